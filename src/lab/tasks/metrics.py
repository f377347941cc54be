"""Metrics on torchmetrics, exact over any number of batches and processes.

`task.extra_metrics` names further ones, which get the rows that `Recipe.finish` returns:
probabilities and classes, predicted and true values, or predicted and true classes of pixels and
tokens.

Metrics count examples and ignore weights, except that a weight of zero leaves an example out. A
class that occurs neither in the targets nor in the predictions gives NaN and is left out of
averages; one that occurs but is never predicted has a precision of 0, as in scikit-learn. One NaN
among the outputs makes every metric NaN: its prediction would be arbitrary.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lab.tasks.losses import full_precision
from regrow.errors import UserError
from regrow.feeding.tokens import IGNORED
from regrow.numerics.precision import widest

if TYPE_CHECKING:
    from torchmetrics import Metric

CHUNK_EXAMPLES = 65_536  # a torchmetrics update costs about 50 µs per metric
CHUNK_ELEMENTS = 1 << 24  # at most 64 MB of buffered outputs
MAX_PAIRS = 2_000  # (true, predicted) values kept for the plot
MAX_CONFUSION = 1_000  # with more classes no table of C x C is kept

Rows = tuple[Tensor, Tensor]  # (N, …) outputs and (N, …) targets
COUNTS = ("_seen", "confusion", "counts")  # states that stay integers, also in the record
SHAPED = ("auroc", "r2")  # their states have the rows' shape, even for no rows
AVERAGED = ("accuracy", "precision", "recall", "f1", "auroc")


@dataclass(frozen=True)
class Recipe:
    """The metrics of one kind of task."""

    names: tuple[str, ...]  # the keys of `scalars`
    build: Callable[[], dict[str, Metric]]  # imports torchmetrics, so it is called late
    flatten: Callable[[Tensor, Tensor], Rows]  # a batch to rows of one shape, without copies
    finish: Callable[[Tensor, Tensor], Rows]  # converts rows to torchmetrics' inputs
    no_rows: Rows  # for a process without examples
    scalars: Callable[[dict[str, Tensor]], dict[str, float]]
    details: Callable[[dict[str, Tensor]], dict[str, Any]]
    of_extra: Callable[[Tensor], Tensor] = lambda outputs: outputs  # what extra metrics get


class Metrics:
    """Metrics of one pass over a split. `update` only buffers rows until a chunk is full.

    All processes must call `scalars`, even those without examples: torchmetrics gathers there. A
    later `details` is local.
    """

    def __init__(
        self, recipe: Recipe, device: torch.device, extra: Mapping[str, Metric] | None = None
    ) -> None:
        self.names = (*recipe.names, *(extra or {}))
        self._extra = extra or {}
        if self._extra:
            from regrow.numerics.extra import check

            check(self._extra, recipe.names)
        self._recipe, self._device = recipe, torch.device(device)
        if self._device.type == "mps":  # MPS does not support float64
            self._device = torch.device("cpu")
        self._waiting: list[tuple[Tensor, Tensor, Tensor | None]] = []
        self._num_waiting = self._num_elements = 0
        self._metrics: dict[str, Any] | None = None
        self._values: dict[str, Tensor] | None = None

    def update(self, outputs: Tensor, targets: Tensor, weights: Tensor | None = None) -> None:
        """Add a batch: outputs and targets as the loss takes them, weights (B,)."""
        num_examples = outputs.shape[0]
        rows = self._recipe.flatten(outputs.detach(), targets)
        if weights is not None and rows[0].shape[0] != num_examples:  # one weight per token
            weights = weights.repeat_interleave(rows[0].shape[0] // max(num_examples, 1))
        self._waiting.append((*rows, weights))
        self._num_waiting += rows[0].shape[0]
        self._num_elements += outputs.numel()
        self._values = None
        if self._num_waiting >= CHUNK_EXAMPLES or self._num_elements >= CHUNK_ELEMENTS:
            self._feed()

    def scalars(self) -> dict[str, float]:
        """Return the metrics by name, NaN where undefined."""
        values = self._compute()
        num_rows, num_nans = values["_seen"].tolist()
        if num_rows == 0 or num_nans > 0:
            return dict.fromkeys(self.names, math.nan)
        extra = {name: float(values[name]) for name in self._extra}
        return self._recipe.scalars(values) | extra

    def details(self) -> dict[str, Any]:
        """Return the data for plots: confusion matrices, or pairs of true and predicted values."""
        values = self._compute()
        return {} if values["_seen"][0] == 0 else self._recipe.details(values)

    def higher_is_better(self, monitor: str) -> bool | None:
        """Return torchmetrics' `higher_is_better` for an extra metric; for others the name says it.

        So a run imports torchmetrics, which takes a second or two, only at its first evaluation.
        """
        higher = getattr(self._extra.get(monitor.split("/")[1]), "higher_is_better", None)
        return higher if isinstance(higher, bool) else None

    def rehearse(self, outputs: Tensor, targets: Tensor) -> None:
        """Raise UserError for an extra metric that does not take such a batch."""
        if self._extra:
            from regrow.numerics.extra import rehearse

            rows = self._recipe.flatten(outputs.detach().to(self._device), targets.to(self._device))
            outputs, targets = self._finished(*rows)
            rehearse(self._extra, self._recipe.of_extra(outputs), targets)

    @torch.no_grad()
    def _feed(self) -> None:
        outputs, targets = self._finished(*self._taken())
        if self._metrics is None:
            self._metrics = self._made(outputs.dtype)
        self._metrics["_seen"].update(outputs, targets)
        if not outputs.is_floating_point():
            outputs = outputs.clamp(min=0)  # -1 stands for NaN, and is counted by now
        for name, metric in self._metrics.items():
            if name == "_pairs":
                pairs = torch.stack([targets, outputs], -1).reshape(-1)
                width = 2 * max(1, outputs[:1].numel())
                most = max(1, 2 * MAX_PAIRS // width) * width
                metric.update(pairs[: most - sum(map(len, metric.value))])
            elif name in self._extra:
                from regrow.numerics import extra

                extra.update(metric, self._recipe.of_extra(outputs), targets)
            elif name != "_seen" and (outputs.shape[0] or name in SHAPED):
                metric.update(outputs, targets)

    def _finished(self, outputs: Tensor, targets: Tensor) -> Rows:
        return self._recipe.finish(
            widest(outputs) if outputs.is_floating_point() else outputs, targets
        )

    def _made(self, dtype: torch.dtype) -> dict[str, Any]:
        from regrow.numerics.exact import Seen

        made: dict[str, Any] = {"_seen": Seen(), **self._recipe.build()}
        for name, metric in made.items():
            metric.to(self._device)
            if name not in COUNTS:
                metric.set_dtype(dtype)
        if self._extra:
            from regrow.numerics.extra import fresh

            made |= {name: fresh(metric, self._device) for name, metric in self._extra.items()}
        return made

    def _taken(self) -> Rows:
        """Return the buffered rows, without examples of weight zero, and clear the buffer."""
        waiting = self._waiting or [(*self._recipe.no_rows, None)]
        self._waiting, self._num_waiting, self._num_elements = [], 0, 0
        outputs = torch.cat([o.to(self._device) for o, _, _ in waiting])
        targets = torch.cat([t.to(self._device) for _, t, _ in waiting])
        if all(weights is None for _, _, weights in waiting):
            return outputs, targets
        kept = [o.new_ones(o.shape[0]) if w is None else w for o, _, w in waiting]
        keep = torch.cat([weights.to(self._device) != 0 for weights in kept])
        return outputs[keep], targets[keep]

    @torch.no_grad()
    def _compute(self) -> dict[str, Tensor]:
        if self._values is not None:
            return self._values
        if self._waiting or self._metrics is None:
            self._feed()
        assert self._metrics is not None
        with warnings.catch_warnings():
            # A process without examples warns, but computes from the others' counts.
            warnings.filterwarnings("ignore", "The ``compute`` method of metric .* was called")
            values = {"_seen": self._metrics["_seen"].compute()}
            if values["_seen"][0] > 0:  # gathered, so all processes take the same branch
                values |= {k: m.compute() for k, m in self._metrics.items() if k not in values}
        self._values = values
        return values


def names_of(
    given: list[str] | None, count: int, key: str = "data.class_names", of: str = "classes"
) -> list[str]:
    """Return the names of the classes or targets, or their indices."""
    names = [str(name) for name in (range(count) if given is None else given)]
    if len(names) != count:
        raise UserError(f"{key} has {len(names)} names for {count} {of}.")
    if len(set(names)) != count:
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{key} holds {twice} twice. Make the names unique.")
    return names


def multiclass_metrics(
    class_names: list[str], ignore_index: int | None, *, per_class: bool, auroc: bool
) -> Recipe:
    """Return the recipe for accuracy over examples; precision, recall, F1, AUROC as class means."""
    num_classes = len(class_names)

    def build() -> dict[str, Any]:
        from torchmetrics import classification as tm

        from regrow.numerics.exact import ClassCounts, MulticlassAUROC

        same: dict[str, Any] = {"num_classes": num_classes, "validate_args": False}
        metrics: dict[str, Any]
        if num_classes <= MAX_CONFUSION:
            metrics = {"confusion": tm.MulticlassConfusionMatrix(**same)}
        else:
            metrics = {"counts": ClassCounts(num_classes)}
        return metrics | ({"auroc": MulticlassAUROC(average="none", **same)} if auroc else {})

    def flatten(outputs: Tensor, targets: Tensor) -> Rows:
        if targets.is_floating_point():
            targets = targets.argmax(1)
        if outputs.ndim > 2:
            outputs = outputs.movedim(1, -1).reshape(-1, num_classes)
        return outputs, targets.reshape(-1)

    def finish(outputs: Tensor, targets: Tensor) -> Rows:
        if ignore_index is not None:
            keep = targets != ignore_index
            outputs, targets = outputs[keep], targets[keep]
        return outputs.softmax(1), targets

    def scalars(values: dict[str, Tensor]) -> dict[str, float]:
        if (table := values.get("confusion")) is None:
            right, true, predicted = values["counts"].cpu().double()
        else:
            counts = table.cpu().double()
            right, true, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
        by_class = _by_class(right, true, predicted, values.get("auroc"))
        # A class's accuracy equals its recall.
        result = _means({"accuracy": by_class["recall"], **by_class}, class_names, per_class)
        return result | {"accuracy": float(right.sum() / true.sum())}

    return Recipe(
        names=_names(class_names, per_class=per_class, auroc=auroc),
        build=build,
        flatten=flatten,
        finish=finish,
        no_rows=(torch.empty(0, num_classes), torch.empty(0, dtype=torch.int64)),
        scalars=scalars,
        details=lambda values: _confusion(values, class_names),
    )


def binary_metrics(class_names: list[str], threshold: float, *, auroc: bool) -> Recipe:
    """Return the recipe for accuracy; precision, recall, F1 and AUROC of the positive class."""

    def build() -> dict[str, Any]:
        from torchmetrics import classification as tm

        from regrow.numerics.exact import BinaryAUROC

        same: dict[str, Any] = {"threshold": threshold, "validate_args": False}
        metrics: dict[str, Any] = {"confusion": tm.BinaryConfusionMatrix(**same)}
        return metrics | ({"auroc": BinaryAUROC(validate_args=False)} if auroc else {})

    def scalars(values: dict[str, Tensor]) -> dict[str, float]:
        counts = values["confusion"].cpu().double()
        right, true, predicted = counts[1, 1], counts[1].sum(), counts[:, 1].sum()
        found = _by_class(right, true, predicted, values.get("auroc"))
        accuracy = counts.diagonal().sum() / counts.sum()
        return {name: float(value) for name, value in {"accuracy": accuracy, **found}.items()}

    return Recipe(
        names=_names([], per_class=False, auroc=auroc),
        build=build,
        flatten=lambda outputs, targets: (outputs.reshape(-1), targets.reshape(-1)),
        finish=lambda outputs, targets: (outputs.sigmoid(), (targets > 0.5).long()),
        no_rows=(torch.empty(0), torch.empty(0, dtype=torch.int64)),
        scalars=scalars,
        details=lambda values: _confusion(values, class_names),
    )


def multilabel_metrics(
    class_names: list[str], threshold: float, *, per_class: bool, auroc: bool
) -> Recipe:
    """Return the recipe for all metrics as means over labels, and the exact-match ratio."""
    num_labels = len(class_names)

    def build() -> dict[str, Any]:
        from torchmetrics import classification as tm

        from regrow.numerics.exact import MultilabelAUROC

        one: dict[str, Any] = {"num_labels": num_labels, "validate_args": False}
        same = {"threshold": threshold, **one}
        metrics: dict[str, Any] = {
            "exact_match": tm.MultilabelExactMatch(**same),
            "confusion": tm.MultilabelConfusionMatrix(**same),
        }
        return metrics | ({"auroc": MultilabelAUROC(average="none", **one)} if auroc else {})

    def scalars(values: dict[str, Tensor]) -> dict[str, float]:
        counts = values["confusion"].cpu().double()  # (C, true, predicted)
        right, true, predicted = counts[:, 1, 1], counts[:, 1].sum(1), counts[:, :, 1].sum(1)
        by_class = _by_class(right, true, predicted, values.get("auroc"))
        # Defined for every label, including absent ones.
        accuracy = (counts[:, 0, 0] + right) / counts.sum((1, 2))
        result = _means({"accuracy": accuracy, **by_class}, class_names, per_class)
        return result | {"exact_match": float(values["exact_match"])}

    return Recipe(
        names=("exact_match", *_names(class_names, per_class=per_class, auroc=auroc)),
        build=build,
        flatten=lambda outputs, targets: (outputs, targets),
        finish=lambda outputs, targets: (outputs.sigmoid(), (targets > 0.5).long()),
        no_rows=(torch.empty(0, num_labels), torch.empty(0, num_labels)),
        scalars=scalars,
        details=lambda values: _confusion(values, class_names),
    )


def language_metrics(
    num_tokens: int, num_bytes: list[int] | None, ignore_index: int | None = None
) -> Recipe:
    """Return the recipe for perplexity, accuracy and, given each token's bytes, bits per byte.

    All of them are over tokens and from the plain cross entropy, whatever the loss is. Targets of
    -100 or `ignore_index` do not count.
    """
    names = ("perplexity", "accuracy") + (() if num_bytes is None else ("bits_per_byte",))

    def build() -> dict[str, Any]:
        from regrow.numerics.exact import TokenSums

        return {"sums": TokenSums(num_tokens, num_bytes or [])}

    def flatten(outputs: Tensor, targets: Tensor) -> Rows:
        """Reduce at once: buffered logits would take a vocabulary's row per token."""
        outputs, targets = full_precision(outputs.flatten(0, 1)), targets.flatten()
        losses = F.cross_entropy(outputs, targets, ignore_index=IGNORED, reduction="none")
        return torch.stack([losses, outputs.argmax(1).to(losses.dtype)], 1), targets

    def finish(rows: Tensor, targets: Tensor) -> Rows:
        keep = targets != IGNORED
        if ignore_index is not None:
            keep &= targets != ignore_index
        return rows[keep], targets[keep]

    def scalars(values: dict[str, Tensor]) -> dict[str, float]:
        loss, right, tokens, total_bytes = values["sums"]
        per_byte = loss / math.log(2) / total_bytes
        every = ((loss / tokens).exp(), right / tokens, per_byte)
        return {name: float(value) for name, value in zip(names, every, strict=False)}

    return Recipe(
        names=names,
        build=build,
        flatten=flatten,
        finish=finish,
        no_rows=(torch.empty(0, 2), torch.empty(0, dtype=torch.int64)),
        scalars=scalars,
        details=lambda values: {},
        of_extra=lambda rows: rows[:, 1].long(),
    )


