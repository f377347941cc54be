"""Images in files. Errors name the file."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import io
import os
import re
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from regrow.errors import DataError, UserError, brief
from regrow.feeding.files import (
    LeftOut,
    contents_of,
    find_files,
    is_folder,
    is_hidden,
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
    check_fractions,
    check_name,
    cut,
    origins_of,
    text_names,
)
from regrow.feeding.transforms import applied

if TYPE_CHECKING:
    from PIL.Image import Image

AnImage = TypeVar("AnImage", "Image", Tensor, "Image | Tensor")

# Formats that Pillow registers but that are not read: they need another program, are only
# identified, or may contain a file of any format, including one that another program would run.
NOT_READ = {
    "EPS": "goes to Ghostscript, which runs it as a program",
    "WMF": "needs Windows",
    "BUFR": "is identified only",
    "GRIB": "is identified only",
    "HDF5": "is identified only",
    "MPEG": "is a video, identified only",
    "IPTC": "may contain any other format, EPS too",
    "FPX": "needs the package olefile",
    "MIC": "needs the package olefile",
}
# Formats that another format's decoder opens.
OPENED_AS = {"MPO": "JPEG"}
# Formats that often hold several frames, of which the first is read.
OF_FRAMES = frozenset({"AVIF", "DCX", "FLI", "GIF", "MPO", "PSD", "TIFF", "WEBP"})
NUM_LOOKED_AT = 256  # files opened to check for several frames
TURNED = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE",
          6: "ROTATE_270", 7: "TRANSVERSE", 8: "ROTATE_90"}  # fmt: skip
SIDEWAYS = (5, 6, 7, 8)  # orientations that swap width and height
DECODERS = ("pillow", "torchvision")
AUTO = "auto"
OF_JPEG = b"\xff\xd8"  # the first bytes of one
OF_TORCHVISION = ("image_stable.so", "image.so")  # names of its library, since 0.29 and before
UNCHANGED = 0  # torchvision.io.ImageReadMode: colours as RGB, grey as grey


@functools.cache
def formats_by_suffix() -> dict[str, str]:
    """Return the raster formats that Pillow decodes by itself, by lower-case suffix."""
    from PIL import Image

    found = Image.registered_extensions()
    return {
        suffix: name
        for suffix, name in sorted(found.items())
        if OPENED_AS.get(name, name) in Image.OPEN and name not in NOT_READ
    }


def suffixes_of(extensions: Sequence[str] | None) -> frozenset[str]:
    """Return the suffixes to read; None: all that Pillow decodes by itself. Raises UserError."""
    known = formats_by_suffix()
    if extensions is None:
        return frozenset(known)
    chosen = frozenset(f".{extension.lower().lstrip('.')}" for extension in extensions)
    if unknown := sorted(chosen - known.keys()):
        raise UserError(
            f"data.source.extensions: Pillow does not decode {unknown[0]} by itself. Convert these "
            f"files, or choose from {', '.join(sorted(known))}."
        )
    return chosen


@functools.cache
def formats_for(suffix: str) -> tuple[str, ...]:
    """Return the formats that a file's content may have; its suffix may be wrong.

    Pillow would pass PostScript of any suffix to Ghostscript. A format without a magic number, such
    as TGA, accepts many broken files, so it is allowed only for its own suffix.
    """
    from PIL import Image

    own = formats_by_suffix().get(suffix)
    own = OPENED_AS.get(str(own), own)
    accepted = [name for name, (_, accepts) in Image.OPEN.items() if accepts or name == own]
    common = ("JPEG", "PNG", "TIFF", "WEBP", "BMP", "GIF", "PPM")
    allowed = [name for name in accepted if name not in NOT_READ]
    return tuple(sorted(allowed, key=lambda name: (name not in common, allowed.index(name))))


def load_image(
    path: str | Path, channels: int, *, exif_orientation: bool, content: IO[bytes] | None = None
) -> Image:
    """Return the first frame as a PIL image in grey (1 channel) or RGB (3), upright on request.

    Drops transparency, like torchvision. `content` is read in place of the file. Raises DataError,
    which names the file, also for grey pixels of more than 8 bits, which Pillow would clip to
    white.
    """
    from PIL import Image

    formats = formats_for(Path(path).suffix.lower())
    with opened(path), Image.open(path if content is None else content, formats=formats) as file:
        return _converted(file, channels, exif_orientation=exif_orientation)


@contextlib.contextmanager
def opened(path: str | Path) -> Iterator[None]:
    """Raise any error of the block, which reads the image, as a DataError that names the file."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            raise unreadable(path, error) from None
        raise _broken(path, error) from None
    except Exception as error:  # decoders raise a dozen different errors
        raise _broken(path, error) from None


