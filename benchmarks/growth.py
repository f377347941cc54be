"""How costs grow: with the model, the data, the log and the jobs of a sweep.

Every cost is measured at sizes a factor apart. Its exponent is the slope of the logarithms over the
larger half of the sizes: 0 for what does not grow, 1 for what grows in proportion.
"""

from __future__ import annotations

import math
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from benchmarks.configured import build
from benchmarks.measure import in_turn
from benchmarks.step import by_hand, pure, train_py
from regrow.record import folder as records
from regrow.record import loggers, report
from regrow.sweep import results, state
from regrow.training.parallel import World

ROOT = Path(__file__).resolve().parents[1]
TRAIN = str(ROOT / "scripts" / "train.py")
PICTURE = "growth_{}.svg"


@dataclass(frozen=True)
class Growth:
    """Costs by size. `picture` is the name of the drawing made of them."""

    title: str
    note: str
    picture: str
    of: str  # what there is more of
    costs: Mapping[str, Mapping[int, float]]  # seconds, by their name with its unit, and by size
    scales: Mapping[str, float]  # of a name's unit, per second

    def text(self) -> str:
        sizes = sorted({size for found in self.costs.values() for size in found})
        lines = [f"## {self.title}", "", self.note, ""]
        lines += [
            f"| {self.of} | {' | '.join(self.costs)} |",
            f"|{' ---: |' * (1 + len(self.costs))}",
        ]
        for size in sizes:
            cells = [
                f"{found[size] * self.scales[name]:.4g}" if size in found else ""
                for name, found in self.costs.items()
            ]
            lines.append(f"| {size:,} | {' | '.join(cells)} |")
        exponents = [f"{exponent(found):.2f}" for found in self.costs.values()]
        lines.append(f"| exponent | {' | '.join(exponents)} |")
        lines += ["", f"![{self.title}]({PICTURE.format(self.picture)})"]
        return "\n".join(lines) + "\n"


def exponent(found: Mapping[int, float]) -> float:
    """The least-squares slope of log cost over log size, for the larger half of the sizes."""
    upper = sorted(found)[len(found) // 2 :] if len(found) > 3 else sorted(found)
    xs, ys = [math.log(size) for size in upper], [math.log(found[size]) for size in upper]
    return statistics.linear_regression(xs, ys).slope


def measure() -> list[Growth]:
    return [model(), data(), folders(), log(), sweep()]


# -- the model -------------------------------------------------------------------------------------

# Widths of two hidden layers, and how many steps are timed after how many that are not.
WIDTHS = {
    11: (300, 40),
    69: (300, 40),
    280: (300, 40),
    962: (60, 20),
    3124: (12, 3),
    9962: (4, 2),
}
LR = 1e-6  # the widest diverges at 1e-3, and denormal gradients make a step three times slower


def model() -> Growth:
    names = ("train.py", "hand-tuned, in memory", "forward, backward and update alone")
    found: dict[str, dict[int, float]] = {name: {} for name in names}
    for width, (steps, before) in WIDTHS.items():
        net = nn.Sequential(
            *(nn.Flatten(), nn.Linear(64, width), nn.ReLU()),
            *(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)),
        )
        size = sum(parameter.numel() for parameter in net.parameters())
        options = (
            f"model.hidden=[{width},{width}]",
            "model.norm=none",
            "trainer.checkpoint.save_every_steps=null",
            f"optimizer.lr={LR}",
        )
        torch.set_num_threads(1)
        world = World(device=torch.device("cpu"))
        ours, inputs, targets = train_py(world, *options, steps=steps, before=before)
        runs: list[Callable[[], float | None]] = [
            ours,
            by_hand(net, inputs, targets, steps, lr=LR),
            pure(net, inputs, targets, steps),
        ]
        seconds = in_turn(dict(zip(names, runs, strict=True)), rounds=5)
        for name, values in seconds.items():
            found[name][size] = statistics.median(values) / steps
    costs = {f"{name}, ms": found[name] for name in names}
    return Growth(
        title="Growth of a step with the model",
        note="MLPs of two equal hidden layers, batch 64, AdamW, one thread; medians of 5 rounds.",
        picture="model",
        of="parameters",
        costs=costs,
        scales=dict.fromkeys(costs, 1e3),
    )


