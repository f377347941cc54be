"""Images and their masks in files. A mask has a class index per pixel. Errors name the file."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from regrow.errors import DataError, UserError
from regrow.feeding.decoding import fit, formats_for, load_image, opened, to_tensor
from regrow.feeding.files import LeftOut, contents_of, is_folder, shown
from regrow.feeding.images import (
    check_size,
    completed,
    find_images,
    frames,
    group_of,
    keys_across,
    look_beside,
    root_of,
)
from regrow.feeding.splits import (
    NAMES,
    Reading,
    Splits,
    are_like_splits,
    check_fractions,
    check_name,
    text_names,
)
from regrow.feeding.transforms import applied

if TYPE_CHECKING:
    from PIL.Image import Image

AS_V2 = "Use the transforms of torchvision.transforms.v2"
MODES = ("1", "L", "P", "I;16", "I")  # of one number per pixel; P: the index in the palette
NUM_VALUES = 1 << 16  # of a pixel
NO_CLASS = -(1 << 31)
NUM_LOOKED_AT = 16  # training masks whose values are compared with the config


def load_mask(path: str | Path) -> Image:
    """Return a mask's numbers as a PIL image, of mode L or, above 8 bits, I. Raises DataError."""
    from PIL import Image

    with opened(path):
        with Image.open(path, formats=formats_for(Path(path).suffix.lower())) as file:
            if file.mode not in MODES:
                raise ValueError(
                    f"its {file.mode} pixels are colours, and a mask has one number per pixel"
                )
            pixels = np.array(file)
        return Image.fromarray(pixels.astype(np.uint8 if pixels.itemsize == 1 else np.int32))


@dataclass(frozen=True)
class MaskFiles:
    """A map-style data set: item i is a uint8 image (C, H, W) and its class indices (H, W)."""

    files: list[str]
    masks: list[str]
    size: list[int]  # H, W
    channels: int
    resize: int | None
    root: str
    exif_orientation: bool
    num_classes: int
    ignore_index: int | None
    mask_values: list[int] | None
    groups: list[str] | None = None
    transform: Callable[..., Any] | None = None

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = load_image(self.files[index], self.channels, exif_orientation=self.exif_orientation)
        mask = load_mask(self.masks[index])
        if image.size != mask.size:
            raise DataError(
                f"{shown(self.files[index])} has {_pixels(image)} pixels, and its mask "
                f"{shown(self.masks[index])} has {_pixels(mask)}. Give them one size; if the "
                "camera was turned, try data.source.exif_orientation=false."
            )
        if self.transform is None:
            image = fit(image, self.size, self.resize)
            numbers = torch.from_numpy(np.array(fit(mask, self.size, self.resize, nearest=True)))
        else:
            image, numbers = self._together(image, torch.from_numpy(np.array(mask)))
        return to_tensor(image), self._classes(numbers, index)

    @cached_property
    def image_of(self) -> dict[str, str]:
        """The image's file of each mask's."""
        return dict(zip(self.masks, self.files, strict=True))

    def decoded(self, file: str) -> Image:
        """Return the image or the mask in a file. Raises BrokenImage, DataError or OSError."""
        if file in self.image_of:
            return load_mask(file)
        return load_image(file, self.channels, exif_orientation=self.exif_orientation)

    def _together(self, image: Image, numbers: Tensor) -> tuple[Image, Tensor]:
        from torchvision.tv_tensors import Mask

        assert self.transform is not None
        given = (image, Mask(numbers))
        found = applied(self.transform, *given, key="data.augmentation", advice=AS_V2)
        try:
            image, numbers = found
        except (TypeError, ValueError) as error:
            raise DataError(
                f"data.augmentation={type(self.transform).__name__} must take an image and its "
                f"mask, and return both ({error}). {AS_V2}."
            ) from None
        return image, numbers.as_subclass(Tensor)

    def _classes(self, numbers: Tensor, index: int) -> Tensor:
        values = numbers.long()
        places = values.clamp(0, NUM_VALUES - 1)
        classes = self._class_of[places]
        unknown = (classes == NO_CLASS) | (places != values)
        if bool(unknown.any()):
            value = int(numbers[unknown][0])
            known = self.mask_values or f"0 … {self.num_classes - 1}"
            way_out = "Set data.num_classes, or data.source.mask_values to the value of each class."
            ignored = ""
            if (also := self._ignored_value) is not None:
                ignored = f" or {also} (ignored)"
            elif value == self.ignore_index:  # a class has this index
                way_out = f"To ignore it, put {value} first in data.source.mask_values, and "
                way_out += "use data.ignore_index=0 with one class more."
            raise DataError(
                f"{shown(self.masks[index])}: the value {value} is not one of the classes "
                f"{known}{ignored}. {way_out}"
            )
        return classes.to(self._dtype)

    @cached_property
    def _class_of(self) -> Tensor:
        """The class of each value of a pixel, (65536,), or NO_CLASS."""
        table = torch.full((NUM_VALUES,), NO_CLASS)
        if (ignored := self._ignored_value) is not None:
            table[ignored] = ignored
        values = range(self.num_classes) if self.mask_values is None else self.mask_values
        table[list(values)] = torch.arange(self.num_classes)
        return table

    @property
    def _ignored_value(self) -> int | None:
        """The value of pixels that are ignored beside all classes, if there is one.

        With `mask_values`, an index below their number is that of a class, and no pixel's value.
        """
        index, least = self.ignore_index, 0 if self.mask_values is None else self.num_classes
        return index if index is not None and least <= index < NUM_VALUES else None

    @property
    def _dtype(self) -> torch.dtype:
        largest = max(self.num_classes - 1, self.ignore_index or 0)
        return torch.uint8 if largest < 256 else torch.int64

    def subset(self, indices: Tensor) -> MaskFiles:
        chosen = indices.tolist()
        files = [self.files[index] for index in chosen]
        masks = [self.masks[index] for index in chosen]
        groups = None if self.groups is None else [self.groups[index] for index in chosen]
        return dataclasses.replace(self, files=files, masks=masks, groups=groups)

    @property
    def ids(self) -> list[str]:
        """The files' paths below the root."""
        return [os.path.relpath(file, self.root) for file in self.files]

    def augmented(self, transform: Callable[..., Any]) -> MaskFiles:
        """Return the same examples, with `transform` in place of Resize and CenterCrop.

        It is called with a PIL image and a `torchvision.tv_tensors.Mask`, and returns both.
        """
        return dataclasses.replace(self, transform=transform)

    def keys(self) -> list[Hashable]:
        """Return a key per image, equal for copies, whatever their masks."""
        return list(contents_of(self.files, self.root))

    def fingerprint(self) -> str:
        """Return the SHA-256 over the contents of images and masks in order."""
        digest = hashlib.sha256(f"{self.mask_values}\n".encode())
        images, masks = (contents_of(files, self.root) for files in (self.files, self.masks))
        for image, mask in zip(images, masks, strict=True):
            digest.update(f"{image.hex()} {mask.hex()}\n".encode())
        return digest.hexdigest()


