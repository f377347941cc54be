"""Totals of a step, and the news of a skipped one.

On a GPU both stay on the device, so that the host does not wait. On a CPU they are plain numbers:
adding tiny tensors took a twentieth of a small model's step. The two classes hide the difference.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from regrow.numerics.precision import at_least_float32

LOSS, SCORE, WEIGHT, EXAMPLES, COUNTED = range(5)  # of the values; the loss's components follow


def on_host(device: torch.device) -> bool:
    """Return True if the host can read this device's numbers without waiting."""
    return device.type == "cpu"


class Totals(NamedTuple):
    """Sums over the examples of a micro-batch, a step or an epoch."""

    values: Tensor | list[float]  # (4 + components,): loss, score, weight, examples, components
    components: tuple[str, ...] = ()  # the names of the loss's parts
    weighted: bool = False  # True if a weight may differ from one
    dtype: torch.dtype = torch.float32  # in which processes exchange the values
    scored: bool = True  # False if a step computes no score

    @classmethod
    def of(
        cls,
        losses: Tensor,
        weights: Tensor | None,
        components: Mapping[str, Tensor],
        score: Tensor | None,
        num_examples: int,
    ) -> Totals:
        """Return a micro-batch's: of weighted losses, their weights and parts, each (B, …).

        The score is (B,), or None if the step computes none.
        """
        dtype = losses.dtype
        parts: list[Tensor | float] = [
            losses.sum(),
            0.0 if score is None else score.detach().sum(dtype=dtype),
            num_examples if weights is None else weights.detach().sum(dtype=dtype),
            num_examples,
        ]
        for part in components.values():
            part = part.detach() if weights is None else (part * weights).detach()
            parts.append(part.sum(dtype=dtype))
        values: Tensor | list[float]
        if on_host(losses.device):
            values = [float(part) for part in parts]
        else:
            values = torch.stack([scalar(part, like=losses) for part in parts])
        scored = score is not None or num_examples == 0
        return cls(values, tuple(components), weights is not None, dtype, scored)

    @classmethod
    def zero(cls, device: torch.device) -> Totals:
        """Return an epoch's, in float64 where the device has it: sums need the digits."""
        if on_host(device):
            return cls([0.0] * COUNTED)
        return cls(torch.zeros(COUNTED, dtype=sum_dtype(device), device=device))

    @property
    def loss(self) -> Tensor | float:
        return self.values[LOSS]

    def read(self) -> list[float]:
        """Return the values as numbers; waits for the device."""
        return self.values if isinstance(self.values, list) else self.values.tolist()

    def means(self, score_name: str | None) -> dict[str, float]:
        """Return the exact means of the loss, the score and the loss's parts; waits."""
        loss, score, weight, examples, *parts = self.read()
        found = {"loss": ratio(loss, weight)}
        if score_name:
            found[score_name] = ratio(score, examples)
        for name, part in zip(self.components, parts, strict=True):
            found[f"loss_{name}"] = ratio(part, weight)
        return found

    def plus(self, more: Totals) -> Totals:
        """Return the sum of two micro-batches' totals."""
        if isinstance(self.values, list):
            pairs = zip(self.values, more.read(), strict=True)
            values: Tensor | list[float] = [a + b for a, b in pairs]
        else:
            values = self.values + torch.as_tensor(more.values)
        weighted, scored = self.weighted or more.weighted, self.scored and more.scored
        return self._replace(values=values, weighted=weighted, scored=scored)

    def joined(self, other: Totals) -> Totals:
        """Return the totals of two losses of one step: their losses add up, the examples do not.

        Score, weight and examples are this one's; the components are those of both.
        """
        at = COUNTED
        mine, its = self.values, other.values
        if isinstance(mine, list):
            values: Tensor | list[float] = [mine[LOSS] + float(its[LOSS]), *mine[1:], *its[at:]]
        else:
            its = torch.as_tensor(its)
            values = torch.cat([mine[:1] + its[:1], mine[1:], its[at:]])
        return self._replace(values=values, components=self.components + other.components)

    def add_(self, step: Totals, skipped: Skipped) -> None:
        """Add a step's totals to an epoch's, in place, unless the step was skipped."""
        if isinstance(self.values, list):
            if not skipped.update:
                pairs = zip(self.values, step.read(), strict=False)  # an epoch has no components
                self.values[:] = [a + b for a, b in pairs]
            return
        if skipped.update is True:
            return
        more = torch.as_tensor(step.values, device=self.values.device)
        if step.components:  # of which an epoch has none
            more = more[:COUNTED]
        if skipped.update is not False:
            more = torch.where(skipped.update.bool(), scalar(0.0, like=more), more)
        self.values.add_(more)

    def clear_(self) -> None:
        """Set an epoch's totals to zero, in the memory that a CUDA graph adds to."""
        if isinstance(self.values, list):
            self.values[:] = [0.0] * len(self.values)
        else:
            self.values.zero_()

    def saved(self) -> Tensor | list[float]:
        """Return the values for a checkpoint; a copy, since `add_` changes a list in place."""
        return [*self.values] if isinstance(self.values, list) else self.values

    def load_(self, values: Tensor | Sequence[float]) -> None:
        """Take in recorded values, in place. A record from another device holds the other kind."""
        if isinstance(self.values, list):
            self.values[:] = map(float, values)
        else:
            self.values.copy_(torch.as_tensor(values))

    def message(self, more: Sequence[float]) -> Tensor:
        """Return the values as one tensor, followed by `more`, for a sum over processes."""
        if isinstance(self.values, list):
            return torch.tensor([*self.values, *more], dtype=self.dtype)
        device = self.values.device
        own = torch.tensor(more, dtype=self.dtype, pin_memory=device.type == "cuda")
        # Otherwise the host would wait here until the device has done the step's forward passes.
        own = own.to(device, non_blocking=True)
        return torch.cat([self.values.to(self.dtype), own])

    def received(self, values: Tensor) -> Totals:
        """Return these totals with the values that a message brought."""
        return self._replace(values=values.tolist() if on_host(values.device) else values)

    def factor(self, num_examples: int) -> Tensor | float:
        """Return what turns a gradient's mean over examples into the weighted mean.

        NaN if all weights are zero, so that the step is skipped.
        """
        if not self.weighted:
            return 1.0
        weight = self.values[WEIGHT]
        # A float division by zero would raise.
        return num_examples / weight if isinstance(weight, Tensor) or weight else math.nan

    def is_empty(self) -> Tensor | bool:
        """Return True if all weights are zero: there is nothing to learn."""
        if not self.weighted:
            return False
        weight = self.values[WEIGHT]
        return weight.eq(0) if isinstance(weight, Tensor) else weight == 0


