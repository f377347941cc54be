"""Signals to the real command at any point: it stops in time, saves, and resumes exactly."""

from __future__ import annotations

import json
import multiprocessing.util
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import Process
from running import TINY, fingerprint, train

from regrow.processes.interrupt import Interrupted, StopRequest
from regrow.processes.signals import NOTHING
from regrow.record.records import load_status

RUN = (
    *(*TINY, "data.normalize=none", "data.source._target_=holding.splits"),
    *("data.eval_batch_size=6", "data.num_workers=2", "model._target_=holding.net"),
    *("model.dropout=0.3", "trainer.ema_decay=0.9", "trainer.accumulation_steps=2"),
    *("trainer.check_first_batch=false", "task.per_class=false", "task.auroc=false"),
)
SMALL, SLOW_TO_SAVE = "+model.ballast=0", "+model.ballast=8_000_000"
LONG = (*RUN, SLOW_TO_SAVE, "trainer.max_epochs=8")  # so that each phase finds steps to be taken
DEADLINE = 20.0  # seconds from the signal to the end of the process, on a busy machine
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def completed(folder: Path, *arguments: str) -> str:
    """Train the run in `folder` to its end in this process, which starts faster."""
    for mark in folder.glob("marks/*"):
        mark.unlink()
    assert train(folder / "run", *arguments)["status"] == "completed"
    return fingerprint(folder / "run")


def interrupted(process: Process, number: signal.Signals) -> None:
    """Check that the process ended in time after this signal, with its last step saved."""
    code, errors = process.end(DEADLINE)
    assert code == 128 + number, errors
    assert f"stopped by {number.name} at step" in errors
    assert "train.py resume=run" in errors and "Traceback" not in errors
    assert NOTHING not in errors
    status = json.loads((process.folder / "run" / "status.json").read_text())
    assert status["state"] == "interrupted"
    newest = (process.folder / "run" / "checkpoints" / "last").resolve().name
    assert newest == f"step_{status['step']:08d}"


def test_a_signal_to_the_whole_group_while_waiting_for_data_changes_nothing(
    tmp_path: Path,
) -> None:
    """As Ctrl-C and most schedulers send it: also to the workers, one of which sleeps."""
    process = Process(tmp_path / "cut", *RUN, SMALL, stays="train_data", seconds=60)
    process.wait_for(process.reached("train_data"))
    os.killpg(process.process.pid, signal.SIGTERM)
    interrupted(process, signal.SIGTERM)
    assert completed(tmp_path / "cut", *RUN, SMALL) == completed(tmp_path / "whole", *RUN, SMALL)


def test_a_signal_while_the_record_is_written_stops_at_the_first_step(tmp_path: Path) -> None:
    process = Process(tmp_path / "cut", *RUN, SMALL, stays="record", seconds=0.3)
    process.wait_for(process.reached("record"))
    assert (tmp_path / "cut" / "run" / "train.log").is_file()  # else nothing was written yet
    process.process.send_signal(signal.SIGTERM)
    interrupted(process, signal.SIGTERM)
    assert json.loads((tmp_path / "cut" / "run" / "status.json").read_text())["step"] == 0
    assert completed(tmp_path / "cut", *RUN, SMALL) == completed(tmp_path / "whole", *RUN, SMALL)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> str:
    return completed(tmp_path_factory.mktemp("whole"), *LONG)


@pytest.mark.slow
@pytest.mark.parametrize(
    "number",
    [SIGNALS[0], *(pytest.param(n, marks=pytest.mark.nightly) for n in SIGNALS[1:])],
    ids=lambda number: number.name,
)
def test_a_run_stopped_in_every_phase_in_turn_ends_the_same(
    number: signal.Signals, tmp_path: Path, whole: str
) -> None:
    phases = ("saving", "training", "evaluation", "train_data", "val_data")
    for index, phase in enumerate(phases):
        stays = "" if phase == "saving" else phase
        process = Process(tmp_path, *LONG, stays=stays, seconds=0.5)
        process.wait_for(process.is_saving if phase == "saving" else process.reached(phase))
        if index % 2:
            os.killpg(process.process.pid, number)
        else:
            process.process.send_signal(number)
        interrupted(process, number)
    assert completed(tmp_path, *LONG) == whole


