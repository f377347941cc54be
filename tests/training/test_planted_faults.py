"""`debug=overfit` names planted faults, and nothing else."""

from __future__ import annotations

import dataclasses
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from running import CPU, TINY, config_of, metrics_of, train, train_config

from regrow.config.targets import allow
from regrow.errors import UserError
from regrow.project import CONF, ROOT
from regrow.runs import training
from regrow.runs.first_steps import FirstSteps
from regrow.runs.lab import lab

ONE = ("trainer.num_threads=1", "trainer.device=cpu")
SHORT = ("debug=overfit", "trainer.max_steps=6")
CLASSES = (*TINY, *SHORT)
OWN = (*CLASSES, "data.normalize=none")
VALUES = (*CLASSES, "task=regression", "data.target_kind=regression", "data.num_classes=null")
VALUE = (*VALUES, "data.num_outputs=1")


def watched(folder: Path, overrides: tuple[str, ...], **nodes: str | dict[str, Any]) -> FirstSteps:
    """Train a run whose `nodes` are planted, with the checks of a command, and return them."""
    config = config_of(*overrides)
    for name, node in nodes.items():
        node = {"_target_": node} if isinstance(node, str) else node
        if name == "data":
            config["data"]["source"] = node
            continue
        partial = {"_partial_": True} if name in ("loss", "step") else {}
        outputs = {"num_outputs": config["data"]["num_outputs"]} if name == "model" else {}
        config[name] = {**outputs, **partial, **node}
    torch.set_num_threads(1)
    allow(config)
    folder.mkdir(exist_ok=True)
    objects = training.build(config, CPU)
    lab().check_first_batch(objects, CPU)
    watch = FirstSteps(objects, CPU, overfits=False)
    training.train(objects, config, folder, CPU, training.StopRequest(), watch=watch)
    return watch


NET = "planted.Net"
FAULTS: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "a detached layer": (
        r"^model: the gradients of first\.weight, first\.bias are zero in each of these 5 steps"
        r".*this is a frozen layer.*requires_grad_\(False\)\.$",
        CLASSES,
        {"model": "planted.Detached"},
    ),
    "a hook on a layer": (
        r"^model: the gradients of last\.weight, last\.bias are zero.*frozen layer.*a hook on it",
        CLASSES,
        {"model": "planted.HookedLast"},
    ),
    "hooks on all layers": (
        r"^gradients: they are zero for all 4 trainable parameters in each of these 5 steps",
        CLASSES,
        {"model": "planted.Hooked"},
    ),
    "zero_grad with zeros before the update": (
        r"^step: the backward pass gives gradients, and they are gone or zero when the optimizer",
        CLASSES,
        {"model": NET, "step": "planted.zeroing_step"},
    ),
    "outputs (B, 1) against targets (B,)": (
        r"^loss: (sub|rsub) got \(16, 1\) against \(16,\), which broadcasts to \(16, 16\).*squeeze",
        VALUE,
        {"model": NET, "step": "planted.pairs_step"},
    ),
    "softmax before cross entropy": (
        r"^loss: cross_entropy gets probabilities.*Remove the softmax from the model",
        CLASSES,
        {"model": "planted.Softmax", "loss": "planted.plain_cross_entropy"},
    ),
    "a leak": (
        r"^data\.source: 8 of the first 32 val examples have the inputs of a training example, the "
        r"first is number 0\.",
        OWN,
        {"data": {"_target_": "planted.rows", "shared": 8}},
    ),
    "the negative of the loss": (
        r"^loss: it rises when the outputs of task=multiclass move towards the targets.*negative",
        CLASSES,
        {"model": NET, "loss": "planted.negative"},
    ),
    "a step up the slope": (
        r"^step: the first step leads up the slope of the task's loss \(agreement \+1\.00\)",
        CLASSES,
        {"model": NET, "step": "planted.ascending_step"},
    ),
    "optimizer.maximize": (
        r"^step: the first step leads up the slope.*Check optimizer\.maximize",
        (*CLASSES, "+optimizer.maximize=true"),
        {"model": NET},
    ),
    "no rate": (
        r"^optimizer\.lr: no parameter changes in these 5 steps \(the rate is 1e-30\)",
        (*CLASSES, "optimizer.lr=1e-30"),
        {"model": NET},
    ),
    "raw inputs": (
        r"^data\.normalize: the inputs have a root mean square of \d+ and a mean of \d+.*=train",
        ("experiment=breast_cancer", *SHORT, *ONE, "data.normalize=none"),
        {},
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_named_in_one_line_and_alone(fault: str, tmp_path: Path) -> None:
    line, overrides, nodes = FAULTS[fault]
    watch = watched(tmp_path / "run", overrides, **nodes)
    assert len(watch.faults) == 1, watch.faults
    assert re.search(line, watch.faults[0]), watch.faults[0]
    assert "\n" not in watch.faults[0]


def test_an_update_without_any_gradient_is_an_error_of_one_line(tmp_path: Path) -> None:
    for overrides in (CLASSES, TINY):
        with pytest.raises(UserError, match=r"^step: no parameter has a gradient when .*zero_grad"):
            watched(
                tmp_path / str(len(overrides)), overrides, model=NET, step="planted.dropping_step"
            )
    for world in (CPU, dataclasses.replace(CPU, mesh=object())):  # of a sharded model too
        with pytest.raises(UserError, match=r"^step: no parameter has a gradient when .*zero_grad"):
            world.norm([])


FEW = {"_target_": "planted.rows", "shared": 0, "values": 4}
SOUND: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "a plain model": (CLASSES, {"model": NET}),
    "a head that starts at zero": (CLASSES, {"model": "planted.ZeroStart"}),
    "a frozen layer": (CLASSES, {"model": "planted.Frozen"}),
    "a loss of one's own": (CLASSES, {"model": NET, "loss": "planted.plain_cross_entropy"}),
    "outputs and targets (B, 1)": (VALUE, {"model": NET, "step": "planted.column_step"}),
    "a loss below zero": (VALUE, {"model": NET, "loss": "planted.below_zero"}),
    "several values": (VALUES, {"model": NET}),
    "a step of one's own": (CLASSES, {"model": NET, "step": "planted.sound_step"}),
    "no example twice": (OWN, {"data": {"_target_": "planted.rows", "shared": 0}}),
    "features of few values": (OWN, {"data": FEW}),
    "a warm-up": ((*CLASSES, "scheduler.warmup_steps=4"), {"model": NET}),
    "a step that asks for gradients": (CLASSES, {"model": NET, "step": "planted.autograd_step"}),
    "class weights": ((*CLASSES, "loss.class_weights=[1,30,1]"), {"model": NET}),
    "a weight of the positives": (
        ("experiment=breast_cancer", *SHORT, *ONE, "loss.pos_weight=[30]"), {},
    ),
    "a quantile": (VALUE, {"model": NET, "loss": "planted.quantile"}),
    "many slices": ((*CLASSES, "trainer.accumulation_steps=16", "optimizer=sgd"), {"model": NET}),
    "a half": ((*CLASSES, "trainer.precision=bf16"), {"model": NET}),
    "slices": ((*CLASSES, "trainer.accumulation_steps=4"), {"model": NET}),
}  # fmt: skip


