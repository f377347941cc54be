"""Nodes of Hydra's ConfigStore that a script registered, for the frozen copy that runs a sweep."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from regrow.command_line import ROOT

NAME = "config_store.json"


def write(folder: Path) -> None:
    """Write what was registered into a copy of the code. Nothing, if there is nothing."""
    nodes = [*_nodes(ConfigStore.instance().repo)]
    if nodes:
        (folder / NAME).write_text(json.dumps(nodes, indent=2) + "\n", encoding="utf-8")


def take_up(code: Path = ROOT) -> None:
    """Register what lies in a copy of the code, this one by default, but for names that are there
    already. A copy from elsewhere must have been checked to be the user's own or trusted."""
    path = code / NAME
    if not path.is_file():
        return
    store = ConfigStore.instance()
    there = {(node["group"], node["name"]) for node in _nodes(store.repo)}
    for node in json.loads(path.read_text(encoding="utf-8")):
        if (node["group"], node["name"]) not in there:
            store.store(**{**node, "node": OmegaConf.create(node["node"])})


def _nodes(repo: Mapping[str, Any], group: str = "") -> Iterator[dict[str, Any]]:
    """All nodes but Hydra's own, and those of its plugins, as plain data."""
    for name, value in repo.items():
        if not group and (name == "hydra" or name.startswith("_")):
            continue
        if isinstance(value, Mapping):
            yield from _nodes(value, f"{group}/{name}".lstrip("/"))
        else:
            yield {
                "group": group or None,
                "name": name,
                "node": OmegaConf.to_container(value.node, resolve=False),
                "package": value.package,
                "provider": value.provider,
            }
