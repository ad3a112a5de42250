"""Finding tissue: pale, dark, inked, empty and full views; polygons; a user's mask; the stage."""

from __future__ import annotations

import errno
import gzip
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.batch.stage import read_manifest
from pipeline.errors import SlideError
from pipeline.kernels.tissue import background_colour, fill_small, find_tissue, remove_small, thumbnail_mpp
from pipeline.slides.inspect import run_inspect
from pipeline.slides.open import open_slide
from pipeline.slides.regions import read_region
from pipeline.slides.slide import level_of
from pipeline.slides.synthetic import write_svs
from pipeline.stores.grid import Grid
from pipeline.stores.lattice import active_cells
from pipeline.tissue import bounds_view, polygons_of, read_mask, read_tissue, read_view, run_tissue

HEMATOXYLIN = np.array([0.65, 0.70, 0.29])
EOSIN = np.array([0.07, 0.99, 0.11])
BOX = shapely.box(0, 0, 1000, 800)


def view(
    tissue: np.ndarray, strength: float = 1.0, background: tuple[int, int, int] = (244, 243, 244), seed: int = 0
) -> np.ndarray:
    """A view of a slide that is H&E where `tissue` is set."""
    rng = np.random.default_rng(seed)
    shape = tissue.shape
    nuclei = cv2.GaussianBlur(rng.random(shape).astype(np.float32), (0, 0), 1.5)
    nuclei = np.clip((nuclei - 0.45) * 4, 0.05, 1)
    stroma = 0.25 + 0.1 * cv2.GaussianBlur(rng.random(shape).astype(np.float32), (0, 0), 4)
    od = strength * (0.45 * nuclei[..., None] * HEMATOXYLIN + stroma[..., None] * EOSIN)
    rgb = np.asarray(background) * 10 ** -(od * tissue[..., None])
    rgb += rng.normal(0, 1.5, (*shape, 3))
    return np.clip(np.rint(rgb), 0, 255).astype(np.uint8)


