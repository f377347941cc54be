"""Run the jobs of a sweep from the first to the last, and note how each ended."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from regrow.processes.signals import STOPPING, handled
from regrow.sweep import ledger
from regrow.sweep.local import Ended
from regrow.sweep.planning import Planned
from regrow.sweep.show import Show


class JobSource(Protocol):
    """A source of jobs."""

    def next(self) -> Planned | None:
        """Return the next job; None if there is none, or none until others have ended."""

    def ended(self, planned: Planned) -> None: ...


class Executor(Protocol):
    """A place where jobs run."""

    @property
    def running(self) -> list[Planned]: ...
    @property
    def has_room(self) -> bool: ...
    def start(self, planned: Planned) -> bool: ...
    def ended(self, seconds: float) -> list[Ended]: ...
    def send(self, number: int, only: Planned | None = None) -> None: ...


@dataclass
class Queue:
    """The jobs of a finite sweep, in order."""

    jobs: list[Planned]

    def next(self) -> Planned | None:
        return self.jobs.pop(0) if self.jobs else None

    def ended(self, planned: Planned) -> None:
        pass


@dataclass
class Stop:
    """A request to stop, by a signal or, with fail_fast, by a failed job."""

    place: Executor
    signals: list[int] = field(default_factory=list)
    failed: bool = False
    _noted: float = 0.0

    @property
    def wished(self) -> bool:
        return bool(self.signals) or self.failed

    def note(self, number: int, frame: object = None) -> None:
        """Handle a signal: the first lets all jobs save and end, the second kills them.

        As for a run, the same signal within a second counts as the first: see `StopRequest`.
        """
        if self._is_echo(number):
            return
        self._noted = time.monotonic()
        self.signals.append(number)
        self.place.send(signal.SIGTERM if len(self.signals) == 1 else signal.SIGKILL)

    def _is_echo(self, number: int) -> bool:
        return self.signals == [number] and time.monotonic() - self._noted < 1

    @contextlib.contextmanager
    def echoes_ignored(self) -> Iterator[None]:
        """After the last job, ignore what `note` would, and let any other signal end the sweep."""

        def end(number: int, frame: object) -> None:
            if not self._is_echo(number):
                raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

        with handled(STOPPING if self.signals else (), end):
            yield

    def because_one_failed(self) -> None:
        if not self.wished:
            self.failed = True
            self.place.send(signal.SIGTERM)


def run(folder: Path, source: JobSource, place: Executor, show: Show, *, fail_fast: bool) -> Stop:
    """Run all jobs until they end or a stop is requested; return the request."""
    stop = Stop(place)
    with handled(STOPPING, stop.note), show:
        waiting: Planned | None = None
        while True:
            # Ask only once there is room: a search proposes better the more jobs have ended.
            while place.has_room and not stop.wished:
                waiting = waiting or source.next()
                if waiting is None or stop.wished or not place.start(waiting):
                    break
                show.started(waiting)
                if stop.signals:  # the signal may have missed the starting job
                    place.send(signal.SIGTERM, only=waiting)
                waiting = None
            if not place.running and (stop.wished or waiting is None):
                return stop
            for ended in place.ended(0.3):
                its = outcome(folder, ended, stop)
                source.ended(ended.planned)
                show.ended(ended.planned, its)
                if its == "failed" and fail_fast:
                    stop.because_one_failed()
            show.tick(place.running)


def outcome(folder: Path, ended: Ended, stop: Stop) -> str:
    """Return a job's state after its process has ended. Notes a failure its run did not record."""
    entry = ended.planned.entry
    its, reason = ledger.state_of(folder, entry)
    if its in ledger.GOOD:
        return its
    if ended.state == "interrupted" or (stop.wished and its != "failed"):
        return "interrupted"  # in the second case, stopped before it could exit cleanly
    if ledger.noted(folder, entry.number).get("state") != "failed":
        reason = ended.reason or reason or "it ended without an error message"
        ledger.note(folder, entry.number, "failed", reason)
    return "failed"
