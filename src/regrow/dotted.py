"""A config as plain values, and dotted names: its keys as typed, and the modules of a model."""

from __future__ import annotations

import fnmatch
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

# A config, or any other plain value: what YAML and JSON hold.
Config: TypeAlias = "Mapping[str, Config] | Sequence[Config] | str | float | bool | None"

# A config to read by its keys, whose types `config.check` has checked. mypy cannot see that, and
# would have each reader narrow each value again.
Checked: TypeAlias = Mapping[str, Any]


def walk(
    node: Mapping[str, Config], prefix: str = "", closed: Container[str] = ()
) -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) for all keys below `node`, a mapping before its own keys.

    Lists are values. Mappings whose dotted key is in `closed` are yielded but not entered.
    """
    for key, value in node.items():
        full = f"{prefix}{key}"
        yield full, value
        if isinstance(value, Mapping) and full not in closed:
            yield from walk(value, f"{full}.", closed)


def leaves(node: Mapping[str, Config]) -> dict[str, Any]:
    """Return the values by dotted key, without mappings."""
    return {key: value for key, value in walk(node) if not isinstance(value, Mapping)}


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Return True if a name matches a pattern, such as `layer[12].*`. Case-sensitive."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