def blob(side: int = 300) -> np.ndarray:
    mask = np.zeros((side, side), np.uint8)
    cv2.ellipse(mask, (side // 2, side // 2), (side // 3, side // 4), 20, 0, 360, 1, -1)
    return mask


def overlap(one: np.ndarray, two: np.ndarray) -> float:
    return float((one & two).sum() / max((one | two).sum(), 1))


@pytest.mark.parametrize("strength", [0.25, 0.5, 1.0, 2.5])
@pytest.mark.parametrize("background", [(255, 255, 255), (244, 243, 244), (225, 227, 231), (196, 198, 200)])
def test_pale_and_dark(strength: float, background: tuple[int, int, int]) -> None:
    truth = blob()
    found = find_tissue(view(truth, strength, background), 8.0)
    assert overlap(found.mask, truth.astype(bool)) > 0.93
    assert found.background_found
    assert np.abs(np.subtract(found.background, background)).max() < 4


@pytest.mark.parametrize("strength", [0.5, 1.0, 2.0])
def test_full_view(strength: float) -> None:
    found = find_tissue(view(np.ones((120, 120), np.uint8), strength), 8.0)
    assert not found.background_found
    assert found.mask.mean() > 0.99


@pytest.mark.parametrize(
    "ink",
    [
        (40, 60, 160),
        (30, 60, 190),
        (20, 120, 70),
        (10, 90, 50),
        (25, 25, 28),
        (60, 60, 62),
        (200, 25, 35),
        (90, 95, 200),
    ],
)
def test_pen_marks(ink: tuple[int, int, int]) -> None:
    truth = blob()
    rgb = view(truth)
    cv2.ellipse(rgb, (150, 150), (135, 120), 0, 0, 360, ink, 5)
    cv2.putText(rgb, "A 12", (10, 40), cv2.FONT_HERSHEY_SIMPLEX, 1, ink, 4)
    found = find_tissue(rgb, 8.0)
    assert overlap(found.mask, truth.astype(bool)) > 0.9
    assert found.ink.any()


def test_empty_and_dust() -> None:
    rng = np.random.default_rng(0)
    empty = view(np.zeros((300, 300), np.uint8))
    assert not find_tissue(empty, 8.0).mask.any()
    assert not find_tissue(np.full((50, 60, 3), 255, np.uint8), 8.0).mask.any()
    assert not find_tissue(np.zeros((50, 60, 3), np.uint8), 8.0).mask.any()
    assert not find_tissue(np.full((1, 1, 3), 255, np.uint8), 8.0).mask.any()
    for _ in range(60):
        x, y = (int(v) for v in rng.integers(0, 300, 2))
        grey = int(rng.integers(40, 200))
        cv2.circle(empty, (x, y), int(rng.integers(0, 4)), (grey, grey, grey), -1)
    cv2.line(empty, (10, 290), (280, 12), (190, 190, 192), 2)  # a coverslip's edge
    assert not find_tissue(empty, 8.0).mask.any()


def test_black_border() -> None:
    truth = blob()
    rgb = view(truth)
    rgb[:30], rgb[:, -25:] = 3, 8
    assert overlap(find_tissue(rgb, 8.0).mask, truth.astype(bool)) > 0.93


def test_nearly_empty() -> None:
    truth = np.zeros((600, 600), np.uint8)
    cv2.circle(truth, (430, 120), 12, 1, -1)
    found = find_tissue(view(truth, 0.6), 8.0)
    assert overlap(found.mask, truth.astype(bool)) > 0.8


def test_rules_in_um2() -> None:
    truth = np.zeros((300, 300), np.uint8)
    truth[50:250, 50:250] = 1
    truth[100:106, 100:106] = 0  # 36 pixels: 2304 µm²
    truth[180:200, 180:200] = 0  # 400 pixels: 25,600 µm²
    truth[10:18, 10:18] = 1  # 64 pixels: 4096 µm²
    rgb = view(truth)
    mask = find_tissue(rgb, 8.0, 10_000, 5_000).mask
    assert mask[103, 103]
    assert not mask[190, 190]
    assert not mask[14, 14]
    assert find_tissue(rgb, 8.0, 1_000, 5_000).mask[14, 14]
    assert find_tissue(rgb, 8.0, 10_000, 50_000).mask[190, 190]


def test_small_parts_and_holes() -> None:
    mask = np.zeros((20, 20), bool)
    mask[2:10, 2:10] = True
    mask[5, 5] = False
    mask[15, 15] = True
    assert remove_small(mask, 2).sum() == 63
    assert fill_small(mask, 2).sum() == 65
    full = np.ones((5, 5), bool)
    assert fill_small(full, 9).all()
    assert remove_small(~full, 1).sum() == 0
    edge = ~np.eye(4, dtype=bool)
    edge[1:3] = True
    assert not fill_small(edge, 9)[0, 0], "a bay at the edge is not a hole"


def test_background_ignores_pale_tissue() -> None:
    pale = np.full((100, 100, 3), (215, 198, 206), np.uint8)
    assert background_colour(pale)[1] is False
    pale[:20] = (236, 236, 238)
    colour, found = background_colour(pale)
    assert found
    assert colour == pytest.approx((236, 236, 238))


def test_filler_is_no_glass() -> None:
    glass = (225, 222, 230)
    whole = view(blob(), background=glass)
    filled = whole.copy()
    filled[:, 200:] = 255
    expected, found = find_tissue(whole, 8), find_tissue(filled, 8)
    np.testing.assert_allclose(found.background, expected.background, atol=2)
    assert overlap(found.mask[:, :190], expected.mask[:, :190]) > 0.95
    assert not found.mask[:, 210:].any()


def test_thumbnail_mpp() -> None:
    assert thumbnail_mpp(20_000, 15_000, 0.25, 8) == 8
    assert thumbnail_mpp(250, 250, 0.25, 8) == pytest.approx(250 / 64)
    assert thumbnail_mpp(25, 25, 0.5, 8) == 0.5
    assert thumbnail_mpp(200_000, 200_000, 0.25, 8) > 8


@pytest.mark.parametrize("folder", ["monuseg/images/*.tif"])
def test_real_fields_are_tissue(shared_data: Path, folder: str) -> None:
    for path in sorted(shared_data.glob(folder)):
        with open_slide(path) as slide:
            mpp = thumbnail_mpp(slide.width * 0.25, slide.height * 0.25, 0.25, 8)
            grid = Grid.for_slide(slide.width, slide.height, 0.25, 0.25, mpp)
            rgb = read_region(slide, grid, 0, 0, grid.width, grid.height)
        assert find_tissue(rgb, mpp).mask.mean() > 0.97, path.name


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), share=st.floats(0.05, 0.95))
def test_polygons_follow_the_mask(seed: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    mask = cv2.GaussianBlur(rng.random((40, 50)).astype(np.float32), (0, 0), 2)
    mask = mask > np.quantile(mask, share)
    polygons = polygons_of(mask, 20.0, 20.0, 995.0, 800.0)
    assert all(p.is_valid and p.geom_type == "Polygon" for p in polygons)
    covered = shapely.union_all(polygons)
    assert covered.area == pytest.approx(sum(p.area for p in polygons)), "parts do not overlap"
    centres = [(x, y) for y in range(40) for x in range(49)]
    inside = shapely.contains_xy(covered, [20.0 * x + 10 for x, _ in centres], [20.0 * y + 10 for _, y in centres])
    np.testing.assert_array_equal(inside, [mask[y, x] for x, y in centres])


def test_polygon_of_everything() -> None:
    (polygon,) = polygons_of(np.ones((40, 50), bool), 20.0, 20.0, 1000.0, 800.0)
    assert polygon.equals(BOX)
    assert polygons_of(np.zeros((40, 50), bool), 20.0, 20.0, 1000.0, 800.0) == []


def write(path: Path, value: Any) -> Path:
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


SQUARE = {"type": "Polygon", "coordinates": [[[10, 10], [110, 10], [110, 110], [10, 110], [10, 10]]]}
MANY = {
    "type": "MultiPolygon",
    "coordinates": [SQUARE["coordinates"], [[[500, 500], [600, 500], [600, 1e4], [500, 500]]]],
}


@pytest.mark.parametrize(
    ("value", "count"),
    [
        (SQUARE, 1),
        (MANY, 2),
        ({"type": "Feature", "geometry": SQUARE}, 1),
        ({"type": "FeatureCollection", "features": [{"type": "Feature", "geometry": MANY}]}, 2),
        ([{"type": "Feature", "geometry": SQUARE}], 1),
        ({"type": "FeatureCollection", "features": []}, 0),
        ({"type": "GeometryCollection", "geometries": [SQUARE, {"type": "Point", "coordinates": [1, 2]}]}, 1),
        ({"type": "Polygon", "coordinates": [[[0, 0], [100, 100], [100, 0], [0, 100], [0, 0]]]}, 2),  # a bow tie
    ],
)
def test_user_mask(tmp_path: Path, value: Any, count: int) -> None:
    polygons = read_mask(write(tmp_path / "mask.geojson", value), BOX)
    assert len(polygons) == count
    assert all(p.is_valid and BOX.covers(p) for p in polygons)
    packed = tmp_path / "mask.geojson.gz"
    packed.write_bytes(gzip.compress(json.dumps(value).encode()))
    assert len(read_mask(packed, BOX)) == count


def drawn(kind: str, left: float, *, named: str = "", by: str = "objectType", size: float = 100) -> dict[str, Any]:
    """A square that QuPath has exported as an object of some kind and class."""
    x, y = [left, left + size, left + size, left, left], [0, 0, size, size, 0]
    properties = {by: kind} | ({"classification": {"name": named}} if named else {})
    ring = [list(point) for point in zip(x, y, strict=True)]
    return {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}, "properties": properties}


