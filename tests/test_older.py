"""Runs that an earlier version recorded keep their meaning: see tests/older/README.md."""

from __future__ import annotations

import inspect
import json
import logging
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from finished import process, script
from running import CPU, as_hydra_has_it, composed, config_of, metrics_of

from lab import added, build
from regrow import project, protocols
from regrow.checkpoint import writer
from regrow.config import older, places, resume, resumed_config
from regrow.config.check import shipped_node
from regrow.config.job import job_of
from regrow.config.older import AddedKey
from regrow.config.yaml_files import read_yaml
from regrow.errors import UserError
from regrow.load import load_run
from regrow.record import moved
from regrow.record.records import read_json
from regrow.runs import training
from regrow.runs.session import run_job

RECORDS = Path(__file__).parent / "older"
RUNS = ("averages", "images", "regression")
KEPT = "is older than these keys or their defaults, and keeps what the code did then"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the folder that the runs were started in, as the current folder."""
    shutil.copytree(RECORDS, tmp_path / "older", symlinks=True)
    monkeypatch.chdir(tmp_path / "older")
    monkeypatch.setattr(training, "draw", lambda folder: None)
    return Path()


def train(*overrides: str) -> None:
    """Run a command line of train.py in this process."""
    config = composed(*resume.expand(overrides))
    folder = Path(config.hydra.run.dir).resolve()
    job = job_of(as_hydra_has_it(config), folder, ["python", "scripts/train.py"])
    torch.set_num_threads(1)
    run_job(job, CPU)


def assert_close(found: Any, expected: Any, where: str = "") -> None:
    """Equal up to rounding: other processors have other kernels, and so other last bits."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_close(found[key], value, f"{where}/{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), where
        for index, value in enumerate(expected):
            assert_close(found[index], value, f"{where}/{index}")
    elif isinstance(expected, torch.Tensor):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, msg=where)
    elif isinstance(expected, float) and not math.isnan(expected):
        assert math.isclose(found, expected, rel_tol=1e-4, abs_tol=1e-6), (where, found, expected)
    else:
        assert repr(found) == repr(expected), where


def assert_same_run(found: Path, expected: Path) -> None:
    """Check that a run ended like the uninterrupted run of that time."""
    assert_close(metrics_of(found), metrics_of(expected))
    told, was = (read_json(folder / "summary.json") for folder in (found, expected))
    for key in ("status", "steps", "epochs", "best", "val", "test"):
        assert_close(told[key], was[key], key)
    for name in ("last", "best"):
        (parts, _), (before, _) = (
            writer.load(writer.named(folder / "checkpoints", name)) for folder in (found, expected)
        )
        for part in before.keys() - {"progress", "optimizer"}:
            assert_close(parts[part], before[part], f"{name}/{part}")
        assert_close(parts["optimizer"]["state"], before["optimizer"]["state"], name)


def recorded(folder: Path) -> dict[str, Any]:
    """Return a record's config, its targets named as they are today."""
    return moved.in_config(read_yaml(folder / "config.yaml"))


