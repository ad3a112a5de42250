from __future__ import annotations

import builtins
import errno
import io
import json
import os
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import shapely
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from pipeline import summary, testing
from pipeline.errors import SlideError
from pipeline.evaluation import readers
from pipeline.export import MEASUREMENTS
from pipeline.layout import SlideLayout
from pipeline.pictures import figure, overview
from pipeline.stores.grid import Grid

GRID = Grid.for_slide(2400, 1800, 0.25, 0.25, 0.5)


def run(paths: SlideLayout, slide: str, **more: object) -> dict:
    return summary.run_summary(
        slide,
        {name: getattr(paths, name) for name in summary.MANIFESTS},
        nuclei=paths.nuclei,
        tissue_geojson=paths.tissue_geojson,
        tiles_zarr=paths.tiles_zarr,
        out=paths.metrics,
        png=paths.overview,
        **more,  # type: ignore[arg-type]
    )


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the picture out of tests that do not look at it: drawing takes most of the time."""
    monkeypatch.setattr(summary, "draw_overview", lambda path, *rest: path.write_bytes(b"picture"))


def truth_of(path: Path, table: object) -> Path:
    shapes = [testing.ring_of(shape) for shape in table["geometry"].to_pylist()]  # type: ignore[index]
    features = [
        {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}, "properties": {}} for ring in shapes
    ]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return path


def test_metrics_of_a_slide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)  # its import would take a tenth of the stage
    paths = testing.write_slide(tmp_path, "a $slide$ <&>", count=300)
    table = testing.nuclei_table(300, 2400, 1800)
    metrics = run(paths, "a $slide$ <&>")
    assert metrics == json.loads(paths.metrics.read_text())
    assert metrics["status"] == "ok"
    assert metrics["nuclei"] == 300
    area = json.loads(paths.tissue.read_text())["area_mm2"]
    assert metrics["nuclei_per_mm2"] == pytest.approx(300 / area, rel=1e-4)
    composition = metrics["composition"]
    assert list(composition) == ["tumour", "other <&>"]
    assert sum(item["count"] for item in composition.values()) == 300
    assert composition["tumour"]["count"] == table["class"].to_pylist().count("tumour")
    assert composition["tumour"]["share"] == pytest.approx(composition["tumour"]["count"] / 300, abs=1e-4)
    areas = table["area_um2"].to_numpy()
    assert metrics["quantiles"]["area_um2"]["50"] == pytest.approx(np.median(areas), abs=1e-3)
    assert list(metrics["quantiles"]["eosin_std"]) == ["5", "25", "50", "75", "95"]
    assert set(MEASUREMENTS) - set(metrics["quantiles"]) == {"orientation"}  # an angle of axes has no middle
    assert metrics["stages"]["inspect"] == {"seconds": 0.5, "peak_rss_mb": 100.0}
    assert set(metrics["stages"]) == {
        "inspect", "tissue", "tiles", "stain", "infer", "instances", "measure", "export"
    }  # fmt: skip
    assert metrics["hashes"] == {"slide": "hash-0", "model": "ab" * 32}
    assert metrics["versions"]["pipeline"]
    assert metrics["evaluation"] is None
    assert metrics["warnings"] == []
    with Image.open(paths.overview) as image:
        assert image.width == 1430
        assert np.asarray(image.convert("L")).std() > 20


def test_no_nuclei_and_no_tissue(tmp_path: Path) -> None:
    paths = testing.write_slide(tmp_path, "empty", count=0, width=700, height=3000)
    tissue = json.loads(paths.tissue.read_text())
    paths.tissue.write_text(json.dumps(tissue | {"area_mm2": 0.0}))
    paths.tissue_geojson.write_text('{"type": "FeatureCollection", "features": []}')
    metrics = run(paths, "empty")
    assert metrics["nuclei"] == 0
    assert metrics["nuclei_per_mm2"] is None
    assert metrics["composition"]["tumour"] == {"count": 0, "share": None, "per_mm2": None, "color": [200, 0, 0]}
    assert metrics["quantiles"]["area_um2"] == dict.fromkeys(["5", "25", "50", "75", "95"])
    assert metrics["warnings"] == ["tissue: no tissue was found"]
    assert paths.overview.stat().st_size > 1000


def test_one_nucleus(tmp_path: Path) -> None:
    metrics = run(testing.write_slide(tmp_path, "one", count=1), "one")
    assert metrics["nuclei"] == 1
    assert metrics["quantiles"]["area_um2"]["5"] == metrics["quantiles"]["area_um2"]["95"]


@pytest.mark.usefixtures("undrawn")
def test_warnings_name_their_stage(tmp_path: Path) -> None:
    paths = testing.write_slide(tmp_path, "s", count=3)
    paths.stain.write_text(json.dumps(json.loads(paths.stain.read_text()) | {"warnings": ["one stain"]}))
    for share, told in ((0.0123, "1.23 %"), (0.999, "99.9 %"), (1.0, "100 %")):
        paths.tiles.write_text(json.dumps(json.loads(paths.tiles.read_text()) | {"unreadable_share": share}))
        assert run(paths, "s")["warnings"] == ["stain: one stain", f"tiles: {told} of the tissue could not be decoded"]


def test_large_numbers_are_written_out(tmp_path: Path) -> None:
    nuclei = summary.Nuclei.open(testing.write_slide(tmp_path, "s", count=1).nuclei)
    for area, told in ((0.0, "0"), (0.06254, "0.0625"), (12.34, "12.3"), (999.6, "1,000"), (1234.5678, "1,235")):
        numbers = {"tissue_mm2": area, "nuclei_per_mm2": 2345.6, "quantiles": {}}
        assert summary._facts(numbers, nuclei)[:3] == ["1 nucleus", f"{told} mm² tissue", "2,346 nuclei/mm²"]


@pytest.mark.usefixtures("undrawn")
def test_what_tells_of_quality_is_brought_together(tmp_path: Path) -> None:
    paths = testing.write_slide(tmp_path, "s", count=3)
    metrics = run(paths, "s")
    assert (metrics["focus"], metrics["doubtful_cells"], metrics["ink_fraction"]) == (None, None, None)  # of old stages
    focus = {"cells": 99, "blur_um": 0.5, "blurred_share": 0.1}
    for path, keys in (
        (paths.stain, {"focus": focus}), (paths.tiles, {"doubtful_cells": 2}), (paths.tissue, {"ink_fraction": 0.2})
    ):  # fmt: skip
        path.write_text(json.dumps(json.loads(path.read_text()) | keys))
    metrics = run(paths, "s")
    assert (metrics["focus"], metrics["doubtful_cells"], metrics["ink_fraction"]) == (focus, 2, 0.2)


@pytest.mark.usefixtures("undrawn")
def test_bounds_are_told(tmp_path: Path) -> None:
    paths = testing.write_slide(tmp_path, "s", count=3)
    assert run(paths, "s")["bounds"] is None
    for path, more in ((paths.inspect, {"bounds": [8, 6, 900, 700]}), (paths.export, {"origin": [8, 6]})):
        path.write_text(json.dumps(json.loads(path.read_text()) | more))
    metrics = run(paths, "s")
    assert (metrics["bounds"], metrics["geojson_origin"]) == ([8, 6, 900, 700], [8, 6])


@pytest.mark.usefixtures("undrawn")
def test_truth_of_a_part_of_the_slide(tmp_path: Path) -> None:
    paths = testing.write_slide(tmp_path, "s", count=60)
    table = testing.nuclei_table(60, 2400, 1800)
    same = run(paths, "s", truth=truth_of(tmp_path / "t.geojson", table))["evaluation"]
    assert same["f1"] == same["aji"] == 1
    assert (same["tp"], same["fp"], same["fn"]) == (60, 0, 0)
    part = run(paths, "s", truth=truth_of(tmp_path / "t.geojson", table.slice(0, 20)))["evaluation"]
    assert part["n_truth"] == 20
    assert part["fn"] == 0
    assert part["fp"] <= 2  # neighbours within the box around them
    assert part["region"][3] < same["region"][3]
    away = truth_of(tmp_path / "t.geojson", table)
    value = json.loads(away.read_text())
    for feature in value["features"]:
        feature["geometry"]["coordinates"] = [
            [[x - 9000, y] for x, y in ring] for ring in feature["geometry"]["coordinates"]
        ]
    away.write_text(json.dumps(value))
    assert "lies outside of the slide" in run(paths, "s", truth=away)["failure"]["reason"]
    about = json.loads(paths.inspect.read_text())
    paths.inspect.write_text(json.dumps(about | {"bounds": [9000, 0, 500, 500]}))
    assert run(paths, "s", truth=away, origin="bounds")["evaluation"]["aji"] == 1


@pytest.mark.usefixtures("undrawn")
def test_truths_outside_of_the_slide_are_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However far away they are, the canvas does not reach there."""
    painted = []
    paint = readers.Outlines.paint

    def counted(self: readers.Outlines, box: readers.Box) -> np.ndarray:
        painted.append((box[2] - box[0]) * (box[3] - box[1]))
        return paint(self, box)

    monkeypatch.setattr(readers.Outlines, "paint", counted)
    paths = testing.write_slide(tmp_path, "s", count=60)
    truth = truth_of(tmp_path / "t.geojson", testing.nuclei_table(60, 2400, 1800))
    value = json.loads(truth.read_text())
    for x, y in ((9_000_000, 100), (-500, 9_000_000)):
        ring = [[x, y], [x + 20, y], [x + 20, y + 10], [x, y + 10], [x, y]]
        value["features"].append(
            {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}, "properties": {}}
        )
    truth.write_text(json.dumps(value))
    metrics = run(paths, "s", truth=truth)
    found = metrics["evaluation"]
    assert (found["n_truth"], found["n_outside"], found["tp"], found["fn"]) == (62, 2, 60, 2)
    area = sum(shapely.from_wkb(shape).area for shape in testing.nuclei_table(60, 2400, 1800)["geometry"].to_pylist())
    assert found["aji"] == pytest.approx(area / (area + 400), rel=1e-3)
    assert found["region"][2] <= 2400 and found["region"][3] <= 1800
    assert sum(painted) <= 2 * 2400 * 1800
    assert metrics["warnings"] == [
        "summary: 2 of 62 known nuclei lie outside of the slide and count as missed: are they in level-0 pixels?"
    ]


