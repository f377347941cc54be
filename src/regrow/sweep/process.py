"""Run a job in a separate process, with the standard library's multiprocessing.

The process is forked from a server that has only imported what a run needs, so it starts at once
and shares no state with earlier jobs; or it is a fresh Python.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import sys
import threading
import traceback
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess, parent_process
from pathlib import Path

from regrow.errors import UserError, in_a_line
from regrow.failing import exit_code_of, show_traceback, tell
from regrow.processes import begin
from regrow.processes.parent import die_with_parent
from regrow.processes.signals import held
from regrow.record.redact import redact
from regrow.sweep import ledger


def make_context(*, fresh: bool) -> BaseContext:
    """Make the context that starts jobs. Its server begins to import now, in the background."""
    begin.sweep()
    if fresh:
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["regrow.sweep.preloaded"])
    with held():  # the server keeps these signals blocked: see `begin.server`
        multiprocessing.forkserver.ensure_running()
    return context


def start(
    context: BaseContext, folder: Path, number: int, text: str, environment: dict[str, str]
) -> BaseProcess:
    """Start the job in `text`, as JSON, as number `number` of the sweep in `folder`."""
    log = ledger.log_of(folder, number)
    log.parent.mkdir(exist_ok=True)
    process: BaseProcess = context.Process(  # type: ignore[attr-defined]
        target=work, args=(str(folder), number, text, environment), name=f"job {number}"
    )
    process.start()
    return process


def work(folder: str, number: int, text: str, environment: dict[str, str]) -> None:
    """Run the job in this process, with its output in its log. Does not return."""
    log = os.open(
        ledger.log_of(Path(folder), number), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666
    )
    begin.job(environment, log)
    os.setpgid(0, 0)  # the sweep receives Ctrl-C and forwards it
    die_with_the_sweep()
    code, reason = 0, None
    try:
        from regrow.runs import worker

        worker.work_alone(text)
    except UserError as error:
        show_traceback(error)
        tell(redact(str(error)))
        code, reason = 2, str(error)
    except SystemExit as end:
        code = exit_code_of(end)
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except BaseException as error:
        print(redact(traceback.format_exc()), file=sys.stderr)
        code, reason = 1, f"{type(error).__name__}: {in_a_line(error)}"
    if reason is not None:
        with contextlib.suppress(OSError):
            ledger.note(Path(folder), number, "failed", reason)
    from regrow.runs import worker

    worker.leave(code)


def die_with_the_sweep() -> None:
    """End this process if the sweep's process, or the server between them, is killed."""
    sweep = parent_process()
    die_with_parent(os.getppid())
    if sweep is None:
        return
    if not sweep.is_alive():
        os._exit(1)
    if not sys.platform.startswith("linux"):  # elsewhere the kernel does not do it

        def watch() -> None:
            sweep.join()
            os.killpg(0, signal.SIGKILL)

        threading.Thread(target=watch, daemon=True).start()
