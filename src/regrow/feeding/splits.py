"""The result of a source: training examples and named sets, cut reproducibly, without overlap."""

from __future__ import annotations

import hashlib
import itertools
import logging
import re
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from regrow.errors import DataError, UserError
from regrow.randomness import generator
from regrow.record.records import NOT_SETS

NAMES = ("train", "val", "test")
log = logging.getLogger("regrow.data")


class MapStyle(Protocol):
    """A data set for torch's DataLoader; item i is always the same example."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True)
class Examples:
    """A split in memory, as tensors.

    inputs: (N, C, H, W) uint8 images, (N, …) floating features in raw units, or integers. targets:
    (N,) int64 classes, (N,) float32 of a binary task, (N, L) float32 labels, or (N,) or (N, K)
    values, float64 if float32 would round them. weights: (N,) float32, or None for all one.
    Converts numpy arrays and lists of numbers. Raises DataError for anything else.
    """

    inputs: Tensor
    targets: Tensor
    weights: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("inputs", "targets", "weights"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, as_tensor(value, f"Examples.{name}"))
        if self.weights is not None:
            weights = self.weights.float()
            if weights.shape != self.inputs.shape[:1]:
                raise DataError(
                    f"Examples.weights: {list(weights.shape)} weights for {len(self.inputs)} "
                    "examples. Give one for each."
                )
            if not bool((weights.isfinite() & (weights >= 0)).all()):
                raise DataError(
                    "Examples.weights: a weight is negative, NaN or infinite. Give numbers of zero "
                    "or more."
                )
            object.__setattr__(self, "weights", weights)

    def __len__(self) -> int:
        return len(self.inputs)

    def subset(self, indices: Tensor) -> Examples:
        weights = None if self.weights is None else self.weights[indices]
        return Examples(self.inputs[indices], self.targets[indices], weights)

    def keys(self) -> list[Hashable]:
        """Return one key per example, equal for equal inputs, whatever their targets."""
        rows = self.inputs.contiguous().flatten(1).numpy()
        return [hashlib.blake2b(row.data, digest_size=16).digest() for row in rows]


@dataclass(frozen=True)
class Reading:
    """Which files of a folder are read, and how. extensions=None: all that Pillow decodes."""

    extensions: list[str] | None = None
    leave_out: tuple[str, ...] = ("hidden", "empty")
    exif_orientation: bool = True


Split = Examples | MapStyle


def as_tensor(value: Any, what: str) -> Tensor:
    """Return a tensor, numpy array or list of numbers (N, …) as a tensor on the CPU.

    Raises DataError, which names it `what`, for anything else.
    """
    if isinstance(value, list | tuple) and value and all(isinstance(it, Tensor) for it in value):
        shapes = sorted({tuple(it.shape) for it in value})
        if len(shapes) > 1:
            raise DataError(
                f"{what}: a list of tensors of {len(shapes)} shapes, such as {shapes[0]} and "
                f"{shapes[1]}. Pad them to one shape, or use from_datasets with a collate function."
            )
        value = torch.stack(list(value))
    if not isinstance(value, Tensor):
        try:
            array = np.asarray(value)
        except (ValueError, TypeError) as error:  # lists of unequal lengths
            raise DataError(f"{what}: {' '.join(str(error).split())[:200]}") from None
        if array.dtype.kind not in "buif":
            raise DataError(
                f"{what}: {type(value).__name__} of {array.dtype}, which is not a type of number. "
                "Convert it to numbers of one type and shape."
            )
        if array.dtype.kind == "u" and array.dtype.itemsize > 1:  # torch has few kernels for these
            array = array.astype(np.int64)
        if array.dtype == np.longdouble and array.dtype.itemsize > 8:
            array = array.astype(np.float64)
        value = torch.from_numpy(np.array(array, array.dtype.newbyteorder("="), order="C"))
    tensor: Tensor = value.detach().cpu()
    if tensor.ndim == 0 or tensor.is_complex() or tensor.layout != torch.strided:
        kind = "one number" if tensor.ndim == 0 else "complex or sparse numbers"
        raise DataError(f"{what}: {kind}. Give a dense tensor of real numbers (N, …).")
    return tensor


@dataclass(frozen=True)
class Splits:
    """Training examples, the sets to evaluate, and facts found while reading them.

    `sets` holds any number of sets beside val and test, by name. A split that is None does not
    exist; an empty one is an error. `input_max` is the raw value of white, `columns` are a table's
    features; `resize`, `reading` and `collate` apply to files, `reads_images` says that they are
    images of ours, and `vocabulary` belongs to a text: see `Vocabulary.record`. `notes` are lines
    to log at the start of a run. `known_keys` holds each split's keys if the source has already
    computed them, which is slow.
    """

    train: Split
    val: Split | None = None
    test: Split | None = None
    sets: Mapping[str, Split] = field(default_factory=dict)
    class_names: list[str] | None = None
    target_names: list[str] | None = None
    input_max: float = 255.0
    resize: int | None = None
    columns: list[str] | None = None
    delimiter: str = ","
    collate: Callable[[list[Any]], Any] | None = None
    reading: Reading = field(default_factory=Reading)
    notes: Sequence[str] = ()
    vocabulary: Mapping[str, str] | None = None
    reads_images: bool = False
    known_keys: Mapping[str, list[Hashable]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.sets:
            check_name(name)
        for name, split in self.items():
            if not isinstance(split, Examples):
                _must_be_map_style(name, split)

    def items(self) -> list[tuple[str, Split]]:
        """Return the splits that exist by name: train, val, the named sets, test."""
        named = {"train": self.train, "val": self.val, **self.sets, "test": self.test}
        return [(name, split) for name, split in named.items() if split is not None]


def check_name(name: str) -> None:
    """Raise UserError for a name that a set beside val and test cannot have."""
    if name in NOT_SETS:
        raise UserError(
            f"the set {name!r}: a run's record uses this name itself. Give the set another name."
        )
    if name in NAMES:
        raise UserError(f"the set {name!r}: the source gives {name} by itself. Rename the set.")
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][\w-]*", name, re.ASCII):
        raise UserError(
            f"the set {name!r}: its metrics are named {name}/loss, so that its name may hold only "
            "letters, digits, - and _. Rename it."
        )


def text_names(class_names: Sequence[Any] | None) -> list[str] | None:
    """Return the names as text. Raises UserError if YAML reads one as another type.

    Numbers are accepted. YAML reads `no` as False, and `off` and `false` too.
    """
    for name in class_names or ():
        if not isinstance(name, str | int) or isinstance(name, bool):
            raise UserError(
                f"data.class_names: YAML reads one of the names as {name!r}. Put each name in "
                'quotes: ["no", "yes"].'
            )
    return None if class_names is None else [str(name) for name in class_names]


def _must_be_map_style(name: str, split: Any) -> None:
    if isinstance(split, torch.utils.data.IterableDataset):
        problem = "is an IterableDataset, which has neither a length nor numbered items"
    elif isinstance(split, torch.utils.data.DataLoader):
        problem = "is a DataLoader; the run makes its own batches, so that it can resume"
    elif isinstance(split, Mapping | str) or not hasattr(type(split), "__getitem__"):
        problem = "has no numbered items"
    elif not hasattr(type(split), "__len__"):
        problem = "has no length"
    else:
        return
    raise UserError(
        f"split {name}: {type(split).__name__} {problem}. Give Examples (tensors), or a map-style "
        "data set with __len__ and __getitem__."
    )


def check_fractions(val_fraction: float, test_fraction: float) -> None:
    if not (val_fraction >= 0 and test_fraction >= 0 and val_fraction + test_fraction < 1):
        raise UserError(
            f"data.source.val_fraction={val_fraction} and test_fraction={test_fraction} leave "
            f"nothing to train on. Both must be 0 or more, and their sum below 1."
        )


def cut(
    keys: Sequence[Hashable],
    strata: npt.NDArray[Any],
    *,
    val_fraction: float,
    test_fraction: float,
    seed: int,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the indices of train, val and test, stratified; a fraction of 0 gives None.

    Examples with equal keys (true duplicates) always land in the same split. The test split depends
    only on the data, `seed` and `test_fraction`, not on `val_fraction`.
    """
    check_fractions(val_fraction, test_fraction)
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    group = np.fromiter((numbers[key] for key in keys), np.int64, len(keys))
    first = np.unique(group, return_index=True)[1]
    test = _sample(strata[first], test_fraction, generator(seed, "test split"))
    val = np.zeros_like(test)
    rest = np.flatnonzero(~test)
    val[rest] = _sample(
        strata[first][rest], val_fraction / (1 - test_fraction), generator(seed, "val split")
    )

    def indices(name: str, chosen: npt.NDArray[np.bool_], fraction: float) -> Tensor | None:
        found = torch.from_numpy(np.flatnonzero(chosen[group]))
        if fraction > 0 and len(found) == 0:
            raise DataError(
                f"split {name} is empty: data.source.{name}_fraction={fraction} of "
                f"{len(first)} distinct examples. Raise it, or set it to 0 for no such split."
            )
        return found if fraction > 0 else None

    train = cast(Tensor, indices("train", ~(test | val), 1 - val_fraction - test_fraction))
    return train, indices("val", val, val_fraction), indices("test", test, test_fraction)


