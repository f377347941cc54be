"""Wait for a kernel lock, and log what the process waits for."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import time
from pathlib import Path

log = logging.getLogger("regrow")

TELL_SECONDS = 2.0  # a longer wait is announced in one line


def wait_for(descriptor: int, what: str) -> None:
    """Take the exclusive lock of an open file or folder.

    A wait longer than 2 seconds logs `what` it is for. Raises OSError on a file system without
    locks.
    """
    started, told = time.monotonic(), False
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
        if not told and time.monotonic() - started > TELL_SECONDS:
            told = True
            log.warning("waiting for %s, which %s", what, in_use_by(descriptor))
        time.sleep(0.1 if told else 0.01)


def in_use_by(descriptor: int) -> str:
    """Return words for who holds the lock of an open file: a process of this machine, if known."""
    status = os.fstat(descriptor)
    device = status.st_dev
    place = f"{os.major(device):02x}:{os.minor(device):02x}:{status.st_ino}"
    with contextlib.suppress(OSError):
        for line in Path("/proc/locks").read_text(encoding="ascii").splitlines():
            words = line.split()  # 1: FLOCK ADVISORY WRITE <pid> <device>:<inode> 0 EOF
            if words[1] == "FLOCK" and words[5] == place and int(words[4]) > 0:
                return f"process {words[4]} is using"
    return "another process is using"
