"""Drawing of ``overview.png``: where the tissue is, how dense the nuclei are, and what they look like up close.

Figures are made with Matplotlib's objects and its Agg canvas; no global state is touched.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import cv2
import numpy as np
import numpy.typing as npt

from pipeline.grid import Grid
from pipeline.slides.regions import shrink

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from shapely.geometry.base import BaseGeometry

THUMBNAIL_SIDE = 1300
"""Most pixels of the thumbnail's longest side; half of them are as many as it has on the picture."""

CROP_UM = 128.0
"""Side of a crop in µm."""

CLASSES_SHOWN = 14
"""Classes that have a bar on the picture of classes."""

REGIONS_SHOWN = 22
"""Regions whose counts are told on their picture."""

DOT_UM = 8.0
"""Least side of a square on the map of classes in µm."""

MARGIN, MAP_WIDTH, CROP_WIDTH = 0.45, 5.85, (13 - 2 * 0.45 - 2 * 0.4) / 3
"""Inches, on a figure 13 inches wide."""

INK, MUTED, RULE = "#1b1f24", "#667085", "#d0d5dd"
TISSUE_LINE = "#0b7285"
COLOUR_MAP = "magma"
REGION_COLOURS = ("#1f5fbf", "#c8401f", "#7a3fa0", "#0b8a8a", "#b8860b", "#b0306a", "#4a5a10", "#333333")
PNG_LEVEL = 4
"""Compression of pictures: a twentieth larger at most than with Pillow's 6, in half the time."""

FONTS = ["Inter", "Source Sans 3", "Helvetica Neue", "Arial", "DejaVu Sans"]


Box = tuple[float, float, float, float]
"""Left, top, width and height in inches."""

Contour = tuple[npt.NDArray[np.float64], Sequence[int]]
"""An outline in grid pixels and its colour."""


class Tiles(Protocol):
    """What the drawing needs of `pipeline.tile_store.TileStore`."""

    @property
    def grid(self) -> Grid: ...

    @property
    def active(self) -> npt.NDArray[np.bool_]: ...

    def read(self, x: int, y: int, w: int, h: int, /) -> npt.NDArray[np.uint8]: ...


