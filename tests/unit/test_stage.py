"""Whole outputs or none; failure as data."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.batch.stage import manifest_failure, read_manifest, run_stage, whole_files
from pipeline.errors import PipelineError, SlideError


def run(folder: Path, body: Any, **options: Any) -> dict[str, Any]:
    return run_stage(
        "tiles", "a b", manifest=folder / "tiles.json", outputs={"data": folder / "data.txt"}, body=body, **options
    )


def good(staged: dict[str, Path]) -> dict[str, Any]:
    staged["data"].write_text("data")
    return {"tiles": 3}


def bad(staged: dict[str, Path]) -> dict[str, Any]:
    staged["data"].write_text("half")
    raise SlideError("tile 7 does not decode", "copy the slide again")


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_good_stage(tmp_path: Path) -> None:
    record = run(tmp_path, good)
    assert record["status"] == "ok"
    assert record["tiles"] == 3
    assert read_manifest(tmp_path / "tiles.json") == record
    assert names(tmp_path) == ["data.txt", "tiles.json"]


def test_bad_slide_is_data(tmp_path: Path) -> None:
    failure = manifest_failure(run(tmp_path, bad))
    assert failure is not None
    assert (failure.stage, failure.reason, failure.hint) == ("tiles", "tile 7 does not decode", "copy the slide again")
    assert (tmp_path / "data.txt").read_text().startswith("slide 'a b' failed at tiles: tile 7")
    assert names(tmp_path) == ["data.txt", "tiles.json"]


def test_failure_is_passed_on(tmp_path: Path) -> None:
    run(tmp_path, bad)

    def never(staged: dict[str, Path]) -> dict[str, Any]:
        raise AssertionError

    record = run_stage(
        "infer",
        "a b",
        manifest=tmp_path / "maps.json",
        outputs={"maps": tmp_path / "maps.zarr"},
        upstream=[tmp_path / "tiles.json"],
        body=never,
    )
    assert record["failure"]["stage"] == "tiles"
    assert (tmp_path / "maps.zarr" / "FAILED.txt").is_file()


def test_stub_that_cannot_be_written_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path, good)
    write = Path.write_text

    def full(path: Path, text: str, **options: Any) -> int:
        write(path, text[: len(text) // 2], **options)
        if "data" in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, text, **options)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        run(tmp_path, bad)
    assert (tmp_path / "data.txt").read_text() == "data"
    assert read_manifest(tmp_path / "tiles.json")["status"] == "ok"
    assert names(tmp_path) == ["data.txt", "tiles.json"]


def test_stop_on_bad_slide(tmp_path: Path) -> None:
    with pytest.raises(SlideError, match=r"slide 'a b', tiles: tile 7 does not decode \(copy the slide again\)"):
        run(tmp_path, bad, on_bad_slide="stop")
    assert names(tmp_path) == []


def test_crash_leaves_what_was_there(tmp_path: Path) -> None:
    run(tmp_path, good)

    def crash(staged: dict[str, Path]) -> dict[str, Any]:
        staged["data"].write_text("half")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(tmp_path, crash)
    assert (tmp_path / "data.txt").read_text() == "data"
    assert names(tmp_path) == ["data.txt", "tiles.json"]


def test_leftovers_of_a_killed_run_go(tmp_path: Path) -> None:
    (tmp_path / ".part-1-data.txt").write_text("half")
    (tmp_path / ".part-1-other.txt").write_text("not ours")
    run(tmp_path, good)
    assert names(tmp_path) == [".part-1-other.txt", "data.txt", "tiles.json"]


def test_what_another_process_stages_stays_where_files_are_shared(tmp_path: Path) -> None:
    (tmp_path / ".part-1-data.txt").write_text("another's")
    for shared in (True, False):
        with whole_files(tmp_path / "data.txt", shared=shared) as (staged,):
            staged.write_text("data")
        assert names(tmp_path) == [".part-1-data.txt", "data.txt"][not shared :]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"status": "fine"}', "{"])
def test_damaged_manifest(tmp_path: Path, text: str) -> None:
    (tmp_path / "tiles.json").write_text(text)
    with pytest.raises(PipelineError, match=r"tiles\.json"):
        read_manifest(tmp_path / "tiles.json")


def test_manifest_is_json(tmp_path: Path) -> None:
    run(tmp_path, good)
    assert json.loads((tmp_path / "tiles.json").read_text())["slide"] == "a b"
