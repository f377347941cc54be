"""Items of a data set, read with a seed for each and collated to batches, in any process."""

from __future__ import annotations

import contextlib
import pickle
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from regrow.errors import DataError, brief, machine_fault
from regrow.feeding.batch import described, each, tensors_of
from regrow.feeding.decoding import BrokenImage
from regrow.feeding.shards import ShardItems
from regrow.feeding.splits import MapStyle
from regrow.feeding.streams import Stream
from regrow.feeding.transforms import Epochs, FailedTransform, Transformed, with_epochs
from regrow.protocols import Inputs, Targets
from regrow.randomness import key, seed_step, states_kept


class BrokenItem:
    """A broken example, returned by a worker as a value: torch would wrap an exception."""

    def __init__(
        self,
        message: str,
        image: tuple[str, str] | None = None,
        cause: BaseException | None = None,
    ) -> None:
        """`image`: the file and `what` of a BrokenImage. `cause`: the error of the user's code."""
        self.message, self.image = message, image
        self.trace = "" if cause is None else "".join(traceback.format_exception(cause))

    def error(self) -> DataError:
        if self.image:
            return BrokenImage(self.message, *self.image)
        error = DataError(self.message)
        if self.trace:  # HYDRA_FULL_ERROR=1 shows it
            error.__cause__ = RuntimeError(f"in the data set:\n{self.trace}")
        return error


class SeededItems:
    """Seeds torch, numpy and `random` for each example from (seed, epoch, index)."""

    def __init__(
        self,
        dataset: MapStyle,
        name: str,
        seed: int,
        num_classes: int | None,
        ignore_index: int | None,
        epochs: Epochs | None = None,
    ) -> None:
        self.dataset, self.name, self.seed, self.num_classes = dataset, name, seed, num_classes
        self.ignore_index = ignore_index
        self.draws = getattr(dataset, "draws", True)  # else items need no seed
        self.epochs, self.with_epochs = epochs or Epochs(), with_epochs(dataset)
        inner = dataset.dataset if isinstance(dataset, Transformed) else dataset
        self.shards = inner if isinstance(inner, ShardItems) else None

    def begin(self, epoch: int) -> None:
        """Tell the data set of the epoch, in this process. Does nothing if it knows."""
        self.epochs.set(self.with_epochs, epoch)

    def release(self) -> None:
        """Let go of the blocks of shards that this process holds."""
        if self.shards is not None:
            self.shards.release()

    def __getitem__(self, place: tuple[Any, ...]) -> Any:
        epoch, index = place[:2]
        again = place[2] if len(place) > 2 else 0
        blocks = place[3] if len(place) > 3 else ()
        try:
            self.begin(epoch)
            if self.shards is not None and blocks:
                self.shards.ahead(blocks)
            item = self._item(epoch, index, again)
            self._check(item, index)
            return item
        except BrokenImage as error:
            return BrokenItem(str(error), (error.file, error.what))
        except FailedTransform as error:
            return BrokenItem(str(error), cause=error.__cause__)
        except DataError as error:
            return BrokenItem(str(error))
        except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
            reason = brief(error)
            return BrokenItem(
                f"{self.name} example {index} cannot be read: {reason}. The files under data.root "
                "must stay as they are while a run needs them. Put it back and resume."
            )
        except Exception as error:
            raise _sendable(error) from error

    def _item(self, epoch: int, index: int, again: int) -> Any:
        if not self.draws:
            return self.dataset[index]
        if isinstance(self.dataset, Stream):
            return self.dataset.at(epoch, index, self._seeded)
        with self._seeded(epoch, index, *([again] if again else ())):
            if again and isinstance(self.dataset, Transformed):
                return self.dataset.drawn(index, again)
            return self.dataset[index]

    def _seeded(self, *place: int) -> contextlib.AbstractContextManager[None]:
        return seeded(key(self.seed, "example", self.name, *place))

    def _check(self, item: Any, index: int) -> None:
        """Raise DataError for a class index out of range; a custom collate is checked later."""
        if self.num_classes is None:
            return
        # The usual case; a tensor would cost 30 µs.
        is_pair = type(item) is tuple and len(item) > 1
        if is_pair and type(item[1]) is int and 0 <= item[1] < self.num_classes:
            return
        if isinstance(item, Mapping):
            targets = item.get("targets")
        else:
            targets = item[1] if isinstance(item, list | tuple) and len(item) > 1 else None
        try:
            targets = torch.as_tensor(targets)
        except (TypeError, ValueError, RuntimeError):
            return
        wrong = outside(targets, self.num_classes, self.ignore_index)
        if wrong is not None:
            files = getattr(self.dataset, "files", None)
            where = f" ({files[index]})" if files is not None else ""
            raise DataError(
                f"{self.name} example {index}{where}: {out_of_range(wrong, self.num_classes)}"
            )


