"""The training loop: every event of a run, by name, in order.

To change what a run does, change these functions. `TrainState` holds what changes during a run,
`Plan` what stays the same; the loop reads nothing else.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from regrow.checkpoint.writer import Facts
from regrow.distributed import sharding
from regrow.distributed.parallel import World, stopping_together, synchronises
from regrow.errors import SlicesTooLarge, UserError
from regrow.numerics.buffers import Buffers
from regrow.numerics.precision import autocast
from regrow.numerics.sums import (
    COUNTED,
    EXAMPLES,
    LOSS,
    SCORE,
    WEIGHT,
    Skipped,
    Sums,
    added,
    constant,
    epoch_sums,
    ratio,
    read,
    slice_sums,
    sum_dtype,
)
from regrow.processes.interrupt import Interrupted
from regrow.protocols import Batch, EvalBatches, Task
from regrow.randomness import Draws, key, seed_step, states_kept
from regrow.training import optim
from regrow.training.options import TrainerOptions
from regrow.training.plan import Plan
from regrow.training.schedules import Plateau, improves
from regrow.training.show import (
    advance,
    announce,
    clock,
    evaluation_bar,
    histograms,
    progress_bar,
    running,
)
from regrow.training.state import TrainState, average_weight, update_average

log = logging.getLogger(__name__)


class Slice(NamedTuple):
    sums: Sums
    weighted: bool  # True if the weights are not all one
    components: tuple[str, ...]


class StepResult(NamedTuple):
    sums: Sums  # over all micro-batches and processes
    components: tuple[str, ...]
    grad_norm: Tensor | float  # () of the unscaled gradients, over all processes, before clipping
    skipped: Skipped  # True for empty steps too


def fit(state: TrainState, plan: Plan) -> str:
    """Train from `state` to the end. Returns "completed" or "interrupted".

    Raises OSError if the run finished but its last checkpoint could not be written.
    """
    together = plan.world.size > 1  # then no rank may stop alone: see Exchange
    try:
        state.model.train()
        plan.exchange.start_clock()
        over = state.step > 0 and settle(state, plan)
        while not over:
            with progress_bar(state, plan) as bar:
                batches = plan.train.epoch(state.epoch, start=state.step_in_epoch)
                for batch in batches if together else plan.stop.while_waiting(batches):
                    result = train_step(state, batch, plan)
                    state.progress.step += 1
                    state.progress.seconds += plan.exchange.seconds
                    advance(bar, state.sums, plan.task.running_name)
                    report(state, result, plan)
                    if result.skipped is not True:  # the optimizer then has a state
                        plan.checkpoints.make_room(state.state_dict)
                    plan.checkpoints.poll()
                    if over := settle(state, plan):
                        break
    except Interrupted:
        save(state, plan)
    saved = plan.checkpoints.wait()
    if not finished(state, plan):
        return "interrupted"
    if not saved:
        raise OSError(f"the weights of step {state.step}, the last, could not be saved")
    plan.world.barrier()  # from here on every rank may read the checkpoint
    return "completed"


def train_step(state: TrainState, batch: Batch, plan: Plan) -> StepResult:
    """Update the weights from one global batch, in as many micro-batches as memory requires."""
    plan.buffers.remember()
    optim.set_lr(state.optimizer, state.schedule(state.step))
    while (parts := gradients(state, batch, plan)) is None:
        halve_slices(state, batch, plan)
        plan.buffers.restore(True)
    sums = plan.exchange.wait()

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
        weight = average_weight(state, plan.options)
        update_average(state.averaged, state.model, weight, skipped)
    count(state, sums, skipped, empty)
    no_factor = isinstance(factor, float) and factor == 1.0  # saves one operation
    true_norm = norm if no_factor else norm * factor
    if isinstance(empty, Tensor):
        true_norm = torch.where(empty.bool(), 0.0, torch.as_tensor(true_norm, device=empty.device))
    elif empty:
        true_norm = 0.0
    return StepResult(sums, parts[0].components, true_norm, skipped)


def gradients(state: TrainState, batch: Batch, plan: Plan) -> list[Slice] | None:
    """Run forward and backward over all micro-batches. Returns None if memory did not suffice."""
    for parameter in plan.parameters:
        parameter.grad = None
    slices = batch.split(plan.options.accumulation_steps << state.progress.halvings)
    parts: list[Slice] = []
    try:
        for index, micro_batch in enumerate(slices):
            is_last = index == len(slices) - 1
            # Dropout must depend on the step, not on earlier draws. The loss may draw as well:
            # torch, numpy and `random` all start from this key.
            seed_step(key(plan.seed, "model", state.step, index, plan.world.rank))
            with synchronises(plan.forward, is_last):
                losses, part = forward(micro_batch, plan)
                parts.append(part)
                if is_last:  # overlaps with the backward pass
                    plan.exchange.send([part.sums for part in parts], losses.dtype)
                backward(losses, state, micro_batch, plan)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return None  # frees the traceback and the tensors that it holds
    return parts


def forward(batch: Batch, plan: Plan) -> tuple[Tensor, Slice]:
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


def backward(losses: Tensor, state: TrainState, batch: Batch, plan: Plan) -> None:
    """Accumulate the gradients of a micro-batch's summed losses."""
    share = 1.0 / batch.num_global
    if state.loss_scale is None:
        factor = constant(share, losses.dtype, losses.device)
    else:
        factor = (share * state.loss_scale.value).to(losses.dtype)
    torch.autograd.backward(losses, factor.expand_as(losses))


