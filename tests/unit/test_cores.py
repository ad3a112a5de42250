"""Control groups that limit the processor time."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from pipeline.machine import cores
from pipeline.machine.cores import available_cores, quota


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


@pytest.mark.parametrize(
    ("files", "groups", "limit"),
    [
        ({"cpu.max": "150000 100000"}, "0::/\n", 1.5),  # in a container, docker run --cpus 1.5
        ({"cpu.max": "max 100000"}, "0::/\n", math.inf),
        ({"a/b/cpu.max": "max 100000", "a/cpu.max": "50000 100000"}, "0::/a/b\n", 0.5),  # of the group above
        ({"a/b/cpu.max": "200000 100000", "a/cpu.max": "400000 100000"}, "0::/a/b\n", 2.0),
        ({"b/cpu.max": "100000 100000"}, "0::/a\n", math.inf),  # another group's
        (
            {"cpu/a/cpu.cfs_quota_us": "300000", "cpu/a/cpu.cfs_period_us": "100000"},
            "4:memory:/x\n3:cpu,cpuacct:/a\n",
            3.0,
        ),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, "3:cpu:/\n0::/\n", math.inf),
        ({"cpu.max": "garbage"}, "0::/\n", math.inf),
        ({}, "0::/../..\n", math.inf),
        ({}, "", math.inf),
    ],
)
def test_quota(tmp_path: Path, files: dict[str, str], groups: str, limit: float) -> None:
    for name, text in files.items():
        write(tmp_path / name, text)
    assert quota(groups, tmp_path) == limit


@pytest.mark.parametrize(("limit", "found"), [(0.2, 1), (1.5, 2), (4.0, 4), (64.0, 8), (math.inf, 8)])
def test_cores_are_limited_by_affinity_and_quota(monkeypatch: pytest.MonkeyPatch, limit: float, found: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(cores, "quota", lambda groups: limit)
    assert available_cores() == found
