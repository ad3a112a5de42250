"""Nuclei corrected in QuPath as training data."""

from __future__ import annotations

import gzip
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import shapely
from PIL import Image

from pipeline.errors import PipelineError
from pipeline.evaluation.metrics import score
from pipeline.evaluation.readers import compare, load
from pipeline.exchange.label_maps import read_label_map
from pipeline.export import write_geojson
from pipeline.slides import open as opening
from pipeline.slides.synthetic import make_field, outlines, write_svs
from pipeline.stores.grid import Grid
from pipeline.testing import nuclei_table, write_nuclei
from pipeline.training.data import Field, load_fields

WIDTH, HEIGHT = 700, 520
IMAGE, LABELS = make_field(WIDTH, HEIGHT, 0.25, seed=5)


def box(x0: float, y0: float, x1: float, y1: float) -> dict[str, Any]:
    return shapely.geometry.mapping(shapely.box(x0, y0, x1, y1))


def feature(geometry: Any, kind: str = "annotation", name: str = "", title: str = "", **more: Any) -> dict[str, Any]:
    properties: dict[str, Any] = {"objectType": kind}
    if name:
        properties["classification"] = {"name": name, "color": [200, 0, 0]}
    if title:
        properties["name"] = title
    return {"type": "Feature", "id": "1-2", "geometry": geometry, "properties": properties, **more}


def nuclei(labels: np.ndarray = LABELS, kind: str = "detection", name: str = "") -> list[dict[str, Any]]:
    return [feature({"type": "Polygon", "coordinates": rings}, kind, name) for rings in outlines(labels).values()]


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("slide") / "s.svs"
    write_svs(path, IMAGE, 0.25, quality=95)
    return path


Write = Callable[..., dict[str, Any]]


