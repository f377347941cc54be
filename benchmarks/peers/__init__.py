"""Other engines, each in its own process that runs a round of steps on request."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
INSTALLED = ROOT / "build" / "peers"  # where `make peers` installs
ENGINES = {  # names of functions in loops.py
    "naive loop, .item() each step": "naive",
    "Ignite": "ignite",
    "Accelerate": "accelerate",
    "Fabric": "fabric",
    "Transformers' Trainer": "transformers",
    "Lightning, all off": "lightning_lean",
    "Lightning, as its Hydra template": "lightning_template",
}


@contextlib.contextmanager
def started(
    names: Sequence[str], steps: int, is_small: bool
) -> Iterator[dict[str, Callable[[], float]]]:
    """For each engine, yield a function that runs `steps` steps and returns their seconds."""
    paths = os.pathsep.join([str(INSTALLED), str(ROOT), str(ROOT / "src")])
    with contextlib.ExitStack() as stack:
        rounds = {}
        for name in names:
            arguments = [ENGINES[name], str(steps), "small" if is_small else "default"]
            process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.peers.loops", *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
            )
            stack.enter_context(process)  # on exit, closes its input, which ends it, and waits
            rounds[name] = round_of(process, name)
        yield rounds


def round_of(process: subprocess.Popen[str], name: str) -> Callable[[], float]:
    assert process.stdin is not None and process.stdout is not None
    told, said = process.stdin, process.stdout

    def run() -> float:
        told.write("\n")
        told.flush()
        line = said.readline()
        if not line:
            raise RuntimeError(f"{name} ended: {process.wait()}")
        return float(line)

    return run