def report(state: TrainState, result: StepResult, plan: Plan) -> None:
    """Log what is due after a step: metrics of the step and of the epoch, and histograms."""
    options, progress, step = plan.options, state.progress, state.step
    if due(step, options.log_every_steps):
        loss, score, weight, examples, *components = read(result.sums)
        line = {"train/loss": ratio(loss, weight)}
        if plan.task.running_name:
            line[f"train/{plan.task.running_name}"] = ratio(score, examples)
        for name, part in zip(result.components, components, strict=True):
            line[f"train/loss_{name}"] = ratio(part, weight)
        line["train/grad_norm"] = float(result.grad_norm)
        line |= {f"train/{name}": lr for name, lr in optim.rates(state.optimizer).items()}
        if state.loss_scale is not None:
            line["train/loss_scale"] = state.loss_scale.value.item()
        if skipped := int(state.skips[0].item()):
            line["train/skipped_steps"] = skipped
        if empty := int(state.empty_steps.item()):
            line["train/empty_steps"] = empty
        plan.record.log(step, state.epoch, {**line, **clock(state, plan.world.device)})
    # A tensor `skipped` is only known to the device, which is read here no more often than for the
    # log.
    if due(step, options.log_every_steps) or result.skipped is True:
        refuse_endless_skipping(state, result, plan)
    if due(step, options.log_histograms_every_steps):
        plan.record.log_histograms(step, histograms(state.model))
    if state.step_in_epoch == 0:
        tell_of_empty_epoch(state, plan)
        progress.train_means = running(state.sums, plan.task.running_name, prefix="train/epoch_")
        plan.record.log(step, state.epoch, progress.train_means)
        state.sums = epoch_sums(plan.world.device)


def settle(state: TrainState, plan: Plan) -> bool:
    """Evaluate and save if due after this step. Returns True if the run is over.

    What is due depends on the step alone, so a run interrupted between evaluation and checkpoint
    resumes with the missing one. A run's end is evaluated wherever it falls; if the limit is raised
    later, that evaluation stays in the record.
    """
    options, progress = plan.options, state.progress
    ends_epoch = state.step_in_epoch == 0
    val = plan.val
    evaluates = val is not None and (
        due(state.step, options.eval_every_steps)
        or (ends_epoch and due(state.epoch, options.eval_every_epochs))
        or finished(state, plan)
    )
    if val is not None and evaluates and progress.evaluated_step != state.step:
        with plan.exchange.clock_stopped():
            values, _ = evaluate(state, val, plan, name="val")
        plan.record.log(state.step, state.epoch, {**values, **clock(state, plan.world.device)})
        take_in(values, state, options)
        progress.evaluated_step, progress.latest = state.step, values
        tell_of_early_stop(values, state, plan)
        progress.pruned = pruned(state, plan)
    is_saved = plan.checkpoints.saved == (state.step, progress.evaluated_step == state.step)
    if (ends_epoch or evaluates) and not is_saved:  # already announced when this step was saved
        announce(state, plan)
    over = finished(state, plan)
    stops = plan.exchange.stops
    saves = (
        due(state.step, options.checkpoint.save_every_steps)
        or (ends_epoch and due(state.epoch, options.checkpoint.save_every_epochs))
        or (ends_epoch and due(state.epoch, options.checkpoint.milestones_every_epochs))
        or progress.best_step == state.step
    )
    # Do not save during a streak of skipped steps: rotation would then keep only those checkpoints.
    saves = saves and not state.skips[1].item()
    if saves or over or stops:
        save(state, plan)
    return over or stops


