"""The better direction of a metric, and runs that monitor none."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from finished import finished, one_line_and_exit_code_2, script
from omegaconf import OmegaConf
from running import CPU, TINY, composed, config_of, launched, metrics_of, train

from lab import loop
from lab.build import measured_by
from lab.tasks.metrics import Metrics
from regrow.config import resume, resumed_config
from regrow.config.check import check
from regrow.config.recorded import ELSEWHERE
from regrow.config.yaml_files import read_yaml
from regrow.errors import UserError
from regrow.load import load_run
from regrow.record import comparison, monitor, side_by_side
from regrow.record.records import read_json, write_text
from regrow.record.report import load
from regrow.runs import training
from regrow.runs.banner import what_is_odd

# 50 examples in windows of 16: an evaluation after each of 8 steps, in which the loss falls.
LEARNS = (*TINY, "optimizer.lr=0.05", "trainer.max_steps=8", "trainer.eval_every_steps=1")
REGRESSION = (
    *("task=regression", "data.target_kind=regression", "data.num_classes=null"),
    *("data.num_outputs=1",),
)
NO_VAL = (*TINY, "data.source.num_val=0")


@pytest.mark.parametrize(
    ("metric", "mode"),
    [
        *((f"val/{name}", "max") for name in ("accuracy", "f1/cat", "auroc", "r2", "exact_match")),
        *((f"val/{name}", "min") for name in ("loss", "loss_mse", "rmse", "mae", "error_rate")),
        *((f"val/{name}", "max") for name in ("top5_accuracy", "mAP", "IoU/loss", "BinaryF1Score")),
        *((f"val/{name}", "min") for name in ("MeanSquaredError", "nll", "perplexity", "log_loss")),
        *((f"val/{name}", "min") for name in ("negative_log_likelihood", "cross-entropy", "WER")),
        *((f"val/{name}", None) for name in ("score", "neg_mean_squared_error", "margin")),
        ("val/accuracy_loss", None),
        *((f"val/{name}", "max") for name in ("accuracy_top5", "f1_macro", "precision_at_1")),
        # The name contains a metric, but measures another quantity.
        *((f"val/{name}", None) for name in ("loss_reduction", "error_detection_rate")),
        *((f"val/{name}", None) for name in ("distance_gain", "reward_std")),
        *((f"val/{name}", None) for name in ("std_accuracy", "drop_in_accuracy", "loss gap f1")),
        # A sign, or a word with its meaning, inverts the metric.
        *((f"val/{name}", None) for name in ("-loss", "1-accuracy", "100 - f1", "inv_mse")),
        *((f"val/{name}", "max") for name in ("1-shot-accuracy", "top-1-acc", "5-fold-auc")),
        ("night/accuracy", "max"),
        # These names mislead: D² is a share that is explained, and a distance is called similarity.
        *((f"val/d2_{name}_score", None) for name in ("absolute_error", "brier", "log_loss")),
        *((f"val/{name}", "max") for name in ("d2", "d2_score", "hamming_score")),
        *((f"val/{name}", "min") for name in ("hamming", "HammingDistance", "hamming_loss")),
        ("val/LearnedPerceptualImagePatchSimilarity", "min"),
        ("val/deep_image_structure_and_texture_similarity", "min"),
    ],
)
def test_the_name_tells_the_direction(metric: str, mode: str | None) -> None:
    assert monitor.by_name(metric) == mode


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("task=binary", "data=breast_cancer"),
        ("task=multilabel", "data=digits_attributes"),
        ("task=regression", "data=diabetes"),
    ],
    ids=" ".join,
)
def test_every_metric_of_the_tasks_is_known_and_as_torchmetrics_says(
    overrides: tuple[str, ...],
) -> None:
    config = config_of(*overrides, "trainer.device=cpu")
    objects = training.build(config, CPU)
    metrics = objects.task.metrics(CPU.device)
    for name in measured_by(objects.task, CPU.device, objects.sets):
        by_name = monitor.by_name(name)
        assert by_name is not None, name
        assert monitor.of_metrics(metrics, name) in (None, by_name), name
    assert objects.options.mode == monitor.by_name(config["task"]["monitor"])


def best_of(summary: dict[str, Any], folder: Path) -> tuple[float, list[float]]:
    metric = summary["best"]["metric"]
    return summary["best"]["value"], [line[metric] for line in metrics_of(folder) if metric in line]


@pytest.mark.parametrize(
    ("overrides", "best"),
    [
        (("trainer.monitor=val/loss",), min),
        (("trainer.monitor=val/accuracy",), max),
        ((*REGRESSION, "trainer.monitor=val/r2"), max),
        ((*REGRESSION,), min),  # its own metric, val/rmse
        (("trainer.monitor=val/loss", "trainer.mode=max"), max),  # the user's value wins
    ],
)
def test_the_best_weights_are_those_of_the_best_value(
    overrides: tuple[str, ...], best: Any, tmp_path: Path
) -> None:
    summary = train(tmp_path, *LEARNS, *overrides)
    value, values = best_of(summary, tmp_path)
    assert value == best(values) and len({*values}) > 1
    assert read_json(tmp_path / "checkpoints" / "best" / "manifest.json")["value"] == value


def test_early_stopping_and_plateau_follow_the_direction(tmp_path: Path) -> None:
    falls = (*LEARNS, "trainer.monitor=val/loss", "trainer.early_stopping.patience=1")
    plateau = ("scheduler=plateau", "scheduler.patience=0", "scheduler.min_delta=0")
    summary = train(tmp_path / "right", *falls, *plateau)
    assert summary["steps"] == 8 and not summary["stopped_early"]
    rates = {line["train/lr"] for line in metrics_of(tmp_path / "right") if "train/lr" in line}
    assert len(rates) == 1
    # The control: the opposite direction ends it and lowers the rate.
    wrong = train(tmp_path / "wrong", *falls, *plateau, "trainer.mode=max")
    assert wrong["steps"] < 8 and wrong["stopped_early"]


@pytest.mark.slow
def test_a_contradiction_is_allowed_with_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training, "draw", lambda folder: None)
    launched("trainer.monitor=val/loss", "trainer.mode=max", "hydra.run.dir=odd")
    said = capsys.readouterr().err
    assert "trainer.mode=max: less of val/loss is usually better" in said
    launched("trainer.monitor=val/loss", "hydra.run.dir=usual")
    assert "usually better" not in capsys.readouterr().err
    assert read_yaml(Path("usual/config.yaml"))["trainer"]["mode"] == "min"


class Scored:
    """A task's metrics under an uninformative name, held as torchmetrics holds them."""

    def __init__(self, metrics: Metrics, **held: Any) -> None:
        self.inner, self.names, self.held = metrics, ("score",), held

    def update(self, *batch: Any) -> None:
        self.inner.update(*batch)

    def scalars(self) -> dict[str, float]:
        return {"score": self.inner.scalars()["accuracy"]}

    def details(self) -> dict[str, Any]:
        return {}


