from __future__ import annotations

import copy
import gzip
import itertools
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shapely
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from pipeline.errors import PipelineError
from pipeline.evaluation import command, readers
from pipeline.evaluation.metrics import METRICS, score
from pipeline.exchange import label_maps
from pipeline.kernels.contours import outlines, pixel_runs
from pipeline.kernels.raster import paint_runs, polygon_runs
from pipeline.stores.grid import Grid
from pipeline.stores.nuclei import nuclei_schema
from pipeline.testing import pixels_of

HALVES = st.integers(1, 60).map(lambda v: v / 2)
COORDINATE = st.one_of(st.integers(0, 24).map(lambda v: v / 2), st.floats(-3, 13, width=32))
RINGS = st.lists(st.lists(st.tuples(COORDINATE, COORDINATE), min_size=3, max_size=7), min_size=1, max_size=3)


def labels_map(count: int = 6) -> np.ndarray:
    labels = np.zeros((40, 50), np.uint16)
    for index in range(count):
        y, x = divmod(index, 3)
        labels[3 + 12 * y : 11 + 12 * y, 2 + 15 * x : 12 + 15 * x] = 10 * (index + 1)
    return labels


def feature(*rings: Any, kind: str = "Polygon") -> dict[str, Any]:
    return {"type": "Feature", "geometry": {"type": kind, "coordinates": list(rings)}, "properties": {}}


def box(x0: float, y0: float, x1: float, y1: float) -> list[list[float]]:
    return [[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]]


def collection(*features: dict[str, Any]) -> bytes:
    return json.dumps({"type": "FeatureCollection", "features": features}).encode()


def boxes_of(labels: np.ndarray) -> list[dict[str, Any]]:
    found = []
    for label in np.unique(labels[labels > 0]):
        y, x = np.nonzero(labels == label)
        found.append(feature(box(*map(float, (x.min(), y.min(), x.max() + 1, y.max() + 1)))))
    return found


@settings(deadline=None, max_examples=50)
@given(RINGS)
def test_a_pixel_is_inside_when_its_centre_is(rings: list[list[tuple[float, float]]]) -> None:
    points = np.array([point for ring in rings for point in ring])
    sizes = np.array([len(ring) for ring in rings])
    runs = polygon_runs(points, np.cumsum(sizes) - sizes, np.array([0]))
    out = np.zeros((20, 20), np.int32)
    paint_runs(runs[:, 1:], runs[:, 0] + 1, out, -4, -4)
    some = polygon_runs(points, np.cumsum(sizes) - sizes, np.array([0]), (2, 7))
    np.testing.assert_array_equal(some, runs[(runs[:, 1] >= 2) & (runs[:, 1] < 7)])
    for y in range(-4, 16):
        for x in range(-4, 16):
            crossings = 0
            for ring in rings:
                for (ax, ay), (bx, by) in zip(ring, [*ring[1:], ring[0]], strict=True):
                    (ax, ay), (bx, by) = sorted([(ax, ay), (bx, by)], key=lambda p: p[1])
                    if ay <= y + 0.5 < by:
                        crossings += ax + (y + 0.5 - ay) * ((bx - ax) / (by - ay)) <= x + 0.5
            assert out[y + 4, x + 4] == crossings % 2


@settings(deadline=None)
@given(
    st.lists(st.floats(0.5, 30, width=32) | HALVES, min_size=2, max_size=6, unique=True),
    st.floats(-1, 1) | st.sampled_from([-1.0, 0.0, 1.0]),
    st.booleans(),
)
def test_neighbours_share_no_pixel_and_leave_none_out(cuts: list[float], slope: float, even_ties: bool) -> None:
    cuts = [0.0, *sorted(cuts), 31.0]
    rings = [[(a, 0.0), (b, 0.0), (b + 20 * slope, 20.0), (a + 20 * slope, 20.0)] for a, b in itertools.pairwise(cuts)]
    corners = np.array([rings[0][0], rings[-1][1], rings[-1][2], rings[0][3]])
    whole = polygon_runs(corners, np.array([0]), np.array([0]), even_ties=even_ties)
    starts = 4 * np.arange(len(rings))
    parts = polygon_runs(np.array(rings).reshape(-1, 2), starts, np.arange(len(rings)), even_ties=even_ties)
    count = np.zeros((22, 100), int)
    for _, y, x0, x1 in parts:
        count[y, x0 + 30 : x1 + 30] += 1
    expected = np.zeros_like(count)
    for _, y, x0, x1 in whole:
        expected[y, x0 + 30 : x1 + 30] = 1
    assert np.array_equal(count, expected)


def enlarged(labels: np.ndarray, factor: int) -> np.ndarray:
    """A label map from its outlines, enlarged."""
    shapes = outlines(*pixel_runs(pixels_of(labels)))
    found = readers.Outlines.of(shapes.points * (factor / 2), shapes.rings[:-1], shapes.polygons[:-1])
    return found.paint((0, 0, factor * labels.shape[1], factor * labels.shape[0]))


