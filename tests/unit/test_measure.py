from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import measure
from pipeline.batch.stage import write_json
from pipeline.kernels import stain as stain_kernel
from pipeline.kernels.contours import every_second, outlines, pixel_runs
from pipeline.kernels.measure import StainSums, cut_runs, hull_areas, hull_diameters, hulls, polygon_shapes
from pipeline.stores.grid import Grid
from pipeline.stores.nuclei import RUNS_FIELD, nuclei_schema, open_nuclei
from pipeline.testing import pixels_of

GRID = Grid(700, 500, 0.5, 2.0, 2.0)


def shapes(*polygons: shapely.Polygon, grid: Grid | None = None) -> dict[str, np.ndarray]:
    return measure.measure_shapes(
        pa.array([shapely.to_wkb(p) for p in polygons], pa.binary()), grid or Grid(4000, 4000, 1.0, 1.0, 1.0)
    )


def blobs(count: int, seed: int = 1) -> np.ndarray:
    """Labels of bent ellipses on a lattice, int32."""
    random = np.random.default_rng(seed)
    side = int(np.ceil(np.sqrt(count)))
    labels = np.zeros((side * 60, side * 60), np.int32)
    y, x = np.mgrid[-30:30, -30:30] + random.uniform(-0.5, 0.5, (2, 1, 1))
    for label in range(1, count + 1):
        turn, a, b = random.uniform(0, np.pi), random.uniform(7, 20), random.uniform(5, 12)
        u, v = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
        mask = (u / a) ** 2 + ((v + random.uniform(-0.02, 0.02) * u**2) / b) ** 2 < 1
        row, column = divmod(label - 1, side)
        labels[row * 60 : row * 60 + 60, column * 60 : column * 60 + 60][mask] = label
    return labels


def polygon_of(mask: np.ndarray, top: int, left: int, scale: float = 1.0) -> shapely.Polygon:
    found = outlines(*pixel_runs(pixels_of(mask.astype(np.int32))))
    points = (found.points / 2 + (left, top)) * scale
    rings = [points[a:b] for a, b in itertools.pairwise(found.rings)]
    return shapely.Polygon(rings[0], rings[1:])


def test_rectangle_with_a_hole() -> None:
    # 6 x 2 with a unit hole in its middle: variances are (12*3 - 1/12)/11 and (12*1/3 - 1/12)/11.
    shell = [(10, 20), (16, 20), (16, 22), (10, 22)]
    hole = [(12.5, 20.5), (13.5, 20.5), (13.5, 21.5), (12.5, 21.5)]
    for turn in (shell, shell[::-1]):
        for inner in (hole, hole[::-1]):
            found = {name: value[0] for name, value in shapes(shapely.Polygon(turn, [inner])).items()}
            assert found["area_um2"] == pytest.approx(11)
            assert (found["centroid_x"], found["centroid_y"]) == pytest.approx((13, 21))
            assert found["perimeter_um"] == pytest.approx(16)
            assert found["major_axis_um"] == pytest.approx(4 * np.sqrt((36 - 1 / 12) / 11))
            assert found["minor_axis_um"] == pytest.approx(4 * np.sqrt((4 - 1 / 12) / 11))
            assert found["solidity"] == pytest.approx(11 / 12)
            assert found["max_diameter_um"] == pytest.approx(np.hypot(6, 2))
            assert found["min_diameter_um"] == pytest.approx(2)
            assert found["circularity"] == pytest.approx(4 * np.pi * 11 / 256)
            assert found["orientation"] == pytest.approx(0)


