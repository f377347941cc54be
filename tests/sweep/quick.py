"""`train.py -m …` in the given process, for tests of how a sweep handles its jobs.

The real command continues as the script of its frozen code, and forks its jobs from a server:
two more Pythons, which import for ten seconds. Here the sweep continues in the process that froze
the code, and forks the jobs itself. Everything else is the same.
"""

from __future__ import annotations

import multiprocessing
import runpy
import sys
from pathlib import Path
from typing import Any

from regrow.processes import begin
from regrow.project import ROOT
from regrow.sweep import frozen, process, run


def main() -> None:
    sweep = run.run

    def run_here(loader: Any, config: Any, arguments: Any) -> None:
        def go_on(code: Path, identity: str, lock: Any, *_: Any, warm: bool) -> None:
            told = {frozen.FOLDER: lock.folder, frozen.LOCK: lock.descriptor}
            told |= {frozen.IDENTITY: identity, frozen.WARM: ""}
            begin.handed.update({name: str(value) for name, value in told.items()})
            lock.descriptor = None  # a new program would not have it
            sweep(loader, config, arguments)

        frozen.become = go_on  # type: ignore[assignment]
        sweep(loader, config, arguments)

    run.run = run_here
    process.make_context = lambda *, fresh: multiprocessing.get_context("fork")
    sys.argv[0] = str(ROOT / "scripts" / "train.py")
    sys.path[0] = str(ROOT / "scripts")
    runpy.run_path(sys.argv[0], run_name="__main__")
