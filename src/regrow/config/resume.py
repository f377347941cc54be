"""Resume runs and sweeps: expand `resume=<folder>`, and check what a resumed run may change."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import os
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from regrow.config import command_line, flags, older, places, registered
from regrow.config.flags import MULTIRUN
from regrow.config.recorded import recorded_config
from regrow.config.roles import check_roles
from regrow.config.targets import targets_in
from regrow.config.yaml_files import read_yaml, readable
from regrow.dotted import Checked, Config, leaves, matches
from regrow.errors import UserError, brief, printable
from regrow.project import lab_name
from regrow.record import manifest, monitor, moved, ownership
from regrow.record.records import load_status, load_summary, read_json
from regrow.record.redact import MASK, redact_all

log = logging.getLogger(__name__)

SWEEP = ownership.SWEEP  # marks a sweep's folder
# About where a run is started and by which package, not about the run.
ELSEWHERE = ("launcher", "sweep", "lab")

# Keys that may differ from the recorded run: limits, devices, micro-batches, workers, logging.
# They change results by float rounding at most. Any other change must be named.
MAY_CHANGE = (
    "tags",
    "notes",
    "logger.*",
    "data.changed",  # has no effect unless it was typed: see `refuse_other_data`
    "data.root",
    "data.source.root",
    "data.source.download",
    "data.source.cache",
    "data.source.cache_gb",
    "data.source.timeout_seconds",
    "data.source.retries",
    "data.cache",  # gives the same bytes
    "data.cache_root",
    "data.cache_max_gb",
    "data.num_workers",
    "data.pin_memory",
    "data.persistent_workers",
    "trainer.max_epochs",
    "trainer.max_steps",
    "trainer.max_seconds",
    "trainer.device",
    "trainer.devices",
    "trainer.strategy",
    "trainer.max_restarts",
    "trainer.timeout_seconds",
    "trainer.ddp.*",
    "trainer.fsdp.modules",
    "trainer.fsdp.reshard_after_forward",
    "trainer.activation_checkpointing",
    "trainer.accumulation_steps",
    "trainer.num_threads",
    "trainer.keep_freed_memory",
    "trainer.capture",
    "trainer.log_every_steps",
    "trainer.log_histograms_every_steps",
    "trainer.check_first_batch",
    "trainer.progress_bar",
    "trainer.find_faults",
    "trainer.profile",
    "trainer.detect_anomaly",
    "trainer.checkpoint.*",
)
CHANGED = "data.changed"
LACKED = Path(".hydra", "older.json")
_REFERENCE = re.compile(r"(?<!\\)(?:\\\\)*\$\{")  # not an escaped one
LIMITS = (
    "trainer.max_epochs",
    "trainer.max_steps",
    "trainer.max_seconds",
    "trainer.early_stopping.patience",
)


def expand(arguments: Sequence[str]) -> list[str]:
    """Expand `resume=<folder> …` to the run's recorded overrides, the new ones, and its folder.

    Returns any other command line unchanged. Raises UserError for a folder without a run.
    """
    arguments = ownership.take_trust(arguments)
    named = [a.removeprefix("resume=") for a in arguments if a.startswith("resume=")]
    if not named or named[-1] in ("auto", "never"):
        return list(arguments)
    folder = Path(command_line.path_of("resume", named[-1]))
    given, new = flags.split([a for a in arguments if not a.startswith("resume=")])
    if (folder / SWEEP).is_file():
        return expand_sweep(folder, [*given, *new])
    recorded = folder / ".hydra" / "overrides.yaml"
    if not recorded.is_file():
        raise UserError(
            f"resume={folder}: there is no run in that folder. Give the folder that a run printed "
            "at its start, such as outputs/digits/latest."
        )
    if any(a in ("-m", "--multirun") for a in arguments):
        raise UserError(f"resume={folder} resumes one run. Leave out --multirun.")
    keys = {key_of(a) for a in new}
    keys |= {*older.removed(_recorded_config(folder)), CHANGED}
    old = [moved.in_text(a) for a in recorded_overrides(folder) if key_of(a) not in keys]
    if own := is_own(folder):
        registered.take_up(folder / ".hydra")
    for override in old:  # the folder may come from someone else
        if is_foreign(override, may_refer=own):
            raise UserError(
                f"resume={folder}: its overrides.yaml has {override}, which is none of a run's own "
                "keys. It is not followed."
            )
    if not own:
        old = without_loggers(folder, old)
        if downloads_elsewhere(folder, _recorded_config(folder), keys):
            old.append("data.source.download=false")
    refuse_masked(folder, old)
    chosen = flags.followed(
        f"resume={folder}", flags.recorded(folder), flags.typed(arguments), is_own=own
    )
    new = [line for line in new if key_of(line) != flags.SEARCH_PATH]
    given = [*flags.others(given), *flags.arguments_of(chosen)]
    place = command_line.override("hydra.run.dir", folder.resolve())
    return [*given, *old, command_line.override("resume", folder), *new, place]


def expand_sweep(folder: Path, arguments: Sequence[str]) -> list[str]:
    """Return the sweep's overrides, the new ones, and its folder. Its frozen code runs again."""
    given, new = flags.split(arguments)
    named, folder = folder, Path(os.path.relpath(folder.resolve()))  # the link `latest` may move
    ownership.check_sweep(folder, f"resume={named}")  # before Hydra reads the folder
    registered.take_up(folder / ownership.CODE)
    content = read_json(folder / SWEEP)
    keys = {key_of(a) for a in new}
    before = content.get("overrides", [])
    if "launcher" not in keys:  # a different launcher has different options
        before = [*before, *content.get("launcher", [])]
    old = [str(a) for a in before if key_of(str(a)) not in (*keys, CHANGED)]
    refuse_masked(folder, old)
    source, code = flags.of_sweep(folder), folder / ownership.CODE
    if flags.copied_source(code) is not None:
        source = flags.in_copy(source, code)
    chosen = flags.followed(f"resume={folder}", source, flags.typed([*given, *new]), is_own=True)
    old, new = ([a for a in its if key_of(a) != flags.SEARCH_PATH] for its in (old, new))
    given = [a for a in flags.others(given) if a not in MULTIRUN]
    return [
        "-m",
        *given,
        *flags.arguments_of(chosen),
        *old,
        *new,
        command_line.override("hydra.sweep.dir", folder),
    ]