def converted(image: Image, channels: int, *, exif_orientation: bool) -> Image:
    """Return an open image as `load_image` does a file. Raises DataError."""
    try:
        return _converted(image, channels, exif_orientation=exif_orientation)
    except Exception as error:  # decoders raise a dozen different errors
        raise DataError(f"inputs: an image that cannot be read: {brief(error)}.") from None


def _converted(file: Image, channels: int, *, exif_orientation: bool) -> Image:
    if file.mode.startswith(("I", "F")):
        raise ValueError(f"{file.mode} pixels have more than 8 bits; convert them to 8")
    # Transparency in a palette only converts by way of RGBA.
    image = file.convert("RGBA") if file.mode == "P" else file
    image = image.convert("L" if channels == 1 else "RGB")
    return _upright(image, file) if exif_orientation else image


class BrokenImage(DataError):
    """An image that cannot be decoded. `file` is its path, and `what` the error without advice."""

    def __init__(self, message: str, file: str = "", what: str = "") -> None:
        super().__init__(message)
        self.file, self.what = file, what


def _broken(path: str | Path, error: Exception) -> BrokenImage:
    reason = re.sub(r" <_io\.[^>]*>", "", brief(error).replace(f" '{path}'", ""))
    what = f"{shown(path)} is not a readable image: {reason}"
    return BrokenImage(f"{what}. Fix or remove the file.", str(path), what)


def _upright(image: Image, file: Image) -> Image:
    """Return `image` turned as the EXIF data of the loaded `file` says (CIPA DC-008, tag 0x0112).

    Pillow turns a TIFF while loading it, and then reports no orientation.
    """
    from PIL.Image import Transpose

    method = _turn_of(file)
    return image if method is None else image.transpose(Transpose[method])


def _turn_of(file: Image) -> str | None:
    """Return the name of Pillow's transposition that turns an image upright; None: it is."""
    try:
        orientation = file.getexif().get(0x0112)
        return TURNED.get(orientation)  # type: ignore[arg-type]
    except Exception:  # damaged EXIF data in a readable image
        return None


def load(
    path: str | Path,
    channels: int,
    *,
    exif_orientation: bool,
    decoder: str,
    content: bytes | None = None,
) -> Image | Tensor:
    """Return the pixels of `load_image`: that PIL image, or uint8 (C, H, W) for torchvision.

    torchvision decodes JPEGs in RGB or grey, where it gives the same bytes as Pillow, 1.2 to 1.5
    times faster. Pillow decodes all other files, and those that torchvision refuses. `content` is
    read in place of the file. Raises DataError.
    """
    how = {"exif_orientation": exif_orientation}
    if decoder == "torchvision" and jpeg_decoder() is not None:
        with opened(path), _stream(path, content) as file:
            encoded = file.read(2)
            encoded += file.read() if encoded == OF_JPEG else b""
        if encoded.startswith(OF_JPEG):
            with contextlib.suppress(Exception):  # Pillow decodes it, or says why it cannot
                pixels = _jpeg(path, encoded, channels, **how)
                if pixels is not None:
                    return pixels
    stream = None if content is None else io.BytesIO(content)
    image = load_image(path, channels, content=stream, **how)
    return image if decoder == "pillow" else pixels_of(image)


def _stream(path: str | Path, content: bytes | None) -> IO[bytes]:
    return Path(path).open("rb") if content is None else io.BytesIO(content)


