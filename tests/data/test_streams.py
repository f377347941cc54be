"""An IterableDataset for training: position by count, the same for any ranks, and its refusals."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reading import NumbersInOrder, part, read_in_parts
from running import config_of, fingerprint, train_config

from lab.data.datasets import from_datasets
from regrow.config.targets import allow, instantiate
from regrow.errors import DataError, UserError
from regrow.feeding.loaders import Data
from regrow.feeding.writing_shards import of_data

COUNT = 300
CPU = torch.device("cpu")


class Noisy(torch.utils.data.IterableDataset[Any]):
    """Rows whose classes a line divides; drawn from torch's generator, or from one of its own."""

    def __init__(self, count: int = 150, own: bool = False, length: bool = True) -> None:
        self.count = count
        self.own = np.random.default_rng() if own else None
        if length:
            self.__class__ = Counted

    def __iter__(self) -> Iterator[Any]:
        for _ in range(self.count):
            noise = torch.randn(6) if self.own is None else torch.tensor(self.own.normal(size=6))
            yield noise.float(), int(noise[0] > 0)


class Counted(Noisy):
    def __len__(self) -> int:
        return self.count


def node_of(target: str, *overrides: str, **arguments: Any) -> dict[str, Any]:
    """Return a run's config whose training set is a stream."""
    config = config_of(
        *("data=synthetic", "data.input_shape=[6]", "data.num_classes=2", "data.num_outputs=2"),
        *("data.batch_size=32", "data.normalize=none", "model.hidden=[8]", "trainer.max_epochs=2"),
        *("trainer.device=cpu", "trainer.num_threads=1", "trainer.log_every_steps=1", *overrides),
    )
    source: dict[str, Any] = {"_target_": "lab.data.datasets.from_datasets"}
    source |= dict.fromkeys(("val", "test", "sets", "collate"))
    config["data"]["source"] = {**source, "train": {"_target_": target, **arguments}}
    allow(config)
    return config


def numbers(workers: int = 0, *overrides: str) -> dict[str, Any]:
    config = node_of("reading.NumbersInOrder", *overrides, count=COUNT)["data"]
    config["source"]["collate"] = {"_target_": "reading.collate", "_partial_": True}
    config["target_kind"] = config["num_classes"] = config["num_outputs"] = None
    allow(config)
    return {**config, "num_workers": workers, "limit_train": COUNT, "input_shape": None}


def test_a_stream_gives_the_same_ids_for_any_ranks_and_kills(tmp_path: Path) -> None:
    dice = random.Random(3)
    ways = ((0, 1), (1, 1), (0, 2), (1, 2))
    parts = [
        part(workers, ranks, dice.randint(1, 2), dice.random() / 50) for workers, ranks in ways
    ]
    found = read_in_parts(numbers(), [*parts, part(1, 2, None)], tmp_path / "logs")
    alone = read_in_parts(numbers(), [part(0, 1, None)], tmp_path / "alone")
    assert found == alone
    ids = [number // 1000 % 10**6 for window in found for number in window]
    assert ids == [*range(COUNT)] * 2  # in the stream's own order, in both epochs
    epochs = [[number // 10**9 for number in window] for window in found]
    assert epochs[0][0] == 0 and epochs[-1][0] == 1
    drawn = [number % 1000 for window in found for number in window]
    assert len({*drawn}) > 100  # each example has draws of its own
    other = read_in_parts({**numbers(), "seed": 1}, [part(0, 1, None)], tmp_path / "other")
    assert drawn != [number % 1000 for window in other for number in window]  # negative control


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("own", [False, True])
def test_a_stopped_run_on_a_stream_ends_with_the_same_bits(
    tmp_path: Path, workers: int, own: bool
) -> None:
    """The negative control: a stream that draws from a generator of its own does not."""
    config = node_of("test_streams.Noisy", f"data.num_workers={workers}", own=own)
    train_config(tmp_path / "whole", config)
    for stop in (3, 7, None):
        train_config(tmp_path / "parts", config, stop_at=stop)
    is_same = fingerprint(tmp_path / "parts") == fingerprint(tmp_path / "whole")
    assert is_same == (not own)


def data_of(config: dict[str, Any]) -> Data:
    found: Data = instantiate(config["data"])
    return found


def test_the_user_is_told_that_a_resume_reads_again() -> None:
    notes = data_of(node_of("test_streams.Noisy")).notes
    assert len(notes) == 1
    assert "a resume reads the examples of its epoch again" in notes[0]


@pytest.mark.parametrize(
    ("overrides", "arguments", "error"),
    [
        (("data.num_workers=2",), {}, r"num_workers=2: train is an IterableDataset.*Use 0 or 1"),
        ((), {"length": False}, r"Noisy has no length. Set data.limit_train to the number"),
    ],
)
def test_a_stream_without_length_or_with_workers_is_refused(
    overrides: tuple[str, ...], arguments: dict[str, Any], error: str
) -> None:
    with pytest.raises(UserError, match=error):
        data_of(node_of("test_streams.Noisy", *overrides, **arguments))


def test_the_limit_is_an_epochs_length_for_a_stream_without_one() -> None:
    data = data_of(node_of("test_streams.Noisy", "data.limit_train=100", length=False))
    assert data.train(device=CPU).steps_per_epoch == 4
    assert sum(batch.num_local for batch in data.train(device=CPU).epoch(0)) == 100


def test_a_stream_that_ends_early_is_one_line() -> None:
    data = data_of(node_of("test_streams.Noisy", "data.limit_train=200", length=False))
    with pytest.raises(DataError, match=r"ended after 150 of the 200 examples of an epoch. Set"):
        list(data.train(device=CPU).epoch(0))


def test_a_stream_is_for_training_alone() -> None:
    with pytest.raises(UserError, match=r"split val: .* only train can be"):
        from_datasets(train=[(torch.ones(1), 0)], val=Noisy(), test=None, collate=None)  # type: ignore[arg-type]


def test_a_stream_cannot_be_written_as_shards() -> None:
    with pytest.raises(
        UserError, match="IterableDataset, and shards are written of numbered items"
    ):
        of_data(data_of(node_of("test_streams.Noisy")))


def test_a_streams_identity_is_its_fingerprint_or_its_length(
    caplog: pytest.LogCaptureFixture,
) -> None:
    data = data_of(node_of("test_streams.Noisy"))
    with caplog.at_level(logging.WARNING, "regrow.data"):
        first = data.fingerprint()
    assert "a stream has no numbered items" in caplog.text
    assert data_of(node_of("test_streams.Noisy", count=149)).fingerprint() != first
    assert isinstance(NumbersInOrder(3), torch.utils.data.IterableDataset)
