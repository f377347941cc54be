"""Images in files. A broken one is named."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from regrow.data.splits import NAMES, Splits, check_fractions, cut
from regrow.errors import DataError, UserError

if TYPE_CHECKING:
    from PIL.Image import Image

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")

# PIL would go by the content, and hand PostScript of any name to Ghostscript.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")


def load_image(path: str | Path, channels: int) -> Image:
    """The file as a PIL image in grey (1 channel) or RGB (3). Raises DataError naming the file."""
    from PIL import Image

    try:
        with Image.open(path, formats=FORMATS) as file:
            if file.mode.startswith(("I", "F")):
                raise ValueError(f"{file.mode} pixels are of more than 8 bits")
            # A palette may hold transparency, which converts by way of RGBA only.
            image = file.convert("RGBA") if file.mode == "P" else file
            return image.convert("L" if channels == 1 else "RGB")
    except Exception as error:  # the decoders raise a dozen different kinds
        reason = " ".join(str(error).split()).replace(f" '{path}'", "") or type(error).__name__
        raise DataError(
            f"{path} is no readable image: {reason}. Mend or remove the file."
        ) from None


def fit(image: Image, size: Sequence[int], resize: int | None) -> Image:
    """Scale to `size` (H, W); with `resize`, scale the shorter side to it and crop the centre.

    The same pixels as torchvision's Resize and CenterCrop on a PIL image.
    """
    from PIL.Image import Resampling

    height, width = size
    if resize is None:
        if image.size == (width, height):
            return image
        return image.resize((width, height), Resampling.BILINEAR)
    shorter = min(image.size)
    scaled = (int(resize * image.width / shorter), int(resize * image.height / shorter))
    if image.size != scaled:
        image = image.resize(scaled, Resampling.BILINEAR)
    left = round((image.width - width) / 2)
    top = round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def to_tensor(image: Image) -> Tensor:
    """(C, H, W) uint8."""
    pixels = torch.from_numpy(np.array(image))
    return pixels.unsqueeze(0) if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()


@dataclass(frozen=True)
class ImageFiles:
    """A map-style data set of image files: item i is a uint8 image (C, H, W) and its class."""

    files: list[str]
    classes: list[int]
    size: list[int]  # H, W
    channels: int
    resize: int
    transform: Callable[[Image], Image] | None = None

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = load_image(self.files[index], self.channels)
        if self.transform is None:
            image = fit(image, self.size, self.resize)
        else:
            image = self.transform(image)
        return to_tensor(image), self.classes[index]

    def subset(self, indices: Tensor) -> ImageFiles:
        chosen = indices.tolist()
        files = [self.files[index] for index in chosen]
        classes = [self.classes[index] for index in chosen]
        return dataclasses.replace(self, files=files, classes=classes)

    def augmented(self, transform: Callable[[Image], Image]) -> ImageFiles:
        """The same examples, each through `transform` in place of Resize and CenterCrop."""
        return dataclasses.replace(self, transform=transform)

    def keys(self) -> list[Hashable]:
        """Size, first and last 4 KiB of each file: enough to know a copy, whatever its name."""
        return [_file_key(file) for file in self.files]

    def fingerprint(self) -> str:
        """SHA-256 over classes, file names and sizes."""
        digest = hashlib.sha256()
        for file, target in zip(self.files, self.classes, strict=True):
            path = Path(file)
            digest.update(
                f"{target}/{path.parent.name}/{path.name}:{path.stat().st_size}\n".encode()
            )
        return digest.hexdigest()


def _file_key(file: str) -> tuple[int, bytes]:
    try:
        path = Path(file)
        size = path.stat().st_size
        digest = hashlib.blake2b(digest_size=16)
        with path.open("rb") as opened:
            digest.update(opened.read(4096))
            opened.seek(max(0, size - 4096))
            digest.update(opened.read(4096))
        return size, digest.digest()
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}.") from None


def find_images(folder: Path) -> list[Path]:
    """Image files below the folder, sorted by path."""
    found = (path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS)
    return sorted(path for path in found if path.is_file())


def image_folder(
    *,
    root: str,
    input_shape: list[int],
    resize: int,
    num_classes: int,
    class_names: list[str] | None,
    val_fraction: float,
    test_fraction: float,
    seed: int,
) -> Splits:
    """Folders of images, one per class: root/<class>/…, or root/train/<class>/…, root/val/….

    A split without a folder of its own is cut from the training images by its fraction.
    """
    check_fractions(val_fraction, test_fraction)
    channels, *size = input_shape
    if channels not in (1, 3) or len(size) != 2:
        raise UserError(
            f"data.input_shape={input_shape} is no image. Use [3, height, width] or [1, …]."
        )
    if resize < max(size):
        raise UserError(
            f"data.source.resize={resize} is smaller than the crop {size[0]} x {size[1]} of "
            f"data.input_shape. Use {max(size)} or more."
        )
    folder = Path(root)
    if not folder.is_dir():
        raise UserError(f"data.root={root} is no folder. Set it to the folder of images.")
    names = [name for name in ("train", "val", "test") if (folder / name).is_dir()]
    folders = {name: folder / name for name in names} if "train" in names else {"train": folder}
    found = sorted(path.name for path in folders["train"].iterdir() if path.is_dir())
    if len(found) != num_classes or (class_names is not None and sorted(class_names) != found):
        given = f" and class_names {class_names}" if class_names is not None else ""
        raise UserError(
            f"data.num_classes={num_classes}{given}, but {folders['train']} holds {len(found)} "
            f"class folders: {', '.join(found[:20])}. Set data.num_classes={len(found)} and "
            f"data.num_outputs={len(found)}."
        )
    classes = class_names or found

    def read(where: Path) -> ImageFiles:
        for path in where.iterdir():
            if path.is_dir() and path.name not in classes:
                raise DataError(f"{path} is none of the classes {', '.join(classes[:20])}.")
        paths = [(path, number) for number, name in enumerate(classes)
                 for path in find_images(where / name)]  # fmt: skip
        if not paths:
            raise DataError(
                f"{where} holds no images ({', '.join(EXTENSIONS)}): the split is empty."
            )
        missing = set(range(len(classes))) - {number for _, number in paths}
        if missing and where == folders["train"]:
            raise DataError(f"{where / classes[min(missing)]} holds no images to train on.")
        files = [str(path) for path, _ in paths]
        return ImageFiles(files, [number for _, number in paths], size, channels, resize)

    own = {name: read(where) for name, where in folders.items()}
    everything = own.pop("train")
    keys = everything.keys()
    parts = cut(
        keys,
        np.array(everything.classes),
        val_fraction=0.0 if "val" in own else val_fraction,
        test_fraction=0.0 if "test" in own else test_fraction,
        seed=seed,
    )
    chosen = {name: part for name, part in zip(NAMES, parts, strict=True) if part is not None}
    splits = own | {name: everything.subset(part) for name, part in chosen.items()}
    return Splits(
        splits["train"],
        splits.get("val"),
        splits.get("test"),
        class_names=classes,
        resize=resize,
        known_keys={
            name: [keys[index] for index in part.tolist()] for name, part in chosen.items()
        },
    )
