"""Record the ConfigStore nodes that a script registered with a run or sweep, and restore them."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from regrow.errors import UserError, printable
from regrow.project import ROOT
from regrow.record import moved

NAME = "config_store.json"
ELSEWHERE = "REGROW_CONFIG_STORE"  # a folder whose nodes to register as well


def text(mask: Callable[[str], str] = str) -> str | None:
    """Return the registered nodes as the content of a file, or None if there are none.

    `mask` replaces secrets in the text of a node.
    """
    nodes = [
        {**node, "node": (masked := mask(node["node"])), "is_masked": masked != node["node"]}
        for node in _nodes(ConfigStore.instance().repo)
    ]
    return json.dumps(nodes, indent=2) + "\n" if nodes else None


def write(folder: Path) -> None:
    """Write the registered nodes into a copy of the code."""
    if (content := text()) is not None:
        (folder / NAME).write_text(content, encoding="utf-8")


def sealed(content: bytes | None) -> list[str]:
    """Return the line of a run's seal for the registered nodes, in a list; empty without them."""
    return [] if content is None else [f"{NAME} {hashlib.sha256(content).hexdigest()}"]


def recorded(folder: Path) -> list[str]:
    """Return `sealed` of the run's record in `folder`. Raises UserError if it cannot be read."""
    path = folder / ".hydra" / NAME
    try:
        return sealed(path.read_bytes() if path.is_file() else None)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None


def take_up(folder: Path = ROOT) -> None:
    """Register the nodes recorded in `folder`: a copy of the code, or a run's `.hydra`.

    Existing names stay. The caller must have checked that the folder is the user's own or trusted.
    Raises UserError for a damaged record.
    """
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
            store.store(**{**node, "node": OmegaConf.create(moved.in_text(node["node"]))})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged: {error}. Remove it, or restore it.") from None


def _nodes(repo: Mapping[str, Any], group: str = "") -> Iterator[dict[str, Any]]:
    """Yield all nodes except those of Hydra and its plugins."""
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
