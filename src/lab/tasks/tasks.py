"""Tasks: how outputs become a loss, predictions and metrics, with a class per kind of target.

All have the methods of `regrow.protocols.Task`. Shapes: B examples, C classes, labels or tokens, D
values, T places.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lab.tasks import checks
from lab.tasks.losses import Loss, LossOutput, attribute, matched, per_example, weighted
from lab.tasks.metrics import (
    Metrics,
    binary_metrics,
    language_metrics,
    multiclass_metrics,
    multilabel_metrics,
    names_of,
    regression_metrics,
    segmentation_metrics,
)
from regrow.config.rules import require
from regrow.feeding.tokens import IGNORED
from regrow.feeding.vocabulary import from_record
from regrow.numerics.precision import widest
from regrow.protocols import Batch
from regrow.record.pictures import of_masks, of_wrong

if TYPE_CHECKING:
    from torchmetrics import Metric


class Multiclass:
    """One of C classes per example: logits (B, C, …), int64 indices (B, …) or probabilities."""

    kind = "multiclass"

    def __init__(
        self,
        *,
        num_classes: int,
        class_names: list[str] | None,
        monitor: str,
        per_class: bool,
        auroc: bool,
        extra_metrics: dict[str, Metric] | None,
        loss: Loss,
    ) -> None:
        checks.fits(loss, self.kind)
        self.class_names = names_of(class_names, num_classes)
        loss = checks.weighted_by_name(loss, self.class_names)
        checks.one_per_class(loss, "class_weights", num_classes)
        self.monitor = monitor
        self.num_classes = num_classes
        self.per_class, self.auroc, self.loss_fn = per_class, auroc, loss
        self.sums_over_examples = bool(attribute(loss, "sums_over_examples", True))
        self.extra_metrics = extra_metrics
        self.ignore_index: int | None = attribute(loss, "ignore_index", None)
        self.as_pixels: Callable[[Tensor], Tensor] | None = None  # of inputs, for pictures
        # The number of ignored targets is not known without waiting for the device.
        self.running_name = "accuracy" if self.ignore_index is None else None

    def loss(self, outputs: Tensor, targets: Tensor, weights: Tensor | None) -> LossOutput:
        return weighted(self.loss_fn(outputs, targets), weights, len(outputs))

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        logits = attribute(self.loss_fn, "name", None) == "cross_entropy"
        checks.multiclass(
            outputs,
            targets,
            num_classes=self.num_classes,
            ignore_index=self.ignore_index,
            logits=logits,
        )
        checks.returned(self.loss_fn, outputs, targets)
        self.metrics(outputs.device).rehearse(outputs, targets)

    def running(self, outputs: Tensor, targets: Tensor) -> Tensor | None:
        if self.running_name is None:
            return None
        if targets.is_floating_point():
            targets = targets.argmax(1)
        right = outputs.argmax(1).eq(targets)
        return right if right.ndim == 1 else per_example(right.float())

    def predict(self, outputs: Tensor) -> dict[str, Tensor]:
        probability = widest(outputs).softmax(1)
        return {"prediction": outputs.argmax(1), "probability": probability}

    def metrics(self, device: torch.device) -> Metrics:
        recipe = multiclass_metrics(
            self.class_names, self.ignore_index, per_class=self.per_class, auroc=self.auroc
        )
        return Metrics(recipe, device, self.extra_metrics)

    def examples(self, batch: Batch, outputs: Tensor) -> dict[str, Any]:
        """Return pictures of the wrong ones among a batch's images, for the report."""
        return of_wrong(batch, outputs, self.predict, self.class_names, self.as_pixels)


class Binary:
    """Yes or no per example: logits (B,) or (B, 1), targets (B,) or (B, 1) of 0 and 1."""

    kind = "binary"
    running_name = "accuracy"

    def __init__(
        self,
        *,
        class_names: list[str] | None,
        threshold: float,
        monitor: str,
        auroc: bool,
        extra_metrics: dict[str, Metric] | None,
        loss: Loss,
    ) -> None:
        checks.fits(loss, self.kind)
        checks.one_per_class(loss, "pos_weight", 1)
        self.monitor = monitor
        self.class_names = names_of(class_names, 2)
        self.auroc, self.loss_fn = auroc, loss
        self.threshold, self.logit = threshold, _logit(threshold)
        self.sums_over_examples = bool(attribute(loss, "sums_over_examples", True))
        self.extra_metrics = extra_metrics
        self.as_pixels: Callable[[Tensor], Tensor] | None = None  # of inputs, for pictures

    def loss(self, outputs: Tensor, targets: Tensor, weights: Tensor | None) -> LossOutput:
        return weighted(self.loss_fn(*matched(outputs, targets)), weights, len(outputs))

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        logits = attribute(self.loss_fn, "name", None) == "bce_with_logits"
        checks.binary(outputs, targets, logits=logits)
        checks.returned(self.loss_fn, *matched(outputs, targets))
        self.metrics(outputs.device).rehearse(outputs, targets)

    def running(self, outputs: Tensor, targets: Tensor) -> Tensor | None:
        outputs, targets = matched(outputs, targets)
        return outputs.gt(self.logit).eq(targets > 0.5)  # soft ones count as the nearer label

    def predict(self, outputs: Tensor) -> dict[str, Tensor]:
        outputs = outputs.flatten()
        probability = widest(outputs).sigmoid()
        prediction = probability.gt(self.threshold).long()
        return {"prediction": prediction, "probability": probability}

    def metrics(self, device: torch.device) -> Metrics:
        recipe = binary_metrics(self.class_names, self.threshold, auroc=self.auroc)
        return Metrics(recipe, device, self.extra_metrics)

    def examples(self, batch: Batch, outputs: Tensor) -> dict[str, Any]:
        """Return pictures of the wrong ones among a batch's images, for the report."""
        return of_wrong(batch, outputs, self.predict, self.class_names, self.as_pixels)


