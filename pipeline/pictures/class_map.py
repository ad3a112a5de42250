"""Draw ``classified.png``: a map of the classes of nuclei, and the number of nuclei of each class."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pipeline.pictures.figure import (
    INK,
    MARGIN,
    MUTED,
    THUMBNAIL_SIDE,
    TISSUE_LINE,
    heading,
    hex_code,
    map_size,
    panel,
    picture,
    scale_bar,
    shorten,
    write,
)
from pipeline.stores.grid import Grid

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from shapely.geometry.base import BaseGeometry

CLASSES_SHOWN = 14
"""Largest number of classes that are shown with a bar."""

DOT_UM = 8.0
"""Smallest side of a square on the map in µm, about the size of a nucleus."""


def class_map(
    centroids: npt.NDArray[np.float64],
    kinds: npt.NDArray[np.int64],
    colours: Sequence[Sequence[int]],
    grid: Grid,
) -> tuple[npt.NDArray[np.uint8], float]:
    """Draw a map of classes: each pixel has the colour of the most frequent class of the nuclei in it.

    Parameters
    ----------
    centroids : numpy.ndarray of float64, shape (n, 2)
        Centroids in grid pixels, x first.
    kinds : numpy.ndarray of int64, shape (n,)
        Index of each nucleus' class.
    colours : sequence of (int, int, int)
        RGB of each class.
    grid : Grid
        The slide's grid.

    Returns
    -------
    image : numpy.ndarray of uint8, shape (rows, columns, 3)
        White where there is no nucleus. If several classes are equally frequent, the first one counts.
    bin_pixels : float
        Side of a pixel of the map in grid pixels; at least `DOT_UM`.
    """
    size = max(DOT_UM / grid.mpp, max(grid.width, grid.height) / THUMBNAIL_SIDE)
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
    """Draw the map of classes, and the number of nuclei of each class.

    Parameters
    ----------
    path : pathlib.Path
        PNG to write.
    slide : str
        Name of the slide.
    grid : Grid
        The slide's grid.
    tissue : sequence of shapely.Polygon
        The tissue in level-0 pixels.
    centroids, kinds
        See `class_map`.
    composition : mapping
        ``count``, ``share``, ``per_mm2`` and ``color`` of each class by name; `kinds` are indices in this order.
    """
    import shapely
    from matplotlib.collections import LineCollection

    rings = [shapely.get_coordinates(ring) / (grid.scale_x, grid.scale_y) for ring in shapely.get_rings(tissue)]
    image, size = class_map(centroids, kinds, [item["color"] for item in composition.values()], grid)
    wide, tall = map_size(grid.width, grid.height, (8.3, 7.0), 3.2)  # the list of classes stands beside the map
    with picture(path, 1.3 + max(tall, 0.42 * min(len(composition), CLASSES_SHOWN)) + 0.4) as figure:
        count = sum(item["count"] for item in composition.values())
        heading(figure, slide, f"{count:,} {'nucleus' if count == 1 else 'nuclei'} by class")
        axes = panel(figure, (MARGIN, 1.3, wide, tall), "Where they are", f"squares of {size * grid.mpp:.0f} µm")
        extent = (0, image.shape[1] * size, image.shape[0] * size, 0)
        axes.imshow(image, extent=extent, interpolation="nearest")
        axes.add_collection(LineCollection(list(rings), colors=TISSUE_LINE, linewidths=0.9))
        axes.set_xlim(0, grid.width)
        axes.set_ylim(grid.height, 0)
        scale_bar(axes, grid.mpp)
        _draw_composition(figure, (MARGIN + wide + 0.45, 1.3), composition)


def _draw_composition(
    figure: Figure, corner: tuple[float, float], composition: Mapping[str, Mapping[str, Any]]
) -> None:
    """Draw a bar for each class, the most frequent class first."""
    from matplotlib.patches import Rectangle

    left, top = corner
    wide, high = figure.get_size_inches()
    length = 3.35
    ordered = sorted(composition.items(), key=lambda item: -item[1]["count"])
    most = max((item["count"] for _, item in ordered), default=0)
    write(figure, left, top - 0.08, "How many", fontsize=10.5, fontweight="bold", color=INK, va="bottom")
    write(figure, left + length, top - 0.08, "number, share, per mm²", fontsize=9, color=MUTED, va="bottom", ha="right")
    for number, (name, item) in enumerate(ordered[:CLASSES_SHOWN]):
        y = top + 0.42 * number + 0.1
        shown = [f"{item['count']:,}"]
        shown += [f"{100 * item['share']:.1f} %"] if item["share"] is not None else []
        shown += [f"{item['per_mm2']:,.0f}"] if item["per_mm2"] is not None else []
        write(figure, left, y, shorten(" ".join(name.split()), 18), fontsize=9, color=INK, va="center")
        write(figure, left + length, y, "   ".join(shown), fontsize=9, color=MUTED, va="center", ha="right")
        bar = length * item["count"] / max(most, 1)
        place = (left / wide, 1 - (y + 0.22) / high)
        colour = hex_code(item["color"])
        figure.add_artist(Rectangle(place, bar / wide, 0.1 / high, fc=colour, ec="none", transform=figure.transFigure))
    if len(ordered) > CLASSES_SHOWN:
        note = f"and {len(ordered) - CLASSES_SHOWN} more classes"
        write(figure, left, top + 0.42 * CLASSES_SHOWN + 0.1, note, fontsize=9, color=MUTED, va="center")
