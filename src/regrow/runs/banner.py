"""The lines that a run prints at its start and its end."""

from __future__ import annotations

import contextlib
import logging
import shutil
import textwrap
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from regrow.config import flags, resumed_config
from regrow.config.command_line import command, key_of
from regrow.config.job import Job
from regrow.config.recorded import recorded_overrides
from regrow.distributed.parallel import World
from regrow.dotted import leaves
from regrow.errors import UserError
from regrow.protocols import Objects
from regrow.record import by_class, monitor, records
from regrow.record.redact import redact_all

log = logging.getLogger("regrow")

OF_SEVERAL = ("ddp", "fsdp", "strategy", "timeout_seconds", "max_restarts")  # processes
OF_IMAGES = ("image_folder", "resized_folder", "mask_folder")  # sources, whose data are files


def introduce(folder: Path, job: Job, objects: Objects, world: World) -> None:
    """Log what is about to run, and the command that resumes it."""
    config = redact_all(dict(job.config))
    typed = {key_of(override) for override in job.overrides}
    for logger, first in (("regrow.terminal", typed), ("regrow.file", None)):
        for line in config_tree(config, job.choices, num_processes=world.size, first=first):
            logging.getLogger(logger).info("%s", line)
    for line in facts(job, objects, world):
        log.info("%s", line)
    for note in objects.data.notes:
        log.warning("%s", note)
    for level, remark in objects.remarks(world):
        log.log(level, "%s", remark)
    for line in [*what_is_odd(config, objects), *unread_root(job)]:
        log.warning("%s", line)
    if config["model"].get("pretrained") and config["data"]["normalize"] == "train":
        log.warning("the pretrained weights expect data.normalize=imagenet, and got train")
    log.info("folder: %s", folder)
    if (before := interrupted(folder, job)) is not None:
        words = "%s, started by the same command, was interrupted. To resume it: %s"
        log.info(words, before, resume_command(job, before))
    log.info("if interrupted, resume with: %s", resume_command(job, folder))


