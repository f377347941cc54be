"""One update of the weights from one global batch, in micro-batches."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lab import optim
from lab.faults import halve_slices
from lab.plan import StepPlan
from lab.state import TrainState, average_weight, count, update_average
from regrow.distributed import sharding
from regrow.distributed.parallel import synchronises
from regrow.numerics.calls import call, is_out_of_memory, say_if_out_of_memory
from regrow.numerics.precision import at_least_float32, autocast
from regrow.numerics.sums import (
    LOSS,
    WEIGHT,
    Skipped,
    Sums,
    constant,
    slice_sums,
)
from regrow.protocols import Batch
from regrow.randomness import key


class Slice(NamedTuple):
    sums: Sums
    weighted: bool  # True if the weights are not all one
    components: tuple[str, ...]


class StepResult(NamedTuple):
    sums: Sums  # over all micro-batches and processes
    components: tuple[str, ...]
    grad_norm: Tensor | float  # () of the unscaled gradients, over all processes, before clipping
    skipped: Skipped  # True for empty steps too


def train_step(state: TrainState, batch: Batch, plan: StepPlan) -> StepResult:
    """Update the weights from one global batch, in as many micro-batches as memory requires."""
    plan.buffers.remember()
    optim.set_lr(state.optimizer, state.schedule(state.step))
    while (parts := gradients(state, batch, plan)) is None:
        if not plan.capture.release():
            halve_slices(state, batch, plan)
        plan.buffers.restore(True)
    sums = plan.exchange.wait()
    step = state.step if state.averaged is None else plan.capture.number(state.step)
    return plan.capture.run(lambda given: update(state, batch, parts, *given, plan), (sums, step))


def update(
    state: TrainState,
    batch: Batch,
    parts: list[Slice],
    sums: Sums,
    step: int | Tensor,
    plan: StepPlan,
) -> StepResult:
    """Update everything from the gradients of `parts` and their `sums`, unless the step is bad."""
    # The micro-batches accumulated the gradient of the summed loss, divided by the number of
    # examples. Where the divisor must be the sum of the weights, or fp16 scaled the loss, one
    # factor corrects it.
    factor: float | Tensor = 1.0
    empty: Skipped = False
    if any(part.weighted for part in parts):
        weight = sums[WEIGHT]
        empty = weight.eq(0).float() if isinstance(weight, Tensor) else weight == 0
        # A float division by zero would raise. NaN makes the norm non-finite, so the step is
        # skipped.
        factor = batch.num_global / weight if isinstance(weight, Tensor) or weight else math.nan
    if state.loss_scale is not None:
        factor = factor / state.loss_scale.value
    found = sharding.local([p.grad for p in plan.parameters if p.grad is not None])
    norm = plan.world.norm(found)
    try:
        skipped = optim.update(
            state.optimizer, found, norm, factor=factor, clipping=plan.clipping, valid=sums[LOSS]
        )
    except RuntimeError as error:
        say_if_out_of_memory(
            error,
            f"the update of step {state.step + 1}",
            "Use an optimizer with less state, a smaller model, trainer=fsdp or a larger device.",
        )
        raise
    plan.buffers.restore(skipped)
    if state.loss_scale is not None:
        state.loss_scale.update(skipped, empty)
    if state.averaged is not None:
        weight = average_weight(state, plan.options, step)
        update_average(state.averaged, state.model, weight, skipped)
    count(state, sums, skipped, empty)
    no_factor = isinstance(factor, float) and factor == 1.0  # saves one operation
    true_norm = norm if no_factor else norm * factor
    if isinstance(empty, Tensor):
        true_norm = torch.where(empty.bool(), 0.0, torch.as_tensor(true_norm, device=empty.device))
    elif empty:
        true_norm = 0.0
    return StepResult(sums, parts[0].components, true_norm, skipped)


def gradients(state: TrainState, batch: Batch, plan: StepPlan) -> list[Slice] | None:
    """Run forward and backward over all micro-batches. Returns None if memory did not suffice."""
    plan.exchange.begin()
    for parameter in plan.parameters:
        parameter.grad = None
    slices = batch.split(state.num_micro_batches)
    plan.capture.begin(slices, state.epoch)
    parts: list[Slice] = []
    together = plan.world.size > 1

    def accumulate(micro_batch: Batch) -> Slice:
        losses, part = forward(micro_batch, plan)
        if is_last and together:  # overlaps with the backward pass
            plan.exchange.send([each.sums for each in (*parts, part)], losses.dtype)
        backward(losses, state, micro_batch, plan)
        return part

    try:
        for index, micro_batch in enumerate(slices):
            is_last = index == len(slices) - 1
            # Dropout must depend on the step, not on earlier draws. The loss may draw as well:
            # torch, numpy and `random` all start from this key.
            seed = key(plan.seed, "model", state.step, index, plan.world.rank)
            with synchronises(plan.forward, is_last):
                parts.append(plan.capture.run(accumulate, micro_batch, seed))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return None  # frees the traceback and the tensors that it holds
    if not together:  # a CUDA graph would not repeat it
        plan.exchange.send([part.sums for part in parts], torch.float32)
    return parts


def forward(batch: Batch, plan: StepPlan) -> tuple[Tensor, Slice]:
    """Return a micro-batch's weighted losses, to be differentiated, and its part of the sums."""
    with autocast(plan.world.device, plan.options.precision):
        outputs = call(plan.forward, batch.inputs)
        loss = plan.task.loss(outputs, batch.targets, batch.weights)
    values, weights = at_least_float32(loss.values), loss.weights
    losses = values if weights is None else values * weights
    score = plan.task.running(outputs, batch.targets) if batch.num_local else None
    parts: list[Tensor | float] = [
        losses.detach().sum(),
        0.0 if score is None else score.detach().sum(dtype=losses.dtype),
        batch.num_local if weights is None else weights.detach().sum(dtype=losses.dtype),
        batch.num_local,
    ]
    for part in loss.components.values():
        part = part.detach() if weights is None else (part * weights).detach()
        parts.append(part.sum(dtype=losses.dtype))
    sums = slice_sums(parts, like=losses)
    return losses, Slice(sums, weights is not None, tuple(loss.components))


def backward(losses: Tensor, state: TrainState, batch: Batch, plan: StepPlan) -> None:
    """Accumulate the gradients of a micro-batch's summed losses."""
    share = 1.0 / batch.num_global
    if state.loss_scale is None:
        factor = constant(share, losses.dtype, losses.device)
    else:
        factor = (share * state.loss_scale.value).to(losses.dtype)
    torch.autograd.backward(losses, factor.expand_as(losses))
