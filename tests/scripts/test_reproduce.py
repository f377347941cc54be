"""A record can be repeated and is compared bit for bit; differences are named."""

from __future__ import annotations

import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from finished import finished, one_line_and_exit_code_2, process, script

from regrow.errors import UserError
from regrow.record.records import read_json, write_json

reproduce = script("reproduce")


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recorded") / "run"
    return finished(folder, "model.dropout=0.2", "trainer.log_every_steps=1", "logger=[csv]")


@pytest.fixture
def run(recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the run to modify. It is repeated in this process, which starts faster."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(recorded, tmp_path / "run", symlinks=True)

    def train(arguments: list[str], **_: str) -> int:
        *overrides, folder = arguments
        finished(Path(folder.removeprefix("hydra.run.dir=")), *overrides)
        return 0

    monkeypatch.setattr(reproduce, "train", train)
    return Path("run")


def answer(run: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    with pytest.raises(SystemExit) as ended:
        reproduce.main([f"run={run}"])
    assert isinstance(ended.value.code, int)
    return ended.value.code, capsys.readouterr().out.splitlines()


def alter(path: Path, line: int, **changes: Any) -> None:
    lines = path.read_text().splitlines()
    lines[line - 1] = json.dumps({**json.loads(lines[line - 1]), **changes})
    path.write_text("\n".join(lines) + "\n")


def test_an_honest_record_is_identical(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = answer(run, capsys)
    weights = read_json(run / "summary.json")["weights_sha256"]
    count = len((run / "metrics.jsonl").read_text().splitlines())
    assert said[-1] == f"identical: {count} lines of metrics.jsonl, and the weights, {weights}"
    assert code == 0 and count > 4
    assert not any("changed since" in line or " is older than " in line for line in said)
    assert not (Path("outputs") / "digits" / "latest").exists()  # it still names the first


@pytest.mark.slow
def test_a_run_with_a_raised_limit_is_reproduced_or_its_resume_is_named(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def in_parts(name: str, *options: str) -> tuple[int, list[str]]:
        finished(Path(name), *options, "trainer.max_steps=20")  # an epoch
        finished(Path(name), *options, "trainer.max_steps=40")
        assert len(read_json(Path(name) / "manifest.json")["resumes"]) == 1
        return answer(Path(name), capsys)

    assert in_parts("longer", "scheduler=constant")[0] == 0
    code, said = in_parts("bent", "scheduler=cosine")  # decays over 20, then 40 steps
    assert code == 1 and any(line.startswith("This run was resumed") for line in said)


def test_an_altered_number_is_named_with_its_line(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = json.loads((run / "metrics.jsonl").read_text().splitlines()[2])["train/loss"]
    alter(run / "metrics.jsonl", 2, **{"time/seconds": 1e6})  # the clock is ignored
    alter(run / "metrics.jsonl", 3, **{"train/loss": 0.125})
    code, said = answer(run, capsys)
    assert code == 1
    assert f"not identical: run/metrics.jsonl:3: train/loss was 0.125 and is {before!r}" in said


@pytest.mark.slow
def test_a_missing_line_and_other_weights_are_named(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = read_json(run / "summary.json")
    write_json(run / "summary.json", {**content, "weights_sha256": "0" * 64})
    code, said = answer(run, capsys)
    assert code == 1
    assert any(f"run/summary.json: weights_sha256 was {'0' * 64} and is " in x for x in said)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:-1]))
    code, said = answer(run, capsys)
    assert code == 1
    assert any(f"run/metrics.jsonl:{len(lines)} is missing" in line for line in said)


@pytest.mark.slow
def test_another_seed_in_the_whole_record_is_found(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The record says seed 1 throughout, but its numbers are those of seed 0."""
    for name in ("config.yaml", ".hydra/overrides.yaml"):
        text = (run / name).read_text().replace("seed: 0", "seed: 1")
        (run / name).write_text(text + ("- seed=1\n" if "overrides" in name else ""))
    code, said = answer(run, capsys)
    assert code == 1
    assert any("not identical: run/metrics.jsonl:1: train/" in line for line in said)


def test_changes_since_the_run_are_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = read_json(run / "manifest.json")
    content["packages"]["torch"] = "1.0"
    content["data"]["train"]["sha256"] = "0" * 64
    content["code_files"]["src/regrow/runs/training.py"] = "0" * 16
    write_json(run / "manifest.json", content)
    code, said = answer(run, capsys)
    assert code == 0
    assert "The code has changed since: src/regrow/runs/training.py differs." in said
    assert any(line.startswith("changed since: packages.torch was 1.0 and is ") for line in said)
    assert any(line.startswith("changed since: data.train.sha256 was 000") for line in said)


@pytest.mark.slow
def test_packages_are_compared_with_an_older_record_too(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An older record lists the installed packages, not the imported ones."""
    content = read_json(run / "manifest.json")
    assert "tqdm" in content["packages"]  # imported, but not in the list from the start
    content["packages"] = {"torch": content["packages"]["torch"], "optuna": version("optuna")}
    write_json(run / "manifest.json", content)
    code, said = answer(run, capsys)
    assert code == 0 and not any("changed since" in line for line in said)
    content["packages"] |= {"optuna": "1.0", "timm-of-then": "1.0"}
    write_json(run / "manifest.json", content)
    code, said = answer(run, capsys)
    assert any(line.startswith("changed since: packages.optuna was 1.0 and is") for line in said)
    assert "changed since: packages.timm-of-then was 1.0 and is absent" in said


@pytest.mark.parametrize("name", ["metrics.jsonl", "summary.json"])
@pytest.mark.parametrize("content", ['[1, {"a": null}]', '{"a":', None])  # None: a folder
def test_a_result_that_cannot_be_compared_is_one_line_before_the_second_run(
    name: str, content: str | None, run: Path
) -> None:
    (run / name).unlink()
    if content is None:
        (run / name).mkdir()
    else:
        (run / name).write_text(content)
    with pytest.raises(UserError, match="there is nothing to compare with"):
        reproduce.record_of(run, run)


@pytest.mark.parametrize("name", ["manifest.json", "config.yaml"])
def test_a_damaged_record_is_used_as_far_as_it_goes(name: str, run: Path) -> None:
    (run / name).write_text('[1, {"a": null}]')
    config, before = reproduce.record_of(run, run)
    assert config["trainer"]["num_threads"] and isinstance(before, dict)
    assert isinstance(reproduce.changes(before, before), list)


@pytest.mark.slow
def test_files_that_redaction_or_the_limit_changed_are_named(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = read_json(run / "manifest.json")
    git = {**(content["git"] or {}), "diff": "git.diff", "redacted": ["my_model.py"]}
    git |= {"diff_is_cut": True, "not_in_diff": {"huge.py": "0" * 64}}
    write_json(run / "manifest.json", {**content, "git": git})
    code, said = answer(run, capsys)
    assert code == 0
    assert any("masks what looked like a secret in my_model.py: put" in line for line in said)
    assert any("Too large for its git.diff: huge.py." in line for line in said)


def test_a_config_that_changed_since_is_refused(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("dropout: 0.2", "dropout: 0.3"))
    with one_line_and_exit_code_2(capsys, "model.dropout was 0.3 and would be 0.2"):
        reproduce.main([f"run={run}"])
    assert not Path("outputs").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("hydra.callbacks.mine._target_=os.system", "is not followed"),
        ("optimizer=../../elsewhere/evil", "is not followed"),
        ("+data.augmentation={_target_:os.system,command:touch was_here}", "would be os.system"),
    ],
)
def test_a_recorded_config_cannot_run_anything(
    override: str, message: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (run / ".hydra" / "overrides.yaml").open("a") as file:
        file.write(f"- {override!r}\n")
    with one_line_and_exit_code_2(capsys, message):
        reproduce.main([f"run={run}"])
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("lab.models.mlp.MLP", "os.system"))
    with one_line_and_exit_code_2(capsys, "model._target_=os.system"):
        reproduce.main([f"run={run}"])
    assert not Path("outputs").exists()


def test_a_run_that_is_not_complete_is_refused(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = read_json(run / "status.json")
    write_json(run / "status.json", {**content, "state": "interrupted"})
    with one_line_and_exit_code_2(capsys, "is interrupted, not completed"):
        reproduce.main([f"run={run}"])
    with one_line_and_exit_code_2(capsys, "holds no run"):
        reproduce.main(["run=nowhere"])


@pytest.mark.slow
def test_the_command_itself(recorded: Path, tmp_path: Path) -> None:
    done = process("reproduce", f"run={recorded}", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "identical: " in done.stdout.splitlines()[-1]
