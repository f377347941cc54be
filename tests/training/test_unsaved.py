"""State that training changes and no checkpoint holds is named once, and nothing else is."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from running import TINY, config_of, train_config
from torch import Tensor, nn

from lab.plan import StepPlan, StepResult
from lab.state import TrainState
from lab.step import train_step
from regrow.numerics.unsaved import Unsaved
from regrow.protocols import Batch


class Net(nn.Module):
    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.inner = nn.LazyLinear(num_outputs)
        self.kept: Any = None

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.inner(inputs.flatten(1))
        self.look(outputs.detach())
        return outputs

    def look(self, outputs: Tensor) -> None: ...


class Counts(Net):
    """Counts its calls in a Python number, as one does to anneal something."""

    kept = 0

    def look(self, outputs: Tensor) -> None:
        self.kept = (self.kept or 0) + 1


class Averages(Net):
    """Keeps a running mean in a tensor that is not a buffer."""

    def __init__(self, num_outputs: int) -> None:
        super().__init__(num_outputs)
        self.kept = torch.zeros(num_outputs)

    def look(self, outputs: Tensor) -> None:
        self.kept.lerp_(outputs.mean(0), 0.1)


class Below(Net):
    def __init__(self, num_outputs: int) -> None:
        super().__init__(num_outputs)
        self.inner = nn.Sequential(nn.Flatten(), Counts(num_outputs))


class Registers(Net):
    """The control for `Counts` and `Averages`: a checkpoint holds the buffer."""

    def __init__(self, num_outputs: int) -> None:
        super().__init__(num_outputs)
        self.register_buffer("count", torch.zeros(()))

    def look(self, outputs: Tensor) -> None:
        self.count += 1


class Shows(Net):
    """Keeps its last outputs, which no step reads."""

    def look(self, outputs: Tensor) -> None:
        self.kept = outputs


class Remembers(Net):
    """Keeps its last outputs' mean, for a log."""

    def look(self, outputs: Tensor) -> None:
        self.kept = float(outputs.mean())


class Caches(Net):
    """Keeps a size of the first batch, as rotary embeddings do."""

    def __init__(self, num_outputs: int) -> None:
        super().__init__(num_outputs)
        self.kept = 0

    def look(self, outputs: Tensor) -> None:
        self.kept = max(self.kept, outputs.shape[1])


class Saves(Counts):
    """A counter that torch's own means save."""

    def get_extra_state(self) -> int:
        return int(self.kept)

    def set_extra_state(self, state: int) -> None:
        self.kept = state


class Centres(nn.Module):
    """A loss with a buffer, which is not part of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.mean = self.mean + 0.1 * outputs.detach().mean()
        return F.cross_entropy(outputs, targets, reduction="none")


class Fixed(Centres):
    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets, reduction="none")


class Step:
    def __init__(self) -> None:
        self.number = 0

    def __call__(self, state: TrainState, batch: Batch, plan: StepPlan) -> StepResult:
        self.number += 1
        return train_step(state, batch, plan)


class Teaches(Step):
    """Keeps a mean of the model's weights."""

    def __init__(self) -> None:
        self.teacher = nn.Linear(1, 1, bias=False)
        self.model: nn.Module | None = None

    def __call__(self, state: TrainState, batch: Batch, plan: StepPlan) -> StepResult:
        self.model = state.model  # the control: a checkpoint holds its weights
        with torch.no_grad():
            self.teacher.weight.mul_(0.9).add_(0.1)
        return train_step(state, batch, plan)


class Odd(Centres):
    """Has a buffer of inference mode, a NaN and the loss of the last call, and an odd object."""

    def __init__(self) -> None:
        super().__init__()
        self.nan, self.mirror = float("nan"), Mirror()

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        with torch.inference_mode():
            self.mean = self.mean + outputs.mean()
        return F.cross_entropy(outputs, targets, reduction="none")


class Mirror:
    __slots__ = ()

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)


class Counting(torch.optim.SGD):
    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr)
        self.number = 0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.number += 1
        super().step(closure)


class SavesItself(Counting):
    """The control: its own `state_dict` may hold the number."""

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict()


def warned(
    caplog: pytest.LogCaptureFixture, folder: Path, *overrides: str, **nodes: Any
) -> list[str]:
    caplog.clear()
    config = config_of(*TINY, "trainer.max_epochs=3", *overrides)
    for name, target in nodes.items():
        outputs = {"num_outputs": 3} if name == "model" else {}
        outputs |= {"_partial_": True, "lr": 0.1} if name == "optimizer" else {}
        config[name] = {"_target_": f"test_unsaved.{target}", **outputs}
    train_config(folder, config)
    lines = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    return [line.split()[2].rstrip(",") for line in lines if "no checkpoint holds" in line]


@pytest.mark.parametrize(
    ("node", "target", "name"),
    [
        ("model", "Counts", "model.kept"),
        ("model", "Averages", "model.kept"),
        ("model", "Below", "model.inner.1.kept"),
        ("loss", "Centres", "task.loss_fn.mean"),
        ("step", "Step", "step.number"),
        ("optimizer", "Counting", "optimizer.number"),
        ("step", "Teaches", "step.teacher.weight"),
        ("model", "Registers", None),
        ("model", "Shows", None),
        ("model", "Caches", None),
        ("model", "Remembers", None),
        ("model", "Saves", None),
        ("loss", "Fixed", None),
        ("loss", "Odd", None),
        ("optimizer", "SavesItself", None),
    ],
)
def test_state_that_no_checkpoint_holds_is_named_once(
    node: str, target: str, name: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert warned(caplog, tmp_path / "run", **{node: target}) == ([name] if name else [])


def test_one_of_several_optimizers_is_named(caplog: pytest.LogCaptureFixture) -> None:
    several = {name: Counting([nn.Parameter(torch.ones(()))], 0.1) for name in ("first", "other")}
    unsaved = Unsaved(nn.Linear(1, 1), optimizer=several)
    for _ in range(2):
        unsaved.look()
        several["other"].step()
    unsaved.look()
    assert caplog.messages[0].startswith("training changes optimizer.other.number, which no ")
    assert len(caplog.messages) == 1