class Multilabel:
    """Any of C labels per example: logits (B, C), targets (B, C) of 0 and 1."""

    kind = "multilabel"
    running_name = "accuracy"  # over all labels

    def __init__(
        self,
        *,
        num_classes: int,
        class_names: list[str] | None,
        threshold: float,
        monitor: str,
        per_class: bool,
        auroc: bool,
        extra_metrics: dict[str, Metric] | None,
        loss: Loss,
    ) -> None:
        checks.fits(loss, self.kind)
        checks.one_per_class(loss, "pos_weight", num_classes)
        self.monitor = monitor
        self.num_classes = num_classes
        self.class_names = names_of(class_names, num_classes)
        self.per_class, self.auroc, self.loss_fn = per_class, auroc, loss
        self.threshold, self.logit = threshold, _logit(threshold)
        self.sums_over_examples = bool(attribute(loss, "sums_over_examples", True))
        self.extra_metrics = extra_metrics

    def loss(self, outputs: Tensor, targets: Tensor, weights: Tensor | None) -> LossOutput:
        return weighted(self.loss_fn(outputs, targets), weights, len(outputs))

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        logits = attribute(self.loss_fn, "name", None) == "bce_with_logits"
        checks.multilabel(outputs, targets, num_classes=self.num_classes, logits=logits)
        checks.returned(self.loss_fn, outputs, targets)
        self.metrics(outputs.device).rehearse(outputs, targets)

    def running(self, outputs: Tensor, targets: Tensor) -> Tensor | None:
        return outputs.gt(self.logit).eq(targets > 0.5).float().mean(1)

    def predict(self, outputs: Tensor) -> dict[str, Tensor]:
        probability = widest(outputs).sigmoid()
        prediction = probability.gt(self.threshold).long()
        return {"prediction": prediction, "probability": probability}

    def metrics(self, device: torch.device) -> Metrics:
        recipe = multilabel_metrics(
            self.class_names, self.threshold, per_class=self.per_class, auroc=self.auroc
        )
        return Metrics(recipe, device, self.extra_metrics)


class Regression:
    """Real values: outputs and targets (B,), (B, 1) or (B, D). Nothing is broadcast.

    If the data standardises its targets, `in_units` reverts that: predictions and metrics are in
    the targets' own units, the loss is not.
    """

    kind = "regression"
    running_name = None

    def __init__(
        self,
        *,
        num_outputs: int,
        target_names: list[str] | None,
        monitor: str,
        per_target: bool,
        extra_metrics: dict[str, Metric] | None,
        loss: Loss,
    ) -> None:
        checks.fits(loss, self.kind)
        self.monitor = monitor
        self.num_outputs, self.loss_fn = num_outputs, loss
        self.target_names = names_of(target_names, num_outputs, "task.target_names", "targets")
        self.per_target = per_target
        self.in_units: Callable[[Tensor], Tensor] = widest
        self.sums_over_examples = bool(attribute(loss, "sums_over_examples", True))
        self.extra_metrics = extra_metrics

    def loss(self, outputs: Tensor, targets: Tensor, weights: Tensor | None) -> LossOutput:
        return weighted(self.loss_fn(*matched(outputs, targets)), weights, len(outputs))

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        checks.regression(outputs, targets, self.num_outputs)
        checks.returned(self.loss_fn, *matched(outputs, targets))
        self.metrics(outputs.device).rehearse(outputs, targets)

    def running(self, outputs: Tensor, targets: Tensor) -> Tensor | None:
        return None

    def predict(self, outputs: Tensor) -> dict[str, Tensor]:
        one = outputs.ndim == 2 and outputs.shape[1] == 1
        return {"prediction": self.in_units(outputs.squeeze(1) if one else outputs)}

    def metrics(self, device: torch.device) -> Metrics:
        each = self.target_names if self.per_target else ()
        recipe = regression_metrics(self.num_outputs, self.in_units, each)
        return Metrics(recipe, device, self.extra_metrics)


