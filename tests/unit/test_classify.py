"""The kernel, the file and the stage that tell classes of nuclei apart."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial import cKDTree

from pipeline import classify, testing
from pipeline.cli import main
from pipeline.errors import PipelineError
from pipeline.kernels import classify as kernel
from pipeline.layout import SlideLayout
from pipeline.models.classifier import Classifier, Measured, check_classifier
from pipeline.models.package import NucleusClass
from pipeline.pictures.class_map import class_map
from pipeline.pictures.figure import THUMBNAIL_SIDE
from pipeline.stores.grid import Grid
from pipeline.stores.nuclei import about_nuclei
from pipeline.testing import MODEL


def columns(count: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.uniform(0.1, 1, count).astype(np.float32) for name in kernel.COLUMNS}


def features(measured: dict[str, np.ndarray], points: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
    rows = np.arange(len(points)) if rows is None else rows
    return kernel.features(measured, rows, *kernel.nearest(points, rows, cKDTree(points)))


def a_classifier(seed: int = 0, **more: Any) -> Classifier:
    rng = np.random.default_rng(seed)
    size = len(kernel.FEATURES)
    values: dict[str, Any] = {
        "name": "mine",
        "classes": (NucleusClass("Tumor", (200, 0, 0)), NucleusClass("日本 <b>", (0, 90, 200))),
        "model": MODEL,
        "mean": rng.normal(size=size),
        "spread": rng.uniform(0.5, 2, size),
        "weights": rng.normal(size=(1 + size + size * (size + 1) // 2, 2)),
        "data": ({"slide": "a", "nuclei": {"Tumor": 30}},),
        "scores": {"balanced_accuracy": 0.9},
    }
    return Classifier(**values | more)


def stage_arguments(paths: SlideLayout, classifier: Path, slide: str) -> list[str]:
    return [
        "classify", f"--slide={slide}", f"--inspect={paths.inspect}", f"--tissue={paths.tissue}",
        f"--tissue-geojson={paths.tissue_geojson}", f"--measure={paths.measure}", f"--nuclei={paths.nuclei}",
        f"--classifier={classifier}", f"--out={paths.classify}", f"--parquet={paths.classified}",
        f"--geojson={paths.classified_geojson}", f"--png={paths.classified_png}",
    ]  # fmt: skip


@given(st.integers(1, 40), st.integers(0, 5), st.integers(0, 1000))
def test_neighbours_are_the_nearest_others(count: int, doubled: int, seed: int) -> None:
    points = np.random.default_rng(seed).uniform(0, 50, (count, 2))
    points = np.concatenate([points, points[:doubled], points[:1].repeat(2 * (doubled > 3), axis=0)])
    rows = np.arange(len(points))
    index, distance = kernel.nearest(points, rows, cKDTree(points))
    k = min(kernel.NEIGHBOURS, len(points) - 1)
    assert index.shape == (len(points), k)
    between = np.linalg.norm(points[:, None] - points[None], axis=2)
    np.fill_diagonal(between, np.inf)
    for row in rows:
        assert row not in index[row]
        assert len(set(index[row].tolist())) == k
        expected = np.sort(between[row])[:k]
        np.testing.assert_allclose(between[row, index[row]], expected, atol=1e-12)
        assert distance[row] == pytest.approx(expected[-1] if k else np.inf)


def test_what_lies_around_a_nucleus() -> None:
    # Nine nuclei in a row, 10 µm apart, all lying along it but the middle one, which lies across.
    points = np.column_stack([np.arange(9) * 10.0, np.zeros(9)])
    measured = columns(9)
    measured["orientation"] = np.zeros(9, np.float32)
    measured["orientation"][4] = np.pi / 2
    found = features(measured, points)
    named = dict(zip(kernel.FEATURES, found.T, strict=True))
    others = np.delete(np.arange(9), 4)
    assert named["alignment"][4] == pytest.approx(-1, abs=1e-6)
    assert named["alignment"][0] == pytest.approx((7 - 1) / 8, abs=1e-6)
    assert named["crowding"][4] == pytest.approx(np.log(8 / (np.pi * 40**2)))
    assert named["area_um2"] == pytest.approx(np.log(measured["area_um2"]))
    assert named["area_um2 around"][4] == pytest.approx(np.log(measured["area_um2"][others]).mean())
    assert named["eosin_mean around"][4] == pytest.approx(measured["eosin_mean"][others].mean())


def test_features_of_some_nuclei_are_those_of_all() -> None:
    points, measured = np.random.default_rng(1).uniform(0, 300, (200, 2)), columns(200)
    rows = np.array([199, 0, 17])
    np.testing.assert_array_equal(features(measured, points, rows), features(measured, points)[rows])


def test_a_nucleus_alone_and_values_that_are_none() -> None:
    alone = features(columns(1), np.zeros((1, 2)))
    assert np.isfinite(alone[0, : len(kernel.OWN)]).all()
    assert np.isnan(alone[0, len(kernel.OWN) :]).all()
    measured = columns(3)
    measured["area_um2"][0] = 0
    measured["hematoxylin_mean"][1] = np.nan
    found = features(measured, np.zeros((3, 2)))  # all on one place: infinitely crowded
    assert np.isnan(found[0, kernel.FEATURES.index("area_um2")])
    assert np.isnan(found[:, kernel.FEATURES.index("crowding")]).all()
    mean, spread = kernel.scale_of(found)
    terms = kernel.design(found, mean, spread)
    assert np.isfinite(terms).all()
    assert spread[kernel.FEATURES.index("crowding")] == 1


def test_terms_of_the_model() -> None:
    matrix = np.array([[1.0, np.nan], [3.0, 1e9], [-1.0, 4.0]])
    terms = kernel.design(matrix, np.array([1.0, 4.0]), np.array([2.0, 1.0]))
    limit = kernel.LIMIT
    expected = [[1, 0, 0, 0, 0, 0], [1, 1, limit, 1, limit, limit**2], [1, -1, 0, 1, 0, 0]]
    np.testing.assert_array_equal(terms, expected)


@pytest.mark.parametrize(("classes", "seed"), [(2, 0), (2, 1), (3, 2), (4, 3)])
def test_weights_are_the_best_ones(classes: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    terms = np.column_stack([np.ones(60), rng.normal(size=(60, 3))])
    kinds = np.concatenate([np.arange(classes), rng.integers(0, classes, 60 - classes)])
    weights = kernel.fit_weights(terms, kinds, classes, 0.01)

    def loss(values: np.ndarray) -> float:
        told = np.log(kernel.probabilities(terms, values)[np.arange(60), kinds])
        by_class = [told[kinds == one].mean() for one in range(classes)]
        return float(-np.mean(by_class) + 0.005 * (values[1:] ** 2).sum())

    least = loss(weights)
    for _ in range(10):
        assert loss(weights + rng.normal(scale=0.05, size=weights.shape)) > least - 1e-7


def test_how_common_a_class_is_says_nothing() -> None:
    kinds = np.array([0] * 90 + [1] * 10)
    weights = kernel.fit_weights(np.ones((100, 1)), kinds, 2, 0.1)
    np.testing.assert_allclose(kernel.probabilities(np.ones((1, 1)), weights), [[0.5, 0.5]], atol=1e-4)


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    made = a_classifier()
    made.save(tmp_path / "to" / "mine.json")
    read = Classifier.load(tmp_path / "to" / "mine.json")
    assert (read.name, read.classes, read.model, read.data, read.scores) == (
        made.name, made.classes, made.model, made.data, made.scores,
    )  # fmt: skip
    matrix = np.random.default_rng(0).normal(size=(50, len(kernel.FEATURES)))
    np.testing.assert_array_equal(read.probabilities(matrix), made.probabilities(matrix))
    assert len(read.sha256) == 64
    assert [path.name for path in (tmp_path / "to").iterdir()] == ["mine.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "other"}, "is not a classifier"),
        ({"features": ["area"]}, "of another version"),
        ({"weights": [[1.0, 2.0]]}, "weights must be"),
        ({"mean": [None] * len(kernel.FEATURES)}, "damaged"),
        ({"spread": [0.0] * len(kernel.FEATURES)}, "spread must be above 0"),
        ({"classes": [{"name": "a", "color": [1, 2, 3]}] * 2}, "same name"),
        ({"classes": [{"name": "a", "color": [1, 2, 3]}]}, "2 to 255 classes"),
        ({"classes": None}, "damaged"),
        (
            {"classes": [{"name": "a", "color": [300, 0, 0]}, {"name": "b", "color": [0, 0, 0]}]},
            "three numbers of 0 to 255",
        ),
        ({"classes": [{"name": "a", "color": [1, 2]}, {"name": "b", "color": [0, 0, 0]}]}, "three numbers of 0 to 255"),
        ({"mean": [10**400] * len(kernel.FEATURES)}, "damaged"),
    ],
)
def test_damage_is_one_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "c.json"
    a_classifier().save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(PipelineError, match=message) as raised:
        Classifier.load(path)
    assert "\n" not in str(raised.value)
    assert "python -m pipeline classifier" in str(raised.value)


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe", b"[]", b"[" * 100_000])
def test_what_is_no_classifier_is_one_line(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "c.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PipelineError, match="is missing" if content is None else "is not a classifier"):
        check_classifier(path, MODEL)


def test_before_a_run_another_model_is_refused(tmp_path: Path) -> None:
    a_classifier().save(tmp_path / "c.json")
    check_classifier(tmp_path / "c.json", MODEL)
    with pytest.raises(PipelineError, match="'new'"):
        check_classifier(tmp_path / "c.json", {"name": "new", "sha256": "0" * 64})


def test_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slide = "s 1 <&>"
    paths = testing.write_slide(tmp_path, slide, count=300)
    a_classifier().save(tmp_path / "c.json")
    assert main(stage_arguments(paths, tmp_path / "c.json", slide)) == 0
    before, after = pq.read_table(paths.nuclei), pq.read_table(paths.classified)
    kept = [name for name in before.column_names if name not in ("class", "class_id")]
    assert after.select(kept).equals(before.select(kept))
    assert after.column_names == [*before.column_names, "class_probability"]
    known = Classifier.load(tmp_path / "c.json")
    measured = Measured(before)
    found = known.probabilities(measured.features(np.arange(300)))
    assert after["class_id"].to_pylist() == found.argmax(axis=1).tolist()
    assert after["class"].to_pylist() == [known.classes[kind].name for kind in found.argmax(axis=1)]
    np.testing.assert_allclose(after["class_probability"].to_numpy(), found.max(axis=1), rtol=1e-6)
    about = about_nuclei(after.schema)
    assert about["classifier"] == {"name": "mine", "sha256": known.sha256}
    assert about["model"] == MODEL
    manifest = json.loads(paths.classify.read_text())
    assert (manifest["stage"], manifest["status"], manifest["nuclei"]) == ("classify", "ok", 300)
    assert list(manifest["composition"]) == ["Tumor", "日本 <b>"]
    assert sum(one["count"] for one in manifest["composition"].values()) == 300
    assert manifest["composition"]["Tumor"]["color"] == [200, 0, 0]
    shown = json.loads(gzip.decompress(paths.classified_geojson.read_bytes()))["features"]
    assert [one["properties"]["classification"]["name"] for one in shown] == after["class"].to_pylist()
    assert shown[0]["properties"]["measurements"]["Class probability"] == pytest.approx(found[0].max(), abs=1e-4)
    assert paths.classified_png.read_bytes()[:4] == b"\x89PNG"
    # However many are taken at once.
    monkeypatch.setattr(classify, "BATCH_ROWS", 7)
    classify.write_classified(paths.nuclei, known, tmp_path / "same.parquet")
    assert pq.read_table(tmp_path / "same.parquet").equals(after)


def test_stage_without_nuclei(tmp_path: Path) -> None:
    paths = testing.write_slide(tmp_path, "none", count=0)
    a_classifier().save(tmp_path / "c.json")
    assert main(stage_arguments(paths, tmp_path / "c.json", "none")) == 0
    manifest = json.loads(paths.classify.read_text())
    assert [one["count"] for one in manifest["composition"].values()] == [0, 0]
    assert pq.read_table(paths.classified).num_rows == 0


def test_failed_slide_is_passed_on(tmp_path: Path) -> None:
    paths = testing.write_failed_slide(tmp_path, "bad", "inspect", "cannot be opened", "copy it again")
    a_classifier().save(tmp_path / "c.json")
    assert main(stage_arguments(paths, tmp_path / "c.json", "bad")) == 0
    manifest = json.loads(paths.classify.read_text())
    assert (manifest["status"], manifest["failure"]["stage"]) == ("failed", "inspect")
    assert "failed at inspect" in paths.classified.read_text()


def test_nuclei_of_another_model_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = testing.write_slide(tmp_path, "a", count=20)
    replace(a_classifier(), model={"name": "old", "sha256": "0" * 64}).save(tmp_path / "c.json")
    assert main(stage_arguments(paths, tmp_path / "c.json", "a")) == 2
    error = capsys.readouterr().err
    assert "holds nuclei of model 'default'" in error
    assert error.count("\n") == 1
    assert not paths.classified.exists()


def test_map_of_classes() -> None:
    grid = Grid(100, 50, 2.0, 1.0, 1.0)  # 2 µm: squares of 4 pixels
    points = np.array([[0.0, 0.0], [1.0, 1.0], [3.9, 3.9], [4.0, 0.0], [99.9, 49.9], [40.0, 20.0], [41.0, 20.0]])
    kinds = np.array([0, 1, 1, 0, 1, 1, 0])
    image, size = class_map(points, kinds, [(255, 0, 0), (0, 0, 255)], grid)
    assert (size, image.shape) == (4.0, (13, 25, 3))
    assert image[0, 0].tolist() == [0, 0, 255]  # two of three
    assert image[0, 1].tolist() == [255, 0, 0]
    assert image[12, 24].tolist() == [0, 0, 255]
    assert image[5, 10].tolist() == [255, 0, 0]  # as common: the first
    assert (image == 255).all(axis=2).sum() == 13 * 25 - 4
    _, size = class_map(points[:0], kinds[:0], [(255, 0, 0)], Grid(52_000, 1000, 0.5, 1.0, 1.0))
    assert size == 52_000 / THUMBNAIL_SIDE
