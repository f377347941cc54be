"""The peak memory of a run and of a bare loop, each in its own process, as in `image`."""

from __future__ import annotations

import re
import subprocess
import sys

from benchmarks.image import KEPT, OURS, PLAIN, ROOT, network
from benchmarks.measure import Table, in_turn

LESS = "train.py, less its copy of the state"


def measure() -> list[Table]:
    return [table("ResNet-18", "resnet18", 4), table("a small CNN", "cnn", 40)]


def table(what: str, model: str, steps: int) -> Table:
    def peak(name: str) -> float:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.image", name, model, str(steps)],
            input="\n", capture_output=True, text=True, cwd=ROOT, check=True,
        )  # fmt: skip
        found = re.search(r"peak of memory (\d+) MiB", done.stderr)
        assert found is not None, done.stderr
        return float(found[1])

    peaks = in_turn(
        {name: lambda name=name: peak(name) for name in (OURS, KEPT, PLAIN)},  # type: ignore[misc]
        rounds=3,
    )
    module = network(model)
    weights, trained = module.state_dict().values(), module.parameters()
    copy = (sum(t.nbytes for t in weights) + 2 * sum(t.nbytes for t in trained)) / 2**20
    return Table(
        title=f"Memory of a run of {what} on 32×32 images",
        note="The most that the process ever held, libraries and data included. train.py keeps a "
        f"copy of the state aside, for checkpoints: {copy:.0f} MiB, which its second row leaves "
        "out.",
        unit="MiB",
        reference=PLAIN,
        seconds={OURS: peaks[OURS], LESS: [each - copy for each in peaks[OURS]], **peaks},
    )
