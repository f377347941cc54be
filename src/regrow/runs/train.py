"""Build objects from a composed config, in order, and train them to a finished run.

All objects are built here and nowhere else. `build` writes nothing, so that errors in the data, the
model or their combination appear before a folder exists.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn

from regrow.checkpoint import writer as checkpoint
from regrow.config.command_line import command
from regrow.config.targets import instantiate, locate
from regrow.distributed import activation_checkpointing, sharding
from regrow.distributed.parallel import (
    Exchange,
    World,
    distribute,
    stopping_together,
    synchronise_batch_norm,
)
from regrow.errors import UserError, did_you_mean
from regrow.models.init import StartsFromData, start_from_data
from regrow.numerics import memory
from regrow.numerics.buffers import Buffers
from regrow.numerics.precision import LossScale
from regrow.numerics.sums import epoch_sums
from regrow.processes.interrupt import Interrupted, StopRequest
from regrow.protocols import Batch, EvalBatches, Record, TrainBatches, Trial
from regrow.randomness import Draws, key, seed_everything, states_kept
from regrow.record import folder as records
from regrow.record import loggers, manifest, monitor, report
from regrow.record.output import whole_file
from regrow.training import loop, model_checks, optim, scheduler_adapter
from regrow.training.evaluate import measure
from regrow.training.options import TrainerOptions
from regrow.training.plan import Plan
from regrow.training.progress import evaluation_bar
from regrow.training.schedules import RunLength, Schedule, Stateful
from regrow.training.state import TrainState, average_of, weights_sha256

log = logging.getLogger(__name__)

WEIGHTS = "weights.pt"


@dataclass(frozen=True)
class Objects:
    """The objects that a config describes."""

    options: TrainerOptions
    data: Any
    task: Any
    state: TrainState
    train: TrainBatches
    val: EvalBatches | None  # None: the data has no validation split
    total_steps: int | None
    parameters: list[nn.Parameter]


def build(config: Mapping[str, Any], world: World) -> Objects:
    """Return all objects of a run, built in the order of their dependencies. Writes nothing."""
    seed = config["seed"]
    options: TrainerOptions = instantiate(config["trainer"])
    set_numerics(options, world.device)

    data = instantiate(config["data"])
    train = data.train(device=world.device, rank=world.rank, world_size=world.size)
    val = None
    if "val" in data.num_examples:
        val = data.evaluation("val", device=world.device, rank=world.rank, world_size=world.size)

    seed_everything(key(seed, "model"))
    model: nn.Module = instantiate(config["model"])
    if model_checks.has_lazy_parts(model):
        with states_kept():
            first = first_batch(train, val)
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
        model.to(memory_format=torch.channels_last)

    task_node = dict(config["task"])
    if task_node.get("class_names", ...) is None:
        task_node["class_names"] = data.class_names  # read from the data, such as folder names
    task = instantiate(task_node, loss=instantiate(config["loss"]))
    task.in_units = data.in_units  # regression metrics are in the targets' own units
    options = with_monitor(options, config, task, world.device, has_val=val is not None)
    slices = options.accumulation_steps
    if slices > 1 and not task.sums_over_examples:
        raise UserError(
            f"trainer.accumulation_steps={slices}: this loss is not a sum over examples, so the "
            "batch cannot be cut into slices. Use trainer.accumulation_steps=1."
        )

    averaged = average_of(model) if options.ema_decay is not None else None
    activation_checkpointing.apply(model, options.activation_checkpointing)
    if world.mesh is not None:
        for each in (model, averaged):
            if each is not None:
                sharding.shard(each, options.fsdp, world.mesh)
    total_steps = steps_of(options, train.steps_per_epoch)
    groups = optim.parameter_groups(model, **config["param_groups"])
    optimizer = optim.build(instantiate(config["optimizer"]), groups)
    length = RunLength(total_steps=total_steps, steps_per_epoch=train.steps_per_epoch)
    schedule = schedule_of(config["scheduler"], optimizer, length)
    state = TrainState(
        model=model,
        optimizer=optimizer,
        schedule=schedule,
        averaged=averaged,
        loss_scale=LossScale(world.device) if options.precision == "fp16" else None,
        sums=epoch_sums(world.device),
        skips=torch.zeros(2, device=world.device),
        empty_steps=torch.zeros((), device=world.device),
        steps_per_epoch=train.steps_per_epoch,
    )
    parameters = [p for p in model.parameters() if p.requires_grad]
    if options.compile:
        if world.is_main:
            log.info("the model is compiled at its first batches, for some seconds or minutes")
        model.compile()
    return Objects(options, data, task, state, train, val, total_steps, parameters)


def with_monitor(
    options: TrainerOptions,
    config: Mapping[str, Any],
    task: Any,
    device: torch.device,
    *,
    has_val: bool,
) -> TrainerOptions:
    """Return the options with their monitor checked and its mode set; both None without one.

    Raises UserError for a monitor that is not measured, or whose mode is unknown.
    """
    if not has_val or options.monitor is None:
        why = "trainer.monitor=null" if has_val else "the data has no validation split"
        monitor.refuse_without(config, why)
        return dataclasses.replace(options, monitor=None, mode=None)
    measured = measured_by(task, device)
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
            f"trainer.mode=null: neither its name nor torchmetrics says whether more of "
            f"{options.monitor} is better. Add trainer.mode=max, or trainer.mode=min."
        )
    return dataclasses.replace(options, mode=mode)


def measured_by(task: Any, device: torch.device) -> list[str]:
    """Return the names of the metrics that an evaluation on the validation split measures."""
    return ["val/loss", *(f"val/{name}" for name in task.metrics(device).names)]


def schedule_of(node: Mapping[str, Any], optimizer: Any, length: RunLength) -> Schedule:
    """Return our schedule, or an adapter for torch's or timm's scheduler with its `interval`."""
    target = locate(node["_target_"], "scheduler")
    if not scheduler_adapter.adapts(target):
        schedule: Schedule = instantiate(node)(length=length)
        return schedule
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


class Silence:
    """The record of a rank that writes none."""

    def log(self, step: int, epoch: int, values: Mapping[str, float]) -> None: ...
    def log_histograms(self, step: int, tensors: Mapping[str, torch.Tensor]) -> None: ...
    def position(self) -> int:
        return 0

    def sync(self, position: int) -> None: ...
    def close(self, exit_code: int = 0) -> None: ...


def check_first_batch(objects: Objects, world: World) -> None:
    """Raise UserError if model, task and data do not fit together. Leaves the run unchanged."""
    model, options = objects.state.model, objects.options
    before = model_checks.described(model)
    first = first_batch(objects.train, objects.val)
    model_checks.check_first_batch(model, objects.task, first, options.precision)
    batch, count = objects.data.batch_size, objects.train.num_examples
    smallest = batch if objects.data.drop_last or count % batch == 0 else count % batch
    if smallest // (options.accumulation_steps * world.size) <= 1:
        model_checks.check_one_example(model, first, options.precision)
    uses_ddp = world.size > 1 and world.mesh is None
    with states_kept():
        model_checks.check_forward(
            model,
            objects.state.averaged,
            first,
            options.precision,
            before=before,
            is_sharded=world.mesh is not None,
            needs_all=uses_ddp and not options.ddp.find_unused_parameters,
            compiles=options.compile,
        )
    sharding.free(model)


def first_batch(train: TrainBatches, val: EvalBatches | None) -> Batch:
    """Return the first batch of the validation split, or of the training split if `val` is None."""
    return next(iter(train.epoch(0) if val is None else val))


def writers_of(world: World, options: TrainerOptions) -> Any:
    """Return the group of ranks that writes a sharded checkpoint; None if nothing is sharded."""
    if world.mesh is None:
        return None
    from regrow.checkpoint.sharded import Writers  # takes a second to import

    return Writers(timedelta(seconds=options.timeout_seconds))


def steps_of(options: TrainerOptions, steps_per_epoch: int) -> int | None:
    """Return the optimizer steps of the whole run; None if only time limits it."""
    if options.max_steps is not None:
        return options.max_steps
    return None if options.max_epochs is None else options.max_epochs * steps_per_epoch


def plan_of(objects: Objects, seed: int, world: World, stop: StopRequest, **record: Any) -> Plan:
    """Return all that a step uses. `record` is the Plan's `record`, `checkpoints` and `trial`."""
    options, model = objects.options, objects.state.model
    exchange = Exchange(world, stop)
    return Plan(
        options=options,
        task=objects.task,
        train=objects.train,
        val=objects.val,
        forward=distribute(model, options.ddp, world, exchange),
        world=world,
        seed=seed,
        total_steps=objects.total_steps,
        parameters=objects.parameters,
        clipping=optim.Clipping(norm=options.clip_norm, value=options.clip_value),
        buffers=Buffers(model),
        stop=stop,
        exchange=exchange,
        **record,
    )


