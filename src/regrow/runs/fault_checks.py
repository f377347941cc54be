"""Name mistakes that do not stop a run: in the calls of the loss, the inputs and the splits.

Each check returns lines that name the key, the value and the fix. `Calls`, `of_inputs` and
`Untrained` need no further pass over anything, so every run makes them.
"""

from __future__ import annotations

import hashlib
import logging
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from regrow.errors import listed
from regrow.feeding.batch import parts_of
from regrow.numerics.precision import widest
from regrow.protocols import Batch, DataLike

log = logging.getLogger(__name__)

FIRST_STEPS = 5  # a random choice of layers or experts passes some over in a single step
MOST_INITIAL = 0.05  # of the running averages; a momentum of 0.1 needs 29 updates
LARGE = 3.0  # root mean square of inputs; standardised ones have 1, images from 0 to 1 less
SMALL = 1e-3
MOST_SHOWN = 8  # channels
# A leak shares at least five examples, more than 1 % of the set, and more than three times what
# chance gives: tables of few values have many equal rows.
LEAST_SHARED, LEAK, NATURAL = 5, 0.01, 3.0
MOST_READ, MOST_SECONDS = 20_000, 20.0  # of each split; of all splits


class Calls(TorchFunctionMode):
    """Watches the calls of torch inside for two mistakes, and changes none of them.

    `found` holds a line for each: (n, 1) against (n,), which broadcasts to (n, n) without an error;
    and probabilities as inputs of a loss that applies softmax or sigmoid itself. Code of `model`
    may broadcast: a step's loss may not.
    """

    def __init__(self, model: torch.nn.Module | None = None) -> None:
        super().__init__()
        self.found: dict[str, str] = {}
        self.modules = set() if model is None else {id(module) for module in model.modules()}

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        result = func(*args, **given)
        name = getattr(func, "__name__", "")
        tensors = [value for value in (*args, *given.values()) if isinstance(value, Tensor)]
        if len(tensors) >= 2:
            one, other = tensors[:2]
            fires = "broadcast" not in self.found and _broadcasts(name.strip("_"), one, other)
            if fires and not self._in_model():
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

    def _in_model(self) -> bool:
        """Return True if a module of the model has called, by the frames of Python."""
        frame = sys._getframe(2)
        while frame is not None:
            is_call = frame.f_code.co_name == "_call_impl"
            if is_call and id(frame.f_locals.get("self")) in self.modules:
                return True
            frame = frame.f_back  # type: ignore[assignment]
        return False


def _broadcasts(name: str, one: Tensor, other: Tensor) -> bool:
    """Return True for a difference or a loss of (n, 1) and (n,), of which one has a gradient.

    Masks, products and the differences of all pairs, as a ranking loss takes, are meant.
    """
    if name not in ("sub", "rsub", "subtract") and not name.endswith("_loss"):
        return False
    column, row = (one, other) if one.ndim == 2 else (other, one)
    if (column.ndim, row.ndim) != (2, 1) or column.shape[1] != 1:
        return False
    if len(row) < 2 or len(column) != len(row) or one.requires_grad == other.requires_grad:
        return False
    return one.untyped_storage().data_ptr() != other.untyped_storage().data_ptr()


def _sum_to_one(logits: Tensor) -> bool:
    """Return True if (B, C, …) or (C,) values are non-negative and sum to one over C."""
    if not logits.is_floating_point() or not logits.numel():
        return False
    rows = logits[:64] if logits.ndim > 1 else logits  # all would take 0.4 s for a GPT
    values = rows.detach().float()
    sums = values.sum(1 if values.ndim > 1 else 0)
    is_one = (sums - 1).abs() < (1e-3 if logits.dtype == torch.float32 else 2e-2)
    return bool((values >= 0).all() and is_one.all())


def _is_sigmoid(logits: Tensor) -> bool:
    node = logits.grad_fn
    moves = ("View", "Reshape", "Squeeze", "Unsqueeze", "ToCopy", "Select")
    while node is not None and node.name().startswith(moves) and node.next_functions:
        node = node.next_functions[0][0]
    return node is not None and node.name().startswith("Sigmoid")


def of_inputs(batch: Batch, *, images: bool = False) -> list[str]:
    """Return a line if floating-point inputs are far from the scale that models start for.

    With `images` also of images (B, C, H, W) without a negative value, such as those from 0 to 1.
    Many models train well on them, so a normal run does not say it.
    """
    for tensor in parts_of(batch.inputs):
        if not tensor.is_floating_point() or tensor.numel() < 2 or not tensor.isfinite().all():
            continue
        values = tensor.detach().float()
        size, mean = float(values.square().mean().sqrt()), float(values.mean())
        is_raw = images and values.ndim == 4 and float(values.min()) >= 0
        if size == 0 or (SMALL <= size <= LARGE and not is_raw):
            continue
        return [
            f"data.normalize: the inputs have a root mean square of {size:.3g} and a mean of "
            f"{mean:.3g}, and models start for about 1 and 0. Set data.normalize=train. A data set "
            f"of your own standardises its numbers itself{_measured(values)}."
        ]
    return []


