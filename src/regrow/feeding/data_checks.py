"""Checks that data fits its config, before anything is computed from it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regrow.errors import DataError, UserError, listed
from regrow.feeding.batch import dtype_of
from regrow.feeding.images import ImageFiles
from regrow.feeding.items import out_of_range, outside
from regrow.feeding.mixing import Mix, refuse_integers
from regrow.feeding.preprocess import NUM_SAMPLED, Normalizer, Preprocessing, rounding
from regrow.feeding.sampling import Windows
from regrow.feeding.splits import Examples, Split, Splits
from regrow.feeding.streams import Stream
from regrow.project import lab_name

log = logging.getLogger("regrow.data")

OF_CLASSES = ("multiclass", "segmentation", "language")  # their targets are indices
FLATTENED = 0.05  # a feature of a deviation below this, where models expect 1


@dataclass(frozen=True)
class DataChecks:
    """A source, and what the config says of its examples: see `loaders.Data`."""

    source: Splits
    target_kind: str | None
    num_classes: int | None
    num_outputs: int | None
    ignore_index: int | None
    input_shape: list[int] | None

    def refuse_other_order(self, sampling: str | dict[str, str] | None, mixing: Mix | None) -> None:
        """Raise UserError for what needs another order than that of shards or of a stream."""
        train = self.source.train
        if sampling is not None and order_of(train) is not None:
            kind = "streams" if isinstance(train, Stream) else "tar shards"
            raise UserError(
                f"data.sampling={sampling}: {kind} are read in an order of their own, which "
                "draws nothing twice. Set data.sampling=null, and use loss.class_weights."
            )
        if isinstance(train, Stream) and mixing is not None:
            raise UserError(
                "data.mixing: an IterableDataset is read in its own order, once. Mix in the data "
                "set, and set data.mixing=null."
            )

    def check_augmentation(self, augmentation: Any) -> None:
        """Raise UserError unless `augmentation` takes the training split as it is stored."""
        train = self.source.train
        if takes_resized(augmentation):
            if not isinstance(train, ImageFiles) or train.resize is None:
                raise UserError(
                    f"data.augmentation={type(augmentation).__name__} takes the resized images of "
                    "data=image_folder with a data.source.resize. Use another one, or null."
                )
            return
        if not isinstance(train, Examples):
            if not hasattr(train, "augmented"):
                raise UserError(
                    "data.augmentation does not reach into a data set of your own. Augment there, "
                    "and set data.augmentation=null."
                )
        elif train.inputs.dtype != torch.uint8 or not hasattr(augmentation, "store"):
            raise UserError(
                f"data.augmentation={type(augmentation).__name__} does not fit "
                f"{dtype_of(train.inputs)} inputs of shape {self.input_shape} in memory. Use "
                "CropFlip for images, or null."
            )
        elif self.target_kind == "segmentation":
            if not getattr(augmentation, "only_moves_pixels", False):
                raise UserError(
                    f"data.augmentation={type(augmentation).__name__} does not move masks with "
                    "their images. Use CropFlip, or null."
                )
            largest = max((self.num_classes or 1) - 1, self.ignore_index or 0)
            if largest > 255 or (self.ignore_index or 0) < 0:
                raise UserError(
                    f"data.ignore_index={self.ignore_index} and data.num_classes="
                    f"{self.num_classes}: masks in memory are augmented as bytes. Use indices of "
                    "0 to 255, or data.augment=false."
                )
            if bool((train.targets < 0).any()):
                raise UserError(
                    "split train: a mask holds a negative value, and masks in memory are augmented "
                    "as bytes. Use data.ignore_index=255 for what is ignored, or "
                    "data.augment=false."
                )

    def check_transforms(self, transforms: list[Any], augmentation: Any) -> None:
        """Raise UserError unless the training split gives images that `transforms` take."""
        train = self.source.train
        key = "data.transforms"
        if augmentation is not None and augmentation in transforms:
            key = f"data.augmentation={type(augmentation).__name__}"
        if self.target_kind == "segmentation":
            raise UserError(
                f"{key}: it would not move masks with their images. Use data.augmentation, "
                "CropFlip in memory and a transform of image and mask from files."
            )
        if not isinstance(train, Examples):
            if not hasattr(train, "augmented"):
                raise UserError(
                    f"{key} does not reach into a data set of your own. Transform there, and set "
                    "'data.transforms=[]'."
                )
        elif train.inputs.dtype != torch.uint8 or train.inputs.ndim != 4:
            raise UserError(
                f"{key} does not fit {dtype_of(train.inputs)} inputs of shape {self.input_shape} "
                "in memory, since it takes uint8 images. Use data.augmentation=null and "
                "'data.transforms=[]'."
            )
        for transform in transforms:
            if type(transform).__name__ == "RandomErasing" and transform.value is None:
                raise UserError(
                    f"{key}: RandomErasing with value=random draws numbers near 0, which are black "
                    "in bytes. Set value to 0 … 255, or to one such number per channel."
                )
            if not callable(transform):
                raise UserError(
                    f"{key}: {type(transform).__name__} cannot be called with an image. Use a "
                    "transform of torchvision.transforms.v2."
                )

    def check_mixing(self, mixing: Mix, how: Preprocessing) -> None:
        """Raise UserError unless `mixing` takes and gives inputs of the data's shape."""
        if not isinstance(mixing, Mix):
            raise UserError(
                f"data.mixing={type(mixing).__name__} is not a regrow.feeding.mixing.Mix. Use "
                f"{lab_name()}.data.augment.MixUp or CutMix, or a subclass of Mix."
            )
        if isinstance(train := self.source.train, Examples):
            refuse_integers(Normalizer(how)(train.inputs[:1]))
        if self.input_shape is not None:
            example = torch.zeros(2, *self.input_shape)
            numbers = torch.full((2, mixing.num_numbers), 0.5, dtype=torch.float64)
            mixed, share = mixing(example, example, mixing.draw(numbers).float())
            if mixed.shape != example.shape or share.shape != (2,):
                raise UserError(
                    f"data.mixing={type(mixing).__name__} gave inputs of shape "
                    f"{list(mixed.shape)} and shares of shape {list(share.shape)} for "
                    f"{list(example.shape)}. Return the inputs' shape, and a share per example."
                )

    def check_examples(self, name: str, split: Examples) -> None:
        """Raise UserError or DataError unless the config describes a split in memory."""
        found = list(split.inputs.shape[1:])
        if found != self.input_shape:
            columns = self.source.columns
            what = f": the columns {listed(columns)}" if columns else ""
            raise UserError(
                f"data.input_shape={self.input_shape}, but the {name} examples are of shape "
                f"{found}{what}. Set 'data.input_shape=[{','.join(map(str, found))}]'."
            )
        if isinstance(train := self.source.train, Examples) and split.inputs.ndim == 4:
            types = {split.inputs.dtype, train.inputs.dtype}
            if torch.uint8 in types and any(it.is_floating_point for it in types):
                raise DataError(
                    f"split {name} holds images of {dtype_of(split.inputs)}, and train of "
                    f"{dtype_of(train.inputs)}: one normalisation does not fit both. Give them in "
                    "one type and range."
                )
        if len(split.targets) != len(split.inputs):
            raise DataError(
                f"split {name} has {len(split.inputs)} inputs and {len(split.targets)} targets."
            )
        targets = split.targets
        if self.target_kind == "segmentation":
            self._check_masks(name, split)
        if self.target_kind in OF_CLASSES and not targets.is_floating_point():
            self._check_classes(name, targets)
        elif not bool(targets.isfinite().all()):
            row = int((~targets.isfinite()).nonzero()[0][0])
            raise DataError(f"split {name}, example {row}: the target is NaN or infinite.")
        elif self.target_kind in ("binary", "multilabel"):
            self._check_labels(name, targets)
        elif self.target_kind == "multiclass" and targets.ndim > 1:
            self._check_probabilities(name, targets)
        if self.target_kind is None or self.num_outputs is None:
            return
        of_classes = dict.fromkeys(OF_CLASSES, self.num_classes)
        width = {"binary": 1, **of_classes}.get(self.target_kind, targets[0].numel())
        if width != self.num_outputs:
            raise UserError(
                f"data.num_outputs={self.num_outputs}, but {self.target_kind} targets of shape "
                f"{list(targets.shape)} take {width}. Set data.num_outputs={width}."
            )

    def _check_masks(self, name: str, split: Examples) -> None:
        images, masks = split.inputs, split.targets
        fits = images.ndim == 4 and masks.shape == (len(images), *images.shape[2:])
        if not fits or masks.is_floating_point():
            raise DataError(
                f"split {name}: {dtype_of(masks)} targets of shape {list(masks.shape)} for inputs "
                f"of shape {list(images.shape)}. Segmentation takes class indices (N, H, W) of "
                "images (N, C, H, W)."
            )

    def _check_classes(self, name: str, targets: Tensor) -> None:
        number = self.num_classes
        if number is None:
            raise UserError(
                f"data.num_classes=null, and {self.target_kind} targets need it. Set the number."
            )
        wrong = outside(targets, number, self.ignore_index)
        if wrong is not None:
            row = int((targets == wrong).nonzero()[0][0])
            raise DataError(f"split {name}, example {row}: {out_of_range(wrong, number)}")

    def _check_labels(self, name: str, targets: Tensor) -> None:
        """Raise DataError for a label outside 0 … 1, of which a loss would have no minimum."""
        wrong = (targets < 0) | (targets > 1)
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0][0])
            raise DataError(
                f"split {name}, example {row}: {self.target_kind} needs targets of 0 and 1, got "
                f"{targets[wrong][0]:g}. For class indices use task=multiclass, for real values "
                "task=regression."
            )

    def _check_probabilities(self, name: str, targets: Tensor) -> None:
        """Raise DataError for a soft target (C, …) that is not a distribution over the classes."""
        tolerance = 1e-3 if targets.dtype in (torch.float32, torch.float64) else 2e-2
        wrong = ((targets.float().sum(1) - 1).abs() >= tolerance) | (targets < 0).any(1)
        if bool(wrong.any()):
            raise DataError(
                f"split {name}, example {int(wrong.nonzero()[0][0])}: a soft target of multiclass "
                "has no negative value, and its values sum to one. For 0 and 1 per label use "
                "task=multilabel, for real values task=regression."
            )

    def warn_of_borders(self, augmentation: Any) -> None:
        """Warn of masks in memory whose augmentation lets in a border of class 0."""
        pads = getattr(augmentation, "padding_mode", None) == "constant"
        pad = getattr(augmentation, "pad", None)
        if self.target_kind == "segmentation" and self.ignore_index is None and pads and pad:
            log.warning(
                "data.augmentation.pad=%s: what comes in from outside is class 0, as no class is "
                "ignored. To leave it out: loss.ignore_index=255, "
                "data.augmentation.padding_mode=reflect or data.augmentation.pad=0",
                pad,
            )

    def warn_of_mixed_features(self, how: Preprocessing) -> None:
        """Warn of series (time, features) whose small features the normalisation flattens.

        `how` has statistics of each place in the first dimension, which is that of channels.
        """
        train = self.source.train
        if not isinstance(train, Examples) or how.kind != "table" or train.inputs.ndim != 3:
            return
        first, last = train.inputs.shape[1:]
        if 4 * last > first:  # more likely (channels, time), or an image
            return
        some = train.inputs[:: -(-len(train) // NUM_SAMPLED)]
        spread = Normalizer(how).features(some).std(0, correction=0).amax(0)  # (features,)
        spread = spread[spread > 0]  # not of constants
        if len(spread) < 2 or float(spread.amin()) > FLATTENED:
            return
        log.warning(
            "data.normalize=train treats the first dimension of inputs [%d, %d] as channels. The "
            "columns of the last one then have standard deviations of %.2g to %.2g, and the model "
            "hardly sees the smallest. If they are features, normalise them in data.source and set "
            "data.normalize=none, or give inputs [features, time].",
            *(first, last, float(spread.amin()), float(spread.amax())),
        )

    def check_cache(self, augmentation: Any) -> None:
        """Raise UserError if `data.cache=resized` does not fit the data. Resizes nothing."""
        key, source = "data.cache=resized", self.source
        if not all(isinstance(split, ImageFiles) for _, split in source.items()):
            raise UserError(
                f"{key} keeps the resized images of data=image_folder, and this data is "
                f"{type(source.train).__name__}. Set data.cache=null."
            )
        if source.resize is None:
            raise UserError(
                f"{key} needs the shorter side of the resized images. Set data.source.resize, such "
                f"as {max(self.input_shape or [256])}, or data.cache=null."
            )
        name = type(augmentation).__name__
        if augmentation is not None and not takes_resized(augmentation):
            raise UserError(
                f"{key}: data.augmentation={name} takes the original image, which is not kept. Use "
                f"data=resized_folder, whose {lab_name()}.data.augment.CropResized takes the "
                "resized one, data.augmentation=null, or data.cache=null."
            )

    def refuse_overflow(self, how: Preprocessing) -> None:
        """Raise DataError for a number of a table that float32 makes infinite."""
        normalize, columns = Normalizer(how), self.source.columns
        for name, split in self.source.items():
            if not isinstance(split, Examples) or split.inputs.dtype != torch.float64:
                continue
            for start in range(0, len(split), NUM_SAMPLED):
                rows = split.inputs[start : start + NUM_SAMPLED]
                lost = (normalize.features(rows).isinf() & rows.isfinite()).nonzero()
                if len(lost):
                    at = lost[0].tolist()
                    column = f", column {columns[at[1]]!r}" if columns else ""
                    raise DataError(
                        f"split {name}, example {start + at[0]}{column}: {float(rows[*at]):g} is "
                        "too large for float32, which models compute in. Correct it, or write "
                        "the column in another unit."
                    )

    def warn_of_rounding(self, how: Preprocessing) -> None:
        """Warn if float32, which models compute in, would lose digits of the data."""
        train = self.source.train
        if not isinstance(train, Examples):
            return
        for what, values, is_raw, way_out in (
            ("targets", train.targets, how.target_mean is None, "data.normalize_targets=true"),
            ("inputs", train.inputs, how.mean is None, "data.normalize=train"),
        ):
            if is_raw and (lost := rounding(values)) > 1e-3:
                log.warning(
                    "the %s are large against their spread: float32 rounds them by up to %.2g of "
                    "it. Set %s, which standardises in float64.",
                    *(what, lost, way_out),
                )

    def far_targets(self, how: Preprocessing) -> str | None:
        """Return a warning if regression targets are far from 0, where models start, else None."""
        train = self.source.train
        if self.target_kind != "regression" or how.target_mean is not None:
            return None
        if not isinstance(train, Examples) or float(train.targets.abs().amax()) <= 10:
            return None
        columns = train.targets.double().reshape(len(train), -1)
        means, deviations = columns.mean(0), columns.std(0, correction=0)
        furthest = int(torch.maximum(means.abs(), deviations).argmax())
        mean, deviation = float(means[furthest]), float(deviations[furthest])
        if max(abs(mean), deviation) <= 10 or rounding(train.targets) > 1e-3:
            return None
        return (
            f"the targets have a mean of {mean:.4g} and a standard deviation of {deviation:.4g}: a "
            "model starts near 0 and learns them slowly. Set data.normalize_targets=true"
        )

    def without_a_class(self, class_names: list[str] | None) -> list[str]:
        """Return a line for each set that is measured and lacks examples of a class."""
        if self.target_kind != "multiclass" or not self.num_classes:
            return []
        lines = []
        names = class_names or range(self.num_classes)
        for name, split in self.source.items():
            if name == "train" or not isinstance(split, Examples | ImageFiles):
                continue
            targets = torch.as_tensor(split.targets)
            there = set(targets.tolist()) if targets.ndim == 1 else {*range(self.num_classes)}
            missing = [str(names[each]) for each in range(self.num_classes) if each not in there]
            if missing:
                more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
                lines.append(
                    f"{name} holds no example of {', '.join(missing[:3])}{more}: its metrics, and "
                    "weights chosen by them, do not count these classes"
                )
        return lines


def order_of(train: Split) -> Callable[[Windows, int, int], Any] | None:
    """Return the order of shards or of a stream; None for data that has none of its own."""
    order = getattr(train, "epoch_order", None)
    return order if callable(order) else None


def takes_resized(augmentation: Any) -> bool:
    """Return True if an augmentation takes images that are resized already."""
    return getattr(augmentation, "takes", None) == "resized"
