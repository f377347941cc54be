"""Models, losses, steps and data, each with one mistake that `debug=overfit` must name."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lab.faults import make_room
from lab.step import accumulate, forward, update
from lab.tasks.losses import mse
from regrow.feeding.splits import Splits
from regrow.numerics.totals import Totals


class Net(nn.Module):
    """Two linear layers, without a mistake."""

    def __init__(self, num_outputs: int, width: int = 32) -> None:
        super().__init__()
        self.first, self.last = nn.LazyLinear(width), nn.Linear(width, num_outputs)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.logits(self.first(inputs.flatten(1)).relu())

    def logits(self, hidden: Tensor) -> Tensor:
        outputs: Tensor = self.last(hidden)
        return outputs


class Detached(Net):
    def logits(self, hidden: Tensor) -> Tensor:
        return super().logits(hidden.detach())


class Sometimes(Net):
    """Skips its first layer at random, as stochastic depth does."""

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.first(inputs.flatten(1)).relu()
        return self.logits(hidden if torch.rand(()) < 0.4 else torch.ones_like(hidden))


class Frozen(Net):
    """A layer that does not require a gradient: deliberate, as in fine-tuning, or a mistake."""

    def __init__(self, num_outputs: int, width: int = 32) -> None:
        super().__init__(num_outputs, width)
        self.last.requires_grad_(False)


class Softmax(Net):
    def logits(self, hidden: Tensor) -> Tensor:
        return super().logits(hidden).softmax(1)


class Hooked(Net):
    """A hook that was to be removed: all gradients are zero."""

    def __init__(self, num_outputs: int, width: int = 32) -> None:
        super().__init__(num_outputs, width)
        self.last.register_full_backward_hook(lambda module, given, got: (given[0] * 0,))
        for parameter in self.last.parameters():
            parameter.register_hook(torch.zeros_like)


class HookedLast(Net):
    def __init__(self, num_outputs: int, width: int = 32) -> None:
        super().__init__(num_outputs, width)
        for parameter in self.last.parameters():
            parameter.register_hook(torch.zeros_like)


class ZeroStart(Net):
    """As adapters and zero-initialised heads do: the first layer gets its gradient later."""

    def __init__(self, num_outputs: int, width: int = 32) -> None:
        super().__init__(num_outputs, width)
        nn.init.zeros_(self.last.weight)


def plain_cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="none")


def negative(outputs: Tensor, targets: Tensor) -> Tensor:
    return -F.cross_entropy(outputs, targets, reduction="none")


def quantile(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the loss of the 90th percentile, whose least value is far above the targets' mean."""
    left = targets - outputs
    return torch.maximum(0.9 * left, -0.1 * left)


def below_zero(outputs: Tensor, targets: Tensor) -> Tensor:
    """A sound loss that is negative."""
    return mse(outputs, targets) - 10


def _step(state: Any, batch: Any, plan: Any, between: Any, forward: Any = forward) -> Any:
    plan.buffers.remember()
    plan.exchange.begin()
    state.set_rates()
    while not accumulate(state, batch, plan, forward):
        make_room(state, batch, plan)
    between(state)
    return update(state, batch.num_global, plan.exchange.wait(), state.step, plan)


def zeroing_step(state: Any, batch: Any, plan: Any) -> Any:
    return _step(state, batch, plan, lambda state: state.model.zero_grad(set_to_none=False))


def dropping_step(state: Any, batch: Any, plan: Any) -> Any:
    return _step(state, batch, plan, lambda state: state.model.zero_grad())


def ascending_step(state: Any, batch: Any, plan: Any) -> Any:
    def turn(state: Any) -> None:
        for parameter in state.model.parameters():
            parameter.grad.neg_()

    return _step(state, batch, plan, turn)


def _squares(batch: Any, plan: Any, targets: Tensor) -> Any:
    losses = ((plan.forward(batch.inputs) - targets) ** 2).mean(1)
    return losses, Totals.of(losses.detach(), None, {}, None, batch.num_local)


def pairs_step(state: Any, batch: Any, plan: Any) -> Any:
    """Outputs (B, 1) minus targets (B,) are (B, B); the mean hides it."""
    return _step(state, batch, plan, lambda state: None, lambda b, p: _squares(b, p, b.targets))


def column_step(state: Any, batch: Any, plan: Any) -> Any:
    def forward(batch: Any, plan: Any) -> Any:
        return _squares(batch, plan, batch.targets.unsqueeze(1))

    return _step(state, batch, plan, lambda state: None, forward)


def sound_step(state: Any, batch: Any, plan: Any) -> Any:
    return _step(state, batch, plan, lambda state: None)


def scoreless_step(state: Any, batch: Any, plan: Any) -> Any:
    def forward(batch: Any, plan: Any) -> Any:
        loss = plan.task.loss(plan.forward(batch.inputs), batch.targets, batch.weights)
        return loss.values, Totals.of(loss.values.detach(), None, {}, None, batch.num_local)

    return _step(state, batch, plan, lambda state: None, forward)


def autograd_step(state: Any, batch: Any, plan: Any) -> Any:
    """A step that asks for gradients in place of calling backward."""
    plan.buffers.remember()
    plan.exchange.begin()
    state.set_rates()
    losses, totals = forward(batch, plan)
    found = torch.autograd.grad(losses.sum() / batch.num_global, plan.parameters)
    for parameter, slope in zip(plan.parameters, found, strict=True):
        parameter.grad = slope
    plan.exchange.send([totals], plan.name)
    return update(state, batch.num_global, plan.exchange.wait(), state.step, plan)


class Rows(torch.utils.data.Dataset[Any]):
    """A data set without keys: `data.overlap` cannot compare its examples."""

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        self.inputs, self.targets = inputs, targets

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.inputs[index], self.targets[index]


def rows(*, shared: int, values: int | None = None, scale: float = 1.0) -> Splits:
    """Return 96, 32 and 32 examples; the first `shared` of val are training examples.

    With `values`, features are drawn from so many values, so that examples are equal by chance.
    """
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(160, 6, generator=generator) * scale + scale
    if values is not None:
        inputs = torch.randint(values, (160, 2), generator=generator).float().repeat(1, 3)
    targets = torch.randint(3, (160,), generator=generator)
    inputs[96 : 96 + shared] = inputs[10 : 10 + shared]
    parts = torch.arange(160).split([96, 32, 32])
    return Splits(*(Rows(inputs[part], targets[part]) for part in parts))
