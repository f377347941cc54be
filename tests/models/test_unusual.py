"""Unusual models train, average, skip, save and resume correctly, or one line refuses them."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from running import (
    CPU,
    TINY,
    Bench,
    batch_of,
    before_each_step,
    config_of,
    fingerprint,
    launched,
    train_config,
)
from torch import Tensor, nn

from lab.build import check_first_batch, first_batch
from lab.state import average_of, update_average
from lab.tasks import losses
from lab.tasks.tasks import Multiclass
from regrow.checkpoint.digest import weights_sha256
from regrow.config.targets import allow
from regrow.errors import UserError
from regrow.feeding.splits import Examples, Splits
from regrow.load import load_run
from regrow.numerics.calls import call
from regrow.numerics.totals import Skipped, gradient_norm
from regrow.record.records import read_json
from regrow.runs import model_checks, training, weights

OPTIONS = (
    *("trainer.ema_decay=0.9", "trainer.clip_norm=1.0", "trainer.clip_value=0.5"),
    "trainer.accumulation_steps=2",
)


class Base(nn.Module):
    """Linear over the inputs (B, 6), to three classes."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(6, 3)

    def forward(self, inputs: Tensor) -> Any:
        return self.out(inputs)


class Experts(Base):
    """Routes each example to one of four linear layers, by its rank in the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))

    def forward(self, inputs: Tensor) -> Any:
        route = inputs[:, 0].argsort().argsort() * 4 // len(inputs)
        mixed = torch.zeros_like(inputs)
        for index, expert in enumerate(self.experts):
            mixed[route == index] = expert(inputs[route == index])
        return self.out(mixed)


# Models that train.


class Integers(Base):
    """Parameters and buffers of every integer type, and empty ones."""

    def __init__(self) -> None:
        super().__init__()
        self.index = nn.Parameter(torch.tensor([5, 4, 3, 2, 1, 0]), requires_grad=False)
        self.none = nn.Parameter(torch.zeros(0, 4))
        self.unused = nn.Parameter(torch.ones(2))  # never gets a gradient
        for name, dtype in {"a": torch.uint8, "b": torch.bool, "c": torch.int32}.items():
            self.register_buffer(name, torch.zeros(2, dtype=dtype))
        self.register_buffer("nothing", torch.zeros(0))
        self.register_buffer("scalar", torch.tensor(1.0))
        self.register_buffer("turns", torch.tensor([1 + 1j, 2 - 1j]))

    def forward(self, inputs: Tensor) -> Any:
        return self.out(inputs[:, self.index]) + self.none.sum() + self.turns.real[0]


class Lazy(Base):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Sequential(nn.LazyLinear(5), nn.LazyBatchNorm1d(), nn.LazyLinear(3))


class LazyOfAnyConfig(Lazy):
    def __init__(self, **config: Any) -> None:
        super().__init__()


class Double(Base):
    def __init__(self) -> None:
        super().__init__()
        self.double()

    def forward(self, inputs: Tensor) -> Any:
        return self.out(inputs.double())


class Wrapped(Base):
    """Old and new parametrizations, and weights that two modules share."""

    def __init__(self) -> None:
        super().__init__()
        parametrized = nn.utils.parametrizations
        self.first = parametrized.weight_norm(nn.Linear(6, 6))
        self.second = parametrized.spectral_norm(nn.Linear(6, 6))
        self.third = nn.utils.spectral_norm(nn.Linear(6, 6))
        self.fourth, self.fifth = nn.Linear(6, 6), nn.Linear(6, 6)
        self.fifth.weight = self.fourth.weight

    def forward(self, inputs: Tensor) -> Any:
        for layer in (self.first, self.second, self.third, self.fourth, self.fifth):
            inputs = layer(inputs).tanh()
        return self.out(inputs)


class Counting(Base):
    """A buffer that each forward pass, in evaluation too, replaces by a new tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, inputs: Tensor) -> Any:
        self.calls = self.calls + 1
        return self.out(inputs) / self.calls.sqrt()