def evaluate(
    state: TrainState, batches: EvalBatches, plan: Plan, *, name: str
) -> tuple[dict[str, float], dict[str, Any]]:
    """Return `measure`'s values for the evaluated weights, under `name/…`, and its details.

    Leaves the training state unchanged. Raises Interrupted if a stop is requested meanwhile.
    """
    draws = Draws(plan.seed, name, state.step, plan.world.rank)
    with optim.evaluating(state.optimizer, state.model), states_kept():
        plan.world.copy_buffers(state.evaluated)
        waited = stopping_together(batches, len(batches), plan.stop, plan.world)
        bar = evaluation_bar(name, batches, plan.options.progress_bar and plan.world.is_main)
        precision = plan.options.precision
        try:
            values, details = measure(
                state.evaluated, plan.task, waited, plan.world, precision, bar, draws
            )
        except RuntimeError as error:
            say_if_out_of_memory(error, "an evaluation", "Use a smaller data.eval_batch_size.")
            raise
        sharding.free(state.evaluated)
    state.model.train()
    return {f"{name}/{key}": value for key, value in values.items()}, details


@torch.no_grad()
def measure(
    model: nn.Module,
    task: Task,
    batches: Iterable[Batch],
    world: World,
    precision: str,
    bar: Any,
    draws: Draws,
) -> tuple[dict[str, float], dict[str, Any]]:
    """Return the exact loss and metrics over all `batches`, and details for plots.

    Accumulates sums over every example and process and divides once, without padding or dropping.
    Leaves the model in evaluation mode and advances `bar`. `draws` seeds each batch, which changes
    the random generators: see `states_kept`.
    """
    sums = torch.zeros(COUNTED, dtype=sum_dtype(world.device), device=world.device)
    metrics = task.metrics(world.device)
    model.eval()
    with bar:
        for number, batch in enumerate(batches):
            draws.begin(number)
            with autocast(world.device, precision):
                outputs = call(model, batch.inputs)
                loss = task.loss(outputs, batch.targets, batch.weights)
            values, weights = at_least_float32(loss.values), loss.weights
            if weights is None:
                sums[LOSS] += values.sum()
                sums[WEIGHT] += values.numel()
            else:
                sums[LOSS] += (values * weights).sum()
                sums[WEIGHT] += weights.sum()
            metrics.update(outputs, batch.targets, batch.weights)
            if not bar.disable:  # only for the progress bar
                score = task.running(outputs, batch.targets)
                sums[SCORE] += 0 if score is None else score.sum(dtype=sums.dtype)
                sums[EXAMPLES] += batch.num_local
            advance(bar, sums, task.running_name)
    draws.look()
    loss_sum, _, weight, _ = world.sum_(sums).tolist()
    return {"loss": ratio(loss_sum, weight), **metrics.scalars()}, metrics.details()


def save(state: TrainState, plan: Plan) -> None:
    """Save a checkpoint of this step in the background, unless it is saved already."""
    evaluated = state.progress.evaluated_step == state.step
    if plan.checkpoints.saved == (state.step, evaluated) or not plan.checkpoints.writes:
        return
    every = plan.options.checkpoint.milestones_every_epochs
    facts = Facts(
        step=state.step,
        epoch=state.epoch,
        value=state.progress.latest.get(plan.options.monitor or "") if evaluated else None,
        milestone=state.step_in_epoch == 0 and due(state.epoch, every),
        metrics_bytes=plan.record.position(),
    )
    plan.checkpoints.save(state.state_dict(), facts, plan.record.sync)
    plan.checkpoints.saved = (state.step, evaluated)


def finished(state: TrainState, plan: Plan) -> bool:
    progress, limit = state.progress, plan.options.max_seconds
    return (
        stopped_early(state, plan.options)
        or progress.pruned
        or (plan.total_steps is not None and progress.step >= plan.total_steps)
        or (limit is not None and progress.seconds >= limit)
    )


def take_in(values: Mapping[str, float], state: TrainState, options: TrainerOptions) -> None:
    """Update the best checkpoint, the plateau schedule and early stopping from an evaluation."""
    progress, mode = state.progress, options.mode
    if options.monitor is None or mode is None:
        return
    value = values[options.monitor]
    # Ties go to the latest step: a small validation split soon reaches its highest accuracy, with
    # weights at half of their training. After skipped steps the weights are not newer, so ties are
    # ignored.
    equals = value == progress.best_value and not state.skips[1].item()
    if equals or improves(value, progress.best_value, mode=mode):
        progress.best_value, progress.best_step = value, state.step
        progress.best_values = dict(values)
    if isinstance(state.schedule, Plateau):
        state.schedule.update(value, mode)
    stopping = options.early_stopping
    if improves(value, progress.reference_value, mode=mode, min_delta=stopping.min_delta):
        progress.reference_value, progress.evaluations_without_improvement = value, 0
    else:
        progress.evaluations_without_improvement += 1


