"""Give memory back that was only needed while something was loaded."""

from __future__ import annotations

import ctypes
import gc
import sys


def give_back() -> None:
    """Return freed memory to the system, where the C library can be told to (glibc).

    Reading a tokenizer or a bundle leaves tens of megabytes of freed pieces behind, which the
    allocator would keep for ever.
    """
    gc.collect()
    if sys.platform != "linux":
        return
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return  # another C library