# -- the data --------------------------------------------------------------------------------------


def data() -> Growth:
    torch.set_num_threads(1)
    batch = 64
    names = {
        "read and check, s": 1.0,
        "fingerprint, s": 1.0,
        "begin an epoch, s": 1.0,
        "resume in its middle, s": 1.0,
        "a batch, µs": 1e6,
    }
    found: dict[str, dict[int, float]] = {name: {} for name in names}
    for size in (1_000, 10_000, 100_000, 1_000_000, 10_000_000):
        options = (
            *("data=synthetic", "data.input_shape=[8]", f"data.source.num_train={size}"),
            *(f"data.batch_size={batch}", "model.hidden=[8]", "trainer.device=cpu"),
            "trainer.num_threads=1",
        )
        world = World(device=torch.device("cpu"))
        build(world, *options[:2], *options[3:])  # its imports
        with clocked(found, "read and check, s", size):
            objects, _ = build(world, *options)
        with clocked(found, "fingerprint, s", size):
            objects.data.fingerprint()
        for name, start in (
            ("begin an epoch, s", 0),
            ("resume in its middle, s", objects.train.steps_per_epoch // 2),
        ):
            next(objects.train.epoch(0, start))  # once, for the memory that it takes
            with clocked(found, name, size):
                next(objects.train.epoch(1, start))
        started, count = time.perf_counter(), 0
        while count < 4000:
            for _ in objects.train.epoch(0):
                if count == 0:
                    started = time.perf_counter()
                count += 1
                if count == 4000:
                    break
        found["a batch, µs"][size] = (time.perf_counter() - started) / count
        del objects
    return Growth(
        title="Growth of feeding with the data",
        note="Examples of eight numbers in memory, batches of 64. Beginning an epoch draws its one "
        "permutation; so does resuming, and it reads nothing of what came before.",
        picture="data",
        of="examples",
        costs=found,
        scales=names,
    )


def folders() -> Growth:
    from regrow.data.images import image_folder

    found: dict[str, dict[int, float]] = {"list, and look for copies, s": {}, "fingerprint, s": {}}
    for size in (1_000, 10_000, 100_000):
        with tempfile.TemporaryDirectory() as folder:
            for number in range(size):
                path = Path(folder) / f"class_{number % 10}" / f"{number // 10}.jpg"
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(number.to_bytes(8, "little") * 64)
            with clocked(found, "list, and look for copies, s", size):
                splits = image_folder(
                    root=folder,
                    input_shape=[3, 8, 8],
                    resize=8,
                    num_classes=10,
                    class_names=None,
                    val_fraction=0.1,
                    test_fraction=0.1,
                    seed=0,
                )
            with clocked(found, "fingerprint, s", size):
                for _, split in splits.items():
                    split.fingerprint()  # type: ignore[union-attr]
    return Growth(
        title="Growth of a start with the files of an image folder",
        note="Files of 512 bytes, in the page cache. To find copies each is opened once; the "
        "fingerprint is of names and sizes.",
        picture="folders",
        of="files",
        costs=found,
        scales=dict.fromkeys(found, 1.0),
    )


# -- the log ---------------------------------------------------------------------------------------


def log() -> Growth:
    names = {"a line, µs": 1e6, "open and rewind, ms": 1e3, "pictures and page, s": 1.0}
    found: dict[str, dict[int, float]] = {name: {} for name in names}
    for size in (1_000, 10_000, 100_000, 1_000_000):
        with tempfile.TemporaryDirectory() as path:
            folder = Path(path)
            records.set_status(folder, "running", step=0, pids=[])
            writer = loggers.Jsonl(folder)
            for step in range(size):
                if step == size - size // 10:
                    kept, started = writer.position(), time.perf_counter()
                writer.log(step, step // 10, line(step))
            found["a line, µs"][size] = (time.perf_counter() - started) / (size // 10)
            writer.close()
            with clocked(found, "open and rewind, ms", size):
                writer = loggers.Jsonl(folder)
                writer.rewind(kept)
            writer.close()
            report.draw(folder)  # matplotlib's imports
            with clocked(found, "pictures and page, s", size):
                report.draw(folder)
    return Growth(
        title="Growth with the log",
        note="Lines of metrics.jsonl as train.py writes them. A line is appended to so many; a "
        "resumed run cuts the last tenth off; the pictures show all others.",
        picture="log",
        of="lines",
        costs=found,
        scales=names,
    )


def line(step: int) -> dict[str, float]:
    value = 1.0 / (1 + step) + 0.01 * (step * 7919 % 100)
    if step % 10:
        return {"train/loss": value, "train/grad_norm": value, "train/lr": 1e-3, "time/epoch": 1.0}
    return {"train/epoch_loss": value, "val/loss": value, "val/accuracy": 1 - value}


# -- a sweep ---------------------------------------------------------------------------------------


def sweep() -> Growth:
    found: dict[str, dict[int, float]] = {
        "until the first job, s": {},
        "each job, s": {},
        "from the last job to the end, s": {},
        "table and page alone, s": {},
    }
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        for size in (10, 30, 100, 300):
            marks = run_jobs(folder / str(size), size)
            first, last, end = marks
            found["until the first job, s"][size] = first
            found["each job, s"][size] = (last - first) / size
            found["from the last job to the end, s"][size] = end - last
        for size in (10, 30, 100, 300, 1000):
            many = folder / f"{size} jobs"
            copied(folder / "10", many, size)
            results.write_page(many, results.write_table(many))  # matplotlib's imports
            with clocked(found, "table and page alone, s", size):
                results.write_page(many, results.write_table(many))
    return Growth(
        title="Growth of a sweep with its jobs",
        note="Digits for two epochs, other learning rates and two seeds, two jobs at a time. The "
        "last column is of the jobs of the smallest sweep, copied as often as it takes.",
        picture="sweep",
        of="jobs",
        costs=found,
        scales=dict.fromkeys(found, 1.0),
    )


def run_jobs(folder: Path, size: int) -> tuple[float, float, float]:
    """Seconds from the command to the first job's start, the last one's end, and its own end."""
    rates = ",".join(f"{0.001 * (1 + number)}" for number in range(size // 2))
    command = [
        *(sys.executable, TRAIN, "-m", f"optimizer.lr={rates}", "seed=0,1"),
        *("trainer.max_epochs=2", "trainer.device=cpu", "trainer.num_threads=1"),
        *("launcher.jobs=2", f"hydra.sweep.dir={folder}"),
    ]
    first = last = 0.0
    started = time.perf_counter()
    with subprocess.Popen(
        command, cwd=folder.parent, stderr=subprocess.STDOUT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for text in process.stdout:
            now = time.perf_counter() - started
            if " started: " in text and not first:
                first = now
            if f" of {size}]" in text:
                last = now
    assert process.returncode == 0
    return first, last, time.perf_counter() - started


def copied(sweep: Path, many: Path, size: int) -> None:
    """A sweep of so many jobs, made of the runs of a smaller one."""
    there = state.entries(sweep)
    entries = []
    for number in range(size):
        one = there[number % len(there)]
        shutil.copytree(sweep / one.folder, many / str(number), symlinks=True)
        swept = {**one.swept, "optimizer.lr": str(0.001 * (1 + number // 2))}
        entries.append(replace(one, number=number, folder=str(number), swept=swept))
    state.write(many, entries, **{k: v for k, v in state.read(sweep).items() if k != "jobs"})


# -- for all ---------------------------------------------------------------------------------------


@contextmanager
def clocked(found: Mapping[str, dict[int, float]], name: str, size: int) -> Iterator[None]:
    started = time.perf_counter()
    yield
    found[name][size] = time.perf_counter() - started
