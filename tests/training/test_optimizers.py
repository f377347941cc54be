"""The optimizers: groups by rule, Muon with AdamW; each shipped one learns and resumes."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from running import TINY, Bench, batch_of, fingerprint, metrics_of, train
from torch import nn

from lab import optim
from lab.optim import Clipping, MuonWithAdamW
from lab.tasks import losses
from lab.tasks.tasks import Regression
from regrow.errors import UserError
from regrow.numerics import totals
from regrow.numerics.totals import Totals, gradient_norm
from regrow.project import CONF

OPTIMIZERS = sorted(path.stem for path in (CONF / "optimizer").glob("*.yaml"))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_learns_and_resumes_exactly(name: str, tmp_path: Path) -> None:
    run = (*TINY, f"optimizer={name}", "trainer.max_epochs=6", "optimizer.lr=0.01")
    whole = train(tmp_path / "whole", *run)
    for stop in (5, 10):
        train(tmp_path / "cut", *run, stop_at=stop)
    again = train(tmp_path / "cut", *run)
    assert whole["weights_sha256"] == again["weights_sha256"]
    assert fingerprint(tmp_path / "whole") == fingerprint(tmp_path / "cut")
    means = [x["train/epoch_loss"] for x in metrics_of(tmp_path / "cut") if "train/epoch_loss" in x]
    assert means[-1] < means[0] - 0.01


@pytest.mark.parametrize("name", [n for n in OPTIMIZERS if n not in ("sgd", "adagrad")])
def test_moments_that_are_not_restored_are_caught(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = (*TINY, f"optimizer={name}", "trainer.max_epochs=2", "optimizer.lr=0.01")
    whole = train(tmp_path / "whole", *run)
    train(tmp_path / "cut", *run, stop_at=5)
    monkeypatch.setattr(torch.optim.Optimizer, "load_state_dict", lambda self, state: None)
    assert train(tmp_path / "cut", *run)["weights_sha256"] != whole["weights_sha256"]


def net() -> nn.Module:
    torch.manual_seed(1)
    layers = nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Unflatten(1, (2, 4))
    return nn.Sequential(*layers, nn.Conv1d(2, 3, 3), nn.Flatten(), nn.Linear(6, 4))


def learn(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(3)
    for _ in range(4):
        model.zero_grad()
        inputs = torch.randn(9, 6, generator=random)
        F.mse_loss(model(inputs), inputs[:, :4]).backward()
        for optimizer in optimizers:
            optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def resumed(kind: Any, before: dict[str, Any], after: dict[str, Any]) -> torch.optim.Optimizer:
    """Return an optimizer of the settings `after` with the state of one that made a step before."""

    def made(settings: dict[str, Any]) -> torch.optim.Optimizer:
        model = nn.Linear(3, 2)
        model(torch.ones(4, 3)).sum().backward()
        groups = optim.parameter_groups(model, lr_scale=None, decay_norms_and_biases=True)
        return optim.build(functools.partial(kind, lr=0.1, **settings), groups)

    earlier = made(before)
    earlier.step()
    later = made(after)
    optim.load(later, {**earlier.state_dict(), optim.CLASS: kind.__qualname__})
    return later


@pytest.mark.parametrize(
    ("kind", "name", "before", "after"),
    [
        (torch.optim.NAdam, "decoupled_weight_decay", True, False),
        (torch.optim.SGD, "maximize", False, True),
        (torch.optim.SGD, "momentum", 0.0, 0.9),
        (torch.optim.Adam, "amsgrad", True, False),
        (torch.optim.Adadelta, "rho", 0.9, 0.5),  # a class without a file in conf/
        (torch.optim.Adafactor, "d", 1.0, 2.0),  # a class that names torch.optim as its module
    ],
)
def test_a_setting_is_the_configured_one_after_a_resume(
    kind: Any, name: str, before: Any, after: Any
) -> None:
    later = resumed(kind, {name: before}, {name: after})
    assert later.param_groups[0][name] == after
    later.step()


class Annealed(torch.optim.SGD):
    """An optimizer of the user's own that changes an argument of its own as it trains."""

    def __init__(self, params: Any, lr: float, heat: float) -> None:
        super().__init__(params, lr)
        for group in self.param_groups:
            group["heat"] = heat

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["heat"] /= 2


