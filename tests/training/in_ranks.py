"""Computations of several processes, for test_ranks.py: each process writes its results."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import os
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from lab import loop, step
from lab.build import plan_of
from lab.step import forward
from lab.tasks.metrics import Metrics as Measured
from lab.tasks.metrics import (
    binary_metrics,
    language_metrics,
    multiclass_metrics,
    regression_metrics,
)
from regrow.checkpoint.digest import weights_sha256
from regrow.checkpoint.sharded import Writers
from regrow.checkpoint.writer import CheckpointFacts, CheckpointWriter
from regrow.config.targets import allow
from regrow.distributed.parallel import World, stopping_together
from regrow.distributed.sharding import whole
from regrow.feeding.batch import share
from regrow.feeding.tokens import IGNORED
from regrow.numerics import totals
from regrow.numerics.totals import Totals
from regrow.processes.interrupt import Interrupted, StopRequest
from regrow.randomness import Draws
from regrow.runs import training

Config = dict[str, Any]
BATCH = 2  # per evaluation batch


def together(
    size: int, config: Config, folder: Path, checks: tuple[str, ...] = ()
) -> list[dict[str, Any]]:
    """Return the results of each of `size` processes, by rank; all checks by default."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    mp.spawn(part, args=(size, store.port, config, folder, checks), nprocs=size, join=True)
    return [torch.load(folder / f"{rank}.pt") for rank in range(size)]


def joined(rank: int, size: int, port: int) -> World:
    """Join as one of `size` processes, quiet and with one thread."""
    torch.set_num_threads(1)
    logging.disable(logging.INFO)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    return World(device=torch.device("cpu"), rank=rank, size=size, store=store)


def part(
    rank: int, size: int, port: int, config: Config, folder: Path, checks: tuple[str, ...]
) -> None:
    world = joined(rank, size, port)
    allow(config)  # as the rank of a run does
    torch.save(
        {name: CHECKS[name](world, config, folder) for name in checks or CHECKS},
        folder / f"{rank}.pt",
    )
    dist.barrier()
    os._exit(0)  # as real runs end: the threads of a process group may crash at exit


def trained(world: World, config: Config, folder: Path, **changes: Any) -> dict[str, Any]:
    """Train six steps. Return the weights, and the loss and norm of each step."""
    objects = training.build({**config, "trainer": {**config["trainer"], **changes}}, world)
    saved = SimpleNamespace(saved=None)
    plan = plan_of(objects, 0, world, StopRequest(), record=None, checkpoints=saved)
    return steps(objects, plan)


def steps(objects: Any, plan: Any, last: int = 6, *, whole_weights: bool = True) -> dict[str, Any]:
    state, seen = objects.state, []
    while state.step < last:
        for batch in objects.train.epoch(state.epoch, state.step_in_epoch):
            result = plan.train_step(state, batch, plan.step)
            state.progress.step += 1
            loss, _, weight, examples = result.totals.read()
            seen.append((loss / weight, float(result.grad_norm), examples))
            if state.step == last:
                break
    weights = state.model.state_dict() if whole_weights else {}
    weights = {name: whole(tensor).clone() for name, tensor in weights.items()}
    return {"weights": weights, "seen": seen, "skipped": int(state.skips[0])}


def trained_in_slices(world: World, config: Config, folder: Path) -> dict[str, Any]:
    return trained(world, config, folder, accumulation_steps=3)


def trained_with_sums_on_device(world: World, config: Config, folder: Path) -> dict[str, Any]:
    """As on a device where reading a number is a wait; a CPU replaces it."""
    on_host = totals.on_host
    totals.on_host = lambda device: False
    try:
        return trained(world, config, folder, accumulation_steps=3)
    finally:
        totals.on_host = on_host


def trained_as_if_alone(world: World, config: Config, folder: Path) -> dict[str, Any]:
    """The broken variant: the mean over processes, as if each had as many examples."""

    def mean(losses: Tensor, state: Any, batch: Any) -> None:
        torch.autograd.backward(losses.sum() / max(1, batch.num_local) / world.size)

    backward = step.backward
    step.backward = mean
    try:
        return trained(world, config, folder)
    finally:
        step.backward = backward


