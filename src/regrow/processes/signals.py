"""The signals that ask a run to stop, and their handlers."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from regrow.config.started import remove_created
from regrow.record.output import remove_unfinished

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
NOTHING = "stopped before the run began; no run folder was written"


@contextlib.contextmanager
def handled(
    numbers: Iterable[signal.Signals], handler: Callable[[int, Any], Any] | signal.Handlers
) -> Iterator[None]:
    """Set a handler for signals, and restore the earlier ones. Does nothing in other threads."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Block STOPPING, also in processes that start inside, which unblock it once they can."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def name_of(number: int) -> str:
    """Return a signal's name; real-time signals have none."""
    return signal.Signals(number).name if number in {*signal.Signals} else f"signal {number}"


class _BeforeTheRun:
    """The handlers of `scripts/train.py` until its run has a folder: importing torch takes seconds.

    A signal ends the process at once, with one line. An exception could get lost, as it would be
    raised anywhere, also in a callback of Python's import system, which drops it.
    """

    def __init__(self) -> None:
        self._handlers = contextlib.ExitStack()
        self.is_active = False
        self._undo: list[Callable[[], object]] = [remove_created, remove_unfinished]

    def begin(self) -> None:
        numbers = [n for n in STOPPING if signal.getsignal(n) is not signal.SIG_IGN]  # e.g. nohup
        self._handlers.enter_context(handled(numbers, self._note))
        self.is_active = True
        os.register_at_fork(after_in_child=self.end)

    def undo(self, function: Callable[[], object]) -> None:
        """Call `function` before a signal ends the process, and before those given earlier."""
        self._undo.insert(0, function)

    def end(self) -> None:
        """Restore the earlier handlers. Call it before the run writes what stays."""
        self._handlers.close()
        self.is_active = False

    def _note(self, number: int, frame: object) -> None:
        for function in self._undo:
            with contextlib.suppress(OSError):
                function()
        with contextlib.suppress(OSError, RuntimeError, ValueError):  # in the middle of a write
            sys.stdout.flush()
        tell_of_nothing()
        os._exit(128 + number)


before_the_run = _BeforeTheRun()


def tell_of_nothing() -> None:
    """Print NOTHING once, also where several processes were started from outside."""
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    if rank == "0":
        with contextlib.suppress(OSError):
            os.write(2, f"{NOTHING}\n".encode())
