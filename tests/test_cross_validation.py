"""A sweep over folds: its table, what all folds predict, and scikit-learn on the same ones."""

from __future__ import annotations

import csv
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
import torch
from finished import finished
from running import CPU, config_of, train
from scipy import stats
from threadpoolctl import threadpool_limits

from regrow.project import ROOT
from regrow.record import comparison
from regrow.record.records import read_json
from regrow.record.report import load
from regrow.record.statistics import differences, estimate
from regrow.runs import set_predictions, training


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """scikit-learn's models are small, and threads that wait for each other take minutes."""
    with threadpool_limits(1):
        yield


SMALL = ("data=breast_cancer", "task=binary", "model.hidden=[8]", "data.folds=3")


@pytest.fixture(scope="module")
def folds(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("folds")
    return [finished(folder / str(fold), *SMALL, f"data.fold={fold}") for fold in range(3)]


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as lines:
        return [*csv.DictReader(lines)]


# The interval.


def test_the_interval_over_folds_is_that_of_nadeau_and_bengio() -> None:
    values, overlap = [0.91, 0.94, 0.9, 0.95, 0.93], 100 / 400
    found = estimate(values, overlap)
    error = math.sqrt((1 / 5 + overlap) * np.var(values, ddof=1))
    low, high = stats.t.interval(0.95, 4, loc=np.mean(values), scale=error)
    assert (found.low, found.high) == pytest.approx((low, high))
    plain = estimate(values)
    assert plain.mean == found.mean
    assert (found.high - found.low) / (plain.high - plain.low) == pytest.approx(1.5)


def test_differences_over_folds_have_the_same_correction() -> None:
    best = dict(enumerate([0.91, 0.94, 0.9, 0.95, 0.93]))
    other = dict(enumerate([0.9, 0.92, 0.89, 0.91, 0.93]))
    ((plain,), (found,)) = (differences(best, [other], overlap) for overlap in (0.0, 0.25))
    assert plain is not None and found is not None
    assert found.high - found.mean == pytest.approx(1.5 * (plain.high - plain.mean))
    t = found.mean / (0.45**0.5 * np.std([other[n] - best[n] for n in best], ddof=1))
    assert found.p == pytest.approx(2 * stats.t.sf(abs(t), 4))


# The table and the predictions.


def test_folds_are_one_setting_with_the_interval_of_each_set(folds: list[Path]) -> None:
    found = comparison.compare(comparison.rows_of([load(run) for run in folds]))
    header, ((label, count, *cells),) = comparison.table_of(found)
    names = ["val/accuracy", "95% interval", "test/accuracy", "95% interval"]
    assert header == ["setting", "runs", *names] and (label, count) == ("all", "3")
    summaries = [read_json(run / "summary.json") for run in folds]
    values = [summary["test"]["test/accuracy"] for summary in summaries]
    sizes = [read_json(run / "manifest.json")["data"] for run in folds]
    overlap = np.mean([it["test"]["examples"] / it["train"]["examples"] for it in sizes])
    want = estimate(values, float(overlap))
    assert cells[2:] == [comparison.spread(want), comparison.interval(want)]


@pytest.mark.slow
def test_folds_without_val_are_compared_by_test(tmp_path: Path) -> None:
    runs_of = [
        finished(tmp_path / str(fold), *SMALL, f"data.fold={fold}", "data.source.val_fraction=0")
        for fold in range(3)
    ]
    found = comparison.compare(comparison.rows_of([load(run) for run in runs_of]))
    assert found.metric == "test/accuracy" and found.mode == "max"
    assert found.settings[0].monitored.count == 3


def test_the_predictions_of_all_folds_are_one_table(folds: list[Path], tmp_path: Path) -> None:
    table = comparison.rows_of([load(run) for run in folds])
    comparison.write_out_of_fold(table, tmp_path / "out.csv")
    found = rows(tmp_path / "out.csv")
    assert [*found[0]] == ["fold", "example", "target", "prediction", "probability"]
    assert [int(row["example"]) for row in found] == [*range(569)]
    from sklearn.datasets import load_breast_cancer

    truth = load_breast_cancer()
    assert [row["target"] for row in found] == [truth.target_names[k] for k in truth.target]
    for fold, run in enumerate(folds):  # the predictions are those that were measured
        its = [row for row in found if row["fold"] == str(fold)]
        right = np.mean([row["target"] == row["prediction"] for row in its])
        measured = read_json(run / "summary.json")["test"]
        assert right == pytest.approx(measured["test/accuracy"], abs=1e-12)
        shares = [float(row["probability"]) for row in its]
        from sklearn.metrics import roc_auc_score

        auc = roc_auc_score([row["target"] == "benign" for row in its], shares)
        assert auc == pytest.approx(measured["test/auroc"], abs=1e-12)


@pytest.mark.parametrize(
    ("overrides", "columns"),
    [
        (("data=diabetes", "task=regression"), ["target", "prediction"]),
        (("data=digits_attributes", "task=multilabel"), ["target/even", "target/prime"]),
        ((), ["target", "prediction", "probability/0"]),
    ],
)
def test_every_task_has_predictions(
    tmp_path: Path, overrides: tuple[str, ...], columns: list[str]
) -> None:
    run = finished(tmp_path / "run", *overrides, "data.folds=5", "data.fold=4")
    found = rows(run / "predictions_test.csv")
    assert [*found[0]][1 : len(columns) + 1] == columns
    told = read_json(run / "summary.json")["test"]
    if "test/rmse" in told:
        errors = [float(row["target"]) - float(row["prediction"]) for row in found]
        assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(told["test/rmse"], rel=1e-9)
        from sklearn.datasets import load_diabetes

        truth = load_diabetes().target
        assert all(float(r["target"]) == pytest.approx(truth[int(r["example"])]) for r in found)
    if overrides == ():
        right = np.mean([row["target"] == row["prediction"] for row in found])
        assert right == pytest.approx(told["test/accuracy"])


def test_a_run_without_folds_writes_no_predictions(tmp_path: Path) -> None:
    run = finished(tmp_path / "run", *SMALL, "data.folds=null")
    assert not [*run.glob("predictions*")]


def test_a_kill_while_predictions_are_written_changes_nothing(
    folds: list[Path], tmp_path: Path
) -> None:
    config = config_of(*SMALL, "trainer.max_steps=4", "trainer.num_threads=1", "trainer.device=cpu")
    for when in ("before", "after"):
        folder = tmp_path / when
        folder.mkdir()
        pid = os.fork()
        if pid == 0:
            try:
                write = set_predictions.write

                def deadly(*given: Any, write: Any = write, when: str = when) -> None:
                    if when == "after":
                        write(*given)
                    os.kill(os.getpid(), signal.SIGKILL)

                set_predictions.write = deadly  # type: ignore[assignment]
                torch.set_num_threads(1)
                training.train(
                    training.build(config, CPU), config, folder, CPU, training.StopRequest()
                )
            finally:
                os._exit(1)
        assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
        assert not (folder / "summary.json").exists()
        assert (folder / "predictions_test.csv").exists() == (when == "after")
        summary = train(folder, *SMALL, "trainer.max_steps=4", "trainer.num_threads=1",
                        "trainer.device=cpu")  # fmt: skip
        assert summary["test"] == read_json(folds[0] / "summary.json")["test"]
        ours, whole = (f / "predictions_test.csv" for f in (folder, folds[0]))
        assert ours.read_bytes() == whole.read_bytes()


@pytest.mark.slow
def test_a_sweep_over_folds_ends_in_its_table(folds: list[Path], tmp_path: Path) -> None:
    done = trained(tmp_path, "-m", "data.fold=0,1,2", "hydra.sweep.dir=sweep")
    assert "setting  runs  val/accuracy" in done.stdout and "test/accuracy" in done.stdout
    assert "folds:    sweep/predictions_out_of_fold.csv" in done.stdout
    found = rows(tmp_path / "sweep" / "predictions_out_of_fold.csv")
    assert [int(row["example"]) for row in found] == [*range(569)]
    alone = {row["example"]: row for run in folds for row in rows(run / "predictions_test.csv")}
    for row in found:
        assert alone[row["example"]].items() <= row.items()


@pytest.mark.slow
@pytest.mark.nightly
def test_several_processes_predict_what_one_does(folds: list[Path], tmp_path: Path) -> None:
    trained(tmp_path, "trainer=ddp", "trainer.devices=2", "hydra.run.dir=run")
    found, alone = (rows(f / "predictions_test.csv") for f in (tmp_path / "run", folds[0]))
    assert len(found) == len(alone) == 190
    for row, one in zip(found, alone, strict=True):
        assert row["example"] == one["example"]
        assert row["prediction"] == one["prediction"] and row["target"] == one["target"]
        assert float(row["probability"]) == pytest.approx(float(one["probability"]), abs=1e-5)


def trained(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the real command."""
    done: subprocess.CompletedProcess[str] = forked.run(
        [sys.executable, str(ROOT / "scripts" / "train.py"), *arguments, *SMALL,
         "trainer.max_steps=4", "trainer.device=cpu", "trainer.num_threads=1"],
        cwd=folder, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done


# scikit-learn on the same folds.


def tables(overrides: tuple[str, ...]) -> tuple[Any, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Return the objects of a run and its raw splits; what is not tested is trained on."""
    objects = training.build(config_of(*overrides, "trainer.device=cpu"), CPU)
    found = {
        name: (split.inputs.flatten(1).double().numpy(), split.targets.numpy())
        for name, split in objects.data.source.items()
    }
    return objects, found


FIVE = ("data.folds=5", "data.source.val_fraction=0")


@pytest.mark.parametrize("data", ["digits", "breast_cancer"])
@pytest.mark.parametrize("fold", range(5))
def test_metrics_of_scikit_learns_predictions_are_its_scores(data: str, fold: int) -> None:
    from sklearn import metrics as theirs
    from sklearn.linear_model import LogisticRegression

    task = "multiclass" if data == "digits" else "binary"
    asked = (f"data={data}", f"task={task}", *FIVE, f"data.fold={fold}", "task.auroc=true")
    objects, parts = tables(asked)
    inputs, scale = parts["test"][0], parts["train"][0].std(0) + 1e-9
    model = LogisticRegression(max_iter=300, C=0.01).fit(
        parts["train"][0] / scale, parts["train"][1]
    )
    shares, truth = model.predict_proba(inputs / scale), parts["test"][1]
    guess = model.predict(inputs / scale)
    ours = objects.task.metrics(CPU.device)
    outputs = np.log(shares) if task == "multiclass" else model.decision_function(inputs / scale)
    ours.update(torch.from_numpy(outputs), torch.from_numpy(truth), None)
    found = ours.scalars()
    average = "macro" if task == "multiclass" else "binary"
    of = {"average": average, "zero_division": 0}
    assert found["accuracy"] == pytest.approx(theirs.accuracy_score(truth, guess), abs=1e-12)
    for name in ("precision", "recall", "f1"):
        score = getattr(theirs, f"{name}_score")(truth, guess, **of)
        assert found[name] == pytest.approx(score, abs=1e-12)
    auc = theirs.roc_auc_score(truth, shares if task == "multiclass" else shares[:, 1],
                               multi_class="ovr")  # fmt: skip
    assert found["auroc"] == pytest.approx(auc, abs=1e-12)


@pytest.mark.parametrize("fold", range(5))
def test_metrics_of_scikit_learns_regression_are_its_scores(fold: int) -> None:
    from sklearn import metrics as theirs
    from sklearn.linear_model import Ridge

    asked = ("data=diabetes", "task=regression", *FIVE, f"data.fold={fold}")
    objects, parts = tables((*asked, "data.normalize_targets=false"))
    guess = Ridge().fit(*parts["train"]).predict(parts["test"][0])
    ours = objects.task.metrics(CPU.device)
    ours.update(torch.from_numpy(guess), torch.from_numpy(parts["test"][1]).double(), None)
    found, truth = ours.scalars(), parts["test"][1]
    assert found["rmse"] == pytest.approx(theirs.root_mean_squared_error(truth, guess), rel=1e-12)
    assert found["mae"] == pytest.approx(theirs.mean_absolute_error(truth, guess), rel=1e-12)
    assert found["r2"] == pytest.approx(theirs.r2_score(truth, guess), abs=1e-12)


LINEAR = (
    *("model.hidden=[]", "optimizer=sgd", "scheduler=cosine", "data.batch_size=2000"),
    *("trainer.num_threads=1", "trainer.device=cpu", "trainer.eval_every_epochs=null"),
    *("trainer.checkpoint.save_every_epochs=null", "trainer.log_every_steps=null"),
)


@pytest.mark.slow
@pytest.mark.parametrize("fold", [0, 3])
def test_a_linear_model_comes_to_scikit_learns(fold: int, tmp_path: Path) -> None:
    from sklearn.linear_model import LinearRegression, LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    decay = 0.01
    asked = ("data=breast_cancer", "task=binary", "task.auroc=true", *FIVE, f"data.fold={fold}",
             f"optimizer.weight_decay={decay}", "optimizer.lr=0.5", "trainer.max_steps=500",
             *LINEAR)  # fmt: skip
    _, parts = tables(asked)
    strength = 1 / (decay * len(parts["train"][1]))
    model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=1000, tol=1e-8))
    score = model.fit(*parts["train"]).score(*parts["test"])
    ours = train(tmp_path / "classes", *asked)["test"]
    assert ours["test/accuracy"] == pytest.approx(score, abs=0.01)
    shares = model.predict_proba(parts["test"][0])
    nll = -np.log(shares[np.arange(len(shares)), parts["test"][1].astype(int)]).mean()
    assert ours["test/loss"] == pytest.approx(nll, abs=1e-3)

    asked = ("data=diabetes", "task=regression", *FIVE, f"data.fold={fold}", "optimizer.lr=0.1",
             "trainer.max_steps=1000", *LINEAR)  # fmt: skip
    _, parts = tables(asked)
    line = LinearRegression().fit(*parts["train"])
    ours = train(tmp_path / "values", *asked)["test"]
    assert ours["test/r2"] == pytest.approx(line.score(*parts["test"]), abs=0.01)
