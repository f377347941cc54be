"""The rates that a run logs while it trains."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from running import train

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


def test_a_run_logs_its_rates_with_each_line_of_training(tmp_path: Path) -> None:
    train(tmp_path / "run", "trainer.max_steps=6", "trainer.log_every_steps=2")
    written = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    lines = [line for line in map(json.loads, written) if "train/loss" in line]
    assert [line["step"] for line in lines] == [2, 4, 6]
    for line in lines:
        assert line["time/examples_per_second"] > 0
        assert 0 <= line["time/waiting_for_data"] <= 1