@dataclass(frozen=True)
class Region:
    """A square of the grid that is shown at full resolution.

    Parameters
    ----------
    name : str
        Why it was chosen.
    x, y, side : int
        Corner and side in grid pixels.
    count : int
        Nuclei whose centroid lies in it.
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
    """Shrink the stored tissue by averaging whole blocks of pixels.

    Parameters
    ----------
    tiles : Tiles
        The slide's pixels.
    side : int
        Most pixels of its longest side.

    Returns
    -------
    image : numpy.ndarray of uint8, shape (ceil(H / factor), ceil(W / factor), 3)
        The thumbnail, white where nothing is stored.
    factor : int
        Grid pixels per thumbnail pixel, a power of two: whole stored tiles are whole pixels, and are read once.
    """
    grid, active = tiles.grid, np.asarray(tiles.active)
    factor = 1 << max(0, math.ceil(math.log2(max(grid.width, grid.height) / side)))
    image = np.full((math.ceil(grid.height / factor), math.ceil(grid.width / factor), 3), 255, dtype=np.uint8)
    step = max(1024, factor)
    for top in range(0, grid.height, step):
        for left in range(0, grid.width, step):
            h, w = min(step, grid.height - top), min(step, grid.width - left)
            if not active[top // 64 : (top + h - 1) // 64 + 1, left // 64 : (left + w - 1) // 64 + 1].any():
                continue
            block: npt.NDArray[Any] = tiles.read(left, top, w, h)
            if h % factor or w % factor:  # at the slide's end
                block = cv2.copyMakeBorder(block, 0, -h % factor, 0, -w % factor, cv2.BORDER_REPLICATE)
            small = shrink(block, factor, factor)
            y, x = top // factor, left // factor
            image[y : y + small.shape[0], x : x + small.shape[1]] = small
    return image, factor


def coverage(rings: Sequence[npt.NDArray[np.float64]], rows: int, cols: int, scale: tuple[float, float]) -> Any:
    """Share of each bin that lies inside of `rings` (even–odd rule).

    Parameters
    ----------
    rings : sequence of numpy.ndarray, shape (k, 2)
        Exteriors and holes, any unit.
    rows, cols : int
        Number of bins.
    scale : tuple of float
        Bins per unit in x and y.

    Returns
    -------
    numpy.ndarray of float64, shape (rows, cols)
        0..1.
    """
    fine, shift = 4, 8
    mask = np.zeros((rows * fine, cols * fine), dtype=np.uint8)
    factor = np.array(scale) * fine
    # fillPoly takes fixed-point coordinates of pixel centres.
    paths = [np.rint((np.asarray(ring) * factor - 0.5) * 2**shift).astype(np.int32) for ring in rings if len(ring) > 3]
    if paths:
        cv2.fillPoly(mask, paths, 1, shift=shift)
    return mask.reshape(rows, fine, cols, fine).mean(axis=(1, 3), dtype=np.float64)


def density_map(
    centroids: npt.NDArray[np.float64],
    rings: Sequence[npt.NDArray[np.float64]],
    size: tuple[float, float],
    bin_um: float | None = None,
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
    bin_um : float or None
        Side of a bin; None chooses 110 bins on the longer side, 20 µm at least.

    Returns
    -------
    Density
        Counts and tissue are smoothed alike (Gaussian of 1.5 bins or 50 µm) before one is divided by the other.
    """
    bin_um = bin_um or max(20.0, max(size) / 110)
    rows, cols = max(1, math.ceil(size[1] / bin_um)), max(1, math.ceil(size[0] / bin_um))
    index = np.clip((centroids // bin_um).astype(np.int64), 0, (cols - 1, rows - 1))
    counts = np.bincount(index[:, 1] * cols + index[:, 0], minlength=rows * cols).reshape(rows, cols)
    tissue = coverage(rings, rows, cols, (1 / bin_um, 1 / bin_um))
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
    side: int | None = None,
) -> list[Region]:
    """Choose up to three squares that do not overlap: the densest, a typical one and a sparse one with nuclei.

    Parameters
    ----------
    centroids : numpy.ndarray of float64, shape (n, 2)
        Centroids in grid pixels, x first.
    grid : Grid
        The slide's grid.
    rings : sequence of numpy.ndarray, shape (k, 2)
        Exteriors and holes of the tissue in grid pixels; squares that are mostly tissue are preferred.
    side : int or None
        Side of a square in grid pixels; None takes `CROP_UM`.

    Returns
    -------
    list of Region
        Without nuclei, one region where there is most tissue.
    """
    side = min(side or max(16, round(CROP_UM / grid.mpp)), grid.width, grid.height)
    half = max(1, side // 2)
    cols, rows = math.ceil(grid.width / half), math.ceil(grid.height / half)

    def windows(bins: npt.NDArray[Any]) -> npt.NDArray[Any]:
        if side == 1:
            return bins
        # Squares start at every bin but the last one of a row or column, which has no neighbour.
        padded = np.pad(bins, 1)
        sums = padded[1:-1, 1:-1] + padded[1:-1, 2:] + padded[2:, 1:-1] + padded[2:, 2:]
        return sums[: max(1, rows - 1), : max(1, cols - 1)]

    def region(name: str, row: int, column: int) -> Region:
        left, top = min(column * half, grid.width - side), min(row * half, grid.height - side)
        inside = (centroids >= (left, top)) & (centroids < (left + side, top + side))
        return Region(name, left, top, side, int(inside.all(axis=1).sum()))

    tissue = windows(coverage(rings, rows, cols, (1 / half, 1 / half))) / (1 if side == 1 else 4)
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


def round_length(limit: float) -> float:
    """The longest of 1, 2, 5, 10 … times a power of ten that is not longer than `limit`."""
    power: float = 10.0 ** math.floor(math.log10(limit))
    return max(step * power for step in (1, 2, 5) if step * power <= limit * (1 + 1e-9))


def length_label(um: float) -> str:
    """A length with its unit."""
    return f"{um / 1000:g} mm" if um >= 1000 else f"{um:g} µm"


def _scale_bar(axes: Axes, um_per_pixel: float, share: float = 0.25) -> None:
    from matplotlib import patheffects

    left, right = sorted(axes.get_xlim())
    bottom, top = axes.get_ylim()
    um = round_length((right - left) * um_per_pixel * share)
    length, height = um / um_per_pixel, abs(bottom - top)
    x, y = left + 0.04 * (right - left), bottom - 0.045 * height * np.sign(bottom - top)
    halo = [patheffects.withStroke(linewidth=4.5, foreground="white")]
    axes.plot([x, x + length], [y, y], color=INK, lw=2.2, solid_capstyle="butt", path_effects=halo)
    text = axes.text(x, y - 0.02 * height * np.sign(bottom - top), length_label(um), color=INK, fontsize=8.5)
    text.set_path_effects([patheffects.withStroke(linewidth=2.5, foreground="white")])


def _text(figure: Figure, x: float, y: float, text: str, **style: Any) -> None:
    # Names are shown as they are: nothing in them is a formula.
    wide, high = figure.get_size_inches()
    figure.text(x / wide, 1 - y / high, text, parse_math=False, **style)


def _panel(figure: Figure, box: Box, title: str, note: str = "") -> Axes:
    """Axes within `box`, titled at its corners whatever the picture's shape."""
    left, top, width, height = box
    wide, high = figure.get_size_inches()
    axes = figure.add_axes((left / wide, 1 - (top + height) / high, width / wide, height / high), anchor="NW")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(RULE)
        spine.set_linewidth(0.8)
    _text(figure, left, top - 0.08, title, fontsize=10.5, fontweight="bold", color=INK, va="bottom")
    _text(figure, left + width, top - 0.08, note, fontsize=9, color=MUTED, va="bottom", ha="right")
    return axes


def _hex(colour: Sequence[int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*(int(value) for value in colour))


def shorten(text: str, length: int = 80) -> str:
    """`text` with its middle left out where it is longer than `length`."""
    if len(text) <= length:
        return text
    head = (length - 1) * 2 // 3
    return f"{text[:head]}…{text[len(text) - (length - 1 - head) :]}"


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
    legend: Sequence[tuple[str, Sequence[int]]] = (),
) -> None:
    """Draw the overview of a slide.

    Parameters
    ----------
    path : pathlib.Path
        PNG to write.
    slide : str
        Name of the slide, shown as it is.
    facts : sequence of str
        What stands below the name.
    tiles : Tiles
        The slide's pixels.
    rings : sequence of numpy.ndarray, shape (k, 2)
        Exteriors and holes of the tissue in grid pixels.
    centroids : numpy.ndarray of float64, shape (n, 2)
        Centroids of all nuclei in grid pixels.
    regions : sequence of Region
        What is shown at full resolution.
    contours : sequence
        For each region the outlines in grid pixels with their colours.
    legend : sequence of tuple
        Names and colours of the classes; shown when there are several.
    """
    # As high as the slide's shape asks for: a wide slide leaves no gap below it.
    tall = min(5.2, max(1.8, MAP_WIDTH * tiles.grid.height / tiles.grid.width))
    with _picture(path, 1.3 + tall + 0.55 + CROP_WIDTH + 0.5) as figure:
        _draw(figure, tall, slide, facts, tiles, rings, centroids, regions, contours, legend)


@contextmanager
def _picture(path: Path, high: float) -> Iterator[Figure]:
    """A figure to draw on, 13 inches wide, which is written as a PNG afterwards."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # fonts that are not there are no news
    with rc_context({"font.family": FONTS, "axes.unicode_minus": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # names come in all scripts
        figure = Figure(figsize=(13, high), dpi=110, facecolor="white")
        FigureCanvasAgg(figure)
        yield figure
        compression = {"compress_level": PNG_LEVEL}
        figure.savefig(path, format="png", metadata={"Software": None}, pil_kwargs=compression)


def class_map(
    centroids: npt.NDArray[np.float64],
    kinds: npt.NDArray[np.int64],
    colours: Sequence[Sequence[int]],
    grid: Grid,
    side: int = THUMBNAIL_SIDE,
) -> tuple[npt.NDArray[np.uint8], float]:
    """Classes of nuclei as a picture: each pixel has the colour of the class that most nuclei in it are of.

    Parameters
    ----------
    centroids : numpy.ndarray of float64, shape (n, 2)
        Centroids in grid pixels, x first.
    kinds : numpy.ndarray of int64, shape (n,)
        Class of each.
    colours : sequence of (int, int, int)
        RGB of each class.
    grid : Grid
        The slide's grid.
    side : int
        Most pixels of the picture's longest side.

    Returns
    -------
    image : numpy.ndarray of uint8, shape (rows, columns, 3)
        White where there is no nucleus; of two classes that are as common, the first.
    bin_pixels : float
        Grid pixels a pixel: at least `DOT_UM`, as large as a nucleus.
    """
    size = max(DOT_UM / grid.mpp, max(grid.width, grid.height) / side)
    rows, cols = math.ceil(grid.height / size), math.ceil(grid.width / size)
    place = np.minimum((centroids / size).astype(np.int64), (cols - 1, rows - 1))
    flat = place[:, 1] * cols + place[:, 0]
    most, image = np.zeros(rows * cols, np.int64), np.full((rows * cols, 3), 255, np.uint8)
    for kind, colour in enumerate(colours):
        count = np.bincount(flat[kinds == kind], minlength=rows * cols)
        image[count > most] = colour
        most = np.maximum(most, count)
    return image.reshape(rows, cols, 3), size


def draw_classes(
    path: Path,
    *,
    slide: str,
    grid: Grid,
    tissue: Sequence[BaseGeometry],
    centroids: npt.NDArray[np.float64],
    kinds: npt.NDArray[np.int64],
    composition: Mapping[str, Mapping[str, Any]],
) -> None:
    """Draw where the classes of nuclei are, and how many there are of each.

    Parameters
    ----------
    path : pathlib.Path
        PNG to write.
    slide : str
        Name of the slide, shown as it is.
    grid : Grid
        The slide's grid.
    tissue : sequence of shapely.Polygon
        The tissue, level-0 pixels.
    centroids, kinds
        See `class_map`.
    composition : mapping
        ``count``, ``share``, ``per_mm2`` and ``color`` of each class by its name, in the order of `kinds`.
    """
    import shapely
    from matplotlib.collections import LineCollection

    rings = [shapely.get_coordinates(ring) / (grid.scale_x, grid.scale_y) for ring in shapely.get_rings(tissue)]
    image, size = class_map(centroids, kinds, [item["color"] for item in composition.values()], grid)
    tall = min(7.0, max(1.8, 8.3 * grid.height / grid.width))
    wide = min(8.3, max(3.2, tall * grid.width / grid.height))  # the bars stand beside the map, however narrow it is
    with _picture(path, 1.3 + max(tall, 0.42 * min(len(composition), CLASSES_SHOWN)) + 0.4) as figure:
        _text(figure, MARGIN, 0.4, shorten(slide, 70), fontsize=17, fontweight="bold", color=INK, va="center")
        count = sum(item["count"] for item in composition.values())
        note = f"{count:,} nuclei by class"
        _text(figure, MARGIN, 0.72, note, fontsize=10.5, color=MUTED, va="center")
        axes = _panel(figure, (MARGIN, 1.3, wide, tall), "Where they are", f"squares of {size * grid.mpp:.0f} µm")
        extent = (0, image.shape[1] * size, image.shape[0] * size, 0)
        axes.imshow(image, extent=extent, interpolation="nearest")
        axes.add_collection(LineCollection(list(rings), colors=TISSUE_LINE, linewidths=0.9))
        axes.set_xlim(0, grid.width)
        axes.set_ylim(grid.height, 0)
        _scale_bar(axes, grid.mpp)
        _draw_composition(figure, (MARGIN + wide + 0.45, 1.3), composition)


def _draw_composition(
    figure: Figure, corner: tuple[float, float], composition: Mapping[str, Mapping[str, Any]]
) -> None:
    """A bar for each class, the commonest first."""
    from matplotlib.patches import Rectangle

    left, top = corner
    wide, high = figure.get_size_inches()
    length = 3.35
    ordered = sorted(composition.items(), key=lambda item: -item[1]["count"])
    most = max((item["count"] for _, item in ordered), default=0)
    _text(figure, left, top - 0.08, "How many", fontsize=10.5, fontweight="bold", color=INK, va="bottom")
    _text(figure, left + length, top - 0.08, "number, share, per mm²", fontsize=9, color=MUTED, va="bottom", ha="right")
    for number, (name, item) in enumerate(ordered[:CLASSES_SHOWN]):
        y = top + 0.42 * number + 0.1
        shown = [f"{item['count']:,}"]
        shown += [f"{100 * item['share']:.1f} %"] if item["share"] is not None else []
        shown += [f"{item['per_mm2']:,.0f}"] if item["per_mm2"] is not None else []
        _text(figure, left, y, shorten(" ".join(name.split()), 18), fontsize=9, color=INK, va="center")
        _text(figure, left + length, y, "   ".join(shown), fontsize=9, color=MUTED, va="center", ha="right")
        bar = length * item["count"] / max(most, 1)
        place = (left / wide, 1 - (y + 0.22) / high)
        colour = _hex(item["color"])
        figure.add_artist(Rectangle(place, bar / wide, 0.1 / high, fc=colour, ec="none", transform=figure.transFigure))
    if len(ordered) > CLASSES_SHOWN:
        note = f"and {len(ordered) - CLASSES_SHOWN} more classes"
        _text(figure, left, top + 0.42 * CLASSES_SHOWN + 0.1, note, fontsize=9, color=MUTED, va="center")


def _draw(
    figure: Figure,
    tall: float,
    slide: str,
    facts: Sequence[str],
    tiles: Tiles,
    rings: Sequence[npt.NDArray[np.float64]],
    centroids: npt.NDArray[np.float64],
    regions: Sequence[Region],
    contours: Sequence[Sequence[Contour]],
    legend: Sequence[tuple[str, Sequence[int]]],
) -> None:
    grid = tiles.grid
    _text(figure, MARGIN, 0.4, shorten(slide, 70), fontsize=17, fontweight="bold", color=INK, va="center")
    _text(figure, MARGIN, 0.72, "   ·   ".join(facts), fontsize=10.5, color=MUTED, va="center")
    _draw_tissue(figure, (MARGIN, 1.3, MAP_WIDTH, tall), tiles, rings, regions)
    density = density_map(
        np.asarray(centroids, dtype=np.float64).reshape(-1, 2) * grid.mpp,
        [np.asarray(ring) * grid.mpp for ring in rings],
        (grid.width * grid.mpp, grid.height * grid.mpp),
    )
    _draw_density(figure, (MARGIN + MAP_WIDTH + 0.4, 1.3, MAP_WIDTH - 0.45, tall), density, rings, grid)
    boxes = [(MARGIN + i * (CROP_WIDTH + 0.4), 1.3 + tall + 0.55, CROP_WIDTH, CROP_WIDTH) for i in range(3)]
    for number, (box, region) in enumerate(zip(boxes, regions, strict=False)):
        outlines = contours[number] if number < len(contours) else []
        _draw_crop(figure, box, f"{number + 1}   {region.name}", tiles, region, outlines)
    if len(regions) < len(boxes):
        left, top, width, height = boxes[len(regions)]
        note = "no further region with nuclei" if len(centroids) else "no nuclei on this slide"
        _text(figure, left + width / 2, top + height / 2, note, ha="center", color=MUTED, fontsize=10)
    if len(legend) > 1:
        _draw_legend(figure, legend)


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
    axes = _panel(figure, box, "Tissue", "as analysed, with its outline")
    axes.imshow(image, extent=extent, interpolation="antialiased")
    axes.add_collection(LineCollection(list(rings), colors=TISSUE_LINE, linewidths=1.1))
    for number, region in enumerate(regions, start=1):
        corner = (region.x, region.y)
        axes.add_patch(Rectangle(corner, region.side, region.side, fill=False, ec="white", lw=2.6))
        axes.add_patch(Rectangle(corner, region.side, region.side, fill=False, ec=INK, lw=1.4))
        above = region.y > 0.04 * grid.height  # else the badge would lie on the panel's title
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
    _scale_bar(axes, grid.mpp)


def _draw_crop(figure: Figure, box: Box, title: str, tiles: Tiles, region: Region, outlines: Sequence[Contour]) -> None:
    from matplotlib.collections import LineCollection

    mpp = tiles.grid.mpp
    plural = "nucleus" if region.count == 1 else "nuclei"
    note = f"{region.count} {plural}, {region.count / (region.side * mpp / 1000) ** 2:,.0f}/mm²"
    axes = _panel(figure, box, title, note if region.count else "")
    axes.imshow(tiles.read(region.x, region.y, region.side, region.side), interpolation="lanczos")
    lines = [outline - (region.x + 0.5, region.y + 0.5) for outline, _ in outlines]
    colours = [_hex(colour) for _, colour in outlines]
    axes.add_collection(LineCollection(lines, colors="white", linewidths=2.2, alpha=0.55))
    axes.add_collection(LineCollection(lines, colors=colours, linewidths=1.3))
    axes.set_xlim(-0.5, region.side - 0.5)
    axes.set_ylim(region.side - 0.5, -0.5)
    _scale_bar(axes, mpp)


def _draw_legend(figure: Figure, legend: Sequence[tuple[str, Sequence[int]]]) -> None:
    from matplotlib.patches import Rectangle

    shown = figure.legend(
        [Rectangle((0, 0), 1, 1, fc=_hex(colour), ec="none") for _, colour in legend],
        [shorten(name, 30) for name, _ in legend],
        loc="lower left",
        bbox_to_anchor=(MARGIN / 13 - 0.003, 0.003),
        ncols=min(8, len(legend)),
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

    axes = _panel(figure, box, "Nuclei per mm² of tissue", f"bins of {density.bin_um:.0f} µm, smoothed")
    finite = density.values[np.isfinite(density.values)]
    top = float(np.quantile(finite, 0.995)) if finite.size else 0.0
    axes.add_collection(LineCollection(list(rings), colors=TISSUE_LINE, linewidths=0.9))
    axes.set_xlim(0, grid.width)
    axes.set_ylim(grid.height, 0)
    axes.set_aspect("equal")
    axes.apply_aspect()  # the axes shrink to the slide's shape; the colour bar stands beside what is left
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
    _scale_bar(axes, grid.mpp)
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
    """The density between the middles of bins, and how much of each fine bin is tissue."""
    values = density.values
    known = np.isfinite(values)
    if known.any() and not known.all():  # from the nearest bin, so that the edge of the tissue has a colour
        unknown = (~known).astype(np.uint8)
        _, bins = cv2.distanceTransformWithLabels(unknown, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)
        found = np.zeros(int(bins.max()) + 1)
        found[bins[known]] = values[known]
        values = found[bins]
    factor = max(1, 700 // max(values.shape))
    fine = cv2.resize(np.nan_to_num(values), None, fx=factor, fy=factor, interpolation=cv2.INTER_LINEAR)
    per_pixel = factor * grid.mpp / density.bin_um
    return np.asarray(fine, np.float64), coverage(rings, fine.shape[0], fine.shape[1], (per_pixel, per_pixel))


def draw_regions(
    path: Path,
    *,
    slide: str,
    picture: Path,
    size: tuple[int, int],
    mpp: tuple[float, float],
    regions: Sequence[tuple[str, BaseGeometry]],
    counts: Sequence[Mapping[str, Any]],
) -> None:
    """Draw the regions of a slide, and how many nuclei are in each.

    Parameters
    ----------
    path : pathlib.Path
        PNG to write.
    slide : str
        Name of the slide, shown as it is.
    picture : pathlib.Path
        ``tissue.png``, a picture of the whole slide.
    size : tuple of int
        Width and height of level 0.
    mpp : tuple of float
        µm per level-0 pixel, x and y.
    regions : sequence of (str, shapely geometry)
        Names and areas in level-0 pixels.
    counts : sequence of mapping
        What `pipeline.regions.count_regions` told.
    """
    import shapely
    from matplotlib import patheffects
    from matplotlib.collections import LineCollection
    from PIL import Image

    # In µm, as the slide is seen where pixels are no squares.
    wide_um, high_um = size[0] * mpp[0], size[1] * mpp[1]
    tall = min(7.0, max(1.8, 8.3 * high_um / wide_um))
    wide = min(8.3, max(3.2, tall * wide_um / high_um))
    shown = counts[:REGIONS_SHOWN]
    with _picture(path, 1.3 + max(tall, 0.3 * (len(shown) + 2)) + 0.4) as figure:
        _text(figure, MARGIN, 0.4, shorten(slide, 70), fontsize=17, fontweight="bold", color=INK, va="center")
        count = f"{len(regions)} region{'' if len(regions) == 1 else 's'}"
        _text(figure, MARGIN, 0.72, count, fontsize=10.5, color=MUTED, va="center")
        axes = _panel(figure, (MARGIN, 1.3, wide, tall), "Where they are", "green: tissue")
        axes.imshow(Image.open(picture), extent=(0, wide_um, high_um, 0), interpolation="antialiased")
        for number, (name, area) in enumerate(regions):
            colour = REGION_COLOURS[number % len(REGION_COLOURS)]
            rings = [shapely.get_coordinates(ring) * mpp for ring in shapely.get_rings(shapely.get_parts(area))]
            axes.add_collection(LineCollection(rings, colors=colour, linewidths=1.8))
            if rings:
                largest = max(shapely.get_parts(area), key=lambda part: part.area)
                x, y = shapely.get_coordinates(shapely.point_on_surface(largest))[0] * mpp
                label = axes.text(
                    x, y, shorten(name, 24), color=colour, fontsize=9, fontweight="bold", ha="center", va="center",
                    parse_math=False, clip_on=True,
                )  # fmt: skip
                label.set_path_effects([patheffects.withStroke(linewidth=2.5, foreground="white")])
        axes.set_xlim(0, wide_um)
        axes.set_ylim(high_um, 0)
        _scale_bar(axes, 1.0)
        left = MARGIN + wide + 0.45
        columns = {left + 2.35: "nuclei", left + 3.35: "nuclei/mm²"}
        for x, title in columns.items():
            _text(figure, x, 1.22, title, fontsize=9, color=MUTED, va="bottom", ha="right")
        for number, one in enumerate(shown):
            drawn = number < len(regions)
            colour = REGION_COLOURS[number % len(REGION_COLOURS)] if drawn else MUTED
            y = 1.42 + 0.3 * number
            density = "–" if one["nuclei_per_mm2"] is None else f"{one['nuclei_per_mm2']:,.0f}"
            _text(figure, left, y, shorten(one["region"], 20), fontsize=10, color=colour, va="center")
            for x, told in zip(columns, (f"{one['nuclei']:,}", density), strict=True):
                _text(figure, x, y, told, fontsize=10, color=INK, va="center", ha="right")
        if len(counts) > len(shown):
            more = f"and {len(counts) - len(shown)} more"
            _text(figure, left, 1.42 + 0.3 * len(shown), more, fontsize=9, color=MUTED, va="center")