@pytest.mark.parametrize("case", SOUND)
def test_no_check_fires_without_a_fault(case: str, tmp_path: Path) -> None:
    overrides, nodes = SOUND[case]
    assert watched(tmp_path / "run", overrides, **nodes).faults == []


def test_the_direction_is_not_judged_after_a_resume(tmp_path: Path) -> None:
    """Momentum remembers other batches then."""
    up = (*CLASSES, "+optimizer.maximize=true", "trainer.checkpoint.save_every_steps=1")
    assert watched(tmp_path / "run", (*up, "trainer.max_steps=2"), model=NET).faults
    resumed = watched(tmp_path / "run", up, model=NET)
    assert resumed.left == 1  # four steps more
    assert resumed.faults == []


def test_a_deliberately_frozen_layer_is_only_a_note(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        watch = watched(tmp_path / "run", CLASSES, model="planted.Frozen")
        frozen = [r for r in caplog.records if "are frozen (requires_grad=False)" in r.getMessage()]
        assert [record.levelno for record in frozen] == [logging.INFO]
        assert "2 of 4 parameters" in frozen[0].getMessage()
        assert "last.weight, last.bias" in frozen[0].getMessage()
    assert watch.faults == [] and watch.frozen == [frozen[0].getMessage()]


EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
STAND_IN = ("data.source._target_=photographs.cifar10", "trainer.device=cpu")
OFFLINE: dict[str, tuple[str, ...]] = {
    "cifar10_fast": (*STAND_IN, "trainer.precision=fp32"),
    "cifar10_resnet18": (*STAND_IN, "trainer.precision=fp32", "data.limit_train=8"),
    "gpt2_124m": (
        *("data=text", "trainer.precision=fp32", "model.layers=2", "model.heads=2"),
        *("model.width=32", "data.batch_size=8", "trainer.accumulation_steps=1"),
        *("data.source.vocabulary=characters", "data.num_classes=76", "data.input_shape=[32]"),
    ),
}
EXAMPLES = {
    "gan_ring": "gan",
    "contrastive_digits": "contrastive",
    "thaw_digits": "thaw",
}


SLOW = ("cifar10_fast", "cifar10_resnet18", "digit_scenes", "persuasion")


@pytest.mark.parametrize(
    "option", [pytest.param(x, marks=pytest.mark.slow) if x in SLOW else x for x in EXPERIMENTS]
)
def test_no_check_fires_on_a_shipped_experiment(option: str, tmp_path: Path) -> None:
    overrides = (f"experiment={option}", *SHORT, *ONE, *OFFLINE.get(option, ()))
    watch = watched(tmp_path / "run", overrides)
    assert watch.faults == []
    assert watch.agreement is not None and watch.agreement < -0.4  # far from the limit


@pytest.mark.parametrize("option", EXAMPLES)
def test_no_check_fires_on_an_example(option: str, tmp_path: Path) -> None:
    folder = f"hydra.searchpath=[file://{ROOT}/src/lab/examples/{EXAMPLES[option]}/conf]"
    assert watched(tmp_path / "run", (f"experiment={option}", folder, *SHORT, *ONE)).faults == []


TABLE = f"{ROOT}/tests/older/table.csv"
DATA = {
    "csv": (
        *(f"data.source.train_file={TABLE}", "data.source.target_columns=[seconds]"),
        *("data.target_kind=regression", "data.num_classes=null", "data.num_outputs=1"),
        *("data.normalize_targets=true", "data.input_shape=[3]", "task=regression"),
    ),
    "image_folder": (
        *(f"data.root={ROOT}/tests/older/photos", "data.num_classes=2"),
        *("data.input_shape=[3,8,8]", "data.batch_size=2"),
    ),
    "synthetic": ("data.source.num_train=128",),
}


@pytest.mark.parametrize("option", DATA)
def test_no_check_fires_on_other_data(option: str, tmp_path: Path) -> None:
    """Experiments use digits, tables, scenes and text; other images must be downloaded."""
    assert watched(tmp_path / "run", (f"data={option}", *DATA[option], *SHORT, *ONE)).faults == []


def test_a_normal_run_warns_of_what_needs_no_further_pass_and_of_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def warnings_of(*overrides: str, **nodes: Any) -> list[str]:
        caplog.clear()
        config = config_of(*overrides)
        for name, target in nodes.items():
            outputs = {"num_outputs": 3} if name == "model" else {"_partial_": True}
            config[name] = {"_target_": target, **outputs}
        allow(config)
        objects = training.build(config, CPU)
        lab().check_first_batch(objects, CPU)
        return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]

    assert warnings_of("experiment=breast_cancer", *ONE) == []
    (line,) = warnings_of("experiment=breast_cancer", *ONE, "data.normalize=none")
    assert line.startswith("data.normalize: the inputs have a root mean square of")
    loss = "planted.plain_cross_entropy"
    assert warnings_of(*TINY, model=NET, loss=loss) == []
    (line,) = warnings_of(*TINY, model="planted.Softmax", loss=loss)
    assert line.startswith("loss: cross_entropy gets probabilities")


