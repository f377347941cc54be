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
from regrow.processes.signals import name_of
from regrow.record import locks
from regrow.record.manifest import cores
from regrow.sweep import gpus, ledger, process
from regrow.sweep.planning import Planned

log = logging.getLogger("regrow")

MOST = 8  # jobs at once with launcher.jobs=auto: each needs its own memory


def gpus_for(trainer: Mapping[str, Any], num_gpus: int) -> int:
    """Return how many of the machine's `num_gpus` GPUs a job takes."""
    if not num_gpus or trainer["device"] not in ("auto", "cuda"):
        return 0
    return num_gpus if trainer["devices"] == "auto" else int(trainer["devices"])


def jobs_at_once(
    asked: int | str | None, trainers: Sequence[Mapping[str, Any]], num_gpus: int
) -> int:
    """Return how many jobs with these `trainer` nodes run at once on a machine's `num_gpus` GPUs.

    Raises UserError for a job that needs more GPUs than there are: it would wait forever.
    """
    needs = [gpus_for(trainer, num_gpus) for trainer in trainers]
    if max(needs, default=0) > num_gpus:
        raise UserError(
            f"trainer.devices={max(needs)}: this machine has {_gpus(num_gpus)} for the job. Use "
            f"trainer.devices={num_gpus}, or trainer.device=cpu."
        )
    if asked is None:
        raise UserError("launcher.jobs=null must be an integer of at least 1, or auto.")
    if asked != "auto":
        return int(asked)
    if any(needs):
        return max(1, num_gpus // max(needs))
    processes = max(processes_of(trainer, num_gpus) for trainer in trainers)
    return min(MOST, max(1, cores() // processes))


def processes_of(trainer: Mapping[str, Any], num_gpus: int) -> int:
    """Return the number of a job's processes: one per GPU, and `auto` is one without GPUs."""
    if trainer["devices"] == "auto":
        return max(1, gpus_for(trainer, num_gpus))
    return int(trainer["devices"])


def threads_of(trainer: Mapping[str, Any], jobs: int, num_gpus: int) -> int:
    """Return a process's share of the cores if `jobs` such jobs run at once."""
    return max(1, cores() // (jobs * processes_of(trainer, num_gpus)))


def _gpus(count: int) -> str:
    return f"{count} GPUs" if count > 1 else f"{count} GPU"


@dataclass(frozen=True)
class Ended:
    """How a job's process ended."""

    planned: Planned
    state: str  # completed, interrupted or failed
    reason: str | None  # set only if the process died without reporting


@dataclass
class Local:
    """The place where jobs run on this machine."""

    folder: Path
    jobs: int
    context: BaseContext
    leases: gpus.Leases
    _running: dict[int, tuple[Planned, BaseProcess, list[str]]] = field(default_factory=dict)
    _wait_began: float | None = None  # when the current wait for GPUs began
    # Which of the two notices were logged in this wait: True: other jobs were running; False: none.
    _told: set[bool] = field(default_factory=set)

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
        self._wait_began = None
        self._told.discard(False)
        ledger.forget(self.folder, planned.number)
        environment = {"CUDA_VISIBLE_DEVICES": ",".join(taken)} if need else {}
        text = planned.job.to_json()
        child = process.start(self.context, self.folder, planned.number, text, environment)
        self._running[planned.number] = (planned, child, taken)
        return True

    def _tell_of_wait(self, planned: Planned, need: int) -> None:
        """Log that a job waits for GPUs.

        Once while other jobs run (they will free GPUs), and once per wait when none runs (somebody
        else holds them).
        """
        now, is_at_work = time.monotonic(), bool(self._running)
        self._wait_began = now if self._wait_began is None else self._wait_began
        if is_at_work in self._told or now - self._wait_began < locks.TELL_SECONDS:
            return
        self._told.add(is_at_work)
        log.warning(
            "job %d waits for %s (trainer.devices): %s",
            *(planned.number, _gpus(need), self.leases.in_use()),
        )

    def ended(self, seconds: float) -> list[Ended]:
        """Wait up to `seconds` for jobs to end, and return those that did.

        Kills what is left of their process groups and gives back their GPUs.
        """
        sentinels = [child.sentinel for _, child, _ in self._running.values()]
        connection.wait(sentinels, timeout=seconds)
        found = []
        for number, (planned, child, taken) in list(self._running.items()):
            if child.is_alive():
                continue
            child.join()
            assert child.pid is not None  # 0 would be this process's own group
            with contextlib.suppress(OSError):  # kill what is left of its process group
                os.killpg(child.pid, signal.SIGKILL)
            self.leases.give_back(taken)
            del self._running[number]
            found.append(how(planned, child.exitcode or 0))
            child.close()
        return found

    def send(self, signum: int, only: Planned | None = None) -> None:
        """Signal each job's main process (or only `only`'s); SIGKILL goes to the whole group."""
        for planned, child, _ in [*self._running.values()]:
            if only is not None and planned.number != only.number:
                continue
            assert child.pid is not None  # 0 would be this process's own group
            with contextlib.suppress(OSError):
                if signum == signal.SIGKILL:
                    os.killpg(child.pid, signum)
                else:
                    os.kill(child.pid, signum)


def how(planned: Planned, code: int) -> Ended:
    """Return how a job ended, by its exit code."""
    if code == 0:
        return Ended(planned, "completed", None)
    if code in STOPPED:
        return Ended(planned, "interrupted", None)
    if code < 0:
        memory = " (out of memory?)" if -code == signal.SIGKILL else ""
        return Ended(planned, "failed", f"its process was killed by {name_of(-code)}{memory}")
    return Ended(planned, "failed", None)
