"""Fill the report's template: charts as inline SVG, overviews as data URIs, every text escaped."""

from __future__ import annotations

import base64
import io
import json
import logging
import math
import os
import statistics
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pipeline.batch.provenance import code_of
from pipeline.progress import duration

log = logging.getLogger(__name__)

IMAGE_BYTES = 24_000_000
"""Maximum size of all pictures in a report, in bytes."""

IMAGE_BYTES_EACH = 260_000
"""Maximum size of one picture, in bytes."""

PALETTE = ("#2f6f8f", "#c8553d", "#588157", "#8a5a9e", "#d4a017", "#3d8b8b", "#a44a6f", "#6b705c")
"""Colours of lines in charts, and of classes to which the model gives none."""

SCORES = (("aji", "AJI"), ("pq", "PQ"), ("dice", "Dice"), ("f1", "F1"))


def shrink_picture(path: Path, limit: int) -> str | None:
    """Encode a picture as a JPEG data URI.

    Parameters
    ----------
    path : pathlib.Path
        PNG file.
    limit : int
        Size of the JPEG in bytes that the picture is shrunk to; exceeded if the smallest version is larger.

    Returns
    -------
    str or None
        None when the picture is missing or cannot be read.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        log.warning("no picture in the report: %s", error)
        return None
    data = b""
    for width, quality in ((1430, 84), (1200, 82), (1000, 80), (820, 78), (640, 74), (480, 70), (320, 60)):
        if width < image.width:
            small = image.resize((width, max(1, round(image.height * width / image.width))), Image.Resampling.LANCZOS)
        else:
            small = image
        stream = io.BytesIO()
        small.save(stream, "JPEG", quality=quality, optimize=True, progressive=True)
        data = stream.getvalue()
        if len(data) <= limit:
            break
    return "data:image/jpeg;base64," + base64.b64encode(data).decode("ascii")


def nice_ticks(top: float, count: int = 4) -> list[float]:
    """Round numbers from 0 to at least `top`.

    >>> nice_ticks(4300)
    [0.0, 2000.0, 4000.0, 6000.0]
    """
    if not (math.isfinite(top) and top > 0):
        return [0.0, 1.0]
    power = 10.0 ** math.floor(math.log10(top / count))
    step = min((s * power for s in (1, 2, 2.5, 5, 10) if s * power * count >= top * (1 - 1e-9)), default=10 * power)
    return [round(step * i, 10) for i in range(math.ceil(top / step - 1e-9) + 1)]


def number(value: Any, digits: int = 0) -> str:
    """Format a number: thousands apart, fixed decimals (more if all would be 0); a dash if None or not finite."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if value and round(abs(value), digits) == 0:
        digits = 1 - math.floor(math.log10(abs(value)))
    return f"{value:,.{digits}f}".replace(",", "\u202f")


def _axis(top: float, left: float, width: float) -> list[dict[str, Any]]:
    ticks = nice_ticks(top)
    return [
        {"x": round(left + width * tick / ticks[-1], 1), "label": f"{tick:,g}".replace(",", "\u202f")} for tick in ticks
    ]


