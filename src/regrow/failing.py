"""How a process ends with an error: one line, and a traceback for those who ask for it."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import traceback
from collections.abc import Iterator
from typing import NoReturn

from regrow.errors import UserError, chain, machine_fault, printable
from regrow.record.redact import redact

SET_BY_US = "REGROW_SET_HYDRA_FULL_ERROR"


def show_traceback(error: BaseException | None) -> None:
    """Print the traceback of `error` if the user set HYDRA_FULL_ERROR=1.

    A UserError without another cause gets none: its one line is complete.
    """
    is_asked = os.environ.get("HYDRA_FULL_ERROR") == "1" and SET_BY_US not in os.environ
    if not is_asked or error is None:
        return
    if all(isinstance(each, UserError) for each in chain(error)):
        return
    for each in chain(error):
        each.__suppress_context__ = False  # `from None` would hide the cause in a traceback too
    sys.stdout.flush()
    print(printable(redact("".join(traceback.format_exception(error)))), file=sys.stderr, end="")


def fail(message: str, code: int = 2) -> NoReturn:
    """Print `message` as one line and exit: with 2 for a user's error, 1 for a machine fault.

    The handled error's traceback comes first if the user asked for tracebacks.
    """
    show_traceback(sys.exception())
    tell(message)
    raise SystemExit(code)


def tell(message: str) -> None:
    """Print an error as one line."""
    print(f"error: {printable(one_line(message))}", file=sys.stderr)


@contextlib.contextmanager
def in_one_line() -> Iterator[None]:
    """Exit with one line for a user's error or a machine fault that is raised inside."""
    try:
        yield
    except UserError as error:
        fail(str(error))
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except Exception as error:
        if (fault := machine_fault(error)) is None:
            raise
        fail(str(fault), code=1)


def exit_code_of(end: SystemExit) -> int:
    """Return the exit code, as Python sets it for `sys.exit` with None, a number or a message."""
    return end.code if isinstance(end.code, int) else int(end.code is not None)


def one_line(message: str) -> str:
    """Return the message without line breaks. Spaces stay: a path in a command may hold them."""
    return re.sub(r"\s*[\r\n]\s*", " ", message.strip())
