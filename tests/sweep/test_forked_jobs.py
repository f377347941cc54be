"""A sweep and its jobs, stopped and killed, in seconds thanks to quick.py.

test_failures and test_sweep do the same with the real command, its copy's Python and its server.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import forked
import pytest
import yaml
from sweeping import LONG, SMALL, environment, pids_of, table, weights
from test_failures import bombs
from test_sweep import alone
from waiting import alive, until

from regrow.project import ROOT
from regrow.record.records import read_json
from regrow.sweep.schedule import Stop

HERE = str(Path(__file__).parent)
# Long enough to be stopped, after the first of seven checkpoints.
TWO = (*LONG, "trainer.max_epochs=60", "trainer.checkpoint.save_every_epochs=60",
       "trainer.checkpoint.save_every_steps=40", "seed=0,1", "launcher.jobs=2",
       "sweep.pictures=none", "hydra.sweep.dir=sweep")  # fmt: skip


def begin(folder: Path, *arguments: str) -> Any:
    """Start a sweep in `folder`, which may hold its own modules."""
    return forked.popen(
        [sys.executable, "-c", "import quick; quick.main()", "-m", *arguments],
        cwd=folder, env=environment(PYTHONPATH=f"{HERE}:{folder}"), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def finish(process: Any, code: int = 0) -> str:
    """Wait for its end and return its output."""
    said, _ = process.communicate(timeout=100)
    assert process.returncode == code, said
    return str(said)


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of TWO, run without interruption."""
    folder = tmp_path_factory.mktemp("untouched")
    finish(begin(folder, *TWO))
    return folder / "sweep"


def both_have_saved(folder: Path) -> bool:
    assert not (folder / "results.csv").exists(), "the sweep was over before it could be stopped"
    return len([*folder.glob("*/checkpoints/last")]) == 2


@pytest.mark.slow
def test_a_stop_lets_all_jobs_save_though_they_have_just_begun(
    untouched: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "sweep"
    process = begin(tmp_path, *TWO)
    until(lambda: both_have_saved(folder))
    process.send_signal(signal.SIGINT)
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)  # as by `timeout`, which signals the group as well
    assert "stopped. Resume with: " in finish(process, code=130)
    states = {row["job"]: row["status"] for row in table(folder)}
    assert "interrupted" in states.values() and {*states.values()} <= {"interrupted", "completed"}
    for job, ended in states.items():
        status = read_json(folder / job / "status.json")
        assert status["state"] == ended  # a killed one would still say "running"
        saved = (folder / job / "checkpoints" / "last").readlink().name
        assert saved == f"step_{status['step']:08}"
    finish(begin(tmp_path, *TWO))
    assert table(folder) == table(untouched)


