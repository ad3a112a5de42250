"""Stage ``stain``: fit one colour transform for the whole slide, towards the reference of the model package.

The transform is fitted to tissue pixels of cells that are spread over the slide. The choice of cells depends only on
the tissue, not on the tile size or the number of workers. A slide whose colours do not determine its stains is left as
it is, with a warning in the manifest. The same cells show how sharp the slide is.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from pipeline import staintools_backend
from pipeline.batch.stage import add_stage_arguments, keywords, run_stage
from pipeline.errors import PipelineError
from pipeline.kernels import stain as kernel
from pipeline.kernels.focus import BLURRED_UM, COARSEST_MPP, edge_blur
from pipeline.machine.allocator import keep_freed_memory
from pipeline.models.package import ModelPackage
from pipeline.pictures.figure import PNG_LEVEL
from pipeline.stores.grid import Grid
from pipeline.stores.lattice import CELL

if TYPE_CHECKING:
    from PIL.Image import Image

    from pipeline.stores.tile_store import Tiles

log = logging.getLogger(__name__)

METHODS = ("model", *kernel.METHODS)
"""Values of ``--method``; ``model`` is what the model package was trained with."""

SAMPLE_PIXELS = 200_000
"""Number of tissue pixels to which a transform is fitted."""

SAMPLE_CELLS = 4096
"""Most cells that are read to find these pixels."""

LEAST_JUDGED = 20
"""Fewest cells with edges from which a slide's focus is judged."""

MOST_BLURRED = 1 / 3
"""Share of these cells that may be out of focus before the slide gets a warning."""

_CELLS_AT_ONCE = 256
_BLOCK_CELLS = 1024 // CELL
_PREVIEWS = 6
_PREVIEW_SIZE = 256


def spread_order(count: int) -> np.ndarray:
    """Order the numbers 0..count-1 so that the first of them, however many, are spread evenly.

    They follow multiples of the golden ratio, the sequence of lowest discrepancy of its kind. It does not fall in step
    with the rows of a lattice.

    Returns
    -------
    numpy.ndarray
        int64, shape ``(count,)``.
    """
    ratio = (5**0.5 - 1) / 2
    return np.argsort((np.arange(count) * ratio) % 1.0, kind="stable").argsort(kind="stable").astype(np.int64)


