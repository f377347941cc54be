"""Training images per second from JPEG files of 500×375 pixels, on one core: decoded and resized as
they are read, or once. The crops in memory are what the cache can reach: the same crops of the
same resized images, which lie in memory as tensors.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.configured import config_of
from benchmarks.feeding import consume
from benchmarks.measure import Table, in_turn
from regrow.config.targets import allow, instantiate
from regrow.feeding.decoding import to_tensor
from regrow.feeding.images import ImageFiles
from regrow.feeding.loaders import Data
from regrow.numerics.memory import keep_freed_memory

IMAGES, BATCH, ROUNDS = 256, 64, 7


class InMemory:
    """Resized images as tensors."""

    def __init__(self, images: list[Tensor]) -> None:
        self.images = images

    def read(self, index: int) -> Tensor:
        return self.images[index]

    def subset(self, indices: list[int]) -> InMemory:
        return InMemory([self.images[index] for index in indices])


def measure() -> Table:
    torch.set_num_threads(1)
    keep_freed_memory()  # as a run does
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "photos")
        write(root)
        runs = {
            "crop and flip, cached": data_of(root, "resized_folder"),
            "the same in memory": in_memory(data_of(root, "resized_folder", "data.cache=null")),
            "crop and flip, torchvision": data_of(root, "resized_folder", "data.cache=null"),
            "crop and flip, Pillow": data_of(
                root, "resized_folder", "data.cache=null", "data.source.decoder=pillow"
            ),
            "Photo, torchvision": data_of(root, "image_folder"),
            "Photo, Pillow": data_of(root, "image_folder", "data.source.decoder=pillow"),
        }
        seconds = in_turn({name: epochs_of(data) for name, data in runs.items()}, rounds=ROUNDS)
    return Table(
        title="Feeding photos of 500×375 pixels from files",
        note=f"{IMAGES} JPEGs, resized to 256, crops of 224×224, normalised, in batches of {BATCH} "
        "by one process with one thread. Photo is the augmentation of data=image_folder.",
        unit="ms an image",
        reference="the same in memory",
        seconds=seconds,
        per=IMAGES,
        scale=1e3,
    )


def write(root: Path) -> None:
    from PIL import Image

    random = np.random.default_rng(0)
    for number in range(IMAGES):
        coarse = random.integers(0, 256, (47, 63, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((500, 375)), float)
        noisy = (smooth + random.normal(0, 6, smooth.shape)).clip(0, 255).astype(np.uint8)
        folder = root / f"class {number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noisy).save(folder / f"{number:04}.jpg", quality=90)


def data_of(root: Path, name: str, *overrides: str) -> Data:
    node = config_of(
        *(f"data={name}", f"data.root={root}", "data.num_classes=2", "data.num_workers=0"),
        *(f"data.batch_size={BATCH}", "data.normalize=imagenet"),
        *("data.source.val_fraction=0", "data.source.test_fraction=0", *overrides),
    )["data"]
    allow(node)
    data: Data = instantiate(node)
    return data


def in_memory(data: Data) -> Data:
    train: Any = data.source.train
    assert isinstance(train, ImageFiles)
    images = [to_tensor(train.resized_file(file)) for file in train.files]
    held = dataclasses.replace(train, resized=InMemory(images))
    data.source = dataclasses.replace(data.source, train=held)
    return data


def epochs_of(data: Data) -> Callable[[], None]:
    train, epochs = data.train(device=torch.device("cpu")), iter(range(1_000_000))

    def run() -> None:
        consume(batch.inputs for batch in train.epoch(next(epochs)))  # type: ignore[misc]

    return run
