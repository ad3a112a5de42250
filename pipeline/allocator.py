"""How the C library gives memory back, for commands that run networks on CPUs."""

from __future__ import annotations

import ctypes
import logging
import sys

log = logging.getLogger(__name__)

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
"""Parameters of glibc's ``mallopt`` (malloc.h)."""


def keep_freed_memory() -> bool:
    """Let the process keep freed memory for the next tensor instead of giving it back to the system.

    By default glibc takes each large buffer from the system and gives it back when it is freed, so the layers of every
    window are paid for in page faults: a fifth of the CPU time of the default model. Call it before memory is taken.

    Returns
    -------
    bool
        Whether it took effect; False on other systems and C libraries.
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    done = all([mallopt(_MMAP_MAX, 0), mallopt(_TRIM_THRESHOLD, 2**31 - 1), mallopt(_TOP_PAD, 512 << 20)])
    log.debug("freed memory is kept: %s", done)
    return done
