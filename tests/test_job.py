"""A job is settled once, and nobody writes to it afterwards."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from running import TINY, composed, launched

import regrow
from regrow.config.job import Job, job_of
from regrow.config.yaml_files import read_yaml
from regrow.project import ROOT
from regrow.runs import machine, session

Made = list[tuple[Job, str]]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Made:
    """All jobs that the test makes, each with its JSON at that moment."""
    jobs: Made = []
    ours = Job.__init__

    def init(self: Job, *values: Any, **named: Any) -> None:
        ours(self, *values, **named)
        jobs.append((self, self.to_json()))

    monkeypatch.setattr(Job, "__init__", init)
    monkeypatch.chdir(tmp_path)
    return jobs


def trainer_of(folder: str) -> dict[str, Any]:
    found: dict[str, Any] = read_yaml(Path(folder, "config.yaml"))["trainer"]
    return found


@pytest.mark.slow
def test_no_job_changes_while_a_run_starts_trains_and_resumes(made: Made) -> None:
    asked = ("hydra.run.dir=run", "trainer.num_threads=null")
    for steps in (2, 3, 3):  # a new run, a resumed one and a complete one
        launched(*asked, f"trainer.max_steps={steps}")
    settled = {"monitor": "val/accuracy", "mode": "max", "devices": 1}
    settled["num_threads"] = machine.usable_cores()
    assert trainer_of("run").items() >= settled.items()
    assert len(made) > 10 and [job for job, before in made if job.to_json() != before] == []


def test_a_write_to_a_job_is_noticed(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control."""

    def write(folder: Path, job: Job, *others: Any) -> None:
        job.config["trainer"]["mode"] = "min"

    monkeypatch.setattr(session, "introduce", write)
    launched("trainer.max_steps=2")
    assert [job for job, before in made if job.to_json() != before]


def test_no_field_of_a_job_can_be_set_and_none_is_a_list() -> None:
    made = Job({}, None, ["a=1"], {}, {}, ["train.py"])  # type: ignore[arg-type]
    again = Job(**json.loads(made.to_json()))
    assert again == made and again.overrides == ("a=1",) and again.command == ("train.py",)
    for field in dataclasses.fields(Job):
        value = getattr(made, field.name)
        assert not isinstance(value, list | set | bytearray), field.name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(made, field.name, value)


def test_a_mapping_of_numbers_has_the_same_keys_in_a_job_its_json_and_a_notebook() -> None:
    """A run gets its job as JSON, whose keys are text."""
    mapping = ("loss=cross_entropy", "loss.class_weights={0: 2.0, 1: 1.0}")
    job = job_of(composed(*TINY, *mapping), None, [])
    assert Job(**json.loads(job.to_json())) == job
    config = regrow.compose("train", [*TINY, *mapping])
    assert job.config["loss"]["class_weights"] == {"0": 2.0, "1": 1.0}
    assert config.loss.class_weights == {"0": 2.0, "1": 1.0}


def changed_jobs(code: str) -> list[str]:
    """Return the calls that copy a job with other fields, or write past its being frozen."""
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    named = [(ast.unparse(call.func), [*map(ast.unparse, call.args)]) for call in calls]
    return [
        f"{function}({of[0]})"
        for function, of in named
        if re.search(r"(^|\.)(replace|__setattr__)$", function)
        and of
        and re.search(r"(^|\W)job$", of[0])
    ]


@pytest.mark.slow
def test_only_the_module_of_the_job_makes_a_changed_one() -> None:
    files = [path for path in sorted((ROOT / "src").rglob("*.py")) if path.name != "job.py"]
    found = [call for path in files for call in changed_jobs(path.read_text("utf-8"))]
    assert len(files) > 100 and found == []
    control = "a = dataclasses.replace(planned.job, trial=t)\nb = replace(job, folder=None)"
    assert changed_jobs(control) == ["dataclasses.replace(planned.job)", "replace(job)"]
    assert changed_jobs("replace(planned, job=job); text.replace('job', 'run')") == []
    assert changed_jobs("object.__setattr__(job, 'folder', None)") == ["object.__setattr__(job)"]
