"""How costs grow with the model, the data, the log and the jobs of a sweep.

Every cost is measured at sizes a factor apart, once each except for a step. Its exponent is the
slope of the logarithms over the larger half of the sizes, or over all if there are three: 0 for
constant cost, 1 for proportional growth.
"""

from __future__ import annotations

import itertools
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from benchmarks.configured import build, config_of
from benchmarks.measure import in_turn, per_second
from benchmarks.step import by_hand, pure, train_py
from regrow.config.targets import allow, instantiate
from regrow.distributed.parallel import World
from regrow.record import loggers, records, report
from regrow.sweep import ledger, results

ROOT = Path(__file__).resolve().parents[1]
TRAIN = str(ROOT / "scripts" / "train.py")
PICTURE = "growth_{}.svg"


@dataclass(frozen=True)
class Growth:
    """Costs by size. `picture` is the name of the plot."""

    title: str
    note: str
    picture: str
    of: str  # the quantity that grows
    costs: Mapping[str, Mapping[int, float]]  # seconds, by "name, unit" and by size

    def text(self) -> str:
        sizes = sorted({size for found in self.costs.values() for size in found})
        lines = [f"## {self.title}", "", self.note, ""]
        lines += [
            f"| {self.of} | {' | '.join(self.costs)} |",
            f"|{' ---: |' * (1 + len(self.costs))}",
        ]
        for size in sizes:
            cells = [
                f"{found[size] * per_second(name):.4g}" if size in found else ""
                for name, found in self.costs.items()
            ]
            lines.append(f"| {size:,} | {' | '.join(cells)} |")
        exponents = [f"{round(exponent(found), 2) + 0.0:.2f}" for found in self.costs.values()]
        lines.append(f"| exponent | {' | '.join(exponents)} |")
        lines += ["", f"![{self.title}]({PICTURE.format(self.picture)})"]
        return "\n".join(lines) + "\n"


def exponent(found: Mapping[int, float]) -> float:
    """The least-squares slope of log cost over log size."""
    upper = sorted(found)[len(found) // 2 :] if len(found) > 3 else sorted(found)
    xs, ys = [math.log(size) for size in upper], [math.log(found[size]) for size in upper]
    return statistics.linear_regression(xs, ys).slope


def measure() -> list[Growth]:
    return [model(), data(), folders(), log(), sweep()]


# -- the model -------------------------------------------------------------------------------------

# Widths of two hidden layers, and the numbers of untimed and timed steps.
WIDTHS = {
    11: (300, 40),
    69: (300, 40),
    280: (300, 40),
    962: (60, 20),
    3124: (12, 3),
    9962: (4, 2),
}
LR = 1e-6  # the widest diverges at 1e-3, and denormal gradients make a step three times as slow


def model() -> Growth:
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for width, (steps, before) in WIDTHS.items():

        def net(width: int = width) -> nn.Module:
            return nn.Sequential(
                *(nn.Flatten(), nn.Linear(64, width), nn.ReLU()),
                *(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)),
            )

        options = (
            *(f"model.hidden=[{width},{width}]", "model.norm=none", f"optimizer.lr={LR}"),
            "trainer.checkpoint.save_every_steps=null",
        )
        torch.set_num_threads(1)
        world = World(device=torch.device("cpu"))
        ours, inputs, targets = train_py(world, *options, steps=steps, before=before)
        hand = by_hand(net(), inputs, targets, steps, lr=LR, before=before)
        alone = pure(net(), inputs, targets, steps, lr=LR, before=before)
        names = ("train.py", "hand-tuned, in memory", "forward, backward and update alone")
        seconds = in_turn(dict(zip(names, (ours, hand, alone), strict=True)), rounds=5)
        size = sum(parameter.numel() for parameter in net().parameters())
        for name, values in seconds.items():
            found[f"{name}, ms"][size] = statistics.median(values) / steps
    return Growth(
        title="Growth of a step with the model",
        note="MLPs of two equal hidden layers, batch 64, AdamW, one thread; medians of 5 rounds.",
        picture="model",
        of="parameters",
        costs=found,
    )


# -- the data --------------------------------------------------------------------------------------


BATCHES = 4000


