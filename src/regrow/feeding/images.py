"""Folders of images: their classes and splits. Errors name the file."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from regrow.config.class_folders import classes_in_words, formats_by_suffix, is_hidden, suffixes_of
from regrow.config.rules import require
from regrow.errors import DataError, UserError, listed
from regrow.feeding.decoding import (
    AUTO,
    NUM_LOOKED_AT,
    OF_FRAMES,
    augmented_by,
    centred,
    formats_for,
    load,
    to_tensor,
    uncropped,
)
from regrow.feeding.files import (
    LeftOut,
    contents_of,
    find_files,
    is_folder,
    key_of_ends,
    keys_of_copies,
    of_two_classes,
    shown,
    unreadable,
)
from regrow.feeding.splits import (
    NAMES,
    Reading,
    Splits,
    are_like_splits,
    check_fractions,
    check_name,
    cut,
    origins_of,
    text_names,
)

if TYPE_CHECKING:
    from PIL.Image import Image


class Resized(Protocol):
    """Images of a data set that were resized before, by their numbers."""

    def read(self, index: int) -> Tensor | None: ...
    def subset(self, indices: list[int]) -> Resized: ...


@dataclass(frozen=True)
class ImageFiles:
    """A map-style data set of image files: item i is a uint8 image (C, H, W) and its class.

    A transform gets a PIL image; if it has the attribute `takes`, "pixels" is for uint8 (C, H, W)
    from the decoder torchvision, and "resized" for uint8 (C, H, W) of the resized image, whose
    shorter side is `resize`. These may also come from `resized`, with the same bytes.
    """

    files: list[str]
    classes: list[int]
    size: list[int]  # H, W
    channels: int
    resize: int | None
    root: str
    exif_orientation: bool
    identity: str
    decoder: str = "pillow"
    transform: Callable[[Any], Any] | None = None
    groups: list[str] | None = None
    resized: Resized | None = None

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._pixels(index), self.classes[index]

    def _pixels(self, index: int) -> Tensor:
        if self.transform is None:
            return to_tensor(centred(self._resized(index), self.size))
        if getattr(self.transform, "takes", None) == "resized":
            image: Image | Tensor = to_tensor(self._resized(index))
        else:
            image = self.decoded(self.files[index])
        return augmented_by(self.transform, image)

    def _load(self, file: str, decoder: str, content: bytes | None = None) -> Image | Tensor:
        return load(
            file,
            self.channels,
            exif_orientation=self.exif_orientation,
            decoder=decoder,
            content=content,
        )

    def decoded(self, file: str) -> Image | Tensor:
        """Return a file's image as `transform` takes it. Raises BrokenImage, DataError, OSError."""
        takes = getattr(self.transform, "takes", "image" if self.transform else "pixels")
        return self._load(file, self.decoder if takes in ("pixels", "resized") else "pillow")

    def _resized(self, index: int) -> Image | Tensor:
        found = None if self.resized is None else self.resized.read(index)
        return self.resized_file(self.files[index]) if found is None else found

    def resized_file(self, file: str, content: bytes | None = None) -> Image | Tensor:
        """Return a file's image with a shorter side of `resize`. Raises DataError.

        Without `resize`, the image is scaled to `size`.
        """
        return uncropped(self._load(file, self.decoder, content), self.size, self.resize)

    def subset(self, indices: Tensor) -> ImageFiles:
        chosen = indices.tolist()
        files = [self.files[index] for index in chosen]
        classes = [self.classes[index] for index in chosen]
        groups = None if self.groups is None else [self.groups[index] for index in chosen]
        resized = None if self.resized is None else self.resized.subset(chosen)
        return dataclasses.replace(
            self, files=files, classes=classes, groups=groups, resized=resized
        )

    @property
    def targets(self) -> list[int]:
        """The class of each file, as data sets of torchvision name it."""
        return self.classes

    @property
    def ids(self) -> list[str]:
        """The files, relative to the root."""
        return [os.path.relpath(file, self.root) for file in self.files]

    def augmented(self, transform: Callable[[Any], Any]) -> ImageFiles:
        """Return the same examples, with `transform` in place of Resize and CenterCrop."""
        return dataclasses.replace(self, transform=transform)

    def keys(self) -> list[Hashable]:
        """Return a key per file, equal for copies: see `identity` in the data set's config."""
        if self.identity == "ends":
            return [key_of_ends(file) for file in self.files]
        return list(contents_of(self.files, self.root))

    def fingerprint(self) -> str:
        """Return the SHA-256 over classes and contents in order.

        With identity "ends" it is over classes, file names and sizes.
        """
        digest = hashlib.sha256()
        if self.identity == "ends":
            for file, target in zip(self.files, self.classes, strict=True):
                path = Path(file)
                digest.update(
                    f"{target}/{path.parent.name}/{path.name}:{path.stat().st_size}\n".encode(
                        errors="surrogateescape"
                    )
                )
            return digest.hexdigest()
        contents = contents_of(self.files, self.root)
        for target, content in zip(self.classes, contents, strict=True):
            digest.update(f"{target}:{content.hex()}\n".encode())
        return digest.hexdigest()


