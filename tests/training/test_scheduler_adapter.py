"""torch's and timm's schedulers by `_target_`: their own values, exact resumes, clear errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from running import CPU, TINY, config_of, fingerprint, metrics_of, train
from torch.optim import lr_scheduler

from lab.build import schedule_of
from lab.schedules import RunLength
from regrow.config.check import check_signature
from regrow.config.targets import allow
from regrow.errors import UserError
from regrow.runs import training

PER_EPOCH, EPOCHS = 7, 9
TOTAL = PER_EPOCH * EPOCHS
LENGTH = RunLength(total_steps=TOTAL, steps_per_epoch=PER_EPOCH)
LR = 0.3
TORCH = "torch.optim.lr_scheduler."
NODES: dict[str, dict[str, Any]] = {
    "CosineAnnealingWarmRestarts": {"T_0": 2, "T_mult": 2, "eta_min": 0.01},
    "CosineAnnealingLR": {"T_max": 5},
    "StepLR": {"step_size": 2, "gamma": 0.5},
    "MultiStepLR": {"milestones": [1, 4], "gamma": 0.5},
    "ExponentialLR": {"gamma": 0.9},
    "LinearLR": {"total_iters": 4},
    "ConstantLR": {"total_iters": 3},
    "PolynomialLR": {"total_iters": 6, "power": 2.0},
    "OneCycleLR": {"max_lr": 0.5, "total_steps": TOTAL},
    "CyclicLR": {"base_lr": 0.1, "max_lr": 0.4, "step_size_up": 3},
}
SEQUENTIAL = {
    "milestones": [3],
    "schedulers": [
        {"_target_": f"{TORCH}LinearLR", "start_factor": 0.1, "total_iters": 3},
        {"_target_": f"{TORCH}CosineAnnealingLR", "T_max": 20},
    ],
}


def sgd(lr: float = LR) -> torch.optim.Optimizer:
    parameter = torch.nn.Parameter(torch.zeros(1))
    groups: list[dict[str, Any]] = [{"params": [parameter], "base_lr": lr, "lr_scale": 1.0}]
    return torch.optim.SGD(groups, lr=lr, momentum=0.9)


def adapted(name: str, interval: str, node: dict[str, Any] | None = None, **more: Any) -> Any:
    node = {**(NODES[name] if node is None else node), **more}
    node |= {"_target_": f"{TORCH}{name}", "interval": interval}
    allow(node)
    return schedule_of(node, sgd(), LENGTH)


def torchs(name: str, interval: str) -> tuple[list[float], list[float]]:
    """Return torch's own learning rates and momenta, one per step."""
    optimizer = sgd()
    scheduler = getattr(lr_scheduler, name)(optimizer, **NODES[name])
    rates, momenta = [], []
    for step in range(TOTAL):
        rates.append(optimizer.param_groups[0]["lr"])
        momenta.append(optimizer.param_groups[0]["momentum"])
        optimizer.step()
        if step + 1 < TOTAL and (interval == "step" or (step + 1) % PER_EPOCH == 0):
            scheduler.step()
    return rates, momenta


@pytest.mark.parametrize("interval", ["step", "epoch"])
@pytest.mark.parametrize("name", NODES)
def test_rates_and_momenta_are_torchs_own(name: str, interval: str) -> None:
    schedule = adapted(name, interval)
    rates, momenta = [], []
    for step in range(TOTAL):
        rates.append(LR * schedule(step))
        momenta.append(schedule.optimizer.param_groups[0]["momentum"])
    expected_rates, expected_momenta = torchs(name, interval)
    assert rates == pytest.approx(expected_rates, rel=1e-12, abs=1e-15)
    assert momenta == expected_momenta
    other, _ = torchs(name, "epoch" if interval == "step" else "step")
    assert rates != pytest.approx(other, rel=1e-6)  # the control: the other interval


NESTED = {
    "milestones": [35],
    "schedulers": [
        {"_target_": f"{TORCH}LinearLR", "start_factor": 0.1, "total_iters": 3},
        {"_target_": f"{TORCH}MultiStepLR", "milestones": [2, 9]},
    ],
}


@pytest.mark.parametrize("name", [*NODES, "SequentialLR", "nested"])
def test_a_saved_schedule_continues_exactly(name: str, tmp_path: Path) -> None:
    node = {"SequentialLR": SEQUENTIAL, "nested": NESTED}.get(name)
    name = "SequentialLR" if node else name
    whole, first, second = (adapted(name, "step", node) for _ in range(3))
    expected = [whole(step) for step in range(TOTAL)]
    for step in range(30):
        first(step)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert second.count == 29
    assert [second(step) for step in range(30, TOTAL)] == expected[30:]
    assert second.group["lr"] == whole.group["lr"]


