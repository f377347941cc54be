"""A folder from elsewhere executes nothing, sends nothing, and only writes inside itself."""

from __future__ import annotations

import json
import logging
import os
import py_compile
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import pytest
import yaml
from running import config_of, launched

from regrow.config import flags, foreign, recorded, resume, roles
from regrow.errors import UserError, printable
from regrow.failing import fail
from regrow.project import ROOT
from regrow.record import ownership, records
from regrow.runs import console, loaded
from regrow.sweep import frozen, ledger

MARKER = "import pathlib, sys\npathlib.Path(sys.argv[0]).with_name('executed').touch()\n"


@pytest.fixture(autouse=True)
def nothing_is_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "_trusted", set())


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A sweep of this user's, whose code prints a line when it runs."""
    return sweep_in(tmp_path / "sweep")


def sweep_in(folder: Path) -> Path:
    code = folder / "code"
    (code / "scripts").mkdir(parents=True)
    (code / "scripts" / "train.py").write_text(MARKER)
    (code / "conf").mkdir()
    (code / "conf" / "train.yaml").write_text("seed: 0\n")
    (code / "src" / "regrow").mkdir(parents=True)
    (code / "src" / "regrow" / "ownership.py").touch()
    (code / "origin.json").write_text('{"root": "/", "git": null}')
    entry = ownership.enter(ownership.digest_of_code(code, "the test"))
    jobs = [ledger.JobEntry(0, "x", {"seed": "0"}, "0", ["seed=0"])]
    facts: dict[str, Any] = {"overrides": ["seed=0,1"], "launcher": [], "complete": False}
    ledger.write(folder, jobs, id=entry.id, **facts)
    return folder


def resumed(folder: Path, *more: str) -> list[str]:
    return resume.expand([f"resume={folder}", *more])


def digits_in(error: pytest.ExceptionInfo[UserError]) -> str:
    assert "\n" not in str(error.value)
    (trust,) = [word for word in str(error.value).split() if word.startswith("trust=")]
    return trust.rstrip(".")


def edit(folder: Path, **facts: Any) -> None:
    path = folder / "sweep.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **facts}))


def other_code(folder: Path) -> None:
    (folder / "code" / "scripts" / "train.py").write_text(MARKER + "# more\n")


def extra_file(folder: Path) -> None:
    (folder / "code" / "scripts" / "torch.py").write_text(MARKER)


def extra_package(folder: Path) -> None:
    (folder / "code" / "hydra_plugins").mkdir()
    (folder / "code" / "hydra_plugins" / "evil.py").write_text(MARKER)


def bytecode(folder: Path) -> None:
    source = folder / "evil.py"
    source.write_text(MARKER)
    py_compile.compile(str(source), cfile=str(folder / "code" / "scripts" / "torch.pyc"))


def other_conf(folder: Path) -> None:
    (folder / "code" / "conf" / "train.yaml").write_text("seed: 1\n")


def removed_file(folder: Path) -> None:
    (folder / "code" / "conf" / "train.yaml").unlink()


ATTACKS: dict[str, Callable[[Path], None]] = {
    "other code": other_code,
    "an extra file": extra_file,
    "an extra package": extra_package,
    "bytecode without its source": bytecode,
    "another conf": other_conf,
    "a file that is gone": removed_file,
    "other overrides": lambda folder: edit(folder, overrides=["model._target_=os.system"]),
    "another launcher": lambda folder: edit(folder, launcher=["launcher.setup=[touch x]"]),
    "another job": lambda folder: edit(
        folder, jobs=[{"number": 0, "identity": "x", "swept": {}, "folder": "0",
                       "overrides": ["hydra.callbacks.x._target_=os.system"]}]),
    "another space": lambda folder: edit(folder, space={"lr": "{}"}),
    "no id": lambda folder: edit(folder, id=""),
    "an id that is not text": lambda folder: edit(folder, id=["x"]),
    "no seal": lambda folder: edit(folder, seal=None),
}  # fmt: skip


