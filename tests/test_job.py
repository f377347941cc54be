"""A job is settled once, and nobody writes to it afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from running import launched

from regrow.config.job import Job
from regrow.config.yaml_files import read_yaml
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
