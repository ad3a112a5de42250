"""Windows of a slide on any grid, area-averaged, the same whatever window is asked for.

A grid pixel is the mean of the slide over the area it covers, each level pixel weighted by its share of it. Weights
come from absolute coordinates and all sums are exact (whole numbers that their type holds), so that a pixel's value
depends neither on the window nor on the order of summation. On scanned tissue no value is more than 0.6 grey levels
from the mean in float64, rounding included, and all together are within 0.002 of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import cv2
import numpy as np

from pipeline.grid import Grid
from pipeline.slides.slide import Level

_WEIGHT_BITS = 11
_WEIGHT = 1 << _WEIGHT_BITS
_MIDDLE_BITS = 5
"""Fraction bits kept between the two passes: 8 + 5 + 11 bits are what float32 holds exactly."""

_WIDTH, _HEIGHT = 2048, 128
"""Level pixels resampled together: what is made of them on the way stays in the cache."""

_PRODUCTS = 400_000
"""Weighted together, for the same reason. With a fourth of it one thread is a sixth faster, but steps become so short
that threads wait for each other's hold on Python: two were no faster than one."""

Taps = tuple[np.ndarray, np.ndarray]
"""First pixel and weights of each pixel along one axis: see `_taps`."""


class Pixels(Protocol):
    """What `read_region` needs of a slide."""

    @property
    def levels(self) -> tuple[Level, ...]:
        """Levels, level 0 first."""

    def read(self, level: int, x: int, y: int, w: int, h: int) -> np.ndarray:
        """Window of a level as RGB, uint8, shape (h, w, 3)."""


class OneLevel:
    """A slide as one of its levels shows it.

    Parameters
    ----------
    slide : Pixels
        The slide.
    level : int
        The level.
    """

    def __init__(self, slide: Pixels, level: int) -> None:
        self._slide, self._level = slide, level
        self.levels: tuple[Level, ...] = (slide.levels[level],)

    def read(self, level: int, x: int, y: int, w: int, h: int) -> np.ndarray:
        """Window of the level, whatever `level` says."""
        return self._slide.read(self._level, x, y, w, h)


def best_level(levels: tuple[Level, ...], grid: Grid) -> int:
    """The coarsest level that is no coarser than the grid."""
    fit = [
        i
        for i, level in enumerate(levels)
        if level.usable and level.scale_x <= grid.scale_x * (1 + 1e-6) and level.scale_y <= grid.scale_y * (1 + 1e-6)
    ]
    return max(fit, key=lambda i: levels[i].scale_x * levels[i].scale_y) if fit else 0


