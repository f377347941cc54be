"""How long a checkpoint blocks the loop: ResNet-50 and AdamW's moments, 307 MB.

`torch.save` writes the same to the same disk, without a checksum or a sync.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision

from benchmarks.measure import Table
from regrow.checkpoint.writer import CheckpointFacts, CheckpointOptions, CheckpointWriter

ROUNDS = 5
OPTIONS = CheckpointOptions(
    save_every_epochs=1,
    save_every_steps=None,
    keep_last=1,
    keep_best=1,
    milestones_every_epochs=None,
    background=True,
)


def measure() -> Table:
    model = torchvision.models.resnet50()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()

    def parts() -> dict[str, dict[str, Any]]:
        return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}

    seconds: dict[str, list[float]] = {}
    first_ones = []  # kept: a run's first checkpoint cannot reuse freed memory

    def clocked(name: str, run: Callable[[], object]) -> None:
        started = time.perf_counter()
        run()
        seconds.setdefault(name, []).append(time.perf_counter() - started)

    with tempfile.TemporaryDirectory() as folder:
        kept = CheckpointWriter(Path(folder) / "kept", OPTIONS, "max")
        for step in range(ROUNDS + 1):
            facts = CheckpointFacts(step, epoch=0, value=None, milestone=False, metrics_bytes=0)
            new = CheckpointWriter(Path(folder) / "new", OPTIONS, "max")
            first_ones.append(new)
            clocked("making room for it, once", lambda: new.make_room(parts))  # noqa: B023
            new.wait()  # the loop runs meanwhile
            for name, writer in (("a save", kept), ("the first save of a run", new)):
                clocked(name, lambda: writer.save(parts(), facts, lambda position: None))  # noqa: B023
                writer.wait()  # one at a time, so that no write slows down another
            clocked("torch.save", lambda: torch.save(parts(), Path(folder) / "plain.pt"))
    return Table(
        title="A checkpoint of ResNet-50 with AdamW, 307 MB",
        note="The time that the loop waits: for the copy, as the rest is done beside it, SHA-256 "
        "and sync included. The memory of the copy is made after the first step, beside it too.",
        unit="ms",
        reference="torch.save",
        seconds={name: values[1:] for name, values in seconds.items()},
        scale=1e3,
    )
