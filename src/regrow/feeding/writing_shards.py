"""Write sets of examples as tar shards with an index, which is written last.

Each shard is written completely or not at all. Rerun the same command to continue an interrupted
one: `.making/` holds a record per finished shard until the index is written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from regrow.config.class_folders import formats_by_suffix
from regrow.errors import DataError, UserError, brief
from regrow.feeding import identity
from regrow.feeding.images import ImageFiles
from regrow.feeding.items import seeded
from regrow.feeding.loaders import Data
from regrow.feeding.masks import MaskFiles
from regrow.feeding.shard_index import END_BYTES, NAME, Index, Shard, SourceFacts, parsed
from regrow.feeding.shard_items import File, encoded, fields_of, file_of
from regrow.feeding.splits import NAMES, Examples, MapStyle, check_name
from regrow.feeding.streams import Stream
from regrow.randomness import generator, key
from regrow.record import locks
from regrow.record.output import whole_file

MAKING = ".making"  # the folder of the plan and of a record per finished shard
PLAN = "plan"  # a hash, then the names of the sets
_OURS = re.compile(r"\d{6,}\.tar|\.\d{6,}\.tar\.\d+\.tmp")


class ShardSource(Protocol):
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
        examples = self.examples
        pair = (examples.inputs[number], examples.targets[number])
        return pair if examples.weights is None else (*pair, examples.weights[number])

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
    """Any map-style data set.

    `fields` maps a field's name in the shard to its name in the data set's rows. `how` tells what
    decides an item's bytes besides the data set's fingerprint.
    """

    dataset: MapStyle
    fields: Mapping[str, str]
    how: str = ""

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
        chosen = f" {[*self.fields.items()]}" if self.fields else self.how
        if hasattr(self.dataset, "fingerprint"):
            return f"{self.dataset.fingerprint()}{chosen}"
        try:
            return identity.of_items(self.dataset) + chosen
        except identity.Unknown:
            return identity.of_length(self.dataset) + chosen


def of_data(data: Data) -> tuple[dict[str, ShardSource], SourceFacts]:
    """Return the sets of a run's data, and what is known of them. Raises UserError for a stream."""
    if isinstance(data.source.train, Stream):
        raise UserError(
            "data.source: train is an IterableDataset, and shards are written of numbered items. "
            "Give a data set with __len__ and __getitem__."
        )
    sets: dict[str, ShardSource] = {}
    are_images = True
    fingerprints = data.fingerprint()
    for name, split in data.source.items():
        digest = str(fingerprints[name]["sha256"])
        if isinstance(split, ImageFiles):
            sets[name] = OfImages(split, digest)
            continue
        are_images = are_images and isinstance(split, Examples) and _are_images(split)
        how = ""
        if isinstance(split, MaskFiles):  # whose items are resized
            how = repr(dataclasses.replace(split, files=[], masks=[], groups=None, root=""))
        sets[name] = (
            OfExamples(split, digest) if isinstance(split, Examples) else OfItems(split, {}, how)
        )
    names = data.source.class_names or data.class_names
    facts = SourceFacts(
        "images" if are_images else "items", names, data.target_names, data.source.input_max
    )
    # `check_overlap` has refused an overlap, but it compares the contents of OfItems only if these
    # have keys.
    disjoint = data.overlap == "refuse" and not any(isinstance(it, OfItems) for it in sets.values())
    return sets, dataclasses.replace(facts, disjoint=disjoint)


def _are_images(examples: Examples) -> bool:
    inputs, targets = examples.inputs, examples.targets
    grey_or_rgb = inputs.ndim == 4 and inputs.shape[1] in (1, 3)
    return inputs.dtype == torch.uint8 and grey_or_rgb and targets.ndim < 3


def of_datasets(
    datasets: Mapping[str, MapStyle], fields: Mapping[str, str]
) -> tuple[dict[str, ShardSource], SourceFacts]:
    """Return map-style data sets, such as those of Hugging Face, and the facts in their features.

    Raises UserError.
    """
    sets: dict[str, ShardSource] = {}
    for name, dataset in datasets.items():
        if name not in NAMES:
            check_name(name)
        sets[name] = OfItems(dataset, fields)
    if "train" not in sets:
        raise UserError(f"the data has the sets {', '.join(sets)}, and none is train. Name it so.")
    _refuse_empty(sets)
    file = file_of(fields_of(sets["train"].item(0)).get("inputs"))
    is_image = file is not None and f".{file.suffix}" in formats_by_suffix()
    features = getattr(datasets["train"], "features", None)  # elsewhere these are the inputs
    columns = features if isinstance(features, Mapping) else {}
    names = getattr(columns.get(fields.get("targets", "targets")), "names", None)
    facts = SourceFacts(
        "images" if is_image else "items", None if names is None else [*map(str, names)]
    )
    return sets, facts


def write_shards(
    output: Path,
    sets: Mapping[str, ShardSource],
    facts: SourceFacts,
    layout: Layout,
    *,
    overwrite: bool,
    told: Callable[[str], None] = lambda line: None,
) -> Index:
    """Write the sets below `output` and return their index.

    Continues an interrupted write of the same plan. `told` is called with each line of progress.
    Raises UserError if the folder holds an index, unless `overwrite`, or other files.
    """
    refuse_other(output, overwrite)
    _refuse_empty(sets)
    plan = _plan(sets, facts, layout)
    untold: list[OSError] = []

    def tell(line: str) -> None:
        try:
            told(line)
        except OSError as error:
            untold.append(error)
            raise

    try:
        output.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(output, os.O_RDONLY)
        try:
            locks.wait_for(descriptor, f"the folder {output}, to write shards into it")
            refuse_other(output, overwrite)  # another process may have written meanwhile
            return _write(output, sets, facts, layout, plan, tell)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error in untold:  # `| head -1` closes a pipe: no fault of the output
            raise
        raise UserError(f"output={output} cannot be written: {error.strerror or error}.") from None


