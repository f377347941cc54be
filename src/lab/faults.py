"""Batches that cannot be split, and steps without memory or without a finite loss or gradient."""

from __future__ import annotations

import logging
import math

import torch

from lab import optim
from lab.plan import LoopPlan, StepPlan
from lab.state import TrainState
from regrow.errors import SlicesTooLarge, UserError
from regrow.numerics.totals import Totals
from regrow.protocols import Batch, Task

log = logging.getLogger(__name__)


def refuse_endless_skipping(state: TrainState, totals: Totals, plan: LoopPlan) -> None:
    """Raise FloatingPointError after too many steps in a row with a non-finite loss or gradient."""
    in_a_row = int(state.skips[1].item())
    # fp16 lowers its loss scale after each overflow: allow for that search.
    allowed = plan.options.max_skipped_steps + (16 if state.loss_scale is not None else 0)
    if in_a_row >= allowed:
        loss, where = float(totals.loss), optim.first_non_finite(state.model)
        # A checkpoint of the last finite step may already hold the bad weights: do not count it.
        good = plan.checkpoints.newest_until(state.step - in_a_row - 1)
        advice = "Lower optimizer.lr or set trainer.clip_norm"
        if not plan.options.detect_anomaly:
            advice = (
                "Lower optimizer.lr, set trainer.clip_norm, or find the cause with debug=anomaly"
            )
        elif not math.isfinite(loss):  # autograd raises at a NaN of its own
            advice = "The backward pass gave no NaN, so look at what the forward pass computes"
        raise FloatingPointError(
            f"step {state.step}: no finite loss or gradient"
            + (f" for {in_a_row} steps in a row" if in_a_row > 1 else "")
            + ("" if math.isfinite(loss) else f"; the loss itself is {loss}")
            + (f"; the first bad parameter is {where}" if where else "")
            + (f"; the last good checkpoint is {good}" if good else "")
            + (
                ". No step was finite: check the data and the loss"
                if in_a_row == state.step
                else ""
            )
            + f". {advice}."
        )


def refuse_split(task: Task, parts: int) -> None:
    """Raise UserError for a loss that is not a sum, if each part of a batch would have its own."""
    if parts > 1 and not task.sums_over_examples:
        raise UserError(
            f"trainer.devices, trainer.accumulation_steps: a step's batch is split into {parts} "
            "parts, and this loss is not a sum over examples. Use 1 for both, or, with several "
            "processes, a step that gathers the rows: see docs/recipes/your_step.md."
        )


def make_room(state: TrainState, batch: Batch, plan: StepPlan) -> None:
    """Undo what a step that ran out of memory has changed, and make the next try need less.

    Frees the graphs of captured steps, or else doubles the number of micro-batches, for this step
    and all later ones. Raises SlicesTooLarge with several ranks, and UserError if the batch cannot
    be split further.
    """
    plan.buffers.restore()
    if plan.capture.release():
        return
    slices = state.num_micro_batches
    parts = f"{slices} micro-batch{'es' if slices > 1 else ''}"
    where = f"step {state.step + 1}: out of memory with {batch.num_local} examples in {parts}"
    if not plan.task.sums_over_examples:
        raise UserError(f"{where}, and this loss cannot be split. Use a smaller data.batch_size.")
    if slices >= batch.num_local:
        raise UserError(
            f"{where}: nothing is left to halve. Use a smaller model or input, "
            "trainer.precision=bf16, or a device with more memory."
        )
    if plan.world.size > 1:  # other ranks may be past this point: all must restart
        raise SlicesTooLarge(where, 2 * slices)
    state.progress.num_micro_batches = 2 * slices
    for parameter in plan.parameters:
        parameter.grad = None
    if plan.world.device.type == "cuda":
        torch.cuda.empty_cache()
    log.warning("%s: continuing in %d", where, 2 * slices)
