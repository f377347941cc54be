"""Handlers for a run's log lines: the terminal, above its progress bars, and a file."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Iterator
from logging.handlers import MemoryHandler
from pathlib import Path

from tqdm import tqdm

from regrow.errors import printable
from regrow.processes import terminal
from regrow.project import lab_name
from regrow.record.redact import redact

log = logging.getLogger("regrow")
to_file = logging.getLogger("regrow.file")


def _have_a_lock_of_our_own() -> None:
    """Replace tqdm's lock, which all processes forked after its creation share.

    If a sweep's job is killed while it writes a line, the shared lock stays held and every other
    job waits forever.
    """
    tqdm.set_lock(threading.RLock())


_have_a_lock_of_our_own()
os.register_at_fork(after_in_child=_have_a_lock_of_our_own)


class _LogFile(logging.FileHandler):
    """A log file that silently loses lines if the disk is full, instead of failing the run."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


class _BarHandler(logging.Handler):
    """Writes lines above the progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        stream = sys.stderr if record.levelno >= logging.WARNING else sys.stdout
        try:
            tqdm.write(self.format(record), file=stream)
        except OSError:  # as after `| head`, or on a full disk: the run and its train.log continue
            if terminal.drop_unread(stream):
                to_file.warning("nothing reads the output any more, so it is written only here")


@contextlib.contextmanager
def console() -> Iterator[None]:
    """Show the run's log on the terminal inside: plain lines, with warnings and errors marked."""
    handler = _BarHandler()
    handler.setFormatter(_ConsoleFormat())
    handler.addFilter(lambda record: record.name != "regrow.file")  # for train.log alone
    with _attached(handler):
        yield


@contextlib.contextmanager
def early_lines() -> Iterator[None]:
    """Keep the lines inside for `log_file`: a run makes its objects before its folder."""
    with _attached(MemoryHandler(1000)):
        yield


@contextlib.contextmanager
def log_file(folder: Path, rank: int = 0) -> Iterator[None]:
    """Write the same log to `train.log` inside, with the time and the rank.

    Begins with those lines that `early_lines` kept.
    """
    handler = _LogFile(folder / "train.log", encoding="utf-8", errors="backslashreplace")
    text = f"%(asctime)s [rank {rank}] %(levelname)s %(name)s: %(message)s"
    handler.setFormatter(_FileFormat(text))
    handler.addFilter(lambda record: record.name != "regrow.terminal")  # short forms
    for early in [each for each in log.handlers if isinstance(each, MemoryHandler)]:
        early.setTarget(handler)
        early.flush()
        _detach(early)
    with _attached(handler):
        yield


@contextlib.contextmanager
def _attached(handler: logging.Handler) -> Iterator[None]:
    for each in (log, logging.getLogger(lab_name())):
        each.setLevel(logging.INFO)
        each.propagate = False
        each.addHandler(handler)
    try:
        yield
    finally:
        _detach(handler)
        handler.close()


def _detach(handler: logging.Handler) -> None:
    for each in (log, logging.getLogger(lab_name())):
        each.removeHandler(handler)


class _ConsoleFormat(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = printable(redact(record.getMessage()))
        return text if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {text}"


class _FileFormat(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(redact(super().format(record)))
