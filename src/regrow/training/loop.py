"""The loop: all that happens during training, by name, in the order in which it happens.

To change what a run does, change these functions. `TrainState` holds what changes during a run and
`Plan` what stays; nothing else is looked at, and nothing happens anywhere else.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from regrow.randomness import key, seed_step
from regrow.training import optim
from regrow.training.checkpoint import CheckpointWriter, Facts
from regrow.training.interrupt import Interrupted, StopRequest
from regrow.training.options import TrainerOptions
from regrow.training.parallel import World, synchronises
from regrow.training.precision import autocast
from regrow.training.schedules import Plateau, improves
from regrow.training.state import Buffers, TrainState, update_average

log = logging.getLogger(__name__)

HEADLINES = ("train/epoch_loss", "train/epoch_accuracy", "val/loss", "val/accuracy")


class Batch(Protocol):
    """This process's share of one optimizer step, on the device."""

    inputs: Any  # a tensor (B, …), or a tuple or mapping of them: the model's arguments
    targets: Tensor  # (B, …)
    weights: Tensor | None  # (B,) of the examples; None: all one
    num_local: int  # examples in it; an empty share is one example of weight zero
    num_global: int  # examples of the step, over all processes

    def split(self, slices: int) -> list[Any]: ...


class TrainBatches(Protocol):
    steps_per_epoch: int

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]: ...


class EvalBatches(Protocol):
    num_examples: int

    def __iter__(self) -> Iterator[Batch]: ...
    def __len__(self) -> int: ...


class Metrics(Protocol):
    def update(self, outputs: Tensor, targets: Tensor, weights: Tensor | None) -> None: ...
    def scalars(self) -> dict[str, float]: ...
    def details(self) -> dict[str, Any]: ...


class Task(Protocol):
    running_name: str | None

    def loss(self, outputs: Tensor, targets: Tensor, weights: Tensor | None) -> Any: ...
    def check(self, outputs: Tensor, targets: Tensor) -> None: ...
    def running(self, outputs: Tensor, targets: Tensor) -> Tensor | None: ...
    def metrics(self, device: torch.device) -> Metrics: ...


class Record(Protocol):
    """Where the numbers go."""

    def log(self, step: int, epoch: int, values: Mapping[str, float]) -> None: ...
    def log_histograms(self, step: int, tensors: Mapping[str, Tensor]) -> None: ...
    def position(self) -> int: ...
    def sync(self) -> None: ...


@dataclass(frozen=True)
class Plan:
    """All that stays the same during a run."""

    options: TrainerOptions
    task: Task
    train: TrainBatches
    val: EvalBatches
    forward: nn.Module  # the model, or DDP around it
    world: World
    seed: int
    total_steps: int | None
    parameters: list[nn.Parameter]  # those that are trained
    clipping: optim.Clipping
    buffers: Buffers
    checkpoints: CheckpointWriter
    record: Record
    stop: StopRequest


class StepResult(NamedTuple):
    sums: Tensor  # (4,) loss, score, weight, examples; over all processes
    grad_norm: Tensor  # () true, global, before clipping
    skipped: Tensor  # () 1.0 if the step was left out as not finite
    components: dict[str, Tensor]  # () each, sums of the loss's named parts


def fit(state: TrainState, plan: Plan) -> str:
    """Train from where `state` is to the end. Returns "completed" or "interrupted"."""
    try:
        state.model.train()
        over = state.step > 0 and settle(state, plan)
        while not over:
            with progress_bar(state, plan) as bar:
                clock = time.perf_counter()
                batches = plan.train.epoch(state.epoch, start=state.step_in_epoch)
                for batch in plan.stop.while_waiting(batches):
                    result = train_step(state, batch, plan)
                    state.progress.step += 1
                    now = time.perf_counter()
                    state.progress.seconds += now - clock
                    clock = now
                    if bar.update(1):
                        bar.set_postfix(running(state, plan), refresh=False)
                    report(state, result, plan)
                    if over := settle(state, plan):
                        break
    except Interrupted:
        save(state, plan)
    plan.checkpoints.wait()
    return "completed" if finished(state, plan) else "interrupted"


