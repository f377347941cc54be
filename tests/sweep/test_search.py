"""Searches with Optuna: trials up to a total, through failures, kills and pruning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest
from sweeping import LONG, SMALL, sweep, table, under_way
from waiting import until

from regrow.record.records import read_json
from regrow.runs.trial import STUDY, open_storage

SEARCH = ("sweep=optuna", "optimizer.lr=tag(log,interval(1e-4,1e-1))", "model.dropout=0,0.2",
          "hydra.sweep.dir=sweep", "launcher.jobs=1")  # fmt: skip


def study(folder: Path) -> Any:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna.load_study(study_name=STUDY, storage=open_storage(folder))


def points(rows: list[dict[str, str]]) -> list[tuple[str, str]]:
    return [(row["optimizer.lr"], row["model.dropout"]) for row in rows]


@pytest.mark.slow
@pytest.mark.nightly
def test_a_killed_search_reaches_its_total_with_the_proposals_of_an_uninterrupted_one(
    tmp_path: Path,
) -> None:
    whole = sweep(tmp_path / "whole", *LONG, *SEARCH, "sweep.n_trials=4")
    assert whole.returncode == 0, whole.stderr
    folder = tmp_path / "parts" / "sweep"
    with under_way(tmp_path / "parts", *LONG, *SEARCH, "sweep.n_trials=4") as process:
        until((folder / "1" / "checkpoints" / "last").exists)
        process.kill()
        process.wait()
    again = sweep(tmp_path / "parts", *LONG, *SEARCH, "sweep.n_trials=4")
    assert again.returncode == 0, again.stderr
    rows = table(folder)
    assert len(rows) == 4 and len({*points(rows)}) == 4
    assert rows == table(tmp_path / "whole" / "sweep")
    trials = study(folder).trials
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 4
    for row, trial in zip(rows, trials, strict=True):
        best = read_json(folder / row["folder"] / "summary.json")["best"]["value"]
        assert trial.value == best
    more = sweep(tmp_path / "parts", *LONG, *SEARCH, "sweep.n_trials=5")
    assert more.returncode == 0 and len(table(folder)) == 5


@pytest.mark.slow
def test_a_failed_trial_is_told_to_the_search_which_continues(tmp_path: Path) -> None:
    space = ("optimizer=sgd", "optimizer.lr=choice(1e30,0.1,0.01)", "sweep.sampler=grid")
    arguments = ("sweep=optuna", *space, "trainer.max_skipped_steps=1", "hydra.sweep.dir=sweep")
    done = sweep(tmp_path, *SMALL, *arguments)
    assert done.returncode == 1, done.stdout
    states = {row["optimizer.lr"]: row["status"] for row in table(tmp_path / "sweep")}
    assert states == {"1e+30": "failed", "0.1": "completed", "0.01": "completed"}
    told = {t.params["optimizer.lr"]: t.state.name for t in study(tmp_path / "sweep").trials}
    assert told == {"1e+30": "FAIL", "0.1": "COMPLETE", "0.01": "COMPLETE"}


@pytest.mark.nightly
@pytest.mark.slow
def test_failed_trials_are_tried_again_on_demand(tmp_path: Path) -> None:
    space = ("optimizer=sgd", "optimizer.lr=choice(0.1,1e30)", "sweep.sampler=grid")
    arguments = ("sweep=optuna", *space, "trainer.max_skipped_steps=1", "hydra.sweep.dir=sweep")
    assert sweep(tmp_path, *SMALL, *arguments).returncode == 1
    again = sweep(tmp_path, *SMALL, *arguments, "sweep.retry_failed=true")
    assert again.returncode == 1
    rows = table(tmp_path / "sweep")
    assert [(row["optimizer.lr"], row["status"]) for row in rows] == [
        ("0.1", "completed"), ("1e+30", "retried"), ("1e+30", "failed"),
    ]  # fmt: skip
    assert rows[1]["reason"] == "tried again as job 2"


@pytest.mark.slow
def test_an_unknown_metric_is_said_and_ends_the_search(tmp_path: Path) -> None:
    arguments = ("sweep=optuna", "optimizer.lr=0.1,0.2", "sweep.metric=val/lss",
                 "sweep.direction=minimize", "sweep.max_failures=1", "hydra.sweep.dir=sweep",
                 "launcher.jobs=1")  # fmt: skip
    done = sweep(tmp_path, *SMALL, *arguments)
    assert done.returncode == 1
    (row,) = table(tmp_path / "sweep")
    assert row["status"] == "failed"
    assert row["reason"].startswith("sweep.metric=val/lss is not measured. Did you mean val/loss?")


@pytest.mark.nightly
@pytest.mark.slow
def test_the_best_trial_is_that_of_the_searchs_metric(tmp_path: Path) -> None:
    arguments = ("sweep=optuna", "sweep.metric=parameters", "model.hidden=choice([64],[4])",
                 "sweep.sampler=grid", "hydra.sweep.dir=sweep")  # fmt: skip
    done = sweep(tmp_path, *SMALL, *arguments)
    assert done.returncode == 0, done.stderr
    assert "best job: 1, parameters" in done.stdout


@pytest.mark.nightly
@pytest.mark.slow
def test_failures_end_a_search_before_they_are_too_many(tmp_path: Path) -> None:
    arguments = ("sweep=optuna", "optimizer=sgd", "optimizer.lr=interval(1e30,1e31)",
                 "trainer.max_skipped_steps=1", "sweep.max_failures=2", "launcher.jobs=1",
                 "hydra.sweep.dir=sweep")  # fmt: skip
    done = sweep(tmp_path, *SMALL, *arguments)
    assert done.returncode == 1 and "2 trials failed: the search ends here" in done.stderr
    assert [row["status"] for row in table(tmp_path / "sweep")] == ["failed", "failed"]


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.nightly)])
def test_a_trial_that_does_worse_is_ended_early(tmp_path: Path, devices: int) -> None:
    """The grid's order is known: two good trials, then two that do not learn."""
    arguments = (
        *("sweep=optuna", "sweep.sampler=grid", "optimizer.lr=choice(0.01,0.02,1e-9,1e-8)"),
        *("sweep.pruner=median", "sweep.pruner_startup_trials=2", "launcher.jobs=1"),
        *("sweep.pruner_warmup_evaluations=1", "sweep.metric=val/loss", "trainer.max_epochs=8"),
        *("sweep.direction=minimize", "trainer.monitor=val/loss", "trainer.mode=min"),
        *("trainer=ddp", f"trainer.devices={devices}", "hydra.sweep.dir=sweep"),
    )
    done = sweep(tmp_path, *SMALL, *arguments)
    assert done.returncode == 0, done.stderr
    rows = table(tmp_path / "sweep")
    assert [row["status"] for row in rows] == ["completed", "completed", "pruned", "pruned"]
    summaries = [read_json(tmp_path / "sweep" / row["folder"] / "summary.json") for row in rows]
    assert [s["epochs"] for s in summaries[:2]] == [8, 8]
    assert all(s["epochs"] < 8 and s["test"] == {} for s in summaries[2:])
    states = [trial.state.name for trial in study(tmp_path / "sweep").trials]
    assert states == ["COMPLETE", "COMPLETE", "PRUNED", "PRUNED"]
    if devices > 1:
        return
    off = [a for a in arguments if not a.startswith("sweep.pruner")]
    done = sweep(tmp_path / "off", *SMALL, *off)  # the negative control
    assert {row["status"] for row in table(tmp_path / "off" / "sweep")} == {"completed"}