class Skipped(NamedTuple):
    """True where a step was skipped: bools if the host knows, else () tensors of bool.

    Tensors of 1.0 and 0.0 are taken as well, at the price of an operation on the device.
    """

    update: Tensor | bool  # nothing changed, because the loss or a gradient is not finite
    empty: Tensor | bool = False  # … or because all weights are zero: not a fault

    @property
    def is_known(self) -> bool:
        """Return True if the host knows that the step was skipped."""
        return self.update is True

    @property
    def did_update(self) -> bool:
        """Return True if the host knows that the step updated the weights."""
        return self.update is False and self.empty is False

    def either(self, other: Skipped) -> Skipped:
        """Return that of a step with two updates, which is skipped if one of them is."""
        if self.update is True or other.update is False:
            return self
        if self.update is False or other.update is True:
            return Skipped(other.update, self.empty)
        return Skipped(torch.maximum(self.update, other.update), self.empty)

    def blend_(self, values: list[Tensor], others: list[Tensor], weight: Tensor | float) -> None:
        """Move `values` by `weight (others - values)`, unless the step was skipped."""
        if self.update is False and isinstance(weight, float):
            torch._foreach_lerp_(values, others, weight)
        elif self.update is not True:  # avoids asking the device whether the step was skipped
            differences = [*torch._foreach_sub(others, values)]
            share = weight if self.update is False else weight * ~self.update.bool()
            torch._foreach_mul_(differences, share)
            torch._foreach_add_(values, differences)

    def restore_(self, values: Tensor, before: Tensor) -> None:
        """Copy `before` back into `values` if the step was skipped."""
        if self.update is True:
            values.copy_(before)
        elif self.update is not False:
            values.copy_(torch.where(self.update.bool(), before, values))

    def count_in(self, skips: Tensor, empty_steps: Tensor) -> None:
        """Count the step in `skips` (2,), of bad steps in total and in a row, or `empty_steps`.

        An empty step is not a bad one: it neither starts nor ends a streak of bad steps.
        """
        if isinstance(self.update, Tensor) or isinstance(self.empty, Tensor):
            bad = torch.as_tensor(self.update, device=skips.device).bool()
            streak_goes_on = bad
            if isinstance(self.empty, Tensor):
                empty = self.empty.bool()
                empty_steps += empty
                streak_goes_on = bad | empty
                bad = bad & ~empty
            skips += bad
            skips[1].mul_(streak_goes_on)
        elif self.empty:
            empty_steps += 1
        elif self.update:
            skips += 1
        else:
            skips[1].zero_()

    def norm(self, norm: Tensor | float, factor: Tensor | float) -> Tensor | float:
        """Return the gradients' norm for the log, `norm * factor`; 0 for an empty step."""
        if self.empty is True:
            return 0.0
        found = times(norm, factor)
        if isinstance(self.empty, Tensor):
            found = torch.as_tensor(found, device=self.empty.device)
            return torch.where(self.empty.bool(), 0.0, found)
        return found


