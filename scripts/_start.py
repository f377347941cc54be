"""Find this checkout's package and what it needs: every script imports this module first.

It runs in any Python: one that is too old, or lacks the packages, gets the line that says so.
"""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

if sys.version_info < (3, 11) or not all(find_spec(name) for name in ("hydra", "torch", "yaml")):
    print(
        f"error: {sys.executable} lacks what requirements.txt asks for. "
        f"Run `make setup` in {ROOT}, then `source .venv/bin/activate`.",
        file=sys.stderr,
    )
    sys.exit(2)

# Use UTF-8 for paths and files whatever the locale; only the terminal keeps the locale's encoding.
# Python reads this setting at startup, so it must restart.
_script = getattr(sys.modules["__main__"], "__file__", None)
if (
    not sys.flags.utf8_mode
    and sys.getfilesystemencoding() != "utf-8"
    and os.environ.get("PYTHONUTF8") != "1"
    and _script is not None
    and Path(_script).resolve().parent == ROOT / "scripts"
):
    _encoding = getattr(sys.stdout, "encoding", None) or "ascii"
    _kept = {"PYTHONIOENCODING": _encoding, **os.environ, "PYTHONUTF8": "1"}
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], _kept)

from regrow.processes import begin  # noqa: E402  only for a Python that is new enough

begin.main()
