"""Limit the record of somebody else's run: no downloads, servers, loggers or code that it names."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from regrow.config import command_line, flags, places
from regrow.config.command_line import key_of, typed
from regrow.config.recorded import followed, is_of_the_launcher, recorded_overrides
from regrow.config.roles import check_roles, entries_of
from regrow.config.targets import targets_in
from regrow.config.yaml_files import readable
from regrow.dotted import Config
from regrow.errors import UserError, printable
from regrow.record import ownership

_REFERENCE = re.compile(r"(?<!\\)(?:\\\\)*\$\{")  # not an escaped one


def is_own(folder: Path) -> bool:
    """Return True if the run in `folder` is listed as this user's or is trusted."""
    try:
        return ownership.is_own_run(folder, followed(folder))
    except UserError:
        return False


def if_trusted(folder: Path) -> str:
    """Return the hint `trust=…` for the end of an error, or "" without a record to trust."""
    with contextlib.suppress(UserError, OSError):
        digits = ownership.digest_of_run(followed(folder))[: ownership.DIGITS]
        return f" If the run is yours, add trust={digits}"
    return ""


def downloads_elsewhere(folder: Path, config: Mapping[str, Config], typed: Iterable[str]) -> bool:
    """Return True if data would be downloaded to a path that someone else may have recorded.

    A path is safe if it was `typed` (keys, with or without `data.`), or if the folder is the
    user's and its overrides or conf/ name the path. config.yaml alone does not count: it has no
    seal.
    """
    data = config.get("data")
    source = data.get("source") if isinstance(data, Mapping) else None
    if not isinstance(source, Mapping) or not source.get("download"):
        return False
    assert isinstance(data, Mapping)
    named = {key.removeprefix("data.") for key in typed}
    place = source.get("root", data.get("root"))
    follows = "root" in named and place == data.get("root")
    if follows or named & {"source.root", "source.download"}:
        return False
    return not (is_own(folder) and place in [*_typed_places(folder), *places_of_conf()])


def refuse_download(
    folder: Path, where: str, config: Mapping[str, Any], keys: Iterable[str]
) -> None:
    """Raise UserError if a run that is not the user's would download data to a path it names.

    `keys` were typed. `where` names the run in the error.
    """
    if not is_own(folder) and downloads_elsewhere(folder, config, keys):
        source = config["data"]["source"]
        raise UserError(
            f"{where}: it would download data to {source.get('root')}, a place that its record "
            "names, and it is not listed as yours. Add data.source.download=false, or "
            f"data.source.root=… to choose the place.{if_trusted(folder)}"
        )


def refuse_remote(
    folder: Path, where: str, config: Mapping[str, Config], typed: Iterable[str]
) -> None:
    """Raise UserError if a run's data is behind a URL that someone else may have recorded.

    Reading it tells that server, and writes to the recorded cache. Resized images are written to a
    recorded `data.cache_root` as well. `typed`, and what is safe: see `downloads_elsewhere`.
    `where` names the run in the error.
    """
    data = config.get("data")
    if not isinstance(data, Mapping):
        return
    named = {key.removeprefix("data.") for key in typed}
    _refuse_cache_root(folder, where, data, named)
    found = {
        f"{node}.{key}".lstrip("."): value
        for node, key, value in entries_of(data, "")
        if not isinstance(value, Mapping | list)
    }
    # data.root is a default of data.source.root, where there is one, and is not read itself.
    roots = [key for key in found if _last(key) == "root"]
    roots = [key for key in roots if key != "root" or "source.root" not in found]
    urls = {key: found[key] for key in roots if "://" in str(found[key])}
    if not urls:
        return
    own = is_own(folder)

    def is_safe(key: str, value: Any) -> bool:
        """A key below `data.source` must be typed, in this command or in the user's record."""
        if key in named or (_last(key) == "cache" and value is None):
            return True
        if key == "source.root" and "root" in named and value == data.get("root"):
            return True
        if key in ("root", "source.root"):
            return own and value in [*_typed_places(folder), *places_of_conf()]
        known = [*places_of_conf("cache")] if key == "source.cache" else []
        return own and value in [*_typed_places(folder, (f"data.{key}",)), *known]

    caches = {key: it for key, it in found.items() if _last(key) == "cache"}
    unsafe = [key for key, value in {**urls, **caches}.items() if not is_safe(key, value)]
    if not unsafe:
        return
    root = next((key for key in unsafe if key in urls), next(iter(urls)))
    cache = f"{root.removesuffix('root')}cache"
    cache = cache if cache in caches else next(iter(caches), cache)
    raise UserError(
        f"{where}: it would read data from {urls[root]} and keep it in "
        f"{caches.get(cache) or 'your cache folder'}, which its record names, and it is not listed "
        f"as yours. Add data.{root}=… and data.{cache}=… to choose them.{if_trusted(folder)}"
    )