def _refuse_empty(sets: Mapping[str, ShardSource]) -> None:
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
    making = output / MAKING
    is_ours = (output / NAME).exists() or (making.is_dir() and not making.is_symlink())
    if output.is_dir() and not is_ours and any(output.iterdir()):
        raise UserError(f"output={output} holds other files. Choose a new folder.")


def _write(
    output: Path,
    sets: Mapping[str, ShardSource],
    facts: SourceFacts,
    layout: Layout,
    plan: str,
    told: Callable[[str], None],
) -> Index:
    making = output / MAKING
    if (output / NAME).exists() or _text(making / PLAN) != plan:
        _start_over(output, sets)
        with whole_file(making / PLAN) as file:
            file.write(plan.encode())
    shards: dict[str, list[Shard]] = {}
    for name, source in sets.items():
        (output / name).mkdir(exist_ok=True)
        order: Sequence[int] = range(len(source))
        if name == "train" and layout.shuffle:
            random = generator(layout.seed, "shards")
            order = torch.randperm(len(source), generator=random).tolist()
        shards[name] = _finished(output, name)
        done = sum(shard.num_examples for shard in shards[name])
        if done:
            told(f"{name}: {done:,} of {len(source):,} examples are there already")
        while done < len(source):
            shard = _write_shard(output, name, len(shards[name]), source, order[done:], layout)
            shards[name].append(shard)
            done += shard.num_examples
            told(f"{shard.name}: {shard.num_examples:,} examples, {shard.num_bytes / 1e6:,.1f} MB")
    index = Index(shards, facts)
    with whole_file(output / NAME) as file:  # the index makes the folder valid
        file.write(index.content().encode())
    _remove_records(making, sets)
    (making / PLAN).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # somebody else's file is in it
        making.rmdir()
    return index


def _plan(sets: Mapping[str, ShardSource], facts: SourceFacts, layout: Layout) -> str:
    """Return a hash of all that decides the shards' bytes, and the sets' names."""
    contents = []
    for name, source in sets.items():
        try:
            contents.append((name, len(source), source.fingerprint()))
        except OSError as error:
            raise DataError(f"the set {name} cannot be read: {brief(error, 160)}.") from None
    settings = (contents, dataclasses.astuple(facts), dataclasses.astuple(layout))
    return " ".join([hashlib.sha256(repr(settings).encode()).hexdigest(), *sets])


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return None


def _start_over(output: Path, sets: Iterable[str]) -> None:
    """Remove earlier shards, but no other files. If killed, the same command starts over again.

    A stale plan keeps the sets' names until the shards are gone. The index goes before them, so
    that nothing looks complete.
    """
    making = output / MAKING
    names = {*sets, *(_text(making / PLAN) or "").split()[1:]}
    with contextlib.suppress(OSError, DataError):  # absent or damaged
        names |= {*parsed((output / NAME).read_bytes(), NAME).sets}
    if making.is_symlink():  # whatever it leads to is not ours
        making.unlink()
    making.mkdir(exist_ok=True)
    with whole_file(making / PLAN) as file:
        file.write(" ".join(["stale", *sorted(names)]).encode())
    (output / NAME).unlink(missing_ok=True)
    _remove_records(making, names)
    for folder in [path for path in output.iterdir() if path.name in names]:
        if folder.is_symlink() or not folder.is_dir():
            continue
        for path in folder.iterdir():
            if _OURS.fullmatch(path.name):
                path.unlink()
        if not any(folder.iterdir()):
            folder.rmdir()


def _remove_records(making: Path, names: Iterable[str]) -> None:
    sets = "|".join(map(re.escape, names))
    ours = re.compile(rf"\.?(?:{PLAN}|(?:{sets})-\d{{6,}})(?:\.\d+\.tmp)?")
    for path in making.iterdir():
        if path.name != PLAN and ours.fullmatch(path.name):
            path.unlink()


def _finished(output: Path, name: str) -> list[Shard]:
    """Return a set's shards that an interrupted write finished. Removes its temporary files."""
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
    output: Path, name: str, number: int, source: ShardSource, order: Sequence[int], layout: Layout
) -> Shard:
    """Write the next shard, from the start of `order`.

    The record comes after the tar, so that a record implies a complete shard.
    """
    file_name = f"{name}/{number:06}.tar"
    digest, blocks, num_bytes = hashlib.sha256(), [], 0
    with whole_file(output / file_name) as file:
        for block, examples in _blocks(name, source, order, layout):
            file.write(block)
            digest.update(block)
            blocks.append([len(block), examples, zlib.crc32(block)])
            num_bytes += len(block)
            if num_bytes >= layout.shard_bytes:
                break
        file.write(b"\0" * END_BYTES)
        digest.update(b"\0" * END_BYTES)
    shard = Shard(file_name, num_bytes + END_BYTES, digest.hexdigest(), blocks)
    with whole_file(output / MAKING / f"{name}-{number:06}") as file:
        file.write(json.dumps(dataclasses.asdict(shard)).encode())
    return shard


def _blocks(
    name: str, source: ShardSource, order: Sequence[int], layout: Layout
) -> Iterator[tuple[bytes, int]]:
    """Yield (block, example count); a block never splits an example."""
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
