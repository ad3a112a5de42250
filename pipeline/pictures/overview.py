"""Draw ``overview.png``: the tissue, the density of nuclei, and a few regions at full resolution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import numpy.typing as npt

from pipeline.pictures.figure import (
    INK,
    MARGIN,
    MUTED,
    THUMBNAIL_SIDE,
    TISSUE_LINE,
    Box,
    heading,
    hex_code,
    map_size,
    panel,
    picture,
    scale_bar,
    shorten,
    write,
)
from pipeline.slides.regions import shrink
from pipeline.stores.grid import Grid
from pipeline.stores.lattice import CELL

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from pipeline.stores.tile_store import Tiles

CROP_UM = 128.0
"""Side of a crop in µm."""

MAP_WIDTH, CROP_WIDTH = 5.475, (13 - 2 * MARGIN - 2 * 0.4) / 3
"""Width of a map and of a crop in inches, on a figure 13 inches wide."""

LEGEND_LETTERS = 30
"""Largest number of characters of a class name in the legend."""

COLOUR_MAP = "magma"

Contour = tuple[npt.NDArray[np.float64], Sequence[int]]
"""An outline in grid pixels and its colour."""


@dataclass(frozen=True)
class Region:
    """A square of the grid that is shown at full resolution.

    Parameters
    ----------
    name : str
        Name of the region, which says why it was chosen.
    x, y, side : int
        Corner and side in grid pixels.
    count : int
        Number of nuclei whose centroid lies in the region.
    """

    name: str
    x: int
    y: int
    side: int
    count: int


@dataclass(frozen=True)
class Density:
    """Density of nuclei in square bins.

    Parameters
    ----------
    values : numpy.ndarray of float64, shape (rows, columns)
        Nuclei per mm² of tissue; NaN where there is no tissue.
    bin_um : float
        Side of a bin in µm.
    """

    values: npt.NDArray[np.float64]
    bin_um: float


def thumbnail(tiles: Tiles, side: int = THUMBNAIL_SIDE) -> tuple[npt.NDArray[np.uint8], int]:
    """Make a thumbnail of the stored tissue by averaging blocks of pixels.

    Parameters
    ----------
    tiles : Tiles
        The slide's pixels.
    side : int
        Largest number of pixels of the thumbnail's longer side.

    Returns
    -------
    image : numpy.ndarray of uint8, shape (ceil(H / factor), ceil(W / factor), 3)
        The thumbnail, white where nothing is stored.
    factor : int
        Grid pixels per thumbnail pixel. It is a power of two, so that no thumbnail pixel straddles two stored tiles and
        each tile is read once.
    """
    grid, active = tiles.grid, np.asarray(tiles.active)
    factor = 1 << max(0, math.ceil(math.log2(max(grid.width, grid.height) / side)))
    image = np.full((math.ceil(grid.height / factor), math.ceil(grid.width / factor), 3), 255, dtype=np.uint8)
    step = max(1024, factor)
    for top in range(0, grid.height, step):
        for left in range(0, grid.width, step):
            h, w = min(step, grid.height - top), min(step, grid.width - left)
            cells = slice(top // CELL, -(-(top + h) // CELL)), slice(left // CELL, -(-(left + w) // CELL))
            if not active[cells].any():
                continue
            block: npt.NDArray[Any] = tiles.read(left, top, w, h)
            if h % factor or w % factor:  # at the right or bottom edge of the slide
                block = cv2.copyMakeBorder(block, 0, -h % factor, 0, -w % factor, cv2.BORDER_REPLICATE)
            small = shrink(block, factor, factor)
            y, x = top // factor, left // factor
            image[y : y + small.shape[0], x : x + small.shape[1]] = small
    return image, factor


def coverage(rings: Sequence[npt.NDArray[np.float64]], rows: int, cols: int, scale: float) -> npt.NDArray[np.float64]:
    """Fraction of each bin that lies inside `rings` (even–odd rule).

    Parameters
    ----------
    rings : sequence of numpy.ndarray, shape (k, 2)
        Exteriors and holes, in any unit.
    rows, cols : int
        Number of bins.
    scale : float
        Bins per unit.

    Returns
    -------
    numpy.ndarray of float64, shape (rows, cols)
        Fractions, 0 to 1.
    """
    fine, shift = 4, 8
    mask = np.zeros((rows * fine, cols * fine), dtype=np.uint8)
    factor = scale * fine
    # fillPoly takes fixed-point coordinates of pixel centres.
    paths = [np.rint((np.asarray(ring) * factor - 0.5) * 2**shift).astype(np.int32) for ring in rings if len(ring) > 3]
    if paths:
        cv2.fillPoly(mask, paths, 1, shift=shift)
    return np.asarray(mask.reshape(rows, fine, cols, fine).mean(axis=(1, 3), dtype=np.float64))


def density_map(
    centroids: npt.NDArray[np.float64],
    rings: Sequence[npt.NDArray[np.float64]],
    size: tuple[float, float],
) -> Density:
    """Smoothed density of nuclei per mm² of tissue.

    Parameters
    ----------
    centroids : numpy.ndarray of float64, shape (n, 2)
        Centroids in µm, x first.
    rings : sequence of numpy.ndarray, shape (k, 2)
        Exteriors and holes of the tissue in µm.
    size : tuple of float
        Width and height of the slide in µm.

    Returns
    -------
    Density
        Bins are 1/110 of the slide's longer side, but at least 20 µm. Counts and tissue area are smoothed alike before
        they are divided (Gaussian with a sigma of 1.5 bins or 50 µm, whichever is larger).
    """
    bin_um = max(20.0, max(size) / 110)
    rows, cols = max(1, math.ceil(size[1] / bin_um)), max(1, math.ceil(size[0] / bin_um))
    index = np.clip((centroids // bin_um).astype(np.int64), 0, (cols - 1, rows - 1))
    counts = np.bincount(index[:, 1] * cols + index[:, 0], minlength=rows * cols).reshape(rows, cols)
    tissue = coverage(rings, rows, cols, 1 / bin_um)
    sigma = max(1.5, 50 / bin_um)
    smooth = cv2.GaussianBlur(counts.astype(np.float64), (0, 0), sigma, borderType=cv2.BORDER_CONSTANT)
    area = cv2.GaussianBlur(tissue, (0, 0), sigma, borderType=cv2.BORDER_CONSTANT) * bin_um**2 / 1e6
    with np.errstate(divide="ignore", invalid="ignore"):
        values = np.where(tissue > 0.15, smooth / area, np.nan)
    return Density(values, bin_um)


def choose_regions(
    centroids: npt.NDArray[np.float64],
    grid: Grid,
    rings: Sequence[npt.NDArray[np.float64]] = (),
) -> list[Region]:
    """Choose up to three squares of `CROP_UM` that do not overlap: the densest, a typical and a sparse one with nuclei.

    Parameters
    ----------
    centroids : numpy.ndarray of float64, shape (n, 2)
        Centroids in grid pixels, x first.
    grid : Grid
        The slide's grid.
    rings : sequence of numpy.ndarray, shape (k, 2)
        Exteriors and holes of the tissue in grid pixels; squares that are mostly tissue are preferred.

    Returns
    -------
    list of Region
        The regions. On a slide without nuclei, a single one where there is most tissue.
    """
    side = min(max(16, round(CROP_UM / grid.mpp)), grid.width, grid.height)
    half = max(1, side // 2)
    cols, rows = math.ceil(grid.width / half), math.ceil(grid.height / half)

    def windows(bins: npt.NDArray[Any]) -> npt.NDArray[Any]:
        if side == 1:
            return bins
        # A square covers 2 x 2 bins, so none begins in the last row or column of bins.
        padded = np.pad(bins, 1)
        sums = padded[1:-1, 1:-1] + padded[1:-1, 2:] + padded[2:, 1:-1] + padded[2:, 2:]
        return sums[: max(1, rows - 1), : max(1, cols - 1)]

    def region(name: str, row: int, column: int) -> Region:
        left, top = min(column * half, grid.width - side), min(row * half, grid.height - side)
        inside = (centroids >= (left, top)) & (centroids < (left + side, top + side))
        return Region(name, left, top, side, int(inside.all(axis=1).sum()))

    tissue = windows(coverage(rings, rows, cols, 1 / half)) / (1 if side == 1 else 4)
    centroids = np.asarray(centroids, dtype=np.float64).reshape(-1, 2)
    if not len(centroids):
        middle = np.hypot(*np.ogrid[-1 : 1 : tissue.shape[0] * 1j, -1 : 1 : tissue.shape[1] * 1j])
        best = np.unravel_index(int(np.argmax(np.round(tissue, 1) - 0.01 * middle)), tissue.shape)
        return [region("no nuclei", int(best[0]), int(best[1]))]
    index = np.clip((centroids // half).astype(np.int64), 0, (cols - 1, rows - 1))
    counts = windows(np.bincount(index[:, 1] * cols + index[:, 0], minlength=rows * cols).reshape(rows, cols))
    wanted = (counts > 0) & (tissue >= min(0.7, float(tissue[counts > 0].max())))
    y, x = np.nonzero(wanted)
    count = counts[y, x]
    goals = (("densest", count.max()), ("median", np.median(count)), ("sparse", np.quantile(count, 0.05)))
    chosen: list[Region] = []
    for name, goal in goals:
        for place in np.argsort(np.abs(count - goal), kind="stable"):
            found = region(name, int(y[place]), int(x[place]))
            if all(abs(found.x - other.x) >= side or abs(found.y - other.y) >= side for other in chosen):
                chosen.append(found)
                break
    return chosen


def draw(
    path: Path,
    *,
    slide: str,
    facts: Sequence[str],
    tiles: Tiles,
    rings: Sequence[npt.NDArray[np.float64]],
    centroids: npt.NDArray[np.float64],
    regions: Sequence[Region],
    contours: Sequence[Sequence[Contour]],
    legend: Sequence[tuple[str, Sequence[int]]],
) -> None:
    """Draw the overview of a slide.

    Parameters
    ----------
    path : pathlib.Path
        PNG to write.
    slide : str
        Name of the slide.
    facts : sequence of str
        Facts about the slide, shown below its name.
    tiles : Tiles
        The slide's pixels.
    rings : sequence of numpy.ndarray, shape (k, 2)
        Exteriors and holes of the tissue in grid pixels.
    centroids : numpy.ndarray of float64, shape (n, 2)
        Centroids of all nuclei in grid pixels.
    regions : sequence of Region
        Regions to show at full resolution.
    contours : sequence
        For each region, the outlines of its nuclei with their colours.
    legend : sequence of tuple
        Names and colours of the classes; drawn if there are several.
    """
    grid = tiles.grid
    wide, tall = map_size(grid.width, grid.height, (MAP_WIDTH, 5.2), 4.2)  # of each of the two maps
    columns, rows = legend_layout([name for name, _ in legend])
    with picture(path, 1.3 + tall + 0.55 + CROP_WIDTH + 0.3 + 0.2 * rows) as figure:
        heading(figure, slide, "   ·   ".join(facts))
        _draw_tissue(figure, (MARGIN, 1.3, wide, tall), tiles, rings, regions)
        density = density_map(
            np.asarray(centroids, dtype=np.float64).reshape(-1, 2) * grid.mpp,
            [np.asarray(ring) * grid.mpp for ring in rings],
            (grid.width * grid.mpp, grid.height * grid.mpp),
        )
        _draw_density(figure, (MARGIN + wide + 0.4, 1.3, wide, tall), density, rings, grid)
        boxes = [(MARGIN + i * (CROP_WIDTH + 0.4), 1.3 + tall + 0.55, CROP_WIDTH, CROP_WIDTH) for i in range(3)]
        for number, (region, outlines) in enumerate(zip(regions, contours, strict=True)):
            _draw_crop(figure, boxes[number], f"{number + 1}   {region.name}", tiles, region, outlines)
        if len(regions) < len(boxes):
            left, top, width, height = boxes[len(regions)]
            note = "no further region with nuclei" if len(centroids) else "no nuclei on this slide"
            write(figure, left + width / 2, top + height / 2, note, ha="center", color=MUTED, fontsize=10)
        if len(legend) > 1:
            _draw_legend(figure, legend, columns)


def _draw_tissue(
    figure: Figure,
    box: Box,
    tiles: Tiles,
    rings: Sequence[npt.NDArray[np.float64]],
    regions: Sequence[Region],
) -> None:
    from matplotlib.collections import LineCollection
    from matplotlib.patches import Rectangle

    grid = tiles.grid
    image, factor = thumbnail(tiles)
    extent = (0, image.shape[1] * factor, image.shape[0] * factor, 0)
    axes = panel(figure, box, "Tissue", "as analysed, with its outline")
    axes.imshow(image, extent=extent, interpolation="antialiased")
    axes.add_collection(LineCollection(list(rings), colors=TISSUE_LINE, linewidths=1.1))
    for number, region in enumerate(regions, start=1):
        corner = (region.x, region.y)
        axes.add_patch(Rectangle(corner, region.side, region.side, fill=False, ec="white", lw=2.6))
        axes.add_patch(Rectangle(corner, region.side, region.side, fill=False, ec=INK, lw=1.4))
        above = region.y > 0.04 * grid.height  # a badge above a region at the top would cover the panel's title
        axes.annotate(
            str(number),
            (region.x, region.y),
            xytext=(-1, 2) if above else (3, -3),
            textcoords="offset points",
            ha="left",
            va="bottom" if above else "top",
            fontsize=8.5,
            fontweight="bold",
            color="white",
            bbox={"boxstyle": "round,pad=0.18", "fc": INK, "ec": "none"},
        )
    axes.set_xlim(0, grid.width)
    axes.set_ylim(grid.height, 0)
    scale_bar(axes, grid.mpp)


def _draw_crop(figure: Figure, box: Box, title: str, tiles: Tiles, region: Region, outlines: Sequence[Contour]) -> None:
    from matplotlib.collections import LineCollection

    mpp = tiles.grid.mpp
    plural = "nucleus" if region.count == 1 else "nuclei"
    note = f"{region.count} {plural}, {region.count / (region.side * mpp / 1000) ** 2:,.0f}/mm²"
    axes = panel(figure, box, title, note if region.count else "")
    axes.imshow(tiles.read(region.x, region.y, region.side, region.side), interpolation="lanczos")
    lines = [outline - (region.x + 0.5, region.y + 0.5) for outline, _ in outlines]
    colours = [hex_code(colour) for _, colour in outlines]
    axes.add_collection(LineCollection(lines, colors="white", linewidths=2.2, alpha=0.55))
    axes.add_collection(LineCollection(lines, colors=colours, linewidths=1.3))
    axes.set_xlim(-0.5, region.side - 0.5)
    axes.set_ylim(region.side - 0.5, -0.5)
    scale_bar(axes, mpp)


def legend_layout(names: Sequence[str]) -> tuple[int, int]:
    """Columns and rows of the legend below the panels, for classes of these names.

    >>> legend_layout(["Nucleus"]), legend_layout(["Tumour", "Stroma", "Immune"])
    ((1, 1), (3, 1))
    >>> legend_layout(["Non-neoplastic epithelial cell"] * 8)
    (4, 2)
    """
    inches = 0.45 + 0.078 * max((min(len(name), LEGEND_LETTERS) for name in names), default=0)
    columns = max(1, min(len(names), int(2 * (MAP_WIDTH + 0.2) / inches)))
    return columns, max(1, -(-len(names) // columns))


def _draw_legend(figure: Figure, legend: Sequence[tuple[str, Sequence[int]]], columns: int) -> None:
    from matplotlib.patches import Rectangle

    shown = figure.legend(
        [Rectangle((0, 0), 1, 1, fc=hex_code(colour), ec="none") for _, colour in legend],
        [shorten(name, LEGEND_LETTERS) for name, _ in legend],
        loc="lower left",
        bbox_to_anchor=(MARGIN / 13 - 0.003, 0.003),
        ncols=columns,
        frameon=False,
        fontsize=9,
        handlelength=0.9,
        handleheight=0.9,
        borderaxespad=0.2,
    )
    for text in shown.get_texts():
        text.set_parse_math(False)


def _draw_density(
    figure: Figure,
    box: Box,
    density: Density,
    rings: Sequence[npt.NDArray[np.float64]],
    grid: Grid,
) -> None:
    from matplotlib.collections import LineCollection
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes = panel(figure, box, "Nuclei per mm² of tissue", f"bins of {density.bin_um:.0f} µm, smoothed")
    finite = density.values[np.isfinite(density.values)]
    top = float(np.quantile(finite, 0.995)) if finite.size else 0.0
    axes.add_collection(LineCollection(list(rings), colors=TISSUE_LINE, linewidths=0.9))
    axes.set_xlim(0, grid.width)
    axes.set_ylim(grid.height, 0)
    axes.set_aspect("equal")
    axes.apply_aspect()  # shrink the axes to the slide's shape now, since the colour bar is placed beside them
    if top <= 0:
        note = "no nuclei" if finite.size else "no tissue"
        axes.text(0.5, 0.5, note, ha="center", va="center", color=MUTED, fontsize=10, transform=axes.transAxes)
        return
    values, share = _fine(density, rings, grid)
    bin_pixels = density.bin_um / grid.mpp
    rows, cols = density.values.shape
    shown = axes.imshow(
        values,
        extent=(0, cols * bin_pixels, rows * bin_pixels, 0),
        cmap=COLOUR_MAP,
        vmin=0,
        vmax=top,
        alpha=share,
        interpolation="nearest",
    )
    axes.set_xlim(0, grid.width)
    axes.set_ylim(grid.height, 0)
    scale_bar(axes, grid.mpp)
    place = axes.get_position()
    bar = figure.colorbar(shown, cax=figure.add_axes((place.x1 + 0.012, place.y0, 0.013, place.height)))
    bar.set_alpha(1)
    bar.outline.set_visible(False)
    bar.ax.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    bar.ax.tick_params(labelsize=8.5, colors=MUTED, length=2.5, width=0.6)


def _fine(
    density: Density, rings: Sequence[npt.NDArray[np.float64]], grid: Grid
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Interpolate the density to finer bins, and return it with the fraction of tissue in each of them."""
    values = density.values
    known = np.isfinite(values)
    if known.any() and not known.all():  # fill from the nearest bin, so that tissue has a colour up to its edge
        unknown = (~known).astype(np.uint8)
        _, bins = cv2.distanceTransformWithLabels(unknown, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)
        found = np.zeros(int(bins.max()) + 1)
        found[bins[known]] = values[known]
        values = found[bins]
    factor = max(1, 700 // max(values.shape))
    fine = cv2.resize(np.nan_to_num(values), None, fx=factor, fy=factor, interpolation=cv2.INTER_LINEAR)
    rows, cols = fine.shape
    return np.asarray(fine, np.float64), coverage(rings, rows, cols, factor * grid.mpp / density.bin_um)
