"""The verdict of `debug=overfit`: what was reached, and what could be."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import forked
import pytest
import torch
from running import CPU, TINY, batch_of, config_of

from lab.tasks.losses import BCEWithLogits, CrossEntropy, Loss, l1, mse, weighted
from regrow.config.targets import allow
from regrow.project import ROOT
from regrow.runs import overfitting, training
from regrow.runs.overfitting import Verdict

ARGUMENTS = ("debug=overfit", "trainer.num_threads=1", "trainer.device=cpu", "model.hidden=[64]")


def command(folder: Path, *arguments: str) -> Any:
    words = [sys.executable, str(ROOT / "scripts" / "train.py"), *ARGUMENTS, *arguments]
    return forked.run(words, cwd=folder, capture_output=True, text=True)


@pytest.mark.slow
def test_a_batch_that_is_learnt_by_heart_ends_with_zero_and_what_was_reached(
    tmp_path: Path,
) -> None:
    done = command(tmp_path, "optimizer.lr=0.003", "model.dropout=0.3", "hydra.run.dir=run")
    assert done.returncode == 0, done.stderr
    last = done.stdout.strip().splitlines()[-1]
    assert last.startswith("debug=overfit: reached. The loss on the training examples is 0.0")
    assert "no dropout in this run (1 modules)" in done.stdout
    assert "check:" not in done.stdout + done.stderr
    assert last in (tmp_path / "run" / "train.log").read_text()


@pytest.mark.slow
def test_a_batch_that_is_not_learnt_ends_with_one_the_checks_and_what_to_try(
    tmp_path: Path,
) -> None:
    short = ("trainer.max_steps=8", "scheduler=constant", "hydra.run.dir=run")
    done = command(tmp_path, *short)
    assert done.returncode == 1
    said = done.stderr.strip().splitlines()[-3:]
    assert said[0].startswith("error: debug=overfit: not reached. The loss on the training")
    assert "after 8 steps" in said[0] and "the best constant answer has 2.228" in said[0]
    assert said[1] == "error: checks: none of them fired."
    assert said[2] == "error: try: trainer.max_steps=1000: the loss still falls."
    done = command(tmp_path, *short[:2], "+optimizer.maximize=true", "hydra.run.dir=up")
    assert done.returncode == 1
    said = done.stderr.strip().splitlines()[-3:]
    assert said[1].startswith("error: check: step: the first step leads up the slope"), said
    assert said[2] == "error: try: correct what the checks name, then run debug=overfit again."


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.nightly)])
def test_several_processes_reach_the_verdict_of_one(strategy: str, tmp_path: Path) -> None:
    short = ("trainer.max_steps=8", "scheduler=constant", "model.dropout=0")
    several = (f"trainer={strategy}", "trainer.devices=2")
    said = []
    for given in ((), several, ("optimizer.lr=0.001",)):  # the last is the control
        done = command(tmp_path, *short, *given, f"hydra.run.dir={len(said)}")
        assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
        assert json.loads((tmp_path / f"{len(said)}/status.json").read_text())["error"] is None
        said.append(done.stderr.strip().splitlines()[-3:])
    assert said[0] == said[1] != said[2]
    done = command(tmp_path, *several, "model.dropout=0", "optimizer.lr=0.01")
    assert done.returncode == 0 and "debug=overfit: reached. The" in done.stdout, done.stderr


def test_a_share_of_the_batch_would_be_judged_by_other_losses() -> None:
    config = config_of(*TINY, "debug=overfit")
    allow(config)
    objects = training.build(config, CPU)
    share = objects.data.train(device=CPU.device, rank=0, world_size=2)
    whole = objects.data.train(device=CPU.device)
    verdicts = [overfitting.judge(objects, each, [1.0]) for each in (objects.train, whole, share)]
    assert verdicts[0] == verdicts[1]
    assert abs(verdicts[2].constant - verdicts[0].constant) > 0.001


def judged(kind: str, loss: Loss, outputs: torch.Tensor, batch: Any) -> tuple[float, ...]:
    """Return the loss, the least one and that of the best constant answer."""

    def loss_of(outputs: Any, targets: Any, weights: Any) -> Any:
        return weighted(loss(outputs, targets), weights, len(outputs))

    task = SimpleNamespace(kind=kind, loss=loss_of)
    found = overfitting._of_batch(task, outputs, batch)
    assert found is not None
    return found


def entropy(*parts: float) -> float:
    return -sum(part * math.log(part) for part in parts if part)


def test_the_least_loss_and_that_of_a_constant_are_the_known_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(8, 3, generator=generator)
    classes = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2])
    logits = torch.randn(8, 3, generator=generator)

    def cross_entropy(smoothing: float) -> CrossEntropy:
        return CrossEntropy(label_smoothing=smoothing, class_weights=None, ignore_index=None)

    _, least, constant = judged("multiclass", cross_entropy(0), logits, batch_of(inputs, classes))
    assert least < 1e-6
    assert constant == pytest.approx(entropy(0.5, 0.25, 0.25), abs=1e-6)
    _, least, _ = judged("multiclass", cross_entropy(0.3), logits, batch_of(inputs, classes))
    assert least == pytest.approx(entropy(0.8, 0.1, 0.1), abs=1e-6)
    soft = torch.tensor([[0.7, 0.3, 0.0]]).repeat(8, 1)  # as MixUp makes them
    _, least, _ = judged("multiclass", cross_entropy(0), logits, batch_of(inputs, soft))
    assert least == pytest.approx(entropy(0.7, 0.3), abs=1e-6)

    values = torch.randn(8, generator=generator) * 7 + 100
    own, least, constant = judged("regression", mse, logits[:, 0], batch_of(inputs, values))
    assert own == pytest.approx(float((logits[:, 0] - values).square().mean()))
    assert least < 1e-9
    assert constant == pytest.approx(float(values.var(correction=0)), rel=1e-6)
    _, least, constant = judged("regression", l1, logits[:, 0], batch_of(inputs, values))
    middle = values.median()
    assert constant == pytest.approx(float((values - middle).abs().mean()), rel=1e-2)
    assert least < 0.05 * constant

    labels = (torch.arange(16).view(8, 2) % 3 == 0).float()
    loss = BCEWithLogits(pos_weight=None)
    _, least, constant = judged("multilabel", loss, logits[:, :2], batch_of(inputs, labels))
    shares = labels.mean(0).tolist()
    assert least < 1e-6
    assert constant == pytest.approx(sum(entropy(s, 1 - s) for s in shares) / 2, abs=1e-6)


def test_equal_inputs_with_different_targets_raise_the_least_loss() -> None:
    inputs, logits = torch.ones(4, 3), torch.zeros(4, 2)
    loss = CrossEntropy(label_smoothing=0.0, class_weights=None, ignore_index=None)
    targets = torch.tensor([0, 1, 0, 1])
    _, least, constant = judged("multiclass", loss, logits, batch_of(inputs, targets))
    assert least == pytest.approx(math.log(2)) == constant
    inputs = torch.arange(12.0).view(4, 3)
    _, least, _ = judged("multiclass", loss, logits, batch_of(inputs, targets))
    assert least < 1e-6


def test_texts_with_equal_beginnings_raise_the_least_loss_of_tokens() -> None:
    texts = torch.tensor([[1, 2, 3], [1, 2, 4]])
    targets = torch.tensor([[2, 3, 0], [2, 4, 0]])
    config = config_of("data=text", "task=language", "model=gpt")
    loss = training.instantiate(config["loss"])
    task = training.instantiate({**config["task"], "num_classes": 5}, loss=loss)
    found = overfitting._of_batch(task, torch.zeros(2, 3, 5), batch_of(texts, targets))
    assert found is not None  # only the token after 1, 2 cannot be known: one of three places
    assert found[1] == pytest.approx(math.log(2) / 3, abs=1e-6)
    assert found[0] == pytest.approx(math.log(5))
    other = torch.tensor([[0, 2, 3], [1, 2, 4]])
    found = overfitting._of_batch(task, torch.zeros(2, 3, 5), batch_of(other, targets))
    assert found is not None and found[1] < 1e-6


def test_a_loss_that_ignores_the_outputs_gives_no_verdict() -> None:
    task = SimpleNamespace(
        kind="embedding", loss=lambda outputs, targets, weights: weighted(targets * 0.0, None, 2)
    )
    batch = batch_of(torch.ones(2, 3), torch.ones(2))
    assert overfitting._of_batch(task, torch.zeros(2, 3), batch) is None


class Wide(torch.nn.Module):
    """Gives (B, T, C) outputs of tokens (B, T), and notes the examples of each call."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.linspace(0, 1, classes))
        self.examples: list[int] = []

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.examples.append(len(inputs))
        return inputs.float().unsqueeze(2) * self.scale


