"""Train the objects that the lab builds to a finished run, and write its record."""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from regrow import phases
from regrow.checkpoint import writer
from regrow.checkpoint.digest import weights_sha256
from regrow.config.command_line import command
from regrow.config.targets import instantiate
from regrow.distributed import sharding
from regrow.distributed.parallel import World
from regrow.dotted import Checked
from regrow.errors import UserError
from regrow.feeding.files import shown, without_gone
from regrow.processes.interrupt import Interrupted, StopRequest
from regrow.protocols import Objects, Record, Settings, State, Trial
from regrow.randomness import Draws
from regrow.record import loggers, manifest, pictures, records, report
from regrow.record.output import whole_file
from regrow.runs import first_calls
from regrow.runs.first_steps import FirstSteps
from regrow.runs.lab import lab
from regrow.runs.machine import set_numerics
from regrow.runs.other_code import naming_code

log = logging.getLogger(__name__)

WEIGHTS = "weights.pt"


def build(config: Checked, world: World, folder: str | None = None) -> Objects:
    """Set this process's switches, and return the objects of a run. Writes nothing.

    `folder` is the one that the run is resumed in, if it holds one: see `files.without_gone`.
    """
    set_numerics(config["trainer"], world.device)
    if folder is not None:
        data = without_gone(config["data"], Path(folder), tells=world.is_main)
        config = {**config, "data": data}
    with first_calls.explained():
        try:
            return lab().build(config, world)
        except torch.OutOfMemoryError:
            raise UserError(
                f"trainer.device={config['trainer']['device']}: {world.device} has no room for the "
                "model and the data. Use a smaller model or less data, or end other programs that "
                "use it, which nvidia-smi lists."
            ) from None


def check_first_batch(objects: Objects, world: World) -> None:
    """Raise UserError if model, task and data do not fit together. Leaves the run unchanged."""
    with first_calls.explained():
        lab().check_first_batch(objects, world)


class Silence:
    """The record of a rank that writes none."""

    def log(self, step: int, epoch: int, values: Mapping[str, float]) -> None: ...
    def log_histograms(self, step: int, tensors: Mapping[str, torch.Tensor]) -> None: ...
    def image(self, name: str, image: object, *, step: int) -> None: ...
    def position(self) -> int:
        return 0

    def sync(self, position: int) -> None: ...
    def close(self, exit_code: int = 0) -> None: ...


def writers_of(world: World, options: Settings) -> Any:
    """Return the group of ranks that writes a sharded checkpoint; None if nothing is sharded."""
    if world.mesh is None:
        return None
    from regrow.checkpoint.sharded import Writers  # takes a second to import

    return Writers(timedelta(seconds=options.timeout_seconds))


def train(
    objects: Objects,
    config: Mapping[str, Any],
    folder: Path,
    world: World,
    stop: StopRequest,
    trial: Trial | None = None,
    accepted: Mapping[str, Any] | None = None,
    begun: Callable[[], None] = lambda: None,
    watch: FirstSteps | None = None,
) -> dict[str, Any]:
    """Train in `folder`, resuming from its newest checkpoint, and write the run's record.

    `accepted` are the splits whose changed content the user accepted; only the main process has
    them. The main process calls `begun` just before training. `watch` sees each step. Returns the
    content of `summary.json`; its `status` is "completed" or "interrupted".
    """
    options, state = objects.options, objects.state
    checkpoints = writer.CheckpointWriter(
        folder / "checkpoints",
        options.checkpoint,
        options.mode,
        written=functools.partial(records.set_step, folder),
        is_main=world.is_main,
        writers=writers_of(world, options),
    )
    facts = restore(state, checkpoints, world)
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
    plan = lab().plan_of(
        *(objects, config["seed"], world, stop), record=record, checkpoints=checkpoints, trial=trial
    )
    if watch is not None:
        plan = watch.over(plan)
    started, first = time.perf_counter(), state.step
    exit_code = 1
    try:
        with profiling(options, folder, world), first_calls.explained(lambda: state.step == first):
            status = lab().fit(state, plan)
        if watch is not None and status == "completed":
            watch.conclude()
        summary = summary_of(status, objects, started)
        if status == "completed" and not state.progress.pruned:  # a pruned trial is not tested
            measure_final(objects, config["seed"], folder, world, stop, record, summary)
        if status == "completed" and world.is_main:
            write_summary(folder, summary)
        exit_code = 0 if status == "completed" else loggers.KILLED
    except Interrupted:  # during the test; training is finished and saved
        summary = summary_of("interrupted", objects, started)
        exit_code = loggers.KILLED
    finally:
        checkpoints.wait()
        record.close(exit_code)
        objects.data.close()
    return summary


