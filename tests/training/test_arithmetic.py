"""The arithmetic of a step: micro-batches, logged numbers, clipping, evaluation without effects."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from running import CPU, TINY, Bench, batch_of, config_of, metrics_of, train
from torch import Tensor, nn

from lab import loop, optim, step
from lab.evaluate import measure
from lab.plan import StepPlan, StepResult
from lab.progress import QUIET
from lab.state import TrainState
from lab.tasks import losses
from lab.tasks.custom import mse_plus_mae
from lab.tasks.tasks import Binary, Multiclass, Multilabel, Regression
from regrow.distributed.parallel import World
from regrow.errors import UserError
from regrow.feeding.batch import LoadedBatch
from regrow.numerics import capture, totals
from regrow.numerics.precision import LossScale
from regrow.numerics.totals import Totals
from regrow.protocols import Batch
from regrow.randomness import Draws
from regrow.runs import training

CLASSES = 5
WEIGHTS = [0.5, 1.0, 2.0, 4.0, 0.25]  # exact in float32, so that float64 shows its digits
SGD = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)
WINDOWS = (13, 13, 2)  # the last one is ragged

Reference = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(
    smoothing: float = 0.0, weights: list[float] | None = None, ignore: int | None = None
) -> losses.CrossEntropy:
    return losses.CrossEntropy(
        label_smoothing=smoothing, class_weights=weights, ignore_index=ignore
    )


def multiclass(loss: Any) -> Multiclass:
    return Multiclass(
        num_classes=CLASSES,
        class_names=None,
        monitor="val/accuracy",
        per_class=False,
        auroc=False,
        extra_metrics=None,
        loss=loss,
    )


def binary(loss: Any) -> Binary:
    names = {"class_names": None, "monitor": "val/accuracy"}
    return Binary(**names, threshold=0.5, auroc=False, extra_metrics=None, loss=loss)  # type: ignore[arg-type]


def multilabel(loss: Any) -> Multilabel:
    return Multilabel(
        num_classes=CLASSES,
        class_names=None,
        threshold=0.5,
        monitor="val/f1",
        per_class=False,
        auroc=False,
        extra_metrics=None,
        loss=loss,
    )


def regression(loss: Any) -> Regression:
    return Regression(
        num_outputs=1,
        monitor="val/rmse",
        target_names=None,
        per_target=True,
        extra_metrics=None,
        loss=loss,
    )


def torch_ce(**options: Any) -> Reference:
    if "weight" in options:
        options["weight"] = torch.tensor(options["weight"], dtype=torch.float64)
    return lambda x, y: F.cross_entropy(x, y, **options)


def torch_bce(pos_weight: Any = None) -> Reference:
    weight = None if pos_weight is None else torch.tensor(pos_weight, dtype=torch.float64)
    return lambda x, y: F.binary_cross_entropy_with_logits(x.view_as(y), y, pos_weight=weight)


def of_values(function: Callable[..., Tensor], **options: Any) -> Reference:
    return lambda x, y: function(x.squeeze(1), y, **options)


# name: task, number of outputs, kind of target, and torch's result for one whole batch
CASES: dict[str, tuple[Any, int, str, Reference]] = {
    "cross_entropy": (multiclass(cross_entropy()), CLASSES, "class", torch_ce()),
    "label_smoothing": (
        multiclass(cross_entropy(smoothing=0.1)),
        *(CLASSES, "class", torch_ce(label_smoothing=0.1)),
    ),
    "class_weights": (
        multiclass(cross_entropy(weights=WEIGHTS)),
        *(CLASSES, "class", torch_ce(weight=WEIGHTS)),
    ),
    "class_weights_and_smoothing": (
        multiclass(cross_entropy(smoothing=0.1, weights=WEIGHTS)),
        *(CLASSES, "class", torch_ce(weight=WEIGHTS, label_smoothing=0.1)),
    ),
    "ignored_targets": (
        multiclass(cross_entropy(ignore=-100)),
        *(CLASSES, "ignored", torch_ce(ignore_index=-100)),
    ),
    "everything_at_once": (
        multiclass(cross_entropy(smoothing=0.1, weights=WEIGHTS, ignore=-100)),
        *(CLASSES, "ignored"),
        torch_ce(weight=WEIGHTS, label_smoothing=0.1, ignore_index=-100),
    ),
    "soft_targets": (multiclass(cross_entropy()), CLASSES, "soft", torch_ce()),
    "binary": (
        binary(losses.BCEWithLogits(pos_weight=None)),
        *(1, "binary", torch_bce()),
    ),
    "binary_pos_weight": (
        binary(losses.BCEWithLogits(pos_weight=3.0)),
        *(1, "binary", torch_bce(3.0)),
    ),
    "multilabel": (
        multilabel(losses.BCEWithLogits(pos_weight=WEIGHTS)),
        *(CLASSES, "labels", torch_bce(WEIGHTS)),
    ),
    "mse": (regression(losses.mse), 1, "value", of_values(F.mse_loss)),
    "l1": (regression(losses.l1), 1, "value", of_values(F.l1_loss)),
    "smooth_l1": (
        regression(functools.partial(losses.smooth_l1, beta=0.5)),
        *(1, "value", of_values(F.smooth_l1_loss, beta=0.5)),
    ),
    "huber": (
        regression(functools.partial(losses.huber, delta=0.5)),
        *(1, "value", of_values(F.huber_loss, delta=0.5)),
    ),
    "mse_plus_mae": (
        regression(functools.partial(mse_plus_mae, mae_factor=0.5)),
        *(1, "value"),
        lambda x, y: F.mse_loss(x.squeeze(1), y) + 0.5 * F.l1_loss(x.squeeze(1), y),
    ),
}


def model_of(outputs: int, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, outputs)).to(dtype)


def windows_of(
    kind: str, dtype: torch.dtype = torch.float64, *, weighted: bool = False
) -> list[LoadedBatch]:
    random = torch.Generator().manual_seed(2)
    batches = []
    for size in WINDOWS:
        inputs = torch.randn(size, 6, generator=random, dtype=dtype)
        targets = {
            "class": lambda n: torch.randint(CLASSES, (n,), generator=random),
            "ignored": lambda n: torch.randint(CLASSES, (n,), generator=random),
            "soft": lambda n: torch.rand(n, CLASSES, generator=random, dtype=dtype).softmax(1),
            "binary": lambda n: torch.randint(2, (n,), generator=random).to(dtype),
            "labels": lambda n: torch.randint(2, (n, CLASSES), generator=random).to(dtype),
            "value": lambda n: torch.randn(n, generator=random, dtype=dtype),
        }[kind](size)
        if kind == "ignored":
            targets[1::3] = -100
        choices = torch.tensor([0.0, 0.25, 1.0, 2.0])
        weights = choices[torch.randint(1, 4, (size,), generator=random)] if weighted else None
        if weights is not None:
            weights[0] = 0.0
        batches.append(batch_of(inputs, targets, weights))
    return batches


def trained(
    task: Any, outputs: int, batches: list[LoadedBatch], *, slices: int, **options: Any
) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """Return the weights after a step for each batch, and the logged lines."""
    model = model_of(outputs, batches[0].inputs.dtype)
    bench = Bench(model, task, SGD, slices=slices, **options)
    lines = [bench.step(batch) for batch in batches]
    return [p.detach() for p in model.parameters()], lines


def by_torch(reference: Reference, outputs: int, batches: list[LoadedBatch]) -> list[Tensor]:
    """Return the weights after the same steps by torch's own loss over each whole batch."""
    model = model_of(outputs, batches[0].inputs.dtype)
    optimizer = SGD(model.parameters())
    for batch in batches:
        optimizer.zero_grad()
        reference(model(batch.inputs), batch.targets).backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def difference(a: list[Tensor], b: list[Tensor]) -> float:
    return max((x - y).abs().max().item() for x, y in zip(a, b, strict=True))