def _measured(values: Tensor) -> str:
    """Return how to standardise inputs (B, C, …) by their own statistics, unless C is large."""
    if values.ndim < 2 or values.shape[1] > MOST_SHOWN:
        return ""
    channels = values.movedim(1, 0).flatten(1).double()
    std = channels.std(1, correction=0)
    columns = channels.mean(1), std.where(std > 0, 1.0)
    mean, scale = (", ".join(f"{number:.4g}" for number in each.tolist()) for each in columns)
    return f": in this batch (inputs - mean) / std has mean [{mean}] and std [{scale}]"


def frozen_parameters(model: torch.nn.Module) -> list[str]:
    """Return a line that names the parameters that do not require a gradient, if there are any."""
    named = dict(model.named_parameters())
    frozen = [name for name, parameter in named.items() if not parameter.requires_grad]
    if not frozen or len(frozen) == len(named):
        return []
    return [
        f"model: {len(frozen)} of {len(named)} parameters are frozen (requires_grad=False): "
        f"{listed(frozen, 4)}. If that is not meant, look at model.freeze and requires_grad_()."
    ]


class Untrained:
    """The trainable parameters of a model that no backward pass of its first steps reaches.

    Reads only whether there is a gradient, so that nothing waits for a device.
    """

    def __init__(
        self,
        model: torch.nn.Module | None = None,
        step: int = 0,
        total_steps: int | None = None,
        *,
        tells: bool = True,
    ) -> None:
        """Watch until step 5 of the run, or its last; `step` is where it begins or resumes.

        Without a model there is nothing to watch. One process of several `tells`.
        """
        named = () if model is None else model.named_parameters()
        self.left = [(name, parameter) for name, parameter in named if parameter.requires_grad]
        self.until = FIRST_STEPS if total_steps is None else min(FIRST_STEPS, total_steps)
        self.step, self.tells = step, tells
        if self.step >= self.until:  # an earlier part of the run has looked
            self.left = []

    def look(self) -> None:
        """Look after the backward passes of a step. Logs a warning after the last one."""
        self.step += 1
        self.left = [(name, p) for name, p in self.left if p.grad is None]
        if self.left and self.step >= self.until:
            names, self.left = [name for name, _ in self.left], []
            if self.tells:
                log.warning("%s", without_gradient(names, self.until))


def without_gradient(names: list[str], steps: int) -> str:
    """Return the line about parameters that got no gradient in the first `steps` steps."""
    when = f"in the first {steps} steps" if steps > 1 else "in the first step"
    return (
        f"model: {listed(names, 4)} got no gradient {when}, so they do not train: forward does not "
        "use them, or detach() or no_grad() stops their gradient. Correct forward, or say that it "
        "is meant: requires_grad_(False)."
    )


def untrained_of(task: Any) -> list[str]:
    """Return a warning if the task or its loss has parameters: only the model's are trained."""
    found = []
    for name, value in {"task": task, **vars(task)}.items():
        if isinstance(value, torch.nn.Module):
            found += [f"{name}.{of}" for of, each in value.named_parameters() if each.requires_grad]
        elif isinstance(value, torch.nn.Parameter) and value.requires_grad:
            found.append(name)
    if not found:
        return []
    return [
        f"task: {', '.join(found[:5])} of the task or its loss is neither trained nor saved, as "
        "only the model's parameters are. Move it to the model, or use requires_grad_(False)."
    ]


def unsettled_averages(model: torch.nn.Module, steps: int, num_micro_batches: int) -> str | None:
    """Return a line if BatchNorm's running averages are mostly of before the run; else None.

    A momentum of m leaves (1 - m)^n of the initial values after n updates. Layers that have more
    updates than the run brought another state along, and those without any are in evaluation mode.
    """
    most, momentum = 0.0, 0.0
    updates = steps * num_micro_batches
    for module in model.modules():
        if not isinstance(module, _BatchNorm) or module.num_batches_tracked is None:
            continue
        if module.momentum is not None and 0 < int(module.num_batches_tracked) <= updates:
            most, momentum = max(
                (most, momentum), ((1 - module.momentum) ** updates, module.momentum)
            )
    if most <= MOST_INITIAL:
        return None
    return (
        f"{steps} steps: BatchNorm's running averages still hold {most:.0%} of their initial "
        "values, and evaluation uses them: val may look worse than the model is. Train for longer, "
        f"or give the layers a momentum above {momentum:g}."
    )


