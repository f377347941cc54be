"""A step that a CUDA graph would not repeat is detected; a CPU shows it as well."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import itertools
import logging
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pytest
import torch
from running import Bench, batch_of, options_of
from torch import Tensor, nn

from lab import faults, optim
from lab.build import capture_of
from lab.tasks import losses
from lab.tasks.losses import CrossEntropy
from lab.tasks.tasks import Multiclass
from regrow.distributed.parallel import World
from regrow.numerics import capture
from regrow.numerics.capture import Recording, distance, mapped, same, tensors_in, watched
from regrow.numerics.totals import scalar
from regrow.randomness import seed_step


class Model(nn.Module):
    """A linear layer that also does `act`."""

    def __init__(self, act: Callable[[Any, Tensor], object]) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.norm = nn.BatchNorm1d(2)
        self.act: Any = act
        self.calls, self.temperature, self.names = 0, 1.0, ["a"]
        self.settings = {"rates": [0.1, 0.2], "array": np.zeros(3)}
        self.own = np.random.default_rng(0)
        self.lock = threading.Lock()  # cannot be pickled
        self.last: Tensor | None = None
        self.steps = torch.zeros(())
        self.loss = _Loss()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, inputs: Tensor) -> Tensor:
        self.act(self, inputs)
        outputs: Tensor = self.norm(self.linear(inputs))
        return outputs


class _Loss:
    """An object that is not a module."""

    def __init__(self) -> None:
        self.module = nn.Linear(1, 1)
        self.seen = 0
        self.in_units = _Data().in_units


class _Data:
    """Data that a task refers to, which is not part of a step."""

    reads = 0

    def in_units(self) -> None:
        self.reads += 1


def set_to(name: str, value: Callable[[Any, Tensor], object]) -> Callable[[Any, Tensor], object]:
    return lambda model, inputs: setattr(model, name, value(model, inputs))


CHANGES: dict[str, tuple[Callable[[Any, Tensor], object], str]] = {
    "a counter": (set_to("calls", lambda m, x: m.calls + 1), "calls"),
    "an annealed float": (set_to("temperature", lambda m, x: 0.9 * m.temperature), "temperature"),
    "a growing list": (lambda m, x: m.names.append("b"), "names"),
    "a number in a mapping": (lambda m, x: m.settings["rates"].append(0.0), "settings"),
    "an array": (lambda m, x: m.settings["array"].fill(1), "settings"),
    "its own generator": (lambda m, x: m.own.random(), "own"),
    "a tensor kept for the next step": (set_to("last", lambda m, x: x.mean()), "last"),
    "a tensor on the CPU": (lambda m, x: m.steps.add_(1), "steps"),
    "a buffer that is replaced": (set_to("count", lambda m, x: m.count + 1), "count"),
    "an object of the model": (lambda m, x: setattr(m.loss, "seen", m.loss.seen + 1), "loss"),
    "a module inside an object": (lambda m, x: setattr(m.loss.module, "n", 1), "loss.n"),
    "a draw from numpy": (lambda m, x: np.random.rand(), "draws from numpy"),
    "a draw from random": (lambda m, x: random.random(), "draws from numpy"),
    "a draw from torch": (lambda m, x: torch.rand(1), "draws from numpy"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_act_that_a_graph_would_not_repeat_is_named(change: str) -> None:
    act, word = CHANGES[change]
    model = Model(act)
    _, reason = watched(model, torch.ones(4, 3), 7, [model])
    assert reason is not None and word in reason


def test_a_model_that_keeps_no_state_in_python_may_be_recorded() -> None:
    model = Model(lambda model, inputs: (model.count.add_(1), model.loss.in_units()))
    for _ in range(3):
        outputs, reason = watched(model, torch.randn(4, 3), 7, [model])
        assert reason is None and outputs.shape == (4, 2)
    assert model.count.item() == 3


def test_a_piece_is_seeded_before_it_runs() -> None:
    dropout, inputs = nn.Dropout(0.5), torch.ones(4, 8)
    first, _ = watched(dropout, inputs, 7, [dropout])
    again, other = (capture.Eager().run(dropout, inputs, seed) for seed in (7, 8))
    assert same([first], [again]) and not same([first], [other])


def test_tensors_are_compared_bit_for_bit() -> None:
    some = [torch.tensor([1.0, torch.nan]), torch.tensor(3)]
    assert same(some, [tensor.clone() for tensor in some])
    assert not same(some, [torch.tensor([1.0, torch.nan]), torch.tensor(4)])
    assert not same([torch.tensor(0.0)], [torch.tensor(-0.0)])
    assert not same([torch.zeros(2)], [torch.zeros(2, 1)]) and not same([], [torch.zeros(1)])
    assert distance([torch.tensor([3.0, 4.0])], [torch.tensor([3.0, 4.5])]) == pytest.approx(
        0.5 / torch.tensor([3.0, 4.5]).norm().item()
    )
    nan = distance([torch.tensor([torch.nan])], [torch.ones(1)])
    assert nan != nan and not nan <= 1e9


class Outputs(NamedTuple):
    sums: Tensor
    names: tuple[str, ...]
    norm: float


def test_batches_and_results_are_mapped_tensor_by_tensor() -> None:
    inputs = {"a": torch.ones(2, 3), "b": torch.zeros(2)}
    batch = batch_of(inputs, torch.arange(2), torch.ones(2))
    doubled = mapped(batch, lambda tensor: tensor * 2)
    assert [t.sum().item() for t in tensors_in(doubled)] == [12, 0, 2, 4]
    assert (doubled.num_local, doubled.num_global) == (2, 2)
    outputs = mapped(Outputs(torch.ones(1), ("x",), 1.0), lambda tensor: tensor + 1)
    assert outputs == Outputs(torch.tensor([2.0]), ("x",), 1.0)


def test_replays_are_compared_early_seldom_later_and_in_later_epochs() -> None:
    recording = Recording({}, epoch=0)
    compared = [number for number in range(1, 300) if recording.count_replay((number + 3) // 50)]
    assert compared == [1, 2, 3, 10, 47, 97, 100]


def test_buffers_of_a_module_inside_a_task_are_restored_by_a_comparison() -> None:
    class Task:
        def __init__(self) -> None:
            self.loss = nn.Sequential(nn.BatchNorm1d(2))

    task = Task()
    found = {id(tensor) for tensor in capture.attribute_tensors([nn.BatchNorm1d(3), task])}
    assert {id(buffer) for buffer in task.loss.buffers()} <= found
    assert len(found) == 6  # those of the model too


HELD = {"factor": 1.0}  # a global that the forward pass reads


class Frozen:
    """Stands for a CUDA graph: repeats a piece with the numbers of when it was recorded."""

    made: ClassVar[list[Frozen]] = []
    python: ClassVar[list[dict[str, Any]]] = []  # the mappings whose numbers a graph would keep

    def __init__(
        self, piece: Callable[[Any], Any], given: Any, parameters: Sequence[Tensor], pool: Any
    ) -> None:
        self.piece, self.held, self.replays = piece, self.numbers(), 0
        self.after: list[Tensor | None] = [None] * len(parameters)
        self.made.append(self)

    def replay(self, given: Any, seed: int | None) -> Any:
        self.replays += 1
        if seed is not None:
            seed_step(seed)
        now = self.numbers()
        try:
            for mapping, held in zip(self.python, self.held, strict=True):
                mapping.update(held)
            return self.piece(given)
        finally:
            for mapping, values in zip(self.python, now, strict=True):
                mapping.update(values)

    def numbers(self) -> list[dict[str, float]]:
        return [
            {key: value for key, value in mapping.items() if isinstance(value, int | float)}
            for mapping in self.python
        ]


@pytest.fixture
def on_a_cpu(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Let `Graphs` run without a GPU, with `Frozen` pieces."""
    caplog.set_level(logging.INFO, logger="regrow.numerics.capture")
    Frozen.made, Frozen.python = [], [HELD]
    HELD["factor"] = 1.0
    monkeypatch.setattr(capture, "Recorded", Frozen)
    without = {"mem_get_info": (1, 1), "memory_snapshot": [], "get_sync_debug_mode": 0}
    for name in ("graph_pool_handle", "current_stream", "empty_cache", "set_sync_debug_mode"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: (0, 1))
    for name, value in without.items():
        monkeypatch.setattr(torch.cuda, name, functools.partial(lambda value: value, value))


