"""An `IterableDataset` as a data set that is read in order: position n is its n-th example."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from regrow.errors import DataError, UserError
from regrow.feeding.sampling import Windows
from regrow.feeding.splits import Splits


class Stream:
    """A stream's first `length` examples, each time it is iterated: one epoch.

    Every rank reads the whole stream and keeps its share of each window, so that any number of
    ranks sees the same global batches. An epoch that is entered in the middle reads the examples
    before it again.
    """

    def __init__(self, dataset: IterableDataset[Any], length: int) -> None:
        self.dataset, self.length = dataset, length
        self._items: Iterator[Any] | None = None
        self._place = (-1, 0)  # epoch, and position of the next example

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_items": None, "_place": (-1, 0)}  # iterators cannot be pickled

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        raise TypeError("a stream has no numbered items")

    def at(
        self, epoch: int, index: int, seeded: Callable[[int, int], AbstractContextManager[None]]
    ) -> Any:
        """Return example `index` of an epoch. Those before it are read first, each one `seeded`.

        Raises DataError if the stream ends before it.
        """
        if self._items is None or self._place[0] != epoch or index < self._place[1]:
            with seeded(epoch, -1):
                self._items = iter(self.dataset)
            self._place = (epoch, 0)
        for number in range(self._place[1], index + 1):
            with seeded(epoch, number):
                try:
                    item = next(self._items)
                except StopIteration:
                    self._items = None
                    raise DataError(
                        f"the stream of train ended after {number} of the {self.length} examples "
                        f"of an epoch. Set data.limit_train={number}, or lengthen it."
                    ) from None
            self._place = (epoch, number + 1)
        return item

    def epoch_order(self, windows: Windows, seed: int, epoch: int) -> Tensor:
        """Return the examples in the stream's own order, (N,) int64."""
        return torch.arange(windows.num_examples)

    def keys(self) -> list[Hashable]:
        """Return nothing to compare: reading the stream to its end may not be possible."""
        return []


def with_stream(source: Splits, limit_train: int | None, num_workers: int) -> Splits:
    """Return the splits, with an `IterableDataset` for training as a `Stream`.

    Raises UserError for one without a length, or for several workers.
    """
    dataset = source.train
    if not isinstance(dataset, IterableDataset):
        return source
    kind = type(dataset).__name__
    if num_workers > 1:
        raise UserError(
            f"data.num_workers={num_workers}: train is an IterableDataset ({kind}), one stream "
            "that several workers would divide in their own order. Use 0 or 1."
        )
    try:
        length: int | None = len(dataset)
    except TypeError:
        length = limit_train
    if length is None:
        raise UserError(
            f"split train: the IterableDataset {kind} has no length. Set data.limit_train to the "
            "number of examples of an epoch, or give it __len__."
        )
    note = (
        f"train is an IterableDataset ({kind}): a resume reads the examples of its epoch again up "
        "to its position, and every process reads the whole stream"
    )
    return replace(source, train=Stream(dataset, length), notes=[*source.notes, note])
