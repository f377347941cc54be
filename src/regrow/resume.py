"""Which folder a run is in, and whether it begins there or goes on."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from regrow import command_line, flags, monitor, older, ownership, places, registered
from regrow.config import MULTIRUN, read_yaml, readable, recorded_config, targets_in
from regrow.dotted import leaves, matches
from regrow.errors import UserError, printable
from regrow.record import manifest
from regrow.record.folder import load_status, load_summary, read_json
from regrow.record.redact import MASK, redact_all
from regrow.roles import check_roles

log = logging.getLogger(__name__)

SWEEP = ownership.SWEEP  # of a sweep's folder
ELSEWHERE = ("launcher", "sweep")  # groups that say where or beside what a run is made

# What may differ from the recorded run: limits, devices, slices, workers, logging. Nothing here
# moves the maths beyond float rounding. Everything else must be named to be changed.
MAY_CHANGE = (
    "tags",
    "notes",
    "logger.*",
    "data.changed",  # lets nothing through unless it was typed: see `refuse_other_data`
    "data.root",
    "data.source.root",
    "data.source.download",
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
    "trainer.log_every_steps",
    "trainer.log_histograms_every_steps",
    "trainer.check_first_batch",
    "trainer.progress_bar",
    "trainer.profile",
    "trainer.detect_anomaly",
    "trainer.checkpoint.*",
)
CHANGED = "data.changed"
LACKED = Path(".hydra", "older.json")
_REFERENCE = re.compile(r"(?<!\\)(?:\\\\)*\$\{")  # and not a literal one
LIMITS = (
    "trainer.max_epochs",
    "trainer.max_steps",
    "trainer.max_seconds",
    "trainer.early_stopping.patience",
)


def expand(arguments: Sequence[str]) -> list[str]:
    """`resume=<folder> …` as the run's recorded overrides, then the new ones, in that folder.

    Any other command line is left as it is. Raises UserError for a folder that holds no run.
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
    old = [a for a in recorded_overrides(folder) if key_of(a) not in keys]
    if own := is_own(folder):
        registered.take_up(folder / ".hydra")
    for override in old:  # a folder may come from anybody
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
    """The sweep's own overrides, then the new ones, in that folder. Its frozen code runs again."""
    given, new = flags.split(arguments)
    named, folder = folder, Path(os.path.relpath(folder.resolve()))  # `latest` may name another
    ownership.check_sweep(folder, f"resume={named}")  # before Hydra sees what is in there
    registered.take_up(folder / ownership.CODE)
    content = read_json(folder / SWEEP)
    keys = {key_of(a) for a in new}
    before = content.get("overrides", [])
    if "launcher" not in keys:  # another one has other options
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
    """Return True if `folder` holds a run that is listed as this user's."""
    try:
        return ownership.is_own_run(folder, followed(folder))
    except UserError:
        return False


def if_trusted(folder: Path) -> str:
    """The end of a refusal that `trust=…` lifts; nothing where there is no record to trust."""
    with contextlib.suppress(UserError, OSError):
        digits = ownership.digest_of_run(followed(folder))[: ownership.DIGITS]
        return f" If the run is yours, add trust={digits}"
    return ""


def downloads_elsewhere(folder: Path, config: Mapping[str, Any], typed: Iterable[str]) -> bool:
    """Return True if data would be downloaded to a place that others may have put into a record.

    It is the user's if it was `typed` (keys, with or without `data.`), or if the folder is the
    user's and its overrides or conf/ name the place: nothing seals config.yaml.
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


def _typed_places(folder: Path) -> list[Any]:
    keys = ("data.root", "data.source.root")
    return [command_line.read(o) for o in recorded_overrides(folder) if key_of(o) in keys]


def places_of_conf() -> Iterator[Any]:
    """Where the files in conf/ keep data."""
    for file, content in readable("**/*.yaml"):
        data = content if file.parent.name == "data" else content.get("data")
        source = data.get("source") if isinstance(data, dict) else None
        yield from (node.get("root") for node in (data, source) if isinstance(node, dict))


def refuse_download(
    folder: Path, where: str, config: Mapping[str, Any], keys: Iterable[str]
) -> None:
    """Raise UserError where a foreign record says, in spite of its config.yaml, where to download
    data to; `keys` were typed."""
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
        return content if isinstance(content, dict) else {}
    return {}


def without_loggers(folder: Path, overrides: Sequence[str]) -> list[str]:
    """The overrides of a folder that is not the user's: nothing is sent to an account named there.

    Says so in one line where that leaves something out.
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
    """Return True if an override reaches beyond a run's config: Hydra's own options, the
    launcher's, a file of another folder, another package, or, unless it `may_refer` to them, the
    environment and the user's own resolvers."""
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
    """Return True if an override says where, or beside what, a run is made: no part of the run."""
    return key_of(override).split(".")[0] in ELSEWHERE