def train(
    objects: Objects,
    config: Mapping[str, Any],
    folder: Path,
    world: World,
    stop: StopRequest,
    trial: Trial | None = None,
    accepted: Mapping[str, Any] | None = None,
    begun: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Train in `folder`, resuming from its newest checkpoint, and write the run's record.

    `accepted` are the splits whose changed content the user accepted; only the main process has
    them. The main process calls `begun` just before training. Returns the content of
    `summary.json`; its `status` is "completed" or "interrupted".
    """
    options, state = objects.options, objects.state
    writer = checkpoint.CheckpointWriter(
        folder / "checkpoints",
        options.checkpoint,
        options.mode,
        written=functools.partial(records.set_step, folder),
        is_main=world.is_main,
        writers=writers_of(world, options),
    )
    facts = go_on(state, writer, world)
    if facts and accepted:
        tell_position(state, accepted, facts)
    if world.is_main:
        (folder / WEIGHTS).unlink(missing_ok=True)  # outdated once this run trains longer
    record: Record = Silence()
    if world.is_main:
        record = loggers.open_loggers(
            folder,
            {n: instantiate({**node, "_partial_": True}) for n, node in config["logger"].items()},
            position=facts["metrics_bytes"] if facts else 0,
            resume_step=state.step if facts else None,
            run_name=f"{folder.parent.name}/{folder.name}",
            config=config,
        )
        begun()
    kept = {"checkpoints": writer, "record": record, "trial": trial}
    plan = plan_of(objects, config["seed"], world, stop, **kept)
    started = time.perf_counter()
    exit_code = 1
    try:
        with profiling(options, folder, world):
            status = loop.fit(state, plan)
        summary = summarise(status, state, options, started)
        if status == "completed" and state.progress.pruned:  # a pruned trial is not tested
            if world.is_main:
                write_summary(folder, summary)
        elif status == "completed":
            step = state.step
            if world.mesh is not None or "test" in objects.data.num_examples:
                step = take_best(state, folder, world)
            if world.mesh is not None:
                export_weights(state, folder, world)
            if "test" in objects.data.num_examples:
                summary["test"] = test_once(objects, plan, folder, step)
            if world.is_main:
                write_summary(folder, summary)
        exit_code = 0 if status == "completed" else loggers.KILLED
    except Interrupted:  # during the test; training is finished and saved
        summary = summarise("interrupted", state, options, started)
        exit_code = loggers.KILLED
    finally:
        writer.wait()
        record.close(exit_code)
        objects.data.close()
    return summary


def go_on(
    state: TrainState, writer: checkpoint.CheckpointWriter, world: World
) -> dict[str, Any] | None:
    """Load the newest complete checkpoint. Returns its manifest, or None if there is none.

    The main process finds it and broadcasts its name, so that all ranks read the same one.
    """
    loaded = None
    if world.is_main:
        loaded = checkpoint.load_newest(writer.folder, checkpoint.read)
    found = world.from_main(f"step_{loaded[1]['step']:08d}" if loaded else "")
    if not found:
        return None
    parts, facts = loaded or checkpoint.read(writer.folder / found)
    try:
        parts = checkpoint.fill(parts, writer.folder / found, world.mesh)
    except checkpoint.DamagedCheckpoint as damage:  # complete, but this torch cannot read it
        raise UserError(f"{damage}. To resume from the one before, move {found} away.") from None
    halvings = state.progress.halvings
    state.load_state_dict(parts)
    state.progress.halvings = max(halvings, state.progress.halvings)
    writer.saved = (state.step, state.progress.evaluated_step == state.step)
    if world.is_main:
        with contextlib.suppress(OSError):  # the run may have been killed before it rotated
            checkpoint.rotate(writer.folder, writer.options, writer.mode, written=state.step)
        manifest.set_step(writer.folder.parent, state.step)
    log.info("resuming from step %d (%s)", state.step, f"checkpoints/{found}")
    tell_of_another_rate(state)
    return facts


def tell_position(state: TrainState, accepted: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Log where the run resumes if the number of training examples has changed."""
    counts = [(it or {}).get("examples") for it in accepted.get("train", {}).values()]
    if len({*counts}) < 2:
        return
    log.warning(
        "training examples: %s then, %s now. Step %d is now step %d of %d in epoch %d. The "
        "checkpoint was saved in epoch %d; epochs count from 0.",
        *(*counts, state.step, state.step_in_epoch, state.steps_per_epoch, state.epoch),
        facts["epoch"],
    )


def tell_of_another_rate(state: TrainState) -> None:
    """Log if the schedule has changed since the save; a raised limit stretches a cosine."""
    if state.step == 0 or isinstance(state.schedule, Stateful):
        return
    parts = getattr(state.optimizer, "parts", [state.optimizer])
    if not any(part.state for part in parts):  # another optimizer: its rates do not compare
        return
    before = optim.rates(state.optimizer)["lr"]
    optim.set_lr(state.optimizer, state.schedule(state.step - 1))
    now = optim.rates(state.optimizer)["lr"]
    if not math.isclose(before, now):
        log.info(
            "the learning rate of step %d was %.3g and would now be %.3g: the schedule follows "
            "what was changed",
            *(state.step, before, now),
        )


def summarise(
    status: str, state: TrainState, options: TrainerOptions, started: float
) -> dict[str, Any]:
    progress = state.progress
    return {
        "status": status,
        "steps": state.step,
        "epochs": state.epoch,
        "best": {
            "metric": options.monitor,
            "value": progress.best_value,
            "step": state.step if options.monitor is None else progress.best_step,
        },
        "val": progress.latest if options.monitor is None else progress.best_values,
        "test": {},
        "pruned": progress.pruned,
        "stopped_early": loop.stopped_early(state, options),
        "evaluations_without_improvement": progress.evaluations_without_improvement,
        "skipped_steps": int(state.skips[0].item()),
        "empty_steps": int(state.empty_steps.item()),
        "parameters": sum(p.numel() for p in state.model.parameters()),
        "weights_sha256": weights_sha256(state.model),
        "seconds": progress.seconds,
        "seconds_of_this_part": time.perf_counter() - started,
    }


def take_best(state: TrainState, folder: Path, world: World) -> int:
    """Load the best weights into the model to evaluate, averaged ones if the run has them.

    Returns the step of those weights.
    """
    best = checkpoint.named(folder / "checkpoints", "best")
    name = world.from_main(best.name if best.exists() else "")
    if not name:
        return state.step
    best = best.with_name(name)
    try:
        parts, facts = checkpoint.read(best)
        of = "averaged" if "averaged" in parts else "model"
        weights = checkpoint.fill({of: parts[of]}, best, world.mesh)[of]
    except checkpoint.DamagedCheckpoint as damage:
        raise UserError(
            f"the best checkpoint cannot be tested: {damage}. The run is trained all the same; "
            f"test its final weights: "
            + command(f"run={folder}", "checkpoint=last", script="evaluate.py")
        ) from None
    state.evaluated.load_state_dict(sharding.as_in(weights, state.evaluated.state_dict()))
    log.info("testing the weights of step %d", facts["step"])
    if state.progress.best_step not in (None, facts["step"]):
        log.warning("the best weights, of step %s, were not saved", state.progress.best_step)
    step: int = facts["step"]
    return step


def export_weights(state: TrainState, folder: Path, world: World) -> None:
    """Write the tested weights of a sharded model as one file, for programs without sharding."""
    weights = {}
    for name, tensor in state.evaluated.state_dict().items():
        whole = sharding.whole(tensor)
        if world.is_main:
            weights[name] = whole.cpu() if isinstance(whole, torch.Tensor) else whole
    if world.is_main:
        with whole_file(folder / WEIGHTS) as file:
            torch.save(weights, file)


def test_once(objects: Objects, plan: Plan, folder: Path, step: int) -> dict[str, float]:
    """Measure the test split once, with the weights of `step` that `take_best` has loaded."""
    options, state = objects.options, objects.state
    batches = objects.data.evaluation(
        "test", device=plan.world.device, rank=plan.world.rank, world_size=plan.world.size
    )
    # Not `evaluate`: saved weights already are a schedule-free optimizer's evaluation weights.
    plan.world.copy_buffers(state.evaluated)
    waited = stopping_together(batches, len(batches), plan.stop, plan.world)
    bar = evaluation_bar("test", batches, options.progress_bar and plan.world.is_main)
    draws = Draws(plan.seed, "test", step, plan.world.rank)
    measured, details = measure(
        state.evaluated, plan.task, waited, plan.world, options.precision, bar, draws
    )
    sharding.free(state.evaluated)
    values = {f"test/{name}": value for name, value in measured.items()}
    plan.record.log(state.step, state.epoch, values)
    if plan.world.is_main:
        (folder / "plots").mkdir(exist_ok=True)
        records.write_json(folder / "plots" / "test.json", details)
    return values


def draw(folder: Path) -> None:
    """Draw the plots and the page of a finished run. A failure is only logged."""
    try:
        report.draw(folder)
    except Exception:
        log.warning("no pictures: the run itself is complete", exc_info=True)


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """Write a complete run's results. First removes the page of earlier ones: see `is_drawn`."""
    (folder / "report.html").unlink(missing_ok=True)
    records.write_json(folder / records.SUMMARY, summary)


def is_drawn(folder: Path) -> bool:
    """Return True if a complete run has its page, which is written last.

    File times cannot tell: a clock may be set back in between.
    """
    return (folder / "report.html").is_file()


def profiling(options: TrainerOptions, folder: Path, world: World) -> Any:
    """Return torch.profiler as a context that writes a trace to `folder`; for runs of few steps."""
    import contextlib

    if not (options.profile and world.is_main):
        return contextlib.nullcontext()
    from torch.profiler import profile

    def finish(profiler: Any) -> None:
        (folder / "profile").mkdir(exist_ok=True)
        profiler.export_chrome_trace(str(folder / "profile" / "trace.json"))
        table = profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=20)
        (folder / "profile" / "operators.txt").write_text(table, encoding="utf-8")
        log.info("profile: %s (open in a browser at ui.perfetto.dev)", folder / "profile")

    return profile(on_trace_ready=finish, profile_memory=True, with_stack=False)


