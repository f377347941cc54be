"""Training images per second: 32×32, shifted by up to four pixels, half of them mirrored, and
normalised; other numbers for each example and epoch. One core, but for the workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.configured import build
from benchmarks.measure import Table, in_turn
from regrow.training.parallel import World

IMAGES = 20_000
BATCH = 128
OPTIONS = (
    *("data=synthetic", f"data.source.num_train={IMAGES}", f"data.batch_size={BATCH}"),
    *("+data.augmentation._target_=regrow.data.augment.CropFlip", "+data.augmentation.pad=4"),
    *("+data.augmentation.flip=true", "trainer.device=cpu", "trainer.num_threads=1"),
    "model.hidden=[8]",
)


def measure() -> Table:
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
        """One crop and one flip for all of a batch, as is often done for speed."""
        order = torch.randperm(IMAGES)
        consume(transform(images[indices]) for indices in order.split(BATCH))

    def by_example(workers: int) -> Callable[[], None]:
        data = PerExample(images, transform)
        loader: Any = DataLoader(
            data, BATCH, shuffle=True, num_workers=workers, persistent_workers=workers > 0
        )
        return lambda: consume(batch for batch in loader)

    return Table(
        title="Feeding augmented 32×32 images",
        note=f"{IMAGES:,} images an epoch, batches of {BATCH}. torchvision's transforms draw for "
        "each example where the data set calls them, and once for a whole batch given to them.",
        unit="µs an image",
        reference="train.py",
        seconds=in_turn(
            {
                "train.py": ours,
                "torchvision, one draw for a batch": whole_batch,
                "torchvision, by example": by_example(0),
                "torchvision, by example, two workers": by_example(2),
            },
            rounds=5,
        ),
        per=IMAGES,
        scale=1e6,
    )


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
