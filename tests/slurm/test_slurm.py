"""Whole runs on a real SLURM of one node: what its jobs ask for, what becomes of killed and cancelled ones."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster
from outcome import outcome
from runs import ROOT, command, read_tsv, run

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(3000)]

PROFILE = ["--workflow-profile", str(ROOT / "profiles" / "ci-slurm")]
SLIDES, PARTS = 4, 2
"""The three demo slides, the largest of them in parts, and a bad one."""

NAMES = ("it's $(touch pwned)", "patient 7, block A", 'a{x} 50%j \\ "q"\xa0<b>')
"""Names of the demo slides over which shells, Snakemake or SLURM could trip. The profile knows the last one."""

Jobs = list[dict[str, str]]


def start(cluster: Cluster, folder: Path, config: dict[str, Any], *targets: str) -> subprocess.Popen[str]:
    """Start a run on the cluster."""
    line = [word for word in command(config, *targets, *PROFILE) if word not in ("--cores", "2")]
    return subprocess.Popen(
        line, cwd=folder, env=cluster.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        # Shells let what they start in the background ignore SIGINT, and their children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def submitted(jobs: Jobs, name: str) -> Jobs:
    """Jobs of a rule or a group; the plugin puts its name into the comment."""
    found = [job for job in jobs if job["Comment"].startswith(f"rule_{name}")]
    return [job for job in found if name.endswith("_part") or not job["Comment"].startswith(f"rule_{name}_part")]


def asked(job: dict[str, str]) -> tuple[str, str]:
    """A job's partition and its GPU flag."""
    return job["Partition"], job.get("TresPerJob", "")


def table(jobs: Jobs) -> str:
    """The jobs as a text table."""
    rows = [("job", "partition", "GPU", "memory", "minutes", "state", "rule or group")]
    rows += [
        (job["JobId"], *asked(job), job["MinMemoryNode"], job["TimeLimit"], job["JobState"], job["Comment"][:60])
        for job in jobs
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) for row in rows)


def show(jobs: Jobs) -> None:
    """Print the jobs, and add them to the file that NUCLEI_SLURM_JOBS names."""
    print(table(jobs))
    if "NUCLEI_SLURM_JOBS" in os.environ:
        with open(os.environ["NUCLEI_SLURM_JOBS"], "a", encoding="utf-8") as stream:
            stream.write(table(jobs) + "\n")


@dataclass(frozen=True)
class Finished:
    """A run that was cancelled, started again and finished."""

    folder: Path
    code_cancelled: int
    cancelled: Jobs
    seconds_to_cancel: float
    code: int
    output: str
    jobs: Jobs


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    # The model without torch: what the network does is tested elsewhere. Blocks are small, so that each part has some.
    blocks = {"tiles": {"tile": 64}, "instances": {"block": 64}}
    return {"slides": "in/slides.tsv", "model": str(ROOT / "models" / "hematoxylin"), **blocks}


@pytest.fixture(scope="module")
def finished(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory, config: dict[str, Any]) -> Finished:
    folder = tmp_path_factory.mktemp("run")
    made = [sys.executable, "-m", "pipeline", "demo-slides", "in", "--size", "0.15"]
    subprocess.run(made, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True, timeout=600)
    (folder / "in" / "bad.svs").write_text("no slide")
    rows = read_tsv(folder / "in" / "slides.tsv")
    for row, name in zip(rows, NAMES, strict=True):
        row["slide"] = name
    with (folder / "in" / "slides.tsv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0], dialect="excel-tab")
        writer.writeheader()
        writer.writerows([*rows, {"slide": "bad", "path": "bad.svs"}])

    largest = max(path.stat().st_size for path in (folder / "in").iterdir() if path.is_file())
    settings = config | {"results": "cluster", "parts": {"from_gb": largest / 1e9, "count": PARTS}}
    process = start(cluster, folder, settings)
    deadline = time.monotonic() + 1200
    while [job["JobState"] for job in cluster.jobs()] != ["RUNNING"] * SLIDES and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.2)
    time.sleep(2)  # the plugin does not cancel a job that it is just submitting
    stopped = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=600)
    while cluster.ask("squeue", "-h").strip() and time.monotonic() < stopped + 60:
        time.sleep(0.5)
    seconds = time.monotonic() - stopped
    cancelled = cluster.jobs()

    again = start(cluster, folder, settings)
    output, _ = again.communicate(timeout=2400)
    jobs = cluster.jobs()[len(cancelled) :]
    show(cancelled + jobs)
    return Finished(folder, process.returncode, cancelled, seconds, again.returncode, output, jobs)


