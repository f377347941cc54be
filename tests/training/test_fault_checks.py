"""The checks for mistakes, on code that is meant and on code that is not."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import forked
import pytest
import torch
import torch.nn.functional as F
from running import CPU, TINY, batch_of, config_of
from torch import Tensor, nn

from lab.tasks.losses import BCEWithLogits, CrossEntropy, Loss, l1, mse, weighted
from regrow.config.targets import allow
from regrow.project import ROOT
from regrow.runs import fault_checks, training
from regrow.runs.fault_checks import unsettled_averages

N = 8
OUTPUTS = torch.randn(N, 1, generator=torch.Generator().manual_seed(0)).requires_grad_()
TARGETS = torch.arange(float(N))


def found(code: Callable[[], Any], model: nn.Module | None = None) -> list[str]:
    with fault_checks.Calls(model) as calls:
        code()
    return [*calls.found]


class Causal(nn.Module):
    """A model of tokens: a mask and angles of all places, and a distance from learnt centres."""

    def __init__(self) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.zeros(N))

    def forward(self, values: Tensor) -> Tensor:
        places = torch.arange(N)
        mask = places[:, None] >= places
        angles = places[:, None] * torch.ones(N)
        return (values[:, None] - self.centres) * mask + angles


MEANT: dict[str, Callable[[], Any]] = {
    "equal labels": lambda: TARGETS[:, None] == TARGETS,
    "all pairs of scores": lambda: OUTPUTS - OUTPUTS.squeeze(1),
    "all pairs of targets": lambda: TARGETS[:, None] - TARGETS,
    "a weight for each class": lambda: OUTPUTS * TARGETS,
    "one shape": lambda: F.mse_loss(OUTPUTS.squeeze(1), TARGETS),
}
MISTAKES: dict[str, Callable[[], Any]] = {
    "a difference": lambda: OUTPUTS - TARGETS,
    "a difference the other way": lambda: TARGETS - OUTPUTS,
    "torch.sub": lambda: torch.sub(OUTPUTS, TARGETS),
    "a loss": lambda: F.l1_loss(OUTPUTS, TARGETS.clone()),
}


@pytest.mark.parametrize("case", MEANT)
def test_broadcasting_that_is_meant_is_not_named(case: str) -> None:
    assert found(MEANT[case]) == []


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("case", MISTAKES)
def test_broadcasting_outputs_against_targets_is_named(case: str) -> None:
    assert found(MISTAKES[case]) == ["broadcast"]


def test_a_model_may_broadcast_and_the_code_around_it_may_not() -> None:
    model = Causal()
    assert found(lambda: model(TARGETS), model) == []
    assert found(lambda: model(TARGETS)) == ["broadcast"]  # of another model


def test_probabilities_are_found_by_the_first_rows() -> None:
    logits = torch.randn(4096, 5)
    targets = torch.zeros(4096, dtype=torch.long)
    assert found(lambda: F.cross_entropy(logits.softmax(1), targets)) == ["softmax"]
    assert found(lambda: F.cross_entropy(logits, targets)) == []
    mixed = logits.clone()
    mixed[:64] = mixed[:64].softmax(1)  # no more rows than these are read
    assert found(lambda: F.cross_entropy(mixed, targets)) == ["softmax"]


def test_the_measured_statistics_in_the_line_standardise_the_inputs() -> None:
    inputs = 50 * torch.randn(64, 3, 4, 4) + torch.tensor([10.0, 200.0, -50.0]).view(3, 1, 1)
    (line,) = fault_checks.of_inputs(batch_of(inputs, TARGETS))
    assert "data.normalize=train" in line
    given = re.search(r"has mean \[(.*)\] and std \[(.*)\]\.$", line)
    assert given is not None, line
    mean, std = (
        torch.tensor([float(x) for x in numbers.split(",")]).view(3, 1, 1)
        for numbers in given.groups()
    )
    inputs = (inputs - mean) / std
    assert fault_checks.of_inputs(batch_of(inputs, TARGETS), images=True) == []
    assert inputs.mean((0, 2, 3)).abs().max() < 1e-2
    assert (inputs.std((0, 2, 3)) - 1).abs().max() < 1e-2


def test_images_from_zero_to_one_are_named_by_the_checks_of_a_debug_run_alone() -> None:
    images = batch_of(torch.rand(64, 3, 8, 8), TARGETS)
    (line,) = fault_checks.of_inputs(images, images=True)
    assert re.search(
        r"root mean square of 0\.\d+ and a mean of 0\.\d+.*data\.normalize=train", line
    )
    assert fault_checks.of_inputs(images) == []


def cross_entropy(smoothing: float, weights: list[float] | None = None) -> CrossEntropy:
    return CrossEntropy(label_smoothing=smoothing, class_weights=weights, ignore_index=None)


def quantile(outputs: Tensor, targets: Tensor) -> Tensor:
    return torch.maximum(0.9 * (targets - outputs), 0.1 * (outputs - targets))


def rate(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs.exp() - targets.abs() * outputs  # of Poisson's distribution


LOGITS = 6 * torch.randn(N, 3, generator=torch.Generator().manual_seed(1))
CLASSES = torch.tensor([0, 0, 0, 0, 0, 0, 1, 2])
SOFT = F.one_hot(CLASSES, 3) * 0.7 + 0.1
RARE = (CLASSES == 1).float()
LOSSES: dict[str, tuple[str, Loss, Tensor, Tensor]] = {
    "cross entropy": ("multiclass", cross_entropy(0), LOGITS, CLASSES),
    "much smoothing": ("multiclass", cross_entropy(0.8), LOGITS, CLASSES),
    "class weights": ("multiclass", cross_entropy(0, [0.01, 1, 100]), LOGITS, CLASSES),
    "soft targets": ("multiclass", cross_entropy(0), LOGITS, SOFT),
    "pixels": ("segmentation", cross_entropy(0), LOGITS.view(2, 3, 2, 2), CLASSES.view(2, 2, 2)),
    "binary": ("binary", BCEWithLogits(pos_weight=[50.0]), LOGITS[:, 0], RARE),
    "several labels": ("multilabel", BCEWithLogits(pos_weight=[50.0] * 3), LOGITS, SOFT.round()),
    "squares": ("regression", mse, LOGITS[:, 0], TARGETS),
    "distances": ("regression", l1, LOGITS[:, 0], TARGETS),
    "a quantile": ("regression", quantile, LOGITS[:, 0], TARGETS),
    "rates": ("regression", rate, LOGITS[:, 0], TARGETS / 10),
}


@pytest.mark.parametrize("case", LOSSES)
def test_only_the_negative_of_a_loss_rises_towards_the_targets(case: str) -> None:
    kind, loss, outputs, targets = LOSSES[case]

    def task(sign: int) -> Any:
        def loss_of(outputs: Any, targets: Any, weights: Any) -> Any:
            result = weighted(loss(outputs, targets), weights, len(outputs))
            return result._replace(values=sign * result.values)

        return SimpleNamespace(kind=kind, loss=loss_of)

    weights = torch.linspace(0, 3, len(outputs))
    for given in (None, weights):
        assert not fault_checks.rises_towards_targets(task(1), outputs, targets, given)
        # An asymmetric loss need not be lower on both sides: it is passed over.
        if case != "rates":
            assert fault_checks.rises_towards_targets(task(-1), outputs, targets, given)


def test_a_leak_is_at_least_five_examples_of_train_and_a_limit_hides_none() -> None:
    def lines(shared: int, **limit: int) -> list[str]:
        config = config_of(*TINY, "data.normalize=none")
        config["data"] |= limit
        config["data"]["source"] = {"_target_": "planted.rows", "shared": shared}
        allow(config)
        return fault_checks.leaks(training.build(config, CPU).data, CPU.device)

    assert lines(4) == []
    (line,) = lines(5)
    assert line.startswith("data.source: 5 of the first 32 val examples")
    assert lines(5, limit_train=8, batch_size=8) == [line]


def test_copied_rows_are_a_leak_and_rows_equal_by_chance_are_not() -> None:
    generator = torch.Generator().manual_seed(0)
    for few in (20, 100, 1000):  # of so many values
        for sizes in ((120, 30), (40, 400), (1000, 200)):
            draws = [torch.randint(few, (n,), generator=generator).tolist() for n in sizes]
            train, own = ([bytes(str(value), "ascii") for value in each] for each in draws)
            shared = sum(one in set(train) for one in own)
            assert shared <= 3 * fault_checks._by_chance(train, own)
    train = [bytes(str(value), "ascii") for value in range(120)]
    assert 3 * fault_checks._by_chance(train, train[:30]) < 15


def trained(model: nn.Module, updates: int) -> nn.Module:
    for _ in range(updates):
        model(torch.randn(4, 3, 2, 2))
    return model


def test_a_short_run_tells_what_is_left_of_the_first_running_averages() -> None:
    line = unsettled_averages(trained(nn.BatchNorm2d(3), 14), steps=7, num_micro_batches=2)
    assert line is not None and line.startswith("7 steps: BatchNorm's running averages still hold")
    assert f"hold {0.9**14:.0%} of" in line and "momentum above 0.1." in line
    layer = nn.BatchNorm2d(3)
    nn.init.constant_(layer.running_mean, 1.0)  # type: ignore[arg-type]
    for _ in range(14):  # zeros in training: what is left is of the initial value
        layer(torch.zeros(4, 3, 2, 2))
    assert layer.running_mean is not None
    assert layer.running_mean.tolist() == pytest.approx([0.9**14] * 3)


def test_running_averages_that_have_settled_or_began_elsewhere_get_no_line() -> None:
    def line(model: nn.Module, updates: int, **more: int) -> str | None:
        steps = more.get("steps", updates)
        return unsettled_averages(trained(model, updates), steps, num_micro_batches=1)

    assert line(nn.BatchNorm2d(3), 28) is not None
    assert line(nn.BatchNorm2d(3), 29) is None
    assert line(nn.BatchNorm2d(3, momentum=0.5), 8) is None
    assert line(nn.BatchNorm2d(3, momentum=None), 8) is None  # a mean over all batches
    assert line(nn.BatchNorm2d(3, track_running_stats=False), 8) is None
    assert line(nn.BatchNorm2d(3).eval(), 8) is None
    assert line(nn.BatchNorm2d(3), 90, steps=8) is None  # loaded with its averages
    assert line(nn.GroupNorm(1, 3), 8) is None


@pytest.mark.parametrize("more", [(), ("debug=fast",)])
@pytest.mark.slow
def test_a_short_run_warns_of_its_running_averages_unless_it_debugs(
    more: tuple[str, ...], tmp_path: Path
) -> None:
    given = ("model=cnn", "model.channels=[4]", "trainer.max_steps=2", "trainer.device=cpu", *more)
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), *given, "trainer.num_threads=1"]
    done = forked.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert ("2 steps: BatchNorm's running averages still hold 81%" in done.stderr) == (not more)
