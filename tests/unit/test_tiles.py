"""The tile store: the same pixels for every tile size and worker count, bad tiles, reflection, damage."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
import tifffile
import zarr
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline import tiles, tissue
from pipeline.batch.parts import Part, manifest_of
from pipeline.batch.stage import read_manifest
from pipeline.errors import PipelineError
from pipeline.slides import tiff_reader
from pipeline.slides.inspect import run_inspect
from pipeline.slides.open import open_slide
from pipeline.slides.regions import read_region
from pipeline.slides.synthetic import write_svs
from pipeline.stores.grid import Grid
from pipeline.stores.lattice import CELL, active_cells
from pipeline.stores.tile_store import RasterReader, TileStore, reflect
from pipeline.testing import stained, write_inputs
from pipeline.tiles import run_tiles

TISSUE = [
    shapely.Polygon([(200, 150), (1900, 300), (1700, 1300), (900, 900), (300, 1250)]),
    shapely.box(2300, 1500, 2310, 1510),
]


def picture(width: int, height: int) -> np.ndarray:
    rng = np.random.default_rng(1)
    coarse = rng.integers(60, 256, (height // 40 + 2, width // 40 + 2, 3)).astype(np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


@pytest.fixture(scope="module")
def slide_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slide")
    write_svs(folder / "s.svs", picture(2500, 1700), 0.25)
    return folder


@pytest.fixture(autouse=True)
def model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "model_mpp", lambda folder: float(folder.name))


def prepare(folder: Path, path: Path, tissue: list[shapely.Geometry] | None = None) -> None:
    run_inspect("s", path, folder / "slide.json")
    features = [
        {"type": "Feature", "properties": {}, "geometry": json.loads(shapely.to_geojson(part))}
        for part in (TISSUE if tissue is None else tissue)
    ]
    (folder / "tissue.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    (folder / "tissue.json").write_text(json.dumps({"stage": "tissue", "status": "ok", "failure": None}))


def run(folder: Path, mpp: float = 0.5, *, store: Path | None = None, **options: Any) -> dict[str, Any]:
    store = store or folder / "tiles.zarr"
    return run_tiles(
        "s",
        folder / "slide.json",
        folder / "tissue.json",
        folder / "tissue.geojson",
        Path(str(mpp)),
        manifest_of(store) if "part" in options else folder / "tiles.json",
        store,
        **options,
    )


def whole(store: TileStore) -> np.ndarray:
    return store.read(0, 0, store.grid.width, store.grid.height)


@pytest.mark.parametrize("mpp", [0.5, 0.47, 0.25, 1.1])
def test_same_pixels_for_every_cut(
    tmp_path: Path, slide_folder: Path, mpp: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(tmp_path, slide_folder / "s.svs")
    digests, images = set(), []
    for tile, workers, size in ((256, 1, 10_000_000), (512, 3, 300_000), (1024, 2, 10_000_000)):
        monkeypatch.setattr(tiles, "_SUPER_PIXELS", size)
        manifest = run(tmp_path, mpp, tile=tile, workers=workers)
        assert manifest["status"] == "ok"
        digests.add(manifest["digest"])
        store = TileStore.open(tmp_path / "tiles.zarr")
        assert store.tile == tile
        images.append(whole(store))
        written = [p for p in (tmp_path / "tiles.zarr" / "rgb" / "c").rglob("0") if p.is_file()]
        assert len(written) == manifest["tiles"]
    assert len(digests) == 1
    for image in images[1:]:
        np.testing.assert_array_equal(image, images[0])
    # And they are those of the slide, where a cell is active.
    with open_slide(slide_folder / "s.svs") as slide:
        grid = Grid.for_slide(2500, 1700, 0.25, 0.25, mpp)
        expected = read_region(slide, grid, 0, 0, grid.width, grid.height)
    active = active_cells(TISSUE, grid)
    mask = np.kron(active, np.ones((CELL, CELL), bool))[: grid.height, : grid.width]
    expected[~mask] = 255
    np.testing.assert_array_equal(images[0], expected)
    np.testing.assert_array_equal(store.active, active)


@pytest.mark.parametrize("mpp", [0.25, 0.26, 0.5, 0.2])
@pytest.mark.parametrize("side", [256, 240])
def test_same_torn_tiles_for_every_cut(tmp_path: Path, mpp: float, side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rgb = picture(2500, 1700).copy()
    for row in range(-(-1700 // side)):
        for column in range(row % 2, -(-2500 // side), 3):
            torn = rgb[row * side + 60 : (row + 1) * side, column * side : (column + 1) * side]
            torn -= np.minimum(torn, 90)
    path = tmp_path / "s.tif"
    tifffile.imwrite(
        path, rgb, tile=(side, side), photometric="rgb", resolution=(40000, 40000), resolutionunit="CENTIMETER"
    )
    prepare(tmp_path, path)
    told = []
    for tile, size, count in ((256, 10_000_000, 0), (512, 300_000, 0), (1024, 10_000_000, 0), (64, 40_000, 3)):
        monkeypatch.setattr(tiles, "_SUPER_PIXELS", size)
        parts = [tmp_path / f"{number}-of-{count}.zarr" for number in range(1, count + 1)]
        for number, store in enumerate(parts, start=1):
            run(tmp_path, mpp, tile=tile, part=Part(number, count), store=store)
        manifest = run(tmp_path, mpp, tile=tile, parts=parts)
        assert manifest["status"] == "ok"
        told.append((manifest["doubtful_cells"], manifest["warnings"]))
    assert told[0][0] > 20
    assert told[1:] == told[:1] * 3


def test_manifest(tmp_path: Path, slide_folder: Path) -> None:
    prepare(tmp_path, slide_folder / "s.svs")
    run(tmp_path)
    manifest = read_manifest(tmp_path / "tiles.json")
    store = TileStore.open(tmp_path / "tiles.zarr")
    assert Grid.from_json(manifest["grid"]) == store.grid == Grid(1250, 850, 0.5, 2.0, 2.0)
    assert manifest["active_cells"] == store.active.sum()
    assert manifest["unreadable"] == []
    assert manifest["tile"] == 1024
    assert manifest["megapixels"] <= manifest["active_cells"] * CELL**2 / 1e6
    assert not list(tmp_path.glob(".part-*"))


@pytest.mark.parametrize(("mpp", "told"), [(0.5, False), (0.125, False), (0.1, True)])
def test_coarse_slides_are_told(tmp_path: Path, slide_folder: Path, mpp: float, told: bool) -> None:
    prepare(tmp_path, slide_folder / "s.svs", tissue=[shapely.box(0, 0, 300, 300)])
    warnings = run(tmp_path, mpp)["warnings"]
    assert len(warnings) == told
    assert not told or "0.25 µm/px are 2.5 times as coarse as the model's 0.1" in warnings[0]


def test_white_tiles_take_no_space(tmp_path: Path) -> None:
    pixels = picture(960, 400).copy()
    pixels[:, 240:720] = 255  # whole tiles of the slide
    write_svs(tmp_path / "s.svs", pixels, 0.5)
    prepare(tmp_path, tmp_path / "s.svs", tissue=[shapely.box(0, 0, 960, 400)])
    run(tmp_path, tile=128)
    chunks = [p for p in (tmp_path / "tiles.zarr" / "rgb" / "c").rglob("0") if p.is_file()]
    assert {int(path.parent.name) for path in chunks} == {0, 1, 5, 6, 7}
    store = TileStore.open(tmp_path / "tiles.zarr")
    assert store.active.all()
    assert (whole(store)[:, 240:720] == 255).all()


def test_chunks_are_written_as_zarr_writes_them(tmp_path: Path, slide_folder: Path) -> None:
    prepare(tmp_path, slide_folder / "s.svs")
    run(tmp_path, tile=256)
    ours = tmp_path / "tiles.zarr"
    group: Any = zarr.open_group(shutil.copytree(ours, tmp_path / "zarr.zarr"), mode="r+")
    shutil.rmtree(tmp_path / "zarr.zarr/rgb/c")
    group["rgb"][:] = whole(TileStore.open(ours))

    def chunks(store: Path) -> dict[Path, bytes]:
        return {path.relative_to(store): path.read_bytes() for path in store.rglob("rgb/c/*/*/0")}

    assert 0 < len(chunks(ours)) < 5 * 4  # of a grid of 1250 x 850 pixels
    assert chunks(ours) == chunks(tmp_path / "zarr.zarr")


def test_no_tissue(tmp_path: Path, slide_folder: Path) -> None:
    prepare(tmp_path, slide_folder / "s.svs", tissue=[])
    manifest = run(tmp_path)
    assert (manifest["status"], manifest["tiles"], manifest["active_cells"]) == ("ok", 0, 0)
    store = TileStore.open(tmp_path / "tiles.zarr")
    assert (store.read(-5, -5, 100, 100) == 255).all()


def spoil(source: Path, target: Path, which: list[int]) -> list[tuple[int, int]]:
    """Copy an SVS with tiles of level 0 overwritten; the tiles' corners."""
    target.write_bytes(source.read_bytes())
    with tifffile.TiffFile(source) as tif:
        page = tif.pages[0]
        across = -(-page.imagewidth // page.tilewidth)
        with target.open("r+b") as file:
            for i in which:
                file.seek(page.dataoffsets[i])
                file.write(bytes(page.databytecounts[i]))
        return [(i % across * page.tilewidth, i // across * page.tilelength) for i in which]


@pytest.mark.parametrize("stored", [{"rowsperstrip": 16}, {"tile": (256, 256)}])
def test_strips_are_decoded_once_for_each_row_of_tiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: dict[str, Any]
) -> None:
    path = tmp_path / "s.tif"
    resolution = {"resolution": (20000, 20000), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(path, picture(4096, 1024), photometric="rgb", **resolution, **stored)
    prepare(tmp_path, path, [shapely.box(0, 0, 4096, 1024)])
    read: list[int] = []
    decode = tiff_reader._Page.segment
    monkeypatch.setattr(tiff_reader._Page, "segment", lambda page, file, i: read.append(i) or decode(page, file, i))
    monkeypatch.setattr(tiles, "_SUPER_PIXELS", 1024 * 1024)
    run(tmp_path, tile=256, workers=1)
    assert set(read) == set(range(64))
    # Tiles on the left of a block are decoded for its border, too; strips of 16 rows have none.
    assert len(read) == 64 + (12 if "tile" in stored else 0)
    read.clear()
    monkeypatch.setattr(tissue, "_BLOCK_PIXELS", 1024 * 1024)
    with open_slide(path) as slide:
        tissue.read_view(slide, Grid(256, 64, 8.0, 16.0, 16.0))
    assert len(set(read)) == 64
    assert len(read) <= 2 * 64


@pytest.mark.parametrize("reader", ["tiffslide", "openslide"])
def test_unreadable_tiles_are_white_and_listed(tmp_path: Path, slide_folder: Path, reader: str) -> None:
    path = tmp_path / "s.svs"
    with open_slide(slide_folder / "s.svs") as slide:
        side = slide.tile_size(0)[0]
    across = -(-2500 // side)
    bad = [across * 2 + 3, across * 2 + 4, len(range(0, 2500, side)) - 1]  # the last one is not tissue
    corners = spoil(slide_folder / "s.svs", path, bad)
    run_inspect("s", path, tmp_path / "slide.json", reader=reader)
    features = [{"type": "Feature", "geometry": json.loads(shapely.to_geojson(part))} for part in TISSUE]
    (tmp_path / "tissue.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    (tmp_path / "tissue.json").write_text(json.dumps({"stage": "tissue", "status": "ok", "failure": None}))
    results = []
    for tile, workers in ((256, 1), (1024, 2)):
        manifest = run(tmp_path, tile=tile, workers=workers, max_unreadable=0.5)
        assert manifest["status"] == "ok", manifest["failure"]
        results.append((manifest["unreadable"], manifest["unreadable_share"], manifest["digest"]))
    assert results[0] == results[1]
    half = side // 2
    assert manifest["unreadable"] == [[x // 2, y // 2, half, half] for x, y in corners[:2]]
    assert 0 < manifest["unreadable_share"] < 0.5
    store = TileStore.open(tmp_path / "tiles.zarr")
    x, y = corners[0]
    assert (store.read(x // 2, y // 2, half, half) == 255).all()
    prepare_good = tmp_path / "good"
    prepare_good.mkdir()
    prepare(prepare_good, slide_folder / "s.svs")
    run(prepare_good)
    good = TileStore.open(prepare_good / "tiles.zarr")
    np.testing.assert_array_equal(store.read(x // 2 - 60, y // 2, 60, half), good.read(x // 2 - 60, y // 2, 60, half))


def test_too_many_unreadable_tiles(tmp_path: Path, slide_folder: Path) -> None:
    path = tmp_path / "s.svs"
    with tifffile.TiffFile(slide_folder / "s.svs") as tif:
        count = len(tif.pages[0].dataoffsets)
    prepare(tmp_path, slide_folder / "s.svs")
    spoil(slide_folder / "s.svs", path, list(range(count // 3, 2 * count // 3)))
    info = read_manifest(tmp_path / "slide.json") | {"path": str(path)}
    (tmp_path / "slide.json").write_text(json.dumps(info))
    manifest = run(tmp_path)
    assert manifest["status"] == "failed"
    assert "of the tissue cannot be decoded" in manifest["failure"]["reason"]
    with pytest.raises(PipelineError):
        TileStore.open(tmp_path / "tiles.zarr")


def test_failure_is_passed_on(tmp_path: Path) -> None:
    failure = {"stage": "inspect", "reason": "file is empty", "hint": ""}
    record = {"stage": "inspect", "status": "failed", "failure": failure}
    for name in ("slide.json", "tissue.json"):
        (tmp_path / name).write_text(json.dumps(record))
    assert run(tmp_path)["failure"] == failure


@pytest.mark.parametrize("options", [{"tile": 100}, {"tile": 0}, {"workers": 0}, {"max_unreadable": 2}])
def test_wrong_settings(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(PipelineError):
        run(tmp_path, **options)


@given(start=st.integers(-500, 500), n=st.integers(1, 300), size=st.integers(1, 90))
def test_reflect_is_symmetric_padding(start: int, n: int, size: int) -> None:
    pad = 900
    expected = np.pad(np.arange(size), (pad, pad), mode="symmetric")[start + pad : start + pad + n]
    np.testing.assert_array_equal(reflect(start, n, size), expected)


def test_read_outside(tmp_path: Path, slide_folder: Path) -> None:
    prepare(tmp_path, slide_folder / "s.svs", tissue=[shapely.box(0, 0, 2500, 1700)])
    run(tmp_path, 4.0, tile=64)
    store = TileStore.open(tmp_path / "tiles.zarr")
    image = whole(store)
    padded = np.pad(image, ((300, 300), (300, 300), (0, 0)), mode="symmetric")
    for x, y, w, h in ((-10, -20, 50, 60), (-300, -300, 700, 650), (100, 60, 200, 200), (5, 6, 30, 40), (250, 0, 9, 9)):
        np.testing.assert_array_equal(store.read(x, y, w, h), padded[y + 300 : y + 300 + h, x + 300 : x + 300 + w])


def test_damaged_store(tmp_path: Path, slide_folder: Path) -> None:
    prepare(tmp_path, slide_folder / "s.svs")
    run(tmp_path, tile=256)
    chunk = next(p for p in sorted((tmp_path / "tiles.zarr" / "rgb" / "c").rglob("0")) if p.is_file())
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 0xFF
    chunk.write_bytes(data)
    store = TileStore.open(tmp_path / "tiles.zarr")
    with pytest.raises(PipelineError, match=r"tiles\.zarr is damaged: .*delete it and run again"):
        whole(store)
    (tmp_path / "tiles.zarr" / "zarr.json").write_text("{")
    with pytest.raises(PipelineError, match="is damaged"):
        TileStore.open(tmp_path / "tiles.zarr")
    with pytest.raises(PipelineError, match="is missing"):
        TileStore.open(tmp_path / "nowhere.zarr")


def test_reading_from_threads(tmp_path: Path, slide_folder: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    prepare(tmp_path, slide_folder / "s.svs")
    run(tmp_path, tile=128)
    store = TileStore.open(tmp_path / "tiles.zarr")
    image = whole(store)
    windows = [(x, y) for y in range(0, 750, 90) for x in range(0, 1150, 90)]
    with ThreadPoolExecutor(4) as threads:
        for (x, y), got in zip(windows, threads.map(lambda at: store.read(*at, 100, 100), windows), strict=True):
            np.testing.assert_array_equal(got, image[y : y + 100, x : x + 100])


@pytest.mark.parametrize(("tiles", "held"), [(0, 4), (3, 4), (5.5, 5), (100, 100)])
def test_windows_in_raster_order_are_read_as_one_by_one(tmp_path: Path, tiles: float, held: int) -> None:
    import zarr

    rng = np.random.default_rng(held)
    group = zarr.create_group(tmp_path / "tiles.zarr", attributes={"grid": Grid(700, 500, 0.5, 1.0, 1.0).to_json()})
    group.attrs["cell"] = CELL
    pixels = rng.integers(0, 255, (500, 700, 3), np.uint8)
    active = rng.random((8, 11)) < 0.5
    pixels[~np.kron(active, np.ones((CELL, CELL), bool))[:500, :700]] = 255
    group.create_array("rgb", shape=pixels.shape, chunks=(128, 128, 3), dtype="uint8", fill_value=255)[:] = pixels
    group.create_array("active", data=active)
    store = TileStore.open(tmp_path / "tiles.zarr")
    reader = RasterReader(store, int(tiles * 3 * 128**2))
    assert reader.limit == held
    windows = [(x, y, 150, 90) for y in range(-20, 500, 70) for x in range(-20, 700, 110)]
    with ThreadPoolExecutor(4) as pool:
        for window, found in zip(windows, pool.map(lambda w: reader.read(*w), windows), strict=True):
            np.testing.assert_array_equal(found, store.read(*window))
            assert len(reader._held) <= held


def test_each_tile_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = write_inputs(tmp_path / "in", stained(600, 600, 1), chunk=128)
    store = TileStore.open(inputs["zarr"])
    read: list[tuple[int, ...]] = []
    decode = TileStore.window
    monkeypatch.setattr(TileStore, "window", lambda self, *place: read.append(place) or decode(self, *place))
    reader = RasterReader(store)
    for y in range(0, 500, 40):
        for x in range(0, 500, 40):
            reader.read(x, y, 100, 100)
    assert len(read) == len(set(read)) == 25 - 1  # of the corner that is not tissue, none


def test_tiles_stay_for_threads_that_are_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = write_inputs(tmp_path / "in", stained(900, 600, 1), chunk=128)
    store = TileStore.open(inputs["zarr"])
    read: list[tuple[int, ...]] = []
    decode = TileStore.window
    monkeypatch.setattr(TileStore, "window", lambda self, *place: read.append(place) or decode(self, *place))
    reader = RasterReader(store, 40 * 3 * 128**2)
    for y in (150, 550, 150, 550, 300):
        reader.read(0, y, 600, 100)
    assert len(read) == len(set(read)) == 25


@pytest.mark.parametrize("at", [(-30, 20), (40, -70), (60, 50), (-90, -90), (-30, -300), (200, 10), (-500, 40)])
def test_outside_the_grid_pixels_are_reflected(tmp_path: Path, at: tuple[int, int]) -> None:
    rgb = stained(90, 130, 1)
    store = TileStore.open(write_inputs(tmp_path / "in", rgb)["zarr"])
    rgb[: 2 * CELL, : 2 * CELL] = 255
    mirrored = np.pad(rgb, ((600, 600), (600, 600), (0, 0)), mode="symmetric")
    x, y = at
    np.testing.assert_array_equal(store.read(x, y, 200, 150), mirrored[600 + y : 750 + y, 600 + x : 800 + x])
