"""Stage ``summary``: write the metrics of a slide (``metrics.json``) and draw its overview (``overview.png``)."""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pipeline.batch import provenance
from pipeline.batch.stage import (
    add_origin_argument,
    add_stage_arguments,
    keywords,
    read_manifest,
    run_stage,
    stage_costs,
)
from pipeline.errors import PipelineError, SlideError
from pipeline.exchange.geojson import origin_of
from pipeline.export import DEFAULT_COLOUR, RANKED
from pipeline.machine.allocator import keep_freed_memory
from pipeline.stores.grid import Grid
from pipeline.stores.nuclei import about_nuclei, grid_of, open_nuclei, read_nuclei

if TYPE_CHECKING:
    from pipeline.pictures.overview import Region

log = logging.getLogger(__name__)

QUANTILES = (5, 25, 50, 75, 95)
"""Percentiles of each measurement that are reported."""

MANIFESTS = ("inspect", "tissue", "tiles", "stain", "maps", "instances", "measure", "export")
"""Manifests of the earlier stages, by their names on the command line and in `pipeline.layout.SlideLayout`."""


@dataclass(frozen=True)
class Nuclei:
    """The small columns of a table of nuclei, which fit into memory: classes and centroids.

    Parameters
    ----------
    path : pathlib.Path
        The table, ``nuclei.parquet`` or ``classified.parquet``.
    grid : Grid
        The grid in whose pixels `centroids` are given.
    classes : tuple of (str, tuple of int)
        Names and colours, in the order of the table's metadata; classes that it does not list come last.
    kinds : numpy.ndarray of int64, shape (n,)
        Index of each nucleus' class in `classes`.
    centroids : numpy.ndarray of float64, shape (n, 2)
        Centroids in grid pixels, x first.
    """

    path: Path
    grid: Grid
    classes: tuple[tuple[str, tuple[int, ...]], ...]
    kinds: npt.NDArray[np.int64]
    centroids: npt.NDArray[np.float64]

    @classmethod
    def open(cls, path: Path, grid: Grid | None = None) -> Nuclei:
        """Read classes and centroids from a table of nuclei; `grid` is by default the table's own."""
        table = read_nuclei(path, ["class", "centroid_x", "centroid_y"])
        about, grid = about_nuclei(table.schema), grid or grid_of(table)
        listed = {str(item["name"]): tuple(item.get("color") or DEFAULT_COLOUR) for item in about.get("classes") or ()}
        encoded = table["class"].combine_chunks().dictionary_encode()
        names = encoded.dictionary.to_pylist()
        listed |= dict.fromkeys(sorted({*names} - {*listed}), DEFAULT_COLOUR)
        order = {name: index for index, name in enumerate(listed)}
        kinds = np.array([order[name] for name in names], np.int64)[encoded.indices.to_numpy()]
        centroids = np.column_stack([table[f"centroid_{axis}"].to_numpy() for axis in "xy"])
        scale = (grid.scale_x, grid.scale_y)
        return cls(path, grid, tuple(listed.items()), kinds, centroids / scale)

    def __len__(self) -> int:
        return len(self.kinds)

    def quantiles(self, groups: Sequence[npt.NDArray[np.int64] | slice]) -> list[dict[str, dict[str, float | None]]]:
        """Percentiles of the measurements in `RANKED` for groups of rows. Only one column is in memory at a time."""
        result: list[dict[str, dict[str, float | None]]] = [{} for _ in groups]
        with open_nuclei(self.path) as file:
            for name in (name for name in RANKED if name in file.schema_arrow.names):
                values = file.read([name])[name].to_numpy().astype(np.float64)
                for found, rows in zip(result, groups, strict=True):
                    found[name] = percentiles(values[rows])
        return result

    def composition(self, tissue_mm2: float) -> dict[str, dict[str, Any]]:
        """Count, share and density of each class."""
        result: dict[str, dict[str, Any]] = {}
        for index, (name, colour) in enumerate(self.classes):
            count = int((self.kinds == index).sum())
            result[name] = {
                "count": count,
                "share": rounded(count / len(self)) if len(self) else None,
                "per_mm2": rounded(count / tissue_mm2, 3) if tissue_mm2 else None,
                "color": list(colour),
            }
        return result

    def contours(self, regions: Sequence[Region]) -> list[list[tuple[npt.NDArray[np.float64], tuple[int, ...]]]]:
        """Outlines of the nuclei near each region, in grid pixels, each with the colour of its class."""
        import shapely

        margin = 60.0 / self.grid.mpp  # 60 µm: no nucleus extends farther from its centroid
        near = []
        for region in regions:
            low = np.array([region.x, region.y]) - margin
            inside = (self.centroids > low) & (self.centroids < low + region.side + 2 * margin)
            near.append(np.all(inside, axis=1))
        result: list[list[tuple[npt.NDArray[np.float64], tuple[int, ...]]]] = [[] for _ in regions]
        scale = (self.grid.scale_x, self.grid.scale_y)
        stop = 0
        with open_nuclei(self.path) as file:
            for group in range(file.num_row_groups):
                start, stop = stop, stop + file.metadata.row_group(group).num_rows
                if not any(mask[start:stop].any() for mask in near):
                    continue  # true for most row groups of a large slide
                wkb = file.read_row_group(group, ["geometry"])["geometry"].to_numpy()
                for found, mask in zip(result, near, strict=True):
                    rows = np.flatnonzero(mask[start:stop])
                    for kind, shape in zip(self.kinds[start + rows], shapely.from_wkb(wkb[rows]), strict=True):
                        rings = shapely.get_rings(shape)
                        found.extend((shapely.get_coordinates(ring) / scale, self.classes[kind][1]) for ring in rings)
        return result


