"""From Hydra's job to a run in its folder: where it writes, what it says, how it ends."""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import sys
import textwrap
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from regrow import config as configs
from regrow import resume
from regrow import run as runs
from regrow.check import check
from regrow.errors import UserError
from regrow.load import preprocessing_record
from regrow.record import folder as records
from regrow.record import manifest
from regrow.record.redact import redact, redact_all
from regrow.training.interrupt import StopRequest
from regrow.training.parallel import World

log = logging.getLogger("regrow")

ROOT = Path(__file__).resolve().parents[2]


def launch(cfg: DictConfig) -> float | None:
    """Run what `cfg` describes and return the best monitored value, for a sweeper.

    Raises UserError before anything is written; ends the process with 128 + signal when stopped.
    """
    try:
        return _launch(cfg)
    except UserError as error:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            raise  # Hydra tells which job it was
        configs.fail(str(error))


def _launch(cfg: DictConfig) -> float | None:
    hydra = HydraConfig.get()
    check(cfg, hydra.runtime.choices)
    config = configs.plain(cfg)
    with console(), claimed_folder(config, hydra) as (folder, goes_on):
        world = World(device=runs.resolve_device(config["trainer"]["device"]))
        if goes_on and resume.is_done(folder, config):
            log.info("%s is complete. To go on with it, raise its limit:", folder)
            log.info("  %s", longer(folder, config))
            best: float | None = records.read_json(folder / "summary.json")["best"]["value"]
            return best
        return run_in(folder, config, cfg, world)


@contextlib.contextmanager
def claimed_folder(config: dict[str, Any], hydra: Any) -> Iterator[tuple[Path, bool]]:
    """The run's folder under its lock, and whether a run goes on there.

    A folder that nobody asked for by name is made only when the first file is written into it, so
    the path of a new one comes from `new_folder` below; see `run_in`.
    """
    chosen = hydra.mode == RunMode.MULTIRUN or Path(hydra.run.dir).resolve() != Path.cwd()
    if not chosen:
        yield Path(), False
        return
    folder = Path(hydra.runtime.output_dir)
    folder = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
    with records.Lock(folder):
        try:
            yield folder, resume.continues(folder, config, hydra.overrides.task)
        finally:
            if [path.name for path in folder.iterdir()] == [".lock"]:  # refused: leave nothing
                (folder / ".lock").unlink()
                folder.rmdir()


def run_in(folder: Path, config: dict[str, Any], cfg: DictConfig, world: World) -> float | None:
    """Build, then train in `folder`, or in a new one if that is none yet."""
    trainer = config["trainer"]
    trainer["num_threads"] = trainer["num_threads"] or runs.usable_cores()
    objects = runs.build(config, world)
    if trainer["check_first_batch"]:
        runs.check_first_batch(objects, world)
    with contextlib.ExitStack() as stack:
        try:
            if folder == Path():
                folder = records.create(Path("outputs"), config["name"])
                stack.enter_context(records.Lock(folder))
            stack.enter_context(log_file(folder))
            write_start(folder, config, cfg, objects)
        except OSError as error:
            raise UserError(
                f"hydra.run.dir={folder} cannot be written: {error.strerror or error}. Make room "
                "there, or choose another folder."
            ) from error
        records.link_latest(folder)
        introduce(folder, config, objects, world)
        status: dict[str, Any] = {"step": 0, "pids": [os.getpid()]}
        records.set_status(folder, "running", **status)
        with StopRequest() as stop:
            try:
                summary = runs.train(objects, config, folder, world, stop)
            except BaseException as error:
                status["step"] = objects.state.step
                line = f"{type(error).__name__}: {error}"
                records.set_status(folder, "failed", error=line, **status)
                if isinstance(error, UserError):
                    raise
                log.error("failed at step %d: %s", objects.state.step, error)
                if isinstance(error, OSError):  # a disk that can be mended, more often than not
                    log.error("Once that is mended, go on with:")
                    log.error("  %s", command(f"resume={folder}"))
                logging.getLogger("regrow.file").error("%s", traceback.format_exc())
                if isinstance(error, FloatingPointError | OSError):
                    raise SystemExit(1) from error
                raise
        status["step"] = summary["steps"]
        records.set_status(folder, summary["status"], **status)
        if summary["status"] == "interrupted":
            assert stop.signal is not None
            log.warning("stopped by %s at step %d. Go on with:", stop.signal.name, summary["steps"])
            log.warning("  %s", command(f"resume={folder}"))
            raise SystemExit(128 + stop.signal.value)
        conclude(folder, config, summary, cfg)
        best: float | None = summary["best"]["value"]
        return best