def some_regions(seed: int) -> np.ndarray:
    """4-connected regions that touch each other along all kinds of borders, numbered from 1 on."""
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(30, 40)), 1.2)
    many, count = ndimage.label(noise > 0.1)
    few, more = ndimage.label(noise < -0.1)
    few[few > 0] += count
    assert count and more
    return np.asarray(many + few, np.int32)


@pytest.mark.parametrize("factor", [1, 2])
@pytest.mark.parametrize("seed", range(5))
def test_outlines_give_back_the_label_map(seed: int, factor: int) -> None:
    labels = some_regions(seed)
    np.testing.assert_array_equal(enlarged(labels, factor), labels.repeat(factor, 0).repeat(factor, 1))


@pytest.mark.parametrize("factor", [1, 2, 3, 4, 6])
def test_enlarged_outlines_are_not_shifted(factor: int) -> None:
    for seed in range(5):
        labels = some_regions(seed)
        numbers = np.arange(1, labels.max() + 1)
        near = labels.repeat(factor, 0).repeat(factor, 1)
        got = enlarged(labels, factor)
        shifts = np.subtract(*(ndimage.center_of_mass(m > 0, m, numbers) for m in (got, near)))
        assert np.abs(np.mean(shifts, axis=0)).max() < 0.03
        for axis in (0, 1):  # what leans to one side would lean to the other in a mirror
            np.testing.assert_array_equal(enlarged(np.flip(labels, axis), factor), np.flip(got, axis))


def test_many_polygons_at_once_are_those_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    turn = np.linspace(0, 2 * np.pi, 20, endpoint=False)
    points = random.uniform(0, 300, (50, 1, 2)) + 9 * np.stack([np.cos(turn), np.sin(turn)], axis=-1)
    together = polygon_runs(points.reshape(-1, 2), 20 * np.arange(50), np.arange(50))
    monkeypatch.setattr("pipeline.kernels.raster._CROSSINGS_AT_ONCE", 100)
    assert np.array_equal(together, polygon_runs(points.reshape(-1, 2), 20 * np.arange(50), np.arange(50)))
    area = np.bincount(together[:, 0], weights=together[:, 3] - together[:, 2])
    assert np.abs(area - 250).max() < 12


@pytest.mark.parametrize("suffix", [".png", ".tif", ".tiff", ".npy", ".geojson", ".geojson.gz"])
def test_every_kind_of_file(tmp_path: Path, suffix: str) -> None:
    labels = labels_map()
    path = tmp_path / f"field{suffix}"
    if suffix == ".png":
        Image.fromarray(labels).save(path)
    elif suffix.startswith(".tif"):
        tifffile.imwrite(path, labels)
    elif suffix == ".npy":
        np.save(path, labels.astype(np.int32))
    else:
        data = collection(*boxes_of(labels))
        path.write_bytes(gzip.compress(data) if suffix.endswith(".gz") else data)
    np.save(tmp_path / "truth.npy", labels)
    result = readers.compare(readers.load(tmp_path / "truth.npy"), readers.load(path))
    assert all(result[name] == 1 for name in METRICS)
    assert result["n_pred"] == 6


def test_multipolygons_holes_and_overlap(tmp_path: Path) -> None:
    path = tmp_path / "a.geojson"
    ring = [box(0, 0, 10, 10), box(2, 2, 8, 8)]
    two = feature([box(20, 0, 22, 4)], [box(24, 0, 26, 4)], kind="MultiPolygon")
    path.write_bytes(collection(feature(*ring), two, feature(box(0, 0, 30, 5))))
    labels = readers.load(path).paint((0, 0, 30, 10))
    expected = np.zeros((10, 30), int)
    expected[:5, :30] = 3
    expected[:10, :10] = 1
    expected[2:5, 2:8] = 3
    expected[5:8, 2:8] = 0
    expected[:4, 20:22] = expected[:4, 24:26] = 2
    assert np.array_equal(labels, expected)


@pytest.mark.parametrize("band", [1 << 24, 120, 1])
def test_bands_and_negative_coordinates_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, band: int
) -> None:
    monkeypatch.setattr(readers, "BAND_PIXELS", band)
    (tmp_path / "a.geojson").write_bytes(collection(feature(box(-5, -3, 5, 5)), feature(box(10, 50, 14, 60))))
    (tmp_path / "b.geojson").write_bytes(collection(feature(box(-5, -3, 5, 1)), feature(box(100, 5, 110, 9))))
    truth, pred = readers.load(tmp_path / "a.geojson"), readers.load(tmp_path / "b.geojson")
    assert readers.canvas(truth, pred) == (-5, -3, 110, 60)
    result = readers.compare(truth, pred)
    assert result["aji"] == pytest.approx(40 / (80 + 40 + 40))
    assert (result["tp"], result["fp"], result["fn"]) == (1, 1, 1)


