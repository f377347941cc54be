"""A sweep's jobs on Slurm: submit them, and for a search wait for them one by one."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from regrow.config.job import Job
from regrow.errors import MachineFault
from regrow.processes import slurm
from regrow.sweep import ledger
from regrow.sweep.local import Ended
from regrow.sweep.planning import Planned

EVERY = 5.0  # seconds between two queries to Slurm
AT_ONCE = 4  # trials of a search, unless launcher.jobs says otherwise


def queued(folder: Path, numbers: Sequence[int]) -> set[int]:
    """Return those of a sweep's jobs that are queued or running on Slurm."""
    names = {n: str(name) for n in numbers if (name := ledger.noted(folder, n).get("slurm"))}
    there = slurm.waiting_or_running([*names.values()])
    return {number for number, name in names.items() if name in there}


def submit(
    folder: Path, jobs: Mapping[int, Job], options: slurm.SlurmOptions, name: str
) -> dict[int, str]:
    """Submit the jobs to Slurm; note and return its job number of each."""
    for number in jobs:
        ledger.forget(folder, number)
    given = slurm.submit_array(jobs, options, folder, name)
    for number, its in given.items():
        said = ledger.noted(folder, number)  # the job may have ended by now
        ledger.note(folder, number, said.get("state", "queued"), said.get("reason"), slurm=its)
    return given


@dataclass
class Cluster:
    """The place where a search's jobs run on Slurm, submitted one by one."""

    folder: Path
    options: slurm.SlurmOptions
    _running: dict[int, Planned] = field(default_factory=dict)
    _asked: float = 0.0

    @property
    def at_once(self) -> int:
        return int(self.options.jobs or AT_ONCE)

    @property
    def running(self) -> list[Planned]:
        return [*self._running.values()]

    @property
    def has_room(self) -> bool:
        return len(self._running) < self.at_once

    def start(self, planned: Planned) -> bool:
        """Submit the job, unless Slurm has it already."""
        if not queued(self.folder, [planned.number]):
            name = str(planned.job.config["name"])
            submit(self.folder, {planned.number: planned.job}, self.options, name)
        self._running[planned.number] = planned
        return True

    def ended(self, seconds: float) -> list[Ended]:
        time.sleep(seconds)
        if time.monotonic() - self._asked < EVERY:
            return []
        self._asked = time.monotonic()
        try:
            there = queued(self.folder, [*self._running])
        except MachineFault:  # Slurm's controller may be unavailable for a while
            return []
        found = []
        for number in set(self._running) - there:
            planned = self._running.pop(number)
            its, reason = ledger.state_of(self.folder, planned.entry)
            if its not in ledger.ENDED:
                its, reason = "failed", reason or "Slurm no longer has it"
            found.append(Ended(planned, its, reason))
        return found

    def send(self, number: int, only: Planned | None = None) -> None:
        """Send no signal: Slurm's jobs continue, and a resumed search waits for them."""
        self._running.clear()
