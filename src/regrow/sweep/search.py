"""Run a search: Optuna proposes a job whenever another ends. A trial's number is its job's.

Optuna's study is in the sweep's folder. Its proposals depend only on the sampler's seed and the
trials so far, so a resumed search makes the proposals that the interrupted one would have made.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    check_distribution_compatibility,
    distribution_to_json,
    json_to_distribution,
)
from optuna.trial import TrialState

from regrow.config.command_line import key_of
from regrow.errors import UserError, brief
from regrow.record import monitor, records
from regrow.record.comparison import REPEATS
from regrow.runs import trial
from regrow.sweep import ledger, planning
from regrow.sweep.kinds import Search
from regrow.sweep.planning import Composer, Planned

log = logging.getLogger("regrow")

OF_THE_RUN = ("parameters", "steps", "seconds")  # facts in a summary that are not metrics


@dataclass(frozen=True)
class Space:
    """The keys that a search varies, and the fixed overrides."""

    fixed: list[str]
    varied: dict[str, BaseDistribution]  # by key, as typed

    def overrides(self, values: dict[str, Any]) -> tuple[list[str], list[str]]:
        swept = [f"{key}={values[key]}" for key in self.varied]
        return [*self.fixed, *swept], swept

    def described(self) -> dict[str, str]:
        """Return each key's range, in Optuna's JSON."""
        return {key_of(key): distribution_to_json(its) for key, its in self.varied.items()}

    def combinations(self) -> list[dict[str, Any]]:
        """Return all points. Raises UserError if they are infinite."""
        return [
            dict(zip(self.varied, values, strict=True))
            for values in itertools.product(*(points(k, d) for k, d in self.varied.items()))
        ]


def space_of(composer: Composer, options: Search, arguments: Sequence[str]) -> Space:
    """Return the search space. Raises UserError if nothing is varied."""
    lines = [*planning.lines_of(options.params), *arguments]
    fixed: dict[str, str] = {}
    varied: dict[str, BaseDistribution] = {}
    parser = OverridesParser.create(config_loader=composer.composed.loader)
    for override in parser.parse_overrides(lines):
        key = override.get_key_element()
        fixed.pop(key, None)
        varied.pop(key, None)  # the last one wins
        if override.is_sweep_override():
            varied[key] = distribution_of(override)
        else:
            fixed[key] = str(override.input_line)
    if not varied:
        raise UserError(
            "sweep=optuna: nothing is varied. Give ranges, such as "
            "'optimizer.lr=tag(log,interval(1e-4,1e-1))', or sweep.params."
        )
    return Space([*fixed.values()], varied)


def warning_of(space: Space, options: Search) -> str | None:
    """Return a warning for a search over seeds or folds, of which it prefers the easiest."""
    found = [key for key in map(key_of, space.varied) if key in REPEATS]
    if not found or options.sampler == "grid":
        return None
    return (
        f"{' and '.join(found)}: the search treats each value as another setting, and prefers the "
        f"easiest. Give it one value, such as {found[0]}=0, and then compare the best settings "
        "over several without sweep=optuna"
    )


def refuse_another(folder: Path, space: Space, options: Search) -> None:
    """Raise UserError if the trials in `folder` are of an incompatible search space."""
    before: dict[str, str] = ledger.read(folder).get("space", space.described())
    now = space.described()
    for key in sorted({*before, *now}):
        try:
            if key not in before or key not in now:
                raise ValueError("it is varied in one of the two alone")
            if before[key] != now[key]:
                if options.sampler == "grid":
                    raise ValueError("the points of a grid stay as they are")
                check_distribution_compatibility(
                    *map(json_to_distribution, (before[key], now[key]))
                )
        except ValueError as error:
            raise UserError(
                f"{key}: {folder} holds a search of another space ({error}). "
                "Another search needs another folder."
            ) from None


def keep_sampler(folder: Path, options: Search) -> None:
    """Raise UserError if the search in `folder` began with a different `multivariate`."""
    began = ledger.read(folder).get("multivariate", options.multivariate)
    if options.sampler == "tpe" and began != options.multivariate:
        raise UserError(
            f"sweep.multivariate={str(options.multivariate).lower()}: the search in {folder} "
            f"began with {str(began).lower()}. Give that value, or use another folder."
        )


def distribution_of(override: Override) -> BaseDistribution:
    """Return Hydra's `interval`, `range`, `choice` or list of values as Optuna's distribution.

    Raises UserError for an invalid range.
    """
    value, line = override.value(), override.input_line
    try:
        is_log = "log" in getattr(value, "tags", ())
        if isinstance(value, IntervalSweep):
            if isinstance(value.start, int) and isinstance(value.end, int):
                return IntDistribution(value.start, value.end, log=is_log)
            return FloatDistribution(float(value.start), float(value.end), log=is_log)  # type: ignore[arg-type]
        if isinstance(value, RangeSweep):
            numbers = [*value.range()]
            if not numbers:
                raise ValueError("it holds no value")
            if all(isinstance(number, int) for number in numbers):
                step = abs(int(numbers[1] - numbers[0])) if len(numbers) > 1 else 1
                if step == 1 or not is_log:  # Optuna has no steps on a logarithmic scale
                    return IntDistribution(min(numbers), max(numbers), step=step, log=is_log)
            return CategoricalDistribution([repr(number) for number in numbers])
        assert isinstance(value, ChoiceSweep) or override.is_discrete_sweep()
        return CategoricalDistribution([str(each) for each in override.sweep_string_iterator()])
    except ValueError as error:
        raise UserError(f"{line}: {brief(error)}") from None


def is_of(of: BaseDistribution, value: Any) -> bool:
    """Return True if a choice contains the value, or if a range gets any number.

    The check is needed because values from Optuna's journal become overrides. A range may have
    changed since.
    """
    if isinstance(of, CategoricalDistribution):
        return value in of.choices
    return isinstance(value, int | float)


def points(key: str, of: BaseDistribution) -> list[Any]:
    """Return all values of a distribution. Raises UserError if they are infinite."""
    if isinstance(of, CategoricalDistribution):
        return list(of.choices)
    if isinstance(of, IntDistribution):
        return list(range(of.low, of.high + 1, of.step))
    raise UserError(
        f"{key}: an interval has infinitely many values. sweep.sampler=grid takes a choice."
    )


def first_of(of: BaseDistribution) -> Any:
    """Return one value, for a check of the space."""
    return of.choices[0] if isinstance(of, CategoricalDistribution) else of.low  # type: ignore[attr-defined]


@dataclass
class Trials:
    """The jobs that Optuna proposes: a source for `schedule.run`."""

    composer: Composer
    options: Search
    space: Space
    metrics: list[str]
    prepare: Callable[[Planned], Planned]
    study: Any
    total: int
    _open: list[Planned] = field(default_factory=list)
    _warned: bool = False

    def next(self) -> Planned | None:
        """Return an interrupted trial, or else a new one; None if none is left."""
        if self._open:
            return self._open.pop(0)
        while True:
            trials = self.study.get_trials(deepcopy=False)
            asked = [one for one in trials if one.state != TrialState.WAITING]
            again = sum("retry_of" in one.user_attrs for one in trials)
            failures = sum(one.state == TrialState.FAIL for one in trials) - again
            if failures >= self.options.max_failures:
                if not self._warned:
                    log.warning(
                        "%d trials failed: the search ends here. sweep.max_failures=%d",
                        *(failures, self.options.max_failures),
                    )
                self._warned = True
                return None
            if len(asked) >= self.total + again:
                return None
            if len(asked) == len(trials):
                self.study.add_trial(self._proposal(trials, len(asked)))
            asked_for = self.study.ask(self.space.varied)
            if (planned := self._planned(asked_for.number, asked_for.params)) is not None:
                return planned

    def _proposal(self, trials: Sequence[Any], number: int) -> Any:
        """Return the next trial, to be added to the study in one write.

        Asks a copy of the study in memory. Optuna writes a trial parameter by parameter, so a
        killed process would leave an incomplete trial. `system_attrs` are the sampler's notes, such
        as the trial's generation, without which NSGA-II would draw every trial at random.
        """
        notes: dict[str, Any] = {}
        if self.options.sampler == "grid":
            combinations = self.space.combinations()
            params = combinations[number - sum("retry_of" in one.user_attrs for one in trials)]
        else:
            copy = optuna.create_study(
                directions=self.study.directions, sampler=sampler_of(self.options, number)
            )
            copy.add_trials(trials)
            params = copy.ask(self.space.varied).params
            notes = copy.get_trials(deepcopy=False)[-1].system_attrs
        return optuna.trial.create_trial(  # as `enqueue_trial` does, which takes no notes
            state=TrialState.WAITING, system_attrs={**notes, "fixed_params": params}
        )

    def take_up(self) -> None:
        """Take over an earlier start's trials: report those that have ended, resume the others."""
        for one in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            whole = optuna.trial.Trial(self.study, one._trial_id)
            for key, its in self.space.varied.items():
                whole._suggest(key, its)  # fetch enqueued values that were not written yet
            planned = self._planned(one.number, whole.params)
            if planned is None:
                continue
            its_state, _ = ledger.state_of(self.composer.folder, planned.entry)
            if its_state in ledger.ENDED:
                self.ended(planned)
            else:
                self._open.append(planned)
        if self.options.retry_failed:
            self._retry()
        for one in self.study.get_trials(deepcopy=False):  # also if an earlier start ended here
            if (failed := one.user_attrs.get("retry_of")) is not None:
                reason = f"tried again as job {one.number}"
                ledger.note(self.composer.folder, failed, "retried", reason)

    def _retry(self) -> None:
        """Enqueue failed trials as new ones: Optuna accepts only one result per trial."""
        trials = self.study.get_trials(deepcopy=False)
        retried = {one.user_attrs.get("retry_of") for one in trials}
        for one in trials:
            if one.state == TrialState.FAIL and one.number not in retried:
                self.study.enqueue_trial(one.params, user_attrs={"retry_of": one.number})

    def _planned(self, number: int, params: dict[str, Any]) -> Planned | None:
        """Return the trial as a job; if its config is invalid, record a failure and return None."""
        folder = self.composer.folder
        try:
            if set(params) != set(self.space.varied) or not all(
                is_of(self.space.varied[key], value) for key, value in params.items()
            ):
                raise UserError("it was proposed for another search space")
            planned = self.prepare(self.composer.plan(number, *self.space.overrides(params)))
            taken = {one.folder: one.number for one in ledger.entries(folder)}
            planning.refuse_shared(planned.entry, taken)
        except UserError as error:
            swept = {key.lstrip("+"): str(value) for key, value in params.items()}
            entry = ledger.JobEntry(number, "", swept, str(number))
            ledger.add(folder, entry)
            ledger.note(folder, number, "failed", str(error))
            log.warning("trial %d failed: %s", number, error)
            self.study.tell(number, state=TrialState.FAIL)
            return None
        ledger.add(folder, planned.entry)
        pruner = {
            "name": self.options.pruner,
            "startup_trials": self.options.pruner_startup_trials,
            "warmup_evaluations": self.options.pruner_warmup_evaluations,
        }
        told = {"folder": str(folder.absolute()), "number": number}
        told |= {"metrics": self.metrics, "pruner": pruner}
        return dataclasses.replace(planned, job=planned.job.of_trial(told))

    def ended(self, planned: Planned) -> None:
        """Tell Optuna the result of a trial; an interrupted trial stays open."""
        its, _ = ledger.state_of(self.composer.folder, planned.entry)
        if its == "pruned":
            self.study.tell(planned.number, state=TrialState.PRUNED)
        elif its == "completed":
            values = values_of(self.composer.folder / planned.entry.folder, self.metrics)
            failed = any(value is None or not math.isfinite(value) for value in values)
            how = TrialState.FAIL if failed else TrialState.COMPLETE
            self.study.tell(planned.number, None if failed else values, state=how)
        elif its == "failed":
            self.study.tell(planned.number, state=TrialState.FAIL)