@pytest.mark.parametrize("classes", [10, 10_000, 50_000])
def test_a_verdict_takes_a_million_outputs_and_passes_of_a_micro_batch(classes: int) -> None:
    tokens = torch.arange(4 * 64).view(4, 64) % 10
    batch, model = batch_of(tokens, tokens.roll(-1, 1)), Wide(classes)
    with torch.no_grad():
        few, outputs = overfitting._outputs(model, batch, slices=2)
    assert few.num_local == len(outputs) == {10: 4, 10_000: 1, 50_000: 1}[classes]
    assert model.examples[0] == 1 and max(model.examples) == min(2, few.num_local)
    task = SimpleNamespace(kind="language")
    cut, targets = overfitting._places(task, outputs, few.targets)
    assert cut.shape[:2] == targets.shape
    assert cut.numel() <= overfitting.MOST_NUMBERS
    assert cut.shape[1] == {10: 64, 10_000: 64, 50_000: 20}[classes]
    assert torch.equal(cut, outputs[:, : cut.shape[1]])


def test_a_verdict_on_part_of_a_text_is_that_of_the_shorter_text(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = config_of("data=text", "task=language", "model=gpt")
    loss = training.instantiate(config["loss"])
    task = training.instantiate({**config["task"], "num_classes": 5}, loss=loss)
    texts = torch.tensor([[1, 2, 3, 0], [1, 2, 4, 0]])
    targets = torch.tensor([[2, 3, 0, 0], [2, 4, 0, 0]])
    outputs = torch.zeros(2, 4, 5)
    whole = overfitting._of_batch(task, outputs[:, :2], batch_of(texts[:, :2], targets[:, :2]))
    monkeypatch.setattr(overfitting, "MOST_NUMBERS", 20)
    assert overfitting._of_batch(task, outputs, batch_of(texts, targets)) == whole
    assert whole is not None and whole[1] == pytest.approx(math.log(2) / 2, abs=1e-6)


def test_pixels_are_limited_by_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overfitting, "MOST_NUMBERS", 3 * 2 * 4)
    task = SimpleNamespace(kind="segmentation")
    outputs, targets = torch.randn(1, 3, 8, 4), torch.zeros(1, 8, 4)
    cut, own = overfitting._places(task, outputs, targets)
    assert cut.shape == (1, 3, 2, 4) and own.shape == (1, 2, 4)
    soft, own = overfitting._places(task, outputs, outputs)
    assert soft.shape == own.shape == (1, 3, 2, 4)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_not_reached_and_named(value: float) -> None:
    config = config_of(*TINY, "debug=overfit")
    allow(config)
    objects = training.build(config, CPU)
    assert math.isfinite(overfitting.judge(objects, objects.train, [1.0]).loss)
    with torch.no_grad():
        for parameter in objects.state.model.parameters():
            parameter.fill_(value)
    verdict = overfitting.judge(objects, objects.train, [1.0, 2.0])
    assert verdict.reached is False and not math.isfinite(verdict.loss)
    first, _, last = overfitting.lines(verdict, [], [1.0, 2.0], 7)
    assert first.endswith("after 7 steps: it is not finite.")
    assert last.startswith("try: debug=anomaly")