def train_step(state: TrainState, batch: Batch, plan: Plan) -> StepResult:
    """One update of the weights from one global batch, in as many slices as fit."""
    options, world, step = plan.options, plan.world, state.step
    plan.buffers.remember()
    state.optimizer.zero_grad()
    optim.set_lr(state.optimizer, state.schedule(step))

    # Each slice gives the gradient of its summed loss over the number of examples of the step.
    # Where weights make the true divisor another one, it is put right once, below.
    share = world.size / batch.num_global  # DDP takes the mean over processes: undo that
    seed = torch.full((), share, device=world.device)
    if state.loss_scale is not None:
        seed = seed * state.loss_scale.value
    total: list[Tensor] = []
    components: dict[str, Tensor] = {}
    weighted = False
    slices = batch.split(state.progress.slices) if state.progress.slices > 1 else [batch]
    for index, micro_batch in enumerate(slices):
        seed_step(key(plan.seed, "model", step, index, world.rank))
        with synchronises(plan.forward, index == len(slices) - 1):
            with autocast(world.device, options.precision):
                outputs = call(plan.forward, micro_batch.inputs)
                loss = plan.task.loss(outputs, micro_batch.targets, micro_batch.weights)
            values, weights = at_least_float32(loss.values), loss.weights
            loss_sum = values.sum() if weights is None else (values * weights).sum()
            loss_sum.backward(seed)
        with torch.no_grad():
            weight = values.numel() if weights is None else weights.sum()
            score = plan.task.running(outputs, micro_batch.targets)
            weighted = weighted or weights is not None or values.numel() != micro_batch.num_local
            total.append(tally(loss_sum, score, weight, micro_batch))
            for name, part in loss.components.items():
                part_sum = (part if weights is None else part * weights).sum().detach()
                components[name] = components.get(name, 0) + part_sum

    sums = world.sum_(total[0] if len(total) == 1 else torch.stack(total).sum(0))
    factor: float | Tensor = batch.num_global / sums[2] if weighted else 1.0
    if state.loss_scale is not None:
        factor = factor / state.loss_scale.value
    gradients = [p.grad for p in plan.parameters if p.grad is not None]
    norm = optim.gradient_norm(gradients)
    skipped = optim.update(
        state.optimizer, gradients, norm, factor=factor, clipping=plan.clipping, valid=sums[0]
    )
    plan.buffers.restore(skipped)
    if state.loss_scale is not None:
        state.loss_scale.update(skipped)
    if state.averaged is not None and options.ema_decay is not None:
        update_average(state.averaged, state.model, options.ema_decay, skipped)
    count(state, sums, skipped)
    return StepResult(sums, norm * factor, skipped, components)


def report(state: TrainState, result: StepResult, plan: Plan) -> None:
    """The log lines that are due after a step: of the step, of the epoch, of the tensors."""
    options, progress, step = plan.options, state.progress, state.step
    if due(step, options.log_every_steps):
        values, norm = result.sums.tolist(), result.grad_norm.item()
        line = {"train/loss": ratio(values[0], values[2])}
        if plan.task.running_name:
            line[f"train/{plan.task.running_name}"] = ratio(values[1], values[3])
        for name, part in result.components.items():
            line[f"train/loss_{name}"] = ratio(plan.world.sum_(part).item(), values[2])
        line |= {"train/grad_norm": norm, "train/lr": state.optimizer.param_groups[0]["lr"]}
        if state.loss_scale is not None:
            line["train/loss_scale"] = state.loss_scale.value.item()
        skipped = int(state.skips[0].item())
        if skipped:
            line["train/skipped_steps"] = skipped
        plan.record.log(step, state.epoch, {**line, **clock(state, plan.world.device)})
    if due(step, options.log_every_steps) or plan.world.device.type == "cpu":
        refuse_endless_skipping(state, plan)
    if due(step, options.log_histograms_every_steps):
        plan.record.log_histograms(step, histograms(state.model))
    if state.step_in_epoch == 0:
        progress.train_means = running(state, plan, prefix="train/epoch_")
        plan.record.log(step, state.epoch, progress.train_means)
        state.sums.zero_()


def settle(state: TrainState, plan: Plan) -> bool:
    """Evaluate and save if they are due after this step. Returns whether the run is over.

    The step alone decides what is due, so a run that was cut between two of these goes on with the
    one that is missing.
    """
    options, progress = plan.options, state.progress
    ends_epoch = state.step_in_epoch == 0
    evaluates = (
        due(state.step, options.eval_every_steps)
        or (ends_epoch and due(state.epoch, options.eval_every_epochs))
        or finished(state, plan)
    )
    if evaluates and progress.evaluated_step != state.step:
        values, _ = evaluate(state, plan.val, plan, name="val")
        plan.record.log(state.step, state.epoch, {**values, **clock(state, plan.world.device)})
        take_in(values, state, options)
        progress.evaluated_step, progress.latest = state.step, values
    if ends_epoch or evaluates:
        announce(state, plan)
    over = finished(state, plan)
    stops = plan.stop.requested
    saves = (
        due(state.step, options.checkpoint.save_every_steps)
        or (ends_epoch and due(state.epoch, options.checkpoint.save_every_epochs))
        or progress.best_step == state.step
    )
    if saves or over or stops:
        save(state, plan)
    return over or stops


