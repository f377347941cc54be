"""One example as members of a tar file, as WebDataset lays them out, and back.

The members of an example share the name up to the first dot. `<key>.jpg` (or another image) is the
input of an image's example, `<key>.cls` its class as text. Any other field is
`<key>.<field>.<kind>`: npy for an array, npz for several, json for a number, list or mapping, txt,
bin, or an image.
"""

from __future__ import annotations

import functools
import io
import json
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regrow.errors import DataError, brief
from regrow.feeding.batch import described
from regrow.feeding.shard_index import UNIT

OF_PNG = ("1", "L", "LA", "I;16", "P", "RGB", "RGBA")  # modes that Pillow saves as PNG
Member = tuple[str, int, int]  # the name after the key, and where its content begins and ends


@dataclass(frozen=True)
class File:
    """The content of a file, written as it is. `suffix` has no dot."""

    content: bytes
    suffix: str


def encoded(key: str, item: Any) -> bytes:
    """Return an example as tar members. `item`: see `fields_of`. Raises DataError."""
    parts = []
    for name, value in fields_of(item).items():
        suffix, content = _encoded(name, value)
        info = tarfile.TarInfo(f"{key}.{suffix}")
        if len(info.name.encode(errors="surrogateescape")) > 100 or {*suffix} & {"/", "\0"}:
            raise DataError(f"an item's field {name!r}: such a name does not fit a tar file.")
        info.size = len(content)
        parts += [info.tobuf(tarfile.USTAR_FORMAT), content, b"\0" * (-len(content) % UNIT)]
    return b"".join(parts)


def fields_of(item: Any) -> dict[str, Any]:
    """Return the fields of an item: of a pair or triple inputs, targets and weights; else its own.

    Raises DataError for an item that is neither a pair, a triple nor a mapping.
    """
    if isinstance(item, list | tuple) and len(item) in (2, 3):
        return dict(zip(("inputs", "targets", "weights"), item, strict=False))
    if isinstance(item, Mapping) and item and all(isinstance(name, str) for name in item):
        if any("." in name for name in item):
            raise DataError(f"an item's fields {sorted(item)}: a name may hold no dot.")
        return dict(item)
    raise DataError(
        f"an item is {described(item)}. Shards take (inputs, targets), (inputs, targets, weights) "
        "or a mapping of named fields."
    )


def _encoded(name: str, value: Any) -> tuple[str, bytes]:
    """Return the name after the key, and the content, of a field."""
    file = file_of(value)
    if file is not None:
        return (file.suffix if name == "inputs" else f"{name}.{file.suffix}"), file.content
    if isinstance(value, Tensor):
        value = _array_of(name, value)
    if name == "targets" and getattr(value, "ndim", 0) == 0 and _is_integer(value):
        return "cls", str(int(value)).encode()
    if isinstance(value, np.ndarray | np.generic) and np.asarray(value).dtype.kind in "buif":
        return f"{name}.npy", _npy(_array_of(name, value))
    if isinstance(value, str):
        return f"{name}.txt", value.encode("utf-8", "surrogatepass")
    if isinstance(value, bytes):
        return f"{name}.bin", value
    several = _several(name, value)
    if several is not None:
        written = io.BytesIO()
        if "file" in several:  # the name of an argument of numpy's
            raise DataError(f"an item's field {name!r}: its part 'file' needs another name.")
        np.savez(written, **several)
        return f"{name}.npz", written.getvalue()
    try:
        return f"{name}.json", json.dumps(value).encode()
    except (TypeError, ValueError) as error:
        raise DataError(f"an item's field {name!r} is {described(value)}: {error}.") from None


def file_of(value: Any) -> File | None:
    """Return a file, a Pillow image, or an image that is not decoded as a file; else None.

    Raises DataError for an image that cannot be read, or be written without a loss.
    """
    if isinstance(value, File):
        return value
    if hasattr(value, "getexif"):  # a Pillow image
        written = io.BytesIO()
        if value.mode in ("F", "I"):
            raise DataError(f"an item's image is of 32 bits (mode {value.mode}). Give an array.")
        try:
            image = value if value.mode in OF_PNG else value.convert("RGB")
        except ValueError as error:
            raise DataError(f"an item's image is of mode {value.mode}: {error}.") from None
        image.save(written, "PNG")
        return File(written.getvalue(), "png")
    if isinstance(value, Mapping) and {*value} == {"bytes", "path"} and value["bytes"]:
        suffix = Path(str(value["path"] or "")).suffix.lower()[1:]
        return File(value["bytes"], suffix or _kind_of(value["bytes"]))
    return None


