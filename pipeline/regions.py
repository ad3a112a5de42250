"""Stage ``regions``: nuclei and tissue in the regions that a user has drawn on a slide.

The stage runs for slides that have regions in the slide table. It only reads measurements, so with other regions the
earlier stages of a run are not repeated.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pipeline.batch.settings import file_sha256
from pipeline.batch.stage import add_origin_argument, add_stage_arguments, keywords, read_manifest, run_stage
from pipeline.errors import SlideError
from pipeline.exchange.geojson import (
    class_names,
    enclosed,
    kind_of,
    no_areas,
    origin_of,
    polygonal,
    read_areas,
    scanned,
)
from pipeline.stores.nuclei import about_nuclei, open_nuclei
from pipeline.summary import Nuclei, rounded

if TYPE_CHECKING:
    from shapely.geometry.base import BaseGeometry

log = logging.getLogger(__name__)

WHAT = "regions"
"""Name of the file of regions in messages."""

ELSEWHERE = "(elsewhere)"
"""Name of the row for everything that lies in no region."""

BATCH_ROWS = 65_536
"""Nuclei that are assigned to regions at once."""

NUDGE = (1e-6, 3.1e-8)
"""Shift of nuclei in level-0 pixels, x and y, before they are assigned to regions, so that none lies on a border.

A nucleus on a border thus belongs to the region on its right or, for a horizontal border, below it, and to exactly one
of two adjacent regions. The direction of the shift is one that drawn borders practically never have.
"""


@dataclass(frozen=True)
class Region:
    """The area of all annotations of one name.

    Parameters
    ----------
    name : str
        Name of the region.
    area : shapely geometry
        Valid polygons in level-0 pixels, clipped to the slide; may be empty.
    """

    name: str
    area: BaseGeometry


def region_name(feature: dict[str, Any], number: int) -> str:
    """Name of an annotation: its own name, else its class, else its number among the file's annotations."""
    own = str((feature.get("properties") or {}).get("name") or "")
    name = " ".join((own.strip() or ": ".join(class_names(feature)) or f"region {number}").split())
    return name.encode("utf-8", "replace").decode("utf-8")  # JSON may hold lone surrogates


def read_regions(path: Path, box: BaseGeometry, origin: tuple[int, int] = (0, 0)) -> tuple[list[Region], list[str]]:
    """Read the regions of a slide.

    Parameters
    ----------
    path : pathlib.Path
        GeoJSON, plain or gzipped, see `pipeline.exchange.geojson`.
    box : shapely geometry
        The slide; regions are clipped to it.
    origin : tuple of int
        Origin of the coordinates as a level-0 pixel, unless the file states its own.

    Returns
    -------
    regions : list of Region
        In the order of the file. Annotations of the same name form one region.
    warnings : list of str
        What was left out.

    Raises
    ------
    SlideError
        When the file is missing or not GeoJSON, when it has objects but no annotation with an area on the slide, or
        when a region has the name `ELSEWHERE`.
    OSError
        When the disk or the file server fails.
    """
    import shapely

    others = 0

    def wanted(feature: dict[str, Any]) -> bool:
        nonlocal others
        others += not (found := kind_of(feature) == "annotation")
        return found

    found = read_areas(path, WHAT, wanted, origin)
    named: dict[str, list[BaseGeometry]] = {}
    without = outside = 0
    for number, (feature, polygons) in enumerate(found, 1):
        with np.errstate(over="ignore"):
            drawn = enclosed(polygons)
            shape = shapely.intersection(drawn, box)
        if not drawn.area > 0:
            without += 1
            continue
        outside += not shape.area > 0
        named.setdefault(region_name(feature, number), []).append(shape)
    if ELSEWHERE in named:
        raise SlideError(f"{WHAT} {path}: one is called {ELSEWHERE}, as all outside of them is", "rename it")
    if not named and (found or others):
        raise no_areas(WHAT, path, "no annotation has an area")
    if named and outside == sum(map(len, named.values())):
        raise no_areas(WHAT, path, "no annotation lies on the slide")
    told = {
        "left out, as detections, cells, frames or of class Ignore*": others,
        "left out, as points, lines or without an area": without,
        "outside of the slide (are they in level-0 pixels?)": outside,
    }
    warnings = [f"objects {what}: {count}" for what, count in told.items() if count]
    if not named:
        warnings.append(f"{path.name} holds no annotation")
    return [Region(name, polygonal(shapely.union_all(shapes))) for name, shapes in named.items()], warnings