def resolve_device(name: str, index: int = 0) -> torch.device:
    """Return the device for `name`; `auto` takes CUDA, then MPS, then the CPU.

    `index` is the local rank. Raises UserError if the machine lacks the device.
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if cuda else "mps" if mps else "cpu"
    if (name == "cuda" and not cuda) or (name == "mps" and not mps):
        raise UserError(
            f"trainer.device={name}: this machine has none that torch {torch.__version__} can use. "
            "Use trainer.device=auto or trainer.device=cpu."
        )
    if name == "cuda" and index >= torch.cuda.device_count():
        raise UserError(
            f"trainer.devices: process {index + 1} of this machine has no GPU of its own; there "
            f"are {torch.cuda.device_count()}. Start as many processes, or use trainer.device=cpu."
        )
    return torch.device(name, index) if name == "cuda" else torch.device(name)


def set_numerics(options: TrainerOptions, device: torch.device) -> None:
    """Set this process's switches that results and speed depend on."""
    if options.precision == "fp16" and device.type != "cuda":
        raise UserError(
            f"trainer.precision=fp16 needs CUDA, and the device is {device.type}. "
            "Use trainer.precision=bf16."
        )
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if options.compile and device.type == "cpu" and shutil.which(compiler) is None:
        raise UserError(
            f"trainer.compile=true needs a C++ compiler on a CPU, and there is no {compiler}. "
            "Install one, name it in CXX, or use trainer.compile=false."
        )
    torch.set_num_threads(options.num_threads or usable_cores())
    if options.keep_freed_memory and device.type == "cpu":
        memory.keep_freed_memory()
    torch.backends.cudnn.benchmark = options.cudnn_benchmark
    torch.set_float32_matmul_precision("high" if options.tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = options.tf32
    if options.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if torch.are_deterministic_algorithms_enabled() != options.deterministic:
        torch.use_deterministic_algorithms(options.deterministic)  # slow: imports the compiler
    torch.autograd.set_detect_anomaly(options.detect_anomaly)


def usable_cores() -> int:
    """Return the number of cores that this process may use, its share if it is one of several."""
    cores = manifest.cores()
    given = os.environ.get("SLURM_CPUS_PER_TASK")  # srun may not bind the task to its cores
    if given and int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        return min(cores, int(given))
    cores = min(cores, int(given)) if given else cores
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