def tell_of_early_stop(values: Mapping[str, float], state: TrainState, plan: Plan) -> None:
    """Log that early stopping ends the run, and why."""
    monitor = plan.options.monitor
    if not plan.world.is_main or monitor is None or not stopped_early(state, plan.options):
        return
    if math.isnan(values[monitor]):
        log.warning(
            "step %d: early stopping ends the run: %s is NaN, which is not an improvement",
            *(state.step, monitor),
        )
    else:
        log.info(
            "step %d: early stopping ends the run: %s has not improved in %d evaluations "
            "(trainer.early_stopping.patience=%d)",
            *(state.step, monitor, state.progress.evaluations_without_improvement),
            plan.options.early_stopping.patience,
        )


def tell_of_empty_epoch(state: TrainState, plan: Plan) -> None:
    """Warn after an epoch in which every step had zero weight, so nothing was learnt."""
    was_bad = bool(state.skips[1].item())  # skipped steps have no sums either
    if plan.world.is_main and read(state.sums)[WEIGHT] == 0 and not was_bad:
        log.warning(
            "epoch %d: every step was empty, since all weights are zero. Check the targets, the "
            "examples' weights, loss.class_weights and loss.ignore_index.",
            state.epoch,
        )


def pruned(state: TrainState, plan: Plan) -> bool:
    """Report to the search, if the run is a trial. Returns True if the search ends the run here."""
    if plan.trial is None:
        return False
    ends = plan.world.is_main and plan.trial.is_over(state.step, state.progress.latest)
    return bool(plan.world.from_main("yes" if ends else ""))


def stopped_early(state: TrainState, options: TrainerOptions) -> bool:
    """Return True if early stopping's patience is exceeded. Not saved, so a resume may raise it."""
    patience = options.early_stopping.patience
    return patience is not None and state.progress.evaluations_without_improvement > patience


def check_first_batch(model: nn.Module, task: Task, batch: Batch, precision: str) -> None:
    """Run one batch through model and loss in evaluation mode, to fail before training starts."""
    buffers = Buffers(model)  # some models count calls in evaluation mode too
    model.eval()
    with autocast(batch.targets.device, precision):
        outputs = call(model, batch.inputs)  # task.check reads the last layer off the graph
        task.check(outputs, batch.targets)
        task.loss(outputs, batch.targets, batch.weights)
    buffers.restore(True)
    model.train()


@torch.no_grad()
def check_one_example(model: nn.Module, batch: Batch, precision: str) -> None:
    """Raise UserError if the model cannot train on a micro-batch of one example."""
    buffers = Buffers(model)
    batch = batch.split(max(1, batch.num_local))[0]
    try:
        with autocast(batch.targets.device, precision):
            call(model.train(), batch.inputs)
    except ValueError as error:  # BatchNorm cannot compute a variance
        raise UserError(
            "the smallest slice of a step is one example, and this model cannot train on one: "
            f"{str(error).splitlines()[0]}. Use data.drop_last=true, another data.batch_size, "
            "fewer trainer.accumulation_steps or a model without BatchNorm."
        ) from None
    finally:
        buffers.restore(True)


def refuse_endless_skipping(state: TrainState, result: StepResult, plan: Plan) -> None:
    """Raise FloatingPointError after too many steps in a row without a finite gradient."""
    in_a_row = int(state.skips[1].item())
    # fp16 finds its scale by overflowing: these halvings are a search, not a fault.
    allowed = plan.options.max_skipped_steps + (16 if state.loss_scale is not None else 0)
    if in_a_row >= allowed:
        loss, where = float(result.sums[LOSS]), optim.first_non_finite(state.model)
        # Only a checkpoint followed by a finite step is good; the last one led into the streak.
        good = plan.checkpoints.newest_until(state.step - in_a_row - 1)
        raise FloatingPointError(
            f"step {state.step}: no finite loss or gradient for {in_a_row} steps in a row"
            + ("" if math.isfinite(loss) else f"; the loss itself is {loss}")
            + (f"; the first bad parameter is {where}" if where else "")
            + (f"; the last good checkpoint is {good}" if good else "")
            + (". None was finite: look at the data and the loss" if in_a_row == state.step else "")
            + ". Lower optimizer.lr or set trainer.clip_norm, or look with debug=anomaly."
        )


