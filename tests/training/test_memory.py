"""Out of memory: the step is repeated in smaller micro-batches, and failed tries leave no trace."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from running import CPU, TINY, Bench, batch_of, config_of, fingerprint, metrics_of, train
from torch import Tensor, nn

from lab import evaluate, step
from lab.build import check_first_batch
from lab.tasks import losses
from lab.tasks.tasks import Multiclass
from regrow.errors import UserError, machine_fault
from regrow.numerics import calls
from regrow.numerics.capture import Eager
from regrow.processes.interrupt import StopRequest
from regrow.runs import model_checks, training

SGD = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)


class Crowded(nn.Module):
    """Fails like CUDA's allocator for more than `room` examples at once, in forward or backward."""

    def __init__(self, room: int, *, in_backward: bool = False) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
        self.room, self.in_backward, self.failures = room, in_backward, 0

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.layers(inputs)
        if self.training and len(inputs) > self.room:
            if not self.in_backward:
                self.fail()
            outputs.register_hook(self.fail)
        return outputs

    def fail(self, *_: Any) -> None:
        self.failures += 1
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def task_of() -> Multiclass:
    return Multiclass(
        num_classes=3,
        class_names=None,
        monitor="val/accuracy",
        per_class=False,
        auroc=False,
        extra_metrics=None,
        loss=losses.CrossEntropy(label_smoothing=0.0, class_weights=None, ignore_index=None),
    )


def batches() -> list[Any]:
    random = torch.Generator().manual_seed(3)
    return [
        batch_of(torch.randn(n, 6, generator=random), torch.randint(0, 3, (n,), generator=random))
        for n in (16, 16, 8)
    ]


