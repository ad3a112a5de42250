"""Settings of glibc's memory allocator: save memory in stages, or save time where large buffers come and go."""

from __future__ import annotations

import ctypes
import logging
import os
import sys

log = logging.getLogger(__name__)

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8
"""Parameters of glibc's ``mallopt`` (malloc.h)."""


def _set_options(options: dict[int, int]) -> bool:
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    done = [mallopt(parameter, value) for parameter, value in options.items()]
    return all(done)


def share_heap() -> bool:
    """Let the threads of this process and of its children share one heap.

    By default, glibc gives each thread a heap of its own, whose freed memory only that thread can use again. On a large
    slide that costs `infer` 150 MB and `instances` 80 MB. Stages allocate memory in large pieces, so their threads
    hardly wait for each other.

    Returns
    -------
    bool
        Whether it took effect; False on other systems and C libraries, and if the environment sets MALLOC_ARENA_MAX.
    """
    if "MALLOC_ARENA_MAX" in os.environ:  # set by the user, or by the process that started this one
        return False
    os.environ["MALLOC_ARENA_MAX"] = "1"
    return _set_options({_ARENA_MAX: 1})


def keep_freed_memory() -> bool:
    """Let the process keep freed memory for the next buffer instead of giving it back to the system.

    By default, glibc gets each large buffer from the system and returns it when it is freed, so the layers of every
    window cause page faults: a fifth of the CPU time of the default model, and of that of measuring nuclei. Call this
    function before memory is allocated.

    Returns
    -------
    bool
        Whether it took effect; False on other systems and C libraries.
    """
    done = _set_options({_MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1, _TOP_PAD: 512 << 20})
    log.debug("freed memory is kept: %s", done)
    return done
