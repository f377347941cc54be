"""Plan a sweep's jobs from its overrides, each of them composed and checked."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra.core.config_loader import ConfigLoader
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from regrow.config.changed_data import CHANGED
from regrow.config.check import check
from regrow.config.command_line import key_of, paths_as_typed, quoted, refuse_unusable
from regrow.config.explain import composition_error, hydras_value_error, wrong_options
from regrow.config.hydras import check_settings
from regrow.config.job import Job, job_of
from regrow.config.yaml_files import plain_value
from regrow.errors import UserError, brief
from regrow.record.comparison import label_of
from regrow.record.redact import MASK, redact_all
from regrow.sweep import ledger
from regrow.sweep.composed import Composed
from regrow.sweep.kinds import Grid, Sets

OWN = ("launcher", "sweep", "resume", "hydra")  # groups and keys of the whole sweep


@dataclass(frozen=True)
class Planned:
    """A job that is composed, checked and ready to run."""

    entry: ledger.JobEntry
    job: Job

    @property
    def number(self) -> int:
        return self.entry.number


def grid(loader: ConfigLoader, lines: Sequence[str]) -> list[tuple[list[str], list[str]]]:
    """Return every combination of the values in `lines`, as all overrides and the swept ones.

    Raises UserError for an interval, an empty sweep, and a swept key of the sweep itself.
    """
    options: dict[str, list[str]] = {}
    swept: dict[str, None] = {}
    for override in OverridesParser.create(config_loader=loader).parse_overrides(list(lines)):
        key, line = override.get_key_element(), override.input_line
        options[key] = [str(line)]  # the last one wins
        swept.pop(key, None)
        if override.is_sweep_override():
            if not override.is_discrete_sweep():
                raise UserError(
                    f"{line}: an interval has infinitely many values. Use sweep=optuna."
                )
            if is_of_the_sweep(key):
                varied = key.partition("sweep.params.")[2]
                raise UserError(
                    f"{line}: {key} is the sweep's own, and takes one value."
                    + (f" Write {varied}={str(line).partition('=')[2]}" if varied else "")
                )
            options[key] = [f"{key}={value}" for value in override.sweep_string_iterator()]
            if not options[key]:
                raise UserError(f"{line}: there is no value in it.")
            swept[key] = None
    keys = [*options]
    return [
        (list(values), [values[keys.index(key)] for key in swept])
        for values in itertools.product(*options.values())
    ]


def is_of_the_sweep(override: str) -> bool:
    """Return True for a key of the whole sweep, such as launcher.jobs, which no job has."""
    return key_of(override).split(".")[0] in OWN


def refuse_own(where: str, override: str) -> None:
    """Raise UserError for a key of the whole sweep, which a job would ignore."""
    if is_of_the_sweep(override) and key_of(override) != "hydra.sweep.subdir":
        raise UserError(
            f"{where}: {key_of(override)} is the sweep's own. Give it on the command line."
        )


def refuse_in_a_set(loader: ConfigLoader, number: int, overrides: Sequence[str]) -> None:
    """Raise UserError for an override that no single job can have."""
    for override in OverridesParser.create(config_loader=loader).parse_overrides([*overrides]):
        line = str(override.input_line)
        refuse_own(f"sweep.sets[{number}]", line)
        if override.is_sweep_override():
            raise UserError(
                f"sweep.sets[{number}]: {line}: a set takes one value of each key. Give a key "
                "several values on the command line, or write a set for each."
            )


def sets_of(options: Sets) -> list[list[str]]:
    """Return the sets of overrides, each as a list. Raises UserError for an invalid set."""
    found = list(options.sets)
    if options.file is not None:
        path = Path(options.file)
        try:
            text = path.read_text(encoding="utf-8")
            content = plain_value(text) if path.suffix in (".yaml", ".yml") else None
        except (OSError, ValueError, yaml.YAMLError) as error:
            said = error.strerror if isinstance(error, OSError) else brief(error)
            raise UserError(f"sweep.file={options.file}: {said}") from None
        lines = [line for line in text.splitlines() if line.strip() and line.strip()[0] != "#"]
        found += lines if content is None else content if isinstance(content, list) else [content]
    sets = []
    for number, each in enumerate(found):
        if isinstance(each, Mapping):
            each = [f"{key}={_typed(value)}" for key, value in each.items()]
        elif isinstance(each, str):
            with contextlib.suppress(ValueError):  # an unclosed quote
                each = shlex.split(each)
        if not isinstance(each, list) or not all(
            isinstance(o, str) and ("=" in o or o.startswith("~")) for o in each
        ):
            raise UserError(
                f"sweep.sets[{number}]={each!r} must be overrides, such as "
                "'optimizer=sgd optimizer.lr=0.1'."
            )
        sets.append(paths_as_typed(each, multirun=False))
    if not sets:
        raise UserError("sweep=list: there is no set. Give 'sweep.sets=[…]' or sweep.file=….")
    return sets


def combinations(
    loader: ConfigLoader, options: Grid | Sets, arguments: Sequence[str], varied: Sequence[str]
) -> Iterator[tuple[list[str], list[str]]]:
    """Yield all jobs of a finite sweep: all overrides, and those that distinguish the job.

    The latter have several values, or keys that an earlier start has `varied`.
    """
    lines = [*lines_of(options.params), *arguments]
    for number, each in enumerate(sets_of(options) if isinstance(options, Sets) else [[]]):
        refuse_in_a_set(loader, number, each)
        named = {key_of(o) for o in each}
        rest = [line for line in lines if key_of(line) not in named]
        for overrides, swept in grid(loader, rest):
            once = [o for o in overrides if key_of(o) in varied and o not in swept]
            yield [*overrides, *each], [*each, *swept, *once]


def lines_of(params: Mapping[str, Any] | None) -> list[str]:
    """Return `sweep.params` as overrides; a list becomes several values. Raises UserError."""
    for key in params or {}:
        refuse_own("sweep.params", str(key))
    return [
        f"{key}={','.join(map(_typed, value)) if isinstance(value, list) else _typed(value)}"
        for key, value in (params or {}).items()
    ]


def _typed(value: Any, *, inside: bool = False) -> str:
    """Return a YAML value as it would be typed; top-level text counts as typed already."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{k}:{_typed(v, inside=True)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(_typed(each, inside=True) for each in value) + "]"
    if isinstance(value, str):
        return quoted(value) if inside else value
    return json.dumps(value)


