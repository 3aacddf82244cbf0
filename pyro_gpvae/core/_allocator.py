r"""Lets glibc's allocator keep freed memory, which makes a training step on a CPU faster."""

from __future__ import annotations

import ctypes
import os
import platform
from functools import cache

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


@cache
def keep_freed_memory() -> bool:
    """Lets this process keep up to 1 GiB of freed memory; returns whether anything was changed.

    A training step allocates and frees the same tens of MiB again and again. By default glibc
    returns them to the kernel, which must clear every page again. That takes about a quarter of a
    step on the CPU (``docs/performance.md``). Settings of the environment have precedence.
    """
    named = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "LD_PRELOAD")
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in named):
        return False
    libc = ctypes.CDLL(None)
    # 32 MiB is the most that glibc accepts for blocks with a mapping of their own
    return bool(
        libc.mallopt(_M_TRIM_THRESHOLD, 1 << 30) and libc.mallopt(_M_MMAP_THRESHOLD, 1 << 25)
    )
