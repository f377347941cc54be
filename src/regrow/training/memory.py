"""How the C library holds the memory that a step frees and the next one asks for again."""

from __future__ import annotations

import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of <malloc.h>
MOST = 1 << 30  # bytes; a larger block is the kernel's again as soon as it is freed
UNLIMITED = (1 << 31) - 1


def keep_freed_memory() -> bool:
    """Let glibc keep blocks that are freed, up to 1 GiB each; whether it does.

    By default it asks the kernel for each large block and hands it back when it is freed, so that
    every step pays once more for the pages of its activations: a fault each, and zeros. Kept, they
    are there already, for about the same peak. See "M_MMAP_THRESHOLD" and "M_TRIM_THRESHOLD" in
    mallopt(3). With another C library, or where the environment tunes malloc, nothing is changed.
    """
    said = [name for name in os.environ if name.startswith("MALLOC_")]
    if said or "malloc" in os.environ.get("GLIBC_TUNABLES", "") or not is_glibc():
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # Any of the two set by hand also ends glibc's own adapting of the other.
    return bool(mallopt(M_MMAP_THRESHOLD, MOST) and mallopt(M_TRIM_THRESHOLD, UNLIMITED))


def is_glibc() -> bool:
    names = getattr(os, "confstr_names", {})  # not on Windows
    return "CS_GNU_LIBC_VERSION" in names and bool(os.confstr("CS_GNU_LIBC_VERSION"))
