"""A training step of ResNet-18 on 32×32 images, and the cost of the C library's allocator.

Each candidate runs in its own process, since the allocator belongs to the process. It runs one
round of steps for each line on its standard input, and prints how long they took.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.measure import Table, in_turn
from benchmarks.peers import round_of

if TYPE_CHECKING:
    from torch import nn

ROOT = Path(__file__).resolve().parents[1]
STEPS = 4
BATCH = 64
EXAMPLES = 2560
SYNTHETIC = ("data=synthetic", f"data.source.num_train={EXAMPLES}")
OURS, KEPT, PLAIN = "train.py", "bare loop, freed memory kept", "bare loop"


def measure() -> list[Table]:
    return [
        table("ResNet-18 on 32×32 images", "resnet18", STEPS),
        table("a small CNN on 32×32 images", "cnn", 10 * STEPS),
    ]


VARIANTS = {
    "as it is": (),
    "trainer.channels_last=true": ("trainer.channels_last=true",),
    "trainer.precision=bf16": ("trainer.precision=bf16",),
    "trainer.precision=bf16, channels_last": (
        "trainer.precision=bf16",
        "trainer.channels_last=true",
    ),
    "trainer.compile=true": ("trainer.compile=true",),
}


def measure_variants() -> list[Table]:
    """Measure the effect of each way to make a step cheaper."""
    return [
        variants("ResNet-18 on 32×32 images", "resnet18", STEPS),
        variants("a small CNN on 32×32 images", "cnn", 10 * STEPS),
        variants("ResNet-18 on 8×8 digits", "resnet18", 5 * STEPS, "data=digits"),
        variants("a small CNN on 8×8 digits", "cnn", 50 * STEPS, "data=digits"),
    ]


def variants(what: str, model: str, steps: int, *data: str) -> Table:
    data = data or SYNTHETIC
    with contextlib.ExitStack() as stack:
        candidates = {
            name: started(stack, OURS, model, steps, *data, *overrides)
            for name, overrides in VARIANTS.items()
            if "compile" not in name or shutil.which("g++") or shutil.which("clang++")
        }
        seconds = in_turn(candidates, rounds=5)
    return Table(
        title=f"Switches of the trainer, for a step of {what}",
        note=f"train.py, batch {BATCH}, all cores. torch.compile needs a C++ compiler.",
        unit="ms a step",
        reference="as it is",
        seconds=seconds,
        per=steps,
        scale=1e3,
    )


def table(what: str, model: str, steps: int) -> Table:
    with contextlib.ExitStack() as stack:
        candidates = {name: started(stack, name, model, steps) for name in (OURS, KEPT, PLAIN)} | {
            f"bare loop, {library}": started(stack, PLAIN, model, steps, LD_PRELOAD=str(path))
            for library, path in other_allocators().items()
        }
        seconds = in_turn(candidates, rounds=7)
    return Table(
        title=f"A training step of {what}",
        note=f"Batch {BATCH}, AdamW, all cores, {steps} steps a round. The bare loop is forward, "
        "backward and update of batches that are there; train.py's adds all else that it does. "
        "Other allocators are those that this machine has, put in front by LD_PRELOAD.",
        unit="ms a step",
        reference=PLAIN,
        against={OURS: KEPT},
        seconds=seconds,
        per=steps,
        scale=1e3,
    )


def other_allocators() -> Mapping[str, Path]:
    """Debian's libjemalloc2, libtcmalloc-minimal4 and libmimalloc2.0, if they are installed."""
    names = {"jemalloc": "libjemalloc.so.2", "tcmalloc": "libtcmalloc_minimal.so.4"}
    names["mimalloc"] = "libmimalloc.so.2"
    folders = [Path("/usr/lib"), *Path("/usr/lib").glob("*-linux-gnu")]
    paths = {name: folder / file for name, file in names.items() for folder in folders}
    return {name: path for name, path in paths.items() if path.exists()}


def started(
    stack: contextlib.ExitStack,
    name: str,
    model: str,
    steps: int,
    *overrides: str,
    **environment: str,
) -> Callable[[], float]:
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.image", name, model, str(steps), *overrides],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
    )
    return round_of(stack.enter_context(process), name)


def main(name: str, model: str, steps: int, *overrides: str) -> None:
    import torch

    from regrow.numerics import memory

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    if name == KEPT and not memory.keep_freed_memory():
        raise SystemExit("the allocator is not glibc's")
    run = ours(model, steps, *overrides) if name == OURS else bare(model, steps)
    for _ in sys.stdin:
        print(run(), flush=True)
    # Not ru_maxrss, which starts at the value of the parent process.
    status = Path("/proc/self/status").read_text()
    peak = int(status.partition("VmHWM:")[2].split()[0]) // 1024
    print(f"{name}, {model}: peak of memory {peak} MiB", file=sys.stderr)


def ours(model: str, steps: int, *overrides: str) -> Callable[[], float]:
    import torch

    from benchmarks.step import train_py
    from regrow.distributed.parallel import World

    options = ("trainer.num_threads=null", f"model={model}", *(overrides or SYNTHETIC))
    world = World(device=torch.device("cpu"))
    run, _, _ = train_py(world, *options, steps=steps, before=2)
    return run


def network(name: str) -> nn.Module:
    from lab.models.cnn import CNN
    from lab.models.vision import resnet

    shape = {"input_shape": [3, 32, 32], "num_outputs": 10, "init": "default", "freeze": []}
    if name == "cnn":
        return CNN(channels=[32, 64, 128], norm="batch", dropout=0.0, **shape)
    return resnet(depth=18, pretrained=False, zero_init_residual=False, **shape)


def bare(name: str, steps: int) -> Callable[[], float]:
    import time

    import torch
    from torch.nn import functional as F

    model = network(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    images = torch.randn(EXAMPLES, 3, 32, 32)  # as many as train.py holds, for equal memory
    batches, y = images.split(BATCH), torch.randint(10, (BATCH,))

    def run() -> float:
        started = time.perf_counter()
        for x in batches[:steps]:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        return time.perf_counter() - started

    return run


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), *sys.argv[4:])
