"""Write sets of examples as tar shards with an index, which is written last.

Each shard is complete or absent, and a run that was killed is continued by the same command: a
finished shard has a record beside it until the index is there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from regrow.errors import DataError, UserError, brief
from regrow.feeding import identity
from regrow.feeding.feeds import seeded
from regrow.feeding.images import ImageFiles, formats_by_suffix
from regrow.feeding.loaders import Data
from regrow.feeding.shard_index import END_BYTES, NAME, Facts, Index, Shard
from regrow.feeding.shard_items import File, encoded, fields_of, file_of
from regrow.feeding.splits import NAMES, Examples, MapStyle, check_name
from regrow.randomness import generator, key
from regrow.record import locks
from regrow.record.output import whole_file

MAKING = (
    ".making"  # a folder with the plan and a record per finished shard, until the index is there
)
PLAN = "plan"
_OURS = re.compile(r"\d{6,}\.tar|\.\d{6,}\.tar\.\d+\.tmp")


class Source(Protocol):
    """A set to write: its items by number, and a text that identifies it."""

    def __len__(self) -> int: ...
    def item(self, number: int) -> Any: ...
    def fingerprint(self) -> str: ...


@dataclass(frozen=True)
class Layout:
    """How the examples are laid out. `shuffle` permutes train, by `seed`."""

    shard_bytes: int
    block_bytes: int
    shuffle: bool
    seed: int


@dataclass(frozen=True)
class OfExamples:
    examples: Examples
    digest: str

    def __len__(self) -> int:
        return len(self.examples)

    def item(self, number: int) -> Any:
        found = self.examples
        pair = (found.inputs[number], found.targets[number])
        return pair if found.weights is None else (*pair, found.weights[number])

    def fingerprint(self) -> str:
        return self.digest


@dataclass(frozen=True)
class OfImages:
    """Image files, which are copied as they are."""

    images: ImageFiles
    digest: str

    def __len__(self) -> int:
        return len(self.images)

    def item(self, number: int) -> Any:
        path = Path(self.images.files[number])
        try:
            content = path.read_bytes()
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror or error}.") from None
        return File(content, path.suffix[1:].lower()), self.images.classes[number]

    def fingerprint(self) -> str:
        return self.digest


@dataclass(frozen=True)
class OfItems:
    """Any map-style data set. `fields`: name in the shard to the name of a row's field."""

    dataset: MapStyle
    fields: Mapping[str, str]

    def __len__(self) -> int:
        return len(self.dataset)

    def item(self, number: int) -> Any:
        with seeded(key(0, "shard", number)):
            item = self.dataset[number]
        if not self.fields:
            return item
        row = fields_of(item)
        for option, name in self.fields.items():
            if name not in row:
                raise UserError(
                    f"{option}={name}: the items have no such field. There are {', '.join(row)}."
                )
        return {option: row[name] for option, name in self.fields.items()}

    def fingerprint(self) -> str:
        if hasattr(self.dataset, "fingerprint"):
            return str(self.dataset.fingerprint())
        try:
            return identity.of_items(self.dataset)
        except identity.Unknown:
            return identity.of_length(self.dataset)


def of_data(data: Data) -> tuple[dict[str, Source], Facts]:
    """Return the sets of a run's data, and what is known of them."""
    sets: dict[str, Source] = {}
    are_images = True
    found = data.fingerprint()
    for name, split in data.source.items():
        digest = str(found[name]["sha256"])
        if isinstance(split, ImageFiles):
            sets[name] = OfImages(split, digest)
            continue
        are_images = are_images and isinstance(split, Examples) and _are_images(split)
        sets[name] = (
            OfExamples(split, digest) if isinstance(split, Examples) else OfItems(split, {})
        )
    names = data.source.class_names or data.class_names
    facts = Facts(
        "images" if are_images else "items", names, data.target_names, data.source.input_max
    )
    # Only such sets as `check_overlap` compares by content, and found apart.
    apart = data.overlap == "refuse" and not any(isinstance(it, OfItems) for it in sets.values())
    return sets, dataclasses.replace(facts, disjoint=apart)