class Collate:
    """Collates items to (inputs, targets, weights); a class, because closures cannot be pickled."""

    def __init__(
        self,
        collate: Callable[[list[Any]], Any] | None,
        name: str,
        num_classes: int | None,
        ignore_index: int | None,
        *,
        heads: bool = False,
    ) -> None:
        self.collate, self.name = collate, name
        self.num_classes, self.ignore_index = num_classes, ignore_index
        self.heads = heads

    def __call__(self, items: list[Any]) -> Any:
        for item in items:
            if isinstance(item, BrokenItem):
                return item
        try:
            return self._checked(self._batch(items))
        except DataError as error:
            return BrokenItem(str(error))

    def _batch(self, items: list[Any]) -> Any:
        """Return what the user's function, or else torch's, makes of the items."""
        if self.collate is not None:
            try:
                return self.collate(items)
            except DataError:
                raise
            except Exception as error:
                raise _sendable(error) from error
        try:
            return default_collate(items)
        except (TypeError, RuntimeError, KeyError) as error:
            if machine_fault(error):  # e.g. a full /dev/shm
                raise
            reason = brief(error, 200)
            raise DataError(
                f"{self.name}: items of the data set do not make a batch: {reason}. Give items of "
                "tensors of one shape, or a collate function: data.source.collate."
            ) from None

    def _checked(self, batch: Any) -> tuple[Inputs, Targets, Tensor | None]:
        """Return the batch's inputs, targets and weights. Raises DataError."""
        try:
            inputs, targets, weights = tensors_of(batch)
        except TypeError as error:
            raise DataError(
                f"{self.name}: a batch of the data set is {error}. It must be (inputs, targets) or "
                "a mapping with inputs, targets and, if wanted, weights. Let data.source.collate "
                "give that."
            ) from None
        if not isinstance(targets, Tensor):
            if not self.heads:
                raise DataError(
                    f"{self.name}: a batch of the data set is a pair whose targets are "
                    f"{described(targets)}, and data.target_kind names a kind of one tensor. For "
                    "several heads set data.target_kind=null, and a task that takes them; else let "
                    "data.source.collate give one tensor."
                )
        elif self.collate is not None and self.num_classes is not None:
            wrong = outside(targets, self.num_classes, self.ignore_index)
            if wrong is not None:
                raise DataError(f"{self.name}, in a batch: {out_of_range(wrong, self.num_classes)}")
        if weights is not None and not _are_weights(weights):
            raise DataError(
                f"{self.name}: the weights of a batch, of shape {list(weights.shape)}, are not one "
                "finite number of zero or more for each example. Let each item give such a number."
            )
        # A worker cannot send a tensor with a graph.
        inputs, targets = each(inputs, Tensor.detach), each(targets, Tensor.detach)
        return inputs, targets, None if weights is None else weights.detach()


def _are_weights(weights: Tensor) -> bool:
    return weights.ndim == 1 and bool((weights.isfinite() & (weights >= 0)).all())


def collated(items: list[Any], collate: Callable[[list[Any]], Any] | None) -> Inputs:
    """Return the inputs of a batch of items, as a run collates them. Raises DataError."""
    found = Collate(collate, "inputs", None, None, heads=True)(items)
    if isinstance(found, BrokenItem):
        raise DataError(found.message)
    inputs: Inputs = found[0]
    return inputs


def input_names(
    dataset: MapStyle, collate: Callable[[list[Any]], Any] | None, seed: int
) -> list[str] | None:
    """Return the inputs' names, or positions from 0, if an example has several; else None."""
    item = SeededItems(dataset, "train", seed, None, None)[(0, 0)]
    if isinstance(item, BrokenItem):
        raise DataError(item.message)
    inputs = collated([item], collate)
    if isinstance(inputs, Tensor):
        return None
    return [str(name) for name in (inputs if isinstance(inputs, Mapping) else range(len(inputs)))]


@contextlib.contextmanager
def seeded(value: int) -> Iterator[None]:
    """Seed the global random states from `value`, then restore them for the loop."""
    with states_kept(on_device=False):  # a worker must not touch the device
        seed_step(value, on_device=False)
        yield


def _sendable(error: Exception) -> Exception:
    """Return the error, or a RuntimeError with its text if its class cannot be pickled.

    Torch sends the class to the run. A class defined in a function would never arrive, and the run
    would wait forever.
    """
    try:
        pickle.dumps(type(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def outside(targets: Tensor, num_classes: int, ignore_index: int | None) -> int | None:
    """Return the first class index that is out of range and not ignored by the loss, else None.

    -100 is accepted as well: torch's losses ignore it.
    """
    if targets.is_floating_point() or targets.is_complex():
        return None
    targets = targets.long()  # a narrow type would wrap the other number of a comparison around
    wrong = ((targets < 0) & (targets != -100)) | (targets >= num_classes)
    if ignore_index is not None:
        wrong &= targets != ignore_index
    return int(targets[wrong].flatten()[0]) if bool(wrong.any()) else None


def out_of_range(wrong: int, num_classes: int) -> str:
    """Return an error's words for what `outside` found, with the way out."""
    return (
        f"class {wrong} is out of range for data.num_classes={num_classes}: 0 … {num_classes - 1}. "
        "Number the classes from 0, or set data.num_classes and data.num_outputs to their number."
    )
