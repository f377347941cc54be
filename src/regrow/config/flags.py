"""Hydra's flags that select which config a command composes. They are part of a run's identity.

A run records its source: the primary config's name, and the places besides `conf/` where config
files may be found. Resuming composes from the same source, and every printed command names it.
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
from omegaconf import OmegaConf

from regrow.config.command_line import command, quoted, read, relative, shell
from regrow.config.yaml_files import read_yaml
from regrow.errors import UserError
from regrow.project import CONF, ROOT
from regrow.record.records import read_json

WITH_A_VALUE = {
    **{"-cn": "--config-name", "-cd": "--config-dir", "-cp": "--config-path"},
    **{"-c": "--cfg", "-p": "--package", "-i": "--info", "": "--experimental-rerun"},
}
SEARCH_PATH = "hydra.searchpath"
KEYS = {"--config-name": "name", "--config-path": "path", "--config-dir": "dir"}
CHECK = "regrow.config.check.CheckBeforeStart"
VALUES = {
    "--cfg": ("job", "hydra", "all"),
    "--info": ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath"),
}
COMMANDS = {  # Hydra executes only one of these
    **{"-m": "--multirun", "--multirun": "--multirun", "-r": "--run", "--run": "--run"},
    **{"--cfg": "--cfg", "--info": "--info"},
    **{"-sc": "--shell-completion", "--shell-completion": "--shell-completion"},
}
MULTIRUN = ("-m", "--multirun")
PLACES = ("path", "dir", "searchpath")
COPIES = "places"  # a folder in a sweep's frozen code
DEFAULT: dict[str, Any] = {"name": "train", "path": None, "dir": None, "searchpath": []}


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the flags, each followed by its value, and the overrides.

    Flags must come first: Hydra's parser loses overrides on one side of a flag.
    """
    flags: list[str] = []
    overrides = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        name, equals, value = argument.partition("=")
        if not argument.startswith("-"):
            overrides.append(argument)
        elif (long := WITH_A_VALUE.get(name, name)) in WITH_A_VALUE.values():
            if long == "--info" and not equals and (not rest or "=" in rest[0]):
                flags += [long, "all"]
            elif equals or rest:
                flags += [long, value if equals else rest.pop(0)]
            else:
                flags.append(long)
        else:
            flags.append(argument)
    return flags, overrides


def check(arguments: Sequence[str]) -> None:
    """Raise UserError for flags that lack a value or cannot be combined.

    Hydra would print its usage or a traceback, or ignore them.
    """
    found, overrides = split(arguments)
    for flag, value in itertools.pairwise([*found, ""]):
        if flag in WITH_A_VALUE.values() and (value == "" or value.startswith("-")):
            raise UserError(f"{flag}: its value is missing.")
        if flag in VALUES and value not in VALUES[flag]:
            raise UserError(f"{flag} {value}: it must be one of {', '.join(VALUES[flag])}.")
        if flag == "--config-path" and "://" not in value:
            _refuse_no_folder(flag, value)
    for argument in found:
        flag, equals, _ = argument.partition("=")
        if equals and flag.startswith("-"):
            raise UserError(f"{argument}: {flag} takes no value. Write {flag}")
    for override in overrides:
        key, _, value = override.partition("=")
        if key.lstrip("+") == SEARCH_PATH and not _are_places(read(override)):
            shown = "/a/folder" if value in ("", "null") else value
            raise UserError(f"{override}: it takes a list of places: {SEARCH_PATH}=[{shown}]")
    if "--experimental-rerun" in found:
        place = found[found.index("--experimental-rerun") + 1]
        raise UserError(
            f"--experimental-rerun {place}: runs keep no pickle of their config. To run one again: "
            "scripts/reproduce.py run=<its folder>. To resume it: resume=<its folder>."
        )
    commands = [*dict.fromkeys(COMMANDS[flag] for flag in found if flag in COMMANDS)]
    if len(commands) > 1 and not {"-h", "--help", "--hydra-help", "--version"} & {*found}:
        first, second = commands[:2]
        hint = ""
        if "--multirun" in commands and {"--cfg", "--info"} & {*commands}:
            shown = "--cfg" if "--cfg" in commands else "--info"
            hint = f" {shown} shows one config: leave out -m, and give each key one value."
        raise UserError(f"{first} and {second} cannot be combined.{hint or ' Leave one out.'}")
    if "--resolve" in found and not {"--cfg", "-h", "--help"} & {*found}:
        raise UserError("--resolve is for --cfg. Add --cfg job, or leave it out.")
    if "--package" in found and "--cfg" not in found:
        place = found[found.index("--package") + 1]
        raise UserError(f"--package {place} is for --cfg. Add --cfg job, or leave it out.")
    completes = ("install=", "uninstall=", "query=")
    if "--shell-completion" in commands and not any(o.startswith(completes) for o in overrides):
        raise UserError("--shell-completion: say what to do with it, such as -sc install=bash.")


