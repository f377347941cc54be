from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from finished import SCRIPTS, finished, one_line_and_exit_code_2, process, script

from regrow.cli.arguments import Option, parse
from regrow.config.yaml_files import read_yaml
from regrow.errors import UserError
from regrow.record.records import read_json

main = script("evaluate").main


def evaluated(run: Path, *arguments: str, output: Path) -> dict[str, Any]:
    main([f"run={run}", f"output={output / 'numbers.json'}", "overwrite=true", *arguments])
    values: dict[str, Any] = read_json(output / "numbers.json")["values"]
    return values


@pytest.mark.parametrize("fixture", ["digits", "diabetes", "table"])
def test_the_numbers_are_those_of_the_run(
    request: pytest.FixtureRequest, tmp_path: Path, fixture: str
) -> None:
    run: Path = request.getfixturevalue(fixture)
    run = run if (run / "config.yaml").exists() else run / "run"
    told = read_json(run / "summary.json")["test"]
    # As text, because NaN must equal NaN here.
    assert json.dumps(evaluated(run, output=tmp_path)) == json.dumps(told)
    other = evaluated(run, "split=val", output=tmp_path)
    assert {f"test/{k.removeprefix('val/')}": v for k, v in other.items()} != told


@pytest.mark.parametrize(
    "overrides",
    [
        ("data=digits_attributes", "task=multilabel", "model=cnn"),
        ("data=breast_cancer", "task=binary", "trainer.precision=bf16"),
        ("model=cnn", "trainer.channels_last=true"),
        ("data=diabetes", "task=regression", "loss=mse_plus_mae", "data.eval_batch_size=7"),
    ],
    ids=" ".join,
)
def test_the_numbers_are_those_of_the_run_for_every_task(
    tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    run = finished(tmp_path / "run", *overrides)
    told = read_json(run / "summary.json")["test"]
    assert json.dumps(evaluated(run, output=tmp_path)) == json.dumps(told)


class ScheduleFree(torch.optim.Optimizer):
    """A minimal SGD that trains one point and evaluates another (Defazio et al. 2024)."""

    def __init__(self, params: Any, *, lr: float, beta: float) -> None:
        super().__init__(params, {"lr": lr, "beta": beta, "training": True, "steps": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["steps"] += 1
            for p in group["params"]:
                z = self.state[p].setdefault("z", p.clone())
                x = p.lerp(z, 1 - 1 / group["beta"])
                z.sub_(group["lr"] * p.grad)
                p.copy_(x.lerp(z, 1 / group["steps"]).lerp(z, 1 - group["beta"]))

    def eval(self) -> None:
        self._move(to_training=False)

    def train(self) -> None:
        self._move(to_training=True)

    @torch.no_grad()
    def _move(self, to_training: bool) -> None:
        for group in self.param_groups:
            if group["training"] is to_training:
                continue
            group["training"] = to_training
            weight = 1 - group["beta"] if to_training else 1 - 1 / group["beta"]
            for p in group["params"]:
                if "z" in self.state[p]:
                    p.lerp_(self.state[p]["z"], weight)


def test_the_weights_of_a_schedule_free_optimizer_are_measured_once_moved(tmp_path: Path) -> None:
    target = f"+optimizer._target_={__name__}.ScheduleFree"
    rest = ("+optimizer._partial_=true", "+optimizer.lr=0.3", "+optimizer.beta=0.9")
    run = finished(tmp_path / "run", "~optimizer", target, *rest, "trainer.max_steps=40")
    told = read_json(run / "summary.json")
    for split in ("val", "test"):  # of the two, val was measured before the weights were saved
        assert evaluated(run, f"split={split}", output=tmp_path) == told[split]


def test_an_evaluation_prints_and_writes_the_runs_own_numbers(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(digits, tmp_path / "copy", symlinks=True)
    main([f"run={run}"])
    out = capsys.readouterr().out
    summary = read_json(run / "summary.json")
    assert f"test/accuracy   {summary['test']['test/accuracy']:.5g}" in out
    assert "The run itself measured the same." in out and "359 examples" in out
    lines = out.splitlines()
    start = lines.index("test, by class")
    assert lines[start + 1].split() == ["precision", "recall", "f1", "auroc"]
    recalls = [float(line.split()[2]) for line in lines[start + 2 : start + 12]]
    told = [summary["test"][f"test/recall/{n}"] for n in range(10)]
    assert recalls == pytest.approx(told, abs=1e-4)
    logged = [line.partition(": ")[2] for line in (run / "train.log").read_text().splitlines()]
    assert lines[start : start + 12] == logged[logged.index("test, by class") :][:12]
    written = read_json(run / "evaluation_test.json")
    assert written["values"] == summary["test"] and written["step"] == summary["best"]["step"]
    main([f"run={run}", "checkpoint=last", "split=val"])
    assert read_json(run / "evaluation_val_last.json")["step"] == 60


def test_an_earlier_evaluation_of_other_numbers_is_told_and_stays(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(digits, tmp_path / "copy", symlinks=True)
    file, kept = run / "evaluation_test.json", run / "evaluation_test.1.json"
    main([f"run={run}"])
    first = file.read_text()
    assert file.name not in capsys.readouterr().out.replace(str(file), "")
    main([f"run={run}"])
    assert "\nevaluation_test.json: as before.\n" in capsys.readouterr().out
    assert file.read_text() == first and not kept.exists()
    old = read_json(file)
    right = old["values"]["test/accuracy"]
    old["values"]["test/accuracy"] = 0.5
    edited = json.dumps(old)
    for _ in range(2):  # the same numbers again are not kept twice
        file.write_text(edited)
        main([f"run={run}"])
        told = f"evaluation_test.json: accuracy was 0.5, is {right:.5g}; the earlier one is in"
        assert f"\n{told} evaluation_test.1.json.\n" in capsys.readouterr().out
        assert kept.read_text() == edited and file.read_text() == first
        assert sorted(run.glob("evaluation_*")) == [kept, file]
    for damaged in ("{", '{"values": 1}'):
        file.write_text(damaged)
        main([f"run={run}"])
        assert "it was not readable; the earlier" in capsys.readouterr().out
    assert (run / "evaluation_test.3.json").read_text() == damaged


def test_an_evaluation_on_other_data_names_it_and_copies_no_linked_file(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(digits, tmp_path / "copy", symlinks=True)
    main([f"run={run}"])
    main([f"run={run}", "data.eval_batch_size=359"])
    out = capsys.readouterr().out
    assert "data was the run's own, is data.eval_batch_size=359; the earlier one is in" in out
    (tmp_path / "secret").write_text("secret")
    file = run / "evaluation_val.json"
    file.symlink_to(tmp_path / "secret")
    main([f"run={run}", "split=val"])
    assert "secret" not in "".join(path.read_text() for path in run.glob("evaluation_*"))
    assert (tmp_path / "secret").read_text() == "secret" and not file.is_symlink()


def test_another_checkpoint_gives_other_numbers(digits: Path, tmp_path: Path) -> None:
    best = evaluated(digits, "split=train", output=tmp_path)
    names = sorted(path.name for path in (digits / "checkpoints").glob("step_*"))
    assert len(names) > 1
    others = [evaluated(digits, f"checkpoint={n}", "split=train", output=tmp_path) for n in names]
    assert best in others and any(other != best for other in others)


def test_the_size_of_the_batches_changes_no_metric(digits: Path, tmp_path: Path) -> None:
    one = evaluated(digits, output=tmp_path)
    other = evaluated(digits, "data.eval_batch_size=50", output=tmp_path)
    assert {k: v for k, v in one.items() if "loss" not in k} == {
        k: v for k, v in other.items() if "loss" not in k
    }
    assert one["test/loss"] == pytest.approx(other["test/loss"], rel=1e-6)


def test_other_data_is_normalised_as_the_training_data_was(table: Path, tmp_path: Path) -> None:
    rows = (table / "rows.csv").read_text().splitlines()
    (tmp_path / "test.csv").write_text("\n".join([rows[0], *rows[1:40]]))
    far = [f"{line.split(',')[0]},1e6,{index}" for index, line in enumerate(rows[1:])]
    (tmp_path / "far.csv").write_text("\n".join(["label,x,y", *far]))
    (tmp_path / "rows.csv").write_text((table / "rows.csv").read_text())
    swapped = [f"data.root={tmp_path}", "data.source.test_file=test.csv", "data.overlap=ignore"]
    near = evaluated(table / "run", *swapped, output=tmp_path)
    other = [*swapped, "data.source.train_file=far.csv"]
    assert evaluated(table / "run", *other, output=tmp_path) == near
    # Without the record of the training data, it would use the other file's statistics.
    run = shutil.copytree(table / "run", tmp_path / "run", symlinks=True)
    (run / "preprocessing.json").unlink()
    assert evaluated(run, *other, output=tmp_path) != near


def test_a_root_given_once_reaches_all_that_was_read_from_it(table: Path, tmp_path: Path) -> None:
    before = evaluated(table / "run", output=tmp_path)
    shutil.copytree(table, tmp_path / "moved", symlinks=True)
    (tmp_path / "moved" / "run" / "config.yaml").write_text(
        (table / "run" / "config.yaml").read_text().replace(str(table), "/no/such/folder")
    )
    run = tmp_path / "moved" / "run"
    assert read_yaml(run / "config.yaml")["data"]["source"]["root"] == "/no/such/folder"
    assert evaluated(run, f"data.root={tmp_path / 'moved'}", output=tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "run must be given: add run=…"),
        (["run=nowhere"], "run=nowhere: not a run's folder (there is no such folder)"),
        (["run=DIGITS", "splt=test"], "splt: there is no such key. Did you mean split?"),
        (["run=DIGITS", "model=cnn"], "model: there is no such key."),
        (["run=DIGITS", "split=tests"], "It has train, val, test. Did you mean test?"),
        (["run=DIGITS", "test"], "test: arguments are key=value."),
        (["run=DIGITS", "--split=test"], "--split=test: arguments are key=value."),
        (["run=DIGITS", "data=mnist"], "data: there is no such key."),
        (["run=DIGITS", "data.batch_sizes=1"], "Did you mean data.batch_size?"),
        (["run=DIGITS", "data.num_classes=3"], "belongs to the trained model and stays 10"),
        (["run=DIGITS", "data.source.digits=1"], "data.source.digits: the run's data has no"),
        (["run=DIGITS", "data.source._target_=os.system"], "has no such key"),
        (["run=DIGITS", "data.eval_batch_size=0"], "must be an integer of at least 1"),
        (["run=DIGITS", "data.augment=1"], "data.augment=1 must be true or false"),
        (["run=DIGITS", "data.root=[a"], "cannot be read"),
        (["run=DIGITS", "checkpoint=step_1"], "has no such checkpoint. There is best, last, step_"),
        (["run=DIGITS", "checkpoint=../checkpoints/best"], "has no such checkpoint"),
        (["run=DIGITS", "device=tpu"], "device=tpu must be one of auto, cpu, cuda, mps."),
        (["run=DIGITS", "output=/no/such/folder/x.json"], "there is no folder /no/such/folder"),
        (["run=DIGITS", "output=DIGITS"], "is a folder"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_a_wrong_argument_is_an_error_of_one_line(
    digits: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    before = sorted(path.name for path in digits.iterdir())
    with one_line_and_exit_code_2(capsys, message):
        main([argument.replace("DIGITS", str(digits)) for argument in arguments])
    assert sorted(path.name for path in digits.iterdir()) == before


def test_the_folder_of_a_sweep_leads_to_its_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sweep.json").write_text("{}")
    with one_line_and_exit_code_2(capsys, f"Give one of its runs, such as {tmp_path}/0;"):
        main([f"run={tmp_path}"])


@pytest.mark.parametrize("name", ["train", "find_lr", "evaluate", "predict"])
def test_a_python_without_the_requirements_is_told_how_to_get_them(name: str) -> None:
    done = subprocess.run(  # -S: without site-packages
        [sys.executable, "-S", str(SCRIPTS / f"{name}.py")],
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ") and "make setup" in done.stderr


@pytest.mark.parametrize("name", ["evaluate", "predict"])
def test_help_and_a_wrong_key_need_no_torch(name: str, tmp_path: Path) -> None:
    for argument, code in (("--help", 0), ("nope=1", 2)):
        program = (
            f"import runpy, sys; sys.path.insert(0, {str(SCRIPTS)!r})\n"
            "sys.argv = ['x', sys.argv[2]]\n"
            f"try: runpy.run_path({str(SCRIPTS / f'{name}.py')!r}, run_name='__main__')\n"
            "except SystemExit as end: print('ended', end.code or 0, 'torch' in sys.modules)"
        )
        done = subprocess.run(
            [sys.executable, "-c", program, "", argument], capture_output=True, text=True
        )
        assert f"ended {code} False" in done.stdout
    assert process(name, "--help", folder=tmp_path).stdout.count("run=…") == 1


@pytest.mark.slow
def test_a_run_made_and_measured_from_outside(tmp_path: Path) -> None:
    done = process("train", "debug=fast", "trainer.num_threads=1", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    printed = next(line for line in done.stdout.splitlines() if "evaluate.py" in line)
    arguments = printed.split()[2:]
    done = process("evaluate", *arguments, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "The run itself measured the same." in done.stdout
    (written,) = (tmp_path / "outputs" / "debug" / "latest").glob("evaluation_*.json")
    assert written.name == "evaluation_test.json"


def test_a_split_that_is_drawn_again_from_other_data_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "table.csv"
    rows = [f"{n % 7},{n % 5},{'ab'[n % 2]}\n" for n in range(120)]
    table.write_text("x,y,kind\n" + "".join(rows))
    source = (f"data.source.train_file={table}", "data.source.target_columns=[kind]")
    run = finished(tmp_path / "run", "data=csv", *source, "data.input_shape=[2]",
        "data.num_classes=2", "data.num_outputs=2", "data.target_kind=multiclass")  # fmt: skip
    capsys.readouterr()
    told = "The data has changed since the run (test: "
    main([f"run={run}"])
    assert told not in capsys.readouterr().out  # the negative control
    assert read_json(run / "evaluation_test.json")["changed"] is None
    table.write_text("x,y,kind\n" + "".join(rows[:100]))
    main([f"run={run}"])
    said = capsys.readouterr().out
    assert told in said and "test may hold examples that the run trained on" in said
    assert read_json(run / "evaluation_test.json")["changed"].startswith("test: ")


def test_a_swapped_key_is_read_as_on_hydras_command_line() -> None:
    given = ["data.root=2026-11-28", "data.source.root=2026-13-45", "data.noise=1e-3"]
    found = parse(given, {}, text="", takes_data=True)
    assert found.data == {"root": "2026-11-28", "source.root": "2026-13-45", "noise": 1e-3}


def test_a_folder_whose_name_is_a_number_is_taken_literally(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("20261128", "2026_11_28"):
        Path(name).mkdir()
        found = parse([f"data.root={name}", "data.batch_size=1_0"], {}, text="", takes_data=True)
        assert found.data == {"root": name, "batch_size": 10}


def test_only_a_script_about_a_run_says_that_the_rest_comes_from_it() -> None:
    for options, said in (
        ({"run": Option("")}, "There are run; everything else"),
        ({}, "There are none."),
    ):
        with pytest.raises(UserError, match=re.escape(said)):
            parse(["x=1"], options, text="")
