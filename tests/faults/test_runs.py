"""Runs side by side, on folders that cannot be written, with crashes of our own, of damaged stores and slides."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from outcome import outcome
from runs import command, read_json, read_tsv, run, write_slide, write_toy_model

from pipeline.batch.lock import OWNER, RESULTS, lock_run, owner
from pipeline.layout import folder_name

pytestmark = [pytest.mark.workflow, pytest.mark.timeout(1800)]

SLIDES = ("bad <i>", "crash", "good", "late")


def errors(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("error: ")]


def test_second_run_in_a_results_folder_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.svs").write_bytes(b"x")
    toy = write_toy_model(tmp_path / "toy")
    lock = lock_run(tmp_path / "my results")
    assert lock is not None
    config = {"slides": "in", "results": "my results", "model": str(toy)}
    done = run(tmp_path, config)
    assert done.code != 0
    (line,) = errors(done.output)
    assert f"another run is at work in 'my results' (process {os.getpid()} on " in line
    assert "Traceback" not in done.output
    assert "Building DAG" not in done.output
    # Looking on is allowed.
    assert run(tmp_path, config, "-n").code == 0
    # Together with a training, which does not need that folder for itself.
    train = config | {"train": {"data": [{"kind": "labels", "path": "nowhere"}]}}
    (line,) = errors(run(tmp_path, train, "all", "train").output)
    assert f"another run is at work in 'my results' (process {os.getpid()} on " in line
    lock.close()
    lock = lock_run(tmp_path / "my results" / "training" / "trained")
    assert lock is not None
    (line,) = errors(run(tmp_path, train | {"compare": {"experiments": ["default"]}}, "compare", "train").output)
    assert "another run is at work in 'my results/training/trained' " in line
    lock.close()


def test_a_late_job_of_an_earlier_run_takes_nothing_away(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that a cluster starts when the run that submitted it was killed, and another one is at work."""
    (tmp_path / "in").mkdir()
    write_slide(tmp_path / "in" / "a.svs", seed=1)
    result = tmp_path / "out" / "slides" / "a" / "slide.json"
    result.parent.mkdir(parents=True)
    result.write_text("of the run that is at work")
    lock = lock_run(tmp_path / "out")
    assert lock is not None
    config = {"slides": "in", "results": "out", "model": str(model)}
    job = ["--mode", "remote", "--target-jobs", "inspect:slide=a", "--allowed-rules", "inspect", "--force"]
    monkeypatch.setenv(RESULTS, "out")
    monkeypatch.setenv(OWNER, "process 1 on node7")
    late = run(tmp_path, config, *job)
    assert late.code != 0
    (line,) = errors(late.output)
    assert line.startswith("error: this job is of a run (process 1 on node7) that another one")
    assert result.read_text() == "of the run that is at work"
    monkeypatch.setenv(OWNER, owner(tmp_path / "out"))
    own = run(tmp_path, config, *job)
    assert own.code == 0, own.output
    assert read_json(result)["status"] == "ok"
    lock.close()
    # So does one of a training, which has a folder of its own.
    lock = lock_run(tmp_path / "out" / "training" / "trained")
    assert lock is not None
    monkeypatch.setenv(RESULTS, "out/training/trained")
    monkeypatch.setenv(OWNER, "process 1 on node7")
    job = ["--mode", "remote", "--target-jobs", "train_settings:training=trained", "--allowed-rules", "train_settings"]
    late = run(tmp_path, config, *job)
    (line,) = errors(late.output)
    assert line.startswith("error: this job is of a run (process 1 on node7) that another one")
    lock.close()


def test_results_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.svs").write_bytes(b"x")
    toy = write_toy_model(tmp_path / "toy")
    results = tmp_path / "results"
    results.mkdir()
    if os.geteuid() == 0:
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(results)], capture_output=True).returncode:
            pytest.skip("no right to mount a read-only file system")
    else:
        results.chmod(0o500)
    try:
        done = run(tmp_path, {"slides": "in", "results": "results", "model": str(toy)})
    finally:
        if os.geteuid() == 0:
            subprocess.run(["umount", str(results)], check=True)
        else:
            results.chmod(0o700)
    assert done.code != 0
    (line,) = errors(done.output)
    assert "results: 'results' cannot be written: " in line
    assert "Traceback" not in done.output
    assert "Building DAG" not in done.output