def values_of(run: Path, metrics: Sequence[str]) -> list[float | None]:
    """Return a completed run's value of each metric; None for one that it lacks.

    A value is the best monitored one, another metric measured at that step, or a fact of the run.
    Raises UserError if the summary cannot be read.
    """
    summary = records.load_summary(run)
    if not summary:
        raise UserError(
            f"{run / records.SUMMARY} cannot be read. Resume that run to write it again."
        )
    found: list[float | None] = []
    for metric in metrics:
        if metric == summary["best"]["metric"]:
            found.append(summary["best"]["value"])
        else:
            values = records.sets_of(summary).get(metric.partition("/")[0], summary)
            found.append(values.get(metric))
    return found


def objectives(options: Search, config: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Return the metrics and the directions of a search, for jobs with such a `config`.

    Raises UserError if they do not fit the jobs, each other or the pruner.
    """
    trainer = config["trainer"]
    has_val = not monitor.lacks_val(config["data"]["source"])
    named = options.metric if options.metric is not None else trainer["monitor"]
    if named is None or (options.metric is None and not has_val):
        why = "trainer.monitor=null" if has_val else "the data has no validation split"
        raise UserError(
            f"sweep.metric=null: {why}, so nothing says what to search for. Name one of "
            f"{', '.join(OF_THE_RUN)}, or give the data a validation split."
        )
    metrics = [named] if isinstance(named, str) else list(named)
    for metric in metrics:
        if metric not in OF_THE_RUN:
            others = f", or one of {', '.join(OF_THE_RUN)}"
            monitor.refuse_unmeasured("sweep.metric", metric, config["data"], others)
        if metric.startswith("val/") and not has_val:
            raise UserError(
                f"sweep.metric={metric}: the data has no validation split. Give it one, or use one "
                f"of {', '.join(OF_THE_RUN)}."
            )
    if options.direction is None:
        directions = [_direction_of(metric, config) for metric in metrics]
    else:
        said = options.direction
        directions = [said] if isinstance(said, str) else list(said)
        for metric, direction in zip(metrics, directions, strict=False):
            if odd := monitor.contradiction(metric, direction.removesuffix("imize")):
                log.warning("sweep.direction=%s: %s", direction, odd)
    if len(directions) != len(metrics):
        raise UserError(
            f"sweep.direction has {len(directions)} and sweep.metric {len(metrics)} values. "
            "Give as many."
        )
    if len(metrics) > 1 and options.pruner != "none":
        raise UserError(
            f"sweep.pruner={options.pruner}: Optuna prunes by one metric. Use sweep.pruner=none."
        )
    if options.pruner != "none" and metrics[0] in OF_THE_RUN:
        raise UserError(
            f"sweep.pruner={options.pruner}: sweep.metric={metrics[0]} is known at the end only."
        )
    return metrics, directions


def _direction_of(metric: str, config: Mapping[str, Any]) -> str:
    """Return maximize or minimize. Raises UserError if the direction is unknown."""
    if metric in OF_THE_RUN:
        return "minimize"
    is_monitored = metric == config["trainer"]["monitor"]
    mode = monitor.of_run(config) if is_monitored else monitor.by_name(metric)
    if mode is None:
        raise UserError(
            f"sweep.metric={metric}: say whether more is better: sweep.direction=maximize."
        )
    return f"{mode}imize"


def sampler_of(options: Search, trials: int) -> Any:
    """Return Optuna's sampler for the next trial.

    The seed depends on the number of `trials` so far: otherwise a resumed search would propose the
    same points again.
    """
    seed = (options.seed * 1_000_003 + trials) % 2**32
    if options.sampler == "tpe":
        with warnings.catch_warnings():  # Optuna 4 calls both options experimental
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return optuna.samplers.TPESampler(
                seed=seed, multivariate=options.multivariate, constant_liar=True
            )
    if options.sampler == "nsgaii":
        return optuna.samplers.NSGAIISampler(seed=seed)
    return optuna.samplers.RandomSampler(seed=seed)  # a grid only enqueues, never asks


def open_study(folder: Path, directions: Sequence[str]) -> Any:
    """Create or open the study in the sweep's folder. Raises UserError for other directions."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(
        storage=trial.open_storage(folder),
        study_name=trial.STUDY,
        directions=list(directions),  # type: ignore[arg-type]
        load_if_exists=True,
    )
    before = [direction.name.lower() for direction in study.directions]
    if before != list(directions):
        raise UserError(
            f"sweep.direction: the search in {folder} has {before}, and {list(directions)} was "
            "asked for. Use another folder."
        )
    return study


def representative(composer: Composer, space: Space) -> Planned:
    """Return one job of the search, checked before anything is written. Raises UserError."""
    values = {key: first_of(its) for key, its in space.varied.items()}
    for key in values:
        if planning.is_of_the_sweep(key):
            raise UserError(f"{key} is the sweep's own, and takes one value.")
    return composer.plan(0, *space.overrides(values))
