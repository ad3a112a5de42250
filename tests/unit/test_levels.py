"""Damage that decodes: the levels of a slide show it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from pipeline.slides.damage import comparable_level, disagreement
from pipeline.slides.inspect import run_inspect
from pipeline.slides.open import open_slide
from pipeline.slides.synthetic import make_field, write_ome_tiff, write_svs, write_tiff
from pipeline.stores.grid import Grid
from pipeline.tiles import run_tiles
from pipeline.tissue import run_tissue

WRITERS = {"svs": write_svs, "tif": write_tiff, "ome.tif": write_ome_tiff}


def store_tiles(folder: Path, path: Path, size: tuple[int, int], mpp: float) -> dict[str, Any]:
    """Inspect a slide, call all of it tissue, and store its tiles at ``mpp``."""
    box = [[0, 0], [size[0], 0], [size[0], size[1]], [0, size[1]], [0, 0]]
    feature = {"type": "Feature", "properties": {}, "geometry": {"type": "Polygon", "coordinates": [box]}}
    (folder / "t.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": [feature]}))
    (folder / "tissue.json").write_text(json.dumps({"status": "ok", "failure": None}))
    card = json.loads((Path(__file__).parents[2] / "models/hematoxylin/model.json").read_text())
    model = folder / "model"
    model.mkdir()
    (model / "model.json").write_text(json.dumps(card | {"mpp": mpp}))
    (model / "weights.safetensors").write_bytes(b"")
    run_inspect("s", path, folder / "slide.json")
    names = ("slide.json", "tissue.json", "t.geojson")
    return run_tiles("s", *(folder / name for name in names), model, folder / "tiles.json", folder / "tiles.zarr")


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("factor", [1, 2, 1.3])
def test_levels_of_a_whole_slide_agree(tmp_path: Path, kind: str, factor: float) -> None:
    rgb, _ = make_field(1200, 900, 0.4, 2)
    WRITERS[kind](tmp_path / f"s.{kind}", rgb, 0.4)
    record = store_tiles(tmp_path, tmp_path / f"s.{kind}", (1200, 900), 0.4 * factor)
    assert record["status"] == "ok"
    assert record["warnings"] == []
    assert record["doubtful_cells"] == 0


@pytest.mark.parametrize("level", [0, 1])
def test_a_tile_that_shows_another_place_is_warned_of(tmp_path: Path, level: int) -> None:
    rgb, _ = make_field(1200, 900, 0.5, 2)
    rgb[:480, :480] = 235
    path = tmp_path / "s.svs"
    write_svs(path, rgb, 0.5)
    with tifffile.TiffFile(path) as tif:
        page = tif.series[0].levels[level].pages[0]
        offsets, counts = page.dataoffsets, page.databytecounts
    # The tile with most on it becomes one of the white ones.
    white, full = min(range(len(counts)), key=counts.__getitem__), max(range(len(counts)), key=counts.__getitem__)
    data = bytearray(path.read_bytes())
    data[offsets[full] : offsets[full] + counts[white]] = data[offsets[white] : offsets[white] + counts[white]]
    path.write_bytes(data)
    record = store_tiles(tmp_path, path, (1200, 900), 0.5)
    assert record["status"] == "ok"
    assert record["doubtful_cells"] > 5
    (warning,) = record["warnings"]
    assert "differ between the levels of the slide, or one does not decode: is the file damaged? The first" in warning


@pytest.mark.parametrize(
    ("side", "count", "grey", "doubtful"),
    [
        (64, 1, 14, True),  # a little, but all over a cell
        (64, 1, 6, False),
        (16, 1, 70, True),  # one square, by much
        (16, 1, 36, False),
        (16, 2, 36, True),  # two squares of one cell
    ],
)
def test_how_much_of_a_cell_must_differ(tmp_path: Path, side: int, count: int, grey: int, doubtful: bool) -> None:
    rgb, _ = make_field(1200, 900, 0.5, 2)
    write_svs(tmp_path / "s.svs", rgb, 0.5)
    slide = open_slide(tmp_path / "s.svs")
    grid = Grid(1200, 900, 0.5, 1.0, 1.0)
    level = comparable_level(slide, grid)
    assert level is not None
    pixels = slide.read(0, 0, 0, 1200, 900)
    assert not disagreement(slide, level, grid, pixels, 0, 0).any()
    part = pixels[128 : 128 + side, 192 : 192 + count * side]
    part[...] = np.clip(part.astype(int) - grey, 0, 255)
    found = disagreement(slide, level, grid, pixels, 0, 0)
    assert np.argwhere(found).tolist() == ([[2, 3]] if doubtful else [])
    slide.close()


def test_a_level_that_does_not_decode_vouches_for_nothing(tmp_path: Path) -> None:
    rgb, _ = make_field(1200, 900, 0.5, 2)
    path = tmp_path / "s.svs"
    write_svs(path, rgb, 0.5)
    with tifffile.TiffFile(path) as tif:
        page = tif.series[0].levels[1].pages[0]
        offsets, counts = page.dataoffsets, page.databytecounts
    data = bytearray(path.read_bytes())
    for offset, count in zip(offsets, counts, strict=True):
        data[offset : offset + count] = bytes(count)
    path.write_bytes(data)
    record = store_tiles(tmp_path, path, (1200, 900), 0.5)
    assert record["status"] == "ok"
    assert record["doubtful_cells"] == record["active_cells"] > 100
    (warning,) = record["warnings"]
    assert "or one does not decode" in warning
    record = run_tissue(
        "s", tmp_path / "slide.json", *(tmp_path / f"tissue.{kind}" for kind in ("json", "geojson", "png"))
    )
    assert record["area_mm2"] > 0
    assert record["warnings"] == [
        "100 % of the overview could not be decoded and was read from finer levels: is the file damaged?"
    ]


@pytest.mark.parametrize(("grey", "doubtful"), [(0, False), (60, True)])
def test_a_single_level_is_looked_at_where_its_tiles_meet(tmp_path: Path, grey: int, doubtful: bool) -> None:
    rgb, _ = make_field(700, 600, 0.5, 2)
    rgb[320:512, 256:512] -= np.minimum(rgb[320:512, 256:512], grey)  # as when a decoder loses its place
    path = tmp_path / "s.tif"
    tifffile.imwrite(
        path, rgb, tile=(256, 256), photometric="rgb", compression="jpeg", resolution=(20000, 20000),
        resolutionunit="CENTIMETER",
    )  # fmt: skip
    record = store_tiles(tmp_path, path, (700, 600), 0.5)
    assert record["status"] == "ok"
    if not doubtful:
        assert (record["doubtful_cells"], record["warnings"]) == (0, [])
        return
    assert record["doubtful_cells"] == 16  # of 110, those of the tile
    (warning,) = record["warnings"]
    assert "16 of 110 cells of 64 pixels lie in tiles of the file that do not continue those beside them" in warning
    assert "is the file damaged? The first: (256, 256), (320, 256), (384, 256)" in warning


def test_strips_of_a_few_rows_have_nothing_to_compare_with(tmp_path: Path) -> None:
    rgb, _ = make_field(400, 300, 0.5, 2)
    tifffile.imwrite(
        tmp_path / "s.tif", rgb, rowsperstrip=16, photometric="rgb", resolution=(20000, 20000),
        resolutionunit="CENTIMETER",
    )  # fmt: skip
    record = store_tiles(tmp_path, tmp_path / "s.tif", (400, 300), 0.5)
    assert (record["doubtful_cells"], record["warnings"]) == (None, [])
