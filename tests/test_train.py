"""The command as a user types it: the folder it leaves, how it resumes, what it prints."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from running import fingerprint, launched, metrics_of

from lab.models.mlp import MLP
from regrow.config.resume import expand
from regrow.errors import UserError
from regrow.project import CONF
from regrow.record import records
from regrow.record.records import Lock, read_json
from regrow.runs import training

ROOT = CONF.parent
TRAIN = ROOT / "scripts" / "train.py"
SMALL = ("model.hidden=[16]", "trainer.max_epochs=2", "trainer.num_threads=1")


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.slow
def test_a_run_leaves_its_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    best = launched("trainer.checkpoint.keep_last=1", "logger=[csv]", draws=True)
    folder = (tmp_path / "outputs" / "synthetic" / "latest").resolve()
    names = {path.name for path in folder.iterdir()}
    assert {
        "config.yaml",
        ".hydra",
        "manifest.json",
        "status.json",
        "metrics.jsonl",
        "metrics.csv",
        "summary.json",
        "checkpoints",
        "plots",
        "report.html",
        "train.log",
        "preprocessing.json",
    } <= names
    summary = read_json(folder / "summary.json")
    assert summary["status"] == "completed" and read_json(folder / "status.json")["step"] == 12
    assert '<span class="badge completed">' in (folder / "report.html").read_text()
    assert summary["steps"] == 12 and summary["epochs"] == 3
    assert summary["best"]["value"] == best
    assert set(summary["test"]) >= {"test/loss", "test/accuracy"}
    assert metrics_of(folder)[-1]["test/accuracy"] == summary["test"]["test/accuracy"]
    out = capsys.readouterr().out
    assert "batch: 16 = 1 device × 1 micro-batch × 16" in out
    assert f"resume={folder.relative_to(tmp_path)}" in out
    assert "[rank 0]" in (folder / "train.log").read_text()


def test_the_same_command_again_says_that_the_run_is_complete(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = launched("hydra.run.dir=mine")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "mine").rglob("*") if p.is_file()}
    capsys.readouterr()
    assert launched("hydra.run.dir=mine") == best
    assert "is complete" in capsys.readouterr().out
    after = {p: p.stat().st_mtime_ns for p in (tmp_path / "mine").rglob("*") if p.is_file()}
    changed = {p.name for p in after if before.get(p) != after[p]}
    assert changed <= {".lock"}


@pytest.mark.slow
def test_a_complete_run_refuses_changes_as_an_unfinished_one_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    launched("hydra.run.dir=mine")
    before = fingerprint(tmp_path / "mine")

    def said(*typed: str) -> tuple[str, str]:
        capsys.readouterr()
        overrides = expand(["resume=mine", *typed])
        with contextlib.suppress(SystemExit):
            launched(*overrides)
        text = capsys.readouterr()
        return text.out, text.err.splitlines()[-1] if text.err else ""

    more = "trainer.max_epochs=5"
    for change, words in {
        "model.hidden=[13]": "the checkpoint is of another model: ",
        "trainer.ema_decay=0.9": "the checkpoint lacks averaged",
        "param_groups.lr_scale={head: 0.5}": "the checkpoint's optimizer has other groups",
        "optimizer.amsgrad=true": "the checkpoint lacks the moments that this needs",
        "data.source.num_train=40": "the data has changed since that run began",
    }.items():
        out, error = said(change)
        assert error.startswith("error: ") and words in error and "is complete" not in out
        unfinished = said(change, more)[1]  # by the limit, which the command in an error repeats
        assert unfinished.replace(f" {more}", "") == error
    assert "mine is complete, so the changes have no effect" in said("optimizer.lr=0.5")[0]
    record = read_json(tmp_path / "mine" / "manifest.json")
    files = {**record["code_files"], "src/lab/models/mlp.py": "0" * 16}
    (tmp_path / "mine" / "manifest.json").write_text(json.dumps({**record, "code_files": files}))
    for typed in (("model.hidden=[13]",), ("model.hidden=[13]", more)):
        assert "The run's code has changed since. " in said(*typed)[1]

    def fail(*_: object) -> None:
        raise AssertionError("the data was read")

    monkeypatch.setattr(training, "build", fail)
    for typed in ((), ("data.num_workers=2",), ("tags=[a]",)):
        assert "mine is complete. To train longer" in said(*typed)[0]
    assert fingerprint(tmp_path / "mine") == before


def test_a_folder_of_another_config_is_refused_with_the_differences(
    capsys: pytest.CaptureFixture[str],
) -> None:
    launched("hydra.run.dir=mine", "optimizer.lr=0.01")
    with pytest.raises(SystemExit) as stop:
        launched("hydra.run.dir=mine", "optimizer.lr=0.02", "seed=3")
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "optimizer.lr was 0.01 and would be 0.02" in error and "seed was 0" in error
    assert error.count("\n") == 1


@pytest.mark.slow
def test_resume_never_does_not_touch_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    launched("hydra.run.dir=mine")
    with pytest.raises(SystemExit):
        launched("hydra.run.dir=mine", "resume=never")
    assert "holds a run already" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_with_a_raised_limit_ends_as_one_longer_run(tmp_path: Path) -> None:
    """With a learning rate that does not depend on the limit."""
    launched("hydra.run.dir=whole", "scheduler=constant", "trainer.max_epochs=4")
    launched("hydra.run.dir=parts", "scheduler=constant", "trainer.max_epochs=2")
    launched("hydra.run.dir=parts", "scheduler=constant", "trainer.max_epochs=4")
    assert fingerprint(tmp_path / "whole") == fingerprint(tmp_path / "parts")
    summaries = [read_json(tmp_path / name / "summary.json") for name in ("whole", "parts")]
    assert summaries[0]["weights_sha256"] == summaries[1]["weights_sha256"]
    assert summaries[0]["test"] == summaries[1]["test"]
    assert [it["step"] for it in read_json(tmp_path / "parts" / "manifest.json")["resumes"]] == [8]


@pytest.mark.slow
def test_a_resume_tells_what_it_changes_and_says_nothing_twice(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for epochs in (2, 2, 4):
        launched("hydra.run.dir=mine", f"trainer.max_epochs={epochs}")
    out = capsys.readouterr().out
    assert out.count("epoch 2, step 8:") == 1 and "changed: resume" not in out
    assert out.count("the learning rate of step 8 was ") == 1  # a cosine, over twice the length
    launched("hydra.run.dir=flat", "trainer.max_epochs=2", "scheduler=constant")
    launched("hydra.run.dir=flat", "trainer.max_epochs=4", "scheduler=constant")
    assert "learning rate of step" not in capsys.readouterr().out


@pytest.mark.slow
def test_a_value_that_looks_like_a_secret_is_hidden_and_the_run_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    secrets = ("name='my password: hunter2'", "data.root=https://me:hunter2@host/x")
    for epochs in (1, 2):
        launched("hydra.run.dir=mine", f"trainer.max_epochs={epochs}", *secrets)
    out = capsys.readouterr().out
    assert "changed: trainer.max_epochs from 1 to 2" in out and "hunter2" not in out
    assert "hunter2" not in (tmp_path / "mine" / "config.yaml").read_text()
    with pytest.raises(UserError, match=r"data.root was taken for a secret.*Give it again"):
        expand(["resume=mine", "name=digits"])
    with pytest.raises(SystemExit):  # keys that are not secret are compared as always
        launched("hydra.run.dir=mine", "trainer.max_epochs=2", *secrets, "seed=3")


class Mine:
    """A logger with secrets."""

    def __init__(self, token: str, password: str, passphrase: str, secret: str) -> None: ...
    def log(self, step: int, epoch: int, values: Any) -> None: ...


def test_no_part_of_a_secret_with_spaces_or_quotes_is_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {"token": "'abc&sesame x'", "password": "'it: is #sesame'",
              "passphrase": "correct sesame battery", "secret": '"it\'s sesame"'}  # fmt: skip
    secrets = [f"+logger.mine.{key}={value}" for key, value in values.items()]
    for epochs in (1, 2):
        launched("hydra.run.dir=mine", f"trainer.max_epochs={epochs}",
                 f"+logger.mine._target_={__name__}.Mine", *secrets)  # fmt: skip
    told = capsys.readouterr()
    assert "sesame" not in told.out + told.err
    written = [path for path in (tmp_path / "mine").rglob("*") if path.is_file()]
    for path in written:  # but for this test, which a diff may hold
        assert path.suffix == ".diff" or b"sesame" not in path.read_bytes(), path
    assert read_json(tmp_path / "mine" / "status.json")["state"] == "completed"


@pytest.mark.parametrize("limit", ["trainer.max_epochs=2", "trainer.max_steps=12"])
@pytest.mark.slow
def test_a_complete_run_is_refused_a_limit_that_it_has_reached(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], limit: str
) -> None:
    launched("hydra.run.dir=mine")
    before = {p: p.read_bytes() for p in (tmp_path / "mine").rglob("*") if p.is_file()}
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        launched("hydra.run.dir=mine", limit)
    assert stop.value.code == 2
    error, (key, _, value) = capsys.readouterr().err, limit.partition("=")
    assert error.count("\n") == 1 and f"{key} was " in error and "at step 12" in error
    assert f"would be {value}" in error
    after = {p: p.read_bytes() for p in (tmp_path / "mine").rglob("*") if p.is_file()}
    assert after == before | {p: after[p] for p in after if p.name == ".lock"}
    launched("hydra.run.dir=mine", f"{key}={2 * int(value)}" if "epochs" in key else f"{key}=13")
    assert read_json(tmp_path / "mine" / "summary.json")["steps"] > 12


IMPATIENT = (
    *("trainer.early_stopping.patience=0", "trainer.early_stopping.min_delta=9.0"),
    *("trainer.max_epochs=30", "scheduler=constant"),
)


@pytest.mark.slow
def test_a_run_that_stopped_early_resumes_with_more_patience_as_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    launched("hydra.run.dir=mine", *IMPATIENT)
    summary = read_json(tmp_path / "mine" / "summary.json")
    assert summary["stopped_early"] and summary["epochs"] == 2
    out = capsys.readouterr().out
    (line,) = (line for line in out.splitlines() if line.startswith("next:"))
    arguments = expand(line.split("train.py ")[1].split())
    with pytest.raises(SystemExit):
        launched(*expand(["resume=mine", "trainer.max_epochs=50"]))
    error = capsys.readouterr().err
    assert "raise it: trainer.early_stopping.patience=2" in error and error.count("\n") == 1
    launched(*arguments)
    assert read_json(tmp_path / "mine" / "summary.json")["epochs"] == 4
    launched("hydra.run.dir=whole", *IMPATIENT, "trainer.early_stopping.patience=2")
    assert fingerprint(tmp_path / "mine") == fingerprint(tmp_path / "whole")


def test_a_second_writer_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").mkdir()
    with Lock(tmp_path / "mine"):
        with pytest.raises(SystemExit) as stop:
            launched("hydra.run.dir=mine")
        assert stop.value.code == 2
    assert "is in use by process" in capsys.readouterr().err


class Fails(MLP):
    """Raises an error in the given pass with gradients; the first is of a check."""

    fails_at = 0
    passes = 0

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.passes += self.training and torch.is_grad_enabled()
        if self.passes == self.fails_at:
            raise KeyError("here")
        return super().forward(inputs)


@pytest.mark.slow
def test_a_run_that_completes_no_step_is_not_the_latest_and_says_what_stays(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = Path("outputs", "synthetic")

    def latest(fails_at: int) -> tuple[Path | None, str]:
        """Start a run; return the latest one's folder, and what the run says of its own."""
        monkeypatch.setattr(Fails, "fails_at", fails_at)
        with contextlib.suppress(SystemExit, KeyError):
            launched("model._target_=test_train.Fails", "trainer.max_steps=3", "scheduler=constant")
        said = capsys.readouterr().out
        link = runs / "latest"
        return link.resolve() if link.is_symlink() else None, said

    told = "no step was completed: {} holds a log, and nothing to resume\n"
    before, said = latest(2)
    (folder,) = runs.iterdir()
    assert before is None and told.format(folder) in said
    assert "Traceback" in (folder / "train.log").read_text()
    trained, said = latest(-1)  # the control
    assert trained is not None and "nothing to resume" not in said
    assert latest(2)[0] == trained
    failed, said = latest(3)  # in the second step
    assert failed not in (None, trained) and "nothing to resume" not in said
    assert len([*runs.iterdir()]) == 5