def followed(folder: Path) -> list[str]:
    """What a resume of the run in `folder` follows: see `composed.as_recorded`."""
    places = flags.followed_places(flags.recorded(folder))
    return [*recorded_overrides(folder), *places, *registered.recorded(folder)]


def recorded_overrides(folder: Path) -> list[str]:
    """The overrides that started the run in `folder`. Raises UserError if it cannot be read."""
    path = folder / ".hydra" / "overrides.yaml"
    try:
        return overrides_in(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"resume={folder}: {path} cannot be read: {reason}") from None


def overrides_in(text: str) -> list[str]:
    """The overrides that an overrides.yaml of this text lists. Raises ValueError or YAMLError."""
    overrides = yaml.safe_load(text) or []
    if not isinstance(overrides, list):
        raise ValueError("a list of overrides is expected")
    return [str(override) for override in overrides]


def typed(overrides: Sequence[str]) -> list[str]:
    """Those of a start's overrides that were typed for it: all, or what `expand` put behind
    `resume=<folder>`."""
    places = [number for number, override in enumerate(overrides) if key_of(override) == "resume"]
    if not places or overrides[places[-1]].partition("=")[2] in ("auto", "never"):
        return list(overrides)
    return list(overrides[places[-1] + 1 :])


def key_of(override: str) -> str:
    """The key that an override such as `+a.b@c=1` or `~a.b` is about."""
    return override.partition("=")[0].lstrip("+~")


