"""Training data that are damaged or half there: what is usable is used, the rest is one line before the training."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from pipeline.errors import PipelineError
from pipeline.slides.synthetic import make_field
from pipeline.training.data import load_fields

SIDE = 120
OUTLINES: dict[str, list[tuple[float, float]]] = {
    "whole": [(20, 20), (40, 20), (40, 40), (20, 40)],
    "leaves the image": [(100, 60), (150, 60), (150, 80), (100, 80)],
    "outside the image": [(500, 60), (550, 60), (550, 80)],
    "crosses itself": [(60, 60), (80, 80), (80, 60), (60, 80)],
    "two points": [(5, 5), (9, 9)],
    "no point": [],
    "far beyond all bounds": [(-9e6, 90), (9e6, 90), (9e6, 100), (-9e6, 100)],
}


def write_monuseg(root: Path, outlines: dict[str, list[tuple[float, float]]]) -> Path:
    for name in ("images", "annotations"):
        (root / name).mkdir(parents=True)
    image, _ = make_field(SIDE, SIDE, 0.25, seed=1)
    cv2.imwrite(str(root / "images" / "TCGA-A7-A13E-01Z.png"), image[..., ::-1])
    vertices = ["".join(f'<Vertex X="{x}" Y="{y}"/>' for x, y in points) for points in outlines.values()]
    regions = "".join(f"<Region><Vertices>{text}</Vertices></Region>" for text in vertices)
    text = f"<Annotations><Annotation><Regions>{regions}</Regions></Annotation></Annotations>"
    (root / "annotations" / "TCGA-A7-A13E-01Z.xml").write_text(text)
    return root


def load(kind: str, root: Path, **more: Any) -> Any:
    return load_fields([{"kind": kind, "path": str(root), "mpp": 0.25, **more}])


def test_outlines_of_all_sorts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = write_monuseg(tmp_path / "data", OUTLINES)
    with caplog.at_level(logging.INFO):
        (field,) = load("monuseg", root)
    # Whole, cut at the border, repaired, and the band that spans the image.
    assert len(np.unique(field.labels)) == 1 + 4
    assert field.labels[62, 110] and not field.labels[5:9, 5:9].any()
    (line,) = [record.getMessage() for record in caplog.records if "regions drawn" in record.getMessage()]
    assert line == (
        "TCGA-A7-A13E-01Z.xml: 4 of 7 regions drawn, 2 clipped at the border, "
        "1 self-intersecting (largest part kept), 2 dropped (no area), 1 dropped (outside the image)"
    )


@pytest.mark.parametrize("what", ["two points", "outside the image"])
def test_nothing_but_useless_outlines_is_one_line(tmp_path: Path, what: str) -> None:
    root = write_monuseg(tmp_path / "data", {what: OUTLINES[what]})
    with pytest.raises(PipelineError, match="the fields of monuseg hold no nucleus") as error:
        load("monuseg", root)
    assert "\n" not in str(error.value)


def damage_xml(root: Path) -> None:
    path = next((root / "annotations").iterdir())
    path.write_bytes(path.read_bytes()[:100])


def remove_xml(root: Path) -> None:
    next((root / "annotations").iterdir()).unlink()


def empty_images(root: Path) -> None:
    next((root / "images").iterdir()).unlink()


def cut_image(root: Path) -> None:
    path = next((root / "images").iterdir())
    path.write_bytes(path.read_bytes()[:2000])


def other_mask(root: Path) -> None:
    (root / "labels").mkdir()
    cv2.imwrite(str(root / "labels" / "TCGA-A7-A13E-01Z.png"), np.ones((SIDE, SIDE - 1), np.uint8))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_xml, r"annotation TCGA-A7-A13E-01Z.xml: "),
        (remove_xml, "has neither an XML nor a label map"),
        (empty_images, "no images in"),
        (cut_image, r"TCGA-A7-A13E-01Z.png cannot be read"),
        (other_mask, r"the image is \(120, 120\), its labels \(120, 119\)"),
    ],
)
def test_a_folder_that_is_half_there_is_one_line(tmp_path: Path, damage: Any, message: str) -> None:
    root = write_monuseg(tmp_path / "data", OUTLINES)
    damage(root)
    with pytest.raises(PipelineError, match=message) as error:
        load("monuseg", root)
    assert "\n" not in str(error.value)
    assert "TCGA-A7-A13E-01Z" in str(error.value) or str(root) in str(error.value)