def test_an_argument_that_a_class_of_ones_own_changes_is_state() -> None:
    assert resumed(Annealed, {"heat": 1.0}, {"heat": 1.0}).param_groups[0]["heat"] == 0.5


@pytest.mark.parametrize(
    ("kind", "name", "before", "after"),
    [
        (torch.optim.RMSprop, "momentum", 0.0, 0.9),
        (torch.optim.RMSprop, "centered", False, True),
        (torch.optim.Adam, "amsgrad", False, True),
        (torch.optim.AdamW, "amsgrad", False, True),
    ],
)
def test_a_setting_whose_moments_the_checkpoint_lacks_is_one_line(
    kind: Any, name: str, before: Any, after: Any
) -> None:
    with pytest.raises(UserError, match=f"optimizer.{name}=.* lacks the moments"):
        resumed(kind, {name: before}, {name: after})
    assert resumed(kind, {name: after}, {name: after}).param_groups[0][name] == after


def test_the_groups_of_another_torch_may_have_more_keys_or_fewer() -> None:
    optimizer = torch.optim.SGD(net().parameters(), lr=0.1)
    own = dict.fromkeys(optimizer.param_groups[0])
    for groups in ([own], [own | {"later": 0}], [{"params": []}]):
        assert not optim.is_of_another(optimizer, {"param_groups": groups}, None)
    assert optim.is_of_another(optimizer, {"param_groups": [{"later": 0}]}, None)


MUON: dict[str, Any] = {
    "lr": 0.01,
    "momentum": 0.95,
    "nesterov": True,
    "ns_steps": 5,
    "weight_decay": 0.1,
    "adjust_lr_fn": "match_rms_adamw",
}
ADAMW: dict[str, Any] = {
    "adamw_modules": ["head"],
    "adamw_betas": (0.9, 0.999),
    "adamw_eps": 1e-8,
}