def facts(job: Job, objects: Objects, world: World) -> list[str]:
    """Return the lines on the sizes of data, model, batch and run."""
    config, state, model = job.config, objects.state, objects.state.model
    counts = objects.data.num_examples.items()
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in objects.parameters)
    frozen = "" if trained == total else f", {trained:,} of them trained"
    trainer, batch = config["trainer"], config["data"]["batch_size"]
    slices, threads = trainer["accumulation_steps"], trainer["num_threads"]
    each = -(-batch // (world.size * slices))
    parts = f"{slices} micro-batch{'es' if slices > 1 else ''}"
    split = f"{world.size} device{'s'[: world.size > 1]} × {parts}"
    most = "" if batch == world.size * slices * each else "at most "
    length = objects.total_steps
    steps = "until time is up" if length is None else f"{length:,} step{'s'[: length != 1]}"
    chosen = " (trainer.device=auto)" if trainer["device"] == "auto" else ""
    names = objects.data.class_names
    is_binary = config["data"].get("target_kind") == "binary"
    return [
        "data: " + ", ".join(f"{count:,} {name}" for name, count in counts),
        *([f"positive class: 1, {names[1]}"] if is_binary and names else []),
        f"model: {type(model).__name__} with {total:,} parameters{frozen}",
        f"batch: {batch} = {split} × {most}{each}",
        f"run: {steps}, {state.steps_per_epoch} per epoch, on {world.device}{chosen} in "
        f"{trainer['precision']} with {threads} thread{'s'[: threads > 1]}",
    ]


def what_is_odd(config: Mapping[str, Any], objects: Objects) -> list[str]:
    """Return one line for each setting that is probably a mistake."""
    options, lines = objects.options, []
    if options.monitor is None:
        lines.append("no metric is monitored: the last weights are the best ones")
    elif odd := monitor.contradiction(options.monitor, str(options.mode)):
        lines.append(f"trainer.mode={options.mode}: {odd}")
    batch, count = config["data"]["batch_size"], objects.train.num_examples
    if batch > count:
        lines.append(
            f"data.batch_size={batch} is more than the {count} training examples: each step is an "
            "epoch over all of them"
        )
    if objects.total_steps is not None and objects.total_steps < objects.warmup_steps:
        lines.append(in_warmup(objects.total_steps, objects.warmup_steps))
    return lines


def unread_root(job: Job) -> list[str]:
    """Return a line if `data.root` was typed for data that reads no folder; else none."""
    data, source = job.config["data"], job.config["data"]["source"]
    typed = [o for o in job.overrides if key_of(o) == "data.root"]
    if not typed or not isinstance(source, Mapping) or "root" in source:
        return []
    named = f"data={job.choices.get('data')}"
    return [
        f"data.root={data['root']} has no effect: {named} reads no folder. For images in folders "
        "of classes: data=image_folder"
    ]


def interrupted(folder: Path, job: Job) -> Path | None:
    """Return the folder of the latest run if this command began it and it was interrupted."""
    latest = Path("outputs", str(job.config["name"]), "latest")
    if not latest.is_dir() or latest.resolve() == folder.resolve():
        return None

    def own(overrides: Iterable[str]) -> list[str]:
        return [o for o in overrides if key_of(o) not in ("hydra.run.dir", "resume")]

    status = records.load_status(latest)
    if status is None or status["state"] != "interrupted":
        return None
    with contextlib.suppress(UserError):
        if own(recorded_overrides(latest)) == own(job.overrides):
            place, here = latest.resolve(), Path.cwd()
            return place.relative_to(here) if place.is_relative_to(here) else place
    return None


def in_warmup(steps: int, warmup: int) -> str:
    return (
        f"the run ends at step {steps}, in the warm-up of {warmup} steps: the learning rate never "
        "reaches optimizer.lr. Lower scheduler.warmup_steps, or train for longer"
    )


def conclude(folder: Path, job: Job, summary: Mapping[str, Any]) -> None:
    """Log the results as a table, the folder, and commands that may come next."""
    sets, best = records.sets_of(summary), summary["best"]
    chosen = (best["metric"] or "").partition("/")[0]  # the set that chose the weights
    rows = [
        (name, value)
        for its in sets.values()
        for name, value in its.items()
        if name.count("/") == 1 and not name.startswith(f"{chosen}/")
    ]
    if best["value"] is not None:
        rows.insert(0, (f"best {best['metric']} (step {best['step']})", best["value"]))
    rows.append(("seconds of training", summary["seconds"]))
    width = max(len(name) for name, _ in rows)
    log.info("")
    for name, value in rows:
        log.info("  %s  %.5g", name.ljust(width), value)
    log.info("")
    split = "test" if "test" in sets else next(iter(sets), "train")
    lines = by_class.table(sets.get(split, {}), split, str(folder / records.SUMMARY))
    for line in [*lines, ""] if lines else []:
        log.info("%s", line)
    log.info("record: %s", folder / "report.html" if job.draws else folder)
    log.info("next:   %s", longer(folder, job, summary))
    log.info("        %s", command(f"run={folder}", f"split={split}", script="evaluate.py"))
    if files := _new_files(job.config["data"]):
        log.info("        %s", command(f"run={folder}", f"input={files}", script="predict.py"))
    kept = [o for o in job.overrides if key_of(o) not in ("seed", "resume")]
    log.info("        %s", command("-m", *flags.arguments_of(job.source), *kept, "seed=0,1,2"))


def _new_files(data: Mapping[str, Any]) -> str:
    """Return an example of what `predict.py` reads for this data; empty if it is not in files."""
    source = data.get("source")
    target = str(source.get("_target_")) if isinstance(source, Mapping) else ""
    name = target.rpartition(".")[2]
    return "path/to/table.csv" if name == "csv" else "path/to/images" if name in OF_IMAGES else ""


def config_tree(
    config: Mapping[str, Any],
    choices: Mapping[str, Any],
    *,
    num_processes: int,
    first: Collection[str] | None = None,
) -> list[str]:
    """Return the config as a tree: a wrapped line for each group.

    Leaves out values that are off, those that repeat a value under the same name further up, and
    keys of several processes where there is one. With `first` (dotted keys), each group shows these
    and as many others as fit into one line.
    """
    lines: list[str] = []
    told: set[tuple[str, str]] = set()
    width = max(80, min(140, shutil.get_terminal_size((100, 24)).columns))
    plain = {key: value for key, value in config.items() if not isinstance(value, Mapping)}
    groups = {key: value for key, value in config.items() if isinstance(value, Mapping)}
    for name, values in {"run": plain, **groups}.items():
        option = choices.get(name) or ""
        flat = sorted(leaves(values).items())
        shown = {key: _short(value) for key, value in flat if _is_shown(key, value)}
        if num_processes == 1 and name == "trainer":
            shown = {k: v for k, v in shown.items() if k.partition(".")[0] not in OF_SEVERAL}
        for key in sorted(shown, key=lambda key: key.count(".")):
            named = key.rpartition(".")[2], shown[key]
            if named in told:
                del shown[key]
            told.add(named)
        mark = "└─" if name == [*groups][-1] else "├─"
        begin, rest = f"{mark} {name:<10} ", f"{'  ' if mark == '└─' else '│ '} {'':<10} "
        if first is not None:
            chosen = [key for key in shown if (key if name == "run" else f"{name}.{key}") in first]
            shown = _in_one_line(shown, chosen, width - len(f"{begin}{option} …"))
        words = [f"{key}={value}" if key else value for key, value in shown.items()]
        if name == "logger":
            words = ["jsonl", *values]  # names only; config.yaml has the settings
        text = " ".join([str(option), *words]).strip()
        if not text:
            continue
        lines += textwrap.wrap(
            text,
            width,
            initial_indent=begin,
            subsequent_indent=rest,
            break_long_words=False,
            break_on_hyphens=False,
        )
    return lines


def _in_one_line(shown: dict[str, str], first: list[str], room: int) -> dict[str, str]:
    """Return the values of `first`, then those that fit, outer keys before inner ones, then "…"."""
    kept = {key: shown[key] for key in first}
    others = sorted((key for key in shown if key not in kept), key=lambda key: key.count("."))
    room -= sum(len(f" {key}={value}") for key, value in kept.items())
    for key in others:
        room -= len(f" {key}={shown[key]}")
        if room < 0:
            return {**kept, "": "…"}
        kept[key] = shown[key]
    return kept


def longer(folder: Path, job: Job, summary: Mapping[str, Any]) -> str:
    """Return the command that trains a complete run for as long again."""
    limits = resumed_config.reached(summary, job.config["trainer"])
    return resume_command(job, folder, *(f"{key}={more}" for key, more in limits.items()))


def resume_command(job: Job, folder: Path, *more: str) -> str:
    """Return the command that resumes the run in `folder`."""
    return command(*flags.arguments_of(job.source), f"resume={folder}", *more)


def _is_shown(key: str, value: Any) -> bool:
    is_off = value is None or value is False or value in ("", [], {})
    is_off = is_off or (isinstance(value, float) and value == 0)
    return not is_off and key.split(".")[-1] not in ("_partial_", "_target_", "resume")


def _short(value: Any) -> str:
    text = str(value).replace(" ", "")
    return text if len(text) <= 40 else f"{text[:37]}…"
