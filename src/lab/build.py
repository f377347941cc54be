"""Builds the objects of a run from its config, in the order of their dependencies.

A run's objects are made only here. `build` writes nothing, so that errors in the data, the
model or their combination appear before a folder exists.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lab import optim, several
from lab.faults import refuse_split
from lab.models.initialisation import StartsFromData, start_from_data
from lab.options import TrainerOptions
from lab.plan import LoopPlan, StepPlan, StepResult
from lab.schedules import RunLength, Schedule
from lab.state import TrainState, average_of, too_short_for_average
from lab.step import train_step
from lab.tasks.losses import BALANCED
from lab.tasks.metrics import Metrics
from regrow.config.targets import call_failed, instantiate, locate
from regrow.distributed import activation_checkpointing, sharding
from regrow.distributed.parallel import (
    DDPOptions,
    Exchange,
    World,
    distribute,
    synchronise_batch_norm,
)
from regrow.dotted import Checked
from regrow.errors import UserError, did_you_mean
from regrow.feeding.sampling import balanced_weights
from regrow.numerics import flops, scheduler_adapter
from regrow.numerics.buffers import Buffers
from regrow.numerics.capture import LEAST_STEPS, Eager, Graphs
from regrow.numerics.precision import LossScale
from regrow.numerics.totals import Totals
from regrow.numerics.unsaved import Unsaved
from regrow.processes.interrupt import StopRequest
from regrow.protocols import Batch, EvalBatches, TrainBatches
from regrow.randomness import key, seed_data, seed_everything, states_kept
from regrow.record import monitor
from regrow.record.meter import Meter
from regrow.runs import model_checks
from regrow.runs.fault_checks import Untrained, untrained_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BuiltObjects:
    """The objects that a config describes."""

    options: TrainerOptions
    data: Any
    task: Any
    state: TrainState
    train: TrainBatches
    sets: Mapping[str, EvalBatches]  # those that are measured during training, by name
    total_steps: int | None
    warmup_steps: int  # 0 if the schedule has none
    parameters: list[nn.Parameter]
    train_step: Callable[..., StepResult]  # (state, batch, plan of the step)

    @property
    def measured(self) -> list[str]:
        """The names of the metrics that are measured during training."""
        return measured_by(self.task, self.state.skips.device, self.sets)

    def remarks(self, world: World) -> list[tuple[int, str]]:
        """Return lines for the start of the log, each with its level of `logging`."""
        state, options, lines = self.state, self.options, []
        if world.device.type != "cpu" and not optim.skips_on_device(state.optimizer, world.device):
            text = "it cannot skip a bad step on the device, so each step waits for the device once"
            lines.append((logging.INFO, f"optimizer: {text}"))
        if short := too_short_for_average(options, self.total_steps):
            lines.append((logging.INFO if options.ema_warmup else logging.WARNING, short))
        if isinstance(state.schedule, scheduler_adapter.SchedulerAdapter):
            name, interval = state.schedule.name.rpartition(".")[2], state.schedule.interval
            text = f"{name} is stepped once per {interval} (scheduler.interval)"
            lines.append((logging.INFO, f"scheduler: {text}"))
        return lines


def build(config: Checked, world: World) -> BuiltObjects:
    """Return all objects of a run, built in the order of their dependencies. Writes nothing."""
    several.check(config)
    seed = config["seed"]
    options: TrainerOptions = instantiate(config["trainer"])
    seed_data(seed)
    data = instantiate(config["data"])
    share = {"device": world.device, "rank": world.rank, "world_size": world.size}
    train = data.train(**share)
    sets = {name: data.evaluation(name, **share) for name in data.measured_in_training}

    seed_everything(key(seed, "model"))
    models = several.each(config["model"], instantiate)
    model_checks.check_types(models)
    model: nn.Module = models[""] if "" in models else several.Models(models)
    if model_checks.has_lazy_parts(model):
        with states_kept():
            first = first_batch(train, sets)
        model_checks.materialise(model, first)
    model_checks.check(model, options.ema_decay)
    if isinstance(model, StartsFromData):
        start_from_data(model, data.sample_inputs())
    if config["init_from"]:
        from regrow.runs.weights import load_weights, warn_of_other_splits

        load_weights(model, Path(config["init_from"]))
        warn_of_other_splits(Path(config["init_from"]), config["data"])
    if world.mesh is None:  # sharding moves only this rank's part
        model.to(world.device)
    if options.sync_batch_norm:
        model = synchronise_batch_norm(model, world.device)
    if options.channels_last:
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.ndim == 5:
                raise UserError(
                    f"trainer.channels_last=true is for images, and {name} of the model, "
                    f"{list(tensor.shape)}, is for volumes. Use trainer.channels_last=false."
                )
        model.to(memory_format=torch.channels_last)

    task_node = dict(config["task"])
    for names in ("class_names", "target_names"):
        if task_node.get(names, ...) is None:
            task_node[names] = getattr(data, names)  # read from the data, such as folder names
    loss = dict(config["loss"])
    if loss.get("class_weights") == BALANCED:
        data.class_weights = balanced_weights(data)  # for the run's record
        loss["class_weights"] = data.class_weights
    task = instantiate(task_node, loss=instantiate(loss))
    task.in_units = data.in_units  # regression metrics are in the targets' own units
    task.vocabulary = data.preprocessing.vocabulary  # says how many bytes a token has
    task.as_pixels = data.as_pixels  # for the report's images
    options = with_monitor(options, config, task, world.device, sets)
    step = instantiate(config["step"])
    # A step of one's own may gather the rows of all processes.
    parts = world.size if is_train_step(step) else 1
    refuse_split(task, parts * options.accumulation_steps)

    averaged = average_of(model) if options.ema_decay is not None else None
    activation_checkpointing.apply(model, options.activation_checkpointing)
    if world.mesh is not None:
        for each in (model,) if averaged is None else (model, averaged):
            for part in several.by_name(each).values():
                sharding.shard(part, options.fsdp, world.mesh)
    total_steps = steps_of(options, train.steps_per_epoch)
    optimizers = optimizers_of(config, model)
    length = RunLength(total_steps=total_steps, steps_per_epoch=train.steps_per_epoch)
    nodes = several.each(config["scheduler"], dict)
    schedules, warmups = {}, []
    for name, optimizer in optimizers.items():
        node = nodes[name] if name in nodes else nodes[""]  # a single one serves all
        schedules[name] = schedule_of(node, optimizer, length)
        warmups.append(length.warmup(node.get("warmup_steps"), node.get("warmup_fraction")))
    state = TrainState(
        model=model,
        optimizer=several.one_or_all(optimizers),
        schedule=several.one_or_all(schedules),
        evaluates="" if "" in models else config["task"]["evaluates"],
        averaged=averaged,
        loss_scale=LossScale(world.device) if options.precision == "fp16" else None,
        sums=Totals.zero(world.device),
        skips=torch.zeros(2, device=world.device),
        empty_steps=torch.zeros((), device=world.device),
        steps_per_epoch=train.steps_per_epoch,
        accumulation_steps=options.accumulation_steps,
    )
    parameters = [p for p in model.parameters() if p.requires_grad]
    try:
        inspect.signature(step).bind(state, None, None)
    except TypeError as error:
        raise UserError(
            f"step._target_={config['step']['_target_']} must take (state, batch, plan): {error}. "
            "lab.step.train_step is an example."
        ) from None
    if options.compile:
        if world.is_main:
            log.info("the first batches compile the model, which takes seconds or minutes")
        for each in several.by_name(model).values():
            each.compile()
    return BuiltObjects(
        options, data, task, state, train, sets, total_steps, max(warmups), parameters, step
    )


def is_train_step(step: Callable[..., StepResult]) -> bool:
    return getattr(step, "func", step) is train_step


def optimizers_of(config: Checked, model: nn.Module) -> dict[str, Optimizer]:
    """Return the optimizers by name; a single one, of all models, has the empty name."""
    make = several.each(config["optimizer"], instantiate)
    settings = config["param_groups"]
    if "" in make:
        return {"": optim.build(make[""], optim.parameter_groups(model, **settings))}
    models, optimizers = several.by_name(model), {}
    several.refuse_foreign(settings["lr_scale"] or {}, "param_groups.lr_scale", models)
    for name, make_one in make.items():
        own = {**settings, "lr_scale": optim.scales_of(name, settings["lr_scale"])}
        optimizers[name] = optim.build(make_one, optim.parameter_groups(models[name], **own))
    return optimizers


def with_monitor(
    options: TrainerOptions,
    config: Checked,
    task: Any,
    device: torch.device,
    sets: Collection[str],
) -> TrainerOptions:
    """Return the options with a checked monitor and its mode; both are None without a monitor.

    Raises UserError for a monitor that is not measured, or whose mode is unknown. Data without val
    has no monitor, unless it names another set.
    """
    lacks_val = "val" not in sets and str(options.monitor).startswith("val/")
    if lacks_val or options.monitor is None:
        why = "the data has no validation split" if lacks_val else "trainer.monitor=null"
        monitor.refuse_without(config, why)
        return dataclasses.replace(options, monitor=None, mode=None)
    measured = measured_by(task, device, sets)
    if options.monitor not in measured:
        hint = did_you_mean(options.monitor, measured)
        raise UserError(
            f"trainer.monitor={options.monitor} is not measured.{hint}"
            f" There are {', '.join(name for name in measured if name.count('/') == 1)}."
        )
    mode = monitor.of_run(config)
    if options.mode is None:
        own = monitor.of_metrics(task.metrics(device), options.monitor)
        if mode and own and own != mode:
            raise UserError(
                f"trainer.mode=null: the name of {options.monitor} says {mode}, and its "
                f"higher_is_better says {own}. Add trainer.mode={own}, or trainer.mode={mode}."
            )
        mode = mode or own
    if mode is None:
        raise UserError(
            f"trainer.mode=null: neither its name nor torchmetrics says whether a higher "
            f"{options.monitor} is better. Add trainer.mode=max, or trainer.mode=min."
        )
    return dataclasses.replace(options, mode=mode)


def measured_by(task: Any, device: torch.device, sets: Collection[str]) -> list[str]:
    """Return the names of the metrics that an evaluation on the `sets` measures."""
    return [f"{name}/{it}" for name in sets for it in ("loss", *task.metrics(device).names)]


def schedule_of(node: Checked, optimizer: Any, length: RunLength) -> Schedule:
    """Return the lab's schedule, or an adapter for a scheduler of torch or timm."""
    target = locate(node["_target_"], "scheduler")
    if not scheduler_adapter.adapts(target):
        make_one: Callable[..., Schedule] = instantiate(node)
        try:
            return make_one(length=length)
        except UserError:
            raise
        except (TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise UserError(call_failed("scheduler", make_one, error)) from error
    scheduler_adapter.refuse_metric(target, node["_target_"])

    def make(node: Mapping[str, Any], stand_in: Any) -> Any:
        arguments = {key: value for key, value in node.items() if key != "interval"}
        inner = {}
        if isinstance(arguments.get("schedulers"), list):  # SequentialLR and ChainedScheduler
            inner["schedulers"] = [make(each, stand_in) for each in arguments.pop("schedulers")]
        return instantiate(arguments, optimizer=stand_in, **inner)

    return scheduler_adapter.SchedulerAdapter(
        lambda stand_in: make(node, stand_in),
        optimizer,
        interval=node.get("interval", "epoch"),
        steps_per_epoch=length.steps_per_epoch,
        total_steps=length.total_steps,
        name=node["_target_"],
    )


def check_first_batch(objects: BuiltObjects, world: World) -> None:
    """Raise UserError if model, task and data do not fit together. Leaves the run unchanged."""
    state, options = objects.state, objects.options
    if is_train_step(objects.train_step):  # --check builds a run of one part, and splits it here
        refuse_split(objects.task, world.size * state.num_micro_batches)
    model: nn.Module = several.by_name(state.model)[state.evaluates]
    averaged = state.evaluated if state.averaged is not None else None
    before = model_checks.described(model)
    first = first_batch(objects.train, objects.sets)
    what = (model, objects.task, first, options.precision)
    if world.mesh is None:
        first, odd = model_checks.check_what_fits(*what)
    else:  # all processes must make as many forward passes
        odd = model_checks.check_first_batch(*what)
    if world.is_main and not options.find_faults:  # otherwise the watched steps report them
        for line in odd:
            log.warning("%s", line)
    is_measured = bool(objects.sets or objects.data.final)
    # The shipped ones would import torchmetrics, and `task.check` rehearses what is added to them.
    if is_measured and type(objects.task.metrics(world.device)) is not Metrics:
        what = (model, objects.task, first, options.precision)
        model_checks.check_metrics(*what, gathers=world.size == 1)
    if getattr(objects.data, "mixing", None) is not None:
        soft = objects.data.as_trained(first)
        model_checks.check_soft_targets(model, objects.task, soft, options.precision)
    batch, count = objects.data.batch_size, objects.train.num_examples
    smallest = batch if objects.data.drop_last or count % batch == 0 else count % batch
    if smallest // (state.num_micro_batches * world.size) <= 1:
        model_checks.check_one_example(model, first, options.precision)
    uses_ddp = world.size > 1 and world.mesh is None
    odd = untrained_of(objects.task)
    # A sharded forward pass involves all processes, some of which may have a single example.
    if world.mesh is None or min(world.gather(first.num_local)) > 1:
        with states_kept():
            odd += model_checks.check_forward(
                model,
                averaged,
                first,
                options.precision,
                before=before,
                is_sharded=world.mesh is not None,
                needs_all=uses_ddp and not options.ddp.find_unused_parameters,
                compiles=options.compile,
            )
    for line in odd if world.is_main else ():
        log.warning("%s", line)
    sharding.free(model)


def first_batch(train: TrainBatches, sets: Mapping[str, EvalBatches]) -> Batch:
    """Return the first batch of the first set, or of the training examples if there is none."""
    return next(iter(next(iter(sets.values()))) if sets else train.epoch(0))


def steps_of(options: TrainerOptions, steps_per_epoch: int) -> int | None:
    """Return the optimizer steps of the whole run; None if only time limits it."""
    if options.max_steps is not None:
        return options.max_steps
    return None if options.max_epochs is None else options.max_epochs * steps_per_epoch


def capture_of(
    options: TrainerOptions,
    state: TrainState,
    task: Any,
    world: World,
    total_steps: int | None,
    step: Callable[..., StepResult] = train_step,
) -> Eager:
    """Return what runs the pieces of a step: CUDA graphs on a GPU if possible."""
    if world.device.type != "cuda":
        return Eager()
    reason = None
    if not options.capture:
        reason = ""  # the user turned it off, so log nothing
    elif world.size > 1 or world.mesh is not None:
        reason = "several processes share them"
    elif not is_train_step(step):
        reason = "step._target_ is not lab.step.train_step, the one that is known to allow it"
    elif options.detect_anomaly:
        reason = "trainer.detect_anomaly=true reads every operation's result"
    elif options.profile:
        reason = "trainer.profile=true waits for the device at each phase of a step"
    elif options.activation_checkpointing:
        reason = "trainer.activation_checkpointing reads random states on the host"
    elif total_steps is not None and total_steps < LEAST_STEPS:
        reason = f"the run has fewer than {LEAST_STEPS} of them"
    return Graphs(
        world.device,
        [p for p in state.model.parameters() if p.requires_grad],
        state.tensors,
        [state.model, task],
        functools.partial(optim.settings, state.optimizer),
        update=optim.skips_on_device(state.optimizer, world.device),
        deterministic=options.deterministic,
        reason=reason,
    )


def distribute_all(model: nn.Module, options: DDPOptions, world: World, exchange: Exchange) -> Any:
    """Return what a step calls: the model, wrapped in DDP if needed; several models by name."""
    models = several.by_name(model).items()
    return several.one_or_all(
        {name: distribute(each, options, world, exchange) for name, each in models}
    )


def plan_of(
    objects: BuiltObjects, seed: int, world: World, stop: StopRequest, **record: Any
) -> LoopPlan:
    """Return everything that stays the same during the run.

    `record` is the Plan's `record`, `checkpoints` and `trial`.
    """
    options, model = objects.options, objects.state.model
    exchange = Exchange(world, stop)
    buffers = Buffers(model, flat=True)
    untrained = Untrained()
    if not (options.find_faults or isinstance(model, several.Models)):
        begun, end = objects.state.step, objects.total_steps
        untrained = Untrained(model, begun, end, tells=world.is_main)
    step = StepPlan(
        options=options,
        task=objects.task,
        world=world,
        seed=seed,
        forward=distribute_all(model, options.ddp, world, exchange),
        parameters=objects.parameters,
        clipping=optim.Clipping(norm=options.clip_norm, value=options.clip_value),
        buffers=buffers,
        exchange=exchange,
        capture=capture_of(
            options, objects.state, objects.task, world, objects.total_steps, objects.train_step
        ),
        record=record.get("record"),
        untrained=untrained,
    )
    optimizer = objects.state.optimizer
    watched = {"task": objects.task, "step": objects.train_step, "optimizer": optimizer}
    peak = flops.peak_of(world.device, options.precision, tf32=options.tf32)
    # Counting the operations of a compiled model would run it uncompiled.
    meter = Meter(None if options.compile or peak is None else peak * world.size)
    return LoopPlan(
        step=step,
        train_step=meter.counting(objects.train_step),
        meter=meter,
        options=options,
        task=objects.task,
        world=world,
        train=objects.train,
        sets=objects.sets,
        total_steps=objects.total_steps,
        stop=stop,
        unsaved=Unsaved(model, **watched) if world.is_main else Unsaved(),
        **record,
    )
