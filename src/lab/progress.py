"""The console output of a run: bars, a line per epoch, running means, time and memory."""

from __future__ import annotations

import logging
import math
import resource
import sys
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lab import optim
from lab.plan import LoopPlan, StepResult
from lab.schedules import Stateful
from lab.several import by_name
from lab.state import TrainState
from regrow.distributed.sharding import whole
from regrow.numerics.totals import EXAMPLES, Totals
from regrow.protocols import EvalBatches

log = logging.getLogger(__name__)


class Quiet:
    """A bar that shows nothing.

    Even a disabled tqdm bar would start a thread and create a lock in every process that imports
    this module, including the one from which a sweep's jobs are forked.
    """

    disable = True

    def __enter__(self) -> Quiet:
        return self

    def __exit__(self, *_: object) -> None: ...
    def update(self, count: int) -> None: ...


QUIET = Quiet()


def clock(state: TrainState, device: torch.device) -> dict[str, float]:
    """Return the values that depend on the clock and the machine."""
    seconds = state.progress.seconds
    values = {"time/seconds": seconds, "time/memory_mb": memory_mb()}
    if seconds > 0:
        values["time/steps_per_second"] = state.step / seconds
    if device.type == "cuda":
        values["time/gpu_memory_mb"] = torch.cuda.max_memory_allocated(device) / 2**20
    return values


def memory_mb() -> float:
    """Return this process's peak memory in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def histograms(model: nn.Module) -> dict[str, Tensor]:
    parameters = [*model.named_parameters()]
    weights = {f"weights/{n}": whole(p).detach() for n, p in parameters}
    gradients = {f"gradients/{n}": whole(p.grad) for n, p in parameters if p.grad is not None}
    return {**weights, **gradients}


def progress_bar(state: TrainState, plan: LoopPlan) -> Any:
    """Return a progress bar for the epoch, quiet if stderr is not a terminal."""
    if not (plan.options.progress_bar and plan.world.is_main and sys.stderr.isatty()):
        return QUIET
    return tqdm(
        total=state.steps_per_epoch,
        initial=state.step_in_epoch,
        desc=f"epoch {state.epoch + 1}",
        unit="step",
        leave=False,
    )


def evaluation_bar(name: str | None, batches: EvalBatches) -> Any:
    """Return a progress bar for an evaluation, quiet without a name or a terminal at stderr."""
    if name is None or not sys.stderr.isatty():
        return QUIET
    return tqdm(total=len(batches), desc=name, unit="batch", leave=False)


def running_score(result: StepResult, plan: LoopPlan) -> str | None:
    """Return the name of the score that the training logs; None if the step computes none."""
    return plan.task.running_name if result.totals.scored else None


def advance(bar: Any, totals: Totals, score_name: str | None) -> None:
    """Advance a bar by one and show the means of `totals`.

    Reads the totals only when the bar redraws (at most ten times a second), because reading
    synchronises with the device.
    """
    if not bar.update(1):  # True only when tqdm redrew
        return
    values: dict[str, Any] = dict(totals.means(score_name))
    if rate := bar.format_dict["rate"]:
        values["examples/s"] = f"{rate * float(totals.values[EXAMPLES]) / bar.n:,.0f}"
    bar.set_postfix(values)


def announce(state: TrainState, plan: LoopPlan, best_before: float | None) -> None:
    """Log one line for an epoch or evaluation; `best_before` is the best value before it.

    "epoch 2" means the end of the second epoch. "in epoch 3" means within the third, whose training
    means are not known yet.
    """
    progress = state.progress
    ends_epoch = state.step_in_epoch == 0
    values = {**progress.train_means} if ends_epoch else {}
    if progress.evaluated_step == state.step:
        values |= progress.latest
    parts = ("train/epoch_", *(f"{name}/" for name in plan.sets))
    names = [f"{part}{it}" for part in parts for it in ("loss", "accuracy")]
    names += [plan.options.monitor or ""]
    shown = [f"{name} {values[name]:.4g}" for name in dict.fromkeys(names) if name in values]
    best = ""
    # take_in moves best_step to the latest of tied values, so best_step alone shows no improvement.
    if progress.best_step == state.step:
        is_tie = progress.best_value == best_before
        best = " (equals the best and replaces it)" if is_tie else " (best)"
    epoch = f"epoch {state.epoch}" if ends_epoch else f"in epoch {state.epoch + 1}"
    log.info("%s, step %d: %s%s", epoch, state.step, ", ".join(shown), best)


def tell_of_another_rate(state: TrainState) -> None:
    """Log if the schedule now gives another learning rate for the last step, and set it.

    For example, if max_epochs was raised, the cosine is longer.
    """
    if state.step == 0 or any(
        isinstance(each, Stateful) for each in by_name(state.schedule).values()
    ):
        return
    for name, optimizer in by_name(state.optimizer).items():
        parts = getattr(optimizer, "parts", [optimizer])
        if not any(part.state for part in parts):  # a new optimizer has no earlier rate
            continue
        before = optim.rates(optimizer)["lr"]
        optim.set_lr(optimizer, by_name(state.schedule)[name](state.step - 1))
        now = optim.rates(optimizer)["lr"]
        if not math.isclose(before, now):
            log.info(
                "the learning rate of %s %d was %.3g and would now be %.3g: the schedule follows "
                "the changed settings",
                *(f"{name}'s step" if name else "step", state.step, before, now),
            )
