"""What there is in regions drawn on a slide: which count, areas, nuclei on borders, the stage."""

from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline import cli, testing
from pipeline.batch.stage import read_manifest
from pipeline.errors import SlideError
from pipeline.layout import RunLayout, SlideLayout
from pipeline.pictures import region_map
from pipeline.regions import ELSEWHERE, Region, count_regions, inside, read_regions
from pipeline.stores.grid import Grid
from pipeline.stores.nuclei import read_nuclei

BOX = shapely.box(0, 0, 1000, 800)
MPP = (0.5, 2.0)


def square(left: float, top: float, side: float) -> list[list[float]]:
    right, bottom = left + side, top + side
    return [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]


def feature(geometry: Any, kind: str = "annotation", **properties: Any) -> dict[str, Any]:
    if isinstance(geometry, list):
        geometry = {"type": "Polygon", "coordinates": geometry}
    return {"type": "Feature", "geometry": geometry, "properties": {"objectType": kind} | properties}


def write(path: Path, *features: Any, **more: Any) -> Path:
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features} | more), encoding="utf-8")
    return path


def read(path: Path, *features: Any, **more: Any) -> tuple[dict[str, Any], list[str]]:
    found, warnings = read_regions(write(path / "r.geojson", *features, **more), BOX)
    return {region.name: region.area for region in found}, warnings


def table(path: Path, points: list[tuple[float, float]], areas: list[float] | None = None) -> Path:
    """Nuclei with these centroids."""
    nuclei = testing.nuclei_table(len(points), 1000, 800)
    places = np.array(points, np.float64).reshape(-1, 2)
    own = {"centroid_x": places[:, 0], "centroid_y": places[:, 1]}
    own["class"] = pa.array([testing.CLASSES[number % 2]["name"] for number in range(len(points))], pa.string())
    own["area_um2"] = np.array(areas if areas is not None else np.ones(len(points)), np.float32)
    for name, column in own.items():
        nuclei = nuclei.set_column(nuclei.column_names.index(name), name, pa.array(column))
    testing.write_nuclei(path / "nuclei.parquet", nuclei, Grid.for_slide(1000, 800, 0.5, 0.5, 0.5), "s")
    return path / "nuclei.parquet"


def counted(path: Path, regions: dict[str, Any], points: list[tuple[float, float]], **more: Any) -> dict[str, Any]:
    tissue = more.pop("tissue", [BOX])
    found = count_regions([Region(*one) for one in regions.items()], table(path, points, **more), tissue, BOX, MPP)
    return {one["region"]: one for one in found}


def test_areas_tissue_and_nuclei_of_two_squares_of_which_one_has_a_hole(tmp_path: Path) -> None:
    first = shapely.Polygon(square(0, 0, 200), [square(50, 50, 100)])
    second = shapely.box(150, 150, 350, 350)
    points = [(10, 10), (100, 100), (175, 175), (300, 300), (900, 700)]
    found = counted(
        tmp_path, {"a": first, "b": second}, points, tissue=[shapely.box(0, 0, 100, 800)], areas=[1, 2, 3, 4, 50]
    )
    assert list(found) == ["a", "b", ELSEWHERE]
    # A pixel is 0.5 µm wide and 2 µm high: 1 µm².
    assert [one["area_mm2"] for one in found.values()] == [0.03, 0.04, round((800_000 - 67_500) / 1e6, 6)]
    assert [one["tissue_mm2"] for one in found.values()] == [0.015, 0.0, round((80_000 - 15_000) / 1e6, 6)]
    # One nucleus is in the hole, one in both.
    assert [one["nuclei"] for one in found.values()] == [2, 2, 2]
    assert found["a"]["nuclei_per_mm2"] == round(2 / 0.015, 3)
    assert found["b"]["nuclei_per_mm2"] is None
    assert [one["quantiles"]["area_um2"]["50"] for one in found.values()] == [2.0, 3.5, 26.0]
    assert {name: one["count"] for name, one in found["b"]["composition"].items()} == {"tumour": 1, "other <&>": 1}
    assert found["a"]["composition"]["tumour"] == {
        "count": 2, "share": 1.0, "per_mm2": round(2 / 0.015, 3), "color": [200, 0, 0]
    }  # fmt: skip


