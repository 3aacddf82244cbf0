r"""glibc's allocator gives memory back too eagerly for training: a quarter of a step."""

from __future__ import annotations

import ctypes
import os
import platform
from functools import cache

__all__ = ["keep_freed_memory"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


@cache
def keep_freed_memory() -> bool:
    """Lets this process keep up to 1 GiB of memory that it has freed, to use it again.

    A training step allocates and frees the same tens of MiB again and again. With its defaults
    glibc returns them to the kernel each time, which has to clear every page anew: about a quarter
    of the time of a step on the CPU (``docs/performance.md``). Called by :func:`pyro_gpvae.fit`
    and :func:`pyro_gpvae.log_weights` on the CPU, once a process. Leaves an allocator alone that
    is not glibc's, or that ``MALLOC_TRIM_THRESHOLD_``, ``MALLOC_MMAP_THRESHOLD_`` or
    ``LD_PRELOAD`` in the environment says something about.

    Returns:
        Whether it was done.
    """
    named = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "LD_PRELOAD")
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in named):
        return False
    libc = ctypes.CDLL(None)
    # 32 MiB is the most that glibc accepts for blocks with a mapping of their own
    return bool(
        libc.mallopt(_M_TRIM_THRESHOLD, 1 << 30) and libc.mallopt(_M_MMAP_THRESHOLD, 1 << 25)
    )