def halve_slices(state: TrainState, batch: Batch, plan: Plan) -> None:
    """Retry the step, and run all later ones, in twice as many micro-batches."""
    slices = plan.options.accumulation_steps << state.progress.halvings
    where = (
        f"step {state.step + 1}: out of memory with {batch.num_local} examples in {slices} slices"
    )
    if not plan.task.sums_over_examples:
        raise UserError(f"{where}, and this loss cannot be cut. Use a smaller data.batch_size.")
    if slices >= batch.num_local:
        raise UserError(
            f"{where}: nothing is left to halve. Use a smaller model or input, "
            "trainer.precision=bf16, or a device with more memory."
        )
    if plan.world.size > 1:  # the other ranks are past this point: all must restart
        raise SlicesTooLarge(where, state.progress.halvings + 1)
    state.progress.halvings += 1
    for parameter in plan.parameters:
        parameter.grad = None
    if plan.world.device.type == "cuda":
        torch.cuda.empty_cache()
    log.warning("%s: continuing in %d", where, 2 * slices)


def say_if_out_of_memory(error: RuntimeError, what: str, way_out: str) -> None:
    """Raise UserError if `error` is out of memory and there is nothing to halve."""
    if is_out_of_memory(error):
        raise UserError(f"{what} ran out of memory. {way_out}") from error


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return True for CUDA's error or the CPU allocator's, which has no class of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


# Torch's words in errors on integers, or on integers mixed with floats.
NAMES_A_TYPE = r"\b(Long|Int|Short|Char|Byte|Bool|int|char|dtype|datatype)\b"


def call(model: nn.Module, inputs: Any) -> Any:
    """Return the outputs for inputs that are one tensor, or a tuple or mapping of arguments.

    Raises UserError for integers that the model's floats cannot be computed with.
    """
    try:
        if isinstance(inputs, Tensor):
            return model(inputs)
        return model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)
    except (RuntimeError, ValueError) as error:
        refuse_integers(error, inputs)
        raise


def refuse_integers(error: Exception, inputs: Any) -> None:
    """Raise UserError if a forward pass failed because its inputs are integers."""
    values = inputs.values() if isinstance(inputs, Mapping) else inputs
    tensors = [inputs] if isinstance(inputs, Tensor) else values
    integers = [t for t in tensors if not t.is_floating_point() and not t.is_complex()]
    reason = " ".join(str(error).split())[:200].rstrip(".")
    is_torchs = not isinstance(error, UserError)
    if integers and is_torchs and re.search(NAMES_A_TYPE, reason):
        kind = str(integers[0].dtype).removeprefix("torch.")
        raise UserError(
            f"model: it cannot compute with {kind} inputs ({reason}). For features set "
            "data.integers=float32, or let your data set give floats. A model of tokens starts "
            "with an embedding."
        ) from error


def count(state: TrainState, sums: Sums, skipped: Skipped, empty: Skipped = False) -> None:
    """Add a step to the epoch's sums, to the skipped steps or to the empty steps.

    An empty step, whose weights are all zero, is skipped as well, but is not a bad step: it neither
    starts nor ends a streak of bad steps.
    """
    if isinstance(skipped, Tensor) or isinstance(empty, Tensor):  # known only to the device
        assert isinstance(sums, Tensor)
        left_out = torch.as_tensor(skipped, dtype=torch.float32, device=sums.device)
        bad, streak = left_out, state.skips[1]
        if isinstance(empty, Tensor):
            bad = left_out * (1 - empty)
            state.empty_steps += empty
            streak = torch.where(empty.bool(), streak, (streak + 1) * bad)
        else:
            streak = (streak + 1) * bad
        state.sums = added(state.sums, torch.where(left_out.bool(), 0.0, sums))
        state.skips[0] += bad
        state.skips[1] = streak
        state.no_streak = False
    elif empty:
        state.empty_steps += 1
    elif skipped:
        state.skips += 1
        state.no_streak = False
    else:
        state.sums = added(state.sums, sums)
        if not state.no_streak:
            state.skips[1], state.no_streak = 0, True


def at_least_float32(values: Tensor) -> Tensor:
    """Return float32 values: half precision would lose digits in sums."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def due(count: int, every: int | None) -> bool:
    return every is not None and count > 0 and count % every == 0