@pytest.mark.slow
def test_a_second_signal_stops_at_once(tmp_path: Path, whole: str) -> None:
    process = Process(tmp_path, *LONG, stays="training", seconds=60)
    process.wait_for(process.reached("training"))
    process.process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    assert process.process.poll() is None  # it is finishing its step
    process.process.send_signal(signal.SIGINT)
    code, _ = process.end(5.0)
    assert code == 130
    status = load_status(tmp_path / "run")
    assert status is not None and status["state"] == "interrupted"
    assert completed(tmp_path, *LONG) == whole


def test_the_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with StopRequest() as stop:
        assert [signal.getsignal(number) for number in SIGNALS] == [stop._note] * 3
        signal.raise_signal(signal.SIGUSR1)
        assert stop.requested and stop.signal is signal.SIGUSR1
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_signal_that_comes_by_two_ways_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert stop.signal is signal.SIGTERM and not ended
        signal.raise_signal(signal.SIGINT)
        assert ended == [130]
        later = time.monotonic() + 1.5
        monkeypatch.setattr(time, "monotonic", lambda: later)
        signal.raise_signal(signal.SIGTERM)
        assert ended == [130, 143]


def test_a_signal_ends_a_wait_early() -> None:
    with pytest.raises(Interrupted), StopRequest() as stop:
        for _ in stop.while_waiting(iter(lambda: signal.raise_signal(signal.SIGTERM), 1)):
            raise AssertionError("the wait was to be cut short")


def arrives(*_: object) -> None:
    signal.raise_signal(signal.SIGTERM)


def with_destructor() -> object:
    class Dropped:
        def __del__(self) -> None:
            arrives()

    return Dropped()


def with_finalizer() -> object:
    dropped = type("Dropped", (), {})()
    weakref.finalize(dropped, arrives)
    return dropped


def with_finalizer_of_a_process() -> object:
    """As the queues of data workers have."""
    dropped = type("Dropped", (), {})()
    multiprocessing.util.Finalize(dropped, arrives)
    return dropped


@pytest.mark.parametrize("make", [with_destructor, with_finalizer, with_finalizer_of_a_process])
def test_a_signal_within_a_destructor_stops_the_next_wait(make: Callable[[], object]) -> None:
    def items() -> Iterator[int]:
        yield 1
        make()
        yield 2

    seen = []
    with pytest.raises(Interrupted), StopRequest() as stop:
        for item in stop.while_waiting(items()):
            seen.append(item)
    assert seen == [1, 2]  # and no warning of an exception that Python dropped


class SignalledLock:
    """A queue's lock; a signal arrives as soon as it is taken."""

    def __init__(self) -> None:
        self.lock = threading.Lock()

    def __enter__(self) -> None:
        self.lock.acquire()
        signal.raise_signal(signal.SIGTERM)

    def __exit__(self, *error: object) -> None:
        self.lock.release()

    def notify(self) -> None: ...


def test_a_signal_leaves_no_lock_of_a_queue_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    queue: Any = multiprocessing.get_context("spawn").Queue()
    monkeypatch.setattr(queue, "_thread", "none is started")

    def put() -> None:  # the control: of the same name, and not a queue's
        with queue._notempty:
            pass

    for ask, is_taken in ((lambda: queue.put(1), False), (put, True)):
        queue._notempty = SignalledLock()
        with pytest.raises(Interrupted), StopRequest() as stop:
            for _ in stop.while_waiting(ask() or number for number in range(2)):
                pass
        assert queue._notempty.lock.locked() is is_taken
    queue._reader.close()
    queue._writer.close()
