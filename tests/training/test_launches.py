"""On a GPU, a step launches few kernels more than a loop by hand. A CPU can count the operations.

Each operation is a kernel on a device, or a few. The host needs some microseconds for each.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
from running import Bench, batch_of
from test_bad_numbers import task
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lab import optim
from lab.step import train_step
from regrow.feeding.batch import LoadedBatch
from regrow.numerics import totals
from regrow.numerics.buffers import Buffers

LAYERS = 6
# Three find bad numbers and tell the optimizer, in whose update that is one more. One leaves a bad
# step out of the epoch's sums and two count such steps. One saves the buffers; two for each of two
# dtypes put them back. One sets the rate and one adds up the score. The loop by hand has one that
# a step lacks.
EXTRA = 13


class Launches(TorchDispatchMode):
    """Counts operations on tensors, without views and allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        is_free = func.is_view or name.startswith("empty") or name == "promote_types"
        if func.namespace == "aten" and not is_free:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def network() -> nn.Module:
    torch.manual_seed(1)
    layers = [layer for _ in range(LAYERS) for layer in (nn.Linear(6, 6), nn.BatchNorm1d(6))]
    return nn.Sequential(*layers, nn.Linear(6, 3))


def batch() -> LoadedBatch:
    random = torch.Generator().manual_seed(0)
    return batch_of(torch.randn(12, 6, generator=random), torch.randint(3, (12,), generator=random))


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the CPU take the branches of a device that the host must not wait for."""
    monkeypatch.setattr(totals, "on_host", lambda device: False)
    monkeypatch.setattr(optim, "skips_on_device", lambda optimizer, device: True)
    monkeypatch.setattr(optim, "_is_on_device", lambda lr: isinstance(lr, Tensor))


def bench_of(model: nn.Module) -> Bench:
    make = functools.partial(torch.optim.AdamW, lr=0.01, fused=True)
    bench = Bench(model, task(), make, slices=1, clip_norm=1.0)
    for _ in range(3):  # moments and constants then exist
        train_step(bench.state, batch(), bench.plan.step)
    return bench


def launched_by(bench: Bench) -> list[str]:
    examples = batch()
    with Launches() as launches:
        train_step(bench.state, examples, bench.plan.step)
    return launches.names


def launched_by_hand() -> list[str]:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    sums, examples = torch.zeros(2), batch()
    for _ in range(3):
        with Launches() as launches:
            optimizer.zero_grad()
            outputs = model(examples.inputs)
            loss = F.cross_entropy(outputs, examples.targets)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
            optimizer.step()
            right = outputs.argmax(1) == examples.targets
            sums += torch.stack([loss.detach(), right.sum()])
    return launches.names


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_step_launches_few_kernels_more_than_a_loop_by_hand() -> None:
    ours, by_hand = launched_by(bench_of(network())), launched_by_hand()
    assert len(by_hand) > 60 and len(ours) <= len(by_hand) + EXTRA


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_model_that_is_trained_again_launches_no_more_than_before() -> None:
    model = network()
    first = launched_by(bench_of(model))
    assert launched_by(bench_of(model)) == first


@pytest.mark.usefixtures("as_on_a_gpu")
def test_buffers_that_are_put_back_one_by_one_are_counted() -> None:
    model = network()
    bench = bench_of(model)
    together = len(launched_by(bench))
    step = dataclasses.replace(bench.plan.step, buffers=Buffers(model))
    bench.plan = dataclasses.replace(bench.plan, step=step)
    assert len(launched_by(bench)) > together + LAYERS
