"""`debug=profile` says where the time goes, and its parts add up to the whole."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
from running import train

from regrow import phases
from regrow.phases import Phases, measured, phase, phased, timed

ONE = ("trainer.num_threads=1", "trainer.device=cpu")


def test_each_moment_belongs_to_one_phase() -> None:
    ticks = itertools.count()
    inclusive = {"outer": 0, "inner": 0}
    with measured(Phases(clock=lambda: float(next(ticks)))) as found:
        with phase("outer"):  # ticks 1 to 6
            with phase("inner"):  # ticks 2 to 3
                pass
            with phase("inner"), phase("inner"):  # ticks 4 to 5; a part of itself
                pass
        assert [*timed("data", [7, 8])] == [7, 8]
        inclusive |= {"outer": 5, "inner": 2}
    assert found.seconds["outer"] == 3 and found.seconds["inner"] == 2
    assert found.calls["inner"] == 2 and found.calls["data"] == 3  # the last finds the end
    assert sum(found.seconds.values()) == found.total
    # Negative control: counted twice, what is inside another phase makes the sum too large.
    assert sum({**found.seconds, **inclusive}.values()) > found.total


def test_nothing_is_measured_without_a_profile() -> None:
    items = iter([1])
    assert timed("data", items) is items
    assert phase("forward") is phase("backward")
    assert phases._measuring == []

    @phased("forward")
    def double(value: int) -> int:
        """Return twice the value."""
        return 2 * value

    assert double(2) == 4 and double.__doc__ == "Return twice the value."


def test_an_iterator_that_is_left_early_is_closed() -> None:
    closed = []

    def items() -> object:
        try:
            yield from range(9)
        finally:
            closed.append(True)

    with measured(Phases()):
        generator = timed("data", items())  # type: ignore[arg-type]
        assert next(generator) == 0
        generator.close()  # type: ignore[attr-defined]
    assert closed == [True]


@pytest.mark.parametrize("slices", [1, 2])
def test_the_table_of_a_run_adds_up_to_its_wall_time(slices: int, tmp_path: Path) -> None:
    more = (f"trainer.accumulation_steps={slices}", "trainer.max_steps=4")
    train(tmp_path, "debug=profile", *more, *ONE)
    text = (tmp_path / "profile" / "phases.txt").read_text()
    first, second = text.split("\n\n")
    rows = [re.fullmatch(r"(\w+) +([\d.]+) +([\d.]+) % *(\d*)", row) for row in first.split("\n")]
    table = {row[1]: (float(row[2]), float(row[3]), row[4]) for row in rows if row}
    assert [*table] == [*phases.NAMES, "total"]
    total = table.pop("total")
    assert total[1] == 100.0
    assert sum(seconds for seconds, _, _ in table.values()) == pytest.approx(total[0], abs=0.006)
    assert sum(share for _, share, _ in table.values()) == pytest.approx(100, abs=0.6)
    assert all(table[name][0] > 0 for name in ("forward", "backward", "optimizer", "evaluation"))
    calls = {name: int(count or 0) for name, (_, _, count) in table.items()}
    assert calls["forward"] == calls["backward"] == 4 * slices
    assert calls["optimizer"] == 4 and calls["evaluation"] == 1
    assert second.startswith("self time of operators") and "aten::" in second
    assert (tmp_path / "profile" / "trace.json").is_file()