@pytest.mark.parametrize("attack", [*ATTACKS])
def test_a_copy_with_other_contents_is_not_the_users(own: Path, attack: str) -> None:
    copy = Path(shutil.copytree(own, own.parent / "copy"))
    assert f"hydra.sweep.dir={os.path.relpath(copy)}" in resumed(copy)  # as it was: a copy is own
    ATTACKS[attack](copy)
    with pytest.raises(UserError, match="not listed as yours") as refused:
        resumed(copy)
    with pytest.raises(UserError, match="not listed as yours"):
        frozen.claim(copy, "digits", ["seed=0,1"], "auto")
    with pytest.raises(UserError, match="not listed as yours"):
        frozen.freeze(copy)
    assert not (copy / ".lock").exists()
    assert resumed(copy, digits_in(refused))[0] == "-m"


def test_code_that_changed_after_it_was_trusted_is_refused(own: Path) -> None:
    other_code(own)
    with pytest.raises(UserError) as refused:
        resumed(own)
    extra_file(own)
    with pytest.raises(UserError, match="nor is it what trust=… names"):
        resumed(own, digits_in(refused))


@pytest.mark.parametrize("key", ["jobs", "varied", "kind"])
def test_trust_covers_the_list_of_jobs(own: Path, key: str) -> None:
    edit(own, seal=None)
    with pytest.raises(UserError) as refused:
        resumed(own)
    evil = {"number": 0, "identity": "x", "swept": {}, "folder": "0", "overrides": ["loss=evil"]}
    edit(own, **{key: {"jobs": [evil], "varied": ["loss"], "kind": "search"}[key]})
    with pytest.raises(UserError, match="nor is it what trust=… names"):
        resumed(own, digits_in(refused))


@pytest.mark.parametrize("digits", ["", "yes", "0123456789a", "0123456789ag", "0" * 65])
def test_trust_names_contents_by_their_digits(own: Path, digits: str) -> None:
    with pytest.raises(UserError, match="give the 12 digits"):
        resumed(own, f"trust={digits}")


def test_a_sweep_that_was_moved_or_renamed_stays_its_users(own: Path) -> None:
    (own.parent / "elsewhere").mkdir()
    moved = own.rename(own.parent / "elsewhere" / "renamed")
    link = own.parent / "latest"
    link.symlink_to(moved)
    assert resumed(moved) and resumed(link)
    with frozen.claim(moved, "digits", [], "auto"):
        assert frozen.freeze(moved)[0] == moved / "code"
    ledger.write(moved, complete=True)  # as a job that ends on another machine does
    assert resumed(moved)


def test_a_link_names_the_folder_that_it_leads_to(own: Path) -> None:
    foreign = Path(shutil.copytree(own, own.parent / "foreign"))
    other_code(foreign)
    (own.parent / "latest").symlink_to(foreign)
    with pytest.raises(UserError, match="not listed as yours"):
        resumed(own.parent / "latest")


@pytest.mark.parametrize("what", ["file", "folder", "code", "pipe"])
def test_code_with_a_link_or_a_special_file_is_never_run(own: Path, what: str) -> None:
    elsewhere = own.parent / "elsewhere"
    elsewhere.mkdir()
    if what == "code":
        (own / "code").rename(elsewhere / "code")
        (own / "code").symlink_to(elsewhere / "code")
    elif what == "pipe":
        os.mkfifo(own / "code" / "pipe")
    else:
        (own / "code" / "linked").symlink_to(elsewhere if what == "folder" else "/etc/hostname")
    with pytest.raises(UserError, match=r"not run|without its own code"):
        resumed(own)


def test_pythons_caches_are_not_used(own: Path, tmp_path: Path) -> None:
    """A cache that is not checked against its source would run instead of it."""
    code = own / "code"
    (code / "scripts" / "helper.py").write_text("x = 1\n")
    (tmp_path / "evil.py").write_text("raise SystemExit('executed')\n")
    entry = ownership.enter(ownership.digest_of_code(code, ""))
    ledger.write(own, id=entry.id)
    cached = code / "scripts" / "__pycache__" / f"helper.{sys.implementation.cache_tag}.pyc"
    mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
    py_compile.compile(str(tmp_path / "evil.py"), cfile=str(cached), invalidation_mode=mode)
    run = [sys.executable, "-c", "import helper"]
    executed = subprocess.run(run, cwd=code / "scripts", capture_output=True, text=True)
    assert "executed" in executed.stderr  # the negative control
    assert frozen.freeze(own) == (code, entry.id)
    subprocess.run(run, cwd=code / "scripts", check=True)