def chart(rows: Sequence[Mapping[str, Any]], classes: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Geometry of the cohort's chart: one line for each slide with its density, areas and classes.

    Parameters
    ----------
    rows : sequence of mapping
        ``metrics.json`` of each slide that did not fail.
    classes : sequence of mapping
        ``name`` and ``color`` (CSS) of the classes, which are drawn when there are several.

    Returns
    -------
    dict or None
        Numbers for the template, in pixels; None without slides.
    """
    if not rows:
        return None
    several = len(classes) > 1
    label, gap, line, head, foot = 230.0, 46.0, 22.0, 34.0, 30.0
    columns = 3 if several else 2
    width = 1080.0
    panel = (width - label - 28 - gap * (columns - 1)) / columns
    lefts = [label + i * (panel + gap) for i in range(columns)]
    ordered = sorted(rows, key=lambda row: -(row["nuclei_per_mm2"] or 0))
    density_top = nice_ticks(max((row["nuclei_per_mm2"] or 0) for row in rows))[-1]
    areas = [row["quantiles"].get("area_um2") or {} for row in ordered]
    area_top = nice_ticks(max((area.get("95") or 0) for area in areas))[-1]
    lines = []
    for index, (row, area) in enumerate(zip(ordered, areas, strict=True)):
        entry: dict[str, Any] = {
            "y": head + index * line,
            "slide": row["slide"],
            "density": row["nuclei_per_mm2"],
            "bar": round(panel * (row["nuclei_per_mm2"] or 0) / density_top, 1),
            "area": None,
            "parts": [],
        }
        if area.get("50") is not None:
            entry["area"] = {q: round(lefts[1] + panel * area[q] / area_top, 1) for q in ("5", "25", "50", "75", "95")}
            entry["median"] = area["50"]
        if several and row["nuclei"]:
            start = lefts[2]
            for item in classes:
                part = row["composition"].get(item["name"], {}).get("share") or 0.0
                size = panel * part
                entry["parts"].append(
                    {
                        "x": round(start, 1),
                        "w": round(size, 1),
                        "color": item["color"],
                        "name": item["name"],
                        "share": part,
                    }
                )
                start += size
        lines.append(entry)
    return {
        "width": width,
        "height": head + len(lines) * line + foot,
        "bottom": head + len(lines) * line,
        "line": line,
        "label": label,
        "panel": panel,
        "lefts": lefts,
        "lines": lines,
        "density_axis": _axis(density_top, lefts[0], panel),
        "area_axis": _axis(area_top, lefts[1], panel),
        "classes": list(classes) if several else [],
    }


def class_list(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Names and CSS colours of all classes, in the order in which the slides list them."""
    found: dict[str, str] = {}
    for row in rows:
        for name, item in row["composition"].items():
            colour = item.get("color")
            known = f"rgb({', '.join(str(int(value)) for value in colour)})" if colour else None
            found.setdefault(name, known or PALETTE[len(found) % len(PALETTE)])
    return [{"name": name, "color": colour} for name, colour in found.items()]


def _columns(
    rows: Sequence[Mapping[str, Any]], extra: Sequence[str], classes: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Columns of the table: title, unit, whether it holds numbers, and a cell (value to sort by, text) for each row."""

    def numeric(title: str, unit: str, values: list[Any], digits: int) -> dict[str, Any]:
        cells = [{"value": value, "text": number(value, digits)} for value in values]
        return {"title": title, "unit": unit, "numeric": True, "cells": cells}

    columns = [
        {
            "title": name,
            "unit": "",
            "numeric": False,
            "cells": [{"value": None, "text": str(row["extra"].get(name, ""))} for row in rows],
        }
        for name in extra
    ]
    columns.append(numeric("Tissue", "mm²", [row["tissue_mm2"] for row in rows], 2))
    columns.append(numeric("Nuclei", "", [row["nuclei"] for row in rows], 0))
    columns.append(numeric("Density", "nuclei/mm²", [row["nuclei_per_mm2"] for row in rows], 0))

    def median(name: str) -> list[Any]:
        return [(row["quantiles"].get(name) or {}).get("50") for row in rows]

    columns.append(numeric("Area", "median µm²", median("area_um2"), 1))
    columns.append(numeric("Circularity", "median", median("circularity"), 2))
    columns.append(numeric("Hematoxylin", "median OD", median("hematoxylin_mean"), 2))
    if len(classes) > 1:
        for item in classes:
            shares = [(row["composition"].get(item["name"]) or {}).get("share") for row in rows]
            columns.append(numeric(item["name"], "%", [None if s is None else 100 * s for s in shares], 1))
    if any(row.get("evaluation") for row in rows):
        for key, title in SCORES:
            columns.append(numeric(title, "against truth", [(row.get("evaluation") or {}).get(key) for row in rows], 3))
    blurred = [(row.get("focus") or {}).get("blurred_share") for row in rows]
    if any(share is not None for share in blurred):
        columns.append(numeric("Blurred", "%", [None if s is None else 100 * s for s in blurred], 0))
    if any(row.get("unreadable_share") for row in rows):
        shares = [row.get("unreadable_share") for row in rows]
        columns.append(numeric("Unreadable", "%", [None if s is None else 100 * s for s in shares], 2))
    columns.append(numeric("Time", "s", [row["total_seconds"] for row in rows], 1))
    return columns


def slides_note(failed: int, waiting: int) -> str:
    """Note on the slides that the report does not show: how many failed, and how many are not finished."""
    notes = [f"{failed} failed" if failed else "none failed"]
    return ", ".join([*notes, f"{waiting} not finished yet"] if waiting else notes)


def _links(root: Path, page: Path, row: Mapping[str, Any]) -> list[dict[str, str]]:
    names = (
        "overview.png", "stain.png", "tissue.png", "nuclei.geojson.gz", "nuclei.parquet", "metrics.json",
        *(("classified.png", "classified.geojson.gz", "classified.parquet") if "classifier" in row else ()),
        *(("regions.png", "regions.json") if "regions" in row else ()),
    )  # fmt: skip
    folder = "/".join(quote(part, safe="") for part in Path(os.path.relpath(root, page)).parts)
    return [{"name": name, "href": f"{folder}/{name}"} for name in names if (root / name).exists()]


def fitting(text: str, width: int) -> str:
    """Return `text`, shortened in the middle if it is wider than `width` letters; ideographs are as wide as two.

    >>> fitting("Study A, patient 001", 12), fitting("short", 12), fitting("肿瘤肿瘤肿瘤", 7)
    ('Study A,… 001', 'short', '肿瘤…瘤')
    """

    def wide(part: str) -> int:
        return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in part)

    if wide(text) <= width:
        return text
    head, tail = len(text), 0
    while head and wide(text[:head]) > 2 * width // 3:
        head -= 1
    while tail < len(text) - head and wide(text[len(text) - tail - 1 :]) + wide(text[:head]) <= width:
        tail += 1
    return f"{text[:head]}…{text[len(text) - tail :]}"


def environment() -> Any:
    """Jinja environment of the reports' templates, with the filters that they use."""
    import jinja2

    found = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters["number"] = number
    found.filters["duration"] = duration
    found.filters["fitting"] = fitting
    return found


def render(
    *,
    rows: Sequence[Mapping[str, Any]],
    failed: Sequence[Mapping[str, str]],
    extra: Sequence[str],
    manifest: Mapping[str, Any],
    folders: Mapping[str, Path],
    page: Path,
) -> str:
    """Render the report as HTML.

    Parameters
    ----------
    rows : sequence of mapping
        ``metrics.json`` of each slide that did not fail, with ``extra`` (columns of the slide table),
        ``total_seconds``, and ``regions`` where the slide has any.
    failed : sequence of mapping
        ``slide``, ``stage``, ``reason``, ``hint`` of each slide that failed.
    extra : sequence of str
        Names of the additional columns of the slide table.
    manifest : mapping
        The run's provenance.
    folders : mapping of str to pathlib.Path
        Results folder of each slide in `rows`.
    page : pathlib.Path
        Folder that the report is written to; links are relative to it.

    Returns
    -------
    str
        One page that refers to nothing outside itself, except for links to the results.
    """
    classes = class_list(rows)
    pictures = len(rows) + sum(("classifier" in row) + ("regions" in row) for row in rows)
    limit = min(IMAGE_BYTES_EACH, IMAGE_BYTES // max(1, pictures))
    cards = [
        {
            "row": row,
            "anchor": f"slide-{index}",
            "picture": shrink_picture(folders[row["slide"]] / "overview.png", limit),
            "classes": shrink_picture(folders[row["slide"]] / "classified.png", limit) if "classifier" in row else None,
            "drawn": shrink_picture(folders[row["slide"]] / "regions.png", limit) if "regions" in row else None,
            "links": _links(folders[row["slide"]], page, row),
        }
        for index, row in enumerate(rows)
    ]
    densities = [row["nuclei_per_mm2"] for row in rows if row["nuclei_per_mm2"] is not None]
    tissue = sum(row["tissue_mm2"] or 0 for row in rows)
    nuclei = sum(row["nuclei"] for row in rows)
    earlier = Counter(item["code"] for item in manifest["slides"] if item["code"] not in (None, code_of(manifest)))
    facts = [
        (
            "slide" if len(rows) == 1 else "slides",
            number(len(rows)),
            slides_note(len(failed), manifest.get("slides_waiting", 0)),
        ),
        ("nuclei", number(nuclei), "in all slides"),
        ("mm² of tissue", number(tissue, 2), "analysed"),
        ("nuclei per mm²", number(nuclei / tissue if tissue else None), "over all tissue"),
        ("median density", number(statistics.median(densities) if densities else None), "nuclei/mm², of the slides"),
        ("of computing", duration(sum(row["total_seconds"] for row in rows)), "sum of the stages"),
    ]
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            cards=cards,
            classes=classes if len(classes) > 1 else [],
            with_regions=any("regions" in row for row in rows),
            columns=_columns(rows, extra, classes),
            chart=chart(rows, classes),
            failed=failed,
            facts=facts,
            manifest=manifest,
            earlier=earlier,
            model=manifest.get("model") or {},
            settings=json.dumps(manifest.get("config"), indent=2, ensure_ascii=False)
            if manifest.get("config")
            else None,
        )
    )


def write_report(path: Path, **content: Any) -> None:
    """Render `content` (the arguments of `render` but for `page`) and write the page."""
    path.write_text(render(**content, page=path.parent), encoding="utf-8")