def test_ellipse_and_circle() -> None:
    turn = np.linspace(0, 2 * np.pi, 2000, endpoint=False)
    tilt = 0.6
    x, y = 12 * np.cos(turn), 5 * np.sin(turn)
    points = np.stack([x * np.cos(tilt) - y * np.sin(tilt), x * np.sin(tilt) + y * np.cos(tilt)], axis=1) + 1000
    circle = np.stack([np.cos(turn), np.sin(turn)], axis=1) * 7 + 100
    found = shapes(shapely.Polygon(points), shapely.Polygon(circle))
    assert found["major_axis_um"] == pytest.approx([24, 14], rel=1e-4)
    assert found["minor_axis_um"] == pytest.approx([10, 14], rel=1e-4)
    assert found["orientation"][0] == pytest.approx(tilt, abs=1e-4)
    assert found["eccentricity"] == pytest.approx([np.sqrt(1 - 25 / 144), 0], abs=1e-3)
    assert found["circularity"][1] == pytest.approx(1, abs=1e-5)
    assert found["circularity"].max() <= 1
    assert found["solidity"] == pytest.approx([1, 1])
    assert found["max_diameter_um"] == pytest.approx([24, 14], rel=1e-4)
    assert found["min_diameter_um"] == pytest.approx([10, 14], rel=1e-4)


def test_pixels_that_are_not_square_and_levels_that_are_scaled() -> None:
    # A square of 20 x 20 µm on a slide of 0.25 x 0.5 µm pixels, grid of 1 µm.
    grid = Grid(1000, 1000, 1.0, 4.0, 2.0)
    found = shapes(shapely.box(400, 100, 480, 140), grid=grid)
    assert found["area_um2"] == pytest.approx([400])
    assert found["perimeter_um"] == pytest.approx([80])
    assert found["eccentricity"] == pytest.approx([0], abs=1e-6)
    assert found["max_diameter_um"] == pytest.approx([np.hypot(20, 20)])
    assert found["min_diameter_um"] == pytest.approx([20])
    assert (found["centroid_x"][0], found["centroid_y"][0]) == pytest.approx((440, 120))


@pytest.mark.parametrize("seed", [1, 2])
def test_agrees_with_regionprops(seed: int) -> None:
    from skimage.measure import regionprops_table

    labels = blobs(200, seed)
    names = ("bbox", "area", "centroid", "major_axis_length", "minor_axis_length", "eccentricity", "orientation")
    names += ("feret_diameter_max",)
    names = tuple(name.replace("major_axis_length", "axis_major_length") for name in names)
    names = tuple(name.replace("minor_axis_length", "axis_minor_length") for name in names)
    table = regionprops_table(labels, properties=(*names, "solidity", "perimeter"))
    polygons = [
        polygon_of(labels[t:b, left:r] == label, t, left)
        for label, (t, left, b, r) in enumerate(zip(*(table[f"bbox-{i}"] for i in range(4)), strict=True), 1)
    ]
    found = shapes(*polygons)
    assert len(polygons) == 200
    # The outline cuts each of its corners: half a pixel less for a nucleus without holes.
    assert np.abs(found["area_um2"] - table["area"] + 0.5).max() < 1e-9
    assert np.abs(found["centroid_x"] - table["centroid-1"] - 0.5).max() < 0.05
    assert np.abs(found["centroid_y"] - table["centroid-0"] - 0.5).max() < 0.05
    assert np.abs(found["major_axis_um"] / table["axis_major_length"] - 1).max() < 0.02
    assert np.abs(found["minor_axis_um"] / table["axis_minor_length"] - 1).max() < 0.02
    # Theirs is of the hull after it has been filled with pixels.
    longer = table["feret_diameter_max"] - found["max_diameter_um"]
    assert longer.min() > -1e-9
    assert longer.max() < 1
    assert (found["min_diameter_um"] <= found["max_diameter_um"]).all()
    assert np.abs(found["min_diameter_um"] / found["minor_axis_um"] - 1).max() < 0.25
    long = table["eccentricity"] > 0.6
    assert long.sum() > 100
    assert np.abs(found["eccentricity"] - table["eccentricity"])[long].max() < 0.01
    # Theirs is measured from the row axis.
    theirs = np.arctan2(np.cos(table["orientation"]), np.sin(table["orientation"]))
    assert np.abs(np.sin(found["orientation"] - theirs))[long].max() < 0.02
    # Their hull is made of pixels, their perimeter weighs steps.
    assert np.abs(found["solidity"] - table["solidity"]).max() < 0.04
    assert np.abs(found["perimeter_um"] / table["perimeter"] - 1).max() < 0.08


