"""A run that is killed goes on where it was and ends with the same bytes as an unbroken one."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from runs import command, run, write_slide

pytestmark = [pytest.mark.workflow, pytest.mark.timeout(1800)]

SAME = ("nuclei.parquet", "nuclei.geojson.gz", "tissue.geojson", "overview.png", "stain.png", "tissue.png")
"""Results that hold no times."""


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slides")
    write_slide(folder / "a.svs", seed=5)
    return folder


def outcome(results: Path) -> dict[str, bytes]:
    return {name: (results / "slides" / "a" / name).read_bytes() for name in SAME}


def kill_when(folder: Path, config: dict[str, Any], started: Path) -> None:
    """Start a run and kill it and all it started, with no chance to tidy up, once `started` is there."""
    with subprocess.Popen(
        command(config), cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    ) as process:
        deadline = time.monotonic() + 1200
        while not started.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        early = process.poll() is None
        os.killpg(process.pid, signal.SIGKILL) if early else None
        process.wait()
    assert started.exists()
    assert early, "the run ended before it could be killed"


def test_killed_run_resumes_to_the_same_bytes(tmp_path: Path, slides: Path, model: Path) -> None:
    config = {"slides": str(slides), "results": "out", "model": str(model)}
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    unbroken.mkdir()
    broken.mkdir()
    done = run(unbroken, config)
    assert done.code == 0, done.output

    # The log of a stage appears when its command starts.
    for stage in ("tiles", "infer"):
        kill_when(broken, config, broken / "out" / "logs" / stage / "a.log")
        unlocked = run(broken, config, "--unlock")
        assert unlocked.code == 0, unlocked.output
    done = run(broken, config)
    assert done.code == 0, done.output
    assert outcome(broken / "out") == outcome(unbroken / "out")
    assert not list(broken.rglob(".part-*"))
    assert run(broken, config).nothing
