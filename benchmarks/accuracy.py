"""Time to accuracy: `experiment=digits_fast` and the same recipe in a script tuned by hand.

A round is a seed, which also determines the splits. Only training time is measured.
"""

from __future__ import annotations

import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.configured import build, world_of
from benchmarks.measure import Table
from regrow.processes.interrupt import StopRequest
from regrow.runs import training

Runner = Callable[..., tuple[float, float]]  # overrides -> seconds of training, test accuracy
EPOCHS, BATCH, RATE, BETAS, WARMUP, DECAY, SMOOTHING = 14, 256, 0.02, (0.7, 0.9), 0.2, 0.3, 0.1
SEEDS = range(5)
OPTIONS = ("experiment=digits_fast", "trainer.device=cpu")
OURS, BY_HAND = "train.py experiment=digits_fast", "hand-tuned, in memory"


def measure() -> Table:
    torch.set_num_threads(1)
    seconds, said = race({OURS: ours, BY_HAND: by_hand}, OPTIONS, SEEDS, warm_up=True)
    return Table(
        title="Time to accuracy",
        note=f"Digits, {EPOCHS} epochs, one thread, {len(SEEDS)} seeds. Test accuracy: {said}.",
        unit="s of training",
        reference=BY_HAND,
        seconds=seconds,
    )


def race(
    runners: Mapping[str, Runner], options: tuple[str, ...], seeds: range, *, warm_up: bool
) -> tuple[dict[str, list[float]], str]:
    """Return the seconds of training for each seed, and a sentence with the accuracies."""
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    right: dict[str, list[float]] = {name: [] for name in runners}
    for seed in (*([99] if warm_up else []), *seeds):
        for name, run in runners.items():
            took, accuracy = run(*options, f"seed={seed}")
            if seed in seeds:
                print(f"seed {seed}: {name} {took:.3g} s, {accuracy:.4f}", file=sys.stderr)
                seconds[name].append(took)
                right[name].append(accuracy)
    said = (
        f"{name} {statistics.fmean(values):.4f}"
        + (f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else "")
        for name, values in right.items()
    )
    return seconds, ", ".join(said)


def ours(*options: str) -> tuple[float, float]:
    world = world_of(*options)
    objects, config = build(world, *options)
    with tempfile.TemporaryDirectory() as folder:
        summary = training.train(objects, config, Path(folder), world, StopRequest())
    return summary["seconds"], summary["test"]["test/accuracy"]


def by_hand(*options: str) -> tuple[float, float]:
    objects, config = build(world_of(*options), *options)
    inputs, targets = whole(objects.train.epoch(0))  # the same examples
    torch.manual_seed(config["seed"])
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 10))
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": DECAY},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=BETAS, fused=True)
    started = time.perf_counter()
    # Smooth once: probabilities need fewer kernels than label_smoothing.
    goals = F.one_hot(targets, 10) * (1 - SMOOTHING) + SMOOTHING / 10
    total = EPOCHS * math.ceil(len(inputs) / BATCH)
    warm = round(WARMUP * total)
    step = 0
    for _ in range(EPOCHS):
        for indices in torch.randperm(len(inputs)).split(BATCH):
            share = (step - warm) / (total - warm)
            factor = (step + 1) / warm if step < warm else (1 + math.cos(math.pi * share)) / 2
            for group in optimizer.param_groups:
                group["lr"] = RATE * factor
            optimizer.zero_grad()
            outputs = model(inputs.index_select(0, indices))
            F.cross_entropy(outputs, goals.index_select(0, indices)).backward()
            optimizer.step()
            step += 1
    seconds = time.perf_counter() - started
    test = objects.data.evaluation("test", device=torch.device("cpu"))
    inputs, targets = whole(test)
    with torch.no_grad():
        right = (model(inputs).argmax(1) == targets).double().mean()
    return seconds, right.item()


def whole(batches: object) -> tuple[Tensor, Tensor]:
    found = list(batches)  # type: ignore[call-overload]
    return torch.cat([b.inputs for b in found]), torch.cat([b.targets for b in found])
