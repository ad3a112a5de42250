from __future__ import annotations

import gzip
import io
import json
import uuid
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shapely
from hypothesis import given
from hypothesis import strategies as st

from pipeline import export
from pipeline import testing as fabricated
from pipeline.errors import PipelineError
from pipeline.evaluation.readers import compare, load
from pipeline.stores.grid import Grid

GRID = Grid.for_slide(2400, 1800, 0.25, 0.25, 0.5)


@pytest.fixture
def nuclei(tmp_path: Path) -> Path:
    path = tmp_path / "nuclei.parquet"
    fabricated.write_nuclei(path, fabricated.nuclei_table(300, 2400, 1800), GRID, 'a "slide"')
    return path


def read(path: Path) -> dict:
    return json.loads(gzip.decompress(path.read_bytes()))


def test_features_are_what_qupath_opens(nuclei: Path, tmp_path: Path) -> None:
    target = tmp_path / "nuclei.geojson.gz"
    assert export.write_geojson(nuclei, target, 'a "slide"') == 300
    collection, table = read(target), pq.read_table(nuclei)
    assert collection["type"] == "FeatureCollection"
    assert len(collection["features"]) == 300
    colours = {item["name"]: item["color"] for item in fabricated.CLASSES}
    shapes = shapely.from_wkb(table["geometry"].to_numpy())
    for row, feature in enumerate(collection["features"]):
        assert str(uuid.UUID(feature["id"])) == feature["id"]
        rings = feature["geometry"]["coordinates"]
        assert rings[0][0] == rings[0][-1]
        assert shapely.equals_exact(shapely.Polygon(rings[0], rings[1:]), shapes[row], 0.0051)
        properties = feature["properties"]
        assert properties["objectType"] == "detection"
        assert properties["classification"]["color"] == colours[properties["classification"]["name"]]
        assert properties["classification"]["name"] == table["class"][row].as_py()
        assert list(properties["measurements"]) == list(export.MEASUREMENTS.values())
        assert properties["measurements"]["Area µm^2"] == pytest.approx(table["area_um2"][row].as_py(), abs=1e-4)


def test_coordinates_from_another_corner(nuclei: Path, tmp_path: Path) -> None:
    export.write_geojson(nuclei, tmp_path / "a.gz", "s")
    export.write_geojson(nuclei, tmp_path / "b.gz", "s", origin=(100, 60))
    plain, moved = read(tmp_path / "a.gz"), read(tmp_path / "b.gz")
    assert moved["level0_origin"] == [100, 60]
    assert "level0_origin" not in plain
    for a, b in zip(plain["features"], moved["features"], strict=True):
        assert a["id"] == b["id"]
        for before, after in zip(a["geometry"]["coordinates"], b["geometry"]["coordinates"], strict=True):
            np.testing.assert_allclose(np.array(before) - (100, 60), after, atol=0.005)
    # What the collection states is taken into account when it is compared.
    (tmp_path / "b.gz").rename(tmp_path / "b.geojson.gz")
    assert compare(load(nuclei), load(tmp_path / "b.geojson.gz"))["aji"] > 0.99


def test_bytes_do_not_depend_on_threads_or_time(nuclei: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "BATCH_ROWS", 37)
    contents = []
    for workers in (1, 3):
        export.write_geojson(nuclei, tmp_path / "x.gz", "s", workers=workers)
        contents.append((tmp_path / "x.gz").read_bytes())
    assert contents[0] == contents[1]
    assert len(json.loads(gzip.decompress(contents[0]))["features"]) == 300


def test_no_nuclei(tmp_path: Path) -> None:
    fabricated.write_nuclei(tmp_path / "n.parquet", fabricated.nuclei_table(0, 2400, 1800), GRID, "s")
    assert export.write_geojson(tmp_path / "n.parquet", tmp_path / "n.gz", "s") == 0
    assert read(tmp_path / "n.gz") == {"type": "FeatureCollection", "features": []}