@dataclass(frozen=True)
class Composer:
    """Turns overrides into jobs by composing configs."""

    composed: Composed
    folder: Path

    def plan(
        self,
        number: int,
        overrides: Sequence[str],
        swept: Sequence[str],
        known: Mapping[str, ledger.JobEntry] | None = None,
    ) -> Planned:
        """Compose and check one job. Raises UserError that names the job.

        A job with the same config as one in `known` takes its number and folder.
        """
        overrides = [o for o in overrides if key_of(o) != "resume"]
        values = by_key(swept)
        try:
            return self._planned(number, overrides, values, known or {})
        except UserError as error:
            what = label_of(values)
            raise UserError(f"{error} (job {number}: {what})" if what else str(error)) from None

    def _planned(
        self,
        number: int,
        overrides: list[str],
        swept: dict[str, str],
        known: Mapping[str, ledger.JobEntry],
    ) -> Planned:
        try:
            cfg = self.composed(overrides)
            identity = ledger.identity_of(cfg)
            before = known.get(identity)
            number = number if before is None else before.number
            with open_dict(cfg):
                cfg.hydra.job.id, cfg.hydra.job.num = str(number), number
            HydraConfig.instance().set_config(cfg)
            check_settings(cfg.hydra, is_sweep=True)  # an experiment may change them
            check(cfg, cfg.hydra.runtime.choices)
            folder = str(cfg.hydra.sweep.subdir) if before is None else before.folder
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(composition_error(error)) from None
        except (ValueError, TypeError) as error:  # from Hydra, if an option is not a name
            wrong = wrong_options(overrides) or hydras_value_error(error)
            if wrong is None:
                raise
            raise UserError(wrong) from None
        refuse_unusable("hydra.sweep.subdir", folder)
        parts = Path(folder).parts
        if not folder.strip() or Path(folder).is_absolute() or ".." in parts:
            raise UserError(f"hydra.sweep.subdir={folder} must lie in the sweep's folder.")
        if not parts or parts[0] in ledger.OWN or parts[0].startswith("."):
            raise UserError(f"hydra.sweep.subdir={folder} is the sweep's own. Choose another name.")
        command = ["python", "scripts/train.py", *overrides]
        job = job_of(cfg, self.folder / folder, command)
        entry = ledger.JobEntry(number, identity, swept, folder, overrides)
        return Planned(entry, job.started_again())