def _refuse_cache_root(
    folder: Path, where: str, data: Mapping[str, Any], named: Collection[str]
) -> None:
    place = data.get("cache_root")
    if place is None or data.get("cache") is None or "cache_root" in named:
        return
    known = [*_typed_places(folder, ("data.cache_root",)), *places_of_conf("cache_root")]
    if not is_own(folder) or place not in known:
        raise UserError(
            f"{where}: it would keep resized images in {place}, which its record names, and it is "
            f"not listed as yours. Add data.cache=null, or choose data.cache_root=…"
            f"{if_trusted(folder)}"
        )


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def _typed_places(
    folder: Path, keys: Sequence[str] = ("data.root", "data.source.root")
) -> list[Any]:
    return [command_line.read(o) for o in recorded_overrides(folder) if key_of(o) in keys]


def places_of_conf(key: str = "root") -> Iterator[Any]:
    """Yield the data roots, or caches, in the files of conf/; may yield None."""
    for file, content in readable("**/*.yaml"):
        data = content if file.parent.name == "data" else content.get("data")
        source = data.get("source") if isinstance(data, dict) else None
        yield from (node.get(key) for node in (data, source) if isinstance(node, dict))


def is_foreign(override: str, *, may_refer: bool = False) -> bool:
    """Return True if an override affects more than a run's config.

    These are Hydra's own options, the launcher's, files in other folders, other packages and,
    unless it `may_refer`, the environment and the user's resolvers.
    """
    key, _, value = override.partition("=")
    names = value.strip("[]'\"").split(",") if places.is_group(key_of(override)) else []
    return (
        override.startswith("-")
        or key_of(override).startswith("hydra")
        or is_of_the_launcher(override)
        or "@" in key
        or (not may_refer and _REFERENCE.search(value) is not None)
        or any(".." in name or name.strip(" '\"").startswith("/") for name in names)
    )


def without_loggers(folder: Path, overrides: Sequence[str]) -> list[str]:
    """Return the overrides without those of loggers, and print a warning if there were any.

    For a folder that is not the user's: nothing may be sent to an account that it names.
    """
    loggers = [o for o in overrides if re.split(r"[./]", key_of(o))[0] == "logger"]
    if loggers:
        digits = ownership.digest_of_run(followed(folder))[: ownership.DIGITS]
        print(
            f"warning: resume={folder}: it is not listed as yours, so its loggers are left out "
            f"({printable(', '.join(loggers))}). Give them again, or, if you trust it, add "
            f"trust={digits}",
            file=sys.stderr,
        )
    return [o for o in overrides if o not in loggers]


def check_recorded(config: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """Raise UserError if a run resumed by name recorded a target or a download that is not safe.

    `overrides` are those of this start, recorded ones included; typed ones are trusted. Call this
    before any other check: those import targets.
    """
    if config["resume"] in ("auto", "never"):
        return
    folder = Path(config["resume"])
    own = [key for override in typed(overrides) for key in targets_of(override)]
    check_roles_of_run(config, tuple(config), folder, f"resume={folder}", own)
    refuse_download(folder, f"resume={folder}", config, map(key_of, typed(overrides)))
    refuse_remote(folder, f"resume={folder}", config, map(key_of, typed(overrides)))


def check_roles_of_run(
    config: Mapping[str, Config],
    groups: Collection[str],
    folder: Path,
    where: str,
    typed: Collection[str] = (),
) -> None:
    """Do `roles.check_roles`, and allow the files and targets that the user's commands name."""
    others, named = places_of(folder), named_by_command(folder)
    check_roles(config, groups, folder, where, typed, others, named)


def places_of(folder: Path) -> list[Path]:
    """Return the config folders besides conf/ that this command names, and those of the run.

    The run's count only if it is the user's: its seal covers them.
    """
    places = flags.folders_of(flags.recorded(folder)) if is_own(folder) else {}
    return [*places.values(), *flags.folders(flags.absolute(sys.argv[1:]))]


def named_by_command(folder: Path) -> frozenset[tuple[str, Any]]:
    """Return the nodes and targets that the command of the user's own run named.

    A seal covers the command. Empty for the run of somebody else.
    """
    if not is_own(folder):
        return frozenset()
    return frozenset(
        (node, target)
        for override in recorded_overrides(folder)
        for node, target in _targets_of(override)
        if isinstance(target, str)
    )


def targets_of(override: str) -> list[str]:
    """Return the dotted keys of the nodes whose `_target_` an override sets."""
    return [node for node, _ in _targets_of(override)]


def _targets_of(override: str) -> list[tuple[str, Any]]:
    key, _, value = override.partition("=")
    key = key.lstrip("+~")
    if key.endswith("._target_"):
        return [(key.removesuffix("._target_"), value)]
    if "_target_" not in value:
        return []
    from hydra.core.override_parser.overrides_parser import OverridesParser

    content = OverridesParser.create().parse_override(override).value()
    return [(f"{key}.{path}" if path else key, target) for path, target in targets_in(content)]