def mask_folder(
    *,
    root: str,
    images_in: str,
    masks_in: str,
    mask_suffix: str,
    mask_values: list[int] | None,
    input_shape: list[int],
    resize: int | str | None,
    num_classes: int,
    ignore_index: int | None,
    class_names: list[str] | None,
    exif_orientation: bool,
    sets: list[str] | None,
    extensions: list[str] | None,
    leave_out: list[str],
    val_fraction: float,
    test_fraction: float,
    folds: int | None,
    fold: int,
    group: int | None,
    seed: int,
) -> Splits:
    """Return the splits of images and masks of the same names, in folders of these layouts.

    root/train/images and root/train/masks, root/<set>/…; or root/images/train and root/masks/train,
    …; or root/images and root/masks alone. The mask of images/a/b.jpg is masks/a/b<mask_suffix>
    with any suffix of an image. Val and test without their own folders are cut from the training
    images by their fractions. With `group`, images with the same folders down to this depth below
    `images_in` are on one side of every cut.
    """
    check_fractions(val_fraction, test_fraction, folds, fold)
    channels, size, side = check_size(input_shape, resize)
    counts = {len(mask_values), len({*mask_values})} if mask_values is not None else {num_classes}
    if counts != {num_classes}:
        raise UserError(
            f"data.source.mask_values={mask_values} must be {num_classes} different values, as "
            f"data.num_classes={num_classes}. Give the value of each class."
        )
    reading = Reading(extensions, tuple(leave_out), exif_orientation)
    folder, left_out = root_of(root, reading)
    shared = (size, channels, side, root, exif_orientation, num_classes, ignore_index)
    own = {}
    places = _places(folder, images_in, masks_in, sets)
    _look_around(folder, [it for pair in places.values() for it in pair], reading, left_out)
    for name, (of_images, of_masks) in places.items():
        pairs = _pairs(of_images, of_masks, mask_suffix, reading, left_out)
        files, found = ([str(pair[side]) for pair in pairs] for side in (0, 1))
        groups = None
        if group is not None:
            groups = [group_of(file.relative_to(of_images), group, file) for file, _ in pairs]
        own[name] = MaskFiles(files, found, *shared, mask_values, groups)
    left_out.check_named(leave_out)
    if folds is not None and "test" in own:
        raise UserError(
            f"data.folds={folds}: {folder} has a test split of its own. Use data.folds=null, or "
            "move it away."
        )
    all_files = [file for split in own.values() for file in split.files]
    keys = keys_across(own, root)
    notes = (str(left_out), frames(all_files), _note_of_values(own["train"]))
    strata = np.zeros(len(own["train"]), np.int64)  # all are alike
    return completed(
        *(own, keys, strata, val_fraction, test_fraction, seed, folds, fold),
        class_names=text_names(class_names),
        resize=side,
        reading=reading,
        notes=[line for line in notes if line],
    )


