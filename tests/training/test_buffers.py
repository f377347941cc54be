"""Buffers that are views of one tensor: the model computes and is restored as before."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from regrow.errors import UserError
from regrow.numerics.buffers import Buffers
from regrow.numerics.totals import Skipped


class Aliased(nn.Module):
    """Keeps a view of a buffer, which must stay a view of it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("sums", torch.zeros(4))
        self.first: Any = self.sums[:2]  # type: ignore[index]


def networks() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    layers = [nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 3), nn.BatchNorm1d(3)]
    model = nn.Sequential(*layers)
    return model, copy.deepcopy(model)


def step(model: nn.Module, seed: int) -> None:
    model(torch.randn(6, 5, generator=torch.Generator().manual_seed(seed)))


def test_flat_buffers_change_no_number_and_take_one_copy_per_dtype() -> None:
    flat, own = networks()
    before = {name: buffer.data_ptr() for name, buffer in flat.named_buffers()}
    buffers = Buffers(flat, flat=True)
    assert [t.dtype for t in buffers.now] == [torch.float32, torch.int64]
    assert all(before[name] != buffer.data_ptr() for name, buffer in flat.named_buffers())
    assert len(Buffers(own).now) == 6
    for seed in range(3):
        step(flat, seed), step(own, seed)
    torch.testing.assert_close(flat.state_dict(), own.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("skipped", [True, False, *map(torch.tensor, (True, False, 1.0, 0.0))])
@pytest.mark.parametrize("flat", [True, False])
def test_only_a_skipped_step_restores_them(skipped: Any, flat: bool) -> None:
    model, _ = networks()
    buffers = Buffers(model, flat=flat)
    step(model, 0)
    before = copy.deepcopy(model.state_dict())
    buffers.remember()
    step(model, 1)
    after = copy.deepcopy(model.state_dict())
    buffers.restore(Skipped(skipped))
    expected = before if float(skipped) else after
    torch.testing.assert_close(dict(model.state_dict()), dict(expected), rtol=0, atol=0)
    assert not torch.equal(before["1.running_mean"], after["1.running_mean"])  # the control


def test_a_buffer_of_which_the_model_keeps_a_view_stays_where_it_is() -> None:
    model = Aliased()
    Buffers(model, flat=True)
    model.sums.add_(1)  # type: ignore[operator, union-attr]
    assert model.first.tolist() == [1, 1]


def test_buffers_that_share_one_memory_are_moved_unless_they_overlap() -> None:
    model, _ = networks()
    for _ in range(2):  # the second time, they are parts of the first one's flat tensors
        assert len(Buffers(model, flat=True).now) == 2
    held = Buffers(model, flat=True)  # still uses the flat tensors
    assert len(Buffers(model, flat=True).now) == 6
    del held
    model = nn.Module()
    model.register_buffer("most", torch.zeros(3))
    memory = model.most.untyped_storage()  # type: ignore[operator, union-attr]
    model.register_buffer("last", torch.empty(0).set_(memory, 2, (1,)))  # type: ignore[call-overload]
    assert len(Buffers(model, flat=True).now) == 2
    model.most.add_(1)  # type: ignore[operator]
    assert model.last.tolist() == [1]  # type: ignore[operator]


class Rotary(nn.Module):
    """Casts a cache to the type of its inputs, as rotary embeddings do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cosines", torch.ones(3), persistent=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.cosines = self.cosines.to(inputs.dtype)
        return inputs * self.cosines


@pytest.mark.parametrize("skipped", [True, False])
def test_a_cache_that_forward_casts_is_restored_in_its_new_type(skipped: bool) -> None:
    model = Rotary()
    buffers = Buffers(model, flat=True)
    buffers.remember()
    model(torch.ones(2, 3, dtype=torch.bfloat16))
    buffers.restore(Skipped(torch.tensor(skipped)))
    assert model.cosines.dtype == torch.bfloat16 and model.cosines.tolist() == [1, 1, 1]


class Placed(nn.Module):
    def __init__(self, *devices: str) -> None:
        super().__init__()
        for device in devices:
            self.register_buffer(f"on_{device}", torch.ones(3, device=device))


def test_flat_buffers_stay_on_their_devices() -> None:
    model = Placed("meta", "cpu")
    buffers = Buffers(model, flat=True)
    assert [str(buffer.device) for buffer in model.buffers()] == ["meta", "cpu"]
    assert [str(flat.device) for flat in buffers.now] == ["meta", "cpu"]
    assert torch.equal(model.on_cpu, torch.ones(3))  # type: ignore[arg-type]


class Rebinding(nn.Module):
    """Gives its buffer another value, as a new tensor."""

    def __init__(self, buffer: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("sums", buffer)


@pytest.mark.parametrize(
    ("before", "after"), [((), (3,)), ((3,), ()), ((3,), (1, 3)), ((0,), (3,)), ((0, 2), (0, 3))]
)
def test_a_persistent_buffer_of_changing_shape_is_named(
    before: tuple[int, ...], after: tuple[int, ...]
) -> None:
    model = nn.Sequential(nn.Identity(), Rebinding(torch.zeros(before)))
    buffers = Buffers(model)
    model[1].sums = torch.ones(before)
    buffers.check_shapes()
    buffers.remember()  # the control: another value of the same shape
    model[1].sums = torch.ones(after)
    for looks in (buffers.check_shapes, buffers.remember):
        with pytest.raises(UserError, match=r"^model: .* buffer 1\.sums from .*persistent=False"):
            looks()


def test_a_buffer_that_grows_from_nothing_is_restored() -> None:
    model = Rebinding(torch.zeros(0))
    buffers = Buffers(model, flat=True)
    for _ in range(2):
        buffers.remember()
        model.sums = torch.ones(2)
        buffers.restore()
        assert model.state_dict()["sums"].shape == (0,)


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("skipped", [True, False, *map(torch.tensor, (True, False, 1.0, 0.0))])
@pytest.mark.parametrize("rebound", [0, 1])
def test_a_buffer_of_two_modules_is_restored_in_both(
    rebound: int, skipped: Any, flat: bool
) -> None:
    shared = torch.zeros(2)
    model = nn.Sequential(Rebinding(shared), Rebinding(shared))
    buffers = Buffers(model, flat=flat)
    for step in (1, 2):
        buffers.remember()
        model[rebound].sums = model[rebound].sums + step
    assert model[rebound].sums.tolist() == [3, 3]
    buffers.restore(Skipped(skipped))
    if not float(skipped):
        buffers.remember()
    assert model[0].sums is model[1].sums
    assert model[0].sums.tolist() == ([1, 1] if float(skipped) else [3, 3])
