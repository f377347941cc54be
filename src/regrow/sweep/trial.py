"""A run as a trial of Optuna's search: it reports each evaluation and hears whether to go on."""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from regrow import locks
from regrow.errors import UserError, did_you_mean
from regrow.record.folder import whole_lines

log = logging.getLogger("regrow")

STORAGE, STUDY = "optuna.log", "sweep"


class JournalLock:
    """The right to append to Optuna's journal; the kernel takes it back when its holder is killed.

    Optuna's own lock is a file, which a killed job leaves behind for 30 seconds.
    """

    def __init__(self, journal: Path) -> None:
        self.journal = journal
        os.close(self._open())
        self._descriptor = -1

    def _open(self) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        return os.open(self.journal, flags, 0o600)  # values may be secrets

    def acquire(self) -> bool:
        descriptor = self._open()
        locks.wait_for(descriptor, f"{self.journal}")
        end = whole_lines(self.journal)  # half a line of a killed job would spoil all after it
        if end < os.fstat(descriptor).st_size:
            os.ftruncate(descriptor, end)
        self._descriptor = descriptor
        return True

    def release(self) -> None:
        os.close(self._descriptor)


def storage_of(folder: Path) -> Any:
    """Optuna's journal in the sweep's folder: a file that several machines may append to."""
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    path = folder / STORAGE
    lock: Any = JournalLock(path)
    return JournalStorage(JournalFileBackend(str(path), lock_obj=lock))


def remove_torn_line(path: Path) -> None:
    """Remove what a killed writer left of its last line: Optuna would append to it, and then read
    neither. Only for the process that holds the sweep's lock, before its jobs begin."""
    if not path.is_file():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        log.warning("%s: removed its last line, which is torn", path)
        os.truncate(path, whole)


def pruner_of(name: str, startup_trials: int, warmup_evaluations: int) -> Any:
    """Optuna's pruner of that name, or None."""
    import optuna

    if name == "median":
        return optuna.pruners.MedianPruner(
            n_startup_trials=startup_trials,
            n_warmup_steps=warmup_evaluations,  # a report's step is its evaluation's number
            n_min_trials=1,
        )
    if name == "hyperband":
        return optuna.pruners.HyperbandPruner(min_resource=1, max_resource="auto")
    return None


class Reporter:
    """Reports the loop's evaluations to the search, from the run's own process on any machine."""

    def __init__(
        self, folder: str, number: int, metrics: list[str], pruner: Mapping[str, Any]
    ) -> None:
        self.folder, self.number, self.metrics = Path(folder), number, metrics
        self.pruner = dict(pruner)
        self._trial: Any = None

    def check(self, measured: Sequence[str]) -> None:
        """Raise UserError for a metric of the search that the run does not measure."""
        for metric in self.metrics:
            if metric.startswith("val/") and metric not in measured:
                hint = did_you_mean(metric, measured)
                whole = ", ".join(name for name in measured if name.count("/") == 1)
                raise UserError(f"sweep.metric={metric} is not measured.{hint} There are {whole}.")

    def is_over(self, step: int, values: Mapping[str, float]) -> bool:
        """Report `values` of an evaluation at `step`; whether the pruner ends the trial here.

        The pruner counts evaluations, so that trials of other batch sizes compare.
        """
        value = values.get(self.metrics[0])
        if self.pruner["name"] == "none" or value is None or not math.isfinite(value):
            return False
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        trial = self._load()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a value that a run reports again after a resume
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
                study_name=STUDY,
                storage=storage_of(self.folder),
                pruner=pruner_of(**self.pruner),
            )
            (frozen,) = [t for t in study.get_trials(deepcopy=False) if t.number == self.number]
            self._trial = optuna.trial.Trial(study, frozen._trial_id)
        return self._trial
