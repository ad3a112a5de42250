"""Runs that are killed, with no chance to tidy up: the same command again ends with the bytes of an unbroken run."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from outcome import check_whole, finals, outcome
from runs import command, run, write_slide

from pipeline.batch.lock import RUN_LOCK
from pipeline.errors import PipelineError
from pipeline.stores.seal import SEAL

pytestmark = [pytest.mark.workflow, pytest.mark.timeout(1800)]

FOLDER = "out put, 'ünd' more"
"""Name of the results folder: it may hold anything."""


def make_slides(folder: Path, count: int) -> Path:
    folder.mkdir()
    for number in range(count):
        write_slide(folder / f"s {number}.svs", seed=number + 5)
    return folder


def end(process: subprocess.Popen[bytes], group: bool) -> None:
    """Kill a run, or the Snakemake process alone: then its jobs live on as orphans."""
    if group:
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()


def left_over(folder: Path) -> list[Path]:
    """What killed processes have left."""
    return [path for pattern in (".part-*", "*.part", ".lock-*") for path in folder.rglob(pattern)]


def start(folder: Path, config: dict[str, Any]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command(config), cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, model: Path) -> tuple[dict[str, Any], Path]:
    """A run that is not killed: its settings and its results. Another one tries to work beside it."""
    folder = tmp_path_factory.mktemp("unbroken")
    config = {"slides": str(make_slides(folder / "in", 1)), "results": FOLDER, "model": str(model)}
    config["tiles"] = {"keep": True}
    lock = folder / FOLDER / RUN_LOCK
    with start(folder, config) as process:
        while process.poll() is None and not (lock.is_file() and f"process {process.pid} on " in lock.read_text()):
            time.sleep(0.02)
        second = run(folder, config)
        assert process.poll() is None, "the run ended before a second one could be tried"
    assert second.code != 0
    assert f"another run is at work in {FOLDER!r} (process {process.pid} on " in second.output
    assert process.returncode == 0
    return config, folder / FOLDER


def test_killed_run_resumes_to_the_same_bytes(tmp_path: Path, unbroken: tuple[dict[str, Any], Path]) -> None:
    config, expected = unbroken
    results = tmp_path / FOLDER
    # The log of a stage appears when its command starts.
    for stage, group in (("tiles", True), ("infer", False)):
        started = results / "logs" / stage / "s 0.log"
        with start(tmp_path, config) as process:
            deadline = time.monotonic() + 1200
            while not started.exists() and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.02)
            assert process.poll() is None, "the run ended before it could be killed"
            end(process, group)
        for path in finals(results):
            check_whole(path)
    done = run(tmp_path, config)
    assert done.code == 0, done.output
    assert outcome(results) == outcome(expected)
    assert left_over(results) == []
    assert run(tmp_path, config).nothing


def test_half_a_file_and_other_contents_would_be_found(tmp_path: Path, unbroken: tuple[dict[str, Any], Path]) -> None:
    results = tmp_path / "results"
    shutil.copytree(unbroken[1], results)
    whole = outcome(results)
    slide = results / "slides" / "s 0"
    assert {path.name for path in finals(results)} > {
        "cohort.parquet", "report.html", "settings.json", "tiles.zarr", "nuclei.parquet", "overview.png"
    }  # fmt: skip
    for path in finals(results):
        check_whole(path)
        inside = [file for file in path.rglob("*") if file.is_file()]
        largest = max(inside, key=lambda file: file.stat().st_size, default=path)
        data = largest.read_bytes()
        largest.write_bytes(data[: len(data) // 2])
        with pytest.raises((ValueError, OSError, EOFError, AssertionError, PipelineError)):
            check_whole(path)
        largest.write_bytes(data)
    for path in (results / "cohort.tsv", slide / "metrics.json", slide / "tiles.zarr" / SEAL, slide / "stain.png"):
        data = path.read_bytes()
        path.write_bytes(data.replace(b"1", b"2"))
        assert len(outcome(results).items() - whole.items()) == 1, path
        path.write_bytes(data)
    assert outcome(results) == whole


@pytest.mark.faults_long
@pytest.mark.timeout(6 * 3600)
def test_killed_at_many_random_moments(tmp_path: Path, model: Path) -> None:
    kills, seed = int(os.environ.get("FAULTS_KILLS", "50")), int(os.environ.get("FAULTS_SEED", "0"))
    config = {"slides": str(make_slides(tmp_path / "in", 3)), "results": FOLDER, "model": str(model)}
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    unbroken.mkdir()
    begin = time.monotonic()
    done = run(unbroken, config)
    assert done.code == 0, done.output
    seconds = time.monotonic() - begin
    expected = outcome(unbroken / FOLDER)
    rng = random.Random(seed)
    done_kills = ended = checked = 0
    while done_kills < kills or broken.exists():
        broken.mkdir(exist_ok=True)
        with start(broken, config) as process:
            # Up to a fifth of a run, so that it is the later stages' turn too.
            moment = time.monotonic() + rng.uniform(0, seconds / 5) if done_kills < kills else float("inf")
            while process.poll() is None and time.monotonic() < moment:
                time.sleep(0.01)
            if process.poll() is None:
                end(process, group=done_kills % 2 == 0)
                done_kills += 1
                for path in finals(broken / FOLDER):
                    try:
                        check_whole(path)
                    except FileNotFoundError:  # an orphan has just replaced it
                        check_whole(path)
                    checked += 1
                print(f"kill {done_kills}: {len(finals(broken / FOLDER))} results, all whole", flush=True)
                continue
        assert process.returncode == 0
        assert outcome(broken / FOLDER) == expected
        assert left_over(broken) == []
        ended += 1
        print(f"end {ended}: the same bytes", flush=True)
        shutil.rmtree(broken)
    print(f"{done_kills} kills, {checked} files under final names read, {ended} runs ended, all with the same bytes")