def sharded(world: World) -> World:
    return dataclasses.replace(world, mesh=init_device_mesh("cpu", (world.size,)))


def trained_sharded(world: World, config: Config, folder: Path) -> dict[str, Any]:
    return trained(sharded(world), config, folder, ema_decay=0.9)


def trained_sharded_in_slices(world: World, config: Config, folder: Path) -> dict[str, Any]:
    units = {**config["trainer"]["fsdp"], "modules": ["body.0"], "reshard_after_forward": False}
    changes = {"accumulation_steps": 3, "activation_checkpointing": ["body.*"]}
    return trained(sharded(world), config, folder, fsdp=units, **changes)


def trained_in_bf16(world: World, config: Config, folder: Path) -> dict[str, Any]:
    """Gathered and computed in bf16, summed and updated in fp32."""
    policy = {**config["trainer"]["fsdp"], "param_dtype": "bf16", "reduce_dtype": "fp32"}
    seen = trained(sharded(world), config, folder, fsdp=policy)
    autocast = trained(sharded(world), config, folder, fsdp=policy, precision="bf16")
    return {**seen, "autocast": autocast["seen"]}


def sharded_with_a_nan(world: World, config: Config, folder: Path) -> dict[str, Any]:
    return trained_with_a_nan(sharded(world), config, folder)


def saved_sharded(world: World, config: Config, folder: Path) -> dict[str, Any]:
    """Three steps, a checkpoint, and three more steps from it in new objects."""
    world = sharded(world)
    trainer = {**config["trainer"], "ema_decay": 0.9}
    options = training.instantiate(trainer["checkpoint"])
    writers = Writers(timedelta(seconds=60))

    def new() -> tuple[Any, Any]:
        objects = training.build({**config, "trainer": trainer}, world)
        writer = CheckpointWriter(
            folder / "saved", options, "max", is_main=world.is_main, writers=writers
        )
        return objects, plan_of(objects, 0, world, StopRequest(), record=None, checkpoints=writer)

    objects, plan = new()
    steps(objects, plan, 3)
    facts = CheckpointFacts(step=3, epoch=0, value=None, milestone=False, metrics_bytes=0)
    plan.checkpoints.save(objects.state.state_dict(), facts, lambda position: None)
    whole_model = {k: whole(v).clone() for k, v in objects.state.model.state_dict().items()}
    assert plan.checkpoints.wait()
    objects, plan = new()
    training.restore(objects.state, plan.checkpoints, world)
    assert objects.state.step == 3
    return {"at three": whole_model, **steps(objects, plan)}


def leg(world: World, config: Config, folder: Path, last: int) -> list[tuple[float, float, int]]:
    """Run from the newest checkpoint to step `last`, and save the next one there."""
    objects = training.build(config, world)
    writers = Writers(timedelta(seconds=60)) if world.mesh is not None else None
    writer = CheckpointWriter(
        folder / "relay",
        training.instantiate(config["trainer"]["checkpoint"]),
        "max",
        is_main=world.is_main,
        writers=writers,
    )
    plan = plan_of(objects, 0, world, StopRequest(), record=None, checkpoints=writer)
    training.restore(objects.state, writer, world)
    seen: list[tuple[float, float, int]] = steps(objects, plan, last)["seen"]
    facts = CheckpointFacts(step=last, epoch=0, value=None, milestone=False, metrics_bytes=0)
    if writer.writes:
        writer.save(objects.state.state_dict(), facts, lambda position: None)
    assert writer.wait()
    world.barrier()
    return seen


def relayed(world: World, config: Config, folder: Path) -> list[tuple[float, float, int]]:
    """Steps of a run that one process started: two with FSDP, and one with DDP."""
    return [*leg(sharded(world), config, folder, 4), *leg(world, config, folder, 5)]


