from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.progress import duration
from pipeline.report import page

NASTY = "<script>alert(1)</script> \"q\" 'a' $x$ & 日本 {{ 7*7 }}"


def row(slide: str, nuclei: int = 100, **more: Any) -> dict[str, Any]:
    quantiles = {str(q): float(q) if nuclei else None for q in (5, 25, 50, 75, 95)}
    base = {
        "slide": slide,
        "nuclei": nuclei,
        "tissue_mm2": 2.0,
        "nuclei_per_mm2": nuclei / 2,
        "composition": {
            "tumour": {"count": nuclei, "share": 0.75 if nuclei else None, "per_mm2": nuclei / 2, "color": [200, 0, 0]},
            NASTY: {"count": 0, "share": 0.25 if nuclei else None, "per_mm2": 0.0, "color": None},
        },
        "quantiles": dict.fromkeys(("area_um2", "circularity", "hematoxylin_mean"), quantiles),
        "evaluation": None,
        "unreadable_share": 0.0,
        "warnings": [],
        "vendor": "aperio",
        "mpp": [0.25, 0.25],
        "total_seconds": 12.5,
        "extra": {"group": NASTY},
    }
    return base | more


def manifest(slides: list[str]) -> dict[str, Any]:
    return {
        "created": "2026-01-01T00:00:00+00:00",
        "platform": "Linux",
        "results": "/x/<results>",
        "versions": {"pipeline": "0.1.0", "numpy": "2"},
        "git": {"commit": "c" * 40, "modified": True},
        "config": {"slides": NASTY},
        "model": {"name": NASTY, "mpp": 0.5, "licence": "CC BY", "sha256": "0" * 64, "description": "d"},
        "slides": [
            {"slide": s, "path": f"/x/{s}", "quick_hash": "h" * 64, "status": "ok", "code": None} for s in slides
        ],
    }


