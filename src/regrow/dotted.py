"""Dotted names: the keys of a config as on the command line, and the modules of a model."""

from __future__ import annotations

import fnmatch
from collections.abc import Container, Iterable, Iterator, Mapping
from typing import Any


def walk(
    node: Mapping[str, Any], prefix: str = "", closed: Container[str] = ()
) -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) for all keys below `node`, a mapping before its own keys.

    Lists are values. Mappings whose dotted key is in `closed` are yielded but not entered.
    """
    for key, value in node.items():
        full = f"{prefix}{key}"
        yield full, value
        if isinstance(value, Mapping) and full not in closed:
            yield from walk(value, f"{full}.", closed)


def leaves(node: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values by dotted key, without mappings."""
    return {key: value for key, value in walk(node) if not isinstance(value, Mapping)}


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Return True if a name matches a pattern, such as `layer[12].*`. Case-sensitive."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
