"""scripts/set_up.py: the lock's hashes are checked, and each fix is one line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from hashlib import sha256
from pathlib import Path
from types import ModuleType

import pytest
from finished import script

from regrow.record.records import read_json

ROOT = Path(__file__).resolve().parents[2]
BACKEND = """
import zipfile
from pathlib import Path


def build_editable(folder, settings=None, metadata=None):
    name = "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(Path(folder, name), "w") as wheel:
        info = "tiny-1.0.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\\nName: tiny\\nVersion: 1.0\\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\\nTag: py3-none-any\\n")
        wheel.writestr(f"{info}/RECORD", "")
    return name
"""


@pytest.fixture
def set_up() -> ModuleType:
    return script("set_up")


def test_a_mismatch_is_told_from_other_failures(set_up: ModuleType) -> None:
    pip = """ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE. If you have \
updated the package versions, please update the hashes. Otherwise, examine the package contents \
carefully; someone may have tampered with them.
    fish==1.0 from file:///w/fish-1.0-py3-none-any.whl (from -r requirements.lock (line 1)):
        Expected sha256 00
             Got        11
"""
    uv = """  × Failed to read `fish @ file:///w/fish-1.0-py3-none-any.whl`
  ╰─▶ Hash mismatch
      for `fish==1.0`

      Expected:
        sha256:00
"""
    assert set_up.mismatch(pip) == set_up.mismatch(uv) == "fish==1.0"
    for other in (
        "ERROR: No matching distribution found for fish==1.0",
        "ERROR: Hashes are required in --require-hashes mode, but they are missing from some",
        "  × No solution found when resolving dependencies: no wheels with a matching platform",
    ):
        assert set_up.mismatch(other) is None


def test_each_pin_of_the_lock_has_hashes_and_no_index_stands_there(set_up: ModuleType) -> None:
    set_up.refuse_without_hashes()
    text = (ROOT / "requirements.lock").read_text()
    assert "http:" not in text and "https:" not in text and "--find-links" not in text
    assert text.count("==") > 90


def project(folder: Path, version: str, digest: str | None) -> Path:
    """A project of one tiny package, whose lock pins another: fish, which exists as 1.0."""
    (folder / "scripts").mkdir(parents=True)
    shutil.copy(ROOT / "scripts" / "set_up.py", folder / "scripts")
    wheels = folder.parent / "wheels"
    wheels.mkdir(exist_ok=True)
    file = wheels / "fish-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as wheel:
        info = "fish-1.0.dist-info"
        wheel.writestr("fish.py", "")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: fish\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    digest = digest or sha256(file.read_bytes()).hexdigest()
    (folder / "requirements.lock").write_text(f"fish=={version} \\\n    --hash=sha256:{digest}\n")
    (folder / "requirements.txt").write_text("fish>=1\n")
    (folder / "requirements-dev.txt").write_text("-r requirements.txt\n")
    (folder / "backend.py").write_text(BACKEND)
    (folder / "pyproject.toml").write_text(
        "[build-system]\nrequires = []\nbuild-backend = 'backend'\nbackend-path = ['.']\n"
        "[project]\nname = 'tiny'\nversion = '1.0'\n"
    )
    return folder


@pytest.mark.slow
def test_a_silent_installer_gets_a_line_every_few_seconds(
    set_up: ModuleType, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    sleep = "import time; time.sleep(0.5)"
    assert set_up.call(sys.executable, "-c", sleep, lock=None)
    assert capfd.readouterr().err == ""
    monkeypatch.setattr(set_up, "TELL_SECONDS", 0.1)
    assert set_up.call(sys.executable, "-c", sleep, lock=None)
    assert "set-up: still fetching and installing, 0 s so far" in capfd.readouterr().err


@pytest.mark.slow
def test_the_line_says_which_step_it_is_and_how_much_is_there(
    set_up: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(set_up, "TELL_SECONDS", 0.1)
    monkeypatch.setattr(set_up, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(sys, "platform", "linux")
    program = (
        "import pathlib, sys, tempfile, time\n"
        "for folder, size in ((tempfile.gettempdir(), 1234), (sys.argv[1], 2)):\n"
        "    path = pathlib.Path(folder, 'a', 'b')\n"
        "    path.parent.mkdir(parents=True)\n"
        "    with path.open('wb') as file:\n"
        "        file.truncate(size * 1_000_000)\n"
        "print(tempfile.gettempdir())\n"
        "time.sleep(0.5)\n"
    )
    step = set_up.STEPS[1]
    command = (sys.executable, "-c", program, tmp_path / ".venv")
    assert set_up.call(*command, lock=None, step=step, pinned=True)
    said = capfd.readouterr().err
    assert (
        f"still fetching and installing ({step}, 1,234 of about 3,000 MB fetched, "
        "2 of about 6,300 MB in .venv), 0 s so far\n" in said
    )
    assert not Path(said.splitlines()[0]).exists()
    monkeypatch.setattr(sys, "platform", "darwin")  # whose packages are smaller
    shutil.rmtree(tmp_path / ".venv")
    assert set_up.call(*command, lock=None, step=step, pinned=True)
    assert f"({step}, 1,234 MB fetched, 2 MB in .venv), 0 s" in capfd.readouterr().err


def test_an_installers_lines_show_as_they_come_but_for_an_error(
    set_up: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shown = tmp_path / "shown"
    program = (
        "import pathlib, sys, time\n"
        "print('Downloading fish', file=sys.stderr, flush=True)\n"
        "shown = pathlib.Path(sys.argv[1])\n"
        "while not (shown.exists() and shown.read_text()): time.sleep(0.01)\n"
        "sys.exit('  × Hash mismatch for `fish==1.0`')\n"
    )
    with shown.open("w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        with pytest.raises(SystemExit, match=r"^set-up: fish==1\.0: the fetched file"):
            set_up.call("timeout", "20", sys.executable, "-c", program, shown, lock=None)
    assert shown.read_text() == "Downloading fish\n"


def test_the_places_that_pip_ignores_are_one_line_and_other_warnings_stay(
    set_up: ModuleType, capfd: pytest.CaptureFixture[str]
) -> None:
    program = (
        "import sys\n"
        "for name in ('a', 'b', 'c'):\n"
        "    print(f\"WARNING: Location 'file:///x/{name}/' is ignored: it is neither \"\n"
        "          'a file nor a directory.', file=sys.stderr)\n"
        "    print('WARNING: Retrying', name, file=sys.stderr)\n"
    )
    assert set_up.call(sys.executable, "-c", program, lock=None)
    assert capfd.readouterr().err.splitlines() == [
        *("WARNING: Retrying a", "WARNING: Retrying b", "WARNING: Retrying c"),
        "set-up: pip ignored 3 locations of its configuration, which do not exist",
    ]
    assert set_up.call(sys.executable, "-c", "", lock=None)
    assert capfd.readouterr().err == ""


def set_up_in(venv: Path, set_up: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the set-up build this environment."""
    for name, path in {
        "VENV": venv,
        "PYTHON": venv / "bin" / "python",
        "STAMP": venv / ".set-up-complete",
        "UNFINISHED": venv / ".set-up-unfinished",
        "LOCK_FILE": venv.parent / "lock",
    }.items():
        monkeypatch.setattr(set_up, name, path)