def test_a_nucleus_on_a_border_belongs_to_one_side(tmp_path: Path) -> None:
    points = [(100, 50), (50, 100), (100, 100), (0, 0), (200, 50), (50, 200)]
    boxes = {f"{x} {y}": shapely.box(x, y, x + 100, y + 100) for x in (0, 100) for y in (0, 100)}
    found = counted(tmp_path, boxes, points)
    assert {name: one["nuclei"] for name, one in found.items()} == {
        "0 0": 1, "0 100": 1, "100 0": 1, "100 100": 1, ELSEWHERE: 2
    }  # fmt: skip
    # Whatever else is drawn along the border, or in which order.
    again = counted(tmp_path, {"long": shapely.box(0, 0, 100, 800)} | dict(reversed(boxes.items())), points)
    assert {name: again[name]["nuclei"] for name in boxes} == {name: found[name]["nuclei"] for name in boxes}
    # A slope on which centroids lie exactly.
    below, above = shapely.Polygon([(0, 0), (320, 10), (0, 10)]), shapely.Polygon([(0, 0), (320, 0), (320, 10)])
    on = np.array([(32.0 * step, float(step)) for step in range(1, 10)])
    assert inside(on, [below, above]).sum(axis=0).tolist() == [0, 9]


def test_a_slide_without_nuclei_or_without_tissue(tmp_path: Path) -> None:
    found = counted(tmp_path, {"a": shapely.box(0, 0, 100, 100)}, [], tissue=[])
    assert [one["nuclei"] for one in found.values()] == [0, 0]
    assert [one["tissue_mm2"] for one in found.values()] == [0.0, 0.0]
    assert [one["nuclei_per_mm2"] for one in found.values()] == [None, None]
    assert found["a"]["quantiles"]["area_um2"]["50"] is None
    assert found["a"]["composition"]["tumour"]["share"] is None
    alone = counted(tmp_path, {}, [(5, 5)])
    assert (alone[ELSEWHERE]["nuclei"], alone[ELSEWHERE]["area_mm2"]) == (1, 0.8)


def test_a_region_may_hold_all_that_there_is(tmp_path: Path) -> None:
    found = counted(tmp_path, {"all": BOX}, [(5, 5), (800, 600)])
    assert (found["all"]["nuclei"], found["all"]["area_mm2"], found["all"]["tissue_mm2"]) == (2, 0.8, 0.8)
    assert (found[ELSEWHERE]["nuclei"], found[ELSEWHERE]["area_mm2"], found[ELSEWHERE]["tissue_mm2"]) == (0, 0.0, 0.0)


