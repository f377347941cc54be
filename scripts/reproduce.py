"""Run a run's record again in a new folder and compare: every number, and every bit of the weights.

python scripts/reproduce.py run=outputs/digits/latest
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import _start  # noqa: F401  finds the package or explains the set-up

from regrow.cli.arguments import Arguments, Option, parse
from regrow.config import flags, older, registered
from regrow.config.command_line import key_of, override
from regrow.config.explain import composition_error
from regrow.config.foreign import (
    check_roles_of_run,
    downloads_elsewhere,
    is_foreign,
    is_own,
    places_of_conf,
    refuse_remote,
)
from regrow.config.hydra_access import plain
from regrow.config.own_modules import import_own_modules
from regrow.config.recorded import ELSEWHERE, recorded_config, recorded_overrides
from regrow.config.resumed_config import differences, lacked_before
from regrow.errors import UserError, brief, printable
from regrow.failing import in_one_line, tell
from regrow.feeding.files import without_gone
from regrow.processes.terminal import may_be_unread
from regrow.project import CONF
from regrow.record import manifest, records
from regrow.record.redact import redact_all

OPTIONS = {
    "run": Option("the folder of a complete run", required=True),
    "config_dir": Option("the run's --config-dir, which its folder does not add by itself"),
    "config_path": Option("the run's --config-path, likewise"),
    "searchpath": Option("the run's hydra.searchpath, likewise"),
}
ROOT = CONF.parent


@in_one_line()
@may_be_unread()
def main(arguments: list[str] | None = None) -> None:
    given = sys.argv[1:] if arguments is None else arguments
    options = parse(given, OPTIONS, text=__doc__ or "")
    raise SystemExit(reproduce(Path(options["run"]), typed_places(options)))


def typed_places(options: Arguments) -> dict[str, Any]:
    """Return the search path from the command line, in the form of Hydra's flags."""
    typed = [
        *(["--config-dir", options["config_dir"]] if options["config_dir"] else []),
        *(["--config-path", options["config_path"]] if options["config_path"] else []),
        *([f"{flags.SEARCH_PATH}={options['searchpath']}"] if options["searchpath"] else []),
    ]
    return flags.typed(flags.absolute(typed))


def reproduce(given: Path, places: Mapping[str, Any] = MappingProxyType({})) -> int:
    """Run again and return 0 if the second run equals the first bit for bit, else 1."""
    run = given.resolve()  # `latest` may change meanwhile
    config, before = record_of(run, given)
    source = flags.followed(f"run={given}", flags.recorded(run), places, is_own=is_own(run))
    arguments = arguments_of(run, config, given, source)
    if changed := manifest.code_changes(run, ROOT):
        print(printable(changed))
    for line in manifest.not_restored(before.get("git") or {}):
        print(printable(line))
    if before.get("resumes"):
        print("This run was resumed. If a key was changed then, a run in one go may differ.")
    again = records.create(Path("outputs"), f"{config['name']}/reproduced")
    nodes = {registered.ELSEWHERE: str(run / ".hydra")} if is_own(run) else {}
    arguments = [*flags.arguments_of(source), *arguments, override("hydra.run.dir", again)]
    if code := train(arguments, **nodes):
        tell(f"the second run ended with exit code {code}.")
        return 1
    for line in changes(before, records.read_json(again / manifest.NAME)):
        print(printable(line))
    if found := first_difference(run, again, given):
        print(f"\nnot identical: {printable(found)}\n\nthe second run: {again}")
        if before.get("resumes"):
            print("The run was resumed. If a key changed at a resume, they need not be identical.")
        return 1
    count, weights = len(lines_of(run)), weights_of(run)
    print(f"\nidentical: {count} lines of {records.METRICS}, and the weights, {weights}")
    return 0