@pytest.mark.parametrize(
    ("features", "area"),
    [
        ([drawn("annotation", 0), drawn("annotation", 300, named="Ignore*")], 1e4),
        ([drawn("annotation", 0), drawn("annotation", 50, named="Ignore*")], 5e3),
        ([drawn("annotation", 0), drawn("detection", 300), drawn("cell", 500)], 1e4),
        ([drawn("annotation", 0), drawn("tile", 300), drawn("tmaCore", 500)], 1e4),
        ([drawn("detection", 0), drawn("detection", 300, named="Tissue")], 2e4),
        ([drawn("annotation", 0, named="Tumor"), drawn("", 300)], 2e4),
    ],
)
def test_what_of_a_qupath_export_is_tissue(tmp_path: Path, features: list[dict[str, Any]], area: float) -> None:
    path = write(tmp_path / "mask.geojson", {"type": "FeatureCollection", "features": features})
    polygons = read_mask(path, BOX)
    assert sum(polygon.area for polygon in polygons) == pytest.approx(area)
    assert all(polygon.is_valid for polygon in polygons)


@pytest.mark.parametrize(
    "features",
    [
        [drawn("annotation", 0, named="Ignore*")],
        [drawn("tile", 0)],
        [drawn("annotation", 0), drawn("annotation", 0, named="Ignore*", size=200)],
    ],
)
def test_a_qupath_export_without_tissue(tmp_path: Path, features: list[dict[str, Any]]) -> None:
    with pytest.raises(SlideError, match=r"Ignore\*"):
        read_mask(write(tmp_path / "mask.geojson", {"type": "FeatureCollection", "features": features}), BOX)