def _sample(
    strata: npt.NDArray[Any], fraction: float, random: torch.Generator
) -> npt.NDArray[np.bool_]:
    """Return a systematic sample of the shuffled, then sorted list: ±1 of each stratum's share."""
    shuffled = torch.randperm(len(strata), generator=random).numpy()
    ordered = shuffled[np.argsort(strata[shuffled], kind="stable")]
    counts = np.floor(np.arange(len(strata) + 1) * fraction + 0.5)
    chosen = np.zeros(len(strata), bool)
    chosen[ordered[np.diff(counts) > 0]] = True
    return chosen


def strata_of(targets: Tensor) -> npt.NDArray[Any]:
    """Return the strata: the class, the combination of labels, or the decile of the value."""
    values = targets.numpy()
    if values.ndim > 1:
        return np.unique(values, axis=0, return_inverse=True)[1].reshape(-1)
    distinct = np.unique(values)
    if not targets.is_floating_point() or len(distinct) <= 2:
        return values
    ranks = np.argsort(np.argsort(values, kind="stable"), kind="stable")
    return cast(npt.NDArray[Any], ranks * 10 // len(values))


def cut_examples(
    examples: Examples,
    *,
    val_fraction: float,
    test_fraction: float,
    seed: int,
    strata: npt.NDArray[Any] | None = None,
) -> tuple[Examples, Examples | None, Examples | None]:
    """Split examples into train, val and test, with `cut`."""
    train, val, test = cut(
        examples.keys(),
        strata_of(examples.targets) if strata is None else strata,
        val_fraction=val_fraction,
        test_fraction=test_fraction,
        seed=seed,
    )
    return (
        examples.subset(train),
        None if val is None else examples.subset(val),
        None if test is None else examples.subset(test),
    )


def check_overlap(
    splits: Splits, policy: str, final: Collection[str] = ("test",)
) -> dict[str, int]:
    """Return the counts of examples in two splits, by content; refuse or report them.

    Compares train with every set, and the sets that are measured during training, which may choose
    the weights, with the `final` ones. Tensors, files, and `torch.utils.data.Subset`s of one data
    set are compared; other data sets only if they are the same object, or offer `keys()`, one
    hashable per example.
    """
    if policy not in ("refuse", "report", "ignore"):
        raise UserError(f"data.overlap={policy} is none of refuse, report, ignore.")
    if policy == "ignore":
        return {}
    parts = dict(splits.items())
    known = splits.known_keys if splits.known_keys.keys() == parts.keys() else {}
    keys: Mapping[str, list[Hashable] | None]
    keys = known or {name: _keys(split) for name, split in parts.items()}
    found: dict[str, int] = {}
    ordered = sorted(parts, key=lambda name: name in final)
    for one, other in itertools.combinations(ordered, 2):
        if one != "train" and (one in final) == (other in final):
            continue
        ours, theirs = keys.get(one), keys.get(other)
        if not ours or not theirs:
            continue
        shared = set(theirs).intersection(ours)  # theirs is usually smaller
        if not shared:
            continue
        both = [index for index, key in enumerate(theirs) if key in shared]
        found[f"{one}/{other}"] = len(both)
        message = (
            f"{len(both)} of the {len(theirs)} {other} examples are in {one} too, the first is "
            f"{_describe(parts[other], both[0])}."
        )
        if policy == "refuse":
            raise DataError(
                f"{message} Remove them, or set data.overlap=report to train all the same."
            )
        log.warning("data.overlap=report: %s", message)
    return found


def _keys(split: Split) -> list[Hashable] | None:
    if isinstance(split, torch.utils.data.Subset):
        indices = [int(index) for index in split.indices]
        base: Any = split.dataset
        while isinstance(base, torch.utils.data.Subset):  # a Subset of a Subset
            indices = [int(base.indices[index]) for index in indices]
            base = base.dataset
        return [(id(base), index) for index in indices]
    keys = getattr(split, "keys", None)
    if callable(keys):
        return list(keys())
    return [(id(split), index) for index in range(len(split))]


def _describe(split: Split, index: int) -> str:
    files = getattr(split, "files", None)
    return str(files[index]) if files is not None else f"number {index}"
