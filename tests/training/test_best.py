"""Which evaluation is the best, and that its weights are kept and tested."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from running import CPU, TINY, config_of, train

from lab import loop, progress, step
from regrow.checkpoint import writer
from regrow.errors import UserError
from regrow.feeding.batch import LoadedBatch
from regrow.runs import training

NAN = math.nan
EACH_STEP = ("trainer.eval_every_steps=1", "trainer.checkpoint.save_every_epochs=null")


@pytest.fixture
def evaluations(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[float]], None]:
    """Set the results of the evaluations in training, one after the other."""
    evaluate = loop.evaluate

    def set_to(values: list[float]) -> None:
        left = iter(values)

        def measured(state: Any, *args: Any, **more: Any) -> Any:
            found, details = evaluate(state, *args, **more)
            return {**found, "val/accuracy": next(left)}, details

        monkeypatch.setattr(loop, "evaluate", measured)

    return set_to


@pytest.mark.parametrize(
    ("mode", "values", "best"),
    [
        ("max", [0.5, 0.9, 0.9, 0.7], 3),
        ("max", [0.9, 0.5, 0.9, 0.9], 4),
        ("max", [0.5, 0.6, 0.5, 0.5], 2),
        ("min", [0.5, 0.9, 0.5, 0.7], 3),
        ("max", [NAN, 0.5, NAN, NAN], 2),
    ],
)
def test_the_latest_of_equal_evaluations_is_best_and_kept(
    mode: str, values: list[float], best: int, tmp_path: Path, evaluations: Any
) -> None:
    evaluations(values)
    summary = train(tmp_path, *TINY, *EACH_STEP, f"trainer.mode={mode}", "trainer.max_steps=4")
    assert summary["best"]["step"] == best
    assert (tmp_path / "checkpoints" / "best").resolve().name == f"step_{best:08d}"


@pytest.mark.parametrize("min_delta", [0, 0.01])
def test_an_equal_evaluation_is_announced_as_such(
    min_delta: float, tmp_path: Path, evaluations: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    evaluations([0.5, 0.9, 0.9, 0.905, 0.7])
    stopping = f"trainer.early_stopping.min_delta={min_delta}"
    train(tmp_path, *TINY, *EACH_STEP, "trainer.max_steps=5", stopping)
    lines = [record.message for record in caplog.records if "val/loss" in record.message]
    ends = [line.partition("val/accuracy ")[2] for line in lines]
    assert ends == [
        "0.5 (best)",
        "0.9 (best)",
        "0.9 (equals the best and replaces it)",
        "0.905 (best)",
        "0.7",
    ]
    # The epochs have four steps: the means of one do not stand beside an evaluation in the next.
    begins = [line.partition("_loss" if "_loss" in line else "/loss")[0] for line in lines]
    assert begins == [
        *(f"in epoch 1, step {number}: val" for number in (1, 2, 3)),
        "epoch 1, step 4: train/epoch",
        "in epoch 2, step 5: val",
    ]


def test_a_changed_rate_is_told_with_the_name_of_its_optimizer(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    optimizers = {}
    for name in ("generator", "critic"):
        parameter = torch.nn.Parameter(torch.ones(1))
        groups = [{"params": [parameter], "lr_scale": 1.0, "base_lr": 1.0}]
        optimizers[name] = torch.optim.SGD(groups, lr=0.5, momentum=0.9)
        parameter.sum().backward()
        optimizers[name].step()  # so that it has a state
    schedule = {"generator": lambda step: 0.5, "critic": lambda step: 0.25}
    state: Any = SimpleNamespace(step=3, schedule=schedule, optimizer=optimizers)
    progress.tell_of_another_rate(state)
    (line,) = caplog.messages
    assert line.startswith("the learning rate of critic's step 3 was 0.5 and would now be 0.25")
    assert optimizers["critic"].param_groups[0]["lr"] == 0.25


def test_an_equal_evaluation_after_a_skipped_step_does_not_become_the_best(
    tmp_path: Path,
    evaluations: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    train_step = step.train_step

    def third_is_bad(state: Any, batch: Any, plan: Any) -> Any:
        if state.step == 2:
            bad = torch.full_like(batch.inputs, NAN)
            batch = LoadedBatch(
                bad, batch.targets, batch.weights, batch.num_local, batch.num_global
            )
        return train_step(state, batch, plan)

    monkeypatch.setattr(step, "train_step", third_is_bad)
    evaluations([0.5, 0.9, 0.9, 0.7])
    summary = train(tmp_path, *TINY, *EACH_STEP, "trainer.max_steps=4")
    assert summary["best"]["step"] == 2
    assert (tmp_path / "checkpoints" / "best").resolve().name == "step_00000002"
    assert "were not saved" not in caplog.text
    # The end of a run, like a stop, saves such a step too. It must not push out the best.
    evaluations([0.5, 0.9, 0.9, 0.7])
    for steps in (3, 4):
        summary = train(tmp_path / "short", *TINY, *EACH_STEP, f"trainer.max_steps={steps}")
        assert summary["best"]["step"] == 2
        assert (tmp_path / "short" / "checkpoints" / "best").resolve().name == "step_00000002"
    assert "were not saved" not in caplog.text


def test_a_checkpoint_has_the_value_of_its_own_step_alone(tmp_path: Path, evaluations: Any) -> None:
    evaluations([0.9, 0.5, 0.7])
    run = (*TINY, "trainer.eval_every_steps=2", "trainer.checkpoint.save_every_steps=1")
    train(tmp_path, *run, "trainer.checkpoint.keep_last=9", "trainer.max_steps=6")
    kept = writer.complete(tmp_path / "checkpoints").values()
    values = {facts["step"]: facts["value"] for facts in kept}
    assert values == {
        1: None,
        2: 0.9,
        3: None,
        4: 0.5,
        5: None,
        6: 0.7,
    }  # by which rotation ranks them


def test_early_stopping_and_plateau_take_an_equal_evaluation_for_no_improvement() -> None:
    config = config_of(*TINY, "scheduler=plateau", "scheduler.patience=9")
    objects = training.build(config, CPU)
    for value in (0.5, 0.5, 0.5):
        loop.take_in({"val/accuracy": value}, objects.state, objects.options)
    schedule: Any = objects.state.schedule
    assert objects.state.progress.evaluations_without_improvement == schedule.waited == 2


def test_a_step_that_does_not_take_state_batch_and_plan_is_refused_before_a_folder_is_made(
    tmp_path: Path,
) -> None:
    config = config_of(*TINY)
    config["step"] = {"_target_": config["model"]["_target_"], "_partial_": True}
    with pytest.raises(UserError, match=r"step\._target_=.*MLP must take \(state, batch, plan\): "):
        training.build(config, CPU)
