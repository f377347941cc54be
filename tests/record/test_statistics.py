"""Means, intervals and differences over seeds, compared with scipy's."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
from scipy import stats

from regrow.record.statistics import _holm, differences, estimate

SEEDS = (0, 1, 2, 3, 4)


def values(mean: float, seed: int, count: int = 5) -> dict[object, float]:
    drawn = random.Random(seed)
    return {number: drawn.gauss(mean, 0.1) for number in range(count)}


def test_an_interval_is_students() -> None:
    found = estimate([*values(0.9, 1).values()])
    its = [*values(0.9, 1).values()]
    low, high = stats.t.interval(0.95, 4, loc=stats.tmean(its), scale=stats.sem(its))
    assert (found.low, found.high) == pytest.approx((low, high))
    assert found.sd == pytest.approx(stats.tstd(its)) and found.count == 5


def test_one_seed_has_no_spread() -> None:
    found = estimate([0.5])
    assert found.mean == 0.5 and math.isnan(found.sd) and math.isnan(found.low)
    assert differences({0: 0.5}, [{0: 0.4}]) == [None]


def test_a_value_that_is_not_finite_leaves_no_spread() -> None:
    for value in (math.nan, math.inf):
        found = estimate([0.5, value, 0.7])
        assert found.count == 3 and repr(found.mean) == repr(value) and math.isnan(found.sd)


def test_the_same_seeds_are_compared_seed_by_seed() -> None:
    one, other = values(0.9, 1), values(0.8, 2)
    (found,) = differences(one, [other])
    theirs: Any = stats.ttest_rel([other[s] for s in SEEDS], [one[s] for s in SEEDS])
    interval = theirs.confidence_interval(0.95)
    assert found is not None and found.paired
    assert found.p == pytest.approx(theirs.pvalue)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))


def test_other_seeds_are_compared_after_welch() -> None:
    one, other = values(0.9, 1), values(0.8, 2, count=4)
    (found,) = differences(one, [other])
    theirs: Any = stats.ttest_ind([*other.values()], [*one.values()], equal_var=False)
    interval = theirs.confidence_interval(0.95)
    assert found is not None and not found.paired
    assert found.p == pytest.approx(theirs.pvalue)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))


def test_several_comparisons_are_adjusted() -> None:
    best = values(0.9, 1)
    others = [values(mean, number) for number, mean in enumerate((0.5, 0.85, 0.88), start=2)]
    found = [one for one in differences(best, others) if one is not None]
    raw = [
        float(stats.ttest_rel([o[s] for s in SEEDS], [best[s] for s in SEEDS]).pvalue)
        for o in others
    ]
    in_order = sorted(range(3), key=lambda index: raw[index])
    expected, highest = {}, 0.0  # among the six pairs of four settings: the best is chosen too
    for rank, index in enumerate(in_order):
        highest = max(highest, min(1.0, (6 - rank) * raw[index]))
        expected[index] = highest
    assert [one.p for one in found] == pytest.approx(raw)
    assert [one.adjusted_p for one in found] == pytest.approx([expected[i] for i in range(3)])
    assert found[0].adjusted_p < 0.05


def test_equal_values_do_not_differ_and_a_constant_difference_is_not_judged() -> None:
    one = {0: 0.5, 1: 0.625, 2: 0.75}
    same, apart = differences(one, [dict(one), {seed: value - 0.25 for seed, value in one.items()}])
    assert same is not None and same.p == 1
    assert apart is None  # accuracies are discrete: equal ones each time prove nothing


def test_noise_alone_is_seldom_taken_for_a_difference() -> None:
    """Without real differences, about one in twenty comparisons reports one."""
    wrong = 0
    for number in range(400):
        (found,) = differences(values(0.9, 2 * number), [values(0.9, 2 * number + 1)])
        assert found is not None
        wrong += found.p < 0.05
    assert 4 <= wrong <= 40


def test_holm_divides_by_what_is_left_and_never_falls() -> None:
    """Computed by hand after Holm (1979), below 1 so that clipping hides nothing."""
    assert _holm([0.03, 0.01, 0.02], among=6) == pytest.approx([0.12, 0.06, 0.10])
    assert _holm([0.021, 0.02], among=6) == pytest.approx([0.12, 0.12])
    assert _holm([None, 0.1], among=3) == [None, pytest.approx(0.3)]
    assert _holm([0.9, 0.5], among=3) == [1.0, 1.0]


@pytest.mark.parametrize("other", [{0: 0.25, 1: 0.45}, {2: 0.25, 3: 0.45}], ids=["paired", "Welch"])
def test_two_seeds_give_neither_an_interval_nor_a_comparison(other: dict[object, float]) -> None:
    best: dict[object, float] = {0: 0.5, 1: 0.6}
    assert differences(best, [other]) == [None]
    found = estimate([0.5, 0.6])
    assert math.isnan(found.low) and math.isnan(found.high) and not math.isnan(found.sd)


@pytest.mark.parametrize("other", [{0: 0.25, 1: 0.45, 2: 0.3}, {3: 0.25, 4: 0.45, 5: 0.3}])
def test_three_seeds_give_both(other: dict[object, float]) -> None:
    (found,) = differences({0: 0.5, 1: 0.6, 2: 0.6}, [other])
    assert found is not None and found.low < found.mean < found.high
    assert not math.isnan(estimate([0.5, 0.6, 0.6]).low)
