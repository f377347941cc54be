"""Where the time of a run goes, by phase. Only `debug=profile` measures it.

A function on the way says which phase it is in. Otherwise `phase` costs half a microsecond, and
nothing is measured.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, ParamSpec, TypeVar

NAMES = ("data", "forward", "backward", "optimizer", "evaluation", "checkpoint", "other")
_NOTHING = contextlib.nullcontext()
_measuring: list[Phases] = []  # at most one

P = ParamSpec("P")
T = TypeVar("T")


class Phases:
    """The seconds and the number of entries of each phase, from its creation until `stop`.

    Each moment belongs to one phase: a phase inside another one interrupts it. What is in none is
    `other`. `synchronise` waits for the device, so that its work counts for the phase that asked
    for it.
    """

    def __init__(
        self,
        synchronise: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._synchronise, self._clock = synchronise, clock
        self.seconds = dict.fromkeys(NAMES, 0.0)
        self.calls = dict.fromkeys(NAMES, 0)
        self._stack = ["other"]
        self._started = self._since = clock()
        self.total = 0.0

    def _charge(self) -> None:
        self._synchronise()
        now = self._clock()
        name = self._stack[-1]
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now

    @contextlib.contextmanager
    def inside(self, name: str) -> Iterator[None]:
        if self._stack[-1] == name:  # a part of it
            yield
            return
        self._charge()
        self._stack.append(name)
        self.calls[name] = self.calls.get(name, 0) + 1
        try:
            yield
        finally:
            self._charge()
            self._stack.pop()

    def stop(self) -> None:
        self._charge()
        self.total = self._since - self._started

    def lines(self) -> list[str]:
        """Return a table: seconds, share of the whole and entries of each phase, and their sum."""
        rows = [(name, self.seconds[name], self.calls[name] or "") for name in self.seconds]
        rows.append(("total", self.total, ""))
        whole = max(self.total, 1e-12) / 100
        return ["phase         seconds    share   calls"] + [
            f"{name:<12} {seconds:>8.3f} {seconds / whole:>6.1f} % {calls:>7}".rstrip()
            for name, seconds, calls in rows
        ]


@contextlib.contextmanager
def measured(phases: Phases) -> Iterator[Phases]:
    """Measure the phases that functions enter inside, in whichever thread."""
    _measuring.append(phases)
    try:
        yield phases
    finally:
        _measuring.remove(phases)
        phases.stop()


def phase(name: str) -> AbstractContextManager[Any]:
    """Return a context that counts for a phase, if anything is measured."""
    return _measuring[-1].inside(name) if _measuring else _NOTHING


def phased(name: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Let a function's calls count for a phase."""

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(function)
        def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
            with phase(name):
                return function(*args, **kwargs)

        return wrapped

    return decorate


def timed(name: str, items: Iterable[T]) -> Iterator[T]:
    """Return an iterator whose waiting for the next item counts for a phase."""
    return _timed(name, items) if _measuring else iter(items)


def _timed(name: str, items: Iterable[T]) -> Iterator[T]:
    iterator = iter(items)
    try:
        while True:
            with phase(name):
                item = next(iterator, _NOTHING)
            if item is _NOTHING:
                return
            yield item  # type: ignore[misc]
    finally:
        close = getattr(iterator, "close", None)
        if close is not None:
            close()
