"""A step that a CUDA graph would not repeat is detected; a CPU shows it as well."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from running import batch_of
from torch import Tensor, nn

from regrow.numerics import capture
from regrow.numerics.capture import Recording, distance, mapped, same, tensors_in, watched


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