def is_own(folder: Path) -> bool:
    """Return True if the run in `folder` is listed as this user's or is trusted."""
    try:
        return ownership.is_own_run(folder, followed(folder))
    except UserError:
        return False


def if_trusted(folder: Path) -> str:
    """Return the hint `trust=…` for the end of an error, or "" if there is no record to trust."""
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
    found = dict(_nested(data))
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


def _nested(node: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted keys below a node, and their values that are neither mapping nor list."""
    if isinstance(node, Mapping):
        items: Iterable[tuple[Any, Any]] = node.items()
    elif isinstance(node, list):
        items = enumerate(node)
    else:
        yield place, node
        return
    for key, value in items:
        yield from _nested(value, f"{place}.{key}" if place else str(key))


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


def _recorded_config(folder: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError, yaml.YAMLError):
        content = read_yaml(folder / "config.yaml")
        return moved.in_config(content) if isinstance(content, dict) else {}
    return {}


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


def refuse_masked(folder: Path, overrides: Sequence[str]) -> None:
    for override in overrides:
        if MASK in override:
            raise UserError(
                f"resume={folder}: the value of {key_of(override)} was taken for a secret and not "
                f"recorded. Give it again: {key_of(override)}=…"
            )


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


def is_of_the_launcher(override: str) -> bool:
    """Return True if an override is of the group launcher or sweep, which no run records."""
    return key_of(override).split(".")[0] in ELSEWHERE


def followed(folder: Path) -> list[str]:
    """Return what resuming the run in `folder` uses of its record: see `job.as_recorded`."""
    places = flags.followed_places(flags.recorded(folder))
    return [*recorded_overrides(folder), *places, *registered.recorded(folder)]


def recorded_overrides(folder: Path) -> list[str]:
    """Return the overrides that started the run in `folder`. Raises UserError if unreadable."""
    path = folder / ".hydra" / "overrides.yaml"
    try:
        return overrides_in(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = brief(error)
        raise UserError(f"resume={folder}: {path} cannot be read: {reason}") from None


def overrides_in(text: str) -> list[str]:
    """Return the overrides in the text of an overrides.yaml. Raises ValueError or YAMLError."""
    overrides = yaml.safe_load(text) or []
    if not isinstance(overrides, list):
        raise ValueError("a list of overrides is expected")
    return [str(override) for override in overrides]


def typed(overrides: Sequence[str]) -> list[str]:
    """Return the overrides typed for this start: all, or those after `expand`'s resume=<folder>."""
    places = [number for number, override in enumerate(overrides) if key_of(override) == "resume"]
    if not places or overrides[places[-1]].partition("=")[2] in ("auto", "never"):
        return list(overrides)
    return list(overrides[places[-1] + 1 :])


def key_of(override: str) -> str:
    """Return the key of an override, such as `a.b@c` of `+a.b@c=1` or `a.b` of `~a.b`."""
    return override.partition("=")[0].lstrip("+~")


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


def resumed(folder: Path, asked: Checked, overrides: Sequence[str]) -> dict[str, Any] | None:
    """Return the `asked` config as it resumes the run in `folder`, or None if there is none.

    `overrides` are those of this start, recorded ones included: see `expand`. Logs what changes.
    Raises UserError if the configs conflict.

    Keys newer than the record get the value for the earlier behaviour. A null
    `trainer.num_threads` becomes the recorded one if the number of processes is the same: results
    depend on it bit for bit. The monitor and its mode become those of the recorded run.
    """
    if not (folder / "config.yaml").is_file():
        return None
    config = copy.deepcopy(dict(asked))
    recorded = recorded_config(folder, f"resume={folder}")
    lacked = [*lacked_before(folder), *older.complete(recorded)]
    kept = {key: value for key, value in older.earlier(recorded).items() if key in lacked}
    kept |= older.earlier_defaults(recorded)
    chosen = {key_of(override) for override in overrides}
    chosen |= older.following(config, changed_sources(recorded, config, lacked, chosen))
    if adopted := older.adopt(config, kept, chosen):
        log.info("%s", older.line(str(folder), adopted))
    if config["resume"] == "never":
        raise UserError(
            f"hydra.run.dir={folder} holds a run already, and resume=never. Use another folder, or "
            "leave out resume=never to resume it."
        )
    as_many = recorded["trainer"].get("devices") == config["trainer"]["devices"]
    if config["trainer"]["num_threads"] is None and as_many:
        config["trainer"]["num_threads"] = recorded["trainer"]["num_threads"]
    by_name = config["resume"] not in ("auto", "never")
    before = recorded_overrides(folder) if (folder / ".hydra" / "overrides.yaml").is_file() else []
    named = keep_monitor(recorded, config, {key_of(o) for o in overrides if o not in before})
    if by_name:
        named |= {key_of(override) for override in typed(overrides)}
        named |= older.following(config, named)
    refuse_other_monitor(recorded, config, folder)
    refused, named_so = [], []
    for key, (old, new) in differences(recorded, redact_all(config)).items():
        if key == "resume" or MASK in str(old):  # a masked secret cannot be compared
            continue
        if matches(key, MAY_CHANGE):
            log.info("changed: %s from %s to %s", key, old, new)
        elif any(key == name or key.startswith(f"{name}.") for name in named):
            log.warning("changed by name: %s from %s to %s", key, old, new)
        else:
            refused.append(f"{key} was {old} and would be {new}")
            if new != "absent":
                named_so.append(older.as_override(key, new))
    if refused:
        words = f": {command_line.shell(named_so)}" if named_so else ""
        way_out = (
            f"Start a new run, or name each key, to change it all the same{words}"
            if by_name
            else "Use another folder, or "
            + command_line.shell([f"resume={folder}"])
            + " with the keys to change."
        )
        if any(" was absent and " in line for line in refused):
            way_out = f"If you added a key, give it a row in {lab_name()}.added. {way_out}"
        raise UserError(f"{folder} holds a run of another config: {'; '.join(refused)}. {way_out}")
    return config


def changed_sources(
    recorded: Mapping[str, Any],
    config: Mapping[str, Any],
    lacked: Sequence[str],
    chosen: Collection[str],
) -> set[str]:
    """Return the keys that other keys follow and that differ from the recorded run.

    A key that the record lacked differs if it was `chosen`, any other if its value changed.
    """
    before, now = leaves(recorded), leaves(config)
    return {
        key
        for key in (row.follows for row in older.added_keys() if row.follows)
        if (key in chosen if key in lacked else before.get(key) != now.get(key))
    }


def lacked_before(folder: Path) -> list[str]:
    """Return the keys that the record in `folder` lacked when an earlier resume completed it."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        content = read_json(folder / LACKED)
        return [str(key) for key in content] if isinstance(content, list) else []
    return []


def lacked_keys(folder: Path) -> list[str]:
    """Return the keys that an older record in `folder` lacks, or lacked before it was completed."""
    if not (folder / "config.yaml").is_file():
        return []
    lacking = older.complete(recorded_config(folder, str(folder)))
    return [*dict.fromkeys([*lacked_before(folder), *lacking])]


def keep_monitor(recorded: Mapping[str, Any], config: dict[str, Any], new: set[str]) -> set[str]:
    """Give `config` the recorded run's monitor and mode, unless they are typed.

    `new` are the keys typed for this start alone. Returns the keys that follow from a typed one
    and so count as named.
    """
    before, trainer = recorded["trainer"], config["trainer"]
    if before.get("monitor") is None and "trainer.monitor" not in new:
        trainer["monitor"] = None  # the run had no validation split
    if trainer["mode"] is None and before.get("monitor") == trainer["monitor"]:
        trainer["mode"] = before.get("mode")
    elif trainer["mode"] is None:
        trainer["mode"] = monitor.of_run(config)
        return {"trainer.mode"}
    return set()


def refuse_other_monitor(recorded: Mapping[str, Any], config: Checked, folder: Path) -> None:
    """Raise UserError if the run's best value, and those of its checkpoints, are of another metric.

    A run without a monitor has none, and one that no longer has a monitor compares none.
    """
    before, now = (each["trainer"].get("monitor") for each in (recorded, config))
    if before != now and None not in (before, now):
        fresh = command_line.shell([f"init_from={folder}", f"trainer.monitor={now}"])
        raise UserError(
            f"trainer.monitor={now}: the run in {folder} chose its best weights by {before}, which "
            f"cannot be compared. Leave it out, or start a new run: {fresh}"
        )


def refuse_other_data(
    folder: Path, fingerprint: Mapping[str, Any], overrides: Sequence[str]
) -> dict[str, Any]:
    """Return the splits whose content changed since the run began, each with both fingerprints.

    Raises UserError if there are any, unless `data.changed=accept` was typed for this start.
    """
    before = recorded_data(folder)
    changed = {
        name: {"was": before.get(name), "is": fingerprint.get(name)}
        for name in (*fingerprint, *(name for name in before if name not in fingerprint))
        if before and fingerprint.get(name) != before.get(name)
    }
    now = typed(overrides)
    values = [o.partition("=")[2] for o in now if key_of(o) == CHANGED]
    if changed and values[-1:] != ["accept"]:
        shown = "; ".join(_change_of(name, **both) for name, both in changed.items())
        more = [o for o in now if key_of(o) != CHANGED] if now != [*overrides] else []
        typed_now = command_line.shell(
            [command_line.override("resume", folder), *more, f"{CHANGED}=accept"]
        )
        raise UserError(
            f"{folder}: the data has changed since that run began ({shown}). Put it back, start a "
            f"new run, or resume with the data as it is now: {typed_now}"
        )
    for name, both in changed.items():
        log.warning("%s=accept: %s", CHANGED, _change_of(name, **both))
    return changed


def change_of_split(folder: Path, name: str, fingerprint: Mapping[str, Any]) -> str:
    """Return how a split differs from the one that the run in `folder` recorded; "" if it does not.

    `fingerprint` is the split's. Returns "" also if the run recorded none.
    """
    before = (_latest_data(folder) or {}).get(name)
    if not isinstance(before, dict) or before == fingerprint:
        return ""
    return _change_of(name, before, **{"is": fingerprint})


def recorded_data(folder: Path) -> dict[str, Any]:
    """Return the data's fingerprint at the run's latest start; empty if it is lost."""
    data = _latest_data(folder)
    if isinstance(data, dict) and all(isinstance(it, dict) for it in data.values()):
        return data
    log.warning(
        "%s: nobody can tell whether the data has changed since that run began",
        folder / manifest.NAME,
    )
    return {}


def _latest_data(folder: Path) -> Any:
    recorded = manifest.read(folder)
    for later in recorded.get("resumes", []):
        recorded |= later
    return recorded.get("data")


def _change_of(name: str, was: Any, **now: Any) -> str:
    counts = [(it or {}).get("examples", 0) for it in (was, now["is"])]
    if counts[0] != counts[1]:
        return f"{name}: {counts[0]:,} examples then, {counts[1]:,} now"
    return f"{name}: other content in {counts[1]:,} examples"


def is_done(folder: Path, config: Checked) -> bool:
    """Return True if the run in `folder` is complete and `config` does not extend it.

    Raises UserError if a limit was changed to a value that the run has already reached.
    """
    status = load_status(folder)
    if status is None or status["state"] != "completed":
        return False
    summary = load_summary(folder)
    if not summary:
        return False  # resuming from the last step writes it again
    recorded = recorded_config(folder, f"resume={folder}")
    older.complete(recorded)
    changed = differences(recorded, config)
    ended = reached(summary, config["trainer"])
    if ended and any(limit in changed for limit in LIMITS):
        key, more = next(iter(ended.items()))
        value = leaves(config)[key]
        was = f" was {changed[key][0]} and would be {value}" if key in changed else f"={value}"
        raise UserError(
            f"{folder} is complete: {key}{was}, and at step {summary['steps']} that is reached. "
            f"To resume, raise it: {key}={more}"
        )
    return bool(ended)


def has_changes(folder: Path, config: Mapping[str, Config]) -> bool:
    """Return True if `config` changes a key of the run in `folder` that is not in `MAY_CHANGE`."""
    recorded = recorded_config(folder, f"resume={folder}")
    older.complete(recorded)
    return any(
        key != "resume" and MASK not in str(was) and not matches(key, MAY_CHANGE)
        for key, (was, _) in differences(recorded, redact_all(dict(config))).items()
    )


def reached(summary: Mapping[str, Any], trainer: Checked) -> dict[str, int]:
    """Return the limits that a complete run has reached, each with a doubled value."""
    patience = trainer["early_stopping"]["patience"]
    waited = summary["evaluations_without_improvement"]
    spent = {"max_steps": summary["steps"], "max_seconds": summary["seconds"]}
    if trainer["max_steps"] is None:  # max_steps overrides max_epochs
        spent["max_epochs"] = summary["epochs"]
    found = {
        f"trainer.{key}": 2 * math.ceil(max(trainer[key], value))
        for key, value in spent.items()
        if trainer[key] is not None and value >= trainer[key]
    }
    if patience is not None and waited > patience:
        found["trainer.early_stopping.patience"] = 2 * waited
    return found


def differences(old: Mapping[str, Config], new: Mapping[str, Config]) -> dict[str, tuple[Any, Any]]:
    """Return the dotted keys whose values differ, with both values, "absent" for a missing key."""
    before, after = leaves(old), leaves(new)
    return {
        key: (before.get(key, "absent"), after.get(key, "absent"))
        for key in sorted({*before, *after})
        if before.get(key, "absent") != after.get(key, "absent")
    }