def test_other_options_at_the_resume_are_followed_from_the_first_step() -> None:
    before, after = adapted("StepLR", "step"), adapted("StepLR", "step", gamma=0.25)
    for step in range(10):
        before(step)
    after.load_state_dict(before.state_dict())
    assert after(10) == adapted("StepLR", "step", gamma=0.25)(10) != before(10)


def test_an_earlier_step_may_be_asked_for() -> None:
    schedule = adapted("ExponentialLR", "step")
    assert schedule(9) < schedule(3)
    assert schedule(3) == pytest.approx(0.9**3)


RUN = (
    *TINY,
    "task.per_class=false",
    "task.auroc=false",
    "scheduler=warm_restarts",
    "scheduler.T_0=1",
    "model.dropout=0.3",
)


@pytest.mark.parametrize("interval", ["step", "epoch"])
@pytest.mark.parametrize("stop_at", [3, 4, 5])
def test_a_run_resumes_exactly(interval: str, stop_at: int, tmp_path: Path) -> None:
    run = (*RUN, f"scheduler.interval={interval}")
    train(tmp_path / "whole", *run)
    train(tmp_path / "stopped", *run, stop_at=stop_at)
    train(tmp_path / "stopped", *run)
    assert fingerprint(tmp_path / "stopped") == fingerprint(tmp_path / "whole")
    rates = [line["train/lr"] for line in metrics_of(tmp_path / "whole") if "train/lr" in line]
    assert len({round(rate, 12) for rate in rates}) > 1


def test_scaled_groups_keep_their_scale(tmp_path: Path) -> None:
    train(tmp_path, *RUN, "param_groups.lr_scale={body.*: 0.1}", "scheduler.interval=step")
    lines = [line for line in metrics_of(tmp_path) if "train/lr" in line]
    assert len(lines) == 12
    for line in lines:
        assert line["train/lr/x0.1"] == pytest.approx(0.1 * line["train/lr"])


@pytest.mark.parametrize(
    ("name", "node", "says"),
    [
        ("ReduceLROnPlateau", {}, "Use scheduler=plateau"),
        ("CosineAnnealingLR", {}, "T_max"),
        ("OneCycleLR", {"max_lr": 0.5, "total_steps": 20}, "Set scheduler.total_steps=63"),
        ("StepLR", {"step_size": "two", "gamma": 0.5}, "Correct its options"),
    ],
)
def test_a_scheduler_that_cannot_work_is_one_line_before_the_run(
    name: str, node: dict[str, Any], says: str
) -> None:
    with pytest.raises(UserError) as refused:
        adapted(name, "step", node)
    assert says in str(refused.value) and "\n" not in str(refused.value)


def test_keys_of_our_own_schedules_do_not_apply() -> None:
    node = {"_target_": f"{TORCH}StepLR", "step_size": 2, "interval": "epoch"}
    check_signature(node, "scheduler")
    with pytest.raises(UserError, match=r"scheduler\.warmup_steps"):
        check_signature({**node, "warmup_steps": 5}, "scheduler")


class TimmLike:
    """timm's interface: a function of a count passed to it."""

    def __init__(self, optimizer: Any, t_initial: int, t_in_epochs: bool = True) -> None:
        self.optimizer, self.t_initial, self.t_in_epochs = optimizer, t_initial, t_in_epochs
        self.base = optimizer.param_groups[0]["lr"]

    def _set(self, count: int) -> None:
        self.optimizer.param_groups[0]["lr"] = self.base * (1 - count / self.t_initial)

    def step(self, epoch: int, metric: Any = None) -> None:
        if self.t_in_epochs:
            self._set(epoch)

    def step_update(self, num_updates: int, metric: Any = None) -> None:
        if not self.t_in_epochs:
            self._set(num_updates)

    def state_dict(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "optimizer"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_timms_interface_is_stepped_with_its_count(interval: str) -> None:
    node: dict[str, Any] = {
        "_target_": f"{__name__}.TimmLike",
        "t_initial": TOTAL,
        "t_in_epochs": interval == "epoch",
        "interval": interval,
    }
    allow(node)
    schedule = schedule_of(node, sgd(), LENGTH)
    per_count = PER_EPOCH if interval == "epoch" else 1
    for step in range(TOTAL):
        assert schedule(step) == pytest.approx(1 - (step // per_count) / TOTAL)
    with pytest.raises(UserError, match=r"Use scheduler\.interval="):
        schedule_of({**node, "t_in_epochs": interval != "epoch"}, sgd(), LENGTH)


def test_the_whole_build_makes_it_from_yaml_alone() -> None:
    config = config_of(*RUN)
    objects = training.build(config, CPU)
    assert objects.state.state_dict()["schedule"]["count"] == 0