@settings(max_examples=60, deadline=None)
@given(
    across=st.lists(st.integers(1, 99), unique=True, max_size=5),
    down=st.lists(st.integers(1, 79), unique=True, max_size=5),
    places=st.lists(st.tuples(st.integers(0, 999), st.integers(0, 799)), max_size=60),
    blob=st.booleans(),
)
def test_parts_of_a_slide_add_up(
    across: list[int],
    down: list[int],
    places: list[tuple[int, int]],
    blob: bool,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    xs, ys = [0, *sorted(10 * x for x in across), 1000], [0, *sorted(10 * y for y in down), 800]
    cells = itertools.product(itertools.pairwise(xs), itertools.pairwise(ys))
    parts = {f"{left} {top}": shapely.box(left, top, right, bottom) for (left, right), (top, bottom) in cells}
    if blob:  # a hole in each that it meets, and itself
        round_one = shapely.Point(500, 400).buffer(123.4)
        parts = {name: part.difference(round_one) for name, part in parts.items()} | {"blob": round_one}
        parts = {name: part for name, part in parts.items() if not part.is_empty}
    tissue = [shapely.Point(400, 300).buffer(250), shapely.box(800, 100, 900, 333)]
    points = [(float(x), float(y)) for x, y in places]
    found = counted(tmp_path_factory.mktemp("parts"), parts, points, tissue=tissue)
    assert sum(one["nuclei"] for one in found.values()) == len(points)
    assert found[ELSEWHERE]["nuclei"] == 0
    assert sum(one["area_mm2"] for one in found.values()) == pytest.approx(0.8, abs=1e-4)
    assert sum(one["tissue_mm2"] for one in found.values()) == pytest.approx(
        sum(t.area for t in tissue) / 1e6, abs=1e-4
    )
    for kind in testing.CLASSES:
        total = sum(one["composition"][kind["name"]]["count"] for one in found.values())
        assert total == sum(number % 2 == testing.CLASSES.index(kind) for number in range(len(points)))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_points_are_looked_up_as_one_by_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    areas = [
        shapely.make_valid(shapely.Polygon(rng.uniform(0, 100, (7, 2))), method="structure", keep_collapsed=False),
        shapely.box(10, 10, 60, 60).difference(shapely.box(20, 20, 40, 50)),
        shapely.MultiPolygon([shapely.box(0, 0, 5, 5), shapely.box(90, 90, 95, 95)]),
        shapely.MultiPolygon(),
    ]
    points = rng.uniform(-10, 110, (300, 2))
    expected = [[area.contains(shapely.Point(point)) for area in areas] for point in points]
    np.testing.assert_array_equal(inside(points, areas), expected)


def test_names(tmp_path: Path) -> None:
    found, warnings = read(
        tmp_path,
        feature([square(0, 0, 10)], name="Tumour"),
        feature([square(20, 0, 10)], classification={"name": "Stroma", "color": [1, 2, 3]}),
        feature([square(40, 0, 10)]),
        feature([square(60, 0, 10)], name="  ", classification={"names": ["Tumor", "Positive"]}),
        feature([square(5, 0, 10)], name="Tumour", classification={"name": "Other"}),
        feature([square(80, 0, 10)], name='=1+1 <b>"日本\n$x$'),
        feature([square(100, 0, 10)], name="\ud800"),
        feature([square(120, 0, 10)], name=7, classification={"name": "Region*"}),
        feature([square(140, 0, 10)], name="out", classification={"name": "Ignore*"}),
        {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [square(160, 0, 10)]}},
        feature([square(180, 0, 10)], kind="detection"),
        feature([square(200, 0, 10)], kind="cell"),
    )  # fmt: skip
    assert list(found) == [
        "Tumour", "Stroma", "region 3", "Tumor: Positive", '=1+1 <b>"日本 $x$', "?", "7", "region 9"
    ]  # fmt: skip
    assert found["Tumour"].area == 150  # of both, once where they overlap
    assert found["Stroma"].equals(shapely.box(20, 0, 30, 10))
    assert warnings == ["objects left out, as detections, cells, frames or of class Ignore*: 3"]


def test_shapes(tmp_path: Path) -> None:
    twice = [[0, 0], [30, 0], [30, 30], [0, 30], [0, 0], [10, 10], [20, 10], [20, 20], [10, 20], [10, 10], [0, 0]]
    bow = [[0, 0], [100, 100], [100, 0], [0, 100], [0, 0]]
    parts = [[square(0, 0, 10)], [square(50, 50, 20), square(55, 55, 10)]]
    found, warnings = read(
        tmp_path,
        feature({"type": "MultiPolygon", "coordinates": parts}, name="parts"),
        feature([bow], name="bow"),
        feature([twice], name="twice"),
        feature([square(990, 0, 100)], name="cut"),
        feature({"type": "Point", "coordinates": [1, 1]}, name="point"),
        feature({"type": "LineString", "coordinates": [[0, 0], [5, 5]]}, name="line"),
        feature([[[0, 0], [5, 5], [9, 9], [0, 0]]], name="flat"),
        feature([square(5000, 5000, 10)], name="far"),
        feature([square(0, 0, 1e200)], name="huge"),
        feature(None, name="nothing"),
    )
    assert {name: area.area for name, area in found.items()} == {
        "parts": 400, "bow": 5000, "twice": 900, "cut": 1000, "far": 0, "huge": 800_000
    }  # fmt: skip
    assert all(area.is_valid for area in found.values())
    assert warnings == [
        "objects left out, as points, lines or without an area: 3",
        "objects outside of the slide (are they in level-0 pixels?): 1",
    ]