def inside(points: npt.NDArray[np.float64], areas: Sequence[BaseGeometry]) -> npt.NDArray[np.bool_]:
    """Determine which points lie in which areas.

    Parameters
    ----------
    points : numpy.ndarray of float64, shape (n, 2)
        Points in level-0 pixels, x first.
    areas : sequence of shapely geometries
        Areas in level-0 pixels; they may overlap.

    Returns
    -------
    numpy.ndarray of bool, shape (n, areas)
        Whether each point lies in each area; see `NUDGE` for points on borders.
    """
    import shapely

    x, y = (points + NUDGE).T
    found = np.zeros((len(points), len(areas)), bool)
    for column, area in enumerate(areas):
        left, top, right, bottom = area.bounds  # NaN where empty
        rows = np.flatnonzero((x >= left) & (x <= right) & (y >= top) & (y <= bottom))
        shapely.prepare(area)
        found[rows, column] = shapely.contains_xy(area, x[rows], y[rows])
    return found


def tissue_within(area: BaseGeometry, tissue: npt.NDArray[np.object_]) -> float:
    """Area of tissue within `area`; the polygons of `tissue` must not overlap."""
    import shapely

    return float(shapely.area(shapely.intersection(tissue, area)).sum())


def members(centroids: npt.NDArray[np.float64], areas: Sequence[BaseGeometry]) -> list[npt.NDArray[np.int64]]:
    """Rows of the nuclei whose centroid (in level-0 pixels) lies in each area, and last of the nuclei in no area."""
    rows: list[list[npt.NDArray[np.int64]]] = [[] for _ in range(len(areas) + 1)]
    for start in range(0, len(centroids), BATCH_ROWS):
        found = inside(centroids[start : start + BATCH_ROWS], areas)
        found = np.column_stack([found, ~found.any(axis=1)])
        for column, taken in enumerate(rows):
            taken.append(start + np.flatnonzero(found[:, column]))
    return [np.concatenate([np.empty(0, np.int64), *taken]) for taken in rows]


def count_regions(
    regions: Sequence[Region],
    nuclei: Path,
    tissue: Sequence[BaseGeometry],
    box: BaseGeometry,
    mpp: tuple[float, float],
) -> list[dict[str, Any]]:
    """Count and summarise the nuclei and the tissue in each region of a slide.

    Parameters
    ----------
    regions : sequence of Region
        The regions.
    nuclei : pathlib.Path
        ``nuclei.parquet`` or ``classified.parquet``.
    tissue : sequence of shapely.Polygon
        The tissue in level-0 pixels.
    box : shapely geometry
        The slide.
    mpp : tuple of float
        µm per level-0 pixel, x and y.

    Returns
    -------
    list of dict
        One for each region, and a last one, `ELSEWHERE`, for everything in no region: ``region`` (name), ``area_mm2``,
        and as in ``metrics.json`` ``tissue_mm2``, ``nuclei``, ``nuclei_per_mm2``, ``composition`` and ``quantiles``.
    """
    import shapely

    areas = [region.area for region in regions]
    parts = np.array(tissue, dtype=object)
    every = shapely.union_all(areas)
    pixels = [(area.area, tissue_within(area, parts)) for area in areas]
    rest = (box.area - every.area, float(shapely.area(parts).sum()) - tissue_within(every, parts))
    table = Nuclei.open(nuclei)
    groups = members(table.centroids * (table.grid.scale_x, table.grid.scale_y), areas)
    mm2 = mpp[0] * mpp[1] / 1e6
    result = []
    for name, (area, within), rows, measured in zip(
        [*(region.name for region in regions), ELSEWHERE],
        [*pixels, rest],
        groups,
        table.quantiles(groups),
        strict=True,
    ):
        seen = rounded(max(0.0, within) * mm2, 6) or 0.0
        own = replace(table, kinds=table.kinds[rows], centroids=table.centroids[rows])
        result.append(
            {
                "region": name,
                "area_mm2": rounded(max(0.0, area) * mm2, 6),
                "tissue_mm2": seen,
                "nuclei": len(rows),
                "nuclei_per_mm2": rounded(len(rows) / seen, 3) if seen else None,
                "composition": own.composition(seen),
                "quantiles": measured,
            }
        )
    return result


