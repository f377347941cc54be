"""A batch whose weights are all zero is not a bad step: it changes nothing, and it counts."""

from __future__ import annotations

import copy
import itertools
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from running import CPU, TINY, Bench, batch_of, fingerprint, metrics_of, train
from torch import nn

from lab.tasks.losses import CrossEntropy
from lab.tasks.tasks import Multiclass
from regrow.feeding.batch import LoadedBatch
from regrow.numerics import precision, totals
from regrow.numerics.precision import LossScale
from regrow.numerics.totals import Skipped, Totals

# Two of three classes have no weight: with two examples a step, many steps have none.
RARE = (
    *TINY,
    *("loss=cross_entropy", "loss.class_weights=[1,0,0]", "data.batch_size=2"),
    *("trainer.max_skipped_steps=1", "trainer.ema_decay=0.9", "model.dropout=0.3"),
    *("task.per_class=false", "task.auroc=false"),
)


def task() -> Multiclass:
    loss = CrossEntropy(label_smoothing=0.0, class_weights=[1.0, 0.0, 0.0], ignore_index=None)
    return Multiclass(
        num_classes=3,
        class_names=None,
        monitor="val/accuracy",
        per_class=False,
        auroc=False,
        extra_metrics=None,
        loss=loss,
    )


def batch(*classes: int, bad: bool = False) -> LoadedBatch:
    inputs = torch.randn(len(classes), 4, generator=torch.Generator().manual_seed(len(classes)))
    inputs[0, 0] = torch.nan if bad else inputs[0, 0]
    return batch_of(inputs, torch.tensor(classes))


def bench(**options: Any) -> Bench:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    adamw = lambda groups: torch.optim.AdamW(groups, lr=0.1, fused=True)  # noqa: E731
    return Bench(model, task(), adamw, **{"max_skipped_steps": 2, "ema_decay": 0.5, **options})


def content(bench: Bench) -> Any:
    parts = copy.deepcopy(bench.state.state_dict())
    return parts["model"], parts["averaged"], parts["optimizer"]["state"]


