"""`set_epoch` of a user's data set: called in every process, before the first example."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import without_pictures
from running import config_of, fingerprint, train_config
from test_files import of_ones_own
from torch import Tensor

from regrow.feeding import identity, items
from regrow.feeding.transforms import Epochs, with_epochs

CPU = torch.device("cpu")


class Curriculum:
    """Items tell the epoch that the data set knows, and how often it was told in this process."""

    def __init__(self, count: int = 13) -> None:
        self.count, self.epoch, self.told = count, -1, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch, self.told = epoch, self.told + 1

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.tensor([index, self.epoch, self.told, os.getpid()]).double(), index % 3


@pytest.fixture(autouse=True)
def no_worker_stays() -> Iterator[None]:
    yield
    assert not multiprocessing.active_children()


def rows(batches: Any) -> Tensor:
    return torch.cat([batch.inputs for batch in batches])


@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_process_knows_the_epoch_before_its_first_example(
    num_workers: int, persistent: bool
) -> None:
    dataset = Curriculum()
    data = of_ones_own(dataset, num_workers=num_workers, persistent_workers=persistent)
    train = data.train(device=CPU)
    for epoch, start in ((0, 0), (1, 0), (5, 2), (6, 0)):
        found = rows(train.epoch(epoch, start))
        assert found[:, 1].unique().tolist() == [epoch]
        assert dataset.epoch == epoch  # in this process too, as for a collate function
        if num_workers == 0:
            assert found[:, 2].unique().tolist() == [dataset.told]
        elif persistent:
            assert len(found[:, 3].unique()) == 2 and os.getpid() not in found[:, 3].tolist()
    assert dataset.told == 4  # once per epoch, not once per example
    # An epoch left half-way, as by a stop, and entered again in a new process.
    batches = train.epoch(7)
    next(batches)
    del batches
    assert rows(train.epoch(8))[:, 1].unique().tolist() == [8]
    data.close()
    resumed = of_ones_own(Curriculum(), num_workers=num_workers, persistent_workers=persistent)
    assert rows(resumed.train(device=CPU).epoch(8, 1))[:, 1].unique().tolist() == [8]
    resumed.close()


def test_a_data_set_that_is_not_told_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: torch's own loader tells workers nothing."""
    monkeypatch.setattr(items.SeededItems, "begin", lambda self, epoch: None)
    found = rows(of_ones_own(Curriculum()).train(device=CPU).epoch(3))
    assert found[:, 1].unique().tolist() == [-1]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_evaluation_between_two_batches_does_not_set_the_epoch_back(num_workers: int) -> None:
    """Training and validation are parts of one data set. An evaluation is epoch 0."""
    whole = Curriculum(20)
    parts = [torch.utils.data.Subset(whole, range(*ends)) for ends in ((0, 13), (13, 20))]
    data = of_ones_own(*parts, num_workers=num_workers, overlap="ignore")
    batches = data.train(device=CPU).epoch(4)
    seen = [next(batches)]
    measured = rows(data.evaluation("val", device=CPU))
    assert measured[:, 1].unique().tolist() == [0]
    assert rows([*seen, *batches])[:, 1].unique().tolist() == [4]
    assert rows(data.evaluation("val", device=CPU))[:, 1].unique().tolist() == [0]
    data.close()


def test_data_sets_inside_others_are_told() -> None:
    inner = [Harder(), Harder()]
    both = torch.utils.data.ConcatDataset(inner)  # type: ignore[arg-type]
    part = torch.utils.data.Subset(both, [0, 20])
    assert with_epochs(part) == inner and with_epochs([1, 2]) == []
    epochs = Epochs()
    epochs.set(with_epochs(part), 2)
    assert [each.epoch for each in inner] == [2, 2]
    assert type(epochs.__reduce__()[0]()) is Epochs  # a worker's copy knows no ids of this process
    # A resume compares items as of epoch 0, whatever the epoch.
    before = identity.of_items(part)
    epochs.set(with_epochs(part), 5)
    assert identity.of_items(part) == before


class Harder(Curriculum):
    """Noise that grows with the epoch."""

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        assert self.epoch >= 0
        return torch.tensor([index % 3, 1.0]) + 0.1 * self.epoch * torch.rand(2), index % 3


def curriculum(num_workers: int) -> dict[str, Any]:
    config: dict[str, Any] = config_of(
        "data=synthetic", "data.input_shape=[2]", "data.num_classes=3", "data.num_outputs=3",
        "data.batch_size=5", "model.hidden=[8]", "trainer.max_epochs=4", "trainer.num_threads=1",
        "trainer.device=cpu", "trainer.log_every_steps=1", "data.normalize=none",
        f"data.num_workers={num_workers}",
    )  # fmt: skip
    node = {"_target_": "test_set_epoch.Harder"}
    source = {"_target_": "lab.data.datasets.from_datasets", "collate": None, "test": None}
    config["data"]["source"] = {**source, "train": node, "val": {**node, "count": 6}}
    return config


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_curriculum_stopped_in_mid_epoch_ends_with_the_same_bits(
    num_workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(name: str, config: Callable[[int], Any] = curriculum, **options: Any) -> str:
        with without_pictures():
            train_config(tmp_path / name, config(num_workers), **options)
        return fingerprint(tmp_path / name)  # type: ignore[no-any-return]

    whole = run("whole")
    run("stopped", stop_at=7)
    assert run("stopped") == whole
    monkeypatch.setattr(Harder, "set_epoch", lambda self, epoch: setattr(self, "epoch", 0))
    assert run("always easy") != whole  # the control
