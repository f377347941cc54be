"""`python -m benchmarks [NAME …]`: measure. Without names, also write RESULTS.md and its plots."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Callable
from datetime import date
from importlib.metadata import distributions
from pathlib import Path

from benchmarks import (
    accuracy,
    checkpoint,
    cifar,
    evaluation,
    feeding,
    growth,
    image,
    memory,
    nanogpt,
    peers,
    photos,
    picture,
    processes,
    seeding,
    shards,
    start,
    step,
    sweep,
)
from benchmarks.growth import Growth
from benchmarks.measure import Table
from regrow.processes import terminal

HERE = Path(__file__).resolve().parent

BENCHMARKS: dict[str, Callable[[], Table | list[Table] | list[Growth]]] = {
    "step": step.measure,
    "seeding": seeding.measure,
    "image": image.measure,
    "variants": image.measure_variants,
    "feeding": feeding.measure,
    "photos": photos.measure,
    "shards": shards.measure,
    "language": nanogpt.measure,
    "evaluation": evaluation.measure,
    "memory": memory.measure,
    "accuracy": accuracy.measure,
    "processes": processes.measure,
    "checkpoint": checkpoint.measure,
    "start": start.measure,
    "sweep": sweep.measure,
    "growth": growth.measure,
}


HELP = f"""python -m benchmarks [NAME …]
{", ".join(BENCHMARKS)}
Without a name: all of them, some 45 minutes; RESULTS.md and its pictures are then rewritten.

python -m benchmarks cifar10 [seeds=5] [KEY=VALUE …]
CIFAR-10 to 94 %, which needs its files (data.root=…) and, without a GPU, half an hour a seed."""


def main(names: list[str]) -> None:
    if "--help" in names:
        print(HELP)
        return
    if names[:1] == ["cifar10"]:
        print(cifar.measure(*names[1:]).text())
        return
    if "cifar10" in names:
        sys.exit("benchmarks: cifar10 is measured alone: python -m benchmarks cifar10 …")
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        sys.exit(f"benchmarks: no {unknown[0]}; there are {', '.join(BENCHMARKS)}, cifar10")
    sections = []
    for name in names or BENCHMARKS:
        found = BENCHMARKS[name]()
        for table in found if isinstance(found, list) else [found]:
            print(table.text(), flush=True)
            sections.append(table.text())
    if not names:
        (HERE / "RESULTS.md").write_text("\n".join([head(), *sections]), encoding="utf-8")
        picture.main()


def head() -> str:
    import torch

    load = os.getloadavg()[0]
    return (
        "# Measured with `make bench`\n\n"
        f"{date.today():%Y-%m-%d}, {platform.system()}, {os.cpu_count()} cores ({processor()}), "
        f"Python {platform.python_version()}, torch {torch.__version__}, load {load:.1f} at the "
        f"end.{engines()}\n"
        "Each pair ran in turn in one go; a ratio is the median over the rounds, with the least "
        "and the most.\nAbsolute times depend on the machine and on what else it did; the ratios "
        "less so.\nA row whose ratio is over another than its column's says so. An exponent is the "
        "slope of log cost over log size\nfor the larger half of the sizes, of three for all: 0 "
        "for what does not grow, 1 for what grows in proportion.\nEach of these costs is measured "
        "once, but for a step, so it is a rough one.\n\n"
        "![time of a step over the hand-tuned floor](results.svg)\n"
    )


def processor() -> str:
    """Return the processor's name from Linux, or else from Python."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.+)$", info.read_text() if info.exists() else "", re.M)
    return names[0] if names else platform.processor()


def engines() -> str:
    """Return the versions of the engines that `make peers` installed."""
    found = {each.name: each.version for each in distributions(path=[str(peers.INSTALLED)])}
    names = ("pytorch-ignite", "accelerate", "transformers", "lightning")
    said = ", ".join(f"{name} {found[name]}" for name in names if name in found)
    return f" Engines: {said}." if said else ""


if __name__ == "__main__":
    terminal.show()
    with terminal.may_be_unread():
        main(sys.argv[1:])
