"""Losses as values and weights; the loop sums them and divides once over everything.

A loss is any callable of `(outputs, targets)`. It returns one value per example (or per token),
alone, as `(values, weights)`, or as a `LossOutput` with named components to log. A step reports and
minimises `sum(values * weights) / sum(weights)` over all its micro-batches and processes, so a loss
never averages over examples itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from regrow.config.rules import require
from regrow.errors import UserError

_NO_TARGET = -(1 << 40)  # torch's default, -100, would silently ignore a broken target
BALANCED = "balanced"  # class_weights that the build of a run replaces by a list
FEW_CLASSES = 100  # up to here, probabilities as targets are faster than torch's label smoothing


class LossOutput(NamedTuple):
    """`values` and `weights` of one shape, (B,) or (B, …) for tokens; weights None: all one."""

    values: Tensor
    weights: Tensor | None = None
    components: Mapping[str, Tensor] = MappingProxyType({})  # each shaped like values


Loss = Callable[[Tensor, Tensor], Any]


def weighted(result: Any, weights: Tensor | None, num_examples: int) -> LossOutput:
    """Return a loss's result as a LossOutput, with the examples' weights (B,) multiplied in.

    Its weights are None only if there is one value per example. A scalar, from a loss that is not a
    sum over examples, is assigned to each example, so that their mean is that scalar.
    """
    loss = LossOutput(result) if isinstance(result, Tensor) else LossOutput(*result)
    values, own, components = loss
    if values.ndim == 0:
        values = values.expand(num_examples)
        components = {name: part.expand(num_examples) for name, part in components.items()}
        loss = LossOutput(values, None, components)
    if own is None and (values.ndim > 1 or len(values) != num_examples):
        own = torch.ones_like(values)
        loss = LossOutput(values, own, components)
    if weights is None:
        return loss
    if len(weights) not in (1, len(values)):
        raise UserError(
            f"loss returned {len(values)} values for {len(weights)} examples that have weights. "
            "Return one value per example, or a single one, or leave the weights out of the data."
        )
    weights = weights.view(-1, *[1] * (values.ndim - 1))
    return LossOutput(values, weights if own is None else own * weights, components)


def attribute(loss: Loss, name: str, default: Any) -> Any:
    """Return an attribute of a loss, also through `functools.partial`."""
    return getattr(loss, name, getattr(getattr(loss, "func", None), name, default))


@functools.cache  # for good, as CUDA graphs read the memory
def _constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a cached small tensor on the device."""
    with torch.inference_mode(False):  # the first call may be an evaluation's
        return torch.tensor(values, dtype=dtype, device=device)


