"""The tests that docs/guarantees.md names exist, and each promise has a fast one."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from regrow.project import CONF

TESTS = Path(__file__).parent
ROW = re.compile(r"^\| (?!promise|---)(?P<promise>[^|]+) \| (?P<names>`[^|]+`) \|$", re.MULTILINE)
SLOW = {"pytest.mark.slow", "pytest.mark.nightly", "needs_slurm"}  # needs_slurm: and skipped


def rows() -> list[tuple[str, list[str]]]:
    text = (CONF.parent / "docs" / "guarantees.md").read_text(encoding="utf-8")
    return [(promise, re.findall(r"`(\w+)`", names)) for promise, names in ROW.findall(text)]


def all_tests() -> dict[str, bool]:
    """Return each test as `pytest -k` sees it, by file and name, and whether it is fast."""
    found = {}
    for path in TESTS.rglob("test_*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                marks = {ast.unparse(decorator) for decorator in node.decorator_list}
                found[f"{path.name}::{node.name}"] = not marks & SLOW
    return found


def test_every_promise_is_shown_by_tests_that_there_are() -> None:
    known = all_tests()
    assert len(rows()) >= 15
    for promise, names in rows():
        for name in names:
            assert any(name in test for test in known), f"{promise}: nothing is named {name}"


def test_every_promise_is_shown_by_a_fast_test() -> None:
    fast = [test for test, is_fast in all_tests().items() if is_fast]
    for promise, names in rows():
        assert any(name in test for name in names for test in fast), promise
