"""A run as a trial of Optuna's search: report each evaluation, and end if the pruner says so."""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from regrow.errors import UserError, did_you_mean
from regrow.record import locks
from regrow.record.records import whole_lines

log = logging.getLogger("regrow")

STORAGE, STUDY = "optuna.log", "sweep"


class JournalLock:
    """The lock of Optuna's journal, which the kernel releases if its holder is killed.

    Optuna's own lock is a file: a killed job would block all others for 30 seconds.
    """

    def __init__(self, journal: Path) -> None:
        self.journal = journal
        os.close(self._open())
        self._descriptor = -1

    def _open(self) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        return os.open(self.journal, flags, 0o600)  # values may hold secrets

    def acquire(self) -> bool:
        descriptor = self._open()
        locks.wait_for(descriptor, f"{self.journal}")
        end = whole_lines(self.journal)  # a killed job's partial line would break the next
        if end < os.fstat(descriptor).st_size:
            os.ftruncate(descriptor, end)
        self._descriptor = descriptor
        return True

    def release(self) -> None:
        os.close(self._descriptor)


def open_storage(folder: Path) -> Any:
    """Open Optuna's journal in the sweep's folder, to which several machines may append."""
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    path = folder / STORAGE
    lock: Any = JournalLock(path)
    return JournalStorage(JournalFileBackend(str(path), lock_obj=lock))


def pruner_of(name: str, startup_trials: int, warmup_evaluations: int) -> Any:
    """Return Optuna's pruner of that name, or None."""
    import optuna

    if name == "median":
        return optuna.pruners.MedianPruner(
            n_startup_trials=startup_trials,
            n_warmup_steps=warmup_evaluations,  # a report's step is the evaluation's number
            n_min_trials=1,
        )
    if name == "hyperband":
        return optuna.pruners.HyperbandPruner(min_resource=1, max_resource="auto")
    return None


class Reporter:
    """Reports a run's evaluations to the search, from the run's process on any machine."""

    def __init__(
        self, folder: str, number: int, metrics: list[str], pruner: Mapping[str, Any]
    ) -> None:
        self.folder, self.number, self.metrics = Path(folder), number, metrics
        self.pruner = dict(pruner)
        self._trial: Any = None

    def check(self, measured: Sequence[str]) -> None:
        """Raise UserError for a metric of the search that the run does not measure."""
        for metric in self.metrics:
            if "/" in metric and metric not in measured:
                hint = did_you_mean(metric, measured)
                whole = ", ".join(name for name in measured if name.count("/") == 1)
                raise UserError(f"sweep.metric={metric} is not measured.{hint} There are {whole}.")

    def report(self, step: int, values: Mapping[str, float]) -> bool:
        """Report `values` of an evaluation at `step`; return True if the pruner ends the trial.

        The pruner counts evaluations, not steps, so that trials with different batch sizes compare.
        """
        value = values.get(self.metrics[0])
        if self.pruner["name"] == "none" or value is None or not math.isfinite(value):
            return False
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        trial = self._load()
        with warnings.catch_warnings(action="ignore"):  # a resumed run may report a value again
            reported = trial.user_attrs.get("evaluations", {})
            number = reported.setdefault(str(step), len(reported) + 1)
            trial.set_user_attr("evaluations", reported)
            trial.report(value, number)
            over = bool(trial.should_prune())
        if over:
            log.info("pruned at step %d: other trials were better by then", step)
        return over

    def _load(self) -> Any:
        if self._trial is None:
            import optuna

            study = optuna.load_study(
                study_name=STUDY, storage=open_storage(self.folder), pruner=pruner_of(**self.pruner)
            )
            (frozen,) = [t for t in study.get_trials(deepcopy=False) if t.number == self.number]
            self._trial = optuna.trial.Trial(study, frozen._trial_id)
        return self._trial
