"""Checks of the first batch: shapes, dtypes and ranges, and probabilities given as logits."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from lab.tasks.losses import CrossEntropy, Loss, LossOutput, attribute, matched
from regrow.errors import UserError, did_you_mean
from regrow.feeding.tokens import IGNORED

# Graph nodes that only move values, and those whose outputs are certainly logits.
_MOVES = (
    "View",
    "UnsafeView",
    "Reshape",
    "Squeeze",
    "Unsqueeze",
    "ToCopy",
    "Transpose",
    "Permute",
    "Slice",
)
_LINEAR = ("Addmm", "Mm", "Bmm", "Linear", "Convolution", "Relu")


def fits(loss: Loss, kind: str) -> None:
    """Raise `UserError` if the loss says that it is for other tasks."""
    kinds = attribute(loss, "kinds", None)
    if kinds is not None and kind not in kinds:
        raise UserError(
            f"loss={attribute(loss, 'name', loss)} does not fit task={kind}: it is for "
            f"{' and '.join(kinds)}. Leave loss out to get the task's own, or change task."
        )


def weighted_by_name(loss: Loss, names: list[str]) -> Loss:
    """Return the loss with `class_weights` by name as a list; classes that it leaves out weigh 1.

    Raises UserError for an unknown name.
    """
    if not (isinstance(loss, CrossEntropy) and isinstance(loss.class_weights, dict)):
        return loss
    given = {str(name): weight for name, weight in loss.class_weights.items()}
    if unknown := next((name for name in given if name not in names), None):
        raise UserError(
            f"loss.class_weights: there is no class {unknown}.{did_you_mean(unknown, names)} The "
            f"classes are {', '.join(names)[:200]}."
        )
    return dataclasses.replace(loss, class_weights=[given.get(name, 1.0) for name in names])


def one_per_class(loss: Loss, name: str, num_classes: int) -> None:
    """Raise `UserError` if the loss's list `name` does not have one factor per class."""
    factors = attribute(loss, name, None)
    if isinstance(factors, list) and len(factors) != num_classes:
        raise UserError(
            f"loss.{name} has {len(factors)} numbers for {num_classes} classes. Give one for each."
        )


def multiclass(
    outputs: Tensor, targets: Tensor, *, num_classes: int, ignore_index: int | None, logits: bool
) -> None:
    """Raise UserError for a batch that does not fit multiclass.

    Expects (B, C, …) outputs; (B, …) int64 class indices or (B, C, …) probabilities as targets.
    """
    _real("multiclass", outputs)
    shape, expected = tuple(targets.shape), (*outputs.shape[:1], *outputs.shape[2:])
    is_one_per_example = targets.ndim == (2 if targets.is_floating_point() else 1)
    has_places = outputs.ndim > 2 and is_one_per_example
    if outputs.ndim < 2 or outputs.shape[1] != num_classes or has_places:
        fix = _pool(outputs, num_classes) if has_places else _give(num_classes)
        raise UserError(
            f"task=multiclass needs outputs of shape (B, {num_classes}), got "
            f"{_per_example(outputs, targets)}. {fix}"
        )
    if targets.is_floating_point():
        if shape != tuple(outputs.shape):
            raise UserError(
                f"task=multiclass needs int64 class indices or probabilities of shape "
                f"{tuple(outputs.shape)}, got {targets.dtype} of shape {shape}. "
                "For real values use task=regression."
            )
        if not _probabilities(targets):
            raise UserError(
                "task=multiclass needs probabilities as soft targets, got rows that do not sum to "
                "one. For 0 and 1 per label use task=multilabel, for real values task=regression."
            )
    elif shape != expected:
        raise UserError(
            f"task=multiclass needs class indices of shape {expected}, got {shape}. "
            "For several labels per example use task=multilabel."
            if len(shape) > len(expected) and shape[-1] > 1
            else f"task=multiclass needs class indices of shape {expected}, got {shape}. "
            "Let the data give one index per example."
        )
    elif targets.dtype != torch.int64:
        raise UserError(
            f"task=multiclass needs class indices of dtype torch.int64, got {targets.dtype}. "
            "Let the data give targets.long()."
        )
    else:
        _in_range("multiclass", targets, num_classes, ignore_index)
    _no_softmax(outputs, logits)


