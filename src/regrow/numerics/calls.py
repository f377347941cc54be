"""Call a model, and explain the errors that a call may raise."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from regrow.errors import UserError, brief


def say_if_out_of_memory(error: RuntimeError, what: str, way_out: str) -> None:
    """Raise UserError if `error` is out of memory and there is nothing to halve."""
    if is_out_of_memory(error):
        # Not from `error`: that would be told as a fault of the machine, with another way out.
        raise UserError(f"{what} ran out of memory. {way_out}") from None


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return True for CUDA's error or the CPU allocator's, which has no class of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


# Torch's words in errors on integers, or on integers mixed with floats.
NAMES_A_TYPE = r"\b(Long|Int|Short|Char|Byte|Bool|int|char|dtype|datatype)\b"


def call(model: nn.Module, inputs: Any) -> Any:
    """Return the outputs for inputs that are one tensor, or a tuple or mapping of arguments.

    Of a mapping with an attribute `logits`, which models of transformers return, it is the logits.
    Raises UserError for integers that the model's floats cannot be computed with.
    """
    try:
        if isinstance(inputs, Tensor):
            outputs = model(inputs)
        else:
            outputs = model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)
        return getattr(outputs, "logits", outputs) if isinstance(outputs, Mapping) else outputs
    except (RuntimeError, ValueError) as error:
        refuse_integers(error, inputs)
        raise


def refuse_integers(error: Exception, inputs: Any) -> None:
    """Raise UserError if a forward pass failed because its inputs are integers."""
    values = inputs.values() if isinstance(inputs, Mapping) else inputs
    tensors = [inputs] if isinstance(inputs, Tensor) else values
    integers = [t for t in tensors if not t.is_floating_point() and not t.is_complex()]
    reason = brief(error, 200).rstrip(".")
    is_torchs = not isinstance(error, UserError)
    if integers and is_torchs and re.search(NAMES_A_TYPE, reason):
        kind = str(integers[0].dtype).removeprefix("torch.")
        raise UserError(
            f"model: it cannot compute with {kind} inputs ({reason}). For features set "
            "data.integers=float32, or let your data set give floats. A model of tokens starts "
            "with an embedding."
        ) from error