@pytest.mark.parametrize(("higher", "mode"), [(True, "max"), (False, "min"), (None, None)])
def test_torchmetrics_tells_where_the_name_does_not(
    higher: bool | None, mode: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchmetrics import MeanMetric

    from lab.tasks.tasks import Multiclass

    held = type("Mine", (MeanMetric,), {"higher_is_better": higher})()
    ours = Multiclass.metrics
    monkeypatch.setattr(
        Multiclass, "metrics", lambda self, device: Scored(ours(self, device), score=held)
    )
    config = config_of(*TINY, "trainer.monitor=val/score")
    if mode is None:
        with pytest.raises(UserError, match=r"trainer\.mode=null.*Add trainer\.mode=max"):
            training.build(config, CPU)
        config = config_of(*TINY, "trainer.monitor=val/score", "trainer.mode=min")
        assert training.build(config, CPU).options.mode == "min"  # as the message advises
    else:
        assert training.build(config, CPU).options.mode == mode


def test_a_task_of_ones_own_may_say_it() -> None:
    task = {"_target_": "mine.Task", "monitor": "val/score", "mode": "min"}
    config = {"trainer": {"monitor": "val/score", "mode": None}, "task": task}
    assert monitor.of_run(config) == "min"
    assert monitor.of_run({**config, "trainer": {"monitor": "val/loss", "mode": None}}) == "min"
    assert monitor.of_run({**config, "trainer": {"monitor": "val/f1", "mode": None}}) == "max"
    assert monitor.of_run({**config, "trainer": {"monitor": "val/f1", "mode": "min"}}) == "min"


def test_a_resume_keeps_the_recorded_direction_unless_another_is_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = finished(Path("run"), *TINY, "trainer.monitor=val/loss", "trainer.max_steps=4")
    recorded = read_yaml(run / "config.yaml")
    assert recorded["trainer"]["mode"] == "min"
    overrides = resume.expand(["resume=run"])

    def resumed(*typed: str, mode: str) -> dict[str, Any]:
        config = config_of(*TINY, "trainer.max_steps=4", "trainer.monitor=val/loss", *typed)
        record = {**recorded, "trainer": {**recorded["trainer"], "mode": mode}}
        write_text(run / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(record)))
        for group in ELSEWHERE:
            del config[group]
        kept = resumed_config.resumed(run, {**config, "resume": "run"}, [*overrides, *typed])
        assert kept is not None
        trainer: dict[str, Any] = kept["trainer"]
        return trainer

    assert resumed(mode="min")["mode"] == "min"
    assert resumed(mode="max")["mode"] == "max"  # an older record, with the wrong one
    assert resumed("trainer.mode=min", mode="max")["mode"] == "min"
    with pytest.raises(UserError, match=r"^trainer.monitor=val/accuracy: the run in run chose its"):
        resumed("trainer.monitor=val/accuracy", mode="min")


