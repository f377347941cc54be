"""Tell whether this process runs `scripts/train.py`, and which folders its start creates."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from regrow.project import ROOT

# The task function of scripts/train.py, once this process has started it.
_started: list[Callable[..., Any]] = []
CHECK = "--check"
_checks: list[str] = []
# The folders that Hydra creates for this process's run, deepest first.
_missing: list[Path] = []


def is_train(task: Callable[..., Any]) -> bool:
    """Return True if `task` is that of scripts/train.py, the only script where -m is our sweep."""
    code = getattr(task, "__code__", None)
    return code is not None and Path(code.co_filename).resolve() == ROOT / "scripts" / "train.py"


def note_start(task: Callable[..., Any]) -> None:
    """Note that this process runs `task`, the task function of scripts/train.py."""
    _started.append(task)


def check_only(arguments: Sequence[str]) -> list[str]:
    """Return the arguments without --check, and note whether it is among them."""
    _checks[:] = [argument for argument in arguments if argument == CHECK]
    return [argument for argument in arguments if argument != CHECK]


def is_check() -> bool:
    """Return True if this process reports what a run would be, without a run."""
    return bool(_checks)


def note_missing(folder: Path) -> None:
    """Note which of a folder and its parents do not exist, before Hydra creates them."""
    folder = folder.absolute()
    _missing[:] = [place for place in (folder, *folder.parents) if not place.exists()]


def remove_created() -> None:
    """Remove the folders that did not exist at `note_missing`, if nothing is in them."""
    with contextlib.suppress(OSError):
        for place in _missing:
            if place.exists():
                place.rmdir()
    _missing.clear()


def is_started(task: Any = None) -> bool:
    """Return True if this process runs scripts/train.py, with `task` if one is given."""
    return bool(_started) if task is None else any(task is each for each in _started)
