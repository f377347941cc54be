"""The index of a folder of tar shards: its sets, their shards, and the blocks of each shard.

A block is a run of whole, consecutive examples of one shard. It is read by one request, and its
CRC-32 is in the index, so that every read notices a changed or damaged shard.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from regrow.errors import DataError
from regrow.feeding.splits import NAMES, check_name

NAME = "index.json"
FORMAT = "regrow tar shards"
VERSION = 1
MOST_BYTES = 2**40  # of a block: the sums of all must fit 64 bits
UNIT = 512  # bytes: every part of a tar file is a multiple
END_BYTES = 1024  # zeros that end a tar file
_SHARD = re.compile(r"[A-Za-z0-9][\w-]*/\d{6,}\.tar", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Shard:
    """A tar file. `blocks` holds (bytes, examples, CRC-32) of each block, from its start."""

    name: str  # <set>/<number>.tar
    num_bytes: int
    sha256: str
    blocks: list[list[int]]

    @property
    def num_examples(self) -> int:
        return sum(examples for _, examples, _ in self.blocks)


@dataclass(frozen=True)
class SourceFacts:
    """Facts about the examples from their source. kind: images or items.

    `disjoint`: the sets were compared, and no example is in two of them.
    """

    kind: str
    class_names: list[str] | None = None
    target_names: list[str] | None = None
    input_max: float = 255.0
    disjoint: bool = False


@dataclass(frozen=True)
class Blocks:
    """The blocks of a set, as arrays (B,) int64. Examples are numbered through all of them."""

    shard: npt.NDArray[np.int64]
    offset: npt.NDArray[np.int64]
    num_bytes: npt.NDArray[np.int64]
    crc: npt.NDArray[np.int64]
    first: npt.NDArray[np.int64]  # (B + 1,): number of the first example; the last is the count

    def __len__(self) -> int:
        return len(self.shard)


@dataclass(frozen=True)
class Index:
    sets: dict[str, list[Shard]]
    facts: SourceFacts
    sha256: str = field(default="", compare=False)  # of the file's content

    def content(self) -> str:
        """Return the text of the file."""
        record = {"format": FORMAT, "version": VERSION, **asdict(self)}
        del record["sha256"]
        return json.dumps(record, separators=(",", ":"))

    def blocks(self, name: str) -> Blocks:
        rows = [
            (number, *block) for number, shard in enumerate(self.sets[name])
            for block in shard.blocks
        ]  # fmt: skip
        shard, num_bytes, examples, crc = np.array(rows, np.int64).T
        ends = np.cumsum(num_bytes)
        is_new = np.append(True, shard[1:] != shard[:-1])
        starts = np.maximum.accumulate(np.where(is_new, ends - num_bytes, 0))
        return Blocks(shard, ends - num_bytes - starts, num_bytes, crc,
                      np.append(0, np.cumsum(examples)))  # fmt: skip

    def fingerprint(self, name: str) -> str:
        """Return the SHA-256 over the contents of a set's shards, wherever they lie.

        The bounds of the blocks are part of it, since they decide the order of an epoch.
        """
        shards = [(it.sha256, [(*block[:2],) for block in it.blocks]) for it in self.sets[name]]
        facts = (self.facts.class_names, self.facts.kind, float(self.facts.input_max))
        return hashlib.sha256(repr((shards, facts)).encode()).hexdigest()


def parsed(content: bytes, where: str) -> Index:
    """Return the index that a file holds. Raises DataError, which names it `where`."""
    again = "Make the shards again with scripts/make_shards.py."
    try:
        record = json.loads(content)
        if record["format"] != FORMAT:
            raise ValueError("it is not an index of tar shards")
        version = record["version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{where} is damaged: {_reason(error)}. {again}") from None
    if version != VERSION:
        raise DataError(
            f"{where} is of version {version}, and this code reads version {VERSION}. {again}"
        )
    try:
        facts = SourceFacts(**record["facts"])
        sets = {name: [_shard(each) for each in shards] for name, shards in record["sets"].items()}
        for name in sets:
            if name not in NAMES:
                check_name(name)
        if not sets.get("train") or not all(sets.values()):
            raise ValueError("a set holds no shards")
        if facts.kind not in ("images", "items") or not _are_names(facts):
            raise ValueError("a fact is of a wrong type")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{where} is damaged: {_reason(error)}. {again}") from None
    return Index(sets, facts, hashlib.sha256(content).hexdigest())


def _shard(record: Mapping[str, Any]) -> Shard:
    shard = Shard(**record)
    # An index may come from anyone, and its names become paths.
    if not _SHARD.fullmatch(shard.name) or not _SHA256.fullmatch(shard.sha256):
        raise ValueError(f"{shard.name!r} is not a shard's name, or its hash is missing")
    for block in shard.blocks:
        if len(block) != 3 or not all(type(it) is int for it in block) or not _is_block(*block):
            raise ValueError(f"{shard.name} has a block {str(block)[:60]}")
    if sum(block[0] for block in shard.blocks) != shard.num_bytes - END_BYTES or not shard.blocks:
        raise ValueError(f"the blocks of {shard.name} do not add up")
    return shard


def _is_block(num_bytes: int, examples: int, crc: int) -> bool:
    return 0 < examples * UNIT <= num_bytes < MOST_BYTES and 0 <= crc < 2**32


def _are_names(facts: SourceFacts) -> bool:
    lists = (facts.class_names, facts.target_names)
    fit = all(
        it is None or (isinstance(it, list) and all(isinstance(n, str) for n in it)) for it in lists
    )
    fit = fit and isinstance(facts.disjoint, bool)
    return fit and isinstance(facts.input_max, int | float) and facts.input_max > 0


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())[:120]
    return f"{text} is missing" if isinstance(error, KeyError) else text