@pytest.mark.parametrize("name", RUNS)
def test_a_killed_run_resumes_to_the_same_end(
    name: str, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    before = recorded(Path(name))
    added = older.complete(before)
    train(f"resume={name}")
    assert_same_run(Path(name), Path("whole", name))
    now = recorded(Path(name))
    assert resumed_config.differences(before, now).keys() <= {"resume"}
    assert resumed_config.lacked_before(Path(name)) == [*added]
    changing = [record.message for record in caplog.records if KEPT in record.message]
    assert len(changing) <= 1
    for key in added:  # only a difference from today's default is logged
        value = now
        for part in key.split("."):
            value = value[part]
        assert value == added[key]


@pytest.mark.parametrize("name", RUNS)
def test_the_numbers_of_the_uninterrupted_run_are_those_of_the_killed_one(name: str) -> None:
    """A control of the records: they are one run, killed and not killed."""
    killed, whole = metrics_of(RECORDS / name), metrics_of(RECORDS / "whole" / name)
    assert 0 < len(killed) < len(whole)
    assert_close(killed, whole[: len(killed)])


@pytest.mark.parametrize("name", RUNS)
def test_it_is_evaluated_as_it_was(
    name: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path("whole", name)
    script("evaluate").main([f"run={run}", "split=test", "output=numbers.json"])
    said = capsys.readouterr().out
    assert "The run itself measured the same" in said
    assert_close(read_json(Path("numbers.json"))["values"], read_json(run / "summary.json")["test"])
    assert said.count(KEPT) == bool(older.complete(recorded(run)))


@pytest.mark.parametrize("name", RUNS)
def test_it_predicts(name: str, root: Path) -> None:
    source = {"images": "photos", "regression": "table.csv", "averages": "inputs.npy"}[name]
    rng = np.random.default_rng(0)
    np.save("inputs.npy", rng.standard_normal((5, 6)).astype(np.float32))
    script("predict").main([f"run=whole/{name}", f"input={source}", "output=predictions.csv"])
    assert len(Path("predictions.csv").read_text().splitlines()) > 5
    run = load_run(f"whole/{name}")
    best = read_json(Path("whole", name, "summary.json"))["best"]["step"]
    assert run.step == best


@pytest.mark.slow  # an uninterrupted run in its own process
@pytest.mark.parametrize(
    "name",
    [
        name if name == "averages" else pytest.param(name, marks=pytest.mark.nightly)
        for name in RUNS
    ],
)
def test_it_is_reproduced(name: str, root: Path) -> None:
    done = process("reproduce", f"run=whole/{name}", folder=Path.cwd())
    (again,) = Path("outputs", name, "reproduced").iterdir()
    assert_same_run(again, Path("whole", name))
    same_bits = "not identical: " not in done.stdout
    assert done.returncode == (0 if same_bits else 1), done.stderr
    assert done.stdout.count(KEPT) == bool(older.complete(recorded(Path("whole", name))))


def test_a_recorded_override_gets_the_name_that_its_target_has_today(root: Path) -> None:
    path = Path("averages", ".hydra", "overrides.yaml")
    path.write_text(path.read_text() + "- data._target_=regrow.feeding.loaders.Data\n")
    assert "data._target_=regrow.feeding.loaders.Data" in resume.expand(["resume=averages"])


# The table itself, with rows of the tests' own.

ROWS = (AddedKey("some.Trainer", "warm_up", False), AddedKey(None, "owner", "nobody"))
ROWS_OF_LAB = (AddedKey("some.Stop", "after", None),)


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(older, "ADDED_KEYS", ROWS)
    monkeypatch.setattr(added, "ADDED_KEYS", ROWS_OF_LAB)


def record() -> dict[str, Any]:
    return {"seed": 0, "trainer": {"_target_": "some.Trainer", "stop": {"_target_": "some.Stop"}}}


def test_a_record_gets_the_keys_that_it_lacks(rows: None) -> None:
    config = record()
    added = older.complete(config)
    assert added == {"owner": "nobody", "trainer.warm_up": False, "trainer.stop.after": None}
    assert config["trainer"]["warm_up"] is False and config["trainer"]["stop"]["after"] is None
    assert older.complete(config) == {}  # and a complete one is unchanged


def test_a_key_that_the_record_has_stays(rows: None) -> None:
    config = record() | {"owner": "me"}
    config["trainer"]["warm_up"] = True
    assert older.complete(config) == {"trainer.stop.after": None}
    assert config["owner"] == "me" and config["trainer"]["warm_up"] is True


def test_a_node_of_another_target_gets_nothing(rows: None) -> None:
    config = record()
    config["trainer"]["_target_"] = "theirs.Trainer"
    assert older.complete(config) == {"owner": "nobody", "trainer.stop.after": None}
    plain = {"owner": "me", "groups": {"warm_up": True}, "list": [{"_target_": "some.Stop"}]}
    assert older.complete(plain) == {}


def test_a_row_at_the_root_may_hold_a_node_or_a_key_of_a_node_without_a_target(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    step = {"_target_": "some.Step", "order": 1}
    rows = (AddedKey(None, "step", step), AddedKey(None, "groups.frozen", []))
    monkeypatch.setattr(older, "ADDED_KEYS", rows)
    config = record() | {"groups": {"scale": 1}}
    added = older.complete(config)
    assert added == {"step": step, "groups.frozen": []}
    assert config["step"] == step and config["groups"] == {"scale": 1, "frozen": []}
    assert older.earlier(config) == added
    now = record() | {"step": {"_target_": "some.Other"}, "groups": {"scale": 1, "frozen": ["a"]}}
    assert older.adopt(now, added, []) == added and now["step"] == step
    assert older.complete(record() | {"groups": None}) == {"step": step}


def test_a_resume_adopts_them_unless_they_are_typed(rows: None) -> None:
    def config() -> dict[str, Any]:
        trainer = {"_target_": "some.Trainer", "warm_up": True, "stop": {"after": 3}}
        return {"owner": "nobody", "trainer": trainer}

    added = older.complete(record())
    whole = config()
    # Equal values are not logged.
    assert older.adopt(whole, added, []) == {"trainer.warm_up": False, "trainer.stop.after": None}
    assert whole["trainer"]["warm_up"] is False and whole["trainer"]["stop"]["after"] is None
    typed = config()
    assert older.adopt(typed, added, ["trainer.warm_up"]) == {"trainer.stop.after": None}
    assert typed["trainer"]["warm_up"] is True
    other = {"owner": "nobody", "trainer": {"_target_": "theirs.Trainer"}}
    assert older.adopt(other, added, []) == {}  # this code's config has no such keys


@pytest.mark.slow
def test_a_node_that_a_record_lacks_becomes_overrides_and_gives_way_to_a_typed_key() -> None:
    record = config_of()
    del record["step"]
    added = older.complete(record)
    assert older.as_overrides({"step": added["step"]}) == [
        f'step._target_="{project.of_lab("lab.step.train_step")}"',
        "step._partial_=true",
    ]
    resumed = {**record, "step": {"_target_": "mine.step", "_partial_": True}}
    assert "step" not in older.adopt(resumed, added, ["step._target_"])
    assert resumed["step"]["_target_"] == "mine.step"
    assert "step" in older.adopt(resumed, added, [])  # the negative control


def test_the_line_names_the_keys_as_they_are_typed() -> None:
    said = older.line("outputs/x", {"a.b": False, "c": None, "d": "é", "e": [".png"]})
    assert said == f'outputs/x {KEPT}: a.b=false, c=null, d="é", e=[".png"]'


def test_without_the_row_a_resume_is_refused(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The negative control: the current config has a key that the record lacks."""
    caplog.set_level(logging.INFO)
    folder = Path("averages")
    overrides = resume.expand([f"resume={folder}"])

    def config() -> dict[str, Any]:
        found = recorded(folder)
        older.complete(found)
        found["resume"] = str(folder)
        found["trainer"]["brand_new"] = True
        return found

    absent = (
        r"trainer\.brand_new was absent and would be true.* give it a row in .*\.added\. "
        r".*: trainer\.brand_new=true$"
    )
    with pytest.raises(UserError, match=absent):
        resumed_config.resumed(folder, config(), overrides)
    row = AddedKey("lab.options.TrainerOptions", "brand_new", False)
    monkeypatch.setattr(added, "ADDED_KEYS", (*added.ADDED_KEYS, row))
    kept = resumed_config.resumed(folder, config(), overrides)
    assert kept is not None and kept["trainer"]["brand_new"] is False
    assert "trainer.brand_new=false" in caplog.text
    typed = resumed_config.resumed(folder, config(), [*overrides, "trainer.brand_new=true"])
    assert typed is not None and typed["trainer"]["brand_new"] is True


def test_an_ignored_index_that_a_resume_adds_reaches_the_data(root: Path) -> None:
    """Then a null in the record, which an older one gets too, is not kept."""
    folder = Path("averages")
    for typed, index in ((["loss.ignore_index=2"], 2), ([], None)):
        config = recorded(folder)
        older.complete(config)
        config["resume"] = str(folder)
        config["loss"]["ignore_index"] = config["data"]["ignore_index"] = index
        overrides = resume.expand([f"resume={folder}", *typed])
        kept = resumed_config.resumed(folder, config, overrides)
        assert kept is not None and kept["data"]["ignore_index"] == index


def test_a_run_keeps_the_default_that_it_recorded(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    folder = Path("images")
    before = recorded(folder)
    before["data"]["source"]["resize"] = 256  # and not typed
    (folder / "config.yaml").write_text(json.dumps(before))
    overrides = [o for o in resume.expand([f"resume={folder}"]) if "data.source.resize" not in o]

    def resumed(value: Any = "auto", *typed: str) -> Any:
        config = as_now(folder)
        config["data"]["source"]["resize"] = value
        kept = resumed_config.resumed(folder, config, [*overrides, *typed])
        assert kept is not None
        return kept["data"]["source"]["resize"]

    assert resumed() == 256 and "data.source.resize=256" in caplog.text
    assert resumed(300, "data.source.resize=300") == 300
    before["data"]["source"]["resize"] = 320  # not the earlier default
    (folder / "config.yaml").write_text(json.dumps(before))
    with pytest.raises(UserError, match=r"data\.source\.resize was 320 and would be auto"):
        resumed()
    before["data"]["source"]["resize"] = 256
    (folder / "config.yaml").write_text(json.dumps(before))
    monkeypatch.setattr(added, "EARLIER_DEFAULTS", ())  # the negative control
    with pytest.raises(UserError, match=r"data\.source\.resize was 256 and would be auto"):
        resumed()


def as_now(folder: Path, **data: str) -> dict[str, Any]:
    """The run's config as in today's conf/, as far as these tests need it."""
    config = recorded(folder)
    older.complete(config)
    config["resume"] = str(folder)
    config["trainer"]["ema_warmup"] = True
    for node in (config["data"], config["data"]["source"]):
        node |= data
    return config


def test_a_typed_key_reaches_those_that_follow_it(root: Path) -> None:
    folder = Path("regression")
    for typed, dtype in ((["data.target_dtype=float64"], "float64"), ([], "float32")):
        config = as_now(folder, target_dtype="float64")
        kept = resumed_config.resumed(folder, config, resume.expand([f"resume={folder}", *typed]))
        assert kept is not None and kept["data"]["target_dtype"] == dtype
        assert kept["data"]["source"]["target_dtype"] == dtype


def test_a_second_resume_keeps_what_the_record_lacked_at_the_first(root: Path) -> None:
    folder = Path("averages")
    lacked = resumed_config.lacked_keys(folder)
    assert "trainer.ema_warmup" in lacked
    completed = as_now(folder) | {"resume": "auto"}
    completed["trainer"]["ema_warmup"] = False
    (folder / "config.yaml").write_text(json.dumps(completed))
    overrides = resume.expand([f"resume={folder}"])
    with pytest.raises(UserError, match=r"trainer\.ema_warmup was false and would be true"):
        # The same as a new record: it had the key, and its value merely equals the earlier one.
        resumed_config.resumed(folder, as_now(folder), overrides)
    (folder / resumed_config.LACKED).write_text(json.dumps(lacked))
    kept = resumed_config.resumed(folder, as_now(folder), overrides)
    assert kept is not None and kept["trainer"]["ema_warmup"] is False
    assert resumed_config.lacked_keys(folder) == lacked


def test_a_field_of_the_progress_that_the_record_lacks_needs_a_row(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Later(build.TrainState):
        def load_state_dict(self, parts: dict[str, dict[str, Any]]) -> None:
            super().load_state_dict({**parts, "progress": self.lacking(parts["progress"])})

        @staticmethod
        def lacking(progress: dict[str, Any]) -> dict[str, Any]:
            return {key: value for key, value in progress.items() if key != "pruned"}

    monkeypatch.setattr(build, "TrainState", Later)
    refused = "its progress differs in pruned. If you added a field, give its earlier value"
    with pytest.raises((UserError, SystemExit), match=refused):
        train("resume=averages")
    monkeypatch.setattr(added, "ADDED_PROGRESS", {**added.ADDED_PROGRESS, "pruned": False})
    train("resume=averages")
    assert_same_run(Path("averages"), Path("whole/averages"))


RECORDED = ("data", "task", "loss", "model", "optimizer", "scheduler", "step", "trainer")


def keys_now() -> dict[str, set[str]]:
    """Return the keys of a record that today's conf/ composes, by `_target_`; "" is the root."""
    kept = set(places.own_keys("train", dict.fromkeys(RECORDED)))
    found = {"": kept - {"lab", "logger", "launcher", "sweep"}}

    def add(node: dict[str, Any]) -> None:
        if "_target_" in node:
            found.setdefault(node["_target_"], set()).update(k for k in node if k[:1] != "_")
        for value in node.values():
            if isinstance(value, dict):
                add(value)

    for group in RECORDED:
        for option in places.options(group):
            add(shipped_node(group, option))
    return found


def without_a_row(rows: tuple[AddedKey, ...]) -> set[tuple[str, str]]:
    """Return the keys in conf/ that a record of that time may lack and that have no row."""
    then = json.loads((RECORDS / "keys.json").read_text())
    before = {moved.in_text(target): keys for target, keys in then.items()}
    known = {(target, key) for target in before for key in before[target]}
    known |= {(row.target or "", row.key) for row in rows}
    now = keys_now()
    return {(target, key) for target in now if target in before for key in now[target]} - known


def test_each_key_added_since_has_a_row() -> None:
    assert without_a_row(older.added_keys()) == set()


def test_a_key_without_a_row_is_found() -> None:
    """The negative control."""
    rows = tuple(row for row in older.added_keys() if row.key != "ema_warmup")
    assert [key for _, key in without_a_row(rows)] == ["ema_warmup"]
    assert len(keys_now()) > 40


def test_the_records_are_of_that_time() -> None:
    """They were not made again; otherwise later code would be compared with itself."""
    for name in RUNS:
        manifest = json.loads((RECORDS / name / "manifest.json").read_text())
        assert manifest["git"]["commit"].startswith("8483121")


def test_the_engine_reads_of_the_labs_lists_what_its_protocol_names() -> None:
    names = set(protocols.Added.__annotations__)
    assert names == set(re.findall(r'_of_lab\("(\w+)"\)', inspect.getsource(older)))
    kinds = {
        "ADDED_KEYS": AddedKey,
        "EARLIER_DEFAULTS": older.EarlierDefault,
        "REMOVED_KEYS": tuple,
    }
    assert names == set(kinds)
    for name, kind in kinds.items():
        rows = getattr(added, name)
        assert isinstance(rows, tuple) and rows and all(isinstance(row, kind) for row in rows)