def read_region(slide: Pixels, grid: Grid, x: int, y: int, w: int, h: int) -> np.ndarray:
    """Read a window of a slide in pixels of a grid.

    Parameters
    ----------
    slide : Slide
        The slide.
    grid : Grid
        The grid.
    x, y, w, h : int
        Window in grid pixels; it may reach outside the slide, where it is white.

    Returns
    -------
    numpy.ndarray
        RGB, uint8, shape (h, w, 3). Area-averaged from the coarsest level that is no coarser than the grid; a pixel
        that the slide covers in part is the mean of that part. Bilinear where the slide is coarser than the grid.

    Raises
    ------
    SlideError
        When the data cannot be decoded.
    """
    index = best_level(slide.levels, grid)
    level = slide.levels[index]
    ratio_x, ratio_y = grid.scale_x / level.scale_x, grid.scale_y / level.scale_y
    # Grid pixels that touch the slide at all.
    gx0, gx1 = max(x, 0), min(x + w, math.ceil(level.width / ratio_x - 1e-9))
    gy0, gy1 = max(y, 0), min(y + h, math.ceil(level.height / ratio_y - 1e-9))
    whole_x, whole_y = round(ratio_x), round(ratio_y)
    integer = whole_x >= 1 and whole_y >= 1 and abs(ratio_x - whole_x) <= 1e-9 and abs(ratio_y - whole_y) <= 1e-9
    if (gx0, gy0, gx1, gy1) == (x, y, x + w, y + h):
        # The usual case, all on the slide, needs no canvas.
        if not integer:
            return _weighted(slide, index, grid, x, y, w, h)
        if (x + w) * whole_x <= level.width and (y + h) * whole_y <= level.height:
            pixels = slide.read(index, x * whole_x, y * whole_y, w * whole_x, h * whole_y)
            return shrink(pixels, whole_x, whole_y)
    out = np.full((h, w, 3), 255, np.uint8)
    if gx1 <= gx0 or gy1 <= gy0:
        return out
    if not integer:
        out[gy0 - y : gy1 - y, gx0 - x : gx1 - x] = _weighted(slide, index, grid, gx0, gy0, gx1 - gx0, gy1 - gy0)
        return out
    # Pixels of whole_x by whole_y level pixels that lie on the level entirely, then what is left right and below.
    inner_x, inner_y = min(gx1, level.width // whole_x), min(gy1, level.height // whole_y)
    if inner_x > gx0 and inner_y > gy0:
        nw, nh = inner_x - gx0, inner_y - gy0
        pixels = slide.read(index, gx0 * whole_x, gy0 * whole_y, nw * whole_x, nh * whole_y)
        out[gy0 - y : inner_y - y, gx0 - x : inner_x - x] = shrink(pixels, whole_x, whole_y)
    inner_x, inner_y = max(inner_x, gx0), max(inner_y, gy0)
    for rx, ry, rw, rh in (
        (inner_x, gy0, gx1 - inner_x, gy1 - gy0),
        (gx0, inner_y, inner_x - gx0, gy1 - inner_y),
    ):
        if rw > 0 and rh > 0:
            out[ry - y : ry + rh - y, rx - x : rx + rw - x] = _weighted(slide, index, grid, rx, ry, rw, rh)
    return out


def shrink(pixels: np.ndarray, across: int, down: int) -> np.ndarray:
    """Mean of blocks of ``down x across`` pixels: uint8 (h * down, w * across, 3) to (h, w, 3)."""
    if across == down == 1:
        return pixels
    h, w = pixels.shape[0] // down, pixels.shape[1] // across
    # Blocks of whole pixels: OpenCV sums each in integers, alike at every place of the image.
    return np.asarray(cv2.resize(pixels, (w, h), interpolation=cv2.INTER_AREA))


def _taps(start: int, n: int, ratio: float, size: int) -> Taps:
    """Level pixels and integer weights (sum `_WEIGHT`) of `n` grid pixels from `start` along one axis.

    Returns
    -------
    first : numpy.ndarray
        First level pixel of each grid pixel, int64, shape (n,).
    weights : numpy.ndarray
        Weights of it and its followers, int64, shape (n, k); 0 outside ``[0, size)``.
    """
    j = np.arange(start, start + n, dtype=np.float64)
    if ratio < 1:
        # The slide is coarser than the grid: bilinear between pixel centres, the outermost ones extended.
        centre = np.clip((j + 0.5) * ratio - 0.5, 0, size - 1)
        first = np.minimum(np.floor(centre), max(size - 2, 0)).astype(np.int64)
        fraction = centre - first
        share = np.stack([1 - fraction, fraction], axis=1) if size > 1 else np.ones((n, 1))
    else:
        begin, end = j * ratio, np.minimum((j + 1) * ratio, size)
        first = np.floor(begin + 1e-9).astype(np.int64)
        count = int((np.ceil(end - 1e-9) - first).max())
        edges = first[:, None] + np.arange(count + 1)
        inside = np.clip(edges, begin[:, None], end[:, None])
        share = np.diff(inside, axis=1)
        share /= share.sum(axis=1, keepdims=True)
    # Round the running sum: each row adds up to _WEIGHT exactly.
    running = np.rint(np.cumsum(share, axis=1) * _WEIGHT).astype(np.int64)
    running[:, -1] = _WEIGHT
    return first, np.diff(running, axis=1, prepend=0)


def _weighted(slide: Pixels, index: int, grid: Grid, x: int, y: int, w: int, h: int) -> np.ndarray:
    """`read_region` by weights, for windows whose every pixel touches the slide."""
    level = slide.levels[index]
    (left, across), (top, down) = (
        _taps(x, w, grid.scale_x / level.scale_x, level.width),
        _taps(y, h, grid.scale_y / level.scale_y, level.height),
    )
    x0, y0 = int(left[0]), int(top[0])
    x1, y1 = min(int(left[-1]) + across.shape[1], level.width), min(int(top[-1]) + down.shape[1], level.height)
    return resample(slide.read(index, x0, y0, x1 - x0, y1 - y0), (top - y0, down), (left - x0, across))


def resample(pixels: np.ndarray, down: Taps, across: Taps) -> np.ndarray:
    """Weighted sums of neighbouring pixels along both axes of an image, exactly.

    Parameters
    ----------
    pixels : numpy.ndarray
        RGB, uint8, shape (h0, w0, 3).
    down, across : tuple of numpy.ndarray
        First pixel, rising, and whole weights that add up to 2048, int64, shapes (n,) and (n, k), of each row and each
        column. Pixels beyond the image weigh nothing.

    Returns
    -------
    numpy.ndarray
        RGB, uint8, shape (h, w, 3).
    """
    (top, rows), (left, columns) = down, across
    h, w = len(top), len(left)
    high, wide = max(8, _HEIGHT // max(2, rows.shape[1] - 1)), max(16, _WIDTH // max(1, columns.shape[1] - 1))
    out = np.empty((h, w, 3), np.uint8)
    for j in range(0, w, wide):
        x0, x1 = int(left[j]), int(left[min(j + wide, w) - 1]) + columns.shape[1]
        to_left, by_column = left[j : j + wide] - x0, columns[j : j + wide] * 2.0 ** -(_MIDDLE_BITS + _WEIGHT_BITS)
        for i in range(0, h, high):
            y0, y1 = int(top[i]), int(top[min(i + high, h) - 1]) + rows.shape[1]
            to_top, by_row = top[i : i + high] - y0, rows[i : i + high] * 2.0 ** (_MIDDLE_BITS - _WEIGHT_BITS)
            block = np.ascontiguousarray(pixels[y0:y1, x0:x1])
            # Sums of at most 255 * 2^11; rounded to 13 bits, so that those of the second pass stay below 2^24.
            middle = np.empty((len(to_top), *block.shape[1:]), np.uint16)
            _sums(block, to_top, by_row, np.rint, middle)
            # Lines are what is summed fast: columns become lines, and pixels rows again.
            turned = np.empty((len(to_left), len(to_top), 3), np.uint8)
            _sums(cv2.transpose(middle), to_left, by_column, _half_up, turned)
            out[i : i + high, j : j + wide] = cv2.transpose(turned)
    return out


def _half_up(values: np.ndarray, **how: Any) -> None:
    """Round positive values that are cast to whole numbers."""
    np.add(values, np.float32(0.5), **how)


def _sums(
    image: np.ndarray, first: np.ndarray, weights: np.ndarray, rounded: Callable[..., Any], out: np.ndarray
) -> None:
    """Weighted sums of neighbouring lines of an image, exact before they are rounded into `out`."""
    lines, results = image.reshape(len(image), -1), out.reshape(len(out), -1)
    (n, k), size = weights.shape, lines.shape[1]
    step = max(1, _PRODUCTS // (k * size))
    chosen = np.minimum(first[:, None] + np.arange(k), len(lines) - 1)  # those beyond weigh nothing
    factors = weights.astype(np.float32)[:, None]
    # Memory used again and again is in the cache.
    taken, values = np.empty((step, k, size), lines.dtype), np.empty((step, k, size), np.float32)
    total = np.empty((step, 1, size), np.float32)
    for i in range(0, n, step):
        m = min(step, n - i)
        np.take(lines, chosen[i : i + m], axis=0, out=taken[:m], mode="clip")  # other modes copy once more
        values[:m] = taken[:m]
        np.matmul(factors[i : i + m], values[:m], out=total[:m])
        rounded(total[:m, 0], out=results[i : i + m], casting="unsafe")