@pytest.mark.parametrize("turns", [1.25, 2.0])
def test_an_outline_that_overshoots_its_start(tmp_path: Path, turns: float) -> None:
    # By hand, an outline is rarely closed where it began: what it goes around twice is still inside.
    angle = np.linspace(0, 2 * np.pi * turns, 400)
    radius = 200 + 20 * angle / angle[-1]
    ring = np.column_stack([500 + radius * np.cos(angle), 400 + radius * np.sin(angle)]).tolist()
    value = {"type": "Polygon", "coordinates": [[*ring, ring[0]]]}
    polygons = read_mask(write(tmp_path / "mask.geojson", value), BOX)
    assert sum(polygon.area for polygon in polygons) > np.pi * 200**2


def test_a_user_mask_that_counts_from_another_pixel(tmp_path: Path) -> None:
    value = {"type": "FeatureCollection", "level0_origin": [300, 200], "features": [SQUARE]}
    (polygon,) = read_mask(write(tmp_path / "mask.geojson", value), BOX)
    assert polygon.bounds == (310, 210, 410, 310)


@pytest.mark.parametrize(
    "value",
    [
        "",
        "no json",
        "[1, 2",
        "3",
        {"type": "FeatureCollection"},
        {"type": "Polygon"},
        {"type": "Polygon", "coordinates": [[["a", 1]]]},
        {"type": "Polygon", "coordinates": [[[1, 1], [2, 2]]]},
        {"type": "Nonsense", "coordinates": []},
        {"type": "LineString", "coordinates": [[0, 0], [5, 5]]},
        {"type": "Polygon", "coordinates": [[[5000, 5000], [6000, 5000], [6000, 6000], [5000, 5000]]]},
        '{"type": "Polygon", "coordinates": [[[0, 0], [NaN, 5], [5, 5], [0, 0]]]}',
        {"type": "FeatureCollection", "features": [3]},
        {"type": "FeatureCollection", "features": [], "level0_origin": "here"},
        '{"type": "FeatureCollection", "level0_origin": [1e999, 0], "features": [{"type": "Feature", "geometry": '
        '{"type": "Polygon", "coordinates": [[[0, 0], [5, 0], [5, 5], [0, 0]]]}}]}',
    ],
)
def test_bad_user_mask(tmp_path: Path, value: Any) -> None:
    path = write(tmp_path / "mask.geojson", value)
    with pytest.raises(SlideError, match=r"tissue mask .*mask\.geojson: ") as caught:
        read_mask(path, BOX)
    assert "\n" not in str(caught.value)


