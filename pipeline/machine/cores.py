"""Number of processor cores."""

from __future__ import annotations

import math
import os
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")


def available_cores() -> int:
    """Return the number of cores that this process may use, e.g. those that a cluster or container has given it."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        return os.cpu_count() or 1
    try:
        groups = Path("/proc/self/cgroup").read_text(encoding="utf-8")
    except OSError:
        groups = ""
    return math.ceil(min(cores, quota(groups)))


def quota(groups: str, root: Path = CGROUPS) -> float:
    """Return the number of cores whose time the control groups of a process allow it; infinite without a limit.

    Containers limit the time on all cores rather than the cores (``docker run --cpus``).

    Parameters
    ----------
    groups : str
        Content of ``/proc/PID/cgroup``: the process's groups, one ``number:controllers:path`` per line.
    root : pathlib.Path
        Where the control groups are mounted. In a container, its own group is the root.
    """
    limits = [math.inf]
    for line in groups.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        for top in (root, root / "cpu") if controllers else (root,):  # version 1 has a mount for each controller
            group = top / path.strip("/")
            limits += [_limit(place) for place in (group, *group.parents) if place.is_relative_to(top)]
    return min(limits)


def _limit(group: Path) -> float:
    """Return the limit of one control group, in cores."""
    try:
        if (file := group / "cpu.max").is_file():
            allowed, period = file.read_text().split()
        else:
            allowed, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(allowed) / int(period) if int(allowed) > 0 else math.inf
    except (OSError, ValueError, ZeroDivisionError):  # no such group here, or "max"
        return math.inf
