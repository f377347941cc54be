"""Hydra's flags that say which config a command composes. They are part of a run's identity.

A run records its source: the primary config's name, and the places beside `conf/` where files of
the config were found. A resume composes from the same source, and every printed command names it.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from regrow.command_line import ROOT, quoted, read, shell
from regrow.errors import UserError

WITH_A_VALUE = {
    **{"-cn": "--config-name", "-cd": "--config-dir", "-cp": "--config-path"},
    **{"-c": "--cfg", "-p": "--package", "-i": "--info", "": "--experimental-rerun"},
}
SEARCH_PATH = "hydra.searchpath"
KEYS = {"--config-name": "name", "--config-path": "path", "--config-dir": "dir"}
PLACES = ("path", "dir", "searchpath")
COPIES = "places"  # in a sweep's frozen code
DEFAULT: dict[str, Any] = {"name": "train", "path": None, "dir": None, "searchpath": []}


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The flags, each followed by its value, and the overrides. Hydra's parser loses overrides on
    one side of a flag, so that flags go first."""
    flags: list[str] = []
    overrides = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        name, equals, value = argument.partition("=")
        if not argument.startswith("-"):
            overrides.append(argument)
        elif (long := WITH_A_VALUE.get(name, name)) in WITH_A_VALUE.values():
            if equals or rest:
                flags += [long, value if equals else rest.pop(0)]
            else:
                flags.append(argument)
        else:
            flags.append(argument)
    return flags, overrides


def absolute(arguments: Sequence[str]) -> list[str]:
    """The arguments with flags first, and with places that mean the same in any folder."""
    flags, overrides = split(arguments)
    for index in range(1, len(flags)):
        value, of = flags[index], flags[index - 1]
        if of == "--config-dir":
            flags[index] = os.path.abspath(value)  # noqa: PTH100  links stay
        elif of == "--config-path" and "://" not in value:
            # Hydra's rule: it is relative to the script.
            flags[index] = os.path.normpath(ROOT / "scripts" / value)
    overrides = [_with_absolute_places(override) for override in overrides]
    return [*flags, *overrides]


def _with_absolute_places(override: str) -> str:
    if override.partition("=")[0] != SEARCH_PATH:
        return override
    places = read(override)
    if isinstance(places, str):
        places = [places]
    if not isinstance(places, list) or not all(isinstance(place, str) for place in places):
        return override  # Hydra says what is wrong
    return as_override([_absolute_place(place) for place in places])


def _absolute_place(place: str) -> str:
    scheme, there, path = place.rpartition("://")
    if there and scheme != "file":
        return place
    return f"file://{os.path.abspath(path)}"  # noqa: PTH100  links stay


def as_override(places: Sequence[str]) -> str:
    return f"{SEARCH_PATH}=[{','.join(map(quoted, places))}]"


def typed(arguments: Sequence[str]) -> dict[str, Any]:
    """What of a source these arguments name; see `absolute`."""
    flags, overrides = split(arguments)
    found: dict[str, Any] = {
        KEYS[flag]: value for flag, value in itertools.pairwise(flags) if flag in KEYS
    }
    for override in overrides:
        if override.partition("=")[0] == SEARCH_PATH:
            places = read(override)
            found["searchpath"] = places if isinstance(places, list) else []
    return found


def source_of(hydra: Any) -> dict[str, Any]:
    """The source that Hydra composed from, by its own config node."""
    from omegaconf import OmegaConf

    source = {**DEFAULT, "name": str(hydra.job.config_name), "searchpath": []}
    if (copied := copied_source(ROOT)) is not None:
        return copied
    # A folder's name may look like an interpolation, and is none.
    places: Any = OmegaConf.to_container(hydra.runtime.config_sources, resolve=False)
    for place in places:
        provider, schema, path = place["provider"], place["schema"], place["path"]
        if provider == "main":
            own = schema == "file" and Path(path).resolve() == ROOT / "conf"
            source["path"] = None if own else path if schema == "file" else f"{schema}://{path}"
        elif provider == "command-line":
            source["dir"] = path
        elif provider == "hydra.searchpath in command-line":
            source["searchpath"].append(f"{schema}://{path}")
    return source


def folders_of(source: Mapping[str, Any]) -> dict[str, Path]:
    """The folders that a source adds beside `conf/`, each with the name of its copy."""
    places = {"dir": source["dir"], "path": source["path"]}
    places |= {f"searchpath_{n}": place for n, place in enumerate(source["searchpath"])}
    found = {name: re.sub(r"^file://", "", str(place or "")) for name, place in places.items()}
    return {name: Path(path) for name, path in found.items() if path and "://" not in path}


