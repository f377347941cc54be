"""Parts of a run that pause where a test asks them to, as a user's slow code might."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lab.data.datasets import from_datasets
from lab.models.mlp import MLP
from regrow.feeding.splits import Splits


def stay(place: str) -> None:
    """Pause once if `marks/<place>` holds the seconds, and rename it to report the pause."""
    mark = Path("marks") / place
    with contextlib.suppress(FileNotFoundError):  # not requested, or another worker was first
        seconds = float(mark.read_text())
        mark.rename(mark.with_suffix(".reached"))
        time.sleep(seconds)


class Rows:
    """Examples that draw from the ambient random state; number 7 may be slow to read."""

    def __init__(self, count: int, name: str) -> None:
        self.inputs = torch.randn(count, 6, generator=torch.Generator().manual_seed(count))
        self.name = name

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index == 7:
            stay(f"{self.name}_data")
        noise = 0.3 * torch.randn(6) if self.name == "train" else torch.zeros(6)
        return self.inputs[index] + noise, int(self.inputs[index].argmax()) % 3

    def fingerprint(self) -> str:
        stay("record")
        return self.name  # no item is read before the run reads it


def splits(**options: Any) -> Splits:
    return from_datasets(
        train=Rows(50, "train"), val=Rows(20, "val"), test=Rows(10, "test"), collate=None
    )


def net(ballast: int, **options: Any) -> nn.Module:
    """An MLP whose forward pass may be slow, and which is slow to save if `ballast` is large."""
    model = MLP(**options)
    model.ballast = nn.Parameter(torch.zeros(ballast), requires_grad=False)
    model.register_forward_pre_hook(_stay_in_the_pass)
    return model


def _stay_in_the_pass(model: nn.Module, inputs: Any) -> None:
    stay("training" if model.training else "evaluation")
