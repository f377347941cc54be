"""scripts/new_project.py: a copy is renamed everywhere and works, or is not created."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import forked
import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "new_project.py"


# Tests that use the package's name in paths, targets, programs and records.
OF_NAMES = [
    *("tests/test_imports.py", "tests/test_config.py", "tests/test_own_modules.py"),
    *("tests/record/test_moved.py", "tests/record/test_damaged.py", "tests/test_monitor.py"),
    *("tests/sweep/test_locks.py", "tests/training/test_kill.py", "tests/test_guarantees.py"),
]


@pytest.fixture(scope="module")
def new_project() -> ModuleType:
    spec = importlib.util.spec_from_file_location("new_project", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["new_project"] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def copy(new_project: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("projects") / "deep-fish"
    new_project.make_project("Deep Fish", folder)
    return folder


def files(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if p.is_file() and ".git" not in p.parts]


@pytest.mark.parametrize(
    ("name", "package", "distribution", "title"),
    [
        ("Deep Fish", "deep_fish", "deep-fish", "Deep Fish"),
        ("deep-fish", "deep_fish", "deep-fish", "Deep Fish"),
        ("deep_fish2", "deep_fish2", "deep-fish2", "Deep Fish2"),
        ("  MRI   study ", "mri_study", "mri-study", "MRI study"),
    ],
)
def test_a_name_is_given_all_its_forms(
    new_project: ModuleType, name: str, package: str, distribution: str, title: str
) -> None:
    names = new_project.names_of(name)
    assert (names.package, names.distribution, names.title) == (package, distribution, title)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("", "letters"),
        ("2fish", "letters"),
        ("fish!", "letters"),
        ("fïsh", "letters"),
        ("a/b", "letters"),
        ("_fish", "letters"),
        ("class", "keyword"),
        ("match", "keyword"),
        ("json", "a module of Python"),
        ("Torch", "module named torch"),
        ("hydra", "module named hydra"),
        ("scikit-learn", "module named scikit_learn"),
        ("tests", "folder"),
        ("train", "named train"),
    ],
)
def test_a_name_that_cannot_be_a_package_is_refused_in_one_line(
    name: str, why: str, tmp_path: Path
) -> None:
    if name == "train" and not (ROOT / "scripts" / "train.py").exists():
        pytest.skip("no scripts/train.py")
    done = run_script(name, tmp_path / "copy")
    assert done.returncode == 2
    assert why in done.stderr and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_an_untracked_file_is_named_after_the_copy_and_beside_no_error(
    new_project: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    real = new_project.git

    def git(folder: Path, *arguments: str) -> str | None:
        return "scratch.py\n" if "--others" in arguments else real(folder, *arguments)

    monkeypatch.setattr(new_project, "git", git)
    assert new_project.main(["class", str(tmp_path / "copy")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    monkeypatch.setattr(new_project, "make_project", lambda *_, **__: "one commit on main")
    assert new_project.main(["Deep Fish", str(tmp_path / "copy")]) == 0
    assert "not copied, as git does not know them: scratch.py" in capsys.readouterr().err


def test_its_own_name_is_refused(new_project: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(new_project.Refused, match="own name"):
        new_project.make_project(new_project.TITLE, tmp_path / "copy")


def test_a_folder_that_holds_something_is_refused_and_left_alone(
    new_project: ModuleType, tmp_path: Path
) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(new_project.Refused, match="not empty"):
        new_project.make_project("Deep Fish", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(new_project.Refused, match="a file of this name exists"):
        new_project.make_project("Deep Fish", tmp_path / "thesis.txt")


def test_a_copy_inside_the_repository_is_refused(new_project: ModuleType) -> None:
    with pytest.raises(new_project.Refused, match="inside this repository"):
        new_project.make_project("Deep Fish", ROOT / "outputs" / "copy")
    assert not (ROOT / "outputs" / "copy").exists()


def test_nothing_is_left_of_a_copy_that_fails(
    new_project: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(*arguments: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(new_project, "fresh_changelog", no_space)  # after the files were copied
    with pytest.raises(OSError, match="No space"):
        new_project.make_project("Deep Fish", tmp_path / "copy")
    assert not list(tmp_path.iterdir())


def test_whole_mentions_are_renamed_and_others_stay(new_project: ModuleType) -> None:
    old = new_project.Names(title="Sea", package="sea")
    new = new_project.Names(title="Deep Fish", package="deep_fish")
    text = "sea.run src/sea SEA_HOME Sea SeaSearch sea_plugin seas Season overseas"
    assert new_project.rename(text, old, new) == (
        "deep_fish.run src/deep_fish DEEP_FISH_HOME Deep Fish DeepFishSearch deep_fish_plugin "
        "seas Season overseas"
    )
    assert new_project.rename(new_project.rename("sea Sea SEA_X", old, new), new, old) == (
        "sea Sea SEA_X"
    )


def test_no_mention_of_the_old_name_remains(copy: Path, new_project: ModuleType) -> None:
    old_names = new_project.OLD
    forms = "|".join({old_names.package, old_names.distribution, old_names.title, old_names.camel})
    old = re.compile(rf"(?i)(?<![a-z0-9])({forms})(?![a-z0-9])")
    allowed = {Path("LICENSE"), Path("CHANGELOG.md")}  # the author, and the origin
    mentions = []
    for path in files(copy):
        if path.relative_to(copy) in allowed or b"\0" in path.read_bytes():
            continue
        lines = path.read_text(encoding="utf-8").splitlines()
        mentions += [f"{path.name}: {line}" for line in lines if old.search(line)]
        assert not old.search(str(path.relative_to(copy)))
    assert not mentions
    assert len(files(copy)) > 10
    assert old.search((copy / "CHANGELOG.md").read_text())  # the control: the search finds it there


def test_a_copy_carries_its_own_name_everywhere(copy: Path, new_project: ModuleType) -> None:
    assert (copy / "src" / "deep_fish" / "__init__.py").exists()
    project = (copy / "pyproject.toml").read_text()
    assert 'name = "deep-fish"' in project
    assert (copy / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    lock = (copy / "requirements.lock").read_text()
    assert lock == (ROOT / "requirements.lock").read_text()
    changes = (copy / "CHANGELOG.md").read_text()
    assert "Deep Fish, begun as a copy of" in changes and changes.count("\n- ") == 1
    if (ROOT / "README.md").exists():
        assert "Deep Fish" in (copy / "README.md").read_text().splitlines()[0]


def test_runs_environment_and_history_stay_behind(copy: Path) -> None:
    assert not (copy / ".venv").exists()
    outputs = copy / "outputs"
    assert not outputs.exists() or {p.name for p in outputs.iterdir()} <= {"README.md", ".gitkeep"}
    assert not list(copy.rglob("__pycache__"))
    assert os.access(copy / ".ci" / "run", os.X_OK)
    assert not list(copy.parent.glob(".deep-fish*"))


def test_a_copy_starts_with_one_commit_or_says_why_not(tmp_path: Path) -> None:
    someone = {
        f"GIT_{who}_{what}": "a@b.c"
        for who in ("AUTHOR", "COMMITTER")
        for what in ("NAME", "EMAIL")
    }
    done = run_script("Deep Fish", tmp_path / "one", **someone)
    assert done.returncode == 0 and "one commit on main" in done.stdout
    log = subprocess.run(
        ["git", "-C", tmp_path / "one", "log", "--format=%s"], capture_output=True, text=True
    )
    assert log.stdout.count("\n") == 1
    status = ["git", "-C", tmp_path / "one", "status", "--porcelain"]
    assert subprocess.run(status, capture_output=True, text=True).stdout == ""

    nobody = {
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": "user.useConfigOnly",
        "GIT_CONFIG_VALUE_0": "true",
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_SYSTEM": os.devnull,
    }
    done = run_script("Deep Fish", tmp_path / "two", **nobody)
    assert done.returncode == 0 and "could not commit" in done.stdout
    assert (tmp_path / "two" / "pyproject.toml").exists()


def test_benchmarks_can_be_left_out(new_project: ModuleType, tmp_path: Path) -> None:
    new_project.make_project("Deep Fish", tmp_path / "copy", without_benchmarks=True)
    assert not (tmp_path / "copy" / "benchmarks").exists()


def test_without_git_the_same_files_are_found(
    new_project: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy"
    new_project.make_project("Deep Fish", copy)
    (copy / "outputs" / "run").mkdir(parents=True)
    for name in ("outputs/run/status.json", ".env", ".coverage.1", "src/.DS_Store", "src/a.pyc"):
        (copy / name).write_text("{}")
    with_git = new_project.files_to_copy(copy)
    monkeypatch.setattr(new_project, "git", lambda *arguments: None)
    assert new_project.files_to_copy(copy) == with_git
    assert "outputs/run/status.json" not in map(str, with_git)
    monkeypatch.undo()
    (copy / "scratch.py").write_text("")
    assert new_project.files_to_copy(copy) == with_git  # untracked files are left behind


@pytest.mark.slow
@pytest.mark.parametrize("files", [OF_NAMES, pytest.param([], marks=pytest.mark.nightly)])
def test_the_tests_and_the_main_script_of_a_copy_work(
    files: list[str], new_project: ModuleType, tmp_path: Path
) -> None:
    copy = tmp_path / "ocean"
    new_project.make_project("Ocean Study", copy)
    environment = os.environ | {"PYTHONPATH": forked.python_path(copy / "src")}
    config = run(copy, environment, "scripts/train.py", "--cfg", "job")
    assert config.returncode == 0, config.stderr
    assert "ocean_study" in config.stdout
    chosen = ("-m", "not slow", "--one-of-each", "-p", "no:cacheprovider", *files)
    tests = run(copy, environment, "-m", "pytest", *chosen)
    assert tests.returncode == 0, tests.stdout[-4000:]
    assert " passed" in tests.stdout


def run(
    folder: Path, environment: dict[str, str], *arguments: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=2700
    )


def run_script(
    name: str, destination: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    return run(ROOT, os.environ | environment, str(SCRIPT), name, str(destination))