def regression_metrics(
    num_outputs: int, in_units: Callable[[Tensor], Tensor], target_names: Sequence[str] = ()
) -> Recipe:
    """Return the recipe for MAE and RMSE over all values, and R² as the mean over outputs.

    With several outputs, it has these also for each of the `target_names`. `in_units` reverts the
    standardisation, for outputs and targets alike.
    """
    names, each = ("mae", "rmse", "r2"), list(target_names) if num_outputs > 1 else []

    def build() -> dict[str, Any]:
        from torchmetrics import CatMetric, MeanAbsoluteError, MeanSquaredError

        from regrow.numerics.exact import ExactR2

        found = {
            "mae": MeanAbsoluteError(),
            "rmse": MeanSquaredError(squared=False),
            "r2": ExactR2(),
            "_pairs": CatMetric(nan_strategy="disable"),
        }
        if each:
            found["mae/each"] = MeanAbsoluteError(num_outputs=num_outputs)
            found["rmse/each"] = MeanSquaredError(squared=False, num_outputs=num_outputs)
        return found

    def scalars(values: dict[str, Tensor]) -> dict[str, float]:
        by_target = {"r2/each": values["r2"], **values}
        result = {name: float(values[name].mean()) for name in names}
        for name in names if each else ():
            named = zip(each, by_target[f"{name}/each"].tolist(), strict=True)
            result |= {f"{name}/{of}": value for of, value in named}
        return result

    def flatten(outputs: Tensor, targets: Tensor) -> Rows:
        shape = (-1,) if num_outputs == 1 else (-1, num_outputs)
        return outputs.reshape(shape), targets.reshape(shape)

    def details(values: dict[str, Tensor]) -> dict[str, Any]:
        shape = (-1, 2) if num_outputs == 1 else (-1, num_outputs, 2)
        pairs = values["_pairs"].reshape(shape)[: max(1, MAX_PAIRS // num_outputs)]
        columns = {"true": pairs[..., 0].tolist(), "predicted": pairs[..., 1].tolist()}
        return columns | ({"target_names": each} if each else {})

    shape = (0,) if num_outputs == 1 else (0, num_outputs)
    return Recipe(
        names=(*names, *(f"{name}/{of}" for name in names for of in each)),
        build=build,
        flatten=flatten,
        finish=lambda outputs, targets: (in_units(outputs), in_units(targets.to(outputs.dtype))),
        no_rows=(torch.empty(shape), torch.empty(shape)),
        scalars=scalars,
        details=details,
    )


def segmentation_metrics(
    class_names: list[str], ignore_index: int | None, *, per_class: bool
) -> Recipe:
    """Return the recipe for pixel accuracy; IoU and Dice as means over the classes that occur."""
    num_classes, averaged = len(class_names), ("iou", "dice")

    def build() -> dict[str, Any]:
        from torchmetrics.classification import MulticlassConfusionMatrix

        return {"confusion": MulticlassConfusionMatrix(num_classes, validate_args=False)}

    def flatten(outputs: Tensor, targets: Tensor) -> Rows:
        """Return the classes of all pixels, at once: the outputs are C times as large."""
        classes = outputs.argmax(1).masked_fill(outputs.amax(1).isnan(), -1)
        return classes.reshape(-1), targets.long().reshape(-1)

    def finish(classes: Tensor, targets: Tensor) -> Rows:
        keep = slice(None) if ignore_index is None else targets != ignore_index
        return classes[keep], targets[keep]

    def scalars(values: dict[str, Tensor]) -> dict[str, float]:
        counts = values["confusion"].cpu().double()
        right, both = counts.diagonal(), counts.sum(1) + counts.sum(0)
        by_class = {"iou": right / (both - right), "dice": 2 * right / both}
        accuracy = float(right.sum() / counts.sum())
        return {"pixel_accuracy": accuracy, **_means(by_class, class_names, per_class)}

    each = [f"{name}/{of}" for name in averaged for of in class_names] if per_class else []
    return Recipe(
        names=("pixel_accuracy", *averaged, *each),
        build=build,
        flatten=flatten,
        finish=finish,
        no_rows=(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)),
        scalars=scalars,
        details=lambda values: _confusion(values, class_names),
    )


def _names(class_names: list[str], *, per_class: bool, auroc: bool) -> tuple[str, ...]:
    averaged = AVERAGED if auroc else AVERAGED[:-1]
    each = [f"{name}/{of}" for name in averaged for of in class_names] if per_class else []
    return (*averaged, *each)


def _by_class(
    right: Tensor, true: Tensor, predicted: Tensor, auroc: Tensor | None
) -> dict[str, Tensor]:
    """Return precision, recall and F1 from each class's counts, and `auroc`; each is (C,) or ().

    Undefined values are NaN.
    """
    absent = true + predicted == 0
    found = {
        "precision": (right / predicted.clamp(min=1)).masked_fill(absent, math.nan),
        "recall": (right / true.clamp(min=1)).masked_fill(absent, math.nan),
        "f1": 2 * right / (true + predicted),
    }
    if auroc is not None:
        found["auroc"] = auroc.reshape(right.shape)  # torchmetrics squeezes a single label
    return found


def _means(
    by_class: dict[str, Tensor], class_names: list[str], per_class: bool
) -> dict[str, float]:
    """Return each metric's mean over the classes for which it is defined, then each class's own."""
    result = {name: float(values.nanmean()) for name, values in by_class.items()}
    if per_class:
        for name, values in by_class.items():
            named = zip(class_names, values.tolist(), strict=True)
            result |= {f"{name}/{of}": value for of, value in named}
    return result


def _confusion(values: dict[str, Tensor], class_names: list[str]) -> dict[str, Any]:
    """Return the counts, with a row per true class; for several labels a 2x2 matrix per label.

    Empty without a table: see `MAX_CONFUSION`.
    """
    if "confusion" not in values:
        return {}
    return {"confusion_matrix": values["confusion"].tolist(), "class_names": class_names}
