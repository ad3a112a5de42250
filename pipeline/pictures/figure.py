"""Helpers for the pictures of a slide: a figure that is saved as PNG, panels with titles, scale bars and text.

Figures use Matplotlib's object interface and the Agg canvas, without pyplot and its global state.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

THUMBNAIL_SIDE = 1300
"""Largest number of pixels of a map's longer side, about twice as many as it has in the picture."""

MARGIN = 0.45
"""Margin in inches, on a figure 13 inches wide."""

INK, MUTED, RULE = "#1b1f24", "#667085", "#d0d5dd"
TISSUE_LINE = "#0b7285"
PNG_LEVEL = 4
"""Compression level of pictures: at most 5 % larger than with Pillow's default of 6, in half the time."""

FONTS = [
    "Inter", "Source Sans 3", "Helvetica Neue", "Arial", "DejaVu Sans",
    "Noto Sans CJK SC", "Noto Sans CJK JP", "PingFang SC", "Hiragino Sans", "Microsoft YaHei",
]  # fmt: skip
"""Fonts in the order of preference; the last ones have the letters that the others lack."""

Box = tuple[float, float, float, float]
"""Left, top, width and height in inches."""


@contextmanager
def picture(path: Path, high: float) -> Iterator[Figure]:
    """Provide a figure, 13 inches wide and `high` inches high, and save it as PNG when the context ends."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # not all of `FONTS` need exist
    with rc_context({"font.family": FONTS, "axes.unicode_minus": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # names may be in any script
        figure = Figure(figsize=(13, high), dpi=110, facecolor="white")
        FigureCanvasAgg(figure)
        yield figure
        compression = {"compress_level": PNG_LEVEL}
        figure.savefig(path, format="png", metadata={"Software": None}, pil_kwargs=compression)


def write(figure: Figure, x: float, y: float, text: str, **style: Any) -> None:
    """Write text at a position in inches from the upper left corner, without parsing dollar signs as formulas."""
    wide, high = figure.get_size_inches()
    figure.text(x / wide, 1 - y / high, text, parse_math=False, **style)


def heading(figure: Figure, slide: str, line: str) -> None:
    """Write the slide's name and a line of text below it."""
    write(figure, MARGIN, 0.4, shorten(slide, 70), fontsize=17, fontweight="bold", color=INK, va="center")
    write(figure, MARGIN, 0.72, line, fontsize=10.5, color=MUTED, va="center")


def panel(figure: Figure, box: Box, title: str, note: str) -> Axes:
    """Add axes within `box`, with `title` and `note` above its upper corners, whatever the shape of the picture."""
    left, top, width, height = box
    wide, high = figure.get_size_inches()
    axes = figure.add_axes((left / wide, 1 - (top + height) / high, width / wide, height / high), anchor="NW")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(RULE)
        spine.set_linewidth(0.8)
    write(figure, left, top - 0.08, title, fontsize=10.5, fontweight="bold", color=INK, va="bottom")
    write(figure, left + width, top - 0.08, note, fontsize=9, color=MUTED, va="bottom", ha="right")
    return axes


def map_size(width: float, height: float, most: tuple[float, float], narrowest: float) -> tuple[float, float]:
    """Width and height in inches of a slide's map: at most `most`, at least 1.8 high and `narrowest` wide."""
    wide, high = most
    tall = min(high, max(1.8, wide * height / width))
    return min(wide, max(narrowest, tall * width / height)), tall


def scale_bar(axes: Axes, um_per_pixel: float) -> None:
    """Draw a scale bar in the lower left corner, at most a quarter of the width long."""
    from matplotlib import patheffects

    left, right = sorted(axes.get_xlim())
    bottom, top = axes.get_ylim()
    um = round_length((right - left) * um_per_pixel * 0.25)
    length, height = um / um_per_pixel, abs(bottom - top)
    x, y = left + 0.04 * (right - left), bottom - 0.045 * height * np.sign(bottom - top)
    halo = [patheffects.withStroke(linewidth=4.5, foreground="white")]
    axes.plot([x, x + length], [y, y], color=INK, lw=2.2, solid_capstyle="butt", path_effects=halo)
    text = axes.text(x, y - 0.02 * height * np.sign(bottom - top), length_label(um), color=INK, fontsize=8.5)
    text.set_path_effects([patheffects.withStroke(linewidth=2.5, foreground="white")])


def round_length(limit: float) -> float:
    """Largest number of the form 1, 2 or 5 times a power of ten that is at most `limit`."""
    power: float = 10.0 ** math.floor(math.log10(limit))
    return max(step * power for step in (1, 2, 5) if step * power <= limit * (1 + 1e-9))


def length_label(um: float) -> str:
    """Format a length in µm or mm with its unit."""
    return f"{um / 1000:g} mm" if um >= 1000 else f"{um:g} µm"


def hex_code(colour: Sequence[int]) -> str:
    """Format an RGB colour (0 to 255) as a hexadecimal code for Matplotlib."""
    return "#{:02x}{:02x}{:02x}".format(*(int(value) for value in colour))


def shorten(text: str, length: int = 80) -> str:
    """Return `text`, shortened in the middle to `length` characters if it is longer."""
    if len(text) <= length:
        return text
    head = (length - 1) * 2 // 3
    return f"{text[:head]}…{text[len(text) - (length - 1 - head) :]}"
