"""The learning-rate range test as a program: suggest a learning rate for a composed config."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from regrow.config import flags
from regrow.config.check import check_once
from regrow.config.command_line import command, key_of
from regrow.config.hydra_access import is_named, output_dir, plain, typed_overrides
from regrow.config.origins import located
from regrow.config.started import remove_created
from regrow.config.targets import instantiate
from regrow.distributed.parallel import World
from regrow.errors import UserError, machine_fault
from regrow.failing import fail
from regrow.processes.interrupt import StopRequest
from regrow.protocols import Batch
from regrow.record import records
from regrow.runs import first_calls, lr_finder, machine, training
from regrow.runs.console import console
from regrow.runs.lab import lab
from regrow.runs.lr_finder import Curve, RangeTest

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger("regrow")


def find_lr(cfg: DictConfig) -> float:
    """Run the range test on what `cfg` describes, write the curve and return the suggested rate.

    Starts and changes no run. Raises UserError in a sweep; otherwise prints it and exits.
    """
    try:
        return _find_lr(cfg)
    except UserError as error:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            raise  # Hydra reports which job it was
        fail(located(str(error)))
    except Exception as error:
        if (fault := machine_fault(error)) is None:
            raise
        fail(str(fault), code=1)
    finally:
        remove_created()  # Hydra's folder, if nothing was written there


def _find_lr(cfg: DictConfig) -> float:
    hydra = HydraConfig.get()
    check_once(cfg, hydra.runtime.choices)
    config = plain(cfg)
    refuse_unfit(config, hydra.runtime.choices)
    with console():
        test: RangeTest = instantiate(config["find_lr"])
        world = World(device=machine.resolve_device(config["trainer"]["device"]))
        objects = training.build(config, world)
        with contextlib.closing(objects.data):
            for note in objects.data.notes:
                log.warning("%s", note)
            if config["trainer"]["check_first_batch"]:
                training.check_first_batch(objects, world)
            nowhere: dict[str, Any] = {"record": None, "checkpoints": None, "trial": None}
            plan = lab().plan_of(objects, config["seed"], world, StopRequest(), **nowhere)

            taken = 0

            def step(batch: Batch) -> list[float]:
                nonlocal taken
                sums = plan.train_step(objects.state, batch, plan.step).totals.read()
                taken += 1
                return sums

            with first_calls.explained(lambda: taken == 0):
                curve = lr_finder.range_test(objects.state, objects.train, step, test)
        lr = lr_finder.suggest(curve)
        if lr_finder.still_falling(curve):
            log.warning(
                "the loss was still falling at the last rate, %.2g: a higher find_lr.max_lr may "
                "find a better one",
                curve.lrs[-1],
            )
        suggestion = train_command(
            lr, config, typed_overrides(hydra.overrides.task), flags.source_of(hydra)
        )
        folder = new_folder(config, hydra)
        write(folder, curve, lr, suggestion)
        lrs = curve.lrs
        log.info("%d steps from %.2g to %.2g: %s", len(lrs), lrs[0], lrs[-1], curve.ended)
        log.info("written: %s", folder / "lr_finder.png")
        log.info("suggestion: %s", suggestion)
    return lr


def refuse_unfit(config: Mapping[str, Any], choices: Mapping[str, Any]) -> None:
    """Raise UserError for a config that the range test cannot run."""
    if config["resume"] not in ("auto", "never"):
        raise UserError(
            f"resume={config['resume']}: the range test resumes no run. To start from that "
            f"run's weights use init_from={config['resume']}."
        )
    if "_target_" in config["launcher"]:
        raise UserError(
            f"launcher={choices['launcher']}: the range test is made here. Leave out "
            "launcher, or call it in a job of your own."
        )
    if "_target_" not in config["optimizer"]:
        raise UserError(
            f"optimizer: the range test looks for one rate, and there are "
            f"{', '.join(config['optimizer'])}. Choose an optimizer with a _target_."
        )
    trainer = config["trainer"]
    if trainer["devices"] != 1:
        raise UserError(
            f"trainer.devices={trainer['devices']}: the range test is one process, which finds "
            "the same rate, since data.batch_size counts all. Use trainer.devices=1."
        )


def train_command(
    lr: float, config: dict[str, Any], overrides: list[str], source: dict[str, Any]
) -> str:
    """Return the command that trains the tested run at the suggested rate."""
    kept = [
        override
        for override in overrides
        if not key_of(override).startswith(("find_lr.", "hydra."))
        and key_of(override) not in ("optimizer.lr", "resume")
    ]
    sign = "" if "lr" in config["optimizer"] else "+"
    places = flags.arguments_of({**source, "name": "train"})
    return command(*places, *kept, f"{sign}optimizer.lr={lr:g}")


def new_folder(config: dict[str, Any], hydra: Any) -> Path:
    """Return the folder of hydra.run.dir or a sweep, else a new outputs/<name>/find_lr/<time>."""
    if hydra.mode == RunMode.MULTIRUN or is_named("hydra.run.dir"):
        return output_dir()
    return records.create(Path("outputs"), f"{config['name']}/find_lr")


def write(folder: Path, curve: Curve, lr: float, command: str) -> None:
    """Write lr_finder.csv, lr_finder.json and lr_finder.png."""
    table = io.StringIO()
    writer = csv.writer(table)
    writer.writerow(["lr", "loss", "smoothed"])
    writer.writerows(zip(curve.lrs, curve.losses, curve.smoothed, strict=True))
    records.write_text(folder / "lr_finder.csv", table.getvalue())
    content = {"lr": lr, "ended": curve.ended, "command": command}
    records.write_text(folder / "lr_finder.json", json.dumps(content, indent=2) + "\n")
    draw(curve, lr).savefig(folder / "lr_finder.png", dpi=130)


def draw(curve: Curve, lr: float) -> Figure:
    """Plot loss against learning rate, with the suggestion marked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(curve.lrs, curve.losses, color="#d8dee4", label="loss of each step")
    axes.plot(curve.lrs, curve.smoothed, color="#0072b2", linewidth=2, label="smoothed")
    axes.axvline(lr, color="#d55e00", linestyle="--", label=f"suggestion: {lr:g}")
    axes.set_xscale("log")
    # Without limits, the end of a diverging test would squash the rest of the curve.
    low, start = min(curve.smoothed), max(curve.losses[: max(2, len(curve.losses) // 10)])
    axes.set_ylim(low - 0.1 * (start - low), start + 0.5 * (start - low))
    axes.set_xlabel("learning rate")
    axes.set_ylabel("training loss")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False)
    return figure
