"""Recomputing activations instead of keeping them changes only the memory."""

from __future__ import annotations

import contextlib
import functools
import random
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from running import TINY, config_of, fingerprint, train
from torch import nn

from regrow.distributed import activation_checkpointing, sharding
from regrow.errors import UserError
from regrow.randomness import seed_everything


@pytest.mark.parametrize("broken", [False, True])
def test_it_changes_no_bit_of_a_run(
    broken: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (*TINY, "model.dropout=0.3", "trainer.ema_decay=0.9")
    train(tmp_path / "kept", *options)
    if broken:  # the negative control: dropout draws other masks in the second pass
        its = functools.partial(activation_checkpointing.checkpoint, preserve_rng_state=False)
        monkeypatch.setattr(activation_checkpointing, "checkpoint", its)
    train(tmp_path / "again", *options, "trainer.activation_checkpointing=[body]")
    same = fingerprint(tmp_path / "kept") == fingerprint(tmp_path / "again")
    assert same is not broken


@pytest.mark.parametrize("broken", [False, True])
def test_batchnorm_counts_a_batch_once(
    broken: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("data=digits", "data.batch_size=400", "model=cnn", "model.channels=[4]",
               "trainer.max_epochs=2", "trainer.num_threads=1", "trainer.device=cpu")  # fmt: skip
    train(tmp_path / "kept", *options)
    if broken:  # the negative control
        nothing = contextlib.nullcontext()
        monkeypatch.setattr(activation_checkpointing.Start, "second", lambda start: nothing)
    train(tmp_path / "again", *options, "trainer.activation_checkpointing=[body]")
    same = fingerprint(tmp_path / "kept") == fingerprint(tmp_path / "again")
    assert same is not broken


def test_the_outermost_of_nested_matches_is_taken() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.Linear(2, 2))
    assert [*sharding.matching(model, ["*"], "key")] == ["0", "1"]
    assert [*sharding.matching(model, ["0.*"], "key")] == ["0.0", "0.1"]


def test_a_module_runs_again_in_the_backward_pass_and_keeps_its_names() -> None:
    calls: list[torch.Size] = []

    class Counted(nn.Linear):
        def forward(self, inputs: Any) -> Any:
            calls.append(inputs.shape)
            return super().forward(inputs)

    model = nn.Sequential(Counted(3, 3), Counted(3, 1))
    names = [*model.state_dict()]
    activation_checkpointing.apply(model, ["0"])
    model(torch.ones(2, 3)).sum().backward()
    assert len(calls) == 3 and [*model.state_dict()] == names
    with torch.no_grad():
        model(torch.ones(2, 3))
    assert len(calls) == 5


def test_a_pattern_without_a_module_is_one_line() -> None:
    from regrow.distributed.parallel import World
    from regrow.runs import training

    config = config_of(*TINY, "trainer.activation_checkpointing=[bodi]")
    with pytest.raises(UserError, match=r"no module matches bodi\. The model's are body"):
        training.build(config, World(device=torch.device("cpu")))


class Noisy(nn.Module):
    """Draws from numpy and `random`, and has a weight whose norm is estimated at each pass."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, inputs: Any) -> Any:
        self.calls = self.calls + 1  # a new tensor, not a change in place
        kept = torch.from_numpy(numpy.random.rand(4) < 0.5) * (1 + random.random())
        return (self.linear(inputs) * kept * self.calls).float().relu()


@pytest.mark.parametrize("broken", [False, True])
def test_draws_of_numpy_and_random_and_changed_buffers_are_the_same_in_both_passes(
    broken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if broken:  # the negative control
        nothing = contextlib.nullcontext()
        monkeypatch.setattr(activation_checkpointing.Start, "second", lambda start: nothing)

    def trained(patterns: list[str]) -> list[Any]:
        seed_everything(3)
        model = nn.Sequential(nn.Linear(4, 4), Noisy(), Noisy(), nn.Linear(4, 1))
        activation_checkpointing.apply(model, patterns)
        found: list[Any] = []
        for _ in range(3):
            model(torch.ones(2, 4)).sum().backward()
            found += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        return [*found, *model.state_dict().values(), torch.tensor(random.random())]

    kept, again = trained([]), trained(["1", "2"])
    assert all(map(torch.equal, kept, again)) is not broken


class Positions(nn.Module):
    """A cached table that grows with the longest input so far, and records its size."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.length = 1
        self.register_buffer("table", torch.ones(1), persistent=False)

    def forward(self, inputs: Any) -> Any:
        if self.length < len(inputs):
            self.length = len(inputs)
            self.table = 1 + torch.arange(self.length)
        return self.linear(inputs * self.table[: len(inputs), None]).relu()


def test_a_cache_that_the_first_pass_let_grow_stays() -> None:
    def gradients(patterns: list[str]) -> list[Any]:
        seed_everything(3)
        model = nn.Sequential(nn.Linear(4, 4), Positions(), nn.Linear(4, 1))
        activation_checkpointing.apply(model, patterns)
        for count in (2, 5, 3):
            model(torch.ones(count, 4)).sum().backward()
        return [p.grad for p in model.parameters()]

    assert all(map(torch.equal, gradients([]), gradients(["1"])))


def test_an_evaluation_copies_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    activation_checkpointing.apply(model, ["1"])
    started: list[Any] = []
    first = activation_checkpointing.Start.__init__

    def start(self: Any, module: nn.Module) -> None:
        started.append(module)
        first(self, module)

    monkeypatch.setattr(activation_checkpointing.Start, "__init__", start)
    inputs = torch.randn(3, 4)
    with torch.no_grad():
        model(inputs)
    with torch.inference_mode():
        model.eval()(inputs)
    assert started == []
    model.train()(inputs).sum().backward()
    assert len(started) == 1


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # in the compiler's own code
def test_a_compiled_model_counts_once_too() -> None:
    def trained(patterns: list[str], compiles: bool) -> list[Any]:
        seed_everything(3)
        block = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), Noisy())
        model = nn.Sequential(nn.Linear(4, 4), block, nn.Linear(4, 1))
        activation_checkpointing.apply(model, patterns)
        if compiles:
            model.compile(backend="aot_eager")
        for _ in range(2):
            model(torch.randn(5, 4)).sum().backward()
        return [*model.state_dict().values(), *(p.grad for p in model.parameters())]

    for kept, again in zip(trained([], False), trained(["1"], True), strict=True):
        torch.testing.assert_close(kept, again)
