"""The learning-rate range test: a short run with a learning rate that grows at every step.

Source: Smith, "Cyclical learning rates for training neural networks", 2017, section 3.3.
"""

from __future__ import annotations

import copy
import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from regrow.errors import UserError
from regrow.protocols import Batch, State, TrainBatches

MEMORY = 0.9  # decay of the running mean that detects divergence
WIDTH = 0.03  # width of the smoothing bell, as a share of the steps
MARGIN = 3.0  # the suggestion is the learning rate of the lowest loss, divided by this


@dataclass(frozen=True, kw_only=True)
class RangeTest:
    """At most `num_steps` optimizer steps, from `min_lr` in equal factors to `max_lr`.

    The test ends early when the running mean of the loss reaches `divergence_factor` times its
    lowest.
    """

    min_lr: float
    max_lr: float
    num_steps: int
    divergence_factor: float

    def __post_init__(self) -> None:
        if self.min_lr >= self.max_lr:
            raise UserError(
                f"find_lr.min_lr={self.min_lr} must be below find_lr.max_lr={self.max_lr}."
            )

    def lr(self, index: int) -> float:
        """Return the learning rate of step `index`, from 0."""
        growth: float = (self.max_lr / self.min_lr) ** (index / max(1, self.num_steps - 1))
        return self.min_lr * growth


@dataclass(frozen=True)
class Curve:
    """The loss of each step before its update; `ended` says why the curve ends."""

    lrs: list[float]
    losses: list[float]
    smoothed: list[float]
    ended: str


def range_test(
    state: State, train: TrainBatches, step: Callable[[Batch], list[float]], test: RangeTest
) -> Curve:
    """Train at growing learning rates, then restore the state as if the test had not run.

    `step` updates the weights from a batch and returns the step's sums: see `numerics.totals`.
    Batches, micro-batches, precision and clipping are the run's own; its schedule is not used.
    """
    before = copy.deepcopy(state.state_dict())
    schedule, was_training, first = state.schedule, state.model.training, state.step
    unit = _unit_lr(state)
    lrs: list[float] = []
    losses: list[float] = []
    running = lowest = math.nan
    ended = "all steps done"
    state.schedule = lambda step: test.lr(step - first) / unit
    state.model.train()
    try:
        for index, batch in enumerate(itertools.islice(_batches(state, train), test.num_steps)):
            sums = step(batch)
            state.progress.step += 1
            loss = sums[0] / sums[2] if sums[2] else math.nan
            if not math.isfinite(loss):
                ended = "the loss is no longer finite"
                break
            lrs.append(test.lr(index))
            losses.append(loss)
            running = loss if index == 0 else MEMORY * running + (1 - MEMORY) * loss
            lowest = running if index == 0 else min(lowest, running)
            # A difference, not a ratio, so that it also works for losses near or below zero.
            if running - lowest > (test.divergence_factor - 1) * abs(lowest):
                ended = "the loss diverged"
                break
    finally:
        state.schedule = schedule
        state.load_state_dict(before)
        state.optimizer.zero_grad()
        state.model.train(was_training)
    return Curve(lrs, losses, smooth(losses, WIDTH * test.num_steps), ended)


def suggest(curve: Curve) -> float:
    """Return a learning rate below that of the lowest smoothed loss, to two digits.

    Past its lowest point the loss rises because the learning rate is too high; a longer run needs
    some margin. Raises UserError for a curve that never fell by more than its own noise.
    """
    flat = curve.losses[: max(2, len(curve.losses) // 10)]  # the rate is still too small to matter
    start = statistics.fmean(flat) if flat else math.nan
    lowest = min(curve.smoothed, default=math.nan)
    noise = 2 * statistics.pstdev(flat) if flat else 0.0
    if not start - lowest > max(noise, 0.01 * abs(start)):
        last = curve.lrs[-1] if curve.lrs else math.nan
        raise UserError(
            f"find_lr: the loss fell at no rate up to {last:.2g} ({curve.ended}). Lower "
            "find_lr.min_lr, raise find_lr.max_lr or find_lr.num_steps, or look at data and model."
        )
    return float(f"{curve.lrs[curve.smoothed.index(lowest)] / MARGIN:.1e}")


def still_falling(curve: Curve) -> bool:
    """Return True if the lowest loss is at the end, so the best learning rate may be higher."""
    return curve.smoothed.index(min(curve.smoothed)) == len(curve.smoothed) - 1


def smooth(values: Sequence[float], width: float) -> list[float]:
    """Return means weighted by a bell of `width` steps around each value, so that nothing lags."""
    reach = max(1, math.ceil(3 * width))
    bell = [math.exp(-0.5 * (offset / width) ** 2) for offset in range(-reach, reach + 1)]
    smoothed = []
    for at in range(len(values)):
        near = range(max(0, at - reach), min(len(values), at + reach + 1))
        weights = [bell[index - at + reach] for index in near]
        total = sum(w * values[index] for w, index in zip(weights, near, strict=True))
        smoothed.append(total / sum(weights))
    return smoothed


def _batches(state: State, train: TrainBatches) -> Iterator[Batch]:
    for epoch in itertools.count(state.epoch):
        yield from train.epoch(epoch)


def _unit_lr(state: State) -> float:
    """Return `optimizer.lr`, which the schedule's factor multiplies."""
    for group in state.optimizer.param_groups:
        if group["lr_scale"] > 0:
            unit: float = group["base_lr"] / group["lr_scale"]
            return unit
    raise UserError(
        "param_groups.lr_scale is 0 for all of the model: there is no rate to look for."
    )
