"""The promise of every example: a stopped run grows back bit for bit."""

from __future__ import annotations

from pathlib import Path

import torch
from running import metrics_of, train

from regrow.checkpoint import writer


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights of a run's models and averages, by part and name."""
    parts, _ = writer.load(writer.named(folder / "checkpoints", "last"))
    return {
        f"{part}.{name}": value
        for part, content in parts.items()
        if part.startswith(("model", "averaged"))
        for name, value in content.items()
    }


def distance(one: Path, other: Path) -> float:
    """Return the largest difference between two runs' weights."""
    mine, its = weights(one), weights(other)
    assert mine.keys() == its.keys() and mine
    return max((mine[name] - its[name]).abs().max().item() for name in mine)


def assert_grows_back(folder: Path, run: tuple[str, ...], steps: int, control: str) -> None:
    """Stop a run at each step in turn. `control` changes the run, so its weights must differ."""
    train(folder / "whole", *run)
    for stop in range(1, steps + 1):
        train(folder / "parts", *run, stop_at=stop)
    train(folder / "parts", *run)
    assert distance(folder / "whole", folder / "parts") == 0
    assert metrics_of(folder / "whole") == metrics_of(folder / "parts")
    train(folder / "other", *run, control)
    assert distance(folder / "whole", folder / "other") > 0
