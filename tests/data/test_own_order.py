"""Data that is read in an order of its own: mixed like other data, or refused in one line."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_files import of_ones_own
from test_mixing import Same, batches_of
from torch.utils.data import IterableDataset

from lab.data.augment import MixUp
from regrow.errors import UserError
from regrow.feeding.loaders import Data
from regrow.feeding.shard_index import SourceFacts
from regrow.feeding.splits import Examples
from regrow.feeding.writing_shards import Layout, OfExamples, write_shards

CPU = torch.device("cpu")
COUNT, SIZE = 45, 11  # windows of 11, 11, 11, 11 and 1
SMALL = Layout(shard_bytes=20_000, block_bytes=3_000, shuffle=True, seed=0)
Make = Callable[..., Data]


@pytest.fixture(scope="module")
def units(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards whose example i is the i-th unit vector: a mixture shows what it is made of."""
    folder = tmp_path_factory.mktemp("units") / "shards"
    examples = OfExamples(Examples(torch.eye(COUNT), torch.arange(COUNT) % 3), "units")
    write_shards(
        folder, {"train": examples}, SourceFacts("items", list("abc")), SMALL, overwrite=False
    )
    return folder


MIX = "mixing={_target_: lab.data.augment.MixUp, alpha: 0.7}"


def data_of(make_data: Make, root: Path, *overrides: str, workers: int = 0) -> Data:
    return make_data(
        *("shards", f"root={root}", "num_classes=3", f"input_shape=[{COUNT}]", "normalize=none"),
        *("augmentation=null", f"num_workers={workers}", f"batch_size={SIZE}"),
        *("source.pool_mb=0.004", "source.lanes=3", *overrides),
    )


def test_shards_mix_within_the_global_batch_for_any_ranks_and_workers(
    units: Path, make_data: Make, same: Same
) -> None:
    whole = batches_of(data_of(make_data, units, MIX))
    plain = batches_of(data_of(make_data, units))
    for mixed, own in zip(whole, plain, strict=True):
        inside = own.inputs.any(0)  # the examples of this global batch
        assert not (mixed.inputs[:, ~inside]).any()
        assert torch.allclose(mixed.inputs.sum(1), torch.ones(len(mixed.inputs)))
    assert any((mixed.inputs > 0).sum(1).max() == 2 for mixed in whole)
    assert same(whole, batches_of(data_of(make_data, units, MIX, workers=2), world_size=2))
    assert same(whole[2:], batches_of(data_of(make_data, units, MIX), start=2))
    assert not same(whole, batches_of(data_of(make_data, units, MIX), epoch=1))  # the control


class Rows(IterableDataset[Any]):
    def __len__(self) -> int:
        return 20

    def __iter__(self) -> Any:
        return ((torch.ones(3), 0) for _ in itertools.repeat(None, 20))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"sampling": "balanced"},
            "data.sampling=balanced: streams are read in an order of their own",
        ),
        ({"mixing": MixUp(alpha=1.0)}, "data.mixing: an IterableDataset is read in its own order"),
        (
            {"transforms": [torch.nn.Identity()]},
            "data.transforms does not reach into a data set of your own",
        ),
    ],
)
def test_a_stream_is_neither_drawn_nor_mixed_nor_transformed(
    change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        of_ones_own(Rows(), **change)


def test_shards_are_not_sampled(units: Path, make_data: Make) -> None:
    with pytest.raises(UserError, match=r"data.sampling=balanced: tar shards are read in an order"):
        data_of(make_data, units, "sampling=balanced")


class Ordered:
    """A data set of a user's, with an attribute that has a common name."""

    order = "by date"

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> Any:
        return torch.eye(20)[index], index % 3


def test_a_data_set_may_have_an_attribute_named_order() -> None:
    data = of_ones_own(Ordered())
    assert sum(batch.num_local for batch in data.train(device=CPU).epoch(0)) == 20