def test_a_broken_model_leaves_no_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        launched("hydra.run.dir=mine", "data.num_classes=3", "data.num_outputs=5")
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "mine").exists()


def test_resume_by_folder_takes_the_recorded_overrides_and_the_new_ones(tmp_path: Path) -> None:
    (tmp_path / "run" / ".hydra").mkdir(parents=True)
    (tmp_path / "run" / ".hydra" / "overrides.yaml").write_text("- model=cnn\n- seed=3\n")
    assert expand(["resume=run", "seed=4", "trainer.max_epochs=9"]) == [
        "model=cnn",
        "resume=run",
        "seed=4",
        "trainer.max_epochs=9",
        f"hydra.run.dir={tmp_path / 'run'}",
    ]
    assert expand(["resume=auto", "seed=4"]) == ["resume=auto", "seed=4"]


def test_a_recorded_override_cannot_run_anything(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / ".hydra").mkdir(parents=True)
    for override in (
        "hydra.callbacks.mine._target_=os.system",
        "+hydra.callbacks.mine._target_=os.system",
        "--config-dir=/tmp",
        "hydra/launcher=joblib",
        "experiment=../../elsewhere/evil",
        "debug=[fast,/tmp/evil]",
        "+model@hydra.callbacks.mine=mlp",
        "notes=${oc.env:HOME}",
    ):
        (folder / ".hydra" / "overrides.yaml").write_text(f"- {override!r}\n")
        with pytest.raises(UserError, match="is not followed"):
            expand([f"resume={folder}"])


