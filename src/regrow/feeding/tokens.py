"""A split of text as one row of tokens, and its windows as batches."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from regrow.feeding.batch import LoadedBatch, sent
from regrow.feeding.sampling import Windows
from regrow.randomness import generator

IGNORED = -100  # a target that does not count, as in torch's losses
RESIDENT_BYTES = 1 << 30  # up to this size a GPU holds the tokens of a split


@dataclass(frozen=True)
class Tokens:
    """A split: documents packed into one row of L tokens, each followed by an end token.

    Example i is the window of `context` tokens that begins at i * context, with the tokens that
    follow each of them as targets. The targets of all windows are all tokens but the first, each
    once; the last window's targets beyond the end are -100.
    """

    row: npt.NDArray[Any]  # (L,) uint16 or uint32, L >= 2; usually a memory map
    context: int
    sha256: str  # of the row's bytes
    documents: list[Hashable]  # a key per document, or part of one, equal for equal contents
    files: list[str]  # the file of each of these

    def __len__(self) -> int:
        return -(-(len(self.row) - 1) // self.context)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, targets = self.windows(self.tensor(), torch.tensor([index]))
        return inputs[0], targets[0]

    def keys(self) -> list[Hashable]:
        """Return the documents' keys: a document in two splits is found, a window is not."""
        return self.documents

    def fingerprint(self) -> str:
        return self.sha256

    def tensor(self) -> Tensor:
        """Return the row as (L,) int16 or int32, without a copy: torch cannot index uint16."""
        signed = np.int16 if self.row.dtype == np.uint16 else np.int32
        return torch.from_numpy(self.row.view(signed))

    def windows(
        self, row: Tensor, indices: Tensor, rotation: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return inputs and targets (B, context), int64, of windows `indices` (B,).

        `row` is `tensor()` or its beginning, on the device of `indices`. With a `rotation` the row
        is a circle that begins there, so that all windows are full.
        """
        length = len(row)
        places = torch.arange(self.context + 1, device=indices.device)
        places = indices[:, None] * self.context + places
        if rotation is None:
            found = _unsigned(row[places.clamp(max=length - 1)])
            return found[:, :-1].contiguous(), found[:, 1:].masked_fill(
                places[:, 1:] >= length, IGNORED
            )
        found = _unsigned(row[(places + rotation) % length])
        return found[:, :-1].contiguous(), found[:, 1:].contiguous()


class TokenFeed:
    """The windows of a split, gathered from its memory map, or on a GPU that holds the tokens.

    If it `rotates`, each epoch cuts its windows elsewhere, by (seed, epoch).
    """

    def __init__(
        self, split: Tokens, device: torch.device, *, seed: int, rotates: bool, pin_memory: bool
    ) -> None:
        self.split, self.device, self.seed, self.rotates = split, device, seed, rotates
        self.pin_memory = pin_memory
        self.row = split.tensor()
        if device.type != "cpu" and self.row.nbytes <= RESIDENT_BYTES:
            self.row = self.row.to(device)

    def read(
        self, windows: Windows, order: Tensor, epoch: int, start: int
    ) -> Iterator[LoadedBatch]:
        """Yield the batches of an epoch's windows `start …`; its examples come in `order` (N,)."""
        row = self.row[: windows.num_examples * self.split.context + 1]  # data.limit_train's part
        rotation = None
        if self.rotates:
            random = generator(self.seed, "rotation", epoch)
            rotation = int(torch.randint(len(row), (), generator=random))
        order = order.to(row.device)
        for number in range(start, len(windows)):
            share = windows.share(number)
            indices = order[share.start : share.stop]
            inputs, targets = self.split.windows(row, indices, rotation)
            weights = None if share.num_local else torch.zeros(1)
            sizes = (share.num_local, share.num_global, share.first)
            batch = LoadedBatch(inputs, targets, weights, *sizes)
            if self.pin_memory and not row.is_cuda:
                yield batch.map(lambda part: sent(part, self.device))
            else:
                yield batch.to(self.device)


def _unsigned(tokens: Tensor) -> Tensor:
    """Return int16 or int32 that hold unsigned numbers as int64."""
    return tokens.long() & (0xFFFF if tokens.dtype == torch.int16 else 0xFFFFFFFF)
