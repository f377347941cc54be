"""Reject Hydra settings that have no effect here, and name the setting that does."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from regrow.config import leads
from regrow.config.command_line import read
from regrow.config.explain import hydras_keys
from regrow.config.hydra_access import plain
from regrow.config.targets import locate
from regrow.dotted import walk
from regrow.errors import UserError, did_you_mean

SWEEPER = "hydra_plugins.regrow_sweeper.RegrowSweeper"
BASIC_LAUNCHER = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"
# Hydra's nodes that accept any key, and those that Hydra fills itself.
OPEN = ("callbacks", "job_logging", "hydra_logging", "sweeper", "launcher", "aliases")
FILLED = ("runtime", "overrides", "help", "hydra_help", "job.env_set", "job.env_copy")
OURS = ("check", "sweep")  # the callbacks of conf/train.yaml


def refuse_typed(arguments: Sequence[str]) -> None:
    """Raise UserError for the first argument that sets a Hydra setting without effect here."""
    for argument in arguments:
        key, equals, value = argument.partition("=")
        key = key.lstrip("+~")
        if not key.startswith("hydra") or (said := leads.replaced(key)) is None:
            continue
        if key in ("hydra/launcher", "hydra/sweeper"):
            raise UserError(leads.replaced_option(key, value))
        if equals and key == "hydra.job.chdir" and read(argument) in (False, None):
            continue  # the default
        raise UserError(f"{argument}: {said}")


def check_settings(hydra: DictConfig, *, is_sweep: bool) -> None:
    """Raise UserError for the first Hydra setting in the config that has no effect here."""
    node = plain(hydra, resolve=False)
    choices = node["runtime"]["choices"]
    for group, usual in (("launcher", "basic"), ("sweeper", "basic"), ("output", "default")):
        option = choices.get(f"hydra/{group}", usual)
        if option != usual:
            raise UserError(leads.replaced_option(f"hydra/{group}", str(option)))
    _refuse_others("sweeper", node["sweeper"], SWEEPER, ("max_batch_size", "params"))
    _refuse_others("launcher", node["launcher"], BASIC_LAUNCHER, ())
    known = {*hydras_keys(), "hydra.env"}
    closed = [f"hydra.{each}" for each in (*OPEN, *FILLED)]
    for key, _ in walk(node, "hydra.", closed):
        if key not in known and not key.endswith("._target_"):
            raise UserError(f"{key}: Hydra has no such setting.{did_you_mean(key, known)}")
    job = node["job"]
    if job.get("chdir"):
        raise UserError(f"hydra.job.chdir=true: {leads.replaced('hydra.job.chdir')}")
    # The default is the script's name, or `app` if a config is composed without a script.
    if job.get("name") not in (None, "???", "app", "train", Path(sys.argv[0]).stem):
        raise UserError(f"hydra.job.name={job['name']}: {leads.replaced('hydra.job.name')}")
    for line in node["overrides"]["hydra"]:
        if line.lstrip("+").startswith("hydra.sweep.subdir=") and not is_sweep:
            raise UserError(f"{line} is for a sweep: add -m. A run's folder is hydra.run.dir=….")
    if is_sweep:
        _refuse_in_sweep(node)


def _refuse_others(name: str, its: Any, target: str, empty: Sequence[str]) -> None:
    """Raise UserError for a setting of a launcher or sweeper that is not ours."""
    for key, value in its.items() if isinstance(its, Mapping) else ():
        full = f"hydra.{name}.{key}"
        is_usual = value == target if key == "_target_" else key in empty and value is None
        if not is_usual:
            raise UserError(f"{full}={leads.shown(value)}: {leads.replaced(full)}")


def _refuse_in_sweep(node: Mapping[str, Any]) -> None:
    """Raise UserError for settings that do not reach a sweep's jobs, which are own processes."""
    for name, value in (node["job"].get("env_set") or {}).items():
        raise UserError(
            f"hydra.job.env_set.{name}={leads.shown(value)}: the jobs of a sweep do not get it. "
            f"Set it in the shell: {name}={leads.shown(value)} python …"
        )
    for name, callback in (node.get("callbacks") or {}).items():
        target = callback.get("_target_") if isinstance(callback, Mapping) else None
        if name in OURS or not isinstance(target, str):
            continue
        found = locate(target, f"hydra.callbacks.{name}")
        for event in ("on_job_start", "on_job_end"):
            if getattr(found, event, None) not in (None, getattr(Callback, event)):
                raise UserError(
                    f"hydra.callbacks.{name}: {event} is not called for the jobs of a sweep, each "
                    f"of which is a process of its own. With -m, leave it out: "
                    f"~hydra.callbacks.{name}"
                )
