"""Interleaved timing: every round runs each candidate once, so that noise affects all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Table:
    title: str
    note: str
    unit: str
    reference: str  # name of the candidate that the ratios divide by
    seconds: Mapping[str, list[float]]  # one value per round
    against: Mapping[str, str] = field(default_factory=dict)  # candidates with their own reference
    per: float = 1.0  # divides the seconds: steps in a round, for example
    scale: float = 1.0  # unit per second

    def ratios(self, name: str) -> list[float]:
        reference = self.against.get(name, self.reference)
        pairs = zip(self.seconds[name], self.seconds[reference], strict=True)
        return [mine / reference for mine, reference in pairs]

    def text(self) -> str:
        lines = [f"## {self.title}", "", self.note, ""]
        lines += [f"| | median, {self.unit} | least | over {self.reference} | range |"]
        lines += ["| --- | ---: | ---: | ---: | --- |"]
        for name, values in self.seconds.items():
            shown = [value / self.per * self.scale for value in values]
            ratios = self.ratios(name)
            other = f" (over *{self.against[name]}*)" if name in self.against else ""
            lines.append(
                f"| {name}{other} | {statistics.median(shown):.4g} | {min(shown):.4g} "
                f"| {statistics.median(ratios):.2f} | {min(ratios):.2f} to {max(ratios):.2f} |"
            )
        return "\n".join(lines) + "\n"


def in_turn(
    candidates: Mapping[str, Callable[[], float | None]], *, rounds: int, warm_up: bool = True
) -> dict[str, list[float]]:
    """Return the seconds of each candidate in each round, after an untimed round to warm up.

    A candidate that times itself returns its seconds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for index in range(0 if warm_up else 1, rounds + 1):
        for name, run in candidates.items():
            started = time.perf_counter()
            own = run()
            if index:
                seconds[name].append(time.perf_counter() - started if own is None else own)
    return seconds


def per_second(name: str) -> float:
    """Return the scale from seconds to the unit that a name ends with, as in "a batch, µs"."""
    return {"s": 1.0, "ms": 1e3, "µs": 1e6}[name.rpartition(", ")[2]]
