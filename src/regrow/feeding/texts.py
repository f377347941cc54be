"""Text files as splits of tokens. Each split is one token file, made once, in the user's cache."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import os
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from regrow.config.class_folders import is_hidden
from regrow.errors import DataError, UserError
from regrow.feeding.files import (
    LeftOut,
    cache_folder,
    contents_of,
    find_files,
    is_folder,
    not_utf8,
    shown,
    unreadable,
)
from regrow.feeding.splits import (
    NAMES,
    Splits,
    are_like_splits,
    check_fractions,
    check_name,
    origins_of,
)
from regrow.feeding.tokens import Tokens
from regrow.feeding.vocabulary import (
    BYTE_PAIRS,
    CHARACTERS,
    Characters,
    Vocabulary,
    from_file,
    from_record,
    is_record,
    learnt_byte_pairs,
)
from regrow.randomness import generator
from regrow.record import locks
from regrow.record.output import whole_file

BLOCK_BYTES = 1 << 20  # of text encoded at once; blocks end at line ends
FORMAT = 1  # of the token files: raise it when the same text gives other tokens
KEY = "data.source.vocabulary"

log = logging.getLogger("regrow.data")


@dataclass(frozen=True)
class Document:
    """A text file, or the part of one that a split gets."""

    file: str
    sha256: bytes  # of the whole file
    start: int  # in bytes
    stop: int

    @property
    def key(self) -> Hashable:
        return self.sha256, self.start, self.stop

    def blocks(self) -> Iterator[str]:
        """Yield the text in blocks of whole lines. Raises DataError unless it is UTF-8."""
        try:
            with Path(self.file).open("rb") as opened:
                at = opened.seek(self.start)
                while at < self.stop and (lines := opened.readlines(BLOCK_BYTES)):
                    block = b"".join(lines)[: self.stop - at]
                    try:
                        yield block.decode()
                    except UnicodeDecodeError as error:
                        fix = "Convert the file, or move it out of data.root."
                        where = f"byte {at + error.start}"
                        raise not_utf8(Path(self.file), where, error.reason, fix) from None
                    at += len(block)
        except OSError as error:
            raise unreadable(self.file, error) from None


def text(
    *,
    root: str,
    vocabulary: str,
    vocabulary_size: int,
    input_shape: list[int],
    sets: list[str] | None,
    val_fraction: float,
    test_fraction: float,
    seed: int,
    folds: int | None,
    fold: int,
) -> Splits:
    """Return the splits of a text file, or of a folder whose .txt files are documents.

    A folder may hold folders train, val, test and others, which are sets to evaluate: `sets`
    chooses some. Val and test without their own are cut from the training text by their fractions,
    in bytes: the documents come in an order that the seed decides, and the last ones are val and
    test. At most two documents are cut in two, at line ends. With `folds`, test is the part number
    `fold` of so many of about the same size, and val is cut from the end of the rest. `vocabulary`:
    characters (those of all splits), bpe (learnt from the training text), a tokenizer.json, or the
    folder of a run. `vocabulary_size` is at least that of the vocabulary.
    """
    check_fractions(val_fraction, test_fraction, folds, fold)
    if len(input_shape) != 1:
        raise UserError(
            f"data.input_shape={input_shape}: a window of text has one length. Set [64], or more."
        )
    left_out = LeftOut(Path(root))
    files = _files(Path(root), sets, left_out)
    own = {name: _documents(its, root) for name, its in files.items()}
    if folds is not None and "test" in own:
        raise UserError(
            f"data.folds={folds}: {root} has a folder test. Use data.folds=null, or move it away."
        )
    fractions = {"val": val_fraction, "test": test_fraction if folds is None else 0.0}
    wanted = {name: share for name, share in fractions.items() if name not in own}
    parts = _cut(own.pop("train"), wanted, seed, folds, fold) | own
    words = _vocabulary(vocabulary, vocabulary_size, parts, root)
    if words.size > vocabulary_size:
        raise UserError(
            f"data.num_classes={vocabulary_size}, but the vocabulary has {words.size} tokens: an "
            f"end token and {words.size - 1} others. Set data.num_classes={words.size}."
        )
    pieces = _pieces(parts)
    found = {
        name: _tokens(part, pieces[name], words, input_shape[0], root)
        for name, part in parts.items()
    }
    for name, split in found.items():
        if len(split.row) < 2:
            raise DataError(
                f"split {name} is empty: {shown(root)} holds too little text, or too few lines: "
                "splits end at line ends."
            )
    return Splits(
        found["train"],
        found.get("val"),
        found.get("test"),
        {name: split for name, split in found.items() if name not in NAMES},
        vocabulary=words.record(),
        origins=origins_of(val_fraction, test_fraction, folds, fold, given=own, of="text"),
        notes=[str(left_out)] if left_out.counts else [],
        known_keys={name: split.keys() for name, split in found.items()},  # those of documents
    )


def _files(root: Path, sets: list[str] | None, left_out: LeftOut) -> dict[str, list[Path]]:
    """Return the files of train and of each set that has its own. Raises UserError or DataError."""
    if not (root.is_file() or is_folder(root)):
        raise UserError(f"data.root={root}: there is no such file or folder of text.")
    beside = is_folder(root / "train")
    if missing := [name for name in sets or () if not (beside and is_folder(root / name))]:
        raise UserError(
            f"data.source.sets={sets}: {root} holds no folder {missing[0]} beside a folder train."
        )
    if root.is_file():
        return {"train": [root]}
    inside = sorted(path.name for path in root.iterdir() if is_folder(path))
    lone = inside if are_like_splits(inside) else [it for it in ("val", "test") if it in inside]
    if lone and not beside:
        raise UserError(
            f"data.root={root} holds {' and '.join(lone)}, but no folder train. Name the folders "
            "train, val and test; to split all texts by fractions, give them other names."
        )
    folders = {"train": root / "train" if beside else root}
    for path in sorted(root.iterdir()) if beside else ():
        asked = path.name in NAMES or sets is None or path.name in sets
        if is_hidden(path.name):
            left_out.add("hidden", path)
        elif is_folder(path) and asked:
            folders[path.name] = path
        else:
            left_out.add("beside train and the sets", path)
    found = {}
    for name, folder in folders.items():
        if name not in NAMES:
            check_name(name)
        found[name] = find_files(folder, (".txt",), ("hidden", "empty"), left_out)
        if not found[name]:
            raise DataError(f"{shown(folder)} holds no text (.txt).{left_out.sentence()}")
    return found


def _documents(files: Sequence[Path], root: str) -> list[Document]:
    names = [str(file) for file in files]
    hashes = contents_of(names, root)
    return [
        Document(name, digest, 0, Path(name).stat().st_size)
        for name, digest in zip(names, hashes, strict=True)
    ]


def _cut(
    documents: list[Document], fractions: dict[str, float], seed: int, folds: int | None, fold: int
) -> dict[str, list[Document]]:
    """Return the documents of train, of each split with a fraction above zero, and of the fold."""
    order = torch.randperm(len(documents), generator=generator(seed, "documents")).tolist()
    rest = [documents[index] for index in order]
    total = sum(it.stop for it in rest)
    parts: dict[str, list[Document]] = {}
    if folds is not None:
        # Each end is found in the whole text, so that one fold ends where the next one begins.
        before, behind = _divided(rest, fold * total // folds)
        _, after = _divided(rest, (fold + 1) * total // folds)
        parts["test"] = _first(behind, _size(behind) - _size(after))
        rest = before + after
    for name in ("test", "val"):  # test is cut first, so that it does not depend on val's fraction
        if fraction := fractions.get(name, 0.0):
            rest, parts[name] = _divided(rest, _size(rest) - round(fraction * total))
    return {"train": rest, **dict(reversed(parts.items()))}


def _pieces(parts: dict[str, list[Document]]) -> dict[str, list[Document]]:
    """Return the documents of each split, divided where a part of an equal one begins or ends.

    So what two splits have in common has one key, even if one of them has only a part of the file.
    """
    ends: dict[bytes, set[int]] = {}
    for each in itertools.chain(*parts.values()):
        ends.setdefault(each.sha256, set()).update((each.start, each.stop))

    def divided(one: Document) -> list[Document]:
        at = sorted(end for end in ends[one.sha256] if one.start <= end <= one.stop)
        return [replace(one, start=start, stop=stop) for start, stop in itertools.pairwise(at)]

    return {name: [it for one in part for it in divided(one)] for name, part in parts.items()}


def _size(documents: list[Document]) -> int:
    return sum(it.stop - it.start for it in documents)


def _first(documents: list[Document], size: int) -> list[Document]:
    """Return the first `size` bytes."""
    found = []
    for each in documents:
        if size <= 0:
            break
        found.append(replace(each, stop=min(each.stop, each.start + size)))
        size -= each.stop - each.start
    return found


def _divided(documents: list[Document], size: int) -> tuple[list[Document], list[Document]]:
    """Divide documents after about `size` bytes, at the next line end or end of a document."""
    for index, each in enumerate(documents):
        length = each.stop - each.start
        if size <= 0:
            return documents[:index], documents[index:]
        if size < length:
            with Path(each.file).open("rb") as opened:
                opened.seek(each.start + size)
                opened.readline()
                at = min(opened.tell(), each.stop)
            halves = replace(each, stop=at), replace(each, start=at)
            first, second = ([it] if it.start < it.stop else [] for it in halves)
            return documents[:index] + first, second + documents[index + 1 :]
        size -= length
    return documents, []


def _vocabulary(name: str, size: int, parts: dict[str, list[Document]], root: str) -> Vocabulary:
    """Return the vocabulary that `name` asks for; one that is learnt from the text is kept."""
    if name not in (CHARACTERS, BYTE_PAIRS):
        return from_file(Path(name), KEY)
    learns = name == BYTE_PAIRS
    documents = parts["train"] if learns else [it for its in parts.values() for it in its]
    with _kept() as folder:
        path = folder / f"{_key(name, size if learns else 0, _keys(documents))}.json"
        with contextlib.suppress(OSError, ValueError):
            record = json.loads(path.read_text(encoding="utf-8"))
            if is_record(record):
                return from_record(record, f"{KEY}={name}")
        blocks = (block for document in documents for block in document.blocks())
        found: Vocabulary
        if learns:
            found = learnt_byte_pairs(blocks, size, f"{KEY}={name}")
        else:
            found = Characters(set().union(*map(set, blocks)))
        _refuse_changed(documents, root)
        with contextlib.suppress(OSError), whole_file(path) as file:
            file.write(json.dumps(found.record()).encode())
    return found


def _tokens(
    documents: list[Document],
    pieces: list[Document],
    words: Vocabulary,
    context: int,
    root: str,
) -> Tokens:
    """Return a split whose row is the memory map of a token file; without a cache, in memory.

    The name of the file holds a hash of all that it is made of, and one of its contents: a damaged
    file is made again.
    """
    dtype = np.dtype(np.uint16 if words.size <= 1 << 16 else np.uint32).newbyteorder("<")
    made_of = _key(FORMAT, dtype.str, words.record(), _keys(documents))
    with _kept() as folder:
        sha256 = _whole(folder, made_of)
        try:
            sha256 = sha256 or _write(folder, made_of, _encoded(documents, words, dtype, root))
            path = folder / f"{made_of}-{sha256}.bin"
            # "c" never writes to the file either; torch warns about a read-only array.
            row: Any = (
                np.memmap(path, dtype, mode="c") if path.stat().st_size else np.empty(0, dtype)
            )
        except OSError as error:
            log.info("no token file is kept (%s): the tokens stay in memory", error.strerror)
            row = np.concatenate([np.empty(0, dtype), *_encoded(documents, words, dtype, root)])
            sha256 = hashlib.sha256(row.tobytes()).hexdigest()
    return Tokens(row, context, sha256, _keys(pieces), [each.file for each in pieces])


def _encoded(
    documents: list[Document], words: Vocabulary, dtype: np.dtype[Any], root: str
) -> Iterator[npt.NDArray[Any]]:
    """Yield the tokens of all documents, each followed by an end token.

    Raises DataError at the end if a file has changed meanwhile.
    """
    for document in documents:
        for block in document.blocks():
            try:
                yield words.encode(block).astype(dtype)
            except DataError as error:
                raise DataError(
                    f"{shown(document.file)}: {error} One that was learnt as "
                    "data.source.vocabulary=bpe has all bytes."
                ) from None
        yield np.array([words.end], dtype)
    _refuse_changed(documents, root)


def _refuse_changed(documents: Sequence[Document], root: str) -> None:
    """Raise DataError if a file no longer has the contents by which what is kept is named."""
    known = {each.file: each.sha256 for each in documents}
    for file, sha256 in zip(known, contents_of([*known], root), strict=True):
        if sha256 != known[file]:
            raise DataError(
                f"{shown(file)} was changed while it was read. Start again once it is complete."
            )


def _write(folder: Path, made_of: str, parts: Iterator[npt.NDArray[Any]]) -> str:
    """Write a token file, complete or not at all, and return the SHA-256 of its contents."""
    digest = hashlib.sha256()

    def publish(temporary: Path, path: Path) -> None:
        temporary.replace(path.with_name(f"{made_of}-{digest.hexdigest()}.bin"))

    with whole_file(folder / f"{made_of}.bin", publish=publish) as file:
        for part in parts:
            content = part.tobytes()
            digest.update(content)
            file.write(content)
    return digest.hexdigest()


def _whole(folder: Path, made_of: str) -> str | None:
    """Return the SHA-256 of the token file if it is there and undamaged, else None."""
    for path in sorted(folder.glob(f"{made_of}-*.bin")):
        sha256 = path.stem.partition("-")[2]
        with contextlib.suppress(OSError, DataError):
            if contents_of([str(path)], str(folder))[0].hex() == sha256:
                return sha256
            log.warning("%s is damaged: it is made again", shown(path))
            path.unlink()
    return None


@contextlib.contextmanager
def _kept() -> Iterator[Path]:
    """Yield the folder of token files, which other processes leave alone meanwhile.

    It may be missing or read-only: writing to it then raises OSError.
    """
    folder = (cache_folder() or Path(os.devnull)) / "tokens"
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            locks.wait_for(descriptor, f"the folder {folder}, to write tokens into it")
        yield folder


def _keys(documents: list[Document]) -> list[Hashable]:
    return [each.key for each in documents]


def _key(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode("utf-8", "surrogatepass")).hexdigest()[:32]
