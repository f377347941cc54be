"""A step sends as many bytes as docs/scaling.md computes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import forked
import pytest

HERE = Path(__file__).resolve().parent


def can_make_a_namespace() -> bool:
    try:
        return subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode == 0
    except OSError:
        return False


def worked_out(size: int) -> dict[str, float]:
    """Return the bytes that a process sends in a step, over the bytes of the parameters in fp32.

    A ring sends (N-1)/N of a tensor for an all-gather or a reduce-scatter, and twice that for an
    all-reduce. gloo has no reduce-scatter and uses an all-reduce instead.
    """
    gather, reduce = (size - 1) / size, 2 * (size - 1) / size
    return {
        "ddp": reduce,
        "ddp, 4 slices": reduce,
        "fsdp": 2 * gather + reduce,
        "fsdp, kept gathered": gather + reduce,
        "fsdp, gathered in bf16": gather + reduce,
        "fsdp, 4 slices": 8 * gather + reduce,
    }


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.skipif(not can_make_a_namespace(), reason="no right to make a network namespace")
@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.nightly)])
def test_a_step_sends_as_many_bytes_as_worked_out(size: int, tmp_path: Path) -> None:
    subprocess.run(
        ["unshare", "--net", sys.executable, HERE / "counting.py", str(size), tmp_path / "sent"],
        check=True, timeout=240, capture_output=True, text=True, cwd=HERE,
        env={"PYTHONPATH": forked.python_path(HERE, HERE.parent, HERE.parents[1] / "src")},
    )  # fmt: skip
    sent = json.loads((tmp_path / "sent").read_text())
    print(json.dumps(sent, indent=2))
    expected = worked_out(size)
    assert sent.keys() == expected.keys()
    for name, times in expected.items():
        # Headers, and the few numbers that a step sends besides its gradients.
        assert times <= sent[name] < 1.03 * times, name
    assert sent["fsdp"] > 1.3 * expected["ddp"]  # the bounds can tell one strategy from another
