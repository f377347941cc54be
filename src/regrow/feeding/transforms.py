"""Transforms of single training images, such as those of torchvision.transforms.v2.

They draw from the global states of torch, numpy and `random`, which the feed seeds for each example
from (seed, epoch, index). On a whole batch, v2 would draw the same numbers for every image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from regrow.config.own_code import own_place
from regrow.config.targets import SHOWS_ALL
from regrow.errors import DataError, UserError, brief, machine_fault
from regrow.feeding.batch import dtype_of
from regrow.feeding.sampling import MOST_WAYS
from regrow.feeding.splits import Examples
from regrow.protocols import Store
from regrow.randomness import key


class FailedTransform(DataError):
    """A transform of the user's raised an error, the cause."""


MOST_SAID = 300  # characters of an error's text
# The key of the config, and what else to choose.
OF_FILES = ("data.transforms", "Of image files, data.augmentation gets PIL images")
IN_MEMORY = ("data.augmentation or data.transforms", "Both get one image at a time")


def applied(transform: Callable[..., Any], *given: Any, key: str, advice: str) -> Any:
    """Return what a transform makes of an image, or of an image and its mask.

    Raises FailedTransform for an error of the transform's, which `key` of the config names.
    """
    try:
        return transform(*given)
    except UserError:
        raise
    except Exception as error:
        if machine_fault(error) is not None:
            raise
        name = getattr(transform, "__name__", type(transform).__name__)
        place = own_place(error)
        where = f" ({place})" if place else ""
        said = f"{type(error).__name__}: {brief(error, MOST_SAID)}".rstrip(".")
        got = " and ".join(map(_kind, given))
        raise FailedTransform(
            f"{key}={name}{where}: {said}. It got {got}. {advice}. {SHOWS_ALL}"
        ) from error


def _kind(given: Any) -> str:
    if type(given) is Tensor:
        return f"a {dtype_of(given)} tensor of shape {list(given.shape)}"
    of_pillow = type(given).__module__.partition(".")[0] == "PIL"
    return "a PIL image" if of_pillow else f"a {type(given).__name__}"


class FromMemory:
    """Images in memory as a map-style data set; a store augments them by (seed, epoch, index)."""

    def __init__(self, examples: Examples, store: Store | None, seed: int) -> None:
        self.examples, self.store, self.seed, self.epoch = examples, store, seed, 0
        self.tables: dict[int, Tensor] = {}

    def set_epoch(self, epoch: int) -> None:
        self.epoch, self.tables = epoch, {}

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return self.drawn(index, 0)

    def drawn(self, index: int, earlier: int) -> tuple[Tensor, ...]:
        """Return an example that the epoch has drawn a number of times before."""
        if self.store is None:
            image = self.examples.inputs[index].clone()  # a transform may work in place
        else:
            way = earlier % MOST_WAYS
            if way not in self.tables:
                self.tables[way] = self.store.table(again(self.seed, way), self.epoch)
            at = torch.tensor([index])
            image = self.store.gather(at, self.tables[way][at])[0]
        item = (image, self.examples.targets[index])
        return item if self.examples.weights is None else (*item, self.examples.weights[index])


class Transformed:
    """A data set whose items begin with a uint8 image (C, H, W), passed through transforms.

    They get pixels of 0 … 255, whatever `input_max` stands for white in the data.
    """

    def __init__(self, dataset: Any, transforms: Sequence[Callable[[Any], Any]], white: float):
        self.dataset, self.transforms, self.white = dataset, transforms, white
        self.files: list[str] | None = getattr(dataset, "files", None)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        return self.drawn(index, 0)

    def drawn(self, index: int, earlier: int) -> tuple[Any, ...]:
        """Return an example that the epoch has drawn a number of times before."""
        if isinstance(self.dataset, FromMemory):
            image, *others = self.dataset.drawn(index, earlier)
        else:
            image, *others = self.dataset[index]
        found = _scaled(image, 255.0 / self.white)
        key, advice = IN_MEMORY if self.files is None else OF_FILES
        for transform in self.transforms:
            found = applied(transform, found, key=key, advice=advice)
        if not isinstance(found, Tensor) or found.dtype != torch.uint8 or found.ndim != 3:
            given = type(found).__name__
            if isinstance(found, Tensor):
                given = f"{found.dtype} of shape {list(found.shape)}"
            names = ", ".join(type(transform).__name__ for transform in self.transforms)
            raise DataError(
                f"data.augmentation and data.transforms ({names}) must return uint8 images (C, H, "
                f"W), and gave {given}. Leave out conversions; data.normalize follows by itself."
            )
        if found.shape != image.shape:
            raise DataError(
                f"data.augmentation and data.transforms must keep an image's shape "
                f"{list(image.shape)}, and gave {list(found.shape)}. Add a Resize to it."
            )
        return _scaled(found.as_subclass(Tensor), self.white / 255.0), *others


def _scaled(image: Tensor, factor: float) -> Tensor:
    """Return uint8 pixels times a factor, rounded."""
    if factor == 1.0:
        return image
    return (image.float() * factor).round().clamp(max=255).to(torch.uint8)


class Epochs:
    """Calls `set_epoch` on data sets that have it, before the first example of an epoch.

    It remembers the last epoch of each, in this process. The feeds of a run share one instance, as
    a training split and a validation split may be parts of one data set.
    """

    def __init__(self) -> None:
        # It holds the object too, so that its id stays its own.
        self._last: dict[int, tuple[Any, int]] = {}

    def __reduce__(self) -> tuple[type[Epochs], tuple[()]]:
        return Epochs, ()  # the ids are those of this process

    def set(self, datasets: Sequence[Any], epoch: int) -> None:
        for dataset in datasets:
            if self._last.get(id(dataset), (None, None))[1] != epoch:
                dataset.set_epoch(epoch)
                self._last[id(dataset)] = (dataset, epoch)


def with_epochs(dataset: Any) -> list[Any]:
    """Return the data sets to tell of an epoch: itself, or those inside a Subset or a wrapper."""
    if callable(getattr(dataset, "set_epoch", None)):
        return [dataset]
    inner = getattr(dataset, "datasets", None)
    inside = [*inner] if isinstance(inner, list | tuple) else []
    if hasattr(dataset, "dataset"):
        inside.append(dataset.dataset)
    return [found for each in inside for found in with_epochs(each)]


def again(seed: int, way: int) -> int:
    """Return the seed of the table for an example's draws after the first in an epoch."""
    return key(seed, "again", way) if way else seed
