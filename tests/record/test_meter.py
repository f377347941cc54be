"""The rates that a run logs while it trains."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from running import fingerprint, train

from regrow.numerics.flops import peak_of, peak_of_card
from regrow.record.meter import Meter


def test_rates_are_those_of_the_steps_since_the_last_line(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)

    def slow() -> Iterator[Any]:
        nonlocal now
        for number in range(4):
            now += 3.0  # until the batch is there
            yield number

    meter, seen = Meter(), []
    for number in meter.timed(slow()):
        now += 1.0  # the step
        meter.add(8, seconds=4.0)
        if number % 2 == 1:
            seen.append(meter.read())
    assert seen == [{"time/examples_per_second": 2.0, "time/waiting_for_data": 0.75}] * 2
    assert meter.read() == {}


def lines_of(folder: Path) -> list[dict[str, Any]]:
    written = (folder / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, written) if "train/loss" in line]


@pytest.mark.slow
def test_a_run_logs_its_rates_with_each_line_of_training(tmp_path: Path) -> None:
    train(tmp_path / "run", "trainer.max_steps=6", "trainer.log_every_steps=2")
    lines = lines_of(tmp_path / "run")
    assert [line["step"] for line in lines] == [2, 4, 6]
    for line in lines:
        assert line["time/examples_per_second"] > 0
        assert 0 <= line["time/waiting_for_data"] <= 1


@pytest.mark.slow
def test_a_run_counts_its_flops_once_and_keeps_its_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("data.batch_size=32", "trainer.max_steps=6", "trainer.log_every_steps=3")
    train(tmp_path / "plain", *options)
    monkeypatch.setattr("regrow.numerics.flops.peak_of", lambda *_, **__: 1e9)
    train(tmp_path / "counted", *options)
    assert fingerprint(tmp_path / "plain") == fingerprint(tmp_path / "counted")
    plain, counted = (lines_of(tmp_path / name) for name in ("plain", "counted"))
    assert all("time/mfu" not in line for line in plain)
    # The default MLP: 64 -> 256 -> 256 -> 10. Two operations for each weight and example, forward,
    # for the weights' gradient, and for the inputs' gradient, of which the first layer needs none.
    first, others = 64 * 256, 256 * 256 + 256 * 10
    flops = 2 * (2 * first + 3 * others)
    for line in counted:
        mfu = flops * line["time/examples_per_second"] / 1e9
        assert line["time/mfu"] == pytest.approx(mfu)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", 70),
        ("NVIDIA B200", None),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
    ],
)
def test_a_card_is_known_by_its_name(name: str, tflops: int | None) -> None:
    assert peak_of_card(name) == (None if tflops is None else tflops * 1e12)


def test_a_cpu_has_no_known_peak() -> None:
    assert peak_of(torch.device("cpu"), "bf16", tf32=True) is None
