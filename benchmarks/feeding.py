"""Training images per second: 32×32, shifted by up to four pixels, half of them mirrored, and
normalised, with new random numbers for each example and epoch. One core, except for the workers.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterator
from copy import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.configured import build
from benchmarks.measure import Table, in_turn
from regrow.distributed.parallel import World
from regrow.feeding.batch import LoadedBatch
from regrow.feeding.loaders import TrainLoader
from regrow.processes.interrupt import StopRequest
from regrow.runs import training

IMAGES = 20_000
BATCH = 128
DATA = (
    *("data=synthetic", f"data.source.num_train={IMAGES}", f"data.batch_size={BATCH}"),
    *("+data.augmentation._target_=lab.data.augment.CropFlip", "+data.augmentation.pad=4"),
    *("+data.augmentation.flip=true", "+data.augmentation.padding_mode=constant"),
    "+data.augmentation.alternate_flips=false",
)
OPTIONS = (*DATA, "trainer.device=cpu", "trainer.num_threads=1", "model.hidden=[8]")


def measure() -> list[Table]:
    return [measure_feeding(), *(measure_waiting(name) for name in WAITING)]


def measure_feeding() -> Table:
    from torchvision.transforms import v2

    objects, _ = build(World(device=torch.device("cpu")), *OPTIONS)
    torch.set_num_threads(1)
    images = torch.randint(0, 256, (IMAGES, 3, 32, 32), dtype=torch.uint8)
    mean, std = [0.5, 0.5, 0.5], [0.25, 0.25, 0.25]
    transform = v2.Compose(
        [
            v2.RandomCrop(32, padding=4),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(mean, std),
        ]
    )
    epochs = iter(range(1_000_000))

    def ours() -> None:
        consume(batch.inputs for batch in objects.train.epoch(next(epochs)))

    def whole_batch() -> None:
        """Use one crop and one flip for the whole batch, as is often done for speed."""
        order = torch.randperm(IMAGES)
        consume(transform(images[indices]) for indices in order.split(BATCH))

    def by_example(workers: int) -> Callable[[], float]:
        data = PerExample(images, transform)
        loader: Any = DataLoader(
            data, BATCH, shuffle=True, num_workers=workers, persistent_workers=workers > 0
        )
        return lambda: an_epoch_of(1, lambda: consume(batch for batch in loader))

    return Table(
        title="Feeding augmented 32×32 images",
        note=f"{IMAGES:,} images an epoch, batches of {BATCH}; a mean of five epochs where one "
        "takes a tenth of a second. torchvision's transforms draw for each example where the data "
        "set calls them, and once for a whole batch given to them.",
        unit="µs an image",
        reference="train.py",
        seconds=in_turn(
            {
                "train.py": lambda: an_epoch_of(5, ours),
                "torchvision, one draw for a batch": lambda: an_epoch_of(5, whole_batch),
                "torchvision, by example": by_example(0),
                "torchvision, by example, two workers": by_example(2),
            },
            rounds=5,
        ),
        per=IMAGES,
        scale=1e6,
    )


def an_epoch_of(epochs: int, run: Callable[[], None]) -> float:
    """Return the mean seconds of one epoch over `epochs` epochs."""
    started = time.perf_counter()
    for _ in range(epochs):
        run()
    return (time.perf_counter() - started) / epochs


WAITING = {
    "the default MLP on digits": (400, ()),
    "a small CNN on 32×32 images": (40, (*DATA, "model=cnn")),
    "ResNet-18 on 32×32 images": (6, (*DATA, "model=resnet18")),
}


def measure_waiting(name: str) -> Table:
    """Measure how long the loop waits for batches of augmented images during training."""
    steps, options = WAITING[name]
    waited, whole = zip(*(waiting(steps, *options) for _ in range(3)), strict=True)
    return Table(
        title=f"Waiting for data: {name}",
        note="Batches of 64 digits or 128 images, augmented as they are read; one thread.",
        unit="ms a step",
        reference="a step",
        seconds={"a step": list(whole), "of it waiting for data": list(waited)},
        scale=1e3,
    )


def waiting(steps: int, *overrides: str) -> tuple[float, float]:
    """Return seconds of waiting and total seconds per step, after a fifth as many untimed steps."""
    asked: list[float] = []
    given: list[float] = []

    class Watched(TrainLoader):
        def epoch(self, epoch: int, start: int = 0) -> Iterator[LoadedBatch]:
            now = time.perf_counter()
            for batch in super().epoch(epoch, start):
                asked.append(now)
                given.append(time.perf_counter())
                yield batch
                now = time.perf_counter()

    first, last = steps // 5, steps // 5 + steps
    world = World(device=torch.device("cpu"))
    objects, config = build(
        world,
        *("trainer.device=cpu", "trainer.num_threads=1", "trainer.eval_every_epochs=null"),
        *("trainer.checkpoint.save_every_epochs=null", "trainer.max_epochs=null"),
        *(f"trainer.max_steps={last + 1}", *overrides),
    )
    watched = copy(objects.train)
    watched.__class__ = Watched
    with tempfile.TemporaryDirectory() as folder:
        objects = dataclasses.replace(objects, train=watched)
        training.train(objects, config, Path(folder), world, StopRequest())
    waits = [end - begin for begin, end in zip(asked, given, strict=True)]
    return sum(waits[first:last]) / steps, (asked[last] - asked[first]) / steps


class PerExample(Dataset[Tensor]):
    def __init__(self, images: Tensor, transform: Callable[[Tensor], Tensor]) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(self.images[index])


def consume(batches: Iterator[Tensor]) -> None:
    for batch in batches:
        assert len(batch)