def graphs_of(
    model: nn.Module, optimizer: torch.optim.Optimizer | None = None, *, deterministic: bool = True
) -> capture.Graphs:
    parameters = [*model.parameters()]

    def state() -> list[Tensor]:
        states = optimizer.state.values() if optimizer is not None else ()
        own = [value for each in states for value in each.values() if isinstance(value, Tensor)]
        return [*(p.data for p in parameters), *own]

    return capture.Graphs(
        *(torch.device("cpu"), parameters, state, [model], tuple),
        update=True,
        deterministic=deterministic,
        reason=None,
    )


def weights_after(
    runner: capture.Eager,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    steps: int = 30,
    factor: Callable[[int], float] = lambda step: 1.0,
    noise: Callable[[], float] = lambda: 0.0,
) -> list[Tensor]:
    """Return the weights after steps of two micro-batches, in epochs of 20 steps."""

    def forward_and_backward(batch: Any) -> Tensor:
        loss = (model(batch.inputs) * (HELD["factor"] + noise())).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    @torch.no_grad()
    def update(number: Tensor | int) -> None:
        for p in model.parameters():
            p.grad /= number
            if optimizer is None:
                p -= 0.1 * p.grad
        if optimizer is not None:
            optimizer.step()

    for step in range(steps):
        HELD["factor"] = factor(step)
        made = torch.Generator().manual_seed(step)
        batches = [batch_of(torch.randn(6, 4, generator=made), torch.zeros(6)) for _ in "ab"]
        runner.begin(batches, step // 20)
        for p in model.parameters():
            p.grad = None
        for index, batch in enumerate(batches):
            runner.run(forward_and_backward, batch, 10 * step + index)
        runner.run(update, runner.number(2))
    return [p.detach().clone() for p in model.parameters()]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))


