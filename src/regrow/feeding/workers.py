"""The processes that load data: how they begin, which signals they take, and how they end."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import connection, resource_sharer
from multiprocessing.process import BaseProcess
from types import TracebackType

import torch
from torch.utils.data.dataloader import _BaseDataLoaderIter

from regrow.processes import begin
from regrow.processes.parent import die_with_parent

# Ctrl-C and most schedulers signal every process, but only the run decides how to react.
FOR_THE_RUN = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
TO_A_WORKER = signal.SIGUSR2  # the run's signal to its workers to exit
END_SECONDS = 3.0  # after this a worker is killed, e.g. if stuck in C code


@contextlib.contextmanager
def no_advice_on_workers() -> Iterator[None]:
    """Hide torch's warning about more workers than cores: that is the user's choice."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
        yield


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Block signals, so that none reaches a new worker while it has the run's handlers."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {*FOR_THE_RUN, TO_A_WORKER})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def none_left_behind() -> Iterator[None]:
    """If starting workers fails halfway, stop those started: nothing else refers to them."""
    before = {*multiprocessing.active_children()}
    try:
        yield
    except BaseException as error:
        stop(child for child in multiprocessing.active_children() if child not in before)
        for frame, _ in traceback.walk_tb(error.__traceback__):
            half_made = frame.f_locals.get("self")
            if isinstance(half_made, _BaseDataLoaderIter):
                half_made._shutdown = True  # type: ignore[attr-defined]  # else its __del__ raises
        raise


def begin_worker(run: int, worker: int) -> None:
    """Set up a new worker of the process `run`, whose signals are blocked: see `signals_held`."""
    # Torch's own watchdog watches the current parent, and so waits forever for a killed run.
    die_with_parent(run)
    begin.data_worker(FOR_THE_RUN, TO_A_WORKER)
    sys.excepthook = functools.partial(_print_unless_lost, sys.excepthook)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {*FOR_THE_RUN, TO_A_WORKER})


def _print_unless_lost(
    printer: Callable[..., object],
    kind: type[BaseException],
    error: BaseException,
    trace: TracebackType | None,
) -> None:
    """Print an error of a worker's threads, unless the run stopped in the middle of reading.

    A thread of multiprocessing's hands tensors over. It prints an error if the run closes the
    connection, as a signal that interrupts the run's wait does.
    """
    place = None if trace is None else trace.tb_frame.f_code.co_filename
    is_lost = issubclass(kind, ConnectionError | EOFError)
    if not (is_lost and place == resource_sharer.__file__):
        printer(kind, error, trace)


def end_workers(items: object) -> None:
    """Stop the workers now; the garbage collector may wait five seconds for each.

    A worker that is busy with an example is stopped too: an interrupted run cannot wait for it.
    """
    workers = getattr(items, "_workers", ())
    if getattr(items, "_worker_pids_set", False):  # else torch raises for a killed worker
        torch._C._remove_worker_pids(id(items))
        items._worker_pids_set = False  # type: ignore[attr-defined]
    stop(workers)
    end = getattr(items, "_shutdown_workers", None)
    if end is not None:
        if workers:  # one may have ended with the lock of torch's event, which `end` would wait for
            items._workers_done_event = multiprocessing.Event()  # type: ignore[attr-defined]
        end()


def stop(workers: Iterable[BaseProcess]) -> None:
    """Tell workers to exit, and kill those that do not.

    At interpreter exit nothing else would stop them: multiprocessing sends one SIGTERM, which a
    worker takes for the run's, and joins without a timeout.
    """
    there = [worker for worker in workers if worker.is_alive()]
    for worker in there:
        _send(worker, TO_A_WORKER)
    deadline = time.monotonic() + END_SECONDS
    while there and (left := deadline - time.monotonic()) > 0:
        connection.wait([worker.sentinel for worker in there], timeout=left)
        there = [worker for worker in there if worker.is_alive()]
    for worker in there:
        _send(worker, signal.SIGKILL)


def _send(worker: BaseProcess, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(worker.pid or 0, number)
