"""The hash of a model's weights."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from regrow.distributed import sharding


def weights_sha256(model: nn.Module) -> str:
    """Return the SHA-256 over name, dtype, shape and bytes of every entry, in order of the names.

    With a sharded model, all processes must call this together.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        _add(digest, name, tensor)
    return digest.hexdigest()


def _add(digest: Any, name: str, value: Any) -> None:
    if isinstance(value, Tensor):
        value = sharding.whole(value).detach().cpu().resolve_conj().resolve_neg().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
    elif isinstance(value, dict | list | tuple):  # from get_extra_state
        digest.update(f"{name} {type(value).__name__} {len(value)}".encode())
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            _add(digest, f"{name}/{key!r}", item)
    else:
        digest.update(f"{name} {value!r}".encode())
