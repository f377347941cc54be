"""Output in any encoding: a character that the terminal lacks is replaced, never an error."""

from __future__ import annotations

import codecs
import io
import sys

ERRORS = "regrow-shown"
# What ASCII has for the signs that this package prints.
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


def show(encoding: str | None = None) -> None:
    """Let stdout and stderr of this process show any text, in `encoding` if it is given."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding=encoding, errors=ERRORS)