def test_tables_rank_by_the_direction() -> None:
    def row(job: int, loss: float, mode: str | None) -> comparison.Row:
        summary = {"best": {"metric": "val/accuracy", "value": 0.5}, "val": {"val/loss": loss}}
        run = type("R", (), {"summary": summary, "config": {"trainer": {"mode": mode}}})
        return comparison.Row(str(job), "completed", {"x": str(job)}, 0, run, "")  # type: ignore[arg-type]

    rows = [row(1, 0.9, "max"), row(2, 0.3, "max")]
    found = comparison.compare(rows, "val/loss")  # none of them monitored it
    assert found.mode == "min" and found.best is rows[1]


# Runs without a validation split.


@pytest.mark.slow
def test_a_run_without_validation_ends_with_its_last_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = ("data.source.num_val=0", "hydra.run.dir=run", "trainer.max_steps=7")
    assert launched(*asked, draws=True) is None
    assert "the last weights are the best ones" in capsys.readouterr().err
    run = Path("run")
    summary = read_json(run / "summary.json")
    assert summary["best"] == {"metric": None, "value": None, "step": 7}
    assert "val" not in summary and summary["test"]["test/loss"] > 0
    trainer = read_yaml(run / "config.yaml")["trainer"]
    assert trainer["monitor"] is None and trainer["mode"] is None
    assert (run / "report.html").is_file() and (run / "plots" / "learning_curves.png").is_file()
    assert not any("val/loss" in line for line in metrics_of(run))

    loaded = load_run(run)
    assert loaded.step == 7
    script("evaluate").main(["run=run", "split=test"])
    assert "The run itself measured the same" in capsys.readouterr().out
    script("evaluate").main(["run=run", "split=train"])
    with one_line_and_exit_code_2(capsys, "split=val does not exist in this data"):
        script("evaluate").main(["run=run", "split=val"])
    torch.set_num_threads(1)
    found = comparison.compare(comparison.rows_of([load(run)]))
    assert found.settings == [] and found.best is None
    comparison.write_csv(found.rows, Path("table.csv"))
    side_by_side.write_page(found, Path("table.html"), "none")


def test_it_is_killed_and_resumed_like_any_other(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", *NO_VAL)
    for stop in (1, 4, 6):
        assert train(tmp_path / "cut", *NO_VAL, stop_at=stop)["status"] == "interrupted"
    summary = train(tmp_path / "cut", *NO_VAL)
    assert summary["weights_sha256"] == whole["weights_sha256"]
    assert repr(metrics_of(tmp_path / "cut")) == repr(metrics_of(tmp_path / "whole"))
    assert summary["best"] == whole["best"] == {"metric": None, "value": None, "step": 12}


@pytest.mark.slow
def test_a_command_is_repeated_without_validation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default names a monitor and the record has none: both are the same config."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training, "draw", lambda folder: None)
    for typed in ([], ["trainer.monitor=val/loss"]):
        same = ("data.source.num_val=0", f"hydra.run.dir=run{len(typed)}", *typed)
        launched(*same, "trainer.max_steps=3")
        launched(*same, "trainer.max_steps=5")
        assert read_json(Path(f"run{len(typed)}/summary.json"))["best"]["step"] == 5


def test_a_monitor_of_null_evaluates_and_keeps_the_last(tmp_path: Path) -> None:
    summary = train(tmp_path, *LEARNS, "trainer.monitor=null")
    assert summary["best"] == {"metric": None, "value": None, "step": 8}
    assert summary["val"]["val/loss"] == metrics_of(tmp_path)[-2]["val/loss"]
    assert (tmp_path / "checkpoints" / "best").resolve().name == "step_00000008"


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("trainer.early_stopping.patience=3", "trainer.early_stopping.patience=3"),
        ("scheduler=plateau", "scheduler=plateau"),
    ],
)
def test_without_a_monitor_nothing_may_decide_by_it(override: str, key: str) -> None:
    with pytest.raises(UserError, match=f"{key}: the data has no validation split"):
        training.build(config_of(*NO_VAL, override), CPU)
    config = composed(*TINY, "trainer.monitor=null", override)
    with pytest.raises(UserError, match=f"{key}: trainer.monitor=null"):
        check(config, config.hydra.runtime.choices)