def rounded(value: float, digits: int = 4) -> float | None:
    """Round `value`; None if it is not finite, because JSON has no NaN."""
    return round(float(value), digits) if math.isfinite(value) else None


def percentiles(values: npt.NDArray[np.float64]) -> dict[str, float | None]:
    """Percentiles of a measurement, keyed by `QUANTILES` as text; None if no value is finite."""
    values = values[np.isfinite(values)]
    found = np.percentile(values, QUANTILES) if len(values) else [math.nan] * len(QUANTILES)
    return {str(q): rounded(value) for q, value in zip(QUANTILES, found, strict=True)}


def warnings_of(manifests: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Warnings of the earlier stages, each prefixed with the name of its stage."""
    found = [f"{name}: {text}" for name, manifest in manifests.items() for text in manifest.get("warnings") or ()]
    share = manifests["tiles"].get("unreadable_share") or 0
    if share:
        found.append(f"tiles: {100 * share:.3g} % of the tissue could not be decoded")
    if not manifests["tissue"]["area_mm2"]:
        found.append("tissue: no tissue was found")
    return found


def summarise(nuclei: Nuclei, manifests: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Compute the metrics of a slide.

    Parameters
    ----------
    nuclei : Nuclei
        The slide's nuclei.
    manifests : mapping
        The manifests of the earlier stages, by the names in `MANIFESTS`.

    Returns
    -------
    dict
        The content of ``metrics.json`` except the evaluation. Densities are per mm² of tissue, or None without tissue.
    """
    inspect, tissue, tiles = manifests["inspect"], manifests["tissue"], manifests["tiles"]
    area = float(tissue["area_mm2"])
    model = manifests["maps"]["model"]
    return {
        "nuclei": len(nuclei),
        "tissue_mm2": rounded(area, 6),
        "tissue_fraction": tissue.get("fraction"),
        "nuclei_per_mm2": rounded(len(nuclei) / area, 3) if area else None,
        "composition": nuclei.composition(area),
        "quantiles": nuclei.quantiles([slice(None)])[0],
        "unreadable_tiles": len(tiles.get("unreadable") or ()),
        "unreadable_share": tiles.get("unreadable_share"),
        "doubtful_cells": tiles.get("doubtful_cells"),
        "ink_fraction": tissue.get("ink_fraction"),
        "focus": manifests["stain"].get("focus"),
        "path": inspect.get("path"),
        "backend": inspect.get("backend"),
        "vendor": inspect.get("vendor"),
        "width": inspect.get("width"),
        "height": inspect.get("height"),
        "bounds": inspect.get("bounds"),
        "geojson_origin": manifests["export"].get("origin") or [0, 0],
        "mpp": inspect.get("mpp"),
        "mpp_source": inspect.get("mpp_source"),
        "objective": inspect.get("objective"),
        "grid": nuclei.grid.to_json(),
        "stain": manifests["stain"].get("method"),
        "warnings": warnings_of(manifests),
        "model": model["name"],
        "stages": stage_costs(manifests.values()),
        "versions": provenance.versions(),
        "git": provenance.git_state(),
        "hashes": {"slide": inspect.get("quick_hash"), "model": model["sha256"]},
    }


def evaluate_slide(
    nuclei: Nuclei, truth: Path, size: tuple[int, int], origin: tuple[int, int] = (0, 0)
) -> dict[str, Any]:
    """Compare a slide's nuclei with known nuclei.

    Parameters
    ----------
    nuclei : Nuclei
        The nuclei found.
    truth : pathlib.Path
        Polygons in level-0 pixels, or a label map of level 0; see `pipeline.evaluation.readers.load`.
    size : tuple of int
        Width and height of level 0.
    origin : tuple of int
        Origin of the polygons' coordinates as a level-0 pixel, unless their file states its own.

    Returns
    -------
    dict
        Scores and counts of `pipeline.evaluation.metrics.score`, rounded to 6 decimals; ``n_outside``, the number of
        known nuclei outside the slide, which count as missed; and ``region``, the evaluated box (left, top, right,
        bottom in level-0 pixels). This is the box around the known nuclei on the slide, or that of the label map, or
        the whole slide if no nucleus is known. Nuclei whose centroid lies outside the box are left out, so that it
        suffices to annotate a part of a slide.

    Raises
    ------
    SlideError
        When the truth cannot be read or does not belong to this slide.
    """
    from pipeline.evaluation.metrics import Overlaps, score_overlaps
    from pipeline.evaluation.readers import LabelMap, compare, load, nuclei_within

    try:
        known = load(truth, origin)
    except PipelineError as error:
        raise SlideError(f"truth: {error.reason}", error.hint) from None
    slide = (0, 0, *size)
    if isinstance(known, LabelMap):
        box = known.box
        if box != slide:
            raise SlideError(
                f"truth: {truth} has {box[2]} x {box[3]} pixels, level 0 of the slide {size[0]} x {size[1]}",
                "give a label map of level 0, or polygons",
            )
    else:
        inside, outside, _ = known.cut(slide)
        box = inside.box if len(inside.runs) else slide
        if len(outside) and not len(inside.runs):
            raise SlideError(f"truth: {truth} lies outside of the slide", "polygons must be in level-0 pixels")
    if known.busy(box[1], box[3]):
        scores = compare(known, nuclei_within(nuclei.path, box), slide)
    else:  # no known nuclei: all that were found are false positives
        found = np.arange(1, len(nuclei) + 1)
        scores = score_overlaps(Overlaps.of(np.zeros_like(found), found)) | {"n_outside": 0}
    told = {name: round(value, 6) if isinstance(value, float) else value for name, value in scores.items()}
    return told | {"region": list(box)}


def _facts(numbers: Mapping[str, Any], nuclei: Nuclei) -> list[str]:
    count, area, density = len(nuclei), numbers["tissue_mm2"], numbers["nuclei_per_mm2"]
    tissue = f"{area:,.0f}" if area > 999 else f"{area:.3g}"
    facts = [f"{count:,} nucle{'us' if count == 1 else 'i'}", f"{tissue} mm² tissue"]
    if density is not None:
        facts.append(f"{density:,.0f} nuclei/mm²")
    median = numbers["quantiles"].get("area_um2", {}).get("50")
    if median is not None:
        facts.append(f"median area {median:.1f} µm²")
    facts.append(f"analysed at {nuclei.grid.mpp:g} µm/px")
    evaluation = numbers.get("evaluation")
    if evaluation:
        facts.append(f"AJI {evaluation['aji']:.3f}, PQ {evaluation['pq']:.3f}, F1 {evaluation['f1']:.3f}")
    return facts


def draw_overview(path: Path, slide: str, numbers: Mapping[str, Any], nuclei: Nuclei, tissue: Path, zarr: Path) -> None:
    """Draw ``overview.png``; see `pipeline.pictures.overview.draw`."""
    import shapely

    from pipeline.pictures import overview
    from pipeline.stores.tile_store import TileStore
    from pipeline.tissue import read_tissue

    scale = (nuclei.grid.scale_x, nuclei.grid.scale_y)
    rings = [shapely.get_coordinates(ring) / scale for ring in shapely.get_rings(read_tissue(tissue))]
    regions = overview.choose_regions(nuclei.centroids, nuclei.grid, rings)
    overview.draw(
        path,
        slide=slide,
        facts=_facts(numbers, nuclei),
        tiles=TileStore.open(zarr),
        rings=rings,
        centroids=nuclei.centroids,
        regions=regions,
        contours=nuclei.contours(regions),
        legend=nuclei.classes,
    )


def run_summary(
    slide: str,
    manifests: Mapping[str, Path],
    *,
    nuclei: Path,
    tissue_geojson: Path,
    tiles_zarr: Path,
    out: Path,
    png: Path,
    truth: Path | None = None,
    origin: str = "slide",
    **how: Any,
) -> dict[str, Any]:
    """Run the stage.

    Parameters
    ----------
    slide : str
        Name of the slide.
    manifests : mapping of str to pathlib.Path
        Manifests of the earlier stages, by the names in `MANIFESTS`.
    nuclei, tissue_geojson, tiles_zarr : pathlib.Path
        ``nuclei.parquet``, ``tissue.geojson`` and ``tiles.zarr``.
    out, png : pathlib.Path
        ``metrics.json`` and ``overview.png`` to write.
    truth : pathlib.Path or None
        Known nuclei of the slide: GeoJSON in level-0 pixels, or a label map of level 0.
    origin : {"slide", "bounds"}
        Origin of the GeoJSON's coordinates, unless it states its own; see `pipeline.exchange.geojson.origin_of`.
    **how : Any
        `on_bad_slide`, `minutes` and `again` of `pipeline.batch.stage.run_stage`.

    Returns
    -------
    dict
        The manifest, with the result of `summarise` and ``evaluation`` (see `evaluate_slide`; None without truth).
    """

    def body(staged: dict[str, Path]) -> dict[str, Any]:
        before = {name: read_manifest(manifests[name]) for name in MANIFESTS}
        table = Nuclei.open(nuclei, Grid.from_json(before["tiles"]["grid"]))
        numbers = summarise(table, before)
        size = (before["inspect"]["width"], before["inspect"]["height"])
        numbers["evaluation"] = None
        if truth is not None:
            numbers["evaluation"] = scores = evaluate_slide(table, truth, size, origin_of(before["inspect"], origin))
            if scores["n_outside"]:
                from pipeline.evaluation.readers import told_outside

                warning = told_outside(scores["n_outside"], scores["n_truth"])
                numbers["warnings"].append(f"summary: {warning}")
                log.warning("slide %r: %s", slide, warning)
        draw_overview(staged["png"], slide, numbers, table, tissue_geojson, tiles_zarr)
        return numbers

    return run_stage(
        "summary",
        slide,
        manifest=out,
        outputs={"png": png},
        upstream=[manifests[name] for name in MANIFESTS],
        stores={tiles_zarr: manifests["tiles"]},
        body=body,
        **how,
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``python -m pipeline summary``."""
    add_stage_arguments(parser)
    for name in MANIFESTS:
        parser.add_argument(f"--{name}", type=Path, required=True, metavar="FILE", help=f"manifest: {name}.json")
    parser.add_argument("--nuclei", type=Path, required=True, metavar="FILE", help="nuclei.parquet")
    parser.add_argument("--tissue-geojson", type=Path, required=True, metavar="FILE", help="tissue.geojson")
    parser.add_argument("--tiles-zarr", type=Path, required=True, metavar="DIR", help="tiles.zarr")
    parser.add_argument("--truth", type=Path, metavar="FILE", help="known nuclei: GeoJSON(.gz), PNG, TIFF or npy")
    add_origin_argument(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="metrics.json to write")
    parser.add_argument("--png", type=Path, required=True, metavar="FILE", help="overview.png to write")


def main(args: argparse.Namespace) -> int:
    """Run ``python -m pipeline summary``."""
    keep_freed_memory()
    options = keywords(args)
    run_summary(manifests={name: options.pop(name) for name in MANIFESTS}, **options)
    return 0
