"""A stopped run resumes as if it had not been stopped: the same weights, the same numbers."""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from running import CPU, TINY, config_of, fingerprint, metrics_of, train, train_config
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset, random_split

from lab.data.datasets import from_datasets
from lab.schedules import Plateau
from lab.state import TrainState
from regrow.feeding.loaders import TrainLoader
from regrow.feeding.splits import Splits
from regrow.numerics import capture, totals
from regrow.numerics.precision import LossScale
from regrow.processes.interrupt import StopRequest
from regrow.runs import training

STEPS = 12
LEAN = ("task.per_class=false", "task.auroc=false")
EVERYTHING = (
    *TINY,
    *LEAN,
    "model.dropout=0.3",
    "optimizer.lr=0.02",
    "scheduler=plateau",
    "scheduler.patience=0",
    "scheduler.factor=0.5",
    "scheduler.min_delta=0.1",
    "scheduler.warmup_steps=2",
    "trainer.ema_decay=0.8",
    "trainer.accumulation_steps=3",
    "trainer.clip_norm=0.5",
    "trainer.eval_every_steps=3",
    "trainer.early_stopping.patience=8",
    "trainer.monitor=val/loss",
    "trainer.mode=min",
)
IMAGES = (
    "data=digits",
    "data.batch_size=400",
    "model=cnn",
    "model.channels=[4]",
    "model.dropout=0.2",
    *LEAN,
    "trainer.max_epochs=3",
    "trainer.num_threads=1",
    "trainer.log_every_steps=1",
    "trainer.device=cpu",
)
WHITENED = (
    *(option for option in TINY if not option.startswith("model.")),
    *("data.input_shape=[2,9,9]", *LEAN),
    *("model=whitened_cnn", "model.channels=[4,4,4]", "optimizer=muon", "optimizer.kernels=true"),
    *("trainer.channels_last=true", "trainer.precision=bf16"),
    "+data.augmentation._target_=lab.data.augment.CropFlip",
    *("+data.augmentation.pad=2", "+data.augmentation.padding_mode=reflect"),
    *("+data.augmentation.flip=true", "+data.augmentation.alternate_flips=true"),
)
CASES = {
    "everything": EVERYTHING,
    "augmentation_and_batchnorm": IMAGES,
    "channels_last": (*IMAGES, "trainer.channels_last=true"),
    "channels_last_sgd": (*IMAGES, "trainer.channels_last=true", "optimizer=sgd"),
    "bf16": (*TINY, *LEAN, "model.dropout=0.3", "trainer.precision=bf16", "trainer.ema_decay=0.9"),
    "whitened": WHITENED,
    "muon": (*TINY, *LEAN, "model.dropout=0.3", "optimizer=muon", "scheduler=onecycle"),
    "never_evaluated": (*TINY, *LEAN, "trainer.eval_every_epochs=null"),
    "saved_by_steps": (
        *(*TINY, *LEAN, "trainer.checkpoint.save_every_steps=5"),
        *("trainer.checkpoint.save_every_epochs=null", "trainer.checkpoint.background=false"),
    ),
}


def same(a: Path, b: Path) -> bool:
    """Return True if two folders hold the same run, without the clock."""
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (a, b)]
    for summary in summaries:
        for name in ("seconds", "seconds_of_this_part"):
            del summary[name]
    return (
        repr(metrics_of(a)) == repr(metrics_of(b))
        and fingerprint(a) == fingerprint(b)
        and repr(summaries[0]) == repr(summaries[1])
    )