def run_regions(
    slide: str,
    inspect: Path,
    tissue: Path,
    tissue_geojson: Path,
    tissue_png: Path,
    measure: Path,
    nuclei: Path,
    regions: Path,
    out: Path,
    png: Path,
    origin: str = "slide",
    **how: Any,
) -> dict[str, Any]:
    """Run the stage.

    Parameters
    ----------
    slide : str
        Name of the slide.
    inspect, tissue, tissue_geojson, tissue_png : pathlib.Path
        ``slide.json``, ``tissue.json``, ``tissue.geojson`` and ``tissue.png``.
    measure, nuclei : pathlib.Path
        Outputs of the stage ``measure`` or ``classify``.
    regions : pathlib.Path
        The regions, see `read_regions`.
    origin : {"slide", "bounds"}
        Origin of the regions' coordinates, unless their file states its own; see `pipeline.exchange.geojson.origin_of`.
    out, png : pathlib.Path
        The manifest and ``regions.png`` to write.
    **how : Any
        `on_bad_slide`, `minutes` and `again` of `pipeline.batch.stage.run_stage`.

    Returns
    -------
    dict
        The manifest, with ``regions`` (see `count_regions`), ``sha256`` (of the file of regions), ``classifier`` (name
        and hash, or None) and ``warnings``.
    """

    def body(staged: dict[str, Path]) -> dict[str, Any]:
        from pipeline.pictures.region_map import draw_regions
        from pipeline.tissue import read_tissue

        info = read_manifest(inspect)
        box = scanned(info)
        found, warnings = read_regions(regions, box, origin_of(info, origin))
        counts = count_regions(found, nuclei, read_tissue(tissue_geojson), box, tuple(info["mpp"]))
        draw_regions(
            staged["png"],
            slide=slide,
            tissue=tissue_png,
            size=(info["width"], info["height"]),
            mpp=tuple(info["mpp"]),
            regions=[(region.name, region.area) for region in found],
            counts=counts,
        )
        for warning in warnings:
            log.warning("slide %r: %s", slide, warning)
        told = ", ".join(f"{one['region']} {one['nuclei']}" for one in counts)
        log.info("slide %r: nuclei by region: %s", slide, told)
        with open_nuclei(nuclei) as file:
            classifier = about_nuclei(file.schema_arrow).get("classifier")
        return {
            "regions": counts,
            "sha256": file_sha256(regions),
            "classifier": classifier,
            "warnings": warnings,
        }

    return run_stage(
        "regions",
        slide,
        manifest=out,
        outputs={"png": png},
        upstream=[inspect, tissue, measure],
        body=body,
        **how,
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``python -m pipeline regions``."""
    add_stage_arguments(parser)
    for name, what in (
        ("inspect", "slide.json"),
        ("tissue", "tissue.json"),
        ("tissue-geojson", "tissue.geojson"),
        ("tissue-png", "tissue.png"),
        ("measure", "measure.json, or classify.json"),
        ("nuclei", "nuclei.parquet, or classified.parquet"),
        ("regions", "annotations: GeoJSON(.gz), level-0 pixels"),
        ("out", "manifest to write"),
        ("png", "picture to write"),
    ):
        parser.add_argument(f"--{name}", type=Path, required=True, metavar="FILE", help=what)
    add_origin_argument(parser)


def main(args: argparse.Namespace) -> int:
    """Run ``python -m pipeline regions``."""
    run_regions(**keywords(args))
    return 0
