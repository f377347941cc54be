"""The keys of a group's options, each with its value and its comment in YAML."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from regrow.config import places
from regrow.config.own_code import shown
from regrow.config.rules import RULES, applies, of_shipped
from regrow.config.yaml_files import read_yaml
from regrow.config.yaml_keys import keys_of
from regrow.errors import UserError
from regrow.project import CONF

_WORD = r"[\w.]+(?: \([^)]*\))?"
_WORDS = re.compile(rf"{_WORD}(?:, {_WORD})+")
_REFERENCE = re.compile(r"\$\{(\.*)([\w.]+)\}")

Find = Callable[[str, str], Path | None]


@dataclass(frozen=True)
class KeyEntry:
    """A key of one option: its value, its comment, and what stands below it."""

    option: str
    value: Any
    comment: str = ""
    below: dict[str, KeyEntry] = field(default_factory=dict)

    @property
    def target(self) -> str | None:
        target = self.below.get("_target_")
        return None if target is None else str(target.value)

    def at(self, key: str) -> KeyEntry | None:
        """Return the entry of a dotted key below this one, or None; for "", this one."""
        found: KeyEntry | None = self
        for part in key.split(".") if key else ():
            found = found.below.get(part) if found is not None else None
        return found

    def listed(self) -> list[str]:
        """Return the options that the comment lists, if it is a list of words and no more."""
        return self.suggested() if _WORDS.fullmatch(self.comment) else []

    def suggested(self) -> list[str]:
        """Return the options that the comment begins with, if the value is one of them."""
        start = _WORDS.match(self.comment)
        words = re.sub(r" \([^)]*\)", "", start[0]).split(", ") if start else []
        return words if self.value in words else []


def accepted(path: str, entry: KeyEntry, parent: KeyEntry | None) -> str:
    """Return in words what values a key takes; "" if any."""
    if path in RULES and applies(parent.target if parent else None):
        return RULES[path].says
    if words := entry.listed():
        return f"one of {', '.join(words)}"
    rule = of_shipped(path, entry.value)
    return rule.says if rule is not None else ""


def in_conf(group: str, option: str) -> Path | None:
    """Return the file of an option in conf/ alone, or None."""
    path = CONF / group / f"{option}.yaml"
    return path if path.is_file() else None


def option(
    group: str, name: str, find: Find = places.file_of, seen: tuple[str, ...] = ()
) -> KeyEntry:
    """Return an option of a group with what it inherits; the comment of a key is the nearest.

    A key without one that repeats another key of the group, as `${..root}` does, has that key's.
    `find` returns an option's file. Without one, a node of the ConfigStore gives the keys. `seen`
    are the options that inherit from this one. Raises OSError, ValueError or yaml.YAMLError for a
    file that cannot be read.
    """
    if (path := find(group, name)) is not None:
        content = _content(path)
    else:
        stored = places.stored(f"{group}/{name}.yaml")
        content = stored if isinstance(stored, dict) else {}
    found = KeyEntry(name, {})
    for parent in _parents(content, (*seen, name)):
        found = _merged(found, option(group, parent, find, (*seen, name)), name)
    found = _merged(found, _own(content, name, path), name)
    return found if seen else _explained(found, found, group, ())


def _explained(entry: KeyEntry, whole: KeyEntry, group: str, path: tuple[str, ...]) -> KeyEntry:
    """Return a key of the group `whole` with the comment of the key that its value repeats."""
    below = {k: _explained(its, whole, group, (*path, k)) for k, its in entry.below.items()}
    comment, repeats = entry.comment, repeated(f"{group}.{'.'.join(path)}", entry.value)
    if not comment and repeats.startswith(f"{group}."):
        found = whole.at(".".join(repeats.split(".")[group.count("/") + 1 :]))
        comment = found.comment if found is not None else ""
    return KeyEntry(entry.option, entry.value, comment, below)


def repeated(path: str, value: Any) -> str:
    """Return the dotted key whose value a key at `path` takes, `${..root}`; "" if it does not."""
    found = _REFERENCE.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        return ""
    parts = path.split(".")
    above = parts[: max(len(parts) - len(found[1]), 0)] if found[1] else []
    return ".".join([*above, found[2]])


def inherited(group: str, name: str, seen: tuple[str, ...] = ()) -> list[str]:
    """Return the options of its group that an option inherits from, the nearest first."""
    path = places.file_of(group, name)
    found: list[str] = []
    for parent in reversed(_parents(read_yaml(path), (*seen, name)) if path is not None else []):
        found += [parent, *inherited(group, parent, (*seen, name))]
    return unique(found)


def _parents(content: Mapping[str, Any], seen: Collection[str]) -> list[str]:
    """Return the options that the defaults list of an option names, without those `seen`."""
    defaults = content.get("defaults")
    names = defaults if isinstance(defaults, list) else []
    return [each for each in names if isinstance(each, str) and each not in ("_self_", *seen)]


def set_at(group: str, name: str, key: str) -> str:
    """Return file:line where an option, or one that it inherits from, sets a key; "" if nowhere.

    `key` is dotted, without the group. The group "" is for primary configs, such as train.
    """
    for each in (name, *inherited(group, name)):
        path = places.file_of(group, each)
        if path is not None and key in (keys := keys_of(path)):
            return f"{shown(path)}:{keys[key].line}"
    return ""


def of_file(path: Path, name: str) -> KeyEntry:
    """Return the keys of one file, without what it inherits. Raises UserError for a list."""
    return _own(_content(path), name, path)


def _content(path: Path) -> dict[str, Any]:
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a mapping. Write lines of `key: value`.")
    return content


def _own(content: Mapping[str, Any], name: str, path: Path | None) -> KeyEntry:
    keys = keys_of(path) if path is not None else {}
    comments = {key: found.comment for key, found in keys.items()}
    return _below(name, {k: v for k, v in content.items() if k != "defaults"}, comments, "")


def _below(name: str, value: Any, comments: Mapping[str, str], path: str) -> KeyEntry:
    below = {}
    if isinstance(value, Mapping):
        for key, its in value.items():
            below[str(key)] = _below(name, its, comments, f"{path}.{key}" if path else str(key))
    return KeyEntry(name, value, comments.get(path, ""), below)


def _merged(base: KeyEntry, over: KeyEntry, name: str) -> KeyEntry:
    comment = over.comment or base.comment
    if not (base.below or over.below) or not isinstance(over.value, Mapping):
        return KeyEntry(name, over.value, comment, {})
    below = dict(base.below) if isinstance(base.value, Mapping) else {}
    for key, entry in over.below.items():
        below[key] = _merged(below[key], entry, name) if key in below else entry
    return KeyEntry(name, {key: entry.value for key, entry in below.items()}, comment, below)


def unique(items: Iterable[Any]) -> list[Any]:
    """Return the items without repetition, in their order."""
    return [*dict.fromkeys(items)]