WIDTH = 512
# Sharding, micro-batches, options of FSDP.
COMMUNICATING: dict[str, tuple[bool, int, dict[str, Any]]] = {
    "ddp": (False, 1, {}),
    "ddp, 4 slices": (False, 4, {}),
    "fsdp": (True, 1, {}),
    "fsdp, kept gathered": (True, 1, {"reshard_after_forward": False}),
    "fsdp, gathered in bf16": (True, 1, {"param_dtype": "bf16", "reduce_dtype": "fp32"}),
    "fsdp, 4 slices": (True, 4, {}),
}


def communicated(
    world: World, config: Config, sent: Callable[[], int], count: int
) -> dict[str, float]:
    """By case: the `sent` bytes of each of `count` steps, over the parameters' bytes in fp32."""
    found = {}
    for name, (is_sharded, slices, fsdp) in COMMUNICATING.items():
        trainer = {**config["trainer"], "accumulation_steps": slices}
        trainer["fsdp"] = {**trainer["fsdp"], "modules": ["body.*"], **fsdp}
        its = sharded(world) if is_sharded else world
        objects = training.build({**config, "trainer": trainer}, its)
        saved = SimpleNamespace(saved=None)
        plan = plan_of(objects, 0, its, StopRequest(), record=None, checkpoints=saved)
        steps(objects, plan, 2, whole_weights=False)  # connections are made and buckets rebuilt
        before = by_now(sent)
        steps(objects, plan, 2 + count, whole_weights=False)
        parameters = sum(p.numel() for p in objects.state.model.parameters())
        found[name] = (by_now(sent) - before) / count / (4 * parameters)
    return found


def by_now(sent: Callable[[], int]) -> int:
    """Return the bytes sent so far, at an instant when no process sends."""
    dist.barrier()
    count = sent()
    dist.barrier()  # nobody continues before all have read the counter
    return count


def sent_by_this_process() -> int:
    """The kernel's byte count of each of its connections: tcpi_bytes_sent, linux/tcp.h"""
    total = 0
    for descriptor in [*Path("/proc/self/fd").iterdir()]:
        with contextlib.suppress(OSError):  # closed meanwhile, or not TCP
            if str(descriptor.readlink()).startswith("socket:"):
                with socket.socket(fileno=os.dup(int(descriptor.name))) as connection:
                    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 208)
                total += struct.unpack_from("Q", info, 200)[0]
    return total


def sent(world: World, config: Config, folder: Path) -> dict[str, float]:
    if sys.platform != "linux":
        return {}
    wide = {**config, "model": {**config["model"], "hidden": [WIDTH, WIDTH]}}
    return communicated(world, wide, sent_by_this_process, 2)


def trained_with_a_nan(world: World, config: Config, folder: Path) -> dict[str, Any]:
    """A NaN in one example, in the last process's share."""
    objects = training.build(config, world)
    saved = SimpleNamespace(saved=None)
    plan = plan_of(objects, 0, world, StopRequest(), record=None, checkpoints=saved)
    before = {n: whole(t).clone() for n, t in objects.state.model.state_dict().items()}
    batch = next(objects.train.epoch(0, 0))
    if world.rank == world.size - 1:
        batch.inputs = batch.inputs.clone()
        batch.inputs[0, 0] = float("nan")
    plan.train_step(objects.state, batch, plan.step)
    after = objects.state.model.state_dict()
    return {
        "skipped": int(objects.state.skips[0]),
        "moved": any(not torch.equal(before[name], whole(after[name])) for name in before),
        "moments": len(objects.state.optimizer.state),
    }


def rows(kind: str, count: int) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(count)
    if kind == "multiclass":
        return torch.randn(count, 3, generator=source), torch.randint(3, (count,), generator=source)
    if kind == "language":
        targets = torch.randint(-1, 4, (count, 3), generator=source)
        outputs = torch.randn(count, 3, 4, generator=source)
        return outputs, targets.where(targets >= 0, IGNORED)
    if kind == "binary":
        return torch.randn(count, generator=source), torch.randint(2, (count,), generator=source)
    return torch.randn(count, 2, generator=source), torch.randn(count, 2, generator=source)


