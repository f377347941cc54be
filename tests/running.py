"""Runs for tests, composed like real ones and trained in this process, in their own folder."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import hashlib
import json
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from forked import without_pictures
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from lab import build, loop, optim, step
from lab.options import TrainerOptions
from lab.plan import LoopPlan, StepPlan
from lab.state import TrainState, average_of
from regrow.config.hydra_access import plain, version_arguments
from regrow.config.targets import allow
from regrow.distributed.parallel import Exchange, World
from regrow.feeding.batch import LoadedBatch
from regrow.numerics.buffers import Buffers
from regrow.numerics.precision import LossScale
from regrow.numerics.totals import Totals
from regrow.processes.interrupt import StopRequest
from regrow.project import CONF, ROOT
from regrow.record.meter import Meter
from regrow.runs import training
from regrow.runs.lab import lab

CPU = World(device=torch.device("cpu"))
# Ragged on purpose: 50 examples in windows of 16, so that each epoch ends with a window of 2.
TINY = (
    "data=synthetic",
    "data.source.num_train=50",
    "data.source.num_val=20",
    "data.source.num_test=10",
    "data.input_shape=[6]",
    "data.num_classes=3",
    "data.num_outputs=3",
    "data.batch_size=16",
    "model.hidden=[12]",
    "trainer.max_epochs=3",
    "trainer.num_threads=1",
    "trainer.log_every_steps=1",
    "trainer.device=cpu",
)


def skip_in_a_project(why: str) -> None:
    """Skip the test in a project, which may lack a part. In the template, do nothing: it fails."""
    if (ROOT / ".template").is_dir():
        pytest.skip(why)


def composed(*overrides: str) -> DictConfig:
    """Return the config with its `hydra` node, as Hydra's job gets it."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), **version_arguments()):
        config = compose("train", overrides=list(overrides), return_hydra_config=True)
    HydraConfig.instance().set_config(config)
    return config


def config_of(*overrides: str) -> dict[str, Any]:
    return copy.deepcopy(_config_of(overrides))


@functools.cache
def _config_of(overrides: tuple[str, ...]) -> dict[str, Any]:
    config = composed(*overrides)
    names = [str(key) for key in config if key != "hydra"]
    values = plain(OmegaConf.masked_copy(config, names))
    allow(values)  # as the check of a command line does
    return values


def launched(*overrides: str, draws: bool = False) -> float | None:
    """Run Hydra's job in this process, in the current folder. The run is TINY."""
    from regrow.runs.launch import launch

    with contextlib.nullcontext() if draws else without_pictures():
        return launch(as_hydra_has_it(composed(*TINY, *overrides)))


def as_hydra_has_it(config: DictConfig) -> DictConfig:
    """Set Hydra's state, and return the config that Hydra passes to its job."""
    folder = Path(config.hydra.run.dir)
    folder.mkdir(parents=True, exist_ok=True)
    OmegaConf.set_readonly(config.hydra, False)
    with open_dict(config):
        config.hydra.mode = RunMode.RUN
        config.hydra.runtime.output_dir = str(folder.resolve())
        HydraConfig.instance().set_config(config)
        del config["hydra"]
    return config


class StopAtStep(StopRequest):
    """Requests a stop once the state has reached a step, as a signal at that moment would."""

    def __init__(self, state: Any, step: int | None) -> None:
        super().__init__()
        self.state, self.step = state, step

    @property
    def requested(self) -> bool:
        if self.step is not None and self.state.step >= self.step and self.signal is None:
            self.signal = signal.SIGTERM
        return self.signal is not None


def train(
    folder: Path, *overrides: str, stop_at: int | None = None, world: World = CPU
) -> dict[str, Any]:
    """Train in `folder`, or resume there. Stop gracefully at step `stop_at`."""
    config = config_of(*overrides)
    return train_config(folder, config, stop_at=stop_at, world=world)


def train_config(
    folder: Path, config: dict[str, Any], *, stop_at: int | None = None, world: World = CPU
) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    allow(config)  # as for a test's own targets
    objects = training.build(config, world)
    return training.train(objects, config, folder, world, StopAtStep(objects.state, stop_at))


