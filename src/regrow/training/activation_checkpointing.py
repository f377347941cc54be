"""Memory for time: chosen modules keep no activations and compute them again when needed."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from torch import nn
from torch.utils.checkpoint import checkpoint

from regrow.training.sharding import matching


def apply(model: nn.Module, patterns: Sequence[str]) -> None:
    """Let the modules whose names match run their forward pass again in the backward pass.

    Names and numbers stay as they are: dropout draws the same again. Raises UserError for a pattern
    that matches no module.
    """
    for module in matching(model, patterns, "trainer.activation_checkpointing").values():
        module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False)