RECIPES: dict[str, Callable[[], Any]] = {
    "multiclass": lambda: multiclass_metrics(["a", "b", "c"], None, per_class=False, auroc=True),
    "binary": lambda: binary_metrics(["no", "yes"], 0.5, auroc=True),
    "regression": lambda: regression_metrics(2, lambda values: values),
    "language": lambda: language_metrics(4, [0, 1, 2, 3]),
}


def measured(world: World, config: Config, folder: Path) -> dict[str, dict[str, float]]:
    """Every metric over 0 … 3·N·B+1 examples, in this process's share."""
    values = {}
    for kind, recipe in RECIPES.items():
        for count in range(3 * world.size * BATCH + 2):
            outputs, targets = rows(kind, count)
            first, last = share(0, count, world.rank, world.size)
            metrics = Measured(recipe(), world.device)
            for start in range(first, last, BATCH):
                stop = min(start + BATCH, last)
                metrics.update(outputs[start:stop], targets[start:stop])
            values[f"{kind} {count}"] = metrics.scalars()
    return values


def stopped(world: World, config: Config, folder: Path) -> list[int]:
    """The batches each process saw before the last one asked to stop; their counts differ."""
    stop, seen = StopRequest(), 0

    def batches() -> Iterator[int]:
        for number in range(40 + world.rank):
            if world.rank == world.size - 1 and number == 13:
                stop._note(15, None)
            yield number

    try:
        for _ in stopping_together(batches(), 40 + world.rank, stop, world):
            seen += 1
    except Interrupted:
        return [seen]
    return []


def told(world: World, config: Config, folder: Path) -> list[Any]:
    firsts = world.gather(int(world.claim_first("a thing")))
    texts = world.gather_texts("ö" * world.rank)
    main = world.from_main(f"ä\udcff {world.rank}")  # with a byte of a path that is not UTF-8
    return [main, world.gather(world.rank * 10), firsts, texts]


def wrong_images(world: World, config: Config, folder: Path) -> Any:
    """Return the wrong examples of a set with named ones, by an untrained model."""
    shape, config = [1, 6, 6], copy.deepcopy(config)
    config["data"]["source"] |= {"input_shape": shape, "num_test": 40}
    config["data"] |= {"input_shape": shape, "eval_batch_size": BATCH}
    config["model"]["input_shape"] = shape
    objects = training.build(config, world)
    objects.data.ids = lambda name: [f"{name}/{index}.png" for index in range(40)]
    draws = Draws(config["seed"], "test", 0, world.rank)
    _, details = training.measure_once(objects, "test", world, StopRequest(), draws)
    return details["wrong"]


def evaluated_with_own_buffers(world: World, config: Config, folder: Path) -> Any:
    """Buffers after an evaluation that processes start with different ones; the cache's size."""
    objects = training.build(config, world)
    saved = SimpleNamespace(saved=None)
    plan = plan_of(objects, 0, world, StopRequest(), record=None, checkpoints=saved)
    model = objects.state.model
    model.register_buffer("statistic", torch.full((2, 2), float(world.rank + 5))[:, 0])  # has gaps
    model.register_buffer("cache", torch.zeros(world.rank + 1), persistent=False)
    loop.evaluate(objects.state, objects.sets["val"], plan, name="val")
    return [*model.get_buffer("statistic").tolist(), len(model.get_buffer("cache"))]


def exchanged(world: World, config: Config, folder: Path) -> dict[str, Any]:
    """Return whether to stop, and the seconds, after a step in which only one process got a signal.

    The last process's clock is a hundred seconds ahead of the others'.
    """
    objects, stop = training.build(config, world), StopRequest()
    saved = SimpleNamespace(saved=None)
    plan = plan_of(objects, 0, world, stop, record=None, checkpoints=saved)
    batches, seen = objects.train.epoch(0, 0), []
    for number in range(2):
        if number == 1 and world.rank == 1:
            stop._note(15, None)
        if world.rank == world.size - 1:
            plan.step.exchange._clock -= 100
        plan.train_step(objects.state, next(batches), plan.step)
        seen.append((plan.step.exchange.stops, plan.step.exchange.seconds))
    return {"stops": [stops for stops, _ in seen], "seconds": seen[0][1]}