class MeanOfMeans:
    """A common mistake: each micro-batch's mean counts the same, whatever its size."""

    def __init__(self, task: Any, batches: list[LoadedBatch], slices: int) -> None:
        self.task, self.slices, self.batches = task, slices, iter(batches)
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task, name)

    def loss(self, outputs: Tensor, targets: Tensor, weights: Tensor | None) -> Any:
        if self.calls % self.slices == 0:
            self.batch = next(self.batches)
        self.calls += 1
        result = self.task.loss(outputs, targets, weights)
        total = result.values.numel() if result.weights is None else result.weights.sum()
        factor = self.batch.num_global / (self.slices * total)
        return result._replace(values=result.values * factor)


@pytest.fixture(params=["host", "device"])
def host_or_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums as numbers; and as tensors that are waited for, with the CPU as the device."""
    monkeypatch.setattr(totals, "on_host", lambda device: request.param == "host")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("slices", [1, 3, 4, 13, 30])
def test_micro_batches_add_up_to_the_batch_for_every_loss(case: str, slices: int) -> None:
    task, outputs, kind, reference = CASES[case]
    batches = windows_of(kind)
    weights, _ = trained(task, outputs, batches, slices=slices)
    whole, _ = trained(task, outputs, batches, slices=1)
    assert difference(weights, whole) < 1e-12
    assert difference(weights, by_torch(reference, outputs, batches)) < 1e-12


@pytest.mark.usefixtures("host_or_device")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("slices", [3, 30])
def test_micro_batches_add_up_to_a_weighted_batch_for_every_loss(case: str, slices: int) -> None:
    task, outputs, kind, _ = CASES[case]
    batches = windows_of(kind, weighted=True)
    whole, _ = trained(task, outputs, batches, slices=1)
    cut, _ = trained(task, outputs, batches, slices=slices)
    unweighted, _ = trained(task, outputs, windows_of(kind), slices=1)
    assert difference(whole, cut) < 1e-12
    assert difference(whole, unweighted) > 1e-4


@pytest.mark.parametrize("case", ["cross_entropy", "everything_at_once", "mse"])
def test_micro_batches_add_up_to_the_batch_in_float32(case: str) -> None:
    task, outputs, kind, _ = CASES[case]
    batches = windows_of(kind, torch.float32)
    whole, _ = trained(task, outputs, batches, slices=1)
    cut, _ = trained(task, outputs, batches, slices=4)
    assert difference(whole, cut) < 1e-5


@pytest.mark.parametrize("case", CASES)
def test_a_mean_of_the_means_of_micro_batches_is_caught_for_every_loss(case: str) -> None:
    task, outputs, kind, reference = CASES[case]
    batches = windows_of(kind)
    wrong = MeanOfMeans(task, batches, slices=4)
    if kind == "ignored":  # a micro-batch without a valid target has no mean
        batches = batches[:2]
    weights, _ = trained(wrong, outputs, batches, slices=4)
    assert not difference(weights, by_torch(reference, outputs, batches)) < 1e-5


@pytest.mark.parametrize("case", ["class_weights", "ignored_targets"])
def test_a_missing_rescale_is_caught(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    task, outputs, kind, reference = CASES[case]
    batches = windows_of(kind)
    update = optim.update
    monkeypatch.setattr(
        optim, "update", lambda *args, **named: update(*args, **{**named, "factor": 1.0})
    )
    weights, _ = trained(task, outputs, batches, slices=4)
    assert difference(weights, by_torch(reference, outputs, batches)) > 1e-5


@pytest.mark.parametrize(("slices", "batch"), [(3, 20), (40, 20), (7, 80)])
def test_a_run_in_micro_batches_has_the_weights_of_the_run_without(
    slices: int, batch: int, tmp_path: Path
) -> None:
    """A ragged window, more micro-batches than examples, a batch larger than the epoch of 50."""
    run = (*TINY, f"data.batch_size={batch}", "trainer.max_steps=3")
    summaries = [
        train(tmp_path / name, *run, f"trainer.accumulation_steps={number}")
        for name, number in (("whole", 1), ("cut", slices))
    ]
    assert summaries[0]["steps"] == summaries[1]["steps"] == 3
    whole, cut = (
        torch.load(tmp_path / name / "checkpoints" / "last" / "model.pt", weights_only=True)
        for name in ("whole", "cut")
    )
    for name in whole:
        torch.testing.assert_close(cut[name], whole[name], atol=1e-5, rtol=0)
    for a, b in zip(metrics_of(tmp_path / "whole"), metrics_of(tmp_path / "cut"), strict=True):
        assert a == pytest.approx(b, abs=1e-5)


# Logged numbers


def true_norm(model: nn.Module, reference: Reference, batch: LoadedBatch) -> float:
    model = copy.deepcopy(model)
    model.zero_grad()
    reference(model(batch.inputs), batch.targets).backward()
    return nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()  # type: ignore[misc]


@pytest.mark.usefixtures("host_or_device")
@pytest.mark.parametrize("slices", [1, 4, 30])
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_norm_in_the_log_are_those_of_the_whole_batch(
    case: str, slices: int
) -> None:
    task, outputs, kind, reference = CASES[case]
    batches = windows_of(kind)
    model = model_of(outputs)
    bench = Bench(model, task, SGD, slices=slices, clip_norm=0.01)
    for batch in batches:
        norm = true_norm(model, reference, batch)
        loss = reference(model(batch.inputs), batch.targets).item()
        line = bench.step(batch)
        assert norm > 0.01  # large enough for clipping to show
        assert line["train/grad_norm"] == pytest.approx(norm, rel=1e-6)
        assert line["train/loss"] == pytest.approx(loss, rel=1e-6)


def test_a_log_of_the_last_micro_batch_alone_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    task, outputs, kind, reference = CASES["cross_entropy"]
    batch = windows_of(kind)[0]
    model = model_of(outputs)
    loss = reference(model(batch.inputs), batch.targets).item()
    forward = step.forward
    calls: list[int] = []

    def only_the_last(*arguments: Any) -> tuple[torch.Tensor, Totals]:
        calls.append(1)
        losses, part = forward(*arguments)
        return losses, part._replace(values=[value * (len(calls) == 4) for value in part.values])

    monkeypatch.setattr(step, "forward", only_the_last)
    line = Bench(model, task, SGD, slices=4).step(batch)
    assert line["train/loss"] != pytest.approx(loss, rel=1e-3)


def test_accuracy_and_epoch_means_count_every_example_once(tmp_path: Path) -> None:
    train(tmp_path, *TINY, "trainer.accumulation_steps=3", "trainer.max_epochs=2")
    lines = metrics_of(tmp_path)
    sizes = [16, 16, 16, 2]
    for epoch in (1, 2):
        steps = [x for x in lines if "train/loss" in x and (x["step"] - 1) // 4 == epoch - 1]
        (whole,) = (x for x in lines if "train/epoch_loss" in x and x["epoch"] == epoch)
        for name in ("loss", "accuracy"):
            exact = sum(s * x[f"train/{name}"] for s, x in zip(sizes, steps, strict=True)) / 50
            unweighted = sum(x[f"train/{name}"] for x in steps) / 4
            assert whole[f"train/epoch_{name}"] == pytest.approx(exact, rel=1e-6)
            assert whole[f"train/epoch_{name}"] != pytest.approx(unweighted, rel=1e-6)


@pytest.mark.usefixtures("host_or_device")
def test_named_components_add_up_to_the_loss() -> None:
    task, outputs, kind, _ = CASES["mse_plus_mae"]
    for slices in (1, 4, 30):
        _, lines = trained(task, outputs, windows_of(kind), slices=slices)
        for line in lines:
            parts = line["train/loss_mse"] + 0.5 * line["train/loss_mae"]
            assert line["train/loss"] == pytest.approx(parts, rel=1e-5)


@pytest.mark.usefixtures("host_or_device")
@pytest.mark.parametrize(("precision", "slices"), [("bf16", 1), ("fp16", 1), ("fp16", 4)])
def test_the_gradient_norm_in_the_log_is_unscaled(precision: str, slices: int) -> None:
    task, outputs, kind, reference = CASES["class_weights"]
    model = model_of(outputs, torch.float32)
    scale = LossScale(torch.device("cpu"), initial=2.0**10) if precision == "fp16" else None
    bench = Bench(
        model, task, SGD, slices=slices, precision=precision, loss_scale=scale, clip_norm=0.01
    )
    in_double = copy.deepcopy(model).double()
    for batch in windows_of(kind, torch.float32)[:2]:
        in_double.load_state_dict(model.state_dict())
        double = batch_of(batch.inputs.double(), batch.targets)
        norm = true_norm(in_double, reference, double)
        line = bench.step(batch)
        assert line["train/grad_norm"] == pytest.approx(norm, rel=0.03)
        before = nn.utils.get_total_norm([p.grad for p in model.parameters()])  # type: ignore[misc]
        assert before.item() == pytest.approx(0.01, rel=1e-3)  # clipped after unscaling
        if scale is not None:
            assert line["train/loss_scale"] == 2.0**10


def test_a_loss_scale_that_is_never_divided_out_is_caught() -> None:
    task, outputs, kind, reference = CASES["mse"]
    model = model_of(outputs, torch.float32)
    scale = LossScale(torch.device("cpu"), initial=2.0**10)
    bench = Bench(model, task, SGD, precision="fp16", loss_scale=scale)
    batch = windows_of(kind, torch.float32)[0]
    norm = true_norm(model, reference, batch)
    result = step.train_step(bench.state, batch, bench.plan.step)
    assert float(result.grad_norm) == pytest.approx(norm, rel=0.03)
    assert float(result.grad_norm) * 2.0**10 != pytest.approx(norm, rel=0.03)


@pytest.mark.parametrize("scheduler", ["cosine", "step", "onecycle", "linear", "exponential"])
def test_the_rate_at_a_step_depends_on_the_step_alone(scheduler: str, tmp_path: Path) -> None:
    run = (*TINY, f"scheduler={scheduler}")
    warm = () if scheduler == "onecycle" else ("scheduler.warmup_steps=3",)

    def rates(name: str, *more: str) -> list[float]:
        return [x["train/lr"] for x in metrics_of(tmp_path / name) if "train/lr" in x]

    train(tmp_path / "whole", *run, *warm)
    train(tmp_path / "slices", *run, *warm, "trainer.accumulation_steps=3")
    train(tmp_path / "cut", *run, *warm, stop_at=5)
    train(tmp_path / "cut", *run, *warm)
    assert len(rates("whole")) == 12
    assert len(set(rates("whole"))) > 2
    assert rates("whole") == rates("slices") == rates("cut")
    assert rates("whole")[1:] != rates("whole")[:-1]


# Clipping


@pytest.mark.parametrize("slices", [1, 4])
@pytest.mark.parametrize(("norm", "value"), [(0.05, None), (None, 0.01), (0.05, 0.01), (1e6, None)])
def test_clipping_is_what_torch_does(norm: float | None, value: float | None, slices: int) -> None:
    task, outputs, kind, reference = CASES["class_weights"]
    batches = windows_of(kind)
    model = model_of(outputs)
    optimizer = SGD(model.parameters())
    for batch in batches:
        optimizer.zero_grad()
        reference(model(batch.inputs), batch.targets).backward()
        if norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), norm)
        if value is not None:
            nn.utils.clip_grad_value_(model.parameters(), value)
        optimizer.step()
    expected = [p.detach() for p in model.parameters()]
    clipped, _ = trained(task, outputs, batches, slices=slices, clip_norm=norm, clip_value=value)
    free, _ = trained(task, outputs, batches, slices=slices)
    assert difference(clipped, expected) < 1e-12
    if norm != 1e6:
        assert difference(free, expected) > 1e-4


# Evaluation without effects

IMAGES = (
    "data=digits",
    "data.batch_size=64",
    "model=cnn",
    "model.channels=[4]",
    "model.dropout=0.3",
    "task.per_class=false",
    "task.auroc=false",
    "trainer.num_threads=1",
    "trainer.device=cpu",
    "trainer.max_steps=21",
    "trainer.checkpoint.save_every_epochs=null",
)
EVALUATIONS = {
    "every": ("trainer.eval_every_steps=1",),
    "seventh": ("trainer.eval_every_steps=7",),
    "never": (),
}


def weights_by_evaluations(folder: Path, *overrides: str) -> dict[str, str]:
    return {
        name: train(folder / name, *overrides, "trainer.eval_every_epochs=null", *often)[
            "weights_sha256"
        ]
        for name, often in EVALUATIONS.items()
    }


@pytest.mark.parametrize(
    "run",
    [
        (*IMAGES,),
        (*IMAGES, "trainer.ema_decay=0.9", "trainer.precision=bf16"),
        (*TINY, "model.dropout=0.3", "trainer.ema_decay=0.9"),
        (*TINY, "model.dropout=0.3", "trainer.accumulation_steps=3", "optimizer=muon"),
    ],
    ids=["cnn", "cnn_ema_bf16", "mlp_ema", "mlp_slices_muon"],
)
def test_evaluating_more_often_gives_the_same_weights(run: tuple[str, ...], tmp_path: Path) -> None:
    found = weights_by_evaluations(tmp_path, *run)
    assert found["every"] == found["seventh"] == found["never"]


SCHEDULE_FREE = (
    "optimizer._target_=schedulefree.AdamWScheduleFree",
    "~optimizer.fused",
    "~optimizer.amsgrad",
    "scheduler=constant",
)


def test_evaluating_a_schedule_free_optimizer_gives_the_same_weights(tmp_path: Path) -> None:
    pytest.importorskip("schedulefree")
    found = weights_by_evaluations(tmp_path, *TINY, *SCHEDULE_FREE)
    assert found["every"] == found["seventh"] == found["never"]


def test_a_schedule_free_optimizers_own_way_back_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("schedulefree")

    @contextlib.contextmanager
    def there_and_back(optimizer: Any, model: nn.Module) -> Iterator[None]:
        optimizer.eval()
        yield
        optimizer.train()

    monkeypatch.setattr(optim, "evaluating", there_and_back)
    found = weights_by_evaluations(tmp_path, *TINY, *SCHEDULE_FREE)
    assert len(set(found.values())) > 1


def test_evaluating_in_training_mode_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nn.Module, "eval", nn.Module.train)
    found = weights_by_evaluations(tmp_path, *IMAGES)
    assert found["every"] != found["never"]


@pytest.mark.slow
def test_dropout_that_draws_from_the_ambient_state_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = loop.evaluate

    def that_draws(*args: Any, **named: Any) -> Any:
        torch.rand(1)
        return evaluate(*args, **named)

    monkeypatch.setattr(loop, "evaluate", that_draws)
    run = (*TINY, "model.dropout=0.3")
    found = weights_by_evaluations(tmp_path / "seeded", *run)
    assert found["every"] == found["never"]
    monkeypatch.setattr(capture, "seed_step", lambda value: None)
    found = weights_by_evaluations(tmp_path / "unseeded", *run)
    assert found["every"] != found["never"]


def step_of_ones_own(state: TrainState, batch: Batch, plan: StepPlan) -> StepResult:
    return step.train_step(state, batch, plan)


def test_a_loss_that_does_not_sum_over_examples_is_not_split(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = (*TINY, "trainer.strategy=ddp")
    monkeypatch.setattr(losses.CrossEntropy, "sums_over_examples", False, raising=False)
    with pytest.raises(UserError, match=r"split into 2 parts, and this loss is not a sum"):
        training.build(config_of(*whole, "trainer.accumulation_steps=2"), CPU)
    two = World(device=CPU.device, size=2)
    with pytest.raises(UserError, match=r"split into 2 parts, and this loss is not a sum"):
        training.build(config_of(*whole), two)
    training.build(config_of(*whole), CPU)
    own = config_of(*whole, f"step._target_={__name__}.step_of_ones_own")
    objects = training.build(own, two)  # it may gather the rows
    plan: Any = SimpleNamespace(task=objects.task, world=two)
    with pytest.raises(UserError, match=r"split into 2 parts, and this loss is not a sum"):
        step.forward(next(iter(objects.train.epoch(0))), plan)  # or compute each share's own loss


def test_totals_of_different_micro_batches_add_up() -> None:
    two, one = torch.tensor([1.0, 2.0]), torch.tensor([3.0])
    plain = Totals.of(two, None, {"part": two}, two, 2)
    halved = Totals.of(one / 2, one / 6, {"part": one}, one, 1)
    without = Totals.of(one * 0, one * 0, {"part": one}, None, 0)  # a process without examples
    for parts in itertools.permutations([plain, halved, without]):
        found = functools.reduce(Totals.plus, parts)
        means = {"loss": 4.5 / 2.5, "score": 6 / 3, "loss_part": 4.5 / 2.5}
        assert found.means("score") == pytest.approx(means)
        assert found.weighted and found.scored and found.factor(3) == 3 / 2.5
        unscored = Totals.of(two, None, {"part": two}, None, 2)
        assert not found.plus(unscored).scored and not unscored.plus(found).scored


def test_losses_in_half_precision_are_summed_in_float32() -> None:
    losses = totals.weighted(torch.ones(257, dtype=torch.bfloat16), None)
    assert Totals.of(losses, None, {}, None, 257).read()[0] == 257  # bfloat16 lacks this number


class Noting(nn.Module):
    """Returns its inputs, and notes what it drew and in which precision it computed."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[tuple[float, torch.dtype]] = []

    def forward(self, inputs: Tensor) -> Tensor:
        self.noted.append((torch.rand(()).item(), (inputs @ inputs.T).dtype))
        return inputs


def test_an_evaluation_counts_by_weight_draws_by_batch_and_has_the_precision_of_the_run() -> None:
    model, right = Noting(), batch_of(torch.eye(3), torch.arange(3))
    wrong = LoadedBatch(torch.eye(3), torch.tensor([1, 2, 0]), torch.zeros(3), 3, 3)
    task = training.build(config_of(*TINY), CPU).task

    def values(*batches: LoadedBatch) -> dict[str, float]:
        return measure(model, task, batches, CPU, "bf16", QUIET, Draws(0, "val", 0, 0))[0]

    assert values(right, wrong) == values(right)
    (first, precision), (second, _), _ = model.noted
    assert first != second and precision == torch.bfloat16
