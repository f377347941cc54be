"""One update of the weights from one global batch, in micro-batches.

Read from the top: `train_step` is the whole update, and each function below is one part of it. The
micro-batches accumulate the gradient of the summed loss, over all processes, divided by the number
of examples. `update` multiplies it by one factor, which makes it the gradient of the weighted mean.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lab.faults import make_room, refuse_split
from lab.plan import StepPlan, StepResult
from lab.state import TrainState
from regrow.numerics.calls import call, is_out_of_memory
from regrow.numerics.totals import Totals, weighted
from regrow.phases import phase
from regrow.protocols import Batch

# Returns a micro-batch's weighted losses, to be differentiated, and its totals.
Forward = Callable[[Batch, StepPlan], tuple[Tensor, Totals]]


def train_step(state: TrainState, batch: Batch, plan: StepPlan) -> StepResult:
    """Update the weights from one global batch, in as many micro-batches as memory requires."""
    plan.buffers.remember()
    plan.exchange.begin()
    state.set_rates()
    while not accumulate(state, batch, plan, forward):
        make_room(state, batch, plan)
    # `capture` runs a piece of the step as it is, or replays it as a CUDA graph. So anything that
    # differs from step to step must be an argument of the piece.
    step = state.step if state.averaged is None else plan.capture.number(state.step)
    given = (plan.exchange.wait(), step)
    return plan.capture.run(lambda given: update(state, batch.num_global, *given, plan), given)


def accumulate(state: TrainState, batch: Batch, plan: StepPlan, forward: Forward) -> bool:
    """Run forward and backward over all micro-batches. Returns False if memory did not suffice."""
    for parameter in plan.parameters:
        parameter.grad = None
    micro_batches = batch.split(state.num_micro_batches)
    plan.capture.begin(micro_batches, state.epoch)
    parts: list[Totals] = []
    together = plan.world.size > 1

    def forward_and_backward(micro_batch: Batch) -> Totals:
        with phase("forward"):  # for debug=profile
            losses, part = forward(micro_batch, plan)
        if is_last and together:  # the exchange overlaps with the backward pass
            plan.exchange.send([*parts, part], plan.name)
        with phase("backward"):
            backward(losses, state, micro_batch)
        return part

    try:
        for index, micro_batch in enumerate(micro_batches):
            is_last = index == len(micro_batches) - 1
            # Draws of dropout and losses must depend on the step, not on earlier draws.
            seed = plan.seed_of(state.step, index)
            with plan.synchronises(is_last):
                parts.append(plan.capture.run(forward_and_backward, micro_batch, seed))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return False  # frees the traceback and the tensors that it holds
    if plan.untrained.left:
        plan.untrained.look()
    if not together:  # a CUDA graph would not repeat it
        plan.exchange.send(parts, plan.name)
    return True


def forward(batch: Batch, plan: StepPlan) -> tuple[Tensor, Totals]:
    """Return a micro-batch's weighted losses, to be differentiated, and its totals."""
    refuse_split(plan.task, plan.world.size)
    with plan.autocast():
        outputs = call(plan.forward, batch.inputs)
        loss = plan.task.loss(outputs, batch.targets, batch.weights)
    losses = weighted(loss.values, loss.weights)  # (B,), or (B, …) for tokens or pixels
    score = plan.task.running(outputs, batch.targets) if batch.num_local else None
    return losses, Totals.of(losses.detach(), loss.weights, loss.components, score, batch.num_local)


def backward(losses: Tensor, state: TrainState, batch: Batch) -> None:
    """Accumulate the gradients of a micro-batch's summed losses."""
    share = state.scaled(1.0 / batch.num_global, like=losses)
    torch.autograd.backward(losses, share.expand_as(losses))


def update(
    state: TrainState, num_examples: int, totals: Totals, step: int | Tensor, plan: StepPlan
) -> StepResult:
    """Update weights, average and counters from the gradients.

    If the loss or a gradient is not finite, or no example has weight, only the counters change:
    weights, moments, buffers and average stay as they were before the step.
    """
    with phase("optimizer"):
        result = update_weights(state, num_examples, totals, plan)
        plan.buffers.restore(result.skipped)
        state.finish_step(totals, result.skipped, step, plan.options)
    return result


def update_weights(
    state: TrainState, num_examples: int, totals: Totals, plan: StepPlan
) -> StepResult:
    """Update the weights, and the moments of the optimizer, unless the update is not finite."""
    with phase("optimizer"):
        gradients = plan.gradients()
        norm = plan.world.norm(gradients)
        factor = state.unscaled(totals.factor(num_examples))
        skipped = state.update(plan.name, gradients, norm, factor, totals, plan.clipping)
    return StepResult(totals, skipped.norm(norm, factor), skipped)