def trained(room: int, *, slices: int = 1, **options: Any) -> tuple[Bench, list[Any]]:
    torch.manual_seed(1)
    bench = Bench(Crowded(room, **options), task_of(), SGD, slices=slices)
    return bench, [bench.step(batch) for batch in batches()]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    ],
)
def test_no_room_for_an_update_or_an_evaluation_is_one_line(
    error: RuntimeError, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(evaluate, "measure", full)
    with pytest.raises(UserError, match=r"an evaluation ran out .* data\.eval_batch_size") as told:
        train(tmp_path / "evaluation", *TINY)
    assert machine_fault(told.value) is None  # which the run would tell in its place
    monkeypatch.setattr(torch.optim.AdamW, "step", full)
    with pytest.raises(UserError, match=r"update of step 1 ran out of memory\. Use an optimizer"):
        train(tmp_path / "update", *TINY)


def test_an_evaluation_without_room_frees_the_graphs_of_steps_and_begins_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = (*TINY, "data.eval_batch_size=6", "model.dropout=0.2")
    train(tmp_path / "roomy", *run)
    call, calls_made, released = evaluate.call, itertools.count(), []

    def crowded(*given: Any) -> Any:
        if next(calls_made) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return call(*given)

    monkeypatch.setattr(evaluate, "call", crowded)
    monkeypatch.setattr(Eager, "release", lambda self: released.append(self) is None)
    train(tmp_path / "crowded", *run)
    assert len(released) == 1
    assert fingerprint(tmp_path / "crowded") == fingerprint(tmp_path / "roomy")


@pytest.mark.parametrize("in_backward", [False, True])
def test_a_step_without_room_is_done_again_in_micro_batches_that_fit(in_backward: bool) -> None:
    """BatchNorm and momentum would show any trace of the abandoned tries."""
    cramped, lines = trained(4, in_backward=in_backward)
    roomy, expected = trained(1000, slices=4)
    assert cramped.state.model.failures == 2  # 16, then 8; from then on, 4 fits
    assert cramped.state.progress.num_micro_batches == 4
    for a, b in zip(
        cramped.state.model.state_dict().values(),
        roomy.state.model.state_dict().values(),
        strict=True,
    ):
        assert torch.equal(a, b)
    for line, other in zip(lines, expected, strict=True):
        assert line["train/loss"] == other["train/loss"]


def test_a_trace_of_an_abandoned_try_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    roomy, _ = trained(1000, slices=4)
    monkeypatch.setattr("regrow.numerics.buffers.Buffers.restore", lambda self, *skipped: None)
    cramped, _ = trained(4)
    found, expected = (b.state.model.layers[1].running_mean for b in (cramped, roomy))
    assert not torch.equal(found, expected)


def test_when_nothing_is_left_to_halve_one_line_says_what_to_change(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(nn, "BatchNorm1d", nn.LayerNorm)  # which also trains on one example
    with pytest.raises(UserError, match="nothing is left to halve") as caught:
        trained(0)
    assert "trainer.precision=bf16" in str(caught.value) and "\n" not in str(caught.value)


def test_a_loss_that_cannot_be_split_is_not_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Multiclass, "sums_over_examples", False, raising=False)
    monkeypatch.setattr(
        Multiclass,
        "__setattr__",
        lambda s, n, v: n == "sums_over_examples" or s.__dict__.update({n: v}),
    )
    with pytest.raises(UserError, match="this loss cannot be split"):
        trained(4)


def test_batchnorm_on_one_example_is_found_before_the_run_starts() -> None:
    small = ("model.norm=batch", "trainer.accumulation_steps=4")  # the last window has 2 examples
    with pytest.raises(UserError, match="cannot train on one"):
        checked(*TINY, *small)
    checked(*TINY, *small, "data.drop_last=true")
    checked(*TINY, "model.norm=layer", "trainer.accumulation_steps=4")


def checked(*overrides: str) -> None:
    objects = training.build(config_of(*overrides), CPU)
    before = [b.clone() for b in objects.state.model.buffers()]
    check_first_batch(objects, CPU)
    after = list(objects.state.model.buffers())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_no_room_for_the_model_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(nn.Module, "to", full)
    with pytest.raises(UserError, match=r"trainer\.device=cpu: cpu has no room for the model"):
        training.build(config_of(*TINY), CPU)


def test_a_first_batch_whose_graph_has_no_room_is_checked_in_part(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An evaluation keeps no graph, so its batch may be larger than the check can take."""
    sizes = []

    def crowded(model: nn.Module, inputs: Tensor) -> Any:
        sizes.append(len(inputs))
        next(model.buffers()).add_(1)  # as far as a forward pass has come
        if len(inputs) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return calls.call(model, inputs)

    monkeypatch.setattr(model_checks, "call", crowded)
    most = 6
    checked(*TINY, "model.norm=batch")
    assert sizes[:3] == [20, 10, 5]
    most = 0
    with pytest.raises(UserError, match=r"check_first_batch: out of memory with one example\."):
        checked(*TINY, "model.norm=batch")


def test_any_other_error_is_not_taken_for_a_lack_of_memory() -> None:
    assert not calls.is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert calls.is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: not enough"))


def test_the_number_of_micro_batches_is_kept_across_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed run keeps the number of micro-batches found, without running out again."""
    failures = []
    forward = step.forward

    def crowded(batch: Any, plan: Any) -> Any:
        if batch.num_local > 8:
            failures.append(batch.num_local)
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(batch, plan)

    monkeypatch.setattr(step, "forward", crowded)
    train(tmp_path / "whole", *TINY)
    assert failures == [16]
    train(tmp_path / "cut", *TINY, stop_at=5)
    train(tmp_path / "cut", *TINY)
    assert failures == [16, 16]
    assert fingerprint(tmp_path / "whole") == fingerprint(tmp_path / "cut")
    assert metrics_of(tmp_path / "whole") == metrics_of(tmp_path / "cut")


def test_a_run_without_room_for_one_example_ends_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crowded(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(step, "forward", crowded)
    config = config_of(*TINY)
    with pytest.raises(UserError, match="out of memory"):
        training.train(training.build(config, CPU), config, tmp_path, CPU, StopRequest())
