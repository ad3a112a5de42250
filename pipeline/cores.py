"""Processor cores."""

from __future__ import annotations

import os


def available_cores() -> int:
    """Cores that this process may run on: a cluster or a container may give it fewer than the machine has."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        return os.cpu_count() or 1
