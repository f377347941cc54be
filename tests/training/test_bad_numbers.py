"""A non-finite step changes nothing, is counted and logged, and k in a row end the run."""

from __future__ import annotations

import copy
import functools
import itertools
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from running import TINY, Bench, batch_of, config_of, metrics_of, train, train_config
from torch import Tensor, nn

from lab import optim
from lab.tasks import losses
from lab.tasks.tasks import Multiclass
from regrow.checkpoint import writer
from regrow.feeding.batch import LoadedBatch
from regrow.numerics import totals
from regrow.numerics.buffers import Buffers
from regrow.numerics.precision import LossScale

CPU = torch.device("cpu")
MAKERS: dict[str, Any] = {
    "adamw": functools.partial(torch.optim.AdamW, lr=0.01, fused=True),
    "sgd": functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9),
    "rmsprop": functools.partial(torch.optim.RMSprop, lr=0.01),
    "nadam": functools.partial(torch.optim.NAdam, lr=0.01),
}


def task() -> Multiclass:
    loss = losses.CrossEntropy(label_smoothing=0.0, class_weights=None, ignore_index=None)
    return Multiclass(
        num_classes=3,
        class_names=None,
        monitor="val/accuracy",
        per_class=False,
        auroc=False,
        extra_metrics=None,
        loss=loss,
    )


def bench_of(make: Any, *, slices: int = 3, **options: Any) -> Bench:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    return Bench(model, task(), make, slices=slices, **{"ema_decay": 0.9, **options})


def batch(number: int, bad: float | None = None) -> LoadedBatch:
    random = torch.Generator().manual_seed(number)
    inputs = torch.randn(12, 6, generator=random)
    if bad is not None:
        inputs[5, 2] = bad  # in the second of three micro-batches
    return batch_of(inputs, torch.randint(3, (12,), generator=random))


def tensors_of(value: Any, path: str = "") -> dict[str, Tensor]:
    """Return every tensor of the model, the optimizer and the average."""
    if isinstance(value, Tensor):
        return {path: value.clone()}
    if isinstance(value, dict):
        return {
            k: v for name in value for k, v in tensors_of(value[name], f"{path}/{name}").items()
        }
    return {}


def held_by(bench: Bench) -> dict[str, Tensor]:
    parts = bench.state.state_dict()
    return tensors_of({name: parts[name] for name in ("model", "optimizer", "averaged")})


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("name", MAKERS)
def test_a_bad_number_in_one_micro_batch_changes_no_weight_moment_average_or_buffer(
    name: str, bad: float
) -> None:
    bench = bench_of(MAKERS[name], clip_norm=1.0, clip_value=0.1)
    bench.step(batch(0))
    before = held_by(bench)
    assert any("running_mean" in key for key in before)
    line = bench.step(batch(1, bad))
    assert same(before, held_by(bench))
    assert bench.state.step == 2  # the step still counts
    assert line["train/skipped_steps"] == 1
    assert line["train/loss"] != line["train/loss"] or abs(line["train/loss"]) == torch.inf
    bench.step(batch(2))
    assert not same(before, held_by(bench))
    assert bench.state.skips.tolist() == [1.0, 0.0]


def test_a_run_continues_after_a_skipped_step_as_if_its_batch_had_not_been() -> None:
    skipped, without = bench_of(MAKERS["adamw"]), bench_of(MAKERS["adamw"])
    for number, bad in ((0, None), (1, torch.nan), (2, None)):
        skipped.step(batch(number, bad))
        if bad is None:
            without.step(batch(number))
    assert same(held_by(skipped), held_by(without))


@pytest.mark.parametrize("dtypes", [*itertools.product([torch.float32, torch.float64], repeat=2)])
def test_a_device_finds_the_same_numbers_not_finite_as_the_host(dtypes: Any) -> None:
    numbers = [0.0, -0.0, 1.5, -1e30, 1e38, torch.inf, -torch.inf, torch.nan]
    for norm, loss in itertools.product(numbers, repeat=2):
        pair = [torch.tensor(n, dtype=dtype) for n, dtype in zip((norm, loss), dtypes, strict=True)]
        found = totals.either_is_not_finite(*pair)
        assert found.dtype == torch.bool
        assert bool(found) is not (math.isfinite(norm) and math.isfinite(loss))


def test_a_step_that_is_not_checked_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = bench_of(MAKERS["sgd"])
    bench.step(batch(0))
    before = held_by(bench)

    def unchecked(optimizer: Any, *args: Any, **named: Any) -> totals.Skipped:
        optimizer.step()
        return totals.Skipped(False)

    monkeypatch.setattr(optim, "update", unchecked)
    bench.step(batch(1, torch.nan))
    assert not same(before, held_by(bench))


