"""Modules that misbehave on cue, named by `_target_` in the tests of several processes."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn


class Hungry(nn.Module):
    """An MLP that runs out of memory for more than `room` examples at once, in one rank."""

    def __init__(self, input_shape: list[int], num_outputs: int, room: int, rank: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(input_shape[0], num_outputs))
        self.room, self.rank = room, rank

    def forward(self, inputs: Tensor) -> Tensor:
        mine = int(os.environ.get("RANK", 0)) == self.rank
        if mine and self.training and len(inputs) > self.room:
            raise torch.OutOfMemoryError("no room")
        outputs: Tensor = self.body(inputs)
        return outputs


class Failing(nn.Module):
    """An MLP that fails in one rank, after its first step."""

    def __init__(self, input_shape: list[int], num_outputs: int, rank: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(input_shape[0], num_outputs))
        self.rank, self.calls = rank, 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls += self.training
        if self.calls == 6 and int(os.environ.get("RANK", 0)) == self.rank:
            raise ArithmeticError("on cue")
        outputs: Tensor = self.body(inputs)
        return outputs


class Slow(nn.Module):
    """An MLP whose every call takes `seconds` once the file `gate` exists."""

    def __init__(self, input_shape: list[int], num_outputs: int, seconds: float, gate: str) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(input_shape[0], num_outputs))
        self.seconds, self.gate = seconds, Path(gate)

    def forward(self, inputs: Tensor) -> Tensor:
        if not self.training:
            self.gate.touch()
            time.sleep(self.seconds)
        outputs: Tensor = self.body(inputs)
        return outputs


class Drawing(nn.Module):
    """An MLP with noise from torch, numpy and `random`, in training and in evaluation."""

    def __init__(self, input_shape: list[int], num_outputs: int, noise: float) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(input_shape[0], num_outputs))
        self.noise = noise

    def forward(self, inputs: Tensor) -> Tensor:
        shift = float(np.random.randn()) + random.gauss(0, 1)
        noisy = inputs + self.noise * (torch.randn_like(inputs) + shift)
        outputs: Tensor = self.body(noisy)
        return outputs
