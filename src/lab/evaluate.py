"""Exact loss and metrics over a split."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from lab import optim
from lab.plan import LoopPlan
from lab.progress import advance, evaluation_bar
from lab.state import TrainState
from regrow.distributed import sharding
from regrow.distributed.parallel import World, stopping_together
from regrow.numerics.calls import call, is_out_of_memory, say_if_out_of_memory
from regrow.numerics.precision import autocast
from regrow.numerics.totals import (
    COUNTED,
    EXAMPLES,
    LOSS,
    SCORE,
    WEIGHT,
    Totals,
    ratio,
    sum_dtype,
    weighted,
)
from regrow.processes.interrupt import StopRequest
from regrow.protocols import Batch, Config, EvalBatches, ShowsExamples, Task
from regrow.randomness import Draws, states_kept
from regrow.record import pictures


def evaluate(
    state: TrainState, batches: EvalBatches, plan: LoopPlan, *, name: str
) -> tuple[dict[str, float], Mapping[str, Config]]:
    """Evaluate the weights to be kept (the average if there is one) on the set `name`.

    Returns the values as `name/key`, and the details. Raises Interrupted if a stop is requested
    meanwhile. Leaves the training state unchanged, except that every process takes over the main
    process's buffers of the evaluated model, such as BatchNorm's statistics.
    """
    draws = Draws(plan.step.seed, name, state.step, plan.world.rank)
    bar = name if plan.options.progress_bar and plan.world.is_main else None
    what = (state.evaluated, plan.task, batches, plan.world, plan.options.precision, draws)
    with optim.evaluating(state.optimizer, state.model), states_kept():
        while True:  # a second time if captured steps held the memory
            try:
                values, details = measure_split(*what, stop=plan.stop, bar=bar, shows=False)
                break
            except RuntimeError as error:
                if not (is_out_of_memory(error) and plan.step.capture.release()):
                    way_out = "Use a smaller data.eval_batch_size."
                    say_if_out_of_memory(error, "an evaluation", way_out)
                    raise
            finally:
                state.model.train()
    return {f"{name}/{key}": value for key, value in values.items()}, details


def measure_split(
    model: nn.Module,
    task: Task,
    batches: EvalBatches,
    world: World,
    precision: str,
    draws: Draws,
    *,
    stop: StopRequest,
    bar: str | None,
    shows: bool = True,
) -> tuple[dict[str, float], Mapping[str, Config]]:
    """Evaluate a split together with the other processes, each on its share.

    Returns the result over all of them: see `measure`. Shows a progress bar named `bar`. Raises
    Interrupted, in all processes, if a stop is requested meanwhile.
    """
    world.copy_buffers(model)
    waited = stopping_together(batches, len(batches), stop, world)
    shown = evaluation_bar(bar, batches)
    measured = measure(model, task, waited, world, precision, shown, draws, shows)
    sharding.free(model)
    return measured


@torch.no_grad()
def measure(
    model: nn.Module,
    task: Task,
    batches: Iterable[Batch],
    world: World,
    precision: str,
    bar: Any,
    draws: Draws,
    shows: bool = True,
) -> tuple[dict[str, float], Mapping[str, Config]]:
    """Return the exact loss and metrics over all `batches`, and details for plots.

    Accumulates sums over every example and process and divides once; no example is padded,
    repeated or dropped. Leaves the model in evaluation mode and advances `bar`. `draws` reseeds the
    global generators for each batch; wrap in `states_kept()` to preserve them. Without `shows`, the
    details hold no examples.
    """
    sums = torch.zeros(COUNTED, dtype=sum_dtype(world.device), device=world.device)
    metrics = task.metrics(world.device)
    examples: Mapping[str, Config] = {}
    model.eval()
    with bar:
        for number, batch in enumerate(batches):
            draws.begin(number)
            with autocast(world.device, precision):
                outputs = call(model, batch.inputs)
                loss = task.loss(outputs, batch.targets, batch.weights)
            losses, weights = weighted(loss.values, loss.weights), loss.weights
            sums[LOSS] += losses.sum()
            sums[WEIGHT] += losses.numel() if weights is None else weights.sum()
            metrics.update(outputs, batch.targets, batch.weights)
            if shows and pictures.has_room(examples) and isinstance(task, ShowsExamples):
                examples = pictures.joined(examples, task.examples(batch, outputs), number)
            if not bar.disable:  # only the progress bar shows these two
                score = task.running(outputs, batch.targets)
                sums[SCORE] += 0 if score is None else score.sum(dtype=sums.dtype)
                sums[EXAMPLES] += batch.num_local
            advance(bar, Totals(sums), task.running_name)
    draws.look()  # did the last batch draw? `begin` checks the others
    summed = world.sum_(sums).tolist()
    details = {**metrics.details(), **examples}
    return {"loss": ratio(summed[LOSS], summed[WEIGHT]), **metrics.scalars()}, details
