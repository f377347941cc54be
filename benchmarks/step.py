"""A training step of `train.py`'s loop, compared with hand-written loops of the same arithmetic.

All train an MLP on digits without augmentation: batch 64, AdamW with decay on matrices only,
cosine schedule, plain cross entropy, gradients clipped at norm 1, running loss and accuracy, and
the loss logged every 50 steps. If `make peers` has installed other engines, they are measured too.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import peers
from benchmarks.configured import build
from benchmarks.measure import Table, in_turn
from benchmarks.peers import ENGINES
from regrow.distributed.parallel import World
from regrow.processes.interrupt import StopRequest
from regrow.runs import training

STEPS = 600
BEFORE = 40  # untimed steps, two epochs; the first steps are slower
TOTAL = 100_000
SMALL = ("model.hidden=[64]", "model.norm=none")


def measure() -> list[Table]:
    return [
        table("the default MLP (86 thousand parameters)"),
        table("a small MLP (5 thousand parameters)", *SMALL),
    ]


def table(what: str, *overrides: str) -> Table:
    torch.set_num_threads(1)
    ours, inputs, targets = train_py(World(device=torch.device("cpu")), *overrides, steps=STEPS)
    is_small = bool(overrides)
    candidates: dict[str, Callable[[], float | None]] = {
        "train.py": ours,
        "forward, backward and update alone": pure(mlp(is_small), inputs, targets),
        "hand-tuned, in memory": by_hand(mlp(is_small), inputs, targets),
        "bare DataLoader loop": by_hand(mlp(is_small), inputs, targets, loader=True),
    }
    with peers.started(list(ENGINES) if peers.INSTALLED.is_dir() else [], STEPS, is_small) as them:
        seconds = in_turn(candidates | them, rounds=9)
    return Table(
        title=f"A training step of {what}",
        note="The whole loop: batch, forward, backward, clip, update, running means, logging, bar "
        f"and checkpoints on. One thread, {STEPS} steps a round. Of train.py and the other engines "
        "the steady state is timed, without what they do at the start and the end of a round.",
        unit="µs a step",
        reference="hand-tuned, in memory",
        seconds=seconds,
        per=STEPS,
        scale=1e6,
    )


def train_py(
    world: World,
    *overrides: str,
    steps: int,
    before: int = BEFORE,
    feed: Callable[[Any], Any] | None = None,
) -> tuple[Callable[[], float], Tensor, Tensor]:
    """The real loop with its real record, without evaluation, which is not part of a step.

    Returns a function that runs and times `steps` steps, and this process's inputs and targets of
    one epoch. `feed` makes another feed of the training split's.
    """

    class After(StopRequest):
        """Requests a stop after a number of steps, and times all but the first of them.

        With several processes, the request comes before the step is counted.
        """

        first = last = 0
        started = ended = 0.0

        @property
        def requested(self) -> bool:
            step = objects.state.step + (world.size > 1)
            if step <= self.first:
                self.started = now(world.device)
            if step == self.last:
                self.ended = now(world.device)
            return step >= self.last

    objects, config = build(
        world,
        *("data.augment=false", "trainer.device=cpu", "trainer.num_threads=1"),
        *("loss=cross_entropy", "trainer.clip_norm=1.0", "trainer.eval_every_epochs=null"),
        *("trainer.checkpoint.save_every_epochs=null", f"trainer.max_steps={TOTAL}"),
        *("trainer.checkpoint.save_every_steps=300", *overrides),
    )
    if feed is not None:
        objects = dataclasses.replace(objects, train=feed(objects.train))
    temporary = tempfile.TemporaryDirectory() if world.is_main else None  # exists as long as `run`
    folder = Path(world.from_main(temporary.name if temporary else ""))
    stop = After()

    def run(_: object = temporary) -> float:
        stop.first = objects.state.step + before
        stop.last = stop.first + steps
        training.train(objects, config, folder, world, stop)
        return stop.ended - stop.started

    batches = list(objects.train.epoch(0))
    return (
        run,
        torch.cat([batch.inputs for batch in batches]),
        torch.cat([batch.targets for batch in batches]),
    )


def now(device: torch.device) -> float:
    """Return the clock's time once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def digits() -> tuple[Tensor, Tensor]:
    """As many examples as in the default training split: 20 steps per epoch."""
    from sklearn.datasets import load_digits

    found = load_digits()
    inputs = torch.from_numpy(found.images[:1258] / 16).float()
    return inputs, torch.from_numpy(found.target[:1258]).long()


def mlp(is_small: bool = False) -> nn.Module:
    """The default model, or that of `SMALL`, written out."""
    if is_small:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    return nn.Sequential(
        *(nn.Flatten(), nn.Linear(64, 256), nn.LayerNorm(256), nn.ReLU()),
        *(nn.Linear(256, 256), nn.LayerNorm(256), nn.ReLU(), nn.Linear(256, 10)),
    )


def pure(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    steps: int = STEPS,
    *,
    lr: float = 1e-3,
    before: int = 0,
) -> Callable[[], float]:
    """The bare arithmetic on one batch, repeated; without the `before` steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=True)
    x, y = inputs[:64], targets[:64]

    def run() -> float:
        started = 0.0
        for step in range(before + steps):
            if step == before:
                started = time.perf_counter()
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        return time.perf_counter() - started

    return run


def by_hand(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    steps: int = STEPS,
    *,
    loader: bool = False,
    lr: float = 1e-3,
    before: int = 0,
) -> Callable[[], float]:
    """A typical hand-written loop; without the `before` steps."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups: list[dict[str, Any]] = [
        {"params": matrices},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, fused=True)
    loaded = DataLoader(TensorDataset(inputs, targets), batch_size=64, shuffle=True)
    log: list[Any] = []

    def in_memory() -> Iterator[tuple[Tensor, Tensor]]:
        for indices in torch.randperm(len(inputs)).split(64):
            yield inputs.index_select(0, indices), targets.index_select(0, indices)

    def run() -> float:
        step, started = 0, time.perf_counter()
        while step < before + steps:
            loss_sum, correct, count = torch.zeros(()), torch.zeros(()), 0
            for x, y in loaded if loader else in_memory():
                if step == before:
                    started = time.perf_counter()
                for group in optimizer.param_groups:
                    group["lr"] = lr * (1 + math.cos(math.pi * step / TOTAL)) / 2
                optimizer.zero_grad()
                outputs = model(x)
                loss = F.cross_entropy(outputs, y)
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                loss_sum += loss.detach() * len(y)
                correct += (outputs.argmax(1) == y).sum()
                count += len(y)
                step += 1
                if step % 50 == 0:
                    log.append((loss.item(), correct.item() / count))
                if step == before + steps:
                    break
        return time.perf_counter() - started

    return run
