"""A step in two processes, compared with hand-written DDP loops that do the same arithmetic."""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from benchmarks.measure import Table, in_turn
from benchmarks.step import TOTAL, mlp, train_py

STEPS = 1000
SIZE = 2
ACCUMULATION = 4


def measure() -> Table:
    with tempfile.TemporaryDirectory() as folder:
        store = dist.TCPStore(  # type: ignore[attr-defined]
            "127.0.0.1", 0, is_master=True, wait_for_workers=False
        )
        results = Path(folder) / "seconds.pt"
        mp.spawn(part, args=(store.port, results), nprocs=SIZE)  # type: ignore[no-untyped-call]
        seconds = torch.load(results)
    return Table(
        title="A training step in two processes",
        note="The same MLP and batch of 64, over gloo on one machine, a thread each; ours with "
        f"running means and logging, no checkpoint but the last. {STEPS} steps a round.",
        unit="µs a step",
        reference="DDP by hand",
        against={f"train.py, {ACCUMULATION} slices": "no_sync by hand"},
        seconds=seconds,
        per=STEPS,
        scale=1e6,
    )


def part(rank: int, port: int, results: Path) -> None:
    from regrow.distributed.parallel import World

    torch.set_num_threads(1)
    logging.disable(logging.INFO)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=SIZE)
    world = World(device=torch.device("cpu"), rank=rank, size=SIZE, store=store)
    # A checkpoint is written in the background, and here no core is left for it.
    options = ("trainer.checkpoint.save_every_steps=null",)
    ours, inputs, targets = train_py(world, *options, steps=STEPS)
    sliced, _, _ = train_py(
        world, *options, f"trainer.accumulation_steps={ACCUMULATION}", steps=STEPS
    )
    candidates = {
        "train.py": ours,
        "DDP by hand": by_hand(inputs, targets, slices=1),
        f"train.py, {ACCUMULATION} slices": sliced,
        "no_sync by hand": by_hand(inputs, targets, slices=ACCUMULATION),
    }
    seconds = in_turn({name: together(run) for name, run in candidates.items()}, rounds=7)
    if rank == 0:
        torch.save(seconds, results)
    dist.destroy_process_group()


def together(run: Callable[[], float | None]) -> Callable[[], float | None]:
    def timed() -> float | None:
        own = run()
        dist.barrier()
        return own

    return timed


def by_hand(inputs: Tensor, targets: Tensor, *, slices: int) -> Callable[[], None]:
    """`inputs` and `targets` are this process's half of an epoch."""
    model = mlp()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups: list[dict[str, Any]] = [
        {"params": matrices},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, fused=True)
    forward = DistributedDataParallel(model, gradient_as_bucket_view=True)
    local = 64 // SIZE
    log: list[Any] = []

    def backward(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        outputs = forward(x)
        loss = F.cross_entropy(outputs, y, reduction="sum")
        (loss / local).backward()
        return loss.detach(), (outputs.detach().argmax(1) == y).sum()

    def run() -> None:
        step = 0
        while step < STEPS:
            loss_sum, correct, count = torch.zeros(()), torch.zeros(()), 0
            for indices in torch.randperm(len(inputs)).split(local):
                x, y = inputs.index_select(0, indices), targets.index_select(0, indices)
                for group in optimizer.param_groups:
                    group["lr"] = 1e-3 * (1 + math.cos(math.pi * step / TOTAL)) / 2
                optimizer.zero_grad()
                parts = list(zip(x.tensor_split(slices), y.tensor_split(slices), strict=True))
                for number, (x_part, y_part) in enumerate(parts):
                    forward.require_backward_grad_sync = number == slices - 1
                    loss, right = backward(x_part, y_part)
                    loss_sum += loss
                    correct += right
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                count += len(y)
                step += 1
                if step % 50 == 0:
                    log.append((loss_sum.item() / count, correct.item() / count))
                if step == STEPS:
                    break

    return run
