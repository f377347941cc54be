"""Raise an error where the host waits for a GPU."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def no_wait_for_the_gpu() -> Iterator[None]:
    """Raise RuntimeError where the host waits for the GPU. Restore torch's mode at the end.

    torch warns that the mode is a prototype, once per process and after setting it. If warnings are
    errors, that would end the test and leave the mode on.
    """
    before = torch.cuda.get_sync_debug_mode()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