def _are_images(examples: Examples) -> bool:
    inputs, targets = examples.inputs, examples.targets
    grey_or_rgb = inputs.ndim == 4 and inputs.shape[1] in (1, 3)
    return inputs.dtype == torch.uint8 and grey_or_rgb and targets.ndim < 3


def of_datasets(
    datasets: Mapping[str, MapStyle], fields: Mapping[str, str]
) -> tuple[dict[str, Source], Facts]:
    """Return map-style data sets by name, such as those of Hugging Face, and what they tell."""
    sets: dict[str, Source] = {}
    for name, dataset in datasets.items():
        if name not in NAMES:
            check_name(name)
        sets[name] = OfItems(dataset, fields)
    if "train" not in sets:
        raise UserError(f"the data has the sets {', '.join(sets)}, and none is train. Name it so.")
    _refuse_empty(sets)
    file = file_of(fields_of(sets["train"].item(0)).get("inputs"))
    is_image = file is not None and f".{file.suffix}" in formats_by_suffix()
    columns: Any = getattr(datasets["train"], "features", None) or {}
    column = columns.get(fields.get("targets", "targets"))
    names = getattr(column, "names", None)
    facts = Facts("images" if is_image else "items", None if names is None else [*map(str, names)])
    return sets, facts


def write_shards(
    output: Path,
    sets: Mapping[str, Source],
    facts: Facts,
    layout: Layout,
    *,
    overwrite: bool,
    told: Callable[[str], None] = lambda line: None,
) -> Index:
    """Write the sets below `output` and return their index. Continues what was interrupted.

    Raises UserError if the folder holds an index, unless `overwrite`, or other files.
    """
    refuse_other(output, overwrite)
    _refuse_empty(sets)
    plan = _plan(sets, facts, layout)
    try:
        output.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(output, os.O_RDONLY)
        try:
            locks.wait_for(descriptor, f"the folder {output}, to write shards into it")
            refuse_other(output, overwrite)  # another process may have written meanwhile
            return _write(output, sets, facts, layout, plan, told)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise UserError(f"output={output} cannot be written: {error.strerror or error}.") from None


def _refuse_empty(sets: Mapping[str, Source]) -> None:
    for name, source in sets.items():
        if len(source) == 0:
            raise UserError(f"the set {name} is empty. Give it examples, or leave it out.")


def refuse_other(output: Path, overwrite: bool) -> None:
    """Raise UserError for an output that holds an index or other files. Call it before the work."""
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise UserError(f"output={output} is not a folder, and shards are written to one.")
    if (output / NAME).exists() and not overwrite:
        raise UserError(
            f"output={output} holds shards already. Choose another folder, or add overwrite=true."
        )
    is_ours = (output / NAME).exists() or (output / MAKING).is_dir()
    if output.is_dir() and not is_ours and any(output.iterdir()):
        raise UserError(f"output={output} holds other files. Choose a new folder.")


def _write(
    output: Path,
    sets: Mapping[str, Source],
    facts: Facts,
    layout: Layout,
    plan: str,
    told: Callable[[str], None],
) -> Index:
    making = output / MAKING
    if (output / NAME).exists() or _text(making / PLAN) != plan:
        _start_over(output)
        making.mkdir()
        with whole_file(making / PLAN) as file:
            file.write(plan.encode())
    found: dict[str, list[Shard]] = {}
    for name, source in sets.items():
        (output / name).mkdir(exist_ok=True)
        order: Sequence[int] = range(len(source))
        if name == "train" and layout.shuffle:
            random = generator(layout.seed, "shards")
            order = torch.randperm(len(source), generator=random).tolist()
        found[name] = _finished(output, name)
        kept = sum(shard.num_examples for shard in found[name])
        if kept:
            told(f"{name}: {kept:,} of {len(source):,} examples are there already")
        while kept < len(source):
            shard = _write_shard(output, name, len(found[name]), source, order[kept:], layout)
            found[name].append(shard)
            kept += shard.num_examples
            told(f"{shard.name}: {shard.num_examples:,} examples, {shard.num_bytes / 1e6:,.1f} MB")
    index = Index(found, facts)
    with whole_file(output / NAME) as file:  # from here on the shards are complete
        file.write(index.content().encode())
    shutil.rmtree(making, ignore_errors=True)
    return index


