"""Tests, without a GPU, of waits for one: of how the GPU tests find them, and of one to avoid."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from waits import no_wait_for_the_gpu

from regrow.distributed.parallel import Exchange, World
from regrow.numerics.totals import Totals
from regrow.processes.interrupt import StopRequest


def test_the_mode_is_set_in_spite_of_its_warning_and_put_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    modes: list[str | int] = [0]
    warned: list[bool] = []

    def set_mode(mode: str | int) -> None:
        modes.append(mode)
        if not warned:  # torch warns once
            warned.append(True)
            warnings.warn(
                "Synchronization debug mode is a prototype feature and does", stacklevel=2
            )

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[0])
    with pytest.raises(ValueError, match="by the test"), no_wait_for_the_gpu():
        assert modes[-1] == "error" and warned
        raise ValueError("by the test")
    assert modes == [0, "error", 0]
    # The control: with warnings as errors, the mode alone ends a test, and stays on.
    warned.clear()
    with pytest.raises(UserWarning):
        torch.cuda.set_sync_debug_mode("error")
    assert modes[-1] == "error"


class Copies(TorchDispatchMode):
    """Collects, for each copy from the host to a device, whether it is one without a wait."""

    def __init__(self) -> None:
        super().__init__()
        self.without_waiting: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and args[0].device != kwargs.get("device"):
            self.without_waiting.append(bool(kwargs.get("non_blocking")))
        return func(*args, **kwargs)


def test_the_sums_of_several_processes_are_sent_without_a_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A meta tensor stands for one of a GPU."""
    sent: list[Tensor] = []
    monkeypatch.setattr(dist, "all_reduce", lambda message, async_op: sent.append(message))
    device = torch.device("meta")
    exchange = Exchange(World(device=device, size=2), StopRequest())
    with Copies() as copies:
        exchange.send([Totals(torch.ones(4, device=device))])
    assert sent[0].shape == (6,) and sent[0].device == device
    assert copies.without_waiting == [True]
