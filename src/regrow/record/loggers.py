"""Trackers. metrics.jsonl is the record; the others are views that can be rebuilt from it.

A resumed run first truncates metrics.jsonl to its checkpoint (`Jsonl.rewind`), then opens its
trackers. They restore from metrics.jsonl what a crash lost, and show each step once.
"""

from __future__ import annotations

import csv
import importlib.util
import inspect
import io
import logging
import os
import secrets
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, Protocol

from regrow.dotted import Config
from regrow.errors import UserError, brief
from regrow.extras import require
from regrow.record import logged_images
from regrow.record.logged_images import Logged
from regrow.record.output import harmless
from regrow.record.records import (
    METRICS,
    dump_line,
    iterate_metrics,
    read_json,
    sync_folder,
    whole_lines,
    write_json,
    write_text,
)
from regrow.record.redact import redact_all

log = logging.getLogger(__name__)


GIVEN = ("folder", "resume_step", "run_name", "config")  # passed to each logger that takes them
EVENTS = "events.out.tfevents."  # begins the names of TensorBoard's files
KILLED = 255  # the exit code that wandb shows as killed, not as failed


class Logger(Protocol):
    def log(self, step: int, epoch: int, values: Mapping[str, float]) -> None: ...
    def log_histograms(self, step: int, tensors: Mapping[str, Any]) -> None: ...
    def flush(self) -> None:
        """Write out buffered values. Called at each checkpoint."""

    # A logger that takes images also has `log_image(step: int, name: str, path: Path)`, of a PNG.

    def close(self, exit_code: int = 0) -> None: ...


