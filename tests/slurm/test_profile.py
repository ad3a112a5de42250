"""The profile that the tests run is the one that users have, but for the size of the cluster."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml
from runs import ROOT

RULES = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "workflow" / "rules").glob("*.smk"))


@pytest.fixture(scope="module")
def profiles() -> dict[str, dict[str, Any]]:
    files = {name: ROOT / "profiles" / name / "config.yaml" for name in ("slurm", "ci-slurm")}
    return {name: yaml.safe_load(path.read_text(encoding="utf-8")) for name, path in files.items()}


def test_same_jobs_on_the_same_partitions(profiles: dict[str, dict[str, Any]]) -> None:
    users, ours = profiles["slurm"], profiles["ci-slurm"]
    for rule in ("cohort", "tissue"):  # killed for memory, and out of time, on purpose
        ours["set-resources"].pop(rule)
    same = ("executor", "retries", "groups", "default-resources", "set-resources", "keep-going", "nolock")
    for key in (*same, "slurm-requeue"):
        assert ours[key] == users[key], key


def test_rules_of_the_profile_exist(profiles: dict[str, dict[str, Any]]) -> None:
    rules = set(re.findall(r"^(?:use rule \w+ as|rule) (\w+)", RULES, re.MULTILINE))
    for profile in profiles.values():
        assert {entry.split("=")[0] for entry in profile["groups"]} <= rules
        assert {*profile["set-resources"], *profile.get("set-threads", {})} <= rules


def test_retries_are_in_no_rule() -> None:
    # Every nested snakemake would try again, with more memory than the job has.
    assert "retries:" not in RULES


def test_every_rule_grows_with_the_attempt() -> None:
    for name, body in re.findall(r"^rule (\w+):\n(.*?)(?=^rule |\Z)", RULES, re.MULTILINE | re.DOTALL):
        if "shell:" in body:
            assert re.search(r"mem_mb=megabytes\(.*runtime=minutes\(", body, re.DOTALL), name