@pytest.fixture
def source(tmp_path: Path, slide: Path) -> Write:
    def write(*features: dict[str, Any], name: str = "s.geojson", **keys: Any) -> dict[str, Any]:
        root = tmp_path / "data"
        for folder in ("slides", "annotations"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        if not (root / "slides" / "s.svs").exists():
            (root / "slides" / "s.svs").symlink_to(slide)
        text = json.dumps({"type": "FeatureCollection", "features": list(features)}).encode()
        (root / "annotations" / name).write_bytes(gzip.compress(text) if name.endswith("gz") else text)
        return {"kind": "qupath", "path": str(root), **keys}

    return write


def of(source: dict[str, Any]) -> list[Field]:
    return load_fields([source])


def test_corrected_export_is_training_data(tmp_path: Path, source: Write) -> None:
    """From the pipeline's own export through corrections to labels."""
    rings = outlines(LABELS)
    table = nuclei_table(len(rings), WIDTH, HEIGHT)
    shapes = [shapely.Polygon(r[0], r[1:]) for r in rings.values()]
    wkb = pa.array(shapely.to_wkb(np.array(shapes, object)), pa.binary())
    table = table.set_column(table.schema.get_field_index("geometry"), "geometry", wkb)
    grid = Grid.for_slide(WIDTH, HEIGHT, 0.25, 0.25, 0.5)
    write_nuclei(tmp_path / "nuclei.parquet", table, grid, "s")
    write_geojson(tmp_path / "nuclei.parquet", tmp_path / "s.geojson.gz", "s")
    exported = json.loads(gzip.decompress((tmp_path / "s.geojson.gz").read_bytes()))["features"]
    assert len(exported) == len(rings)
    # Corrections: one nucleus removed, one called none, one drawn by hand, a region outlined.
    corrected = LABELS.copy()
    centres = [shape.centroid.coords[0] for shape in shapes]
    inner = [i for i, (x, y) in enumerate(centres) if 60 < x < 620 and 60 < y < 440]
    first, second = inner[0], inner[-1]
    for index in (first, second):
        corrected[corrected == list(rings)[index]] = 0
    exported[second]["properties"]["classification"] = {"name": "Ignore*", "color": [0, 0, 0]}
    del exported[first]
    x, y = (int(v) for v in centres[first])
    corrected[y - 5 : y + 6, x - 6 : x + 7][corrected[y - 5 : y + 6, x - 6 : x + 7] == 0] = 10_000
    drawn = feature(box(x - 6, y - 5, x + 7, y + 6), "annotation", "Mitosis")
    region = feature(box(40, 30, 640, 460), "annotation", title="Region 1", isLocked=True)
    (field,) = of(source(*exported, region, drawn, name="s.geojson.gz"))
    truth = corrected[30:460, 40:640]
    assert field.mpp == 0.25
    assert field.patient == "qupath-s"
    assert field.labels.shape == truth.shape
    result = score(truth, field.labels)
    assert result["aji"] > 0.999
    assert result["fn"] == result["fp"] == 0
    # The pixels are the slide's, up to its JPEG compression.
    assert np.abs(field.image.astype(int) - IMAGE[30:460, 40:640]).mean() < 3
    # Classes are as QuPath has them.
    assert field.classes == ("Mitosis", "other <&>", "tumour")
    assert field.types is not None
    assert field.types[y - 30, x - 40] == 1
    assert ((field.types > 0) == (field.labels > 0)).all()


def test_without_regions_it_is_the_box_around_the_nuclei(source: Write, caplog: pytest.LogCaptureFixture) -> None:
    labels = np.zeros_like(LABELS)
    labels[100:400, 200:500] = LABELS[100:400, 200:500]
    ys, xs = np.nonzero(labels)
    parts = nuclei(relabel(labels))
    with caplog.at_level(logging.INFO):
        (field,) = of(source(*parts))
    assert "no region tells what is annotated" in caplog.text
    window = labels[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
    assert field.labels.shape == window.shape
    assert ((field.labels > 0) == (window > 0)).all()
    assert field.types is None


def test_exports_that_count_from_the_scan(
    tmp_path: Path, slide: Path, source: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    area = (120, 80, 520, 400)
    (expected,) = of(source(feature(box(*area), name="Region*"), *nuclei()))
    real = opening.open_slide

    def bounded(path: Path) -> Any:
        opened = real(path)
        opened.bounds = (40, 30, WIDTH - 40, HEIGHT - 30)
        return opened

    monkeypatch.setattr(opening, "open_slide", bounded)
    moved = [feature(box(*area), name="Region*"), *nuclei()]
    for one in moved:
        rings = one["geometry"]["coordinates"]
        one["geometry"]["coordinates"] = [(np.asarray(ring) - (40, 30)).tolist() for ring in rings]
    (found,) = of(source(*moved, origin="bounds"))
    assert np.array_equal(found.labels, expected.labels) and np.array_equal(found.image, expected.image)
    (shifted,) = of(source(*moved))
    assert not np.array_equal(shifted.image, expected.image)
    # What a file states counts more.
    keys = source(*moved, origin="bounds")
    path = tmp_path / "data" / "annotations" / "s.geojson"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"level0_origin": [0, 0]}))
    assert np.array_equal(of(keys)[0].image, shifted.image)


def relabel(labels: np.ndarray) -> np.ndarray:
    """Each connected part a label of its own, as cutting may have divided some."""
    from skimage.measure import label

    return np.asarray(label(labels, connectivity=1), np.int32)