def restore(
    state: State, checkpoints: writer.CheckpointWriter, world: World
) -> dict[str, Any] | None:
    """Load the newest complete checkpoint. Returns its manifest, or None if there is none.

    The main process finds it and broadcasts its name, so that all ranks read the same one.
    """
    loaded = None
    if world.is_main:
        loaded = writer.load_newest(checkpoints.folder, writer.read)
    found = world.from_main(f"step_{loaded[1]['step']:08d}" if loaded else "")
    if not found:
        return None
    parts, facts = loaded or writer.read(checkpoints.folder / found)
    try:
        parts = writer.fill(parts, checkpoints.folder / found, world.mesh)
    except writer.DamagedCheckpoint as damage:  # complete, but this torch cannot read it
        raise UserError(f"{damage}. To resume from the one before, move {found} away.") from None
    least = state.progress.num_micro_batches
    with naming_code(checkpoints.folder.parent):
        state.load_state_dict(parts)
    state.progress.num_micro_batches = max(least, state.progress.num_micro_batches)
    checkpoints.saved = (state.step, state.progress.evaluated_step == state.step)
    if world.is_main:
        with contextlib.suppress(OSError):  # the run may have been killed before it rotated
            writer.rotate(
                checkpoints.folder, checkpoints.options, checkpoints.mode, written=state.step
            )
        manifest.set_step(checkpoints.folder.parent, state.step)
    log.info("resuming from step %d (%s)", state.step, f"checkpoints/{found}")
    return facts


