"""The MLflow logger, read back by MLflow's own client."""

from __future__ import annotations

import json
import logging
import math
import random
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from running import TINY, config_of, train_config

from regrow import extras
from regrow.errors import UserError
from regrow.project import ROOT
from regrow.record import mlflow_logger
from regrow.record.loggers import check_choice, open_loggers

pytest.importorskip("mlflow", reason="the extra mlflow is not installed")


@pytest.fixture(autouse=True)
def quietly() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow's own deprecations
        yield


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a database with MLflow's tables, which take seconds to create."""
    from mlflow import MlflowClient

    folder = tmp_path_factory.mktemp("empty")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        MlflowClient(address(folder)).search_experiments()
    return folder / "mlflow.db"


@pytest.fixture
def database(empty: Path, tmp_path: Path) -> Path:
    """Return a folder with such a database."""
    shutil.copy(empty, tmp_path / "mlflow.db")
    return tmp_path


def address(folder: Path) -> str:
    return f"sqlite:///{folder}/mlflow.db"


def opened(folder: Path, resume_step: int | None, position: int | None = None, **more: Any) -> Any:
    from regrow.record.mlflow_logger import Mlflow

    settings: dict[str, Any] = {"experiment": "e", "tags": ["one", "two"], "notes": "why"}
    settings |= {"flush_seconds": 60, "timeout_seconds": 30}

    def node(**given: Any) -> Any:
        return Mlflow(**{**settings, "tracking_uri": address(folder), **more}, **given)  # type: ignore[arg-type]

    config = {
        "optimizer": {"lr": 0.1},
        "service_token": "planted-in-the-config",
        "long": "x" * 9000,
        "k" * 300: 1,
    }
    run = folder / "run"
    run.mkdir(exist_ok=True)
    nodes: Any = {"mlflow": node}
    given = {"resume_step": resume_step, "run_name": "x/y", "config": config}
    return open_loggers(run, nodes, position=position, **given)  # type: ignore[arg-type]


def read(folder: Path) -> tuple[Any, Any]:
    from mlflow import MlflowClient

    client = MlflowClient(address(folder))
    run = client.get_run(json.loads((folder / "run" / "mlflow.json").read_text())["id"])
    return client, run


def history(folder: Path, key: str) -> list[tuple[int, float]]:
    client, run = read(folder)
    found = client.get_metric_history(run.info.run_id, key)
    return sorted((metric.step, metric.value) for metric in found)


def test_a_killed_and_resumed_run_is_one_run_with_each_step_once(database: Path) -> None:
    first = opened(database, None)
    for step in range(1, 7):
        first.log(step, 0, {"train/loss": 1 / step, "per class/näme": 0.5})
        if step == 4:
            position = first.position()
    first.trackers["mlflow"].flush()  # all six are there; then it is killed
    _, run = read(database)
    assert (run.info.status, run.info.run_name) == ("RUNNING", "x/y")
    second = opened(database, 4, position)
    second.log(4, 0, {"val/loss": math.nan})
    for step in range(5, 9):
        second.log(step, 0, {"train/loss": 1 / step})
    second.close()
    client, again = read(database)
    assert again.info.run_id == run.info.run_id
    assert len(client.search_runs([run.info.experiment_id])) == 1
    losses = [(step, pytest.approx(1 / step)) for step in range(1, 9)]
    assert history(database, "train/loss") == losses
    assert [step for step, _ in history(database, "epoch")] == [*range(1, 9)]
    ((step, value),) = history(database, "val/loss")
    assert step == 4 and math.isnan(value)
    assert again.info.status == "FINISHED"
    assert again.data.params["optimizer.lr"] == "0.1" and len(again.data.params["long"]) == 6000
    assert "planted-in" not in json.dumps(dict(again.data.params))
    assert again.data.tags["tags"] == "one, two"
    assert again.data.tags["mlflow.note.content"] == "why"


