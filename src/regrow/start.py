"""How a script's `main` starts: in this process alone, or in the first of several."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

from regrow import outside
from regrow.config import fail
from regrow.errors import UserError
from regrow.parent import die_with_parent


def start(main: Callable[[], Any]) -> None:
    """Run `main`; of several processes that torchrun or srun started, the first alone does.

    It composes the config and gives its job to the others.
    """
    if os.environ.get("REGROW_SWEEP_WARM"):
        from regrow.sweep import process  # before Hydra, which takes a while

        told = {k: os.environ.pop(k) for k in list(os.environ) if k.startswith("REGROW_SWEEP")}
        process.context_of(fresh=False)
        os.environ.update(told)  # is for this process alone
    try:
        os.environ.update(outside.srun_environment())
        is_one_of_several = outside.started_from_outside()
        if is_one_of_several:
            outside.check_environment()
    except UserError as error:
        fail(str(error))
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
            main()  # with a job it never comes back
        except SystemExit as end:
            code = end.code
        except Exception:  # the others wait for a word of this one
            traceback.print_exc()
            code = 1
    from regrow import worker  # torch comes with it

    if os.environ["RANK"] == "0":
        worker.dismiss(code if isinstance(code, int) else int(code is not None))
    worker.main()
