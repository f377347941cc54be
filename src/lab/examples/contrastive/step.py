"""One update from two random views of each example: SimCLR (Chen et al., ICML 2020)."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from lab.faults import make_room
from lab.plan import StepPlan, StepResult
from lab.state import TrainState
from lab.step import accumulate, update
from regrow.feeding.batch import noise
from regrow.numerics.totals import Totals, weighted
from regrow.protocols import Batch


def contrastive_step(
    state: TrainState, batch: Batch, plan: StepPlan, *, temperature: float, strength: float
) -> StepResult:
    """Update the weights so that the two views of an example are nearer than those of others."""
    plan.buffers.remember()
    plan.exchange.begin()
    state.set_rates()
    forward = functools.partial(compare, state, temperature, strength)
    while not accumulate(state, batch, plan, forward):
        make_room(state, batch, plan)
    return update(state, batch.num_global, plan.exchange.wait(), state.step, plan)


def compare(
    state: TrainState, temperature: float, strength: float, batch: Batch, plan: StepPlan
) -> tuple[Tensor, Totals]:
    """Return the losses of this process's examples among all of the global batch, (B,)."""
    assert isinstance(batch.inputs, Tensor)
    random = noise(plan.seed, state.step, batch, 2, 5)  # for each of the two views
    views = torch.cat([view(batch.inputs, strength * random[:, index]) for index in (0, 1)])
    with plan.autocast():
        embeddings = F.normalize(plan.forward(views).float(), dim=1)  # (2B, D)
    one, other = embeddings.chunk(2)
    # (N, D) of the global batch; a gradient flows back to the process that holds the example.
    ones = plan.world.gather_rows(one[: batch.num_local], batch.num_global)
    others = plan.world.gather_rows(other[: batch.num_local], batch.num_global)
    losses = nt_xent(one, ones, others, batch.first, temperature)
    losses = (losses + nt_xent(other, others, ones, batch.first, temperature)) / 2
    losses = weighted(losses, batch.weights)
    return losses, Totals.of(losses.detach(), batch.weights, {}, None, batch.num_local)


def nt_xent(rows: Tensor, same: Tensor, paired: Tensor, first: int, temperature: float) -> Tensor:
    """Return equation 1 of the paper for `rows` (B, D), which are `same[first:]`, (B,).

    `same` and `paired` (N, D) hold one view and the other of every example.
    """
    at = first + torch.arange(len(rows), device=rows.device)
    own = torch.zeros(len(rows), len(same), dtype=torch.bool, device=rows.device)
    own[torch.arange(len(rows)), at] = True
    logits = torch.cat([rows @ paired.T, (rows @ same.T).masked_fill(own, -torch.inf)], dim=1)
    return F.cross_entropy(logits / temperature, at, reduction="none")


def view(images: Tensor, random: Tensor) -> Tensor:
    """Return the images (B, C, H, W) turned, scaled and shifted by the random numbers (B, 5)."""
    angle, log_scale, shear = random[:, 0], random[:, 1], random[:, 2]
    scale = torch.exp(log_scale)
    rows = torch.stack([scale * angle.cos(), -angle.sin() + shear, random[:, 3]], dim=1)
    columns = torch.stack([angle.sin(), scale * angle.cos(), random[:, 4]], dim=1)
    grid = F.affine_grid(torch.stack([rows, columns], dim=1), list(images.shape), False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)