def _jpeg(
    path: str | Path, content: bytes, channels: int, *, exif_orientation: bool
) -> Tensor | None:
    """Return the pixels of a JPEG, or None for a kind that torchvision may decode differently.

    Raises any error.
    """
    from PIL import Image

    decode = jpeg_decoder()
    assert decode is not None
    formats = formats_for(Path(path).suffix.lower())
    with Image.open(io.BytesIO(content), formats=formats) as file:
        # CMYK is converted in another way. So is grey from colours, which would be the Y of YCbCr.
        if file.format not in ("JPEG", "MPO") or file.mode not in ("L", "RGB"):
            return None
        if file.mode == "RGB" and channels == 1:
            return None
        method = _turn_of(file) if exif_orientation else None
    encoded = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    return turned(decode(encoded, UNCHANGED, False), method).expand(channels, -1, -1)


@functools.cache
def jpeg_decoder() -> Callable[[Tensor, int, bool], Tensor] | None:
    """Return torchvision's decoder of JPEGs; None without it.

    That is the operator of its library. Its function in Python, `decode_jpeg`, is deprecated and
    warns for each image. The whole package also takes over a second to import. Without the library,
    Pillow gives the same bytes.
    """
    package = importlib.util.find_spec("torchvision")
    folders = () if package is None else package.submodule_search_locations or ()
    for path in (Path(folder, name) for folder in folders for name in OF_TORCHVISION):
        with contextlib.suppress(OSError, AttributeError):
            if path.exists():
                torch.ops.load_library(path)  # type: ignore[no-untyped-call]
                decode: Callable[[Tensor, int, bool], Tensor] = torch.ops.image.decode_jpeg
                return decode
    return None


def turned(pixels: Tensor, method: str | None) -> Tensor:
    """Return (C, H, W) pixels transposed as Pillow's `Transpose` of this name does."""
    if method is None:
        return pixels
    if method in ("TRANSPOSE", "TRANSVERSE", "ROTATE_90", "ROTATE_270"):
        pixels = pixels.transpose(1, 2)
    axes = {
        "FLIP_LEFT_RIGHT": [2],
        "ROTATE_180": [1, 2],
        "FLIP_TOP_BOTTOM": [1],
        "TRANSPOSE": [],
        "ROTATE_270": [2],
        "TRANSVERSE": [1, 2],
        "ROTATE_90": [1],
    }[method]
    return pixels.flip(axes)


def scaled_size(height: int, width: int, resize: int) -> tuple[int, int]:
    """Return (H, W) of an image whose shorter side is scaled to `resize`, as torchvision rounds."""
    shorter = min(height, width)
    return int(resize * height / shorter), int(resize * width / shorter)


def size_of(path: str | Path, *, exif_orientation: bool) -> tuple[int, int]:
    """Return (H, W) of the image that `load_image` returns, from the file's header alone."""
    from PIL import Image

    with opened(path), Image.open(path, formats=formats_for(Path(path).suffix.lower())) as file:
        is_turned = exif_orientation and file.getexif().get(0x0112) in SIDEWAYS
        return (file.width, file.height) if is_turned else (file.height, file.width)


def fit(
    image: AnImage, size: Sequence[int], resize: int | None, *, nearest: bool = False
) -> AnImage:
    """Return an image, or uint8 pixels (C, H, W), scaled to `size` (H, W), `nearest` for a mask.

    With `resize`, the shorter side is scaled to it and the centre is cropped. The pixels are the
    same as from torchvision's Resize and CenterCrop on a PIL image, or on a tensor.
    """
    height, width = size
    if resize is None:
        return scaled(image, (height, width), nearest=nearest)
    return centred(scaled(image, scaled_size(*sides(image), resize), nearest=nearest), size)


def sides(image: Image | Tensor) -> tuple[int, int]:
    """Return (H, W)."""
    if isinstance(image, Tensor):
        return image.shape[1], image.shape[2]
    return image.height, image.width


def scaled(image: AnImage, size: tuple[int, int], *, nearest: bool = False) -> AnImage:
    """Return an image, or uint8 pixels (C, H, W), scaled to `size` (H, W) by bilinear filtering.

    On a tensor it is about four times faster, and up to 0.3 % of a photo's bytes differ by one from
    Pillow's. torch computes them in integers here, so that they depend on neither the machine nor
    the layout in memory; v2's Resize would convert to float32 on processors without AVX2.
    """
    if sides(image) == size:
        return image
    if isinstance(image, Tensor):
        assert not nearest, "masks are read with Pillow"
        batch = image.unsqueeze(0).contiguous(memory_format=torch.channels_last)  # the fast layout
        return F.interpolate(batch, size, mode="bilinear", antialias=True)[0]
    from PIL.Image import Resampling

    how = Resampling.NEAREST if nearest else Resampling.BILINEAR
    return image.resize((size[1], size[0]), how)