def tell_position(state: State, accepted: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
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


def summary_of(status: str, objects: Objects, started: float) -> dict[str, Any]:
    """Return the content of summary.json; a set that was not measured has no values."""
    state, options = objects.state, objects.options
    said = lab().summary(state, options)
    sets = (name for name in objects.data.num_examples if name != "train")
    return {
        "status": status,
        **said,
        **{name: {} for name in sets if name not in said},
        "weights_sha256": weights_sha256(state.model),
        "seconds": state.progress.seconds,
        "seconds_of_this_part": time.perf_counter() - started,
    }


def take_best(state: State, folder: Path, world: World) -> int:
    """Load the best weights into the model to evaluate, averaged ones if the run has them.

    Returns the step of those weights.
    """
    best = writer.named(folder / "checkpoints", "best")
    name = world.from_main(best.name if best.exists() else "")
    if not name:
        return state.step
    best = best.with_name(name)
    try:
        parts, facts = writer.read(best)
        of = writer.evaluated_part(parts, state.evaluates)
        weights = writer.fill({of: parts[of]}, best, world.mesh)[of]
    except writer.DamagedCheckpoint as damage:
        raise UserError(
            f"the best checkpoint cannot be tested: {damage}. The run is trained anyway; "
            f"test its final weights: "
            + command(f"run={folder}", "checkpoint=last", script="evaluate.py")
        ) from None
    state.evaluated.load_state_dict(sharding.as_in(weights, state.evaluated.state_dict()))
    log.info("testing the weights of step %d", facts["step"])
    if state.progress.best_step not in (None, facts["step"]):
        log.warning("the best weights, of step %s, were not saved", state.progress.best_step)
    step: int = facts["step"]
    return step


def export_weights(state: State, folder: Path, world: World) -> None:
    """Write the tested weights of a sharded model as one file, for programs without sharding."""
    weights = {}
    for name, tensor in state.evaluated.state_dict().items():
        whole = sharding.whole(tensor)
        if world.is_main:
            weights[name] = whole.cpu() if isinstance(whole, torch.Tensor) else whole
    if world.is_main:
        with whole_file(folder / WEIGHTS) as file:
            torch.save(weights, file)


def measure_final(
    objects: Objects,
    seed: int,
    folder: Path,
    world: World,
    stop: StopRequest,
    record: Record,
    summary: dict[str, Any],
) -> None:
    """Measure the final sets with the best weights, and add their values to `summary`."""
    state, step = objects.state, objects.state.step
    if world.mesh is not None or objects.data.final:
        step = take_best(state, folder, world)
    if world.mesh is not None:
        export_weights(state, folder, world)
    for name in objects.data.final:
        draws = Draws(seed, name, step, world.rank)
        summary[name], details = measure_once(objects, name, world, stop, draws)
        record.log(state.step, state.epoch, summary[name])
        if name == "test" and objects.data.folds is not None:
            from regrow.runs import set_predictions

            set_predictions.write(folder, objects, name, world, stop, draws)
        if world.is_main:
            (folder / "plots").mkdir(exist_ok=True)
            records.write_json(folder / "plots" / f"{name}.json", details)


def measure_once(
    objects: Objects, name: str, world: World, stop: StopRequest, draws: Draws
) -> tuple[dict[str, float], Mapping[str, Any]]:
    """Measure a set with the weights that `take_best` has loaded: values and details."""
    options = objects.options
    batches = objects.data.evaluation(
        name, device=world.device, rank=world.rank, world_size=world.size
    )
    # Saved weights already are a schedule-free optimizer's evaluation weights.
    values, details = lab().measure_split(
        *(objects.state.evaluated, objects.task, batches, world, options.precision, draws),
        stop=stop,
        bar=name if options.progress_bar and world.is_main else None,
    )
    details = pictures.in_the_set(
        details,
        batches.start_of,
        lambda: [shown(one) if isinstance(one, str) else one for one in objects.data.ids(name)],
        world.gather_texts,
    )
    return {f"{name}/{key}": value for key, value in values.items()}, details


def draw(folder: Path) -> None:
    """Draw the plots and the page of a finished run. A failure is only logged."""
    try:
        report.draw(folder)
    except Exception:
        log.warning("no plots and no report: the run itself is complete", exc_info=True)


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """Write a complete run's results. First removes the page of earlier ones: see `is_drawn`."""
    (folder / "report.html").unlink(missing_ok=True)
    records.write_json(folder / records.SUMMARY, summary)


def is_drawn(folder: Path) -> bool:
    """Return True if a complete run has its page, which is written last.

    File times cannot tell: a clock may be set back in between.
    """
    return (folder / "report.html").is_file()


@contextlib.contextmanager
def profiling(options: Settings, folder: Path, world: World) -> Iterator[None]:
    """Measure what runs inside, if `trainer.profile` asks for it; for runs of few steps.

    Logs where the time goes, and writes that table, torch's trace and its table of operators to
    `folder/profile`.
    """
    if not (options.profile and world.is_main):
        yield
        return
    from torch.profiler import profile

    is_cuda = world.device.type == "cuda"
    wait = functools.partial(torch.cuda.synchronize, world.device) if is_cuda else lambda: None
    # torch 2.11 warns, even of a single cycle, if events are not accumulated.
    profiler = profile(profile_memory=True, with_stack=False, acc_events=True)
    measured = phases.Phases(wait)
    try:
        with profiler, phases.measured(measured):
            yield
    finally:  # also of a run that fails
        _write_profile(profiler, measured, folder, is_cuda=is_cuda)


def _write_profile(profiler: Any, measured: phases.Phases, folder: Path, *, is_cuda: bool) -> None:
    events = profiler.key_averages()
    lines = [*measured.lines(), "", *top_operators(events, is_cuda=is_cuda)]
    (folder / "profile").mkdir(exist_ok=True)
    profiler.export_chrome_trace(str(folder / "profile" / "trace.json"))
    table = events.table(sort_by="self_cpu_time_total", row_limit=20)
    (folder / "profile" / "operators.txt").write_text(table, encoding="utf-8")
    (folder / "profile" / "phases.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for line in lines:
        log.info("%s", line)
    log.info("profile: %s (open trace.json at ui.perfetto.dev)", folder / "profile")


def top_operators(events: Any, *, is_cuda: bool) -> list[str]:
    """Return a table of the ten operators with the most self time, on a GPU by the time there."""
    kind = "self_device_time_total" if is_cuda else "self_cpu_time_total"
    seconds = {event.key: getattr(event, kind) / 1e6 for event in events}
    calls = {event.key: event.count for event in events}
    total = sum(seconds.values()) or 1.0
    rows = sorted(seconds, key=lambda key: -seconds[key])[:10]
    return ["self time of operators          seconds    share   calls"] + [
        f"{key[:30]:<30} {seconds[key]:>8.3f} {100 * seconds[key] / total:>6.1f} % {calls[key]:>7}"
        for key in rows
    ]
