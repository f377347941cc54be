"""Print in any encoding: replace a character that the terminal lacks instead of failing."""

from __future__ import annotations

import atexit
import codecs
import contextlib
import io
import os
import select
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

ERRORS = "regrow-shown"
# ASCII replacements for the characters that this package prints.
_ASCII = {
    **{"├": "|", "─": "-", "│": "|", "└": "`", "×": "x", "±": "+-", "…": "...", "–": "-", "—": "-"},
    **{"’": "'", "\u2018": "'", "“": '"', "”": '"', "·": ".", "→": "->", "≥": ">=", "≤": "<="},
    **{"\u202f": " ", "\u00a0": " "},
}


def _replace(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    shown = []
    for sign in error.object[error.start : error.end]:
        if sign in _ASCII:
            shown.append(_ASCII[sign])
        elif "\udc80" <= sign <= "\udcff":  # a byte of a file name that is not UTF-8
            shown.append(f"\\x{ord(sign) - 0xDC00:02x}")
        else:
            shown.append(sign.encode("ascii", "backslashreplace").decode("ascii"))
    return "".join(shown), error.end


codecs.register_error(ERRORS, _replace)


def drop_unread(stream: TextIO | None = None) -> bool:
    """Drop a stream's output if its reader has gone, as `| head -1` does, and return True.

    Without a `stream`, that is stdout.
    """
    stream = sys.stdout if stream is None else stream
    try:
        descriptor = stream.fileno()
        with contextlib.suppress(BrokenPipeError):
            stream.flush()
    except (AttributeError, OSError, ValueError):  # it is missing or closed
        return False
    poll = select.poll()
    poll.register(descriptor, 0)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    return True


@contextlib.contextmanager
def may_be_unread() -> Iterator[None]:
    """Exit with 1 and without a word once the reader of stdout has gone."""
    try:
        yield
    except BrokenPipeError:
        if not drop_unread():
            raise
        raise SystemExit(1) from None


def show(encoding: str | None = None) -> None:
    """Make stdout and stderr accept any text, in `encoding` if it is given.

    One that was closed before the start, as by `2>&-`, becomes one that drops it. Its descriptor is
    taken with it, or the next file to be opened would receive what libraries print.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            dropping = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115  until the exit
            setattr(sys, name, dropping)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding=encoding, errors=ERRORS)
    atexit.register(drop_unread)  # else Python's flush at exit reports a broken pipe
