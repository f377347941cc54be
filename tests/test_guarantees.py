"""What docs/guarantees.md says shows a promise is there to show it."""

from __future__ import annotations

import re
from pathlib import Path

from regrow.config import CONF

TESTS = Path(__file__).parent
ROW = re.compile(r"^\| (?!promise|---)(?P<promise>[^|]+) \| (?P<names>`[^|]+`) \|$", re.MULTILINE)


def test_every_promise_is_shown_by_tests_that_there_are() -> None:
    rows = ROW.findall((CONF.parent / "docs" / "guarantees.md").read_text())
    known = {path.stem for path in TESTS.rglob("test_*.py")}
    for path in TESTS.rglob("test_*.py"):
        known |= set(re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE))
    assert len(rows) >= 15
    for promise, names in rows:
        for name in re.findall(r"`(\w+)`", names):
            assert any(name in test for test in known), f"{promise}: nothing is named {name}"
