from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from datetime import datetime
from pathlib import Path

import pytest

from regrow.errors import UserError
from regrow.record import output, records
from regrow.record.records import (
    FolderBusy,
    Lock,
    create,
    is_locked,
    link_latest,
    load_status,
    read_json,
    read_metrics,
    remove_unused,
    set_status,
    write_json,
)


def test_a_lock_that_was_removed_is_not_taken_for_one(tmp_path: Path) -> None:
    """A second process waits for the lock while the first one removes the folder that it leaves."""
    folder = tmp_path / "run"
    folder.mkdir()
    first, second = Lock(folder).acquire(), Lock(folder)
    waiting = threading.Thread(target=second.acquire)
    waiting.start()
    time.sleep(0.1)
    remove_unused(folder)
    first.release()
    waiting.join()
    assert (folder / ".lock").exists() and is_locked(folder)
    with pytest.raises(FolderBusy):
        Lock(folder).acquire()
    second.release()


HOLD = """
import os, sys, time
from pathlib import Path
from regrow.record.records import Lock, set_status
folder = Path(sys.argv[1])
lock = Lock(folder).acquire()
set_status(folder, "running", step=3, pids=[os.getpid()])
if sys.argv[2] == "fork":
    child = os.fork()
    if child == 0:
        time.sleep(30)
        os._exit(0)
    print(child, flush=True)
else:
    print("held", flush=True)
time.sleep(30)
"""


def hold(folder: Path, how: str = "alone") -> tuple[subprocess.Popen[str], str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), how], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def _create_at_once(outputs: Path, ready: object, found: object) -> None:
    ready.wait()  # type: ignore[attr-defined]
    folder = create(outputs, "digits", datetime(2026, 11, 21, 10, 2, 11))
    link_latest(folder, folder.parent)
    found.put(str(folder))  # type: ignore[attr-defined]


@pytest.mark.slow
def test_twenty_processes_in_the_same_instant_get_twenty_folders(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready, found = context.Barrier(20), context.Queue()
    processes = [
        context.Process(target=_create_at_once, args=(tmp_path, ready, found)) for _ in range(20)
    ]
    for process in processes:
        process.start()
    folders = {found.get(timeout=30) for _ in processes}
    for process in processes:
        process.join()
    assert len(folders) == 20
    assert all(Path(folder).name.startswith("2026-11-21_10-02-11-") for folder in folders)
    latest = tmp_path / "digits" / "latest"
    assert str(latest.parent / latest.readlink()) in folders
    assert not list((tmp_path / "digits").glob(".latest*"))


def test_a_taken_suffix_is_not_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    letters = iter("aaaaaaaabbbb")
    monkeypatch.setattr("regrow.record.records.secrets.choice", lambda _: next(letters))
    now = datetime(2026, 1, 2)
    first, second = create(tmp_path, "x", now), create(tmp_path, "x", now)
    assert (first.name[-4:], second.name[-4:]) == ("aaaa", "bbbb")


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "", "a\0b"])
def test_a_name_cannot_leave_the_outputs(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="name="):
        create(tmp_path, name)
    assert not list(tmp_path.iterdir())


def test_latest_moves_on_and_never_replaces_a_folder_of_the_user(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = create(tmp_path, "x"), create(tmp_path, "x")
    link_latest(first, tmp_path / "x")
    link_latest(second, tmp_path / "x")
    assert (tmp_path / "x" / "latest").resolve() == second
    (tmp_path / "y" / "latest").mkdir(parents=True)
    link_latest(create(tmp_path, "y"), tmp_path / "y")
    assert not (tmp_path / "y" / "latest").is_symlink()
    assert "left as it is" in caplog.text


def test_latest_names_the_newest_run_and_of_sweeps_the_newest_sweep(tmp_path: Path) -> None:
    runs = tmp_path / "digits"
    for name in ("a", "chosen", "chosen/again/0", "sweeps/s/0", "sweeps/s/1"):
        (runs / name).mkdir(parents=True)
        link_latest(runs / name, runs)
    assert (runs / "latest").resolve() == runs / "chosen"
    assert (runs / "sweeps" / "latest").resolve() == runs / "sweeps" / "s"
    (tmp_path / "elsewhere").mkdir()
    for folder in (tmp_path / "elsewhere", runs, runs / "sweeps"):
        link_latest(folder, runs)
    links = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("latest")}
    assert links == {"digits/latest", "digits/sweeps/latest"}
    link_latest(runs / "latest", runs)  # as with hydra.run.dir=outputs/digits/latest
    assert (runs / "latest").resolve() == runs / "chosen"


