"""A training step of `train.py`'s loop beside loops written by hand that do the same arithmetic.

All train the default MLP on digits without augmentation: batch 64, AdamW with decay on the
matrices alone, cosine rate, gradient clipped at norm 1, running loss and accuracy, and the loss
logged every 50 steps.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.measure import Table, in_turn
from regrow.training.interrupt import StopRequest
from regrow.training.parallel import World

STEPS = 600
TOTAL = 100_000


def measure() -> Table:
    torch.set_num_threads(1)
    ours, inputs, targets = train_py(World(device=torch.device("cpu")), steps=STEPS)
    candidates = {
        "train.py": ours,
        "hand-tuned, in memory": by_hand(inputs, targets, loader=False),
        "bare DataLoader loop": by_hand(inputs, targets, loader=True),
    }
    return Table(
        title="A training step of a small MLP",
        note="The whole loop: batch, forward, backward, clip, update, running means, logging, bar "
        f"and checkpoints on. One thread, {STEPS} steps a round.",
        unit="µs a step",
        reference="bare DataLoader loop",
        seconds=in_turn(candidates, rounds=9),
        per=STEPS,
        scale=1e6,
    )


def train_py(
    world: World, *overrides: str, steps: int
) -> tuple[Callable[[], None], Tensor, Tensor]:
    """The real loop with its real record; evaluation is not part of a step and is left out.

    Returns what runs `steps` steps, and this process's inputs and targets of one epoch.
    """
    from hydra import compose, initialize_config_dir
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    from regrow import run as runs
    from regrow.config import CONF, plain

    class After(StopRequest):
        """Asks to stop after so many steps; several processes ask before the step is counted."""

        last = 0

        @property
        def requested(self) -> bool:
            return objects.state.step + (world.size > 1) >= self.last

    with initialize_config_dir(str(CONF), version_base=None):
        config = compose(
            "train",
            [
                *("data.augment=false", "trainer.device=cpu", "trainer.num_threads=1"),
                *("trainer.clip_norm=1.0", "trainer.eval_every_epochs=null"),
                *("trainer.checkpoint.save_every_epochs=null", f"trainer.max_steps={TOTAL}"),
                *("trainer.checkpoint.save_every_steps=300", *overrides),
            ],
            return_hydra_config=True,
        )
    HydraConfig.instance().set_config(config)
    config = plain(OmegaConf.masked_copy(config, [str(k) for k in config if k != "hydra"]))
    objects = runs.build(config, world)
    folder = Path(world.from_main(tempfile.mkdtemp() if world.is_main else ""))
    stop = After()

    def run() -> None:
        stop.last = objects.state.step + steps
        runs.train(objects, config, folder, world, stop)

    batches = list(objects.train.epoch(0))
    return (
        run,
        torch.cat([batch.inputs for batch in batches]),
        torch.cat([batch.targets for batch in batches]),
    )


def mlp() -> nn.Module:
    """The default model, written out."""
    return nn.Sequential(
        *(nn.Flatten(), nn.Linear(64, 256), nn.LayerNorm(256), nn.ReLU()),
        *(nn.Linear(256, 256), nn.LayerNorm(256), nn.ReLU(), nn.Linear(256, 10)),
    )


def by_hand(inputs: Tensor, targets: Tensor, *, loader: bool) -> Callable[[], None]:
    model = mlp()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, fused=True)
    loaded = DataLoader(TensorDataset(inputs, targets), batch_size=64, shuffle=True)
    log: list[Any] = []

    def in_memory() -> Iterator[tuple[Tensor, Tensor]]:
        for indices in torch.randperm(len(inputs)).split(64):
            yield inputs.index_select(0, indices), targets.index_select(0, indices)

    def run() -> None:
        step = 0
        while step < STEPS:
            loss_sum, correct, count = torch.zeros(()), torch.zeros(()), 0
            for x, y in loaded if loader else in_memory():
                for group in optimizer.param_groups:
                    group["lr"] = 1e-3 * (1 + math.cos(math.pi * step / TOTAL)) / 2
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
                if step == STEPS:
                    break

    return run
