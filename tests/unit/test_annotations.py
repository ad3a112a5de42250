"""ImageScope annotations, how they are drawn, and the command that writes them."""

from __future__ import annotations

import logging
from pathlib import Path

import cv2
import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.cli import main as cli
from pipeline.errors import PipelineError
from pipeline.evaluation.metrics import score
from pipeline.exchange.label_maps import read_label_map
from pipeline.training.annotations import DrawingReport, Region, burn, rasterise, read_imagescope_xml
from pipeline.training.masks import parse_size

XML = """<?xml version="1.0"?><Annotations MicronsPerPixel="0.25">{}</Annotations>"""
LAYER = '<Annotation Name="{}"><Attributes><Attribute Name="{}"/></Attributes><Regions>{}</Regions></Annotation>'
SQUARE = [(2, 2), (9, 2), (9, 9), (2, 9)]


def region(points: list[tuple[float, float]], more: str = "") -> str:
    vertices = "".join(f'<Vertex X="{x}" Y="{y}"/>' for x, y in points)
    return f"<Region {more}><Vertices>{vertices}</Vertices></Region>"


def write_xml(path: Path, *regions: str, layer: str = "", attribute: str = "Description") -> Path:
    path.write_text(XML.format(LAYER.format(layer, attribute, "".join(regions))))
    return path


def outlines(*polygons: list[tuple[float, float]]) -> list[Region]:
    return [Region(np.array(points, float).reshape(-1, 2)) for points in polygons]


def test_regions_are_read_in_order(tmp_path: Path) -> None:
    path = write_xml(tmp_path / "a.xml", region(SQUARE), region([(0, 0), (1, 1)]), region(SQUARE, 'NegativeROA="1"'))
    found = read_imagescope_xml(path)
    assert [len(one.points) for one in found] == [4, 2]
    assert found[0].points.tolist() == [list(map(float, p)) for p in SQUARE]
    assert found[0].name == ""


def test_layers_name_their_regions(tmp_path: Path) -> None:
    path = tmp_path / "a.xml"
    layers = [("", "Epithelial"), ("Lymphocyte", "Description"), ("", "Description")]
    path.write_text(XML.format("".join(LAYER.format(*names, region(SQUARE)) for names in layers)))
    assert [one.name for one in read_imagescope_xml(path)] == ["Epithelial", "Lymphocyte", ""]


def test_pixel_centres_are_at_whole_numbers() -> None:
    labels, report = rasterise(outlines(SQUARE), (12, 12))
    # Centres on the outline belong to what lies right of and below it: 2 to 8, not 2 to 9.
    assert np.argwhere(labels).min() == 2
    assert np.argwhere(labels).max() == 8
    assert np.count_nonzero(labels) == 49
    assert report == DrawingReport(regions=1)


def test_first_outline_wins() -> None:
    labels, report = rasterise(outlines(SQUARE, [(0, 0), (1, 1)], [(6, 2), (16, 2), (16, 9), (6, 9)]), (20, 20))
    assert labels[5, 8] == 1
    assert labels[5, 14] == 3
    assert report == DrawingReport(regions=3, dropped=1)


def test_outlines_beyond_the_image_are_cut() -> None:
    shapes = outlines(
        [(-50, -5), (5, -5), (5, 500), (-50, 500)],
        [(90, 90), (99, 90), (99, 99)],
        # A clamp around the image's left border: two parts of one nucleus.
        [(8, 1), (-5, 1), (-5, 8), (8, 8), (8, 7), (-3, 7), (-3, 2), (8, 2)],
    )
    labels, report = rasterise(shapes, (10, 10))
    assert (labels[:, :5] == 1).all()
    assert report == DrawingReport(regions=3, clipped=2, outside=1)
    assert report.drawn == 2
    alone, _ = rasterise(shapes[2:], (10, 10))
    assert cv2.connectedComponents((alone > 0).astype(np.uint8))[0] == 3
    assert alone.max() == 1


def test_self_intersecting_outlines_keep_their_largest_part() -> None:
    bow_tie = [(0, 0), (30, 20), (30, 0), (0, 12)]
    labels, report = rasterise(outlines(bow_tie), (40, 40))
    assert report == DrawingReport(regions=1, repaired=1)
    assert cv2.connectedComponents((labels > 0).astype(np.uint8))[0] == 2
    assert labels[8, 25] == 1
    assert labels[5, 2] == 0