def leaks(data: DataLike, device: torch.device) -> list[str]:
    """Return a line for each set that shares inputs with train, whatever `data.limit_train` is.

    Compares the inputs as the model gets them, unaugmented, of at most 20,000 examples per split
    and for at most 20 seconds. `data.overlap` compares all, where a data set offers keys.
    """
    until = time.monotonic() + MOST_SECONDS
    # Train comes last, as it is the largest: no time may be left for what follows.
    sets = {name: [*_digests(data, name, device, until)] for name in data.num_examples
            if name != "train"}  # fmt: skip
    train = [*_digests(data, "train", device, until)] if sets else []
    known = set(train)
    lines = []
    for name, own in sets.items():
        shared = [place for place, digest in enumerate(own) if digest in known]
        least = max(LEAK * len(own), NATURAL * _by_chance(train, own))
        if len(shared) >= LEAST_SHARED and len(shared) > least:
            lines.append(
                f"data.source: {len(shared)} of the first {len(own)} {name} examples have the "
                f"inputs of a training example, the first is number {shared[0]}. Split before "
                "examples are copied or augmented, and keep what belongs together in one split."
            )
    return lines


def _by_chance(train: Sequence[bytes], own: Sequence[bytes]) -> float:
    """Return how many of `own` have a copy in `train` by chance, from the copies inside of each.

    An example of a set of n has a copy among n - 1 others, so one of `own` has about as many in
    `train`, if that has as many. One copy more than there is bounds the rate of few examples.
    """

    def rate(examples: Sequence[bytes]) -> float:
        counts = Counter(examples)
        return (1 + sum(n for n in counts.values() if n > 1)) / max(1, len(examples))

    fewer = min(1.0, len(train) / max(1, len(own)))
    return len(own) * max(rate(train), rate(own) * fewer)


def _digests(data: DataLike, name: str, device: torch.device, until: float) -> Iterator[bytes]:
    read, most = 0, min(MOST_READ, data.num_examples[name])
    for batch in data.evaluation(name, device=device):
        columns = [tensor.detach().cpu().contiguous() for tensor in parts_of(batch.inputs)]
        for row in range(min(batch.num_local, most - read)):
            digest = hashlib.blake2b(digest_size=16)
            for column in columns:
                digest.update(column[row].contiguous().view(-1).view(torch.uint8).numpy().data)
            yield digest.digest()
        read += batch.num_local
        if read >= most or time.monotonic() > until:
            return


def rises_towards_targets(
    task: Any, outputs: Tensor, targets: Tensor, weights: Tensor | None
) -> bool:
    """Return True if the task's loss rises when outputs (B, …) move towards the targets.

    Classes: from equal logits towards the targets, against the other way. Weights of classes and
    examples and label smoothing do not matter. Regression: the loss is lower on both sides of the
    targets, which no convex loss is, wherever its least value lies (quantiles, rates).
    """
    kind, outputs = getattr(task, "kind", None), widest(outputs.detach())

    def loss_at(point: Tensor) -> float:
        loss = mean_loss(task, point, targets, weights)
        return float("nan") if loss is None else float(loss)

    if kind == "regression":
        if outputs.numel() != targets.numel():
            return False
        aim = targets.to(outputs.dtype).view_as(outputs)
        away = (outputs - aim).abs().mean() + 1e-3
        here, below, above = (loss_at(point) for point in (aim, aim - away, aim + away))
        return max(below, above) < here - 1e-6 * abs(here)
    aim_of_kind = _direction(kind, outputs, targets, getattr(task, "ignore_index", None))
    if aim_of_kind is None:
        return False
    there, back = loss_at(0.1 * aim_of_kind), loss_at(-0.1 * aim_of_kind)
    return there > back + 1e-6 * abs(back)


def _direction(kind: Any, outputs: Tensor, targets: Tensor, ignored: int | None) -> Tensor | None:
    """Return where logits of zero have to move, shaped like `outputs`; None if that is unknown."""
    if kind in ("binary", "multilabel"):
        if outputs.numel() != targets.numel():
            return None
        return targets.to(outputs.dtype).view_as(outputs) - 0.5
    if kind not in ("multiclass", "segmentation", "language"):
        return None
    class_dim = 2 if kind == "language" else 1
    if outputs.ndim <= class_dim:
        return None
    classes = outputs.shape[class_dim]
    if targets.is_floating_point():
        return targets.to(outputs.dtype) - 1 / classes if targets.shape == outputs.shape else None
    index = targets.long().unsqueeze(class_dim)
    if index.ndim != outputs.ndim:
        return None
    known = (index >= 0) & (index < classes)
    if ignored is not None:
        known &= index != ignored
    hot = torch.zeros_like(outputs).scatter_(class_dim, index.where(known, 0), 1.0)
    return (hot - 1 / classes) * known


def mean_loss(task: Any, outputs: Any, targets: Any, weights: Tensor | None) -> Tensor | None:
    """Return the weighted mean of the task's losses, a scalar; None if they cannot be computed."""
    try:
        loss = task.loss(outputs, targets, weights)
    except (RuntimeError, TypeError, ValueError, IndexError):
        return None
    values: Tensor = loss.values
    if loss.weights is None:
        return values.mean()
    weighed: Tensor = torch.where(loss.weights != 0, values * loss.weights, 0).sum()
    return weighed.div(loss.weights.sum())