def test_buffers_that_are_not_put_back_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = bench_of(MAKERS["sgd"])
    bench.step(batch(0))
    before = held_by(bench)
    monkeypatch.setattr(Buffers, "restore", lambda self, skipped: None)
    bench.step(batch(1, torch.nan))
    after = held_by(bench)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all("running_" in name or "num_batches" in name for name in changed)


def test_a_bad_loss_with_good_gradients_is_skipped_too() -> None:
    """A constant added to the loss has no gradient."""
    bench = bench_of(MAKERS["adamw"], slices=1)
    bench.step(batch(0))
    before = held_by(bench)
    good = bench.plan.step.task.loss
    bad = copy.copy(bench.plan.step.task)
    bad.loss = lambda o, t, w: good(o, t, w)._replace(values=good(o, t, w).values + torch.inf)
    object.__setattr__(bench.plan.step, "task", bad)
    bench.step(batch(1))
    assert same(before, held_by(bench))


@pytest.mark.parametrize("on_device", [False, True])
def test_a_step_whose_loss_is_not_a_number_is_skipped(
    on_device: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One micro-batch has a loss of inf, another of -inf."""
    monkeypatch.setattr(totals, "on_host", lambda device: not on_device)
    bench = bench_of(MAKERS["adamw"])
    bench.step(batch(0))
    before = held_by(bench)
    good = bench.plan.step.task.loss
    signs = iter([torch.inf, -torch.inf, 0.0])
    bad = copy.copy(bench.plan.step.task)

    def loss(outputs: Tensor, targets: Tensor, weights: Tensor | None) -> losses.LossOutput:
        values = good(outputs, targets, weights).values
        return losses.LossOutput(values + next(signs))

    bad.loss = loss
    object.__setattr__(bench.plan.step, "task", bad)
    line = bench.step(batch(1))
    assert line["train/skipped_steps"] == 1
    assert same(before, held_by(bench))


@pytest.mark.parametrize("on_device", [False, True])
def test_epoch_means_leave_skipped_steps_out(
    on_device: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the sums stay on a device that skips by itself; a CPU acts as the device here."""
    monkeypatch.setattr(totals, "on_host", lambda device: not on_device)
    monkeypatch.setattr(optim, "skips_on_device", lambda optimizer, device: on_device)
    bench = bench_of(MAKERS["adamw"])
    assert isinstance(bench.state.sums.values, Tensor) == on_device
    lines = [bench.step(batch(n, bad)) for n, bad in ((0, None), (1, torch.inf), (2, None))]
    exact = (lines[0]["train/loss"] + lines[2]["train/loss"]) / 2
    loss, _, weight, examples = bench.state.sums.read()
    assert loss / weight == pytest.approx(exact)
    assert examples == 24


@pytest.mark.parametrize("every", [1, 100])
def test_so_many_bad_steps_in_a_row_end_the_run_and_name_step_and_parameter(every: int) -> None:
    bench = bench_of(MAKERS["adamw"], max_skipped_steps=3, log_every_steps=every)
    for number, bad in enumerate((None, torch.nan, torch.nan, None, torch.nan, torch.nan)):
        bench.step(batch(number, bad))  # never three in a row
    with pytest.raises(FloatingPointError, match=r"step 7: .* 3 steps in a row.* is 0\.weight"):
        bench.step(batch(9, torch.nan))


def test_debug_anomaly_does_not_advise_itself() -> None:
    said = []
    for detect in (False, True):
        bench = bench_of(MAKERS["adamw"], max_skipped_steps=1, detect_anomaly=detect)
        with pytest.raises(FloatingPointError) as raised:
            bench.step(batch(0, torch.nan))
        said.append(str(raised.value))
    assert said[0].startswith("step 1: no finite loss or gradient; the loss itself is nan")
    assert said[0].endswith(
        "Lower optimizer.lr, set trainer.clip_norm, or find the cause with debug=anomaly."
    )
    assert said[1].endswith("gave no NaN, so look at what the forward pass computes.")


def test_a_bad_parameter_is_named_where_only_it_is_bad() -> None:
    bench = bench_of(MAKERS["adamw"], max_skipped_steps=1)
    with torch.no_grad():
        bench.state.model[3].bias[1] = torch.inf  # type: ignore[index, union-attr]
    with pytest.raises(
        FloatingPointError, match=r"bad parameter is .*\. No step was finite: check"
    ):
        bench.step(batch(0))


def test_a_bad_loss_is_named_before_the_gradients_that_it_made() -> None:
    bench = bench_of(MAKERS["adamw"], max_skipped_steps=1)
    bench.step(batch(0))
    good = bench.plan.step.task.loss
    bad = copy.copy(bench.plan.step.task)
    bad.loss = lambda o, t, w: good(o, t, w)._replace(values=good(o, t, w).values * torch.nan)
    object.__setattr__(bench.plan.step, "task", bad)
    with pytest.raises(
        FloatingPointError, match=r"; the loss itself is nan; .* is 0\.weight\. Lower"
    ):
        bench.step(batch(1))


def test_the_checkpoint_that_is_named_is_from_before_the_fault(tmp_path: Path) -> None:
    """A step that goes too far is finite itself, but what was saved after it is useless."""
    config = (*TINY, "optimizer=sgd", "optimizer.lr=0.1", "trainer.max_skipped_steps=3")
    saving = ("trainer.checkpoint.save_every_steps=1", "trainer.checkpoint.keep_last=2")
    train(tmp_path, *config, *saving, stop_at=5)
    with pytest.raises(FloatingPointError, match=r"the last good checkpoint is (\w+)") as failed:
        train(tmp_path, *config, *saving, "optimizer.lr=1e30")
    found = re.search(r"checkpoint is (step_\d+)", str(failed.value))
    assert found is not None
    parts, _ = writer.load(tmp_path / "checkpoints" / found[1])
    assert all(weight.abs().max() < 100 for weight in parts["model"].values())
    newest = writer.named(tmp_path / "checkpoints", "last")
    parts, _ = writer.load(newest)  # the control: the state that led to it is saved too
    assert any(weight.abs().max() > 1e6 for weight in parts["model"].values())


def test_no_checkpoint_is_saved_during_a_streak_of_skipped_steps(tmp_path: Path) -> None:
    """Rotation would keep only those, and lose the state from which the run can be repeated."""
    config = (*TINY, "optimizer=sgd", "optimizer.lr=0.1", "trainer.max_skipped_steps=50")
    saving = ("trainer.checkpoint.save_every_steps=1", "trainer.checkpoint.keep_last=50")
    train(tmp_path, *config, *saving, stop_at=5)
    summary = train(tmp_path, *config, *saving, "optimizer.lr=1e30")
    found = [facts["step"] for facts in writer.complete(tmp_path / "checkpoints").values()]
    skipped = summary["skipped_steps"]
    assert skipped >= 4
    led_there = summary["steps"] - skipped
    # The end of the run is always saved; nothing between it and the start of the streak is.
    assert found == [*range(1, led_there + 1), summary["steps"]]


def test_steps_skipped_in_the_search_of_the_fp16_scale_do_not_end_the_run() -> None:
    """From 2^30, it takes some halvings to reach a scale without overflow."""
    scale = LossScale(CPU, initial=2.0**30, growth_interval=5)
    bench = bench_of(
        MAKERS["sgd"], precision="fp16", loss_scale=scale, max_skipped_steps=3, slices=1
    )
    lines = [bench.step(batch(number)) for number in range(40)]
    skipped = lines[-1]["train/skipped_steps"]
    assert skipped > 3
    scales = [line["train/loss_scale"] for line in lines]
    assert min(scales) < 2.0**27
    assert any(b == 2 * a for a, b in itertools.pairwise(scales))  # it grows again
    assert all(p.isfinite().all() for p in bench.state.model.parameters())


def test_without_a_search_the_same_bad_steps_end_the_run() -> None:
    bench = bench_of(MAKERS["sgd"], max_skipped_steps=3)
    with pytest.raises(FloatingPointError, match="3 steps in a row"):
        for number in range(19):
            bench.step(batch(number, torch.nan))


def test_endless_overflow_in_fp16_ends_the_run_too() -> None:
    bench = bench_of(
        MAKERS["sgd"], precision="fp16", loss_scale=LossScale(CPU), max_skipped_steps=3
    )
    with pytest.raises(FloatingPointError, match="19 steps in a row"):
        for number in range(19):
            bench.step(batch(number, torch.nan))
    assert bench.state.step == 19


def test_a_run_whose_rate_explodes_fails_and_keeps_its_checkpoints(tmp_path: Path) -> None:
    config = config_of(*TINY, "optimizer=sgd", "trainer.max_skipped_steps=2")
    config["optimizer"]["lr"] = 1e30
    with pytest.raises(FloatingPointError, match="2 steps in a row"):
        train_config(tmp_path, config)
    steps = [line for line in metrics_of(tmp_path) if "train/loss" in line]
    assert steps[-1]["train/skipped_steps"] == 2
