"""Statistics over seeds: runs that differ only in their seed are one setting.

They give a setting's mean and spread, and tell whether settings differ by more than their seeds do.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

LEVEL = 0.95
FEWEST = 3  # seeds: with two, equal differences are common, because accuracies come in steps


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds; NaN where there are too few seeds, or a value is not finite."""

    count: int
    mean: float
    sd: float  # over seeds, with n - 1
    low: float  # of the confidence interval of the mean, by Student's t
    high: float


@dataclass(frozen=True)
class Difference:
    """The difference of a setting from the best one."""

    mean: float
    low: float  # of the confidence interval
    high: float
    p: float  # two-sided, by Student's t, like the interval
    adjusted_p: float  # for the number of comparisons, by Holm (1979)
    paired: bool  # seed by seed, over the same seeds; else by Welch (1947)


def estimate(values: Sequence[float], overlap: float = 0.0) -> Estimate:
    """Return the estimate of one setting's values, one per seed, or per fold.

    Folds share training examples, so that their values vary together, and the plain interval is too
    short. `overlap`, the ratio of test to training examples, corrects the variance of the mean from
    s²/n to s² (1/n + overlap): Nadeau and Bengio (2003); with several seeds, Bouckaert and Frank
    (2004).
    """
    count, mean = len(values), statistics.fmean(values) if values else math.nan
    if count < 2 or not math.isfinite(mean):  # NaN has no deviation
        return Estimate(count, mean, math.nan, math.nan, math.nan)
    sd = statistics.stdev(values)
    if count < FEWEST:
        return Estimate(count, mean, sd, math.nan, math.nan)
    reach = _t_quantile(count - 1) * sd * math.sqrt(1 / count + overlap)
    return Estimate(count, mean, sd, mean - reach, mean + reach)


def differences(
    best: Mapping[object, float], others: Sequence[Mapping[object, float]], overlap: float = 0.0
) -> list[Difference | None]:
    """Return the difference of each of `others` from `best`; None if there are too few seeds.

    Settings are {seed: value}. Values of the same seeds are compared seed by seed, because a seed
    also determines the data splits. `overlap` is that of folds: see `estimate`.
    """
    raw = [_difference(best, other, overlap) for other in others]
    # The best is itself selected, so all pairs of settings count.
    pairs = len(others) * (len(others) + 1) // 2
    adjusted = _holm([None if one is None else one.p for one in raw], among=pairs)
    return [
        None if one is None or p is None else replace(one, adjusted_p=p)
        for one, p in zip(raw, adjusted, strict=True)
    ]


def _difference(
    one: Mapping[object, float], other: Mapping[object, float], overlap: float
) -> Difference | None:
    paired = set(one) == set(other)
    if paired and len(one) >= FEWEST:
        each = [other[seed] - one[seed] for seed in one]
        mean, freedom = statistics.fmean(each), float(len(each) - 1)
        error = statistics.stdev(each) * math.sqrt(1 / len(each) + overlap)
    elif min(len(one), len(other)) >= FEWEST:
        parts = [statistics.variance(s.values()) * (1 / len(s) + overlap) for s in (one, other)]
        mean = statistics.fmean(other.values()) - statistics.fmean(one.values())
        error = math.sqrt(sum(parts))
        below = sum(part**2 / (len(its) - 1) for part, its in zip(parts, (one, other), strict=True))
        freedom = sum(parts) ** 2 / below if below else math.inf
        paired = False
    else:
        return None
    if not error > 1e-9 * abs(mean):  # the same difference for each seed: metrics come in steps
        return Difference(mean, mean, mean, 1.0, 1.0, paired) if mean == 0 else None
    reach = _t_quantile(freedom) * error
    p = _p_value(mean / error, freedom)
    return Difference(mean, mean - reach, mean + reach, p, p, paired)


def _holm(values: Sequence[float | None], *, among: int) -> list[float | None]:
    """Return p-values adjusted by Holm's method for `among` comparisons."""
    order = sorted((p, index) for index, p in enumerate(values) if p is not None)
    adjusted: list[float | None] = [None] * len(values)
    highest = 0.0
    for rank, (p, index) in enumerate(order):
        highest = max(highest, min(1.0, (among - rank) * p))
        adjusted[index] = highest
    return adjusted


def _t_quantile(freedom: float) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(freedom, (1 + LEVEL) / 2))


def _p_value(t: float, freedom: float) -> float:
    from scipy.special import stdtr

    return float(2 * stdtr(freedom, -abs(t)))
