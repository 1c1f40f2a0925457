"""Memory of a CPU that one layer frees and the next one needs again."""

import ctypes
import os
import platform
from functools import cache

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1
"""Names of ``mallopt``'s parameters in glibc's ``malloc.h``."""
_INT_MAX = 2**31 - 1
CHOSEN_BY = {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES"}
"""Environment variables with which a user sets the same."""

_block = 0


def keep_freed(block: int) -> None:
    """Let the process keep blocks of up to so many bytes when they are freed, four of them at most.

    glibc returns a block over 32 MiB, and often smaller ones, to the system as soon as it is freed. The next layer asks
    for as much again and gets it as pages yet to be made, one page fault for each 4 KiB: half to two thirds of the time
    that an autoencoder takes on a CPU. Thresholds as in ``mallopt(3)``; they are never lowered, and stay as they are
    where `keeps_freed` is False.
    """
    global _block
    block = min(max(block, 32 * 2**20), _INT_MAX)  # up to 32 MiB glibc would have raised its threshold itself
    if block > _block and keeps_freed():
        _block = block
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, block)
        ctypes.CDLL(None).mallopt(_TRIM_THRESHOLD, min(4 * block, _INT_MAX))


@cache
def keeps_freed() -> bool:
    """Whether the allocator is glibc's, and its environment variables leave its thresholds to us."""
    return platform.libc_ver()[0] == "glibc" and not CHOSEN_BY & os.environ.keys()
