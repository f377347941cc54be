"""Compare the config of a resumed run with the recorded one, and refuse what must not change."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from regrow.config import command_line, older
from regrow.config.command_line import key_of, typed
from regrow.config.recorded import holds_run, recorded_config, recorded_overrides
from regrow.dotted import Checked, Config, leaves, matches
from regrow.errors import UserError
from regrow.project import lab_name
from regrow.record import monitor
from regrow.record.records import load_status, load_summary, read_json
from regrow.record.redact import MASK, redact_all

log = logging.getLogger(__name__)

# Keys that may differ from the recorded run: limits, devices, micro-batches, workers, logging.
# They change results by float rounding at most. Any other change must be named.
MAY_CHANGE = (
    "tags",
    "notes",
    "logger.*",
    "data.changed",  # has no effect unless it was typed: see `changed_data`
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
LACKED = Path(".hydra", "older.json")
LIMITS = (
    "trainer.max_epochs",
    "trainer.max_steps",
    "trainer.max_seconds",
    "trainer.early_stopping.patience",
)


class _Absent:
    """In place of a missing key's value; equals no value of a config."""

    def __str__(self) -> str:
        return "absent"


ABSENT = _Absent()


def resumed(folder: Path, asked: Checked, overrides: Sequence[str]) -> dict[str, Any] | None:
    """Return the `asked` config as it resumes the run in `folder`, or None if there is none.

    `overrides` are those of this start, recorded ones included: see `expand`. Logs what changes.
    Raises UserError if the configs conflict.

    Keys newer than the record get the value for the earlier behaviour. A null
    `trainer.num_threads` becomes the recorded one if the number of processes is the same: results
    depend on it bit for bit. The monitor and its mode become those of the recorded run.
    """
    if not holds_run(folder):
        return None
    config = copy.deepcopy(dict(asked))
    recorded = recorded_config(folder, f"resume={folder}")
    lacked = [*lacked_before(folder), *older.complete(recorded)]
    kept = {key: value for key, value in older.earlier(recorded).items() if key in lacked}
    kept |= older.earlier_defaults(recorded, config)
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
    try:
        before = recorded_overrides(folder)
    except UserError:
        before = []
        lost = folder / ".hydra" / "overrides.yaml"
        log.warning("%s cannot be read: only this command's overrides count", lost)
    named = keep_monitor(recorded, config, {key_of(o) for o in overrides if o not in before})
    if by_name:
        named |= {key_of(override) for override in typed(overrides)}
        named |= older.following(config, named)
    refuse_other_monitor(recorded, config, folder)
    _refuse_changes(folder, recorded, config, named, by_name=by_name)
    return config


def _refuse_changes(
    folder: Path,
    recorded: Mapping[str, Any],
    config: dict[str, Any],
    named: Collection[str],
    *,
    by_name: bool,
) -> None:
    """Raise UserError for changed keys that are neither in `MAY_CHANGE` nor `named`; log others."""
    refused, named_so, has_new = [], [], False
    for key, (old, new) in differences(recorded, redact_all(config)).items():
        if key == "resume" or MASK in str(old):  # a masked secret cannot be compared
            continue
        if matches(key, MAY_CHANGE):
            log.info("changed: %s from %s to %s", key, _shown(old), _shown(new))
        elif any(key == name or key.startswith(f"{name}.") for name in named):
            log.warning("changed by name: %s from %s to %s", key, _shown(old), _shown(new))
        else:
            refused.append(f"{key} was {_shown(old)} and would be {_shown(new)}")
            has_new = has_new or old is ABSENT
            if new is not ABSENT:
                named_so.append(older.as_override(key, new))
    if refused:
        words = f": {command_line.shell(named_so)}" if named_so else ""
        way_out = (
            f"Start a new run, or name each key to change it anyway{words}"
            if by_name
            else "Use another folder, or "
            + command_line.shell([f"resume={folder}"])
            + " with the keys to change."
        )
        if has_new:
            way_out = f"If you added a key, give it a row in {lab_name()}.added. {way_out}"
        raise UserError(
            f"{folder} holds a run with another config: {'; '.join(refused)}. {way_out}"
        )


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
    if not holds_run(folder):
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
        was = f"={value}"
        if key in changed:
            was = f" was {_shown(changed[key][0])} and would be {value}"
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
    """Return the dotted keys whose values differ, with both values, `ABSENT` for a missing key."""
    before, after = leaves(old), leaves(new)
    both = {
        key: (before.get(key, ABSENT), after.get(key, ABSENT)) for key in sorted({*before, *after})
    }
    return {key: (a, b) for key, (a, b) in both.items() if not _equal(a, b)}


def _shown(value: Any) -> str:
    """Return a value as it would be typed, which tells a text from a number or null."""
    return str(value) if value is ABSENT else older.as_override("", value)[1:]


def _equal(one: Any, other: Any) -> bool:
    """Return True if two values are equal; NaN, which differs from itself, has not changed."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_equal, one, other))
    return bool(one == other or (one != one and other != other))