def check_recorded(config: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """Raise UserError if what a run that is to be resumed by name recorded does not fit its place.

    `overrides` are those of this start, recorded ones included. What was typed now is the user's
    own. This goes first, since looking at a target imports it.
    """
    if config["resume"] in ("auto", "never"):
        return
    folder = Path(config["resume"])
    own = [key for override in typed(overrides) for key in targets_of(override)]
    check_roles(config, tuple(config), folder, f"resume={folder}", own, places_of(folder))
    refuse_download(folder, f"resume={folder}", config, map(key_of, typed(overrides)))


def places_of(folder: Path) -> list[Path]:
    """The folders beside conf/ that the config of the run in `folder` came from, if it is the
    user's: its seal covers them. And those that this command names."""
    places = flags.folders_of(flags.recorded(folder)) if is_own(folder) else {}
    return [*places.values(), *flags.folders(flags.absolute(sys.argv[1:]))]


def targets_of(override: str) -> list[str]:
    """The dotted keys of the nodes whose `_target_` an override gives, none of those beside it."""
    key, _, value = override.partition("=")
    key = key.lstrip("+~")
    if key.endswith("._target_"):
        return [key.removesuffix("._target_")]
    if "_target_" not in value:
        return []
    from hydra.core.override_parser.overrides_parser import OverridesParser

    content = OverridesParser.create().parse_override(override).value()
    return [f"{key}.{path}" if path else key for path, _ in targets_in(content)]


def continues(folder: Path, config: dict[str, Any], overrides: Sequence[str]) -> bool:
    """Return True if `folder` holds a run that this one resumes. Raises UserError if it must not.

    `overrides` are those of this start, recorded ones included: see `expand`.

    Keys that are newer than the record keep their earlier meaning, in `config` too. A null
    `trainer.num_threads` becomes what the recorded run had, for bits depend on it, unless
    the number of processes is another. So do the monitor and its direction that the run settled on.
    """
    if not (folder / "config.yaml").is_file():
        return False
    recorded = recorded_config(folder, f"resume={folder}")
    lacked = [*lacked_before(folder), *older.complete(recorded)]
    kept = {key: value for key, value in older.earlier(recorded).items() if key in lacked}
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
    refused = []
    for key, (old, new) in differences(recorded, redact_all(config)).items():
        if key == "resume" or MASK in str(old):  # a secret: nobody can tell if it is the same
            continue
        if matches(key, MAY_CHANGE):
            log.info("changed: %s from %s to %s", key, old, new)
        elif any(key == name or key.startswith(f"{name}.") for name in named):
            log.warning("changed by name: %s from %s to %s", key, old, new)
        else:
            refused.append(f"{key} was {old} and would be {new}")
    if refused:
        way_out = (
            "Name a key on the command line to change it all the same, or start a new run."
            if by_name
            else "Use another folder, or "
            + command_line.shell([f"resume={folder}"])
            + " with the keys to change."
        )
        raise UserError(f"{folder} holds a run of another config: {'; '.join(refused)}. {way_out}")
    return True


def changed_sources(
    recorded: Mapping[str, Any],
    config: Mapping[str, Any],
    lacked: Sequence[str],
    chosen: Collection[str],
) -> set[str]:
    """The keys that others follow, and that are not what they were in the recorded run: chosen, if
    the record lacked them, or else of another value."""
    before, now = leaves(recorded), leaves(config)
    return {
        key
        for key in (row.follows for row in older.ADDED_KEYS if row.follows)
        if (key in chosen if key in lacked else before.get(key) != now.get(key))
    }


def lacked_before(folder: Path) -> list[str]:
    """The keys that the record in `folder` lacked when an earlier resume completed it."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        content = read_json(folder / LACKED)
        return [str(key) for key in content] if isinstance(content, list) else []
    return []


def lacked_keys(folder: Path) -> list[str]:
    """The keys that an older record in `folder` lacks, or lacked before: for `lacked_before`."""
    if not (folder / "config.yaml").is_file():
        return []
    lacking = older.complete(recorded_config(folder, str(folder)))
    return [*dict.fromkeys([*lacked_before(folder), *lacking])]


def keep_monitor(recorded: Mapping[str, Any], config: dict[str, Any], new: set[str]) -> set[str]:
    """Give `config` the monitor and direction that the recorded run settled on, unless they are
    typed; `new` are the keys typed for this start alone. Returns the keys that follow from a typed
    one, and so count as named."""
    before, trainer = recorded["trainer"], config["trainer"]
    if before.get("monitor") is None and "trainer.monitor" not in new:
        trainer["monitor"] = None  # without a validation split
    if trainer["mode"] is None and before.get("monitor") == trainer["monitor"]:
        trainer["mode"] = before.get("mode")
    elif trainer["mode"] is None:
        trainer["mode"] = monitor.of_run(config)
        return {"trainer.mode"}
    return set()


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
    values = [o.partition("=")[2] for o in typed(overrides) if key_of(o) == CHANGED]
    if changed and values[-1:] != ["accept"]:
        shown = "; ".join(_change_of(name, **both) for name, both in changed.items())
        typed_now = command_line.shell(
            [command_line.override("resume", folder), f"{CHANGED}=accept"]
        )
        raise UserError(
            f"{folder}: the data has changed since that run began ({shown}). Put it back, start a "
            f"new run, or resume with the data as it is now: {typed_now}"
        )
    for name, both in changed.items():
        log.warning("%s=accept: %s", CHANGED, _change_of(name, **both))
    return changed


def recorded_data(folder: Path) -> dict[str, Any]:
    """The data's fingerprint at the latest start of the run in `folder`; empty where it is lost."""
    recorded = manifest.read(folder)
    for later in recorded.get("resumes", []):
        recorded |= later
    data = recorded.get("data")
    if isinstance(data, dict) and all(isinstance(it, dict) for it in data.values()):
        return data
    log.warning(
        "%s: nobody can tell whether the data has changed since that run began",
        folder / manifest.NAME,
    )
    return {}


def _change_of(name: str, was: Any, **now: Any) -> str:
    counts = [(it or {}).get("examples", 0) for it in (was, now["is"])]
    if counts[0] != counts[1]:
        return f"{name}: {counts[0]:,} examples then, {counts[1]:,} now"
    return f"{name}: other content in {counts[1]:,} examples"


def is_done(folder: Path, config: Mapping[str, Any]) -> bool:
    """Return True if the folder's run is complete and `config` asks for no more of it.

    Raises UserError if a limit was changed all the same, to one that does not let it go on.
    """
    status = load_status(folder)
    if status is None or status["state"] != "completed":
        return False
    summary = load_summary(folder)
    if not summary:
        return False  # written again by a resume from the last step
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


def reached(summary: Mapping[str, Any], trainer: Mapping[str, Any]) -> dict[str, int]:
    """The limits that a complete run has come to, each with a value that is as much again."""
    patience = trainer["early_stopping"]["patience"]
    waited = summary["evaluations_without_improvement"]
    spent = {"max_steps": summary["steps"], "max_seconds": summary["seconds"]}
    if trainer["max_steps"] is None:  # it wins over max_epochs
        spent["max_epochs"] = summary["epochs"]
    found = {
        f"trainer.{key}": 2 * math.ceil(max(trainer[key], value))
        for key, value in spent.items()
        if trainer[key] is not None and value >= trainer[key]
    }
    if patience is not None and waited > patience:
        found["trainer.early_stopping.patience"] = 2 * waited
    return found


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ, with both; a key that is not there shows as "absent"."""
    before, after = leaves(old), leaves(new)
    return {
        key: (before.get(key, "absent"), after.get(key, "absent"))
        for key in sorted({*before, *after})
        if before.get(key, "absent") != after.get(key, "absent")
    }
