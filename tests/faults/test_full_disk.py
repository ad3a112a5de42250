"""Disks that are full and folders that cannot be written: one line says so, and nothing is lost."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from chain import STAGES, arguments, run_chain
from outcome import check_whole, content, outcome
from runs import run, write_slide

from pipeline import cli
from pipeline.layout import SlideLayout

WRITES = {"tiles": "tiles.zarr", "infer": "maps.zarr", "instances": "instances.parquet", "export": "nuclei.geojson.gz"}
"""Stages that write much, and what."""


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("slide") / "s.svs"
    write_slide(path, seed=4)
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, slide: Path, model: Path) -> SlideLayout:
    """A slide's results, all stages done."""
    layout = SlideLayout(tmp_path_factory.mktemp("whole"))
    run_chain(slide, layout, model)
    return layout


@contextlib.contextmanager
def full_disk(folder: Path, room: int) -> Iterator[None]:
    """A small file system in memory at a folder, with so many bytes of room."""
    folder.mkdir()
    options = f"size={max(4096, room)}"
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no right to mount a small file system")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@contextlib.contextmanager
def file_limit(folder: Path, room: int) -> Iterator[None]:
    """No file may grow beyond so many bytes."""
    folder.mkdir()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def size_of(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return max(file.stat().st_size for file in files)


@pytest.mark.parametrize("share", [0.1, 0.6])
@pytest.mark.parametrize("disk", [full_disk, file_limit])
@pytest.mark.parametrize("stage", WRITES)
def test_full_disk_is_one_line_and_leaves_nothing_half(
    tmp_path: Path, slide: Path, whole: SlideLayout, model: Path, stage: str, disk: object, share: float,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    room = int(share * size_of(whole.root / WRITES[stage]))
    out = SlideLayout(tmp_path / "dísk 1")
    line = arguments(stage, slide, whole, out, model)
    if stage == "tiles":
        line.append("--job-minutes=5")
    with disk(out.root, room):  # type: ignore[operator]
        code = cli.main(line)
        errors = [text for text in capfd.readouterr().err.splitlines() if text.startswith("error: ")]
        left = sorted(path.name for path in out.root.iterdir())
    assert code == 1
    assert len(errors) == 1
    assert "No space left on device" in errors[0] or "File too large" in errors[0], errors
    assert "run the same command again" in errors[0]
    assert left == []


def test_after_making_room_the_bytes_are_the_same(tmp_path: Path, slide: Path, whole: SlideLayout, model: Path) -> None:
    out = SlideLayout(tmp_path / "out")
    with file_limit(out.root, 3000):
        assert [cli.main(arguments(stage, slide, whole, out, model)) for stage in WRITES] == [1, 1, 1, 1]
    assert [cli.main(arguments(stage, slide, whole, out, model)) for stage in WRITES] == [0, 0, 0, 0]
    for name in WRITES.values():
        check_whole(out.root / name)
        assert content(out.root / name) == content(whole.root / name)


@pytest.mark.parametrize("stage", STAGES)
def test_read_only_results_are_one_line(
    tmp_path: Path, slide: Path, whole: SlideLayout, model: Path, stage: str, capfd: pytest.CaptureFixture[str]
) -> None:
    out = SlideLayout(tmp_path / "results")
    out.root.mkdir()
    if os.geteuid() == 0:
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(out.root)], capture_output=True).returncode:
            pytest.skip("no right to mount a read-only file system")
    else:
        out.root.chmod(0o500)
    try:
        code = cli.main(arguments(stage, slide, whole, out, model))
    finally:
        if os.geteuid() == 0:
            subprocess.run(["umount", str(out.root)], check=True)
        else:
            out.root.chmod(0o700)
    assert code == 1
    (error,) = [text for text in capfd.readouterr().err.splitlines() if text.startswith("error: ")]
    assert "Read-only file system" in error or "Permission denied" in error


@pytest.mark.workflow
@pytest.mark.faults_long
@pytest.mark.timeout(3600)
def test_run_on_a_disk_that_fills_up(tmp_path: Path, model: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(2):
        write_slide(tmp_path / "in" / f"s{number}.svs", seed=number)
    config = {"slides": str(tmp_path / "in"), "model": str(model)}
    done = run(tmp_path, config | {"results": "plain"})
    assert done.code == 0, done.output
    failed = 0
    with full_disk(tmp_path / "small disk", 400_000):
        results = tmp_path / "small disk" / "results"
        for size in ("400k", "800k", "1200k", "1600k", "64m"):
            subprocess.run(["mount", "-o", f"remount,size={size}", str(tmp_path / "small disk")], check=True)
            done = run(tmp_path, config | {"results": str(results)})
            if done.code:
                failed += 1
                assert "No space left" in done.output, done.output
            else:
                break
        print(f"{failed} runs met a full disk before one ended")
        assert failed
        assert done.code == 0, done.output
        assert outcome(results) == outcome(tmp_path / "plain")
        shutil.rmtree(results)
