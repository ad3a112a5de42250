"""Slides that cannot be processed: each is listed with stage and reason, the others finish, the run ends well."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from runs import MPP, Run, read_json, read_tsv, run, write_slide

from pipeline.layout import folder_name

pytestmark = [pytest.mark.workflow, pytest.mark.timeout(1800)]

BAD = {
    "empty": "inspect",
    "text": "inspect",
    "cut at 30 %": None,
    "cut at 90 %": None,
    "huge": None,
    "no mpp": "inspect",
    "unreadable": "inspect",
    "folder": "inspect",
    "broken in the middle": None,
}
"""Bad slides by name, with the stage that finds out where there is but one that can."""


def claim_size(path: Path, side: int) -> None:
    """Write a TIFF of a few hundred bytes that claims ``side x side`` pixels."""
    tile = 512
    entries = [
        (256, 4, 1, side),
        (257, 4, 1, side),
        (258, 3, 1, 8),
        (259, 3, 1, 1),
        (262, 3, 1, 1),
        (277, 3, 1, 1),
        (322, 3, 1, tile),
        (323, 3, 1, tile),
        (324, 4, 1, 8),
        (325, 4, 1, 8),
    ]
    data = b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(entries))
    for tag, kind, count, value in entries:
        data += struct.pack("<HHII", tag, kind, count, value)
    path.write_bytes(data + struct.pack("<I", 0))


def break_middle(path: Path) -> None:
    """Overwrite the middle half of the tiles of the largest level."""
    import tifffile

    with tifffile.TiffFile(path) as tif:
        page = tif.pages[0]
        tiles = [(o, n) for o, n in zip(page.dataoffsets, page.databytecounts, strict=True) if n]
    with path.open("r+b") as stream:
        for offset, size in tiles[len(tiles) // 4 : -(len(tiles) // 4)]:
            stream.seek(offset)
            stream.write(b"\0" * size)


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, model: Path, without_root_rights: list[str]
) -> Iterator[tuple[Path, Run, dict[str, Any]]]:
    """A run over all bad slides and a good one."""
    folder = tmp_path_factory.mktemp("bad")
    slides = folder / "in"
    slides.mkdir()
    write_slide(slides / "good.svs", seed=1)
    write_slide(folder / "whole.svs", seed=2, size=(1536, 1280))
    whole = (folder / "whole.svs").read_bytes()
    (slides / "empty.svs").write_bytes(b"")
    (slides / "text.svs").write_text("This is not a slide.\n" * 50, encoding="utf-8")
    (slides / "cut at 30 %.svs").write_bytes(whole[: len(whole) * 3 // 10])
    (slides / "cut at 90 %.svs").write_bytes(whole[: len(whole) * 9 // 10])
    claim_size(slides / "huge.tif", 10**6)
    write_without_mpp(slides / "no mpp.tif")
    (slides / "unreadable.svs").write_bytes(whole)
    (slides / "unreadable.svs").chmod(0)
    (slides / "folder.svs").mkdir()
    (slides / "broken in the middle.svs").write_bytes(whole)
    break_middle(slides / "broken in the middle.svs")
    config = {"slides": "in", "results": "out", "model": str(model)}
    done = run(folder, config, before=without_root_rights)
    yield folder, done, config
    (slides / "unreadable.svs").chmod(0o600)


def write_without_mpp(path: Path) -> None:
    """Write a tiled TIFF that does not say how large a pixel is."""
    import tifffile

    from pipeline.slides.synthetic import make_field

    rgb, _ = make_field(640, 512, MPP, 3)
    tifffile.imwrite(path, rgb, tile=(256, 256), photometric="rgb", compression="jpeg")


def test_run_ends_well(finished: tuple[Path, Run, dict[str, Any]]) -> None:
    _, done, _ = finished
    assert done.code == 0, done.output


def test_run_ends_with_what_failed_and_where_to_look(
    finished: tuple[Path, Run, dict[str, Any]], without_root_rights: list[str]
) -> None:
    folder, done, config = finished
    again = run(folder, config, before=without_root_rights)
    assert again.nothing, again.output
    count = len(BAD) + 1
    for output in (done.output, again.output):
        words = output[output.index(f"\n{count} slides: ") :].splitlines()[1:]
        assert words[0] == f"{count} slides: 1 finished, {len(BAD)} failed, 0 to go"
        assert words[1].startswith("failed: ")
        assert words[-2:] == [
            f"all that failed: {folder / 'out' / 'failed.tsv'}",
            f"report: {folder / 'out' / 'report.html'}",
        ]


def test_slide_table_is_there_from_the_start(finished: tuple[Path, Run, dict[str, Any]]) -> None:
    _, done, _ = finished
    assert done.output.index("localrule slide_table:") < done.output.index("Finished jobid")


def test_every_bad_slide_is_listed_once_with_stage_and_reason(finished: tuple[Path, Run, dict[str, Any]]) -> None:
    folder, _, _ = finished
    rows = read_tsv(folder / "out" / "failed.tsv")
    for row in rows:
        print("\t".join(row.values()))
    assert sorted(row["slide"] for row in rows) == sorted(BAD)
    for row in rows:
        assert BAD[row["slide"]] in (None, row["stage"]), row
        assert len(row["reason"]) > 10
        assert "Traceback" not in row["reason"]


def test_missing_pixel_size_says_how_to_give_it(finished: tuple[Path, Run, dict[str, Any]]) -> None:
    folder, _, _ = finished
    (row,) = [row for row in read_tsv(folder / "out" / "failed.tsv") if row["slide"] == "no mpp"]
    assert "mpp=" in " ".join(row.values())


def test_good_slide_is_finished(finished: tuple[Path, Run, dict[str, Any]]) -> None:
    folder, _, _ = finished
    assert read_json(folder / "out" / "slides" / "good" / "metrics.json")["status"] == "ok"
    assert "good" in [row["slide"] for row in read_tsv(folder / "out" / "cohort.tsv")]


def test_no_stub_can_be_taken_for_a_result(finished: tuple[Path, Run, dict[str, Any]]) -> None:
    import pyarrow.parquet

    folder, _, _ = finished
    for slide in BAD:
        results = folder / "out" / "slides" / folder_name(slide)
        assert read_json(results / "metrics.json")["status"] == "failed"
        with pytest.raises(pyarrow.ArrowInvalid):
            pyarrow.parquet.read_table(results / "nuclei.parquet")
        assert (results / "nuclei.geojson.gz").read_bytes()[:2] != b"\x1f\x8b"


def test_stop_fails_on_a_bad_slide(tmp_path: Path, model: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "empty.svs").write_bytes(b"")
    done = run(tmp_path, {"slides": "in", "results": "out", "model": str(model), "on_bad_slide": "stop"})
    assert done.code != 0
    assert "error: slide 'empty', inspect: " in done.output
    assert not os.path.exists(tmp_path / "out" / "slides" / "empty" / "slide.json")
