"""Evaluation with all metrics, compared with a bare loop over the same batches that only sums the
loss and the correct answers.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from benchmarks.configured import build
from benchmarks.measure import Table, in_turn
from lab import evaluate
from lab.progress import evaluation_bar
from regrow.distributed.parallel import World
from regrow.randomness import Draws, states_kept

CPU = torch.device("cpu")
IMAGES = ("data=synthetic", "data.source.num_val=1024", "data.eval_batch_size=256")


def measure() -> list[Table]:
    return [
        table("1,024 images by ResNet-18", *IMAGES, "model=resnet18"),
        table("1,024 images by a small CNN", *IMAGES, "model=cnn"),
        table("180 digits by the default MLP"),
    ]


def table(what: str, *overrides: str, device: torch.device = CPU) -> Table:
    world = World(device=device)
    on_device = (f"trainer.device={device.type}", "trainer.num_threads=1")
    options = (*on_device, "loss=cross_entropy", *overrides)
    objects, _ = build(world, *options)
    model, task, val = objects.state.model, objects.task, objects.sets["val"]

    def ours() -> None:
        bar, draws = evaluation_bar(None, val), Draws(0, "val", 0, 0)
        with states_kept():  # as lab/evaluate.py does
            evaluate.measure(model, task, val, world, "fp32", bar, draws, shows=False)

    @torch.no_grad()
    def bare() -> None:
        model.eval()
        loss, right = torch.zeros((), device=device), torch.zeros((), device=device)
        for batch in val:
            outputs = model(batch.inputs)
            loss += F.cross_entropy(outputs, batch.targets, reduction="sum")
            right += (outputs.argmax(1) == batch.targets).sum()
        loss.item(), right.item()

    return Table(
        title=f"An evaluation of {what}",
        note="train.py's counts loss, accuracy, precision, recall, F1 and AUROC, each per class "
        "too, and the confusion matrix. One thread.",
        unit="ms",
        reference="bare loop",
        seconds=in_turn({"train.py": ours, "bare loop": bare}, rounds=9),
        scale=1e3,
    )
