"""Keep memory that a step frees in the C library, for the next step."""

from __future__ import annotations

import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # from <malloc.h>
MOST = 1 << 30  # bytes; larger blocks go back to the kernel when freed
UNLIMITED = (1 << 31) - 1


def keep_freed_memory() -> bool:
    """Make glibc keep freed blocks of up to 1 GiB each. Returns True if it does.

    By default glibc requests each large block from the kernel and returns it when freed, so every
    step pays again for page faults and zeroing of its activations. Keeping them costs about the
    same peak memory. See "M_MMAP_THRESHOLD" and "M_TRIM_THRESHOLD" in mallopt(3). With another C
    library, or if the environment tunes malloc, nothing is changed.
    """
    said = [name for name in os.environ if name.startswith("MALLOC_")]
    if said or "malloc" in os.environ.get("GLIBC_TUNABLES", "") or not is_glibc():
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # Setting either one also stops glibc from adapting the other.
    return bool(mallopt(M_MMAP_THRESHOLD, MOST) and mallopt(M_TRIM_THRESHOLD, UNLIMITED))


def is_glibc() -> bool:
    names = getattr(os, "confstr_names", {})  # missing on Windows
    return "CS_GNU_LIBC_VERSION" in names and bool(os.confstr("CS_GNU_LIBC_VERSION"))