def find_images(folder: Path, reading: Reading, left_out: LeftOut) -> list[Path]:
    """Return the image files below the folder, sorted by path; others are added to `left_out`."""
    return find_files(folder, suffixes_of(reading.extensions), reading.leave_out, left_out)


def image_folder(
    *,
    root: str,
    input_shape: list[int],
    resize: int | str | None,
    num_classes: int,
    class_names: list[str] | None,
    decoder: str,
    exif_orientation: bool,
    sets: list[str] | None,
    extensions: list[str] | None,
    leave_out: list[str],
    identity: str,
    val_fraction: float,
    test_fraction: float,
    folds: int | None,
    fold: int,
    group: int | None,
    seed: int,
) -> Splits:
    """Return the splits of root/<class>/…, or of root/train/<class>/…, root/<set>/<class>/….

    Val and test without their own folders are cut from the training images by their fractions.
    With `group`, images with the same folders down to this depth below their class's folder are on
    one side of every cut, whatever their class.
    """
    check_fractions(val_fraction, test_fraction, folds, fold)
    channels, size, side = check_size(input_shape, resize)
    if identity not in ("contents", "ends"):
        raise UserError(f"data.source.identity={identity} is not one of contents, ends.")
    require("data.source.decoder", decoder)
    reading = Reading(extensions, tuple(leave_out), exif_orientation, decoder)
    folder, left_out = root_of(root, reading)
    inside = _folders(folder, reading)
    class_names = text_names(class_names)
    are_classes = class_names is not None and sorted(class_names) == inside
    names = [name for name in NAMES if name in inside and not are_classes]
    lone, way_out = names, "Add train/<class>/…"
    if not are_classes and are_like_splits(inside):
        lone, way_out = inside, "Rename them to train, val and test"
    if lone and "train" not in names:
        raise UserError(
            f"data.root={root} holds {' and '.join(lone)}, but no folder train. {way_out}"
            f", or, if {lone[0]} is a class, name all classes in data.class_names."
        )
    folders = {name: folder / name for name in names} if "train" in names else {"train": folder}
    found = _folders(folders["train"], reading)
    if folds is not None and "test" in folders:
        raise UserError(
            f"data.folds={folds}: {folders['test']} is a test split of its own. Use "
            "data.folds=null, or move it away."
        )
    if missing := [name for name in sets or () if "train" not in names or name not in inside]:
        raise UserError(
            f"data.source.sets={sets}: {folder} holds no folder {missing[0]} beside a folder train."
        )
    if not found:
        or_class = ", or, if train is a class, name all classes in data.class_names" * bool(names)
        raise UserError(
            f"data.root={root}: {folders['train']} holds no folders of classes. It should hold a "
            f"folder for each class, with its images{or_class}."
        )
    if len(found) != num_classes or (class_names is not None and sorted(class_names) != found):
        given = f" and data.class_names={class_names}" if class_names is not None else ""
        raise UserError(
            f"data.num_classes={num_classes}{given}, but {folders['train']} holds "
            + classes_in_words(
                folders["train"],
                found,
                num_classes,
                lambda inside: _folders(inside, reading),
                lambda inside: len(find_images(inside, reading, LeftOut(inside))),
            )
        )
    classes = class_names or found
    if "train" in names:
        for name in inside if sets is None else sets:
            if name not in NAMES and (sets or {*_folders(folder / name, reading)} & {*classes}):
                check_name(name)
                folders[name] = folder / name
        look_beside(folder, [*folders], reading, "beside train and the sets", left_out)

    def read(where: Path) -> ImageFiles:
        if others := [name for name in _folders(where, reading) if name not in classes]:
            raise DataError(f"{where / others[0]} is none of the classes {listed(classes)}.")
        look_beside(where, classes, reading, "beside the class folders", left_out)
        paths = [(path, number) for number, name in enumerate(classes)
                 for path in _of_class(where / name, folder, reading, left_out)]  # fmt: skip
        why = left_out.sentence()
        if not paths:
            raise DataError(f"{where} holds no images, so that the split is empty.{why}")
        missing = set(range(len(classes))) - {number for _, number in paths}
        if missing and where == folders["train"]:
            name = classes[min(missing)]
            raise DataError(
                f"{where / name} holds no images to train on. Add some, or remove the folder"
                f" and set data.num_classes={len(classes) - len(missing)}.{why}"
            )
        files = [str(path) for path, _ in paths]
        numbers = [number for _, number in paths]
        groups = None
        if group is not None:
            groups = [
                group_of(Path(*path.relative_to(where).parts[1:]), group, path) for path, _ in paths
            ]
        return ImageFiles(
            *(files, numbers, size, channels, side, root, exif_orientation, identity, decoder),
            groups=groups,
        )

    own = {name: read(where) for name, where in folders.items()}
    left_out.check_named(reading.leave_out)
    by_ends = identity == "ends"
    keys = {name: it.keys() for name, it in own.items()} if by_ends else keys_across(own, root)
    labels = [(file, classes[it]) for split in own.values()
              for file, it in zip(split.files, split.classes, strict=True)]  # fmt: skip
    # Equal ends do not prove that two files are copies.
    known = [] if by_ends else [key for name in own for key in keys[name]]
    notes = (str(left_out), frames(own["train"].files), of_two_classes(labels, known))
    strata = np.array(own["train"].classes)
    return completed(
        *(own, keys, strata, val_fraction, test_fraction, seed, folds, fold),
        class_names=classes,
        resize=side,
        reading=reading,
        notes=[line for line in notes if line],
    )