def centred(image: AnImage, size: Sequence[int]) -> AnImage:
    """Return the centre (H, W), as torchvision's CenterCrop rounds."""
    height, width = size
    top, left = (round((its - wanted) / 2) for its, wanted in zip(sides(image), size, strict=True))
    if isinstance(image, Tensor):
        return image[:, top : top + height, left : left + width]
    return image.crop((left, top, left + width, top + height))


def to_tensor(image: Image | Tensor) -> Tensor:
    """Return the image as (C, H, W) uint8. Raises DataError for a tensor of another kind."""
    if isinstance(image, Tensor):  # from a transform that ends in tensors
        if image.dtype != torch.uint8 or image.ndim != 3:
            raise DataError(
                f"data.augmentation gave {image.dtype} of shape {list(image.shape)}. Return a PIL "
                "image or a uint8 tensor (C, H, W); data.normalize follows by itself."
            )
        return image.as_subclass(Tensor).contiguous()
    return pixels_of(image).contiguous()


def augmented_by(transform: Callable[[Any], Any], image: Image | Tensor) -> Tensor:
    """Return the augmented image as (C, H, W) uint8. Raises DataError if that fails."""
    advice = "List it in data.transforms to get a uint8 tensor (C, H, W) of data.input_shape"
    return to_tensor(applied(transform, image, key="data.augmentation", advice=advice))