def test_another_lock_than_that_of_a_complete_venv_is_installed(
    set_up: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    venv = tmp_path / ".venv"
    (venv / "bin").mkdir(parents=True)
    set_up_in(venv, set_up, monkeypatch)
    set_up.PYTHON.touch()
    made = set_up.wanted() | {"installed_from": set_up.PINNED, "lock": "yes"}
    set_up.STAMP.write_text(json.dumps(made))
    calls: list[bool] = []

    def install(uv: str | None, lock: int | None, *, pinned: bool) -> str:
        calls.append(pinned)
        return "it"

    monkeypatch.setattr(set_up, "install", install)
    for argument, expected in (("lock=yes", []), ("lock=no", [False]), ("lock=no", [])):
        calls.clear()
        monkeypatch.setattr(sys, "argv", ["set_up.py", argument])
        set_up.main()
        assert calls == expected
        said = capsys.readouterr().err
        assert ("there is nothing to do" in said) != bool(expected)
    assert read_json(set_up.STAMP)["lock"] == "no"


@pytest.mark.parametrize("changed", ["python", "place", "requirements"])
def test_a_venv_made_by_hand_is_never_emptied(
    changed: str, set_up: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    venv = tmp_path / ".venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").symlink_to(sys.executable)
    (venv / "mine").touch()
    set_up_in(venv, set_up, monkeypatch)

    def stopped(*_: object, **__: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["set_up.py"])
    monkeypatch.setattr(set_up, "install", lambda *_, **__: "it")
    set_up.main()
    before = set_up.wanted()
    monkeypatch.setattr(set_up, "wanted", lambda: before | {changed: "another"})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(set_up, "install", stopped)
        set_up.main()
    set_up.main()
    assert (venv / "mine").exists()
    assert read_json(set_up.STAMP)[changed] == "another"


def test_make_keeps_the_interpreter_of_a_venv_unless_another_is_named(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "set_up.py").write_text("import sys; print(sys.executable)")

    def make(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["make", "-s", "setup", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    for name in ("an other", ".venv/bin/python"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(sys.executable)
        done = make(*([f"PYTHON={tmp_path / name}"] * (name == "an other")))
        assert done.stdout.strip() == str(tmp_path / name), done.stderr
    at_home = make("PYTHON=~/an other", f"HOME={tmp_path}")  # zsh and dash leave the ~ to make
    assert at_home.stdout.strip() == str(tmp_path / "an other"), at_home.stderr
    missing = make("PYTHON=/none/python3")
    assert missing.returncode and not missing.stdout
    assert "no Python >= 3.11 found (PYTHON=/none/python3); install one" in missing.stderr


def test_uv_makes_an_environment_with_pip(
    set_up: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in Debian, whose python3 has no ensurepip. `make extras` calls pip."""
    (tmp_path / ".venv").mkdir()
    set_up_in(tmp_path / ".venv", set_up, monkeypatch)
    calls: list[tuple[object, ...]] = []
    monkeypatch.setattr(set_up, "call", lambda *command, **_: calls.append(command) or True)
    monkeypatch.setattr(set_up.importlib.util, "find_spec", lambda name: None)
    set_up.create("uv", None)
    assert calls[0][:2] == ("uv", "venv") and "--seed" in calls[0]


def start(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    wheels = str(folder.parent / "wheels")
    # No network, and only pip: uv may be missing.
    environment = {"PATH": "/usr/bin:/bin", "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": wheels}
    return subprocess.run(
        [sys.executable, "scripts/set_up.py", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def stamp(folder: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads((folder / ".venv" / ".set-up-complete").read_text())
    return found


@pytest.mark.slow
def test_a_mismatch_ends_in_one_line_and_lock_no_installs_the_ranges(tmp_path: Path) -> None:
    folder = project(tmp_path / "wrong", "1.0", "0" * 64)
    done = start(folder)
    lines = [line for line in done.stderr.splitlines() if "making .venv" not in line]
    assert done.returncode == 1 and len(lines) == 1
    assert lines[0].startswith("set-up: fish==1.0: ") and "make setup LOCK=no" in lines[0]
    assert not list((folder / ".venv").rglob("fish.py"))  # no fall-back
    done = start(folder, "lock=no")  # the fix
    assert done.returncode == 0, done.stderr
    assert list((folder / ".venv").rglob("fish.py"))
    assert (stamp(folder)["installed_from"], stamp(folder)["lock"]) == (
        "requirements-dev.txt",
        "no",
    )
    (folder / "requirements.txt").write_text("fish>=0.5\n")
    assert start(folder).returncode == 0  # a later one keeps it
    assert stamp(folder)["lock"] == "no"
    assert start(folder, "lock=yes").returncode == 0  # the pinned version is already installed
    assert stamp(folder)["lock"] == "yes"


@pytest.mark.slow
def test_the_right_hash_installs_the_lock_and_another_platform_the_ranges(tmp_path: Path) -> None:
    folder = project(tmp_path / "right", "1.0", None)
    assert start(folder).returncode == 0
    assert stamp(folder)["installed_from"] == "requirements.lock"
    digest = "0" * 64
    (folder / "requirements.lock").write_text(f"fish==2.0 --hash=sha256:{digest}\n")  # none here
    done = start(folder)
    assert done.returncode == 0 and "could not be installed here; trying the ranges" in done.stderr
    assert stamp(folder)["installed_from"] == "requirements-dev.txt"
    (folder / "requirements.lock").write_text("fish==1.0\n")
    done = start(folder)
    assert done.returncode == 1 and "fish==1.0 has no hash. Run make lock." in done.stderr
    assert "LOCK=maybe" in start(folder, "lock=maybe").stderr
