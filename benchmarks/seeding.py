"""The cost of seeding a micro-batch: torch, numpy and `random`, timed inside the loop.

A tight loop would measure half of it, because its caches are warm.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy
import torch

from benchmarks.measure import Table
from benchmarks.step import SMALL, STEPS, train_py
from regrow.distributed.parallel import World
from regrow.randomness import key, seed_step

STEP, ALL = "a step of the small MLP", "seeding"
KEY, SEED = "lab.plan.key", "regrow.numerics.capture.seed_step"  # as a step finds them
PARTS: dict[str, tuple[str, Callable[..., Any]]] = {
    "of it the key": (KEY, key),
    "of it torch": (SEED, torch.default_generator.manual_seed),
    "of it numpy": (SEED, lambda value: numpy.random.seed(value & 0xFFFFFFFF)),
    "of it random": (SEED, random.seed),
}


def measure() -> Table:
    torch.set_num_threads(1)
    run, _, _ = train_py(World(device=torch.device("cpu")), *SMALL, steps=STEPS)
    seconds: dict[str, list[float]] = {name: [] for name in (STEP, ALL, *PARTS)}
    run()
    for _ in range(9):
        step, seeding = timed(run, {KEY: key, SEED: seed_step})
        seconds[STEP].append(step)
        seconds[ALL].append(seeding)
        for name, (place, part) in PARTS.items():
            seconds[name].append(timed(run, {place: part})[1])
    return Table(
        title="Seeding a micro-batch",
        note="torch, numpy and `random` start from a key of the step, the micro-batch and the "
        "rank. Timed in the loop as it trains the small MLP, whose steps have one micro-batch "
        f"each; the parts are timed one by one. One thread, {STEPS} steps a round.",
        unit="µs a micro-batch",
        reference=STEP,
        seconds=seconds,
        scale=1e6,
    )


def timed(
    run: Callable[[], float], functions: dict[str, Callable[..., Any]]
) -> tuple[float, float]:
    """Return the seconds per step, and the seconds in `functions`, which replace those named."""
    took: dict[str, list[float]] = {name: [] for name in functions}

    def clocked(name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            started = time.perf_counter()
            result = functions[name](*arguments)
            took[name].append(time.perf_counter() - started)
            return result

        return call

    with contextlib.ExitStack() as stack:
        for name in functions:
            stack.enter_context(mock.patch(name, clocked(name)))
        whole = run()
    return whole / STEPS, sum(sum(each) / len(each) for each in took.values())
