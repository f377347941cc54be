"""A wait for a lock is logged in one line, with what it waits for and who holds it."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from waiting import until

from lab.data import datasets
from regrow.record import locks, ownership
from regrow.runs import trial
from regrow.sweep import gpus, ledger, local


@pytest.fixture(autouse=True)
def heard(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Return the lines of the log."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    monkeypatch.setattr(locks, "TELL_SECONDS", 0.05)
    locks.log.addHandler(handler)
    yield lines
    locks.log.removeHandler(handler)


def journal(folder: Path) -> Any:
    lock = trial.JournalLock(folder / "optuna.log")
    lock.acquire()
    return contextlib.closing(SimpleNamespace(close=lock.release))


USERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "sweep": (ledger.LOCK, ledger.alone),
    "results": (ledger.RESULTS_LOCK, lambda folder: ledger.alone(folder, ledger.RESULTS_LOCK)),
    "ownership": (ownership.LOCK, ownership._alone),
    "download": (".", datasets._alone),
    "search": ("optuna.log", journal),
}


@pytest.mark.parametrize("name", USERS)
def test_a_lock_that_another_holds_is_named_and_then_taken(
    tmp_path: Path, name: str, heard: list[str]
) -> None:
    file, hold = USERS[name]
    done = threading.Event()

    def work() -> None:
        with hold(tmp_path):
            done.set()

    if file != ".":
        (tmp_path / file).touch()
    descriptor = os.open(tmp_path / file, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    until(lambda: heard, 5)
    assert not done.is_set()
    os.close(descriptor)
    worker.join(10)
    assert done.is_set() and len(heard) == 1
    (line,) = heard
    assert line.startswith("waiting for ") and str(tmp_path / file) in line
    assert line.endswith("process is using") or line.endswith(f"process {os.getpid()} is using")


def test_a_lock_that_is_free_or_that_there_is_none_says_nothing(
    tmp_path: Path, heard: list[str]
) -> None:
    with ledger.alone(tmp_path), ledger.alone(tmp_path, ledger.RESULTS_LOCK):
        pass
    read, write = os.pipe()
    os.close(read)
    os.close(write)
    with pytest.raises(OSError, match="Bad file descriptor"):
        locks.wait_for(write, "a closed file")
    assert heard == []


def test_a_sweep_that_waits_for_gpus_says_who_has_them(tmp_path: Path, heard: list[str]) -> None:
    mine, yours = (gpus.Leases(["0", "1"], tmp_path / "locks") for _ in range(2))
    place = local.Local(tmp_path, 2, None, mine)  # type: ignore[arg-type]
    config = {"trainer": {"device": "cuda", "devices": 2}}
    planned: Any = SimpleNamespace(number=7, job=SimpleNamespace(config=config))
    assert yours.take(1) == ["0"]
    for _ in range(2):
        until(lambda: not place.start(planned) and heard, 5)
    assert len(heard) == 1
    holder = f"process {os.getpid()}" if "another" not in heard[0] else "another process"
    assert heard[0] == (f"job 7 waits for 2 GPUs (trainer.devices): {holder} is using GPU 0")
    place._running[3] = (planned, None, mine.take(1))  # type: ignore[assignment,arg-type]
    for _ in range(3):
        assert not place.start(planned)
    assert heard[1].endswith("a job of this sweep is using GPU 1") and len(heard) == 2
    assert mine.take(0) == [] and mine._held.keys() == {"1"}  # looking at the rest took nothing
