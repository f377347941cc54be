"""Each schedule matches torch's own, or its formula, at every step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from lab import schedules
from lab.schedules import Plateau, RunLength
from regrow.config.targets import instantiate
from regrow.config.yaml_files import read_yaml
from regrow.errors import UserError
from regrow.project import CONF

PER_EPOCH, EPOCHS = 7, 9
TOTAL = PER_EPOCH * EPOCHS
LENGTH = RunLength(total_steps=TOTAL, steps_per_epoch=PER_EPOCH)
ENDLESS = RunLength(total_steps=None, steps_per_epoch=PER_EPOCH)
COLD: dict[str, Any] = {"warmup_steps": None, "warmup_fraction": None}


def torchs(make: Callable[[torch.optim.Optimizer], Any], *, per_epoch: bool = False) -> list[float]:
    """Return torch's learning rates for a base of 1, one per step."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make(optimizer)
    rates = []
    for step in range(TOTAL):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        if not per_epoch or (step + 1) % PER_EPOCH == 0:
            scheduler.step()
    return rates


def ours(schedule: schedules.Schedule) -> list[float]:
    return [schedule(step) for step in range(TOTAL)]


# ours, another setting of ours that must differ, torch's
REFERENCES: dict[str, tuple[schedules.Schedule, schedules.Schedule, list[float]]] = {
    "constant": (
        schedules.constant(**COLD, length=LENGTH),
        schedules.constant(warmup_steps=2, warmup_fraction=None, length=LENGTH),
        torchs(lambda o: lr_scheduler.ConstantLR(o, factor=1.0)),
    ),
    "step": (
        schedules.step(every_epochs=2, gamma=0.3, **COLD, length=LENGTH),
        schedules.step(every_epochs=1, gamma=0.3, **COLD, length=LENGTH),
        torchs(lambda o: lr_scheduler.StepLR(o, 2, 0.3), per_epoch=True),
    ),
    "multistep": (
        schedules.multistep(milestones_epochs=[3, 5], gamma=0.3, **COLD, length=LENGTH),
        schedules.multistep(milestones_epochs=[3, 6], gamma=0.3, **COLD, length=LENGTH),
        torchs(lambda o: lr_scheduler.MultiStepLR(o, [3, 5], 0.3), per_epoch=True),
    ),
    "exponential": (
        schedules.exponential(gamma=0.5, **COLD, length=LENGTH),
        schedules.exponential(gamma=0.51, **COLD, length=LENGTH),
        torchs(lambda o: lr_scheduler.ExponentialLR(o, 0.5 ** (1 / PER_EPOCH))),
    ),
    "linear": (
        schedules.linear(final_factor=0.1, **COLD, length=LENGTH),
        schedules.linear(final_factor=0.2, **COLD, length=LENGTH),
        torchs(lambda o: lr_scheduler.LinearLR(o, 1.0, 0.1, total_iters=TOTAL)),
    ),
    "cosine": (
        schedules.cosine(final_factor=0.1, **COLD, length=LENGTH),
        schedules.cosine(final_factor=0.0, **COLD, length=LENGTH),
        torchs(lambda o: lr_scheduler.CosineAnnealingLR(o, TOTAL, eta_min=0.1)),
    ),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_a_schedule_is_torchs_at_every_step(name: str) -> None:
    schedule, another, reference = REFERENCES[name]
    assert ours(schedule) == pytest.approx(reference, abs=1e-9)
    assert ours(another) != pytest.approx(reference, abs=1e-9)


def test_onecycle_goes_up_to_one_and_down_in_half_cosines() -> None:
    schedule = schedules.onecycle(
        peak_fraction=0.3, initial_factor=0.04, final_factor=4e-6, **COLD, length=LENGTH
    )
    peak = round(0.3 * TOTAL)
    # torch counts its cycle in updates minus one, and ends a step before its last update.
    torch_like = torchs(
        lambda o: lr_scheduler.OneCycleLR(
            o,
            1.0,
            total_steps=TOTAL + 1,
            pct_start=(peak + 1) / (TOTAL + 1),
            div_factor=25.0,
            final_div_factor=0.04 / 4e-6,
        )
    )
    assert ours(schedule) == pytest.approx(torch_like, abs=1e-9)
    assert schedule(peak) == 1.0
    assert ours(schedule)[1:] != pytest.approx(torch_like[:-1], abs=1e-3)


@pytest.mark.parametrize("name", ["constant", "step", "exponential", "linear", "cosine"])
@pytest.mark.parametrize("given", [(6, None), (None, 5.6 / TOTAL)])
def test_warm_up_rises_in_equal_parts_and_then_leaves_the_schedule(
    name: str, given: tuple[int | None, float | None]
) -> None:
    more: dict[str, Any] = {
        "step": {"every_epochs": 2, "gamma": 0.3},
        "exponential": {"gamma": 0.5},
        "linear": {"final_factor": 0.1},
        "cosine": {"final_factor": 0.1},
    }.get(name, {})
    make = getattr(schedules, name)
    warm = make(**more, warmup_steps=given[0], warmup_fraction=given[1], length=LENGTH)
    cold = make(**more, **COLD, length=LENGTH)
    for step in range(6):
        unwarmed = cold(step) if name in ("step", "exponential") else 1.0
        assert warm(step) == pytest.approx((step + 1) / 6 * unwarmed)
    assert warm(0) > 0  # no update is wasted
    if name in ("linear", "cosine"):  # they start to decay after the warm-up
        assert warm(6) == pytest.approx(1.0)
        assert warm(TOTAL) == pytest.approx(0.1)
    else:
        assert [warm(s) for s in range(6, TOTAL)] == [cold(s) for s in range(6, TOTAL)]


def test_every_shipped_schedule_stays_between_zero_and_one_and_is_a_function_of_the_step() -> None:
    for path in sorted((CONF / "scheduler").glob("*.yaml")):
        node = read_yaml(path)
        if "interval" in node:  # third-party: see test_scheduler_adapter.py
            continue
        schedule, again = instantiate(node)(length=LENGTH), instantiate(node)(length=LENGTH)
        rates = ours(schedule)
        assert all(0 <= rate <= 1 for rate in rates), path
        backwards = [again(step) for step in reversed(range(TOTAL))]
        assert rates == backwards[::-1], path


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("patience", [0, 1, 3])
def test_plateau_is_torchs_on_any_history(mode: str, patience: int) -> None:
    settings: dict[str, Any] = {"factor": 0.5, "patience": patience}
    caught = 0
    for seed in range(20):
        values = torch.randn(40, generator=torch.Generator().manual_seed(seed)).tolist()
        plateau = Plateau(**settings, min_delta=0.05, min_factor=0.01, warmup_steps=0)
        careless = Plateau(**settings, min_delta=0.0, min_factor=0.0, warmup_steps=0)
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        torchs = lr_scheduler.ReduceLROnPlateau(
            optimizer,
            mode=mode,  # type: ignore[arg-type]
            factor=0.5,
            patience=patience,
            threshold=0.05,
            threshold_mode="abs",
            min_lr=0.01,
            eps=0.0,
        )
        history, expected, others = [], [], []
        for step, value in enumerate(values):
            plateau.update(value, mode)
            careless.update(value, mode)
            torchs.step(value)
            history.append(plateau(step))
            others.append(careless(step))
            expected.append(optimizer.param_groups[0]["lr"])
        assert history == pytest.approx(expected)
        caught += others != pytest.approx(expected)
    assert caught > 0


def test_plateau_takes_a_nan_for_no_improvement_and_resumes_from_its_record() -> None:
    settings: dict[str, Any] = {"factor": 0.5, "patience": 1, "min_delta": 0.0, "min_factor": 0.0}
    whole = Plateau(**settings, warmup_steps=0)
    for value in (1.0, math.nan, 1.0):
        whole.update(value, "max")
    assert whole(10) == 0.5
    cut, forgetful = Plateau(**settings, warmup_steps=0), Plateau(**settings, warmup_steps=0)
    cut.load_state_dict(whole.state_dict())
    for value in (0.9, 0.8):
        for plateau in (whole, cut, forgetful):
            plateau.update(value, "max")
    assert cut(10) == whole(10) == 0.25
    assert forgetful(10) != whole(10)


def test_a_schedule_that_needs_the_number_of_steps_says_so_when_only_time_limits_the_run() -> None:
    for name in ("linear", "cosine", "onecycle"):
        node = read_yaml(CONF / "scheduler" / f"{name}.yaml")
        with pytest.raises(UserError, match=f"scheduler={name} needs the number of steps"):
            instantiate(node)(length=ENDLESS)
    for name in ("constant", "step", "multistep", "exponential", "plateau"):
        node = read_yaml(CONF / "scheduler" / f"{name}.yaml")
        assert instantiate(node)(length=ENDLESS)(100) <= 1
        with pytest.raises(UserError, match=r"warmup_fraction=0\.1 needs the number of steps"):
            instantiate({**node, "warmup_fraction": 0.1})(length=ENDLESS)
        assert instantiate({**node, "warmup_steps": 10})(length=ENDLESS)(0) == pytest.approx(0.1)