def test_a_recorded_target_that_is_foreign_to_its_place_is_not_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    launched("hydra.run.dir=mine")
    target = "+data.augmentation={_target_:os.system,command:touch was_here}"
    (tmp_path / "mine" / ".hydra" / "overrides.yaml").write_text(f"- {target!r}\n")
    with pytest.raises(SystemExit):
        launched("hydra.run.dir=mine", target, "resume=mine")
    assert "is not instantiated" in capsys.readouterr().err
    assert not (tmp_path / "was_here").exists()


def test_a_recorded_target_is_judged_before_its_module_is_imported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    launched("hydra.run.dir=mine")
    target = "model._target_=evil_in_the_run.Net"
    (tmp_path / "mine" / ".hydra" / "overrides.yaml").write_text(f"- {target!r}\n")
    code = f"import os\nos.mkdir({str(tmp_path / 'was_here')!r})\n"
    (tmp_path / "mine" / "evil_in_the_run.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path / "mine"))
    with pytest.raises(SystemExit):
        launched("hydra.run.dir=mine", target, "resume=mine")
    assert "It is not imported" in capsys.readouterr().err
    assert not (tmp_path / "was_here").exists()
    with pytest.raises(SystemExit):  # the negative control: typed again, it is the user's own
        launched("hydra.run.dir=new", target)
    assert (tmp_path / "was_here").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.hidden=[5]", "body.0.bias is (12,) there and (5,) here"),
        ("trainer.ema_decay=0.9", "the checkpoint lacks averaged"),
    ],
)
def test_a_resume_with_another_model_is_one_line_and_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    launched("hydra.run.dir=mine", "trainer.max_epochs=1")
    before = (tmp_path / "mine" / "config.yaml").read_bytes()
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        launched("hydra.run.dir=mine", "resume=mine", override, "trainer.max_epochs=2")
    assert stop.value.code == 2
    (line,) = (x for x in capsys.readouterr().err.splitlines() if not x.startswith("warning:"))
    assert message in line and "init_from=" in line
    assert (tmp_path / "mine" / "config.yaml").read_bytes() == before