class Jsonl:
    """metrics.jsonl: one object per line.

    Each line reaches the kernel at once; only sync() waits for the disk. NaN and infinities are
    written as NaN and Infinity, which Python's json reads. If the disk is full, lines stay in
    memory until there is room.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / METRICS
        self.descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self.end = whole_lines(self.path)  # drops a killed writer's partial line
        os.ftruncate(self.descriptor, self.end)
        sync_folder(folder)
        self.waiting: deque[bytes] = deque()
        self.full = False

    def log(self, step: int, epoch: int, values: Mapping[str, float]) -> None:
        self.waiting.append(dump_line({"step": step, "epoch": epoch, **values}))
        self._write()

    def _write(self) -> None:
        try:
            while self.waiting:
                line, written = self.waiting[0], 0
                while written < len(line):
                    written += os.pwrite(self.descriptor, line[written:], self.end + written)
                self.end += written
                self.waiting.popleft()
        except OSError as error:
            with suppress(OSError):  # leave no partial line
                os.ftruncate(self.descriptor, self.end)
            if not self.full:
                log.warning("%s: %s. Its lines wait in memory.", self.path, error.strerror)
            self.full = True
            return
        if self.full:
            log.warning("%s: written again, nothing is missing.", self.path)
            self.full = False

    def position(self) -> int:
        """Return the length in bytes of everything logged, including lines still in memory."""
        self.flush()
        return self.end + sum(map(len, self.waiting))

    def sync(self, position: int) -> None:
        """Wait until everything logged up to `position` is on disk. Raises OSError if it is not.

        May be called from another thread.
        """
        if os.fstat(self.descriptor).st_size < position:  # some lines are still in memory
            raise OSError(f"{self.path} has no room for its lines")
        os.fsync(self.descriptor)

    def rewind(self, position: int, step: int | None = None) -> None:
        """Drop the lines logged after the checkpoint of `step`, which stores `position`.

        If the file was edited, no line ends at `position`; then the lines up to `step` are kept.
        """
        ends_there = position == 0 or (
            position <= self.end and os.pread(self.descriptor, 1, position - 1) == b"\n"
        )
        if not ends_there:
            log.warning(
                "%s was edited: no line of it ends at byte %d, where the checkpoint was saved. The "
                "lines up to step %s are kept.",
                *(self.path, position, step),
            )
            self._keep_until(step or 0)
            return
        self.waiting.clear()
        os.ftruncate(self.descriptor, position)
        self.end = position

    def _keep_until(self, step: int) -> None:
        self.waiting.clear()
        lines = [
            dump_line(values)
            for values in iterate_metrics(self.path.parent)
            if values["step"] <= step
        ]
        content = b"".join(lines)
        os.pwrite(self.descriptor, content, 0)
        os.ftruncate(self.descriptor, len(content))
        self.end = len(content)

    def flush(self) -> None:
        if self.waiting:
            self._write()

    def close(self, exit_code: int = 0) -> None:
        if self.descriptor < 0:
            return
        self.flush()
        if self.waiting:
            log.warning("%s: %d lines found no room.", self.path, len(self.waiting))
        try:
            os.fsync(self.descriptor)
        except OSError as error:
            log.warning("%s: %s", self.path, error.strerror)
        os.close(self.descriptor)
        self.descriptor = -1


class Csv:
    """metrics.csv: the same numbers as a table; a column is added when its key first appears."""

    def __init__(
        self,
        *,
        folder: Path,
        resume_step: int | None,
        run_name: str,
        config: Mapping[str, Any] | None,
    ) -> None:
        self.path = folder / "metrics.csv"
        self.columns: list[str] = []
        self._rewrite(list(iterate_metrics(folder)))

    def _rewrite(self, rows: list[dict[str, Any]]) -> None:
        columns = dict.fromkeys(["step", "epoch", *self.columns])
        for row in rows:
            columns.update(dict.fromkeys(row))
        self.columns = list(columns)
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(map(harmless, self.columns))
        writer.writerows(self._cells(row) for row in rows)
        write_text(self.path, text.getvalue())

    def log(self, step: int, epoch: int, values: Mapping[str, float]) -> None:
        row = {"step": step, "epoch": epoch, **values}
        if row.keys() <= set(self.columns):
            with self.path.open(
                "a", newline="", encoding="utf-8", errors="backslashreplace"
            ) as file:
                csv.writer(file, lineterminator="\n").writerow(self._cells(row))
            return
        with self.path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file, self.columns)
            next(reader, None)  # the header
            # A full disk may have joined two lines: the cells beyond the columns are dropped.
            rows = [{key: each[key] for key in self.columns} for each in reader]
        self._rewrite([*rows, row])

    def _cells(self, row: Mapping[str, Any]) -> list[Any]:
        return [harmless(row.get(column, "")) for column in self.columns]

    def log_histograms(self, step: int, tensors: Mapping[str, Any]) -> None:
        """Do nothing: a table cannot hold histograms."""

    def flush(self) -> None:
        """Do nothing: nothing is buffered."""

    def close(self, exit_code: int = 0) -> None:
        # Restore rows that a full disk refused from metrics.jsonl.
        self._rewrite(list(iterate_metrics(self.path.parent)))


class TensorBoard:
    """tensorboard/: `tensorboard --logdir <run folder>`."""

    def __init__(
        self,
        *,
        flush_seconds: float,
        folder: Path,
        resume_step: int | None,
        run_name: str,
        config: Mapping[str, Any] | None,
    ) -> None:
        self.folder, self.flush_seconds = folder, flush_seconds
        self._open(-1 if resume_step is None else resume_step)

    def _open(self, kept: int | None) -> None:
        """Write to a new file, first what the record holds and the other files lack.

        Of these, events up to the step `kept` count, or all of them.
        """
        from torch.utils.tensorboard import SummaryWriter

        path = self.folder / "tensorboard"
        old = sorted(path.glob(f"{EVENTS}*"))
        self.shown = {event for event in _events(old) if kept is None or event[0] <= kept}
        _date_back(old)
        self.writer = SummaryWriter(
            str(path),
            purge_step=kept + 1 if old and kept is not None else None,
            flush_secs=self.flush_seconds,
        )
        _fill(self, self.folder)

    def log(self, step: int, epoch: int, values: Mapping[str, float]) -> None:
        for tag, value in values.items():
            if (step, tag) not in self.shown:
                self.writer.add_scalar(tag, value, step)

    def log_histograms(self, step: int, tensors: Mapping[str, Any]) -> None:
        for tag, tensor in tensors.items():
            finite = tensor[tensor.isfinite()]  # a histogram of NaN raises
            if finite.numel() and (step, tag) not in self.shown:
                self.writer.add_histogram(tag, finite, step)

    def log_image(self, step: int, name: str, path: Path) -> None:
        import numpy as np
        from PIL import Image

        if (step, name) not in self.shown:
            with Image.open(path) as file:
                pixels = np.array(file.convert("RGB"))
            self.writer.add_image(name, pixels, step, dataformats="HWC")

    def flush(self) -> None:
        self.writer.flush()

    def close(self, exit_code: int = 0) -> None:
        try:
            self.writer.flush()
        except OSError:  # a full disk has ended its thread: restore what it lost
            self._open(None)
        self.writer.close()


def _date_back(files: list[Path]) -> None:
    """Rename sorted event files so that a new one comes after them, and their order stays.

    TensorBoard reads files in the order of their names: a time in seconds, then texts such as the
    process id, of which 10 comes before 9. The last file may be of this second, or of a later one
    if the clock was set back or the run resumes on another machine.
    """
    start = int(time.time()) - len(files)
    for latest, file in enumerate(files, start):
        seconds, _, rest = file.name.removeprefix(EVENTS).partition(".")
        if seconds.isdecimal() and int(seconds) > latest:
            file.rename(file.with_name(f"{EVENTS}{latest:010d}.{rest}"))


def _events(paths: Iterable[Path]) -> Iterator[tuple[int, str]]:
    """Yield (step, tag) of all that TensorBoard would show, after earlier resumes' purges."""
    paths = list(paths)
    if not paths:
        return
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    seen: set[tuple[int, str]] = set()
    for path in paths:
        for event in EventFileLoader(str(path)).Load():
            if event.HasField("session_log"):
                seen = {item for item in seen if item[0] < event.step}
            for value in event.summary.value:
                seen.add((event.step, value.tag))
    yield from seen


