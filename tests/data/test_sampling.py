from __future__ import annotations

import dataclasses

import pytest
import torch

from lab.data.augment import CropFlip
from regrow.feeding.batch import LoadedBatch
from regrow.feeding.feeds import MemoryFeed
from regrow.feeding.loaders import EvalLoader
from regrow.feeding.preprocess import Normalizer, Preprocessing
from regrow.feeding.sampling import Windows, permutation
from regrow.feeding.splits import Examples

CPU = torch.device("cpu")
AS_IS = Preprocessing(
    "table", [2], 255.0, None, None, None, None, ",", None, None, True, None, [], None, "pillow"
)


def feed_of(count: int) -> MemoryFeed:
    numbers = torch.arange(count, dtype=torch.float64)
    examples = Examples(torch.stack([numbers, -numbers], 1), numbers.long())
    return MemoryFeed(examples, Normalizer(AS_IS), CPU, store=None, seed=0)


def real(batches: list[LoadedBatch]) -> list[int]:
    return [int(t) for batch in batches for t in batch.targets[: batch.num_local]]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 4])
def test_evaluation_sees_every_example_once_over_all_ranks(world_size: int, size: int) -> None:
    for count in range(3 * world_size * size + 2):
        seen: list[int] = []
        lengths = set()
        for rank in range(world_size):
            windows = Windows(count, size * world_size, False, rank, world_size)
            batches = list(EvalLoader(feed_of(count), windows)) if count else []
            assert all(len(batch.targets) <= size for batch in batches)
            assert all(batch.weights is None for batch in batches if batch.num_local)
            lengths.add(len(batches))
            seen += real(batches)
        assert sorted(seen) == list(range(count))
        assert len(lengths) == 1  # no rank waits for another's forward pass


def test_a_sampler_that_pads_would_be_caught() -> None:
    """The negative control: DistributedSampler pads seven examples on two ranks."""
    from torch.utils.data import DistributedSampler

    samplers = [DistributedSampler(range(7), 2, rank, shuffle=False) for rank in range(2)]
    assert sorted(index for sampler in samplers for index in sampler) != list(range(7))


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("size", [1, 3, 8, 100])
def test_a_windows_shares_are_the_single_process_window(world_size: int, size: int) -> None:
    count = 29
    order = permutation(3, 1, count)
    alone = list(feed_of(count).read(Windows(count, size, False, 0, 1), order, 1, 0))
    ranks = [
        list(feed_of(count).read(Windows(count, size, False, rank, world_size), order, 1, 0))
        for rank in range(world_size)
    ]
    for window, batch in enumerate(alone):
        shares = [batches[window] for batches in ranks]
        assert real(shares) == batch.targets.tolist()
        assert {share.num_global for share in shares} == {len(batch.targets)}
        assert sum(share.num_local for share in shares) == len(batch.targets)
        for share in shares:
            if share.num_local == 0:
                assert share.weights is not None and share.weights.tolist() == [0.0]
                assert len(share.inputs) == 1
    # The negative control: the shares of another epoch's order differ from this window.
    other = list(
        feed_of(count).read(Windows(count, size, False, 0, 1), permutation(3, 2, count), 2, 0)
    )
    assert real(other) != real(alone)


@pytest.mark.parametrize("start", [0, 1, 5, 6, 7])
def test_an_epoch_entered_in_its_middle_gives_the_same_windows(start: int) -> None:
    order = permutation(0, 0, 29)
    windows = Windows(29, 4, False, 0, 1)
    whole = list(feed_of(29).read(windows, order, 0, 0))
    rest = list(feed_of(29).read(windows, order, 0, start))
    assert [batch.targets.tolist() for batch in rest] == [
        batch.targets.tolist() for batch in whole[start:]
    ]


def test_a_batch_has_the_same_alignment_wherever_the_epoch_was_entered() -> None:
    """With another alignment, kernels may take another path and give other bits."""
    order = permutation(0, 0, 29)
    windows = Windows(29, 3, False, 0, 1)
    whole = list(feed_of(29).read(windows, order, 0, 0))
    for start in range(len(windows)):
        rest = list(feed_of(29).read(windows, order, 0, start))
        assert [b.inputs.data_ptr() % 64 for b in rest] == [
            b.inputs.data_ptr() % 64 for b in whole[start:]
        ]


def test_drop_last_leaves_out_only_a_smaller_last_window() -> None:
    assert [len(Windows(n, 4, True, 0, 1)) for n in (3, 4, 7, 8)] == [0, 1, 1, 2]
    assert [len(Windows(n, 4, False, 0, 1)) for n in (0, 3, 4, 7, 8)] == [0, 1, 1, 2, 2]


def test_epochs_and_seeds_have_permutations_of_their_own() -> None:
    orders = [permutation(seed, epoch, 50).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert orders[0] == permutation(0, 0, 50).tolist()


@pytest.mark.parametrize("slices", [1, 2, 3, 7, 9])
def test_micro_batches_hold_the_batch_and_empty_ones_weigh_nothing(slices: int) -> None:
    inputs = {"a": torch.arange(7.0), "b": torch.arange(14.0).view(7, 2)}
    batch = LoadedBatch(inputs, torch.arange(7), None, 7, 20)
    parts = batch.split(slices)
    assert len(parts) == slices
    assert real(parts) == list(range(7))
    for part in parts:
        assert part.num_global == 20 and len(part.inputs["b"]) == len(part.targets) >= 1
        assert (part.weights is None) == (part.num_local > 0)


def test_an_empty_share_splits_into_empty_micro_batches() -> None:
    batch = LoadedBatch(torch.ones(1, 2), torch.zeros(1), torch.zeros(1), 0, 3)
    for part in batch.split(3):
        assert part.num_local == 0 and part.weights is not None and part.weights.sum() == 0


def test_weights_follow_their_examples() -> None:
    numbers = torch.arange(10, dtype=torch.float64)
    examples = Examples(numbers.view(-1, 1), numbers.float(), weights=numbers.float() / 10)
    feed = MemoryFeed(examples, Normalizer(AS_IS), CPU, store=None, seed=0)
    for batch in feed.read(Windows(10, 3, False, 0, 1), permutation(0, 0, 10), 0, 0):
        for part in batch.split(2):
            if part.num_local:
                assert part.weights is not None
                assert torch.allclose(part.weights, part.targets / 10)


def test_an_augmented_example_does_not_depend_on_its_batch() -> None:
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (40, 3, 8, 8), dtype=torch.uint8, generator=random)
    how = dataclasses.replace(AS_IS, kind="image", input_shape=[3, 8, 8])
    store = CropFlip(pad=2, flip=True, padding_mode="constant", alternate_flips=False).store(images)
    feed = MemoryFeed(Examples(images, torch.arange(40)), Normalizer(how), CPU, store=store, seed=0)

    def by_example(
        size: int, epoch: int, rank: int = 0, world_size: int = 1
    ) -> dict[int, torch.Tensor]:
        windows = Windows(40, size, False, rank, world_size)
        batches = feed.read(windows, permutation(0, epoch, 40), epoch, 0)
        return {
            int(t): x
            for batch in batches
            for x, t in zip(batch.inputs, batch.targets[: batch.num_local], strict=False)
        }

    whole, small = by_example(40, 0), by_example(7, 0)
    shares = by_example(16, 0, 0, 2) | by_example(16, 0, 1, 2)
    assert all(torch.equal(whole[i], small[i]) for i in range(40))
    assert all(torch.equal(whole[i], shares[i]) for i in range(40))
    other = by_example(40, 1)
    assert sum(torch.equal(whole[i], other[i]) for i in range(40)) < 10