def _kind_of(content: bytes) -> str:
    from PIL import Image

    from regrow.feeding.decoding import formats_for

    try:
        with Image.open(io.BytesIO(content), formats=formats_for("")) as image:
            return str(image.format).lower()
    except Exception as error:
        raise DataError(f"an item's image cannot be read: {brief(error, 100)}.") from None


def _is_integer(value: Any) -> bool:
    if isinstance(value, bool):
        return False
    return isinstance(value, int | np.integer) or (
        isinstance(value, np.ndarray) and value.dtype.kind in "iu"
    )


def _several(name: str, value: Any) -> dict[str, Any] | None:
    """Return the arrays of a mapping or tuple of tensors by name; None if it holds others."""
    found: dict[str, Any] = {}
    if isinstance(value, Mapping):
        found = {str(key): part for key, part in value.items()}
    elif isinstance(value, tuple):
        found = {f"arr_{number}": part for number, part in enumerate(value)}
    if not found or not all(isinstance(part, Tensor | np.ndarray) for part in found.values()):
        return None
    return {key: _array_of(name, part) for key, part in found.items()}


def _array_of(name: str, value: Any) -> np.ndarray[Any, Any]:
    """Return an array in this machine's byte order. Raises DataError for one that torch refuses."""
    try:
        array = np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value)
        array = array.astype(array.dtype.newbyteorder("="), copy=False)
        torch.from_numpy(np.empty(0, array.dtype))
    except TypeError:
        raise DataError(
            f"an item's field {name!r} has arrays of {value.dtype}. Give a type that numpy and "
            "torch share, such as float32."
        ) from None
    return array


def _npy(array: np.ndarray[Any, Any]) -> bytes:
    written = io.BytesIO()
    np.lib.format.write_array(written, np.asarray(array, order="C"), (1, 0), allow_pickle=False)
    return written.getvalue()


def members_in(block: bytes) -> list[list[Member]]:
    """Return the members of each example of a block. Raises ValueError for other bytes."""
    found: list[list[Member]] = []
    at, last, end = 0, b"", len(block)
    while at < end:
        name = block[at : at + 100].partition(b"\0")[0]
        start = at + UNIT
        size = int(block[at + 124 : at + 135], 8)
        stop = start + size
        if size < 0 or stop > end:
            raise ValueError(f"a member of {size} bytes in a block of {end}")
        key, _, suffix = name.partition(b".")
        if key != last:
            found.append([])
            last = key
        found[-1].append((suffix.decode(), start, stop))
        at = stop + -stop % UNIT
    return found


def decoded(name: str, content: bytes) -> tuple[str, Any]:
    """Return the field and the value of a member. An image stays a `File`."""
    if name == "cls":
        return "targets", int(content)
    field, _, kind = name.rpartition(".")
    if kind == "npy":
        return field, _array(content)
    if kind == "json":
        return field, json.loads(content)
    if kind == "txt":
        return field, content.decode("utf-8", "surrogatepass")
    if kind == "bin":
        return field, content
    if kind == "npz":
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            parts = {key: torch.from_numpy(arrays[key]) for key in arrays.files}
        if all(key == f"arr_{number}" for number, key in enumerate(parts)):
            return field, tuple(parts.values())
        return field, parts
    return field or "inputs", File(content, kind)


def _array(content: bytes) -> Tensor:
    size = 10 + int.from_bytes(content[8:10], "little")
    dtype, shape = _layout(content[:size])
    array = np.frombuffer(content, dtype, offset=size).reshape(shape)
    return torch.from_numpy(array.copy())


@functools.lru_cache(maxsize=256)
def _layout(header: bytes) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """Return dtype and shape from the head of an .npy file; parsing one costs 50 µs."""
    if header[:8] != b"\x93NUMPY\x01\x00":
        raise ValueError("not an array of numpy's format 1.0")
    shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(io.BytesIO(header[8:]))
    if is_fortran or dtype.hasobject:
        raise ValueError("an array in Fortran's order, or of objects")
    return dtype, shape


def as_item(fields: dict[str, Any]) -> Any:
    """Return (inputs, targets), (inputs, targets, weights), or the fields if others are there."""
    if "inputs" in fields and "targets" in fields:
        if len(fields) == 2:
            return fields["inputs"], fields["targets"]
        if len(fields) == 3 and "weights" in fields:
            return fields["inputs"], fields["targets"], fields["weights"]
    return fields
