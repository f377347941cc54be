"""One update of the discriminator, then one of the generator, from the same global batch."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from lab.faults import make_room
from lab.plan import StepPlan, StepResult
from lab.state import TrainState
from lab.step import accumulate, update_weights
from regrow.feeding.batch import noise
from regrow.numerics.totals import Totals, weighted
from regrow.protocols import Batch


def gan_step(state: TrainState, batch: Batch, plan: StepPlan) -> StepResult:
    """Update both models with the non-saturating loss of Goodfellow et al., 2014.

    If one of the two updates is not finite, it is left out, and the step counts as skipped.
    """
    plan.buffers.remember()
    plan.exchange.begin()
    state.set_rates()
    results = []
    for name, losses_of in (("discriminator", tell_apart), ("generator", deceive)):
        own, forward = plan.of(name), functools.partial(losses_of, state)
        while not accumulate(state, batch, own, forward):
            make_room(state, batch, own)
        totals = own.exchange.wait(name)
        results.append(update_weights(state, batch.num_global, totals, own))
    of_discriminator, of_generator = results
    totals = of_discriminator.totals.joined(of_generator.totals)
    skipped = of_discriminator.skipped.either(of_generator.skipped)
    plan.buffers.restore(skipped)
    state.finish_step(totals, skipped, state.step, plan.options)
    return StepResult(totals, of_generator.grad_norm, skipped)


def tell_apart(state: TrainState, batch: Batch, plan: StepPlan) -> tuple[Tensor, Totals]:
    """Return the discriminator's losses, (B,), on real points and on as many generated ones."""
    assert isinstance(batch.inputs, Tensor)
    models: Any = state.model
    with plan.autocast():
        with torch.no_grad():
            generated = models["generator"](latent(state, batch, plan))
        scores = plan.forward(torch.cat([batch.inputs, generated]))[:, 0]  # one call, as DDP needs
    real, fake = scores.split(len(generated))
    return losses_and_totals(softplus(-real) + softplus(fake), batch, "discriminator")


def deceive(state: TrainState, batch: Batch, plan: StepPlan) -> tuple[Tensor, Totals]:
    """Return the generator's losses, (B,): how sure the discriminator is of what is generated."""
    models: Any = state.model
    with plan.autocast(), frozen(models["discriminator"]):
        scores = models["discriminator"](plan.forward(latent(state, batch, plan)))[:, 0]
    return losses_and_totals(softplus(-scores), batch, "generator")


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Let the model's parameters get no gradient inside."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def latent(state: TrainState, batch: Batch, plan: StepPlan) -> Tensor:
    """Return the generator's inputs, (B, D), the same for any number of processes."""
    assert isinstance(batch.inputs, Tensor)
    return noise(plan.seed, state.step, batch, *batch.inputs.shape[1:])


def losses_and_totals(losses: Tensor, batch: Batch, name: str) -> tuple[Tensor, Totals]:
    """Return the losses (B,) times the examples' weights, and totals with a component `name`."""
    parts, losses = {name: losses.detach()}, weighted(losses, batch.weights)
    return losses, Totals.of(losses.detach(), batch.weights, parts, None, batch.num_local)
