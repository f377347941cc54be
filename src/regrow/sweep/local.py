"""Run jobs on this machine: how many at once, with which GPUs and threads, and how each ended."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import connection
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from regrow.errors import UserError
from regrow.processes.ranks import STOPPED
from regrow.record import locks
from regrow.record.manifest import cores
from regrow.sweep import gpus, ledger, process
from regrow.sweep.planning import Planned

log = logging.getLogger("regrow")

MOST = 8  # jobs at once with launcher.jobs=auto: each needs its own memory


def gpus_for(trainer: Mapping[str, Any], there: int) -> int:
    """Return how many of the machine's GPUs a job takes; `there` is their number."""
    if not there or trainer["device"] not in ("auto", "cuda"):
        return 0
    return there if trainer["devices"] == "auto" else int(trainer["devices"])


def jobs_at_once(asked: int | str | None, trainers: Sequence[Mapping[str, Any]], there: int) -> int:
    """Return how many jobs with these `trainer` nodes run at once; `there` is the number of GPUs.

    Raises UserError for a job that needs more GPUs than there are: it would wait forever.
    """
    needs = [gpus_for(trainer, there) for trainer in trainers]
    if max(needs, default=0) > there:
        raise UserError(
            f"trainer.devices={max(needs)}: this machine has {there} GPU{'s'[: there > 1]} for the "
            f"job. Use trainer.devices={there}, or trainer.device=cpu."
        )
    if asked is None:
        raise UserError("launcher.jobs=null must be an integer of at least 1, or auto.")
    if asked != "auto":
        return int(asked)
    if any(needs):
        return max(1, there // max(needs))
    processes = max(1 if t["devices"] == "auto" else int(t["devices"]) for t in trainers)
    return min(MOST, max(1, cores() // processes))


def threads_of(trainer: Mapping[str, Any], jobs: int) -> int:
    """Return a process's share of the cores if `jobs` such jobs run at once."""
    processes = 1 if trainer["devices"] == "auto" else int(trainer["devices"])
    return max(1, cores() // (jobs * processes))


@dataclass(frozen=True)
class Ended:
    """How a job's process ended."""

    planned: Planned
    state: str  # completed, interrupted or failed
    reason: str | None  # of a failure that the process could not report itself


@dataclass
class Local:
    """The place where jobs run on this machine."""

    folder: Path
    jobs: int
    context: BaseContext
    leases: gpus.Leases
    _running: dict[int, tuple[Planned, BaseProcess, list[str]]] = field(default_factory=dict)
    _waits_since: float | None = None  # for GPUs
    _told: set[bool] = field(default_factory=set)  # waits announced: True while jobs run

    @property
    def running(self) -> list[Planned]:
        return [planned for planned, _, _ in self._running.values()]

    @property
    def has_room(self) -> bool:
        return len(self._running) < self.jobs

    def start(self, planned: Planned) -> bool:
        """Start the job and return True, or return False if its GPUs are not free."""
        need = gpus_for(planned.job.config["trainer"], len(self.leases.names))
        taken = self.leases.take(need)
        if taken is None:
            self._tell_of_wait(planned, need)
            return False
        self._waits_since = None
        self._told.discard(False)
        ledger.forget(self.folder, planned.number)
        environment = {"CUDA_VISIBLE_DEVICES": ",".join(taken)} if need else {}
        text = planned.job.to_json()
        child = process.start(self.context, self.folder, planned.number, text, environment)
        self._running[planned.number] = (planned, child, taken)
        return True

    def _tell_of_wait(self, planned: Planned, need: int) -> None:
        """Log that a job waits for GPUs: once while other jobs run, each time while none runs.

        With more jobs at once than GPUs, each job waits for earlier ones.
        """
        now, is_at_work = time.monotonic(), bool(self._running)
        self._waits_since = now if self._waits_since is None else self._waits_since
        if is_at_work in self._told or now - self._waits_since < locks.TELL_SECONDS:
            return
        self._told.add(is_at_work)
        log.warning(
            "job %d waits for %d GPU%s (trainer.devices): %s",
            *(planned.number, need, "s"[: need > 1], self.leases.in_use()),
        )

    def ended(self, seconds: float) -> list[Ended]:
        """Wait up to `seconds` for jobs to end, and return those that did."""
        sentinels = [child.sentinel for _, child, _ in self._running.values()]
        connection.wait(sentinels, timeout=seconds)
        found = []
        for number, (planned, child, taken) in list(self._running.items()):
            if child.is_alive():
                continue
            child.join()
            with contextlib.suppress(OSError):  # end what it may have left, such as data workers
                os.killpg(child.pid or 0, signal.SIGKILL)
            self.leases.give_back(taken)
            del self._running[number]
            found.append(how(planned, child.exitcode or 0))
            child.close()
        return found

    def send(self, number: int, only: Planned | None = None) -> None:
        """Send a signal to the main process of each job, or of one; SIGKILL to all processes."""
        for planned, child, _ in [*self._running.values()]:
            if only is not None and planned.number != only.number:
                continue
            with contextlib.suppress(OSError):
                if number == signal.SIGKILL:
                    os.killpg(child.pid or 0, number)
                else:
                    os.kill(child.pid or 0, number)


def how(planned: Planned, code: int) -> Ended:
    """Return how a job ended, by its exit code."""
    if code == 0:
        return Ended(planned, "completed", None)
    if code in STOPPED:
        return Ended(planned, "interrupted", None)
    if code < 0:
        name = signal.Signals(-code).name
        memory = " (out of memory?)" if -code == signal.SIGKILL else ""
        return Ended(planned, "failed", f"its process was killed by {name}{memory}")
    return Ended(planned, "failed", None)
