"""Memory for time: chosen modules keep no activations and compute them again when needed."""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from regrow.training.sharding import matching


def apply(model: nn.Module, patterns: Sequence[str]) -> None:
    """Let the modules whose names match run their forward pass again in the backward pass.

    Names and numbers stay as they are: dropout and what draws from numpy or `random` draw the same
    again, and BatchNorm counts a batch once. Raises UserError for a pattern that matches no module.
    """
    found = matching(model, patterns, "trainer.activation_checkpointing")
    # torch.compile takes no contexts: compiled, BatchNorm would count twice.
    disable: Any = torch.compiler.disable
    run = disable(_forward) if found else _forward
    for module in found.values():
        module.forward = functools.partial(run, module, module.forward)


def _forward(module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():  # nothing is computed again, so nothing need be copied
        return forward(*args, **kwargs)
    contexts = functools.partial(_contexts, module)
    return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)


def _contexts(
    module: nn.Module,
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Of the first forward pass and of the second."""
    return contextlib.nullcontext(), Start(module).second()


class Start:
    """Where a module's forward pass starts: its buffers, and numpy's and `random`'s generators.

    torch's own generators are restored by torch.
    """

    def __init__(self, module: nn.Module) -> None:
        self.numpy, self.random = numpy.random.get_state(), random.getstate()
        self.buffers = [
            (each._buffers, name, buffer)
            for each in module.modules()
            for name, buffer in each._buffers.items()
            if buffer is not None
        ]
        # Copies of all: BatchNorm changes its statistics without counting a version.
        self.copies = [buffer.detach().clone() for _, _, buffer in self.buffers]

    @contextlib.contextmanager
    def second(self) -> Iterator[None]:
        """Start as the first pass did, and leave the buffers and generators as they were."""
        now = [buffers[name] for buffers, name, _ in self.buffers]
        drawn = numpy.random.get_state(), random.getstate()
        for (buffers, name, _), copy, grown in zip(self.buffers, self.copies, now, strict=True):
            if (
                grown is not None and grown.shape == copy.shape
            ):  # the module may have noted the size of a cache
                buffers[name] = copy.clone()  # a graph that is kept may ask for a third pass
        numpy.random.set_state(self.numpy)
        random.setstate(self.random)
        try:
            yield
        finally:
            for (buffers, name, _), buffer in zip(self.buffers, now, strict=True):
                buffers[name] = buffer
            numpy.random.set_state(drawn[0])
            random.setstate(drawn[1])