def test_a_search_needs_something_to_search_for() -> None:
    from regrow.sweep.kinds import Search
    from regrow.sweep.search import objectives

    def asked(*overrides: str, **options: Any) -> tuple[list[str], list[str]]:
        node = config_of("sweep=optuna")["sweep"]
        node = {k: v for k, v in node.items() if not k.startswith("_")}
        return objectives(Search(**{**node, **options}), config_of(*TINY, *overrides))

    with pytest.raises(UserError, match=r"sweep\.metric=null: the data has no validation split"):
        asked("data.source.num_val=0")
    with pytest.raises(UserError, match=r"sweep\.metric=val/loss: the data has no validation"):
        asked("data.source.num_val=0", metric="val/loss")
    with pytest.raises(UserError, match=r"sweep\.metric=null: trainer\.monitor=null"):
        asked("trainer.monitor=null")
    assert asked("data.source.num_val=0", metric="parameters") == (["parameters"], ["minimize"])
    assert asked("trainer.monitor=val/loss") == (["val/loss"], ["minimize"])
    assert asked() == (["val/accuracy"], ["maximize"])
    assert asked(metric=["val/loss", "val/f1"])[1] == ["minimize", "maximize"]
    with pytest.raises(UserError, match="say whether more is better"):
        asked(metric="val/score")


@pytest.mark.parametrize(
    ("source", "lacks"),
    [
        ({"val_fraction": 0.0}, True),
        ({"val_fraction": 0.1}, False),
        ({"val_fraction": 0, "val_file": "val.csv"}, False),
        ({"val_fraction": 0, "val_file": None}, True),
        ({"num_val": 0}, True),
        ({"train": {}, "val": None}, True),
        ({"anything": 1}, False),
    ],
)
def test_some_sources_are_sure_to_have_no_validation_split(
    source: dict[str, Any], lacks: bool, tmp_path: Path
) -> None:
    assert monitor.lacks_val(source) == lacks
    (tmp_path / "val").mkdir()
    assert not monitor.lacks_val({"val_fraction": 0, "root": str(tmp_path)})


@pytest.mark.parametrize("source", ["digits", "csv", "image_folder"])
def test_every_source_trains_without_validation(source: str, tmp_path: Path) -> None:
    overrides = [f"data={source}", "data.source.val_fraction=0"]
    if source == "csv":
        rows = [f"{'ab'[n % 2]},{n},{-n}" for n in range(40)]
        (tmp_path / "rows.csv").write_text("\n".join(["label,x,y", *rows]))
        overrides += [f"data.root={tmp_path}", "data.source.train_file=rows.csv"]
        overrides += ["data.source.target_columns=[label]", "data.target_kind=multiclass"]
        overrides += ["data.num_classes=2", "data.num_outputs=2", "data.input_shape=[2]"]
    if source == "image_folder":
        from PIL import Image

        for number in range(20):
            file = tmp_path / "images" / "ab"[number % 2] / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (number * 12, 0, number)).save(file)
        overrides += [f"data.root={tmp_path / 'images'}", "data.num_classes=2"]
        overrides += ["data.input_shape=[3,8,8]", "data.source.resize=8", "data.num_workers=0"]
    run = finished(tmp_path / "run", *overrides)
    summary = read_json(run / "summary.json")
    assert summary["best"] == {"metric": None, "value": None, "step": 4} and summary["test"]
    assert load_run(run).step == 4


# Messages at the start or at the event.


