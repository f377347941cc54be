"""Vocabularies: from text to tokens and back, as plain values that a run's folder records.

In each of them one token ends a document. Characters need no library; byte pairs are those of
Hugging Face's `tokenizers`, an extra of this project.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from regrow.errors import DataError, UserError, brief
from regrow.extras import require

END_OF_TEXT = "<|endoftext|>"  # GPT-2's name of the end token
CHARACTERS, BYTE_PAIRS = "characters", "bpe"
Ids = npt.NDArray[np.uint32]


class Vocabulary(Protocol):
    size: int  # the number of tokens
    end: int  # the token after each document

    def encode(self, text: str) -> Ids:
        """Return the tokens of a text, without an end token. Raises DataError."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens; that of an end token is empty."""
        ...

    def num_bytes(self) -> list[int]:
        """Return each token's length in bytes of UTF-8; that of the end token is 0."""
        ...

    def record(self) -> dict[str, str]:
        """Return what `from_record` makes the same vocabulary of."""
        ...


class Characters:
    """One token per character, in the order of their code points, after the end token 0."""

    def __init__(self, characters: Iterable[str]) -> None:
        self.characters = "".join(sorted(set(characters)))
        self.size, self.end = len(self.characters) + 1, 0
        self._codes = _codes_of(self.characters)

    def encode(self, text: str) -> Ids:
        codes = _codes_of(text)
        places = np.searchsorted(self._codes, codes).clip(max=max(0, len(self._codes) - 1))
        found = self._codes[places] == codes if len(self._codes) else np.zeros(len(codes), bool)
        if not found.all():
            raise DataError(
                f"the character {text[int(found.argmin())]!r} is not in this vocabulary of "
                f"{len(self.characters)} characters."
            )
        return (places + 1).astype(np.uint32)

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(self.characters[token - 1] for token in tokens if token != self.end)

    def num_bytes(self) -> list[int]:
        return [0, *(len(it.encode("utf-8", "surrogatepass")) for it in self.characters)]

    def record(self) -> dict[str, str]:
        return {"kind": CHARACTERS, "content": self.characters}


class BytePairs:
    """A byte-level BPE (Sennrich et al. 2016, as in GPT-2), from the text of a tokenizer.json."""

    def __init__(self, content: str, where: str) -> None:
        """Raises UserError, which names the key `where`, for a tokenizer of another kind."""
        tokenizers = _library(where)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(content)
        except Exception as error:  # the library raises plain exceptions
            raise UserError(f"{where}: not a tokenizer.json: {brief(error, 200)}.") from None
        parts = json.loads(content)
        if parts.get("normalizer") or '"ByteLevel"' not in json.dumps(parts.get("decoder")):
            raise UserError(
                f"{where}: this tokenizer is not byte-level BPE without a normalizer, as GPT-2's "
                "is. The text must come back byte for byte. Use bpe, or another file."
            )
        end = self._tokenizer.token_to_id(END_OF_TEXT)
        if end is None:
            raise UserError(f"{where}: this tokenizer has no token {END_OF_TEXT}. Add one to it.")
        self._tokenizer.encode_special_tokens = True  # in a text, these words are only words
        self._content, self.end = content, int(end)
        self._words: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        self.size = max(self._words.values()) + 1

    def encode(self, text: str) -> Ids:
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.uint32)

    def decode(self, tokens: Sequence[int]) -> str:
        kept = [token for token in tokens if token != self.end]
        return str(self._tokenizer.decode(kept, skip_special_tokens=False))

    def num_bytes(self) -> list[int]:
        added = {token.content for token in self._tokenizer.get_added_tokens_decoder().values()}
        lengths = [0] * self.size
        for word, token in self._words.items():  # a byte-level token has one sign per byte
            lengths[token] = len(word.encode()) if word in added else len(word)
        lengths[self.end] = 0
        return lengths

    def record(self) -> dict[str, str]:
        return {"kind": BYTE_PAIRS, "content": self._content}


def learnt_byte_pairs(texts: Iterable[str], size: int, where: str) -> BytePairs:
    """Return a vocabulary of at most `size` byte pairs, learnt from `texts`; 257 at least."""
    tokenizers = _library(where)
    if size < 257:
        raise UserError(
            f"data.num_classes={size}: byte pairs begin with 256 bytes and an end token. Set 257 "
            "or more, such as 1024."
        )
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    return BytePairs(made.to_str(), where)


def from_record(record: Mapping[str, str], where: str) -> Vocabulary:
    if record["kind"] == CHARACTERS:
        return Characters(record["content"])
    return BytePairs(record["content"], where)


def is_record(value: Any) -> bool:
    """Return True if `value` is what `Vocabulary.record` returns."""
    return (
        isinstance(value, dict)
        and value.keys() == {"kind", "content"}
        and value["kind"] in (CHARACTERS, BYTE_PAIRS)
        and isinstance(value["content"], str)
    )


def from_file(path: Path, where: str) -> Vocabulary:
    """Return the vocabulary of a run's folder or of a tokenizer.json. Raises UserError."""
    file = path / "preprocessing.json" if path.is_dir() else path
    try:
        content = file.read_text(encoding="utf-8")
        found = json.loads(content)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{where}={path}: {brief(error, 200)}. Give characters, bpe, a tokenizer.json, or the "
            "folder of a run on text."
        ) from None
    if not path.is_dir() and path.name != "preprocessing.json":
        return BytePairs(content, f"{where}={path}")
    record = found.get("vocabulary") if isinstance(found, dict) else None
    if record is None or not is_record(record):
        raise UserError(f"{where}={path}: that run has no vocabulary. Name one on text.")
    return from_record(record, f"{where}={path}")


def _codes_of(text: str) -> Ids:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def _library(where: str) -> Any:
    require(where, "text", "tokenizers")
    import tokenizers

    return tokenizers