def segmentation(
    outputs: Tensor, targets: Tensor, num_classes: int, ignore_index: int | None, *, logits: bool
) -> None:
    """Raise UserError unless outputs are (B, C, H, W) and targets class indices (B, H, W)."""
    _real("segmentation", outputs)
    if outputs.ndim != 4 or outputs.shape[1] != num_classes:
        raise UserError(
            f"task=segmentation needs outputs of shape (B, {num_classes}, H, W), got "
            f"{_per_example(outputs, targets)}. Use a model with an output per class and pixel, "
            "such as model=unet."
        )
    expected = (outputs.shape[0], *outputs.shape[2:])
    if targets.is_floating_point() or tuple(targets.shape) != expected:
        fix = "Let the model's outputs be as large as the masks."
        if targets.is_floating_point():
            fix = "Let the data give targets.long()."
        elif targets.ndim != 3:
            fix = "Let the data give one class index per pixel, (B, H, W)."
        raise UserError(
            f"task=segmentation needs class indices of shape {expected}, got {targets.dtype} of "
            f"shape {tuple(targets.shape)}. {fix}"
        )
    _in_range("segmentation", targets.long(), num_classes, ignore_index)
    _no_softmax(outputs, logits)


def binary(outputs: Tensor, targets: Tensor, *, logits: bool) -> None:
    """Raise UserError unless outputs and targets are (B,) or (B, 1), targets from 0 to 1."""
    _real("binary", outputs)
    if outputs.ndim == 0 or outputs.shape[1:] not in ((), (1,)):
        fix = "Set data.num_outputs=1, or use task=multiclass."
        raise UserError(
            "task=binary needs outputs of shape (B,) or (B, 1), got "
            f"{_per_example(outputs, targets)}. {_pool(outputs, 1) if outputs.ndim > 2 else fix}"
        )
    if targets.shape[:1] != outputs.shape[:1] or targets.shape[1:] not in ((), (1,)):
        raise UserError(
            f"task=binary needs targets of shape (B,), got {tuple(targets.shape)} for outputs of "
            f"shape {tuple(outputs.shape)}. For several labels per example use task=multilabel."
        )
    _zero_to_one("binary", targets)
    _no_sigmoid(outputs, logits)


def multilabel(outputs: Tensor, targets: Tensor, *, num_classes: int, logits: bool) -> None:
    """Raise UserError unless outputs and targets are (B, C), targets from 0 to 1."""
    _real("multilabel", outputs)
    if targets.ndim != 2 or targets.shape[1] != num_classes:
        labels = num_classes if targets.ndim > 1 else "C"
        raise UserError(
            f"task=multilabel needs targets of shape (B, {labels}), got {tuple(targets.shape)}. "
            "For class indices use task=multiclass."
        )
    if outputs.shape != targets.shape:
        fix = "Set model.num_outputs=${data.num_outputs}."
        raise UserError(
            f"task=multilabel needs outputs of shape {tuple(targets.shape)}, got "
            f"{tuple(outputs.shape)}. {_pool(outputs, num_classes) if outputs.ndim > 2 else fix}"
        )
    _zero_to_one("multilabel", targets)
    _no_sigmoid(outputs, logits)


