from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import shapely
from scipy import ndimage

from pipeline.slides import synthetic


@pytest.fixture(scope="module")
def field() -> tuple[np.ndarray, np.ndarray]:
    return synthetic.make_field(903, 706, 0.5, seed=5)


def test_same_seed_same_field(field: tuple[np.ndarray, np.ndarray]) -> None:
    rgb, labels = synthetic.make_field(903, 706, 0.5, seed=5)
    assert np.array_equal(rgb, field[0])
    assert np.array_equal(labels, field[1])
    assert not np.array_equal(synthetic.make_field(903, 706, 0.5, seed=6)[1], labels)


def test_labels_are_whole_numbered_and_sized_like_nuclei(field: tuple[np.ndarray, np.ndarray]) -> None:
    _, labels = field
    count = int(labels.max())
    assert count > 100
    assert labels.dtype == np.int32
    areas = np.bincount(labels.ravel(), minlength=count + 1)[1:] * 0.25
    assert (areas > 5).all()
    assert (areas < 150).all()
    for index, box in enumerate(ndimage.find_objects(labels), start=1):
        assert box is not None
        assert ndimage.label(labels[box] == index)[1] == 1


def test_some_nuclei_touch(field: tuple[np.ndarray, np.ndarray]) -> None:
    _, labels = field
    left, right = labels[:, :-1], labels[:, 1:]
    assert ((left != right) & (left > 0) & (right > 0)).any()


@pytest.mark.parametrize("stain", sorted(synthetic.STAINS))
def test_nuclei_are_darker_and_bluer_than_the_stroma(stain: str) -> None:
    rgb, labels = synthetic.make_field(600, 600, 0.5, seed=2, stain=stain)
    density = -np.log((rgb.astype(float) + 1) / 256)
    tissue = (labels == 0) & (density.sum(-1) > 0.5)
    inside, outside = density[labels > 0].mean(0), density[tissue].mean(0)
    assert (inside > outside + 0.15).all()
    assert inside[0] / inside.sum() > outside[0] / outside.sum()
    assert (rgb[0, 0] > 225).all()  # white background in the corner


def test_stains_differ() -> None:
    looks = [synthetic.make_field(400, 400, 0.5, 1, stain=name)[0].mean((0, 1)) for name in sorted(synthetic.STAINS)]
    assert min(np.abs(looks[i] - looks[j]).max() for i in range(3) for j in range(i)) > 4


def test_empty_and_full_fields() -> None:
    rgb, labels = synthetic.make_field(300, 200, 0.5, seed=1, tissue=False)
    assert labels.max() == 0
    assert rgb.min() > 225
    rgb, labels = synthetic.make_field(300, 200, 0.5, seed=1, background=False, density=0)
    assert labels.max() == 0
    assert (rgb[:20, :20].mean() < 225) or (rgb.mean() < 225)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 3}, "at least 16"),
        ({"mpp": 0.0}, "mpp"),
        ({"density": -1.0}, "density"),
        ({"pairs": 2.0}, "pairs"),
    ],
)
def test_wrong_arguments(change: dict[str, float], message: str) -> None:
    arguments = {"width": 64, "height": 64, "mpp": 0.5, "seed": 1} | change
    with pytest.raises(ValueError, match=message):
        synthetic.make_field(**arguments)


def test_a_look_is_validated() -> None:
    with pytest.raises(ValueError, match="white"):
        synthetic.StainLook((1, 1, 1), (1, 1, 1), white=(0.0, 1.0, 1.0))
    with pytest.raises(ValueError, match="eosin"):
        synthetic.StainLook((1, 1, 1), (0, 1, 1))


@pytest.mark.parametrize(
    ("write", "name", "vendor", "levels"),
    [
        (synthetic.write_svs, "a slide.svs", "aperio", 2),
        (synthetic.write_tiff, "a.tiff", "generic-tiff", 3),
        (synthetic.write_ome_tiff, "a.ome.tiff", "generic-tiff", 1),  # OpenSlide does not look into SubIFDs
    ],
)
def test_openslide_reads_what_is_written(
    tmp_path: Path, field: tuple[np.ndarray, np.ndarray], write: object, name: str, vendor: str, levels: int
) -> None:
    openslide = pytest.importorskip("openslide")
    rgb, _ = field
    write(tmp_path / name, rgb, 0.37)  # type: ignore[operator]
    with openslide.OpenSlide(tmp_path / name) as slide:
        assert slide.dimensions == (903, 706)
        assert slide.level_count == levels
        assert slide.properties["openslide.vendor"] == vendor
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.37, rel=1e-6)
        assert slide.properties.get("openslide.objective-power") == ("27" if vendor == "aperio" else None)
        pixels = np.asarray(slide.read_region((200, 300), 0, (256, 256)).convert("RGB")).astype(int)
    assert np.abs(pixels - rgb[300:556, 200:456]).mean() < 4


def test_ome_tiff_has_a_pyramid_and_fixed_bytes(tmp_path: Path, field: tuple[np.ndarray, np.ndarray]) -> None:
    import tifffile

    path, rgb = tmp_path / "x.ome.tiff", field[0]
    synthetic.write_ome_tiff(path, rgb, 0.37)
    with tifffile.TiffFile(path) as tif:
        assert tif.is_ome
        assert [level.shape[:2] for level in tif.series[0].levels] == [(706, 903), (353, 451), (176, 225)]
        assert 'PhysicalSizeX="0.37"' in (tif.ome_metadata or "")
    before = path.read_bytes()
    synthetic.write_ome_tiff(path, rgb, 0.37)
    assert path.read_bytes() == before


def test_truth_is_exact_to_the_pixel(field: tuple[np.ndarray, np.ndarray]) -> None:
    _, labels = field
    content = synthetic.truth_geojson(labels, name="x")
    assert content == synthetic.truth_geojson(labels, name="x")
    features = json.loads(gzip.decompress(content))["features"]
    assert len(features) == labels.max()
    areas = np.bincount(labels.ravel())
    for feature in features:
        polygon = shapely.geometry.shape(feature["geometry"])
        ring = feature["geometry"]["coordinates"][0]
        assert polygon.is_valid
        assert ring[0] == ring[-1]
        assert polygon.area == areas[int(feature["id"])]


def test_outlines_keep_holes_and_refuse_parts() -> None:
    labels = np.zeros((8, 8), dtype=np.int32)
    labels[1:6, 1:6] = 1
    labels[3, 3] = 0
    rings = synthetic.outlines(labels)[1]
    assert len(rings) == 2
    assert shapely.Polygon(rings[0], rings[1:]).area == 24
    labels[7, 7] = 1
    with pytest.raises(ValueError, match="parts"):
        synthetic.outlines(labels)