@functools.cache  # for good, as CUDA graphs read the memory
def _smoothed_rows(
    classes: int, smoothing: float, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return the cached (C, C) smoothed probabilities of each class index, on the device."""
    with torch.inference_mode(False):  # the first call may be an evaluation's
        share = smoothing / classes
        table = torch.full((classes, classes), share, dtype=dtype)
        return table.fill_diagonal_(1 - smoothing + share).to(device)


@dataclass(frozen=True, kw_only=True)
class CrossEntropy:
    """Cross entropy of logits (B, C, …) with class indices (B, …) or probabilities (B, C, …).

    With class weights w the result equals torch's: the sum of the weighted losses over the sum of
    w[target]; for probabilities, the mean over examples. See `torch.nn.CrossEntropyLoss` for the
    formula with label smoothing (Szegedy et al. 2016). Targets of `ignore_index` have weight zero.
    """

    label_smoothing: float  # 0 to 1, the mass spread over all classes
    class_weights: list[float] | dict[str, float] | None  # one per class; a task knows the names
    ignore_index: int | None

    name = "cross_entropy"
    kinds = ("multiclass", "segmentation", "language")

    def __post_init__(self) -> None:
        require("loss.label_smoothing", self.label_smoothing)
        given: object = self.class_weights
        if given == BALANCED:
            raise UserError(
                f"loss.class_weights={BALANCED}: outside a run, no training examples are counted. "
                "Give a list with a weight for each class."
            )
        weights = self.class_weights
        weights = [*weights.values()] if isinstance(weights, dict) else weights
        if weights is not None and (min(weights, default=0) < 0 or max(weights, default=0) <= 0):
            raise UserError(
                f"loss.class_weights={weights} holds a negative number or nothing above zero. "
                "Give one weight of zero or more for each class."
            )
        if weights is not None and self.label_smoothing and min(weights) == 0:
            raise UserError(
                f"loss.class_weights={weights} has a zero, which label_smoothing would bring back. "
                "Use loss.label_smoothing=0, or loss.ignore_index for the class that is left out."
            )

    def __call__(self, outputs: Tensor, targets: Tensor) -> LossOutput:
        outputs = full_precision(outputs)
        if self._smooths_cheaply(outputs, targets):
            classes = outputs.shape[1]
            rows = _smoothed_rows(classes, self.label_smoothing, outputs.dtype, outputs.device)
            try:
                smoothed = rows.index_select(0, targets)
            except IndexError as error:  # does not name the target
                outside = targets[(targets < 0) | (targets >= classes)]
                raise IndexError(f"Target {outside[0].item()} is out of bounds.") from error
            return LossOutput(F.cross_entropy(outputs, smoothed, reduction="none"))
        soft = targets.is_floating_point()
        table = None
        if self.class_weights is not None:
            table = _constant(tuple(self.class_weights), outputs.dtype, outputs.device)
        values = F.cross_entropy(
            outputs,
            targets.to(outputs.dtype) if soft else targets,
            # Without smoothing the class weight is a plain factor, so it can also be zero.
            weight=table if soft or self.label_smoothing else None,
            ignore_index=_NO_TARGET if self.ignore_index is None else self.ignore_index,
            reduction="none",
            label_smoothing=self.label_smoothing,
        )
        if soft or (table is None and self.ignore_index is None):
            return LossOutput(values)
        valid = None if self.ignore_index is None else targets != self.ignore_index
        if table is None:
            assert valid is not None
            return LossOutput(values, valid.to(values.dtype))
        weights = table[targets if valid is None else targets.where(valid, 0)]
        if self.label_smoothing:
            values = values / weights
        return LossOutput(values, weights if valid is None else weights * valid)

    def _smooths_cheaply(self, outputs: Tensor, targets: Tensor) -> bool:
        """Return True if probabilities as targets give the same result in fewer kernels.

        Results agree up to rounding. With few classes this halves the cost of smoothing; with many
        it is slower than torch's.
        """
        return (
            self.label_smoothing > 0
            and self.class_weights is None
            and self.ignore_index is None
            and targets.dtype == torch.int64
            and targets.shape == outputs.shape[:1]
            and outputs.ndim == 2
            and outputs.shape[1] <= FEW_CLASSES
        )


@dataclass(frozen=True, kw_only=True)
class BCEWithLogits:
    """Binary cross entropy of logits (B,) or (B, C) with targets 0 to 1; the mean over C labels."""

    pos_weight: float | list[float] | None  # factor of the positive term: one, or one per label

    name = "bce_with_logits"
    kinds = ("binary", "multilabel")

    def __post_init__(self) -> None:
        require("loss.pos_weight", self.pos_weight)

    @property
    def _factors(self) -> tuple[float, ...]:
        if self.pos_weight is None:
            return (1.0,)
        return tuple(self.pos_weight) if isinstance(self.pos_weight, list) else (self.pos_weight,)

    def __call__(self, outputs: Tensor, targets: Tensor) -> LossOutput:
        outputs, targets = matched(outputs, targets)
        table = None
        if self.pos_weight is not None:
            table = _constant(self._factors, outputs.dtype, outputs.device)
        values = F.binary_cross_entropy_with_logits(
            outputs, targets, pos_weight=table, reduction="none"
        )
        return LossOutput(per_example(values))


def mse(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the squared error, (B,), as the mean over D outputs."""
    return per_example(F.mse_loss(*matched(outputs, targets), reduction="none"))


def l1(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the absolute error, (B,), as the mean over D outputs."""
    return per_example(F.l1_loss(*matched(outputs, targets), reduction="none"))


def smooth_l1(outputs: Tensor, targets: Tensor, *, beta: float) -> Tensor:
    """Return the absolute error less beta / 2, and below `beta` its square / (2 beta).

    (B,), the mean over D outputs.
    """
    outputs, targets = matched(outputs, targets)
    return per_example(F.smooth_l1_loss(outputs, targets, reduction="none", beta=beta))


def huber(outputs: Tensor, targets: Tensor, *, delta: float) -> Tensor:
    """Return half the squared error, linear beyond `delta` (Huber 1964).

    (B,), the mean over D outputs.
    """
    outputs, targets = matched(outputs, targets)
    return per_example(F.huber_loss(outputs, targets, reduction="none", delta=delta))


def per_example(values: Tensor) -> Tensor:
    """Return (B, …) values as (B,), averaged over all other dimensions."""
    return values if values.ndim == 1 else values.flatten(1).mean(1)


def full_precision(outputs: Tensor) -> Tensor:
    """Return float16 and bfloat16 as float32: a sum of many losses needs the digits."""
    return outputs.float() if outputs.dtype in (torch.float16, torch.bfloat16) else outputs


def matched(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return outputs and targets in one shape and dtype; (B, 1) becomes (B,), nothing broadcasts.

    Raises UserError if their shapes differ.
    """
    if outputs.ndim == 2 and outputs.shape[1] == 1:
        outputs = outputs.squeeze(1)
    if targets.ndim == 2 and targets.shape[1] == 1:
        targets = targets.squeeze(1)
    if outputs.shape != targets.shape:
        raise UserError(
            f"the model's outputs have shape {tuple(outputs.shape)} and the targets "
            f"{tuple(targets.shape)}. Make data.num_outputs the number of values per example."
        )
    outputs = full_precision(outputs)
    return outputs, targets if targets.dtype == outputs.dtype else targets.to(outputs.dtype)
