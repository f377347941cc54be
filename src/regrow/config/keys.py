"""The keys that the files of the search path have."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from regrow.config import flags, places
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
    primary = flags.typed(sys.argv[1:]).get("name", "train")
    keys |= {key: [] for key in places.own_keys(primary, {}) if key not in keys}
    for path in (path for folder in places.folders() for path in sorted(folder.glob("*/*.yaml"))):
        group = path.parent.name
        if group not in RECIPES:  # a recipe holds keys of other groups
            content = places.read(path)
            for key in _keys(content, f"{group}."):
                keys[key] = [*keys.get(key, []), path.stem]
    return keys


def _keys(node: Mapping[str, Any], prefix: str = "") -> list[str]:
    left_out = {"defaults", "_target_", "_partial_"}
    return [key for key, _ in walk(node, prefix) if left_out.isdisjoint(key.split("."))]
