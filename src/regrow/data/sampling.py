"""Which examples make a batch: a pure function of the seed, the epoch, the position and the rank.

An epoch is one permutation, cut into windows of `size` examples, one per optimizer step over all
processes. A rank takes its contiguous share of each window. Nothing here has a state, so a run that
resumes at window 700 takes window 700, without a replay of the 699 before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from regrow.data.batch import share
from regrow.randomness import generator


def permutation(seed: int, epoch: int, num_examples: int) -> Tensor:
    """The order of an epoch's examples, (N,) int64."""
    return torch.randperm(num_examples, generator=generator(seed, "order", epoch))


class Share(NamedTuple):
    """Places `start … stop` of an epoch's order: what one rank takes of one window.

    An empty share points at the window's first example and counts none: `num_local` is 0.
    """

    start: int
    stop: int
    num_local: int
    num_global: int


@dataclass(frozen=True)
class Windows:
    """An epoch of `num_examples` cut into windows of `size`, seen by one rank."""

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
            return Share(first, first + 1, 0, last - first)
        return Share(start, stop, stop - start, last - first)
