"""Start a script's `main`: in a single process, or in rank 0 of several."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

from regrow.failing import in_one_line
from regrow.processes import begin, outside
from regrow.processes.parent import die_with_parent


def start(main: Callable[[], Any]) -> None:
    """Run `main`; of several processes that torchrun or srun started, only in rank 0.

    Rank 0 composes the config and gives its job to the other ranks.
    """
    if begin.handed.get("REGROW_SWEEP_WARM"):
        from regrow.sweep import process  # before Hydra, which imports slowly

        process.make_context(fresh=False)
    with in_one_line():
        if given := outside.srun_environment():
            begin.rank(given)
        is_one_of_several = outside.started_from_outside()
        if is_one_of_several:
            outside.check_environment()
    if not is_one_of_several:
        tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
        if tasks != "1" and "RANK" not in os.environ and outside.is_in_a_shell():
            print(
                f"note: one process, in a shell that Slurm gave {tasks} tasks. For a process in "
                f"each, start with srun --ntasks={tasks}.",
                file=sys.stderr,
            )
        main()
        return
    if "TORCHELASTIC_RUN_ID" in os.environ:  # a killed torchrun leaves its processes behind
        die_with_parent(os.getppid())
    code: Any = 0
    if os.environ["RANK"] == "0":
        try:
            main()  # does not return if there is a job
        except SystemExit as end:
            code = end.code
        except Exception:  # the other ranks wait until this one dismisses them
            traceback.print_exc()
            code = 1
    from regrow.runs import worker  # imports torch

    if os.environ["RANK"] == "0":
        worker.dismiss(code if isinstance(code, int) else int(code is not None))
    worker.main()