def inspected(results: Path) -> dict[str, int]:
    """When each slide was inspected."""
    paths = {slide: results / "slides" / folder_name(slide) / "slide.json" for slide in SLIDES}
    return {slide: path.stat().st_mtime_ns for slide, path in paths.items()}


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory, model: Path) -> dict[str, Any]:
    """One run with a crash of ours and a bad slide; then a damaged store, and all put right."""
    folder = tmp_path_factory.mktemp("with blanks, 'quotes' and ü")
    (folder / "in").mkdir()
    write_slide(folder / "in" / "good.svs", seed=1)
    write_slide(folder / "whole.svs", seed=2)
    for name in ("crash", "late"):
        shutil.copy(folder / "whole.svs", folder / "in" / f"{name}.svs")
    (folder / "in" / "bad <i>.svs").write_bytes((folder / "whole.svs").read_bytes()[:20000])
    config = {"slides": "in", "results": "my 'results' 1", "model": str(model), "tiles": {"keep": True}}
    results = folder / "my 'results' 1"
    told: dict[str, Any] = {"folder": folder, "results": results}
    # What no slide is to blame for: a folder where the stage has a file.
    obstacles = [results / "slides" / name for name in ("crash/.lock-stain.json", "late/.lock-instances.json")]
    for obstacle in obstacles:
        obstacle.mkdir(parents=True)
    told["crash"] = run(folder, config)
    assert told["crash"].code == 1, told["crash"].output
    for obstacle in obstacles:
        obstacle.rmdir()
    metrics = {slide: results / "slides" / folder_name(slide) / "metrics.json" for slide in SLIDES}
    told["states"] = {slide: read_json(path)["status"] if path.exists() else None for slide, path in metrics.items()}
    status = subprocess.run(
        [*command({}, cores=1)[:2], "pipeline", "status", str(results), "--report"],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False,
    )  # fmt: skip
    told["status"] = status.stdout + status.stderr
    told["so far"] = run(folder, config, "so_far", cores=1)
    told["failed so far"] = read_tsv(results / "so-far" / "failed.tsv")
    told["cohort so far"] = read_tsv(results / "so-far" / "cohort.tsv")
    # The slides that wait get a damaged store each, the bad one is put right.
    for store in ("crash/tiles.zarr/rgb", "late/maps.zarr/maps"):
        chunk = next(path for path in (results / "slides" / store / "c").rglob("*") if path.is_file())
        data = bytearray(chunk.read_bytes())
        data[len(data) // 2] ^= 4
        chunk.write_bytes(data)
    told["damaged"] = run(folder, config)
    told["healed"] = [read_json(metrics[slide])["status"] for slide in ("crash", "late")]
    shutil.copy(folder / "whole.svs", folder / "in" / "bad <i>.svs")
    told["before"] = inspected(results)
    told["last"] = run(folder, config)
    return told


def test_crash_of_ours_is_a_failure_and_the_others_finish(story: dict[str, Any]) -> None:
    done = story["crash"]
    assert done.code == 1
    for stage in ("stain", "instances"):
        assert f"error: {stage}: " in done.output  # the end of its log
    assert "Is a directory" in done.output
    assert story["states"] == {"bad <i>": "failed", "crash": None, "good": "ok", "late": None}


def test_cohort_so_far(story: dict[str, Any]) -> None:
    assert "4 slides: 1 finished, 1 failed, 2 to go" in story["status"]
    assert "under way: 1 after tiles, 1 after infer" in story["status"]
    assert "failed: bad <i> at inspect: " in story["status"]
    assert story["so far"].code == 0, story["so far"].output
    assert [row["slide"] for row in story["failed so far"]] == ["bad <i>"]
    assert [row["slide"] for row in story["cohort so far"]] == ["good"]
    report = (story["results"] / "so-far" / "report.html").read_text(encoding="utf-8")
    assert "bad &lt;i&gt;" in report
    assert "bad <i>" not in report


def test_damaged_stores_are_found_and_made_anew_by_the_same_command(story: dict[str, Any]) -> None:
    done = story["damaged"]
    for store in ("tiles", "maps"):
        assert done.output.count(f"{store}.zarr was damaged and has been removed") == 1
    (line,) = [line for line in done.output.splitlines() if "had been damaged: the same command starts once" in line]
    assert "crash/tiles.zarr, " in line
    assert "late/maps.zarr had been damaged" in line
    assert done.code == 0, done.output
    assert story["healed"] == ["ok", "ok"]
    assert "another run is at work" not in done.output


def test_slide_that_was_put_right_is_run_alone(story: dict[str, Any]) -> None:
    after = inspected(story["results"])
    assert [slide for slide in SLIDES if after[slide] != story["before"][slide]] == ["bad <i>"]


def test_in_the_end_all_is_there(story: dict[str, Any]) -> None:
    assert story["last"].code == 0, story["last"].output
    assert read_tsv(story["results"] / "failed.tsv") == []
    found = outcome(story["results"])
    # Copies of one slide, two of which met a crash and a damaged store.
    folders = [story["results"] / "slides" / folder_name(name) for name in ("crash", "late", "bad <i>")]
    for name in ("tissue.geojson", "stain.png", "tiles.zarr"):
        assert len({found[f"slides/{folder.name}/{name}"] for folder in folders}) == 1
    assert len({read_json(folder / "instances.json")["digest"] for folder in folders}) == 1


@pytest.mark.faults_long
@pytest.mark.parametrize(("stage", "files"), [("tiles", "sums/c/**/*"), ("infer", "maps/c/**/*"), ("instances", "*")])
def test_damaged_part_of_a_huge_slide_is_made_anew(tmp_path: Path, model: Path, stage: str, files: str) -> None:
    (tmp_path / "in").mkdir()
    write_slide(tmp_path / "in" / "a.svs", seed=1)
    config = {"slides": "in", "model": str(model), "parts": {"from_gb": 0, "count": 2}}
    assert run(tmp_path, {**config, "results": "whole"}).code == 0
    slide = tmp_path / "out" / "slides" / "a"
    obstacle = slide / f".lock-{'maps' if stage == 'infer' else stage}.json"
    obstacle.mkdir(parents=True)
    assert run(tmp_path, {**config, "results": "out"}).code == 1
    obstacle.rmdir()
    # Some of the parts have no tissue, so no such file.
    stores = {path: store for store in slide.glob(f"parts/{stage}-?-of-2.zarr") for path in store.glob(files)}
    largest = max((path for path in stores if path.is_file()), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 4
    largest.write_bytes(data)
    done = run(tmp_path, {**config, "results": "out"})
    assert done.code == 0, done.output
    assert done.output.count(f"{stores[largest].name} was damaged and has been removed") == 1
    assert outcome(tmp_path / "out") == outcome(tmp_path / "whole")
