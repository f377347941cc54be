"""A damaged file of a record loses only its contents, with one line; checkpoints stay usable."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from fakes import make_run
from finished import finished, script
from running import TINY, as_hydra_has_it, composed

from regrow.config.recorded import recorded_config
from regrow.config.resume import expand
from regrow.errors import UserError
from regrow.load import load_run
from regrow.record import plots, report
from regrow.record.earlier import differences
from regrow.record.loggers import Jsonl
from regrow.record.names import refuse_foreign_run
from regrow.runs import training, trial
from regrow.runs.inference import evaluate
from regrow.runs.launch import launch

FILES = ("manifest.json", "summary.json", "status.json", "preprocessing.json", "config.yaml")
DAMAGES = {"empty": "", "torn": '{"a": [1, ', "a_list": "[1]", "of_wrong_types": ""}
WRONG = {
    "manifest.json": {"resumes": 3, "data": [1], "git": "x", "code_files": [1]},
    "summary.json": {"steps": "x", "best": [], "val": 3, "test": "y", "seconds": None},
    "status.json": {"state": 3, "step": "x", "pids": None},
    "preprocessing.json": {"kind": 3, "input_shape": "x"},
    "config.yaml": {"data": 3, "trainer": "x"},
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished(tmp_path_factory.mktemp("whole") / "run", *TINY, "trainer.max_steps=8")


@pytest.fixture
def run(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training, "draw", lambda folder: None)
    return Path(shutil.copytree(whole, tmp_path / "run", symlinks=True))


def resumed(*overrides: str, folder: str = "run") -> None:
    arguments = (*TINY, "trainer.num_threads=1", "trainer.device=cpu", *overrides)
    launch(as_hydra_has_it(composed(*arguments, f"hydra.run.dir={folder}")))


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_run_with_a_damaged_file_is_measured_reported_and_resumed(
    name: str, damage: str, run: Path, whole: Path,
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    caplog.set_level(logging.WARNING)
    text = json.dumps(WRONG[name]) if damage == "of_wrong_types" else DAMAGES[damage]
    (run / name).write_text(text)
    values = evaluate(load_run(run, device="cpu"), "test")
    assert values == evaluate(load_run(whole, device="cpu"), "test")
    monkeypatch.setattr(plots, "figures", lambda *_: {})  # figures read none of these files
    report.write(run, run.parent / "page.html")
    resumed("trainer.max_steps=9")
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 9 and summary["status"] == "completed"
    assert name in caplog.text
    if name != "preprocessing.json" and name != "config.yaml":
        json.loads((run / name).read_text())
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["max_steps"] == 9


def test_a_lost_config_is_compared_by_its_copy(
    run: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "config.yaml").unlink()
    with pytest.raises(SystemExit):
        resumed("trainer.max_steps=9", "optimizer.lr=9.0")
    assert "optimizer.lr was 0.003 and would be 9.0" in capsys.readouterr().err
    assert "its config.yaml is not read" in caplog.text
    assert evaluate(load_run(run, device="cpu"), "test")
    resumed("trainer.max_steps=9")
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["max_steps"] == 9


@pytest.mark.parametrize("damage", ["torn", "lost"])
def test_damaged_overrides_cost_the_short_command_alone(
    damage: str, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    overrides = run / ".hydra" / "overrides.yaml"
    overrides.unlink() if damage == "lost" else overrides.write_text("- [1,\n")
    with pytest.raises(UserError, match=r"repeat the command in manifest\.json with hydra\.run"):
        expand(["resume=run"])
    resumed("trainer.max_steps=9")
    assert "overrides.yaml cannot be read: only this command's overrides count" in caplog.text
    assert expand(["resume=run"])


def test_a_config_whose_copy_is_lost_as_well_leads_to_init_from(run: Path) -> None:
    (run / "config.yaml").write_text("")
    (run / ".hydra" / "config.yaml").write_text("x: ${oc.env:HOME}")
    with pytest.raises(UserError, match=r"Its weights can start a new run: init_from="):
        load_run(run)
    resumed(f"init_from={run}", folder="new")
    assert (run.parent / "new" / "summary.json").is_file()


@pytest.mark.parametrize(("debug", "smoothing"), [("overfit", 0.0), ("null", 0.1)])
def test_a_copy_is_resolved_with_the_choices_of_its_own_run(
    debug: str, smoothing: float, run: Path
) -> None:
    hydra = run / ".hydra" / "hydra.yaml"
    text = hydra.read_text()
    assert "debug: null" in text
    hydra.write_text(text.replace("debug: null", f"debug: {debug}"))
    copy = run / ".hydra" / "config.yaml"
    node = yaml.safe_load(copy.read_text())
    node["loss"]["label_smoothing"] = "${if_chosen:debug,overfit,0.0,0.1}"
    node["name"] = "on_${hydra:runtime.choices.data}"
    copy.write_text(yaml.safe_dump(node))
    (run / "config.yaml").write_text("")
    config = recorded_config(run, "run=run")
    assert config["loss"]["label_smoothing"] == smoothing
    assert config["name"] == f"on_{yaml.safe_load(text)['runtime']['choices']['data']}"


def test_a_copy_reads_no_environment_however_that_is_written(run: Path) -> None:
    copy = run / ".hydra" / "config.yaml"
    text = copy.read_text()
    (run / "config.yaml").write_text("")
    for written in (
        "${oc.env:HOME}",
        r"\x24{oc.env:HOME}",
        r"\u0024{if_chosen:a,b,${oc.env:HOME},c}",
    ):
        copy.write_text(f'{text}\nnotes_of_mine: "{written}"\n')
        with pytest.raises(UserError, match=r"neither can its copy in \.hydra"):
            recorded_config(run, "run=run")
    copy.write_text(f'{text}\nnotes_of_mine: "\\x24{{seed}}"\n')  # the control: its own key
    assert recorded_config(run, "run=run")["notes_of_mine"] == 0


def edited(text: str, change: Callable[[list[str]], list[str]]) -> str:
    return "".join(change(text.splitlines(keepends=True)))


@pytest.mark.parametrize(
    ("change", "lost"),
    [
        (lambda lines: ["\n", *lines], 0),  # longer
        (lambda lines: [*lines[1:]], 1),  # shorter
        (lambda lines: [lines[0][:10] + "\n", *lines[1:]], 1),
        (lambda lines: [lines[0].replace("{", "[", 1), *lines[1:]], 1),  # equally long
        (lambda lines: [], None),
    ],
)
def test_an_edited_log_costs_the_edited_lines(
    change: Any, lost: int | None, run: Path, whole: Path
) -> None:
    path = run / "metrics.jsonl"
    path.write_text(edited(path.read_text(), change))
    resumed("trainer.max_steps=9")
    before = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    found = []
    for line in path.read_text().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    losses = [line["step"] for line in found if isinstance(line, dict) and "train/loss" in line]
    assert losses[-1] == 9 and len({*losses}) == len(losses)  # no duplicates
    if lost is not None:
        expected = {line["step"] for line in before if "train/loss" in line} | {9}
        assert len(expected - {*losses}) <= lost


def test_an_edited_log_is_rewound_to_a_line_and_an_untouched_one_to_its_position(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = Jsonl(tmp_path)
    for step in (1, 2, 3):
        log.log(step, 0, {"train/loss": 0.5})
        if step == 2:
            position = log.position()
    log.rewind(position, 2)
    log.log(3, 0, {"train/loss": 0.7})
    log.close()
    path = tmp_path / "metrics.jsonl"
    assert not caplog.text and path.read_text().count("\n") == 3
    path.write_text("\n" + path.read_text())
    log = Jsonl(tmp_path)
    log.rewind(position, 2)
    log.close()
    assert "was edited" in caplog.text
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


def test_the_torn_last_line_of_a_search_is_removed(tmp_path: Path) -> None:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(storage=trial.open_storage(tmp_path), study_name=trial.STUDY)
    study.tell(study.ask(), 1.0)
    path = tmp_path / trial.STORAGE
    content = path.read_bytes()
    path.write_bytes(content + b'{"op_code": 4, "worker')
    study = optuna.load_study(storage=trial.open_storage(tmp_path), study_name=trial.STUDY)
    study.tell(study.ask(), 2.0)
    assert path.read_bytes().startswith(content)
    assert all(json.loads(line) for line in path.read_text().splitlines())
    study = optuna.load_study(storage=trial.open_storage(tmp_path), study_name=trial.STUDY)
    assert [it.value for it in study.trials] == [1.0, 2.0]


def test_a_new_metric_is_named_and_the_others_compared() -> None:
    compared = script("evaluate").compared
    told = {"test/loss": 0.5, "test/accuracy": 0.9}
    new = "the same; it did not measure test/f1"
    assert compared(told, {**told, "test/f1": 1.0}) == new
    assert compared({**told, "test/f1": 1.0}, told).endswith("does not measure test/f1")
    other = compared(told, {**told, "test/loss": 0.6, "test/f1": 1.0})
    assert other == "other numbers: loss was 0.5, is 0.6; it did not measure test/f1"


def test_differences_of_many_metrics_are_counted_and_close_ones_have_all_digits() -> None:
    old = {"test/loss": 0.5, "test/nan": float("nan"), "test/f1/zero": 0.25}
    new = {"test/loss": 0.5000001, "test/nan": float("nan"), "test/f1/zero": 0.75}
    assert differences(old, new) == "loss was 0.5, is 0.5000001; f1/zero was 0.25, is 0.75"
    many = {f"test/m{index}": index for index in range(6)}
    assert differences(many, dict.fromkeys(many, 9)).endswith("m3 was 3, is 9; 2 more differ")
    assert differences(many, {**many}) == ""


def test_a_moved_run_predicts_without_the_source_of_its_data(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"]["source"] = {"_target_": "my_own_source.read", "root": "/gone"}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    loaded = load_run(run, device="cpu")
    assert loaded.preprocessing.input_shape == [6]
    with pytest.raises(UserError, match=r"my_own_source\.read"):
        _ = loaded.data


@pytest.mark.parametrize("name", ["manifest.json", "metrics.jsonl", "plots/test.json"])
def test_json_that_nests_too_deep_for_python_costs_only_its_file(name: str, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    (folder / name).write_text("[" * 200_000 + "\n")
    refuse_foreign_run(folder)
    report.write(folder)