def pixels_of(image: Image) -> Tensor:
    """Return an image's pixels, uint8 (C, H, W), as they lie in memory: channels last."""
    pixels = torch.from_numpy(np.array(image))
    return pixels.unsqueeze(0) if pixels.ndim == 2 else pixels.permute(2, 0, 1)


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
        how = {"exif_orientation": self.exif_orientation, "decoder": decoder, "content": content}
        return load(file, self.channels, **how)  # type: ignore[arg-type]

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
        image = self._load(file, self.decoder, content)
        if self.resize is None:
            return scaled(image, (self.size[0], self.size[1]))
        return scaled(image, scaled_size(*sides(image), self.resize))

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
    check_decoder(decoder)
    reading = Reading(extensions, tuple(leave_out), exif_orientation, decoder)
    folder, left_out = root_of(root, reading)
    inside = _folders(folder, reading)
    class_names = text_names(class_names)
    names = [name for name in NAMES if name in inside]
    lone = [name for name in names if name not in (class_names or ())]
    if lone and "train" not in names:
        raise UserError(
            f"data.root={root} holds {' and '.join(lone)}, but no folder train. Add train/<class>/…"
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
        raise UserError(
            f"data.root={root}: {folders['train']} holds no folders of classes. It should hold a "
            "folder for each class, with its images."
        )
    if len(found) != num_classes or (class_names is not None and sorted(class_names) != found):
        given = f" and data.class_names={class_names}" if class_names is not None else ""
        raise UserError(
            f"data.num_classes={num_classes}{given}, but {folders['train']} holds "
            + _what_is_there(folders["train"], found, num_classes, reading)
        )
    classes = class_names or found
    if "train" in names:
        for name in inside if sets is None else sets:
            if name not in NAMES and (sets or {*_folders(folder / name, reading)} & {*classes}):
                check_name(name)
                folders[name] = folder / name
        _look_beside(folder, [*folders], reading, "beside train and the sets", left_out)

    def read(where: Path) -> ImageFiles:
        if others := [name for name in _folders(where, reading) if name not in classes]:
            raise DataError(
                f"{where / others[0]} is none of the classes {', '.join(classes[:20])}."
            )
        _look_beside(where, classes, reading, "beside the class folders", left_out)
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
    keys = _keys(own, root, identity)
    labels = [(file, classes[it]) for split in own.values()
              for file, it in zip(split.files, split.classes, strict=True)]  # fmt: skip
    # Equal ends do not prove that two files are copies.
    known = [] if identity == "ends" else [key for name in own for key in keys[name]]
    everything = own.pop("train")
    all_files = everything.files
    origins = origins_of(val_fraction, test_fraction, folds, fold, given=own)
    parts = cut(
        keys["train"],
        np.array(everything.classes),
        val_fraction=0.0 if "val" in own else val_fraction,
        test_fraction=0.0 if "test" in own else test_fraction,
        seed=seed,
        folds=folds,
        fold=fold,
        groups=everything.groups,
    )
    chosen = {name: part for name, part in zip(NAMES, parts, strict=True) if part is not None}
    splits = own | {name: everything.subset(part) for name, part in chosen.items()}
    known_keys = {name: keys[name] for name in own} | {
        name: [keys["train"][index] for index in part.tolist()] for name, part in chosen.items()
    }
    return Splits(
        splits["train"],
        splits.get("val"),
        splits.get("test"),
        {name: split for name, split in own.items() if name not in NAMES},
        class_names=classes,
        resize=side,
        reads_images=True,
        known_keys=known_keys,
        origins=origins,
        reading=reading,
        notes=[
            line
            for line in (str(left_out), frames(all_files), of_two_classes(labels, known))
            if line
        ],
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


def check_decoder(decoder: str) -> None:
    """Raise UserError for an unknown decoder."""
    if decoder not in DECODERS:
        raise UserError(f"data.source.decoder={decoder} is not one of {', '.join(DECODERS)}.")


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


def _look_beside(
    folder: Path, read: Sequence[str], reading: Reading, where: str, left_out: LeftOut
) -> None:
    """Add everything in `folder` to `left_out`, except the folders `read`."""
    for name in sorted(path.name for path in folder.iterdir()):
        if "hidden" in reading.leave_out and is_hidden(name):
            left_out.add("hidden", folder / name)
        elif name not in read:
            left_out.add(where, folder / name)


def _what_is_there(folder: Path, found: list[str], num_classes: int, reading: Reading) -> str:
    """Return the folders of classes with their images in words, and the likely correction."""

    def count(name: str, where: Path = folder) -> int:
        return len(find_images(where / name, reading, LeftOut(where)))

    if len(found) == 1:
        inside = folder / found[0]
        inner = _folders(inside, reading)
        if "train" in inner:
            inner, of_classes = _folders(inside / "train", reading), inside / "train"
        else:
            of_classes = inside
        if len(inner) > 1:
            shown_inner = ", ".join(f"{name} {count(name, of_classes)}" for name in inner[:20])
            number = f" data.num_classes={len(inner)}" * (len(inner) != num_classes)
            return (
                f"one folder, {found[0]}, with these folders and images in it: {shown_inner}. If "
                f"these are the classes, set data.root={inside}{number}."
            )
    counts = {name: count(name) for name in found[:20]}
    listed = ", ".join(f"{name} {number}" for name, number in counts.items())
    more = ", …" if len(found) > len(counts) else ""
    said = f"{len(found)} class folders (images): {listed}{more}."
    if empty := [name for name, number in counts.items() if number == 0]:
        *others, last = empty
        those = f"folders {', '.join(others)} and {last} hold" if others else f"folder {last} holds"
        said += f" The {those}"
        if len(found) - len(empty) == num_classes:
            return f"{said} no images: add some, or remove the folder{'s' * bool(others)}."
        said += " no images."
    if len(found) == 1:
        said = said.replace("1 class folders", "one class folder")
        return f"{said} A classifier needs at least two: add a folder for each other class."
    if len(found) == num_classes:
        return f"{said} Set data.class_names to the names of these folders, in quotes."
    return f"{said} Set data.num_classes={len(found)}."


def _of_class(folder: Path, root: Path, reading: Reading, left_out: LeftOut) -> list[Path]:
    """Return the images of a class; none if a split lacks its folder."""
    if not is_folder(folder):
        return []
    if folder.is_symlink() and root.resolve().is_relative_to(folder.resolve()):
        raise DataError(f"{shown(folder)} is a link to a folder around it. Remove the link.")
    return find_images(folder, reading, left_out)


def _keys(own: Mapping[str, ImageFiles], root: str, identity: str) -> dict[str, list[Hashable]]:
    """Return a key per file of each split. Copies have equal keys across all splits."""
    if identity == "ends":
        return {name: split.keys() for name, split in own.items()}
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