def _cell_window(grid: Grid, cell: np.ndarray, size: int) -> tuple[int, int, int, int]:
    """Window ``x, y, width, height`` of side `size` (less on a small grid) around a cell, within the grid."""
    width, height = min(size, grid.width), min(size, grid.height)
    x = min(max(0, int(cell[1]) * CELL + CELL // 2 - width // 2), grid.width - width)
    y = min(max(0, int(cell[0]) * CELL + CELL // 2 - height // 2), grid.height - height)
    return x, y, width, height


@dataclass(frozen=True, eq=False)
class Sample:
    """Pixels and measurements of cells that are spread over a slide.

    Parameters
    ----------
    rgb : numpy.ndarray
        Tissue pixels, uint8, shape ``(n, 3)``.
    cells : int
        Number of cells that were read.
    white : numpy.ndarray
        OD of the glass in the cells, float64, shape ``(3,)``, see `pipeline.kernels.stain.white_level`.
    blur : list of float
        Width of the edges in µm, see `pipeline.kernels.focus.edge_blur`, for each cell that is mostly tissue and has
        edges. Empty when the slide's pixels are too coarse to judge.
    """

    rgb: np.ndarray
    cells: int
    white: np.ndarray
    blur: list[float]


def sample_tissue(tiles: Tiles, pixels: int = SAMPLE_PIXELS) -> Sample:
    """Sample cells that are spread over a slide.

    Parameters
    ----------
    tiles : Tiles
        The slide's tiles.
    pixels : int
        Number of tissue pixels wanted. The sample has fewer when `SAMPLE_CELLS` cells do not hold as many.
    """
    cells = np.argwhere(tiles.active)
    order = spread_order(len(cells))[:SAMPLE_CELLS]
    # Edges are no narrower than the slide's own pixels, which may be coarser than the grid's.
    fine = tiles.grid.mpp <= COARSEST_MPP * min(tiles.grid.scale_x, tiles.grid.scale_y)
    found = [np.empty((0, 3), np.uint8)]
    blur: list[float] = []
    counts, white_pixels, seen = np.zeros((3, 256), np.int64), 0, 0
    for start in range(0, len(order), _CELLS_AT_ONCE):
        some = cells[np.sort(order[start : start + _CELLS_AT_ONCE])]
        tissue: dict[int, np.ndarray] = {}
        for index, cell in _read_cells(tiles, some):
            tissue[index] = kernel.tissue_pixels(cell)
            more, white = kernel.count_values(cell)
            counts, white_pixels = counts + more, white_pixels + white
            mostly_tissue = 2 * len(tissue[index]) > cell.shape[0] * cell.shape[1]
            if fine and mostly_tissue and (width := edge_blur(cell, tiles.grid.mpp)) is not None:
                blur.append(width)
        found += [tissue[index] for index in range(len(some))]
        seen += len(some)
        if sum(map(len, found)) >= pixels:
            break
    rgb = kernel.thinned(np.concatenate(found), pixels)
    return Sample(rgb, seen, kernel.white_of_counts(counts, white_pixels), blur)


def _read_cells(tiles: Tiles, cells: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the index of each cell in `cells`, and its pixels; cells that lie close together are read at once."""
    block = cells // _BLOCK_CELLS
    order = np.lexsort(block.T[::-1])
    for members in np.split(order, np.flatnonzero(np.diff(block[order], axis=0).any(axis=1)) + 1):
        top, left = cells[members].min(axis=0) * CELL
        bottom, right = (cells[members].max(axis=0) + 1) * CELL
        width, height = min(right, tiles.grid.width) - left, min(bottom, tiles.grid.height) - top
        rgb = tiles.read(int(left), int(top), int(width), int(height))
        for index in members:
            y, x = cells[index] * CELL - (top, left)
            yield int(index), rgb[y : y + CELL, x : x + CELL]


def judge_focus(blur: Sequence[float]) -> tuple[dict[str, Any], list[str]]:
    """Judge how sharp a slide is.

    Parameters
    ----------
    blur : sequence of float
        `Sample.blur`.

    Returns
    -------
    focus : dict
        JSON values: ``cells`` (the number of cells in `blur`), ``blur_um`` (the median width of their edges) and
        ``blurred_share`` (the share of cells whose edges are wider than `pipeline.kernels.focus.BLURRED_UM`). The last
        two are None below `LEAST_JUDGED` cells.
    warnings : list of str
        One line when more than `MOST_BLURRED` of the cells are out of focus.
    """
    if len(blur) < LEAST_JUDGED:
        return {"cells": len(blur), "blur_um": None, "blurred_share": None}, []
    median, share = float(np.median(blur)), float(np.mean(np.array(blur) > BLURRED_UM))
    warnings = []
    if share > MOST_BLURRED:
        warnings.append(
            f"out of focus: edges are wider than {BLURRED_UM:g} µm in {100 * share:.0f} % of {len(blur)} places "
            f"(median {median:.2f} µm), and nuclei are missed there: see the crops of stain.png, scan the slide again"
        )
    return {"cells": len(blur), "blur_um": round(median, 4), "blurred_share": round(share, 4)}, warnings


def resolve_method(
    requested: str, model: ModelPackage, strength: float | None
) -> tuple[str, str, float, dict[str, Any]]:
    """Resolve the requested method and strength for a model; see `fit_slide`.

    Returns
    -------
    method : str
        One of `pipeline.kernels.stain.METHODS`.
    target : str
        The entry of the model's reference that the method aims at.
    strength : float
        How far towards the target, 0 to 1.
    reference : dict
        The model's reference, with an entry for the method.

    Raises
    ------
    PipelineError
        When the method is unknown, not installed, or the model has no reference for it.
    """
    method = model.stain.get("method", "none") if requested == "model" else requested
    if method not in kernel.METHODS:
        raise PipelineError(f"no such stain method: {method!r}", f"one of {', '.join(METHODS)}")
    staintools_backend.check_method(method)
    if strength is None:
        strength = float(model.stain.get("strength", 1.0)) if requested == "model" else 1.0
    if strength == 0:
        method = "none"
    reference = model.stain.get("reference") or {}
    target = method
    if method == "vahadane" and method not in reference and "macenko" in reference:
        # Both describe the same two dyes; a package made without staintools has only Macenko's vectors.
        target = "macenko"
        reference = {**reference, method: reference[target]}
    if method != "none" and method not in reference:
        there = ", ".join(name for name in reference if name in kernel.METHODS) or "none"
        raise PipelineError(
            f"model {model.name} carries no stain reference for {method}",
            f"it has {there}; method model takes the one it was trained with",
        )
    return method, target, strength, reference


def fit_slide(
    rgb: np.ndarray,
    requested: str,
    model: ModelPackage,
    strength: float | None = None,
    white: np.ndarray | None = None,
) -> tuple[kernel.StainTransform, dict[str, Any]]:
    """Fit a slide's transform, or leave its colours as they are when that cannot be done.

    Parameters
    ----------
    rgb : numpy.ndarray
        Tissue pixels of the slide, uint8, shape ``(n, 3)``.
    requested : str
        One of `METHODS`.
    model : ModelPackage
        The model whose stain is the target.
    strength : float, optional
        How far towards the target, 0 to 1. None means 1 or, with method ``model``, the model's own strength, raised for
        stains that the model does not know (see `pipeline.kernels.stain.adapted_strength`).
    white : numpy.ndarray, optional
        OD of the slide's glass, float64, shape ``(3,)``; None means 0.

    Returns
    -------
    transform : StainTransform
        The transform.
    payload : dict
        JSON values for the manifest: ``requested``; ``method`` (the one in effect); ``strength``; ``transform``;
        ``source`` (the slide's own fit); ``target`` (the entry of the model's reference); ``stains`` (the slide's own
        stain vectors by Macenko, for measurements, or None) and ``white`` (OD of the slide's glass), neither of which
        depends on the method; ``extractor``; ``warnings``.

    Raises
    ------
    PipelineError
        When the method is unknown, not installed, or the model has no reference for it.
    """
    extractors = staintools_backend.extractors()
    adapt = strength is None
    method, target, strength, reference = resolve_method(requested, model, strength)
    warnings: list[str] = []
    transform = kernel.StainTransform()
    source: dict[str, Any] = {}
    try:
        transform, source = kernel.fit_transform(rgb, method, reference, extractors, strength, white, adapt)
        if adapt and source:
            strength = round(kernel.adapted_strength(source, reference[method], strength), 4)
    except kernel.StainFitError as error:
        warnings.append(f"stain left as it is: {error}")
        method = target = "none"
        strength = 0.0
    glass = np.zeros(3) if white is None else np.round(white, 6)
    stains: dict[str, Any] | None = source if method == "macenko" else None
    if stains is None:
        try:
            stains = kernel.fit_stains(kernel.balanced_tissue(rgb, glass), extractors["macenko"])
        except kernel.StainFitError as error:
            log.info("stains are measured with typical vectors: %s", error)
    version = staintools_backend.version()
    return transform, {
        "requested": requested,
        "method": method,
        "strength": strength,
        "transform": transform.to_json(),
        "source": source,
        "target": target,
        "stains": stains,
        "white": glass.tolist(),
        "extractor": f"staintools {version}" if version else "own",
        "warnings": warnings,
    }


def run_stain(
    slide: str,
    tiles: Path,
    zarr: Path,
    model: Path,
    out: Path,
    png: Path,
    *,
    method: str = "model",
    strength: float | None = None,
    **how: Any,
) -> dict[str, Any]:
    """Run the stage.

    Parameters
    ----------
    slide : str
        Name of the slide.
    tiles, zarr : pathlib.Path
        Manifest and store of the stage ``tiles``.
    model : pathlib.Path
        Folder of the model package.
    out, png : pathlib.Path
        The manifest and the preview to write.
    method : str
        One of `METHODS`.
    strength : float, optional
        How far towards the reference, 0 to 1; see `fit_slide` for None.
    **how : Any
        `on_bad_slide`, `minutes` and `again` of `pipeline.batch.stage.run_stage`.

    Returns
    -------
    dict
        The manifest: the payload of `fit_slide`, ``focus`` (see `judge_focus`) and ``samples`` (``pixels``, ``cells``).
    """
    package = ModelPackage.load(model)

    def body(staged: dict[str, Path]) -> dict[str, Any]:
        from pipeline.stores.tile_store import TileStore

        store = TileStore.open(zarr)
        sample = sample_tissue(store)
        transform, payload = fit_slide(sample.rgb, method, package, strength, sample.white)
        draw_preview(store, transform, payload, package).save(staged["png"], compress_level=PNG_LEVEL)
        focus, warnings = judge_focus(sample.blur)
        warnings = payload["warnings"] + warnings
        for warning in warnings:
            log.warning("slide %r: %s", slide, warning)
        samples = {"pixels": len(sample.rgb), "cells": sample.cells}
        return payload | {"warnings": warnings, "focus": focus, "samples": samples}

    return run_stage(
        "stain",
        slide,
        manifest=out,
        outputs={"png": png},
        upstream=[tiles],
        stores={zarr: tiles},
        body=body,
        **how,
    )


def stain_matrix(manifest: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray, str]:
    """Stain vectors and colour of the glass with which to measure a slide's stains.

    Parameters
    ----------
    manifest : mapping
        ``stain.json``.

    Returns
    -------
    matrix : numpy.ndarray
        Unit rows of hematoxylin and eosin, float64, shape ``(2, 3)``.
    white : numpy.ndarray
        OD of the glass, float64, shape ``(3,)``.
    origin : {"slide", "ruifrok"}
        Whether the vectors are the slide's own or the typical ones.
    """
    stains, white = manifest.get("stains"), np.array(manifest.get("white", (0, 0, 0)), np.float64)
    if stains:
        return np.array(stains["matrix"], np.float64), white, "slide"
    return kernel.RUIFROK, white, "ruifrok"


def preview_windows(tiles: Tiles) -> Iterator[tuple[tuple[int, int, int, int], np.ndarray]]:
    """Yield up to six windows ``x, y, width, height`` that show what a slide's tissue looks like, and their pixels."""
    cells = np.argwhere(tiles.active)
    chosen = cells[np.sort(spread_order(len(cells))[: 4 * _PREVIEWS])]
    shown: list[tuple[int, int]] = []
    for group in np.array_split(chosen, _PREVIEWS):
        best, best_score = None, 0.0
        for cell in group:
            window = _cell_window(tiles.grid, cell, _PREVIEW_SIZE)
            if any(max(abs(window[0] - x), abs(window[1] - y)) < _PREVIEW_SIZE // 2 for x, y in shown):
                continue
            rgb = tiles.read(*window)
            # Prefer windows with much tissue and much contrast.
            score = float(kernel.tissue_mask(rgb).mean()) * float(cv2.meanStdDev(rgb)[1].mean())
            if score > best_score:
                best, best_score = (window, rgb), score
        if best is not None:
            shown.append(best[0][:2])
            yield best


def draw_preview(
    tiles: Tiles, transform: kernel.StainTransform, payload: Mapping[str, Any], model: ModelPackage
) -> Image:
    """Draw crops of the slide before and after the transform.

    Parameters
    ----------
    tiles : Tiles
        The slide's tiles.
    transform : StainTransform
        The transform.
    payload : mapping
        The payload of `fit_slide`.
    model : ModelPackage
        The model whose stain is the target.

    Returns
    -------
    PIL.Image.Image
        RGB.
    """
    from PIL import Image, ImageDraw, ImageFont

    margin, gap, label, head, side = 20, 8, 64, 58, _PREVIEW_SIZE
    ink, quiet, paper = (34, 34, 40), (110, 110, 120), (250, 250, 252)
    windows = list(preview_windows(tiles))
    count = max(1, len(windows))
    # Wide enough for a warning, even with a single crop.
    width = max(margin + label + count * (side + gap) - gap + margin, 900)
    image = Image.new("RGB", (width, head + (2 * (side + gap) - gap if windows else 20) + margin), paper)
    draw = ImageDraw.Draw(image)
    title, text = ImageFont.load_default(17), ImageFont.load_default(13)
    way = f"{payload['strength']:.0%} of the way" if payload["strength"] < 1 else "all the way"
    name = "left as it is" if payload["method"] == "none" else f"{payload['method']}, {way} to the model's reference"
    draw.text((margin, 12), f"Stain: {name}", ink, title)
    note = payload["warnings"][0] if payload["warnings"] else f"{tiles.grid.mpp:g} microns per pixel"
    draw.text((margin, 36), note, (176, 62, 20) if payload["warnings"] else quiet, text)
    references = model.stain.get("reference") or {}
    targets = references.get(payload["target"], {})
    rows = (("before", payload["stains"] or {}), ("after", targets)) if windows else ()
    for row, (caption, fit) in enumerate(rows):
        top = head + row * (side + gap)
        draw.text((margin, top + 4), caption, ink, text)
        for index, vector in enumerate(fit.get("matrix", ())):
            colour = kernel.od_to_rgb(np.array(vector) * 0.9)
            y = top + 34 + index * 50
            draw.rectangle((margin, y, margin + 28, y + 28), tuple(int(value) for value in colour))
            draw.text((margin + 34, y + 7), "HE"[index], quiet, text)
        for index, (_, rgb) in enumerate(windows):
            crop = Image.fromarray(transform.apply(rgb) if row else rgb)
            image.paste(crop, (margin + label + index * (side + gap), top))
    if windows:
        length = round(25 / tiles.grid.mpp)
        *_, width, height = windows[0][0]
        if length < width - 30:
            x, y = margin + label + width - 12, head + height - 12
            draw.rectangle((x - length - 4, y - 22, x + 4, y + 5), (255, 255, 255))
            draw.rectangle((x - length, y - 2, x, y + 1), ink)
            draw.text((x - length / 2, y - 4), "25 microns", ink, ImageFont.load_default(11), anchor="mb")
    else:
        draw.text((margin, head + 4), "no tissue", quiet, text)
    return image


def _strength(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not within 0 and 1")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``python -m pipeline stain``."""
    add_stage_arguments(parser)
    parser.add_argument("--tiles", type=Path, required=True, metavar="FILE", help="tiles.json")
    parser.add_argument("--zarr", type=Path, required=True, metavar="DIR", help="tiles.zarr")
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="model package")
    parser.add_argument(
        "--method",
        choices=METHODS,
        default="model",
        help="stain normalisation (default: what the model was trained with)",
    )
    parser.add_argument(
        "--strength",
        type=_strength,
        metavar="S",
        help="how far towards the model's reference, 0 to 1 (default: with --method=model what its card says, else 1)",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="manifest to write")
    parser.add_argument("--png", type=Path, required=True, metavar="FILE", help="preview to write")


def main(args: argparse.Namespace) -> int:
    """Run ``python -m pipeline stain``."""
    keep_freed_memory()
    run_stain(**keywords(args))
    return 0
