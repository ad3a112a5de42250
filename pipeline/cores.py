"""Number of processor cores."""

from __future__ import annotations

import os


def available_cores() -> int:
    """Return the number of cores that this process may run on, e.g. those that a cluster or container has given it."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        return os.cpu_count() or 1