def test_cancelled_run_cancels_its_jobs(finished: Finished) -> None:
    assert finished.code_cancelled != 0
    assert {job["JobState"] for job in finished.cancelled} == {"CANCELLED"}
    assert finished.seconds_to_cancel < 60


def test_run_goes_on_and_ends_well(finished: Finished) -> None:
    assert finished.code == 0, finished.output
    (row,) = read_tsv(finished.folder / "cluster" / "failed.tsv")
    assert (row["slide"], row["stage"]) == ("bad", "inspect")
    assert sorted(row["slide"] for row in read_tsv(finished.folder / "cluster" / "cohort.tsv")) == sorted(NAMES)
    assert not list(finished.folder.rglob("pwned"))


def test_every_job_has_its_partition_and_its_gpus(finished: Finished) -> None:
    assert finished.code == 0, finished.output
    cpu, gpu = ("cpu", ""), ("gpu", "gres:gpu:1")
    wanted = {name: {cpu: SLIDES} for name in ("prepare", "finish")}
    wanted |= {"look": {cpu: SLIDES + 1}, "cohort": {cpu: 2}}  # one of each is tried again
    wanted |= {"tiles_part": {cpu: PARTS}, "infer_part": {gpu: PARTS}, "instances_part": {cpu: PARTS}}
    wanted["infer"] = {gpu: SLIDES - 1, cpu: 1}  # to join parts
    for name, counts in wanted.items():
        found = Counter(asked(job) for job in submitted(finished.jobs, name))
        assert found == counts, f"{name}\n{table(finished.jobs)}"
    assert len(finished.jobs) == sum(sum(counts.values()) for counts in wanted.values())


def test_job_killed_for_memory_comes_back_with_more(finished: Finished) -> None:
    first, second = submitted(finished.jobs, "cohort")
    assert first["JobState"] in ("FAILED", "OUT_OF_MEMORY")
    assert first["MinMemoryNode"] == "100M"
    assert second["JobState"] == "COMPLETED"
    assert second["MinMemoryNode"] == "1600M"


def test_slide_that_needs_too_long_is_tried_again(finished: Finished) -> None:
    # It would be listed as failed if the first attempt took itself for the last one.
    others = [job for job in finished.jobs if job not in submitted(finished.jobs, "cohort")]
    (failed,) = [job for job in others if job["JobState"] != "COMPLETED"]
    assert failed in submitted(finished.jobs, "look")
    assert failed["JobState"] == "FAILED"


def test_results_are_those_of_a_local_run_without_parts(finished: Finished, config: dict[str, Any]) -> None:
    local = run(finished.folder, config | {"results": "local"})
    assert local.code == 0, local.output
    assert outcome(finished.folder / "cluster") == outcome(finished.folder / "local")


def test_folds_are_jobs_of_their_own(cluster: Cluster, tmp_path: Path) -> None:
    import imageio.v3
    import numpy as np

    from pipeline.slides.synthetic import make_field

    for name in ("images", "labels"):
        (tmp_path / "data" / name).mkdir(parents=True)
    for index in range(3):
        image, labels = make_field(80, 80, 0.5, seed=index)
        imageio.v3.imwrite(tmp_path / "data" / "images" / f"{index}.png", image)
        imageio.v3.imwrite(tmp_path / "data" / "labels" / f"{index}.png", labels.astype(np.uint16))
    train = {
        "name": "tiny",
        "data": [{"kind": "labels", "path": "data", "mpp": 0.5}],
        "holdout": "labels",
        "split": {"method": "patients", "test": 0.34},
        "validation": 1,
        "network_args": {"widths": [4, 6]},
        "schedule": {"steps": 1, "batch": 1, "size": 64, "validate_every": 1, "workers": 0},
        "final_steps": 0,
    }
    before = len(cluster.jobs())
    process = start(cluster, tmp_path, {"train": train, "crossval": {"folds": 2, "final": False}}, "train", "crossval")
    output, _ = process.communicate(timeout=2400)
    jobs = cluster.jobs()[before:]
    show(jobs)
    assert process.returncode == 0, output
    assert [asked(job) for job in jobs] == [("gpu", "gres:gpu:1")] * 3, table(jobs)
    assert Counter(job["JobState"] for job in jobs) == {"COMPLETED": 3}
    assert len(submitted(jobs, "train_part")) == 2
    assert len(submitted(jobs, "train_model")) == 1
    assert (tmp_path / "results" / "training" / "tiny" / "crossval.tsv").is_file()
    assert (tmp_path / "models" / "tiny" / "weights.safetensors").is_file()
