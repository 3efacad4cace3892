"""Keep freed memory in the process instead of handing every large tensor back to the system.

glibc maps and unmaps allocations of a few megabytes anew each time; a training step makes
thousands of them, and the page faults can cost more than the arithmetic. Two settings of its
allocator end that. Where the allocator is another one, nothing changes.
"""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # from malloc.h
_KEEP_BYTES = 1 << 30


def keep_freed_memory() -> bool:
    """Let glibc serve allocations below 1 GiB from kept memory; say whether that took effect."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library
        return False
    settings = (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD)
    return all([mallopt(setting, _KEEP_BYTES) == 1 for setting in settings])
