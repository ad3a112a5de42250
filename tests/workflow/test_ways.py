"""Ways to run that change no result: stages started warm, stores on a scratch disk."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import zarr
from runs import command, read_json, run, write_slide

sys.path.insert(0, str(Path(__file__).parents[1] / "faults"))

from outcome import outcome

from pipeline.batch.warm import possible
from pipeline.testing import digest

pytestmark = [pytest.mark.workflow, pytest.mark.timeout(1800)]


def test_warm_start_and_scratch_change_no_byte(tmp_path: Path, model: Path) -> None:
    (tmp_path / "in").mkdir()
    write_slide(tmp_path / "in" / "a.svs", seed=3, size=(320, 256))
    (tmp_path / "in" / "bad.svs").write_text("no slide")
    config = {"slides": "in", "model": str(model), "tiles": {"keep": True}, "export": {"labels": True}}
    plain = run(tmp_path, config | {"results": "plain"})
    assert plain.code == 0, plain.output
    other = run(tmp_path, config | {"results": "other", "scratch": "disk", "warm_start": possible()})
    assert other.code == 0, other.output
    # The kept store is on the scratch disk alone, the others are gone, but for the label map, which is a result.
    kept = {f"slides/{name}/tiles.zarr" for name in ("a", "bad")}
    expected = outcome(tmp_path / "plain")
    assert outcome(tmp_path / "other") == {name: value for name, value in expected.items() if name not in kept}
    assert kept < {*expected}
    assert (tmp_path / "plain" / "slides" / "a" / "tiles.zarr").is_dir()
    assert [path.name for path in (tmp_path / "other" / "slides" / "a").glob("*.zarr")] == ["nuclei.ome.zarr"]
    labels, same = (tmp_path / name / "slides" / "a" / "nuclei.ome.zarr" for name in ("plain", "other"))
    assert digest(same) == digest(labels)
    nuclei = read_json(tmp_path / "plain" / "slides" / "a" / "metrics.json")["nuclei"]
    assert np.array_equal(np.unique(zarr.open_group(labels, mode="r")["0"]), np.arange(nuclei + 1))
    assert (tmp_path / "plain" / "slides" / "bad" / "nuclei.ome.zarr" / "FAILED.txt").is_file()
    assert sorted(path.name for path in (tmp_path / "disk").glob("*/slides/a/*.zarr")) == ["tiles.zarr"]
    assert run(tmp_path, config | {"results": "other", "scratch": "disk"}, "-n").counts == {
        **dict.fromkeys(("settings", "cohort", "all"), 1 * possible()),
        "total": 3 * possible(),
    }
    (tmp_path / "plain" / "slides" / "a" / "labels.json").unlink()
    assert run(tmp_path, config | {"results": "plain"}, "-n").counts == {"labels": 1, "all": 1, "total": 2}


@pytest.mark.skipif(not possible(), reason="stages cannot be started warm here")
@pytest.mark.parametrize(("count", "warm"), [(3, False), (10, True)])
def test_many_small_slides_are_started_warm(tmp_path: Path, model: Path, count: int, warm: bool) -> None:
    (tmp_path / "in").mkdir()
    for number in range(count):
        (tmp_path / "in" / f"{number}.svs").write_text("no slide")
    targets = [f"r/slides/{number}/slide.json" for number in range(count)]
    words = command({"slides": "in", "results": "r", "model": str(model)}, *targets, "--verbose")
    log = tmp_path / "log"
    with log.open("w") as stream, subprocess.Popen(words, cwd=tmp_path, stderr=stream) as process:
        servers = set()
        while process.poll() is None:
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                with suppress(OSError):
                    words = path.read_text().split("\0")
                    servers |= {path.parent.name} if {"warm-server", str(process.pid)} <= set(words) else set()
            time.sleep(0.05)
    assert process.returncode == 0
    assert bool(servers) == warm  # the stages, its forks, have its command line
    assert all((tmp_path / target).is_file() for target in targets)
    deadline = time.monotonic() + 20  # it ends by itself, with its parent
    while any(Path("/proc", server).exists() for server in servers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path("/proc", server).exists() for server in servers)
    # No limit of jobs a second, with which the scheduler would look at them again and again.
    limits = re.findall(r"after job selection: .*'_job_count': (\d+)", log.read_text(encoding="utf-8"))
    assert {*limits} == {str(sys.maxsize)}
