"""Recipes and debug modes: each composes, passes the check, and trains."""

from __future__ import annotations

from pathlib import Path

import pytest
from running import composed, metrics_of, train

from regrow.check import check
from regrow.config import CONF

EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
DEBUG = sorted(path.stem for path in (CONF / "debug").glob("*.yaml"))
ONE = ("trainer.num_threads=1", "trainer.device=cpu")
# CIFAR-10 is not bundled: images of its shape and classes stand in for it.
IMAGES = (
    "data=synthetic",
    "data.source.num_train=48",
    "data.source.num_val=16",
    "data.source.num_test=16",
    "data.batch_size=16",
)


@pytest.mark.parametrize("option", EXPERIMENTS)
def test_an_experiment_opens_as_a_lab_note_and_is_sound(option: str) -> None:
    first, question, command = (CONF / "experiment" / f"{option}.yaml").read_text().split("\n")[:3]
    assert first == "# @package _global_" and question.startswith("# ")
    assert f"experiment={option}" in command
    config = composed(f"experiment={option}")
    check(config, config.hydra.runtime.choices)
    assert config.name == option


@pytest.mark.parametrize("option", [name for name in EXPERIMENTS if "cifar" not in name])
def test_an_experiment_takes_two_steps_of_everything(option: str, tmp_path: Path) -> None:
    summary = train(tmp_path, f"experiment={option}", "debug=fast", *ONE)
    assert summary["status"] == "completed" and summary["test"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_cifar_recipe_trains_on_images_of_its_shape(precision: str, tmp_path: Path) -> None:
    recipe = ("experiment=cifar10_resnet18", "trainer.max_steps=2", *IMAGES, *ONE)
    summary = train(tmp_path, *recipe, f"trainer.precision={precision}")
    assert summary["status"] == "completed" and summary["steps"] == 2


@pytest.mark.parametrize("option", DEBUG)
@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_a_debug_mode_runs(option: str, model: str, tmp_path: Path) -> None:
    summary = train(tmp_path, f"debug={option}", f"model={model}", *ONE, "trainer.max_steps=2")
    assert summary["status"] == "completed"
    assert (tmp_path / "profile" / "trace.json").exists() is (option == "profile")


@pytest.mark.slow
@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_one_batch_can_be_learnt_by_heart(model: str, tmp_path: Path) -> None:
    train(tmp_path, "debug=overfit", f"model={model}", *ONE)
    losses = [line["train/loss"] for line in metrics_of(tmp_path) if "train/loss" in line]
    assert losses[-1] < 0.01
