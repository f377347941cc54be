"""The keys that the files of the search path have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from regrow.config import places
from regrow.config.leads import RECIPES
from regrow.config.yaml_files import readable
from regrow.dotted import walk


def known_keys() -> dict[str, list[str]]:
    """Return all dotted keys on the search path, each with the options that have it.

    A top-level key has no options.
    """
    keys: dict[str, list[str]] = {group: [] for group in places.groups()}
    for _, node in readable("*.yaml"):
        content = {key: value for key, value in node.items() if key != "hydra"}
        keys |= {key: [] for key in _keys(content)}
    keys |= {key: [] for key in places.own_keys(places.primary(), {}) if key not in keys}
    for path in (path for folder in places.folders() for path in sorted(folder.glob("*/*.yaml"))):
        group = path.parent.name
        if group not in RECIPES:  # a recipe holds keys of other groups
            content = places.read(path)
            for key in _keys(content, f"{group}."):
                keys[key] = [*keys.get(key, []), path.stem]
    return keys


def options_with(key: str) -> str:
    """Return " group=option has it.", with the options that have the key; "" if none has."""
    options = [option for option in known_keys().get(key, []) if not option.startswith("_")]
    have = "has" if len(options) == 1 else "have"
    return f" {key.partition('.')[0]}={', '.join(options)} {have} it." if options else ""


def _keys(node: Mapping[str, Any], prefix: str = "") -> list[str]:
    left_out = {"defaults", "_target_", "_partial_"}
    return [key for key, _ in walk(node, prefix) if left_out.isdisjoint(key.split("."))]
