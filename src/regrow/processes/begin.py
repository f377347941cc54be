"""The first call in each kind of process: set its environment, warnings, signals and streams.

Only this module, `machine.set_numerics`, which depends on the config, and the loggers of wandb and
MLflow write to `os.environ`.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import gc
import io
import logging
import os
import re
import signal
import stat
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from regrow.errors import UserError
from regrow.failing import SET_BY_US, exit_code_of
from regrow.processes import terminal
from regrow.processes.signals import STOPPING, before_the_run
from regrow.project import ROOT

SAFE_PATH = "PYTHONSAFEPATH"  # same as Python's option -P
# Empty, so that torch installs no signal handlers: `ranks.start` installs ours.
KEEPS_HANDLERS = "TORCHELASTIC_SIGNALS_TO_HANDLE"
# Prefixes of variables that one command hands to another, and whose children must not inherit.
HANDED = ("REGROW_SWEEP", "REGROW_CONFIG_STORE")
handed: dict[str, str] = {}
# Loaded into a process from outside, such as a profiler, which may write its data at the exit.
INJECTED = ("LD_PRELOAD", "CUDA_INJECTION64_PATH")
_exit_code: int | None = None
_puts_off = False


def _put_off_collecting() -> None:
    # The imports make a million objects that stay. Searching them for garbage, again and again,
    # took a fifth of the time of a run of one epoch.
    global _puts_off
    _puts_off = True
    gc.disable()


def imported() -> None:
    """Collect garbage from here on, but never search what exists by now, if this was put off."""
    if _puts_off:
        gc.freeze()
        gc.enable()


def built() -> None:
    """Never search the objects of a run either, if collecting garbage was put off."""
    global _puts_off
    if _puts_off:
        _puts_off = False
        gc.collect()
        gc.freeze()
        gc.enable()


@contextlib.contextmanager
def ending() -> Iterator[None]:
    """Note how this process ends, for `_leave`. Everything it does must happen inside."""
    global _exit_code
    try:
        yield
        _exit_code = 0
    except SystemExit as end:
        _exit_code = exit_code_of(end)
        raise
    except Exception:  # Ctrl-C that nothing has caught ends Python by the signal itself
        _exit_code = 1
        raise


def _leave() -> None:
    """As the last exit handler, end the process without taking the interpreter apart.

    Freeing one module after the other took a second. While a file is open for writing, Python ends
    as usual, since only the end of the user's object may write its last lines.
    """
    with contextlib.suppress(OSError, ValueError):  # of a closed or full one: Python reports that
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
        logging.shutdown()
        if _exit_code is not None and not _writes_files():
            os._exit(_exit_code & 0xFF)
    gc.unfreeze()  # or libraries report what is frozen as leaks


def _register_leaving() -> None:
    # The first handler to be registered is the last to be called. Others than that of logging, such
    # as those that measure coverage in child processes, would not be called.
    if atexit._ncallbacks() <= 1 and not any(os.environ.get(name) for name in INJECTED):
        atexit.register(_leave)


def _writes_files() -> bool:
    """Return True if a file is open for writing, beside stdout and stderr, or if nothing tells."""
    flushed = set()
    for stream in filter(None, (sys.__stdout__, sys.__stderr__)):
        with contextlib.suppress(OSError, ValueError):
            flushed.add(stream.fileno())
    try:
        descriptors = [int(path.name) for path in Path("/dev/fd").iterdir()]
    except (OSError, ValueError):
        return True
    for descriptor in descriptors:
        with contextlib.suppress(OSError):  # that of the listing is closed by now
            is_read = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
            is_file = stat.S_ISREG(os.fstat(descriptor).st_mode)
            if is_file and not is_read and descriptor not in flushed:
                return True
    return False


def _quieten() -> None:
    # torch warns while it builds a layer of width 0. The layer's first call says it in one line.
    warnings.filterwarnings("ignore", "Initializing zero-element tensors", UserWarning)
    # At its first import on a machine, matplotlib says in Hydra's log that it has listed the fonts.
    logging.getLogger("matplotlib.font_manager").setLevel(logging.WARNING)


def main() -> None:
    """Begin a command: every script calls this before it imports torch or Hydra."""
    _register_leaving()
    terminal.show()
    handed.update({k: os.environ.pop(k) for k in list(os.environ) if k.startswith(HANDED)})
    is_train = Path(sys.argv[0]).resolve() == ROOT / "scripts" / "train.py"
    if is_train:
        _put_off_collecting()
    if is_train and "REGROW_SWEEP" not in handed:  # a sweep's job has its folder already
        before_the_run.begin()
    # Spins of a waiting thread before it sleeps. With libgomp's default a run took 12.2 s on two
    # busy cores and 1.3 s on idle ones; with 10,000 it took 4.0 s and 1.4 s.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    # Hydra would print errors itself, with its own hints. Child processes inherit both variables:
    # the second says that the user did not ask for tracebacks.
    if os.environ.get("HYDRA_FULL_ERROR") != "1":
        os.environ |= {"HYDRA_FULL_ERROR": "1", SET_BY_US: "1"}
    _quieten()
    # Hydra skips a missing search path entry and then composes a different config.
    warnings.filterwarnings("error", r"provider=hydra\.searchpath", UserWarning)
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # nobody asked for it
    if {"-i", "--info"} & {argument.partition("=")[0] for argument in sys.argv[1:]}:
        # With `| head`, logging would print a traceback for each remaining line.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    if "COMP_LINE" in os.environ and any(a.startswith("query=") for a in sys.argv[1:]):
        # Tab completion. Hydra knows no --check, and its usage would be printed into the prompt.
        os.environ["COMP_LINE"] = re.sub(r" --check(?= )", "", os.environ["COMP_LINE"])
        sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115  until the exit
    os.environ[KEEPS_HANDLERS] = ""


def rank(environment: Mapping[str, str]) -> None:
    """Begin one of a run's processes. `environment` holds what its launcher left unset."""
    terminal.show()
    _put_off_collecting()
    _quieten()
    os.environ.update(environment)
    os.environ[KEEPS_HANDLERS] = ""


