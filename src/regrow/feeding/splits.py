"""The result of a source: training examples and named sets, cut reproducibly, without overlap."""

from __future__ import annotations

import hashlib
import itertools
import logging
import re
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from regrow.config.rules import require
from regrow.errors import DataError, UserError
from regrow.randomness import generator
from regrow.record.records import NOT_SETS

NAMES = ("train", "val", "test")
GIVEN = "given"  # of a split that the seed does not draw
LIKE_SPLITS = re.compile(  # how a folder's name begins
    "(train(ing)?|val(id(ation)?)?|test(ing)?)(set|data|images|imgs)?(?![a-z])", re.IGNORECASE
)
log = logging.getLogger("regrow.data")

# How far a split's size may be from what was asked without a warning: relative, and in examples.
TOLERANCE, LEAST_TOLERANCE = 0.25, 10


class MapStyle(Protocol):
    """A data set for torch's DataLoader; item i is always the same example."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True)
class Examples:
    """A split in memory, as tensors.

    inputs: (N, C, H, W) uint8 images, (N, …) floating features in raw units, or integers.
    targets: (N,) int64 classes, (N,) float32 of a binary task, (N, L) float32 labels, or (N,) or
        (N, K) values, float64 if float32 would round them.
    weights: (N,) float32, or None for all one.
    ids: names of the examples in their source, such as lines of a file.
    groups: examples of one group, such as a patient, are in one split.
    draw_weights: (N,), for `data.sampling`.

    Converts numpy arrays and lists of numbers. Raises DataError for anything else.
    """

    inputs: Tensor
    targets: Tensor
    weights: Tensor | None = None
    ids: Sequence[int | str] | None = None
    groups: Sequence[Hashable] | None = None
    draw_weights: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("inputs", "targets", "weights", "draw_weights"):
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
        def some(values: Sequence[Any] | None) -> list[Any] | None:
            return None if values is None else [values[index] for index in indices.tolist()]

        weights, draw_weights = (
            None if values is None else values[indices]
            for values in (self.weights, self.draw_weights)
        )
        inputs, targets = self.inputs[indices], self.targets[indices]
        named = some(self.ids), some(self.groups)
        return Examples(inputs, targets, weights, *named, draw_weights)

    def keys(self) -> list[Hashable]:
        """Return one key per example, equal for equal inputs, whatever their targets."""
        rows: Iterable[Any] = self.inputs.contiguous().unsqueeze(-1).flatten(1).numpy()
        if self.inputs.is_floating_point():
            rows = (row + 0.0 for row in rows)  # makes -0.0 the 0.0 that it equals
        return [hashlib.blake2b(row.data, digest_size=16).digest() for row in rows]


@dataclass(frozen=True)
class Reading:
    """Which files of a folder are read, and how.

    extensions: their suffixes, or None for all that Pillow decodes.
    leave_out: kinds of files (hidden, empty), and paths, that are ignored.
    decoder: pillow or torchvision, which also resizes.
    """

    extensions: list[str] | None = None
    leave_out: tuple[str, ...] = ("hidden", "empty")
    exif_orientation: bool = True
    decoder: str = "pillow"


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
    if tensor.dtype == torch.bfloat16:  # which numpy lacks
        tensor = tensor.float()
    if tensor.ndim == 0 or tensor.is_complex() or tensor.layout != torch.strided:
        kind = "one number" if tensor.ndim == 0 else "complex or sparse numbers"
        raise DataError(f"{what}: {kind}. Give a dense tensor of real numbers (N, …).")
    return tensor


@dataclass(frozen=True)
class Splits:
    """Training examples, the sets to evaluate, and facts found while reading them.

    val, test: None for a split that does not exist. An empty split is an error.
    sets: any number of others, by name.
    input_max: the raw value of white.
    columns: a table's features.
    resize, reading, collate: apply to files.
    reads_images: True if this package decodes the images, rather than a data set of the user's.
    vocabulary: of a text, see `Vocabulary.record`.
    notes: lines to log at the start of a run.
    known_keys: each split's keys, if the source has computed them already, which is slow.
    origins: where val and test come from, in words; see `origins_of`.
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
    origins: Mapping[str, str] = field(default_factory=dict)

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
    """Raise UserError if no set other than train, val and test can have this name."""
    if name in NOT_SETS:
        raise UserError(
            f"the set {name!r}: a run's record uses this name itself. Give the set another name."
        )
    if name in NAMES:
        raise UserError(f"the set {name!r}: the source gives {name} by itself. Rename the set.")
    if (lower := str(name).lower()) in NAMES:
        raise UserError(f"the set {name!r}: only its case differs from {lower}. Rename the set.")
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][\w-]*", name, re.ASCII):
        raise UserError(
            f"the set {name!r}: its metrics are named {name}/loss, so that its name may hold only "
            "letters, digits, - and _. Rename it."
        )


