"""Tell whether this process runs `scripts/train.py`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from regrow.project import ROOT

# The task function of scripts/train.py, once this process has started it.
_started: list[Callable[..., Any]] = []


def is_train(task: Callable[..., Any]) -> bool:
    """Return True if `task` is that of scripts/train.py, the only script where -m is our sweep."""
    code = getattr(task, "__code__", None)
    return code is not None and Path(code.co_filename).resolve() == ROOT / "scripts" / "train.py"


def note_start(task: Callable[..., Any]) -> None:
    """Note that this process runs `task`, the task function of scripts/train.py."""
    _started.append(task)


def is_started(task: Any = None) -> bool:
    """Return True if this process runs scripts/train.py, with `task` if one is given."""
    return bool(_started) if task is None else any(task is each for each in _started)