def test_a_sweep_without_its_code_gets_no_other(own: Path) -> None:
    shutil.rmtree(own / "code")
    for start in (resumed, frozen.freeze):
        with pytest.raises(UserError, match="other code never takes its place"):
            start(own)
    assert not (own / "code").exists()


def test_code_alone_is_run_only_if_it_is_the_users(own: Path) -> None:
    """As left by a start that was killed before it planned a job."""
    (own / "sweep.json").unlink()
    (own / ".lock").touch()
    with frozen.claim(own, "digits", [], "auto"):
        assert frozen.freeze(own)[0] == own / "code"
    other_code(own)
    with pytest.raises(UserError, match="not listed as yours"):
        frozen.claim(own, "digits", [], "auto")


def test_a_command_does_not_pick_up_a_foreign_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = sweep_in(Path("outputs", "digits", "sweeps", "2026-11-26_10-00-00-abcd"))
    with frozen.claim(None, "digits", ["seed=0,1"], "auto") as lock:
        assert lock.folder == folder
    other_code(folder)
    with pytest.raises(UserError, match="To start another sweep instead: resume=never"):
        frozen.claim(None, "digits", ["seed=0,1"], "auto")
    with frozen.claim(None, "digits", ["seed=0,1"], "never") as lock:
        assert lock.folder != folder


def test_a_trusted_sweep_becomes_the_users(own: Path, tmp_path: Path) -> None:
    other_code(own)
    with pytest.raises(UserError) as refused:
        resumed(own)
    resumed(own, digits_in(refused))
    identity = frozen.freeze(own)[1]
    ownership._trusted.clear()
    assert ownership.find(identity) is not None and resumed(own)
    assert ownership.trust_of(own) == []


def test_code_that_seals_nothing_is_trusted_each_time(
    own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its next write would break the seal, and the printed command would lack `trust=…`."""
    (own / frozen.ledger.CODE / "src" / "regrow" / "ownership.py").unlink()
    with pytest.raises(UserError) as refused:
        resumed(own)
    resumed(own, digits_in(refused))
    assert frozen.freeze(own)[1] == ""
    assert "will need trust=… again" in capsys.readouterr().err
    assert ownership.trust_of(own) == [digits_in(refused)]


@pytest.mark.slow
def test_a_sweep_of_keys_that_conf_lacks_by_now_resumes_with_its_own_code(tmp_path: Path) -> None:
    folder = sweep_in(tmp_path / "sweep")
    overrides = ["task.mode=max", "seed=0,1"]  # from 8483121, removed since
    ledger.write(folder, overrides=overrides)
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), "resume=sweep"]
    done = forked.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert (folder / "code" / "scripts" / "executed").exists()


def test_a_trusted_sweep_with_a_link_out_of_it_is_refused(own: Path, tmp_path: Path) -> None:
    other_code(own)
    (own / "logs").mkdir()
    (own / "logs" / "0.log").symlink_to(tmp_path / "profile")
    with pytest.raises(UserError) as refused:
        resumed(own)
    with pytest.raises(UserError, match="a link that leads out"):
        resumed(own, digits_in(refused))


@pytest.mark.parametrize("content", ["[]", "{", "3", '{"overrides": 3, "jobs": {"a": 1}}'])
def test_a_file_that_is_not_a_sweeps_record_is_an_error_of_one_line(
    own: Path, content: str
) -> None:
    (own / "sweep.json").write_text(content)
    with pytest.raises(UserError) as refused:
        resumed(own)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "job",
    [
        {"folder": "../../elsewhere"}, {"folder": "/tmp"}, {"number": "../x"}, {"swept": [1]},
        {"overrides": [1]}, {"more": 1},
    ],
    ids=str,
)  # fmt: skip
def test_a_list_of_jobs_reaches_nothing_outside(own: Path, job: dict[str, Any]) -> None:
    whole = {"number": 0, "identity": "x", "swept": {}, "folder": "0", "overrides": []}
    edit(own, jobs=[{**whole, **job}])
    with pytest.raises(UserError, match="not a job of this folder"):
        ledger.entries(own)


def test_the_real_command_runs_foreign_code_only_if_it_is_trusted(own: Path) -> None:
    other_code(own)
    executed = own / "code" / "scripts" / "executed"

    def train(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "scripts" / "train.py"), *arguments]
        return forked.run(command, cwd=own.parent, capture_output=True, text=True, timeout=200)

    done = train("resume=sweep")
    assert done.returncode == 2 and not executed.exists()
    (line,) = done.stderr.splitlines()
    (trust,) = [word for word in line.split() if word.startswith("trust=")]
    done = train("-m", "hydra.sweep.dir=sweep", "seed=0,1")
    assert done.returncode == 2 and not executed.exists() and trust in done.stderr
    done = train("resume=sweep", trust)  # the negative control
    assert done.returncode == 0 and executed.exists(), done.stderr


# -- runs ------------------------------------------------------------------------------------------


def run_in(folder: Path, *overrides: str) -> Path:
    """A minimal run folder of this user's for `resume=`."""
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(list(overrides)))
    ownership.enter_run(folder, overrides, None)
    return folder