_NO_LOGIN = (
    "logger.wandb.mode=online needs a login. Run `wandb login`, set WANDB_API_KEY, or use "
    "logger.wandb.mode=offline."
)


class Wandb:
    """Weights & Biases. wandb.json keeps the id, so a resumed run continues the same wandb run.

    The environment's WANDB_MODE overrides `mode`. Offline runs are uploaded with `wandb sync`.
    Raises UserError if `mode` is online without a login.
    """

    def __init__(
        self,
        *,
        project: str,
        entity: str | None,
        group: str | None,
        tags: list[str],
        notes: str | None,
        mode: str,
        timeout_seconds: float,
        folder: Path,
        resume_step: int | None,
        run_name: str,
        config: Mapping[str, Any] | None,
    ) -> None:
        chosen = wandb_mode(mode)
        self.run: Any = None
        self.first_step = 0
        if chosen == "disabled":
            return
        import wandb

        common: dict[str, Any] = {"silent": True, "console": "off", "quiet": True}
        with _wandb_environment(chosen):
            wandb.setup(wandb.Settings(**common))
            if chosen == "online" and not wandb.login(verify=False, prompt=False):
                raise UserError(_NO_LOGIN)
            identity = _wandb_identity(folder)
            # An offline run cannot query the server, so each attempt holds the whole run. One that
            # is online now, and falls back to offline, does too.
            _set_aside_offline_runs(folder)
            arguments: dict[str, Any] = {
                "project": project,
                "entity": entity,
                "group": group,
                "tags": tags or None,
                "notes": notes or None,
                "name": run_name,
                "id": identity,
                "resume": "allow",
                "dir": str(folder),
                "config": redact_all(dict(config)) if config is not None else None,
                "settings": wandb.Settings(init_timeout=timeout_seconds, **common),
            }
            try:
                self.run = wandb.init(mode=chosen, **arguments)
            except wandb.errors.CommError as error:
                reason = brief(error, 200)
                log.warning("wandb is not reached, this run is kept offline: %s", reason)
                chosen = "offline"
                with _wandb_environment(chosen):
                    wandb.teardown()  # else wandb reports that the id is in use
                    wandb.setup(wandb.Settings(**common))
                    self.run = wandb.init(mode=chosen, **arguments)
        self.histogram, self.image = wandb.Histogram, wandb.Image
        where = (
            self.run.url
            if chosen == "online"
            else f"send it with: wandb sync {Path(self.run.dir).parent}"
        )
        log.info("wandb: %s, id %s, %s", chosen, identity, where)
        self.first_step = int(self.run.starting_step)
        _fill(self, folder)

    def log(self, step: int, epoch: int, values: Mapping[str, float]) -> None:
        # Skip steps that the server already has: a resumed run logs the same numbers.
        if self.run is not None and step >= self.first_step:
            self.run.log({**values, "epoch": epoch}, step=step)
        elif self.run is not None and step == self.first_step - 1:
            # A run that stopped in an evaluation or its test has sent a part of this step, and
            # wandb takes no second row of a step. Its results are those of the summary at least.
            self.run.summary.update(dict(values))

    def log_histograms(self, step: int, tensors: Mapping[str, Any]) -> None:
        if self.run is None or step < self.first_step:
            return
        histograms = {}
        for tag, tensor in tensors.items():
            finite = tensor[tensor.isfinite()]
            if finite.numel():
                histograms[tag] = self.histogram(finite.detach().float().cpu().numpy())
        self.run.log(histograms, step=step)

    def log_image(self, step: int, name: str, path: Path) -> None:
        if self.run is not None and step >= self.first_step:
            self.run.log({name: self.image(str(path))}, step=step)

    def flush(self) -> None:
        """Do nothing: wandb's own process sends, the newest step along with the next one."""

    def close(self, exit_code: int = 0) -> None:
        if self.run is not None:
            self.run.finish(exit_code=exit_code)
            self.run = None