@pytest.mark.parametrize("kind", ["t.geojson", "t.npy", "t.png", "t.tif", "t.parquet"])
@pytest.mark.parametrize(("number", "expected"), [(errno.ESTALE, OSError), (errno.EACCES, SlideError)])
def test_a_file_server_that_fails_over_the_truth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, number: int, expected: type[Exception]
) -> None:
    """The slide shall be compared another time."""
    table = testing.nuclei_table(50, 2400, 1800)
    testing.write_nuclei(tmp_path / "n.parquet", table, Grid.for_slide(2400, 1800, 0.25, 0.25, 0.5), "s")
    nuclei = summary.Nuclei.open(tmp_path / "n.parquet")
    (tmp_path / kind).write_bytes(b"content")

    def fail(*args: Any, **options: Any) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        for module, name in ((builtins, "open"), (io, "open"), (pq, "ParquetFile")):
            patch.setattr(module, name, fail)
        with pytest.raises((OSError, SlideError)) as raised:
            summary.evaluate_slide(nuclei, tmp_path / kind, (2400, 1800))
    assert isinstance(raised.value, expected)


def test_a_truth_of_lists_within_lists_is_no_geojson(tmp_path: Path) -> None:
    nuclei = summary.Nuclei.open(testing.write_slide(tmp_path, "s", count=1).nuclei)
    (tmp_path / "t.geojson").write_bytes(b"[" * 1000 + b"]" * 1000)  # as deep as the parser goes
    with pytest.raises(SlideError, match="is not GeoJSON of polygons"):
        summary.evaluate_slide(nuclei, tmp_path / "t.geojson", (2400, 1800))


