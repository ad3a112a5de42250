"""``python -m pipeline classifier``: nuclei named in QuPath become a classifier."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shapely
from hypothesis import given
from hypothesis import strategies as st

from pipeline import testing
from pipeline.cli import main
from pipeline.errors import PipelineError
from pipeline.kernels import classify as kernel
from pipeline.models.classifier import Classifier, Measured
from pipeline.stores.grid import Grid
from pipeline.training import classifier as learning


def squares(places: list[tuple[float, float]], side: float = 10) -> pa.Table:
    """Square nuclei with their corners at these level-0 pixels."""
    table = testing.nuclei_table(len(places), 1000, 1000)
    shapes = [shapely.box(x, y, x + side, y + side) for x, y in places]
    values = {
        "geometry": pa.array(shapely.to_wkb(shapes), pa.binary()),
        "centroid_x": [x + side / 2 for x, _ in places],
        "centroid_y": [y + side / 2 for _, y in places],
    }
    for name, column in values.items():
        table = table.set_column(table.column_names.index(name), name, pa.array(column))
    return table


def feature(
    geometry: dict[str, Any], name: str | None, kind: str = "annotation", key: str = "objectType", **more: Any
) -> dict[str, Any]:
    properties: dict[str, Any] = {key: kind} | more
    if name is not None:
        properties["classification"] = {"name": name, "color": [len(name), 1, 2]}
    return {"type": "Feature", "geometry": geometry, "properties": properties}


def area(*corners: tuple[float, float]) -> dict[str, Any]:
    return {"type": "Polygon", "coordinates": [[*map(list, corners), list(corners[0])]]}


def box(x: float, y: float, right: float, bottom: float) -> dict[str, Any]:
    return area((x, y), (right, y), (right, bottom), (x, bottom))


def exported(x: float, name: str, measurements: Any, stated: str | None = None) -> dict[str, Any]:
    """A detection on the nucleus at `x`, with measurements and, maybe, the class with which it was exported."""
    one = feature(box(x, 100, x + 10, 110), name, "detection")
    one["properties"] |= {"measurements": measurements} | ({"metadata": {"Classified as": stated}} if stated else {})
    return one


def dots(*places: tuple[float, float]) -> dict[str, Any]:
    return {"type": "MultiPoint", "coordinates": [list(place) for place in places]}


def write_export(folder: Path, slide: str, features: list[dict[str, Any]], **more: Any) -> None:
    folder.mkdir(exist_ok=True)
    text = json.dumps({"type": "FeatureCollection", "features": features} | more)
    (folder / f"{slide}.geojson").write_text(text, encoding="utf-8")


def named(tmp_path: Path, features: list[dict[str, Any]], places: list[tuple[float, float]], **more: Any) -> list[str]:
    """Class of each nucleus of a slide, empty where it was not named."""
    write_export(tmp_path / "ann", "a", features, **more)
    grid = Grid.for_slide(1000, 1000, 0.5, 0.5, 0.5)
    testing.write_nuclei(tmp_path / "n.parquet", squares(places), grid, "a")
    centroids = np.array(places) + 5
    objects = learning.read_objects(tmp_path / "ann" / "a.geojson", {})
    told = [pa.chunked_array([["Nucleus", "T", "T", "T"]]), pa.chunked_array([["A", "B", "T", "T"]])]
    names, lost = learning.named_rows(tmp_path / "n.parquet", centroids, objects, 0.5, told)
    return [names.get(row, "") for row in range(len(places))] + [f"lost {lost[0]} {lost[1]}"]


PLACES = [(100.0, 100.0), (200.0, 100.0), (300.0, 100.0), (400.0, 100.0)]


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        ([feature(box(90, 90, 215, 115), "A")], ["A", "A", "", "", "lost 0 0"]),
        # A smaller area comes before a larger one, whichever is first; a point before all.
        ([feature(box(190, 90, 215, 115), "B"), feature(box(90, 90, 415, 115), "A")], ["A", "B", "A", "A", "lost 0 0"]),
        ([feature(dots((305, 105)), "C"), feature(box(295, 95, 315, 115), "A")], ["", "", "C", "", "lost 0 0"]),
        # A point lies in a nucleus, or within 3 µm of one: 6 pixels.
        ([feature(dots((101, 101), (409, 115), (205, 118)), "A")], ["A", "", "", "A", "lost 0 1"]),
        ([feature({"type": "Point", "coordinates": [205, 105, 0]}, "A")], ["", "A", "", "", "lost 0 0"]),
        (
            [feature(dots(), "A"), feature(dots((101, 101)), "A")],
            ["A", "", "", "", "lost 0 0"],
        ),  # points that were removed
        # Detections; one whose outline has moved off the nucleus' middle; one beside all.
        ([feature(box(100, 100, 110, 110), "C", "detection")], ["C", "", "", "", "lost 0 0"]),
        # Those that have the class with which they were exported name nothing; what is around them does.
        ([feature(box(100, 100, 110, 110), "A", "detection")], ["", "", "", "", "lost 0 0"]),
        (
            [feature(box(300, 100, 310, 110), "T", "detection"), feature(box(190, 90, 500, 120), "D")],
            ["", "D", "D", "D", "lost 0 0"],
        ),
        ([feature(box(100, 100, 110, 110), "A")], ["A", "", "", "", "lost 0 0"]),
        # A classifier that agrees with what was named does not unname it: the file tells what it was exported with.
        ([exported(100, "A", {"Area µm^2": 9})], ["A", "", "", "", "lost 0 0"]),
        ([exported(100, "Nucleus", {"Area µm^2": 9}), exported(200, "T", {"x": 1})], ["", "", "", "", "lost 0 0"]),
        ([exported(100, "A", {"Class probability": 0.9})], ["", "", "", "", "lost 0 0"]),
        ([exported(100, "A", [{"name": "Class probability", "value": 1}])], ["", "", "", "", "lost 0 0"]),
        ([exported(100, "A", {"Class probability": 0.9}, "B")], ["A", "", "", "", "lost 0 0"]),
        ([exported(100, "C", {"Class probability": 0.9}, "C")], ["", "", "", "", "lost 0 0"]),
        # QuPath 0.3 has another key for the type, and what has none is drawn.
        ([feature(box(100, 100, 110, 110), "A", "detection", key="object_type")], ["", "", "", "", "lost 0 0"]),
        ([feature(box(90, 90, 500, 120), "A", "")], ["A", "A", "A", "A", "lost 0 0"]),
        # An outline around the nucleus' middle counts by its size like any other.
        (
            [
                feature(area((199, 99), (211, 99), (211, 101), (201, 101), (201, 111), (199, 111)), "C"),
                feature(box(90, 90, 500, 120), "D"),
            ],
            ["D", "C", "D", "D", "lost 0 0"],
        ),
        ([feature(box(208, 100, 216, 110), "A", "detection")], ["", "A", "", "", "lost 0 0"]),
        ([feature(box(600, 600, 610, 610), "A", "detection")], ["", "", "", "", "lost 1 0"]),
        # The nucleus of a cell; the base class of a derived one.
        (
            [
                feature(box(0, 0, 999, 999), "A", "cell") | {"nucleusGeometry": box(299, 99, 311, 111)},
                feature(dots((405, 105)), "Immune cells: CD3"),
            ],
            ["", "", "A", "Immune cells", "lost 0 0"],
        ),
        # What is not a class of nuclei.
        (
            [
                feature(box(90, 90, 500, 120), "Region*"),
                feature(box(90, 90, 500, 120), "Ignore*"),
                feature(box(90, 90, 110, 120), "Nucleus", "detection"),
                feature(box(90, 90, 110, 120), None, "detection"),
                feature(box(0, 0, 999, 999), "A", "tile"),
                {"type": "Feature", "geometry": None, "properties": {"classification": {"name": "A"}}},
                feature({"type": "LineString", "coordinates": [[0, 0], [900, 900]]}, "A"),
            ],
            ["", "", "", "", "lost 0 0"],
        ),
    ],
)
def test_which_nuclei_an_object_names(tmp_path: Path, features: list[dict[str, Any]], expected: list[str]) -> None:
    assert named(tmp_path, features, PLACES) == expected


def test_exports_that_count_from_the_scan(tmp_path: Path) -> None:
    features = [feature(box(40, 40, 65, 65), "A"), feature(dots((155, 55)), "B")]
    assert named(tmp_path, features, PLACES, level0_origin=[50, 50]) == ["A", "B", "", "", "lost 0 0"]


@pytest.mark.parametrize(
    "value",
    [
        {"nothing": 1},
        {"type": "FeatureCollection", "features": [feature(dots((1e12, 0)), "A")]},
        {"type": "FeatureCollection", "features": [feature({"type": "Point", "coordinates": ["x", 0]}, "A")]},
        {"type": "FeatureCollection", "features": [feature({"type": "Polygon", "coordinates": 5}, "A")]},
    ],
)
def test_what_is_no_export_is_one_line(tmp_path: Path, value: Any) -> None:
    (tmp_path / "a.geojson").write_text(json.dumps(value))
    with pytest.raises(PipelineError, match="is not GeoJSON of QuPath") as raised:
        learning.read_objects(tmp_path / "a.geojson", {})
    assert "\n" not in str(raised.value)


def write_run(results: Path, slide: str, seed: int, count: int = 400) -> tuple[np.ndarray, pa.Table]:
    """A finished slide whose nuclei are of two kinds, by their size; returns which are large."""
    paths = testing.write_slide(results, slide, count=count, seed=seed)
    table = pq.read_table(paths.nuclei)
    rng = np.random.default_rng(seed)
    large = rng.random(count) < 0.4
    size = np.exp(rng.normal(np.where(large, 4.2, 3.2), 0.25)).astype(np.float32)
    table = table.set_column(table.column_names.index("area_um2"), "area_um2", pa.array(size))
    testing.write_nuclei(paths.nuclei, table, Grid.for_slide(2400, 1800, 0.25, 0.25, 0.5), slide)
    rows = results / "slides.tsv"
    lines = rows.read_text(encoding="utf-8") if rows.exists() else "slide\tpath\n"
    rows.write_text(f"{lines}{slide}\t/data/{slide}.svs\n", encoding="utf-8")
    return large, table


def points_of(table: pa.Table, rows: np.ndarray) -> dict[str, Any]:
    where = zip(table["centroid_x"].to_numpy()[rows], table["centroid_y"].to_numpy()[rows], strict=True)
    return dots(*((float(x), float(y)) for x, y in where))


def test_learns_what_tells_classes_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, slide in enumerate(("a", "b.c", "d {1}")):
        large, table = write_run(tmp_path / "run", slide, number)
        some = np.arange(0, 400, 5)
        write_export(
            tmp_path / "ann", slide,
            [feature(points_of(table, some[large[some]]), "large"), feature(points_of(table, some[~large[some]]), "x")],
        )  # fmt: skip
    out = tmp_path / "new" / "types.json"
    words = ["classifier", f"--results={tmp_path / 'run'}", f"--annotations={tmp_path / 'ann'}", f"--out={out}"]
    assert main(words) == 0
    told = capsys.readouterr().out
    assert "3 folds, leaving out slides" in told
    assert f"classifier={out}" in told
    made = Classifier.load(out)
    assert [(one.name, one.color) for one in made.classes] == [("large", (5, 1, 2)), ("x", (1, 1, 2))]
    assert [one["slide"] for one in made.data] == ["a", "b.c", "d {1}"]
    assert sum(sum(one["nuclei"].values()) for one in made.data) == 240
    assert made.model == testing.MODEL
    assert made.scores["balanced_accuracy"] > 0.9
    assert np.sum(made.scores["confusion"]) == 240
    # Nuclei of a slide that it has never seen.
    large, table = write_run(tmp_path / "run", "other", 9)
    measured = Measured(pq.read_table(tmp_path / "run" / "slides" / "other" / "nuclei.parquet"))
    found = made.probabilities(measured.features(np.arange(400))).argmax(axis=1) == 0
    assert (found == large).mean() > 0.9
    # The same once more, byte for byte.
    again = [*words[:-1], f"--out={tmp_path / 'types.json'}"]
    assert main(again) == 0
    assert (tmp_path / "types.json").read_bytes() == out.read_bytes()


def test_scores_are_of_what_was_left_out(tmp_path: Path) -> None:
    # Classes that follow nothing: whoever scored what was learned would find them told apart.
    for number, slide in enumerate("abc"):
        _, table = write_run(tmp_path / "run", slide, number)
        rows = np.arange(0, 400, 8)
        chance = np.random.default_rng(number).random(len(rows)) < 0.5
        write_export(
            tmp_path / "ann", slide,
            [feature(points_of(table, rows[chance]), "A"), feature(points_of(table, rows[~chance]), "B")],
        )  # fmt: skip
    made = learning.make_classifier("n", *learning.gather(tmp_path / "run", tmp_path / "ann"))
    assert 0.3 < made.scores["balanced_accuracy"] < 0.7


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "two classes are needed, there are none"),
        (["A"] * 30, "there are only 'A'"),
        (["A"] * 30 + ["B"] * 9, "class 'B' has 9 nuclei, at least 10"),
    ],
)
def test_too_little_is_one_line(names: list[str], message: str) -> None:
    count = len(names)
    slide = learning.Named("a", tuple(names), np.ones((count, len(kernel.FEATURES))), np.zeros((count, 2)))
    with pytest.raises(PipelineError, match=message):
        learning.make_classifier("n", [slide], testing.MODEL, {})


def test_a_slide_without_results_and_two_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "run", "a", 0)
    write_export(tmp_path / "ann", "A", [feature(box(0, 0, 900, 900), "A")])
    words = ["classifier", f"--results={tmp_path / 'run'}", f"--annotations={tmp_path / 'ann'}", "--out=c.json"]
    assert main(words) == 2
    assert "has no nuclei of a slide 'A'" in capsys.readouterr().err
    (tmp_path / "ann" / "A.geojson").rename(tmp_path / "ann" / "a.geojson")
    write_run(tmp_path / "run", "b", 1)
    write_export(tmp_path / "ann", "b", [feature(box(0, 0, 900, 900), "A")])
    path = tmp_path / "run" / "slides" / "b" / "nuclei.parquet"
    table = pq.read_table(path)
    about = json.loads(table.schema.metadata[b"nuclei"]) | {"model": {"name": "other", "sha256": "0" * 64}}
    pq.write_table(table.replace_schema_metadata({b"nuclei": json.dumps(about).encode()}), path)
    assert main(words) == 2
    assert "slide 'b' was run with another model" in capsys.readouterr().err
    assert main([*words[:2], f"--annotations={tmp_path / 'nowhere'}", words[3]]) == 2
    assert "is not a folder" in capsys.readouterr().err
    assert main(["classifier", f"--results={tmp_path / 'ann'}", *words[2:]]) == 2
    assert "has no slides.tsv" in capsys.readouterr().err
    path.write_text("slide 'b' failed at tissue: too white")
    assert main(words) == 2
    assert "b.geojson: slide 'b' failed at tissue: too white" in capsys.readouterr().err
    write_export(tmp_path / "ann", "a.svs", [feature(box(0, 0, 900, 900), "A")])
    assert main(words) == 2
    assert "are of one slide, a" in capsys.readouterr().err


def test_an_export_may_be_named_as_the_file_and_count_from_the_scan(tmp_path: Path) -> None:
    _, table = write_run(tmp_path / "run", "a", 0)
    inspect = tmp_path / "run" / "slides" / "a" / "slide.json"
    inspect.write_text(json.dumps(json.loads(inspect.read_text()) | {"bounds": [300, 200, 2000, 1500]}))
    x, y = (table[f"centroid_{axis}"].to_numpy() for axis in "xy")
    write_export(tmp_path / "ann", "a.svs", [feature(box(0, 0, 1000, 1000), "A")])
    expected = int(((x > 300) & (x < 1300) & (y > 200) & (y < 1200)).sum())
    (named,), _, _ = learning.gather(tmp_path / "run", tmp_path / "ann", "bounds")
    assert len(named.names) == expected
    (named,), _, _ = learning.gather(tmp_path / "run", tmp_path / "ann")
    assert len(named.names) == int(((x < 1000) & (y < 1000)).sum())


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 2)), min_size=1, max_size=60))
def test_groups_are_left_out_whole(pairs: list[tuple[int, int]]) -> None:
    groups = np.unique([group for group, _ in pairs], return_inverse=True)[1]
    kinds = np.unique([kind for _, kind in pairs], return_inverse=True)[1]
    fold = learning.folds_of(groups, kinds)
    if fold is None:
        return
    for group in np.unique(groups):
        assert len(np.unique(fold[groups == group])) == 1
    assert len(np.unique(fold)) == min(learning.FOLDS, len(np.unique(groups))) > 1
    for one in np.unique(fold):
        assert set(kinds[fold != one]) == set(kinds)


def test_a_class_in_one_place_is_told() -> None:
    assert learning.folds_of(np.array([0, 0, 1, 1]), np.array([0, 0, 1, 1])) is None
    names, rng = ("A",) * 30 + ("B",) * 12, np.random.default_rng(0)
    points = np.concatenate([rng.uniform(0, 5000, (30, 2)), np.full((12, 2), 10.0)])
    features = rng.normal(size=(42, len(kernel.FEATURES)))
    made = learning.make_classifier("n", [learning.Named("a", names, features, points)], testing.MODEL, {})
    assert (
        made.scores["protocol"] == "5 folds, leaving out scattered nuclei (one class lies in one place), which flatters"
    )
    points[30:] = rng.uniform(0, 5000, (12, 2))
    made = learning.make_classifier("n", [learning.Named("a", names, features, points)], testing.MODEL, {})
    assert made.scores["protocol"] == "5 folds, leaving out squares of 250 µm"


def test_folds_are_the_strictest_that_serve() -> None:
    rng = np.random.default_rng(0)

    def slide(name: str, kinds: str) -> learning.Named:
        count = len(kinds)
        return learning.Named(name, tuple(kinds), np.zeros((count, 1)), rng.uniform(0, 5000, (count, 2)))

    def folds(*kinds: str) -> str:
        named = [slide(str(number), of) for number, of in enumerate(kinds)]
        every = np.array([*"".join(kinds)])
        return learning._folds(named, (every == "b").astype(int))[1]

    assert folds("ab" * 9, "ab" * 9, "ab" * 9) == "slides"
    assert folds("a" * 9 + "b" * 30, "a" * 9, "a" * 9, "a" * 9) == "squares of 250 µm"
    assert folds("ab" * 9, "ab" * 9) == "squares of 250 µm"
    # Two slides of a patient are left out together.
    kinds = ("ab" * 9,) * 4
    named = [replace(slide(str(number), of), patient="P" * (number < 2)) for number, of in enumerate(kinds)]
    fold, what = learning._folds(named, np.arange(72) % 2)
    assert what == "patients"
    assert len(set(fold[:36])) == 1
    assert len(set(fold[36:])) == 2


def test_of_very_many_nuclei_some_are_learned_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning, "MOST", 20)
    rng = np.random.default_rng(0)
    slides = [
        learning.Named(
            name,
            ("a",) * 100 + ("b",) * 10,
            rng.normal(size=(110, len(kernel.FEATURES))),
            rng.uniform(0, 5000, (110, 2)),
        )
        for name in "xyz"
    ]
    made = learning.make_classifier("n", slides, testing.MODEL, {})
    assert {name: one["nuclei"] for name, one in made.scores["classes"].items()} == {"a": 20, "b": 20}
    assert all(count in (6, 7) for one in made.data for count in one["nuclei"].values())


@pytest.mark.parametrize(
    ("classification", "colour"),
    [
        ({"name": "A", "color": [1, 2, 3]}, (1, 2, 3)),
        ({"name": "A", "colorRGB": -65536}, (255, 0, 0)),
        ({"name": "A", "color": -16711936}, (0, 255, 0)),
        ({"name": "A", "color": "red"}, None),
        ({"name": "A"}, None),
        ({"names": "A", "color": [1, 2, 3]}, (1, 2, 3)),
        ("A", None),
    ],
)
def test_colours_of_classes(tmp_path: Path, classification: Any, colour: tuple[int, int, int] | None) -> None:
    one = feature(dots((105, 105)), None, classification=classification)
    write_export(tmp_path, "a", [one])
    colours: dict[str, tuple[int, int, int]] = {}
    objects = learning.read_objects(tmp_path / "a.geojson", colours)
    assert objects.point_names == ("A",)
    assert colours == ({} if colour is None else {"A": colour})


def test_more_classes_without_a_colour_than_there_are() -> None:
    rng = np.random.default_rng(0)
    names = [f"c{i}" for i in range(len(learning.PALETTE) + 1) for _ in range(10)]
    slide = learning.Named("a", tuple(names), rng.normal(size=(len(names), 17)), rng.uniform(0, 5000, (len(names), 2)))
    taken = {f"c{i}": colour for i, colour in enumerate(learning.PALETTE)}
    made = learning.make_classifier("n", [slide], testing.MODEL, taken)
    assert made.classes[-1].color == learning.PALETTE[0]


def test_classes_without_a_colour_get_different_ones() -> None:
    count = 12
    names = [f"class {i}" for i in range(len(learning.PALETTE) + 2) for _ in range(count)]
    rng = np.random.default_rng(0)
    slide = learning.Named(
        "a", tuple(names), rng.normal(size=(len(names), len(kernel.FEATURES))), rng.uniform(0, 5000, (len(names), 2))
    )
    made = learning.make_classifier("n", [slide], testing.MODEL, {"class 3": learning.PALETTE[0]})
    colours = [one.color for one in made.classes]
    assert colours[3] == learning.PALETTE[0]
    assert len(set(colours[: len(learning.PALETTE)])) == len(learning.PALETTE)
