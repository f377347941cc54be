"""The errors that are part of the interface: one line, with the key, the value and the way out."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something the user can mend. The message is one line; scripts print it and exit with 2."""


class DataError(UserError):
    """Broken data. The message names the file and the row, or the example."""


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """ " Did you mean …?" with the nearest of `words`, or nothing.

    That is a dotted name that ends in the word, then one that begins with it, then one spelt
    nearly so, then one whose last part contains it; of several the shortest.
    """
    others = sorted({other for other in words if other != word}, key=lambda w: (len(w), w))
    last = word.rpartition(".")[2]
    near = (
        [other for other in others if other.rpartition(".")[2] == word]
        or [other for other in others if word and other.startswith(word)]
        or [
            other
            for other in difflib.get_close_matches(word, others)
            if difflib.get_close_matches(last, [other.rpartition(".")[2]])
        ]
        or [other for other in others if len(word) > 2 and word in other.rpartition(".")[2]]
    )
    return f" Did you mean {near[0]}?" if near else ""