def language(outputs: Tensor, targets: Tensor, *, num_classes: int) -> None:
    """Raise UserError unless outputs are (B, T, C) and targets (B, T) int64 tokens or -100."""
    _real("language", outputs)
    if outputs.ndim != 3 or outputs.shape[2] != num_classes:
        raise UserError(
            f"task=language needs outputs of shape (B, T, {num_classes}), got "
            f"{_per_example(outputs, targets)}. {_give(num_classes)}"
        )
    if targets.dtype != torch.int64 or targets.shape != outputs.shape[:2]:
        is_index = targets.shape == outputs.shape[:2] and not targets.is_floating_point()
        fix = "Let the data give targets.long()." if is_index else "Use data=text."
        raise UserError(
            f"task=language needs an int64 token per place, {tuple(outputs.shape[:2])}, got "
            f"{targets.dtype} of shape {tuple(targets.shape)}. {fix}"
        )
    kept = targets[targets != IGNORED]
    if kept.numel() and not 0 <= int(kept.min()) <= int(kept.max()) < num_classes:
        wrong = int(kept.min()) if int(kept.min()) < 0 else int(kept.max())
        raise UserError(
            f"task=language got token {wrong} with data.num_classes={num_classes}. Tokens count "
            f"from 0 to {num_classes - 1}, and {IGNORED} does not count."
        )


def regression(outputs: Tensor, targets: Tensor, num_outputs: int) -> None:
    """Raise UserError unless outputs and targets are floating-point, finite and of one shape.

    Several outputs are the last dimension of (B, …, num_outputs): each has metrics of its own.
    """
    _real("regression", outputs)
    if not targets.is_floating_point():
        raise UserError(
            f"task=regression needs floating-point targets, got {targets.dtype}. "
            "Let the data give targets.float(); for class indices use task=multiclass."
        )
    if not targets.isfinite().all():
        raise UserError(
            "task=regression got a target that is NaN or infinite. Remove such examples from data."
        )
    matched(outputs, targets)
    if num_outputs > 1 and (outputs.ndim < 2 or outputs.shape[-1] != num_outputs):
        raise UserError(
            f"task=regression needs outputs of shape (B, …, {num_outputs}), got "
            f"{_per_example(outputs, targets)}. Make data.num_outputs the size of the last "
            "dimension; task.num_outputs=1 measures all values alike."
        )


def returned(loss: Loss, outputs: Tensor, targets: Tensor) -> None:
    """Call the loss once. Raises UserError unless it returns one value per example.

    A loss with `sums_over_examples=False` may return any shape.
    """
    with torch.no_grad():
        result = loss(outputs.detach(), targets)
    output = LossOutput(result) if isinstance(result, Tensor) else LossOutput(*result)
    shape, num_examples = output.values.shape, outputs.shape[0]
    if attribute(loss, "sums_over_examples", True) and shape[:1] != (num_examples,):
        raise UserError(
            f"{_named(loss)}: it returned values of shape {tuple(shape)} for {num_examples} "
            "examples. Return one value per example (reduction='none'), or set "
            "sums_over_examples=False on the loss."
        )
    for name, tensor in {"weights": output.weights, **output.components}.items():
        if tensor is not None and tensor.shape != shape:
            raise UserError(
                f"{_named(loss)}: it returned {name} of shape {tuple(tensor.shape)} and values of "
                f"shape {tuple(shape)}. Make the shapes equal."
            )


def _named(loss: Loss) -> str:
    """Return the loss with its target, by which the error's place in the config is found."""
    made = getattr(loss, "func", loss)
    made = made if hasattr(made, "__qualname__") else type(made)
    return f"loss ({made.__module__}.{made.__qualname__})"


def _per_example(outputs: Tensor, targets: Tensor) -> str:
    """Return the outputs' shape, with B in place of the batch's size."""
    shape = str(tuple(outputs.shape))
    is_batch = outputs.shape[:1] == targets.shape[:1]
    return shape.replace(str(outputs.shape[0]), "B", 1) if outputs.ndim and is_batch else shape


def _give(num_classes: int) -> str:
    return (
        f"Give the model {num_classes} outputs. A model that takes their number gets it by "
        "model.num_outputs=${data.num_outputs}."
    )