def loggers_in(arguments: list[str]) -> list[str]:
    return [a for a in arguments if a.lstrip("+").startswith("logger")]


WANDB = ("seed=1", "logger=[csv,wandb]", "logger.wandb.entity=somebody", "+logger.x._target_=os.y")


def test_loggers_of_a_foreign_run_are_left_out_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_in(tmp_path / "run", *WANDB)
    assert [*WANDB] == resumed(folder)[:4]
    assert capsys.readouterr().err == ""
    foreign = Path(shutil.copytree(folder, tmp_path / "foreign"))
    recorded = foreign / ".hydra" / "overrides.yaml"
    recorded.write_text(recorded.read_text().replace("somebody", "attacker"))
    arguments = resumed(foreign, "notes=mine")
    assert arguments[0] == "seed=1" and not loggers_in(arguments)
    (line,) = capsys.readouterr().err.splitlines()
    assert "logger.wandb.entity=attacker" in line
    assert len(loggers_in(resumed(foreign, line.split()[-1]))) == 3  # trusted
    assert "logger=[csv]" in resumed(foreign, "logger=[csv]")  # typed


def test_a_search_path_put_into_the_users_own_run_is_not_followed(tmp_path: Path) -> None:
    folder = run_in(tmp_path / "run", "seed=1")
    source = {**flags.DEFAULT, "dir": str(tmp_path / "evil")}
    (folder / "manifest.json").write_text(json.dumps({"config": source}))
    with pytest.raises(UserError, match=r"by itself.*--config-dir"):
        resumed(folder)
    ownership.enter_run(folder, ["seed=1", *flags.followed_places(source)], None)
    assert "--config-dir" in resumed(folder)  # the negative control


def test_a_run_that_is_killed_between_its_seal_and_its_overrides_stays_its_users(
    tmp_path: Path,
) -> None:
    folder = run_in(tmp_path / "run", "seed=1")
    ownership.enter_run(folder, ["seed=1", "notes=more"], None)
    assert ownership.is_own_run(folder, ["seed=1"])
    assert ownership.is_own_run(folder, ["seed=1", "notes=more"])
    assert not ownership.is_own_run(folder, ["seed=2"])
    held = json.loads((folder / ownership.OWNER).read_text())
    (folder / ownership.OWNER).write_text(json.dumps({**held, "seals": ["\u00e9"]}))
    assert not ownership.is_own_run(folder, ["seed=1"])


