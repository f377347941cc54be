"""The identity of a split: by all it holds in memory, or by the contents of a few of its items."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections.abc import Mapping, Sized
from typing import Any

import numpy as np
import torch
from torch import Tensor

from regrow.errors import brief
from regrow.feeding.items import seeded
from regrow.feeding.splits import Examples, MapStyle, Split
from regrow.feeding.streams import Stream
from regrow.feeding.transforms import Epochs, with_epochs
from regrow.randomness import key

NUM_READ = 16  # items per split, spread evenly from the first to the last


class Unknown(Exception):
    """Raised if the items do not identify the data set; the text says why."""


def of_split(split: Split, how: str) -> str:
    """Return a split's SHA-256. Raises Unknown if its items cannot be compared."""
    if isinstance(split, Examples):
        digest = hashlib.sha256()
        for tensor in (split.inputs, split.targets, split.weights, split.draw_weights):
            if tensor is not None:
                digest.update(f"{tensor.dtype} {list(tensor.shape)}\n".encode())
                digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()
    if isinstance(split, Stream):
        if hasattr(split.dataset, "fingerprint"):
            return str(split.dataset.fingerprint())
        raise Unknown("a stream has no numbered items")
    if hasattr(split, "fingerprint"):
        return str(split.fingerprint())
    return of_items(split) if how == "contents" else of_length(split)


def of_items(dataset: MapStyle) -> str:
    """Return the SHA-256 over the type, the length and up to 16 items. Raises Unknown.

    torch, numpy and `random` are seeded alike for each read, so a transform that draws from them
    gives the same item. Each item is read twice, to detect one that draws from another source.
    """
    dataset = _copied(dataset)
    Epochs().set(with_epochs(dataset), 0)  # as an evaluation reads it
    digest = hashlib.sha256(of_length(dataset).encode())
    count = len(dataset)
    for index in sorted({place * (count - 1) // (NUM_READ - 1) for place in range(NUM_READ)}):
        once, again = (_of_item(dataset, index) for _ in range(2))
        if once != again:
            raise Unknown(f"two reads of item {index} differ")
        digest.update(once)
    return digest.hexdigest()


def of_length(dataset: Sized) -> str:
    """Return the SHA-256 over type and length, as in records older than `data.identity`."""
    return hashlib.sha256(f"{type(dataset).__qualname__} {len(dataset)}".encode()).hexdigest()


def _copied(dataset: Any) -> Any:
    """Return a shallow copy, including nested Subsets and wrappers.

    Reading an item may open a file, and the workers must not inherit it: they would share its
    position.
    """
    try:
        copied = copy.copy(dataset)
        if "dataset" in vars(copied):
            copied.dataset = _copied(copied.dataset)
        if "datasets" in vars(copied):
            copied.datasets = [_copied(part) for part in copied.datasets]
    except Exception:  # cannot be copied, or has no attributes
        return dataset
    return copied


def _of_item(dataset: MapStyle, index: int) -> bytes:
    digest = hashlib.sha256()
    with seeded(key(0, "identity", index)):
        try:
            item = dataset[index]
        except Exception:  # the run reports the item if it reads it
            return b"unreadable"
    try:
        _add(digest, item)
    except (TypeError, ValueError, RuntimeError) as error:  # e.g. a quantized tensor
        reason = brief(error, 100)
        raise Unknown(f"item {index} cannot be compared ({reason})") from None
    return digest.digest()


def _add(digest: Any, value: Any) -> None:
    """Add a value with its type and, for a container, its length, so that no two values collide."""
    if value is None or isinstance(value, bool | int | float | complex | str | bytes | np.generic):
        content = value if isinstance(value, bytes) else repr(value).encode(errors="replace")
        digest.update(f"{type(value).__name__} {len(content)}\n".encode() + content)
    elif isinstance(value, Tensor):
        dense = value.detach().cpu()
        dense = dense if dense.layout == torch.strided else dense.to_dense()
        digest.update(f"tensor {dense.dtype} {list(dense.shape)}\n".encode())
        digest.update(dense.resolve_conj().contiguous().flatten().view(torch.uint8).numpy().data)
    elif isinstance(value, Mapping):
        digest.update(f"mapping {len(value)}\n".encode())
        for name, part in value.items():
            _add(digest, name)
            _add(digest, part)
    elif isinstance(value, list | tuple):
        digest.update(f"sequence {len(value)}\n".encode())
        for part in value:
            _add(digest, part)
    elif hasattr(value, "__array_interface__"):  # numpy arrays and Pillow images
        array = np.asarray(value)
        if array.dtype.hasobject:
            _add(digest, [list(array.shape), *array.ravel().tolist()])
        else:
            digest.update(f"array {array.dtype.str} {list(array.shape)}\n".encode())
            digest.update(array.tobytes())
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        _add(
            digest, {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        )
    else:
        raise Unknown(
            f"an item holds an instance of {type(value).__name__}, which cannot be compared"
        )
