"""`train.py --check`: report what a run would be, without a run. Writes nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from regrow.config import flags, resume
from regrow.config.job import Job
from regrow.config.leads import RECIPES, shown
from regrow.config.origins import TYPED, Origins, origins
from regrow.config.targets import allow
from regrow.distributed.parallel import World
from regrow.dotted import leaves
from regrow.errors import UserError
from regrow.processes import ranks
from regrow.processes.interrupt import StopRequest
from regrow.protocols import Batch, Objects
from regrow.record import names
from regrow.record.records import load_status
from regrow.record.redact import redact
from regrow.runs import machine, training
from regrow.runs.banner import facts, what_is_odd
from regrow.runs.lab import lab

log = logging.getLogger("regrow")

DIRECT = 1e8  # parameters times examples of a micro-batch that is measured whole
FEW = (2, 4)  # examples of the two steps that stand for a larger one


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of a micro-batch in one process: operations, and bytes."""

    flops: float  # forward and backward; a multiplication and an addition are two
    activations: float  # the most that is saved for the backward pass at one time
    optimizer: int  # the optimizer's state


def report(job: Job) -> None:
    """Log what the job's run would be. Raises UserError for what a start would refuse."""
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
    threads = trainer["num_threads"] or machine.usable_cores()
    job = job.with_trainer(devices=count, num_threads=threads)
    world = World(device=device)
    objects = training.build(_alone(job.config, device), world)
    with contextlib.closing(objects.data):
        if job.config["data"].get("cache") is not None:
            objects.data.check_cache()
        if trainer["check_first_batch"] and not note:
            lab().check_first_batch(objects, world)
        for line in facts(job, objects, dataclasses.replace(world, size=count)):
            log.info("%s", line)
        for line in [*objects.data.notes, *what_is_odd(job.config, objects)]:
            log.warning("%s", line)
        if note:
            log.warning("%s", note)
        slices = trainer["accumulation_steps"]
        size = -(-job.config["data"]["batch_size"] // (count * slices))
        cost = measured(objects, job.config["seed"], world, size)
    shares = count if trainer["strategy"] == "fsdp" else 1
    log.info("%s", _memory(objects, cost, size, shares))
    flops = cost.flops * job.config["data"]["batch_size"] / size
    log.info("compute: %sFLOP per step, forward and backward, of matrix products and convolutions",
             _scaled(flops))  # fmt: skip
    log.info("folder: %s", _folder(job))
    for line in _differences(job):
        log.info("%s", line)


def _alone(config: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Return the config of a step in this process, in which nothing is compiled or captured."""
    trainer = dict(config["trainer"])
    trainer |= {"devices": 1, "accumulation_steps": 1, "compile": False, "capture": False}
    trainer |= {"profile": False, "progress_bar": False}
    if device.type != "cuda":
        trainer |= {"sync_batch_norm": False}
        trainer["precision"] = "bf16" if trainer["precision"] == "fp16" else trainer["precision"]
    data = {**config["data"], "num_workers": 0}
    if "cache" in data:
        data["cache"] = None  # which would be written
    return {**config, "trainer": trainer, "data": data}


# -- Cost of a step --------------------------------------------------------------------------------


def measured(objects: Objects, seed: int, world: World, size: int) -> Cost:
    """Return the cost of a micro-batch of `size` examples from one or two steps of training."""
    batch = next(iter(objects.train.epoch(0)))
    count = sum(p.numel() for p in objects.state.model.parameters())
    size = min(size, batch.num_local)
    if count * size <= DIRECT or size <= max(FEW):
        return _step(objects, seed, world, _first(batch, size))
    small, large = (_step(objects, seed, world, _first(batch, few)) for few in FEW)

    def at(of_small: float, of_large: float) -> float:
        slope = (of_large - of_small) / (FEW[1] - FEW[0])
        return of_small + slope * (size - FEW[0])

    return Cost(
        at(small.flops, large.flops), at(small.activations, large.activations), large.optimizer
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
    with FlopCounterMode(display=False) as counter, _saved(objects.state.model) as peak:
        plan.train_step(objects.state, batch, plan.step)
    optimizer: Any = objects.state.optimizer  # several by name, for several models
    each = optimizer.values() if isinstance(optimizer, Mapping) else [optimizer]
    tensors = [t for one in each for t in tree_leaves(one.state_dict()) if _is_tensor(t)]
    return Cost(counter.get_total_flops(), max(peak), sum(map(_bytes, tensors)))


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


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _memory(objects: Objects, cost: Cost, size: int, shares: int) -> str:
    """Return a line on the memory of a process: what the config implies, without the libraries."""
    model = objects.state.model
    parts = {
        "weights": sum(map(_bytes, [*model.parameters(), *model.buffers()])),
        "gradients": sum(map(_bytes, objects.parameters)),
        "optimizer": cost.optimizer,
    }
    if (averaged := getattr(objects.state, "averaged", None)) is not None:
        parts["average"] = sum(map(_bytes, [*averaged.parameters(), *averaged.buffers()]))
    parts = {name: -(-part // shares) for name, part in parts.items()}
    parts[f"activations of {size} examples"] = round(cost.activations)
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
    if (folder / resume.SWEEP).is_file():
        raise UserError(f"hydra.run.dir={folder} holds a sweep. Choose another folder.")
    if folder.is_dir():
        names.refuse_foreign_run(folder)
    return job.with_values(**resume.resumed(folder, job.config, job.overrides) or {})


def _folder(job: Job) -> str:
    if job.folder is None:
        return f"outputs/{job.config['name']}/<date>_<time>-<suffix>, a new one"
    folder = Path(job.folder)
    if resume.is_done(folder, job.config):
        return f"{folder}, whose run is complete"
    status = load_status(folder)
    return f"{folder}, resumed from step {status['step']}" if status else str(folder)


def _differences(job: Job) -> Iterator[str]:
    """Yield the choices and keys that differ from the shipped ones, each with its place."""
    source = job.source or flags.DEFAULT
    found = origins(source, job.overrides)
    usual = origins(source, [])
    changed = [
        (f"{group}={_option(option)}", found.chose(group))
        for group, option in found.choices.items()
        if option != usual.choices.get(group) and group.split("/")[0] != "hydra"
    ]
    kept = [
        f"{group}={option}"
        for group, option in found.choices.items()
        if isinstance(option, str) and group in usual.choices and group not in RECIPES
    ]
    before = leaves(_values(origins(source, [o for o in kept if not o.startswith("hydra/")])))
    for key, value in leaves(_values(found)).items():
        if key not in before or before[key] != value:
            old = f" instead of {_shown(before[key])}" if key in before else ""
            old = "" if "${" in old else old  # the default depends on other keys
            changed.append((f"{key}={_shown(value)}{old}", found.of(key, hops=0) or TYPED))
    yield "differs from the defaults:" + ("" if changed else " nothing")
    width = max((len(words) for words, _ in changed), default=0)
    for words, place in changed:
        yield f"  {words:<{min(width, 60)}}  {place}"


def _values(found: Origins) -> Mapping[str, Any]:
    return {key: value for key, value in found.config.items() if key != "resume"}


def _option(option: Any) -> str:
    return "null" if option is None else str(option).replace(" ", "").replace("'", "")


def _shown(value: Any) -> str:
    text = redact(shown(value).replace(", ", ","))
    return text if len(text) <= 40 else f"{text[:38]} …"