class Checker(HTMLParser):
    """Collects what a browser would see."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img", "input", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def render(
    tmp_path: Path,
    rows: list[dict[str, Any]],
    failed: list[dict[str, str]] | None = None,
    where: str = ".",
    codes: Sequence[str] = (),
) -> str:
    record = manifest([item["slide"] for item in rows])
    for item, code in zip(record["slides"], codes, strict=False):
        item["code"] = code
    folders = {}
    for index, item in enumerate(rows):
        folder = tmp_path / "slides" / f"s{index} #%"
        folder.mkdir(parents=True, exist_ok=True)
        folders[item["slide"]] = folder
    return page.render(
        rows=rows,
        failed=failed or [],
        extra=["group"],
        manifest=record,
        folders=folders,
        page=tmp_path / where,
    )


def check(html: str) -> Checker:
    checker = Checker()
    checker.feed(html)
    checker.close()
    assert not checker.open
    assert [tag for tag, _ in checker.tags].count("script") == 1
    for tag, attributes in checker.tags:
        for name in ("src", "href", "xlink:href"):
            value = attributes.get(name)
            if value:
                assert re.match(r"(data:|#|(\.\./)?slides/|cohort\.|failed\.tsv|manifest\.json)", value), (tag, value)
        assert not any(name.startswith("on") for name in attributes)
    assert "@import" not in html
    assert "url(" not in html
    return checker


def test_everything_is_escaped_and_nothing_is_loaded(tmp_path: Path) -> None:
    scores = {"aji": 0.6, "pq": 0.5, "dice": 0.8, "f1": 0.9}
    rows = [row(NASTY, warnings=[NASTY], evaluation=scores, unreadable_share=0.1), row("b", 0), row("c")]
    html = render(tmp_path, rows, [{"slide": NASTY, "stage": "inspect", "reason": NASTY, "hint": ""}])
    checker = check(html)
    text = " ".join(checker.text)
    assert NASTY in text
    assert "49" not in re.findall(r"\d+", text.replace(NASTY, ""))
    assert "0.600" in text
    assert "no nuclei" in text


def test_blurred_share_is_a_column_where_it_is_known(tmp_path: Path) -> None:
    old, unknown = row("a"), row("b", focus={"cells": 2, "blur_um": None, "blurred_share": None})
    blurred = row("c", focus={"cells": 99, "blur_um": 0.9, "blurred_share": 0.625})
    assert "Blurred" not in render(tmp_path, [old, unknown])
    html = render(tmp_path, [old, unknown, blurred])
    assert ">Blurred<" in html
    assert 'data-value="62.5">62<' in html


def test_slides_that_other_code_has_made_are_told(tmp_path: Path) -> None:
    rows = [row(name) for name in "abcd"]
    assert "by other code" not in render(tmp_path, rows)
    html = render(tmp_path, rows, codes=["0.1.0, commit cccccccccccc with local changes", "0.0.9", "0.0.8", "0.0.9"])
    assert "<dt>Slides by other code</dt><dd>2 by 0.0.9; 1 by 0.0.8 (" in html


def test_bounds_are_told(tmp_path: Path) -> None:
    told = "begins at (800, 600) of level 0, where QuPath begins to count; nuclei.geojson.gz counts from (0, 0)"
    plain, bounded = row("a"), row("a", bounds=[800, 600, 9, 9], geojson_origin=[0, 0])
    assert "The scan begins" not in render(tmp_path, [plain])
    assert told in render(tmp_path, [bounded])


def test_both_sides_of_pixels_that_are_not_square(tmp_path: Path) -> None:
    assert "· 0.25 µm/px" in render(tmp_path, [row("a", mpp=[0.25, 0.2500001])])
    assert "· 0.4 × 0.3 µm/px" in render(tmp_path, [row("a", mpp=[0.4, 0.3])])


@pytest.mark.parametrize("count", [0, 1, 30])
def test_any_number_of_slides(tmp_path: Path, count: int) -> None:
    checker = check(render(tmp_path, [row(f"slide {index}", 10 * index) for index in range(count)]))
    text = " ".join(" ".join(checker.text).split())
    assert f"Nuclei of {count} slide" in text
    assert ("No slide was finished" in text) == (count == 0)
    assert ("every slide was finished" in text) == (count >= 0)


def test_slides_that_are_not_finished_are_not_said_to_be(tmp_path: Path) -> None:
    waiting = manifest(["a"]) | {"slides_waiting": 2}
    page.write_report(tmp_path / "r.html", rows=[], failed=[], extra=[], manifest=waiting, folders={})
    html = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "none failed, 2 not finished yet" in html
    assert "None so far: not every slide is finished." in html


def test_links_lead_to_files_that_are_there(tmp_path: Path) -> None:
    folder = tmp_path / "slides" / "s0 #%"
    folder.mkdir(parents=True)
    (folder / "nuclei.parquet").touch()
    for where, up in ((".", ""), ("so-far", "../")):
        checker = check(render(tmp_path, [row("a")], where=where))
        links = [attributes["href"] for tag, attributes in checker.tags if "slides/" in (attributes.get("href") or "")]
        assert links == [f"{up}slides/s0%20%23%25/nuclei.parquet"]


def test_pictures_keep_to_their_budget(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (500, 900, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "x.png")
    sizes = []
    for limit in (10**7, 60_000, 15_000):
        uri = page.shrink_picture(tmp_path / "x.png", limit)
        assert uri is not None
        data = base64.b64decode(uri.removeprefix("data:image/jpeg;base64,"))
        assert len(data) <= limit
        with Image.open(io.BytesIO(data)) as image:
            sizes.append(image.width)
    assert sizes[0] == 900
    assert sizes == sorted(sizes, reverse=True)


def test_a_missing_or_broken_picture_is_no_error(tmp_path: Path) -> None:
    assert page.shrink_picture(tmp_path / "none.png", 1000) is None
    (tmp_path / "x.png").write_text("slide failed")
    assert page.shrink_picture(tmp_path / "x.png", 1000) is None


def test_report_is_written(tmp_path: Path) -> None:
    page.write_report(tmp_path / "r.html", rows=[], failed=[], extra=[], manifest=manifest([]), folders={})
    assert (tmp_path / "r.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


@pytest.mark.parametrize("top", [0.0, 1e-9, 0.3, 1, 7, 99.9, 100, 4300, 1e6, float("nan")])
def test_ticks_cover_the_values(top: float) -> None:
    ticks = page.nice_ticks(top)
    assert ticks[0] == 0
    assert 2 <= len(ticks) <= 6
    assert not ticks[-1] < top
    assert np.allclose(np.diff(ticks), ticks[1])


def test_numbers_and_durations() -> None:
    assert page.number(1234567.8) == "1\u202f234\u202f568"
    assert [page.number(value, 2) for value in (0.0041, 0.0, 0.01, -0.0041)] == ["0.0041", "0.00", "0.01", "-0.0041"]
    assert [page.number(value) for value in (0.7, 0.4, 999.6, 0)] == ["1", "0.40", "1\u202f000", "0"]
    assert page.number(None) == page.number(float("nan")) == "–"
    assert duration(None) == "–"
    assert duration(3661) == "1 h 1 min"