def test_regions_that_count_from_another_pixel(tmp_path: Path) -> None:
    found, _ = read(tmp_path, feature([square(0, 0, 10)], name="a"), level0_origin=[200, 100])
    assert found["a"].bounds == (200, 100, 210, 110)


def test_a_file_without_annotations(tmp_path: Path) -> None:
    found, warnings = read(tmp_path)
    assert (found, warnings) == ({}, ["r.geojson holds no annotation"])


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"nonsense", "no JSON"),
        (b'{"type": "FeatureCollection"}', "it is not GeoJSON"),
        (b'{"type": "FeatureCollection", "features": [{"geometry": 7}]}', "it is not GeoJSON"),
        (b"\x1f\x8b\x08\x00broken", "no JSON"),
        (json.dumps(feature({"type": "Point", "coordinates": [1, 1]})).encode(), "no annotation has an area"),
        (json.dumps(feature([square(0, 0, 9)], kind="detection")).encode(), "no annotation has an area"),
        (json.dumps(feature([square(5000, 0, 9)])).encode(), "no annotation lies on the slide"),
        (json.dumps(feature([square(0, 0, 9)], name=ELSEWHERE)).encode(), "one is called"),
    ],
)  # fmt: skip
def test_bad_files(tmp_path: Path, content: bytes, why: str) -> None:
    (tmp_path / "r.geojson").write_bytes(content)
    with pytest.raises(SlideError, match=rf"regions .*r\.geojson: {why}"):
        read_regions(tmp_path / "r.geojson", BOX)
    with pytest.raises(SlideError, match=r"regions .*none\.geojson does not exist"):
        read_regions(tmp_path / "none.geojson", BOX)


BOUNDS = "--origin=bounds"


def stage(paths: SlideLayout, regions: Path, nuclei: Path | None = None, *more: str) -> dict[str, Any]:
    words = [
        "regions", f"--slide={paths.root.name}", f"--inspect={paths.inspect}", f"--tissue={paths.tissue}",
        f"--tissue-geojson={paths.tissue_geojson}", f"--tissue-png={paths.tissue_png}", f"--measure={paths.measure}",
        f"--nuclei={nuclei or paths.nuclei}", f"--regions={regions}", f"--out={paths.regions}",
        f"--png={paths.regions_png}", *more,
    ]  # fmt: skip
    assert cli.main(words) == 0
    return read_manifest(paths.regions)


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> SlideLayout:
    paths = testing.write_slide(tmp_path_factory.mktemp("run"), "a $x$ <b>", count=300)
    Image.new("RGB", (800, 600), "pink").save(paths.tissue_png)
    return paths


