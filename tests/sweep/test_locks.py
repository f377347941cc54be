"""A job killed anywhere does not delay others: jobs share no lock."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from sweeping import SMALL, sweep, table
from test_failures import BOMB, bombs

DEADLY = """
import os, signal

class Deadly:
    def write(self, text): os.kill(os.getpid(), signal.SIGKILL)
    def flush(self): pass
"""
FORKS = """
import sys
from tqdm import tqdm
from tqdm.std import TqdmDefaultWriteLock

import regrow.runs.console

if SHARED:
    shared = TqdmDefaultWriteLock()
    os.register_at_fork(after_in_child=lambda: tqdm.set_lock(shared))

def child(work):
    if not (pid := os.fork()):
        os._exit(work())
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

WRITES = {
    "line": lambda: tqdm.write("a line", file=Deadly()),
    "bar": lambda: tqdm(total=1, file=Deadly()),
}
print(child(WRITES[WAY]), child(lambda: int(not tqdm.get_lock().acquire(True, 2))))
"""


@pytest.mark.parametrize("way", ["line", "bar"])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.slow
def test_a_process_killed_as_it_writes_leaves_no_lock_held(way: str, shared: bool) -> None:
    program = f"SHARED, WAY = {shared}, {way!r}\n{DEADLY}{FORKS}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.split() == ["-9", "1" if shared else "0"], done.stderr


JOURNAL = """
import sys
from pathlib import Path

import optuna

from regrow.runs import trial

folder = Path(sys.argv[1])
if OPTUNAS:
    from optuna.storages.journal import JournalFileSymlinkLock
    trial.JournalLock = lambda path: JournalFileSymlinkLock(str(path))
(folder / trial.STORAGE).touch()
storage = trial.open_storage(folder)
os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
optuna.create_study(study_name="sweep", storage=storage)
"""


@pytest.mark.parametrize("optunas", [False, True])
def test_a_job_killed_as_it_reports_leaves_the_journal_free_and_whole(
    optunas: bool, tmp_path: Path
) -> None:
    program = f"OPTUNAS = {optunas}\n{DEADLY}{JOURNAL}"
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True)
    assert done.returncode == -9, done.stderr
    left = tmp_path / "optuna.log.lock"
    assert left.is_symlink() == optunas  # every other job would wait for it
    if optunas:
        return
    import optuna

    from regrow.runs.trial import open_storage

    with (tmp_path / "optuna.log").open("a") as journal:
        journal.write('{"op_code": 4, "half a li')  # as a kill in the middle of a write leaves it
    study = optuna.create_study(
        study_name="sweep", storage=open_storage(tmp_path), load_if_exists=True
    )
    study.tell(study.ask(), 0.5)
    again = optuna.load_study(study_name="sweep", storage=open_storage(tmp_path))
    assert [trial.value for trial in again.trials] == [0.5]


@pytest.mark.slow
def test_jobs_end_though_one_is_killed_in_the_middle_of_a_log_line(tmp_path: Path) -> None:
    model = (*bombs(tmp_path), "+model.ends=killed,fine,good")
    dies = "os.kill(os.getpid(), signal.SIGKILL)"
    bomb = BOMB.replace(dies, 'tqdm.write("its last line", file=Deadly())')
    assert bomb != BOMB
    (tmp_path / "bomb.py").write_text(f"{DEADLY}\nfrom tqdm import tqdm\n{bomb}")
    arguments = (*SMALL, *model, "launcher.jobs=2", "hydra.sweep.dir=sweep")
    done = sweep(tmp_path, *arguments, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1, done.stderr
    rows = {row["model.ends"]: row for row in table(tmp_path / "sweep")}
    assert {ends: row["status"] for ends, row in rows.items()} == {
        "killed": "failed", "fine": "completed", "good": "completed"
    }  # fmt: skip
    assert "killed by SIGKILL" in rows["killed"]["reason"]