def weighted(losses: Tensor, weights: Tensor | None) -> Tensor:
    """Return the losses times their weights, at least in float32, in which a sum has its digits."""
    losses = at_least_float32(losses)
    return losses if weights is None else losses * weights


def scalar(value: Tensor | float, like: Tensor) -> Tensor:
    """Return a () tensor with the dtype and on the device of `like`."""
    if isinstance(value, Tensor):
        return value.to(like.dtype)
    return _constant(value, like.dtype, like.device)


@functools.cache  # for good: CUDA graphs read the memory of those that they have used
def _constant(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    # Creating a tensor costs a copy to the device at each step.
    return torch.full((), value, dtype=dtype, device=device)


def times(value: Tensor | float, factor: Tensor | float) -> Tensor | float:
    """Return the product, without an operation on the device for a factor of one."""
    return value if isinstance(factor, float) and factor == 1.0 else value * factor


def either_is_not_finite(first: Tensor, second: Tensor | float) -> Tensor:
    """Return a () tensor of bool, from two operations on the device.

    Also True if the difference of two finite numbers has no finite value in their dtype.
    """
    second = torch.as_tensor(second, device=first.device)
    dtype = torch.promote_types(first.dtype, second.dtype)
    mixed = first.to(dtype).lerp(second.to(dtype), 0.0)  # first + 0 (second - first)
    return mixed.ne(mixed)


def numbers(first: Tensor | float, *others: Tensor | float) -> list[float]:
    """Return () tensors as floats, with a single wait for the device."""
    if isinstance(first, float) or on_host(first.device):
        return [float(value) for value in (first, *others)]
    tensors = [torch.as_tensor(value, device=first.device) for value in (first, *others)]
    found: list[float] = torch.stack(tensors).tolist()
    return found


def without_waiting(value: Tensor) -> Tensor | float:
    """Return a () tensor as a number, unless the host would have to wait for it."""
    return value.item() if on_host(value.device) else value


def sum_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # MPS does not support float64


def ratio(total: float, divisor: float) -> float:
    return total / divisor if divisor else math.nan


def gradient_norm(gradients: list[Tensor]) -> Tensor | float:
    """Return the () global 2-norm, NaN or inf if any element is; a float on a CPU."""
    half = any(gradient.dtype in (torch.float16, torch.bfloat16) for gradient in gradients)
    # float16 ends at 65,504: a norm of inf would skip a good step.
    norms = torch._foreach_norm(gradients, 2, torch.float32 if half else None)
    if on_host(norms[0].device):
        return math.hypot(*[norm.item() for norm in norms])
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return norm
