"""Steps replayed as CUDA graphs: the bits of uncaptured ones, or uncaptured with a reason."""

from __future__ import annotations

import copy
import functools
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from running import Bench, batch_of, fingerprint, options_of, train
from torch import Tensor, nn
from waits import no_wait_for_the_gpu

from lab import optim
from lab.tasks import losses
from lab.tasks.tasks import Multiclass
from regrow.distributed.parallel import World
from regrow.numerics import capture
from regrow.numerics.precision import LossScale

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")

GPU = World(device=torch.device("cuda", 0))
RUN = (
    *("data=digits", "data.batch_size=96", "model=cnn", "model.channels=[8]", "model.dropout=0.2"),
    *("trainer.max_epochs=5", "trainer.num_threads=1", "trainer.log_every_steps=1"),
    *("trainer.device=cuda", "trainer.deterministic=true"),
    *("trainer.ema_decay=0.9", "trainer.clip_norm=1"),
)
CAPTURED = "are replayed as CUDA graphs"
MAKERS: dict[str, Callable[..., Any]] = {
    "adamw": functools.partial(torch.optim.AdamW, lr=0.01, fused=True),
    "adam": functools.partial(torch.optim.Adam, lr=0.01, fused=True),
    "sgd": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, fused=True),
    "rmsprop": functools.partial(torch.optim.RMSprop, lr=0.01),
    "muon": functools.partial(
        optim.MuonWithAdamW,
        **{"lr": 0.01, "momentum": 0.9, "nesterov": True, "ns_steps": 5, "weight_decay": 0.1},
        **{"adjust_lr_fn": "match_rms_adamw", "kernels": True, "adamw_modules": ["head"]},
        **{"adamw_betas": (0.9, 0.99), "adamw_eps": 1e-8},
    ),
}


@pytest.fixture(autouse=True)
def _as_it_was(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first matrix product
    caplog.set_level(logging.INFO, logger="regrow.numerics.capture")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class Network(nn.Module):
    """A small network with BatchNorm and dropout that also does `act`."""

    def __init__(self, act: Callable[[Any, Tensor], Tensor] = lambda model, x: x) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8)
        self.hidden, self.head = nn.Linear(8 * 36, 16), nn.Linear(16, 3)
        self.act: Any = act
        self.calls, self.temperature = 0, 1.0

    def forward(self, inputs: Tensor) -> Tensor:
        features = nn.functional.relu(self.norm(self.conv(inputs))).flatten(1)
        features = nn.functional.dropout(self.hidden(features), 0.2, self.training)
        outputs: Tensor = self.head(self.act(self, features))
        return outputs


def task() -> Multiclass:
    loss = losses.CrossEntropy(label_smoothing=0.1, class_weights=None, ignore_index=None)
    names = {"class_names": None, "monitor": "val/accuracy", "per_class": False, "auroc": False}
    return Multiclass(num_classes=3, extra_metrics=None, loss=loss, **names)  # type: ignore[arg-type]


def batch(number: int, *, size: int = 24, bad: bool = False) -> Any:
    random = torch.Generator().manual_seed(number)
    inputs = torch.randn(size, 1, 8, 8, generator=random)
    inputs[5] = torch.nan if bad else inputs[5]
    return batch_of(inputs, torch.randint(3, (size,), generator=random)).to(GPU.device)