def are_like_splits(names: Sequence[str]) -> bool:
    """Return True for folders such as Train and Test, or training_set and test_set."""
    return (
        len(names) > 1
        and all(map(LIKE_SPLITS.match, names))
        and any(name.lower().startswith("train") for name in names)
    )


def text_names(class_names: Sequence[Any] | None) -> list[str] | None:
    """Return the names as text. Raises UserError if YAML reads one as another type.

    Integers are accepted. Other numbers may be written in several ways, and YAML reads `no`, `off`
    and `false` as False.
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
        if name == "train":  # see streams.py
            return
        problem = "is an IterableDataset, which only train can be: a set is measured whole"
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


def check_fractions(
    val_fraction: float, test_fraction: float, folds: int | None = None, fold: int = 0
) -> None:
    """Raise UserError for fractions or folds that leave nothing to train on."""
    require("data.source.val_fraction", val_fraction)
    require("data.source.test_fraction", test_fraction)
    if folds is not None:
        if not (folds >= 2 and 0 <= fold < folds):
            raise UserError(
                f"data.folds={folds} and data.fold={fold}: folds are numbered from 0 to folds - 1, "
                "and there are 2 or more. Choose such a fold."
            )
        if not val_fraction < 1 - 1 / folds:
            raise UserError(
                f"data.source.val_fraction={val_fraction} and data.folds={folds} leave nothing to "
                "train on. Use a smaller fraction, which is of all examples."
            )
    elif not val_fraction + test_fraction < 1:
        raise UserError(
            f"data.source.val_fraction={val_fraction} and test_fraction={test_fraction} leave "
            "nothing to train on. Their sum must be below 1."
        )


def cut(
    keys: Sequence[Hashable],
    strata: npt.NDArray[Any],
    *,
    val_fraction: float,
    test_fraction: float,
    seed: int,
    folds: int | None = None,
    fold: int = 0,
    groups: Sequence[Hashable] | None = None,
    keeps_equal_together: bool = True,
    way_apart: str | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the indices of train, val and test, stratified; a fraction of 0 gives None.

    With `folds`, the test set is fold `fold` of `folds` equal folds; `test_fraction` is ignored.
    Examples of one of the `groups` always land in the same split, and so do those with equal keys
    (true duplicates) if `keeps_equal_together`. Warns if a split's size is then far from what was
    asked; `way_apart` says what splits them one by one. The test split depends only on the data,
    `seed` and `test_fraction` or `folds`, not on `val_fraction`. Raises UserError for fractions,
    DataError for a split that would be empty.
    """
    check_fractions(val_fraction, test_fraction, folds, fold)
    test_share = test_fraction if folds is None else 1 / folds
    keys = keys if keeps_equal_together else range(len(keys))
    unit = _numbered(keys) if groups is None else _bound_together(keys, groups)

    def choose(within: npt.NDArray[np.int64], share: float, name: str) -> npt.NDArray[np.bool_]:
        """Return a mask over `within` (sorted unit numbers): `share` of the units.

        With groups, it is `share` of their examples.
        """
        if not len(within):
            return np.zeros(0, bool)
        random = generator(seed, f"{name} split")
        if groups is not None:
            inside = np.isin(unit, within)
            its = np.searchsorted(within, unit[inside])
            chosen: npt.NDArray[np.bool_] = (
                _allocate(its, strata[inside], [1 - share, share], random) == 1
            )
            return chosen
        return _sample(strata[first_in_unit][within], share, random)

    first_in_unit = np.unique(unit, return_index=True)[1]
    everything = np.arange(len(first_in_unit))
    if folds is None:
        test = choose(everything, test_fraction, "test")
    else:
        random = generator(seed, "folds")
        if groups is not None:
            of_unit = _allocate(unit, strata, [1 / folds] * folds, random)
        else:
            of_unit = _deal(strata[first_in_unit], folds, random)
        test = of_unit == fold
    val = np.zeros_like(test)
    rest = np.flatnonzero(~test)
    val[rest] = choose(rest, val_fraction / (1 - test_share), "val")

    causes = {"val": f"data.source.val_fraction={val_fraction}"} if val_fraction else {}
    if folds is not None:
        causes["test"] = f"data.folds={folds}"
    elif test_fraction:
        causes["test"] = f"data.source.test_fraction={test_fraction}"
    kind = "distinct example" if groups is None else "group"
    kinds = f"{len(first_in_unit)} {kind}{'s' * (len(first_in_unit) > 1)}"
    given = len(keys) if groups is None else len(set(groups))
    together = ""
    if len(first_in_unit) < (1 - TOLERANCE) * given:  # a few equal ones do not explain it
        theirs = ", and so do their groups" if groups is not None else ""
        together = f" Equal examples stay in one split{theirs}. {way_apart or ''}".rstrip()

    def indices(name: str, chosen: npt.NDArray[np.bool_], fraction: float) -> Tensor | None:
        found = torch.from_numpy(np.flatnonzero(chosen[unit]))
        asked = causes.get(name) or " and ".join(causes.values()) or "all"
        if fraction > 0 and len(found) == 0:
            way_out = "Raise it, or set it to 0 for no such split."
            if name == "train":
                way_out = "Let val and test take less, or add data."
            elif name == "test" and folds is not None:
                way_out = "Use fewer."
            raise DataError(f"split {name} is empty: {asked} of {kinds}. {way_out}{together}")
        wanted = fraction * len(unit)
        if name != "train" and abs(len(found) - wanted) > max(TOLERANCE * wanted, LEAST_TOLERANCE):
            log.warning(
                "split %s has %d of %d examples instead of %.0f: %s of %s.%s",
                *(name, len(found), len(unit), wanted, asked, kinds, together),
            )
        return found if fraction > 0 else None

    train = cast(Tensor, indices("train", ~(test | val), 1 - val_fraction - test_share))
    return train, indices("val", val, val_fraction), indices("test", test, test_share)


