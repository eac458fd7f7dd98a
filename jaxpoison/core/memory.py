"""What a program does with memory that it has freed."""

import ctypes
import sys

# Of glibc's <malloc.h>.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def keep_freed() -> bool:
    """Makes glibc keep freed memory in the process, in one heap; returns whether it will.

    By default it returns large blocks to the kernel, and those of XLA's threads in any case: their
    heaps are small. Every training step on CPU then faults the same pages in again, which takes up
    to a quarter of its time. The process stays as large as it once was. Call it before JAX's
    first operation. Elsewhere than on Linux with glibc there is no effect.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all([mallopt(_TRIM_THRESHOLD, -1), mallopt(_MMAP_MAX, 0), mallopt(_ARENA_MAX, 1)])
