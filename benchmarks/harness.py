"""Measure CPU seconds, wall seconds and memory of a process and its children; collect figures and tabulate them."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Figure:
    """One measured number with its limit.

    Parameters
    ----------
    row, what : str
        Name of the benchmark, and what was measured.
    value : float
        The number.
    unit : str
        Its unit.
    ceiling : float, optional
        The limit in the same unit, measured in the same run.
    of : str
        What the limit is.
    target : str
        Bound on the ratio or the value, e.g. ``"ratio >= 0.7"`` or ``"value <= 2000"``; empty for none.
    note : str
        Sizes and conditions.
    """

    row: str
    what: str
    value: float
    unit: str
    ceiling: float | None = None
    of: str = ""
    target: str = ""
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """Value divided by the limit; None without a limit."""
        return None if not self.ceiling else self.value / self.ceiling

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None without a target."""
        if not self.target:
            return None
        name, relation, bound = self.target.split()
        found = self.ratio if name == "ratio" else self.value
        assert found is not None
        return found >= float(bound) if relation == ">=" else found <= float(bound)

    def to_json(self) -> dict[str, Any]:
        """Return the figure as plain JSON values."""
        return asdict(self) | {"ratio": self.ratio, "met": self.met}


@dataclass(frozen=True)
class Spent:
    """Time that some work took.

    Parameters
    ----------
    cpu, wall : float
        CPU seconds of all threads and finished children, and wall seconds.
    """

    cpu: float
    wall: float


def spent(work: Callable[[], Any]) -> tuple[Any, Spent]:
    """Call `work` in this process; return its result and the time it took."""
    start, before = time.perf_counter(), _cpu()
    result = work()
    return result, Spent(_cpu() - before, time.perf_counter() - start)


def _cpu() -> float:
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def best(work: Callable[[], Any], times: int) -> tuple[Any, Spent]:
    """Call `work` several times; return its last result and the least time it took.

    On a shared machine, what exceeds the least time is due to other processes.
    """
    [(result, least)] = best_in_turns([work], times)
    return result, least


def best_in_turns(works: Sequence[Callable[[], Any]], times: int) -> list[tuple[Any, Spent]]:
    """Do `best` for several works that are compared, in turns, as a machine's speed changes from minute to minute."""
    tries = list(zip(*([spent(work) for work in works] for _ in range(times)), strict=True))
    return [(one[-1][0], Spent(min(t.cpu for _, t in one), min(t.wall for _, t in one))) for one in tries]


@dataclass(frozen=True)
class Run:
    """Time and memory that a command took.

    Parameters
    ----------
    cpu, wall : float
        CPU seconds including all children, and wall seconds.
    rss_mb : float
        Peak memory of the command and its children together, in MB; a shared page counts once for each process.
    path : float
        CPU seconds of the command's own process and of its busiest child: the least that the command could take on an
        idle machine with a core for each process.
    own : float
        CPU seconds of the command's own process.
    """

    cpu: float
    wall: float
    rss_mb: float
    path: float
    own: float


def run_command(command: Sequence[str | Path]) -> Run:
    """Run a command and measure its time and memory.

    Raises
    ------
    RuntimeError
        When the command fails; the message ends with the command's output.
    """
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.Popen(
        [str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    watched = _Watched()
    watcher = threading.Thread(target=watched.watch, args=(process.pid,), daemon=True)
    watcher.start()
    output, _ = process.communicate()
    watcher.join()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} ended with {process.returncode}: {output[-2000:]}")
    own = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    # rusage may miss workers that are forked from a server: for these, count the time that was last observed.
    others = [seconds for pid, seconds in watched.cpu.items() if pid != process.pid]
    cpu = max(own, watched.cpu.get(process.pid, 0.0) + sum(others))
    path = cpu - sum(others) + max(others, default=0.0)
    return Run(cpu, time.perf_counter() - start, watched.peak / 1e6, path, watched.cpu.get(process.pid, 0.0))


class _Watched:
    """Memory and CPU time of a process and its children, sampled ten times a second."""

    def __init__(self) -> None:
        self.peak = 0
        self.cpu: dict[int, float] = {}

    def watch(self, pid: int) -> None:
        """Sample until the process ends."""
        try:
            top = psutil.Process(pid)
            while top.is_running() and top.status() != psutil.STATUS_ZOMBIE:
                total = 0
                for process in [top, *top.children(recursive=True)]:
                    try:
                        total += process.memory_info().rss
                        times = process.cpu_times()
                        self.cpu[process.pid] = times.user + times.system
                    except psutil.Error:
                        continue
                self.peak = max(self.peak, total)
                time.sleep(0.1)
        except psutil.Error:
            return


def stage(name: str, **options: Any) -> Run:
    """Run one stage in a process of its own, as the workflow does; ``key=value`` becomes the option ``--key=value``."""
    return run_command([sys.executable, "-m", "pipeline", name, *_listed(options)])


def stage_here(name: str, **options: Any) -> Run:
    """Run one stage in this process; its memory is not measured."""
    from pipeline import cli

    status, took = spent(lambda: cli.main([name, *_listed(options)]))
    assert status == 0, name
    return Run(took.cpu, took.wall, 0.0, took.cpu, took.cpu)


def _listed(options: dict[str, Any]) -> list[str]:
    return [f"--{key.replace('_', '-')}={value}" for key, value in options.items()]


HEAD = ("benchmark", "what", "value", "limit", "ratio", "target", "")


def table(figures: Iterable[Figure], head: bool = True) -> str:
    """Format figures as a text table, one line each."""
    lines = [HEAD] if head else []
    for f in figures:
        limit = "" if f.ceiling is None else f"{_short(f.ceiling)} {f.of}".strip()
        ratio = "" if f.ratio is None else f"{f.ratio:.2f}"
        state = {True: "met", False: "MISSED", None: ""}[f.met]
        lines.append((f.row, f.what, f"{_short(f.value)} {f.unit}", limit, ratio, f.target, state))
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEAD))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _short(value: float) -> str:
    if value == 0 or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"