def origins_of(
    val_fraction: float,
    test_fraction: float,
    folds: int | None = None,
    fold: int = 0,
    *,
    given: Collection[str] = (),
    of: str = "examples",
) -> dict[str, str]:
    """Return where val and test come from, in words: `given`, or else from `cut`, by the seed."""
    drawn = {
        "val": f"data.source.val_fraction={val_fraction} of the {of}",
        "test": f"data.source.test_fraction={test_fraction} of the {of}",
    }
    if folds is not None:
        drawn["test"] = f"fold {fold} of {folds}"
    return {name: GIVEN if name in given else words for name, words in drawn.items()}


def _numbered(keys: Sequence[Hashable]) -> npt.NDArray[np.int64]:
    """Return a number per key, equal for equal keys, in the order of their first occurrence."""
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return np.fromiter((numbers[key] for key in keys), np.int64, len(keys))


def _bound_together(keys: Sequence[Hashable], groups: Sequence[Hashable]) -> npt.NDArray[np.int64]:
    """Return a number per example, equal for those that duplicates or groups connect."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    of_key, of_group = _numbered(keys), _numbered(groups)
    num_keys = int(of_key.max()) + 1
    count = num_keys + int(of_group.max()) + 1
    edges = coo_array((np.ones(len(keys)), (of_key, of_group + num_keys)), shape=(count, count))
    labels = connected_components(edges, directed=False)[1]
    return _numbered(labels[of_key].tolist())


def _sample(
    strata: npt.NDArray[Any], fraction: float, random: torch.Generator
) -> npt.NDArray[np.bool_]:
    """Return a mask of a `fraction` of the list.

    Shuffles, sorts by stratum and takes every 1/fraction-th: each stratum gets its share ±1.
    """
    shuffled = torch.randperm(len(strata), generator=random).numpy()
    ordered = shuffled[np.argsort(strata[shuffled], kind="stable")]
    counts = np.floor(np.arange(len(strata) + 1) * fraction + 0.5)
    chosen = np.zeros(len(strata), bool)
    chosen[ordered[np.diff(counts) > 0]] = True
    return chosen


def _deal(strata: npt.NDArray[Any], folds: int, random: torch.Generator) -> npt.NDArray[np.int64]:
    """Return a fold for each entry of the list.

    Shuffles, sorts by stratum and deals to the folds in turn: each gets its share of a stratum ±1.
    """
    shuffled = torch.randperm(len(strata), generator=random).numpy()
    ordered = shuffled[np.argsort(strata[shuffled], kind="stable")]
    found = np.empty(len(strata), np.int64)
    found[ordered] = np.arange(len(strata)) % folds
    return found


def _allocate(
    unit: npt.NDArray[np.int64],
    strata: npt.NDArray[Any],
    shares: Sequence[float],
    random: torch.Generator,
) -> npt.NDArray[np.int64]:
    """Assign each unit to a part so that each part gets its share of each stratum's examples.

    `unit` and `strata` are per example; units, numbered from 0, are not divided. The largest units
    come first, in random order within a size, each to the part where the sum over strata of
    (count - share)² / share stays smallest. Exact shares may be impossible.
    """
    stratum = np.unique(strata, return_inverse=True)[1].reshape(-1)
    num_units, num_strata = int(unit.max()) + 1, int(stratum.max()) + 1
    # One more "stratum" holds all examples, so that the sizes of the parts are balanced too.
    pairs, counts = np.unique(unit * (num_strata + 1) + stratum, return_counts=True)
    sizes = np.bincount(unit, minlength=num_units)
    totals = np.append(np.bincount(stratum, minlength=num_strata), len(unit)).astype(float)
    starts = np.searchsorted(pairs, np.arange(num_units + 1) * (num_strata + 1))
    scale = np.asarray(shares) * totals[:, None]  # (strata, parts)
    loads = np.zeros_like(scale)
    found = np.empty(num_units, np.int64)
    shuffled = torch.randperm(num_units, generator=random).numpy()
    for one in shuffled[np.argsort(-sizes[shuffled], kind="stable")]:
        mine = slice(starts[one], starts[one + 1])
        rows = np.append(pairs[mine] % (num_strata + 1), num_strata)
        added = np.append(counts[mine], sizes[one])[:, None]
        # By how much a part's sum would grow: (load + added - share)² - (load - share)², less
        # 2·share·added, which over `share` is the same for every part.
        with np.errstate(divide="ignore"):
            cost = ((2 * loads[rows] * added + added**2) / scale[rows]).sum(0)
        found[one] = cost.argmin()
        loads[rows, found[one]] += added[:, 0]
    return found


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
    folds: int | None = None,
    fold: int = 0,
    strata: npt.NDArray[Any] | None = None,
    keeps_equal_together: bool = True,
    way_apart: str | None = None,
) -> tuple[Examples, Examples | None, Examples | None]:
    """Split examples into train, val and test, with `cut`.

    With folds, examples without `ids` get their row numbers.
    """
    if folds is not None and examples.ids is None:
        examples = replace(examples, ids=range(len(examples)))
    train, val, test = cut(
        examples.keys(),
        strata_of(examples.targets) if strata is None else strata,
        val_fraction=val_fraction,
        test_fraction=test_fraction,
        seed=seed,
        folds=folds,
        fold=fold,
        groups=examples.groups,
        keeps_equal_together=keeps_equal_together,
        way_apart=way_apart,
    )
    return (
        examples.subset(train),
        None if val is None else examples.subset(val),
        None if test is None else examples.subset(test),
    )


def check_overlap(
    splits: Splits, policy: str, final: Collection[str] = ("test",)
) -> dict[str, int]:
    """Return the count of examples in both splits, per overlapping pair; refuse or report them.

    Compares train with every set. Also compares sets used to select weights with the `final` sets.
    Examples overlap by content, or by group. Tensors, files, and other data sets that offer
    `keys()`, one hashable per example, are compared, and `torch.utils.data.Subset`s of them. Other
    data sets are compared only if they are the same object, or Subsets of it.
    """
    if policy == "ignore":
        return {}
    parts = dict(splits.items())
    known = splits.known_keys if splits.known_keys.keys() == parts.keys() else {}
    of_data_sets: dict[int, list[Hashable]] = {}
    keys: Mapping[str, list[Hashable]]
    keys = known or {name: _keys(split, of_data_sets) for name, split in parts.items()}
    groups = {name: getattr(split, "groups", None) for name, split in parts.items()}
    overlaps: dict[str, int] = {}
    ordered = sorted(parts, key=lambda name: name in final)
    for one, other in itertools.combinations(ordered, 2):
        if one != "train" and (one in final) == (other in final):
            continue
        copies = _shared(keys[one], keys[other])
        by_group = sorted({*_shared(groups[one], groups[other])}.difference(copies))
        if not copies and not by_group:
            continue
        overlaps[f"{one}/{other}"] = len(copies) + len(by_group)
        size = len(keys[other])  # of a text these are its documents
        said = [
            f"{len(indices)} of the {size} {other} examples {how} {one} too, the first is "
            f"{_describe(parts[other], indices[0])}"
            for indices, how in (
                (copies, "are in"),
                (by_group, "have their group (data.source.group) in"),
            )
            if indices
        ]
        message = f"{'; '.join(said)}."
        if policy == "refuse":
            raise DataError(f"{message} Remove them, or set data.overlap=report to train anyway.")
        log.warning("data.overlap=report: %s", message)
    return overlaps


def _shared(ours: Sequence[Hashable] | None, theirs: Sequence[Hashable] | None) -> list[int]:
    """Return the positions in `theirs` of what is in `ours` too."""
    shared = set(theirs or ()).intersection(ours or ())  # theirs is usually smaller
    return [index for index, key in enumerate(theirs or ()) if key in shared] if shared else []


def _keys(split: Split, known: dict[int, list[Hashable]]) -> list[Hashable]:
    """Return a key per example. `known` caches the keys of a data set by its id."""
    base: Any = split
    indices: list[int] | None = None
    while isinstance(base, torch.utils.data.Subset):  # also a Subset of a Subset
        chosen = range(len(base.indices)) if indices is None else indices
        indices = [int(base.indices[index]) for index in chosen]
        base = base.dataset
    own = getattr(base, "keys", None)
    if callable(own):
        if id(base) not in known:
            known[id(base)] = list(own())
        keys = known[id(base)]
        if indices is None and not keys:  # shards have none
            return keys
        if len(keys) == len(base):  # else they are something else, such as names of columns
            return keys if indices is None else [keys[index] for index in indices]
    if indices is None:
        indices = [*range(len(base))]
    return [(id(base), index if index >= 0 else index + len(base)) for index in indices]


def _describe(split: Split, index: int) -> str:
    files = getattr(split, "files", None)
    return str(files[index]) if files is not None else f"number {index}"