def test_values_lost_in_a_kill_are_sent_again_from_the_record(database: Path) -> None:
    first = opened(database, None)
    for step in (1, 2):
        first.log(step, 0, {"train/loss": float(step)})
    first.image("samples", torch.ones(2, 2), step=2)
    position = first.jsonl.position()
    first.trackers["mlflow"].waiting.clear()  # killed before it sent
    assert history(database, "train/loss") == []
    second = opened(database, 2, position)
    second.close(255)
    assert history(database, "train/loss") == [(1, 1.0), (2, 2.0)]
    client, run = read(database)
    assert run.info.status == "KILLED"
    (file,) = client.list_artifacts(run.info.run_id, "images/samples")
    assert file.path == "images/samples/step_00000002.png"
    assert run.info.artifact_uri.startswith((database / "mlflow-files").as_uri())


ODD = [
    "val/f1/",
    "val/f1/..",
    "val/f1/.",
    "val/f1/...",
    "val/f1/a//b",
    "/x",
    "//x",
    "",
    ".",
    "../y",
]
ODD += ["val/f1/a+", "val/f1/a*", "val/f1/a_", "line\nbreak", "m" * 250, "m" * 251, "m" * 252]


def test_each_name_of_a_metric_arrives_and_none_stands_for_two(
    database: Path, caplog: pytest.LogCaptureFixture
) -> None:
    values = {key: float(number) for number, key in enumerate(ODD)}
    first = opened(database, None)
    for step in (1, 2):
        first.log(step, 0, values)
    position = first.position()
    first.close()
    resumed = opened(database, 2, position)  # its names are the same
    for step in (3, 4):
        resumed.log(step, 0, values)
    resumed.close()
    _, run = read(database)
    assert run.info.status == "FINISHED" and caplog.records == []
    assert len(run.data.metrics) == len(ODD) + 1  # the epoch
    assert sorted(run.data.metrics.values()) == sorted([0.0, *map(float, range(len(ODD)))])
    assert (run.data.metrics["val/f1/a_"], run.data.metrics["m" * 250]) == (12.0, 14.0)
    for key in run.data.metrics:
        assert [step for step, _ in history(database, key)] == [1, 2, 3, 4]
    assert any(key.startswith("k" * 200) for key in run.data.params)


def test_only_the_values_that_mlflow_refuses_are_left_out(
    database: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loggers = opened(database, None)
    tracker = loggers.trackers["mlflow"]
    loggers.log(1, 0, {"good": 1.0})
    tracker.waiting.insert(0, tracker.metric("not/../normal", 1.0, 1, 1))
    tracker.waiting.insert(0, tracker.metric("not/../normal", 1.0, 1, 2))
    loggers.log(2, 0, {"good": 2.0})
    loggers.close()
    assert history(database, "good") == [(1, 1.0), (2, 2.0)]
    (warning,) = caplog.records
    assert warning.getMessage().startswith("mlflow: not/../normal is left out: ")
    assert read(database)[1].info.status == "FINISHED"


@pytest.fixture
def dead_server() -> Iterator[tuple[str, list[int]]]:
    """Yield the address of a server that hangs up, and a list that grows by each request."""
    requests: list[int] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def hang_up() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    requests.append(1)
                    connection.close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}", requests
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