@pytest.mark.parametrize(
    ("change", "why", "draws"),
    [
        (lambda out: (out, out), "the outputs or the targets are not one tensor.", False),
        (lambda out: (out, torch.randn_like(out)), "the outputs or the targets are not", True),
        (lambda out: out.int(), "not reached. The loss", False),
        (lambda out: out + torch.randn_like(out), "not reached. The loss", True),
    ],
)
def test_an_unknown_least_loss_and_noise_of_the_model_are_told_apart(
    change: Any, why: str, draws: bool
) -> None:
    config = config_of(*TINY, "debug=overfit")
    allow(config)
    objects = training.build(config, CPU)
    objects.state.model.register_forward_hook(lambda model, inputs, outputs: change(outputs))
    before = torch.get_rng_state()
    verdict = overfitting.judge(objects, objects.train, [3.0])
    assert torch.equal(torch.get_rng_state(), before)
    first, *others = overfitting.lines(verdict, [], [3.0], 300)
    assert why in first and "minimise" not in first
    assert any("it draws random numbers in evaluation mode" in line for line in others) == draws


def test_a_resume_after_the_last_step_is_judged_by_all_steps() -> None:
    verdict = Verdict(False, 2.0, 0.0, 2.2, math.nan)
    first, _, last = overfitting.lines(verdict, [], [], 300)
    assert "is 2 after 300 steps; the least" in first
    assert "trainer.max_steps=1000" in last
    first, _, last = overfitting.lines(verdict._replace(trained=2.0), [], [2.0], 400)
    assert "after 400 steps (2 in the last step)" in first
    assert "trainer.max_steps=1200" in last
    # Frozen parameters are said again, as they may be why.
    said = overfitting.lines(verdict, [], [], 300, ["model: 2 of 4 parameters are frozen"])
    assert said[2] == "model: 2 of 4 parameters are frozen" and len(said) == 4
    assert len(overfitting.lines(verdict._replace(reached=True), [], [], 300, said[2:3])) == 1
    assert config_of("debug=overfit")["trainer"]["max_restarts"] == 0
    typed = config_of("debug=overfit", "trainer.max_restarts=2")
    assert typed["trainer"]["max_restarts"] == 2


def test_a_batch_of_one_class_gets_no_verdict() -> None:
    for constant, words in ((8.6e-13, "no verdict"), (0.69, "debug=overfit: reached")):
        verdict = overfitting.Verdict(True, 0.0005, 4.7e-11, constant, 0.0005)
        (line,) = overfitting.lines(verdict, [], [0.0005], 300)
        assert words in line and ("data.limit_train=512" in line) == (constant < 0.5)
