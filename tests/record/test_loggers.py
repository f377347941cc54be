from __future__ import annotations

import csv
import errno
import functools
import json
import logging
import math
import os
import random
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from running import TINY, config_of, train_config

from regrow.config.hydra_access import version_arguments
from regrow.errors import UserError
from regrow.record.loggers import (
    Csv,
    Jsonl,
    Loggers,
    TensorBoard,
    Wandb,
    check_choice,
    check_required,
    open_loggers,
    wandb_mode,
)
from regrow.record.records import read_metrics

ROOT = Path(__file__).parents[2]


def runtime(folder: Path, resume_step: int | None = None) -> dict[str, Any]:
    return {"folder": folder, "resume_step": resume_step, "run_name": "x/y", "config": {"a": 1}}


# -- metrics.jsonl ---------------------------------------------------------------------------------


def test_a_line_is_readable_at_once_and_keeps_every_bit(tmp_path: Path) -> None:
    jsonl = Jsonl(tmp_path)
    jsonl.log(1, 0, {"train/loss": 0.1 + 0.2, "train/lr": 1e-300, "val/auroc": math.nan})
    (line,) = read_metrics(tmp_path)
    assert list(line)[:2] == ["step", "epoch"]
    assert (line["train/loss"], line["train/lr"]) == (0.1 + 0.2, 1e-300)
    assert math.isnan(line["val/auroc"])
    assert "NaN" in (tmp_path / "metrics.jsonl").read_text()
    jsonl.close()
    jsonl.close()


def test_numbers_of_numpy_and_torch_are_written_as_numbers(tmp_path: Path) -> None:
    import numpy as np
    import torch

    jsonl = Jsonl(tmp_path)
    jsonl.log(1, 0, {"a": np.float32(0.5), "b": torch.tensor(0.25), "c": np.int64(3)})  # type: ignore[dict-item]
    assert read_metrics(tmp_path) == [{"step": 1, "epoch": 0, "a": 0.5, "b": 0.25, "c": 3}]
    jsonl.close()


