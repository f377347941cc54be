"""Selects a batch's examples from seed, epoch, position, rank and world size, without state.

An epoch is one permutation, divided into windows: the global batches of `size` examples over all
ranks, one per optimizer step. A rank takes its contiguous share of each window. A run that resumes
at window 700 starts there, without replaying the earlier ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from regrow.feeding.batch import share
from regrow.randomness import generator


def permutation(seed: int, epoch: int, num_examples: int) -> Tensor:
    """Return the order of an epoch's examples, (N,) int64."""
    return torch.randperm(num_examples, generator=generator(seed, "order", epoch))


class Share(NamedTuple):
    """Positions [start, stop) of an epoch's order: one rank's share of one window.

    An empty share holds the window's first example as a placeholder: `num_local` is 0.
    """

    start: int
    stop: int
    num_local: int
    num_global: int
    first: int  # position of `start` in the window


@dataclass(frozen=True)
class Windows:
    """An epoch of `num_examples` divided into windows of `size`, as seen by one rank."""

    num_examples: int
    size: int
    drop_last: bool
    rank: int
    world_size: int

    def __len__(self) -> int:
        whole, rest = divmod(self.num_examples, self.size)
        return whole + (rest > 0 and not self.drop_last)

    def share(self, window: int) -> Share:
        first = window * self.size
        last = min(first + self.size, self.num_examples)
        start, stop = share(first, last, self.rank, self.world_size)
        if start == stop:
            return Share(first, first + 1, 0, last - first, 0)
        return Share(start, stop, stop - start, last - first, start - first)
