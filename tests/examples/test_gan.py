"""Several models and optimizers by name, shown by the GAN of the examples."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import forked
import pytest
import torch
from growing import assert_grows_back, distance, weights
from running import CPU, config_of, metrics_of, train

from lab.examples.gan import ring, step
from lab.state import TrainState
from regrow.checkpoint import writer
from regrow.errors import UserError
from regrow.feeding.batch import noise
from regrow.load import load_run
from regrow.project import CONF
from regrow.runs import training

EXAMPLE = Path(step.__file__).parent / "conf"
SMALL = (
    *("experiment=gan_ring", "data.source.num_train=50", "data.source.num_val=20"),
    *("data.source.num_test=20", "data.batch_size=16", "trainer.max_epochs=2"),
    *("model.generator.hidden=[8]", "model.discriminator.hidden=[8]", "trainer.device=cpu"),
    *("trainer.num_threads=1", "trainer.log_every_steps=1", "trainer.ema_decay=0.9"),
)
GAN = (f"hydra.searchpath=[file://{EXAMPLE}]", *SMALL)
STEPS = 8


def test_an_example_of_weight_zero_is_not_counted() -> None:
    metrics = ring.CoverageMetrics(ring.centres(8), 0.3)
    metrics.update(ring.centres(8), torch.zeros(8))
    metrics.update(torch.full((1, 2), 9.0), torch.zeros(1), torch.zeros(1))
    assert metrics.scalars() == {"modes": 8.0, "near": 1.0}


def test_stops_at_each_step_in_turn_change_no_bit(tmp_path: Path) -> None:
    assert_grows_back(tmp_path, GAN, STEPS, "optimizer.generator.lr=0.0011")


def test_a_resume_clips_as_before_if_a_part_of_the_discriminator_is_frozen(tmp_path: Path) -> None:
    run = (*GAN, "model.discriminator.freeze=[body.0]", "trainer.clip_norm=0.05")
    train(tmp_path / "whole", *run)
    train(tmp_path / "parts", *run, stop_at=3)
    train(tmp_path / "parts", *run)
    assert distance(tmp_path / "whole", tmp_path / "parts") == 0


def test_the_step_computes_in_the_precision_of_the_run(tmp_path: Path) -> None:
    train(tmp_path / "fp32", *GAN)
    train(tmp_path / "bf16", *GAN, "trainer.precision=bf16")
    assert 0 < distance(tmp_path / "fp32", tmp_path / "bf16") < 0.1


def test_micro_batches_draw_the_same_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path / "one", *GAN)
    train(tmp_path / "three", *GAN, "trainer.accumulation_steps=3")
    assert distance(tmp_path / "one", tmp_path / "three") < 1e-5
    # The control draws again for each micro-batch.
    monkeypatch.setattr(
        step, "noise", lambda seed, at, batch, *s: torch.randn(len(batch.targets), *s)
    )
    train(tmp_path / "again", *GAN, "trainer.accumulation_steps=3")
    assert distance(tmp_path / "one", tmp_path / "again") > 1e-3


def test_a_checkpoint_has_a_part_and_a_log_a_rate_for_each_name(tmp_path: Path) -> None:
    train(tmp_path, *GAN, "optimizer.generator.lr=0.002", "trainer.ema_decay=0.9")
    parts, _ = writer.load(writer.named(tmp_path / "checkpoints", "last"))
    kinds = ("model", "averaged", "optimizer")
    names = {f"{kind}.{name}" for kind in kinds for name in ("generator", "discriminator")}
    assert set(parts) == {*names, "progress"}
    line = metrics_of(tmp_path)[0]
    assert line["train/lr/generator"] == pytest.approx(0.002)
    assert line["train/lr/discriminator"] == pytest.approx(0.001)
    total = line["train/loss_discriminator"] + line["train/loss_generator"]
    assert line["train/loss"] == pytest.approx(total)


@pytest.mark.slow
def test_a_loaded_run_is_the_evaluated_model(tmp_path: Path) -> None:
    finished(command(tmp_path, "hydra.run.dir=run"))
    run = load_run(tmp_path / "run")
    best, _ = writer.load(writer.named(tmp_path / "run" / "checkpoints", "best"))
    its, own = run.model.state_dict(), best["averaged.generator"]
    assert its.keys() == own.keys() and all(torch.equal(its[name], own[name]) for name in own)
    assert not all(torch.equal(its[name], best["model.generator"][name]) for name in own)


def test_a_new_run_may_start_from_the_weights_of_both(tmp_path: Path) -> None:
    train(tmp_path / "first", *GAN)
    config = config_of(*GAN, f"init_from={tmp_path / 'first'}", "trainer.max_epochs=1")
    state: Any = training.build(config, CPU).state
    best, _ = writer.load(writer.named(tmp_path / "first" / "checkpoints", "best"))
    for name in ("generator", "discriminator"):
        for key, value in state.model[name].state_dict().items():
            assert torch.equal(value, best[f"averaged.{name}"][key])


def test_a_rate_can_be_scaled_by_the_name_of_a_model(tmp_path: Path) -> None:
    scale = "param_groups.lr_scale={discriminator.*: 0.1}"
    train(tmp_path, *GAN, scale)
    line = metrics_of(tmp_path)[0]
    assert line["train/lr/discriminator/x0.1"] == pytest.approx(1e-4)
    assert line["train/lr/generator"] == pytest.approx(5e-4)
    with pytest.raises(UserError, match="must begin with the name of a model"):
        train(tmp_path / "foreign", *GAN, "param_groups.lr_scale={layers.*: 0.1}")


def test_names_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    for change, said in (
        ("~optimizer.generator", "optimizer: it names discriminator, and model names generator"),
        ("task.evaluates=critic", r"task.evaluates=critic must name the model .*discriminator\.$"),
        ("task=multiclass", "generator or discriminator. The shipped tasks lack this key"),
    ):
        with pytest.raises(UserError, match=said):
            train(tmp_path, *GAN, change)


def test_an_optimizer_of_all_models_is_refused_by_a_step_that_names_them(tmp_path: Path) -> None:
    (experiment,) = (text for text in SMALL if text.startswith("experiment="))
    single = ("data=ring", "task=gan_ring", "loss=mse", "model=gan", "step=gan", "optimizer=adam")
    own = [text for text in GAN if text != experiment]
    with pytest.raises(UserError, match="step needs discriminator, and the config has a single"):
        train(tmp_path, *single, *own, "trainer.mode=max")


def test_a_checkpoint_of_another_model_is_refused_by_its_name(tmp_path: Path) -> None:
    train(tmp_path, *GAN, stop_at=2)
    for name in ("generator", "discriminator"):
        said = rf"is of another model: model\.{name}\.body\.0\.bias is \(8,\) there and \(6,\) here"
        with pytest.raises(UserError, match=said):
            train(tmp_path, *GAN, f"model.{name}.hidden=[6]")


def test_a_bad_update_of_one_model_is_left_out_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deceive = step.deceive

    def fails_once(state: TrainState, batch: Any, plan: Any) -> Any:
        losses, totals = deceive(state, batch, plan)
        return (losses * torch.nan, totals) if state.step == 3 else (losses, totals)

    monkeypatch.setattr(step, "deceive", fails_once)
    summary = train(tmp_path, *GAN)
    assert summary["skipped_steps"] == 1
    assert all(value.isfinite().all() for value in weights(tmp_path).values())


def test_noise_depends_on_seed_step_and_example_alone(tmp_path: Path) -> None:
    config = config_of(*GAN)
    train_batches: Any = training.build(config, CPU).train
    batch = next(train_batches.epoch(0))
    whole = noise(0, 5, batch, 2)
    parts = torch.cat([noise(0, 5, part, 2) for part in batch.split(3)])
    assert torch.equal(whole, parts) and whole.shape == (16, 2)
    others = [noise(1, 5, batch, 2), noise(0, 6, batch, 2)]
    assert not any(torch.equal(whole, other) for other in others)
    assert len({tuple(row) for row in whole.tolist()}) == 16


def test_noise_for_a_gpu_comes_from_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGPU(torch.Tensor):
        device = torch.device("cuda", 0)  # type: ignore[assignment]

    calls: list[Any] = []
    to = lambda values, *given, **more: calls.append((*given, more)) or values  # noqa: E731
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda values: calls.append("pinned") or values)
    monkeypatch.setattr(torch.Tensor, "to", to)
    batch: Any = SimpleNamespace(
        targets=torch.zeros(3).as_subclass(OnGPU), num_local=3, num_global=5, first=1
    )
    assert noise(0, 5, batch, 2).shape == (3, 2)
    assert calls == ["pinned", (OnGPU.device, {"non_blocking": True})]


def command(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    script = CONF.parent / "scripts" / "train.py"
    return forked.popen(
        [sys.executable, str(script), "--config-dir", str(EXAMPLE), *SMALL, *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finished(process: subprocess.Popen[str], code: int = 0) -> None:
    said, _ = process.communicate(timeout=300)
    assert process.returncode == code, said


@pytest.mark.slow
def test_two_processes_train_the_same_models(tmp_path: Path) -> None:
    finished(command(tmp_path, "hydra.run.dir=one"))
    finished(command(tmp_path, "hydra.run.dir=two", "trainer=ddp", "trainer.devices=2"))
    assert distance(tmp_path / "one", tmp_path / "two") < 1e-5


@pytest.mark.slow
@pytest.mark.nightly
def test_a_sweep_trains_each_job_and_a_killed_run_grows_back(tmp_path: Path) -> None:
    long = ("trainer.max_epochs=60", "trainer.checkpoint.save_every_steps=7")
    finished(command(tmp_path, "hydra.run.dir=whole", *long))
    process = command(tmp_path, "hydra.run.dir=killed", *long)
    while not any((tmp_path / "killed" / "checkpoints").glob("step_*")):
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    finished(command(tmp_path, "hydra.run.dir=killed", *long))
    assert distance(tmp_path / "whole", tmp_path / "killed") == 0
    finished(command(tmp_path, "-m", "seed=0,1", "hydra.sweep.dir=sweep"))
    done = [json.loads(path.read_text()) for path in (tmp_path / "sweep").glob("*/summary.json")]
    assert [each["status"] for each in done] == ["completed", "completed"]