@pytest.mark.usefixtures("on_a_cpu")
def test_steps_are_recorded_after_three_and_replayed_from_the_next(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = network()
    expected = weights_after(capture.Eager(), copy.deepcopy(model))
    assert same(weights_after(graphs_of(model), model), expected)
    assert [piece.replays for piece in Frozen.made] == [26, 26, 26]  # two micro-batches, an update
    assert "are replayed as CUDA graphs" in caplog.text and "from here on" not in caplog.text


def halved_from(step: int) -> Callable[[int], float]:
    return lambda number: 0.5 if number >= step else 1.0


@pytest.mark.usefixtures("on_a_cpu")
@pytest.mark.parametrize("deterministic", [True, False])
def test_a_replay_that_differs_turns_capture_off_with_one_line(
    deterministic: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model = network()
    factor = halved_from(6)  # where replay 3 is compared
    expected = weights_after(capture.Eager(), copy.deepcopy(model), factor=factor)
    graphs = graphs_of(model, deterministic=deterministic)
    assert same(weights_after(graphs, model, factor=factor), expected)
    (line,) = [text for text in caplog.messages if "from here on" in text]
    assert "replay 3 differs from the step itself" in line and not graphs.is_on


@pytest.mark.usefixtures("on_a_cpu")
@pytest.mark.parametrize("reads", [[1, 1, 0, 0, 0, 1], [1, 1, 1]])
def test_reads_of_the_device_before_a_recording_do_not_count_after_it(
    reads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each recording may meet two: another thread may read, or the checks of the first steps."""
    each = iter([*reads, *[0] * 100])

    @contextlib.contextmanager
    def scripted() -> Iterator[list[str]]:
        yield ["loop.py:1"] * next(each)

    monkeypatch.setattr(capture, "host_reads", scripted)
    model, factor = network(), halved_from(12)
    expected = weights_after(capture.Eager(), copy.deepcopy(model), factor=factor)
    graphs = graphs_of(model)
    graphs.settings = lambda: HELD["factor"]  # another one is another recording
    assert same(weights_after(graphs, model, factor=factor), expected)
    assert graphs.is_on == (len(reads) > 3) and len(graphs.recordings) == 2 * graphs.is_on


@pytest.mark.usefixtures("on_a_cpu")
def test_without_a_comparison_a_replay_that_differs_changes_the_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(capture, "COMPARED", set())
    monkeypatch.setattr(capture, "LATER_EPOCHS", 0)
    model, factor = network(), halved_from(6)
    expected = weights_after(capture.Eager(), copy.deepcopy(model), factor=factor)
    assert not same(weights_after(graphs_of(model), model, factor=factor), expected)


@pytest.mark.usefixtures("on_a_cpu")
def test_noise_of_kernels_is_allowed_unless_they_are_deterministic(
    caplog: pytest.LogCaptureFixture,
) -> None:
    for deterministic in (False, True):
        caplog.clear()
        model, kernels = network(), itertools.cycle((0.0, 1e-4, 2e-4))
        graphs = graphs_of(model, deterministic=deterministic)
        weights_after(graphs, model, noise=lambda kernels=kernels: next(kernels))  # type: ignore[misc]
        assert graphs.is_on == ("from here on" not in caplog.text) == (not deterministic)


@pytest.mark.usefixtures("on_a_cpu")
@pytest.mark.parametrize("failing", [8, 9, 10])  # the replay, the step itself, the step once more
def test_a_comparison_without_enough_memory_frees_the_graphs_and_changes_nothing(
    failing: int, caplog: pytest.LogCaptureFixture
) -> None:
    calls = itertools.count()

    def noise() -> float:
        number = next(calls)
        if number == failing:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 1e-3 if number == 8 else 0.0  # so that the replay differs

    model = network()
    expected = weights_after(capture.Eager(), copy.deepcopy(model))
    graphs = graphs_of(model, deterministic=False)
    assert same(weights_after(graphs, model, noise=noise), expected)
    assert not graphs.is_on and "leave too little memory" in caplog.text


class Short(torch.optim.SGD):
    """Has no memory left at the end of one step, counted from zero."""

    failing, steps = -1, 0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        self.steps += 1
        if self.steps == self.failing + 1:
            raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.usefixtures("on_a_cpu")
@pytest.mark.parametrize("failing", [4, 5])  # the replayed update, and the update itself
def test_an_update_compared_without_enough_memory_happens_once(failing: int) -> None:
    model = network()
    other = copy.deepcopy(model)
    expected = weights_after(capture.Eager(), other, Short(other.parameters(), lr=0.1))
    optimizer = Short(model.parameters(), lr=0.1)
    optimizer.failing = failing
    graphs = graphs_of(model, optimizer)
    assert same(weights_after(graphs, model, optimizer), expected)
    assert optimizer.steps > failing and not graphs.is_on


@pytest.mark.usefixtures("on_a_cpu")
def test_a_difference_beyond_noise_turns_capture_off(caplog: pytest.LogCaptureFixture) -> None:
    model, kernels = network(), itertools.cycle((0.0, 1e-4, 2e-4))
    graphs = graphs_of(model, deterministic=False)
    weights_after(graphs, model, factor=halved_from(6), noise=lambda: next(kernels))
    assert "replay 3 differs" in caplog.text and not graphs.is_on


@pytest.mark.usefixtures("on_a_cpu")
def test_an_update_that_counts_in_python_would_be_caught(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    schedulefree = pytest.importorskip("schedulefree")

    def trained(captured: bool) -> list[Tensor]:
        model = network()
        optimizer = schedulefree.AdamWScheduleFree(model.parameters(), lr=0.1)
        optimizer.train()
        Frozen.python = [HELD, *optimizer.param_groups]
        runner = graphs_of(model, optimizer) if captured else capture.Eager()
        return weights_after(runner, model, optimizer)

    expected = trained(False)
    assert same(trained(True), expected)
    assert "differs from the step itself" in caplog.text
    monkeypatch.setattr(capture, "COMPARED", set())
    monkeypatch.setattr(capture, "LATER_EPOCHS", 0)
    assert not same(trained(True), expected)


def reason_for(
    *, world: World | None = None, total: int | None = 1000, step: Any = None, **options: Any
) -> str | None:
    """Return why `capture_of` does not capture on a GPU, by its line; None if it does."""
    world = world or World(device=torch.device("cuda", 0))
    more = () if step is None else (step,)
    sgd = functools.partial(torch.optim.SGD, lr=0.1)
    state = Bench(nn.Linear(4, 2), SimpleNamespace(), sgd).state
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    capture.log.addHandler(handler)
    capture.log.setLevel(logging.INFO)
    try:
        found = capture_of(options_of(**options), state, None, world, total, *more)
    finally:
        capture.log.removeHandler(handler)
    assert isinstance(found, capture.Graphs) and found.is_on == (not lines and options == {})
    return lines[0] if lines else None


def test_a_run_that_is_not_captured_says_why_in_one_line() -> None:
    assert reason_for() is None
    assert reason_for(capture=False) is None  # the user's own choice
    two = World(rank=0, size=2, device=torch.device("cuda", 0))
    for reason, given in {
        "several processes share them": {"world": two},
        "step._target_ is not lab.step.train_step": {"step": print},
        "trainer.detect_anomaly=true": {"detect_anomaly": True},
        "trainer.profile=true": {"profile": True},
        "trainer.activation_checkpointing": {"activation_checkpointing": ["0"]},
        "fewer than 50": {"total": 49},
    }.items():
        assert reason in str(reason_for(**given))  # type: ignore[arg-type]
    assert reason_for(total=50) is None and reason_for(total=None) is None


def test_a_constant_that_a_graph_may_read_keeps_its_memory() -> None:
    like = torch.zeros(())
    first = scalar(7.0, like)
    for number in range(1000):  # as batches of many sizes need, while a graph replays another one
        scalar(1 / (1 + number), like)
    assert scalar(7.0, like) is first


def test_weights_of_classes_that_a_graph_may_read_keep_their_memory() -> None:
    of = (torch.float32, torch.device("cpu"))
    first = losses._constant((7.0, 1.0), *of), losses._smoothed_rows(3, 0.7, *of)
    for number in range(40):  # as a task of many heads needs
        losses._constant((float(number), 1.0), *of)
        losses._smoothed_rows(2 + number, 0.1, *of)
    assert losses._constant((7.0, 1.0), *of) is first[0]
    assert losses._smoothed_rows(3, 0.7, *of) is first[1]


class Counting(optim.MuonWithAdamW):
    """Counts in Python, which a graph would not."""


def test_only_tested_optimizers_have_their_update_captured() -> None:
    schedulefree = pytest.importorskip("schedulefree")
    gpu = torch.device("cuda", 0)
    muon = {
        **{"lr": 0.01, "momentum": 0.9, "nesterov": True, "ns_steps": 5, "weight_decay": 0.1},
        **{"adjust_lr_fn": "match_rms_adamw", "kernels": True, "adamw_modules": []},
        **{"adamw_betas": (0.9, 0.99), "adamw_eps": 1e-8},
    }

    def allows(make: Callable[..., Any], **more: Any) -> bool:
        group = {"params": [nn.Parameter(torch.ones(2, 2))], "param_names": ["kernel"]}
        return optim.skips_on_device(make([group], **more), gpu)

    assert allows(torch.optim.AdamW, fused=True) and allows(optim.MuonWithAdamW, **muon)
    assert not allows(torch.optim.AdamW) and not allows(torch.optim.RMSprop)
    assert not allows(schedulefree.AdamWScheduleFree) and not allows(Counting, **muon)


def test_graphs_are_freed_before_the_micro_batches_are_halved() -> None:
    loss = CrossEntropy(label_smoothing=0.0, class_weights=None, ignore_index=None)
    names = {"class_names": None, "monitor": "val/accuracy", "per_class": False, "auroc": False}
    task = Multiclass(num_classes=2, extra_metrics=None, loss=loss, **names)  # type: ignore[arg-type]
    bench = Bench(nn.Linear(4, 2), task, functools.partial(torch.optim.SGD, lr=0.1))
    had = iter([True, False])
    runner = SimpleNamespace(release=lambda: next(had))
    plan = dataclasses.replace(bench.plan.step, capture=runner)  # type: ignore[arg-type]
    batch = batch_of(torch.ones(6, 4), torch.zeros(6, dtype=torch.long))
    faults.make_room(bench.state, batch, plan)
    assert bench.state.num_micro_batches == 1
    faults.make_room(bench.state, batch, plan)
    assert bench.state.num_micro_batches == 2