def wandb_mode(mode: str) -> Literal["online", "offline", "disabled"]:
    """Return the effective mode; the environment overrides `mode`. Raises UserError if unknown."""
    key, value = "logger.wandb.mode", mode
    if os.environ.get("WANDB_MODE"):
        key, value = "WANDB_MODE", os.environ["WANDB_MODE"]
    match value:
        case "online" | "run":
            return "online"
        case "offline" | "dryrun":
            return "offline"
        case "disabled":
            return "disabled"
    raise UserError(f"{key}={value}: not a mode. Use online, offline or disabled.")


@contextmanager
def _wandb_environment(mode: str) -> Iterator[None]:
    """Set WANDB_MODE to the effective mode while wandb reads it."""
    before = os.environ.get("WANDB_MODE")
    os.environ["WANDB_MODE"] = mode
    try:
        yield
    finally:
        if before is None:
            del os.environ["WANDB_MODE"]
        else:
            os.environ["WANDB_MODE"] = before


def _wandb_identity(folder: Path) -> str:
    path = folder / "wandb.json"
    if path.exists():
        return str(read_json(path)["id"])
    # An agent of a wandb sweep waits for the run of its id. A new id is not drawn from `random`,
    # whose state belongs to the run.
    agents = os.environ.get("WANDB_RUN_ID") if "WANDB_SWEEP_ID" in os.environ else None
    identity = agents or secrets.token_hex(4)
    write_json(path, {"id": identity})
    return identity


def _set_aside_offline_runs(folder: Path) -> None:
    for old in (folder / "wandb").glob("offline-run-*"):
        if old.is_dir():
            aside = old.parent / "superseded"
            aside.mkdir(exist_ok=True)
            old.rename(aside / f"{old.name}-{secrets.token_hex(2)}")


def _fill(tracker: Any, folder: Path) -> None:
    """Give a tracker what the run's record holds; it leaves out what it has."""
    for each in logged_images.merged(folder, iterate_metrics(folder)):
        if isinstance(each, Logged):
            tracker.log_image(*each)
        else:
            values = {key: value for key, value in each.items() if key not in ("step", "epoch")}
            tracker.log(each["step"], each.get("epoch", 0), values)


class Loggers:
    """metrics.jsonl and the chosen trackers as one logger.

    A tracker's first error is logged; the run and the record continue.
    """

    def __init__(self, jsonl: Jsonl, trackers: Mapping[str, Logger]) -> None:
        self.jsonl, self.folder = jsonl, jsonl.path.parent
        self.trackers = dict(trackers)
        self.complained: set[str] = set()

    def log(self, step: int, epoch: int, values: Mapping[str, float]) -> None:
        self.jsonl.log(step, epoch, values)
        self._each(lambda tracker: tracker.log(step, epoch, values))

    def log_histograms(self, step: int, tensors: Mapping[str, Any]) -> None:
        self._each(lambda tracker: tracker.log_histograms(step, tensors))

    def image(self, name: str, image: Any, *, step: int) -> None:
        """Write an image. One that cannot be written is a warning, once: it never ends a run."""
        try:
            path = logged_images.place(self.folder, name, step)
            if path.is_file():  # logged before a resume
                return
            logged_images.write(path, image)
        except Exception as error:
            self._complain("images", error)
            return
        self._each(lambda tracker: getattr(tracker, "log_image", _takes_none)(step, name, path))

    def position(self) -> int:
        self._each(lambda tracker: tracker.flush())
        return self.jsonl.position()

    def sync(self, position: int) -> None:
        self.jsonl.sync(position)

    def close(self, exit_code: int = 0) -> None:
        self.jsonl.close(exit_code)
        self._each(lambda tracker: tracker.close(exit_code))

    def _each(self, do: Callable[[Logger], None]) -> None:
        for name, tracker in self.trackers.items():
            try:
                do(tracker)
            except Exception as error:
                self._complain(name, error)

    def _complain(self, name: str, error: Exception) -> None:
        if name not in self.complained:
            self.complained.add(name)
            log.warning("logger %s: %s: %s", name, type(error).__name__, brief(error, 200))