@pytest.mark.parametrize("scale", [1.0, 1.3466, 2.0040080160320644])
def test_rounding_turns_nothing_that_is_symmetrical(scale: float) -> None:
    upright, level = np.ones((5, 1)), np.ones((1, 5))
    same_in_both = [np.ones((1, 1)), np.ones((2, 2)), np.pad(np.zeros((1, 1)), 1, constant_values=1)]
    grid = Grid(40_000, 40_000, 0.5, scale, scale)
    for place in ((0, 0), (7, 13), (123, 4567), (31_001, 29_999)):
        polygons = [polygon_of(mask, place[1], place[0], scale) for mask in (upright, level, *same_in_both)]
        found = shapes(*polygons, grid=grid)
        assert found["orientation"].tolist() == [np.pi / 2, 0, 0, 0, 0]
        assert found["eccentricity"][2:].tolist() == [0, 0, 0]


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.floats(1, 9), st.floats(-50, 50), st.floats(-50, 50)), min_size=1, max_size=5),
    st.floats(-1e5, 1e5),
)
def test_place_and_company_change_no_shape(parts: list[tuple[float, float, float]], shift: float) -> None:
    turn = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    polygons = [
        shapely.Polygon(np.stack([x + r * np.cos(turn) * 2, y + r * np.sin(turn)], axis=1)) for r, x, y in parts
    ]
    together = shapes(*polygons)
    for index, polygon in enumerate(polygons):
        alone = shapes(polygon)
        moved = shapes(shapely.transform(polygon, lambda points: points + shift))
        for name, values in together.items():
            assert values[index] == alone[name][0]
            if not name.startswith("centroid"):
                assert moved[name][0] == pytest.approx(alone[name][0], rel=1e-5, abs=1e-5)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.lists(st.tuples(st.integers(-7, 7), st.integers(-7, 7)), min_size=1, max_size=12), min_size=1, max_size=6
    ),
    st.integers(-(10**6), 10**6),
)
def test_hulls_are_those_of_geos(sets: list[list[tuple[int, int]]], shift: int) -> None:
    points = np.array([p for part in sets for p in part], np.int64) + shift
    starts = np.cumsum([0, *map(len, sets)])
    expected = [shapely.MultiPoint(part).convex_hull.area for part in sets]
    corners, ends = hulls(points, starts)
    np.testing.assert_array_equal(hull_areas(corners, ends), expected)
    largest, smallest = hull_diameters(corners.astype(float), ends)
    for part, most, least in zip(sets, largest, smallest, strict=True):
        # No direction gives a smaller width than the best of those through two points.
        between = np.array(part)[:, None] - np.array(part)[None]
        length = np.hypot(*between.transpose(2, 0, 1))
        assert most == pytest.approx(length.max())
        normals = between[length > 0][:, ::-1] * (1, -1) / length[length > 0][:, None]
        widths = np.ptp(np.array(part) @ normals.T, axis=0)
        assert least == pytest.approx(widths.min() if len(widths) else 0, abs=1e-9)


def test_outlines_off_the_lattice_have_hulls_too() -> None:
    # The second is not an outline of the stage before: its points lie anywhere.
    square, odd = shapely.box(10, 10, 14, 12), shapely.Polygon([(0, 0), (4.1, 0), (2.3, 1), (4, 4.7), (0, 4)])
    found = shapes(square, odd)
    assert found["solidity"] == pytest.approx([1, odd.area / odd.convex_hull.area])
    assert found["max_diameter_um"] == pytest.approx([np.hypot(4, 2), np.hypot(4, 4.7)])
    assert found["min_diameter_um"][0] == pytest.approx(2)


def test_nothing_and_degenerate_polygons() -> None:
    assert all(len(values) == 0 for values in shapes().values())
    flat = shapely.Polygon([(3, 4), (9, 4), (3, 4)])
    found = shapes(flat)
    assert all(np.isfinite(values).all() for values in found.values())
    assert found["area_um2"][0] == found["circularity"][0] == found["solidity"][0] == 0
    assert (found["max_diameter_um"][0], found["min_diameter_um"][0]) == (6, 0)
    assert all(len(v) == 0 for v in polygon_shapes(np.empty((0, 2)), np.empty(0, int), np.empty(0, int)).values())