class Segmentation:
    """One of C classes per pixel: logits (B, C, H, W), masks (B, H, W) of class indices.

    Pixels of the loss's `ignore_index` count neither in the loss nor in the metrics.
    """

    kind = "segmentation"
    running_name = None  # the number of ignored pixels is not known without waiting for the device

    def __init__(
        self,
        *,
        num_classes: int,
        class_names: list[str] | None,
        monitor: str,
        per_class: bool,
        extra_metrics: dict[str, Metric] | None,
        loss: Loss,
    ) -> None:
        checks.fits(loss, self.kind)
        self.class_names = names_of(class_names, num_classes)
        loss = checks.weighted_by_name(loss, self.class_names)
        checks.one_per_class(loss, "class_weights", num_classes)
        self.monitor = monitor
        self.num_classes = num_classes
        self.per_class, self.loss_fn = per_class, loss
        self.sums_over_examples = bool(attribute(loss, "sums_over_examples", True))
        self.extra_metrics = extra_metrics
        self.ignore_index: int | None = attribute(loss, "ignore_index", None)
        self.as_pixels: Callable[[Tensor], Tensor] | None = None  # of inputs, for pictures

    def loss(self, outputs: Tensor, targets: Tensor, weights: Tensor | None) -> LossOutput:
        return weighted(self.loss_fn(outputs, targets.long()), weights, len(outputs))

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        logits = attribute(self.loss_fn, "name", None) == "cross_entropy"
        checks.segmentation(outputs, targets, self.num_classes, self.ignore_index, logits=logits)
        checks.returned(self.loss_fn, outputs, targets.long())
        self.metrics(outputs.device).rehearse(outputs, targets)

    def running(self, outputs: Tensor, targets: Tensor) -> Tensor | None:
        return None

    def predict(self, outputs: Tensor) -> dict[str, Tensor]:
        # In float32: a float64 per class and pixel would take twice the memory of the outputs.
        return {"prediction": outputs.argmax(1), "probability": outputs.float().softmax(1)}

    def metrics(self, device: torch.device) -> Metrics:
        recipe = segmentation_metrics(self.class_names, self.ignore_index, per_class=self.per_class)
        return Metrics(recipe, device, self.extra_metrics)

    def examples(self, batch: Batch, outputs: Tensor) -> dict[str, Any]:
        """Return pictures of a few inputs, masks and predictions, for the report."""
        targets: Any = batch.targets
        masks = {"true": targets, "predicted": outputs.argmax(1)}
        named = (self.class_names, self.ignore_index)
        return of_masks(batch.inputs, masks, *named, self.as_pixels)


class Language:
    """The next of C tokens at each place: logits (B, T, C), targets (B, T) int64.

    Targets of -100, or of the loss's `ignore_index`, do not count. `vocabulary` is the data's, as
    recorded, if they have one.
    """

    kind = "language"
    running_name = None

    def __init__(
        self,
        *,
        num_classes: int,
        monitor: str,
        extra_metrics: dict[str, Metric] | None,
        loss: Loss,
    ) -> None:
        checks.fits(loss, self.kind)
        loss = checks.weighted_by_name(loss, names_of(None, num_classes))
        checks.one_per_class(loss, "class_weights", num_classes)
        self.monitor = monitor
        self.num_classes, self.loss_fn = num_classes, loss
        self.sums_over_examples = bool(attribute(loss, "sums_over_examples", True))
        self.extra_metrics = extra_metrics
        self.ignore_index: int | None = attribute(loss, "ignore_index", None)
        self.vocabulary: Mapping[str, str] | None = None

    def loss(self, outputs: Tensor, targets: Tensor, weights: Tensor | None) -> LossOutput:
        kept = targets != IGNORED
        flat = outputs.flatten(0, 1), targets.where(kept, 0).flatten()
        result = weighted(self.loss_fn(*flat), kept.flatten().float(), targets.numel())
        per_place = LossOutput(
            result.values.view_as(targets),
            None if result.weights is None else result.weights.view_as(targets),
            {name: part.view_as(targets) for name, part in result.components.items()},
        )
        return weighted(per_place, weights, len(outputs))

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        checks.language(outputs, targets, num_classes=self.num_classes)
        kept = targets.flatten() != IGNORED
        checks.returned(self.loss_fn, outputs.flatten(0, 1)[kept], targets.flatten()[kept])
        self.metrics(outputs.device).rehearse(outputs, targets)

    def running(self, outputs: Tensor, targets: Tensor) -> Tensor | None:
        return None  # an argmax over many logits takes a good part of a step

    def predict(self, outputs: Tensor) -> dict[str, Tensor]:
        return {"prediction": outputs.argmax(-1), "probability": widest(outputs).softmax(-1)}

    def metrics(self, device: torch.device) -> Metrics:
        known = self.vocabulary
        num_bytes = None if known is None else from_record(known, "task=language").num_bytes()
        recipe = language_metrics(self.num_classes, num_bytes, self.ignore_index)
        return Metrics(recipe, device, self.extra_metrics)


def _logit(threshold: float) -> float:
    require("task.threshold", threshold)
    return math.log(threshold / (1 - threshold))
