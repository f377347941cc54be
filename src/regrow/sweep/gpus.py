"""Lease GPUs: each to one job at a time, among all of the user's sweeps on this machine."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from regrow.record import locks


def visible() -> list[str]:
    """Return the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them.

    Imports no torch.
    """
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    try:
        said = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    there = said.stdout.split() if said.returncode == 0 else []
    if named is None or not there:
        return there
    names = [name.strip() for name in named.split(",")]
    return list(itertools.takewhile(lambda name: name and not name.startswith("-"), names))


@dataclass
class Leases:
    """The leased GPUs. The kernel releases a lease when its holder dies."""

    names: Sequence[str]
    folder: Path = field(
        default_factory=lambda: Path(tempfile.gettempdir(), f"regrow-gpus-{os.getuid()}")
    )
    _held: dict[str, int] = field(default_factory=dict)

    def take(self, count: int) -> list[str] | None:
        """Lease `count` free GPUs; return None if there are fewer."""
        if len(self.names) - len(self._held) < count:
            return None
        self.folder.mkdir(mode=0o700, exist_ok=True)
        taken: list[str] = []
        for name in self.names:
            if len(taken) == count:
                break
            if name not in self._held and self._lock(name):
                taken.append(name)
        if len(taken) < count:  # another sweep holds some
            self.give_back(taken)
            return None
        return taken

    def in_use(self) -> str:
        """Return words for who is using each leased GPU."""
        phrases = []
        for name in self.names:
            if name in self._held:
                phrases.append(f"a job of this sweep is using GPU {name}")
            elif self._lock(name):
                self.give_back([name])
            else:
                descriptor = self._open(name)
                phrases.append(f"{locks.in_use_by(descriptor)} GPU {name}")
                os.close(descriptor)
        return ", ".join(phrases)

    def _open(self, name: str) -> int:
        file = self.folder / f"{name.replace('/', '_')}.lock"
        return os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def _lock(self, name: str) -> bool:
        descriptor = self._open(name)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            return False
        self._held[name] = descriptor
        return True

    def give_back(self, names: Sequence[str]) -> None:
        for name in names:
            with contextlib.suppress(KeyError):
                os.close(self._held.pop(name))
