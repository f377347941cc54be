"""The real command in its own process, to be stopped or killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import forked

from regrow.project import CONF

TRAIN = CONF.parent / "scripts" / "train.py"


class Process:
    """The command in a folder, in its own process group, with places to pause."""

    def __init__(self, folder: Path, *arguments: str, stays: str = "", seconds: float = 1) -> None:
        self.folder, self.marks = folder, folder / "marks"
        self.marks.mkdir(parents=True, exist_ok=True)
        for mark in self.marks.iterdir():
            mark.unlink()
        if stays:
            (self.marks / stays).write_text(str(seconds))
        paths = forked.python_path(CONF.parent / "src", Path(__file__).parent)
        self.process = forked.popen(
            [sys.executable, str(TRAIN), "hydra.run.dir=run", *arguments],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": paths},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def wait_for(self, reached: Callable[[], object]) -> None:
        deadline = time.monotonic() + 120
        while not reached():
            assert self.process.poll() is None, self.end()[1]
            assert time.monotonic() < deadline
            time.sleep(0.002)

    def reached(self, place: str) -> Callable[[], bool]:
        return (self.marks / f"{place}.reached").exists

    def is_saving(self) -> bool:
        return any((self.folder / "run" / "checkpoints").glob(".tmp-step_*/*.pt"))

    def end(self, deadline: float = 120) -> tuple[int, str]:
        try:
            _, errors = self.process.communicate(timeout=deadline)
        finally:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.returncode, errors