def test_damaged_gzipped_mask(tmp_path: Path) -> None:
    header = gzip.compress(json.dumps(SQUARE).encode())[:10]
    (tmp_path / "mask.geojson.gz").write_bytes(header + b"\xff" * 40)
    with pytest.raises(SlideError, match=r"tissue mask .*mask\.geojson\.gz: no JSON"):
        read_mask(tmp_path / "mask.geojson.gz", BOX)


def test_missing_user_mask(tmp_path: Path) -> None:
    with pytest.raises(SlideError, match=r"tissue mask .*none\.geojson does not exist \(check the path"):
        read_mask(tmp_path / "none.geojson", BOX)


def test_a_file_server_that_fails_over_a_user_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stale(self: Path) -> None:
        raise OSError(errno.ESTALE, "Stale file handle", str(self))

    path = write(tmp_path / "mask.geojson", SQUARE)
    monkeypatch.setattr(Path, "read_bytes", stale)
    with pytest.raises(OSError, match="Stale file handle"):
        read_mask(path, BOX)


@pytest.fixture
def slide(tmp_path: Path) -> Path:
    truth = cv2.resize(blob(200), (1600, 1200), interpolation=cv2.INTER_NEAREST)
    write_svs(tmp_path / "s.svs", view(truth), 1.0)
    run_inspect("s", tmp_path / "s.svs", tmp_path / "slide.json")
    return tmp_path


def run(folder: Path, **options: Any) -> dict[str, Any]:
    return run_tissue(
        "s", folder / "slide.json", folder / "tissue.json", folder / "tissue.geojson", folder / "tissue.png", **options
    )


def test_stage(slide: Path) -> None:
    run(slide)
    manifest = read_manifest(slide / "tissue.json")
    truth = np.pi * 1600 / 3 * 1200 / 4 / 1e6
    assert manifest["area_mm2"] == pytest.approx(truth, rel=0.05)
    assert manifest["fraction"] == pytest.approx(manifest["area_mm2"] / 1.92, rel=1e-3)
    assert manifest["parts"] == 1
    (polygon,) = read_tissue(slide / "tissue.geojson")
    assert polygon.area / 1e6 == pytest.approx(manifest["area_mm2"], rel=1e-3)
    picture = np.asarray(Image.open(slide / "tissue.png"))
    assert max(picture.shape) <= 1600
    assert (picture == (0, 160, 60)).all(axis=2).any()


def test_stage_with_a_mask(slide: Path) -> None:
    mask = write(slide / "mask.geojson", SQUARE)
    assert run(slide, mask=mask)["area_mm2"] == pytest.approx(0.01)
    assert read_manifest(slide / "tissue.json")["method"] == "mask"
    write(mask, "nonsense")
    manifest = run(slide, mask=mask)
    assert manifest["status"] == "failed"
    assert manifest["failure"]["stage"] == "tissue"


def test_a_hole_that_touches_the_edge(slide: Path) -> None:
    shell = [[1603, 676], [910, 1548], [285, 626], [1603, 676]]
    hole = [
        [1275.835577553945, 1087.6700957762769], [1244.2964793379044, 1058.855424448654],
        [1233.126610079861, 1086.6984490824507], [1275.835577553945, 1087.6700957762769],
    ]  # fmt: skip
    mask = write(slide / "mask.geojson", {"type": "Polygon", "coordinates": [shell, hole]})
    run(slide, mask=mask)
    polygons = read_tissue(slide / "tissue.geojson")
    assert polygons and all(polygon.is_valid for polygon in polygons)
    active_cells(polygons, Grid(1600, 1200, 1.0, 1.0, 1.0))


