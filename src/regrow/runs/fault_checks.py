"""Name mistakes that do not stop a run: in the calls of the loss, the inputs and the splits.

Each check returns lines that name the key, the value and the fix. `calls_watched` and `of_inputs`
need no further pass over anything, so every run makes them on its first batch.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from regrow.errors import UserError
from regrow.feeding.batch import parts_of
from regrow.numerics.precision import widest
from regrow.protocols import Batch, Data

LARGE = 3.0  # root mean square of inputs; standardised ones have 1, images from 0 to 1 less
SMALL = 1e-3
# A leak shares more than this part of a set's examples with training, and more than three times the
# part of the training examples that have a copy among themselves: tables of few values have many.
LEAK, NATURAL = 0.01, 3.0
MOST_READ, MOST_SECONDS = 20_000, 20.0  # of each split; of all splits


class Calls(TorchFunctionMode):
    """Watches the calls of torch inside for two mistakes, and changes none of them.

    `found` holds a line for each: (n, 1) against (n,), which broadcasts to (n, n) without an error;
    and probabilities as inputs of a loss that applies softmax or sigmoid itself.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, str] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        result = func(*args, **given)
        name = getattr(func, "__name__", "")
        tensors = [value for value in (*args, *given.values()) if isinstance(value, Tensor)]
        if len(tensors) >= 2:
            one, other = tensors[:2]
            if "broadcast" not in self.found and _broadcasts(name, one, other, result):
                shapes = " against ".join(str(tuple(t.shape)) for t in (one, other))
                n = max(one.shape[0], other.shape[0])
                self.found["broadcast"] = (
                    f"loss: {name.strip('_')} got {shapes}, which broadcasts to ({n}, {n}): each "
                    "output is compared with every target. Give both one shape, such as "
                    "outputs.squeeze(1) or targets.unsqueeze(1)."
                )
            if name == "cross_entropy" and "softmax" not in self.found and _sum_to_one(one):
                self.found["softmax"] = (
                    "loss: cross_entropy gets probabilities (non-negative, and they sum to one), "
                    "and applies a softmax itself. Remove the softmax from the model: return "
                    "logits."
                )
            if name == "binary_cross_entropy_with_logits" and _is_sigmoid(one):
                self.found["sigmoid"] = (
                    "loss: binary_cross_entropy_with_logits gets the outputs of a sigmoid, and "
                    "applies one itself. Remove the sigmoid from the model: return logits."
                )
        return result


def _broadcasts(name: str, one: Tensor, other: Tensor, result: Any) -> bool:
    column, row = (one, other) if one.ndim == 2 else (other, one)
    if (column.ndim, row.ndim) != (2, 1) or column.shape[1] != 1:
        return False
    n = row.shape[0]
    if n < 2 or column.shape[0] != n:
        return False
    # Indexing and masking take (n, 1) and (n,) too, but give no (n, n).
    return name.endswith("_loss") or (isinstance(result, Tensor) and result.shape == (n, n))


def _sum_to_one(logits: Tensor) -> bool:
    """Return True if (B, C, …) or (C,) values are non-negative and sum to one over C."""
    if not logits.is_floating_point() or not logits.numel():
        return False
    values = logits.detach().float()
    sums = values.sum(1 if values.ndim > 1 else 0)
    is_one = (sums - 1).abs() < (1e-3 if logits.dtype == torch.float32 else 2e-2)
    return bool((values >= 0).all() and is_one.all())


def _is_sigmoid(logits: Tensor) -> bool:
    node = logits.grad_fn
    moves = ("View", "Reshape", "Squeeze", "Unsqueeze", "ToCopy", "Select")
    while node is not None and node.name().startswith(moves) and node.next_functions:
        node = node.next_functions[0][0]
    return node is not None and node.name().startswith("Sigmoid")


def of_inputs(batch: Batch) -> list[str]:
    """Return a line if floating-point inputs are far from the scale that models start for."""
    for tensor in parts_of(batch.inputs):
        if not tensor.is_floating_point() or tensor.numel() < 2 or not tensor.isfinite().all():
            continue
        values = tensor.detach().float()
        size, mean = float(values.square().mean().sqrt()), float(values.mean())
        if SMALL <= size <= LARGE or size == 0:
            continue
        return [
            f"data.normalize: the inputs have a root mean square of {size:.3g} and a mean of "
            f"{mean:.3g}, and models start for about 1. Set data.normalize=train, or let your data "
            "set give standardised inputs."
        ]
    return []


