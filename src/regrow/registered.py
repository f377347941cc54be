"""Nodes of Hydra's ConfigStore that a script registered, kept with a run or a sweep."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from regrow.command_line import ROOT

NAME = "config_store.json"


def files() -> dict[str, str]:
    """The file that holds what was registered, by its name; none, if there is nothing."""
    nodes = [*_nodes(ConfigStore.instance().repo)]
    return {NAME: json.dumps(nodes, indent=2) + "\n"} if nodes else {}


def write(folder: Path) -> None:
    """Write what was registered into a copy of the code."""
    for name, text in files().items():
        (folder / name).write_text(text, encoding="utf-8")


def sealed(text: str | None) -> list[str]:
    """A line of a run's seal for what was registered; none, if there is nothing."""
    return [] if text is None else [f"{NAME} {hashlib.sha256(text.encode()).hexdigest()}"]


def recorded(folder: Path) -> list[str]:
    """The same, of the run in `folder`."""
    path = folder / ".hydra" / NAME
    return sealed(path.read_text(encoding="utf-8") if path.is_file() else None)


def take_up(folder: Path = ROOT) -> None:
    """Register what lies in a folder: a copy of the code, this one by default, or a run's `.hydra`.
    Names that are there already stay. A folder from elsewhere must have been checked to be the
    user's own or trusted."""
    path = folder / NAME
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