def test_an_outline_that_goes_around_twice_has_no_hole() -> None:
    turn = np.linspace(0, 2.6 * np.pi, 80)
    points = 20 + (10 + 0.3 * turn)[:, None] * np.stack([np.cos(turn), np.sin(turn)], axis=1)
    labels, report = rasterise([Region(points)], (40, 40))
    assert report.repaired == 1
    assert cv2.connectedComponents((labels == 0).astype(np.uint8))[0] == 2
    assert np.count_nonzero(labels) > 0.95 * np.pi * 100


def test_no_area_and_no_pixel() -> None:
    shapes = outlines(
        [],
        [(1, 1)],
        [(1, 1), (5, 5)],
        [(1, 1), (3, 3), (5, 5)],
        [(4, 4), (4, 4), (4, 4), (4, 4)],
        [(6.1, 6.1), (6.4, 6.1), (6.4, 6.4)],
        SQUARE,
        [(3, 3), (8, 3), (8, 8), (3, 8)],
    )
    labels, report = rasterise(shapes, (12, 12))
    assert report == DrawingReport(regions=8, dropped=5, hidden=2)
    assert set(np.unique(labels)) == {0, 7}
    assert str(report) == "1 of 8 regions drawn, 5 dropped (no area), 2 dropped (no pixel left)"


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(st.tuples(st.integers(-20, 60), st.integers(-20, 60)), max_size=9), max_size=6))
def test_every_region_is_accounted_for(polygons: list[list[tuple[float, float]]]) -> None:
    labels, report = rasterise(outlines(*polygons), (40, 40))
    assert report.regions == len(polygons)
    assert report.drawn == len(np.unique(labels[labels > 0])) >= 0
    assert min(report.clipped, report.repaired, report.dropped, report.outside, report.hidden) >= 0
    for label in np.unique(labels[labels > 0]):
        points = np.array(polygons[label - 1], float) + 0.5
        y, x = np.nonzero(labels == label)
        assert shapely.MultiPoint(points).convex_hull.buffer(1e-6).contains(shapely.MultiPoint(np.c_[x, y] + 0.5))


def test_burn_takes_holes_and_parts() -> None:
    ring = shapely.box(0, 0, 10, 10).difference(shapely.box(3, 3, 7, 7))
    labels = burn([None, ring, shapely.MultiPolygon([shapely.box(4, 4, 6, 6), shapely.box(12, 0, 14, 2)])], (10, 16))
    assert (labels == 2).sum() == 84
    assert (labels == 3).sum() == 8
    assert not burn([], (3, 3)).any()