@pytest.mark.nightly
@pytest.mark.slow
def test_two_metrics_leave_a_front(tmp_path: Path) -> None:
    arguments = ("sweep=optuna", "sweep.metric=[val/accuracy,parameters]", "sweep.n_trials=4",
                 "model.hidden=choice([4],[8],[64])", "sweep.sampler=nsgaii",
                 "hydra.sweep.dir=sweep")  # fmt: skip
    done = sweep(tmp_path, *SMALL, *arguments)
    assert done.returncode == 0, done.stderr
    assert "no trial beats these in all of val/accuracy, parameters" in done.stdout
    its = study(tmp_path / "sweep")
    assert [d.name for d in its.directions] == ["MAXIMIZE", "MINIMIZE"]
    assert all(len(trial.values) == 2 for trial in its.trials)


@pytest.mark.nightly
@pytest.mark.slow
def test_a_search_space_in_yaml_and_random_points(tmp_path: Path) -> None:
    space = "sweep.params={optimizer.lr:'interval(0.001,0.1)',data.eval_batch_size:'range(8,33,8)'}"
    arguments = ("sweep=optuna", space, "sweep.sampler=random", "sweep.n_trials=4")
    done = sweep(tmp_path, *SMALL, *arguments, "hydra.sweep.dir=sweep")
    assert done.returncode == 0, done.stderr
    rows = table(tmp_path / "sweep")
    assert {row["data.eval_batch_size"] for row in rows} <= {"8", "16", "24", "32"}
    assert all(0.001 <= float(row["optimizer.lr"]) <= 0.1 for row in rows)
    assert len({row["optimizer.lr"] for row in rows}) == 4


@pytest.mark.nightly
@pytest.mark.slow
def test_hyperband_ends_trials_too(tmp_path: Path) -> None:
    rates = ("0.01", "0.02", "1e-09", "1e-08", "0.03", "1e-07")
    arguments = (
        *("sweep=optuna", "sweep.sampler=grid", f"optimizer.lr=choice({','.join(rates)})"),
        *("sweep.pruner=hyperband", "trainer.max_epochs=9", "launcher.jobs=1"),
        "hydra.sweep.dir=sweep",
    )
    done = sweep(tmp_path, *SMALL, *arguments)
    assert done.returncode == 0, done.stderr
    states = {row["optimizer.lr"]: row["status"] for row in table(tmp_path / "sweep")}
    assert states == {
        rate: "pruned" if rate.startswith("1e-") else "completed" for rate in rates
    }  # fmt: skip