def test_outlines_are_cut_at_a_label_map(tmp_path: Path) -> None:
    labels = np.zeros((10, 10), int)
    labels[0:4, 0:4] = 1
    (tmp_path / "a.geojson").write_bytes(collection(feature(box(-4, -4, 4, 4)), feature(box(20, 20, 30, 30))))
    result = readers.compare(readers.LabelMap(labels), readers.load(tmp_path / "a.geojson"))
    assert result["aji"] == 1
    assert result["n_pred"] == 1


def test_nothing_found(tmp_path: Path) -> None:
    (tmp_path / "a.geojson").write_bytes(collection())
    (tmp_path / "b.geojson").write_bytes(collection(feature(box(5, 5, 9, 9))))
    empty, some = readers.load(tmp_path / "a.geojson"), readers.load(tmp_path / "b.geojson")
    assert readers.compare(empty, empty)["aji"] == 1
    assert readers.compare(some, empty)["fn"] == 1
    assert readers.compare(empty, some)["fp"] == 1


def test_nuclei_of_a_slide(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    labels = labels_map()
    rows = [
        {
            "id": index,
            "geometry": shapely.to_wkb(shapely.Polygon(item["geometry"]["coordinates"][0])),
            "class": "nucleus",
            "class_id": 0,
            "probability": 1.0,
        }
        for index, item in enumerate(boxes_of(labels))
    ]
    about = {"grid": Grid(50, 40, 0.5, 1, 1).to_json()}
    pq.write_table(pa.Table.from_pylist(rows, schema=nuclei_schema(about)), tmp_path / "nuclei.parquet")
    (tmp_path / "truth.geojson.gz").write_bytes(gzip.compress(collection(*boxes_of(labels))))
    known, found = readers.load(tmp_path / "truth.geojson.gz"), readers.load(tmp_path / "nuclei.parquet")
    assert readers.compare(known, found)["aji"] == 1

    stray = feature(box(9e6, 5, 9e6 + 10, 9))  # the slide's end is known, so no canvas reaches there
    (tmp_path / "truth.geojson.gz").write_bytes(gzip.compress(collection(*boxes_of(labels), stray)))
    result = command.evaluate(tmp_path / "nuclei.parquet", tmp_path / "truth.geojson.gz")["images"]["truth"]
    assert (result["n_truth"], result["n_outside"], result["tp"], result["fn"]) == (7, 1, 6, 1)
    assert result["aji"] == pytest.approx(480 / (480 + 40))
    assert "1 of 7 known nuclei lie outside of the slide" in caplog.text


def test_a_mask_is_taken_apart(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Image.fromarray(((labels_map() > 0) * 255).astype(np.uint8)).save(tmp_path / "mask.png")
    with caplog.at_level(logging.WARNING):
        found = readers.load(tmp_path / "mask.png")
    assert "connected parts" in caplog.text
    assert score(labels_map(), found.paint(found.box))["aji"] == 1


def write_bad(folder: Path) -> dict[str, Path]:
    np.save(folder / "dict.npy", {"type_map": labels_map()}, allow_pickle=True)  # type: ignore[arg-type]
    np.save(folder / "float.npy", np.full((3, 3), 0.5))
    np.save(folder / "negative.npy", np.full((3, 3), -1))
    np.save(folder / "cube.npy", np.zeros((3, 4, 5), int))
    Image.fromarray(np.eye(4, 12, dtype=np.uint8).reshape(4, 4, 3)).save(folder / "colour.png")
    for name, data in {
        "text.png": b"no picture",
        "text.tif": b"no picture",
        "text.geojson": b"{",
        "cut.geojson.gz": gzip.compress(b"[]" * 100)[:20],
        "point.geojson": collection({"type": "Feature", "geometry": {"type": "Point", "coordinates": [1, 2]}}),
        "ring.geojson": collection(feature([[1, 2], "x"])),
        "far.geojson": collection(feature(box(0, 0, 1e300, 5))),
        "nowhere.geojson": collection({"type": "Feature", "properties": {}}),
        "table.parquet": b"PAR1",
        "note.txt": b"hello",
    }.items():
        (folder / name).write_bytes(data)
    return {path.name: path for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("dict.npy", "has type_map but no inst_map"),
        ("float.npy", "holds float64"),
        ("negative.npy", "negative"),
        ("cube.npy", "has shape"),
        ("colour.png", "coloured picture"),
        ("text.png", "cannot be read"),
        ("text.tif", "cannot be read"),
        ("text.geojson", "is not GeoJSON"),
        ("cut.geojson.gz", "is not GeoJSON"),
        ("point.geojson", "found a Point"),
        ("ring.geojson", "not GeoJSON of polygons"),
        ("far.geojson", "not a number of pixels"),
        ("nowhere.geojson", "not GeoJSON of polygons: KeyError 'geometry'"),
        ("table.parquet", "not a table of nuclei"),
        ("note.txt", "unknown kind of file"),
        ("absent.png", "is missing"),
    ],
)
def test_bad_files_are_told_in_one_line(tmp_path: Path, name: str, reason: str) -> None:
    write_bad(tmp_path)
    with pytest.raises(PipelineError, match=reason) as caught:
        readers.load(tmp_path / name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def run(*arguments: Any) -> int:
    import argparse

    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.main(parser.parse_args([str(argument) for argument in arguments]))


def test_command_on_folders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    truth, pred = tmp_path / "truth", tmp_path / "pred"
    truth.mkdir()
    pred.mkdir()
    for name in ("a", "b.c", "alone"):
        Image.fromarray(labels_map()).save(truth / f"{name}.png")
    (pred / "a.geojson").write_bytes(collection(*boxes_of(labels_map())))
    np.save(pred / "b.c.npy", labels_map(3))
    (pred / "readme.txt").write_text("not an image")
    assert run(pred, truth, "--json", tmp_path / "scores.json") == 0
    result = json.loads((tmp_path / "scores.json").read_text())
    assert list(result["images"]) == ["a", "b.c"]
    assert result["images"]["a"]["aji"] == 1
    assert result["images"]["b.c"]["aji"] == pytest.approx(0.5)
    assert result["mean"]["aji"] == pytest.approx(0.75)
    assert result["left_out"] == {"pred": [], "truth": ["alone"]}
    assert "1 of" in caplog.text
    assert "alone" in caplog.text
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[-1].split()[:2] == ["mean", "0.7500"]


def test_command_on_files_and_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.truth.geojson.gz").write_bytes(gzip.compress(collection(*boxes_of(labels_map()))))
    slides = tmp_path / "slides" / "x"
    slides.mkdir(parents=True)
    (slides / "nuclei.geojson.gz").write_bytes(gzip.compress(collection(*boxes_of(labels_map(4)))))
    assert run(slides / "nuclei.geojson.gz", tmp_path / "x.truth.geojson.gz") == 0
    first = capsys.readouterr().out
    assert run(tmp_path / "slides", tmp_path / "x.truth.geojson.gz") == 0
    assert capsys.readouterr().out == first
    assert first.splitlines()[1].split()[0] == "x"


def test_slides_that_failed_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("x", "bad"):
        (tmp_path / "truth").mkdir(exist_ok=True)
        (tmp_path / "truth" / f"{name}.geojson").write_bytes(collection(*boxes_of(labels_map())))
        (tmp_path / "slides" / name).mkdir(parents=True)
    (tmp_path / "slides" / "x" / "nuclei.geojson").write_bytes(collection(*boxes_of(labels_map(4))))
    stub = tmp_path / "slides" / "bad" / "nuclei.parquet"
    stub.write_text("slide 'bad' failed at inspect: file is empty. copy it again\n")
    assert run(tmp_path / "slides", tmp_path / "truth", "--json", tmp_path / "new" / "out.json") == 0
    found = json.loads((tmp_path / "new" / "out.json").read_text())
    assert list(found["images"]) == ["x"]
    assert found["left_out"] == {"pred": [], "truth": ["bad"]}
    assert "slide 'bad' failed at inspect" in caplog.text
    with pytest.raises(PipelineError, match="holds no nuclei: slide 'bad' failed at inspect"):
        run(stub, tmp_path / "truth" / "bad.geojson")


def test_results_of_slides_are_compared_as_their_metrics_are(tmp_path: Path) -> None:
    # Half of a slide is annotated, in coordinates from the corner of its bounds, in a file of the slide's own name.
    from pipeline import summary, testing

    paths = testing.write_slide(tmp_path / "results", "a, b", count=100)
    assert paths.root.name == "a~2C b"
    table = pq.read_table(paths.nuclei)
    half = [shapely.from_wkb(one) for one in table["geometry"].to_pylist()[:50]]
    corner = np.array([120, 80])
    moved = [shapely.transform(one, lambda points: points - corner) for one in half]
    (tmp_path / "truth").mkdir()
    features = [feature(*(shapely.get_coordinates(ring).tolist() for ring in shapely.get_rings(one))) for one in moved]
    for one in features:
        one["properties"]["classification"] = {"name": "Nucleus"}
    (tmp_path / "truth" / "a, b.geojson").write_bytes(collection(*features))
    paths.metrics.write_text(json.dumps({"slide": "a, b", "geojson_origin": corner.tolist()}))
    (found,) = command.evaluate(tmp_path / "results" / "slides", tmp_path / "truth")["images"].values()
    nuclei = summary.Nuclei.open(paths.nuclei)
    told = summary.evaluate_slide(nuclei, tmp_path / "truth" / "a, b.geojson", (2400, 1800), (120, 80))
    assert found == {name: pytest.approx(value, abs=1e-6) for name, value in told.items() if name != "region"}
    assert (found["tp"], found["n_truth"], found["n_outside"]) == (50, 50, 0)
    assert found["n_pred"] < 60
    # The classes are a classifier's, if it has run.
    kinds = pa.array(["A", "B"] * 50)
    where = table.schema.get_field_index("class")
    pq.write_table(table.set_column(where, "class", kinds), paths.root / "classified.parquet")
    for one, name in zip(features, "AB" * 25, strict=True):
        one["properties"]["classification"]["name"] = name if one is not features[0] else "Nucleus"
    (tmp_path / "truth" / "a, b.geojson").write_bytes(collection(*features))
    types = command.evaluate(tmp_path / "results" / "slides", tmp_path / "truth")["types"]
    assert set(types["classes"]) == {"A", "B"}
    assert types["accuracy"] == 1
    assert types["matched"] in (49, 50)
    # A slide on which nothing has been named yet does not count.
    testing.write_slide(tmp_path / "results", "c", count=20)
    plain = [copy.deepcopy(one) for one in features[:5]]
    for one in plain:
        one["properties"]["classification"]["name"] = "Nucleus"
    (tmp_path / "truth" / "c.geojson").write_bytes(collection(*plain))
    assert command.evaluate(tmp_path / "results" / "slides", tmp_path / "truth")["types"] == types
    # A copy has its own name; classes of nuclei that are no longer there are left out, and failed slides as ever.
    shutil.copytree(paths.root, paths.root.with_name("copy"))
    pq.write_table(table.slice(10), paths.nuclei)
    found = command.evaluate(tmp_path / "results" / "slides", tmp_path / "truth")
    assert set(found["left_out"]["pred"]) == {"copy"}
    assert "types" not in found
    paths.nuclei.write_text("slide 'a, b' failed at inspect: file is empty. copy it again\n")
    assert list(command.evaluate(tmp_path / "results" / "slides", tmp_path / "truth")["images"]) == ["c"]


def test_command_says_what_is_wrong(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", labels_map())
    np.save(tmp_path / "b.npy", labels_map()[:-1])
    sizes = "sizes differ: the truth has 50 x 40 pixels, the prediction 50 x 39"
    with pytest.raises(PipelineError, match=rf"b\.npy.*a\.npy.*{sizes}"):
        command.evaluate(tmp_path / "b.npy", tmp_path / "a.npy")
    folders = {name: tmp_path / name for name in ("one", "two", "none")}
    for folder in folders.values():
        folder.mkdir()
    np.save(folders["one"] / "a.npy", labels_map())
    np.save(folders["two"] / "b.npy", labels_map())
    with pytest.raises(PipelineError, match=r"share no name: 'a' \.\.\., 'b' \.\.\."):
        command.evaluate(folders["one"], folders["two"])
    with pytest.raises(PipelineError, match="holds nothing to compare"):
        command.evaluate(folders["none"], folders["two"])
    with pytest.raises(PipelineError, match="absent is missing"):
        command.evaluate(tmp_path / "absent", folders["two"])
    Image.fromarray(labels_map()).save(folders["one"] / "a.png")
    with pytest.raises(PipelineError, match="have one name"):
        command.evaluate(folders["one"], folders["two"])


def test_real_truth(shared_data: Path) -> None:
    truth = readers.load(shared_data / "slides" / "monuseg-mosaic.truth.geojson.gz")
    left, top, right, bottom = truth.box
    assert 0 <= left < right <= 7400
    assert 0 <= top < bottom <= 6200
    result = readers.compare(truth, truth)
    assert all(result[name] == 1 for name in METRICS)
    assert result["n_truth"] > 15_000


def test_odd_label_maps(tmp_path: Path) -> None:
    """What counts are the pixels of each number, not the numbers, their type or the file they are in."""
    labels = labels_map()
    np.save(tmp_path / "truth.npy", labels)
    scattered = np.array([0, 9, 700, 3, 12_345, 60_000, 8])[labels // 10]
    grey = np.array([0, 9, 200, 3, 123, 60, 8], np.uint8)[labels // 10]
    np.save(tmp_path / "scattered.npy", scattered * 2**33)
    np.save(tmp_path / "float.npy", labels.astype(np.float32))
    np.save(tmp_path / "dict.npy", {"inst_map": labels.astype(np.int32)}, allow_pickle=True)  # type: ignore[arg-type]
    Image.fromarray(np.dstack([grey] * 3)).save(tmp_path / "rgb.png")
    cv2.imwrite(str(tmp_path / "rgb16.png"), np.dstack([scattered.astype(np.uint16)] * 3))
    Image.fromarray(scattered.astype(np.int32)).save(tmp_path / "mode_i.tif")
    tifffile.imwrite(tmp_path / "page.tif", scattered.astype(np.uint32)[None])
    palette = Image.fromarray(grey)
    palette.putpalette(list(range(255, -1, -1)) * 3)
    palette.save(tmp_path / "palette.png")
    for path in sorted(tmp_path.iterdir()):
        result = command.evaluate(path, tmp_path / "truth.npy")
        assert all(result["mean"][name] == 1 for name in METRICS), path.name
        assert result["images"]["truth"]["n_pred"] == 6, path.name


def test_what_qupath_ignores_is_no_nucleus(tmp_path: Path) -> None:
    """Classes with a star, as QuPath has it; cells count by their nucleus."""
    region, none, cell = feature(box(0, 0, 30, 30)), feature(box(2, 2, 9, 9)), feature(box(10, 10, 25, 25))
    region["properties"] = {"classification": {"name": "Region*"}}
    none["properties"] = {"classification": {"names": ["Ignore*"]}}
    cell["nucleusGeometry"] = {"type": "Polygon", "coordinates": [box(14, 14, 20, 20)]}
    named = feature(box(2, 14, 9, 20)) | {"properties": {"classification": "Tumor: Positive"}}
    (tmp_path / "a.geojson").write_bytes(collection(region, none, cell, named))
    (tmp_path / "b.geojson").write_bytes(collection(feature(box(14, 14, 20, 20)), feature(box(2, 14, 9, 20))))
    result = command.evaluate(tmp_path / "a.geojson", tmp_path / "b.geojson")["images"]["b"]
    assert result["aji"] == 1
    assert result["n_pred"] == 2


@pytest.mark.parametrize("frame_first", [True, False])
def test_an_annotation_around_nuclei_is_no_nucleus(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, frame_first: bool
) -> None:
    """All objects of QuPath, as they are exported: the frame in which cells were detected, and these, one redrawn."""
    nuclei = [feature(box(20 * i, 30, 20 * i + 10, 40)) for i in range(5)]
    (tmp_path / "known.geojson").write_bytes(collection(*nuclei))
    for one in nuclei:
        one["properties"] = {"objectType": "detection"}
    nuclei[2]["properties"] = {"objectType": "annotation"}
    frame = feature(box(0, 0, 100, 80))
    for told in ({"properties": {"objectType": "annotation"}}, {"id": "PathAnnotationObject"}):
        around = frame | told
        objects = [around, *nuclei] if frame_first else [*nuclei, around]
        (tmp_path / "all.geojson").write_bytes(collection(*objects))
        row = command.evaluate(tmp_path / "all.geojson", tmp_path / "known.geojson")["images"]["known"]
        assert (row["aji"], row["n_pred"]) == (1, 5)
    assert "all.geojson: 1 annotations are left out" in caplog.text
    # What no person has drawn stays, however large.
    (tmp_path / "all.geojson").write_bytes(collection(frame, *nuclei))
    assert command.evaluate(tmp_path / "all.geojson", tmp_path / "known.geojson")["images"]["known"]["n_pred"] == 1


def classified(labels: np.ndarray, classes: dict[int, Any]) -> bytes:
    """Boxes of a label map with QuPath's classes, some without."""
    found = boxes_of(labels)
    for item, label in zip(found, np.unique(labels[labels > 0]).tolist(), strict=True):
        if label in classes:
            item["properties"]["classification"] = classes[label]
    return collection(*found)


def test_classes_of_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truth, pred = tmp_path / "truth", tmp_path / "pred"
    truth.mkdir()
    pred.mkdir()
    labels = labels_map()  # six of 8 x 10 pixels, 10 to 60
    (truth / "x.geojson").write_bytes(
        classified(labels, {10: {"name": "A"}, 20: {"names": ["A", "Positive"]}, 30: "B: Negative", 40: "B"})
    )
    # One of A is right, one is found as B, one of B is missed, 50 is of unknown class; 60 is, too, and was not found.
    found = np.where(np.isin(labels, (30, 60)), 0, labels)
    (pred / "x.geojson").write_bytes(classified(found, {10: "A", 20: "B", 40: "B", 50: "A"}))
    (truth / "y.geojson").write_bytes(classified(labels_map(1), {10: "A"}))
    (pred / "y.geojson").write_bytes(collection())
    (truth / "w.geojson").write_bytes(collection(*boxes_of(labels)))  # knows no classes: in no score of them
    (pred / "w.geojson").write_bytes(classified(labels_map(3), {10: "A", 20: "B"}))
    for folder in (truth, pred):  # nor does this
        Image.fromarray(labels).save(folder / "z.png")
    assert run(pred, truth, "--json", tmp_path / "scores.json") == 0
    result = json.loads((tmp_path / "scores.json").read_text())
    assert list(result) == ["images", "mean", "left_out", "types"]
    assert list(result["mean"]) == list(METRICS)
    assert result["images"]["x"]["type_counts"] == {
        "right": 2, "matched": 3, "classes": {"A": [1, 2, 1, 1.0], "B": [1, 2, 2, 1.0]},
    }  # fmt: skip
    assert result["images"]["y"]["type_counts"]["classes"] == {"A": [0, 1, 0, 0.0]}
    assert not any("type_counts" in result["images"][name] for name in "wz")
    types = result["types"]
    assert types["classes"]["A"] == {"n_truth": 3, "n_pred": 1, "f1": 0.5, "sq": 1, "pq": 0.5, "r2": -3}
    assert types["classes"]["B"] == {"n_truth": 2, "n_pred": 2, "f1": 0.5, "sq": 1, "pq": 0.5, "r2": 1}
    assert (types["mpq_plus"], types["r2"], types["accuracy"]) == (0.5, -1, pytest.approx(2 / 3))
    lines = capsys.readouterr().out.splitlines()
    assert lines[5].split()[0] == "mean"
    assert [line.split()[:2] for line in lines[7:10]] == [["class", "PQ"], ["A", "0.5000"], ["B", "0.5000"]]
    assert lines[10] == "mPQ+ 0.5000, R2 -1.0000, right of 3 matched nuclei 0.6667"


def test_composition_is_of_nuclei_with_a_pixel_in_the_middle(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # In a patch of 256 the middle of 224 begins at pixel 16 and ends before pixel 240.
    known = {"x": [(5, 16), (10, 17), (230, 250)], "y": [(100, 110), (239, 250), (240, 250)], "z": [(2, 9)]}
    found = {"x": [(10, 17), (230, 250)], "y": [(100, 110), (239, 250), (1, 9), (2, 4)], "z": []}
    for folder, images in (("truth", known), ("pred", found)):
        (tmp_path / folder).mkdir()
        for name, spans in images.items():
            patch = np.zeros((256, 256, 2), np.uint16)
            for index, (start, end) in enumerate(spans):
                patch[40 + 20 * index : 50 + 20 * index, start:end] = (index + 1, 1 + index % 2)
            np.save(tmp_path / folder / f"{name}.npy", patch)
    whole, middle = (command.evaluate(tmp_path / "pred", tmp_path / "truth", within) for within in (0, 224))
    # All in the middle are found; of class 1, which the first and third are of, 2, 2, 1 are known and 1, 2, 0 found.
    assert middle["images"]["x"]["type_counts"]["composition"] == {"1": (1, 1), "2": (1, 1)}
    assert middle["types"]["classes"]["1"]["r2"] == middle["types"]["r2"] == 1
    assert whole["types"]["classes"]["1"]["r2"] == pytest.approx(-2)
    for name, row in middle["types"]["classes"].items():  # all else is about the whole patch
        assert row | {"r2": 0} == whole["types"]["classes"][name] | {"r2": 0}
    assert run(tmp_path / "pred", tmp_path / "truth", "--count-within", "224") == 0
    assert f"R2 {middle['types']['r2']:.4f}" in capsys.readouterr().out
    with pytest.raises(PipelineError, match="--count-within -1"):
        run(tmp_path / "pred", tmp_path / "truth", "--count-within=-1")


def test_polygons_have_no_middle(tmp_path: Path) -> None:
    square = {"type": "Polygon", "coordinates": [[[5, 5], [15, 5], [15, 15], [5, 15], [5, 5]]]}
    feature = {"type": "Feature", "geometry": square, "properties": {"classification": {"name": "A"}}}
    for name in ("truth", "pred"):
        (tmp_path / f"{name}.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": [feature]}))
    with pytest.raises(PipelineError, match="--count-within 224: polygons do not tell the size of the patch"):
        run(tmp_path / "pred.geojson", tmp_path / "truth.geojson", "--count-within", "224")


def test_classes_that_cannot_be_compared(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    labels = labels_map(2)
    files = {
        "two": {10: "A", 20: "B"}, "others": {10: "C", 20: "D"}, "one": {10: "nucleus", 20: "nucleus"}, "none": {},
    }  # fmt: skip
    for name, classes in files.items():
        (tmp_path / f"{name}.geojson").write_bytes(classified(labels, classes))

    def compared(pred: str, truth: str) -> bool:
        return "types" in command.evaluate(tmp_path / f"{pred}.geojson", tmp_path / f"{truth}.geojson")

    assert compared("two", "two")
    for pair in (("one", "one"), ("one", "two"), ("two", "one"), ("none", "two"), ("two", "none"), ("none", "none")):
        assert not compared(*pair), pair
    assert not caplog.text
    assert not compared("others", "two")
    assert "no name is in both: A, B (known), C, D (found); name them alike" in caplog.text


def test_classes_of_arrays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CoNIC's two channels and HoVer-Net's two maps are the same, and numbers are names."""
    labels = labels_map().astype(np.int32)
    kinds = np.select([labels == 0, labels <= 30, labels <= 50], [0, 1, 2], 0)
    kinds[3, 2:12] = 2  # a row of the first: most of it is 1
    np.save(tmp_path / "conic.npy", np.dstack([labels, kinds]).astype(np.uint16))
    both = {"inst_map": labels * 7.0, "type_map": kinds.astype(np.float64)}
    np.save(tmp_path / "dict.npy", both, allow_pickle=True)  # type: ignore[arg-type]
    (tmp_path / "named.geojson").write_bytes(classified(labels, {10: "1", 20: "1", 30: "1", 40: "2", 50: "2", 60: "1"}))
    read: list[str] = []
    load_npy = label_maps.load_npy

    def noted(path: Path) -> Any:
        read.append(path.name)
        return load_npy(path)

    for module in (label_maps, readers):
        monkeypatch.setattr(module, "load_npy", noted)
    for name in ("conic.npy", "dict.npy", "named.geojson"):
        read.clear()
        result = command.evaluate(tmp_path / name, tmp_path / "conic.npy")
        assert read == ["conic.npy", *([name] if name.endswith(".npy") else [])]
        assert result["mean"]["pq"] == 1, name
        rows = {k: (v["n_truth"], v["n_pred"], v["pq"]) for k, v in result["types"]["classes"].items()}
        assert rows == {"1": (3, 3, 1), "2": (2, 2, 1)}, name  # what matches the sixth, of no class, counts nowhere
        assert (result["types"]["mpq_plus"], result["types"]["r2"]) == (1, None)
    np.save(tmp_path / "plain.npy", labels)
    assert "types" not in command.evaluate(tmp_path / "plain.npy", tmp_path / "conic.npy")
    for kind in (kinds[:-1], kinds - 1, kinds + 0.5):
        both = {"inst_map": labels, "type_map": kind}
        np.save(tmp_path / "bad.npy", both, allow_pickle=True)  # type: ignore[arg-type]
        with pytest.raises(PipelineError, match=r"bad\.npy: the classes are not whole numbers .*one for each pixel"):
            readers.load(tmp_path / "bad.npy")


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 1000), st.integers(1, 300))
def test_classes_of_instances_are_their_most_frequent(seed: int, band: int) -> None:
    random = np.random.default_rng(seed)
    labels, kinds = random.integers(0, 5, (9, 8)) * 3, random.integers(0, 3, (9, 8))
    found = readers.classed(labels, kinds)
    assert score(labels, found.labels)["aji"] == 1
    for label in np.unique(found.labels[found.labels > 0]).tolist():
        count = np.bincount(kinds[found.labels == label], minlength=3)
        code = found.classes.codes[label - 1]  # type: ignore[union-attr]
        name = ("", *found.classes.names)[code]  # type: ignore[union-attr]
        assert count[int(name or 0)] == count.max()


def test_classes_of_a_slide_in_bands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Known nuclei that lie outside of the slide are missed ones of their class."""
    monkeypatch.setattr(readers, "BAND_PIXELS", 100)
    monkeypatch.setattr(readers, "_POLYGONS_AT_ONCE", 2)
    labels = labels_map()
    names = ["A", "B", "A: Positive", "B", "A", "B"]
    rows = [
        {
            "id": index,
            "geometry": shapely.to_wkb(shapely.Polygon(item["geometry"]["coordinates"][0])),
            "class": name,
            "class_id": 0,
            "probability": 1.0,
        }
        for index, (item, name) in enumerate(zip(boxes_of(labels), names, strict=True))
    ]
    about = {"grid": Grid(50, 40, 0.5, 1, 1).to_json()}
    pq.write_table(pa.Table.from_pylist(rows, schema=nuclei_schema(about)), tmp_path / "nuclei.parquet")
    truth = json.loads(classified(labels, {10 * (i + 1): name for i, name in enumerate(names)}))
    strays = [feature(box(9e6, 5, 9e6 + 10, 9)), feature(box(-20, 5, -10, 9))]
    strays[0]["properties"]["classification"] = "B"
    truth["features"] = [strays[0], *truth["features"][::-1], strays[1]]
    (tmp_path / "truth.geojson").write_text(json.dumps(truth))
    result = command.evaluate(tmp_path / "nuclei.parquet", tmp_path / "truth.geojson")
    assert result["images"]["truth"]["n_outside"] == 2
    assert result["images"]["truth"]["type_counts"] == {
        "right": 6, "matched": 6, "classes": {"B": (3, 4, 3, 3.0), "A": (3, 3, 3, 3.0)},
    }  # fmt: skip
    some = readers.some_nuclei(tmp_path / "nuclei.parquet", np.array([False, True, True, False, False, True]))
    assert some.classes is not None
    assert [some.classes.names[code - 1] for code in some.classes.codes] == ["B", "A", "B"]
