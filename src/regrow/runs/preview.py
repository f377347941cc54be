"""`train.py --check`: report what a run would be, without a run. Writes nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from regrow.config import flags, places, resumed_config
from regrow.config.job import Job
from regrow.config.leads import RECIPES, shown
from regrow.config.origins import TYPED, composed, located_in, origins
from regrow.config.targets import allow
from regrow.distributed.parallel import World, synchronise_batch_norm
from regrow.dotted import Checked, leaves
from regrow.errors import UserError
from regrow.feeding.splits import GIVEN
from regrow.processes import ranks
from regrow.processes.interrupt import StopRequest
from regrow.project import CONF
from regrow.protocols import Batch, Objects
from regrow.record import names, ownership
from regrow.record.records import load_status
from regrow.record.redact import redact
from regrow.runs import first_calls, machine, training
from regrow.runs.banner import facts, unread_root, what_is_odd
from regrow.runs.lab import lab

log = logging.getLogger("regrow")

DIRECT = 1e8  # parameters times examples of a micro-batch that is measured whole
FEW = (2, 4)  # examples of the two steps that stand for a larger one, or for one example
MOST_NAMED = 10  # classes
FEW_EVALUATED = 8  # examples of the batch that the check of the first batch takes


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of a micro-batch in one process: operations, and bytes."""

    size: int  # its examples
    flops: float  # forward and backward; a multiplication and an addition are two
    activations: float  # the most that is saved for the backward pass at one time
    optimizer: int  # the optimizer's state


def report(job: Job) -> None:
    """Log what the job's run would be. Raises UserError for what a start would refuse."""
    try:
        _report(job)
    except UserError as error:  # as a start says it
        said = located_in(str(error), job.source or flags.DEFAULT, job.overrides)
        raise type(error)(said) from error.__cause__