@torch.no_grad()
def evaluate(
    state: TrainState, batches: EvalBatches, plan: Plan, *, name: str
) -> tuple[dict[str, float], dict[str, Any]]:
    """The exact loss and metrics over all of `batches`, and what pictures need.

    Sums over every example, divided once; nothing is padded and nothing dropped. Training is left
    as it was. Raises Interrupted when a stop is asked for in between.
    """
    options, world, task = plan.options, plan.world, plan.task
    model = state.evaluated
    sums = torch.zeros(2, dtype=sum_dtype(world.device), device=world.device)
    metrics = task.metrics(world.device)
    model.eval()
    with optim.evaluating(state.optimizer, state.model):
        for batch in plan.stop.while_waiting(evaluation_bar(batches, name, plan)):
            with autocast(world.device, options.precision):
                outputs = call(model, batch.inputs)
                loss = task.loss(outputs, batch.targets, batch.weights)
            values, weights = at_least_float32(loss.values), loss.weights
            if weights is None:
                sums[0] += values.sum()
                sums[1] += values.numel()
            else:
                sums[0] += (values * weights).sum()
                sums[1] += weights.sum()
            metrics.update(outputs, batch.targets, batch.weights)
    state.model.train()
    loss_sum, weight = world.sum_(sums).tolist()
    scalars = {"loss": ratio(loss_sum, weight), **metrics.scalars()}
    return {f"{name}/{key}": value for key, value in scalars.items()}, metrics.details()


def save(state: TrainState, plan: Plan) -> None:
    """A checkpoint of this step, written beside the loop, unless there is one already."""
    evaluated = state.progress.evaluated_step == state.step
    if plan.checkpoints.saved == (state.step, evaluated) or not plan.world.is_main:
        return
    every = plan.options.checkpoint.milestones_every_epochs
    facts = Facts(
        step=state.step,
        epoch=state.epoch,
        value=state.progress.latest.get(plan.options.monitor) if evaluated else None,
        milestone=state.step_in_epoch == 0 and due(state.epoch, every),
        metrics_bytes=plan.record.position(),
    )
    plan.checkpoints.save(state.state_dict(), facts, plan.record.sync)
    plan.checkpoints.saved = (state.step, evaluated)


def finished(state: TrainState, plan: Plan) -> bool:
    """Whether a limit is reached."""
    progress, limit = state.progress, plan.options.max_seconds
    return (
        progress.stopped_early
        or (plan.total_steps is not None and progress.step >= plan.total_steps)
        or (limit is not None and progress.seconds >= limit)
    )


def take_in(values: Mapping[str, float], state: TrainState, options: TrainerOptions) -> None:
    """Let an evaluation decide: the best so far, the plateau, early stopping."""
    progress, mode = state.progress, options.mode
    value = values[options.monitor]
    if improves(value, progress.best_value, mode=mode):
        progress.best_value, progress.best_step = value, state.step
        progress.best_values = dict(values)
    if isinstance(state.schedule, Plateau):
        state.schedule.update(value, mode)
    stopping = options.early_stopping
    if improves(value, progress.reference_value, mode=mode, min_delta=stopping.min_delta):
        progress.reference_value, progress.evaluations_without_improvement = value, 0
    else:
        progress.evaluations_without_improvement += 1
        if stopping.patience is not None:
            waited = progress.evaluations_without_improvement
            progress.stopped_early = waited > stopping.patience


def check_first_batch(model: nn.Module, task: Task, val: EvalBatches, precision: str) -> None:
    """Run one validation batch through model and loss, so that what breaks breaks early."""
    model.eval()
    batch = next(iter(val))
    with autocast(batch.targets.device, precision):
        outputs = call(model, batch.inputs)  # with its graph: that tells what the model ends in
        task.check(outputs, batch.targets)
        task.loss(outputs, batch.targets, batch.weights)
    model.train()