def by_key(overrides: Sequence[str]) -> dict[str, str]:
    """Return the values of overrides, as typed."""
    return {key.lstrip("+"): value for key, _, value in (o.partition("=") for o in overrides)}


def distinguished(entry: ledger.JobEntry, varied: Sequence[str]) -> ledger.JobEntry:
    """Return an earlier start's job with its values of the keys that are `varied` since then.

    The table would take it for another setting than a job of this start with the same values.
    """
    its = by_key([o for o in entry.overrides if key_of(o) in varied])
    # The first keeps the order of its keys, the last their values.
    return dataclasses.replace(entry, swept={**entry.swept, **its, **entry.swept})


def numbered(
    composer: Composer,
    wanted: Sequence[tuple[list[str], list[str]]],
    known: Sequence[ledger.JobEntry],
) -> list[Planned]:
    """Return the wanted jobs. Jobs with a `known` config keep their numbers; others get new ones.

    Raises UserError for the first invalid job, and for two that would share a folder.
    """
    by_identity = {entry.identity: entry for entry in known}
    following = max((entry.number for entry in known), default=-1) + 1
    folders = {entry.folder: entry.number for entry in known}
    planned: dict[int, Planned] = {}
    for overrides, swept in wanted:
        found = composer.plan(following, overrides, swept, by_identity)
        if found.number == following:
            refuse_shared(found.entry, folders)
            by_identity[found.entry.identity] = found.entry
            folders[found.entry.folder] = found.number
            following += 1
        planned.setdefault(found.number, found)
    return [*planned.values()]


def refuse_shared(entry: ledger.JobEntry, folders: Mapping[str, int]) -> None:
    """Raise UserError if the job's folder is that of another one: see its number in `folders`."""
    if (other := folders.get(entry.folder, entry.number)) != entry.number:
        raise UserError(
            f"hydra.sweep.subdir={entry.folder}: job {entry.number} would share it with job "
            f"{other}. Put ${{hydra.job.num}} into it."
        )


def left_over(
    composer: Composer, planned: Sequence[Planned], known: Sequence[ledger.JobEntry], *, retry: bool
) -> list[Planned]:
    """Return the unfinished jobs of earlier commands that this command does not plan.

    With `retry`, failed jobs count as unfinished.
    """
    numbers = {one.number for one in planned}
    found = []
    for entry in known:
        is_open = ledger.is_to_be_run(composer.folder, entry, retry=retry)
        if entry.number in numbers or not is_open or any(MASK in o for o in entry.overrides):
            continue
        swept = [f"{key}={value}" if value else key for key, value in entry.swept.items()]
        before = [o for o in entry.overrides if key_of(o) != CHANGED]  # applied to that start only
        again = composer.plan(entry.number, before, swept, {entry.identity: entry})
        found.append(dataclasses.replace(again, entry=entry))
    return found


def fixed_by(lines: Sequence[str], swept: Sequence[str]) -> dict[str, str]:
    """Return the overrides that all jobs share, by key, without those that do not change results.

    `ledger.ASIDE` lists the latter, such as loggers and tags.
    """
    varied = {key_of(override) for override in swept}
    return {
        key_of(line): line
        for line in lines
        if key_of(line) not in (*varied, CHANGED) and key_of(line).split(".")[0] not in ledger.ASIDE
    }


def refuse_another(folder: Path, fixed: Mapping[str, str], swept: Sequence[str]) -> None:
    """Raise UserError if the jobs in `folder` share other overrides than `fixed`.

    Results of both would be compared as one setting.
    """
    content = ledger.read(folder)
    before: dict[str, str] = content.get("fixed", {})
    varied = {key_of(o) for o in swept} | set(content.get("varied", []))
    masked = redact_all(dict(fixed))
    for key in [*before, *fixed]:
        old, new = before.get(key), masked.get(key)
        if content and key not in varied and old != new:
            old, new = (f"{key}={MASK}" if it == MASK else it for it in (old, new))
            raise UserError(
                f"{new or '~' + key}: the sweep in {folder} was made with "
                f"{old or 'no such override'}. Vary it, or use another folder."
            )


def overrides_of(config: DictConfig) -> list[str]:
    """Return the overrides that were typed for the sweep, of Hydra's node and of the config."""
    said = OmegaConf.to_container(config.hydra.overrides, resolve=False)
    assert isinstance(said, dict)
    return [str(o) for o in (*said["hydra"], *said["task"])]