RUNS = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 90), st.integers(1, 60)), min_size=0, max_size=30)


@settings(deadline=None)
@given(RUNS, st.integers(1, 70))
def test_cutting_runs_keeps_every_pixel(items: list[tuple[int, int, int]], block: int) -> None:
    runs = np.array([(y, x, x + n) for y, x, n in items], np.int32).reshape(-1, 3)
    nucleus = np.arange(len(runs)) // 3
    pieces = cut_runs(runs, nucleus, block)

    def pixels(*parts: Any) -> list[tuple[int, int, int]]:
        return sorted((int(n), int(y), x) for n, y, a, b in zip(*parts, strict=True) for x in range(a, b))

    assert pixels(pieces.nucleus, pieces.y, pieces.x0, pieces.x1) == pixels(nucleus, *runs.T)
    assert (pieces.x1 > pieces.x0).all()
    for (row, column), start, end in zip(pieces.blocks, pieces.starts, pieces.ends, strict=True):
        assert (pieces.y[start:end] // block == row).all()
        assert (pieces.x0[start:end] // block == column).all()
        assert ((pieces.x1[start:end] - 1) // block == column).all()
        assert (np.diff(pieces.nucleus[start:end]) >= 0).all()


class ArrayTiles:
    """Tiles that are an array."""

    def __init__(self, rgb: np.ndarray, grid: Grid = GRID) -> None:
        self.rgb, self.grid = rgb, grid

    def read(self, x: int, y: int, w: int, h: int) -> np.ndarray:
        assert w <= measure.BLOCK
        assert h <= measure.BLOCK
        return self.rgb[y : y + h, x : x + w]


@pytest.fixture(scope="module")
def scene() -> tuple[np.ndarray, np.ndarray, pa.Table]:
    """Labels, colours and the table of instances of a small slide."""
    random = np.random.default_rng(7)
    labels = np.zeros((GRID.height, GRID.width), np.int32)
    made = blobs(60)
    labels[: made.shape[0], : made.shape[1]] = made[: GRID.height, : GRID.width]
    rgb = random.integers(0, 256, (*labels.shape, 3), dtype=np.uint8)
    rows: list[dict[str, Any]] = []
    for label in np.unique(labels[labels > 0]):
        ys, xs = np.nonzero(labels == label)
        top, left = ys.min(), xs.min()
        mask = labels[top : ys.max() + 1, left : xs.max() + 1] == label
        rows.append(
            {
                "id": int(ys[0]) << 32 | int(xs[0]),
                "geometry": shapely.to_wkb(polygon_of(mask, top, left, 2.0)),
                "class": "nucleus",
                "class_id": 0,
                "probability": 0.5,
                "runs": (pixel_runs(pixels_of(mask.astype(np.int32)))[0] + np.array([top, left, left], np.int32))
                .ravel()
                .tolist(),
            }
        )
    rows.sort(key=lambda row: row["id"])
    schema = nuclei_schema({"grid": GRID.to_json(), "slide": "s", "classes": []}, [RUNS_FIELD])
    return labels, rgb, pa.Table.from_pylist(rows, schema=schema)


def write_instances(path: Path, table: pa.Table, rows: int) -> None:
    with pq.ParquetWriter(path, table.schema) as writer:
        for start in range(0, table.num_rows, rows):
            writer.write_table(table.slice(start, rows))


def test_stains_are_those_of_the_pixels(scene: tuple[np.ndarray, np.ndarray, pa.Table], tmp_path: Path) -> None:
    labels, rgb, table = scene
    write_instances(tmp_path / "in.parquet", table, 1000)
    measure.write_measured(tmp_path / "in.parquet", ArrayTiles(rgb), stain_kernel.RUIFROK, tmp_path / "out.parquet")
    found = pq.read_table(tmp_path / "out.parquet")
    amounts = stain_kernel.concentrations(rgb, stain_kernel.RUIFROK) / np.log(10)
    for row in found.to_pylist():
        inside = amounts[labels == labels[row["id"] >> 32, row["id"] & 0xFFFFFFFF]]
        expected = [*inside.mean(axis=0), *inside.std(axis=0)]
        measured = [row[f"{name}_{kind}"] for kind in ("mean", "std") for name in ("hematoxylin", "eosin")]
        assert measured == pytest.approx(expected, abs=5e-4)


@pytest.mark.parametrize(("block", "batch", "group"), [(64, 7, 1000), (100, 1, 10), (37, 1000, 3)])
def test_no_partition_changes_a_bit(
    scene: tuple[np.ndarray, np.ndarray, pa.Table],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    block: int,
    batch: int,
    group: int,
) -> None:
    _, rgb, table = scene
    results = []
    for name, sizes in (("a", None), ("b", (block, batch))):
        if sizes:
            monkeypatch.setattr(measure, "BLOCK", sizes[0])
            monkeypatch.setattr(measure, "BATCH_ROWS", sizes[1])
        write_instances(tmp_path / f"{name}.parquet", table, group if sizes else 1000)
        out = tmp_path / f"{name}-out.parquet"
        assert measure.write_measured(tmp_path / f"{name}.parquet", ArrayTiles(rgb), stain_kernel.RUIFROK, out) == 60
        results.append(pq.read_table(out))
    assert results[0].equals(results[1], check_metadata=True)


@pytest.mark.parametrize("block", [1024, 37])
def test_nuclei_on_finer_pixels_than_the_tiles(
    scene: tuple[np.ndarray, np.ndarray, pa.Table], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    labels, rgb, table = scene
    monkeypatch.setattr(measure, "BLOCK", block)
    rgb = np.ascontiguousarray(rgb[::2, ::2])
    runs = [np.array(flat, np.int32).reshape(-1, 3) for flat in table["runs"].to_pylist()]
    starts = np.concatenate([[0], np.cumsum([len(one) for one in runs])])
    thin, starts = every_second(np.concatenate(runs), starts)
    lists = pa.array([thin[a:b].ravel().tolist() for a, b in itertools.pairwise(starts)], RUNS_FIELD.type)
    table = table.set_column(table.schema.get_field_index("runs"), RUNS_FIELD, lists)
    write_instances(tmp_path / "in.parquet", table, 10)
    tiles = ArrayTiles(rgb, Grid(350, 250, 1.0, 4.0, 4.0))
    measure.write_measured(tmp_path / "in.parquet", tiles, stain_kernel.RUIFROK, tmp_path / "out.parquet")
    amounts = stain_kernel.concentrations(rgb, stain_kernel.RUIFROK) / np.log(10)
    for row in pq.read_table(tmp_path / "out.parquet").to_pylist():
        inside = amounts[labels[::2, ::2] == labels[row["id"] >> 32, row["id"] & 0xFFFFFFFF]]
        found = [row["hematoxylin_mean"], row["eosin_mean"]]
        assert found == pytest.approx(inside.mean(axis=0).tolist(), abs=5e-4)


def test_a_block_is_read_once_whatever_the_batches(
    scene: tuple[np.ndarray, np.ndarray, pa.Table], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, rgb, table = scene
    write_instances(tmp_path / "in.parquet", table, 1000)
    monkeypatch.setattr(measure, "BLOCK", 64)
    monkeypatch.setattr(measure, "BATCH_ROWS", 3)
    held: list[int] = []
    read_blocks = measure.read_blocks

    def noted(batches: Any, *rest: Any) -> None:
        held.append(len(batches))
        read_blocks(batches, *rest)

    monkeypatch.setattr(measure, "read_blocks", noted)
    results, reads = [], []
    for waiting in (1000, 2):
        monkeypatch.setattr(measure, "BATCHES_AT_ONCE", waiting)
        places: list[tuple[int, int]] = []

        class Watched(ArrayTiles):
            def read(self, x: int, y: int, w: int, h: int, places: list[tuple[int, int]] = places) -> np.ndarray:
                places.append((y // 64, x // 64))
                return super().read(x, y, w, h)

        out = tmp_path / f"{waiting}.parquet"
        measure.write_measured(tmp_path / "in.parquet", Watched(rgb), stain_kernel.RUIFROK, out)
        results.append(out.read_bytes())
        reads.append(places)
    assert results[0] == results[1]
    assert len(reads[0]) == len(set(reads[0])) == len(set(reads[1])) < len(reads[1])
    assert max(held) > 3
    held.clear()
    measure.write_measured(tmp_path / "in.parquet", ArrayTiles(rgb), stain_kernel.RUIFROK, out)
    assert max(held) == 3  # the new one and two that wait


def test_extreme_colours_do_not_spill_between_stains() -> None:
    rgb = np.array([[[0, 0, 0], [255, 255, 255], [0, 255, 0], [255, 0, 255]]], np.uint8)
    matrix = np.array([[0.65, 0.70, 0.29], [0.55, 0.78, 0.29]])
    matrix /= np.linalg.norm(matrix, axis=1, keepdims=True)
    sums = StainSums(5, matrix)
    one = np.arange(4)
    sums.add(rgb, one, np.zeros(4, int), one, one + 1)
    expected = stain_kernel.concentrations(rgb, matrix)[0]
    assert np.abs(sums.sums[:, :4].T / sums.SCALE - expected).max() < 5e-4
    assert np.isnan(sums.columns()["eosin_mean"][4])
    with pytest.raises(ValueError, match="too close"):
        StainSums(1, np.array([[0.65, 0.7, 0.29], [0.65, 0.7, 0.2900001]]))


def write_tiles(path: Path, rgb: np.ndarray) -> None:
    import zarr
    from zarr.codecs import BloscCodec

    group = zarr.open_group(path, mode="w")
    group.attrs.update({"grid": GRID.to_json(), "cell": 64})
    array = group.create_array(
        "rgb",
        shape=rgb.shape,
        chunks=(128, 128, 3),
        dtype="uint8",
        fill_value=255,
        compressors=[BloscCodec(cname="lz4")],
    )
    array[:] = rgb
    shape = (-(-GRID.height // 64), -(-GRID.width // 64))
    group.create_array("active", shape=shape, dtype="bool", chunks=shape)[:] = True


@pytest.mark.parametrize("own", [True, False])
def test_stage(scene: tuple[np.ndarray, np.ndarray, pa.Table], tmp_path: Path, own: bool) -> None:
    _, rgb, table = scene
    write_tiles(tmp_path / "tiles.zarr", rgb)
    matrix = [[0.6, 0.74, 0.3], [0.1, 0.9, 0.4]]
    for name in ("instances", "tiles", "stain"):
        extra = {"stains": {"matrix": matrix} if own else None} if name == "stain" else {}
        write_json(tmp_path / f"{name}.json", {"status": "ok", "failure": None, **extra})
    names = ("instances.json", "instances.parquet", "tiles.json", "tiles.zarr", "stain.json", "measure.json")
    for rows in (table, table.slice(0, 0)):
        write_instances(tmp_path / "instances.parquet", rows, 1000)
        manifest = measure.run_measure("s", *(tmp_path / name for name in names), tmp_path / "nuclei.parquet")
        assert manifest["status"] == "ok"
        assert manifest["nuclei"] == rows.num_rows
        assert manifest["stains_origin"] == ("slide" if own else "ruifrok")
        found = open_nuclei(tmp_path / "nuclei.parquet")
        schema = found.schema_arrow
        assert schema.metadata == table.schema.metadata
        assert json.loads(schema.metadata[b"geo"])["primary_column"] == "geometry"
        assert schema.names == [*table.schema.names[:-1], "centroid_x", "centroid_y", *measure.COLUMNS]
        assert found.read(columns=["id"]).equals(rows.select(["id"]))
        assert not any(
            np.isnan(column.to_numpy()).any() for column in found.read(columns=list(measure.COLUMNS)).columns
        )
