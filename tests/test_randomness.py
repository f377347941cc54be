"""The keys that all randomness is derived from."""

from __future__ import annotations

import itertools

import pytest
import torch

from regrow.randomness import generator, key

PARTS = [(part, step, index) for part in ("a", "b") for step in range(40) for index in range(40)]


def test_a_key_is_the_same_on_every_machine_and_in_every_version() -> None:
    """Pinned: another key would change the order and the dropout of every recorded run."""
    assert key(0) == 0
    assert key(0, "model", 0, 0, 0) == 6169679686739817008
    assert key(1, "order", 3) == 5110497461776595501
    assert key(2**64 - 1, "example", "train", 2, 41) == 2740412573564407795
    assert generator(7, "x").initial_seed() == key(7, "x")


def test_no_two_places_share_a_key() -> None:
    assert len({key(0, *parts) for parts in PARTS}) == len(PARTS)
    assert key(0, "a", 1, 2) != key(0, "a", 2, 1)


@pytest.mark.parametrize("bits", [8, 16, 32, 48])
def test_every_bit_of_the_seed_and_of_a_part_counts(bits: int) -> None:
    assert key(5, "a", 3) != key(5 + (1 << bits), "a", 3)
    assert key(5, "a", 3) != key(5, "a", 3 + (1 << bits))


def test_neighbouring_steps_share_nothing() -> None:
    """Two keys differ in half of their 63 bits, like random numbers."""
    keys = [key(0, "model", step) for step in range(1000)]
    differing = [(a ^ b).bit_count() for a, b in itertools.pairwise(keys)]
    assert 30.5 < sum(differing) / len(differing) < 32.5
    low_bits = torch.tensor([value & 1 for value in keys]).float().mean()
    assert 0.4 < low_bits < 0.6