def test_a_run_of_this_command_is_the_users_and_stays_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    launched("trainer.max_epochs=1", "hydra.run.dir=run")
    assert foreign.is_own(Path("run"))
    Path("run").rename("moved")
    launched("trainer.max_epochs=2", "hydra.run.dir=moved", "notes=more")
    assert foreign.is_own(Path("moved"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another user"))
    assert not foreign.is_own(Path("moved"))


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoints", "train.log", ".lock", "plots"])
def test_nothing_is_written_through_a_link_of_a_foreign_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    victim = Path("victim")
    if name in ("checkpoints", "plots"):
        victim.mkdir()
        (victim / "step_00000001").mkdir()
    else:
        victim.write_text("mine")
    Path("run").mkdir()
    Path("run", name).symlink_to(victim.resolve())
    with pytest.raises(SystemExit):
        launched("trainer.max_epochs=1", "hydra.run.dir=run")
    assert [*Path("run").iterdir()] == [Path("run", name)]
    if victim.is_dir():
        assert [path.name for path in victim.iterdir()] == ["step_00000001"]
    else:
        assert victim.read_text() == "mine"


def test_a_link_is_made_below_outputs_alone(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    records.link_latest(tmp_path / "run", tmp_path / "outputs" / "..")
    assert not (tmp_path / "latest").is_symlink()


def test_a_foreign_run_does_not_say_where_data_is_downloaded_to(tmp_path: Path) -> None:
    folder = run_in(tmp_path / "run", "data=mnist", "data.root=/somewhere")
    place = {"root": "/somewhere"}
    config = {"data": {"source": {"download": True, **place}, **place}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert "data.source.download=false" not in resumed(folder)
    (folder / ".hydra" / "owner.json").unlink()
    assert "data.source.download=false" in resumed(folder)
    assert "data.source.download=false" not in resumed(folder, "data.root=/mine")


def test_a_config_folder_of_the_users_names_targets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as a function that returns a model, which is of no known kind."""
    monkeypatch.setattr(sys, "argv", ["train.py"])
    mine = tmp_path / "mine" / "model"
    mine.mkdir(parents=True)
    (mine / "made.yaml").write_text("_target_: lab.create_model\n")
    folder = run_in(tmp_path / "run", "model=made")

    def check() -> None:
        places = foreign.places_of(folder)
        roles.check_roles(
            {"model": {"_target_": "lab.create_model"}}, ("model",), folder, "run", others=places
        )

    monkeypatch.setattr(roles, "is_apart", lambda target, folder: True)
    monkeypatch.setattr(roles, "locate", lambda target, path: check)
    record = {"config": {**flags.DEFAULT, "dir": str(mine.parent)}}
    (folder / "manifest.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="no file in conf/model names"):
        check()  # nothing marks the place as the user's
    monkeypatch.setattr(sys, "argv", ["train.py", "--config-dir", str(mine.parent)])
    check()
    monkeypatch.setattr(sys, "argv", ["train.py"])
    ownership.enter_run(folder, recorded.followed(folder), None)
    check()
    with pytest.raises(UserError, match="no file in conf/loss names"):
        roles.check_roles(
            {"loss": {"_target_": "lab.create_model"}},
            ("loss",),
            folder,
            "run",
            others=[mine.parent],
        )


def test_a_foreign_record_that_hides_its_download_is_refused(tmp_path: Path) -> None:
    folder = run_in(tmp_path / "run", "data=mnist", "data.source.root=evil")
    (folder / "config.yaml").write_text(yaml.safe_dump({"data": {"source": {}}}))

    def check(*more: str) -> None:
        overrides = ["data=mnist", "data.source.root=evil", f"resume={folder}", *more]
        foreign.check_recorded(config_of(*overrides), overrides)

    check()  # the user's own
    (folder / ".hydra" / "owner.json").unlink()
    for typed in ((), ("data.root=mine",)):  # data.source.root does not follow it
        with pytest.raises(UserError, match="would download data to evil") as error:
            check(*typed)
    check("data.source.download=false")
    check("data.source.root=mine")
    resumed(folder, digits_in(error))
    check()


def test_a_foreign_record_names_no_server_to_read_from(tmp_path: Path) -> None:
    place = ["data.source.root=http://evil/x", "data.source.cache=/victim"]
    folder = run_in(tmp_path / "run", "data=shards", *place)
    source = {"root": "http://evil/x", "cache": "/victim"}
    config = {"data": {"root": None, "source": source}}
    foreign.refuse_remote(folder, "run", config, [])  # the user's own
    local = {"data": {"root": "x", "source": {**source, "root": "x"}}}
    (folder / ".hydra" / "owner.json").unlink()
    foreign.refuse_remote(folder, "run", local, [])
    for typed in ([], ["source.root"], ["data.source.cache"], ["data.root"]):
        with pytest.raises(UserError, match="it would read data from http://evil/x and keep it"):
            foreign.refuse_remote(folder, "run", config, typed)
    foreign.refuse_remote(folder, "run", config, iter(["data.source.root", "source.cache"]))


def test_a_foreign_record_names_no_folder_for_resized_images(tmp_path: Path) -> None:
    typed = ["data.root=x", "data.cache_root=/victim"]
    folder = run_in(tmp_path / "run", "data=resized_folder", *typed)
    config: dict[str, Any] = {"data": {"root": "x", "cache": "resized", "cache_root": "/victim"}}
    foreign.refuse_remote(folder, "run", config, [])  # the user's own
    other = {"data": {**config["data"], "cache_root": "/other"}}  # config.yaml has no seal
    with pytest.raises(UserError, match="it would keep resized images in /other"):
        foreign.refuse_remote(folder, "run", other, [])
    (folder / ".hydra" / "owner.json").unlink()
    with pytest.raises(UserError, match=r"in /victim, .*data\.cache=null"):
        foreign.refuse_remote(folder, "run", config, ["data.root"])
    foreign.refuse_remote(folder, "run", config, ["data.cache_root"])
    for safe in ({"cache": None}, {"cache_root": None}):
        foreign.refuse_remote(folder, "run", {"data": {**config["data"], **safe}}, [])


def test_a_foreign_record_hides_no_server_deeper_in_its_data(tmp_path: Path) -> None:
    folder = run_in(tmp_path / "run", "data=shards", "data.source.root=x")
    inner = {"root": "http://evil/x", "cache": "/victim"}
    for source, key in (
        ({"root": "x", "inner": inner}, "source.inner"),
        ({"root": "x", "parts": [{}, inner]}, "source.parts.1"),
    ):
        config = {"data": {"root": None, "source": source}}
        for typed in ([], ["data.source.root"], ["root"], [f"data.{key}.root"]):
            with pytest.raises(UserError, match=f"from http://evil/x.*Add data.{key}.root="):
                foreign.refuse_remote(folder, "run", config, typed)
        foreign.refuse_remote(folder, "run", config, [f"data.{key}.root", f"{key}.cache"])
    # The user's own record typed it.
    typed = ["+data.source.inner.root=http://evil/x", "+data.source.inner.cache=/victim"]
    folder = run_in(tmp_path / "own", "data=shards", "data.source.root=x", *typed)
    config = {"data": {"root": None, "source": {"root": "x", "inner": inner}}}
    foreign.refuse_remote(folder, "run", config, [])
    (folder / ".hydra" / "owner.json").unlink()
    with pytest.raises(UserError, match="from http://evil/x"):
        foreign.refuse_remote(folder, "run", config, [])


def test_the_class_names_of_a_foreign_run_are_not_asked_of_its_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = ("data=shards", "data.num_classes=2", "data.root=http://evil/x")
    folder = run_in(tmp_path / "run", *place)
    config: dict[str, Any] = config_of(*place)
    read = []

    def instantiated(node: Any) -> Any:
        read.append(node)
        raise UserError("read")

    monkeypatch.setattr(loaded, "instantiate", instantiated)
    assert loaded._names_in(config, folder, []) is None
    assert len(read) == 1  # the user's own
    (folder / ".hydra" / "owner.json").unlink()
    assert loaded._names_in(config, folder, []) is None
    assert len(read) == 1
    assert loaded._names_in(config, folder, ["data.root"]) is None
    assert len(read) == 2


# -- the list --------------------------------------------------------------------------------------


def test_the_list_is_for_its_user_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    entry = ownership.enter("c" * 64)
    folder = tmp_path / "state" / "regrow"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
    assert (folder / "folders").read_text() == f"{entry.id} {'c' * 64} {entry.key}\n"
    folder.chmod(0o777)  # someone else may have written there
    assert ownership.find(entry.id) is None
    with pytest.raises(PermissionError):
        ownership.enter()


@pytest.mark.parametrize("how", ["a file", "a link that leads nowhere", "no home"])
def test_a_run_without_the_list_works_and_says_what_follows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    monkeypatch.setattr(logging.getLogger("regrow"), "propagate", True)
    if how == "no home":
        monkeypatch.delenv("XDG_STATE_HOME")
        monkeypatch.delenv("HOME")
        monkeypatch.setattr("os.path.expanduser", lambda path: path)
    else:
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
        if how == "a file":
            (tmp_path / "state").touch()
        else:
            (tmp_path / "state").symlink_to(tmp_path / "nowhere" / "x")
    folder = run_in(tmp_path / "run", "logger=[csv]")
    (line,) = {record.getMessage() for record in caplog.records}
    assert "could not be listed as yours" in line and "\n" not in line
    assert "logger=[csv]" not in resumed(folder)
    assert "logger=[csv]" in resumed(folder, line.split()[-1])


def test_a_sweep_without_the_list_is_resumed_by_the_command_that_it_prints(
    own: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another"))
    edit(own, kind="search")
    (trust,) = ownership.trust_of(own)
    with pytest.raises(UserError) as refused:
        resumed(own)
    assert digits_in(refused) == trust
    ledger.add(own, ledger.JobEntry(1, "y", {"seed": "1"}, "1", ["seed=1"]))  # as a search does
    ledger.write(own, complete=False)
    assert resumed(own, trust)


def test_the_list_does_not_grow_without_end(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(ownership, "MOST_BYTES", 20 * 100)
    entered = [ownership.enter() for _ in range(100)]
    assert (tmp_path / "regrow" / "folders").stat().st_size <= 20 * 100
    assert stat.S_IMODE((tmp_path / "regrow" / "folders").stat().st_mode) == 0o600
    assert ownership.entries()[-5:] == entered[-5:]


def test_an_entry_that_a_full_disk_has_torn_takes_no_other_with_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    first = ownership.enter()
    write = os.write
    with monkeypatch.context() as full:
        full.setattr(os, "write", lambda file, line: write(file, line[:40]))
        with pytest.raises(OSError, match="No space left"):
            ownership.enter()
    second = ownership.enter()
    assert [ownership.find(one.id) for one in (first, second)] == [first, second]


def test_several_may_write_the_list_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    entered: list[ownership.ListedFolder] = []
    threads = [
        threading.Thread(target=lambda: entered.extend(ownership.enter() for _ in range(20)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {*ownership.entries()} == {*entered} and len(entered) == 160


# -- the terminal ----------------------------------------------------------------------------------

ESCAPE = "\x1b]0;title\x07\x1b[2J\u202egnp.exe\x9b1m\rover"


def test_a_terminal_gets_no_orders(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run = run_in(tmp_path / "run", f"logger.wandb.entity={ESCAPE}")
    (run / ".hydra" / "owner.json").unlink()
    resumed(run)
    with console.console(), console.log_file(tmp_path):
        logging.getLogger("regrow").warning("%s", ESCAPE)
    with pytest.raises(SystemExit):
        fail(ESCAPE)
    said = capsys.readouterr()
    for text in (said.out + said.err, (tmp_path / "train.log").read_text()):
        assert r"\x1b[2J" in text and r"\u202e" in text and "gnp.exe" in text
        assert not {*"\x1b\x07\x9b\u202e\r"} & {*text}
    assert printable("Ünïcode, 日本\n\t≥ 1 😀") == "Ünïcode, 日本\n\t≥ 1 😀"


def test_wandbs_own_links_do_not_stop_a_resume(tmp_path: Path) -> None:
    folder = run_in(tmp_path / "run", "seed=1")
    logs = folder / "wandb" / "offline-run-1" / "logs"
    logs.mkdir(parents=True)
    (logs / "debug-core.log").symlink_to(tmp_path / "cache.log")
    records.refuse_links(folder, "hydra.run.dir=run")
    (folder / "checkpoints").symlink_to(tmp_path)  # the negative control
    with pytest.raises(UserError, match=r"checkpoints is a link .* add trust=[0-9a-f]{12}$"):
        records.refuse_links(folder, "hydra.run.dir=run", way_out=foreign.if_trusted(folder))