class InMemory:
    """A record that keeps its lines in memory."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def log(self, step: int, epoch: int, values: Mapping[str, float]) -> None:
        self.lines.append({"step": step, "epoch": epoch, **values})

    def log_histograms(self, step: int, tensors: Mapping[str, torch.Tensor]) -> None: ...
    def image(self, name: str, image: object, *, step: int) -> None: ...
    def position(self) -> int:
        return len(self.lines)

    def sync(self, position: int) -> None: ...


def options_of(**changes: Any) -> TrainerOptions:
    options: TrainerOptions = training.instantiate(config_of(*TINY)["trainer"])
    return dataclasses.replace(options, **changes)


def before_each_step(
    monkeypatch: pytest.MonkeyPatch, action: Callable[[TrainState, LoopPlan], None]
) -> None:
    """Call `action` with state and plan before each step of the runs of this process."""
    fit = lab().fit

    def watched(state: Any, plan: Any) -> str:
        def train_step(state: Any, *arguments: Any) -> Any:
            action(state, plan)
            return plan.train_step(state, *arguments)

        return fit(state, dataclasses.replace(plan, train_step=train_step))

    monkeypatch.setattr(lab(), "fit", watched)


class Bench:
    """The loop's own step over any model, task and batches, without a folder or a data set."""

    def __init__(
        self,
        model: torch.nn.Module,
        task: Any,
        make: Callable[..., Any],
        *,
        slices: int = 1,
        schedule: Callable[[int], float] = lambda step: 1.0,
        loss_scale: LossScale | None = None,
        world: World = CPU,
        **options: Any,
    ) -> None:
        model.to(world.device)
        self.options = options_of(**{"log_every_steps": 1, "accumulation_steps": slices, **options})
        averaged = average_of(model) if self.options.ema_decay is not None else None
        groups = optim.parameter_groups(model, lr_scale={}, decay_norms_and_biases=True)
        self.state = TrainState(
            model=model,
            optimizer=optim.build(make, groups),
            schedule=schedule,
            averaged=averaged,
            loss_scale=loss_scale,
            sums=Totals.zero(world.device),
            skips=torch.zeros(2, device=world.device),
            empty_steps=torch.zeros((), device=world.device),
            steps_per_epoch=1000,
            accumulation_steps=slices,
        )
        self.record = InMemory()
        step_plan = StepPlan(
            options=self.options,
            task=task,
            world=world,
            seed=0,
            forward=model,
            parameters=[p for p in model.parameters() if p.requires_grad],
            clipping=optim.Clipping(self.options.clip_norm, self.options.clip_value),
            buffers=Buffers(model, flat=True),
            exchange=Exchange(world, StopRequest()),
            capture=build.capture_of(self.options, self.state, task, world, None),
        )
        fields = dict.fromkeys((f.name for f in dataclasses.fields(LoopPlan)), None)
        known = {
            "step": step_plan,
            "train_step": step.train_step,
            "options": self.options,
            "task": task,
            "world": world,
            "record": self.record,
            "stop": StopRequest(),
            "meter": Meter(),
            "checkpoints": SimpleNamespace(saved=None, newest_until=lambda step: None),
        }
        self.plan = LoopPlan(**{**fields, **known})  # type: ignore[arg-type]
        model.train()

    def step(self, batch: LoadedBatch) -> dict[str, Any]:
        """Run one step and return its log line."""
        result = self.plan.train_step(self.state, batch, self.plan.step)
        self.state.progress.step += 1
        loop.report(self.state, result, self.plan)
        return self.record.lines[-1] if self.record.lines else {}


def batch_of(
    inputs: Any, targets: torch.Tensor, weights: torch.Tensor | None = None
) -> LoadedBatch:
    return LoadedBatch(inputs, targets, weights, len(targets), len(targets))


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    """Return metrics.jsonl without the values that depend on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]


def fingerprint(folder: Path) -> str:
    """Return the SHA-256 of the last checkpoint's content and the metrics, without the clock."""
    from regrow.checkpoint import writer

    parts, _ = writer.load((folder / "checkpoints" / "last").resolve())
    digest = hashlib.sha256()
    _add(digest, parts)
    # repr, not equality: NaN must equal NaN here.
    digest.update(repr(metrics_of(folder)).encode())
    return digest.hexdigest()


def _add(digest: Any, value: Any, name: str = "") -> None:
    if name.endswith("/seconds") or "/time/" in name:
        return
    if isinstance(value, dict):
        for key in sorted(value, key=str):
            _add(digest, value[key], f"{name}/{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _add(digest, item, f"{name}/{index}")
    elif isinstance(value, torch.Tensor):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    else:
        digest.update(f"{name} {value!r}".encode())