def completed(
    own: Mapping[str, Any],
    keys: Mapping[str, list[Hashable]],
    strata: npt.NDArray[Any],
    val_fraction: float,
    test_fraction: float,
    seed: int,
    folds: int | None,
    fold: int,
    **facts: Any,
) -> Splits:
    """Return the splits of files, with val and test that are not among `own` cut from train.

    `keys` are those of `own`, and `strata` those of train. `facts` are further fields of Splits.
    """
    train = own["train"]
    found, known_keys = dict(own), dict(keys)
    parts = cut(
        keys["train"],
        strata,
        val_fraction=0.0 if "val" in own else val_fraction,
        test_fraction=0.0 if "test" in own else test_fraction,
        seed=seed,
        folds=folds,
        fold=fold,
        groups=train.groups,
    )
    for name, part in zip(NAMES, parts, strict=True):
        if part is not None:
            found[name] = train.subset(part)
            known_keys[name] = [keys["train"][index] for index in part.tolist()]
    return Splits(
        *(found["train"], found.get("val"), found.get("test")),
        {name: split for name, split in own.items() if name not in NAMES},
        reads_images=True,
        known_keys=known_keys,
        origins=origins_of(val_fraction, test_fraction, folds, fold, given=own),
        **facts,
    )


def root_of(root: str, reading: Reading) -> tuple[Path, LeftOut]:
    """Return the folder of all images, and where to count the files that are left out.

    Raises UserError if there is no such folder, or for an unknown suffix.
    """
    if not is_folder(Path(root)):
        raise UserError(f"data.root={root}: not a folder. Set it to the folder of images.")
    suffixes_of(reading.extensions)  # check before reading any folder
    return Path(root), LeftOut(Path(root))


