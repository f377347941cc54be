"""Say how to get a run's own code back where the code as it is now cannot use the run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from regrow.config import foreign
from regrow.errors import UserError
from regrow.project import ROOT
from regrow.record import manifest


@contextlib.contextmanager
def naming_code(folder: Path) -> Iterator[None]:
    """Add to a user's error the commands that restore the code of the run, if it has changed.

    Of a run that is not the user's only the file that names its commit: its patch is not trusted.
    """
    try:
        yield
    except UserError as error:
        if not (advice := manifest.way_back(folder, ROOT)):
            raise
        if not foreign.is_own(folder):
            advice = f" {manifest.CHANGED} {folder / manifest.NAME} names its commit."
        raise type(error)(f"{error}{advice}") from error
