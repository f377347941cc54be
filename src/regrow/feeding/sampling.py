"""Selects a batch's examples from seed, epoch, position, rank and world size, without state.

An epoch is one permutation, or one sample with replacement, divided into windows: the global
batches of `size` examples over all ranks, one per optimizer step. A rank takes its contiguous share
of each window. A run that resumes at window 700 starts there, without replaying the earlier ones.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from regrow.errors import DataError, UserError
from regrow.feeding.batch import share
from regrow.randomness import generator

log = logging.getLogger("regrow")

MOST_WAYS = 16  # in which one epoch augments an example in memory, each from a table of its own


def permutation(seed: int, epoch: int, num_examples: int) -> Tensor:
    """Return the order of an epoch's examples, (N,) int64."""
    return torch.randperm(num_examples, generator=generator(seed, "order", epoch))


def sample(seed: int, epoch: int, weights: Tensor) -> Tensor:
    """Return as many draws with replacement as there are weights: the epoch's examples, (N,) int64.

    Each draw is example i with a probability of weights[i] / weights.sum(); `weights` are (N,)
    float64, zero or more.
    """
    # torch.multinomial takes 2**24 weights at most. Its sums also depend on the number of threads.
    bounds = np.cumsum(weights.numpy())
    count = len(weights)
    draws = torch.rand(count, dtype=torch.float64, generator=generator(seed, "sample", epoch))
    found = np.searchsorted(bounds, draws.numpy() * bounds[-1], side="right")
    return torch.from_numpy(found)


def repeats_of(order: Tensor) -> Tensor:
    """Return, for each place of an order, how often its example stands at earlier ones, (N,)."""
    ranked, places = order.sort(stable=True)
    first = torch.searchsorted(ranked, ranked)
    return torch.empty_like(order).scatter_(0, places, torch.arange(len(order)) - first)


def rows_of(table: Callable[[int], Tensor], order: Tensor, repeats: Tensor | None) -> Tensor:
    """Return the row of a table of random numbers, (N, …), for each place of an order.

    `table(0)` is for the first draws of the examples in an epoch, `table(1)` for their second ones,
    and so on up to MOST_WAYS, after which the tables come again.
    """
    rows = table(0)[order]
    if repeats is not None:
        for way in range(1, min(int(repeats.max()) + 1, MOST_WAYS)):
            again = repeats % MOST_WAYS == way
            rows[again] = table(way)[order[again]]
    return rows


def balancing(classes: Tensor, valid: Tensor) -> Tensor:
    """Return draw weights, (N,) float64, that make every class among the `valid` equally likely."""
    found, number = torch.unique(classes, return_inverse=True)
    counts = torch.bincount(number[valid], minlength=len(found))
    return valid / counts[number].clamp(min=1).double()


def balanced_weights(data: Any) -> list[float]:
    """Return a loss weight per class: n / (k n_c) over the examples that are trained on.

    These are scikit-learn's of class_weight="balanced", with the k classes that occur; the others
    weigh 1. Ignored targets do not count. Raises UserError for data that does not give its classes.
    """
    key = "loss.class_weights=balanced"
    if data.target_kind != "multiclass":
        raise UserError(
            f"{key}: it counts examples by their class, and data.target_kind={data.target_kind}. "
            "Give a list with a weight for each class."
        )
    classes = data.of_training_examples("targets")
    if classes is None or classes.is_floating_point():
        kind = type(data.source.train).__name__
        raise UserError(
            f"{key}: {kind} does not give its classes. Give a list of a weight for each class, or "
            "give the data set an attribute targets: the class index of each example."
        )
    valid = (classes >= 0) & (classes < data.num_classes)
    if data.ignore_index is not None:
        valid &= classes != data.ignore_index
    if data.sampling == "balanced":
        log.warning("%s and data.sampling=balanced count rare classes twice. Leave one out.", key)
    counts = torch.bincount(classes[valid].long(), minlength=data.num_classes).double()
    weights = counts.sum() / (counts.count_nonzero() * counts)
    found: list[float] = weights.where(counts > 0, 1.0).tolist()
    return found


def per_example(split: Any, name: str) -> Tensor | None:
    """Return a split's attribute of one number per example, (N,), or None if it has none.

    Integers become int64: uint8 takes -100 for 156 in a comparison, and 256 for 0.
    Looks into `torch.utils.data.Subset`s. Raises DataError unless there is one number per example.
    """
    if isinstance(split, torch.utils.data.Subset):
        indices = torch.as_tensor(split.indices, dtype=torch.int64)
        found = per_example(split.dataset, name)
        return None if found is None else found[indices]
    values = getattr(split, name, None)
    if values is None:
        return None
    try:
        found = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError):
        found = torch.empty(0)
    if found.ndim == 2 and found.shape[1] == 1:
        found = found.squeeze(1)
    if found.shape != (len(split),):
        raise DataError(
            f"split train: {type(split).__name__}.{name} must hold one number for each of the "
            f"{len(split)} examples. For data.sampling, give such a list."
        )
    return found if found.is_floating_point() else found.long()


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