def write_start(
    folder: Path, config: Mapping[str, Any], cfg: DictConfig, objects: runs.Objects
) -> None:
    """What a run can be made again from: config, overrides, code, environment, data.

    Raises UserError, before anything is written, if the data is not what the run was trained on.
    """
    hydra = HydraConfig.get()
    data = objects.data.fingerprint()
    if (folder / manifest.NAME).is_file():
        resume.refuse_other_data(folder, data, hydra.overrides.task)
    (folder / ".hydra").mkdir(exist_ok=True)
    overrides = [o for o in hydra.overrides.task if resume.key_of(o) != "resume"]
    for name, content in (
        (".hydra/overrides.yaml", overrides),
        (".hydra/config.yaml", cfg),
        (".hydra/hydra.yaml", hydra),
        ("config.yaml", OmegaConf.create(redact_all(dict(config)))),
    ):
        records.write_text(folder / name, redact(OmegaConf.to_yaml(content)))
    records.write_json(folder / "preprocessing.json", preprocessing_record(objects.data))
    if (folder / manifest.NAME).is_file() and (changes := manifest.code_changes(folder, ROOT)):
        log.warning("%s", changes)
    manifest.write(
        folder,
        command=[Path(sys.executable).name, *sys.argv],
        root=ROOT,
        data=data,
        seeds={"seed": config["seed"]},
    )


