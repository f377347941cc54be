"""How much of a metric each parameter explains: Optuna's functional ANOVA, or main effects."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from regrow.record.comparison import REPEATS, Comparison, Row

if TYPE_CHECKING:
    from optuna import Study

FEWEST_RUNS = 10  # to fit trees to: with fewer, the trees' shares depend on the random draws


@dataclass(frozen=True)
class Importance:
    """How much of a metric each parameter explains, as shares of one; or why that is unknown."""

    shares: Mapping[str, float]
    note: str
    rest: str = ""  # the entry that is not a parameter


def of_study(
    study: Study, count: int, target: Callable[[Any], float] | None = None
) -> dict[str, float]:
    """Return Optuna's importances by parameter, over `count` complete trials. They sum to one."""
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    # 64 trees over 1,000 trials took 29 s. The seed is that of the trees: a page repeats.
    trees = max(8, min(64, 6400 // max(1, count)))
    evaluator = FanovaImportanceEvaluator(n_trees=trees, seed=0)
    return get_param_importances(study, evaluator=evaluator, target=target)


def of_table(comparison: Comparison, short: Mapping[str, str]) -> Importance:
    """Return Optuna's importances of a grid's parameters: each finished run is a trial.

    Each level of a parameter counts as much as any other. Seeds and folds are repetitions.
    Returns main effects, with a note, if there are few runs or Optuna fails.
    """
    done, keys, values = _trials(comparison)
    if len({*values}) < 2:
        return Importance({}, f"Not computed: {comparison.metric} does not vary.")
    try:
        if len(done) >= FEWEST_RUNS:
            shares = of_study(_study(done, keys, values), len(done))
            note = (
                f"Share of the variance of {comparison.metric} that each parameter explains: "
                f"Optuna's functional ANOVA over {len(done)} runs. It is rough below about a "
                "hundred."
            )
            return Importance({short.get(key, key): share for key, share in shares.items()}, note)
        why = f"Optuna's importances need {FEWEST_RUNS} runs."
    except Exception as error:  # an unsupported version of Optuna, say; the runs are done
        why = f"Optuna's failed: {' '.join(str(error).split()) or repr(error)}"
    found = effects(comparison, short)
    return replace(found, note=f"{found.note} {why}")


def _trials(comparison: Comparison) -> tuple[list[Row], list[str], list[float]]:
    """Return the finished runs, the keys of their parameters, and each run's value."""
    done = comparison.counted
    keys = [k for k in dict.fromkeys(k for row in done for k in row.swept) if k not in REPEATS]
    return done, keys, [comparison.values[row.job] for row in done]


def _study(done: Sequence[Row], keys: Sequence[str], values: Sequence[float]) -> Study:
    """Return a study in memory, with a trial for each run, whose values are ranks of levels."""
    import optuna
    from optuna.distributions import IntDistribution

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    settings = [dict(row.setting) for row in done]
    levels = {key: _ranked({its.get(key, "") for its in settings}) for key in keys}
    distributions: dict[str, Any] = {
        key: IntDistribution(0, len(its) - 1) for key, its in levels.items()
    }
    study.add_trials(
        [
            optuna.create_trial(
                params={key: its[setting.get(key, "")] for key, its in levels.items()},
                distributions=distributions,
                value=value,
            )
            for setting, value in zip(settings, values, strict=True)
        ]
    )
    return study


def _ranked(levels: Collection[str]) -> dict[str, int]:
    """Return the rank of each level, by its number if all are numbers."""
    try:
        ordered = sorted(levels, key=float)
    except ValueError:
        ordered = sorted(levels)
    return {level: rank for rank, level in enumerate(ordered)}


def effects(comparison: Comparison, short: Mapping[str, str]) -> Importance:
    """Return the main effects of a grid: the share of the variance between a parameter's means.

    Only if each combination ran equally often: else the parameters' shares overlap.
    """
    done, keys, values = _trials(comparison)
    metric = comparison.metric
    settings = [dict(row.setting) for row in done]  # in which 1e-3 and 0.001 are one level
    levels = {key: [it.get(key, "") for it in settings] for key in keys}
    counts = Counter(zip(*levels.values(), strict=True))
    num_whole = math.prod(len({*its}) for its in levels.values())
    mean = statistics.fmean(values) if values else 0.0
    total = sum((value - mean) ** 2 for value in values)
    if not total or len(counts) != num_whole or len({*counts.values()}) > 1:
        why = "not each combination of the values ran equally often"
        return Importance({}, f"Not computed: {why if total else f'{metric} does not vary'}.")
    shares = {}
    for key, its in levels.items():
        of_level = [
            [value for value, one in zip(values, its, strict=True) if one == level]
            for level in dict.fromkeys(its)  # a set's order, and with it the sum's, would vary
        ]
        between = sum(len(some) * (statistics.fmean(some) - mean) ** 2 for some in of_level)
        shares[short.get(key, key)] = between / total
    shares = dict(sorted(shares.items(), key=lambda pair: -pair[1]))
    repeats = any(key in row.swept for row in done for key in REPEATS)
    rest = " and ".join(
        [*(["interactions"] if len(keys) > 1 else []), *(["seeds"] if repeats else [])]
    )
    if rest:
        shares[rest] = max(0.0, 1 - sum(shares.values()))
    note = f"Share of the variance of {metric} over all runs that each parameter explains by itself"
    return Importance(shares, f"{note} (main effects of the grid).", rest)
