from __future__ import annotations

import copy
import csv
import dataclasses
import hashlib
import json
import math
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from finished import process
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from PIL import Image
from running import CPU, config_of

from lab import loop
from lab.build import BuiltObjects, plan_of
from lab.plan import LoopPlan
from lab.schedules import Plateau
from regrow.config.hydra_access import version_arguments
from regrow.errors import UserError
from regrow.processes.interrupt import StopRequest
from regrow.project import CONF
from regrow.runs import lr_finder, training
from regrow.runs.find_lr import find_lr
from regrow.runs.lr_finder import Curve, RangeTest, smooth, still_falling, suggest

SMALL = ("trainer.device=cpu", "trainer.num_threads=1")
TEST = RangeTest(min_lr=1e-6, max_lr=10.0, num_steps=200, divergence_factor=4.0)


def job(*overrides: str) -> DictConfig:
    """Return what Hydra passes to the script."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), **version_arguments()):
        cfg = compose("find_lr", overrides=[*SMALL, *overrides], return_hydra_config=True)
    OmegaConf.set_readonly(cfg.hydra, False)
    with open_dict(cfg):
        cfg.hydra.mode = RunMode.RUN
    HydraConfig.instance().set_config(cfg)
    return OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])


def built(*overrides: str) -> tuple[BuiltObjects, LoopPlan]:
    config = config_of(*SMALL, *overrides)
    objects = training.build(config, CPU)
    nowhere: dict[str, Any] = {"record": None, "checkpoints": None}
    return objects, plan_of(objects, config["seed"], CPU, StopRequest(), **nowhere)


def range_tested(state: Any, plan: Any, test: RangeTest) -> Curve:
    def step(batch: Any) -> list[float]:
        return plan.train_step(state, batch, plan.step).totals.read()

    return lr_finder.range_test(state, plan.train, step, test)


def fingerprint(objects: BuiltObjects) -> str:
    """Return the SHA-256 of the whole state, and the files left beside it."""
    state = objects.state
    gradients = [p.grad for p in state.model.parameters()]
    text = repr((copy.deepcopy(state.state_dict()), gradients, state.model.training))
    digest = hashlib.sha256(text.encode())
    for value in state.model.state_dict().values():
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()


def loss_after(lr: float, *overrides: str, epochs: int = 5) -> float:
    """Return the validation loss of a run at `lr`."""
    objects, plan = built(*overrides, f"optimizer.lr={lr}", f"trainer.max_epochs={epochs}")
    state = objects.state
    for epoch in range(epochs):
        for batch in plan.train.epoch(epoch):
            plan.train_step(state, batch, plan.step)
            state.progress.step += 1
    values, _ = loop.evaluate(state, objects.sets["val"], plan, name="val")
    return values["val/loss"]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "overrides",
    [
        ("model=mlp", "optimizer=adamw", "trainer.ema_decay=0.9"),
        pytest.param(("model=cnn", "optimizer=sgd", "scheduler=plateau"), marks=pytest.mark.slow),
        pytest.param(("model=mlp", "optimizer=muon", "model.norm=batch"), marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_nothing_of_the_run_changes(overrides: tuple[str, ...]) -> None:
    objects, plan = built(*overrides)
    schedule = objects.state.schedule
    before = fingerprint(objects)
    curve = range_tested(objects.state, plan, RangeTest(**{**vars(TEST), "num_steps": 30}))
    assert fingerprint(objects) == before and objects.state.schedule is schedule
    assert len(curve.lrs) > 5 and curve.losses[0] != curve.losses[-1]
    plan.train_step(objects.state, next(plan.train.epoch(0)), plan.step)  # the negative control
    assert fingerprint(objects) != before


def test_a_run_after_the_test_is_the_run_without_it() -> None:
    def trained(tested: bool) -> list[float]:
        objects, plan = built("model=mlp", "scheduler=plateau", "model.dropout=0.2")
        assert isinstance(objects.state.schedule, Plateau)
        if tested:
            range_tested(objects.state, plan, RangeTest(**{**vars(TEST), "num_steps": 25}))
        losses = []
        for batch in plan.train.epoch(0):
            losses.append(plan.train_step(objects.state, batch, plan.step).totals.loss)
            objects.state.progress.step += 1
        return losses

    assert trained(tested=True) == trained(tested=False)


def test_the_state_is_put_back_when_the_test_fails() -> None:
    objects, plan = built("model=mlp")
    before = fingerprint(objects)

    class Failing:
        steps_per_epoch = 3

        def epoch(self, epoch: int, start: int = 0) -> Any:
            yield next(plan.train.epoch(0))
            raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        range_tested(objects.state, dataclasses.replace(plan, train=Failing()), TEST)
    assert fingerprint(objects) == before


def test_the_rate_grows_in_equal_factors_and_scales_with_the_groups() -> None:
    assert TEST.lr(0) == 1e-6 and TEST.lr(199) == pytest.approx(10)
    factors = [TEST.lr(index + 1) / TEST.lr(index) for index in range(199)]
    assert max(factors) - min(factors) < 1e-9
    objects, plan = built("model=mlp", "optimizer=sgd", "scheduler=onecycle")
    seen = []
    step = objects.state.optimizer.step
    objects.state.optimizer.step = lambda *a, **k: (  # type: ignore[method-assign]
        seen.append(objects.state.optimizer.param_groups[0]["lr"]),
        step(*a, **k),
    )
    test = RangeTest(min_lr=1e-5, max_lr=1e-3, num_steps=30, divergence_factor=4.0)
    curve = range_tested(objects.state, plan, test)
    assert seen == pytest.approx([test.lr(index) for index in range(30)], rel=1e-9)
    assert curve.lrs == [test.lr(index) for index in range(30)]


def test_it_stops_where_the_loss_diverges() -> None:
    objects, plan = built("model=mlp", "optimizer=sgd")
    curve = range_tested(
        objects.state,
        plan,
        RangeTest(min_lr=1e-3, max_lr=1e4, num_steps=100, divergence_factor=4.0),
    )
    assert len(curve.lrs) < 100
    assert curve.ended in ("the loss diverged", "the loss is no longer finite")
    assert all(math.isfinite(loss) for loss in curve.losses)


def curve_of(function: Any, steps: int = 200) -> Curve:
    lrs = [TEST.lr(index) for index in range(steps)]
    losses = [function(math.log10(lr), index) for index, lr in enumerate(lrs)]
    return Curve(lrs, losses, smooth(losses, 6), "all steps done")


def test_the_suggestion_lies_below_the_rate_of_the_lowest_loss() -> None:
    def valley(exponent: float, index: int) -> float:  # lowest at 1e-2, with noise
        fall = 2.3 - 1.5 * math.exp(-((exponent + 2) ** 2))
        return fall + (0.05 if index % 2 else -0.05)

    assert 1e-2 / 4 < suggest(curve_of(valley)) < 1e-2 / 2.5
    assert not still_falling(curve_of(valley))
    falling = curve_of(lambda exponent, index: 2 - exponent)
    assert still_falling(falling)


def test_a_loss_that_never_fell_gives_no_suggestion() -> None:
    for function in (
        lambda exponent, index: 2.3,
        lambda exponent, index: 2.3 + 0.1 * (index % 3),
        lambda exponent, index: 3 + exponent,
    ):
        with pytest.raises(UserError, match="the loss fell at no rate"):
            suggest(curve_of(function))
    with pytest.raises(UserError, match="the loss fell at no rate"):
        suggest(Curve([], [], [], "the loss is no longer finite"))


def test_smoothing_keeps_a_line_and_its_place() -> None:
    line = [0.5 * index for index in range(50)]
    assert smooth(line, 2.0)[10:40] == pytest.approx(line[10:40])
    peak = [0.0] * 20 + [1.0] + [0.0] * 20
    smoothed = smooth(peak, 2.0)
    assert smoothed.index(max(smoothed)) == 20 and max(smoothed) < 0.3


@pytest.mark.parametrize(
    ("model", "optimizer"),
    [
        ("mlp", "adamw"),
        ("mlp", "sgd"),
        pytest.param("cnn", "adamw", marks=pytest.mark.slow),
        pytest.param("cnn", "sgd", marks=[pytest.mark.slow, pytest.mark.nightly]),
        pytest.param("mlp", "muon", marks=[pytest.mark.slow, pytest.mark.nightly]),
        pytest.param("cnn", "rmsprop", marks=[pytest.mark.slow, pytest.mark.nightly]),
    ],
)
@pytest.mark.nightly
@pytest.mark.slow
def test_training_at_the_suggestion_is_better_than_far_below_it(model: str, optimizer: str) -> None:
    # Without label smoothing, whose loss has a floor above zero.
    overrides = (f"model={model}", f"optimizer={optimizer}", "loss=cross_entropy")
    lrs = []
    for _ in range(2):
        objects, plan = built(*overrides)
        lrs.append(suggest(range_tested(objects.state, plan, TEST)))
    assert lrs[0] == lrs[1]
    at, below = loss_after(lrs[0], *overrides), loss_after(lrs[0] / 100, *overrides)
    assert at < 0.6 and at < 0.5 * below, (lrs[0], at, below)


def test_the_files_and_the_suggested_command_hold_the_rate_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = job("model=mlp", "find_lr.num_steps=60", "seed=3", "optimizer.lr=1", "notes=a b")
    lr = find_lr(cfg)
    (folder,) = (tmp_path / "outputs" / "digits" / "find_lr").iterdir()
    assert {path.name for path in folder.iterdir()} == {
        "lr_finder.csv",
        "lr_finder.json",
        "lr_finder.png",
    }
    assert (folder / "lr_finder.png").read_bytes().startswith(b"\x89PNG")
    with (folder / "lr_finder.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert 30 < len(rows) <= 60 and float(rows[0]["lr"]) == pytest.approx(1e-6)
    out = capsys.readouterr().out
    command = next(line for line in out.splitlines() if line.startswith("suggestion: "))
    words = shlex.split(command.removeprefix("suggestion: "))
    assert words[0] == "python" and words[1].endswith("scripts/train.py")
    assert words[2:] == [*SMALL, "model=mlp", "seed=3", "notes=a b", f"optimizer.lr={lr:g}"]
    written = json.loads((folder / "lr_finder.json").read_text())
    assert written["lr"] == lr and written["command"] == shlex.join(words)
    assert find_lr(job("model=mlp", "find_lr.num_steps=60", "seed=3", "optimizer.lr=0.5")) == lr
    assert config_of(*words[2:])["optimizer"]["lr"] == lr


def test_a_wrong_override_is_an_error_of_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for overrides, message in (
        (("find_lr.min_lr=2", "find_lr.max_lr=1"), "must be below find_lr.max_lr=1"),
        (("find_lr.min_lr=0",), "find_lr.min_lr=0 must be a number above 0"),
        (("find_lr.num_steps=2",), "find_lr.num_steps=2 must be an integer of at least 20"),
        (("find_lr.min_lr=1", "find_lr.max_lr=2"), "the loss fell at no rate"),
        (("+find_lr.steps=3",), "Did you mean find_lr.num_steps?"),
        (("trainer.devices=2",), "Use trainer.devices=1."),
    ):
        with pytest.raises(SystemExit) as ended:
            find_lr(job(*overrides))
        assert ended.value.code == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
        assert len(lines) == 1 and message in lines[0]
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_left_out_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def enough(*arguments: Any) -> Curve:
        raise UserError("enough")

    monkeypatch.setattr(lr_finder, "range_test", enough)
    for number in range(20):
        folder = tmp_path / "images" / ("a", "b")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 12 * number).save(folder / f"{number}.png")
    (tmp_path / "images" / "a" / "photo.heic").write_bytes(b"heic")
    cfg = job(
        *("data=image_folder", "data.root=images", "data.num_classes=2", "data.num_outputs=2"),
        *("data.input_shape=[1,8,8]", "data.source.resize=8", "data.num_workers=0"),
        *("data.augment=false", "model.hidden=[4]", "data.normalize=none"),
    )
    with pytest.raises(SystemExit):
        find_lr(cfg)
    said = capsys.readouterr()
    assert "enough" in said.err and "1 of suffix .heic (a/photo.heic)" in said.out + said.err


def test_a_misspelt_key_ends_it_at_once(tmp_path: Path) -> None:
    done = process("find_lr", "find_lr.num_step=50", folder=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: find_lr.num_step: there is no such key.")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_range_test_without_a_suggestion_leaves_no_folder(tmp_path: Path) -> None:
    flat = ("find_lr.min_lr=1", "find_lr.max_lr=2", "find_lr.num_steps=20")
    done = process("find_lr", *SMALL, *flat, "hydra.run.dir=tests/lr", folder=tmp_path)
    assert done.returncode == 2 and "the loss fell at no rate" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_range_test_from_outside(tmp_path: Path) -> None:
    done = process("find_lr", *SMALL, "model=mlp", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    command = done.stdout.splitlines()[-1]
    arguments = shlex.split(command)[3:]
    done = process("train", *arguments, "debug=fast", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    folders = [path.name for path in (tmp_path / "outputs" / "digits" / "find_lr").iterdir()]
    assert len(folders) == 1


@pytest.mark.slow
def test_the_range_test_uses_the_runs_own_precision_and_micro_batches() -> None:
    objects, plan = built("model=mlp", "trainer.accumulation_steps=3", "trainer.clip_norm=0.1")
    curve = range_tested(objects.state, plan, RangeTest(**{**vars(TEST), "num_steps": 20}))
    whole, plan = built("model=mlp", "trainer.clip_norm=0.1")
    other = range_tested(whole.state, plan, RangeTest(**{**vars(TEST), "num_steps": 20}))
    near = zip(curve.losses, other.losses, strict=True)
    assert all(a == pytest.approx(b, rel=1e-3) for a, b in list(near)[:12])
    assert torch.isfinite(torch.tensor(curve.losses)).all()
