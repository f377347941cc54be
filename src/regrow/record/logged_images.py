"""The images that a run logs: images/<name>/step_<8 digits>.png in its folder."""

from __future__ import annotations

import io
import operator
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from regrow.errors import UserError
from regrow.record.records import write_bytes

if TYPE_CHECKING:
    from torch import Tensor

FOLDER = "images"
NAME = re.compile(r"[\w\-. ]+(/[\w\-. ]+)*")
FILE = re.compile(r"step_(\d{8,})\.png")
DOTS_PER_INCH = 100  # of figures
GAP = 2  # pixels between the images of a batch
NUM_SHOWN = 4  # images of each name on a run's page: the latest
NUM_NAMES = 20  # names on a run's page: those logged last
LONGEST_PART = 200  # bytes of a folder's name; file systems take 255
FAR_ABOVE_1 = 10  # a larger value comes from another scale, such as 0 to 255


class Logged(NamedTuple):
    step: int
    name: str
    path: Path


def place(folder: Path, name: str, step: int) -> Path:
    """Return the file of an image. Raises UserError for a name or a step that cannot have one."""
    parts = name.split("/") if isinstance(name, str) and NAME.fullmatch(name) else [""]
    if any(part.strip(". ") == "" or FILE.fullmatch(part) for part in parts):
        raise UserError(
            f"record.image: {repr(name)[:200]} is not a name of an image. Use letters, "
            "digits, spaces, -, _, . and / alone, such as val/samples, and no part like "
            "step_00000001.png."
        )
    if any(len(part.encode()) > LONGEST_PART for part in parts):
        raise UserError(
            f"record.image: the name {repr(name)[:60]} is too long. Use at most "
            f"{LONGEST_PART} bytes between two /."
        )
    try:
        number = operator.index(step)
    except TypeError:
        number = -1
    if number < 0:
        raise UserError(
            f"record.image: step={repr(step)[:60]} is not a step. Give an integer of at "
            "least 0, such as state.step + 1."
        )
    return folder / FOLDER / name / f"step_{number:08d}.png"


def write(path: Path, image: Any) -> None:
    """Write a figure of matplotlib or a tensor as PNG. Raises UserError if it is neither."""
    content = as_png(image)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, content)


def logged(folder: Path) -> list[Logged]:
    """Return the images in a run's folder by step, then by name."""
    found = []
    for path in (folder / FOLDER).rglob("step_*.png"):
        if (match := FILE.fullmatch(path.name)) and path.is_file():
            name = path.parent.relative_to(folder / FOLDER).as_posix()
            found.append(Logged(int(match[1]), name, path))
    return sorted(found)


def rewind(folder: Path, step: int | None) -> None:
    """Delete the images logged after `step`; the resumed run logs them again. None deletes all."""
    for image in logged(folder):
        if step is None or image.step > step:
            image.path.unlink()


def as_png(image: Any) -> bytes:
    """Return a figure or a tensor as PNG. Raises UserError for anything else.

    Tensors and arrays: (H, W), (1, H, W), (3, H, W), or a batch (B, 1 or 3, H, W), which becomes
    one image of a grid. Dtypes: uint8, bool, or floating point from 0 to 1. Floats outside [0, 1]
    are clipped; other dtypes, and floats above 10, raise UserError.
    """
    buffer = io.BytesIO()
    if hasattr(image, "savefig"):
        image.savefig(buffer, format="png", dpi=DOTS_PER_INCH)
        return buffer.getvalue()
    import numpy
    import torch
    from PIL import Image

    if isinstance(image, numpy.ndarray):
        image = image.copy()  # torch takes no negative strides, such as those of a mirrored array
    try:
        pixels = torch.as_tensor(image).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        raise UserError(
            f"record.image: a {type(image).__name__} is not an image. Give a tensor or a figure of "
            "matplotlib."
        ) from None
    if pixels.ndim == 2:
        pixels = pixels[None]
    if pixels.ndim == 4 and pixels.numel():
        pixels = _grid(pixels)
    if pixels.ndim != 3 or pixels.shape[0] not in (1, 3) or not pixels.numel():
        raise UserError(
            f"record.image: a tensor of shape {tuple(torch.as_tensor(image).shape)} is not an "
            "image. Give (H, W), (C, H, W) or (B, C, H, W) with one or three channels."
        )
    if not (pixels.is_floating_point() or pixels.dtype in (torch.uint8, torch.bool)):
        raise UserError(
            f"record.image: a tensor of {str(pixels.dtype).removeprefix('torch.')} is not an "
            "image. Give uint8 from 0 to 255, or floating-point values from 0 to 1."
        )
    largest = float(pixels[pixels.isfinite()].amax()) if pixels.isfinite().any() else 0.0
    if pixels.is_floating_point() and largest > FAR_ABOVE_1:
        raise UserError(
            f"record.image: a tensor with values up to {largest:.4g} is not an image. Give "
            "floating-point values from 0 to 1, such as image / 255, or uint8."
        )
    if pixels.dtype != torch.uint8:
        pixels = (pixels.float().nan_to_num(0.0).clamp(0, 1) * 255).round().to(torch.uint8)
    array = pixels.permute(1, 2, 0).squeeze(2).contiguous().numpy()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def _grid(batch: Tensor) -> Tensor:
    """Return a batch (B, C, H, W) as one image, in about as many rows as columns."""
    count, channels, height, width = batch.shape
    columns = max(1, round(count**0.5))
    rows = -(-count // columns)
    tall, wide = height + GAP, width + GAP
    grid = batch.new_zeros(channels, rows * tall - GAP, columns * wide - GAP)
    for index, image in enumerate(batch):
        top, left = index // columns * tall, index % columns * wide
        grid[:, top : top + height, left : left + width] = image
    return grid


def latest(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the newest images of the newest names, each its `step` and its `image`, a PNG."""
    found: dict[str, list[dict[str, Any]]] = {}
    for image in reversed(logged(folder)):
        if image.name not in found and len(found) == NUM_NAMES:
            continue
        its = found.setdefault(image.name, [])
        if len(its) < NUM_SHOWN:
            its.insert(0, {"step": image.step, "image": image.path.read_bytes()})
    return dict(sorted(found.items()))


def merged(folder: Path, lines: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any] | Logged]:
    """Merge a run's metric lines and images by step; images follow the lines of the same step."""
    waiting = logged(folder)[::-1]
    for line in lines:
        while waiting and waiting[-1].step < line["step"]:
            yield waiting.pop()
        yield line
    yield from reversed(waiting)