def trained(
    captured: bool,
    act: Callable[[Any, Tensor], Tensor] = lambda model, x: x,
    *,
    make: Callable[..., Any] = MAKERS["adamw"],
    steps: int = 45,
    before: Callable[[int, Bench], object] = lambda number, bench: None,
    compiled: bool = False,
    bad: tuple[int, ...] = (),
    **options: Any,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the state and the log after steps in epochs of 20; every seventh batch is smaller."""
    torch.manual_seed(0)
    scale = LossScale(GPU.device) if options.get("precision") == "fp16" else None
    own = {"ema_decay": 0.9, "clip_norm": 1.0, "deterministic": True, "max_skipped_steps": 99}
    own |= {"capture": "auto" if captured else False, **options}
    schedule = lambda step: 1 / (1 + step / 10)  # noqa: E731
    bench = Bench(Network(act), task(), make, schedule=schedule, loss_scale=scale, world=GPU, **own)
    bench.state.steps_per_epoch = 20
    if compiled:
        torch._dynamo.reset()  # else it remembers that the batch size varies
        bench.state.model.compile()
    for number in range(steps):
        before(number, bench)
        size = 20 if number % 7 == 6 else 24
        bench.step(batch(number, size=size, bad=number in bad))
    return copy.deepcopy(bench.state.state_dict()), bench.record.lines


def assert_same(found: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            if key not in ("seconds", "record") and not str(key).startswith("time/"):
                assert_same(found[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    elif isinstance(expected, Tensor):
        assert capture.same([found], [expected])
    else:
        assert repr(found) == repr(expected)


SETTINGS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "fp16"},
    "micro_batches": {"accumulation_steps": 3},
    "bad_steps": {"bad": (9, 20, 21, 33)},
    "bad_steps_fp16": {"bad": (9, 20, 33), "precision": "fp16", "accumulation_steps": 2},
    "clip_value": {"clip_value": 0.01, "clip_norm": None, "ema_warmup": False},
    **{name: {"make": make, "bad": (15,)} for name, make in MAKERS.items()},
}


@pytest.mark.parametrize("settings", SETTINGS)
def test_captured_steps_have_the_bits_of_uncaptured_ones(
    settings: str, caplog: pytest.LogCaptureFixture
) -> None:
    expected = trained(False, **SETTINGS[settings])
    assert CAPTURED not in caplog.text
    found = trained(True, **SETTINGS[settings])
    assert CAPTURED in caplog.text and "from here on" not in caplog.text
    assert ("update is not captured" in caplog.text) == (settings == "rmsprop")
    assert_same(found, expected)


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")  # torch advises against fp32
@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_compiled_steps_are_captured_with_the_same_bits(
    precision: str, caplog: pytest.LogCaptureFixture
) -> None:
    expected = trained(False, precision=precision, compiled=True)
    found = trained(True, precision=precision, compiled=True)
    assert CAPTURED in caplog.text and "from here on" not in caplog.text
    assert_same(found, expected)


def test_a_graph_that_kept_its_first_seed_would_be_caught(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The control: without comparisons the bits differ, and a comparison finds it."""
    expected = trained(False)
    replay = capture.Recorded.replay
    frozen = lambda self, given, seed: replay(self, given, 3 if seed else None)  # noqa: E731
    monkeypatch.setattr(capture.Recorded, "replay", frozen)
    assert_same(trained(True), expected)
    assert "replay 1 differs" in caplog.text
    monkeypatch.setattr(capture, "COMPARED", set())
    monkeypatch.setattr(capture, "LATER_EPOCHS", 0)
    with pytest.raises(AssertionError):
        assert_same(trained(True), expected)


HELD = {"factor": 1.0}  # a global that forward reads


def counts(model: Any, x: Tensor) -> Tensor:
    model.calls += 1
    return 2 * x if model.calls > 30 else x


def anneals(model: Any, x: Tensor) -> Tensor:
    model.temperature *= 0.99
    return x / model.temperature


def draws(model: Any, x: Tensor) -> Tensor:
    return x * (1 + 0.1 * np.random.rand())


def reads(model: Any, x: Tensor) -> Tensor:
    return 2 * x if x.sum().item() > 0 else x


def refuses(model: Any, x: Tensor) -> Tensor:
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("this layer cannot be captured")
    return x


def moves_to_host(model: Any, x: Tensor) -> Tensor:
    if torch.cuda.is_current_stream_capturing():
        x.sum().item()  # invalidates the recording
    return x


CONTROLS: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "a counter of calls": (counts, "changes Network.calls"),
    "an annealed temperature": (anneals, "changes Network.temperature"),
    "a draw from numpy": (draws, "draws from numpy"),
    "a number read on the host": (reads, "waits for the device"),
    "an error while recording": (refuses, "this layer cannot be captured"),
    "a recording that becomes invalid": (moves_to_host, "cannot be recorded"),
    "a global that a later epoch changes": (lambda m, x: x * HELD["factor"], "differs from"),
}


@pytest.mark.parametrize("control", CONTROLS)
def test_a_step_that_cannot_be_captured_runs_uncaptured_and_one_line_says_why(
    control: str, caplog: pytest.LogCaptureFixture
) -> None:
    act, words = CONTROLS[control]

    def anneal_globally(number: int, bench: Bench) -> None:
        HELD["factor"] = 0.5 ** (number // 20)

    expected = trained(False, act, before=anneal_globally)
    caplog.clear()
    found = trained(True, act, before=anneal_globally)
    said = [
        record.message for record in caplog.records if "uncaptured from here on" in record.message
    ]
    assert len(said) == 1 and words in said[0]
    assert_same(found, expected)


def test_the_update_of_an_optimizer_that_counts_in_python_is_not_captured(
    caplog: pytest.LogCaptureFixture,
) -> None:
    schedulefree = pytest.importorskip("schedulefree")
    make = functools.partial(schedulefree.AdamWScheduleFree, lr=0.01)
    assert_same(trained(True, make=make), trained(False, make=make))
    assert "update is not captured" in caplog.text


def test_a_momentum_that_a_schedule_changes_is_never_held_by_a_graph() -> None:
    def cycle(number: int, bench: Bench) -> None:
        for group in bench.state.optimizer.param_groups:
            group["momentum"] = 0.9 if number < 25 else 0.5

    run = functools.partial(trained, make=MAKERS["sgd"], before=cycle)
    assert_same(run(True), run(False))


def test_captured_steps_do_not_wait_for_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "COMPARED", set())
    monkeypatch.setattr(capture, "LATER_EPOCHS", 0)
    bench = Bench(
        *(Network(), task(), MAKERS["muon"]),
        **{"world": GPU, "ema_decay": 0.9, "clip_norm": 1.0, "capture": "auto"},
    )
    batches = [batch(number) for number in range(12)]
    for each in batches[:6]:
        bench.plan.train_step(bench.state, each, bench.plan.step)
        bench.state.progress.step += 1
    with no_wait_for_the_gpu():
        for each in batches[6:]:
            bench.plan.train_step(bench.state, each, bench.plan.step)
            bench.state.progress.step += 1
    assert bench.plan.step.capture.release()  # it was captured


