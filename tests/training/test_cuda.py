"""Promises that hold on a GPU too. Without one, all tests here are skipped."""

from __future__ import annotations

import functools
import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from running import config_of, fingerprint, metrics_of, train
from torch import Tensor, nn
from waits import no_wait_for_the_gpu

from lab import optim
from lab.build import plan_of
from regrow.distributed.parallel import World
from regrow.numerics.totals import Skipped, Totals
from regrow.processes.interrupt import StopRequest
from regrow.runs import training

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")

GPU = World(device=torch.device("cuda", 0))
IMAGES = (
    "data=digits",
    "data.batch_size=400",
    "model=cnn",
    "model.channels=[8]",
    "model.dropout=0.2",
    "trainer.max_epochs=3",
    "trainer.num_threads=1",
    "trainer.log_every_steps=1",
    "trainer.device=cuda",
)
EXACT = ("trainer.deterministic=true", "trainer.ema_decay=0.9", "trainer.clip_norm=1")


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("mix", ["MixUp", "CutMix"])
def test_a_gpu_gets_the_sampled_and_mixed_batches_of_the_cpu(mix: str) -> None:
    node = f"data.mixing={{_target_: lab.data.augment.{mix}, alpha: 1.0}}"
    config = config_of(*IMAGES, node, "data.sampling=balanced")
    worlds = (GPU, World(device=torch.device("cpu")))
    here, there = (training.build(config, world).train.epoch(1) for world in worlds)
    for ours, theirs in zip(here, there, strict=True):
        assert ours.inputs.is_cuda and torch.allclose(ours.inputs.cpu(), theirs.inputs, atol=1e-5)
        assert torch.allclose(ours.targets.cpu(), theirs.targets, atol=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_stop_changes_nothing_on_a_gpu(precision: str, tmp_path: Path) -> None:
    options = (*IMAGES, *EXACT, f"trainer.precision={precision}")
    train(tmp_path / "whole", *options, world=GPU)
    train(tmp_path / "cut", *options, stop_at=5, world=GPU)
    train(tmp_path / "cut", *options, world=GPU)
    assert fingerprint(tmp_path / "cut") == fingerprint(tmp_path / "whole")


@pytest.mark.parametrize(
    ("precision", "tolerance"), [("fp32", 1e-3), ("bf16", 5e-2), ("fp16", 2e-2)]
)
def test_a_gpu_computes_what_the_cpu_does(precision: str, tolerance: float, tmp_path: Path) -> None:
    # Dropout draws from another generator, and TF32 has 10 bits.
    options = (*IMAGES, "model.dropout=0", "trainer.tf32=false")
    train(tmp_path / "gpu", *options, f"trainer.precision={precision}", world=GPU)
    train(tmp_path / "cpu", *options, "trainer.device=cpu")
    here, there = metrics_of(tmp_path / "gpu"), metrics_of(tmp_path / "cpu")
    losses = [(a["train/loss"], b["train/loss"]) for a, b in zip(here, there, strict=True)
              if "train/loss" in a]  # fmt: skip
    assert losses
    for a, b in losses:
        assert a == pytest.approx(b, abs=tolerance)


@pytest.mark.slow
def test_a_compiled_run_grows_back_on_a_gpu(tmp_path: Path) -> None:
    options = (*IMAGES, *EXACT, "trainer.compile=true", "trainer.precision=bf16")
    train(tmp_path / "whole", *options, world=GPU)
    train(tmp_path / "cut", *options, stop_at=5, world=GPU)
    train(tmp_path / "cut", *options, world=GPU)
    assert fingerprint(tmp_path / "cut") == fingerprint(tmp_path / "whole")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_no_step_waits_for_the_gpu(precision: str) -> None:
    config = config_of(*IMAGES, f"trainer.precision={precision}", "trainer.log_every_steps=1000")
    objects = training.build(config, GPU)
    plan = plan_of(objects, 0, GPU, StopRequest(), record=None, checkpoints=None)
    batches = [*objects.train.epoch(0, 0)]
    plan.train_step(objects.state, batches[0], plan.step)  # chooses kernels and allocates memory
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError), no_wait_for_the_gpu():
        objects.state.skips.sum().item()  # the control: the mode finds a wait
    with no_wait_for_the_gpu():
        for batch in batches[1:]:
            plan.train_step(objects.state, batch, plan.step)
            objects.state.progress.step += 1


def test_an_empty_step_does_not_wait_for_the_gpu_and_changes_nothing() -> None:
    parameter = nn.Parameter(torch.ones(4, device=GPU.device))
    groups = [{"params": [parameter], "lr_scale": 1.0}]
    optimizer = optim.build(functools.partial(torch.optim.AdamW, lr=0.1, fused=True), groups)

    def step(weight: Tensor, gradient: Tensor) -> Skipped:
        parameter.grad = gradient
        return optim.update(
            optimizer,
            [gradient],
            torch.linalg.vector_norm(gradient),
            factor=4 / weight,
            clipping=optim.Clipping(None, None),
            totals=Totals(torch.stack([weight * 0, weight, weight, weight]), weighted=True),
        )

    first = step(torch.tensor(2.0, device=GPU.device), torch.ones(4, device=GPU.device))
    before = parameter.detach().clone()
    with no_wait_for_the_gpu():
        second = step(torch.zeros((), device=GPU.device), torch.zeros(4, device=GPU.device))
    assert [bool(told) for told in (*first, *second)] == [False, False, True, True]
    assert torch.equal(parameter, before) and not torch.equal(before, torch.ones_like(before))


def memory_kept() -> int:
    """Return the bytes that earlier runs of this process still hold, once the rest is freed."""
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()


def test_a_gpu_without_room_halves_the_micro_batches_and_the_run_completes(tmp_path: Path) -> None:
    wide = (*IMAGES, "model.channels=[64]", "data.batch_size=1200")
    before = memory_kept()
    torch.cuda.reset_peak_memory_stats()
    train(tmp_path / "roomy", *wide, world=GPU)
    needed = torch.cuda.max_memory_allocated() - before
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((memory_kept() + 0.7 * needed) / total)
    try:
        summary = train(tmp_path / "cramped", *wide, world=GPU)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert summary["status"] == "completed"
