"""Derive every seed of a run, as a pure function of the run's seed and fixed sub-keys.

No code draws from a random state that a checkpoint must save. Code that needs random numbers
derives a key from `(seed, purpose, epoch or step, example or micro-batch, rank)` and seeds from it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import random
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_MASK = (1 << 64) - 1


@functools.cache
def _of_text(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def key(seed: int, *parts: int | str) -> int:
    """Return a 63-bit key of the seed and its sub-keys, the same on every machine and Python.

    Each part goes through the finaliser of SplitMix64 (Steele, Lea and Flood, "Fast splittable
    pseudorandom number generators", OOPSLA 2014), so that keys of adjacent steps are unrelated.
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
    """Return a private generator on the CPU, so that every device gets the same numbers."""
    import torch

    return torch.Generator().manual_seed(key(seed, *parts))


def seed_everything(value: int) -> None:
    """Seed torch, numpy and `random`, for code that draws from the global state."""
    import numpy
    import torch

    torch.manual_seed(value)
    numpy.random.seed(value & 0xFFFFFFFF)
    random.seed(value)


def seed_data(seed: int) -> None:
    """Seed the global state for a source that draws its examples or splits from it.

    It then gives the same ones at each start, in each process and in every command.
    """
    seed_everything(key(seed, "data"))


def seed_step(value: int, *, on_device: bool = True) -> None:
    """Seed all that a model or a loss draws from: torch, its device, numpy and `random`.

    `torch.manual_seed` costs about a hundred microseconds. Seeding the generators directly costs
    three, numpy four and `random` eight, without waiting for a device.
    """
    import numpy

    torch = sys.modules["torch"]
    torch.default_generator.manual_seed(value)
    if on_device and torch.cuda.is_initialized():
        torch.cuda.default_generators[torch.cuda.current_device()].manual_seed(value)
    elif on_device and torch.backends.mps.is_available():
        torch.mps.manual_seed(value)
    numpy.random.seed(value & 0xFFFFFFFF)
    random.seed(value)


def states(*, on_device: bool = True) -> list[Any]:
    """Return the states of the generators that `seed_step` seeds, without waiting for a device."""
    import numpy

    torch = sys.modules["torch"]
    found = [torch.get_rng_state(), numpy.random.get_state(), random.getstate()]
    if on_device and torch.cuda.is_initialized():
        found.append(torch.cuda.get_rng_state())
    elif on_device and torch.backends.mps.is_available():
        found.append(torch.mps.get_rng_state())
    return found


@contextlib.contextmanager
def states_kept(*, on_device: bool = True) -> Iterator[None]:
    """Restore the generators' states afterwards, so that draws inside have no effect outside."""
    import numpy

    torch = sys.modules["torch"]
    before = states(on_device=on_device)
    try:
        yield
    finally:
        torch.set_rng_state(before[0])
        numpy.random.set_state(before[1])
        random.setstate(before[2])
        if len(before) > 3:
            (torch.cuda if torch.cuda.is_initialized() else torch.mps).set_rng_state(before[3])


class Draws:
    """Seeds each batch of one evaluation by its number.

    The keys depend on the seed, the split, the step of the weights, the batch and the rank. So a
    model or a loss draws the same numbers in the run, after resuming and in a script. With `watch`,
    `drawn` is True afterwards if anything was drawn.
    """

    def __init__(self, seed: int, name: str, step: int, rank: int, *, watch: bool = False) -> None:
        self.seed, self.name, self.step, self.rank = seed, name, step, rank
        self.watch, self.drawn = watch, False
        self._before = ""

    def begin(self, number: int) -> None:
        """Seed for batch `number`. Call it before that batch."""
        self.look()
        seed_step(key(self.seed, "evaluation", self.name, self.step, number, self.rank))
        if self.watch:
            self._before = _shown(states())

    def look(self) -> None:
        """Update `drawn` for the draws since `begin`."""
        if self.watch and self._before:
            self.drawn = self.drawn or self._before != _shown(states())


def drawn_on_host() -> str:
    """Return a digest that changes if torch on the CPU, numpy or `random` draws."""
    return _shown(states(on_device=False))


def _shown(found: list[Any]) -> str:
    digest = hashlib.blake2b()
    for state in found:
        digest.update(state.numpy().tobytes() if hasattr(state, "numpy") else b"")
        digest.update(repr(state).encode() if isinstance(state, tuple) else b"")
        if isinstance(state, tuple) and hasattr(state[1], "tobytes"):  # repr shortens arrays
            digest.update(state[1].tobytes())
    return digest.hexdigest()
