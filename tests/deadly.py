"""Kills its process at the end of a run or sweep, for tests that start it with DIES_AT set.

DIES_AT is `<file>:<when>`, before or after the file is renamed to its final name, or
`loggers:<when>`: before or after the loggers are closed. It is also imported as `sitecustomize`,
because a sweep becomes the script of its own copy.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

AT, _, WHEN = os.environ.get("DIES_AT", "").partition(":")


def deadly(owner: Any, name: str, is_it: Any) -> None:
    function = getattr(owner, name)

    def call(self: Any, *arguments: Any, **named: Any) -> Any:
        dies = is_it(*arguments)
        if dies and WHEN == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(self, *arguments, **named)
        if dies and WHEN == "after":
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, call)


if AT == "loggers":
    from regrow.record import loggers

    deadly(loggers.Loggers, "close", lambda *arguments: True)
elif AT:
    deadly(Path, "replace", lambda target: Path(target).name == AT)