def test_coarser_pixels(source: Write) -> None:
    (field,) = of(source(*nuclei(), feature(box(0, 0, WIDTH, HEIGHT), name="Region*"), mpp=0.5))
    assert field.mpp == 0.5
    assert field.labels.shape == (HEIGHT // 2, WIDTH // 2)
    up = np.kron(field.labels, np.ones((2, 2), int))
    assert score(LABELS, up)["dice"] > 0.93
    small = IMAGE.reshape(HEIGHT // 2, 2, WIDTH // 2, 2, 3).mean(axis=(1, 3))
    assert np.abs(field.image - small).mean() < 3


def test_stated_pixels_are_those_that_are_read(source: Write) -> None:
    region = feature(box(0, 0, WIDTH, HEIGHT), name="Region*")
    stated, whole = (of(source(*nuclei(), region, **keys))[0] for keys in ({"mpp_of": {"qupath-s": 0.5}}, {"mpp": 0.5}))
    assert stated.mpp == whole.mpp == 0.5
    np.testing.assert_array_equal(stated.labels, whole.labels)


def test_what_trains_is_what_is_evaluated(tmp_path: Path) -> None:
    point = {"type": "Point", "coordinates": [3, 3]}
    around = box(0, 0, WIDTH, HEIGHT)
    others = [
        feature(around, name="Region*"), feature(around, name="Training"), feature(around, title="Region 1"),
        feature(around, name="Ignore*"), feature(around, kind="tile"), feature(point),
    ]  # fmt: skip
    for name, more in (("plain", []), ("full", others)):
        text = json.dumps({"type": "FeatureCollection", "features": [*nuclei(), *more]})
        (tmp_path / f"{name}.geojson").write_text(text)
    # What others call their objects means nothing.
    named = [one | {"id": f"tile_3-{i}", "properties": {}} for i, one in enumerate(nuclei())]
    frame = feature(around) | {"id": "PathTileObject", "properties": {}}
    text = json.dumps({"type": "FeatureCollection", "features": [*named, frame]})
    (tmp_path / "named.geojson").write_text(text)
    plain, full, other = (load(tmp_path / f"{name}.geojson") for name in ("plain", "full", "named"))
    assert compare(plain, full)["aji"] == compare(plain, other)["aji"] == 1


def test_large_regions_are_cut_evenly(source: Write) -> None:
    fields = of(source(*nuclei(), feature(box(0, 0, WIDTH, HEIGHT), name="Region*"), field_size=300))
    assert len(fields) == 6
    assert {f.labels.shape for f in fields} == {(260, 233), (260, 234)}
    assert len({f.patient for f in fields}) == 1
    whole = np.zeros_like(LABELS)
    for number, one in enumerate(fields):
        x, y = map(int, one.name.split("-")[-2:])
        h, w = one.labels.shape
        whole[y : y + h, x : x + w] = one.labels + (one.labels > 0) * 1000 * number
    assert ((whole > 0) == (LABELS > 0)).all()
    some = of(source(*nuclei(), feature(box(0, 0, WIDTH, HEIGHT), name="Region*"), field_size=300, limit=2))
    assert [f.name for f in some] == [fields[0].name, fields[-1].name]


def test_beyond_a_slanted_region_is_white(source: Write) -> None:
    triangle = {"type": "Polygon", "coordinates": [[[0, 0], [400, 0], [0, 400], [0, 0]]]}
    (field,) = of(source(*nuclei(), feature(triangle, title="training area")))
    assert field.labels.shape == (400, 400)
    outside = np.add.outer(np.arange(400), np.arange(400)) > 400
    assert (field.image[outside] == 255).all()
    assert not field.labels[outside].any()
    inside = np.add.outer(np.arange(400), np.arange(400)) < 398
    assert ((field.labels > 0) == (LABELS[:400, :400] > 0))[inside].all()


def test_regions_by_other_names(source: Write) -> None:
    (field,) = of(source(*nuclei(), feature(box(100, 100, 300, 260), name="Done: Positive"), regions=["done"]))
    assert field.labels.shape == (160, 200)


def test_older_and_stranger_exports(source: Write) -> None:
    whole = feature(box(0, 0, 200, 200), name="Region*")
    cell = feature(box(10, 10, 60, 60), "cell", "Tumor: Positive", nucleusGeometry=box(20, 20, 40, 40))
    old = {"type": "Feature", "id": "PathDetectionObject", "geometry": box(100, 20, 110, 32), "properties": {}}
    new = feature(box(100, 60, 110, 72))
    new["properties"]["classification"] = {"names": ["Stroma", "x"], "color": [1, 2, 3]}
    tile = feature(box(0, 0, 200, 200), "tile")
    point = feature({"type": "Point", "coordinates": [3, 4]})
    none = feature(None)
    parts = feature(
        {
            "type": "MultiPolygon",
            "coordinates": [box(120, 120, 130, 130)["coordinates"], box(140, 120, 150, 130)["coordinates"]],
        }
    )
    (field,) = of(source(whole, cell, old, new, tile, point, none, parts))
    assert len(np.unique(field.labels)) == 5
    assert np.count_nonzero(field.labels) == 400 + 120 + 120 + 200
    assert field.classes == ("Stroma", "Tumor")
    assert field.types is not None
    assert field.types[30, 30] == 2
    assert field.types[25, 105] == 0
    assert field.labels[25, 105] > 0


def test_patients_of_a_table(tmp_path: Path, slide: Path, source: Write) -> None:
    table = tmp_path / "slides.tsv"
    table.write_text(f"slide\tpath\tmpp\tpatient\torgan\ns\t{slide}\t0.5\tP7\tskin\n")
    (field,) = of(source(*nuclei(), feature(box(0, 0, 300, 300), name="Region*"), table=str(table)))
    assert (field.patient, field.organ, field.mpp) == ("P7", "skin", 0.5)
    (again,) = of(source(*nuclei(), feature(box(0, 0, 300, 300), name="Region*"), slides=str(table), name="s.geojson"))
    assert again.patient == "P7"


def test_a_region_may_hold_what_is_no_nucleus(source: Write, caplog: pytest.LogCaptureFixture) -> None:
    region = feature(box(0, 0, 300, 300), name="Region*")
    (field,) = of(source(region, empty=True))
    assert field.image.shape == (300, 300, 3) and not field.labels.any()
    with pytest.raises(PipelineError, match=r"field qupath-s-0-0 of qupath holds nuclei, but empty: true"):
        of(source(region, *nuclei(), empty=True))
    for nowhere in (box(WIDTH, 0, WIDTH + 300, 300), box(0, 0, 20, 300)):
        caplog.clear()
        with pytest.raises(PipelineError, match="data source 'qupath' has no field"):
            of(source(feature(nowhere, name="Region*"), empty=True))
        assert "s: no region of 32 pixels lies on the slide, which is left out" in caplog.text


def test_bad_exports_are_one_line(tmp_path: Path, source: Write) -> None:
    region = feature(box(0, 0, 300, 300), name="Region*")
    cases: list[tuple[list[dict[str, Any]], dict[str, Any], str]] = [
        ([], {}, "s: the export holds no nucleus"),
        ([feature(None)], {}, "holds no nucleus"),
        ([region], {}, "hold no nucleus"),
        ([feature(box(9000, 9000, 9010, 9010))], {}, "1 of 1 nuclei lie outside the slide of 700 x 520"),
        (
            [feature(box(x, 20, x + 10, 30)) for x in (20, 800, 900)],
            {},
            "2 of 3 nuclei lie outside the slide of 700 x 520",
        ),
        ([feature(box(0, 0, 400, 400)), *nuclei()], {}, r"the object at \(0, 0\) of 10000 µm² is not a nucleus"),
        ([feature({"type": "LineString", "coordinates": [[0, 0], [5, 5]]}, name="Region*")], {}, "encloses nothing"),
        ([{"type": "Feature", "properties": {}}], {}, "not GeoJSON of QuPath: KeyError 'geometry'"),
        ([feature({"type": "Polygon", "coordinates": [["a"]]})], {}, "not GeoJSON of QuPath"),
        ([feature({"type": "Polygon", "coordinates": [[[0, 0], [1e300, 0], [1, 1]]]})], {}, "not a list of points"),
        ([feature({"type": "Polygon"})], {}, "not GeoJSON of QuPath: KeyError 'coordinates'"),
        ([region], {"field_size": 5}, "field_size 5"),
        ([region], {"regions": [""]}, "regions name nothing"),
        ([region], {"slides": str(tmp_path / "absent")}, "does not exist"),
        ([region], {"speed": 1}, "unknown key 'speed'"),
    ]
    for features, keys, reason in cases:
        with pytest.raises(PipelineError, match=reason) as caught:
            of(source(*features, **keys))
        assert "\n" not in str(caught.value)


def test_unmatched_and_damaged_files_are_one_line(tmp_path: Path, source: Write) -> None:
    good = source(*nuclei())
    annotations = tmp_path / "data" / "annotations"
    (annotations / "other.geojson").write_bytes(b"[]")
    with pytest.raises(PipelineError, match=r"other\.geojson has no slide, there are s"):
        of(good)
    (annotations / "other.geojson").unlink()
    (annotations / "s.geojson").write_bytes(b'{"type": "FeatureCollection", "features": [')
    with pytest.raises(PipelineError, match="is not GeoJSON"):
        of(good)
    (annotations / "s.geojson.gz").write_bytes(gzip.compress(b"[]")[:10])
    with pytest.raises(PipelineError, match="are of one slide"):
        of(good)
    for path in annotations.iterdir():
        path.unlink()
    with pytest.raises(PipelineError, match="no GeoJSON in"):
        of(good)
    source(*nuclei(), name="s.svs.geojson")
    assert len(of(good)) == 1
    (tmp_path / "data" / "slides" / "s.svs").unlink()
    (tmp_path / "data" / "slides" / "s.svs").write_bytes(b"no slide")
    with pytest.raises(PipelineError, match="slide s: "):
        of(good)


def test_what_users_get_wrong(tmp_path: Path, source: Write, slide: Path, caplog: pytest.LogCaptureFixture) -> None:
    parts = nuclei()
    region = feature(box(0, 0, WIDTH, HEIGHT), name="Region*")
    good = source(region, *parts)
    annotations = tmp_path / "data" / "annotations"
    # Two exports of one slide, with and without its suffix.
    (annotations / "s.svs.geojson").write_bytes((annotations / "s.geojson").read_bytes())
    with pytest.raises(PipelineError, match=r"s\.geojson and .*s\.svs\.geojson are of one slide, s \(keep one"):
        of(good)
    (annotations / "s.svs.geojson").unlink()
    # Outlines of another slide lie anywhere.
    places = np.argwhere(IMAGE.mean(axis=2) > 200)[::997].tolist()
    assert len(places) >= 20
    elsewhere = [feature(box(x, y, x + 4, y + 4)) for y, x in places]
    with pytest.raises(
        PipelineError, match=r"s: the \d+ outlines around \(0, 0\) are no darker than what lies between"
    ):
        of(source(region, *elsewhere))
    # Two spellings are two classes, which is told.
    for one, name in zip(parts, ("Tumor", "tumor ", "Stroma", "Nucleus") * len(parts), strict=False):
        one["properties"]["classification"] = {"name": name}
    with caplog.at_level(logging.INFO):
        (field,) = of(source(region, *parts))
    assert field.classes == ("Stroma", "Tumor", "tumor")
    assert "classes Tumor " in caplog.text
    assert "'Tumor' and 'tumor' are taken for different classes" in caplog.text
    assert "Stroma' are" not in caplog.text
    with pytest.raises(
        PipelineError, match=r"S\.geojson has no slide, there are s \(name the export as the slide, capitals"
    ):
        (annotations / "s.geojson").rename(annotations / "S.geojson")
        of(good)


def test_a_slide_that_tells_no_pixel_size(tmp_path: Path, source: Write) -> None:
    slides = tmp_path / "plain"
    slides.mkdir()
    Image.fromarray(IMAGE).save(slides / "s.png")
    with pytest.raises(PipelineError, match=r"slide s: no pixel size .*give it as mpp of the data source 'qupath'"):
        of(source(*nuclei(), slides=str(slides)))
    (field,) = of(source(*nuclei(), slides=str(slides), mpp=0.25))
    assert field.mpp == 0.25


def test_real_slide(shared_data: Path, tmp_path: Path) -> None:
    """Known nuclei of a slide made of fields, with a region around its first field, against the field's own labels."""
    value = json.loads(gzip.decompress((shared_data / "slides" / "monuseg-mosaic.truth.geojson.gz").read_bytes()))
    value["features"].append(feature(box(200, 200, 1200, 1200), name="Region*"))
    (tmp_path / "monuseg-mosaic.geojson").write_text(json.dumps(value))
    (field,) = load_fields([{"kind": "qupath", "path": str(tmp_path), "slides": str(shared_data / "slides")}])
    known, *_ = sorted((shared_data / "monuseg" / "labels").iterdir())
    assert abs(field.mpp - 0.25) < 0.01
    result = score(read_label_map(known), field.labels)
    assert result["f1"] > 0.99
    assert result["aji"] > 0.9  # its outlines run through the centres of the outermost pixels
