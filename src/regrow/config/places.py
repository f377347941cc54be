"""Find the files of a config: in `conf/`, and in folders that flags or a search path add.

Also reads Hydra's ConfigStore, which holds what a script registered.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from regrow.config import flags
from regrow.config.own_code import shown
from regrow.config.yaml_files import read_yaml
from regrow.project import CONF

HEADER = "# @package _global_"


def folders() -> tuple[Path, ...]:
    """Return the folders of this command's search path, in Hydra's order, and `conf/`."""
    found = [place for place in map(_folder, _composed_from() or _typed()) if place is not None]
    return tuple(dict.fromkeys([*found, CONF]))


def _composed_from() -> list[str]:
    """Return the search path that Hydra has composed from; empty before it composes."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    if not HydraConfig.initialized():
        return []
    cfg: Any = HydraConfig.instance().cfg
    sources = OmegaConf.select(cfg, "hydra.runtime.config_sources")
    content: Any = [] if sources is None else OmegaConf.to_container(sources, resolve=False)
    return [
        f"{place['schema']}://{place['path']}"
        for place in content
        if place["provider"] not in ("hydra", "schema")
    ]


def _typed() -> list[str]:
    """Return the search path that the command line asks for, before Hydra composes from it."""
    given = flags.typed(flags.absolute(sys.argv[1:]))
    main = [given.get("path") or f"file://{CONF}", *([given["dir"]] if "dir" in given else [])]
    of_file = []
    for place in filter(None, map(_folder, main)):
        name = str(given.get("name", "train")).removesuffix(".yaml")
        node = read(place / f"{name}.yaml").get("hydra")
        its = node.get("searchpath") if isinstance(node, Mapping) else None
        of_file += [str(each) for each in its] if isinstance(its, list) else []
    return [*main, *map(str, given.get("searchpath") or of_file)]


def _folder(place: str) -> Path | None:
    scheme, there, path = place.rpartition("://")
    if scheme == "pkg":
        with contextlib.suppress(ImportError, ValueError, AttributeError):
            spec = importlib.util.find_spec(path.replace("/", "."))
            for found in (spec and spec.submodule_search_locations) or []:
                return Path(found)
        return None
    if there and scheme != "file":
        return None
    folder = Path(path)
    return CONF if folder.resolve() == CONF else folder if folder.is_dir() else None


def read(path: Path) -> dict[str, Any]:
    """Return a file's mapping; empty if it is missing or unreadable, which Hydra reports."""
    with contextlib.suppress(OSError, ValueError, yaml.YAMLError, RecursionError):
        content = read_yaml(path)
        return content if isinstance(content, dict) else {}
    return {}


def primary() -> str:
    """Return the name of the primary config that this command composes."""
    return str(flags.typed(sys.argv[1:]).get("name", "train"))


def primary_file(name: str) -> str:
    """Return the file that holds the keys of a primary config, as shown to the user."""
    path = file_of("", name)
    return shown(path) if path is not None else f"conf/{name.removesuffix('.yaml')}.yaml"


def is_group(name: str) -> bool:
    """Return True if the group exists on the search path or in the ConfigStore."""
    if not name or name.startswith(("/", ".")) or ".." in name or name.split("/")[0] == "hydra":
        return False
    return isinstance(stored(name), dict) or any((folder / name).is_dir() for folder in folders())


def groups() -> set[str]:
    """Return all top-level groups; only folders that hold a config file count."""
    found = {path.parent.name for folder in folders() for path in folder.glob("*/*.yaml")} | {
        name for name, node in (stored("") or {}).items() if isinstance(node, dict)
    }
    return found - {"hydra"}


def options(group: str) -> list[str]:
    """Return the options of a group, sorted, without files that begin with `_`."""
    found = {path.stem for folder in folders() for path in (folder / group).glob("[!_]*.yaml")}
    store = stored(group)
    found |= {name.removesuffix(".yaml") for name in store} if isinstance(store, dict) else set()
    return sorted(found)


def file_of(group: str, option: str) -> Path | None:
    """Return the file of an option, the first on the search path, or None."""
    option = option.removesuffix(".yaml")
    paths = (folder / group / f"{option}.yaml" for folder in folders())
    return next((path for path in paths if path.is_file()), None)


def stored(path: str) -> Any:
    """Return what the ConfigStore holds at `path`: a group's mapping, or a node as plain data.

    None if it holds nothing there.
    """
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    node: Any = ConfigStore.instance().repo
    for part in filter(None, path.split("/")):
        node = node.get(part) if isinstance(node, dict) else None
    if node is None or isinstance(node, dict):
        return node
    with contextlib.suppress(OmegaConfBaseException):
        return OmegaConf.to_container(OmegaConf.create(node.node), resolve=False)
    return {}


def own_keys(name: str, choices: Mapping[str, Any]) -> set[str]:
    """Return the top-level keys of a primary config and its parents, and the groups it chooses."""
    chosen = {group.partition("@")[0].split("/")[0] for group in choices}
    return chosen - {"hydra"} | {key for node in _primaries(name, set()) for key in node}


def _primaries(name: str, seen: set[str]) -> Iterator[dict[str, Any]]:
    name = name.removesuffix(".yaml")
    if name in seen:
        return
    seen.add(name)
    found = [read(folder / f"{name}.yaml") for folder in folders()]
    store = stored(f"{name}.yaml")
    for node in [*found, store if isinstance(store, dict) else {}]:
        yield {str(key): value for key, value in node.items() if key not in ("defaults", "hydra")}
        defaults = node.get("defaults")
        for parent in defaults if isinstance(defaults, list) else []:
            if isinstance(parent, str) and parent != "_self_":
                yield from _primaries(parent.removeprefix("/"), seen)


def without_header(group: str, chosen: Sequence[str]) -> Path | None:
    """Return the first chosen file of a group without `# @package _global_` at its start."""
    paths = [path for option in chosen if (path := file_of(group, option)) is not None]
    others = (p for p in paths if not p.read_text("utf-8", "replace").lstrip().startswith(HEADER))
    return next(others, None)


def package_of(path: Path) -> str:
    """Return the package that a file's first lines name, or ""."""
    found = re.match(r"(?:#.*\n|\s)*?#\s*@package\s+(\S+)", path.read_text("utf-8", "replace"))
    return found[1] if found else ""


def names_in(choice: Any) -> list[str]:
    """Return the options in a choice such as `cnn` or `[a,b]`, each without `.yaml`."""
    names = str(choice).strip("[]").split(",")
    return [name.strip(" '\"").removesuffix(".yaml") for name in names if name.strip(" '\"")]
