"""The order of an epoch that reads whole blocks: shuffled within bounds, and computed, not kept.

An epoch is a function of (seed, epoch, batch size, limit). A permutation of the blocks is divided
into lanes, one for each part of a window: with 4 lanes, the first quarter of every batch comes from
the first quarter of the permuted blocks. So a rank, whose share is a part of every window, reads
blocks of its own, and yet any number of ranks sees the same windows. Within a lane, the examples of
a pool (a run of windows) are permuted together, so that only a pool's blocks are in memory.
Any window follows from its number: a resume reads nothing before it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from regrow.feeding.batch import share
from regrow.feeding.sampling import Windows
from regrow.randomness import generator

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Pool:
    """Windows [start, stop) and their examples, (stop - start, window size), in order."""

    start: int
    stop: int
    examples: Numbers


class BlockOrder:
    """The order of an epoch's examples; `order[start:stop]` gives a part within one window."""

    def __init__(
        self, first: Numbers, windows: Windows, seed: int, epoch: int, *, lanes: int, pool: int,
        is_shared: bool = False,
    ) -> None:  # fmt: skip
        """`first`: (B + 1,) see `Blocks`. `pool`: examples that are permuted together.

        `is_shared`: what one worker fetches all find, in a cache.
        """
        self.first, self.is_shared = first, is_shared
        self.windows, self.seed, self.epoch = windows, seed, epoch
        count, self.size = windows.num_examples, windows.size
        ends = np.minimum(first, count)  # the limit may cut a block, and drops those behind it
        num_blocks = int(np.searchsorted(first, count))
        order = torch.randperm(num_blocks, generator=generator(seed, "blocks", epoch)).numpy()
        self.blocks: Numbers = order
        self.starts: Numbers = ends[:-1][order]  # first example of each block, as permuted
        lengths = (ends[1:] - ends[:-1])[order]
        self.places: Numbers = np.append(0, np.cumsum(lengths))  # its place in the epoch
        self.num_whole = count // self.size
        num_lanes = min(lanes, self.size)
        self.lanes = [share(0, self.size, lane, num_lanes) for lane in range(num_lanes)]
        self.num_pools = max(1, round(self.num_whole * self.size / pool))
        self.pool = functools.lru_cache(maxsize=2)(self._pool)
        self.needed = functools.lru_cache(maxsize=2)(self._needed)

    def __getitem__(self, part: slice) -> Tensor:
        window = part.start // self.size
        if window >= self.num_whole:
            row, start = self._last(), self.num_whole * self.size
        else:
            pool = self.pool(self._pool_of(window))
            row, start = pool.examples[window - pool.start], window * self.size
        return torch.from_numpy(row[part.start - start : part.stop - start])

    def _bounds(self, pool: int) -> tuple[int, int]:
        """Return the windows [start, stop) of a pool: all have nearly equal numbers of them."""
        return share(0, self.num_whole, pool, self.num_pools)

    def _pool_of(self, window: int) -> int:
        size, extra = divmod(self.num_whole, self.num_pools)
        longer = extra * (size + 1)
        return window // (size + 1) if window < longer else extra + (window - longer) // size

    def _places(self, lane: tuple[int, int], start: int, stop: int) -> tuple[int, int]:
        """Return which places of the permuted blocks give a lane's part of the windows."""
        first, last = lane
        width, begins = last - first, self.num_whole * first
        return begins + start * width, begins + stop * width

    def _pool(self, number: int) -> Pool:
        start, stop = self._bounds(number)
        parts = []
        for lane, (first, last) in enumerate(self.lanes):
            begin, end = self._places((first, last), start, stop)
            random = generator(self.seed, "pool", self.epoch, number, lane)
            places = begin + torch.randperm(end - begin, generator=random).numpy()
            parts.append(self._examples(places).reshape(stop - start, last - first))
        return Pool(start, stop, np.concatenate(parts, 1))

    def _last(self) -> Numbers:
        """Return the examples of the last, smaller window."""
        begin, end = self.num_whole * self.size, self.windows.num_examples
        random = generator(self.seed, "pool", self.epoch, "last")
        return self._examples(begin + torch.randperm(end - begin, generator=random).numpy())

    def _examples(self, places: Numbers) -> Numbers:
        at = np.searchsorted(self.places, places, side="right") - 1
        found: Numbers = self.starts[at] + (places - self.places[at])
        return found

    def ahead(self, window: int, *, start: int, num_workers: int) -> Sequence[int]:
        """Return the blocks to read before they are needed, when a window of this rank is due.

        An epoch entered at `start` gives window n to worker (n - start) mod num_workers. If workers
        share what they fetch, the blocks of the next pool are spread over the windows of this one,
        and the first window also names those of its own pool, and what earlier windows would have
        named. Else a window names the blocks of the next window of the same worker.
        """
        if not self.is_shared:
            return _blocks_of(self, window + max(1, num_workers))
        if window >= self.num_whole:
            return self._of_last()
        number = self._pool_of(window)
        first, stop = self._bounds(number)
        coming = self.needed(number + 1)
        portion = share(0, len(coming), window - first, stop - first)
        if window == start:
            return [*self.needed(number), *coming[: portion[1]]]
        return coming[portion[0] : portion[1]]

    def _of_last(self) -> list[int]:
        """Return the blocks of the last, smaller window, if the epoch has one."""
        if self.windows.drop_last:
            return []
        return self._between(self.num_whole * self.size, self.windows.num_examples)

    def _needed(self, number: int) -> list[int]:
        """Return the blocks of this rank's part of a pool, in the order of the permutation."""
        if number >= self.num_pools:
            return self._of_last()
        start, stop = self._bounds(number)
        mine = share(0, self.size, self.windows.rank, self.windows.world_size)
        found: dict[int, None] = {}
        for first, last in self.lanes:
            if first < mine[1] and mine[0] < last:
                found |= dict.fromkeys(self._between(*self._places((first, last), start, stop)))
        return [*found]

    def _between(self, begin: int, end: int) -> list[int]:
        if begin >= end:
            return []
        first = int(np.searchsorted(self.places, begin, side="right")) - 1
        last = int(np.searchsorted(self.places, end, side="left"))
        chosen: list[int] = self.blocks[first:last].tolist()
        return chosen


class FileOrder:
    """The examples as they stand in the files, for an evaluation; `order[start:stop]` as above."""

    def __init__(self, first: Numbers, windows: Windows) -> None:
        self.first, self.windows = first, windows

    def __getitem__(self, part: slice) -> Tensor:
        return torch.arange(part.start, part.stop)

    def ahead(self, window: int, *, start: int, num_workers: int) -> Sequence[int]:
        """Return the blocks of the next window of the same worker, to read before it is due."""
        return _blocks_of(self, window + max(1, num_workers))


def _blocks_of(order: BlockOrder | FileOrder, window: int) -> list[int]:
    """Return the blocks of this rank's part of a window, as they are needed."""
    if window >= len(order.windows):
        return []
    mine = order.windows.share(window)
    examples = order[mine.start : mine.stop].numpy()
    blocks = np.searchsorted(order.first, examples, side="right") - 1
    return [*dict.fromkeys(blocks.tolist())]