def frozen_parameters(model: torch.nn.Module) -> list[str]:
    """Return a line that names the parameters that do not require a gradient, if there are any."""
    named = dict(model.named_parameters())
    frozen = [name for name, parameter in named.items() if not parameter.requires_grad]
    if not frozen or len(frozen) == len(named):
        return []
    return [
        f"model: {len(frozen)} of {len(named)} parameters are frozen (requires_grad=False): "
        f"{listed(frozen)}. If that is not meant, look at model.freeze and requires_grad_()."
    ]


def listed(names: list[str], most: int = 4) -> str:
    """Return the first names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def leaks(data: Data, device: torch.device) -> list[str]:
    """Return a line for each set that shares inputs with the training examples.

    Compares the inputs as the model gets them, unaugmented, of at most 20,000 examples per split
    and for at most 20 seconds. `data.overlap` compares all, where a data set offers keys.
    """
    until = time.monotonic() + MOST_SECONDS
    train = [*_digests(data, "train", device, until)]
    known = set(train)
    copies = 1 - len(known) / len(train) if train else 0.0
    lines = []
    for name in data.num_examples:
        if name == "train":
            continue
        own = [*_digests(data, name, device, until)]
        shared = [place for place, digest in enumerate(own) if digest in known]
        part = len(shared) / len(own) if own else 0.0
        if part > max(LEAK, NATURAL * copies):
            lines.append(
                f"data.source: {len(shared)} of the first {len(own)} {name} examples have the "
                f"inputs of a training example, the first is number {shared[0]}. Split before "
                "examples are copied or augmented, and keep what belongs together in one split."
            )
    return lines


def _digests(data: Data, name: str, device: torch.device, until: float) -> Iterator[bytes]:
    read = 0
    for batch in data.evaluation(name, device=device):
        columns = [tensor.detach().cpu().contiguous() for tensor in parts_of(batch.inputs)]
        for row in range(batch.num_local):
            digest = hashlib.blake2b(digest_size=16)
            for column in columns:
                digest.update(column[row].contiguous().view(-1).view(torch.uint8).numpy().data)
            yield digest.digest()
        read += batch.num_local
        if read >= MOST_READ or time.monotonic() > until:
            return


def reference_loss(task: Any, outputs: Any, targets: Any) -> Tensor | None:
    """Return the textbook loss of the kind of target, a scalar; None if the kind is unknown.

    Cross entropy, binary cross entropy or the squared error: any sound loss falls where it falls.
    """
    if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor):
        return None
    kind, outputs = getattr(task, "kind", None), widest(outputs)
    ignored = getattr(task, "ignore_index", None)
    if kind in ("multiclass", "segmentation", "language"):
        if kind == "language":
            outputs, targets = outputs.flatten(0, 1), targets.flatten()
        targets = targets.to(outputs.dtype) if targets.is_floating_point() else targets.long()
        return F.cross_entropy(outputs, targets, ignore_index=-100 if ignored is None else ignored)
    targets = targets.to(outputs.dtype)
    if outputs.numel() != targets.numel():
        return None
    if kind in ("binary", "multilabel"):
        return F.binary_cross_entropy_with_logits(outputs.flatten(), targets.flatten())
    return F.mse_loss(outputs.flatten(), targets.flatten()) if kind == "regression" else None


def mean_loss(task: Any, outputs: Any, targets: Any, weights: Tensor | None) -> Tensor | None:
    """Return the weighted mean of the task's losses, a scalar; None if they cannot be computed."""
    try:
        loss = task.loss(outputs, targets, weights)
    except (RuntimeError, TypeError, ValueError, IndexError, UserError):
        return None
    values: Tensor = loss.values
    if loss.weights is None:
        return values.mean()
    weighed: Tensor = torch.where(loss.weights != 0, values * loss.weights, 0).sum()
    return weighed.div(loss.weights.sum())