def test_the_second_holder_is_refused_with_one_line_that_names_the_first(tmp_path: Path) -> None:
    process, _ = hold(tmp_path)
    try:
        with pytest.raises(FolderBusy) as refused:
            Lock(tmp_path).acquire()
        assert f"process {process.pid}" in str(refused.value)
        assert "\n" not in str(refused.value)
    finally:
        kill(process)


def test_the_lock_dies_with_its_killed_holder_and_running_becomes_interrupted(
    tmp_path: Path,
) -> None:
    process, _ = hold(tmp_path)
    status = load_status(tmp_path)
    assert status is not None and status["state"] == "running" and is_locked(tmp_path)
    kill(process)
    status = load_status(tmp_path)
    assert status is not None and status["state"] == "interrupted" and status["step"] == 3
    assert read_json(tmp_path / "status.json")["state"] == "running"  # reading changes nothing
    with Lock(tmp_path):
        assert is_locked(tmp_path)
    assert not is_locked(tmp_path)


def test_a_forked_worker_that_outlives_its_killed_parent_does_not_keep_the_lock(
    tmp_path: Path,
) -> None:
    process, child = hold(tmp_path, "fork")
    assert is_locked(tmp_path)  # the child released only its copy, not the parent's lock
    process.kill()
    process.wait()
    try:
        os.kill(int(child), 0)  # alive
        Lock(tmp_path).acquire().release()
    finally:
        os.kill(int(child), signal.SIGKILL)
        process.communicate()


def test_looking_at_the_lock_does_not_refuse_a_holder(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    looking = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from pathlib import Path; from regrow.record.records import is_locked\n"
            "print('go', flush=True)\nwhile True: is_locked(Path(sys.argv[1]))",
            str(tmp_path),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert looking.stdout is not None and looking.stdout.readline()
        for _ in range(50):
            Lock(tmp_path).acquire().release()
    finally:
        kill(looking)


WRITE_FOREVER = """
import sys
from pathlib import Path
from regrow.record.records import write_json
path = Path(sys.argv[1])
n = 0
while True:
    write_json(path, {"n": n, "filler": [n] * 20000})
    if n == 0: print("go", flush=True)
    n += 1
"""


def test_a_file_is_whole_after_its_writer_was_killed_at_any_instant(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    for round_ in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITE_FOREVER, str(path)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None and process.stdout.readline()
        time.sleep(0.013 * round_)
        kill(process)
        value = read_json(path)
        assert set(value["filler"]) == {value["n"]}
    (tmp_path / ".summary.json.7.tmp").touch()
    with Lock(tmp_path):
        assert not list(tmp_path.glob(".*.tmp"))  # left by a killed writer


def test_json_keeps_every_bit_of_a_float_and_nan(tmp_path: Path) -> None:
    value = {"a": 0.1 + 0.2, "b": math.nan, "c": math.inf, "d": 5e-324}
    write_json(tmp_path / "x.json", value)
    back = read_json(tmp_path / "x.json")
    assert math.isnan(back.pop("b"))
    assert back == {"a": 0.1 + 0.2, "c": math.inf, "d": 5e-324}


def test_status_is_one_line_of_error_and_never_stops_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    set_status(tmp_path, "failed", step=7, pids=[1, 2], error="a\n  b token=abcdefgh123", epoch=2)
    status = load_status(tmp_path)
    assert status is not None
    assert (status["error"], status["epoch"], status["pids"]) == ("a b token=***", 2, [1, 2])
    set_status(tmp_path / "missing", "failed", step=7, pids=[])
    assert "was not written" in caplog.text


def test_a_status_file_that_is_missing_or_half_written_reads_as_none(tmp_path: Path) -> None:
    assert load_status(tmp_path) is None
    (tmp_path / "status.json").write_text('{"state": "runn')
    assert load_status(tmp_path) is None


def test_a_torn_line_of_metrics_is_left_out(tmp_path: Path) -> None:
    line = json.dumps({"step": 1, "train/loss": math.nan})
    (tmp_path / "metrics.jsonl").write_text(line + '\n{"step": 2, "tra')
    (read,) = read_metrics(tmp_path)
    assert read["step"] == 1 and math.isnan(read["train/loss"])


@pytest.mark.parametrize("how", ["record", "csv", "text"])
def test_a_planted_link_is_not_written_through(how: str, tmp_path: Path) -> None:
    victim, target = tmp_path / "victim", tmp_path / "out.csv"
    victim.write_text("mine")
    (tmp_path / f".out.csv.{os.getpid()}.tmp").symlink_to(victim)
    if how == "record":
        records.write_text(target, "new")
    elif how == "csv":
        output.write_csv([{"a": "new"}], target, overwrite=False)
    else:
        output.write_text("new", target, overwrite=False)
    assert victim.read_text() == "mine"
    assert "new" in target.read_text() and not target.is_symlink()
    assert {path.name for path in tmp_path.iterdir()} == {"victim", "out.csv"}