def refuse_endless_skipping(state: TrainState, plan: Plan) -> None:
    """End the run after too many steps in a row without a finite gradient."""
    in_a_row = int(state.skips[1].item())
    # fp16 finds its scale by overflowing: that many halvings are a search, not a fault.
    allowed = plan.options.max_skipped_steps + (16 if state.loss_scale is not None else 0)
    if in_a_row >= allowed:
        where = optim.first_non_finite(state.model)
        raise FloatingPointError(
            f"step {state.step}: no finite loss or gradient for {in_a_row} steps in a row"
            + (f"; the first bad parameter is {where}" if where else "; the loss itself is bad")
            + ". Lower optimizer.lr or set trainer.clip_norm, or look with debug=anomaly."
        )


def call(model: nn.Module, inputs: Any) -> Any:
    """The outputs for inputs that are one tensor, or a tuple or mapping of arguments."""
    if isinstance(inputs, Tensor):
        return model(inputs)
    return model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)


def tally(loss_sum: Tensor, score: Tensor | None, weight: Tensor | float, batch: Batch) -> Tensor:
    """(4,) sums of loss, score, weight and examples of one micro-batch."""
    sums = torch.tensor((0.0, 0.0, 0.0, batch.num_local), device=loss_sum.device)
    sums[0] = loss_sum.detach()
    if score is not None and batch.num_local:
        sums[1] = score.sum()
    sums[2] = weight
    return sums


def count(state: TrainState, sums: Tensor, skipped: Tensor) -> None:
    """Add a step to the epoch's sums and to the number of skipped steps, on the device."""
    state.sums += torch.where(skipped.bool(), 0.0, sums)
    state.skips[0] += skipped
    state.skips[1].add_(1).mul_(skipped)


def running(state: TrainState, plan: Plan, prefix: str = "") -> dict[str, float]:
    """The exact means over the epoch so far."""
    loss, score, weight, examples = state.sums.tolist()
    values = {f"{prefix}loss": ratio(loss, weight)}
    if plan.task.running_name:
        values[f"{prefix}{plan.task.running_name}"] = ratio(score, examples)
    return values


def clock(state: TrainState, device: torch.device) -> dict[str, float]:
    """What depends on the clock and the machine."""
    seconds = state.progress.seconds
    values = {"time/seconds": seconds, "time/memory_mb": memory_mb()}
    if seconds > 0:
        values["time/steps_per_second"] = state.step / seconds
    if device.type == "cuda":
        values["time/gpu_memory_mb"] = torch.cuda.max_memory_allocated(device) / 2**20
    return values


def histograms(model: nn.Module) -> dict[str, Tensor]:
    weights = {f"weights/{n}": p.detach() for n, p in model.named_parameters()}
    gradients = {
        f"gradients/{n}": p.grad for n, p in model.named_parameters() if p.grad is not None
    }
    return {**weights, **gradients}


def at_least_float32(values: Tensor) -> Tensor:
    """Sums of half-precision numbers are no sums."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def due(count: int, every: int | None) -> bool:
    return every is not None and count > 0 and count % every == 0


def ratio(total: float, divisor: float) -> float:
    return total / divisor if divisor else float("nan")


def sum_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64


def memory_mb() -> float:
    """Peak memory of this process, in MiB."""
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def progress_bar(state: TrainState, plan: Plan) -> Any:
    """A bar for the epoch, quiet when the output is no terminal."""
    shown = plan.options.progress_bar and plan.world.is_main
    total = state.steps_per_epoch
    return tqdm(
        total=total,
        initial=state.step_in_epoch,
        desc=f"epoch {state.epoch + 1}",
        unit="step",
        leave=False,
        disable=None if shown else True,
    )


def evaluation_bar(batches: EvalBatches, name: str, plan: Plan) -> Any:
    shown = plan.options.progress_bar and plan.world.is_main
    disable = None if shown else True
    return tqdm(batches, desc=name, unit="batch", leave=False, disable=disable)


def announce(state: TrainState, plan: Plan) -> None:
    """One line per epoch or evaluation."""
    progress = state.progress
    values = {**progress.train_means, **progress.latest}
    shown = [f"{name} {values[name]:.4g}" for name in HEADLINES if name in values]
    if plan.options.monitor in values and plan.options.monitor not in HEADLINES:
        shown.append(f"{plan.options.monitor} {values[plan.options.monitor]:.4g}")
    best = " (best)" if progress.best_step == state.step else ""
    log.info("epoch %d, step %d: %s%s", state.epoch, state.step, ", ".join(shown), best)