def test_a_run_logs_what_was_said_before_its_folder_was_there(tmp_path: Path) -> None:
    launched("hydra.run.dir=a", "trainer.max_epochs=1")
    launched("hydra.run.dir=b", "init_from=a", "trainer.max_epochs=1")
    launched("hydra.run.dir=b", "init_from=a", "trainer.max_epochs=2")
    text = (tmp_path / "b" / "train.log").read_text()
    assert text.count(" tensors from a\n") == 1
    assert text.count("changed: trainer.max_epochs from 1 to 2\n") == 1


def test_a_resume_begins_at_the_step_of_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = []
    set_status = records.set_status

    def note(folder: Path, state: records.State, *, step: int, **more: Any) -> None:
        steps.append((state, step))
        set_status(folder, state, step=step, **more)

    monkeypatch.setattr(records, "set_status", note)
    launched("hydra.run.dir=a", "trainer.max_epochs=1")
    launched("hydra.run.dir=a", "trainer.max_epochs=2")
    assert steps[0] == ("running", 0) and steps[-1] == ("completed", 8)
    assert steps[steps.index(("completed", 4)) + 1] == ("running", 4)


def test_data_that_changed_since_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    launched("hydra.run.dir=mine", "trainer.max_epochs=1")
    path = tmp_path / "mine" / "manifest.json"
    content = json.loads(path.read_text())
    content["data"]["train"]["sha256"] = "0" * 64
    path.write_text(json.dumps(content))
    with pytest.raises(SystemExit) as stop:
        launched("hydra.run.dir=mine", "trainer.max_epochs=2")
    assert stop.value.code == 2
    assert "the data has changed since that run began (train: other" in capsys.readouterr().err


