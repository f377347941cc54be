"""A model's draws depend on the seed, the step, the micro-batch and the rank."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import torch
from running import Bench, batch_of
from torch import Tensor, nn

from lab import step
from lab.tasks.losses import LossOutput
from regrow.distributed.parallel import World
from regrow.feeding.items import SeededItems


class Drawing(nn.Module):
    """Records its draws in each forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 1)
        self.drawn: list[float] = []

    def forward(self, inputs: Tensor) -> Tensor:
        self.drawn.append(torch.rand(()).item())
        output: Tensor = self.linear(inputs)[:, 0]
        return output


class SquaredError:
    running_name = None
    sums_over_examples = True

    def loss(self, outputs: Tensor, targets: Tensor, weights: Tensor | None) -> LossOutput:
        return LossOutput((outputs - targets).square(), weights, {})

    def running(self, outputs: Tensor, targets: Tensor) -> None:
        return None


def draws(*, seed: int = 0, rank: int = 0, start: int = 0, steps: int = 3) -> list[float]:
    """Return the model's draws in the two micro-batches of each step."""
    model = Drawing()
    bench = Bench(model, SquaredError(), functools.partial(torch.optim.SGD, lr=0.1), slices=2)
    world = World(device=torch.device("cpu"), rank=rank)
    plan: Any = dataclasses.replace(bench.plan.step, seed=seed, world=world)
    bench.state.progress.step = start
    for _ in range(steps):
        plan.exchange.begin()
        step.accumulate(bench.state, batch_of(torch.ones(4, 2), torch.ones(4)), plan, step.forward)
        bench.state.progress.step += 1
    return model.drawn


def test_every_micro_batch_of_every_step_and_rank_draws_other_numbers() -> None:
    seen = [*draws(), *draws(rank=1), *draws(seed=1)]
    assert len(seen) == 18 and len(set(seen)) == 18


def test_the_draws_of_a_step_are_the_same_whatever_came_before() -> None:
    torch.manual_seed(5)
    assert draws(start=2, steps=1) == draws()[4:]
    torch.manual_seed(6)
    torch.rand(7)
    assert draws() == draws()


def test_each_example_of_a_file_draws_other_numbers_and_other_ones_in_each_epoch() -> None:
    class Random:
        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            return torch.rand(1), 0

        def __len__(self) -> int:
            return 9

    def item(seed: int, name: str, epoch: int, index: int) -> float:
        value: float = SeededItems(Random(), name, seed, None, None)[epoch, index][0].item()
        return value

    places = itertools.product((0, 1), ("train", "val"), (0, 1), range(9))
    seen = [item(*place) for place in places]
    assert len(set(seen)) == len(seen) == 72
    assert item(0, "train", 1, 4) == item(0, "train", 1, 4)