def test_muon_takes_the_matrices_and_adamw_the_rest_as_torchs_own_do() -> None:
    model = net()
    groups = optim.parameter_groups(model, lr_scale={}, decay_norms_and_biases=False)
    make = functools.partial(MuonWithAdamW, **MUON, **ADAMW, kernels=False)
    together = learn(model, [optim.build(make, groups)])

    model = net()
    matrices = [p for p in model.parameters() if p.ndim == 2]
    kernels = [p for p in model.parameters() if p.ndim == 3]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    assert matrices
    assert kernels
    adamw = torch.optim.AdamW(
        [{"params": kernels, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=0.01,
        fused=True,
    )
    by_hand = learn(model, [torch.optim.Muon(matrices, **MUON), adamw])
    for a, b in zip(together, by_hand, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)

    model = net()
    adamw_alone = learn(model, [torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)])
    with pytest.raises(AssertionError):
        for a, b in zip(together, adamw_alone, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def with_kernels(layout: Any) -> nn.Module:
    """Kernels of all kinds: one channel, groups, one position, several of each."""
    torch.manual_seed(2)
    layers = nn.Conv2d(1, 3, 1), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 2, groups=4)
    model = nn.Sequential(*layers, nn.Conv2d(4, 8, 2), nn.Conv2d(8, 2, 1), nn.Flatten())
    return model.to(memory_format=layout)


def learn_kernels(optimizers_of: Callable[[nn.Module], Any], layout: Any) -> list[torch.Tensor]:
    model = with_kernels(layout)
    optimizers = optimizers_of(model)
    random = torch.Generator().manual_seed(3)
    for _ in range(4):
        model.zero_grad()
        model(torch.randn(5, 1, 6, 6, generator=random)).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_on_a_device_does_torchs_step_and_skips_a_bad_one(nesterov: bool) -> None:
    torch.manual_seed(0)
    matrices = [nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(3, 5))]
    copies = copy.deepcopy(matrices)
    options = {"lr": 0.02, "momentum": 0.9, "nesterov": nesterov, "weight_decay": 0.1}
    on_host, on_device = (torch.optim.Muon(each, **options) for each in (matrices, copies))
    on_device.param_groups[0]["lr"] = torch.tensor(0.02)
    for _ in range(3):
        for one, other in zip(matrices, copies, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        on_host.step()
        optim.muon_on_device(on_device, torch.tensor(0.0))
        torch.testing.assert_close(copies, matrices)
    before = copy.deepcopy([copies, [on_device.state[p]["momentum_buffer"] for p in copies]])
    for other in copies:
        other.grad = torch.full_like(other, torch.nan)
    optim.muon_on_device(on_device, torch.tensor(1.0))
    after = [copies, [on_device.state[p]["momentum_buffer"] for p in copies]]
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    optim.muon_on_device(on_device, torch.tensor(0.0))
    assert copies[0].isnan().all()  # the control


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_muon_takes_kernels_as_matrices_of_filters(layout: Any) -> None:
    def ours(model: nn.Module, kernels: bool = True) -> Any:
        return [muon(model, kernels=kernels)]

    def by_hand(model: nn.Module) -> Any:
        kernels = [p for p in model.parameters() if p.ndim == 4]
        matrices = [nn.Parameter(p.detach().flatten(1).clone()) for p in kernels]
        muon = torch.optim.Muon(matrices, **MUON)
        vectors = [p for p in model.parameters() if p.ndim == 1]
        adamw = torch.optim.AdamW(vectors, lr=0.01, weight_decay=0.0, fused=True)

        class Flattened:
            def step(self) -> None:
                for kernel, matrix in zip(kernels, matrices, strict=True):
                    assert kernel.grad is not None
                    matrix.grad = kernel.grad.flatten(1)
                muon.step()
                for kernel, matrix in zip(kernels, matrices, strict=True):
                    kernel.data.copy_(matrix.data.view_as(kernel))

        return [Flattened(), adamw]

    found = learn_kernels(ours, layout)
    for a, b in zip(found, learn_kernels(by_hand, torch.contiguous_format), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
    without = learn_kernels(functools.partial(ours, kernels=False), layout)
    assert max((a - b).abs().max().item() for a, b in zip(found, without, strict=True)) > 1e-3


def muon(model: nn.Module, **changed: Any) -> Any:
    groups = optim.parameter_groups(model, lr_scale={}, decay_norms_and_biases=False)
    options = {**MUON, **ADAMW, "kernels": False, **changed}
    return optim.build(functools.partial(MuonWithAdamW, **options), groups)


def test_a_kernel_is_moved_from_its_present_values_and_only_by_a_gradient() -> None:
    model = with_kernels(torch.contiguous_format)
    optimizer = muon(model, kernels=True, weight_decay=0.0)
    kernels = [p for p in model.parameters() if p.ndim == 4]
    for kernel in kernels:  # as a checkpoint's
        kernel.data.fill_(2.0)
    kernels[0].grad = torch.ones_like(kernels[0])
    optimizer.step()
    assert 1.5 < kernels[0].min() <= kernels[0].max() < 2.0
    assert all(bool((kernel == 2.0).all()) for kernel in kernels[1:])


def test_the_momentum_of_a_kernel_does_not_follow_its_layout_in_memory() -> None:
    """Checkpoints hold it, and a run may be resumed with another layout."""
    momenta = []
    for layout in (torch.contiguous_format, torch.channels_last):
        model = with_kernels(layout)
        optimizer = muon(model, kernels=True)
        inputs = torch.randn(5, 1, 6, 6, generator=torch.Generator().manual_seed(3))
        model(inputs).square().mean().backward()
        optimizer.step()
        momenta.append(optimizer.state_dict()["parts"][0]["state"])
        optimizer.zero_grad()
        assert all(p.grad is None for p in model.parameters())
    assert len(momenta[0]) == 5
    for number, state in momenta[0].items():
        one, other = state["momentum_buffer"], momenta[1][number]["momentum_buffer"]
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)
    turned = momenta[0][1]["momentum_buffer"].view(4, 3, 3, 3).permute(0, 2, 3, 1).flatten(1)
    assert not torch.allclose(turned, momenta[1][1]["momentum_buffer"], atol=1e-6)


@pytest.mark.parametrize(
    ("modules", "kernels", "left"),
    [
        ([], False, {"0.weight", "head.weight", "embed.weight"}),
        (["head", "*embed*"], False, {"0.weight"}),
        (["head", "*embed*"], True, {"0.weight", "conv.weight"}),
    ],
)
def test_muon_takes_the_matrices_that_its_options_leave_it(
    modules: list[str], kernels: bool, left: set[str]
) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model.add_module("head", nn.Linear(4, 3))
    model.add_module("embed", nn.Embedding(5, 4))
    model.add_module("conv", nn.Conv1d(2, 3, 3))
    model.register_parameter("token", nn.Parameter(torch.zeros(1, 1, 4)))
    groups = muon(model, adamw_modules=modules, kernels=kernels).param_groups
    names = {name for group in groups if group["is_for_muon"] for name in group["param_names"]}
    assert names == left
    assert {name for group in groups for name in group["param_names"]} == {
        name for name, _ in model.named_parameters()
    }


def test_a_checkpoint_of_other_groups_is_one_line() -> None:
    saved = muon(with_kernels(torch.contiguous_format), kernels=False).state_dict()
    with pytest.raises(UserError, match=r"does not fit.*param_groups as they were"):
        optim.load(muon(with_kernels(torch.contiguous_format), kernels=True), saved)


def test_rates_and_decay_follow_the_rules_of_the_groups() -> None:
    model = net()
    groups = optim.parameter_groups(model, lr_scale={"6": 0.1}, decay_norms_and_biases=False)
    optimizer = optim.build(functools.partial(torch.optim.SGD, lr=0.5, weight_decay=0.2), groups)
    optim.set_lr(optimizer, 0.5)
    assert optim.rates(optimizer) == pytest.approx({"lr": 0.25, "lr/x0.1": 0.025})
    found = {
        id(p): (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    for name, parameter in model.named_parameters():
        lr, decay = found[id(parameter)]
        assert lr == pytest.approx(0.025 if name.startswith("6.") else 0.25), name
        assert decay == (0.2 if parameter.ndim > 1 else 0.0), name
    groups = optim.parameter_groups(model, lr_scale={"0": 0.1}, decay_norms_and_biases=False)
    optimizer = optim.build(functools.partial(torch.optim.SGD, lr=0.25), groups)
    optim.set_lr(optimizer, 1.0)
    assert optim.rates(optimizer) == pytest.approx({"lr": 0.25, "lr/x0.1": 0.025})
    with pytest.raises(UserError, match="no trainable parameter matches backbone"):
        optim.parameter_groups(model, lr_scale={"backbone": 0.1}, decay_norms_and_biases=False)
    with pytest.raises(UserError, match="matches 6, or earlier patterns, which win, match the"):
        optim.parameter_groups(model, lr_scale={"*": 0.1, "6": 1}, decay_norms_and_biases=False)
    model.requires_grad_(False)
    with pytest.raises(UserError, match="requires_grad is false for all parameters"):
        optim.parameter_groups(model, lr_scale={}, decay_norms_and_biases=False)


# The path of devices that skip a step themselves, with the CPU's fused kernels.


def steps_of(make: Any, on_device: bool, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Return the weights after a good, a bad and a good step."""
    monkeypatch.setattr(optim, "skips_on_device", lambda optimizer, device: on_device)
    monkeypatch.setattr(totals, "on_host", lambda device: not on_device)
    torch.manual_seed(1)
    model = nn.Linear(6, 1)
    task = Regression(
        num_outputs=1,
        monitor="val/rmse",
        target_names=None,
        per_target=True,
        extra_metrics=None,
        loss=losses.mse,
    )
    bench = Bench(model, task, make, clip_norm=0.1, clip_value=0.05, ema_decay=0.5)
    random = torch.Generator().manual_seed(2)
    for bad in (False, True, False):
        inputs = torch.randn(5, 6, generator=random)
        inputs[2, 3] = torch.inf if bad else 1.0
        bench.step(batch_of(inputs, torch.randn(5, generator=random)))
    assert bench.state.averaged is not None
    return [p.detach() for m in (model, bench.state.averaged) for p in m.parameters()]


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_a_device_that_skips_by_itself_ends_with_the_same_weights(
    kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    make = functools.partial(kind, lr=0.1, fused=True, **options)
    asked = steps_of(make, False, monkeypatch)
    by_itself = steps_of(make, True, monkeypatch)
    for a, b in zip(asked, by_itself, strict=True):
        assert a.isfinite().all()
        assert a.abs().sum() > 0
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
    # Without the flag, the same path applies the bad numbers.
    monkeypatch.setattr(kind, "found_inf", None, raising=False)
    monkeypatch.setattr(kind, "__setattr__", _without_flag)
    broken = steps_of(make, True, monkeypatch)
    assert not all(b.isfinite().all() for b in broken)


def _without_flag(self: Any, name: str, value: Any) -> None:
    if name != "found_inf":
        object.__setattr__(self, name, value)


def test_a_device_gets_the_count_of_steps_of_a_checkpoint_without_its_kernels() -> None:
    """Else a fused kernel of a GPU would read memory of the host."""

    def adamw(device: str, **kernels: bool) -> torch.optim.Optimizer:
        parameter = nn.Parameter(torch.ones(3, device=device))
        parameter.grad = torch.ones(3, device=device)
        make = functools.partial(torch.optim.AdamW, lr=0.1, **kernels)
        group = {"params": [parameter], "param_names": ["weight"], "lr_scale": 1.0}
        return optim.build(make, [group])

    before, after = adamw("cpu", fused=False), adamw("meta", capturable=True)
    before.step()
    optim.load(after, before.state_dict())
    (moments,) = after.state.values()
    assert {name: its.device.type for name, its in moments.items()} == dict.fromkeys(
        ("step", "exp_avg", "exp_avg_sq"), "meta"
    )


def test_clipping_on_a_device_does_not_ask_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A meta tensor has no value to wait for: any host synchronisation raises."""
    monkeypatch.setattr(optim, "skips_on_device", lambda optimizer, device: True)
    parameter = nn.Parameter(torch.zeros(3, device="meta"))
    parameter.grad = torch.zeros(3, device="meta")

    class Sink(torch.optim.Optimizer):
        def __init__(self) -> None:
            super().__init__([parameter], {})

        def step(self, closure: Any = None) -> None:
            assert self.found_inf.device.type == "meta"  # type: ignore[attr-defined]

    gradients = [parameter.grad]
    norm = gradient_norm(gradients)
    factor = torch.ones((), device="meta")
    step = Totals(torch.ones(4, device="meta"))
    for clipping in (Clipping(1.0, 0.1), Clipping(None, None)):
        optim.update(Sink(), gradients, norm, factor=factor, clipping=clipping, totals=step)
    monkeypatch.setattr(optim, "skips_on_device", lambda optimizer, device: False)
    with pytest.raises((RuntimeError, NotImplementedError)):
        optim.update(Sink(), gradients, norm, factor=factor, clipping=clipping, totals=step)
