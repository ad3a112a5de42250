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


def start(folder: Path, config: dict[str, Any]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command(config), cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )


def test_killed_run_resumes_to_the_same_bytes(tmp_path: Path, model: Path) -> None:
    config = {"slides": str(make_slides(tmp_path / "in", 1)), "results": FOLDER, "model": str(model)}
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    unbroken.mkdir()
    broken.mkdir()
    done = run(unbroken, config)
    assert done.code == 0, done.output
    # The log of a stage appears when its command starts.
    for stage, group in (("tiles", True), ("infer", False)):
        started = broken / FOLDER / "logs" / stage / "s 0.log"
        with start(broken, config) as process:
            deadline = time.monotonic() + 1200
            while not started.exists() and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.02)
            assert process.poll() is None, "the run ended before it could be killed"
            end(process, group)
        for path in finals(broken / FOLDER):
            check_whole(path)
    done = run(broken, config)
    assert done.code == 0, done.output
    assert outcome(broken / FOLDER) == outcome(unbroken / FOLDER)
    assert not list(broken.rglob(".part-*"))
    assert not list(broken.rglob(".lock-*"))
    assert run(broken, config).nothing


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
    while done_kills < kills or ended == 0:
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
        assert not list(broken.rglob(".part-*"))
        ended += 1
        print(f"end {ended}: the same bytes", flush=True)
        shutil.rmtree(broken)
    print(f"{done_kills} kills, {checked} files under final names read, {ended} runs ended, all with the same bytes")