def test_a_sweep_killed_by_itself_takes_its_jobs_with_it_and_ends_the_same(
    untouched: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "sweep"
    process = begin(tmp_path, *TWO)
    until(lambda: both_have_saved(folder))
    pids = pids_of(folder)
    process.kill()
    process.wait()
    until(lambda: not any(alive(pid) for pid in pids), seconds=1)
    left = {read_json(folder / job / "status.json")["state"] for job in "01"}
    assert "running" in left  # as a killed job leaves it; none ran to its end
    finish(begin(tmp_path, *TWO))
    assert table(folder) == table(untouched)


def test_a_forked_job_is_the_run_that_it_would_be_by_itself(
    untouched: Path, tmp_path: Path
) -> None:
    overrides: Any = yaml.safe_load((untouched / "1" / ".hydra" / "overrides.yaml").read_text())
    assert any(override.startswith("trainer.num_threads=") for override in overrides)
    assert alone(tmp_path, overrides) == weights(untouched)["1"]
    assert weights(untouched)["0"] != weights(untouched)["1"]  # another seed is another run


def test_failures_stay_where_they_are_though_jobs_are_forked(tmp_path: Path) -> None:
    model = (*bombs(tmp_path), "+model.ends=killed,fine,raised")
    named = (*SMALL, *model, "trainer.max_epochs=1", "sweep.pictures=none", "hydra.sweep.dir=sweep")
    said = finish(begin(tmp_path, *named), code=1)
    assert "2 of 3 jobs failed" in said and "sweep.retry_failed=true" in said
    rows = {row["model.ends"]: row for row in table(tmp_path / "sweep")}
    assert {ends: row["status"] for ends, row in rows.items()} == {
        "killed": "failed", "fine": "completed", "raised": "failed",
    }  # fmt: skip
    assert "killed by SIGKILL" in rows["killed"]["reason"]
    assert "my own mistake" in rows["raised"]["reason"]
    assert "my own mistake" in (tmp_path / "sweep" / rows["raised"]["log"]).read_text()


# -- what ends with what ---------------------------------------------------------------------------


def children_of(pid: int) -> list[int]:
    try:
        return [*map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]
    except (FileNotFoundError, ProcessLookupError):  # it has ended by now, as a call of git does
        return []


def below(pid: int) -> list[int]:
    """Return the processes that a process and its descendants have started."""
    children = children_of(pid)
    return [*children, *(it for child in children for it in below(child))]


def ranks_below(pid: int) -> list[int]:
    found = []
    for each in below(pid):
        with contextlib.suppress(OSError):
            if b"regrow.runs.child" in Path(f"/proc/{each}/cmdline").read_bytes():
                found.append(each)
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's promise is Linux's")
@pytest.mark.slow
def test_a_killed_job_takes_the_ranks_with_it_that_it_has_just_started(tmp_path: Path) -> None:
    """They are two Pythons that import. Processes that a sweep and its jobs forked end too."""
    process = begin(tmp_path, *TWO, "trainer=ddp", "trainer.devices=2")
    until(lambda: len(ranks_below(process.pid)) >= 2)
    family = below(process.pid)
    process.kill()
    process.wait()
    until(lambda: not any(alive(pid) for pid in family), seconds=5)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's promise is Linux's")
def test_a_killed_server_takes_a_job_that_is_still_importing_with_it(tmp_path: Path) -> None:
    """As in a real sweep, though this server has not imported anything yet."""
    program = "import multiprocessing; from regrow.sweep import process; from pathlib import Path\n"
    program += "context = multiprocessing.get_context('forkserver')\n"
    program += "job = process.start(context, Path('sweep'), 0, '', {})\n"
    program += "print(job.pid, flush=True); job.join(); print(job.exitcode, flush=True)"
    (tmp_path / "sweep").mkdir()
    sweep = subprocess.Popen(
        [sys.executable, "-c", program], cwd=tmp_path,
        env=environment(PYTHONPATH=str(ROOT / "src")), stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert sweep.stdout is not None
    job = int(sweep.stdout.readline())
    until((tmp_path / "sweep" / "logs" / "0.log").exists)  # from here on, it ends with its sweep
    status = Path(f"/proc/{job}/status").read_text()
    (server,) = [int(x.split()[1]) for x in status.splitlines() if x.startswith("PPid:")]
    assert server != sweep.pid
    os.kill(server, signal.SIGKILL)
    until(lambda: not alive(job), seconds=1)
    assert int(sweep.communicate(timeout=60)[0]) != 0  # the sweep counts this as a failure


# -- what a sweep runs, and where ------------------------------------------------------------------


def test_edits_change_nothing_of_what_was_frozen(tmp_path: Path) -> None:
    """The repository is edited between the copy and the start of the copied code."""
    root, sweep = tmp_path / "repository", tmp_path / "sweep"
    for part in ("src", "conf", "scripts"):
        shutil.copytree(ROOT / part, root / part)
    program = """
import sys
from pathlib import Path
from regrow.record.records import Lock
from regrow.sweep import frozen

root, sweep = map(Path, sys.argv[1:])
sys.argv[0] = str(root / "scripts" / "train.py")
frozen.ROOT = root
lock = Lock(sweep).acquire()
code, identity = frozen.freeze(sweep)
for edited in ("src/regrow/config/check.py", "scripts/train.py"):
    assert (root / edited).is_file()
    (root / edited).write_text("this is not Python")
config = root / "conf" / "optimizer" / "adamw.yaml"
config.write_text(config.read_text().replace("lr:", "lr: 0.5 #"))
frozen.become(code, identity, lock, ["--cfg", "job", "--package", "optimizer"], warm=False)
"""
    done = forked.run(
        [sys.executable, "-c", program, root, sweep], cwd=tmp_path, env=environment(),
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    before = (ROOT / "conf" / "optimizer" / "adamw.yaml").read_text()
    (rate,) = [line.split()[1] for line in before.splitlines() if line.startswith("lr:")]
    assert f"lr: {rate}\n" in done.stdout, done.stderr


def test_twenty_sweeps_that_begin_at_once_have_twenty_folders(tmp_path: Path) -> None:
    """In twenty processes, many of which draw the same name: there are 16 per second."""
    program = """
import multiprocessing
import os
from regrow.record import records
from regrow.sweep import frozen

records._SUFFIX = "ab"
fork = multiprocessing.get_context("fork")
together, done = fork.Barrier(20), fork.Barrier(20)

def begin():
    together.wait()
    with frozen.claim(None, "digits", ["seed=0,1"], "auto") as lock:
        os.write(1, f"{lock.folder}\\n".encode())  # whole: print() writes the line's end apart
        done.wait(timeout=20)  # in vain, where one of them has failed

sweeps = [fork.Process(target=begin) for _ in range(20)]
for sweep in sweeps:
    sweep.start()
for sweep in sweeps:
    sweep.join()
"""
    done = forked.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment(),
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    said = done.stdout.split()
    assert len(said) == len({*said}) == 20, done.stderr
    assert {tmp_path / name for name in said} == {*(tmp_path / "outputs/digits/sweeps").iterdir()}


class Nowhere:
    def send(self, number: int, only: object = None) -> None:
        pass


def test_a_signal_that_comes_again_after_the_last_job_ends_nothing() -> None:
    stop = Stop(Nowhere())  # type: ignore[arg-type]
    stop.note(signal.SIGINT)
    with stop.echoes_ignored():
        os.kill(os.getpid(), signal.SIGINT)
    stop._noted -= 10  # the control: this one is another wish
    with pytest.raises(KeyboardInterrupt), stop.echoes_ignored():
        os.kill(os.getpid(), signal.SIGINT)