def _refuse_no_folder(flag: str, value: str) -> None:
    """Raise UserError for a --config-path that is not a folder; it is relative to the script."""
    if (ROOT / "scripts" / value).is_dir():
        return
    _refuse_record(Path(value), f"{flag} {value}")
    beside = "" if Path(value).is_absolute() else f" in {ROOT / 'scripts'}, where Hydra looks"
    typed = shell(["--config-dir", value])
    added = f" To add a folder to conf/: {typed}" if Path(value).is_dir() else ""
    raise UserError(f"{flag} {value}: there is no such folder{beside}.{added}")


def _are_places(value: Any) -> bool:
    listed = value if isinstance(value, list) else [value]
    return all(isinstance(place, str) for place in listed)


def absolute(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with flags first, and with absolute paths in flags and search path."""
    flags, overrides = split(arguments)
    for index in range(1, len(flags)):
        value, of = flags[index], flags[index - 1]
        if of == "--config-dir":
            flags[index] = os.path.abspath(value)  # noqa: PTH100  links stay
        elif of == "--config-path" and "://" not in value:
            # Hydra takes it relative to the script.
            flags[index] = os.path.normpath(ROOT / "scripts" / value)
    overrides = [_with_absolute_places(override) for override in overrides]
    return [*flags, *overrides]


def _with_absolute_places(override: str) -> str:
    if override.partition("=")[0].lstrip("+") != SEARCH_PATH:  # Hydra ignores one with a plus
        return override
    places = read(override)
    if isinstance(places, str):
        places = [places]
    if not _are_places(places):
        return override  # Hydra reports the error
    return as_override([_absolute_place(place) for place in places])


def _absolute_place(place: str) -> str:
    scheme, there, path = place.rpartition("://")
    if there and scheme != "file":
        return place
    return f"file://{os.path.abspath(path)}"  # noqa: PTH100  links stay


def as_override(places: Sequence[str]) -> str:
    return f"{SEARCH_PATH}=[{','.join(map(quoted, places))}]"


def typed(arguments: Sequence[str]) -> dict[str, Any]:
    """Return the parts of a source that these arguments name; see `absolute`."""
    flags, overrides = split(arguments)
    found: dict[str, Any] = {
        KEYS[flag]: value for flag, value in itertools.pairwise(flags) if flag in KEYS
    }
    for override in overrides:
        if override.partition("=")[0] == SEARCH_PATH:
            places = read(override)
            found["searchpath"] = places if isinstance(places, list) else []
    return found


def folders(arguments: Sequence[str]) -> list[Path]:
    """Return the existing folders that these arguments add to `conf/`; see `absolute`."""
    found = typed(arguments)
    places = [found.get("path"), found.get("dir"), *found.get("searchpath", [])]
    texts = [str(place).removeprefix("file://") for place in places if place]
    return [Path(text) for text in texts if Path(text).is_dir()]


def refuse_records(arguments: Sequence[str]) -> None:
    """Raise UserError for flags that compose a run's record, as Hydra repeats a job from `.hydra`.

    Also for a primary config without the check of every start. Hydra would create a folder before
    it failed. Call `absolute` on the arguments first.
    """
    given, overrides = split(arguments)
    for flag, value in itertools.pairwise(given):
        if flag in ("--config-path", "--config-dir"):
            # The user may have meant --config-path relative to the current folder.
            within = os.path.relpath(value, ROOT / "scripts")
            for place in (Path(value), Path(within)):
                _refuse_record(place, f"{flag} {relative(place)}")
    for place in folders([o for o in overrides if o.startswith(f"{SEARCH_PATH}=")]):
        _refuse_record(place, f"{SEARCH_PATH}=[{relative(place)}]")
    name = typed(arguments).get("name")
    if name is None or {"-sc", "--shell-completion"} & {*given}:
        return
    main = typed(arguments).get("path") or str(CONF)
    places = [*folders(arguments), Path(main.removeprefix("file://"))]
    if (path := _found(name, places)) is not None and _is_checked(path, places) is False:
        raise UserError(
            f"--config-name {name}: {relative(path)} does not build on train. Begin it with "
            "`defaults: [train, _self_]`. To run a run's record again: "
            "scripts/reproduce.py run=<its folder>."
        )


def _refuse_record(place: Path, where: str) -> None:
    run = place.parent if place.name == ".hydra" else place
    if not (run / ".hydra" / "overrides.yaml").is_file():
        return
    folder = relative(run)
    raise UserError(
        f"{where} holds the record of a run. To run it again and compare: "
        f"{command(f'run={folder}', script='reproduce.py')}. To resume it: "
        f"{command(f'resume={folder}')}."
    )


def _found(name: str, places: Sequence[Path]) -> Path | None:
    files = [place / f"{name.removesuffix('.yaml')}.yaml" for place in places]
    return next((file for file in files if file.is_file()), None)


def _is_checked(path: Path, places: Sequence[Path], depth: int = 9) -> bool | None:
    """Return whether a primary config, or one that it builds on, has `CheckBeforeStart`.

    None if its files do not tell.
    """
    try:
        content = read_yaml(path)
    except (OSError, ValueError, yaml.YAMLError):
        return None  # Hydra reports the error
    if not isinstance(content, dict):
        raise UserError(f"{relative(path)} must hold keys and values, and holds a list or a text.")
    if CHECK in json.dumps(content.get("hydra"), default=str):
        return True
    answer: bool | None = False
    defaults = content.get("defaults")
    for entry in defaults if isinstance(defaults, list) else []:
        if not isinstance(entry, str) or entry == "_self_":
            continue
        name = re.sub(r"^optional |@.*", "", entry).lstrip("/")
        found = _found(name, places) if depth else None
        below = None if found is None else _is_checked(found, places, depth - 1)
        if below or answer is False:
            answer = below
        if answer:
            break
    return answer


def source_of(hydra: Any) -> dict[str, Any]:
    """Return the source that Hydra composed from, according to its own config node."""
    if (copied := copied_source(ROOT)) is not None:
        return copied
    # Do not resolve: a folder's name may contain `${`.
    places: Any = OmegaConf.to_container(hydra.runtime.config_sources, resolve=False)
    source = _added_to_conf(str(hydra.job.config_name), places)
    for place in places:
        schema, path = place["schema"], place["path"]
        if place["provider"] == "main" and (schema, Path(path).resolve()) != ("file", CONF):
            source["path"] = path if schema == "file" else f"{schema}://{path}"
    return source


def _added_to_conf(name: Any, places: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the source of a config of this name with the places that its command added."""
    source = {**DEFAULT, "name": name, "searchpath": []}
    for place in places:
        if place["provider"] == "command-line":
            source["dir"] = place["path"]
        elif place["provider"] == "hydra.searchpath in command-line":
            source["searchpath"].append(f"{place['schema']}://{place['path']}")
    return source


def folders_of(source: Mapping[str, Any]) -> dict[str, Path]:
    """Return the folders that a source adds to `conf/`, by the name of their copy."""
    places = {"dir": source["dir"], "path": source["path"]}
    places |= {f"searchpath_{n}": place for n, place in enumerate(source["searchpath"])}
    found = {name: re.sub(r"^file://", "", str(place or "")) for name, place in places.items()}
    return {name: Path(path) for name, path in found.items() if path and "://" not in path}


def copied_source(code: Path) -> dict[str, Any] | None:
    """Return the source whose folders were copied into a sweep's frozen code, or None."""
    with contextlib.suppress(OSError, ValueError):
        return checked(read_json(code / COPIES / "source.json"), code)
    return None


def in_copy(source: Mapping[str, Any], code: Path) -> dict[str, Any]:
    """Return the source with its folders replaced by their copies in a sweep's frozen code."""
    copies = {name: str(code.absolute() / COPIES / name) for name in folders_of(source)}
    places = [
        f"file://{copies[f'searchpath_{n}']}" if f"searchpath_{n}" in copies else place
        for n, place in enumerate(source["searchpath"])
    ]
    named = {key: copies.get(key, source[key]) for key in ("dir", "path")}
    return {**source, **named, "searchpath": places}


def arguments_of(source: Mapping[str, Any] | None) -> list[str]:
    """Return the arguments that select a source, flags first.

    A --config-dir below the current folder is relative to it.
    """
    source = source or DEFAULT
    found = [] if source["name"] == "train" else ["--config-name", str(source["name"])]
    if source["path"] is not None:
        found += ["--config-path", str(source["path"])]
    if source["dir"] is not None:
        found += ["--config-dir", relative(Path(source["dir"]))]
    if source["searchpath"]:
        found.append(as_override(source["searchpath"]))
    return found


def others(flags: Sequence[str]) -> list[str]:
    """Return those of the flags, as `split` returns them, that do not select a source."""
    pairs = itertools.pairwise(["", *flags])
    return [word for before, word in pairs if before not in KEYS and word not in KEYS]


def of_sweep(folder: Path) -> dict[str, Any]:
    """Return the source of the sweep in `folder`; if an old sweep lacks it, a job's source."""
    first = None
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
        content = read_json(folder / "sweep.json")
        if isinstance(content.get("config"), dict):
            first = content["config"]
        else:
            jobs = [folder / job["folder"] for job in content["jobs"]]
            first = next((job for job in jobs if (job / ".hydra").is_dir()), None)
    if isinstance(first, Path):
        return recorded(first)
    return dict(DEFAULT) if first is None else checked(first, folder)


def recorded(folder: Path) -> dict[str, Any]:
    """Return the source of the run in `folder`, from its manifest or else from Hydra's record.

    A run that is older, or was killed at its start, has none in its manifest. Both files are
    untrusted.
    """
    found: dict[str, Any] | None = None
    with contextlib.suppress(OSError, ValueError):
        content = read_json(folder / "manifest.json")
        found = content.get("config") if isinstance(content, dict) else None
    if isinstance(found, dict):
        return checked(found, folder)
    found = None
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, yaml.YAMLError):
        node = read_yaml(folder / ".hydra" / "hydra.yaml")
        found = _added_to_conf(node["job"]["config_name"], node["runtime"]["config_sources"])
    return dict(DEFAULT) if found is None else checked(found, folder)


def checked(source: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return a recorded source. Raises UserError if no run can have written it."""
    source = {key: source.get(key, value) for key, value in DEFAULT.items()}
    name, places = source["name"], source["searchpath"]
    if not (
        isinstance(name, str)
        and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)*", name)
        and ".." not in name
        and isinstance(places, list)
        and all(isinstance(place, str) for place in places)
        and all(isinstance(source[key], str | None) for key in ("path", "dir"))
    ):
        raise UserError(f"resume={folder}: its record names a config that no run has: {source}.")
    return source


def followed(
    where: str, source: Mapping[str, Any], given: Mapping[str, Any], *, is_own: bool
) -> dict[str, Any]:
    """Return the source to compose a record from: the recorded one, with the `given` places.

    `where` names the record. Raises UserError for a different config name and, unless the folder
    is the user's own, for a recorded place that was not typed.
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


def followed_places(source: Mapping[str, Any] | None) -> list[str]:
    """Return the places of a source as a line of a run's seal; no line for `conf/` alone."""
    places = {key: source[key] for key in PLACES if source[key]} if source else {}
    return [json.dumps(places, sort_keys=True)] if places else []