def in_parts(folder: Path, run: tuple[str, ...], stops: list[int]) -> dict[str, Any]:
    """Stop at each of `stops`, resuming in between, and then run to the end."""
    for stop in stops:
        summary = train(folder, *run, stop_at=stop)
        assert (summary["status"], summary["steps"]) == ("interrupted", stop)
    return train(folder, *run)


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_a_stop_at_any_step_changes_nothing(
    step: int, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    whole = whole_run("everything", tmp_path_factory)
    in_parts(tmp_path, EVERYTHING, [step])
    assert same(tmp_path, whole)


# The others run with the slow tests.
QUICK = ("everything", "augmentation_and_batchnorm", "saved_by_steps")


@pytest.mark.parametrize(
    "case",
    [
        case if case in QUICK else pytest.param(case, marks=[pytest.mark.slow, pytest.mark.nightly])
        for case in CASES
    ],
)
def test_a_stop_at_every_step_in_turn_changes_nothing(
    case: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    whole = whole_run(case, tmp_path_factory)
    steps = json.loads((whole / "summary.json").read_text())["steps"]
    in_parts(tmp_path, CASES[case], list(range(1, steps + 1)))
    assert same(tmp_path, whole)


def test_stops_twice_within_an_epoch_and_at_its_end_change_nothing(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    whole = whole_run("everything", tmp_path_factory)
    in_parts(tmp_path, EVERYTHING, [5, 7, 8])
    assert same(tmp_path, whole)


def test_stops_change_nothing_where_the_sums_stay_on_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CPU acts as the device."""
    monkeypatch.setattr(totals, "on_host", lambda device: False)
    train(tmp_path / "whole", *EVERYTHING)
    in_parts(tmp_path / "cut", EVERYTHING, [5, 7, 8])
    assert same(tmp_path / "cut", tmp_path / "whole")


_whole: dict[str, Path] = {}


def whole_run(case: str, factory: pytest.TempPathFactory) -> Path:
    """The folder of the uninterrupted run."""
    if case not in _whole:
        folder = factory.mktemp(case)
        summary = train(folder, *CASES[case])
        assert summary["status"] == "completed"
        _whole[case] = folder
    return _whole[case]


def test_the_run_that_is_compared_uses_what_it_says(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    lines = metrics_of(whole_run("everything", tmp_path_factory))
    rates = [x["train/lr"] for x in lines if "train/lr" in x]
    assert len(rates) == STEPS
    assert rates[0] < rates[1]  # warm-up
    assert rates[-1] < rates[1]  # the plateau lowered it
    assert sum("val/loss" in x for x in lines) == 6  # from steps 3, 4, 6, 8, 9, 12


class StopAtQuestion(StopRequest):
    """Requests a stop the n-th time that the loop checks, wherever that is."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number, self.asked = number, 0

    @property
    def requested(self) -> bool:
        self.asked += 1
        if self.asked == self.number:
            self.signal = signal.SIGTERM
        return self.signal is not None


def test_a_stop_wherever_the_loop_looks_changes_nothing(tmp_path: Path) -> None:
    """Evaluations take several batches here, so many of these stops fall inside one."""
    run = (*EVERYTHING, "data.eval_batch_size=6", "trainer.max_epochs=2")
    config = config_of(*run)
    train(tmp_path / "whole", *run)
    asked = 0
    for number in range(1, 100, 3):
        folder = tmp_path / str(number)
        folder.mkdir()
        stop = StopAtQuestion(number)
        summary = training.train(training.build(config, CPU), config, folder, CPU, stop)
        if stop.signal is None:
            assert summary["status"] == "completed"
            asked = stop.asked
            break
        assert summary["status"] == "interrupted", number
        assert not (folder / "summary.json").exists()
        train_config(folder, config)
        assert same(folder, tmp_path / "whole"), number
    assert asked >= 30


def test_an_interrupted_evaluation_is_done_after_the_resume(tmp_path: Path) -> None:
    run = (*TINY, *LEAN)
    summary = train(tmp_path, *run, stop_at=4)
    assert summary["status"] == "interrupted"
    assert not any("val/loss" in line for line in metrics_of(tmp_path))
    train(tmp_path, *run, stop_at=5)
    (line,) = (line for line in metrics_of(tmp_path) if "val/loss" in line)
    assert line["step"] == 4


@pytest.mark.parametrize("sets", ["with_a_test", "without_a_test"])
def test_a_run_stopped_in_its_last_evaluation_is_not_complete(tmp_path: Path, sets: str) -> None:
    run = (*TINY, *LEAN, "data.eval_batch_size=6")
    run += ("data.source.num_test=0",) if sets == "without_a_test" else ()
    train(tmp_path / "whole", *run)
    summary = train(tmp_path / "cut", *run, stop_at=STEPS)
    assert (summary["status"], summary["steps"]) == ("interrupted", STEPS)
    assert not (tmp_path / "cut" / "summary.json").exists()
    train(tmp_path / "cut", *run)
    assert same(tmp_path / "cut", tmp_path / "whole")


def test_a_run_stopped_before_its_first_step_resumes(tmp_path: Path) -> None:
    summary = train(tmp_path / "cut", *TINY, stop_at=0)
    assert (summary["status"], summary["steps"]) == ("interrupted", 0)
    train(tmp_path / "cut", *TINY)
    train(tmp_path / "whole", *TINY)
    assert same(tmp_path / "cut", tmp_path / "whole")


def test_a_raised_limit_gives_the_longer_run(tmp_path: Path) -> None:
    run = (*TINY, *LEAN, "scheduler=constant", "model.dropout=0.3", "trainer.ema_decay=0.9")
    train(tmp_path / "raised", *run, "trainer.max_epochs=1")
    short = metrics_of(tmp_path / "raised")
    train(tmp_path / "raised", *run, "trainer.max_epochs=3")
    train(tmp_path / "long", *run, "trainer.max_epochs=3")
    assert any("test/loss" in line for line in short)
    assert same(tmp_path / "raised", tmp_path / "long")
    train(tmp_path / "other", *run, "trainer.max_epochs=3", "seed=1")
    assert not same(tmp_path / "other", tmp_path / "long")


def test_a_complete_run_that_is_started_again_stays_as_it_is(tmp_path: Path) -> None:
    train(tmp_path, *TINY)
    before = fingerprint(tmp_path)
    summary = train(tmp_path, *TINY)
    assert summary["status"] == "completed"
    assert fingerprint(tmp_path) == before


def test_a_resumed_run_limited_by_time_alone_counts_the_seconds_before(tmp_path: Path) -> None:
    run = (*TINY, *LEAN, "scheduler=constant", "trainer.max_epochs=null")
    summary = train(tmp_path, *run, "trainer.max_seconds=1e6", stop_at=5)
    assert summary["status"] == "interrupted"
    spent = summary["seconds"]
    assert train(tmp_path, *run, f"trainer.max_seconds={spent}")["steps"] == 5


@pytest.mark.parametrize("name", ["adamw", "muon", "sgd"])
def test_a_rate_and_decay_changed_on_a_resume_take_effect(name: str, tmp_path: Path) -> None:
    run = (*TINY, *LEAN, f"optimizer={name}", "scheduler=constant", "optimizer.lr=0.01")
    new = ("optimizer.lr=0.002", "optimizer.weight_decay=0.3")
    train(tmp_path / "changed", *run, stop_at=5)
    changed = train(tmp_path / "changed", *run, *new)
    rates = [x["train/lr"] for x in metrics_of(tmp_path / "changed") if "train/lr" in x]
    assert rates == [0.01] * 5 + [0.002] * 7
    train(tmp_path / "rate", *run, stop_at=5)
    rate = train(tmp_path / "rate", *run, new[0])
    assert rate["weights_sha256"] != changed["weights_sha256"]  # the decay has an effect too


# Decisions across a resume


@pytest.mark.parametrize("stop", range(2, 15, 4))
def test_early_stopping_and_best_decide_the_same_across_a_resume(stop: int, tmp_path: Path) -> None:
    run = (
        *(*TINY, *LEAN, "trainer.max_epochs=20", "trainer.early_stopping.patience=2"),
        *("trainer.early_stopping.min_delta=0.01", "optimizer.lr=0.05", "scheduler=plateau"),
        *("scheduler.patience=0", "model.dropout=0.5"),
    )
    whole = train(tmp_path / "whole", *run)
    assert whole["stopped_early"]
    assert stop < whole["steps"] < 80
    cut = in_parts(tmp_path / "cut", run, [stop])
    assert cut["best"] == whole["best"]
    assert same(tmp_path / "cut", tmp_path / "whole")


def test_a_forgotten_history_of_early_stopping_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = (
        *(*TINY, *LEAN, "trainer.max_epochs=9", "trainer.early_stopping.patience=1"),
        *("trainer.early_stopping.min_delta=10.0",),
    )
    assert train(tmp_path / "whole", *run)["steps"] == 12
    train(tmp_path / "cut", *run, stop_at=9)
    forget(monkeypatch, evaluations_without_improvement=0)
    assert train(tmp_path / "cut", *run)["steps"] > 12


# Negative controls: mistakes that the comparison above must detect


def forget(monkeypatch: pytest.MonkeyPatch, **values: Any) -> None:
    """Make a resume lose a part of the progress."""
    load = TrainState.load_state_dict

    def forgetful(self: TrainState, parts: dict[str, dict[str, Any]]) -> None:
        load(self, {**parts, "progress": {**parts["progress"], **values}})

    monkeypatch.setattr(TrainState, "load_state_dict", forgetful)


def not_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "seed_step", lambda value: None)


def without_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    forget(monkeypatch, sums=torch.zeros(4, dtype=torch.float64))


def without_the_plateau(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Plateau, "load_state_dict", lambda self, state: None)


def without_the_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    forget(monkeypatch, evaluated_step=-1)


def without_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    forget(monkeypatch, best_value=0.0, best_step=None)


def without_fast_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    epoch = TrainLoader.epoch

    def from_its_start(self: TrainLoader, number: int, start: int = 0) -> Iterator[Any]:
        batches = list(epoch(self, number, 0))
        return iter(batches[: len(batches) - start])

    monkeypatch.setattr(TrainLoader, "epoch", from_its_start)


def with_the_weights_for_the_average(monkeypatch: pytest.MonkeyPatch) -> None:
    load = TrainState.load_state_dict

    def wrong(self: TrainState, parts: dict[str, dict[str, Any]]) -> None:
        load(self, {**parts, "averaged": parts["model"]})

    monkeypatch.setattr(TrainState, "load_state_dict", wrong)


@pytest.mark.parametrize(
    ("mistake", "stop"),
    [
        (not_seeded, 5),
        (without_sums, 5),
        (without_the_plateau, 9),
        (without_the_evaluation, 5),
        (without_the_best, 7),
        (without_fast_forward, 6),
        (with_the_weights_for_the_average, 5),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_resume_that_loses_something_is_caught(
    mistake: Any,
    stop: int,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = whole_run("everything", tmp_path_factory)
    train(tmp_path, *EVERYTHING, stop_at=stop)
    if mistake is without_the_evaluation:
        train(tmp_path, *EVERYTHING, stop_at=6)  # in the evaluation after step 6
        config = config_of(*EVERYTHING)
        stops = StopAfterEvaluation()
        training.train(training.build(config, CPU), config, tmp_path, CPU, stops)
    mistake(monkeypatch)
    train(tmp_path, *EVERYTHING)
    assert not same(tmp_path, whole)


class StopAfterEvaluation(StopRequest):
    """Requests a stop once an evaluation has finished."""

    def while_waiting(self, items: Any) -> Iterator[Any]:
        yield from items
        self.signal = signal.SIGTERM


# The moving average, saved before or after an evaluation


@pytest.mark.parametrize("when", ["before", "after"])
def test_raw_and_averaged_weights_are_kept_around_an_evaluation(when: str, tmp_path: Path) -> None:
    run = (*TINY, *LEAN, "trainer.ema_decay=0.5", "model.dropout=0.3")
    config = config_of(*run)
    whole = train(tmp_path / "whole", *run)
    folder = tmp_path / "cut"
    train(folder, *run, stop_at=3)
    objects = training.build(config, CPU)
    stop = StopAfterEvaluation()
    if when == "before":
        assert train(folder, *run, stop_at=4)["status"] == "interrupted"
    else:
        training.train(objects, config, folder, CPU, stop)
    evaluated = [line["step"] for line in metrics_of(folder) if "val/loss" in line]
    assert evaluated == ([] if when == "before" else [4])
    parts = {
        name: torch.load(folder / "checkpoints" / "last" / f"{name}.pt", weights_only=True)
        for name in ("model", "averaged")
    }
    assert not torch.equal(parts["model"]["head.weight"], parts["averaged"]["head.weight"])
    assert train(folder, *run)["weights_sha256"] == whole["weights_sha256"]
    assert same(folder, tmp_path / "whole")


# fp16 below the config's check, which refuses it on a CPU


def test_an_fp16_run_resumes_with_its_loss_scale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "set_numerics", lambda options, device: None)
    run = (*TINY, *LEAN, "model.dropout=0.3", "trainer.ema_decay=0.9", "trainer.precision=fp16")
    monkeypatch.setattr(
        "lab.build.LossScale", lambda device: LossScale(device, initial=2.0**27, growth_interval=3)
    )
    train(tmp_path / "whole", *run)
    lines = [x for x in metrics_of(tmp_path / "whole") if "train/loss_scale" in x]
    assert len({x["train/loss_scale"] for x in lines}) > 2  # it fell and rose
    assert lines[-1]["train/skipped_steps"] > 0
    in_parts(tmp_path / "cut", run, [1, 2, 5, 6, 11])
    assert same(tmp_path / "cut", tmp_path / "whole")
    train(tmp_path / "broken", *run, stop_at=6)
    monkeypatch.setattr(LossScale, "load_state_dict", lambda self, state: None)
    train(tmp_path / "broken", *run)
    assert not same(tmp_path / "broken", tmp_path / "whole")


def test_a_schedule_free_run_resumes_exactly(tmp_path: Path) -> None:
    pytest.importorskip("schedulefree")
    run = (
        *(*TINY, *LEAN, "optimizer._target_=schedulefree.AdamWScheduleFree", "~optimizer.fused"),
        *("~optimizer.amsgrad", "scheduler=constant"),
    )
    train(tmp_path / "whole", *run)
    in_parts(tmp_path / "cut", run, [1, 3, 4, 10])
    assert same(tmp_path / "cut", tmp_path / "whole")


# Examples that workers read


class Noisy(Dataset[Any]):
    """Items that draw from torch's ambient state, like transforms."""

    def __init__(self, count: int, augment: bool) -> None:
        self.inputs = torch.randn(count, 6, generator=torch.Generator().manual_seed(count))
        self.augment = augment

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        noise = 0.5 * torch.randn(6) if self.augment else torch.zeros(6)
        return self.inputs[index] + noise, int(self.inputs[index].argmax()) % 3


def noisy() -> Splits:
    return from_datasets(
        train=Noisy(50, True), val=Noisy(20, False), test=Noisy(10, False), collate=None
    )


def read_by(workers: int) -> dict[str, Any]:
    config = config_of(*TINY, *LEAN, "model.dropout=0.3", "data.normalize=none")
    config["data"] |= {"source": {"_target_": f"{__name__}.noisy"}, "num_workers": workers}
    return config


def test_workers_and_stops_change_nothing(tmp_path: Path) -> None:
    train_config(tmp_path / "whole", read_by(0))
    train_config(tmp_path / "workers", read_by(2))
    assert same(tmp_path / "workers", tmp_path / "whole")
    for workers, stops in ((0, (1, 3, 4, 6, 11)), (2, (3, 6))):
        folder = tmp_path / f"cut_{workers}"
        for stop in stops:
            train_config(folder, read_by(workers), stop_at=stop)
        train_config(folder, read_by(2 - workers))  # their number may change
        assert same(folder, tmp_path / "whole")


def drawn() -> Splits:
    """Examples and splits from the ambient state, like those of torch's random_split."""
    inputs = torch.randn(80, 6)
    rows = TensorDataset(inputs, inputs.argmax(1) % 3)
    train, val, test = random_split(rows, [50, 20, 10])
    return from_datasets(train=train, val=val, test=test, collate=None)


def test_a_source_that_draws_gives_the_same_splits_at_each_start(tmp_path: Path) -> None:
    config = config_of(*TINY, *LEAN, "data.normalize=none")
    config["data"] |= {"source": {"_target_": f"{__name__}.drawn"}}
    train_config(tmp_path / "whole", config)
    torch.rand(3)  # the process has drawn something else by then
    train_config(tmp_path / "cut", config, stop_at=5)
    train_config(tmp_path / "cut", config)
    assert same(tmp_path / "cut", tmp_path / "whole")
    train_config(tmp_path / "other", {**config, "seed": 1})  # the control
    assert not same(tmp_path / "other", tmp_path / "whole")


def test_examples_that_draw_without_a_seed_are_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from regrow.feeding import items

    train_config(tmp_path / "whole", read_by(0))
    monkeypatch.setattr(items, "key", lambda *parts: random.getrandbits(60))
    train_config(tmp_path / "cut", read_by(0), stop_at=5)
    train_config(tmp_path / "cut", read_by(0))
    assert not same(tmp_path / "cut", tmp_path / "whole")
