"""Memory for time: chosen modules keep no activations and compute them again when needed."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint, noop_context_fn

from regrow.training.sharding import matching


def apply(model: nn.Module, patterns: Sequence[str]) -> None:
    """Let the modules whose names match run their forward pass again in the backward pass.

    Names and numbers stay as they are: dropout draws the same again, and BatchNorm counts a batch
    once. Raises UserError for a pattern that matches no module.
    """
    for module in matching(model, patterns, "trainer.activation_checkpointing").values():
        contexts = functools.partial(_contexts, module) if _norms(module) else noop_context_fn
        module.forward = functools.partial(
            checkpoint, module.forward, use_reentrant=False, context_fn=contexts
        )


def _contexts(
    module: nn.Module,
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Of the first forward pass and of the second."""
    return contextlib.nullcontext(), _without_statistics(module)


def _norms(module: nn.Module) -> list[_BatchNorm]:
    return [m for m in module.modules() if isinstance(m, _BatchNorm)]


@contextlib.contextmanager
def _without_statistics(module: nn.Module) -> Iterator[None]:
    """Let BatchNorm count into copies, which are thrown away."""
    kept = [(norm, dict(norm._buffers)) for norm in _norms(module)]
    for norm, buffers in kept:
        norm._buffers.update({n: b if b is None else b.clone() for n, b in buffers.items()})
    try:
        yield
    finally:
        for norm, buffers in kept:
            norm._buffers.update(buffers)
