"""GeoJSON as versions of QuPath write it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import PipelineError, SlideError
from pipeline.exchange.geojson import (
    bare_cells,
    class_names,
    iter_features,
    kind_of,
    read_areas,
    read_geojson,
    role,
    stated_origin,
)

SQUARE = {"type": "Polygon", "coordinates": [[[0, 0], [10, 0], [10, 10], [0, 10], [0, 0]]]}


def feature(properties: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "Feature", "geometry": SQUARE, "properties": properties} | more


@pytest.mark.parametrize(
    ("one", "kind", "part"),
    [
        (feature({"objectType": "annotation"}), "annotation", "nucleus"),  # 0.4 and later
        (feature({"object_type": "detection"}), "detection", "nucleus"),  # 0.3
        (feature({"object_type": "tma_core", "name": "A-1"}), "frame", "other"),
        (feature({"object_type": "tile"}), "frame", "other"),
        (feature({}, id="PathCellObject"), "detection", "nucleus"),  # 0.2
        (feature({}, id="PathRootObject"), "frame", "other"),
        (feature({}, id="tile-7"), "annotation", "nucleus"),  # of another program
        (feature({"objectType": "annotation", "classification": {"name": "Ignore*"}}), "ignored", "other"),
        (feature({"objectType": "annotation", "name": "Region 1"}), "annotation", "region"),
    ],
)
def test_what_an_object_is(one: dict[str, Any], kind: str, part: str) -> None:
    assert (kind_of(one), role(one)) == (kind, part)


@pytest.mark.parametrize(
    ("classification", "names"),
    [
        ({"names": ["Tumor", "Positive"], "color": [1, 2, 3]}, ["Tumor", "Positive"]),
        ({"name": "Tumor: Positive", "colorRGB": -1}, ["Tumor", "Positive"]),
        ({"parentClass": {"name": "Tumor", "colorRGB": -1}, "name": "Positive"}, ["Tumor", "Positive"]),  # before 0.4
        ("Tumor", ["Tumor"]),
        (None, []),
        ({}, []),
        (["Tumor", "Positive"], ["Tumor", "Positive"]),  # of other programs
        (5, []),
        (True, []),
        ({"name": 5}, []),
    ],
)
def test_classes_of_an_object(classification: Any, names: list[str]) -> None:
    assert class_names(feature({"classification": classification})) == names


def test_a_measurement_without_a_value(tmp_path: Path) -> None:
    # Before version 0.5 QuPath writes it as NaN, which is not JSON.
    path = tmp_path / "a.geojson"
    path.write_text(json.dumps(feature({"measurements": {"x": float("nan")}})))
    assert "NaN" in path.read_text()
    assert [one["geometry"] for one in iter_features(read_geojson(path))] == [SQUARE]
    assert len(read_areas(path, "mask")) == 1
    path.write_text(json.dumps(feature({}) | {"geometry": {**SQUARE, "coordinates": [[[0, float("nan")]] * 4]}}))
    with pytest.raises(SlideError, match="mask"):
        read_areas(path, "mask")
    path.write_text('{"type": "Feature", NaN')
    with pytest.raises(PipelineError, match="is not GeoJSON"):
        read_geojson(path)


@pytest.mark.parametrize("origin", [[float("inf"), 0], [0, float("nan")]])
def test_an_origin_that_is_nowhere(origin: list[float]) -> None:
    with pytest.raises(ValueError, match="level0_origin"):
        stated_origin({"level0_origin": origin})


def test_children_of_an_object() -> None:
    child = feature({"objectType": "detection"})
    parent = feature({"objectType": "annotation", "childObjects": [feature({"childObjects": [child]})]})
    assert len(list(iter_features({"type": "FeatureCollection", "features": [parent, child]}))) == 4


def test_cells_without_a_nucleus() -> None:
    whole, bare = feature({"objectType": "cell"}, nucleusGeometry=SQUARE), feature({"objectType": "cell"})
    assert bare_cells([whole, bare, feature({}), bare]) == {1, 3}
    assert bare_cells([bare, bare]) == set()  # what the program calls cells
