"""Complete older records with keys added since, at the values for the earlier behaviour.

A run's config holds every key that existed at its time. Later versions add keys, some with a
default that changes the maths. `complete` gives an older record the value that reproduces what the
code did without the key, so that resume, evaluate, predict and reproduce keep the run's meaning.

The rows of the lab's own options are in its module `added`: see `added_keys`.
"""

from __future__ import annotations

import copy
import importlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from regrow.config.command_line import override
from regrow.dotted import Config, leaves
from regrow.project import lab_name


class EarlierDefault(NamedTuple):
    target: str  # `_target_` of the node that holds the key
    key: str
    before: object  # the default before it changed


class AddedKey(NamedTuple):
    target: str | None  # `_target_` of the node that holds the key; None: the root of the config
    key: str  # from the root it may be dotted, for a node without a `_target_`
    before: object  # reproduces the behaviour from before the key existed
    follows: str | None = None  # the dotted key that conf/ interpolates it from


EARLY_EXTENSIONS = [
    ".bmp",
    ".gif",
    ".jpeg",
    ".jpg",
    ".pgm",
    ".png",
    ".ppm",
    ".tif",
    ".tiff",
    ".webp",
]
ADDED_KEYS: tuple[AddedKey, ...] = (
    AddedKey("regrow.feeding.loaders.Data", "changed", "refuse"),
    AddedKey("regrow.feeding.loaders.Data", "identity", "length"),
    AddedKey("regrow.feeding.loaders.Data", "integers", "float32"),
    AddedKey("regrow.feeding.loaders.Data", "ignore_index", None, "loss.ignore_index"),
    AddedKey("regrow.feeding.loaders.Data", "target_dtype", "float32"),
    AddedKey("regrow.feeding.loaders.Data", "final_sets", []),
    AddedKey("regrow.feeding.loaders.Data", "folds", None),
    AddedKey("regrow.feeding.loaders.Data", "fold", 0),
    AddedKey("regrow.feeding.loaders.Data", "sampling", None),
    AddedKey("regrow.feeding.loaders.Data", "transforms", []),
    AddedKey("regrow.feeding.loaders.Data", "mixing", None),
    AddedKey("regrow.feeding.loaders.Data", "cache", None),
    AddedKey("regrow.feeding.loaders.Data", "cache_root", None),
    AddedKey("regrow.feeding.loaders.Data", "cache_max_gb", 20),
    AddedKey("regrow.feeding.loaders.Data", "limit_by", "first"),
)
# Added fields of preprocessing.json, which says how a run reads the files it predicts for.
ADDED_PREPROCESSING: Mapping[str, Any] = {
    "exif_orientation": False,
    "extensions": EARLY_EXTENSIONS,
    "leave_out": [],
    "vocabulary": None,
    "decoder": "pillow",
}


def added_keys() -> tuple[AddedKey, ...]:
    """Return the rows of the engine and of the lab."""
    return (*ADDED_KEYS, *_of_lab("ADDED_KEYS"))


def _of_lab(name: str) -> Any:
    """Return one of the lab's lists: see `regrow.protocols.Added`, which needs torch."""
    return getattr(importlib.import_module(f"{lab_name()}.added"), name)


def complete(config: dict[str, Any]) -> dict[str, Any]:
    """Add the keys that a recorded config lacks. Returns them, dotted, with their values.

    Also deletes keys that this code no longer accepts: see `removed`.
    """
    added: dict[str, Any] = {}
    for key in removed(config):
        *parents, last = key.split(".")
        node = config
        for parent in parents:
            node = node[parent]
        del node[last]
    for row, node, key in _rows(config):
        last = key.rpartition(".")[2]
        if last not in node:
            node[last] = added[key] = copy.deepcopy(row.before)
    return added


def removed(config: Mapping[str, Config]) -> list[str]:
    """Return the dotted keys of a recorded config that this code no longer accepts."""
    return [
        f"{prefix}{key}"
        for prefix, node in (("", config), *_nodes(config))
        for target, key in _of_lab("REMOVED_KEYS")
        if target == node.get("_target_") and key in node
    ]


def _rows(config: dict[str, Any]) -> Iterator[tuple[AddedKey, dict[str, Any], str]]:
    """Yield each row that applies to a config, with the node and the dotted name of its key."""
    rows = added_keys()
    for row in rows:
        node: Any = config
        for parent in row.key.split(".")[:-1] if row.target is None else ():
            node = node.get(parent) if isinstance(node, dict) else None
        if row.target is None and isinstance(node, dict):
            yield row, node, row.key
    for prefix, node in _nodes(config):
        for row in rows:
            if row.target is not None and row.target == node.get("_target_"):
                yield row, node, f"{prefix}{row.key}"


def _nodes(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    for name, value in node.items():
        if isinstance(value, dict):
            yield f"{prefix}{name}.", value
            yield from _nodes(value, f"{prefix}{name}.")


def earlier(config: dict[str, Any]) -> dict[str, Any]:
    """Return the dotted keys that have their earlier value in a completed config."""
    return {
        key: row.before
        for row, node, key in _rows(config)
        if node.get(key.rpartition(".")[2], ...) == row.before
    }


def following(config: dict[str, Any], changed: Iterable[str]) -> set[str]:
    """Return the dotted keys that conf/ interpolates from one of the `changed` keys or groups."""
    found = set(changed)
    for row, _, key in _rows(config):
        if row.follows and any(f"{row.follows}.".startswith(f"{each}.") for each in found):
            found.add(key)
    return found.difference(changed)


def earlier_defaults(config: dict[str, Any], now: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the dotted keys of a recorded config that have a default from before it changed.

    Leaves out nodes that have another target in `now`, which has defaults of its own.
    """
    rows: tuple[EarlierDefault, ...] = _of_lab("EARLIER_DEFAULTS")
    targets = {prefix: node.get("_target_") for prefix, node in _nodes(now or config)}
    return {
        f"{prefix}{row.key}": row.before
        for prefix, node in _nodes(config)
        for row in rows
        if row.target == node.get("_target_") == targets.get(prefix)
        and node.get(row.key, ...) == row.before
    }


def adopt(config: dict[str, Any], added: Mapping[str, Any], typed: Iterable[str]) -> dict[str, Any]:
    """Copy earlier values into the config of the resumed run, and return what changed.

    Skips keys in `typed` (dotted), nodes that hold one, and keys that the config lacks.
    """
    adopted = {}
    for key, value in added.items():
        if any(f"{each}.".startswith(f"{key}.") for each in typed):
            continue
        *parents, last = key.split(".")
        node: Any = config
        for parent in parents:
            node = node.get(parent) if isinstance(node, dict) else None
        if isinstance(node, dict) and last in node and node[last] != value:
            node[last] = adopted[key] = value
    return adopted


def line(where: str, keys: Mapping[str, Config]) -> str:
    """Return one line about the keys that have an earlier value in an older record."""
    return (
        f"{where} is older than these keys or their defaults, and keeps what the code did then: "
        + ", ".join(as_overrides(keys))
    )


def as_overrides(keys: Mapping[str, Config]) -> list[str]:
    """Return the keys as overrides; a node as one for each of its values."""
    return [as_override(key, value) for key, value in leaves(keys).items()]


def as_override(key: str, value: Any) -> str:
    """Return `key=value` in Hydra's grammar, for a plain value."""
    if isinstance(value, str):
        return override(key, value)
    return f"{key}={json.dumps(value, ensure_ascii=False)}"
