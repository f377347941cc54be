"""The training loop: every event of a run, by name, in order.

To change what a run does, change these functions. `TrainState` holds what changes during a run,
`LoopPlan` what stays the same; the loop reads nothing else.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from lab import optim
from lab.evaluate import evaluate
from lab.faults import refuse_endless_skipping
from lab.options import TrainerOptions
from lab.plan import LoopPlan, StepResult
from lab.progress import (
    advance,
    announce,
    clock,
    histograms,
    progress_bar,
    running_score,
    tell_of_another_rate,
)
from lab.schedules import Plateau, improves
from lab.several import by_name
from lab.state import TrainState
from regrow.checkpoint.writer import CheckpointFacts
from regrow.numerics.totals import WEIGHT
from regrow.phases import phase
from regrow.processes.interrupt import Interrupted
from regrow.record.records import by_set

log = logging.getLogger(__name__)


def fit(state: TrainState, plan: LoopPlan) -> str:
    """Train from `state` to the end. Returns "completed" or "interrupted".

    Raises OSError if the run finished but its last checkpoint could not be written.
    """
    together = plan.world.size > 1  # if so, no rank may stop alone: see Exchange
    is_interrupted = False
    try:
        state.model.train()
        tell_of_another_rate(state)
        plan.step.exchange.start_clock()
        over = state.step > 0 and settle(state, plan)
        while not over:
            with progress_bar(state, plan) as bar:
                batches = plan.train.epoch(state.epoch, start=state.step_in_epoch)
                batches = batches if together else plan.stop.while_waiting(batches)
                for batch in plan.meter.timed(batches):
                    result = plan.train_step(state, batch, plan.step)
                    state.progress.step += 1
                    state.progress.seconds += plan.step.exchange.seconds
                    plan.meter.add(batch.num_global, plan.step.exchange.seconds)
                    advance(bar, state.sums, running_score(result, plan))
                    report(state, result, plan)
                    if not result.skipped.is_known:  # the optimizer then has a state
                        plan.checkpoints.make_room(state.state_dict)
                    plan.checkpoints.poll()
                    if over := settle(state, plan):
                        break
    except Interrupted:
        is_interrupted = True  # even after the last step, whose evaluation is then missing
        save(state, plan)
    plan.step.capture.close()
    saved = plan.checkpoints.wait()
    if is_interrupted or not finished(state, plan):
        return "interrupted"
    if not saved:
        raise OSError(f"the weights of step {state.step}, the last, could not be saved")
    plan.world.barrier()  # from here on every rank may read the checkpoint
    return "completed"


def report(state: TrainState, result: StepResult, plan: LoopPlan) -> None:
    """Log what is due after a step: metrics of the step and of the epoch, and histograms."""
    options, progress, step = plan.options, state.progress, state.step
    if due(step, options.log_every_steps):
        means = result.totals.means(running_score(result, plan))
        line = {f"train/{name}": value for name, value in means.items()}
        line["train/grad_norm"] = float(result.grad_norm)
        line |= {f"train/{name}": lr for name, lr in optim.rates(state.optimizer).items()}
        if state.loss_scale is not None:
            line["train/loss_scale"] = state.loss_scale.value.item()
        if skipped := int(state.skips[0].item()):
            line["train/skipped_steps"] = skipped
        if empty := int(state.empty_steps.item()):
            line["train/empty_steps"] = empty
        line |= {**clock(state, plan.world.device), **plan.meter.read()}
        plan.record.log(step, state.epoch, line)
    # If only the device knows whether a step was skipped, ask it no more often than for the log.
    if due(step, options.log_every_steps) or result.skipped.is_known:
        refuse_endless_skipping(state, result.totals, plan)
    if due(step, options.log_histograms_every_steps):
        plan.record.log_histograms(step, histograms(state.model))
    if state.step_in_epoch == 0:
        tell_of_empty_epoch(state, plan)
        means = state.sums.means(running_score(result, plan))
        progress.train_means = {f"train/epoch_{name}": value for name, value in means.items()}
        plan.record.log(step, state.epoch, progress.train_means)
        state.sums.clear_()


def settle(state: TrainState, plan: LoopPlan) -> bool:
    """Evaluate and save if due after this step. Returns True if the run is over.

    What is due depends on the step alone, so a run interrupted between evaluation and checkpoint
    resumes with the missing one. The end of a run is evaluated wherever it falls; if the limit is
    raised later, that evaluation stays in the record.
    """
    options, progress = plan.options, state.progress
    ends_epoch = state.step_in_epoch == 0
    evaluates = bool(plan.sets) and (
        due(state.step, options.eval_every_steps)
        or (ends_epoch and due(state.epoch, options.eval_every_epochs))
        or finished(state, plan)
    )
    best_before = progress.best_value
    if evaluates and progress.evaluated_step != state.step:
        values: dict[str, float] = {}
        with plan.step.exchange.clock_stopped(), phase("evaluation"):
            for name, batches in plan.sets.items():
                values |= evaluate(state, batches, plan, name=name)[0]
        plan.record.log(state.step, state.epoch, {**values, **clock(state, plan.world.device)})
        take_in(values, state, options)
        progress.evaluated_step, progress.latest = state.step, values
        tell_of_early_stop(values, state, plan)
        progress.pruned = report_to_search(state, plan)
    is_saved = plan.checkpoints.saved == (state.step, progress.evaluated_step == state.step)
    if (ends_epoch or evaluates) and not is_saved:  # a saved step was announced before
        announce(state, plan, best_before)
    over = finished(state, plan)
    stops = plan.step.exchange.stops
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


def save(state: TrainState, plan: LoopPlan) -> None:
    """Save a checkpoint of this step in the background, unless it is saved already."""
    progress = state.progress
    evaluated = progress.evaluated_step == state.step
    if plan.checkpoints.saved == (state.step, evaluated) or not plan.checkpoints.writes:
        return
    plan.step.buffers.check_shapes()
    plan.unsaved.look()
    every = plan.options.checkpoint.milestones_every_epochs
    value = progress.latest.get(plan.options.monitor or "") if evaluated else None
    if value == progress.best_value and state.step != progress.best_step:
        value = None  # a tie that `take_in` ignored: rotation would prefer the latest step
    facts = CheckpointFacts(
        step=state.step,
        epoch=state.epoch,
        value=value,
        milestone=state.step_in_epoch == 0 and due(state.epoch, every),
        metrics_bytes=plan.record.position(),
    )
    plan.checkpoints.save(state.state_dict(), facts, plan.record.sync)
    plan.checkpoints.saved = (state.step, evaluated)


def finished(state: TrainState, plan: LoopPlan) -> bool:
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
    # Ties go to the latest step: a small validation split soon reaches its highest accuracy, when
    # the weights are half trained. After skipped steps the weights are not newer, so ties are
    # ignored.
    equals = value == progress.best_value and not state.skips[1].item()
    if equals or improves(value, progress.best_value, mode=mode):
        progress.best_value, progress.best_step = value, state.step
        progress.best_values = dict(values)
    for schedule in by_name(state.schedule).values():
        if isinstance(schedule, Plateau):
            schedule.update(value, mode)
    stopping = options.early_stopping
    if improves(value, progress.reference_value, mode=mode, min_delta=stopping.min_delta):
        progress.reference_value, progress.evaluations_without_improvement = value, 0
    else:
        progress.evaluations_without_improvement += 1


def tell_of_early_stop(values: Mapping[str, float], state: TrainState, plan: LoopPlan) -> None:
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


def tell_of_empty_epoch(state: TrainState, plan: LoopPlan) -> None:
    """Warn after an epoch in which every step had zero weight, so nothing was learnt."""
    was_bad = bool(state.skips[1].item())  # skipped steps have no sums either
    if plan.world.is_main and state.sums.read()[WEIGHT] == 0 and not was_bad:
        log.warning(
            "epoch %d: every step was empty, since all weights are zero. Check the targets, the "
            "examples' weights, loss.class_weights and loss.ignore_index.",
            state.epoch,
        )


def report_to_search(state: TrainState, plan: LoopPlan) -> bool:
    """Report to the search, if the run is a trial. Returns True if the search ends the run now."""
    if plan.trial is None:
        return False
    ends = plan.world.is_main and plan.trial.report(state.step, state.progress.latest)
    return bool(plan.world.from_main("yes" if ends else ""))


def stopped_early(state: TrainState, options: TrainerOptions) -> bool:
    """Return True if early stopping's patience is exceeded. Not saved, so a resume may raise it."""
    patience = options.early_stopping.patience
    return patience is not None and state.progress.evaluations_without_improvement > patience


def summary(state: TrainState, options: TrainerOptions) -> dict[str, Any]:
    """Return what `summary.json` says about the state."""
    progress = state.progress
    return {
        "steps": state.step,
        "epochs": state.epoch,
        "best": {
            "metric": options.monitor,
            "value": progress.best_value,
            "step": state.step if options.monitor is None else progress.best_step,
        },
        **by_set(progress.latest if options.monitor is None else progress.best_values),
        "pruned": progress.pruned,
        "stopped_early": stopped_early(state, options),
        "evaluations_without_improvement": progress.evaluations_without_improvement,
        "skipped_steps": int(state.skips[0].item()),
        "empty_steps": int(state.empty_steps.item()),
        "parameters": sum(p.numel() for p in state.model.parameters()),
    }


def due(count: int, every: int | None) -> bool:
    return every is not None and count > 0 and count % every == 0
