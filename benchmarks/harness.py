"""Measuring: CPU seconds, wall seconds, memory of a process and its children; figures and their table."""

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
    """One measured number, beside its limit.

    Parameters
    ----------
    row, what : str
        Benchmark, and what was measured.
    value : float
        The number.
    unit : str
        Its unit.
    ceiling : float, optional
        The limit, measured in the same run, in the same unit.
    of : str
        What the limit is.
    target : str
        What the ratio or the value ought to be, e.g. ``"ratio >= 0.7"`` or ``"value <= 2000"``.
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
        """Value over limit."""
        return None if not self.ceiling else self.value / self.ceiling

    @property
    def met(self) -> bool | None:
        """Whether the target is met, None without one."""
        if not self.target:
            return None
        name, relation, bound = self.target.split()
        found = self.ratio if name == "ratio" else self.value
        assert found is not None
        return found >= float(bound) if relation == ">=" else found <= float(bound)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self) | {"ratio": self.ratio, "met": self.met}


@dataclass(frozen=True)
class Spent:
    """What some work took.

    Parameters
    ----------
    cpu, wall : float
        CPU seconds of all threads and finished children, and seconds.
    """

    cpu: float
    wall: float


def spent(work: Callable[[], Any]) -> tuple[Any, Spent]:
    """Do some work in this process; its result and what it took."""
    start, before = time.perf_counter(), _cpu()
    result = work()
    return result, Spent(_cpu() - before, time.perf_counter() - start)


def _cpu() -> float:
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def best(work: Callable[[], Any], times: int) -> tuple[Any, Spent]:
    """The least that some work takes in several tries; on a shared machine the rest is the others'."""
    [(result, least)] = best_in_turns([work], times)
    return result, least


def best_in_turns(works: Sequence[Callable[[], Any]], times: int) -> list[tuple[Any, Spent]]:
    """The same for several that are compared: in turns, as a machine's speed changes from one minute to the next."""
    tries = list(zip(*([spent(work) for work in works] for _ in range(times)), strict=True))
    return [(one[-1][0], Spent(min(t.cpu for _, t in one), min(t.wall for _, t in one))) for one in tries]


@dataclass(frozen=True)
class Run:
    """What a command took.

    Parameters
    ----------
    cpu, wall : float
        CPU seconds with all children, and seconds.
    rss_mb : float
        Most memory that it and its children held at one time, shared pages counted once a process.
    path : float
        CPU seconds of the command's own process and of its busiest child: what it would take at least on a machine that
        does nothing else, with a core for each.
    own : float
        CPU seconds of the command's own process.
    """

    cpu: float
    wall: float
    rss_mb: float
    path: float
    own: float


def run_command(command: Sequence[str | Path]) -> Run:
    """Run a command and watch it.

    Raises
    ------
    RuntimeError
        When it fails; the message ends with what it wrote.
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
    # Workers that are forked from a server are nobody's children in the end: their time is what was seen of it.
    others = [seconds for pid, seconds in watched.cpu.items() if pid != process.pid]
    cpu = max(own, watched.cpu.get(process.pid, 0.0) + sum(others))
    path = cpu - sum(others) + max(others, default=0.0)
    return Run(cpu, time.perf_counter() - start, watched.peak / 1e6, path, watched.cpu.get(process.pid, 0.0))


class _Watched:
    """Memory and CPU time of a process and its children, looked at ten times a second."""

    def __init__(self) -> None:
        self.peak = 0
        self.cpu: dict[int, float] = {}

    def watch(self, pid: int) -> None:
        """Look until the process ends."""
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


def stage(name: str, *arguments: str | Path, **options: Any) -> Run:
    """Run one stage as the workflow does; options as ``key=value``."""
    return run_command([sys.executable, "-m", "pipeline", name, *arguments, *_listed(options)])


def stage_here(name: str, **options: Any) -> Run:
    """Run one stage in this process."""
    from pipeline import cli

    status, took = spent(lambda: cli.main([name, *_listed(options)]))
    assert status == 0, name
    return Run(took.cpu, took.wall, 0.0, took.cpu, took.cpu)


def _listed(options: dict[str, Any]) -> list[str]:
    return [f"--{key.replace('_', '-')}={value}" for key, value in options.items()]


HEAD = ("benchmark", "what", "value", "limit", "ratio", "target", "")


def table(figures: Iterable[Figure], head: bool = True) -> str:
    """The figures as text, a line each."""
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
