"""CIFAR-10 for a machine without a network: six pictures of 10,000 images, without loss.

`python -m benchmarks.gpu.sprites data packed` packs torchvision's files in `data`: some 17 MB a
picture, in two folders, so that each half can be carried alone.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lab.data.datasets import cifar10
from regrow.feeding.splits import Examples, Splits, cut_examples

HALVES = {"first": ("train_0", "train_1", "train_2"), "second": ("train_3", "train_4", "test_0")}
COUNT = 10_000  # images of a picture


def read(*, root: str, download: bool, val_fraction: float, seed: int) -> Splits:
    """Return what `lab.data.datasets.cifar10` returns, from pictures below `root`."""
    del download
    paths = {path.stem: path for path in Path(root).rglob("*_[0-9].webp")}
    if missing := [name for names in HALVES.values() for name in names if name not in paths]:
        sys.exit(f"benchmarks: {root} lacks {', '.join(missing)}")
    images = {name: unpack(path) for name, path in paths.items()}
    labels = torch.from_numpy(np.load(next(Path(root).rglob("labels.npy")))).long()
    inputs = torch.cat([images[f"train_{number}"] for number in range(5)])
    examples = Examples(inputs, labels[: len(inputs)])
    train, val, _ = cut_examples(examples, val_fraction=val_fraction, test_fraction=0.0, seed=seed)
    return Splits(train, val, Examples(images["test_0"], labels[len(examples) :]))


def drawn(*, root: str, download: bool, val_fraction: float, seed: int, count: int) -> Splits:
    """Return random images and classes of CIFAR-10's shape, to measure time alone."""
    del root, download, val_fraction

    def draw(size: int) -> Examples:
        images = torch.randint(256, (size, 3, 32, 32), generator=random, dtype=torch.uint8)
        return Examples(images, torch.randint(10, (size,), generator=random))

    random = torch.Generator().manual_seed(seed)
    return Splits(draw(count), draw(max(1, count // 99)), draw(max(1, count // 5)))


def pack(images: Tensor, path: Path) -> None:
    """Write images (N, 3, H, W), N a square, as one lossless picture."""
    side = round(len(images) ** 0.5)
    height, width = images.shape[2:]
    tiles = images.view(side, side, 3, height, width).permute(0, 3, 1, 4, 2)
    pixels = tiles.reshape(side * height, side * width, 3).numpy()
    Image.fromarray(pixels).save(path, lossless=True, quality=100, method=6)


def unpack(path: Path, size: int = 32) -> Tensor:
    """Return the images (N, 3, H, W) of a picture."""
    with Image.open(path) as picture:
        pixels = torch.from_numpy(np.array(picture.convert("RGB")))
    rows, columns = pixels.shape[0] // size, pixels.shape[1] // size
    tiles = pixels.view(rows, size, columns, size, 3).permute(0, 2, 4, 1, 3)
    return tiles.reshape(-1, 3, size, size).contiguous()


def main(source: str, folder: str) -> None:
    splits = cifar10(root=source, download=False, val_fraction=0.0, seed=0)
    assert splits.test is not None
    images = {f"train_{n}": part for n, part in enumerate(splits.train.inputs.split(COUNT))}
    images["test_0"] = splits.test.inputs
    for half, names in HALVES.items():
        (Path(folder) / half).mkdir(parents=True)
        for name in names:
            pack(images[name], Path(folder) / half / f"{name}.webp")
    labels = torch.cat([splits.train.targets, splits.test.targets])
    np.save(Path(folder) / "first" / "labels.npy", labels.to(torch.uint8).numpy())


if __name__ == "__main__":
    main(*sys.argv[1:])
