"""The errors that are part of the interface: one line, with the key, the value and the way out."""

from __future__ import annotations


class UserError(ValueError):
    """Something the user can mend. The message is one line; scripts print it and exit with 2."""


class DataError(UserError):
    """Broken data. The message names the file and the row, or the example."""
