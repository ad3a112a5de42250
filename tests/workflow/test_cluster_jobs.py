"""What the jobs of a cluster would ask for: plans with the SLURM profile, which no SLURM is needed for."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from runs import ROOT, Run, run

pytestmark = pytest.mark.workflow

PROFILE = ["-n", "--workflow-profile", str(ROOT / "profiles" / "slurm")]
PARTS = ("tiles_part", "infer_part", "instances_part")
GROUPS = {"look": ("inspect", "tissue"), "finish": ("instances", "measure", "export", "summary")}


@pytest.fixture
def config(tmp_path: Path, toy_model: Path) -> dict[str, Any]:
    """Settings of a run on one slide of 40 GB, which takes no place on the disk."""
    (tmp_path / "s").mkdir()
    with (tmp_path / "s" / "a.svs").open("wb") as file:
        file.truncate(40 * 10**9)
    return {"slides": "s", "results": "r", "model": str(toy_model)}


def asked(done: Run) -> dict[str, dict[str, str]]:
    """Threads and resources of each rule's last job in a plan."""
    assert done.code == 0, done.output
    found = {}
    for rule, text in re.findall(r"^ *(?:local)?rule (\w+):\n((?: +\w+:.*\n)*)", done.output, re.MULTILINE):
        line = re.search(r"resources: (.*)", text)
        threads = re.search(r"threads: (\d+)", text)
        pairs = [part.split("=", 1) for part in line[1].split(", ")] if line else []
        found[rule] = {"threads": threads[1] if threads else "1", **dict(pairs)}
    return found


def test_memory_hardly_grows_and_time_has_a_limit(tmp_path: Path, config: dict[str, Any]) -> None:
    jobs = asked(run(tmp_path, config, *PROFILE))
    memory = {rule: int(job["mem_mb"]) for rule, job in jobs.items()}
    assert max(memory.values()) <= 12_000, memory  # of a slide of 40 GB
    last = asked(run(tmp_path, {**config, "cluster": {"max_minutes": 600}}, *PROFILE, "--attempt", "3"))
    assert {rule: int(job["mem_mb"]) for rule, job in last.items() if rule in memory and rule != "all"} == {
        rule: 3 * amount for rule, amount in memory.items() if rule != "all"
    }
    for limit, plan in ((1440, jobs), (600, last)):
        time = {rule: int(job["runtime"]) for rule, job in plan.items()}
        assert time["infer"] == limit
        for members in GROUPS.values():  # they run one after another in one job
            assert limit / 2 < sum(time[rule] for rule in members) <= limit, time


def test_parts_ask_for_their_share_and_joining_them_for_little(tmp_path: Path, config: dict[str, Any]) -> None:
    whole = asked(run(tmp_path, config, *PROFILE, cores=16))
    parts = asked(run(tmp_path, {**config, "parts": {"from_gb": 40, "count": 20}}, *PROFILE, cores=16))
    for rule in PARTS:
        stage = whole[rule.removesuffix("_part")]
        assert int(parts[rule]["mem_mb"]) < int(stage["mem_mb"])
        assert int(parts[rule]["runtime"]) < int(stage["runtime"]) / 2
    assert (whole["infer"]["slurm_partition"], whole["infer"]["gpu"]) == ("gpu", "1")
    assert (parts["infer_part"]["slurm_partition"], parts["infer_part"]["gpu"]) == ("gpu", "1")
    assert (parts["infer"]["slurm_partition"], parts["infer"]["gpu"]) == ("cpu", "0")
    assert {rule: parts[rule]["threads"] for rule in ("tiles", "infer", "infer_part")} == {
        "tiles": "1", "infer": "1", "infer_part": "8",
    }  # fmt: skip
    assert all(int(parts[rule]["mem_mb"]) <= 2500 for rule in ("tiles", "infer"))


def test_groups_that_parts_do_not_fit_in_are_refused_in_one_line(tmp_path: Path, config: dict[str, Any]) -> None:
    one = [f"{rule}=all" for rule in ("inspect", "tissue", "tiles", "stain")]
    assert run(tmp_path, config, *PROFILE, "--groups", *one).code == 0
    done = run(tmp_path, {**config, "parts": {"from_gb": 1}}, *PROFILE, "--groups", *one)
    assert done.code != 0
    (line,) = [line for line in done.output.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: parts: tiles is in one group with inspect and tissue")
    assert "Traceback" not in done.output


@pytest.mark.parametrize(("model", "gpus"), [("models/default", "1"), ("models/hematoxylin", "0")])
def test_only_a_network_asks_for_a_gpu(
    tmp_path: Path, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, model: str, gpus: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    asks = asked(run(tmp_path, config | {"model": str(ROOT / model)}, "-n"))
    assert asks["infer"]["gpu"] == gpus
    assert "gpu" not in asks["tiles"] or asks["tiles"]["gpu"] == "0"
