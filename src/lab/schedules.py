"""Learning rates as functions of the step: `step -> factor` of `optimizer.lr`.

The learning rate depends on the step alone, so a resumed run follows the same curve without saved
state. Only the plateau depends on results; its history is in the checkpoint. The run passes its
length to every schedule; the user never does. Each takes a linear warm-up, in steps or as a
fraction of all steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from regrow.errors import UserError


@dataclass(frozen=True)
class RunLength:
    """The length of a run, passed in by the run."""

    total_steps: int | None  # None: only time limits the run
    steps_per_epoch: int

    def total(self, name: str) -> int:
        if self.total_steps is None:
            raise UserError(
                f"scheduler={name} needs the number of steps, and trainer.max_epochs and "
                "trainer.max_steps are both null. Set one, or use scheduler=constant or plateau."
            )
        return self.total_steps

    def warmup(self, steps: int | None, fraction: float | None) -> int:
        """Return the number of warm-up steps, given directly or as a fraction of all steps."""
        if fraction is None:
            return steps or 0
        if self.total_steps is None:
            raise UserError(
                f"scheduler.warmup_fraction={fraction} needs the number of steps, and "
                "trainer.max_epochs and trainer.max_steps are both null. "
                "Use scheduler.warmup_steps."
            )
        return round(fraction * self.total_steps)


class Schedule(Protocol):
    """The factor of the learning rate for the update that follows `step` updates."""

    def __call__(self, step: int) -> float: ...


@runtime_checkable
class Stateful(Protocol):
    """A schedule that does not depend on the step alone, so its state goes into checkpoints."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def constant(
    *,
    warmup_steps: int | None,
    warmup_fraction: float | None,
    length: RunLength,
) -> Schedule:
    warmup = length.warmup(warmup_steps, warmup_fraction)
    return _warmed_up(lambda step: 1.0, warmup)


def step(
    *,
    every_epochs: int,
    gamma: float,
    warmup_steps: int | None,
    warmup_fraction: float | None,
    length: RunLength,
) -> Schedule:
    """Return `gamma` to the power of the number of complete periods of `every_epochs` epochs."""
    period = every_epochs * length.steps_per_epoch
    warmup = length.warmup(warmup_steps, warmup_fraction)
    return _warmed_up(lambda step: gamma ** (step // period), warmup)


def multistep(
    *,
    milestones_epochs: Sequence[int],
    gamma: float,
    warmup_steps: int | None,
    warmup_fraction: float | None,
    length: RunLength,
) -> Schedule:
    """Return `gamma` to the power of the number of milestones passed."""
    milestones = [epoch * length.steps_per_epoch for epoch in milestones_epochs]
    warmup = length.warmup(warmup_steps, warmup_fraction)
    return _warmed_up(lambda step: gamma ** sum(step >= m for m in milestones), warmup)


def exponential(
    *,
    gamma: float,
    warmup_steps: int | None,
    warmup_fraction: float | None,
    length: RunLength,
) -> Schedule:
    """Decay by `gamma` per epoch, by the same factor in each step."""
    warmup = length.warmup(warmup_steps, warmup_fraction)
    return _warmed_up(lambda step: gamma ** (step / length.steps_per_epoch), warmup)


def linear(
    *,
    final_factor: float,
    warmup_steps: int | None,
    warmup_fraction: float | None,
    length: RunLength,
) -> Schedule:
    """Decay linearly from 1 after the warm-up to `final_factor` at the end."""
    total = length.total("linear")
    warmup = length.warmup(warmup_steps, warmup_fraction)
    return _warmed_up(
        lambda step: _between(1.0, final_factor, _progress(step, warmup, total)), warmup
    )


def cosine(
    *,
    final_factor: float,
    warmup_steps: int | None,
    warmup_fraction: float | None,
    length: RunLength,
) -> Schedule:
    """Decay along half a cosine from 1 to `final_factor`.

    Source: Loshchilov and Hutter, "SGDR", ICLR 2017, eq. 5.
    """
    total = length.total("cosine")
    warmup = length.warmup(warmup_steps, warmup_fraction)
    return _warmed_up(
        lambda step: _half_cosine(1.0, final_factor, _progress(step, warmup, total)), warmup
    )


def onecycle(
    *,
    peak_fraction: float,
    initial_factor: float,
    final_factor: float,
    warmup_steps: int | None,
    warmup_fraction: float | None,
    length: RunLength,
) -> Schedule:
    """Rise to the peak and fall, each along half a cosine.

    Source: Smith and Topin, "Super-convergence", 2018.
    """
    total = length.total("onecycle")
    peak = max(1, round(peak_fraction * total))

    def factor(step: int) -> float:
        if step < peak:
            return _half_cosine(initial_factor, 1.0, step / peak)
        return _half_cosine(1.0, final_factor, _progress(step, peak, total))

    return _warmed_up(factor, length.warmup(warmup_steps, warmup_fraction))


class Plateau:
    """Multiplies by `factor` after more than `patience` evaluations without an improvement."""

    def __init__(
        self,
        *,
        factor: float,
        patience: int,
        min_delta: float,
        min_factor: float,
        warmup_steps: int,
    ) -> None:
        self.factor, self.patience, self.min_delta = factor, patience, min_delta
        self.min_factor, self.warmup_steps = min_factor, warmup_steps
        self.best: float | None = None
        self.waited = 0
        self.current = 1.0

    def __call__(self, step: int) -> float:
        return self.current * _ramp(step, self.warmup_steps)

    def update(self, value: float, mode: str) -> None:
        """Record a monitored value. A NaN is not an improvement."""
        if improves(value, self.best, mode=mode, min_delta=self.min_delta):
            self.best, self.waited = value, 0
            return
        self.waited += 1
        if self.waited > self.patience:
            self.waited = 0
            self.current = max(self.min_factor, self.current * self.factor)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "waited": self.waited, "current": self.current}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.waited, self.current = state["best"], state["waited"], state["current"]


def plateau(
    *,
    factor: float,
    patience: int,
    min_delta: float,
    min_factor: float,
    warmup_steps: int | None,
    warmup_fraction: float | None,
    length: RunLength,
) -> Plateau:
    warmup = length.warmup(warmup_steps, warmup_fraction)
    return Plateau(
        factor=factor,
        patience=patience,
        min_delta=min_delta,
        min_factor=min_factor,
        warmup_steps=warmup,
    )


def improves(value: float, best: float | None, *, mode: str, min_delta: float = 0.0) -> bool:
    """Return True if `value` beats `best` by more than `min_delta`. A NaN never does."""
    if math.isnan(value):
        return False
    if best is None:
        return True
    return value > best + min_delta if mode == "max" else value < best - min_delta


def _warmed_up(factor: Callable[[int], float], warmup_steps: int) -> Schedule:
    return lambda step: factor(step) * _ramp(step, warmup_steps)


def _ramp(step: int, warmup_steps: int) -> float:
    # The first update has 1/warmup_steps of the learning rate: with zero it would be wasted.
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0


def _progress(step: int, start: int, total: int) -> float:
    """Return 0 at `start` and 1 after `total` updates, so the last update's rate is not zero."""
    return min(1.0, max(0.0, (step - start) / max(1, total - start)))


def _between(start: float, end: float, progress: float) -> float:
    return start + (end - start) * progress


def _half_cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2