DETACHED = "first.weight, first.bias got no gradient in the first"


def test_a_normal_run_names_a_layer_that_the_first_steps_do_not_reach(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def warned(folder: str, model: str, *overrides: str, stop_at: int | None = None) -> list[str]:
        caplog.clear()
        config = config_of(*TINY, "trainer.max_steps=8", *overrides)
        config["model"] = {"_target_": model, "num_outputs": 3}
        train_config(tmp_path / folder, config, stop_at=stop_at)
        lines = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
        return [line for line in lines if "got no gradient" in line]

    (line,) = warned("run", "planted.Detached", "trainer.accumulation_steps=4")
    assert f"model: {DETACHED} 5 steps, so they do not train: " in line
    assert warned("run", "planted.Detached", "trainer.max_steps=16") == []  # resumed
    assert warned("early", "planted.Detached", stop_at=2) == []
    assert len(warned("early", "planted.Detached")) == 1
    (line,) = warned("short", "planted.Detached", "trainer.max_steps=1")
    assert f"model: {DETACHED} step, so" in line
    # The negative controls: each gets a gradient in some step, is frozen, or is dropped on purpose.
    for name in ("Net", "Frozen", "ZeroStart", "Sometimes"):
        assert warned(name, f"planted.{name}") == []
    thaws = "{_target_: lab.examples.thaw.step.thaw_step, frozen: ['first.*'], until_step: 9}"
    assert warned("thaws", NET, f"+step={thaws}") == []
    assert warned("watched", "planted.Detached", "trainer.find_faults=true") == []  # other words


def test_a_step_that_computes_no_score_logs_none(tmp_path: Path) -> None:
    overrides = (*TINY, "trainer.max_epochs=1", "trainer.accumulation_steps=3")
    own = {**config_of(*overrides), "step": {"_target_": "planted.scoreless_step"}}
    own["step"]["_partial_"] = True
    train_config(tmp_path / "own", own)
    train(tmp_path / "shipped", *overrides)  # the control
    for name, is_scored in (("own", False), ("shipped", True)):
        keys = {key for line in metrics_of(tmp_path / name) for key in line}
        assert {"train/loss", "train/epoch_loss"} <= keys
        assert ("train/accuracy" in keys, "train/epoch_accuracy" in keys) == (is_scored, is_scored)
