"""Every seed of a run: a pure function of the run's seed and fixed sub-keys.

Nothing draws from a random state that someone must remember to save. What needs random numbers
derives a key from `(seed, what for, epoch or step, example or micro-batch, rank)` and seeds from
it.
"""

from __future__ import annotations

import functools
import hashlib
import random
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_MASK = (1 << 64) - 1


@functools.cache
def _of_text(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def key(seed: int, *parts: int | str) -> int:
    """A 63-bit key of the seed and its sub-keys, the same on every machine and Python.

    Each part goes through the finaliser of SplitMix64 (Steele, Lea and Flood, "Fast splittable
    pseudorandom number generators", OOPSLA 2014), so that neighbouring steps share nothing.
    """
    state = seed & _MASK
    for part in parts:
        value = _of_text(part) if isinstance(part, str) else part
        state = (state + 0x9E3779B97F4A7C15 + value * 0xD1342543DE82EF95) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1


def generator(seed: int, *parts: int | str) -> torch.Generator:
    """A private generator on the CPU, so that every device sees the same numbers."""
    import torch

    return torch.Generator().manual_seed(key(seed, *parts))


def seed_everything(value: int) -> None:
    """Seed torch, numpy and `random`, for code that draws from the ambient state."""
    import numpy
    import torch

    torch.manual_seed(value)
    numpy.random.seed(value & 0xFFFFFFFF)
    random.seed(value)


def seed_step(value: int) -> None:
    """Seed what a model's own layers draw from (dropout), at the price of one call per device.

    `torch.manual_seed` costs about a hundred microseconds, this one.
    """
    torch = sys.modules["torch"]
    torch.default_generator.manual_seed(value)
    if torch.cuda.is_initialized():
        torch.cuda.default_generators[torch.cuda.current_device()].manual_seed(value)
    elif torch.backends.mps.is_available():
        torch.mps.manual_seed(value)