def introduce(folder: Path, config: Mapping[str, Any], objects: runs.Objects, world: World) -> None:
    """What is about to run, and how to go on with it should it be cut."""
    options, state = objects.options, objects.state
    for line in config_tree(config):
        log.info("%s", line)
    sizes = objects.data.num_examples
    log.info("data: %s", ", ".join(f"{count:,} {name}" for name, count in sizes.items()))
    total = sum(p.numel() for p in state.model.parameters())
    trained = sum(p.numel() for p in objects.parameters)
    frozen = "" if trained == total else f", {trained:,} of them trained"
    log.info("model: %s with %s parameters%s", type(state.model).__name__, f"{total:,}", frozen)
    batch, slices = config["data"]["batch_size"], options.accumulation_steps
    each = -(-batch // (world.size * slices))
    log.info(
        "batch: %d = %d device%s × %d slice%s × %d",
        *(batch, world.size, "s"[: world.size > 1], slices, "s"[: slices > 1], each),
    )
    steps = "until time is up" if objects.total_steps is None else f"{objects.total_steps:,} steps"
    log.info(
        "run: %s of %d per epoch, on %s in %s with %d threads",
        *(steps, state.steps_per_epoch, world.device, options.precision),
        config["trainer"]["num_threads"],
    )
    log.info("folder: %s", folder)
    log.info("if it is cut, go on with: %s", command(f"resume={folder}"))


def conclude(
    folder: Path, config: Mapping[str, Any], summary: Mapping[str, Any], cfg: DictConfig
) -> None:
    """The result as a table, the folder, and what one may want to type next."""
    rows = [(name, value) for name, value in summary["test"].items() if name.count("/") == 1]
    best = summary["best"]
    if best["value"] is not None:
        rows.insert(0, (f"best {best['metric']} (step {best['step']})", best["value"]))
    rows.append(("seconds of training", summary["seconds"]))
    width = max(len(name) for name, _ in rows)
    log.info("")
    for name, value in rows:
        log.info("  %s  %.5g", name.ljust(width), value)
    log.info("")
    log.info("record: %s", folder / "report.html")
    overrides = [o for o in HydraConfig.get().overrides.task if resume.key_of(o) != "resume"]
    log.info("next:   %s", longer(folder, config))
    split = "test" if summary["test"] else "val"
    log.info("        %s", command(f"run={folder}", f"split={split}", script="evaluate.py"))
    kept = [o for o in overrides if resume.key_of(o) != "seed"]
    log.info("        %s", command("-m", *kept, "seed=0,1,2"))


def config_tree(config: Mapping[str, Any]) -> list[str]:
    """The config as a tree: a line for each group, wrapped."""
    choices = HydraConfig.get().runtime.choices
    lines = []
    width = max(80, min(140, _terminal_width()))
    plain = {key: value for key, value in config.items() if not isinstance(value, Mapping)}
    groups = {key: value for key, value in config.items() if isinstance(value, Mapping)}
    for name, values in {"run": plain, **groups}.items():
        option = choices.get(name) or ""
        flat = resume.differences({}, values)
        words = [f"{k}={_short(new)}" for k, (_, new) in flat.items() if not _is_plumbing(k)]
        text = " ".join([str(option), *words]).strip()
        mark = "└─" if name == [*groups][-1] else "├─"
        first, rest = f"{mark} {name:<10} ", f"{'  ' if mark == '└─' else '│ '} {'':<10} "
        lines += textwrap.wrap(
            text or "–",
            width,
            initial_indent=first,
            subsequent_indent=rest,
            break_long_words=False,
            break_on_hyphens=False,
        )
    return lines


def longer(folder: Path, config: Mapping[str, Any]) -> str:
    """The command that goes on with a complete run, for as long again."""
    trainer = config["trainer"]
    for key in ("max_steps", "max_epochs", "max_seconds"):
        if trainer[key] is not None:
            return command(f"resume={folder}", f"trainer.{key}={2 * trainer[key]}")
    raise AssertionError("a run has a limit")


def command(*arguments: str, script: str = "train.py") -> str:
    """A command line that can be pasted into a shell."""
    path = ROOT / "scripts" / script
    shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    return shlex.join(["python", str(shown), *arguments])


class _LogFile(logging.FileHandler):
    """On a full disk it loses lines; the run and its terminal do not hear of it from here."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


class _BarHandler(logging.Handler):
    """Writes lines above the progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        stream = sys.stderr if record.levelno >= logging.WARNING else sys.stdout
        tqdm.write(self.format(record), file=stream)


@contextlib.contextmanager
def console() -> Iterator[None]:
    """The run's log on the terminal: plain lines, warnings and errors marked."""
    handler = _BarHandler()
    handler.setFormatter(_ConsoleFormat())
    handler.addFilter(lambda record: record.name != "regrow.file")  # tracebacks, for train.log
    with _attached(handler):
        yield


@contextlib.contextmanager
def log_file(folder: Path, rank: int = 0) -> Iterator[None]:
    """The same log in `train.log`, with the time and the rank."""
    handler = _LogFile(folder / "train.log", encoding="utf-8")
    text = f"%(asctime)s [rank {rank}] %(levelname)s %(name)s: %(message)s"
    handler.setFormatter(_FileFormat(text))
    with _attached(handler):
        yield


@contextlib.contextmanager
def _attached(handler: logging.Handler) -> Iterator[None]:
    log.setLevel(logging.INFO)
    log.propagate = False
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        handler.close()


class _ConsoleFormat(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        text = redact(text)
        return text if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {text}"


class _FileFormat(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def _terminal_width() -> int:
    import shutil

    return shutil.get_terminal_size((100, 24)).columns


def _is_plumbing(key: str) -> bool:
    return key.split(".")[-1] in ("_partial_", "_target_")


def _short(value: Any) -> str:
    text = "null" if value is None else str(value).replace(" ", "")
    return text if len(text) <= 40 else f"{text[:37]}…"