def data() -> Growth:
    torch.set_num_threads(1)
    world = World(device=torch.device("cpu"))
    options = (
        *("data=synthetic", "data.input_shape=[8]", "data.batch_size=64", "model.hidden=[8]"),
        *("trainer.device=cpu", "trainer.num_threads=1"),
    )
    build(world, *options)  # its imports
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for size in (1_000, 10_000, 100_000, 1_000_000, 10_000_000):
        with clocked(found, "read and check, s", size):
            objects, _ = build(world, *options, f"data.source.num_train={size}")
        with clocked(found, "fingerprint, s", size):
            objects.data.fingerprint()
        train = objects.train
        for name, start in (("begin an epoch", 0), ("resume half-way", train.steps_per_epoch // 2)):
            next(train.epoch(0, start))  # once, to allocate its memory
            with clocked(found, f"{name}, s", size):
                next(train.epoch(1, start))
        epochs = itertools.chain.from_iterable(train.epoch(epoch) for epoch in itertools.count())
        next(epochs)
        started = time.perf_counter()
        for _ in itertools.islice(epochs, BATCHES):
            pass
        found["a batch, µs"][size] = (time.perf_counter() - started) / BATCHES
    return Growth(
        title="Growth of feeding with the data",
        note="Examples of eight numbers in memory, batches of 64. Beginning an epoch draws its one "
        "permutation; so does resuming, and it reads nothing of what came before. A batch is the "
        f"mean of {BATCHES:,}, with the epochs that begin among them.",
        picture="data",
        of="examples",
        costs=found,
    )


def folders() -> Growth:
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for size in (1_000, 10_000, 100_000):
        with tempfile.TemporaryDirectory() as folder:
            for number in range(size):
                path = Path(folder) / f"class_{number % 10}" / f"{number // 10}.jpg"
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(number.to_bytes(8, "little") * 64)
            config = config_of(
                *("data=image_folder", f"data.root={folder}", "data.num_classes=10"),
                *("data.input_shape=[3,8,8]", "data.source.resize=8"),
                "data.source.val_fraction=0.1",
                "data.source.test_fraction=0.1",
            )
            allow(config)
            with clocked(found, "list, and look for copies, s", size):
                splits = instantiate(config["data"]["source"])
            with clocked(found, "fingerprint, s", size):
                for _, split in splits.items():
                    split.fingerprint()  # type: ignore[union-attr]
    return Growth(
        title="Growth of a start with the files of an image folder",
        note="Files of 512 bytes, in the page cache, too new for a hash of them to be kept. Copies "
        "are found by the first and last bytes of each; the fingerprint is over all contents.",
        picture="folders",
        of="files",
        costs=found,
    )


# -- the log ---------------------------------------------------------------------------------------


def log() -> Growth:
    found: dict[str, dict[int, float]] = defaultdict(dict)
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
    )


def line(step: int) -> dict[str, float]:
    value = 1.0 / (1 + step) + 0.01 * (step * 7919 % 100)
    if step % 10:
        return {"train/loss": value, "train/grad_norm": value, "train/lr": 1e-3, "time/epoch": 1.0}
    return {"train/epoch_loss": value, "val/loss": value, "val/accuracy": 1 - value}


# -- a sweep ---------------------------------------------------------------------------------------


def sweep() -> Growth:
    found: dict[str, dict[int, float]] = defaultdict(dict)
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        for size in (10, 30, 100, 300):
            first, last, end = run_jobs(folder / str(size), size)
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
    )


def run_jobs(folder: Path, size: int) -> tuple[float, float, float]:
    """Return the seconds until the first job starts, the last job ends, and the command ends."""
    rates = ",".join(f"{0.001 * (1 + number)}" for number in range(size // 2))
    command = [
        *(sys.executable, TRAIN, "-m", f"optimizer.lr={rates}", "seed=0,1"),
        *("trainer.max_epochs=2", "trainer.device=cpu", "trainer.num_threads=1"),
        *("launcher.jobs=2", f"hydra.sweep.dir={folder}"),
    ]
    first = last = 0.0
    lines = []
    started = time.perf_counter()
    with subprocess.Popen(
        command, cwd=folder.parent, stderr=subprocess.STDOUT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for text in process.stdout:
            now = time.perf_counter() - started
            lines.append(text)
            if " started: " in text and not first:
                first = now
            if f" of {size}]" in text:
                last = now
    if process.returncode or not 0 < first < last:
        raise RuntimeError("".join(lines[-20:]))
    return first, last, time.perf_counter() - started


def copied(sweep: Path, many: Path, size: int) -> None:
    """Make a sweep of `size` jobs from the runs of a smaller one."""
    there = ledger.entries(sweep)
    entries = []
    for number in range(size):
        one = there[number % len(there)]
        shutil.copytree(sweep / one.folder, many / str(number), symlinks=True)
        swept = {**one.swept, "optimizer.lr": str(0.001 * (1 + number // 2))}
        entries.append(replace(one, number=number, folder=str(number), swept=swept))
    ledger.write(many, entries, **{k: v for k, v in ledger.read(sweep).items() if k != "jobs"})


# -- shared ----------------------------------------------------------------------------------------


@contextmanager
def clocked(found: Mapping[str, dict[int, float]], name: str, size: int) -> Iterator[None]:
    started = time.perf_counter()
    yield
    found[name][size] = time.perf_counter() - started