def _report(job: Job) -> None:
    allow(job.config)
    if job.folder is not None:
        job = _resumed(job, Path(job.folder))
    trainer, note = job.config["trainer"], ""
    try:
        device = machine.resolve_device(trainer["device"])
        count = ranks.count_of(trainer)
    except UserError as error:  # a check may be made where the run will not be
        device, count, note = torch.device("cpu"), 1, f"{error} Measured on the CPU."
        if isinstance(trainer["devices"], int):
            count = trainer["devices"]
    unfit = "" if note else _unfit(trainer, device)
    threads = trainer["num_threads"] or machine.usable_cores()
    job = job.of_processes(count, threads)
    world = World(device=device)
    objects = training.build(_alone(job.config, device), world, job.folder)
    with contextlib.closing(objects.data):
        if job.config["data"].get("cache") is not None:
            objects.data.check_cache()
        split = count * trainer["accumulation_steps"]
        if trainer["check_first_batch"] and not note:
            position = objects.state.progress
            position.num_micro_batches = split  # a start refuses a micro-batch that is too small
            training.check_first_batch(objects, world)
            position.num_micro_batches = 1
        sizes = facts(job, objects, dataclasses.replace(world, size=count))
        for line in [*sizes, *_splits(job.config, objects), _choices(job)]:
            log.info("%s", line)
        odd = [*what_is_odd(job.config, objects), *unread_root(job)]
        for line in [*objects.data.notes, *odd, *filter(None, (note, unfit))]:
            log.warning("%s", line)
        batch = min(job.config["data"]["batch_size"], objects.train.num_examples)
        with first_calls.explained():
            cost = measured(objects, job.config["seed"], world, -(-batch // split))
    shares = count if trainer["strategy"] == "fsdp" else 1
    log.info("%s", _memory(objects, cost, shares))
    flops = cost.flops * batch / cost.size
    log.info("compute: %sFLOP per step, forward and backward, of matrix products and convolutions",
             _scaled(flops))  # fmt: skip
    log.info("folder: %s", _folder(job))
    for line in _differences(job):
        log.info("%s", line)


def _unfit(trainer: Checked, device: torch.device) -> str:
    """Return what a start on the device would refuse, of that which `_alone` leaves out; or ""."""
    try:
        machine.set_numerics(trainer, device)
        if trainer["sync_batch_norm"]:
            synchronise_batch_norm(nn.Sequential(), device)
    except UserError as error:
        return f"{error} A start here would fail."
    return ""


def _alone(config: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Return the config of a step in this process, in which nothing is compiled or captured."""
    trainer = dict(config["trainer"])
    trainer |= {"devices": 1, "accumulation_steps": 1, "compile": False, "capture": False}
    trainer |= {"profile": False, "progress_bar": False}
    if device.type != "cuda":
        trainer |= {"sync_batch_norm": False}
        trainer["precision"] = "bf16" if trainer["precision"] == "fp16" else trainer["precision"]
    data = {**config["data"], "num_workers": 0}
    data["eval_batch_size"] = min(data["eval_batch_size"], FEW_EVALUATED)
    if "cache" in data:
        data["cache"] = None  # which would be written
    return {**config, "trainer": trainer, "data": data}


def _splits(config: Mapping[str, Any], objects: Objects) -> Iterator[str]:
    """Yield a line with the classes, and one with where val and test come from."""
    if class_names := objects.data.class_names:
        more = f", … ({len(class_names)})" if len(class_names) > MOST_NAMED else ""
        yield f"classes: {', '.join(map(str, class_names[:MOST_NAMED]))}{more}"
    origins = getattr(getattr(objects.data, "source", None), "origins", {})
    found = {name: how for name, how in origins.items() if name in objects.data.num_examples}
    if found:
        seed = config["data"]["source"].get("seed")
        drawn = seed is not None and any(how != GIVEN for how in found.values())
        more = f"; data.source.seed={seed} draws them" * drawn
        yield f"splits: {', '.join(f'{name} is {how}' for name, how in found.items())}{more}"


def _choices(job: Job) -> str:
    """Return the chosen options, also those that are the default."""
    named = ("data", "task", "loss", "model", "optimizer", "scheduler")
    return "chosen: " + " ".join(
        f"{n}={_option(job.choices[n])}" for n in named if n in job.choices
    )


# -- Cost of a step --------------------------------------------------------------------------------


def measured(objects: Objects, seed: int, world: World, size: int) -> Cost:
    """Return the cost of a micro-batch of `size` examples from one or two steps of training.

    It has fewer examples if the training split has. One example is not measured itself where there
    are more: BatchNorm cannot train on one.
    """
    batch = next(iter(objects.train.epoch(0)))
    count = sum(p.numel() for p in objects.state.model.parameters())
    size = min(size, batch.num_local)
    is_small = count * size <= DIRECT or size <= max(FEW)
    if batch.num_local < max(FEW):
        size, is_small = max(size, min(FEW[0], batch.num_local)), True
    if is_small and (size > 1 or batch.num_local == 1):
        return _step(objects, seed, world, _first(batch, size))
    small, large = (_step(objects, seed, world, _first(batch, few)) for few in FEW)

    def at(of_small: float, of_large: float) -> float:
        slope = (of_large - of_small) / (large.size - small.size)
        return of_small + slope * (size - small.size)

    return Cost(
        size,
        at(small.flops, large.flops),
        at(small.activations, large.activations),
        large.optimizer,
    )


def _first(batch: Any, size: int) -> Batch:
    """Return the first `size` examples of a batch."""
    parts: list[Any] = batch.split(-(-batch.num_local // size))
    part = parts[0]
    part.num_global = part.num_local
    return part  # type: ignore[no-any-return]


def _step(objects: Objects, seed: int, world: World, batch: Batch) -> Cost:
    nothing: dict[str, Any] = {"record": None, "checkpoints": None, "trial": None}
    plan: Any = lab().plan_of(objects, seed, world, StopRequest(), **nothing)
    optimizer: Any = objects.state.optimizer  # several by name, for several models
    each = [*optimizer.values()] if isinstance(optimizer, Mapping) else [optimizer]
    counter = FlopCounterMode(display=False)
    with _of_updates(each, counter) as updates, counter, _saved(objects.state.model) as peak:
        plan.train_step(objects.state, batch, plan.step)
    kept = [leaf for one in each for leaf in tree_leaves(one.state_dict())]
    size = sum(leaf.nbytes for leaf in kept if isinstance(leaf, Tensor) and leaf.ndim > 0)
    flops = counter.get_total_flops() - sum(updates)
    return Cost(batch.num_local, flops, max(peak), size)


@contextlib.contextmanager
def _of_updates(optimizers: Sequence[Any], counter: FlopCounterMode) -> Iterator[list[int]]:
    """Yield the operations of the optimizers' updates, such as Muon's, whose number is fixed.

    Those of an update that is given a closure count as forward and backward.
    """
    spent: list[int] = []

    def counted(step: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*given: Any, **named: Any) -> Any:
            before = counter.get_total_flops()
            result = step(*given, **named)
            if not given and not named:
                spent.append(counter.get_total_flops() - before)
            return result

        return wrapped

    own = [vars(optimizer).get("step") for optimizer in optimizers]
    for optimizer in optimizers:
        optimizer.step = counted(optimizer.step)
    try:
        yield spent
    finally:
        for optimizer, step in zip(optimizers, own, strict=True):
            if step is None:
                del optimizer.step
            else:
                optimizer.step = step


@contextlib.contextmanager
def _saved(model: nn.Module) -> Iterator[list[int]]:
    """Yield the bytes that are saved for the backward pass, after each tensor that is saved."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    held: dict[int, int] = {}  # how often a storage is saved
    sizes = [0]

    def release(storage: int, size: int) -> None:
        held[storage] -= 1
        if not held[storage]:
            sizes.append(sizes[-1] - size)

    def pack(tensor: Tensor) -> Any:
        storage = tensor.untyped_storage()
        place = storage.data_ptr()
        kept = _Kept(tensor)
        if place and place not in own:
            size = storage.nbytes()
            held[place] = held.get(place, 0) + 1
            if held[place] == 1:
                sizes.append(sizes[-1] + size)
            weakref.finalize(kept, release, place, size)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        yield sizes


class _Kept:
    """A saved tensor, whose end can be observed."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _memory(objects: Objects, cost: Cost, shares: int) -> str:
    """Return a line on the memory of a process: what the config implies, without the libraries."""
    model = objects.state.model
    parts = {
        "weights": sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())),
        "gradients": sum(parameter.nbytes for parameter in objects.parameters),
        "optimizer": cost.optimizer,
    }
    if (averaged := getattr(objects.state, "averaged", None)) is not None:
        parts["average"] = sum(t.nbytes for t in (*averaged.parameters(), *averaged.buffers()))
    parts = {name: -(-part // shares) for name, part in parts.items()}
    parts[f"activations of {cost.size} examples"] = round(cost.activations)
    named = ", ".join(f"{name} {_scaled(part)}B" for name, part in parts.items())
    return f"memory: about {_scaled(sum(parts.values()))}B per process: {named}"


def _scaled(number: float) -> str:
    """Return a number with three digits and a prefix of a thousand, such as `1.23 M`."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if number < 999.5 or prefix == "P":
            break
        number /= 1000
    return f"{number:.3g} {prefix}"


# -- Folder and config -----------------------------------------------------------------------------


def _resumed(job: Job, folder: Path) -> Job:
    """Return the job as it would resume the run in `folder`, if there is one. Writes nothing."""
    if (folder / ownership.SWEEP).is_file():
        raise UserError(f"hydra.run.dir={folder} holds a sweep. Choose another folder.")
    if folder.is_dir():
        names.refuse_foreign_run(folder)
    return job.resuming(resumed_config.resumed(folder, job.config, job.overrides))


def _folder(job: Job) -> str:
    if job.folder is None:
        return f"outputs/{job.config['name']}/<date>_<time>-<suffix>, a new one"
    folder = Path(job.folder)
    if resumed_config.is_done(folder, job.config):
        return f"{folder}, whose run is complete"
    status = load_status(folder)
    return f"{folder}, resumed from step {status['step']}" if status else str(folder)


def _differences(job: Job) -> Iterator[str]:
    """Yield the choices and keys that differ from the shipped ones, each with its place."""
    source = job.source or flags.DEFAULT
    found = origins(source, job.overrides)
    shipped = _shipped(source)
    _, usual = composed(shipped, ["~local"])
    changed = [
        (f"{group}={_option(option)}", found.chose(group))
        for group, option in found.choices.items()
        if option != usual.get(group) and group.split("/")[0] not in ("hydra", "local")
    ]
    kept = [
        f"{group}={option}"
        for group, option in found.choices.items()
        if isinstance(option, str) and group in usual and group not in RECIPES
    ]
    kept = ["~local", *(choice for choice in kept if not choice.startswith("hydra/"))]
    before = leaves(_values(composed(shipped, kept)[0]))
    now = leaves(_values(found.config))
    typed = {override.partition("=")[0] for override in job.overrides}
    changed += [(f"~{key}", TYPED) for key in before if key not in now and f"~{key}" in typed]
    for key, value in now.items():
        if key not in before or before[key] != value:
            old = f" instead of {_shown(before[key])}" if key in before else ""
            old = "" if "${" in old else old  # the default depends on other keys
            changed.append((f"{key}={_shown(value)}{old}", found.of(key, hops=0) or TYPED))
    yield "differs from the defaults:" + ("" if changed else " nothing")
    width = max((len(words) for words, _ in changed), default=0)
    for words, place in changed:
        yield f"  {words:<{min(width, 60)}}  {place}"


def _shipped(source: Mapping[str, Any]) -> dict[str, Any]:
    """Return the source of the defaults: conf/train.yaml, with the options of the given places."""
    own = [] if source["path"] is None else [source["path"]]
    own += [str(folder) for folder in places.folders() if folder != CONF]  # a file may add some
    searched = [place if "://" in place else f"file://{place}" for place in own]
    searched = list(dict.fromkeys([*source["searchpath"], *searched]))
    return {**source, "name": "train", "path": None, "searchpath": searched}


def _values(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return {key: value for key, value in config.items() if key != "resume"}


def _option(option: Any) -> str:
    return "null" if option is None else str(option).replace(" ", "").replace("'", "")


def _shown(value: Any) -> str:
    text = redact(shown(value).replace(", ", ","))
    return text if len(text) <= 40 else f"{text[:38]} …"
