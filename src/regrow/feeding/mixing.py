"""Mixes each training example with a partner of its global batch.

Partner and random numbers follow from (seed, epoch, example), so that any number of ranks, workers
and micro-batches gives the same batches. A rank that holds an example also reads its partner.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from regrow.errors import DataError
from regrow.feeding.sampling import Share, rows_of
from regrow.protocols import Inputs
from regrow.randomness import generator


class Mix(ABC):
    """A way to make one training example from two. Subclass it for `data.mixing`."""

    num_numbers: int  # random numbers that it needs for each example

    def draw(self, numbers: Tensor) -> Tensor:
        """Return an epoch's choices, (N, …), made of random numbers uniform in [0, 1).

        `numbers` are (N, num_numbers) float64, on the CPU; by default the choices are the numbers.
        Row i of the result must depend on row i alone.
        """
        return numbers

    @abstractmethod
    def __call__(self, inputs: Tensor, partners: Tensor, choices: Tensor) -> tuple[Tensor, Tensor]:
        """Return mixed inputs, (B, …), and the share of the own target in each, (B,).

        `inputs` and `partners` are normalised model inputs, (B, …), and `choices` are float32, (B,
        …), all on the device. A row of the result must depend on the same row of these alone.
        """


@dataclass(frozen=True)
class Pairs:
    """The partners of an epoch's examples, and the choices of each."""

    mix: Mix
    partners: Tensor  # (N,) places in the epoch's order
    choices: Tensor  # (N, …) float32, on the CPU
    num_classes: int | None  # of targets that are class indices; None: they are mixed as they are

    def read_by(self, share: Share) -> tuple[Tensor, Tensor]:
        """Return the places that a rank reads, its own first, and where its partners are in them.

        A partner that is in the rank's own share is not read twice.
        """
        own = torch.arange(share.start, share.stop)
        others = self.partners[own]
        inside = (others >= share.start) & (others < share.stop)
        added, at = torch.unique(others[~inside], return_inverse=True)
        slots = others - share.start
        slots[~inside] = len(own) + at
        return torch.cat([own, added]), slots

    def mixed(
        self,
        choices: Tensor,
        own: tuple[Inputs, Inputs, Tensor | None],
        others: tuple[Inputs, Inputs, Tensor | None],
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return inputs, soft targets and weights of examples mixed with their partners."""
        (inputs, targets, weights), (inputs_2, targets_2, weights_2) = own, others
        refuse_integers(inputs)
        mixed, share = self.mix(one_tensor(inputs), one_tensor(inputs_2), choices)
        number = self.num_classes
        soft = self._blend(
            share, *(softened(one_tensor(it), number) for it in (targets, targets_2))
        )
        if weights is None or weights_2 is None:
            return mixed, soft, None
        return mixed, soft, self._blend(share, weights, weights_2)

    @staticmethod
    def _blend(share: Tensor, own: Tensor, other: Tensor) -> Tensor:
        share = share.view(-1, *[1] * (own.ndim - 1))
        return own * share + other * (1 - share)


def pairs_of(
    mix: Mix,
    order: Tensor,
    repeats: Tensor | None,
    size: int,
    *,
    seed: int,
    epoch: int,
    num_classes: int | None,
) -> Pairs:
    """Return the pairs of an epoch in the `order` (N,), whose windows hold `size` examples.

    The partner is another place of the same window, each as likely; in a window of one example it
    is the example itself.
    """
    count = len(order)
    wide = (count, 1 + mix.num_numbers)

    def table(way: int) -> Tensor:
        random = generator(seed, "mix", epoch, way)
        return torch.rand(wide, dtype=torch.float64, generator=random)

    numbers = rows_of(table, order, repeats)
    place = torch.arange(count)
    first = place - place % size
    length = (count - first).clamp(max=size)
    further = 1 + (numbers[:, 0] * (length - 1)).long()
    partners = first + (place - first + further) % length
    return Pairs(mix, partners, mix.draw(numbers[:, 1:]).float(), num_classes)


def one_tensor(value: Inputs) -> Tensor:
    """Return inputs or targets of one tensor. Raises DataError for others."""
    if not isinstance(value, Tensor):
        raise DataError(
            "data.mixing mixes examples whose inputs and targets are one tensor each, and these "
            "have several. Set data.mixing=null."
        )
    return value


def softened(targets: Tensor, num_classes: int | None) -> Tensor:
    """Return class indices as float32 rows, one at the class and zero elsewhere; numbers as is.

    A row is NaN for an index out of range, so that the loss is too: zeros would train unnoticed.
    """
    if num_classes is None or targets.is_floating_point():
        return targets.float()
    classes = torch.arange(num_classes, device=targets.device)
    rows = (targets.unsqueeze(-1) == classes).float()
    return rows / rows.sum(-1, keepdim=True)


def refuse_integers(inputs: Inputs) -> None:
    """Raise DataError for inputs that cannot be blended, such as tokens."""
    if not one_tensor(inputs).is_floating_point():
        raise DataError(
            "data.mixing blends inputs, and these are integers, such as tokens. Set "
            "data.mixing=null."
        )