def test_a_run_that_few_would_mean_says_so() -> None:
    def lines(*overrides: str) -> list[str]:
        config = config_of(*TINY, *overrides)
        return what_is_odd(config, training.build(config, CPU))

    assert lines() == []
    (line,) = lines("data.batch_size=51")
    assert "data.batch_size=51 is more than the 50 training examples" in line
    (line,) = lines("scheduler.warmup_steps=13")
    assert "ends at step 12, in the warm-up of 13 steps" in line
    assert lines("scheduler.warmup_steps=12") == lines("scheduler.warmup_fraction=1.0") == []
    timed = ("scheduler=constant", "trainer.max_epochs=null", "trainer.max_seconds=9")
    assert lines(*timed, "scheduler.warmup_steps=9") == []  # not known yet


def test_a_time_limit_in_the_warm_up_is_told_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training, "draw", lambda folder: None)
    launched("scheduler.warmup_steps=13", "trainer.max_epochs=900", "trainer.max_seconds=1e-9")
    assert "in the warm-up of 13 steps" in capsys.readouterr().err


def test_a_nan_monitor_that_ends_the_run_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = loop.evaluate

    def broken(*arguments: Any, **named: Any) -> Any:
        values, details = real(*arguments, **named)
        return {**values, "val/accuracy": float("nan")}, details

    monkeypatch.setattr(loop, "evaluate", broken)
    caplog.set_level(logging.WARNING)
    summary = train(tmp_path, *LEARNS, "trainer.early_stopping.patience=1")
    assert summary["stopped_early"] and summary["steps"] == 2
    said = "step 2: early stopping ends the run: val/accuracy is NaN"
    assert [said in record.message for record in caplog.records].count(True) == 1
    caplog.clear()
    train(tmp_path / "on", *LEARNS)  # without early stopping, nothing ends
    assert "early stopping" not in caplog.text


def test_an_early_stop_is_told_with_its_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    options = ("trainer.early_stopping.patience=1", "trainer.early_stopping.min_delta=10")
    assert train(tmp_path, *LEARNS, *options)["stopped_early"]
    said = "has not improved in 2 evaluations (trainer.early_stopping.patience=1)"
    assert [said in record.message for record in caplog.records].count(True) == 1


OTHERS = [
    ("adamw", "sgd"),
    ("sgd", "adamw"),
    ("muon", "adamw"),
    ("adamw", "muon"),
    ("sgd", "rmsprop"),
]


@pytest.mark.parametrize(
    ("first", "second", "older"),
    [
        *((*others, older) for older in (False, True) for others in OTHERS),
        ("adam", "adamw", False),  # which have the same settings
    ],
)
def test_another_optimizer_starts_without_moments_and_says_so(
    first: str, second: str, older: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """`older`: the checkpoint does not name the class of its moments."""
    from lab import optim

    train(tmp_path, *TINY, f"optimizer={first}", stop_at=5)
    with pytest.MonkeyPatch.context() as patch:
        if older:
            real = optim.load
            patch.setattr(
                optim,
                "load",
                lambda o, state: real(o, {k: v for k, v in state.items() if k != optim.CLASS}),
            )
        summary = train(tmp_path, *TINY, f"optimizer={second}")
    assert summary["status"] == "completed" and summary["steps"] == 12
    assert "do not carry over" in caplog.text
    caplog.clear()
    train(tmp_path / "same", *TINY, f"optimizer={first}", stop_at=5)
    train(tmp_path / "same", *TINY, f"optimizer={first}")
    assert "do not carry over" not in caplog.text


@pytest.mark.parametrize("key", ["optimizer", "scheduler"])
def test_a_forgotten_partial_is_named(key: str) -> None:
    config = config_of(*TINY)
    del config[key]["_partial_"]
    with pytest.raises(UserError, match="add _partial_: true") as refused:
        training.build(config, CPU)
    assert "other code" not in str(refused.value)


def test_a_forgotten_partial_of_a_loss_is_named() -> None:
    config = config_of(*TINY, *REGRESSION)
    del config["loss"]["_partial_"]
    with pytest.raises(UserError, match="add _partial_: true"):
        training.build(config, CPU)


def test_a_record_that_lacks_a_key_is_still_of_other_code() -> None:
    config = config_of(*TINY)
    del config["trainer"]["clip_norm"]
    with pytest.raises(UserError, match="made by other code"):
        training.build(config, CPU)