def record_of(run: Path, given: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the config and manifest of a complete run, as of its latest start."""
    status = records.load_status(run)
    if status is None or status["state"] != "completed":
        state = "holds no run" if status is None else f"is {status['state']}, not completed"
        raise UserError(f"run={given} {state}. Only a complete run can be compared.")
    config, content = recorded_config(run, f"run={given}"), manifest.read(run)
    name, threads = config.get("name"), config["trainer"].get("num_threads")
    try:
        lines_of(run), weights_of(run)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = brief(error, 200)
        raise UserError(
            f"run={given}: there is nothing to compare with, as its {records.METRICS} or "
            f"{records.SUMMARY} cannot be read: {reason}. Restore that file."
        ) from None
    import_own_modules()
    check_roles_of_run(config, tuple(config), run, f"run={given}")
    if not isinstance(name, str) or not isinstance(threads, int):
        raise UserError(f"run={given}: its config.yaml has no name or no trainer.num_threads.")
    return config, manifest.latest(content)


def arguments_of(
    run: Path,
    config: dict[str, Any],
    given: Path,
    source: Mapping[str, Any] = flags.DEFAULT,
) -> list[str]:
    """Return the command line that composes the recorded config again, except for trackers.

    Raises UserError if it uses keys that are not a run's own, or now composes another config.
    """
    gone = older.removed(config)
    recorded = [o for o in recorded_overrides(run) if key_of(o) not in gone]
    added = older.complete(config)
    lacked = lacked_before(run)
    added |= {key: value for key, value in older.earlier(config).items() if key in lacked}
    added |= older.earlier_defaults(config)
    if own := is_own(run):
        registered.take_up(run / ".hydra")
    if foreign := [line for line in recorded if is_foreign(line, may_refer=own)]:
        raise UserError(
            f"run={given}: its overrides.yaml has {foreign[0]}, which is none of a run's own keys. "
            "It is not followed."
        )
    arguments = [o for o in recorded if key_of(o).split(".")[0] not in ("logger", "resume")]
    # Bits depend on the first two, which by default come from the machine. The others are the
    # values that the run resolved.
    settled = ("num_threads", "devices", "monitor", "mode")
    kept = {f"trainer.{key}": config["trainer"][key] for key in settled}
    arguments = [o for o in arguments if key_of(o) not in kept]
    arguments += ["logger=[jsonl]", *(older.as_override(*item) for item in kept.items())]
    typed = {key_of(o) for o in arguments}
    if keys := older.adopt(composed(arguments, source), added, typed):  # others are as they were
        print(older.line(f"run={given}", keys))
        arguments += older.as_overrides(keys)
    refuse_remote(run, f"run={given}", config, ())
    aside = ["logger", "resume"]
    elsewhere = not own and downloads_elsewhere(run, config, ())
    if elsewhere and config["data"]["source"].get("root") not in [*places_of_conf()]:
        arguments.append("data.source.download=false")
        aside.append("data.source.download")
    now = redact_all(composed(arguments, source))
    changed = [
        f"{key} was {old} and would be {new}"
        for key, (old, new) in differences(config, now).items()
        if key.split(".")[0] not in aside and key not in aside
    ]
    if changed:
        raise UserError(
            f"run={given}: conf/ has changed since, so that its command means another run now: "
            f"{'; '.join(changed)}. Check out the commit in its {manifest.NAME}."
        )
    if (data := without_gone(config["data"], run)) is not config["data"]:
        arguments.append(older.as_override("data.source.leave_out", data["source"]["leave_out"]))
    return arguments


def composed(overrides: list[str], source: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config that train.py would compose, as plain values. Instantiates nothing."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from regrow.config.composition import composition

    try:
        config = composition(source, overrides)
        HydraConfig.instance().set_config(config)
        names = [str(key) for key in config if key not in ("hydra", *ELSEWHERE)]
        return plain(OmegaConf.masked_copy(config, names))
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(composition_error(error)) from None


def train(arguments: list[str], **environment: str) -> int:
    """Run the real command in a new process and return its exit code."""
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), *arguments]
    return subprocess.run(command, check=False, env={**os.environ, **environment}).returncode


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return lines on what changed since the run was made and may explain different bits."""

    def facts(content: Mapping[str, Any]) -> dict[str, Any]:
        its = content.get("hardware") or {}
        hardware = {key: its.get(key) for key in ("cpu", "accelerators")}
        parts = {key: content.get(key) for key in ("python", "environment", "data")}
        return {**parts, "hardware": hardware}

    # A package of the first run may be missing in the second record though installed: an older
    # record lists packages that were not imported, and a killed run's record those of its start.
    packages = before.get("packages") or {}
    there = now.get("packages") or {}
    versions = {name: there.get(name) or installed(name) for name in packages}
    before = {**facts(before), "packages": packages}
    now = {**facts(now), "packages": versions}
    return [
        f"changed since: {key} was {old} and is {new}"
        for key, (old, new) in differences(before, now).items()
    ]


def installed(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def first_difference(run: Path, again: Path, shown: Path) -> str | None:
    """Return the first difference in metrics.jsonl, or else in the weights; None if equal."""
    ours, theirs = lines_of(run), lines_of(again)
    for number in range(max(len(ours), len(theirs))):
        where = f"{shown / records.METRICS}:{number + 1}"
        if number >= len(theirs):
            return f"{where} is missing in the second run: {ours[number]}"
        if number >= len(ours):
            return f"{where} is missing, and the second run has {theirs[number]}"
        for key, (old, new) in differences(ours[number], theirs[number]).items():
            if repr(old) != repr(new):  # NaN equals NaN
                return f"{where}: {key} was {old!r} and is {new!r}"
    if weights_of(run) != weights_of(again):
        old, new = weights_of(run), weights_of(again)
        return f"{shown / records.SUMMARY}: weights_sha256 was {old} and is {new}"
    return None


def lines_of(run: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl without values that depend on the clock."""
    lines = (run / records.METRICS).read_text(encoding="utf-8").splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if not key.startswith("time/")}
        for line in lines
    ]


def weights_of(run: Path) -> str:
    return str(records.read_json(run / records.SUMMARY)["weights_sha256"])


if __name__ == "__main__":
    main()
