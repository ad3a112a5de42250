"""Draw ``regions.png``: a map of a slide's regions, and the number of nuclei in each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.pictures.figure import INK, MARGIN, MUTED, heading, map_size, panel, picture, scale_bar, shorten, write

if TYPE_CHECKING:
    from shapely.geometry.base import BaseGeometry

SHOWN = 22
"""Largest number of regions whose counts are listed."""

COLOURS = ("#1f5fbf", "#c8401f", "#7a3fa0", "#0b8a8a", "#b8860b", "#b0306a", "#4a5a10", "#333333")


def draw_regions(
    path: Path,
    *,
    slide: str,
    tissue: Path,
    size: tuple[int, int],
    mpp: tuple[float, float],
    regions: Sequence[tuple[str, BaseGeometry]],
    counts: Sequence[Mapping[str, Any]],
) -> None:
    """Draw the regions of a slide, and the number of nuclei in each.

    Parameters
    ----------
    path : pathlib.Path
        PNG to write.
    slide : str
        Name of the slide.
    tissue : pathlib.Path
        ``tissue.png``, a picture of the whole slide.
    size : tuple of int
        Width and height of level 0.
    mpp : tuple of float
        µm per level-0 pixel, x and y.
    regions : sequence of (str, shapely geometry)
        Names and areas in level-0 pixels.
    counts : sequence of mapping
        What `pipeline.regions.count_regions` returned.
    """
    import shapely
    from matplotlib import patheffects
    from matplotlib.collections import LineCollection
    from PIL import Image

    # Drawn in µm, so that proportions are right even if pixels are not square.
    wide_um, high_um = size[0] * mpp[0], size[1] * mpp[1]
    wide, tall = map_size(wide_um, high_um, (8.3, 7.0), 3.2)
    shown = counts[:SHOWN]
    with picture(path, 1.3 + max(tall, 0.3 * (len(shown) + 2)) + 0.4) as figure:
        heading(figure, slide, f"{len(regions)} region{'' if len(regions) == 1 else 's'}")
        axes = panel(figure, (MARGIN, 1.3, wide, tall), "Where they are", "green: tissue")
        with Image.open(tissue) as view:
            axes.imshow(view, extent=(0, wide_um, high_um, 0), interpolation="antialiased")
        for number, (name, area) in enumerate(regions):
            colour = COLOURS[number % len(COLOURS)]
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
        scale_bar(axes, 1.0)
        left = MARGIN + wide + 0.45
        columns = {left + 2.35: "nuclei", left + 3.35: "nuclei/mm²"}
        for x, title in columns.items():
            write(figure, x, 1.22, title, fontsize=9, color=MUTED, va="bottom", ha="right")
        for number, one in enumerate(shown):
            drawn = number < len(regions)
            colour = COLOURS[number % len(COLOURS)] if drawn else MUTED
            y = 1.42 + 0.3 * number
            density = "–" if one["nuclei_per_mm2"] is None else f"{one['nuclei_per_mm2']:,.0f}"
            write(figure, left, y, shorten(one["region"], 20), fontsize=10, color=colour, va="center")
            for x, told in zip(columns, (f"{one['nuclei']:,}", density), strict=True):
                write(figure, x, y, told, fontsize=10, color=INK, va="center", ha="right")
        if len(counts) > len(shown):
            more = f"and {len(counts) - len(shown)} more"
            write(figure, left, 1.42 + 0.3 * len(shown), more, fontsize=9, color=MUTED, va="center")
