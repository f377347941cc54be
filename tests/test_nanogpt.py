"""The language task computes what nanoGPT's model and loop compute, on the same batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from running import CPU, config_of, metrics_of, train
from torch import Tensor

from benchmarks import nanogpt
from regrow.runs import training

STEPS = 100
OPTIONS = (
    *nanogpt.OPTIONS,
    *("data.batch_size=2", f"trainer.max_steps={STEPS}", "trainer.log_every_steps=1"),
    *("trainer.eval_every_epochs=null", "trainer.num_threads=1", "trainer.device=cpu"),
)


def batches_of(objects: Any) -> list[tuple[Tensor, Tensor]]:
    found = [(batch.inputs, batch.targets) for batch in objects.train.epoch(0)]
    assert len(found) > STEPS
    return found[:STEPS]


@pytest.mark.slow
def test_each_loss_of_a_hundred_steps_is_that_of_nanogpt(
    tmp_path: Path, record_property: Any
) -> None:
    config = config_of(*OPTIONS)
    objects = training.build(config, CPU)
    start, batches = objects.state.model, batches_of(objects)
    torch.set_num_threads(1)

    def losses(**mistake: bool) -> Tensor:
        model = nanogpt.like(start, n_head=config["model"]["heads"])
        optimizer = nanogpt.configure_optimizers(model, **mistake)
        return torch.tensor(nanogpt.train(model, optimizer, batches), dtype=torch.float64)

    theirs, with_a_mistake = losses(), losses(decays_all=True)
    train(tmp_path, *OPTIONS)
    lines = [line["train/loss"] for line in metrics_of(tmp_path) if "train/loss" in line]
    ours = torch.tensor(lines, dtype=torch.float64)
    distance = float((ours - theirs).abs().max())
    record_property("largest difference from nanoGPT's losses", f"{distance:.1e}")
    assert len(ours) == STEPS and float(ours[0] - ours[-1]) > 0.5  # it has learnt meanwhile
    assert distance < 1e-5
    assert float((with_a_mistake - theirs).abs().max()) > 1e-5  # decays norms and biases too