def _plan(sets: Mapping[str, Source], facts: Facts, layout: Layout) -> str:
    """Return a hash of all that decides the shards' bytes."""
    contents = []
    for name, source in sets.items():
        try:
            contents.append((name, len(source), source.fingerprint()))
        except OSError as error:
            raise DataError(f"the set {name} cannot be read: {brief(error, 160)}.") from None
    settings = (contents, dataclasses.astuple(facts), dataclasses.astuple(layout))
    return hashlib.sha256(repr(settings).encode()).hexdigest()


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return None


def _start_over(output: Path) -> None:
    """Remove earlier shards; the index first, so that nothing looks complete."""
    (output / NAME).unlink(missing_ok=True)
    shutil.rmtree(output / MAKING, ignore_errors=True)
    for folder in [path for path in output.iterdir() if path.is_dir() and not path.is_symlink()]:
        for path in folder.iterdir():
            if _OURS.fullmatch(path.name):
                path.unlink()
        if not any(folder.iterdir()):
            folder.rmdir()


def _finished(output: Path, name: str) -> list[Shard]:
    """Return the shards of a set that an interrupted run has finished."""
    found: list[Shard] = []
    for left in (output / name).glob(".*.tmp"):
        left.unlink()
    while (text := _text(output / MAKING / f"{name}-{len(found):06}")) is not None:
        shard = Shard(**json.loads(text))
        path = output / shard.name
        if not path.is_file() or path.stat().st_size != shard.num_bytes:
            break
        found.append(shard)
    return found


def _write_shard(
    output: Path, name: str, number: int, source: Source, order: Sequence[int], layout: Layout
) -> Shard:
    """Write one shard from the first examples of `order`. Its record comes last."""
    shard = f"{name}/{number:06}.tar"
    digest, blocks, num_bytes = hashlib.sha256(), [], 0
    with whole_file(output / shard) as file:
        for block, examples in _blocks(name, source, order, layout):
            file.write(block)
            digest.update(block)
            blocks.append([len(block), examples, zlib.crc32(block)])
            num_bytes += len(block)
            if num_bytes >= layout.shard_bytes:
                break
        file.write(b"\0" * END_BYTES)
        digest.update(b"\0" * END_BYTES)
    found = Shard(shard, num_bytes + END_BYTES, digest.hexdigest(), blocks)
    with whole_file(output / MAKING / f"{name}-{number:06}") as file:
        file.write(json.dumps(dataclasses.asdict(found)).encode())
    return found


def _blocks(
    name: str, source: Source, order: Sequence[int], layout: Layout
) -> Iterator[tuple[bytes, int]]:
    """Yield blocks of whole examples, with their numbers of examples."""
    parts: list[bytes] = []
    size = 0
    for number in order:
        try:
            part = encoded(f"{number:09}", source.item(number))
        except DataError as error:
            raise DataError(f"{name} example {number}: {error}") from None
        except OSError as error:
            raise DataError(
                f"{name} example {number} cannot be read: {brief(error, 160)}."
            ) from None
        if parts and size + len(part) > layout.block_bytes:
            yield b"".join(parts), len(parts)
            parts, size = [], 0
        parts.append(part)
        size += len(part)
    if parts:
        yield b"".join(parts), len(parts)
