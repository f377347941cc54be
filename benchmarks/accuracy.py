"""Time to accuracy: `experiment=digits_fast` beside the same recipe in a script tuned by hand.

A round is a seed, which also cuts the data. The seconds are those of training alone.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.configured import build
from benchmarks.measure import Table
from regrow import run as runs
from regrow.training.interrupt import StopRequest
from regrow.training.parallel import World

EPOCHS, BATCH, RATE, WARMUP, DECAY = 15, 128, 0.01, 0.2, 0.1
SEEDS = range(5)
OURS, BY_HAND = "train.py experiment=digits_fast", "hand-tuned, in memory"


def measure() -> Table:
    torch.set_num_threads(1)
    seconds: dict[str, list[float]] = {OURS: [], BY_HAND: []}
    right: dict[str, list[float]] = {OURS: [], BY_HAND: []}
    for seed in (99, *SEEDS):  # the first warms up
        for name, run in ((OURS, ours), (BY_HAND, by_hand)):
            took, accuracy = run(seed)
            if seed in SEEDS:
                seconds[name].append(took)
                right[name].append(accuracy)
    said = ", ".join(
        f"{name} {statistics.fmean(values):.4f} ± {statistics.stdev(values):.4f}"
        for name, values in right.items()
    )
    return Table(
        title="Time to accuracy",
        note=f"Digits, {EPOCHS} epochs, one thread, {len(SEEDS)} seeds. Test accuracy: {said}.",
        unit="s of training",
        reference=BY_HAND,
        seconds=seconds,
    )


def ours(seed: int) -> tuple[float, float]:
    world = World(device=torch.device("cpu"))
    objects, config = build(world, "experiment=digits_fast", f"seed={seed}", "trainer.device=cpu")
    with tempfile.TemporaryDirectory() as folder:
        summary = runs.train(objects, config, Path(folder), world, StopRequest())
    return summary["seconds"], summary["test"]["test/accuracy"]


def by_hand(seed: int) -> tuple[float, float]:
    world = World(device=torch.device("cpu"))
    objects, _ = build(world, "experiment=digits_fast", f"seed={seed}", "trainer.device=cpu")
    inputs, targets = whole(objects.train.epoch(0))  # the same examples
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 10))
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": DECAY},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE, fused=True)
    started = time.perf_counter()
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
            goal = targets.index_select(0, indices)
            F.cross_entropy(outputs, goal, label_smoothing=0.1).backward()
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
