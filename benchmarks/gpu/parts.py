"""The parts of `make bench-gpu`. Each yields named results, which are stored one by one."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import cifar, evaluation
from benchmarks.checkpoint import OPTIONS
from benchmarks.gpu import loops
from benchmarks.gpu.loops import Case
from benchmarks.measure import Table
from benchmarks.step import now
from regrow.checkpoint.writer import CheckpointFacts, CheckpointWriter

ROOT = Path(__file__).resolve().parents[2]
Results = Iterator[tuple[str, Callable[[], dict[str, Any]]]]
IMAGES = ("data=synthetic", "data.augment=false", "data.drop_last=true", "data.overlap=ignore",
          "data.source.num_val=64", "data.source.num_test=64", "trainer.precision=bf16",
          "trainer.channels_last=true", "optimizer=adamw",
          "trainer.checkpoint.save_every_steps=null")  # fmt: skip
SMALL = ("model=cnn", "model.channels=[8]")


@dataclasses.dataclass(frozen=True)
class Setting:
    device: torch.device
    is_tiny: bool  # to try the code, on a CPU
    data: str | None  # a folder with CIFAR-10 in sprites


def tests(setting: Setting) -> Results:
    """The tests that need a GPU, slow ones included."""
    workers = ("-n", "8") if setting.device.type == "cuda" else ()
    files = map(str, sorted(ROOT.glob("tests/training/test_cuda*.py")))
    yield "Tests that need a GPU", lambda: pytest(*files, *workers)


def suite(setting: Setting) -> Results:
    """All fast tests."""
    workers = ("-n", str(os.cpu_count()), "--dist", "loadfile")
    yield "All fast tests", lambda: pytest("-m", "not slow", *workers)


def pytest(*arguments: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", f"--junitxml={report}", "-p", "no:cacheprovider"]
        command += ["-p", "no:benchmark"]  # a plugin that warns of another one, if it is installed
        started = time.perf_counter()
        subprocess.run([*command, *arguments], cwd=ROOT, check=False)
        seconds = time.perf_counter() - started
        if not report.is_file():
            raise RuntimeError("no test ran: install pytest and pytest-xdist")
        suite = next(ET.parse(report).getroot().iter("testsuite"))
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "skipped")}
    return {**counts, "failed": failed, "seconds": seconds}


def step(setting: Setting) -> Results:
    tiny = setting.is_tiny
    steps = 5 if tiny else 2000  # captured, 200 take less than a checkpoint
    digits = Case(
        title="the default MLP on digits, batch 64",
        overrides=(
            "data=digits", "data.augment=false", "data.drop_last=true",
            f"trainer.checkpoint.save_every_steps={steps}",
        ),
        batch=64, steps=steps, rounds=2 if tiny else 5, before=3 if tiny else 110,
        candidates=(loops.EAGER, loops.OURS, loops.BARE, loops.CAPTURED, loops.COMPILED),
        note="train.py saves a checkpoint in each, and compares one captured step of each.",
    )  # fmt: skip
    count = 64 if tiny else 10_240
    batch = 16 if tiny else 512
    photographs = Case(
        title=f"ResNet-18 on 32×32 images, batch {batch}, bf16, channels_last",
        overrides=(
            *IMAGES, *(SMALL if tiny else ("model=resnet18",)),
            f"data.source.num_train={count}", f"data.batch_size={batch}",
        ),
        batch=batch, steps=2 if tiny else 30, rounds=2 if tiny else 4, before=1 if tiny else 50,
        candidates=(
            loops.EAGER, loops.OURS, loops.OURS_COMPILED,
            loops.BARE, loops.CAPTURED, loops.COMPILED,
        ),
    )  # fmt: skip
    yield "mlp", lambda: loops.measure(digits, setting.device)
    yield "resnet18", lambda: loops.measure(photographs, setting.device)


def resnet50(setting: Setting) -> Results:
    tiny, device = setting.is_tiny, setting.device
    batch, side = (4, 32) if tiny else (256, 224)
    case = Case(
        title=f"ResNet-50 on {side}×{side} images, batch {batch}, bf16, channels_last",
        overrides=(
            *IMAGES, *(SMALL if tiny else ("model=resnet50",)),
            f"data.source.num_train={8 * batch}",
            f"data.batch_size={batch}", f"data.input_shape=[3,{side},{side}]",
        ),
        batch=batch, steps=1 if tiny else 16, rounds=2 if tiny else 3, before=1 if tiny else 24,
        candidates=(loops.OURS, loops.FIXED, loops.BARE),
    )  # fmt: skip
    images = 64 if tiny else 10_000
    options = (
        "data=synthetic",
        f"data.source.num_val={images}",
        *(SMALL if tiny else ("model=resnet18",)),
    )
    yield "resnet50", lambda: loops.measure(case, device)
    yield "checkpoint", lambda: {"table": dataclasses.asdict(checkpoint(device, tiny))}
    yield (
        "evaluation",
        lambda: {
            "table": dataclasses.asdict(
                evaluation.table(f"{images:,} images by ResNet-18", *options, device=device)
            )
        },
    )


def checkpoint(device: torch.device, is_tiny: bool) -> Table:
    """How much longer a few steps take if the state is saved in their middle."""
    import torchvision
    from torch.nn import functional as F

    size = 4 if is_tiny else 64
    model = torchvision.models.resnet18() if is_tiny else torchvision.models.resnet50()
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    images = torch.randn(size, 3, 64, 64, device=device)
    targets = torch.randint(10, (size,), device=device)

    def parts() -> dict[str, dict[str, Any]]:
        return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}

    def update() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), targets).backward()
        optimizer.step()

    def steps(save: Callable[[], object]) -> float:
        started = now(device)
        for number in range(2 if is_tiny else 40):
            update()
            if number == 0:
                save()
        return now(device) - started

    update()
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        writer = CheckpointWriter(Path(folder), OPTIONS, "max")
        writer.make_room(parts)
        for number in range(6):
            facts = CheckpointFacts(number, epoch=0, value=None, milestone=False, metrics_bytes=0)
            found = {
                "without a save": steps(lambda: None),
                "with a save": steps(lambda: writer.save(parts(), facts, lambda position: None)),  # noqa: B023
            }
            writer.wait()
            found["with torch.save"] = steps(lambda: torch.save(parts(), Path(folder) / "plain.pt"))
            for name, value in found.items() if number else ():
                seconds.setdefault(name, []).append(value)
    return Table(
        title="A checkpoint of ResNet-50 with AdamW, 307 MB",
        note="Forty steps, with the state saved after the first one, SHA-256 and sync included.",
        unit="ms for all steps",
        reference="without a save",
        seconds=seconds,
        scale=1e3,
    )


def cifar10(setting: Setting) -> Results:
    yield "cifar10", lambda: race(setting)


def race(setting: Setting) -> dict[str, Any]:
    read = f"data.root={setting.data}", "data.source._target_=benchmarks.gpu.sprites.read"
    count = 20 if setting.is_tiny else 49_500
    drawn = "data.source._target_=benchmarks.gpu.sprites.drawn", f"+data.source.count={count}"
    seeds = 1 if setting.is_tiny else 5 if setting.data else 3
    source = read if setting.data else drawn
    place = f"trainer.device={setting.device.type}", "trainer.num_threads=1"
    small = ("model.channels=[8,8,8]",) if setting.is_tiny else ()
    found = cifar.table(range(seeds), *source, *place, *small)
    if not setting.data:
        note = f"Random images, so the accuracies mean nothing. {found.note}"
        found = dataclasses.replace(found, note=note)
    return {"table": dataclasses.asdict(found)}


PARTS: dict[str, Callable[[Setting], Results]] = {
    "tests": tests,
    "step": step,
    "resnet50": resnet50,
    "cifar": cifar10,
    "suite": suite,
}