def test_a_damaged_overview_costs_no_tissue(slide: Path) -> None:
    class Damaged:
        """A pyramid of which the coarsest level does not decode everywhere."""

        def __init__(self, level_0_too: bool) -> None:
            self.level_0_too = level_0_too
            self.levels = (level_of(1600, 1200, 1600, 1200), level_of(400, 300, 1600, 1200))

        def in_strips(self, level: int) -> bool:
            return False

        def read(self, level: int, x: int, y: int, w: int, h: int) -> np.ndarray:
            factor = (1, 4)[level]
            if x * factor < 500 and y * factor < 500 and (level or self.level_0_too):
                raise SlideError("cannot decode")
            return np.full((h, w, 3), 100 + level, np.uint8)

    grid = Grid(200, 150, 8.0, 8.0, 8.0)
    rgb, unreadable, finer = read_view(Damaged(False), grid)  # type: ignore[arg-type]
    assert unreadable == 0
    assert 0.05 < finer < 0.3
    assert rgb.max() == 101
    assert rgb.min() == 100
    rgb, unreadable, finer = read_view(Damaged(True), grid)  # type: ignore[arg-type]
    assert 0.05 < unreadable < 0.3
    assert finer == 0
    assert (rgb[:50, :50] == 255).all()


def test_stage_without_tissue(tmp_path: Path) -> None:
    Image.fromarray(view(np.zeros((400, 500), np.uint8))).save(tmp_path / "white.png")
    run_inspect("s", tmp_path / "white.png", tmp_path / "slide.json", mpp=1.0)
    manifest = run(tmp_path)
    assert (manifest["status"], manifest["area_mm2"], manifest["parts"]) == ("ok", 0, 0)
    assert read_tissue(tmp_path / "tissue.geojson") == []


def test_stage_keeps_to_the_bounds(slide: Path) -> None:
    info = read_manifest(slide / "slide.json") | {"bounds": [0, 0, 800, 1200]}
    write(slide / "slide.json", info)
    run(slide)
    assert max(p.bounds[2] for p in read_tissue(slide / "tissue.geojson")) <= 800


def test_a_user_mask_that_counts_from_the_bounds(slide: Path) -> None:
    write(slide / "slide.json", read_manifest(slide / "slide.json") | {"bounds": [300, 200, 800, 600]})
    mask = write(slide / "mask.geojson", SQUARE)
    assert "no polygon lies on the slide" in run(slide, mask=mask)["failure"]["reason"]
    run(slide, mask=mask, origin="bounds")
    assert read_tissue(slide / "tissue.geojson")[0].bounds == (310, 210, 410, 310)


def test_bounds_reach_to_the_last_strip() -> None:
    grid = Grid(101, 51, 8.0, 10.0, 10.0)  # of 1004 x 503 pixels
    assert bounds_view([0, 0, 1004, 503], grid) == (slice(0, 51), slice(0, 101))
    assert bounds_view([200, 95, 304, 210], grid) == (slice(9, 31), slice(20, 51))
    assert bounds_view([1003, 502, 9, 9], grid) == (slice(50, 51), slice(100, 101))


def test_what_was_not_scanned_is_no_glass(tmp_path: Path) -> None:
    truth = cv2.resize(blob(200), (1600, 1200), interpolation=cv2.INTER_NEAREST)
    scan = np.minimum(view(truth), np.array([214, 220, 226], np.uint8))
    canvas = np.full((2400, 3200, 3), 255, np.uint8)
    canvas[600:1800, 800:2400] = scan
    areas = []
    for name, image, bounds in (("scan", scan, None), ("canvas", canvas, [800, 600, 1600, 1200])):
        write_svs(tmp_path / f"{name}.svs", image, 1.0)
        run_inspect("s", tmp_path / f"{name}.svs", tmp_path / "slide.json")
        write(tmp_path / "slide.json", read_manifest(tmp_path / "slide.json") | {"bounds": bounds})
        areas.append(run(tmp_path)["area_mm2"])
    assert areas[1] == pytest.approx(areas[0], rel=0.02)


def test_real_slides(shared_data: Path, tmp_path: Path) -> None:
    # What an eye sees on these three, give or take a few per cent.
    expected = {"cmu-1-small-region": 0.63, "monuseg-mosaic": 1.9, "tcga-cr-7395-01a-01-ts1": 9.9}
    for name, area in expected.items():
        path = shared_data / "slides" / f"{name}.svs"
        run_inspect("s", path, tmp_path / "slide.json", mpp=1.0 if name.startswith("tcga") else None)
        assert run(tmp_path)["area_mm2"] == pytest.approx(area, rel=0.05)
