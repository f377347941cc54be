"""Memory that a step frees is kept for the next one and not requested from the kernel again."""

from __future__ import annotations

import os
import resource
import subprocess
import sys

import pytest
from running import CPU, config_of

from regrow.numerics import memory
from regrow.runs import training

pytestmark = pytest.mark.skipif(not memory.is_glibc(), reason="of glibc alone")

# 40 MB: more than glibc alone ever keeps.
FAULTS = """
import resource, sys
import torch
from regrow.numerics import memory
print(memory.keep_freed_memory() if sys.argv[1] == "kept" else None)
for index in range(30):  # glibc needs a few to find a place for such a block
    if index == 20:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(10_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(what: str, **environment: str) -> tuple[str, int]:
    """Return whether memory is kept now, and the page faults of ten times 40 MB."""
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, what], capture_output=True, text=True, check=True,
        env={k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")} | environment,
    )  # fmt: skip
    is_kept, count = done.stdout.split()
    return is_kept, int(count)


@pytest.mark.slow
def test_freed_memory_is_used_again_without_a_page_fault() -> None:
    pages = 10 * 40_000_000 // resource.getpagesize()
    is_kept, count = faults("kept")
    assert is_kept == "True" and count < pages / 100
    assert faults("not kept")[1] > pages / 1000  # with huge pages they are fewer and larger


@pytest.mark.nightly
@pytest.mark.slow
def test_an_environment_that_tunes_malloc_is_left_alone() -> None:
    assert faults("kept", MALLOC_ARENA_MAX="2")[0] == "False"
    assert faults("kept", GLIBC_TUNABLES="glibc.malloc.arena_max=2")[0] == "False"


@pytest.mark.parametrize("wanted", [True, False])
def test_the_switch_is_the_trainers(wanted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[bool] = []
    monkeypatch.setattr(memory, "keep_freed_memory", lambda: called.append(True))
    training.build(config_of(f"trainer.keep_freed_memory={str(wanted).lower()}"), CPU)
    assert called == [True] * wanted