def _takes_none(step: int, name: str, path: Path) -> None:
    """Do nothing: this logger takes no images."""


def open_loggers(
    folder: Path,
    nodes: Mapping[str, Callable[..., Logger]],
    *,
    position: int | None,
    resume_step: int | None,
    run_name: str,
    config: Mapping[str, Config] | None,
) -> Loggers:
    """Return loggers of metrics.jsonl, truncated to `position`, and of the config's nodes.

    `position` None empties metrics.jsonl. A tracker that cannot be opened is reported and skipped.
    """
    jsonl = Jsonl(folder)
    jsonl.rewind(position or 0, resume_step)
    logged_images.rewind(folder, resume_step)
    given = {
        "folder": folder,
        "resume_step": resume_step,
        "run_name": run_name,
        "config": config,
    }
    trackers = {}
    for name, node in nodes.items():
        try:
            tracker = node(**_taken_by(node, given))
            if not callable(getattr(tracker, "log", None)):
                raise TypeError(f"a {type(tracker).__name__} has no method log")
            trackers[name] = tracker
        except UserError:
            Loggers(jsonl, trackers).close(1)
            raise
        except Exception as error:
            said = f"{type(error).__name__}: {brief(error, 200)}"
            log.warning("logger.%s: %s. The run continues without it.", name, said)
            logging.getLogger("regrow.file").warning("%s", traceback.format_exc())
    return Loggers(jsonl, trackers)


def _taken_by(node: Callable[..., Logger], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that a logger takes; a user's own logger need not take all."""
    try:
        parameters = inspect.signature(node).parameters
    except (TypeError, ValueError):
        return dict(given)
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return dict(given)
    return {key: value for key, value in given.items() if key in parameters}


def check_required(node: Mapping[str, Config], path: str, parameters: Mapping[str, Any]) -> None:
    """Raise UserError if a logger needs an argument that neither the config nor the run gives.

    `parameters` are those of its signature, by name.
    """
    needed = [
        name
        for name, p in parameters.items()
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    if missing := [name for name in needed if name not in node and name not in GIVEN]:
        raise UserError(
            f"{path}.{missing[0]} must be given: {node['_target_']} needs it. A run gives "
            f"{', '.join(GIVEN)}."
        )


def check_choice(nodes: Mapping[str, Mapping[str, Config]]) -> None:
    """Raise UserError for a missing package or an unknown mode, without importing the trackers.

    Called before any folder is created.
    """
    for name, node in nodes.items():
        if name == "mlflow":
            require("logger=mlflow", "mlflow", "mlflow", "sqlalchemy", "alembic")
        if name in ("tensorboard", "wandb") and importlib.util.find_spec(name) is None:
            raise UserError(
                f"logger={name} needs the package {name}. Install it (pip install {name}) or leave "
                "it out of logger."
            )
        if (
            name == "wandb"
            and wandb_mode(str(node["mode"])) == "online"
            and not _wandb_login_is_possible()
        ):
            raise UserError(_NO_LOGIN)


def _wandb_login_is_possible() -> bool:
    """Return False only if none of wandb's sources has credentials."""
    settings = Path(os.environ.get("WANDB_CONFIG_DIR", "~/.config/wandb")) / "settings"
    files = [Path(os.environ.get("NETRC", "~/.netrc")), Path("~/_netrc"), settings]
    return any(map(os.environ.get, ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"))) or any(
        file.expanduser().exists() for file in files
    )
