"""Nodes of Hydra's ConfigStore that a script registered, kept with a run or a sweep."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from regrow.command_line import ROOT
from regrow.errors import UserError, printable

NAME = "config_store.json"
ELSEWHERE = "REGROW_CONFIG_STORE"  # the folder of another that is to be taken up


def text(mask: Callable[[str], str] = str) -> str | None:
    """What was registered, as the content of a file; None, if there is nothing. `mask` is to leave
    out secrets."""
    nodes = [*_nodes(ConfigStore.instance().repo)]
    shown = [{**node, "node": mask(node["node"])} for node in nodes]
    for node, its in zip(nodes, shown, strict=True):
        its["is_masked"] = its["node"] != node["node"]
    return json.dumps(shown, indent=2) + "\n" if nodes else None


def write(folder: Path) -> None:
    """Write what was registered into a copy of the code."""
    if (content := text()) is not None:
        (folder / NAME).write_text(content, encoding="utf-8")


def sealed(content: bytes | None) -> list[str]:
    """A line of a run's seal for what was registered; none, if there is nothing."""
    return [] if content is None else [f"{NAME} {hashlib.sha256(content).hexdigest()}"]


def recorded(folder: Path) -> list[str]:
    """That line for the record of the run in `folder`. Raises UserError if it cannot be read."""
    path = folder / ".hydra" / NAME
    try:
        return sealed(path.read_bytes() if path.is_file() else None)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None


def take_up(folder: Path = ROOT) -> None:
    """Register what lies in a folder: a copy of the code, this one by default, or a run's `.hydra`.
    Names that are there already stay. A folder from elsewhere must have been checked to be the
    user's own or trusted. Raises UserError for what cannot be registered."""
    path = folder / NAME
    if not path.is_file():
        return
    store = ConfigStore.instance()
    there = {(node["group"], node["name"]) for node in _nodes(store.repo)}
    try:
        for node in json.loads(path.read_text(encoding="utf-8")):
            if (node["group"], node["name"]) in there:
                continue
            if node.pop("is_masked"):
                name = printable(node["name"].removesuffix(".yaml"))
                print(
                    f"warning: {path}: {name} held a secret, which the record masks, and is left "
                    "out. To choose it, start with the script that registers it.",
                    file=sys.stderr,
                )
                continue
            store.store(**{**node, "node": OmegaConf.create(node["node"])})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged: {error}. Remove it, or restore it.") from None


def _nodes(repo: Mapping[str, Any], group: str = "") -> Iterator[dict[str, Any]]:
    """All nodes but Hydra's own, and those of its plugins."""
    for name, value in repo.items():
        if not group and (name == "hydra" or name.startswith("_")):
            continue
        if isinstance(value, Mapping):
            yield from _nodes(value, f"{group}/{name}".lstrip("/"))
        else:
            yield {
                "group": group or None,
                "name": name,
                "node": OmegaConf.to_yaml(value.node),  # as text: a node may hold any type
                "package": value.package,
                "provider": value.provider,
            }