def copied_source(code: Path) -> dict[str, Any] | None:
    """The source whose folders were copied into a sweep's frozen code; None if it has none."""
    with contextlib.suppress(OSError, ValueError):
        return checked(_json(code / COPIES / "source.json"), code)
    return None


def in_copy(source: Mapping[str, Any], code: Path) -> dict[str, Any]:
    """The source with the copies of its folders in a sweep's frozen code in their place."""
    copies = {name: str(code.absolute() / COPIES / name) for name in folders_of(source)}
    places = [
        f"file://{copies[f'searchpath_{n}']}" if f"searchpath_{n}" in copies else place
        for n, place in enumerate(source["searchpath"])
    ]
    named = {key: copies.get(key, source[key]) for key in ("dir", "path")}
    return {**source, **named, "searchpath": places}


def arguments_of(source: Mapping[str, Any] | None, *, default: str = "train") -> list[str]:
    """What to type for a source, flags first. Places in the current folder are relative to it."""
    source = source or DEFAULT
    found = [] if source["name"] == default else ["--config-name", str(source["name"])]
    if source["path"] is not None:
        found += ["--config-path", str(source["path"])]
    if source["dir"] is not None:
        place = Path(source["dir"])
        inside = place.is_relative_to(Path.cwd())
        found += ["--config-dir", str(place.relative_to(Path.cwd()) if inside else place)]
    if source["searchpath"]:
        found.append(as_override(source["searchpath"]))
    return found


def others(flags: Sequence[str]) -> list[str]:
    """The flags, as `split` gives them, that have nothing to do with the source."""
    kept = []
    rest = list(flags)
    while rest:
        flag = rest.pop(0)
        if flag in KEYS:
            rest = rest[1:]
        else:
            kept.append(flag)
    return kept


def of_sweep(folder: Path) -> dict[str, Any]:
    """The source of the sweep in `folder`; of one from before it was recorded, that of a job."""
    first = None
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
        content = _json(folder / "sweep.json")
        if isinstance(content.get("config"), dict):
            first = content["config"]
        else:
            jobs = [folder / job["folder"] for job in content["jobs"]]
            first = next((job for job in jobs if (job / ".hydra").is_dir()), None)
    if isinstance(first, Path):
        return recorded(first)
    return dict(DEFAULT) if first is None else checked(first, folder)


def recorded(folder: Path) -> dict[str, Any]:
    """The source of the run in `folder`: of its manifest, or, for one from before that held it or
    one that was killed at its start, of what Hydra composed. Anybody may have written both."""
    found: dict[str, Any] | None = None
    with contextlib.suppress(OSError, ValueError):
        content = _json(folder / "manifest.json")
        found = content.get("config") if isinstance(content, dict) else None
    if isinstance(found, dict):
        return checked(found, folder)
    found = None
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, yaml.YAMLError):
        text = (folder / ".hydra" / "hydra.yaml").read_text(encoding="utf-8")
        node = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        found = {**DEFAULT, "name": node["job"]["config_name"], "searchpath": []}
        for place in node["runtime"]["config_sources"]:
            if place["provider"] == "command-line":
                found["dir"] = place["path"]
            elif place["provider"] == "hydra.searchpath in command-line":
                found["searchpath"].append(f"{place['schema']}://{place['path']}")
    return dict(DEFAULT) if found is None else checked(found, folder)


def checked(source: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A recorded source, or UserError for one that no run wrote."""
    source = {key: source.get(key, value) for key, value in DEFAULT.items()}
    name, places = source["name"], source["searchpath"]
    fits = isinstance(name, str) and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)*", name) is not None
    fits = fits and ".." not in str(name)
    fits = fits and isinstance(places, list) and all(isinstance(place, str) for place in places)
    fits = fits and all(
        source[key] is None or isinstance(source[key], str) for key in ("path", "dir")
    )
    if not fits:
        raise UserError(f"resume={folder}: its record names a config that no run has: {source}.")
    return source


def followed(
    where: str, source: Mapping[str, Any], given: Mapping[str, Any], *, is_own: bool
) -> dict[str, Any]:
    """The source to compose a record from: the recorded one, but for places that were `given`.

    `where` names the record. Raises UserError for another config's name, and for a place that was
    not typed, unless the folder is the user's own: one from elsewhere adds no search path.
    """
    if given.get("name", source["name"]) != source["name"]:
        raise UserError(
            f"{where}: it was started with --config-name {source['name']}, and this says "
            f"--config-name {given['name']}. Leave that out."
        )
    for key in PLACES:
        if source[key] and key not in given and not is_own:
            words = shell(arguments_of({**DEFAULT, key: source[key]}))
            raise UserError(
                f"{where}: it was composed of files from elsewhere, and a folder does not add a "
                f"search path by itself. If you trust them, add: {words}"
            )
    return {**source, **{key: value for key, value in given.items() if key in DEFAULT}}


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