class Extra(Base):
    """Plain values in the state_dict."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, Any] = {"passes": 0, "scale": torch.ones(2)}

    def forward(self, inputs: Tensor) -> Any:
        self.seen["passes"] += self.training
        return self.out(inputs)

    def get_extra_state(self) -> Any:
        return self.seen

    def set_extra_state(self, state: Any) -> None:
        self.seen = state


class Positions(Base):
    """A cached table that grows with the longest input so far, as with rotary embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(1), persistent=False)
        self.length = 1

    def forward(self, inputs: Tensor) -> Any:
        if self.length < len(inputs):
            self.length = len(inputs)
            self.register_buffer("table", torch.arange(self.length) / 10.0, persistent=False)
        return self.out(inputs) * (1 + self.table[: len(inputs), None])


class Notes(Base):
    """Keeps in plain attributes what no later output depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.scale: Tensor | None = None

    def forward(self, inputs: Tensor) -> Any:
        self.calls += 1
        if self.scale is None:  # a cache
            self.scale = torch.full((6,), 0.5)
        return self.out(inputs * self.scale)


TRAINS = [Integers, Lazy, Double, Wrapped, Counting, Positions, Notes]


def config_with(model: type, *overrides: str) -> dict[str, Any]:
    config = config_of(*TINY, *overrides)
    config["model"] = {"_target_": f"{model.__module__}.{model.__qualname__}"}
    allow(config)
    return config


def run_with(folder: Path, model: type, *overrides: str, stop_at: int | None = None) -> Any:
    config = config_with(model, *overrides)
    objects = training.build(config, CPU)
    check_first_batch(objects, CPU)  # leaves no trace
    summary = train_config(folder, config, stop_at=stop_at)
    return summary, objects


@pytest.mark.parametrize(
    ("model", "options"),
    [
        *((model, OPTIONS) for model in TRAINS if model is not Lazy),
        (Lazy, OPTIONS[:3]),  # its BatchNorm cannot train on one example
        (Extra, OPTIONS[1:]),
    ],
)
def test_an_unusual_model_trains_and_a_resume_gives_the_same(
    model: type, options: tuple[str, ...], tmp_path: Path
) -> None:
    summary, _ = run_with(tmp_path / "whole", model, *options)
    assert summary["status"] == "completed" and summary["skipped_steps"] == 0
    assert math.isfinite(summary["test"]["test/loss"])
    run_with(tmp_path / "parts", model, *options, stop_at=5)
    resumed, objects = run_with(tmp_path / "parts", model, *options)
    assert fingerprint(tmp_path / "whole") == fingerprint(tmp_path / "parts")
    assert resumed["weights_sha256"] == summary["weights_sha256"]
    assert weights_sha256(objects.state.model) != summary["weights_sha256"]  # the untrained one
    weights.load_weights(objects.state.model, tmp_path / "whole")


def bench_of(model: nn.Module, **options: Any) -> Bench:
    loss = losses.CrossEntropy(label_smoothing=0.0, class_weights=None, ignore_index=None)
    task = Multiclass(
        num_classes=3,
        class_names=None,
        monitor=None,
        per_class=False,
        auroc=False,
        extra_metrics=None,
        loss=loss,
    )
    make = functools.partial(torch.optim.AdamW, lr=0.01, fused=True)
    return Bench(model, task, make, **{"ema_decay": 0.9, "clip_norm": 1.0, **options})


@pytest.mark.parametrize("model", TRAINS)
def test_a_bad_step_of_an_unusual_model_changes_nothing(model: type) -> None:
    torch.manual_seed(0)
    made = model()
    good = batch_of(torch.randn(8, 6), torch.randint(3, (8,)))
    if model_checks.has_lazy_parts(made):
        model_checks.materialise(made, good)
    bench = bench_of(made, slices=2)
    bench.step(good)
    before = weights_sha256(made), weights_sha256(bench.state.averaged)
    bad = batch_of(torch.full((8, 6), math.nan), good.targets)
    assert bench.step(bad)["train/skipped_steps"] == 1
    assert (weights_sha256(made), weights_sha256(bench.state.averaged)) == before
    bench.step(good)
    assert weights_sha256(made) != before[0]


def test_on_a_device_a_replaced_buffer_is_put_back_without_a_wait() -> None:
    model = Counting()
    bench = bench_of(model)
    for skipped, expected in ((False, 1), (True, 1), (False, 2)):
        bench.plan.step.buffers.remember()
        model(torch.ones(2, 6))
        bench.plan.step.buffers.restore(Skipped(torch.tensor(skipped)))
        assert model.calls.item() == expected


def test_the_first_batch_leaves_no_trace_in_a_buffer() -> None:
    objects = training.build(config_with(Counting, *OPTIONS), CPU)
    before = weights_sha256(objects.state.model)
    check_first_batch(objects, CPU)
    assert weights_sha256(objects.state.model) == before


def test_an_integer_parameter_is_taken_over_by_the_average() -> None:
    model = Integers()
    bench = bench_of(model)
    model.index.data.fill_(2)
    bench.step(batch_of(torch.ones(2, 6), torch.tensor([0, 1])))
    assert bench.state.averaged is not None
    assert bench.state.averaged.index.tolist() == [2] * 6


def test_the_hash_is_over_names_types_shapes_and_bytes_in_the_order_of_the_names() -> None:
    model = nn.Module()
    model.register_buffer("wide", torch.tensor([1 + 2j]).conj())
    model.register_buffer("narrow", torch.ones(2, 1, dtype=torch.bfloat16))
    hashed = hashlib.sha256(b"narrow torch.bfloat16 (2, 1)" + b"\x80\x3f" * 2)
    hashed.update(b"wide torch.complex64 (1,)" + np.complex64(1 - 2j).tobytes())
    assert weights_sha256(model) == hashed.hexdigest()


@pytest.mark.parametrize("kind", [list, tuple, lambda items: dict(enumerate(items))])
def test_the_hash_sees_each_number_of_an_extra_state(kind: Any) -> None:
    class Extra(nn.Module):
        def get_extra_state(self) -> Any:
            return kind([tensor])

    tensor = torch.zeros(2_000)  # of which a text shows six
    before = weights_sha256(Extra())
    tensor[1_000] = 1
    assert weights_sha256(Extra()) != before


def test_a_complex_parameter_has_an_average() -> None:
    model = nn.ParameterList([torch.zeros(3, dtype=torch.complex64)])
    averaged = average_of(model)
    model[0].data.fill_(4 + 8j)
    update_average(averaged, model, 0.25, Skipped(False))
    assert averaged[0].tolist() == [1 + 2j] * 3


def test_a_lazy_model_is_loaded_from_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    launched("model._target_=test_unusual.LazyOfAnyConfig")
    (folder,) = {path.parent.resolve() for path in tmp_path.glob("outputs/*/*/summary.json")}
    run = load_run(folder, which="last")
    assert weights_sha256(run.model) == read_json(folder / "summary.json")["weights_sha256"]
    assert run.model(torch.ones(2, 6)).shape == (2, 3)


def test_the_norm_of_half_precision_gradients_does_not_overflow() -> None:
    gradients = [torch.full((4,), 6e4, dtype=torch.float16)]
    assert gradient_norm(gradients) == pytest.approx(119_968, rel=1e-3)


# Models that are refused.


class Complex(Base):
    def __init__(self) -> None:
        super().__init__()
        self.phase = nn.Parameter(torch.ones(6, dtype=torch.complex64))


class Half(Base):
    def __init__(self) -> None:
        super().__init__()
        self.bfloat16()


class SparseGradients(Base):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4, 6, sparse=True)

    def forward(self, inputs: Tensor) -> Any:
        return self.out(self.table(inputs[:, 0].long().abs() % 4))


class SparseFunction(SparseGradients):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4, 6)

    def forward(self, inputs: Tensor) -> Any:
        index = inputs[:, 0].long().abs() % 4
        return self.out(nn.functional.embedding(index, self.table.weight, sparse=True))


class SparseBuffer(Base):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("graph", torch.eye(3).to_sparse())


class Expanded(Base):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(1, 6).expand(4, 6))


class Conjugated(Base):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("turns", torch.tensor([1 + 1j]).conj())


class Meta(Base):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(6, 3, device="meta")


class Created(Base):
    def forward(self, inputs: Tensor) -> Any:
        self.register_buffer("made", torch.ones(3))
        return super().forward(inputs)


class FilledNone(Base):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", None)

    def forward(self, inputs: Tensor) -> Any:
        if self.training:
            self.mask = torch.ones(3)
        return super().forward(inputs)


class Growing(Base):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("memory", torch.zeros(1))

    def forward(self, inputs: Tensor) -> Any:
        self.memory = torch.cat([self.memory, torch.ones(1)])
        return super().forward(inputs)


class GrowsLate(Growing):
    """Grows in the third step alone."""

    grows = False

    def forward(self, inputs: Tensor) -> Any:
        return super().forward(inputs) if self.grows and self.training else self.out(inputs)


class Remembers(Base):
    """Keeps the keys of each batch for the next one."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("keys", torch.zeros(1, 6), persistent=False)

    def forward(self, inputs: Tensor) -> Any:
        self.keys = torch.cat([self.keys, inputs.detach()])
        return self.out(inputs + self.keys.mean(0))


