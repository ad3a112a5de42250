"""Label crafting and training data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from pipeline.errors import PipelineError
from pipeline.training.data import Field, load_fields
from pipeline.training.field import guess_mpp
from pipeline.training.labels import craft_distance, seam_weight

TOUCHING = np.zeros((20, 30), np.int32)
TOUCHING[4:16, 3:15] = 1
TOUCHING[4:16, 15:27] = 2


def test_distance_falls_between_touching_nuclei() -> None:
    distance = craft_distance(TOUCHING)
    assert distance[TOUCHING == 0].max() == 0
    assert distance[TOUCHING == 1].max() == distance[TOUCHING == 2].max() == 1
    assert distance[10, 14] < 0.2
    assert distance[10, 15] < 0.2


def test_distance_does_not_fall_towards_the_fields_edge() -> None:
    labels = np.zeros((40, 60), np.int32)
    labels[0:9, 10:30] = 1  # the lower half of a nucleus
    labels[31:40, 52:60] = 2  # a quarter of one, in the corner
    labels[15:25, 20:40] = 3
    mirrored = np.pad(labels, 20, mode="symmetric")
    whole = craft_distance(mirrored)[20:60, 20:80]
    np.testing.assert_allclose(craft_distance(labels), whole, atol=1e-6)
    assert craft_distance(labels)[0, 20] == 1
    assert craft_distance(np.ones((6, 6), np.int32)).min() == 1  # nothing but nucleus


def test_distance_without_nuclei() -> None:
    assert not craft_distance(np.zeros((5, 5), np.int32)).any()


def test_one_pixel_nucleus() -> None:
    labels = np.zeros((5, 5), np.int32)
    labels[2, 2] = 9
    assert craft_distance(labels)[2, 2] == 1


def test_seams_lie_between_nuclei() -> None:
    seam = seam_weight(TOUCHING, radius=2)
    assert (seam[6:14, 13:17] == 1).all()
    assert not seam[:, :10].any()
    apart = TOUCHING.copy()
    apart[:, 12:18] = 0
    assert not seam_weight(apart, radius=2).any()


def test_guess_mpp() -> None:
    labels = np.zeros((100, 100), np.int32)
    labels[10:26, 10:42] = 1  # 512 px, taken for 32 µm²
    assert guess_mpp(labels) == pytest.approx(0.25)
    assert guess_mpp(np.zeros((4, 4), np.int32)) is None


def field(patient: str, organ: str, source: str = "monuseg") -> Field:
    return Field(
        f"{source}-{patient}", source, patient, organ, 0.25, np.zeros((4, 4, 3), np.uint8), np.ones((4, 4), np.int32)
    )


def test_class_maps_fit_their_field() -> None:
    one = field("p", "")
    types = np.ones((4, 4), np.uint8)
    assert replace(one, types=types, classes=("Tumour",)).types is types
    with pytest.raises(PipelineError, match="class 1 has no name"):
        replace(one, types=types)
    with pytest.raises(PipelineError, match=r"the class map is \(3, 4\)"):
        replace(one, types=types[1:], classes=("Tumour",))


def write_source(root: Path, count: int = 2) -> Path:
    (root / "images").mkdir(parents=True)
    (root / "labels").mkdir()
    for i in range(count):
        cv2.imwrite(str(root / "images" / f"{i}.png"), np.full((40, 50, 3), 200, np.uint8))
        labels = np.zeros((40, 50), np.uint16)
        labels[10:20, 10:20] = 1
        cv2.imwrite(str(root / "labels" / f"{i}.png"), labels)
    return root


def test_label_map_folder(tmp_path: Path) -> None:
    fields = load_fields([{"kind": "labels", "path": str(write_source(tmp_path / "a")), "mpp": 0.5}])
    assert [f.mpp for f in fields] == [0.5, 0.5]
    assert fields[0].labels.sum() == 100


def test_bad_sources_are_one_line(tmp_path: Path) -> None:
    half = write_source(tmp_path / "half")
    (half / "labels" / "1.png").unlink()
    other = write_source(tmp_path / "other", 1)
    cv2.imwrite(str(other / "labels" / "0.png"), np.ones((7, 7), np.uint8))
    empty = write_source(tmp_path / "empty", 0)
    nothing = write_source(tmp_path / "nothing", 1)
    cv2.imwrite(str(nothing / "labels" / "0.png"), np.zeros((40, 50), np.uint8))
    for source, message in [
        ({"kind": "labels", "path": half}, "has no label map"),
        ({"kind": "labels", "path": other}, "the image is"),
        ({"kind": "labels", "path": empty}, "no images"),
        ({"kind": "labels", "path": nothing, "mpp": 0.5}, "hold no nucleus"),
        ({"kind": "labels", "path": tmp_path / "absent"}, "is not a folder"),
        ({"kind": "magic", "path": half}, "unknown kind"),
    ]:
        with pytest.raises(PipelineError, match=message):
            load_fields([source])


def test_two_sources_need_names(tmp_path: Path) -> None:
    source = {"kind": "labels", "path": write_source(tmp_path / "a")}
    with pytest.raises(PipelineError, match="two data sources are called 'labels'"):
        load_fields([source, source])
    fields = load_fields([source, source | {"name": "more"}])
    assert {f.source for f in fields} == {"labels", "more"}


def test_monuseg(shared_data: Path) -> None:
    fields = load_fields([{"kind": "monuseg", "path": shared_data / "monuseg", "mpp_of": {"TCGA-HE": 0.5}}])
    assert len(fields) == 30
    assert len({f.patient for f in fields}) == 30
    assert {f.mpp for f in fields if f.patient.startswith("HE")} == {0.5}
    assert all(f.organ for f in fields)
