"""The logger of MLflow, whose runs are in a database beside the runs' folders or on a server."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from regrow.dotted import leaves
from regrow.errors import brief
from regrow.record import logged_images
from regrow.record.records import iterate_metrics, read_json, write_json
from regrow.record.redact import redact_all

log = logging.getLogger(__name__)

IDENTITY = "mlflow.json"
MOST_METRICS, MOST_PARAMS, LONGEST = 1000, 100, 6000  # that MLflow takes in one call; characters
MOST_WAITING = 100_000  # values in memory while a server is down: some 30 MB
LONGEST_NAME = 250  # characters of a metric's or a param's name
REFUSED = "INVALID_PARAMETER_VALUE"  # MLflow's code for a value or a name that it never takes
GONE = ("RESOURCE_DOES_NOT_EXIST", REFUSED)  # its codes for a run that is missing or deleted
ENDS = {0: "FINISHED", 255: "KILLED"}  # by exit code; any other: FAILED
SQLITE = "sqlite:///"
PAUSE = 10  # times timeout_seconds without a try after a failure: a dead server costs a tenth


class Mlflow:
    """An MLflow run. mlflow.json keeps its id, so a resumed run continues the same MLflow run.

    MLflow cannot delete what it holds. So a resumed run reads which steps are there, and adds the
    others alone: a replayed step is equal. Values wait in memory for at most `flush_seconds`, and
    until the next checkpoint. After a failure the next try waits for 10 `timeout_seconds`. Of many
    values that wait for a server, the oldest are read from the record again once it answers.
    """

    def __init__(
        self,
        *,
        tracking_uri: str,
        experiment: str,
        tags: list[str],
        notes: str | None,
        flush_seconds: float,
        timeout_seconds: float,
        folder: Path,
        resume_step: int | None,
        run_name: str,
        config: Mapping[str, Any] | None,
    ) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric

        logging.getLogger("mlflow").setLevel(logging.WARNING)  # it tells of each new table
        self.metric = Metric
        self.flush_seconds, self.sent_at = flush_seconds, time.monotonic()
        self.timeout_seconds = timeout_seconds
        self.paused: dict[str, float] = {}  # until when, of values and of images
        self.folder = folder
        self.is_behind = True  # the record may hold values that MLflow lacks
        self.waiting: list[Any] = []
        self.waiting_images: list[tuple[str, Path]] = []
        self.images: dict[str, set[str]] = {}  # the files of each name that are there
        self.shown: set[tuple[str, int]] = set()  # what MLflow has or will have of the record
        self.last: tuple[int, set[str]] = (-1, set())  # the keys of the newest step
        self.refused: set[str] = set()  # the names that MLflow does not take
        file = _file(tracking_uri)
        with _limited(timeout_seconds):
            with _alone(file):
                address = tracking_uri if file is None else f"{SQLITE}{file}"
                self.client: Any = MlflowClient(address)
                number = _experiment(self.client, experiment, file)
            self.run_id = self._identity(folder / IDENTITY, number, run_name)
            self._describe(config, tags, notes, self.client.get_run(self.run_id).data)
        self.flush()
        for image in logged_images.logged(folder):
            self.log_image(*image)

    def _identity(self, path: Path, experiment: str, run_name: str) -> str:
        """Return the id of the MLflow run, which is created if it is not there."""
        from mlflow.exceptions import MlflowException

        if path.exists():
            run_id = str(read_json(path)["id"])
            try:
                self.client.update_run(run_id, status="RUNNING")
                return run_id
            except MlflowException as error:
                # A failure that may pass, such as a locked database, must not begin a second run.
                if error.error_code not in GONE:
                    raise
                log.warning("mlflow: run %s is not there, a new one begins: %s", run_id, error)
        run = self.client.create_run(experiment, run_name=run_name)
        write_json(path, {"id": run.info.run_id})
        return str(run.info.run_id)

    def _history(self, keys: Iterable[str]) -> set[tuple[str, int]]:
        history = (self.client.get_metric_history(self.run_id, key) for key in keys)
        return {(metric.key, metric.step) for metrics in history for metric in metrics}

    def _describe(
        self, config: Mapping[str, Any] | None, tags: list[str], notes: str | None, there: Any
    ) -> None:
        """Add the params and tags that are not there: an earlier process may have been killed."""
        from mlflow.entities import Param, RunTag

        flat = {_name(key): value for key, value in leaves(redact_all(dict(config or {}))).items()}
        params = [
            Param(name, str(value)[:LONGEST])
            for name, value in flat.items()
            if name not in there.params
        ]
        for start in range(0, len(params), MOST_PARAMS):
            self.client.log_batch(self.run_id, params=params[start : start + MOST_PARAMS])
        about = {"tags": ", ".join(tags), "mlflow.note.content": notes}
        found = [RunTag(key, text) for key, text in about.items() if text and key not in there.tags]
        if found:
            self.client.log_batch(self.run_id, tags=found)

    def log(self, step: int, epoch: int, values: Mapping[str, float]) -> None:
        if step != self.last[0]:
            self.last = (step, set())
        now = _milliseconds()
        for key, value in {**values, "epoch": epoch}.items():
            name = _name(key)
            if name in self.last[1] or (name, step) in self.shown:
                continue
            self.last[1].add(name)
            self.waiting.append(self.metric(name, float(value), now, step))
        if len(self.waiting) > MOST_WAITING:
            del self.waiting[: MOST_WAITING // 2]
            self.is_behind = True
        late = time.monotonic() - self.sent_at >= self.flush_seconds
        if late or len(self.waiting) >= MOST_METRICS:
            self.flush()

    def log_histograms(self, step: int, tensors: Mapping[str, Any]) -> None:
        """Do nothing: MLflow has no histograms."""

    def log_image(self, step: int, name: str, path: Path) -> None:
        self.waiting_images.append((name, path))
        self._try("images", self._send_images)

    def flush(self) -> None:
        self.sent_at = time.monotonic()
        self._try("values", self._send_values)
        self._try("images", self._send_images)

    def _try(self, kind: str, send: Callable[[], None]) -> None:
        """Send what waits, unless that failed a short while ago."""
        if time.monotonic() < self.paused.get(kind, 0.0):
            return
        try:
            with _limited(self.timeout_seconds):
                send()
        except Exception:
            self.paused[kind] = time.monotonic() + PAUSE * self.timeout_seconds
            raise

    def _send_images(self) -> None:
        while self.waiting_images:
            name, path = self.waiting_images[0]
            where = f"{logged_images.FOLDER}/{name}"
            if name not in self.images:
                files = self.client.list_artifacts(self.run_id, where)
                self.images[name] = {file.path.rpartition("/")[2] for file in files}
            if path.name not in self.images[name] and path.is_file():
                self.client.log_artifact(self.run_id, str(path), where)
                self.images[name].add(path.name)
            del self.waiting_images[0]

    def _send_values(self) -> None:
        if self.is_behind:
            self._send_record()
            self.is_behind = False
        while self.waiting:
            part = self.waiting[:MOST_METRICS]
            self._send(part)
            del self.waiting[: len(part)]

    def _send_record(self) -> None:
        """Send what the record has, and neither MLflow nor what waits."""
        self.shown = self._history(self.client.get_run(self.run_id).data.metrics)
        self.shown |= {(metric.key, metric.step) for metric in self.waiting}
        now, part = _milliseconds(), []
        for line in iterate_metrics(self.folder):
            step = line.pop("step")
            for key, value in {**line, "epoch": line.get("epoch", 0)}.items():
                if (name := _name(key), step) not in self.shown:
                    self.shown.add((name, step))
                    part.append(self.metric(name, float(value), now, step))
            if len(part) >= MOST_METRICS // 2:
                self._send(part)
                part = []
        self._send(part)

    def _send(self, metrics: list[Any]) -> None:
        """Send values. One that MLflow refuses is left out: it would hold back all later ones."""
        from mlflow.exceptions import MlflowException

        try:
            self.client.log_batch(self.run_id, metrics=metrics)
        except MlflowException as error:
            if error.error_code != REFUSED:
                raise
            if len(metrics) > 1:
                for metric in metrics:
                    self._send([metric])
            elif (name := metrics[0].key) not in self.refused:
                self.refused.add(name)
                log.warning("mlflow: %s is left out: %s", name, brief(error, 200))

    def close(self, exit_code: int = 0) -> None:
        self.paused.clear()  # the last chance
        try:
            self.flush()
        finally:
            with _limited(self.timeout_seconds):
                self.client.set_terminated(self.run_id, ENDS.get(exit_code, "FAILED"))


def _milliseconds() -> int:
    """Return the time of a metric as MLflow wants it, since 1970."""
    return int(time.time() * 1000)


def _name(key: str) -> str:
    """Return a key as a name that MLflow takes.

    MLflow refuses other characters, names over 250 characters and names that are not normal paths.
    A changed name ends with a hash of its key: the classes a+ and a* would else share the name a_.
    """
    parts = re.sub(r"[^\w\-. :/]", "_", key).split("/")
    name = "/".join(f"_{part}" if part in ("", ".") or part[:2] == ".." else part for part in parts)
    if name == key and len(key) <= LONGEST_NAME:
        return key
    digest = hashlib.sha256(key.encode()).hexdigest()[:8]
    return f"{name[: LONGEST_NAME - 1 - len(digest)]}_{digest}"


@contextmanager
def _limited(timeout_seconds: float) -> Iterator[None]:
    """Let a request to a server be tried twice within `timeout_seconds`, not eight times.

    MLflow reads both limits from the environment at each request. A user's own are kept.
    """
    ours = {
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(max(1, round(timeout_seconds / 2))),
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    }
    ours = {key: value for key, value in ours.items() if key not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for key in ours:
            os.environ.pop(key, None)


def _file(tracking_uri: str) -> Path | None:
    """Return the file of a SQLite database; None for any other address."""
    if not tracking_uri.startswith(SQLITE):
        return None
    return Path(tracking_uri.removeprefix(SQLITE)).absolute()


@contextmanager
def _alone(file: Path | None) -> Iterator[None]:
    """Let one process at a time create the tables of a SQLite database: a sweep starts several."""
    if file is None:
        yield
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.with_name(f".{file.name}.lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _experiment(client: Any, name: str, file: Path | None) -> str:
    """Return the id of the experiment, which is created if it is missing.

    Beside the `file` of a SQLite database, its files are in the database's folder; by default they
    would be in the current one.
    """
    found = client.get_experiment_by_name(name)
    if found is None:
        where = {} if file is None else {"artifact_location": _artifacts(file, name)}
        try:
            return str(client.create_experiment(name, **where))
        except Exception as error:  # another process may have been faster
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
            log.info("mlflow: %s", brief(error, 200))
    return str(found.experiment_id)


def _artifacts(file: Path, experiment: str) -> str:
    return (file.parent / f"{file.stem}-files" / re.sub(r"[^\w\-.]", "_", experiment)).as_uri()