class Averages(Base):
    """Keeps a running mean of the inputs in a buffer that its first batch makes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", None, persistent=False)

    def forward(self, inputs: Tensor) -> Any:
        before = torch.zeros(6) if self.mean is None else self.mean
        self.mean = 0.9 * before + 0.1 * inputs.detach().mean(0)
        return self.out(inputs - self.mean)


class Anneals(Base):
    """Lowers a temperature at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = 2.0

    def forward(self, inputs: Tensor) -> Any:
        self.temperature *= 0.99
        return self.out(inputs) / self.temperature


class OwnDraws(Base):
    """Draws from a generator of its own, which no step seeds."""

    def __init__(self) -> None:
        super().__init__()
        self.draws = np.random.default_rng(0)

    def forward(self, inputs: Tensor) -> Any:
        return self.out(inputs + self.draws.normal())


class RunningMean(Base):
    """Keeps a tensor that is not a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = torch.zeros(6)

    def forward(self, inputs: Tensor) -> Any:
        self.mean.lerp_(inputs.detach().mean(0), 0.1)
        return self.out(inputs - self.mean)


class Attached(Base):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("memory", torch.zeros(3))

    def forward(self, inputs: Tensor) -> Any:
        outputs = super().forward(inputs)
        self.memory = self.memory + outputs.mean(0)
        return outputs


class UnusedLazy(Base):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.LazyLinear(3)


class LazyThatMakes(Lazy):
    def forward(self, inputs: Tensor) -> Any:
        self.register_buffer("made", torch.ones(3))
        return super().forward(inputs)


class Frozen(Base):
    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)


class Empty(nn.Module):
    def forward(self, inputs: Tensor) -> Any:
        return inputs[:, :3]


class Detached(Base):
    def forward(self, inputs: Tensor) -> Any:
        return self.out(inputs).detach()


class InAList(Base):
    def __init__(self) -> None:
        super().__init__()
        self.layers = [nn.Linear(6, 6)]

    def forward(self, inputs: Tensor) -> Any:
        return self.out(self.layers[0](inputs))


class Mapping(Base):
    def forward(self, inputs: Tensor) -> Any:
        return {"logits": self.out(inputs)}


class Tuple(Base):
    def forward(self, inputs: Tensor) -> Any:
        return self.out(inputs), inputs


class OldWeightNorm(Base):
    def __init__(self) -> None:
        super().__init__()
        with pytest.warns(FutureWarning):
            self.out = nn.utils.weight_norm(self.out)


class KeepsResult(Base):
    def __init__(self) -> None:
        super().__init__()
        self.penalty = self.out.weight.square().sum()


class Closure(Base):
    def __init__(self) -> None:
        super().__init__()
        self.run = lambda inputs: self.out(inputs)

    def forward(self, inputs: Tensor) -> Any:
        return self.run(inputs)


class Unreadable(Base):
    def get_extra_state(self) -> Any:
        return Path("x")

    def set_extra_state(self, state: Any) -> None: ...


EMA = OPTIONS[:1]
REFUSED: list[tuple[type, tuple[str, ...], str]] = [
    (Complex, (), r"parameter phase is complex64\. Keep a real"),
    (Half, EMA, r"trainer\.ema_decay=0\.9: the parameter out\.weight is bfloat16.*null\."),
    (SparseGradients, (), r"table gives sparse gradients.*Use sparse=False\."),
    (SparseFunction, (), r"table\.weight gives sparse gradients.*Use sparse=False\."),
    (SparseBuffer, (), r"graph is a sparse tensor"),
    (Expanded, (), r"mask share their memory.*\.clone\(\)"),
    (Conjugated, (), r"turns is a conjugated view\. Add \.resolve_conj"),
    (Meta, (), r"out\.weight is on the meta device"),
    (Created, EMA, r"forward changes made \(before: missing, after: float32 \(3,\)\).*__init__"),
    (FilledNone, (), r"forward changes mask"),
    (Growing, (), r"forward changes memory \(before: float32 \(1,\).*persistent=False"),
    (Remembers, (), r"forward changes keys, and the outputs for the same inputs with it"),
    (Averages, (), r"forward changes mean, and the outputs for the same inputs with it"),
    (Attached, (), r"the buffer memory keeps the graph.*\.detach\(\)"),
    (UnusedLazy, (), r"other\.weight, other\.bias of lazy modules"),
    (LazyThatMakes, (), r"forward makes made\. Register it in __init__"),
    (Frozen, (), r"requires_grad is false for all parameters, which leaves nothing to train"),
    (Empty, (), r"model: it has no parameters"),
    (Detached, (), r"outputs depend on no trainable parameter"),
    (InAList, (), r"parameter of shape \(6, 6\) that the model does not list.*nn\.ModuleList"),
    (Mapping, (), r"dict"),
    (Tuple, (), r"tuple"),
    (OldWeightNorm, EMA, r"trainer\.ema_decay: the model cannot be copied.*weight_norm"),
    (KeepsResult, EMA, r"trainer\.ema_decay: the model cannot be copied"),
    (Closure, EMA, r"copy of the model still uses out\.(weight|bias) of the original"),
    (Unreadable, (), r"_extra_state of the model's state is a PosixPath.*get_extra_state"),
    (Extra, EMA, r"trainer\.ema_decay=0\.9: _extra_state .*has no average"),
]


@pytest.mark.parametrize(("model", "options", "line"), REFUSED, ids=lambda value: str(value)[-40:])
def test_a_model_that_cannot_be_trained_is_one_line_before_anything_starts(
    model: type, options: tuple[str, ...], line: str
) -> None:
    with pytest.raises(UserError, match=line) as raised:
        check_first_batch(training.build(config_with(model, *options), CPU), CPU)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("model", "attribute"),
    [(Anneals, "temperature"), (OwnDraws, "draws"), (RunningMean, "mean"), (Notes, "")],
)
def test_state_that_no_checkpoint_holds_is_one_line(
    model: type, attribute: str, caplog: pytest.LogCaptureFixture
) -> None:
    objects = training.build(config_with(model), CPU)
    check_first_batch(objects, CPU)
    said = [line for line in caplog.messages if "Register it as a buffer" in line]
    name = f"{model.__name__}.{attribute}"
    assert len(said) == bool(attribute)
    assert all(f"forward changes {name}, and the outputs" in line for line in said)
    if model is Anneals:  # once evaluated, once in training mode; then a copy was called
        assert objects.state.model.temperature == 2.0 * 0.99 * 0.99


def test_no_checkpoint_holds_a_buffer_whose_shape_the_last_step_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("trainer.max_epochs=null", "trainer.max_steps=3")
    run_with(tmp_path / "control", GrowsLate, *options)
    assert [*(tmp_path / "control" / "checkpoints").glob("step_*3")]

    def grow(state: Any, plan: Any) -> None:
        state.model.grows = state.step == 2

    before_each_step(monkeypatch, grow)
    with pytest.raises(UserError, match=r"buffer memory from shape \[1\] to \[2\]"):
        run_with(tmp_path / "run", GrowsLate, *options)
    assert not [*(tmp_path / "run" / "checkpoints").glob("step_*3")]


NEED_A_BATCH = (
    *(SparseFunction, Created, FilledNone, Growing, Attached, Detached, InAList, Mapping, Tuple),
    *(Closure, Remembers, Averages),
)


@pytest.mark.parametrize(
    ("model", "options", "line"), REFUSED, ids=lambda value: getattr(value, "__name__", "")
)
def test_a_check_that_needs_no_batch_is_made_without_the_first(
    model: type, options: tuple[str, ...], line: str
) -> None:
    """conf/trainer/default.yaml lists the checks that need it."""
    config = config_with(model, *options, "trainer.check_first_batch=false")
    with (
        contextlib.nullcontext() if model in NEED_A_BATCH else pytest.raises(UserError, match=line)
    ):
        training.build(config, CPU)


@pytest.mark.parametrize("model", [OldWeightNorm, KeepsResult, Closure, Half])
def test_a_model_that_only_its_average_forbids_is_built_without_one(model: type) -> None:
    training.build(config_with(model), CPU)


def test_experts_that_a_few_examples_do_not_reach_pass_under_ddp() -> None:
    forward_check(Experts)(needs_all=True)


def test_a_parameter_without_a_gradient_is_one_line_under_ddp() -> None:
    check = forward_check(Integers)
    check(needs_all=False)
    with pytest.raises(UserError, match=r"unused gets no gradient.*find_unused_parameters=true"):
        check(needs_all=True)


def forward_check(model: type) -> Callable[..., None]:
    objects = training.build(config_with(model), CPU)
    first = first_batch(objects.train, objects.sets)
    return functools.partial(
        model_checks.check_forward,
        *(objects.state.model, None, first, "fp32"),
        before=model_checks.described(objects.state.model),
        is_sharded=False,
        compiles=False,
    )


# Integer inputs to a float model.


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(6, 3),
        nn.Conv1d(2, 3, 1),
        nn.LayerNorm(6),
        nn.BatchNorm1d(6),
        nn.GRU(6, 3),
        nn.Dropout(),
        nn.Softmax(-1),
        nn.GELU(),
    ],
    ids=lambda layer: type(layer).__name__,
)
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
def test_integers_to_a_model_of_floats_are_one_line(layer: nn.Module, dtype: torch.dtype) -> None:
    inputs = torch.ones(2, 6, dtype=dtype)
    for given in (inputs, (inputs,), {"input": inputs}):
        with pytest.raises(UserError, match=r"cannot compute with u?int\d+ inputs") as raised:
            call(layer, given)
        assert "\n" not in str(raised.value) and "data.integers=float32" in str(raised.value)


def test_other_failures_of_a_forward_pass_stay_as_they_are() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as raised:
        call(nn.Linear(6, 3), torch.ones(2, 5))
    assert not isinstance(raised.value, UserError)
    with pytest.raises(IndexError):
        call(nn.Embedding(3, 2), torch.tensor([7]))


class Margin(nn.Module):
    """A loss with a parameter of its own."""

    def __init__(self, trains: bool) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()), requires_grad=trains)

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.scale * outputs, targets, reduction="none")


@pytest.mark.parametrize("trains", [True, False])
def test_a_parameter_of_the_loss_is_named_unless_it_is_frozen(
    trains: bool, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of(*TINY)
    config["loss"] = {"_target_": f"{__name__}.Margin", "trains": trains}
    allow(config)
    check_first_batch(training.build(config, CPU), CPU)
    said = [line for line in caplog.messages if "is neither trained nor saved" in line]
    assert len(said) == trains and all("loss_fn.scale of the task" in line for line in said)


def test_a_run_on_integers_in_memory_ends_before_it_starts_and_the_advice_helps() -> None:
    def checked(*overrides: str) -> None:
        config = config_of(*TINY, "data.normalize=none", *overrides)
        config["data"]["source"] = {"_target_": f"{__name__}.counts"}
        allow(config)
        check_first_batch(training.build(config, CPU), CPU)

    with pytest.raises(UserError, match=r"int64 inputs .* data\.integers=float32"):
        checked()
    checked("data.integers=float32")


def counts() -> Splits:
    """Integer features."""
    draws = torch.Generator().manual_seed(0)
    train, val = (torch.randint(0, 90, (n, 6), generator=draws) for n in (50, 20))
    return Splits(Examples(train, train[:, 0] % 3), Examples(val, val[:, 0] % 3), None)


class Volumes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Conv3d(1, 3, 3, padding=1)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.kernel(inputs.view(-1, 1, 1, 2, 3)).mean((2, 3, 4))
        return outputs


class Grid(Base):
    """A model with a buffer for volumes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("grid", torch.zeros(1, 1, 2, 2, 2))


@pytest.mark.parametrize(
    ("model", "named"),
    [(Volumes, r"kernel.weight of the model, \[3, 1, 3, 3, 3\]"), (Grid, "grid of the model")],
)
def test_a_memory_format_of_images_for_a_model_of_volumes_is_one_line(
    model: type[nn.Module], named: str
) -> None:
    training.build(config_with(model), CPU)
    with pytest.raises(UserError, match=rf"{named}, .*=false"):
        training.build(config_with(model, "trainer.channels_last=true"), CPU)
