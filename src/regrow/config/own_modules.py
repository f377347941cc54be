"""Modules and resolvers that a project keeps beside `src/`."""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import importlib.util
import sys
import traceback
from pathlib import Path

from regrow.errors import UserError, brief
from regrow.project import ROOT


def import_own_modules() -> None:
    """Make modules in the repository's root importable, and import its `resolvers.py`.

    The root goes last on sys.path, so that it does not shadow installed modules. Raises UserError
    if `resolvers.py` cannot be imported.
    """
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))
    import_resolvers(ROOT)


@functools.cache
def import_resolvers(root: Path) -> None:
    """Import the `resolvers.py` in `root` once, never an installed module of that name."""
    spec = importlib.machinery.PathFinder.find_spec("resolvers", [str(root)])
    if spec is None or spec.loader is None:
        return
    module = importlib.util.module_from_spec(spec)
    before = sys.modules.setdefault("resolvers", module)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        if before is module:
            del sys.modules["resolvers"]
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == spec.origin]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else 1
        raise UserError(
            f"resolvers.py:{line}: {type(error).__name__}: {brief(error)}. It is imported "
            "wherever a config is composed: correct it, or remove it."
        ) from error
