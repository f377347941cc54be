"""Graceful stop: SIGTERM, SIGINT and SIGUSR1 end a run after a last checkpoint."""

from __future__ import annotations

import multiprocessing.queues
import multiprocessing.util
import os
import signal
import time
import weakref
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any, TypeVar

from regrow.processes.signals import STOPPING, handled

T = TypeVar("T")

# Called when an object is dropped, as destructors are.
_FINALIZERS = {multiprocessing.util.Finalize.__call__.__code__, weakref.finalize.__call__.__code__}


class Interrupted(BaseException):
    """Raised where waiting for the end of a step would take too long, as in an evaluation.

    Like KeyboardInterrupt it is not an Exception: code that reads data, ours or a user's, would
    take it for a broken example.
    """


class StopRequest:
    """Records the first signal; the loop stops at its next safe point.

    A second signal stops the process at once. The same signal within a second counts as the first:
    schedulers signal every process of a job, and its launcher forwards its own signal. The context
    manager restores the previous handlers on exit. Outside the main thread it handles no signals
    and `requested` stays False.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._noted = 0.0
        self._waiting = False
        self._handlers = handled(STOPPING, self._note)

    @property
    def requested(self) -> bool:
        return self.signal is not None

    def while_waiting(self, items: Iterable[T]) -> Iterator[T]:
        """Yield `items`; a stop request interrupts the wait for one with Interrupted."""
        iterator = iter(items)
        while True:
            self._waiting = True
            try:
                if self.requested:
                    raise Interrupted
                item = next(iterator)
            except StopIteration:
                return
            finally:
                self._waiting = False
            yield item

    def __enter__(self) -> StopRequest:
        self._handlers.__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        self._handlers.__exit__(*raised)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            if number == self.signal and time.monotonic() - self._noted < 1:
                return
            os._exit(128 + number)
        self.signal, self._noted = signal.Signals(number), time.monotonic()
        if self._waiting and not _must_finish(frame):
            raise Interrupted


def _must_finish(frame: FrameType | None) -> bool:
    """Return True within a function that an exception must not interrupt.

    Python drops what a destructor raises, and prints a traceback. A queue's `put`, by which a run
    asks its data workers for batches, may have taken a lock that nothing would then release.
    """
    while frame is not None:
        code = frame.f_code
        if code.co_name == "__del__" or code in _FINALIZERS:
            return True
        if code.co_name == "put" and code.co_filename == multiprocessing.queues.__file__:
            return True
        frame = frame.f_back
    return False
