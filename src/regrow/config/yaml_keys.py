"""The keys of a YAML file with their lines and comments, which a plain reader drops."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

MERGE = "tag:yaml.org,2002:merge"


class Key(NamedTuple):
    """Where a key stands in its file, and what its comment says ("" without one)."""

    line: int  # from 1
    comment: str


class Choice(NamedTuple):
    """An entry of a defaults list."""

    group: str  # without `override`, a slash and a package; "" for a config's name alone
    option: str
    line: int  # from 1
    is_override: bool = False


def keys_of(path: Path) -> dict[str, Key]:
    """Return the keys of a YAML file by dotted name, in their order.

    A key's comment is the one behind its value or, without it, the lines directly above the key.
    Raises OSError, ValueError or yaml.YAMLError for a file that cannot be read.
    """
    text = path.read_text(encoding="utf-8-sig")
    return dict(_keys(_composed(text), text.splitlines(), ""))


def choices_of(path: Path) -> list[Choice]:
    """Return the entries of a file's defaults list, a list of options as one entry each.

    Raises OSError, ValueError or yaml.YAMLError for a file that cannot be read.
    """
    root = _composed(path.read_text(encoding="utf-8-sig"))
    pairs = root.value if isinstance(root, yaml.MappingNode) else []
    lists = (value for key, value in pairs if key.value == "defaults")
    return [choice for node in lists for entry in node.value for choice in _choices(entry)]


def _choices(entry: Any) -> Iterator[Choice]:
    if isinstance(entry, yaml.ScalarNode):
        yield Choice("", entry.value, entry.start_mark.line + 1)
    for key, value in entry.value if isinstance(entry, yaml.MappingNode) else ():
        words = str(key.value).split()
        options = value.value if isinstance(value, yaml.SequenceNode) else [value]
        for option in options:
            line = option.start_mark.line + 1
            group = words[-1].lstrip("/").partition("@")[0]
            yield Choice(group, str(option.value), line, words[0] == "override")


def _composed(text: str) -> Any:
    return yaml.compose(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def head_of(path: Path) -> str:
    """Return the comment at the top of a file in one line, without Hydra's header."""
    lines = []
    for line in path.read_text(encoding="utf-8-sig").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            lines.append(_said(line))
    return " ".join(lines)


def _keys(node: Any, lines: list[str], prefix: str) -> Iterator[tuple[str, Key]]:
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        if key.tag == MERGE:  # the mapping's own keys win, which a reader finds elsewhere
            yield from _merged(value, lines, prefix)
    for key, value in node.value:
        if key.tag == MERGE:
            continue
        name = f"{prefix}{key.value}"
        yield name, Key(key.start_mark.line + 1, _comment(key, value, lines))
        for inner, found in _keys(value, lines, f"{name}."):
            yield inner, Key(found.line, "") if value.flow_style else found


def _merged(value: Any, lines: list[str], prefix: str) -> Iterator[tuple[str, Key]]:
    """Yield the keys of the mapping behind `<<`, or of several, of which the first wins."""
    mappings = value.value if isinstance(value, yaml.SequenceNode) else [value]
    for mapping in reversed(mappings):
        yield from _keys(mapping, lines, prefix)


def _comment(key: Any, value: Any, lines: list[str]) -> str:
    is_block = isinstance(value, yaml.CollectionNode) and not value.flow_style
    end = key.end_mark if is_block else value.end_mark
    behind = lines[end.line][end.column :] if end.line < len(lines) else ""
    if found := re.match(r":?\s+(#.*)", behind):
        return _said(found[1])
    above: list[str] = []
    number = key.start_mark.line - 1
    indent = " " * key.start_mark.column
    while number >= 0 and lines[number].startswith(f"{indent}#"):
        above.insert(0, _said(lines[number]))
        number -= 1
    return " ".join(above) if number >= 0 else ""  # the first lines are the file's own


def _said(comment: str) -> str:
    return comment.strip().lstrip("#").strip()