def sent_in_one_step(world: World, config: Config, folder: Path) -> dict[str, Any]:
    """The examples counted for two synchronised backward passes, and the errors of further ones."""
    objects = training.build(config, world)
    saved = SimpleNamespace(saved=None)
    plan = plan_of(objects, 0, world, StopRequest(), record=None, checkpoints=saved)
    batch, exchange, errors = next(objects.train.epoch(0, 0)), plan.step.exchange, []
    exchange.begin()

    def backward(name: str | None) -> None:
        losses, part = forward(batch, plan.step)
        if name is not None:
            exchange.send([part], name)
        losses.sum().backward()

    backward("first")
    backward("second")
    counted = {
        name: float(exchange.wait(name).values[totals.EXAMPLES]) for name in ("first", "second")
    }
    try:
        exchange.send([Totals.zero(torch.device("cpu"))], "second")
    except RuntimeError as error:
        errors.append(str(error))
    exchange.begin()
    backward("first")  # a new step may use the name again
    again = float(exchange.wait("first").values[totals.EXAMPLES])
    try:
        backward(None)
    except RuntimeError as error:
        errors.append(str(error))
    return {"counted": counted, "errors": errors, "again": again, "global": batch.num_global}


def trained_with_empty_steps(world: World, config: Config, folder: Path) -> list[dict[str, Any]]:
    """Three steps with zero weights: nowhere, in the main process alone, everywhere."""
    objects = training.build({**config, "trainer": {**config["trainer"], "ema_decay": 0.9}}, world)
    saved = SimpleNamespace(saved=None)
    plan = plan_of(objects, 0, world, StopRequest(), record=None, checkpoints=saved)
    state, seen = objects.state, []
    batches = objects.train.epoch(0, 0)
    for empty in (False, world.is_main, True):
        batch, before = next(batches), weights_sha256(state.model)
        if empty:
            batch.weights = torch.zeros(len(batch.targets))
        result = plan.train_step(state, batch, plan.step)
        state.progress.step += 1
        after = weights_sha256(state.model)
        seen.append(
            {
                "empty": int(state.empty_steps),
                "skipped": int(state.skips[0]),
                "moved": after != before,
                "weights": after,
                "norm": float(result.grad_norm),
            }
        )
    return seen


def trained_with_empty_steps_on_device(
    world: World, config: Config, folder: Path
) -> list[dict[str, Any]]:
    on_host = totals.on_host
    totals.on_host = lambda device: False
    try:
        return trained_with_empty_steps(world, config, folder)
    finally:
        totals.on_host = on_host


CHECKS: dict[str, Callable[[World, Config, Path], Any]] = {
    "trained": trained,
    "trained_in_slices": trained_in_slices,
    "trained_with_sums_on_device": trained_with_sums_on_device,
    "trained_as_if_alone": trained_as_if_alone,
    "trained_with_a_nan": trained_with_a_nan,
    "trained_sharded": trained_sharded,
    "trained_sharded_in_slices": trained_sharded_in_slices,
    "trained_in_bf16": trained_in_bf16,
    "sharded_with_a_nan": sharded_with_a_nan,
    "saved_sharded": saved_sharded,
    "relayed": relayed,
    "sent": sent,
    "measured": measured,
    "stopped": stopped,
    "told": told,
    "wrong_images": wrong_images,
    "evaluated_with_own_buffers": evaluated_with_own_buffers,
    "exchanged": exchanged,
    "sent_in_one_step": sent_in_one_step,
    "trained_with_empty_steps": trained_with_empty_steps,
    "trained_with_empty_steps_on_device": trained_with_empty_steps_on_device,
}
