"""`python -m regrow.child`: one of the processes that `ranks.start` starts.

Importing torch takes seconds, in which a rank must be as easy to end as later.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys


def die_with_parent(parent: int) -> None:
    """Let the kernel end this process when the one that started it is killed (Linux)."""
    if not sys.platform.startswith("linux"):
        return
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was killed before this line
        os._exit(1)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: os._exit(128 + signal.SIGINT))
    die_with_parent(int(os.environ["REGROW_PARENT"]))

    from regrow import worker

    signal.signal(signal.SIGINT, signal.default_int_handler)
    worker.main()
