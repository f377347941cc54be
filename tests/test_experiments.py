"""Recipes and debug modes: each composes, passes the check, and trains."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from running import CPU, composed, config_of, metrics_of, train

from regrow.config.check import check
from regrow.project import CONF
from regrow.runs import training

EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
DEBUG = sorted(path.stem for path in (CONF / "debug").glob("*.yaml"))
ONE = ("trainer.num_threads=1", "trainer.device=cpu")
CIFAR = [name for name in EXPERIMENTS if "cifar" in name]
LARGE = ["gpt2_124m"]  # see training/test_language_runs.py
STAND_IN = ("data.source._target_=photographs.cifar10", "data.batch_size=16")


@pytest.mark.parametrize("option", EXPERIMENTS)
def test_an_experiment_opens_as_a_lab_note_and_is_sound(option: str) -> None:
    first, question, command = (CONF / "experiment" / f"{option}.yaml").read_text().split("\n")[:3]
    assert first == "# @package _global_" and question.startswith("# ")
    assert f"experiment={option}" in command
    config = composed(f"experiment={option}")
    check(config, config.hydra.runtime.choices)
    assert config.name == option


def test_gpt2_keeps_its_precision_and_its_micro_batches_on_several_gpus() -> None:
    page = (CONF.parent / "docs" / "recipes" / "language.md").read_text(encoding="utf-8")
    (several,) = re.findall(r"or several\n\(`(.*)`\)", page)
    one, config = (composed("experiment=gpt2_124m", *more) for more in ((), several.split()))
    assert config.trainer.precision == one.trainer.precision == "bf16"
    devices, slices = config.trainer.devices, config.trainer.accumulation_steps
    assert devices > 1 and devices * slices == one.trainer.accumulation_steps


@pytest.mark.parametrize("option", sorted({*EXPERIMENTS} - {*CIFAR, *LARGE}))
def test_an_experiment_takes_two_steps_of_everything(option: str, tmp_path: Path) -> None:
    summary = train(tmp_path, f"experiment={option}", "debug=fast", *ONE)
    assert summary["status"] == "completed" and summary["test"]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.nightly)])
@pytest.mark.parametrize("option", CIFAR)
def test_a_cifar_recipe_trains_on_images_of_its_shape(
    option: str, precision: str, tmp_path: Path
) -> None:
    recipe = (f"experiment={option}", "trainer.max_steps=2", *STAND_IN, *ONE)
    summary = train(tmp_path, *recipe, f"trainer.precision={precision}")
    assert summary["status"] == "completed" and summary["steps"] == 2


@pytest.mark.nightly
@pytest.mark.slow
def test_the_first_layer_of_cifar10_fast_comes_from_the_data_unless_weights_are_given(
    tmp_path: Path,
) -> None:
    recipe = ("experiment=cifar10_fast", *STAND_IN, *ONE)

    def first_layer(*overrides: str) -> torch.Tensor:
        model: Any = training.build(config_of(*recipe, *overrides), CPU).state.model
        weight: torch.Tensor = model.whiten.weight.detach().clone()
        return weight

    made = first_layer()
    assert torch.equal(made, first_layer())
    assert not torch.equal(made, first_layer("data.source.seed=1"))
    other = ("data.source.seed=1", "trainer.max_steps=2", f"hydra.run.dir={tmp_path}")
    train(tmp_path, *recipe, *other)
    assert torch.equal(first_layer(f"init_from={tmp_path}"), first_layer("data.source.seed=1"))


@pytest.mark.parametrize("option", DEBUG)
@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_a_debug_mode_runs(option: str, model: str, tmp_path: Path) -> None:
    summary = train(tmp_path, f"debug={option}", f"model={model}", *ONE, "trainer.max_steps=2")
    assert summary["status"] == "completed"
    assert (tmp_path / "profile" / "trace.json").exists() is (option == "profile")


@pytest.mark.slow
def test_labels_are_smoothed_but_under_overfit() -> None:
    def smoothing(*overrides: str) -> float:
        found = config_of(*overrides)["loss"]["label_smoothing"]
        assert isinstance(found, float)
        return found

    assert smoothing() == smoothing("debug=fast") == 0.1
    assert smoothing("debug=overfit") == smoothing("loss=cross_entropy") == 0
    assert smoothing("debug=overfit", "experiment=digits_fast") == 0
    assert smoothing("debug=overfit", "loss.label_smoothing=0.3") == 0.3


@pytest.mark.slow
@pytest.mark.parametrize("model", [pytest.param("mlp", marks=pytest.mark.nightly), "cnn"])
def test_one_batch_can_be_learnt_by_heart(model: str, tmp_path: Path) -> None:
    train(tmp_path, "debug=overfit", f"model={model}", *ONE)
    losses = [line["train/loss"] for line in metrics_of(tmp_path) if "train/loss" in line]
    assert losses[-1] < 0.01
