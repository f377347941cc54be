"""Dotted names: the keys of a config as on the command line, and the modules of a model."""

from __future__ import annotations

import fnmatch
from collections.abc import Container, Iterable, Iterator, Mapping
from typing import Any


def walk(
    node: Mapping[str, Any], prefix: str = "", closed: Container[str] = ()
) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of all below, a mapping before what is in it.

    Lists are values. What is in a mapping whose dotted key is `closed` is left out.
    """
    for key, value in node.items():
        full = f"{prefix}{key}"
        yield full, value
        if isinstance(value, Mapping) and full not in closed:
            yield from walk(value, f"{full}.", closed)


def leaves(node: Mapping[str, Any]) -> dict[str, Any]:
    """The values by dotted key, without mappings."""
    return {key: value for key, value in walk(node) if not isinstance(value, Mapping)}


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Return True if a name matches one of the patterns, such as `layer[12].*`; case counts."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