def check_size(
    input_shape: list[int], resize: int | str | None
) -> tuple[int, list[int], int | None]:
    """Return the channels, (H, W), and the shorter side before the centre crop, if there is one.

    With auto, that crop takes the share of ImageNet's evaluations: 224 of 256. Raises UserError for
    a wrong shape or resize.
    """
    channels, *size = input_shape
    if channels not in (1, 3) or len(size) != 2:
        raise UserError(
            f"data.input_shape={input_shape}: not an image's shape. Use [3, height, width] or "
            "[1, height, width]."
        )
    if resize == AUTO:
        return channels, size, round(max(size) * 256 / 224)
    if isinstance(resize, str):
        raise UserError(f"data.source.resize={resize} is not {AUTO}, an integer or null.")
    if resize is not None and resize < max(size):
        raise UserError(
            f"data.source.resize={resize} is smaller than the crop {size[0]} x {size[1]} of "
            f"data.input_shape. Use {max(size)} or more."
        )
    return channels, size, resize


def group_of(path: Path, depth: int, whole: Path) -> str:
    """Return the folders of `path`, below its class or split, down to `depth`."""
    inside = path.parts[:-1]
    if len(inside) < depth:
        raise DataError(
            f"{shown(whole)} is in no folder of depth {depth} below its class or split, so that "
            f"data.source.group={depth} gives it no group. Move it, or use data.source.group=null."
        )
    return "/".join(inside[:depth])


def class_folders(root: str) -> list[str]:
    """Return the names of the classes of an image folder. Raises UserError, DataError."""
    folder, _ = root_of(root, Reading())
    names = _folders(folder, Reading())
    return _folders(folder / "train", Reading()) if "train" in names else names


def _folders(folder: Path, reading: Reading) -> list[str]:
    """Return the names of the folders in `folder`, including links, sorted. Raises DataError."""
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if entry.is_dir()]
    except OSError as error:
        raise unreadable(folder, error) from None
    if "hidden" in reading.leave_out:
        names = [name for name in names if not is_hidden(name)]
    for name in names:
        if not name.isprintable():
            raise DataError(
                f"{shown(folder / name)}: a folder's name must be printable UTF-8, since it is "
                "the name of a class. Rename it."
            )
    return sorted(names)


def look_beside(
    folder: Path, read: Sequence[str], reading: Reading, where: str, left_out: LeftOut
) -> None:
    """Add everything in `folder` to `left_out`, except the folders `read`."""
    for name in sorted(path.name for path in folder.iterdir()):
        if "hidden" in reading.leave_out and is_hidden(name):
            left_out.add("hidden", folder / name)
        elif name not in read:
            left_out.add(where, folder / name)


def _of_class(folder: Path, root: Path, reading: Reading, left_out: LeftOut) -> list[Path]:
    """Return the images of a class; none if a split lacks its folder."""
    if not is_folder(folder):
        return []
    if folder.is_symlink() and root.resolve().is_relative_to(folder.resolve()):
        raise DataError(f"{shown(folder)} is a link to a folder around it. Remove the link.")
    return find_images(folder, reading, left_out)


def keys_across(own: Mapping[str, Any], root: str) -> dict[str, list[Hashable]]:
    """Return a key per file of each split. Copies have equal keys across all splits."""
    keys = iter(keys_of_copies([file for split in own.values() for file in split.files], root))
    return {name: [next(keys) for _ in split.files] for name, split in own.items()}


def frames(files: Sequence[str]) -> str:
    """Return a note if some files hold several frames, else "". Checks a sample of the files."""
    from PIL import Image

    formats = formats_by_suffix()
    able = [f for f in files if formats.get(Path(f).suffix.lower()) in OF_FRAMES]
    able = able[:: max(1, -(-len(able) // NUM_LOOKED_AT))]
    several = []
    for file in able:
        with contextlib.suppress(Exception):  # broken files are reported when read
            suffix = Path(file).suffix.lower()
            with Image.open(file, formats=formats_for(suffix)) as image:
                if getattr(image, "is_animated", False):
                    several.append(file)
    if not several:
        return ""
    looked_at = f"{len(several):,} of {len(able):,} files looked at"
    return f"the first frame is read of files with several: {looked_at}, such as {several[0]}"