def test_without_memory_the_graphs_go_before_the_micro_batches_are_halved(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failing = {14: 1}
    replay = capture.Recorded.replay

    def fails_once(self: Any, given: Any, seed: int | None) -> Any:
        if seed is not None and failing.pop(at[0], 0):
            raise torch.OutOfMemoryError("by the test")
        return replay(self, given, seed)

    at = [0]
    monkeypatch.setattr(capture.Recorded, "replay", fails_once)
    expected = trained(False)
    found = trained(True, before=lambda number, bench: at.__setitem__(0, number))
    assert "too little memory" in caplog.text and not failing
    assert found[0]["progress"]["num_micro_batches"] == 1
    assert_same(found, expected)


COMPILED = pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"), pytest.mark.slow


@pytest.mark.parametrize(
    ("precision", "compiled"),
    [
        *(("fp32", False), ("bf16", False), ("fp16", False)),
        *(pytest.param(precision, True, marks=COMPILED) for precision in ("fp32", "bf16")),
    ],
)
def test_a_run_may_change_between_the_two_at_a_resume(
    precision: str, compiled: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = (*RUN, f"trainer.precision={precision}", f"trainer.compile={str(compiled).lower()}")
    uncaptured = "trainer.capture=false"
    train(tmp_path / "uncaptured", *run, uncaptured, world=GPU)
    assert CAPTURED not in caplog.text
    train(tmp_path / "captured", *run, world=GPU)
    assert CAPTURED in caplog.text and "from here on" not in caplog.text
    train(tmp_path / "on", *run, uncaptured, stop_at=23, world=GPU)
    train(tmp_path / "on", *run, world=GPU)
    train(tmp_path / "off", *run, stop_at=23, world=GPU)
    train(tmp_path / "off", *run, uncaptured, world=GPU)
    prints = {fingerprint(folder) for folder in tmp_path.iterdir()}
    assert len(prints) == 1


DEADLY = """
import logging, os, signal, sys
logging.basicConfig(level=logging.INFO)
from pathlib import Path
from running import train
from test_cuda_capture import GPU
from lab import loop
report = loop.report
def deadly(state, result, plan):
    report(state, result, plan)
    if state.step == 37:
        os.kill(os.getpid(), signal.SIGKILL)
loop.report = deadly
train(Path(sys.argv[1]), *sys.argv[2:], world=GPU)
"""


@pytest.mark.parametrize("captured_first", [True, False])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=COMPILED)])
def test_a_killed_run_may_change_between_the_two(
    captured_first: bool, compiled: bool, tmp_path: Path
) -> None:
    run = (*RUN, "trainer.checkpoint.save_every_steps=10")
    run, off = (*run, f"trainer.compile={str(compiled).lower()}"), "trainer.capture=false"
    first, then = (run, (*run, off)) if captured_first else ((*run, off), run)
    paths = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    command = [sys.executable, "-c", DEADLY, str(tmp_path / "killed"), *first]
    done = subprocess.run(
        command, env={**os.environ, **paths}, check=False, timeout=240, capture_output=True
    )
    said = done.stderr.decode()
    assert done.returncode == -signal.SIGKILL, said
    assert (CAPTURED in said) == captured_first
    train(tmp_path / "killed", *then, world=GPU)
    train(tmp_path / "whole", *run, off, world=GPU)
    assert fingerprint(tmp_path / "killed") == fingerprint(tmp_path / "whole")


def test_a_short_run_says_that_it_is_not_captured(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(tmp_path, *RUN, "trainer.max_epochs=2", world=GPU)
    assert "fewer than 50" in caplog.text and CAPTURED not in caplog.text


def test_a_cpu_is_silent_about_it() -> None:
    assert options_of().capture == "auto"