@pytest.mark.parametrize("kind", ["t.geojson", "t.npy"])
def test_without_known_nuclei_no_outline_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(readers, "some_nuclei", None)
    table = testing.nuclei_table(50, 2400, 1800)
    testing.write_nuclei(tmp_path / "n.parquet", table, Grid.for_slide(2400, 1800, 0.25, 0.25, 0.5), "s")
    (tmp_path / "t.geojson").write_text('{"type": "FeatureCollection", "features": []}')
    np.save(tmp_path / "t.npy", np.zeros((1800, 2400), np.uint16))
    found = summary.evaluate_slide(summary.Nuclei.open(tmp_path / "n.parquet"), tmp_path / kind, (2400, 1800))
    assert (found["n_truth"], found["n_pred"], found["fp"], found["f1"]) == (0, 50, 50, 0)
    assert found["region"] == [0, 0, 2400, 1800]  # where all these nuclei are


def test_only_nuclei_near_the_truth_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the slide, what is held are the nuclei of its annotated part."""
    of, looked_at = readers.Outlines.of, []

    def counted(points: np.ndarray, rings: np.ndarray, polygons: np.ndarray) -> readers.Outlines:
        looked_at.append(len(polygons))
        return of(points, rings, polygons)

    monkeypatch.setattr(readers.Outlines, "of", counted)
    monkeypatch.setattr(readers, "_POLYGONS_AT_ONCE", 500)
    peaks = []
    for count in (1_000, 1_000, 30_000):  # the first one imports
        width, height = 2000, 10 * count
        table = testing.nuclei_table(count, width, height)
        path = tmp_path / f"{count}.parquet"
        testing.write_nuclei(path, table, Grid.for_slide(width, height, 0.25, 0.25, 0.5), "s")
        truth = truth_of(tmp_path / "t.geojson", table.slice(count // 2, 20))
        nuclei = summary.Nuclei.open(path)
        looked_at.clear()
        tracemalloc.start()
        found = summary.evaluate_slide(nuclei, truth, (width, height))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert found["n_truth"] == 20
        assert found["fn"] == 0
        assert sum(looked_at) == found["n_truth"] + found["n_pred"]
        assert found["n_pred"] < 200
    print([round(peak / 1e6, 1) for peak in peaks])
    assert peaks[2] - peaks[1] < 3_000_000  # 30,000 outlines as pixels are 20 MB


@pytest.mark.usefixtures("undrawn")
def test_label_map_as_truth(tmp_path: Path) -> None:
    paths = testing.write_slide(tmp_path, "s", count=5)
    labels = np.zeros((1800, 2400), dtype=np.uint16)
    np.save(tmp_path / "t.npy", labels)
    assert run(paths, "s", truth=tmp_path / "t.npy")["evaluation"]["f1"] == 0
    np.save(tmp_path / "t.npy", labels[:-1])
    metrics = run(paths, "s", truth=tmp_path / "t.npy")
    assert metrics["failure"]["stage"] == "summary"
    assert "2400 x 1799 pixels, level 0 of the slide 2400 x 1800" in metrics["failure"]["reason"]
    with pytest.raises(SlideError, match="truth"):
        run(paths, "s", truth=tmp_path / "missing.geojson", on_bad_slide="stop")


def test_a_failure_is_passed_on(tmp_path: Path) -> None:
    paths = testing.write_failed_slide(tmp_path, "bad", "inspect", "empty file", "copy it again")
    metrics = run(paths, "bad")
    assert metrics["failure"] == {"stage": "inspect", "reason": "empty file", "hint": "copy it again"}


def test_regions_do_not_overlap_and_differ() -> None:
    rng = np.random.default_rng(1)
    points = np.concatenate([rng.uniform((0, 0), (1200, 900), (300, 2)), rng.normal((300, 300), 40, (400, 2))])
    regions = overview.choose_regions(points, GRID)
    assert [region.name for region in regions] == ["densest", "median", "sparse"]
    assert regions[0].count > regions[1].count >= regions[2].count > 0
    assert regions[0].x <= 300 < regions[0].x + regions[0].side
    for i, one in enumerate(regions):
        for other in regions[:i]:
            assert abs(one.x - other.x) >= one.side or abs(one.y - other.y) >= one.side


@given(
    st.integers(1, 700),
    st.integers(1, 700),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True)), max_size=30),
)
@example(1, 2, [(0.0, 0.5)])
def test_regions_lie_within_any_grid(width: int, height: int, places: list[tuple[float, float]]) -> None:
    grid = Grid(width, height, 0.5, 2.0, 2.0)
    points = np.array(places).reshape(-1, 2) * (width, height)
    regions = overview.choose_regions(points, grid)
    assert 1 <= len(regions) <= 3
    for region in regions:
        assert 0 <= region.x <= region.x + region.side <= width
        assert 0 <= region.y <= region.y + region.side <= height
    assert bool(len(places)) == (regions[0].count > 0)


def test_outlines_are_read_where_a_region_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table, path = testing.nuclei_table(400, 2400, 1800), tmp_path / "n.parquet"
    testing.write_nuclei(path, table, GRID, "s")
    pq.write_table(pq.read_table(path), path, row_group_size=50)
    read, read_group = [], pq.ParquetFile.read_row_group

    def counted(self: pq.ParquetFile, group: int, *rest: Any) -> Any:
        read.append(group)
        return read_group(self, group, *rest)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    regions = [overview.Region("a", 500, 60, 128, 0), overview.Region("b", 900, 70, 128, 0)]
    found = summary.Nuclei.open(path).contours(regions)
    assert read == [0, 1, 2]  # of eight: 120 pixels about 60 to 198 of 900
    for region, outlines in zip(regions, found, strict=True):
        box = shapely.box(region.x, region.y, region.x + region.side, region.y + region.side)
        shapes = shapely.transform(shapely.from_wkb(table["geometry"].to_pylist()), lambda points: points / 2)
        near = {ring.tobytes() for ring, _ in outlines}
        wanted = [shapely.get_coordinates(shape).tobytes() for shape in shapes if shape.intersects(box)]
        assert len(wanted) > 3
        assert near.issuperset(wanted)
    colours = {tuple(kind["color"]) for kind in testing.CLASSES}
    assert {colour for outlines in found for _, colour in outlines} == colours


def test_density_of_an_even_field() -> None:
    # One nucleus every 20 µm each way: 2500 per mm², up to the very edge of the tissue.
    y, x = np.mgrid[10:1000:20, 10:1500:20]
    points = np.stack([x.ravel(), y.ravel()], axis=1).astype(float)
    ring = np.array([[0, 0], [1500, 0], [1500, 1000], [0, 1000], [0, 0]], float)
    density = overview.density_map(points, [ring], (1500.0, 1000.0))
    assert density.values.shape == (50, 75)
    assert np.allclose(density.values, 2500)
    nothing = overview.density_map(points[:0], [], (1500.0, 1000.0))
    assert np.isnan(nothing.values).all()


def test_fine_density_goes_on_to_the_edge_of_the_tissue() -> None:
    values = np.full((7, 10), np.nan)
    values[2:5, 3] = 100
    values[2:5, 4:7] = 300
    grid = Grid(200, 140, 1.0, 1.0, 1.0)
    ring = np.array([[0, 0], [200, 0], [200, 140], [0, 140], [0, 0]], float)
    fine, share = overview._fine(overview.Density(values, 20.0), [ring], grid)
    assert fine.shape == share.shape == (490, 700)
    assert np.allclose(fine[:, :240], 100)  # as its nearest bin, left of the middle between the two
    assert np.allclose(fine[:, 320:], 300)
    assert np.allclose(fine[240, [245, 279, 280, 314]], 100 + 200 * (np.array([245, 279, 280, 314]) + 0.5 - 245) / 70)


def test_coverage_honours_holes() -> None:
    outer = np.array([[0, 0], [8, 0], [8, 8], [0, 8], [0, 0]], float)
    share = overview.coverage([outer, outer / 2 + 2], 10, 10, 1.0)
    expected = np.zeros((10, 10))
    expected[:8, :8] = 1
    expected[2:6, 2:6] = 0
    assert np.abs(share - expected).mean() < 0.08  # edges are drawn a little outside
    assert share[0, 0] == 1
    assert share[4, 4] == 0


class FakeTiles:
    def __init__(self, rgb: np.ndarray) -> None:
        self.rgb = rgb
        self.grid = Grid(rgb.shape[1], rgb.shape[0], 0.5, 1.0, 1.0)
        self.active = np.ones((-(-rgb.shape[0] // 64), -(-rgb.shape[1] // 64)), dtype=bool)
        self.windows: list[tuple[int, int, int, int]] = []

    def read(self, x: int, y: int, w: int, h: int) -> np.ndarray:
        self.windows.append((x, y, w, h))
        return self.rgb[y : y + h, x : x + w]


@pytest.mark.parametrize("side", [300, 262, 1050, 3000])
def test_thumbnail_averages_blocks_and_skips_white(side: int) -> None:
    rng = np.random.default_rng(0)
    tiles = FakeTiles(rng.integers(0, 255, (2100, 1301, 3), dtype=np.uint8))
    image, factor = overview.thumbnail(tiles, side)
    assert factor == {300: 8, 262: 16, 1050: 2, 3000: 1}[side]
    assert max(image.shape) <= side
    # What lies beyond the slide is as its last row and column.
    padded = np.pad(tiles.rgb, ((0, -2100 % factor), (0, -1301 % factor), (0, 0)), mode="edge")
    means = padded.reshape(len(image), factor, image.shape[1], factor, 3).mean((1, 3))
    assert image.shape == means.shape
    assert np.abs(image - means).max() <= 0.5001
    # Each of a store's tiles is decoded once.
    assert all(x % 1024 == y % 1024 == 0 and max(w, h) <= 1024 for x, y, w, h in tiles.windows)
    tiles.active[:] = False
    tiles.windows.clear()
    assert (overview.thumbnail(tiles, side)[0] == 255).all()
    assert not tiles.windows


@pytest.mark.parametrize(("limit", "expected"), [(1.0, 1), (7.3, 5), (49.9, 20), (5000, 5000), (0.3, 0.2)])
def test_scale_bars_have_round_lengths(limit: float, expected: float) -> None:
    assert figure.round_length(limit) == pytest.approx(expected)


def test_labels() -> None:
    assert figure.length_label(2000) == "2 mm"
    assert figure.length_label(50) == "50 µm"
    assert figure.shorten("x" * 200, 20) == "x" * 12 + "…" + "x" * 7
    assert figure.shorten("short") == "short"


@pytest.mark.parametrize("count", [2, 9, 20])
def test_legends_of_many_classes_stay_on_the_picture(
    tmp_path: Path, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = testing.write_slide(tmp_path, "s", count=50)
    names = [f"Non-neoplastic epithelial cell {number}" for number in range(count)]
    boxes = []
    drawn = overview._draw_legend

    def measured(on: Any, legend: Any, columns: int) -> None:
        drawn(on, legend, columns)
        size = on.get_size_inches() * on.dpi
        boxes.append(on.legends[0].get_window_extent(on.canvas.get_renderer()))
        # Below the panels, and within the picture.
        assert boxes[0].x0 >= 0 and boxes[0].x1 <= size[0] and boxes[0].y0 >= 0
        assert boxes[0].y1 <= min(axes.get_window_extent().y0 for axes in on.axes)

    monkeypatch.setattr(overview, "_draw_legend", measured)
    known = [(name, (40 * (number % 6), 120, 200)) for number, name in enumerate(names)]
    draw = overview.draw
    monkeypatch.setattr(overview, "draw", lambda path, **how: draw(path, **(how | {"legend": known})))
    run(paths, "s")
    assert len(boxes) == 1