def test_stage(slide: SlideLayout, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    half = [[0, 0], [1200, 0], [1200, 1800], [0, 1800], [0, 0]]
    path = tmp_path / "r.geojson.gz"
    path.write_bytes(gzip.compress(json.dumps([feature([half], name="$left_$"), feature(None)]).encode()))
    manifest = stage(slide, path)
    assert (manifest["stage"], manifest["status"]) == ("regions", "ok")
    left, rest = manifest["regions"]
    assert (left["region"], rest["region"]) == ("$left_$", ELSEWHERE)
    nuclei = read_nuclei(slide.nuclei)
    here = nuclei["centroid_x"].to_numpy() < 1200
    assert (left["nuclei"], rest["nuclei"]) == (here.sum(), 300 - here.sum())
    area = nuclei["area_um2"].to_numpy().astype(np.float64)
    assert left["quantiles"]["area_um2"]["50"] == round(float(np.median(area[here])), 4)
    total = read_manifest(slide.tissue)["area_mm2"]
    assert left["tissue_mm2"] + rest["tissue_mm2"] == pytest.approx(total, abs=2e-6)
    assert left["area_mm2"] == 1200 * 1800 / 16e6
    assert (manifest["classifier"], manifest["warnings"]) == (None, [])
    with Image.open(slide.regions_png) as picture:
        assert picture.width == 1430
        colour = tuple(int(region_map.COLOURS[0][i : i + 2], 16) for i in (1, 3, 5))
        assert any(pixel == colour for _, pixel in picture.convert("RGB").getcolors(1 << 24) or ())
    before = slide.regions_png.read_bytes()
    stage(slide, path)
    assert slide.regions_png.read_bytes() == before


def test_stage_of_a_slide_that_was_scanned_in_part(slide: SlideLayout, tmp_path: Path) -> None:
    own = json.loads(slide.inspect.read_text())
    slide.inspect.write_text(json.dumps(own | {"bounds": [100, 100, 1000, 1000]}))
    try:
        manifest = stage(slide, write(tmp_path / "r.geojson", feature([square(0, 0, 300)], name="a")))
        qupath = stage(slide, write(tmp_path / "q.geojson", feature([square(-100, -100, 300)], name="a")), None, BOUNDS)
        said = write(tmp_path / "o.geojson", feature([square(0, 0, 300)], name="a"), level0_origin=[0, 0])
        own_origin = stage(slide, said, None, BOUNDS)
    finally:
        slide.inspect.write_text(json.dumps(own))
    assert [one["area_mm2"] for one in manifest["regions"]] == [0.0025, 0.06]
    assert qupath["regions"] == own_origin["regions"] == manifest["regions"]


def test_stage_with_a_bad_file_or_none(slide: SlideLayout, tmp_path: Path) -> None:
    (tmp_path / "r.geojson").write_text("nonsense")
    manifest = stage(slide, tmp_path / "r.geojson")
    assert manifest["failure"]["stage"] == "regions"
    assert "r.geojson: no JSON" in manifest["failure"]["reason"]
    assert manifest["failure"]["hint"] == "give GeoJSON polygons in level-0 pixels"
    assert slide.regions_png.read_bytes().startswith(b"slide ")
    assert stage(slide, tmp_path / "none.geojson")["failure"]["reason"].endswith("none.geojson does not exist")


def test_stage_of_a_slide_that_failed_before(tmp_path: Path) -> None:
    paths = testing.write_failed_slide(tmp_path, "bad", "inspect", "cut short")
    assert stage(paths, tmp_path / "none.geojson")["failure"]["stage"] == "inspect"


def test_picture_of_many_regions_of_a_narrow_slide(tmp_path: Path) -> None:
    Image.new("RGB", (100, 900), "pink").save(tmp_path / "t.png")
    areas = [(f"{number} " + "n" * 60, shapely.box(0, 10 * number, 20, 10 * number + 5)) for number in range(40)]
    areas.append(("empty", shapely.MultiPolygon()))
    counts = [{"region": name, "nuclei": 5, "nuclei_per_mm2": None} for name, _ in [*areas, (ELSEWHERE, None)]]
    region_map.draw_regions(
        tmp_path / "r.png", slide="s" * 200, tissue=tmp_path / "t.png", size=(100, 900), mpp=(1.0, 0.5), regions=areas,
        counts=counts,
    )  # fmt: skip
    with Image.open(tmp_path / "r.png") as picture:
        assert picture.height < 1200


def test_layout_has_their_files(tmp_path: Path) -> None:
    layout = RunLayout(tmp_path)
    assert layout.slide("a").regions.name == "regions.json"
    assert (layout.regions_tsv.name, layout.regions_parquet.name) == ("regions.tsv", "regions.parquet")
