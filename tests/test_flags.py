"""The config that a command composes, its name and location, is part of a run's identity."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from forked import run_script as run
from running import TINY

from regrow.config import flags
from regrow.config.yaml_files import read_yaml
from regrow.errors import UserError
from regrow.project import ROOT
from regrow.record.records import read_json, write_json, write_text
from regrow.sweep import frozen

SMALL = (*TINY, "trainer.max_steps=2", "trainer.progress_bar=false")
MINE = "defaults:\n  - train\n  - _self_\nnotes: mine\n"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a custom config, outside of `conf/`."""
    write_text_in(tmp_path / "D" / "mytrain.yaml", MINE)
    write_text_in(tmp_path / "D" / "model" / "wide.yaml", "defaults: [mlp]\nhidden: [99]\n")
    return tmp_path


def write_text_in(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)


def test_flags_go_first_each_with_its_value(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["a=1", "-m", "b=2", "-cn", "mytrain", "c=3", "--config-dir=D", "--cfg", "job"]
    first = ["-m", "--config-name", "mytrain", "--config-dir", "D", "--cfg", "job"]
    assert flags.split(arguments) == (first, ["a=1", "b=2", "c=3"])
    found = flags.absolute([*arguments, "hydra.searchpath=[E,pkg://x.y]"])
    assert found[4] == str(tmp_path / "D")
    assert found[-1] == f'hydra.searchpath=["file://{tmp_path}/E","pkg://x.y"]'
    assert flags.absolute(found) == found
    assert flags.typed(found) == {
        "name": "mytrain", "dir": f"{tmp_path}/D", "searchpath": [f"file://{tmp_path}/E", "pkg://x.y"]
    }  # fmt: skip
    path = flags.absolute(["--config-path", "../conf"])[1]
    assert Path(path) == ROOT / "conf"  # relative to the script, as in Hydra


def test_a_source_is_typed_as_it_was_recorded(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    source = {"name": "mine", "path": None, "dir": f"{tmp_path}/D (1)", "searchpath": ["pkg://x.y"]}
    words = flags.arguments_of(source)
    assert words[:4] == ["--config-name", "mine", "--config-dir", "D (1)"]
    assert {**flags.DEFAULT, **flags.typed(flags.absolute(words))} == source
    assert flags.arguments_of(None) == flags.arguments_of(flags.DEFAULT) == []


def test_the_folder_in_an_advice_is_quoted_for_the_shell(place: Path) -> None:
    (place / "D").rename(place / "my D")
    advice = "--config-dir 'my D'"
    given = ("-cn", "my D/mytrain.yaml")
    assert f"Use {advice} --config-name mytrain\n" in run(place, *given, code=2)
    assert f"To add a folder to conf/: {advice}\n" in run(place, "-cp", "my D", code=2)
    given = ("-cn", "mytrain", "hydra.searchpath=[my D]")
    assert f"Use --config-dir '{place}/my D'\n" in run(place, *given, code=2)


def test_a_folder_adds_no_search_path_by_itself(tmp_path: Path) -> None:
    for key, value in {"dir": "/evil", "path": "/evil", "searchpath": ["file:///evil"]}.items():
        source = {**flags.DEFAULT, key: value}
        with pytest.raises(UserError, match=r"by itself. If you trust them, add: .*/evil"):
            flags.followed("resume=x", source, {}, is_own=False)
        assert flags.followed("resume=x", source, {}, is_own=True) == source
        assert flags.followed("resume=x", source, {key: "/new"}, is_own=False)[key] == "/new"
    with pytest.raises(UserError, match="started with --config-name mine, and this says"):
        flags.followed("x", {**flags.DEFAULT, "name": "mine"}, {"name": "train"}, is_own=True)


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a b", "", None, ["a"], "a\nb"])
def test_a_record_that_names_no_config_is_refused(name: object, tmp_path: Path) -> None:
    write_json(tmp_path / "manifest.json", {"config": {**flags.DEFAULT, "name": name}})
    with pytest.raises(UserError, match="names a config that no run has"):
        flags.recorded(tmp_path)


def test_a_record_from_before_the_source_was_in_it_is_read_from_what_hydra_composed(
    tmp_path: Path,
) -> None:
    assert flags.recorded(tmp_path) == flags.DEFAULT
    text = (
        "job: {config_name: mine}\n"
        "runtime: {config_sources: [{provider: command-line, path: /D, schema: file}]}\n"
    )
    write_text_in(tmp_path / ".hydra" / "hydra.yaml", text)
    assert flags.recorded(tmp_path) == {**flags.DEFAULT, "name": "mine", "dir": "/D"}


@pytest.mark.slow
def test_a_run_of_another_primary_config_resumes_by_its_printed_command(place: Path) -> None:
    said = run(
        place, *SMALL, "-cn", "mytrain", "model=wide", "--config-dir", "D", "hydra.run.dir=r"
    )
    assert read_json(place / "r" / "manifest.json")["config"] == {
        "name": "mytrain", "path": None, "dir": f"{place}/D", "searchpath": []
    }  # fmt: skip
    longer = re.findall(r"next: +python \S+ (.*)", said)[0]
    assert "resuming from step 2" in run(place, *shlex.split(longer))
    said = run(place, "resume=r", "--config-name", "train", "--config-dir", "D", code=2)
    assert "it was started with --config-name mytrain" in said


@pytest.mark.nightly
@pytest.mark.slow
def test_a_search_path_is_passed_on_to_the_second_run(place: Path) -> None:
    run(place, *SMALL, "hydra.searchpath=[D]", "model=wide", "hydra.run.dir=r")
    said = run(place, "run=r", "searchpath=[D]", script="reproduce.py")
    assert "identical: " in said
    run(place, *SMALL, "-cn", "mytrain", "--config-dir", "D", "hydra.run.dir=s")
    assert "identical: " in run(place, "run=s", "config_dir=D", script="reproduce.py")


@pytest.mark.nightly
@pytest.mark.slow
def test_another_primary_config_takes_over_no_sweep(place: Path) -> None:
    mine = ("-cn", "mytrain", "--config-dir", "D")
    run(place, "-m", *SMALL, *mine, "seed=0,1", "hydra.sweep.dir=s")
    said = run(place, "-m", *SMALL, "seed=0,1", "hydra.sweep.dir=s", code=2)
    assert "s holds a sweep with another config or search path" in said
    said = run(place, "-m", "resume=s", "seed=0,1,2", *mine)
    assert "all      3" in said
    said = run(place, "-m", "resume=s", "--config-name", "train", code=2)
    assert "it was started with --config-name mytrain" in said
    # An interrupted sweep with one config is not taken over by the same command with another.
    (sweep,) = [place / "s"]
    content = {**read_json(sweep / "sweep.json"), "complete": False}
    write_json(sweep / "sweep.json", content)
    from regrow.sweep import ledger

    source = {**flags.DEFAULT, "name": "mytrain", "dir": f"{place}/D"}
    assert ledger.is_open(sweep, content["overrides"], source)
    assert not ledger.is_open(sweep, content["overrides"])


def test_a_frozen_copy_holds_the_folders_of_a_config(place: Path) -> None:
    write_text_in(place / "E" / "data" / "mine.yaml", "root: E\n")
    (place / "D" / "weights.bin").touch()
    source = {**flags.DEFAULT, "name": "mytrain", "dir": f"{place}/D"}
    source["searchpath"] = ["pkg://some.package", f"file://{place}/E"]
    code = place / "code"
    frozen.copy_places(source, code / flags.COPIES)
    assert flags.copied_source(code) == source and flags.copied_source(place) is None
    copy = flags.in_copy(source, code)
    assert copy["searchpath"][0] == "pkg://some.package"
    assert flags.in_copy(copy, code) == copy
    found = [Path(copy["dir"]), Path(copy["searchpath"][1].removeprefix("file://"))]
    assert {path.name for folder in found for path in folder.rglob("*") if path.is_file()} == {
        "mytrain.yaml", "wide.yaml", "mine.yaml"
    }  # fmt: skip
    frozen.copy_places(flags.DEFAULT, place / "none")
    assert not (place / "none").exists()


def test_a_frozen_copy_within_a_config_folder_holds_neither_itself_nor_records(place: Path) -> None:
    """The folder may be the current one, where the runs are too."""
    write_text_in(place / "outputs" / "run" / "manifest.json", "{}")
    write_text_in(place / "outputs" / "run" / "config.yaml", "seed: 0\n")
    copies = place / "outputs" / "sweep" / ".code" / flags.COPIES
    frozen.copy_places({**flags.DEFAULT, "dir": str(place)}, copies)
    found = [path.relative_to(copies / "dir") for path in copies.rglob("*.yaml")]
    assert sorted(map(str, found)) == ["D/model/wide.yaml", "D/mytrain.yaml"]


NARROW = tuple(one for one in SMALL if not one.startswith("model."))


@pytest.mark.nightly
@pytest.mark.slow
def test_an_edit_of_a_config_folder_changes_no_later_job_of_a_sweep(place: Path) -> None:
    mine = ("-cn", "mytrain", "--config-dir", "D", "model=wide")
    run(place, "-m", *NARROW, *mine, "seed=0", "hydra.sweep.dir=s")
    write_text_in(place / "D" / "model" / "wide.yaml", "defaults: [mlp]\nhidden: [7]\n")
    run(place, "-m", "resume=s", "seed=0,1")
    shutil.rmtree(place / "D")
    assert "all      3" in run(place, "-m", "resume=s", "seed=0,1,2")
    for number in "012":
        config = read_yaml(place / "s" / number / "config.yaml")
        assert (config["model"]["hidden"], config["notes"]) == ([99], "mine")
    assert read_json(place / "s" / "sweep.json")["config"]["dir"] == f"{place}/D"


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("subdir", "names"),
    [
        ("${hydra.job.override_dirname}", {"optimizer.lr=0.1", "optimizer.lr=0.2"}),
        ("${hydra.job.num}_${optimizer.lr}", {"0_0.1", "1_0.2"}),
    ],
)
@pytest.mark.slow
def test_a_jobs_folder_may_be_named_by_its_overrides(
    subdir: str, names: set[str], tmp_path: Path
) -> None:
    run(tmp_path, "-m", "debug=fast", "optimizer.lr=0.1,0.2", "hydra.sweep.dir=s",
        f"hydra.sweep.subdir={subdir}")  # fmt: skip
    found = (tmp_path / "s").rglob("summary.json")
    jobs = {str(path.parent.relative_to(tmp_path / "s")) for path in found}
    assert len(jobs) == 2
    for name in names:
        assert any(name in job for job in jobs)
    run(tmp_path, "-m", "resume=s")  # with no jobs left