def test_rewind_gives_the_file_of_an_uninterrupted_run(tmp_path: Path) -> None:
    def log(jsonl: Jsonl, steps: range) -> None:
        for step in steps:
            jsonl.log(step, 0, {"train/loss": 1 / step})

    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    whole = Jsonl(tmp_path / "whole")
    log(whole, range(1, 10))
    cut = Jsonl(tmp_path / "cut")
    log(cut, range(1, 5))
    position = cut.position()
    log(cut, range(5, 8))  # lost in the crash
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "tr')  # and a half line
    (tmp_path / "broken").mkdir()
    shutil.copy(tmp_path / "cut" / "metrics.jsonl", tmp_path / "broken")
    broken = Jsonl(tmp_path / "broken")  # a resume that forgets to rewind
    log(broken, range(5, 10))
    resumed = Jsonl(tmp_path / "cut")
    resumed.rewind(position)
    log(resumed, range(5, 10))
    expected = (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    assert (tmp_path / "cut" / "metrics.jsonl").read_bytes() == expected
    assert (tmp_path / "broken" / "metrics.jsonl").read_bytes() != expected
    for jsonl in (whole, cut, resumed, broken):
        jsonl.close()


def test_a_half_written_line_is_removed_before_the_next_is_written(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st')
    jsonl = Jsonl(tmp_path)
    jsonl.log(2, 0, {})
    jsonl.close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]


def test_a_file_shorter_than_its_checkpoint_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    jsonl = Jsonl(tmp_path)
    jsonl.rewind(100)
    assert "was edited: no line of it ends at byte 100" in caplog.text
    jsonl.close()


FULL = """
import logging, resource, sys
from pathlib import Path
from regrow.record.loggers import Csv, Jsonl, Loggers
logging.basicConfig(format="%(message)s")
folder = Path(sys.argv[1])
jsonl = Jsonl(folder)
loggers = Loggers(jsonl, {"csv": Csv(folder=folder, resume_step=None, run_name="x", config=None)})
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
for step in range(50):
    loggers.log(step, 0, {"train/loss": 1 / (step + 1)})
import json
lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
assert 0 < len(lines) < 50, len(lines)
position = loggers.position()
assert position > jsonl.path.stat().st_size  # where the waiting lines will end
try:
    loggers.sync(position)
except OSError as error:
    assert "has no room for its lines" in str(error)
else:
    raise AssertionError("a checkpoint would be ahead of its record")
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
loggers.log(50, 0, {"train/loss": 0.0})
loggers.sync(position)
assert jsonl.path.read_bytes()[:position].count(b"\\n") == 50
loggers.close()
"""


def test_a_full_disk_is_said_once_and_nothing_is_missing_when_there_is_room_again(
    tmp_path: Path,
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Its lines wait in memory") == 1
    assert done.stderr.count("nothing is missing") == 1
    assert done.stderr.count("logger csv") == 1
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(51))
    with (tmp_path / "metrics.csv").open() as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == list(range(51))


# -- csv -------------------------------------------------------------------------------------------


def test_csv_adds_columns_as_they_come_and_holds_what_jsonl_holds(tmp_path: Path) -> None:
    jsonl = Jsonl(tmp_path)
    table = Csv(**runtime(tmp_path))
    loggers = Loggers(jsonl, {"csv": table})
    loggers.log(1, 0, {"train/loss": 0.1 + 0.2})
    loggers.log(2, 0, {"train/loss": 1.0})
    loggers.log(2, 0, {"val/loss": math.nan})
    text = (tmp_path / "metrics.csv").read_text().splitlines()
    assert text == [
        "step,epoch,train/loss,val/loss",
        "1,0,0.30000000000000004,",
        "2,0,1.0,",
        "2,0,,nan",
    ]
    loggers.close()
    assert (tmp_path / "metrics.csv").read_text().splitlines() == text


def test_csv_recovers_from_a_line_that_a_full_disk_tore(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = Csv(**runtime(tmp_path))
    loggers = Loggers(Jsonl(tmp_path), {"csv": table})
    loggers.log(1, 0, {"a": 1.0})
    with table.path.open("a", encoding="utf-8") as file:
        file.write("2,0,0.")  # the next line joins it
    loggers.log(3, 0, {"a": 3.0})
    loggers.log(4, 0, {"b": 4.0})
    loggers.close()
    assert table.path.read_text().splitlines() == [
        "step,epoch,a,b", "1,0,1.0,", "3,0,3.0,", "4,0,,4.0"
    ]  # fmt: skip
    assert "logger csv" not in caplog.text


def test_no_cell_of_csv_is_a_formula(tmp_path: Path) -> None:
    table = Csv(**runtime(tmp_path))
    table.log(1, 0, {"=1+1": 0.5})
    table.log(2, 0, {"=1+1": -0.5, "@more": "=A1"})  # type: ignore[dict-item]
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = [*csv.reader(file)]
    assert rows[0] == ["step", "epoch", "'=1+1", "'@more"]
    assert rows[1:] == [["1", "0", "0.5", ""], ["2", "0", "-0.5", "'=A1"]]


def test_csv_forgets_on_resume_what_jsonl_forgot(tmp_path: Path) -> None:
    nodes = {"csv": Csv}
    first = open_loggers(tmp_path, nodes, position=None, **without_folder(tmp_path, None))
    first.log(1, 0, {"a": 1.0})
    position = first.position()
    first.log(2, 0, {"a": 2.0})
    second = open_loggers(tmp_path, nodes, position=position, **without_folder(tmp_path, 1))
    second.log(2, 0, {"b": 2.5})
    text = (tmp_path / "metrics.csv").read_text()
    assert text.splitlines() == ["step,epoch,a,b", "1,0,1.0,", "2,0,,2.5"]
    second.close()
    first.jsonl.close()


def without_folder(folder: Path, resume_step: int | None) -> dict[str, Any]:
    return {k: v for k, v in runtime(folder, resume_step).items() if k != "folder"}


# -- TensorBoard -----------------------------------------------------------------------------------


@contextmanager
def quietly() -> Iterator[None]:
    """Ignore TensorBoard's own deprecation warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def accumulated(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(
        str(folder / "tensorboard"), size_guidance={"scalars": 0, "histograms": 0}
    )
    events.Reload()
    return events


def shown(folder: Path, tag: str) -> list[tuple[int, float]]:
    with quietly():
        return [(event.step, event.value) for event in accumulated(folder).Scalars(tag)]


def tensorboard(folder: Path, resume_step: int | None) -> TensorBoard:
    return TensorBoard(flush_seconds=30, **runtime(folder, resume_step))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_tensorboard_lacks_nothing_if_a_full_disk_has_room_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from tensorboard.summary.writer.record_writer import RecordWriter

    def refuse(self: Any, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with quietly():
        run = Loggers(Jsonl(tmp_path), {"tensorboard": tensorboard(tmp_path, None)})
        for step in range(1, 30):
            if step == 5:
                run.position()
                monkeypatch.setattr(RecordWriter, "write", refuse)
            run.log(step, 0, {"train/loss": float(step)})
        run.position()
        monkeypatch.undo()  # there is room again
        run.log(30, 0, {"train/loss": 30.0})
        run.close()
    assert shown(tmp_path, "train/loss") == [(step, float(step)) for step in range(1, 31)]
    assert caplog.text.count("logger tensorboard: OSError") == 1


def test_tensorboard_shows_each_step_once_after_a_crash_and_a_resume(tmp_path: Path) -> None:
    import torch

    with quietly():
        jsonl = Jsonl(tmp_path)
        first = Loggers(jsonl, {"tensorboard": tensorboard(tmp_path, None)})
        for step in range(1, 8):
            first.log(step, 0, {"train/loss": 1 / step})
            first.log_histograms(step, {"weights/w": torch.arange(4.0) * step})
            if step == 4:
                position = first.position()
                first.log(step, 0, {"val/loss": 9.0})  # after the checkpoint of the same step
        first.trackers["tensorboard"].flush()
        # killed here: never closed
        second = open_loggers(
            tmp_path,
            {"tensorboard": lambda **given: TensorBoard(flush_seconds=30, **given)},
            position=position,
            **without_folder(tmp_path, 4),
        )
        second.log(4, 0, {"val/loss": 9.0})
        for step in range(5, 10):
            second.log(step, 0, {"train/loss": 1 / step})
            second.log_histograms(step, {"weights/w": torch.arange(4.0) * step})
        second.close()
        jsonl.close()
        assert [step for step, _ in shown(tmp_path, "train/loss")] == list(range(1, 10))
        assert shown(tmp_path, "val/loss") == [(4, 9.0)]
        steps = [event.step for event in accumulated(tmp_path).Histograms("weights/w")]
        assert steps == list(range(1, 10))


def test_without_the_purge_steps_would_show_twice(tmp_path: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with quietly():
        for start in (1, 3):
            writer = SummaryWriter(str(tmp_path / "tensorboard"))
            for step in range(start, 6):
                writer.add_scalar("train/loss", 1.0, step)
            writer.close()
        assert len(shown(tmp_path, "train/loss")) == 8


def test_tensorboard_shows_each_step_once_after_the_clock_was_set_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another machine's clock may be behind as well."""
    now = time.time()
    with quietly():
        for back, start in ((0, 1), (-1, 3), (100, 5), (200, 7)):
            monkeypatch.setattr(time, "time", lambda back=back: now - back)
            writer = tensorboard(tmp_path, start - 1 if start > 1 else None)
            for step in range(start, start + 5):
                writer.log(step, 0, {"train/loss": 1 / step})
            writer.close()
        assert [step for step, _ in shown(tmp_path, "train/loss")] == list(range(1, 12))


def test_tensorboard_is_filled_from_the_record_when_a_kill_emptied_its_buffer(
    tmp_path: Path,
) -> None:
    with quietly():
        jsonl = Jsonl(tmp_path)
        for step in range(1, 6):
            jsonl.log(step, 0, {"train/loss": float(step)})
        resumed = tensorboard(tmp_path, 5)  # added at the resume, or its file was never written
        resumed.log(6, 0, {"train/loss": 6.0})
        resumed.close()
        jsonl.close()
        assert shown(tmp_path, "train/loss") == [(step, float(step)) for step in range(1, 7)]


def test_a_run_that_begins_again_shows_nothing_of_the_first_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.summary.writer import event_file_writer

    # The second file's name ends with 10, and 10 comes before 9 where both begin alike.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(9))
    with quietly():
        for value in (1.0, 2.0):
            writer = tensorboard(tmp_path, None)
            writer.log(0, 0, {"val/loss": value})
            writer.log(1, 0, {"train/loss": value})
            writer.close()
        assert shown(tmp_path, "train/loss") == [(1, 2.0)]
        assert shown(tmp_path, "val/loss") == [(0, 2.0)]


def test_a_histogram_of_not_finite_values_does_not_stop_the_run(tmp_path: Path) -> None:
    import torch

    with quietly():
        writer = tensorboard(tmp_path, None)
        writer.log_histograms(1, {"w": torch.tensor([math.nan]), "v": torch.tensor([1, math.inf])})
        writer.close()
        assert accumulated(tmp_path).Tags()["histograms"] == ["v"]


# -- wandb -----------------------------------------------------------------------------------------

SETTINGS: dict[str, Any] = {
    "project": "p",
    "entity": None,
    "group": "g",
    "tags": ["one"],
    "notes": None,
    "mode": "offline",
    "timeout_seconds": 30,
}

WANDB_RUN = """
import json, logging, os, sys
from pathlib import Path
from regrow.record.loggers import Wandb, open_loggers
logging.basicConfig(format="%(message)s", level="INFO", stream=sys.stderr)
folder, position, resume_step, first, last, end = json.loads(sys.argv[1])
settings = json.loads(sys.argv[2])
loggers = open_loggers(Path(folder), {"wandb": lambda **given: Wandb(**settings, **given)},
    position=position, resume_step=resume_step, run_name="x/y",
    config={"optimizer": {"lr": 0.001}, "service_token": "planted-in-the-config"})
if end == "histograms":
    import torch
    loggers.log_histograms(first, {"weights/w": torch.arange(5.0)})
    end = "close"
for step in range(first, last):
    loggers.log(step, 0, {"train/loss": 1 / step})
    if step == 4: print(loggers.position())
if end == "close": loggers.close()
else: os._exit(9)
"""


def wandb_run(arguments: list[Any], environment: dict[str, str] | None = None, **more: Any) -> Any:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    return subprocess.run(
        [sys.executable, "-c", WANDB_RUN, json.dumps(arguments), json.dumps({**SETTINGS, **more})],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env={**clean, "WANDB_ERROR_REPORTING": "false", **(environment or {})},
        timeout=120,
    )


def offline_records(folder: Path) -> list[dict[str, Any]]:
    (run,) = (folder / "wandb").glob("offline-run-*")
    tool = Path(sys.executable).with_name("wandb")
    done = subprocess.run(
        [tool, "leet", "inspect", "--json", str(run)], capture_output=True, text=True, check=True
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_an_offline_run_is_whole_in_wandbs_own_file_after_a_crash_and_a_resume(
    tmp_path: Path,
) -> None:
    secret = {"MY_API_KEY": "planted-in-the-environment"}
    killed = wandb_run([str(tmp_path), None, None, 1, 8, "kill"], secret)
    assert killed.returncode == 9, killed.stderr
    position = int(killed.stdout)
    resumed = wandb_run([str(tmp_path), position, 4, 5, 10, "histograms"], secret)
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout == "" and len(resumed.stderr.strip().splitlines()) == 1, resumed.stderr
    assert "wandb sync" in resumed.stderr
    records = offline_records(tmp_path)
    (run,) = (record["run"] for record in records if record["type"] == "run")
    identity = json.loads((tmp_path / "wandb.json").read_text())["id"]
    assert (run["run_id"], run["project"], run["tags"]) == (identity, "p", ["one"])
    assert run["config"]["update"]["optimizer"] == {"lr": 0.001}
    history = [record["history"]["item"] for record in records if record["type"] == "history"]
    losses = {item["_step"]: item["train/loss"] for item in history}
    assert losses == {step: pytest.approx(1 / step) for step in range(1, 10)}
    assert len(history) == 9
    assert any("weights/w._type" in item or "weights/w" in item for item in history)
    (before,) = (tmp_path / "wandb" / "superseded").iterdir()
    assert identity in before.name
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert b"planted-in" not in path.read_bytes(), path


class Server:
    """Takes rows as wandb's server does: none of a step before the last one of an earlier start."""

    def __init__(self) -> None:
        self.rows: dict[int, dict[str, Any]] = {}
        self.summary: dict[str, Any] = {}
        self.url, self.starting_step = "https://wandb.example", 0

    def init(self, **_: Any) -> Server:
        self.starting_step = max(self.rows, default=-1) + 1
        return self

    def log(self, values: dict[str, Any], step: int) -> None:
        assert step >= self.starting_step
        self.rows.setdefault(step, {}).update(values)
        self.summary.update(values)

    def finish(self, exit_code: int) -> None: ...


def test_results_after_a_stop_in_an_evaluation_are_in_wandbs_summary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server()
    kinds = {"Settings": dict, "Histogram": object, "Image": object, "setup": lambda _: None}
    fake = SimpleNamespace(**kinds, login=lambda **_: True, init=server.init)
    fake.errors = SimpleNamespace(CommError=ConnectionError)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    nodes: Any = {"wandb": functools.partial(Wandb, **{**SETTINGS, "mode": "online"})}

    def opened(position: int | None, step: int | None) -> Loggers:
        return open_loggers(tmp_path, nodes, position=position, **without_folder(tmp_path, step))

    first = opened(None, None)
    for step in (1, 2, 3):
        first.log(step, 0, {"train/loss": 1 / step})
    position = first.position()
    first.close(255)  # in the evaluation of step 3
    second = opened(position, 3)
    second.log(3, 0, {"val/loss": 0.5})
    assert server.summary["val/loss"] == 0.5 and server.summary["train/loss"] == 1 / 3
    second.log(4, 0, {"train/loss": 0.25})
    second.log(4, 0, {"val/loss": 0.4})
    second.close()
    assert (server.summary["val/loss"], server.summary["train/loss"]) == (0.4, 0.25)
    assert [(step, its.get("train/loss")) for step, its in server.rows.items()] == [
        (1, 1.0), (2, 0.5), (3, 1 / 3), (4, 0.25)
    ]  # fmt: skip
    assert not first.complained | second.complained


def test_disabled_makes_nothing_and_imports_nothing(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from regrow.record.loggers import Wandb\n"
        f"w = Wandb(**{SETTINGS | {'mode': 'disabled'}}, folder=Path({str(tmp_path)!r}), "
        "resume_step=None, run_name='x', config=None)\n"
        "w.log(1, 0, {'a': 1.0}); w.log_histograms(1, {}); w.flush(); w.close()\n"
        "assert not {'wandb', 'torch', 'matplotlib', 'tensorboard', 'yaml'} & set(sys.modules)"
    )
    clean = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    subprocess.run([sys.executable, "-c", script], check=True, env=clean)
    assert not list(tmp_path.iterdir())


def test_the_environments_mode_wins(tmp_path: Path) -> None:
    done = wandb_run(
        [str(tmp_path), None, None, 1, 3, "close"], {"WANDB_MODE": "disabled"}, mode="online"
    )
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_online_without_a_login_is_one_line_and_no_prompt(tmp_path: Path) -> None:
    home = {"HOME": str(tmp_path), "NETRC": str(tmp_path / "none")}
    (tmp_path / "run").mkdir()
    arguments = [str(tmp_path / "run"), None, None, 1, 3, "close"]
    done = wandb_run(arguments, home, mode="online")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "logger.wandb.mode=offline" in last and "UserError" in last


@pytest.mark.slow
def test_an_online_logger_without_a_network_continues_offline(tmp_path: Path) -> None:
    environment = {"WANDB_API_KEY": "a" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    position = None
    for resume_step, first, last in ((None, 1, 5), (4, 5, 7)):  # what is sent later is one run
        done = wandb_run(
            [str(tmp_path), position, resume_step, first, last, "close"],
            environment, mode="online", timeout_seconds=4,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "kept offline" in done.stderr and "a" * 40 not in done.stderr
        history = [it for it in offline_records(tmp_path) if it["type"] == "history"]
        assert len(history) == last - 1
        position = int(done.stdout or 0)


def test_the_choice_is_checked_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_CONFIG_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    check_choice({"wandb": {"mode": "offline"}, "csv": {}})
    with pytest.raises(UserError, match=r"logger\.wandb\.mode=on"):
        check_choice({"wandb": {"mode": "on"}})
    with pytest.raises(UserError, match="needs a login"):
        check_choice({"wandb": {"mode": "online"}})
    monkeypatch.setenv("WANDB_MODE", "sometimes")
    with pytest.raises(UserError, match="WANDB_MODE=sometimes"):
        check_choice({"wandb": {"mode": "offline"}})
    monkeypatch.setenv("WANDB_MODE", "dryrun")
    assert wandb_mode("online") == "offline"


# -- all together ----------------------------------------------------------------------------------


class Broken:
    def log(self, *_: Any) -> None:
        raise RuntimeError("no\nroom")

    log_histograms = log

    def flush(self) -> None:
        raise OSError("no room")

    def close(self, exit_code: int = 0) -> None:
        raise OSError("no room")


def test_a_broken_tracker_is_named_once_and_the_record_continues(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        loggers = Loggers(Jsonl(tmp_path), {"theirs": Broken()})
        for step in range(3):
            loggers.log(step, 0, {"a": 1.0})
        loggers.position()
        loggers.close()
    assert [record.getMessage() for record in caplog.records] == [
        "logger theirs: RuntimeError: no room"
    ]
    assert len(read_metrics(tmp_path)) == 3


class Told:
    """Records how its run ended."""

    codes: ClassVar[list[int]] = []

    def __init__(self, **_: Any) -> None: ...
    def log(self, *_: Any) -> None: ...
    def flush(self) -> None: ...
    def close(self, exit_code: int = 0) -> None:
        self.codes.append(exit_code)


def test_trackers_are_told_whether_a_run_was_completed_stopped_or_failed(tmp_path: Path) -> None:
    config = config_of(*TINY)
    config["logger"]["told"] = {"_target_": f"{__name__}.Told", "_partial_": True}
    train_config(tmp_path / "stopped", config, stop_at=5)
    train_config(tmp_path / "stopped", config)
    config["optimizer"]["lr"] = 1e38
    config["trainer"]["max_skipped_steps"] = 2
    with pytest.raises(FloatingPointError):
        train_config(tmp_path / "failed", config)
    assert Told.codes == [255, 0, 1]


def test_logging_leaves_the_ambient_random_state_alone(tmp_path: Path) -> None:
    before = random.getstate()
    loggers = open_loggers(tmp_path, {"csv": Csv}, position=None, **without_folder(tmp_path, None))
    loggers.log(1, 0, {"a": 1.0})
    loggers.close()
    assert random.getstate() == before


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ([], []),
        (["logger=[]"], []),
        (["logger=jsonl"], []),
        (["logger=wandb", "logger.wandb.mode=offline"], ["wandb"]),
        (["logger=[tensorboard,wandb]"], ["tensorboard", "wandb"]),
        (["logger=[csv,tensorboard,wandb,jsonl]"], ["csv", "tensorboard", "wandb"]),
    ],
)
def test_options_merge_into_one_mapping(
    tmp_path: Path, choice: list[str], names: list[str]
) -> None:
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    (tmp_path / "logger").symlink_to(ROOT / "conf" / "logger")
    (tmp_path / "config.yaml").write_text(
        "defaults:\n  - _self_\n  - logger: [jsonl]\nlogger: {}\ntags: [a]\nnotes: null\n"
    )
    with initialize_config_dir(str(tmp_path), **version_arguments()):
        composed: Any = OmegaConf.to_container(compose("config", choice), resolve=True)
    assert list(composed["logger"]) == names
    assert all(node["_partial_"] for node in composed["logger"].values())


class Short:
    """A minimal custom logger that takes no arguments from the run."""

    seen: ClassVar[list[int]] = []

    def log(self, step: int, epoch: int, values: Any) -> None:
        self.seen.append(step)


class Named(Short):
    def __init__(self, url: str, run_name: str) -> None:
        assert (url, run_name) == ("here", "x/y")


class Unreachable(Short):
    def __init__(self, url: str) -> None:
        raise ConnectionError("no route\nto host")


class Dumb:
    pass


def test_loggers_of_ones_own_take_what_they_like_and_end_no_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of(*TINY, "trainer.max_epochs=1")
    config["logger"] = {
        "short": {"_target_": f"{__name__}.Short"},
        "gone": {"_target_": f"{__name__}.Unreachable", "url": "there", "_partial_": True},
        "dumb": {"_target_": f"{__name__}.Dumb"},
    }
    with caplog.at_level(logging.WARNING):
        assert train_config(tmp_path / "run", config)["status"] == "completed"
    assert Short.seen and len(Short.seen) == len(read_metrics(tmp_path / "run"))
    said = [record.getMessage() for record in caplog.records if record.name != "regrow.file"]
    assert said[:2] == [
        "logger.gone: ConnectionError: no route to host. The run continues without it.",
        "logger.dumb: TypeError: a Dumb has no method log. The run continues without it.",
    ]
    nodes: Any = {"named": functools.partial(Named, url="here")}
    opened = open_loggers(tmp_path, nodes, position=None, **without_folder(tmp_path, None))
    assert [*opened.trackers] == ["named"]


def test_a_missing_argument_of_a_users_logger_is_named_before_anything_is_made() -> None:
    from regrow.config.check import check_signature

    node = {"_target_": f"{__name__}.Named"}
    parameters = check_signature(node, "logger.mine")
    with pytest.raises(UserError, match=r"logger\.mine\.url must be given: .*Named needs it"):
        check_required(node, "logger.mine", parameters)
    check_required({**node, "url": "here"}, "logger.mine", parameters)
    with pytest.raises(UserError, match=r"logger\.mine\._target_=nowhere\.Logger"):
        check_signature({"_target_": "nowhere.Logger"}, "logger.mine")
