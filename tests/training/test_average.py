"""The average of the weights: against its formula, on real data, and in older records."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from running import CPU, TINY, Bench, batch_of, config_of, train
from torch import Tensor, nn

from lab import optim
from lab.state import too_short_for_average
from lab.tasks import losses
from lab.tasks.tasks import Regression
from regrow.config import older
from regrow.numerics import totals
from regrow.record.records import read_json
from regrow.runs import training

ADAMW = functools.partial(torch.optim.AdamW, lr=0.01, fused=True)
BAD = (1, 4)  # steps with a non-finite batch


def bench_of(**options: Any) -> Bench:
    torch.manual_seed(1)
    task = Regression(
        num_outputs=1,
        monitor="val/rmse",
        target_names=None,
        per_target=True,
        extra_metrics=None,
        loss=losses.mse,
    )
    return Bench(nn.Linear(6, 1), task, ADAMW, **options)


def batches() -> list[Any]:
    random = torch.Generator().manual_seed(2)
    made = []
    for number in range(8):
        inputs = torch.randn(5, 6, generator=random)
        inputs[2, 3] = torch.inf if number in BAD else 1.0
        made.append(batch_of(inputs, torch.randn(5, generator=random)))
    return made


def averages(bench: Bench) -> list[Tensor]:
    assert bench.state.averaged is not None
    return [p.detach().clone() for p in bench.state.averaged.parameters()]


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize(("decay", "warmup"), [(0.999, True), (0.3, True), (0.9, False)])
def test_the_average_is_that_of_its_formula_and_skipped_steps_do_not_count(
    decay: float, warmup: bool, on_device: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optim, "skips_on_device", lambda optimizer, device: on_device)
    monkeypatch.setattr(totals, "on_host", lambda device: not on_device)
    bench = bench_of(ema_decay=decay, ema_warmup=warmup)
    expected = [p.detach().clone() for p in bench.state.model.parameters()]
    updates = 0
    for number, batch in enumerate(batches()):
        bench.step(batch)
        if number not in BAD:
            most = (1 + updates) / (10 + updates) if warmup else 1.0
            share = 1 - min(decay, most)
            for average, weight in zip(expected, bench.state.model.parameters(), strict=True):
                average += share * (weight.detach() - average)
            updates += 1
        for average, reference in zip(averages(bench), expected, strict=True):
            torch.testing.assert_close(average, reference, atol=1e-6, rtol=0)


@pytest.mark.parametrize("on_device", [False, True])
def test_the_average_takes_over_the_statistics_of_batchnorm(
    on_device: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are averages already; its own would stay those of an untrained model."""
    monkeypatch.setattr(optim, "skips_on_device", lambda optimizer, device: on_device)
    monkeypatch.setattr(totals, "on_host", lambda device: not on_device)
    torch.manual_seed(1)
    model = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 1))
    task = Regression(
        num_outputs=1,
        monitor="val/rmse",
        target_names=None,
        per_target=True,
        extra_metrics=None,
        loss=losses.mse,
    )
    bench = Bench(model, task, ADAMW, ema_decay=0.9)
    assert bench.state.averaged is not None
    for batch in batches():
        bench.step(batch)
        there, here = (dict(m.named_buffers()) for m in (model, bench.state.averaged))
        assert len(there) == 3 and all(torch.equal(here[name], there[name]) for name in there)
    assert there["0.num_batches_tracked"] == 6
    assert not torch.equal(there["0.running_mean"], torch.zeros(6))


def test_the_number_of_updates_is_derived_and_not_in_a_checkpoint() -> None:
    with_, without = (bench_of(ema_decay=0.9, ema_warmup=w).state for w in (True, False))
    assert with_.state_dict().keys() == without.state_dict().keys()
    progress = (state.state_dict()["progress"].keys() for state in (with_, without))
    assert next(progress) == next(progress)


@pytest.mark.parametrize("warmup", [True, False])
def test_in_200_steps_of_digits_the_average_is_as_good_as_the_weights_only_with_its_warmup(
    warmup: bool, tmp_path: Path
) -> None:
    run = ("trainer.max_steps=200", "trainer.num_threads=1", "trainer.device=cpu")
    average = (f"trainer.ema_warmup={warmup}", "trainer.ema_decay=0.999")
    train(tmp_path, *run, *average, "trainer.eval_every_epochs=null")
    accuracy = read_json(tmp_path / "summary.json")["test"]["test/accuracy"]
    # The trained weights themselves reach 0.972.
    assert accuracy > 0.95 if warmup else accuracy < 0.6


@pytest.mark.parametrize(
    ("decay", "warmup", "steps", "says"),
    [
        (0.999, True, 200, "too short for it, as its warm-up takes 8,990"),
        (0.999, False, 200, "82% of the average are the initial weights"),
        (0.999, True, 9000, None),
        (0.999, False, 9000, None),
        (0.9, True, 80, None),
        (0.999, True, None, None),
        (None, True, 5, None),
    ],
)
def test_a_run_that_is_too_short_for_its_average_says_so(
    decay: float | None, warmup: bool, steps: int | None, says: str | None
) -> None:
    line = too_short_for_average(bench_of(ema_decay=decay, ema_warmup=warmup).options, steps)
    assert line is None if says is None else says in str(line)


def test_a_record_from_before_the_warmup_keeps_its_average() -> None:
    config = config_of(*TINY, "trainer.ema_decay=0.9")
    recorded = copy.deepcopy(config)
    del recorded["trainer"]["ema_warmup"]
    added = older.complete(recorded)
    assert added["trainer.ema_warmup"] is False
    assert older.adopt(config, added, ())["trainer.ema_warmup"] is False
    assert training.build(config, CPU).options.ema_warmup is False