def child(stopping: Iterable[signal.Signals]) -> None:
    """Begin a rank that `ranks.start` started with the signals `stopping` blocked."""
    _register_leaving()
    rank({})
    signal.signal(signal.SIGINT, lambda *_: os._exit(128 + signal.SIGINT))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, stopping)  # see `signals.held`


def data_worker(for_the_run: Iterable[signal.Signals], to_a_worker: signal.Signals) -> None:
    """Begin a data worker: it ignores signals for its run, and ends at one of its own."""
    for number in for_the_run:
        signal.signal(number, signal.SIG_IGN)
    # Ignore only the first SIGTERM: at exit Python terminates the remaining workers and joins them.
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    signal.signal(to_a_worker, lambda *_: os._exit(0))  # for torch, 0 is not a failure


def sweep() -> None:
    """Begin a sweep's process. Its jobs and their server inherit the environment."""
    # Python 3.11's server does not inherit sys.path and would not find the frozen code. It must not
    # search the current folder: a profile.py there would shadow Python's own.
    os.environ |= {"PYTHONPATH": python_path(), SAFE_PATH: "1"}


@contextlib.contextmanager
def server() -> Iterator[None]:
    """Begin the server that a sweep forks its jobs from. Make its imports inside this context."""
    # Only the sweep and the jobs handle signals, which may be sent to the whole group: a server
    # that dies takes its jobs with it. A job unblocks them once it can handle them, see `job`.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    # OpenBLAS would start its threads on import. `job` restores their number.
    is_given = "OPENBLAS_NUM_THREADS" in os.environ
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    _put_off_collecting()
    try:
        yield
    finally:
        imported()
        if not is_given:
            del os.environ["OPENBLAS_NUM_THREADS"]


def job(environment: Mapping[str, str], log: int) -> None:
    """Begin a job of a sweep, with its output in the file with the descriptor `log`."""
    import multiprocessing  # not for every command

    # Start data workers as in a single run: forked where that is the default.
    multiprocessing.set_start_method(None, force=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for descriptor, stream in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(descriptor, stream)
    terminal.show("utf-8")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # the log of a killed job is up to date
    os.environ.pop(SAFE_PATH, None)  # scripts that the job starts may import modules beside them
    os.environ.update(environment)
    if "regrow.sweep.preloaded" in sys.modules and "OPENBLAS_NUM_THREADS" not in os.environ:
        from threadpoolctl import ThreadpoolController

        from regrow.record.manifest import cores

        # The server uses one thread. A job uses as many as a single run.
        ThreadpoolController().limit(limits=cores(), user_api="blas")


def python_path() -> str:
    """Return the PYTHONPATH that another process needs to find the same modules.

    Leaves out the repository's root, which `import_own_modules` puts last: at the front, a user's
    module named `profile` would shadow Python's own. `-P` likewise keeps out the current folder.
    Python finds its own folders, such as lib/python3.12 of its prefix, by itself. A prefix like
    /usr may hold the code as well.
    """
    prefixes = "|".join(map(re.escape, (sys.prefix, sys.base_prefix)))
    own = re.compile(rf"({prefixes})/(.*/)?lib\w*/python")
    added = [path for path in sys.path if not own.match(path) and Path(path) != ROOT]
    refuse_separator(*added)
    return os.pathsep.join(dict.fromkeys(path for path in added if path))


def refuse_separator(*paths: str | Path) -> None:
    """Raise UserError for a path that PYTHONPATH would split into two."""
    for path in map(str, paths):
        if os.pathsep in path:
            raise UserError(
                f"{path}: other processes find no code in a path with {os.pathsep!r}. Rename the "
                "folder. One run in one process works there."
            )
