"""Decode images: which files are read, and how they are turned, resized and made tensors."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from regrow.config.class_folders import NOT_READ, OPENED_AS, formats_by_suffix
from regrow.errors import DataError, brief
from regrow.feeding.files import shown, unreadable
from regrow.feeding.transforms import applied

if TYPE_CHECKING:
    from PIL.Image import Image

AnImage = TypeVar("AnImage", "Image", Tensor, "Image | Tensor")
Decode = Callable[[Tensor, int, bool], Tensor]  # torchvision's operator: bytes, mode, upright

# Formats that often hold several frames, of which the first is read.
OF_FRAMES = frozenset({"AVIF", "DCX", "FLI", "GIF", "MPO", "PSD", "TIFF", "WEBP"})
NUM_LOOKED_AT = 256  # files opened to check for several frames
TURNED = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE",
          6: "ROTATE_270", 7: "TRANSVERSE", 8: "ROTATE_90"}  # fmt: skip
# Those that swap width and height.
SIDEWAYS = ("TRANSPOSE", "TRANSVERSE", "ROTATE_90", "ROTATE_270")
DECODERS = ("pillow", "torchvision")
AUTO = "auto"
OF_JPEG = b"\xff\xd8"  # the first bytes of one
OF_TORCHVISION = ("image_stable.so", "image.so")  # names of its library, since 0.29 and before
UNCHANGED = 0  # torchvision.io.ImageReadMode: colours as RGB, grey as grey


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
    path: str | Path, channels: int, *, exif_orientation: bool, content: bytes | None = None
) -> Image:
    """Return the first frame as a PIL image in grey (1 channel) or RGB (3), upright on request.

    Drops transparency, like torchvision. `content` is read in place of the file. Raises DataError,
    which names the file, also for grey pixels of more than 8 bits, which Pillow would clip to
    white.
    """
    from PIL import Image

    formats = formats_for(Path(path).suffix.lower())
    source = path if content is None else io.BytesIO(content)
    with opened(path), Image.open(source, formats=formats) as file:
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
    decode = jpeg_decoder() if decoder == "torchvision" else None
    if decode is not None:
        encoded = content or b""
        if content is None:
            with opened(path), Path(path).open("rb") as file:
                encoded = file.read(2)
                encoded += file.read() if encoded == OF_JPEG else b""
        if encoded.startswith(OF_JPEG):
            with contextlib.suppress(Exception):  # Pillow decodes it, or says why it cannot
                pixels = _jpeg(path, encoded, channels, decode, exif_orientation=exif_orientation)
                if pixels is not None:
                    return pixels
    image = load_image(path, channels, exif_orientation=exif_orientation, content=content)
    return image if decoder == "pillow" else pixels_of(image)


def _jpeg(
    path: str | Path, content: bytes, channels: int, decode: Decode, *, exif_orientation: bool
) -> Tensor | None:
    """Return the pixels of a JPEG, or None for a kind that torchvision may decode differently.

    Raises any error.
    """
    from PIL import Image

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
def jpeg_decoder() -> Decode | None:
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
                decode: Decode = torch.ops.image.decode_jpeg
                return decode
    return None


def turned(pixels: Tensor, method: str | None) -> Tensor:
    """Return (C, H, W) pixels transposed as Pillow's `Transpose` of this name does."""
    if method is None:
        return pixels
    if method in SIDEWAYS:
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
    """Return (H, W) of the image that `load_image` returns, mostly from the file's header alone."""
    from PIL import Image

    with opened(path), Image.open(path, formats=formats_for(Path(path).suffix.lower())) as file:
        if file.format == "TIFF" and _turn_of(file) is not None:
            file.load()  # which turns it; versions of Pillow differ in the size before
        is_turned = exif_orientation and _turn_of(file) in SIDEWAYS
        return (file.width, file.height) if is_turned else (file.height, file.width)


def fit(
    image: AnImage, size: Sequence[int], resize: int | None, *, nearest: bool = False
) -> AnImage:
    """Return an image, or uint8 pixels (C, H, W), scaled to `size` (H, W), `nearest` for a mask.

    With `resize`, the shorter side is scaled to it and the centre is cropped. The pixels are the
    same as from torchvision's Resize and CenterCrop on a PIL image, or on a tensor.
    """
    return centred(uncropped(image, size, resize, nearest=nearest), size)


def uncropped(
    image: AnImage, size: Sequence[int], resize: int | None, *, nearest: bool = False
) -> AnImage:
    """Return what `fit` crops: the shorter side is `resize`, or without it, all is scaled."""
    height, width = size if resize is None else scaled_size(*sides(image), resize)
    return scaled(image, (height, width), nearest=nearest)


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
    if sides(image) == (height, width):
        return image
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