def test_holes_missing_values_and_unknown_classes(tmp_path: Path) -> None:
    table = fabricated.nuclei_table(2, 2400, 1800)
    ring = shapely.Point(500, 500).buffer(30)
    shapes = [ring.difference(shapely.Point(500, 500).buffer(5)), ring]
    table = table.set_column(1, "geometry", pa.array(shapely.to_wkb(shapes)))
    table = table.set_column(2, "class", pa.array(["tumour", "new"], pa.string()))
    place = table.schema.get_field_index("eosin_std")
    table = table.set_column(place, "eosin_std", pa.array([np.nan, None], pa.float32()))
    fabricated.write_nuclei(tmp_path / "n.parquet", table, GRID, "s")
    export.write_geojson(tmp_path / "n.parquet", tmp_path / "n.gz", "s")
    first, second = read(tmp_path / "n.gz")["features"]
    assert len(first["geometry"]["coordinates"]) == 2
    assert first["properties"]["classification"] == fabricated.CLASSES[0]
    assert second["properties"]["classification"] == {"name": "new", "color": list(export.DEFAULT_COLOUR)}
    for feature in (first, second):
        assert "Eosin OD std dev" not in feature["properties"]["measurements"]
        assert "Eosin OD mean" in feature["properties"]["measurements"]


def test_only_polygons(tmp_path: Path) -> None:
    table = fabricated.nuclei_table(1, 2400, 1800)
    table = table.set_column(1, "geometry", pa.array(shapely.to_wkb([shapely.Point(0, 0)])))
    fabricated.write_nuclei(tmp_path / "n.parquet", table, GRID, "s")
    with pytest.raises(ValueError, match="polygons"):
        export.write_geojson(tmp_path / "n.parquet", tmp_path / "n.gz", "s")


@given(st.lists(st.integers(0, 2**64 - 1), max_size=40), st.text(max_size=8))
def test_uuids_are_valid_unique_and_stable(ids: list[int], slide: str) -> None:
    array = np.array(ids, dtype=np.uint64)
    uuids = export.nucleus_uuids(slide, array)
    assert uuids == export.nucleus_uuids(slide, array)
    assert len(set(uuids)) == len(set(ids))
    for text in uuids:
        parsed = uuid.UUID(text)
        assert str(parsed) == text
        assert parsed.variant == uuid.RFC_4122
        assert parsed.version == 8
    assert not set(uuids) & set(export.nucleus_uuids(slide + "x", array))


@given(st.lists(st.binary(max_size=300), max_size=9), st.integers(1, 3))
def test_gzip_writer_round_trip(blocks: list[bytes], workers: int) -> None:
    stream = io.BytesIO()
    with export.GzipWriter(stream, workers=workers) as out:
        for block in blocks:
            out.write(block)
    assert gzip.decompress(stream.getvalue()) == b"".join(blocks)


def test_gzip_writer_leaves_no_valid_file_after_an_error() -> None:
    stream = io.BytesIO()
    with pytest.raises(KeyError), export.GzipWriter(stream) as out:
        out.write(b"text")
        raise KeyError
    with pytest.raises(EOFError):
        gzip.decompress(stream.getvalue())


def test_stage(tmp_path: Path) -> None:
    paths = fabricated.write_slide(tmp_path, "s 1", count=20)
    manifest = export.run_export("s 1", paths.measure, paths.nuclei, paths.export, paths.nuclei_geojson)
    assert manifest["status"] == "ok"
    assert manifest["nuclei"] == 20
    assert manifest["bytes"] == paths.nuclei_geojson.stat().st_size


@pytest.mark.parametrize(("origin", "expected"), [("slide", [0, 0]), ("bounds", [800, 600])])
def test_stage_counts_from_the_bounds(tmp_path: Path, origin: str, expected: list[int]) -> None:
    paths = fabricated.write_slide(tmp_path, "s", count=20)
    for bounds, corner in (([800, 600, 1000, 900], expected), (None, [0, 0])):
        paths.inspect.write_text(json.dumps(json.loads(paths.inspect.read_text()) | {"bounds": bounds}))
        done = export.run_export(
            "s", paths.measure, paths.nuclei, paths.export, paths.nuclei_geojson, inspect=paths.inspect, origin=origin
        )
        assert done["origin"] == corner
        assert read(paths.nuclei_geojson).get("level0_origin", [0, 0]) == corner
    with pytest.raises(PipelineError, match=r"'s': origin 'bounds' without a slide\.json"):
        export.run_export("s", paths.measure, paths.nuclei, paths.export, paths.nuclei_geojson, origin="bounds")


def test_stage_passes_a_failure_on(tmp_path: Path) -> None:
    paths = fabricated.write_failed_slide(tmp_path, "bad", "inspect", "the file is empty")
    manifest = export.run_export("bad", paths.measure, paths.nuclei, paths.export, paths.nuclei_geojson)
    assert manifest["failure"]["reason"] == "the file is empty"
    assert "failed at inspect" in paths.nuclei_geojson.read_text()
