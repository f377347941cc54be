"""The jobs of a sweep, from the first to the last: what is started when, and what is noted."""

from __future__ import annotations

import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from regrow.signals import STOPPING, handled
from regrow.sweep import state
from regrow.sweep.local import Ended
from regrow.sweep.plan import Planned
from regrow.sweep.show import Show


class Source(Protocol):
    """Where jobs come from."""

    def next(self) -> Planned | None:
        """The next job; None where there is none, or none before others have ended."""

    def ended(self, planned: Planned) -> None: ...


class Place(Protocol):
    """Where jobs run."""

    @property
    def running(self) -> list[Planned]: ...
    @property
    def has_room(self) -> bool: ...
    def start(self, planned: Planned) -> bool: ...
    def ended(self, seconds: float) -> list[Ended]: ...
    def send(self, number: int, only: Planned | None = None) -> None: ...


@dataclass
class Queue:
    """The jobs of a finite sweep, in their order."""

    jobs: list[Planned]

    def next(self) -> Planned | None:
        return self.jobs.pop(0) if self.jobs else None

    def ended(self, planned: Planned) -> None:
        pass


@dataclass
class Stop:
    """A wish to stop: by a signal, or by a failed job where one is enough."""

    place: Place
    signals: list[int] = field(default_factory=list)
    failed: bool = False

    @property
    def wished(self) -> bool:
        return bool(self.signals) or self.failed

    def note(self, number: int, frame: object = None) -> None:
        """The first signal lets all jobs save and end, the second ends them."""
        self.signals.append(number)
        self.place.send(signal.SIGTERM if len(self.signals) == 1 else signal.SIGKILL)

    def because_one_failed(self) -> None:
        if not self.wished:
            self.failed = True
            self.place.send(signal.SIGTERM)


def run(folder: Path, source: Source, place: Place, show: Show, *, fail_fast: bool) -> Stop:
    """Run all jobs to their ends, or until a wish to stop, which is returned."""
    stop = Stop(place)
    with handled(STOPPING, stop.note), show:
        waiting: Planned | None = None
        while True:
            # Only once there is room: a search knows more the later it is asked.
            while place.has_room and not stop.wished:
                waiting = waiting or source.next()
                if waiting is None or stop.wished or not place.start(waiting):
                    break
                show.started(waiting)
                if stop.signals:  # came as the job was started, and may have missed it
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
    """A job's state, once its process has ended; noted where its run's folder does not say it."""
    entry = ended.planned.entry
    its, reason = state.state_of(folder, entry)
    if its in state.GOOD or ended.state == "interrupted":
        return its if its in state.GOOD else "interrupted"
    if ended.state == "completed":
        return "completed"
    if stop.wished and its != "failed":  # it had to end before it could do so in good order
        return "interrupted"
    if state.noted(folder, entry.number).get("state") != "failed":
        reason = ended.reason or reason or "it ended without a word"
        state.note(folder, entry.number, "failed", reason)
    return "failed"