def _pool(outputs: Tensor, num_outputs: int) -> str:
    """Return advice on how forward turns a map, such as (B, D, H, W), or a sequence into (B, C)."""
    width, *places = outputs.shape[1:]
    end = "" if num_outputs in outputs.shape[1:] else f", and end in {num_outputs} outputs"
    if not any(size > 1 for size in places):
        return f"Flatten in forward: outputs.flatten(1){end}."
    if len(places) == 1 and width != num_outputs:  # (B, T, D), or (B, D, T) of a convolution
        over = "outputs.mean(1)" if places[0] == num_outputs else "outputs.mean(1) or .mean(2)"
        return f"Pool over the sequence in forward: {over}{end}."
    dims = tuple(range(2, outputs.ndim))
    over = f"dimensions {dims}" if len(dims) > 1 else "dimension 2"
    return f"Pool over {over} in forward: outputs.mean({dims if len(dims) > 1 else 2}){end}."


def _real(kind: str, outputs: Tensor) -> None:
    if not isinstance(outputs, Tensor) or not outputs.is_floating_point():
        got = outputs.dtype if isinstance(outputs, Tensor) else type(outputs).__name__
        raise UserError(
            f"task={kind} needs the model to return one floating-point tensor, got {got}. "
            "Return the logits or values alone from the model's forward."
        )


def _in_range(kind: str, targets: Tensor, num_classes: int, ignore_index: int | None) -> None:
    valid = targets if ignore_index is None else targets[targets != ignore_index]
    if valid.numel() and not 0 <= int(valid.min()) <= int(valid.max()) < num_classes:
        wrong = int(valid.min()) if int(valid.min()) < 0 else int(valid.max())
        raise UserError(
            f"task={kind} got class index {wrong} with data.num_classes={num_classes}. Classes "
            f"count from 0 to {num_classes - 1}; to ignore a target, set loss.ignore_index."
        )


def _no_softmax(outputs: Tensor, logits: bool) -> None:
    if logits and _probabilities(outputs):
        raise UserError(
            "model ends in a softmax (its outputs are non-negative and sum to one), and "
            "loss=cross_entropy applies one itself. Remove it from the model: return logits."
        )


def _zero_to_one(kind: str, targets: Tensor) -> None:
    values = targets.float()
    if values.numel() and not (values.ge(0) & values.le(1)).all():
        raise UserError(
            f"task={kind} needs targets of 0 and 1, got {values.min():g} to {values.max():g}. "
            "For class indices use task=multiclass, for real values task=regression."
        )


def _probabilities(rows: Tensor) -> bool:
    """Return True if (B, C, …) values are non-negative and sum to one over C."""
    rows = rows.detach()
    tolerance = 1e-3 if rows.dtype in (torch.float32, torch.float64) else 2e-2
    sums = rows.float().sum(1)
    return bool(rows.numel() and (rows >= 0).all() and ((sums - 1).abs() < tolerance).all())


def _no_sigmoid(outputs: Tensor, logits: bool) -> None:
    if logits and _ends_in_sigmoid(outputs):
        raise UserError(
            "model ends in a sigmoid (its outputs are probabilities), and loss=bce_with_logits "
            "applies one itself. Remove it from the model: return logits."
        )


def _ends_in_sigmoid(outputs: Tensor) -> bool:
    """Return True if `outputs` come from a sigmoid, judged by the graph or else by the values.

    Values in [0, 1] are not enough: a fresh model's logits can lie there by chance, small and all
    positive. Probabilities centre on a half or reach both ends.
    """
    node = outputs.grad_fn
    while node is not None and node.name().startswith(_MOVES) and node.next_functions:
        node = node.next_functions[0][0]
    if node is not None and node.name().startswith(("Sigmoid", "Softmax")):
        return True
    if node is not None and node.name().startswith(_LINEAR):
        return False
    values = outputs.detach().float()
    if not values.numel() or not ((values > 0) & (values <= 1)).all():  # a ReLU gives zeros
        return False
    centred = abs(float(values.mean()) - 0.5) < 0.15
    return centred or bool(values.min() < 0.1 and values.max() > 0.9)