def test_a_server_that_fails_is_left_alone_for_a_while(
    database: Path, dead_server: tuple[str, list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    from mlflow import MlflowClient

    loggers = opened(database, None, timeout_seconds=30, flush_seconds=0)
    tracker, (where, requests) = loggers.trackers["mlflow"], dead_server
    alive, tracker.client = tracker.client, MlflowClient(where)
    loggers.log(1, 0, {"a": 1.0})
    assert len(requests) == 2  # one retry
    for step in range(2, 50):
        loggers.log(step, 0, {"a": 1.0})
    loggers.position()
    assert len(requests) == 2
    tracker.paused["values"] -= mlflow_logger.PAUSE * 30  # the time has passed
    loggers.log(50, 0, {"a": 1.0})
    assert len(requests) == 4
    loggers.image("samples", torch.ones(2, 2), step=50)
    assert len(requests) == 6  # images have a pause of their own
    loggers.image("samples", torch.ones(2, 2), step=51)
    assert len(requests) == 6
    tracker.client = alive
    loggers.close()
    assert [step for step, _ in history(database, "a")] == [*range(1, 51)]
    client, run = read(database)
    assert len(client.list_artifacts(run.info.run_id, "images/samples")) == 2
    (warning,) = (r for r in caplog.records if r.name.startswith("regrow"))
    assert warning.getMessage().startswith("logger mlflow: MlflowException: ")


def test_values_that_wait_too_long_are_read_from_the_record_again(
    database: Path, dead_server: tuple[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    monkeypatch.setattr(mlflow_logger, "MOST_WAITING", 20)
    loggers = opened(database, None)
    tracker = loggers.trackers["mlflow"]
    loggers.log(1, 0, {"a": 1.0, "b": 0.0})
    tracker.flush()
    alive, tracker.client = tracker.client, MlflowClient(dead_server[0])
    most = 0
    for step in range(2, 60):
        loggers.log(step, 0, {"a": float(step), "b": 0.0})
        loggers.log(step, 0, {"c": 1.0})  # an evaluation of the same step
        most = max(most, len(tracker.waiting))
    assert most <= 20
    tracker.client = alive
    loggers.close()
    assert history(database, "a") == [(step, float(step)) for step in range(1, 60)]
    assert [step for step, _ in history(database, "c")] == [*range(2, 60)]
    assert [step for step, _ in history(database, "epoch")] == [*range(1, 60)]


def test_the_limits_of_a_request_hold_for_our_requests_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from mlflow import environment_variables as variables

    def limits() -> tuple[int, int]:
        retries = variables.MLFLOW_HTTP_REQUEST_MAX_RETRIES
        return variables.MLFLOW_HTTP_REQUEST_TIMEOUT.get(), retries.get()

    assert limits() == (120, 7)  # MLflow's own
    with mlflow_logger._limited(30):
        assert limits() == (15, 1)
        with mlflow_logger._limited(60):
            assert limits() == (15, 1)
        assert limits() == (15, 1)
    assert limits() == (120, 7)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "77")
    with mlflow_logger._limited(0.1):
        assert limits() == (77, 1)
    assert limits() == (77, 7)


@pytest.mark.slow
def test_a_run_begins_without_a_server_that_does_not_answer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        where = f"http://127.0.0.1:{silent.getsockname()[1]}"
        start = time.monotonic()
        loggers = opened(tmp_path, None, tracking_uri=where, timeout_seconds=1)
        assert time.monotonic() - start < 30  # MLflow's own limits: 16 minutes
    assert not loggers.trackers and "The run continues without it" in caplog.text
    loggers.close()


def test_a_run_that_cannot_send_is_ended_all_the_same(database: Path) -> None:
    loggers = opened(database, None)
    loggers.trackers["mlflow"].waiting.append("not a metric")
    assert read(database)[1].info.status == "RUNNING"
    loggers.close(1)
    assert read(database)[1].info.status == "FAILED"


def test_a_run_missing_from_the_database_is_replaced_by_a_new_one(
    database: Path, caplog: pytest.LogCaptureFixture
) -> None:
    opened(database, None).close()
    (database / "run" / "mlflow.json").write_text('{"id": "0123456789abcdef0123456789abcdef"}')
    with caplog.at_level(logging.WARNING):
        opened(database, None).close()
    assert "is not there, a new one begins" in caplog.text
    assert read(database)[1].info.status == "FINISHED"


def test_a_deleted_run_is_replaced_by_a_new_one(database: Path) -> None:
    opened(database, None).close()
    client, run = read(database)
    client.delete_run(run.info.run_id)
    opened(database, None).close()
    assert read(database)[1].info.run_id != run.info.run_id


def test_a_failure_that_may_pass_begins_no_second_run(
    database: Path, caplog: pytest.LogCaptureFixture
) -> None:
    opened(database, None).close()
    client, run = read(database)
    refusing = "CREATE TRIGGER t BEFORE UPDATE ON runs BEGIN SELECT RAISE(ABORT, 'not now'); END"
    with closing(sqlite3.connect(database / "mlflow.db")) as connection:
        connection.execute(refusing)
    loggers = opened(database, None)
    assert not loggers.trackers and "The run continues without it" in caplog.text
    loggers.close()
    with closing(sqlite3.connect(database / "mlflow.db")) as connection:
        connection.execute("DROP TRIGGER t")
    assert len(client.search_runs([run.info.experiment_id])) == 1
    loggers = opened(database, None)
    assert loggers.trackers
    loggers.close()
    assert read(database)[1].info.run_id == run.info.run_id


def test_a_run_that_was_killed_before_its_params_gets_them(database: Path) -> None:
    from mlflow import MlflowClient
    from mlflow.entities import Param

    loggers = opened(database, None)  # creates the experiment
    loggers.close()
    client = MlflowClient(address(database))
    bare = client.create_run(read(database)[1].info.experiment_id)
    client.log_batch(bare.info.run_id, params=[Param("optimizer.lr", "0.05")])  # a first part
    client.set_tag(bare.info.run_id, "mlflow.note.content", "edited")
    (database / "run" / "mlflow.json").write_text(json.dumps({"id": bare.info.run_id}))
    opened(database, None).close()
    data = read(database)[1].data
    assert data.params["optimizer.lr"] == "0.05"  # what is there stays
    assert len(data.params["long"]) == 6000
    assert (data.tags["tags"], data.tags["mlflow.note.content"]) == ("one, two", "edited")


def test_a_run_of_the_config_is_in_the_database_and_draws_nothing(database: Path) -> None:
    config = config_of(*TINY, "trainer.max_epochs=1", "logger=mlflow")
    assert config["logger"]["mlflow"]["tracking_uri"] == "sqlite:///outputs/mlflow.db"
    config["logger"]["mlflow"]["tracking_uri"] = address(database)
    before = random.getstate()
    train_config(database / "run", config)
    with_logger = random.getstate()
    random.setstate(before)
    plain = config_of(*TINY, "trainer.max_epochs=1")
    train_config(database / "plain", plain)
    assert random.getstate() == with_logger
    assert [step for step, _ in history(database, "train/loss")] == [1, 2, 3, 4]


@pytest.mark.slow
def test_two_processes_may_create_the_database_at_once(tmp_path: Path) -> None:
    script = (
        "import sys; sys.path.insert(0, 'src'); from pathlib import Path\n"
        "from regrow.record.mlflow_logger import Mlflow\n"
        "folder = Path(sys.argv[1]); folder.mkdir()\n"
        f"m = Mlflow(tracking_uri={address(tmp_path)!r}, experiment='e', tags=[], notes=None, "
        "flush_seconds=5, timeout_seconds=30, folder=folder, resume_step=None, run_name='x', "
        "config=None)\n"
        "m.log(1, 0, {'a': 1.0}); m.close()"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path / name)], cwd=ROOT)
        for name in ("one", "two")
    ]
    assert [process.wait(timeout=120) for process in started] == [0, 0]
    from mlflow import MlflowClient

    client = MlflowClient(address(tmp_path))
    experiment: Any = client.get_experiment_by_name("e")
    assert len(client.search_runs([experiment.experiment_id])) == 2


def test_without_the_extra_one_line_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    check_choice({"mlflow": {}})
    find = extras.importlib.util.find_spec
    monkeypatch.setattr(
        extras.importlib.util, "find_spec", lambda name: None if name == "mlflow" else find(name)
    )
    with pytest.raises(UserError, match=r"^logger=mlflow needs mlflow, .* -e '\.\[mlflow\]'$"):
        check_choice({"mlflow": {}})