def assert_same(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("on_host", [True, False])  # False: a CPU as the device
@pytest.mark.parametrize("slices", [1, 2])
def test_an_empty_step_changes_nothing_and_counts(
    on_host: bool, slices: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not on_host:
        monkeypatch.setattr(totals, "on_host", lambda device: False)
    run = bench(slices=slices)
    run.step(batch(0, 0, 1, 2))
    before = content(run)
    for number in range(1, 6):  # more than may be skipped
        line = run.step(batch(1, 2, 2, 1))
        assert line["train/empty_steps"] == number
        assert "train/skipped_steps" not in line
        assert line["train/grad_norm"] == 0 and line["train/loss"] != line["train/loss"]
    assert_same(content(run), before)
    assert run.state.step == 6
    run.step(batch(0, 0, 1, 2))  # and it still learns
    with pytest.raises(AssertionError):
        assert_same(content(run), before)


def test_the_warm_up_of_the_average_does_not_count_it() -> None:
    from lab.state import average_weight

    run = bench(ema_decay=0.99, ema_warmup=True)
    run.step(batch(0, 0, 1, 2))
    before = average_weight(run.state, run.options, run.state.step)
    run.step(batch(1, 2, 2, 1))
    assert average_weight(run.state, run.options, run.state.step) == before
    run.step(batch(0, 0, 1, 2))
    assert average_weight(run.state, run.options, run.state.step) < before


def test_it_may_be_the_first_step() -> None:
    run = bench()
    assert run.step(batch(1, 2))["train/empty_steps"] == 1
    assert run.step(batch(0, 0, 1, 2))["train/loss"] > 0


@pytest.mark.parametrize("on_host", [True, False])
def test_bad_steps_are_counted_beside_them(on_host: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: a NaN is still a bad step, and an empty step in between neither ends a streak
    nor adds to it.
    """
    if not on_host:
        monkeypatch.setattr(totals, "on_host", lambda device: False)
    run = bench()
    run.step(batch(0, 0, 1, 2))
    line = run.step(batch(0, 0, 1, 2, bad=True))
    assert line["train/skipped_steps"] == 1
    line = run.step(batch(1, 2))
    assert (line["train/skipped_steps"], line["train/empty_steps"]) == (1, 1)
    with pytest.raises(FloatingPointError, match="for 2 steps in a row"):
        run.step(batch(0, 0, 1, 2, bad=True))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_skipped_and_empty_steps_are_told_apart_on_the_device(dtype: torch.dtype) -> None:
    """With the tensors of a device that nobody has waited for."""
    run = bench()
    run.state.sums = Totals(torch.zeros(4, dtype=torch.float64))
    one, zero = torch.ones((), dtype=dtype), torch.zeros((), dtype=dtype)
    step = Totals(torch.tensor([3.0, 1.0, 2.0, 4.0], dtype=torch.float64))
    for skipped, empty in ((zero, zero), (one, zero), (one, one), (one, zero), (True, one)):
        run.state.finish_step(step, Skipped(skipped, empty), 0, run.options)  # type: ignore[arg-type]
    assert run.state.skips.tolist() == [2, 2] and run.state.empty_steps == 2
    assert run.state.sums.read() == step.read()
    run.state.finish_step(step, Skipped(zero, zero), 0, run.options)
    assert run.state.skips.tolist() == [2, 0]


@pytest.mark.parametrize("on_host", [True, False])
@pytest.mark.parametrize("its", [True, False])
def test_a_step_of_two_updates_is_skipped_if_either_is(on_host: bool, its: bool) -> None:
    for one, other in itertools.product([True, False], repeat=2):
        first = Skipped(one if on_host else torch.tensor(one), empty=one)
        found = first.either(Skipped(other if its else torch.tensor(other)))
        assert bool(found.update) is (one or other) and found.empty is one


def test_runs_with_empty_steps_end_and_resume_exactly(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", *RARE)
    assert whole["status"] == "completed" and whole["skipped_steps"] == 0
    assert whole["empty_steps"] > 5
    last = [line for line in metrics_of(tmp_path / "whole") if "train/empty_steps" in line][-1]
    assert last["train/empty_steps"] == whole["empty_steps"]
    for stop in (3, 20, 41, 60):
        train(tmp_path / "cut", *RARE, stop_at=stop)
    cut = train(tmp_path / "cut", *RARE)
    assert cut["empty_steps"] == whole["empty_steps"]
    assert fingerprint(tmp_path / "cut") == fingerprint(tmp_path / "whole")


def test_an_epoch_of_empty_steps_alone_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    def epoch(*batches: LoadedBatch) -> list[str]:
        caplog.clear()
        run = bench(max_skipped_steps=5)
        run.state.steps_per_epoch = len(batches)
        for one in batches:
            run.step(one)
        return [it.getMessage() for it in caplog.records if it.levelno == logging.WARNING]

    (line,) = epoch(batch(1, 2), batch(2, 1))
    assert line.startswith("epoch 1: every step was empty") and "loss.class_weights" in line
    assert epoch(batch(1, 2), batch(0, 1)) == []
    assert epoch(batch(1, 2), batch(0, 1, bad=True)) == []  # a bad step is reported elsewhere


@pytest.mark.slow
def test_micro_batches_do_not_make_a_step_empty(tmp_path: Path) -> None:
    """A micro-batch of weight zero and one with weight make a normal step."""
    one = train(tmp_path / "one", *RARE, "model.dropout=0")
    two = train(tmp_path / "two", *RARE, "model.dropout=0", "trainer.accumulation_steps=2")
    assert one["empty_steps"] == two["empty_steps"] > 0
    for first, second in zip(
        metrics_of(tmp_path / "one"), metrics_of(tmp_path / "two"), strict=True
    ):
        assert first == pytest.approx(second, rel=1e-3, abs=1e-5, nan_ok=True)


# The scale of fp16.


def test_an_empty_step_leaves_the_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    for empty in (True, torch.tensor(True), torch.ones(())):
        scale = LossScale(CPU.device, growth_interval=2)
        scale.update(False)
        before = scale.state_dict()
        scale.update(True, empty)
        assert scale.state_dict() == before
        scale.update(False)
        assert scale.value == 2.0**17  # the second good step
    with_zero = LossScale(CPU.device)
    with_zero.update(torch.tensor(True), torch.tensor(False))
    assert with_zero.value == 2.0**15


def test_the_scale_has_a_limit_that_the_search_leads_back_from() -> None:
    scale = LossScale(CPU.device, growth_interval=1)
    for _ in range(200):  # zero gradients never overflow
        scale.update(False)
    assert scale.value == precision.MAX_SCALE
    halvings = 0
    while scale.value > precision.INITIAL:
        scale.update(True)
        halvings += 1
    assert halvings < 16  # only as many as are tolerated: see refuse_endless_skipping
    without = torch.tensor(precision.INITIAL)  # the control: doubling alone ends at inf
    assert (without * 2.0**200).isinf()


@pytest.mark.parametrize("recorded", [torch.inf, torch.nan, 0.0])
def test_a_recorded_scale_that_is_lost_is_repaired(
    recorded: float, caplog: pytest.LogCaptureFixture
) -> None:
    scale = LossScale(CPU.device)
    scale.load_state_dict({"value": torch.tensor(recorded), "good_steps": torch.tensor(7.0)})
    assert scale.value == precision.INITIAL and scale.good_steps == 7
    assert "loss scale" in caplog.text
    scale.load_state_dict({"value": torch.tensor(2.0**30), "good_steps": torch.tensor(0.0)})
    assert scale.value == 2.0**30  # from before the limit: unchanged


def test_an_empty_step_in_fp16(monkeypatch: pytest.MonkeyPatch) -> None:
    run = bench(precision="fp32", loss_scale=LossScale(CPU.device))
    run.step(batch(0, 0, 1, 2))
    before, scale = content(run), run.state.loss_scale
    assert scale is not None
    for _ in range(40):  # more than the search may take
        run.step(batch(1, 2, 2, 1))
    assert_same(content(run), before)
    assert scale.value == precision.INITIAL and scale.good_steps == 1
