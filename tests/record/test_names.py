"""No files are replaced or deleted except a run's own, which are identified by their names."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import forked
import pytest
from finished import finished, script
from running import TINY

from regrow.errors import UserError
from regrow.project import ROOT
from regrow.record import records
from regrow.record.names import (
    LOCK,
    RUN,
    is_of_a_run,
    is_temporary,
    refuse_foreign_run,
    refuse_foreign_sweep,
)
from regrow.record.output import refuse_existing, write_text
from regrow.record.records import Lock

MINE = ("metrics.jsonl", "notes.txt", ".notes.tmp", "train.log", "config.yaml", "checkpoints/x.pt")


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def make(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine", encoding="utf-8")
    return folder


def test_the_readme_names_every_file_that_a_run_writes() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text.partition("## A run's folder")[2].partition("\n## ")[0]
    named = {name.partition("/")[0] for name in re.findall("`([^`]+)`", table)}
    assert "report.html" in named and "predictions_test.csv" in named
    # A range test has a folder of its own.
    own = {name for name in RUN if name != LOCK and not name.startswith("lr_finder.")}
    assert own <= named, own - named


@pytest.mark.parametrize("name", MINE)
@pytest.mark.parametrize("refuse", [refuse_foreign_run, refuse_foreign_sweep])
def test_a_folder_of_the_users_is_refused(refuse: object, name: str, tmp_path: Path) -> None:
    folder = make(tmp_path / "mine", name)
    with pytest.raises(UserError, match=rf"holds {name.partition('/')[0]}, which no"):
        refuse(folder)  # type: ignore[operator]


@pytest.mark.parametrize("name", [".lock", "metrics.jsonl", "summary.json", "status.json"])
def test_a_folder_in_the_place_of_a_file_is_refused_before_anything_is_written(
    name: str, tmp_path: Path
) -> None:
    folder = make(tmp_path / "run", ".lock", "config.yaml", "metrics.jsonl", "checkpoints/x.pt")
    records.write_json(folder / "manifest.json", {"code_sha256": "", "seeds": {}})
    refuse_foreign_run(folder)
    (folder / name).unlink(missing_ok=True)
    (folder / name).mkdir()
    with pytest.raises(UserError, match=rf"{name} in it is a folder"):
        refuse_foreign_run(folder)


def test_a_file_that_a_living_run_renames_meanwhile_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(tmp_path / "run", ".lock", ".status.json.4711.tmp")
    scanned = os.scandir

    def renamed_after(path: Path) -> list[os.DirEntry[str]]:
        entries = [*scanned(path)]
        (folder / ".status.json.4711.tmp").rename(folder / "status.json")
        return entries

    monkeypatch.setattr(os, "scandir", renamed_after)
    refuse_foreign_run(folder)


def test_a_folder_left_by_a_killed_start_is_used_again(tmp_path: Path) -> None:
    refuse_foreign_run(tmp_path / "new")
    folder = make(tmp_path / "run", ".lock", ".hydra/overrides.yaml", "config.yaml", "train.log",
                  ".manifest.json.4711.tmp", "slurm/job.json")  # fmt: skip
    refuse_foreign_run(folder)
    make(folder, "notes.txt")
    with pytest.raises(UserError, match=r"holds notes\.txt"):
        refuse_foreign_run(folder)
    records.write_json(folder / "manifest.json", {"code_sha256": "", "seeds": {}})
    refuse_foreign_run(folder)  # a run's folder, with the user's notes
    sweep = make(tmp_path / "sweep", ".lock", "code/origin.json", ".code/src/x.py", ".state.lock")
    refuse_foreign_sweep(sweep)
    make(sweep, "0/config.yaml")
    with pytest.raises(UserError, match="holds 0, which no sweep"):
        refuse_foreign_sweep(sweep)
    records.write_json(sweep / "sweep.json", {"jobs": [], "overrides": []})
    refuse_foreign_sweep(sweep)


@pytest.mark.parametrize("content", ["", "[1]"])
def test_a_run_with_a_damaged_manifest_may_hold_the_users_notes(
    content: str, tmp_path: Path
) -> None:
    folder = make(tmp_path / "run", ".lock", "config.yaml", "status.json", "notes.txt")
    (folder / "manifest.json").write_text(content)
    refuse_foreign_run(folder)
    (folder / "status.json").unlink()  # the control
    with pytest.raises(UserError, match=r"holds notes\.txt"):
        refuse_foreign_run(folder)


def test_a_link_or_a_pipe_in_a_runs_place_is_refused(tmp_path: Path) -> None:
    make(tmp_path, "precious.jsonl")
    folder = make(tmp_path / "run", ".lock", "config.yaml")
    records.write_json(folder / "manifest.json", {"code_sha256": "", "seeds": {}})
    (folder / "metrics.jsonl").symlink_to(tmp_path / "precious.jsonl")
    with pytest.raises(UserError, match=r"metrics\.jsonl in it is a link"):
        refuse_foreign_run(folder)
    (folder / "metrics.jsonl").unlink()
    os.mkfifo(folder / "metrics.jsonl")
    with pytest.raises(UserError, match=r"metrics\.jsonl in it is not a regular file"):
        refuse_foreign_run(folder)


def test_a_lock_clears_up_after_a_writer_of_its_own_alone(tmp_path: Path) -> None:
    own = (".status.json.12.tmp", ".weights.pt.tmp", ".git.2.diff.7.tmp", ".results.csv.1.tmp",
           ".evaluation_test.json.3.tmp", ".evaluation_test.1.json.3.tmp")  # fmt: skip
    others = (".notes.tmp", ".notes.txt.12.tmp", "status.json.12.tmp", ".status.json.tmp")
    make(tmp_path, *own, *others)
    with Lock(tmp_path):
        assert sorted(content(tmp_path)) == sorted([*others, ".lock"])
    assert all(map(is_temporary, own)) and not any(map(is_temporary, others))


@pytest.mark.parametrize("arguments", [["hydra.run.dir=mine"], ["-m", "hydra.sweep.dir=mine"]])
def test_a_run_or_sweep_leaves_a_folder_of_the_users_as_it_was(
    arguments: list[str], tmp_path: Path
) -> None:
    folder = make(tmp_path / "mine", *MINE)
    before = content(tmp_path)
    done = forked.run(
        [sys.executable, str(ROOT / "scripts" / "train.py"), *arguments, *TINY], cwd=tmp_path,
        capture_output=True, encoding="utf-8", check=False,
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "=mine holds .notes.tmp, which no" in done.stderr
    assert content(tmp_path) == before and folder.is_dir()


@pytest.mark.slow
def test_every_name_that_a_run_and_the_scripts_write_is_known(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished(tmp_path / "run", *TINY, "trainer.max_steps=2", "logger=[csv,tensorboard]",
                   "trainer.profile=true")  # fmt: skip
    script("evaluate").main([f"run={run}"])
    script("evaluate").main([f"run={run}", "split=val", "checkpoint=last"])
    assert script("report").main([str(run)]) == 0
    assert {path.name for path in run.iterdir() if not is_of_a_run(path.name)} == set()
    refuse_foreign_run(run)
    (run / "manifest.json").unlink()
    refuse_foreign_run(run)  # by its names alone


# -- paths that the user names ---------------------------------------------------------------------


def test_a_script_asks_before_it_overwrites_what_the_user_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished(tmp_path / "run", *TINY, "trainer.max_steps=1")
    evaluate = script("evaluate").main
    before = (run / "config.yaml").read_bytes()
    with pytest.raises(SystemExit):
        evaluate([f"run={run}", f"output={run / 'config.yaml'}"])
    assert "exists already. Choose another name, or add overwrite=true" in capsys.readouterr().err
    assert (run / "config.yaml").read_bytes() == before
    make(tmp_path, "mine.json", "train.csv")
    evaluate([f"run={run}", f"output={tmp_path / 'mine.json'}", "overwrite=true"])
    assert json.loads((tmp_path / "mine.json").read_text(encoding="utf-8"))["split"] == "test"
    report, page = script("report").main, tmp_path / "train.html"
    other = finished(tmp_path / "other", *TINY, "trainer.max_steps=1")
    assert report([str(run), str(other), f"output={page}"]) == 2
    assert "train.csv exists already" in capsys.readouterr().err and not page.exists()
    assert (tmp_path / "train.csv").read_text(encoding="utf-8") == "mine"
    assert report([str(run), str(other), f"output={page}", "overwrite=true"]) == 0
    for wrong in ("--output", "outptu=x", "output=x.pdf", "--nothing"):
        assert report([str(run), wrong]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_a_report_that_is_interrupted_prints_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    report = script("report")
    monkeypatch.setattr(report, "make", stopped)
    with pytest.raises(SystemExit) as ended:
        report.main([str(tmp_path)])
    assert ended.value.code == 130


def test_an_output_is_a_regular_file_or_nothing(tmp_path: Path) -> None:
    make(tmp_path, "file")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    for name, said in {"link": "a link", "dangling": "a link", "pipe": "not a regular file",
                       ".": "a folder", "x" * 300: "cannot be written"}.items():  # fmt: skip
        for overwrite in (False, True):
            with pytest.raises(UserError, match=said):
                refuse_existing(tmp_path / name, overwrite)
    for device in ("/dev/null", "/dev/stdout"):
        with pytest.raises(UserError, match=r"is not a regular file|is a link"):
            refuse_existing(Path(device), True)
    write_text("new", tmp_path / "file", overwrite=True)
    with pytest.raises(UserError, match="exists already"):
        write_text("newer", tmp_path / "file", overwrite=False)
    assert (tmp_path / "file").read_text(encoding="utf-8") == "new"
    with pytest.raises(FileExistsError):
        records.write_text(tmp_path / "pipe", "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "file", "link", "pipe"]
