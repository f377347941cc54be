"""All names of files that a run, a sweep or a script writes in its folder. Others are the user's.

`hydra.run.dir=…` may name any folder, and a run replaces files and cleans up after a kill. So it
accepts a folder only if it is empty or holds a run's files, and deletes a temporary file only if
its name is exactly one that a run writes.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
from pathlib import Path
from typing import Any

from regrow.errors import UserError

# Every run has the first of these from its start until it is deleted.
LOCK = ".lock"
RUN = (
    *(LOCK, ".hydra", "config.yaml", "preprocessing.json", "manifest.json", "status.json"),
    *("metrics.jsonl", "summary.json", "train.log", "checkpoints", "plots", "profile"),
    *("report.html", "weights.pt", "metrics.csv", "tensorboard", "wandb", "wandb.json", "slurm"),
    *("lr_finder.csv", "lr_finder.json", "lr_finder.png", "mlflow.json", "images"),
)
RUN_PATTERNS = (
    *(r"git(\.\d+)?\.diff", r"evaluation_[\w-]+(\.\d+)?\.json", r"predictions_[\w-]+\.csv"),
)
# `.code` is the frozen code during the copy. A folder with sweep.json permanently belongs to a
# sweep.
SWEEP_START = (LOCK, ".state.lock", ".results.lock", ".code", "code")
SWEEP = (
    *SWEEP_START,
    *("sweep.json", "results.csv", "sweep.html", "jobs", "logs", "slurm", "optuna.log"),
    "predictions_out_of_fold.csv",
)
# The folders among these names.
FOLDERS = (
    *(".hydra", "checkpoints", "plots", "profile", "tensorboard", "wandb", "slurm", "images"),
    *("code", ".code", "jobs", "logs"),
)


def is_of_a_run(name: str) -> bool:
    """Return True if a run, or a script for it, writes a file or folder of this name."""
    return (
        name in RUN
        or any(re.fullmatch(pattern, name) for pattern in RUN_PATTERNS)
        or is_temporary(name)
    )


def is_of_a_sweeps_start(name: str) -> bool:
    return name in SWEEP_START or is_temporary(name)


def is_temporary(name: str) -> bool:
    """Return True if this names a file being written, or left by a writer that died."""
    if name == ".weights.pt.tmp":
        return True
    found = re.fullmatch(r"\.(.+)\.\d+\.tmp", name)
    return found is not None and (found[1] in SWEEP or is_of_a_run(found[1]))


def refuse_foreign_run(folder: Path) -> None:
    """Raise UserError if `folder` holds something that no run wrote. Writes nothing.

    If it holds a run's manifest, other names are the user's notes and are allowed.
    """
    content = _json(folder / "manifest.json")
    is_ours = isinstance(content, dict) and {"code_sha256", "seeds"} <= content.keys()
    is_damaged = not isinstance(content, dict) and all(
        (folder / name).is_file() for name in (LOCK, "config.yaml", "status.json", "manifest.json")
    )
    _refuse(folder, "hydra.run.dir", is_of_a_run, is_ours or is_damaged, "run")


def refuse_foreign_sweep(folder: Path) -> None:
    """Raise UserError if `folder` holds something that no sweep wrote. Writes nothing."""
    content = _json(folder / "sweep.json")
    is_ours = isinstance(content, dict) and {"jobs", "overrides"} <= content.keys()
    _refuse(folder, "hydra.sweep.dir", is_of_a_sweeps_start, is_ours, "sweep")


def _refuse(folder: Path, key: str, is_own: Any, is_ours: bool, what: str) -> None:
    if not folder.is_dir():
        return
    found = sorted(os.scandir(folder), key=lambda entry: entry.name)
    for entry in found:
        try:
            mode = entry.stat(follow_symlinks=False).st_mode
        except FileNotFoundError:  # a temporary file of the run that is writing here
            continue
        fits = stat.S_ISREG(mode) or stat.S_ISDIR(mode) or (is_ours and entry.is_dir())
        if stat.S_ISDIR(mode) and entry.name not in FOLDERS:
            fits = False
        if (is_own(entry.name) or entry.name in SWEEP) and not fits:
            kind = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
            kind = "a link" if stat.S_ISLNK(mode) else kind
            raise UserError(
                f"{key}={folder}: {entry.name} in it is {kind}, and a {what} writes only files of "
                "its own. Move it away, or choose another folder."
            )
    if is_ours:
        return
    foreign = [entry.name for entry in found if not is_own(entry.name)]
    if found and not foreign and all(entry.name != LOCK for entry in found):
        foreign = [entry.name for entry in found]  # only the names match a run's
    if foreign:
        raise UserError(
            f"{key}={folder} holds {foreign[0]}, which no {what} of this repository wrote. "
            "Choose another folder."
        )


def _json(path: Path) -> Any:
    with contextlib.suppress(OSError, ValueError, RecursionError):
        return json.loads(path.read_text(encoding="utf-8"))
    return None