def test_a_run_without_a_test_split_ends_well(tmp_path: Path) -> None:
    launched("hydra.run.dir=mine", "data.source.num_test=0")
    assert "test" not in read_json(tmp_path / "mine" / "summary.json")


@pytest.mark.slow
def test_a_recipe_that_changed_since_is_refused_unless_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The option was recorded, but its file has changed since, so it was not named."""
    launched("hydra.run.dir=mine", "optimizer=sgd", "trainer.max_epochs=1")
    recorded = tmp_path / "mine" / "config.yaml"
    recorded.write_text(recorded.read_text().replace("momentum: 0.9", "momentum: 0.8"))
    (tmp_path / "mine" / ".hydra" / "overrides.yaml").write_text("- optimizer=sgd\n")
    rest = ("hydra.run.dir=mine", "optimizer=sgd", "resume=mine")
    with pytest.raises(SystemExit):
        launched(*rest)
    assert "optimizer.momentum was 0.8 and would be 0.9" in capsys.readouterr().err
    assert launched(*rest, "optimizer.momentum=0.9") is not None


def command(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    return forked.run(
        [sys.executable, str(TRAIN), *arguments],
        capture_output=True,
        text=True,
        check=False,
        **options,  # type: ignore[call-overload]
    )


@pytest.mark.nightly
@pytest.mark.slow
def test_the_next_commands_work_as_printed(tmp_path: Path) -> None:
    done = command("optimizer=adamw", "scheduler=cosine", *SMALL)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("next:"))
    commands = [line.removeprefix("next:").strip() for line in lines[start : start + 3]]
    folder = (tmp_path / "outputs" / "digits" / "latest").resolve()
    python = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{python}:{os.environ['PATH']}"}
    for line in commands:
        assert line.startswith("python ")
        again = subprocess.run(
            line, shell=True, env=environment, capture_output=True, text=True, check=False
        )
        assert again.returncode == 0, f"{line}\n{again.stderr}"
    resumed = read_json(folder / "summary.json")
    assert resumed["epochs"] == 4
    sweeps = [*tmp_path.glob("outputs/digits/sweeps/latest/[012]")]
    assert len(sweeps) == 3
    hashes = {read_json(job / "summary.json")["weights_sha256"] for job in sweeps}
    assert len(hashes) == 3