BOMB = '<!DOCTYPE a [<!ENTITY b "x"><!ENTITY c "&b;&b;">]><a>&c;</a>'
EXTERNAL = (
    '<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><Annotations><Annotation>&b;</Annotation></Annotations>'
)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("not xml", "not well-formed|syntax error"),
        ("", "no element"),
        ("<Annotations><Annotation>", "no element found|not well-formed"),
        (BOMB, "Entit"),
        (EXTERNAL, "Entit"),
        ('<?xml version="1.0" encoding="klingon"?><a/>', "encoding"),
        ("<a><Region/></a>", "no Annotation element"),
        (XML.format(LAYER.format("", "", '<Region><Vertex X="1"/></Region>')), "a vertex is damaged: 'Y'"),
        (XML.format(LAYER.format("", "", '<Region><Vertex X="one" Y="1"/></Region>')), "a vertex is damaged"),
        (XML.format(LAYER.format("", "", '<Region><Vertex X="nan" Y="1"/></Region>')), "not finite"),
        (XML.format(LAYER.format("", "", '<Region><Vertex X="1e300" Y="1"/></Region>')), "out of all bounds"),
    ],
)
def test_bad_xml_is_one_line(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "bad.xml"
    path.write_text(text)
    with pytest.raises(PipelineError, match=reason) as error:
        read_imagescope_xml(path)
    assert "bad.xml" in str(error.value)
    assert "\n" not in str(error.value)


# --- the command -----------------------------------------------------------------------------------------------------


def test_masks_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    annotations, images = tmp_path / "annotations", tmp_path / "images"
    annotations.mkdir()
    images.mkdir()
    for name in ("a", "b.c"):
        write_xml(annotations / f"{name}.xml", region(SQUARE), region([(20, 5), (50, 5), (50, 15), (20, 15)]))
        cv2.imwrite(str(images / f"{name}.tif"), np.zeros((20, 30, 3), np.uint8))
    assert cli(["masks", str(annotations), str(tmp_path / "out")]) == 0
    labels = read_label_map(tmp_path / "out" / "labels" / "b.c.png")
    assert labels.dtype == np.uint16
    assert labels.shape == (20, 30)
    assert set(np.unique(labels)) == {0, 1, 2}
    mask = read_label_map(tmp_path / "out" / "masks" / "b.c.png")
    assert set(np.unique(mask)) == {0, 255}
    np.testing.assert_array_equal(mask > 0, labels > 0)
    assert capsys.readouterr().out.splitlines() == [
        "a.xml: 2 of 2 regions drawn, 1 clipped at the border",
        "b.c.xml: 2 of 2 regions drawn, 1 clipped at the border",
    ]
    assert sorted(p.name for p in (tmp_path / "out" / "labels").iterdir()) == ["a.png", "b.c.png"]


def test_masks_of_one_file(tmp_path: Path) -> None:
    path = write_xml(tmp_path / "a.xml", region(SQUARE))
    cv2.imwrite(str(tmp_path / "other.png"), np.zeros((16, 18, 3), np.uint8))
    assert cli(["masks", str(path), str(tmp_path / "one"), "--images", str(tmp_path / "other.png")]) == 0
    assert read_label_map(tmp_path / "one" / "labels" / "a.png").shape == (16, 18)
    assert cli(["masks", str(path), str(tmp_path / "two"), "--size", "40x25"]) == 0
    assert read_label_map(tmp_path / "two" / "labels" / "a.png").shape == (25, 40)


def test_a_bad_file_does_not_stop_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    write_xml(tmp_path / "good.xml", region(SQUARE))
    (tmp_path / "bad.xml").write_text(BOMB)
    with caplog.at_level(logging.ERROR):
        assert cli(["masks", str(tmp_path), str(tmp_path / "out"), "--size", "20x20"]) == 2
    output = capsys.readouterr()
    assert output.out == "good.xml: 1 of 1 regions drawn\n"
    assert "error: 1 of 2 annotations were not converted (bad.xml)" in output.err
    assert "bad.xml" in caplog.text
    assert [p.name for p in (tmp_path / "out" / "masks").iterdir()] == ["good.png"]


def test_masks_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_xml(tmp_path / "a.xml", region(SQUARE))
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged.png").write_bytes(b"\x89PNG\r\n\x1a\n cut")
    for arguments, reason in [
        ([str(tmp_path / "empty")], "no annotations in"),
        ([str(tmp_path / "absent")], "is missing"),
        ([str(path)], "a.xml: no image a.* in"),
        ([str(path), "--images", str(tmp_path / "damaged.png")], "damaged.png cannot be read"),
        ([str(path), "--size", "big"], "--size 'big' is not a size"),
        ([str(path), "--size", "90000x90000"], "are too many"),
    ]:
        assert cli(["masks", arguments[0], str(tmp_path / "out"), *arguments[1:]]) == 2
        error = capsys.readouterr().err
        assert reason in error
        assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["", "0x5", "5x00", "5", "-5x5", "5x5x5", "5.0x5"])
def test_sizes(text: str) -> None:
    assert parse_size("1000x800") == (800, 1000)
    with pytest.raises(PipelineError, match="is not a size"):
        parse_size(text)


def test_drawing_agrees_with_published_label_maps(shared_data: Path) -> None:
    """The label maps of MoNuSeg fields with XML were made by others."""
    found = []
    for path in sorted((shared_data / "monuseg" / "annotations").glob("*.xml"))[:3]:
        known = read_label_map(shared_data / "monuseg" / "labels" / f"{path.stem}.png")
        labels, report = rasterise(read_imagescope_xml(path), (known.shape[0], known.shape[1]))
        assert report.drawn > 300
        found.append(score(known, labels)["aji"])
    assert min(found) > 0.99
