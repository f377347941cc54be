"""Activation checkpointing: chosen modules recompute their activations in the backward pass."""

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

from regrow.distributed.sharding import matching


def apply(model: nn.Module, patterns: Sequence[str]) -> None:
    """Make the modules whose names match rerun their forward pass in the backward pass.

    Parameter names and results do not change: dropout, numpy and `random` repeat their draws, and
    BatchNorm counts a batch once. Raises UserError for a pattern that matches no module.
    """
    found = matching(model, patterns, "trainer.activation_checkpointing")
    # torch.compile ignores context_fn: compiled, BatchNorm would count each batch twice.
    disable: Any = torch.compiler.disable
    run = disable(_forward) if found else _forward
    for module in found.values():
        module.forward = functools.partial(run, module, module.forward)


def _forward(module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():  # without gradients nothing is recomputed
        return forward(*args, **kwargs)
    contexts = functools.partial(_contexts, module)
    return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)


def _contexts(
    module: nn.Module,
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return the contexts of the first and the second forward pass."""
    return contextlib.nullcontext(), Start(module).second()


class Start:
    """State at the start of a module's forward pass: buffers, numpy's and `random`'s generators.

    torch restores its own generators.
    """

    def __init__(self, module: nn.Module) -> None:
        self.numpy, self.random = numpy.random.get_state(), random.getstate()
        self.buffers = [
            (each._buffers, name, buffer)
            for each in module.modules()
            for name, buffer in each._buffers.items()
            if buffer is not None
        ]
        # Copy every buffer: BatchNorm changes its statistics without bumping their version.
        self.copies = [buffer.detach().clone() for _, _, buffer in self.buffers]

    @contextlib.contextmanager
    def second(self) -> Iterator[None]:
        """Start from the first pass's state; afterwards restore buffers and generators."""
        now = [buffers[name] for buffers, name, _ in self.buffers]
        drawn = numpy.random.get_state(), random.getstate()
        for (buffers, name, _), copy, grown in zip(self.buffers, self.copies, now, strict=True):
            if (
                grown is not None and grown.shape == copy.shape
            ):  # the module may have stored its cache's size
                buffers[name] = copy.clone()  # a retained graph may run a third pass
        numpy.random.set_state(self.numpy)
        random.setstate(self.random)
        try:
            yield
        finally:
            for (buffers, name, _), buffer in zip(self.buffers, now, strict=True):
                buffers[name] = buffer
            numpy.random.set_state(drawn[0])
            random.setstate(drawn[1])