def _places(
    root: Path, images_in: str, masks_in: str, sets: list[str] | None
) -> dict[str, tuple[Path, Path]]:
    """Return the folders of images and masks of each split that has its own."""
    for layout, beside in (("{name}/{kind}", root), ("{kind}/{name}", root / images_in)):
        names = sorted(path.name for path in beside.iterdir()) if is_folder(beside) else []
        found = {
            name: tuple(
                root / layout.format(name=name, kind=kind) for kind in (images_in, masks_in)
            )
            for name in names
        }
        found = {name: pair for name, pair in found.items() if is_folder(pair[0])}
        if "train" not in found:
            continue
        if missing := [name for name in sets or () if name not in found]:
            raise UserError(
                f"data.source.sets={sets}: {beside} holds no images of {missing[0]} beside train."
            )
        named = [name for name in (found if sets is None else sets) if name not in NAMES]
        for name in named:
            check_name(name)
        chosen = [*(name for name in NAMES if name in found), *named]
        return {name: (found[name][0], found[name][1]) for name in chosen}
    if is_folder(root / images_in):
        inside = [name for name in names if is_folder(root / images_in / name)]
        if are_like_splits(inside):
            raise UserError(
                f"data.root={root}: {images_in} holds {' and '.join(inside)}, but no folder train. "
                f"Rename them to train, val and test, there and in {masks_in}."
            )
        return {"train": (root / images_in, root / masks_in)}
    raise UserError(
        f"data.root={root} has no folder train/{images_in}, {images_in}/train or {images_in}. Put "
        f"the images there and the masks into {masks_in} beside it, or name the folders: "
        "data.source.images_in=… data.source.masks_in=…"
    )


def _look_around(root: Path, read: Collection[Path], reading: Reading, left_out: LeftOut) -> None:
    """Add everything below `root` that lies beside the folders `read` to `left_out`."""
    root, *read = (Path(os.path.normpath(folder)) for folder in (root, *read))
    above = {it for folder in read for it in folder.parents if it.is_relative_to(root)}
    for folder in sorted(above):
        if any(folder.is_relative_to(it) for it in read):  # its walk has seen the rest
            continue
        names = [it.name for it in (*above, *read) if it.parent == folder]
        look_beside(folder, names, reading, "beside the images and masks", left_out)


def _pairs(
    images: Path, masks: Path, mask_suffix: str, reading: Reading, left_out: LeftOut
) -> list[tuple[Path, Path]]:
    """Return each image of a folder with its mask, sorted. Raises DataError for one without."""
    if not is_folder(masks):
        raise DataError(f"{shown(masks)}: there is no such folder. It holds the masks of {images}.")
    of_name: dict[Path, Path] = {}
    for mask in find_images(masks, reading, left_out):
        name = mask.relative_to(masks).with_suffix("")
        if name in of_name:
            raise DataError(f"{shown(mask)} and {of_name[name].name} mask one image. Remove one.")
        of_name[name] = mask
    files = find_images(images, reading, left_out)
    if not files:
        raise DataError(
            f"{shown(images)} holds no images, so that the split is empty.{left_out.sentence()}"
        )
    found = []
    used = set()
    for file in files:
        name = file.relative_to(images).with_suffix("")
        name = name.with_name(f"{name.name}{mask_suffix}")
        if name not in of_name:
            raise DataError(
                f"{shown(file)} has no mask: no image {shown(masks / name)}.* is there. Add it, "
                "remove the image, or set data.source.mask_suffix to the end of the masks' names."
                f"{left_out.sentence()}"
            )
        found.append((file, of_name[name]))
        used.add(name)
    for name in sorted(of_name.keys() - used):
        left_out.add("masks without an image", of_name[name])
    return found


def _note_of_values(train: MaskFiles) -> str:
    """Return a note if the first masks hold 0 and `ignore_index` alone: it may be a class."""
    if train.mask_values is not None or train.ignore_index is None:
        return ""
    values: set[int] = set()
    for mask in train.masks[:NUM_LOOKED_AT]:
        values.update(np.unique(np.array(load_mask(mask))).tolist())
    if values != {0, train.ignore_index}:
        return ""
    return (
        f"the first masks hold 0 and {train.ignore_index} alone, and {train.ignore_index} is "
        f"ignored. If it is a class, set 'data.source.mask_values=[0,{train.ignore_index}]'"
    )


def _pixels(image: Image) -> str:
    return f"{image.width} x {image.height}"


def as_written(classes: Tensor, values: Sequence[int] | None) -> Image:
    """Return class indices (H, W) as a mask's PIL image, with the value of each class.

    8 bits per pixel, or 16 if a value needs them.
    """
    from PIL import Image

    pixels = classes.cpu().numpy() if values is None else np.asarray(values)[classes.cpu().numpy()]
    return Image.fromarray(pixels.astype(np.uint8 if pixels.max(initial=0) < 256 else np.uint16))
