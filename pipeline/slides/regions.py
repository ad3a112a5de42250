"""Read windows of a slide on any grid, area-averaged.

A grid pixel is the mean of the slide over the area that it covers, each level pixel weighted by its share of that area.
Weights are computed from absolute coordinates and all sums are exact (whole numbers that their type can hold), so that
the value of a pixel depends neither on the window nor on the order of summation. On scanned tissue no value differs by
more than 0.6 grey levels from the mean computed in float64, rounding included, and the mean of all values by no more
than 0.002.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import cv2
import numpy as np

from pipeline.slides.slide import Level
from pipeline.stores.grid import Grid

_WEIGHT_BITS = 11
_WEIGHT = 1 << _WEIGHT_BITS
_MIDDLE_BITS = 5
"""Fraction bits kept between the two passes: 8 + 5 + 11 = 24 bits, the most that float32 holds exactly."""

_WIDTH, _HEIGHT = 2048, 128
"""Size of the block of level pixels resampled at once, small enough for intermediate results to stay in the cache."""

_PRODUCTS = 400_000
"""Products of pixel and weight computed in one step, limited for the same reason.

A quarter of it makes a single thread a sixth faster, but its steps are so short that threads wait for each other's hold
on Python's global lock: two threads were no faster than one.
"""

Taps = tuple[np.ndarray, np.ndarray]
"""First level pixel and weights of each grid pixel along one axis, see `_taps`."""


class Pixels(Protocol):
    """The part of `Slide` that `read_region` needs."""

    @property
    def levels(self) -> tuple[Level, ...]:
        """Levels, level 0 first."""

    def read(self, level: int, x: int, y: int, w: int, h: int) -> np.ndarray:
        """Window of a level as RGB, uint8, shape (h, w, 3)."""


class OneLevel:
    """View of a slide that has only one of its levels.

    Parameters
    ----------
    slide : Pixels
        The slide.
    level : int
        Index of the level.
    """

    def __init__(self, slide: Pixels, level: int) -> None:
        self._slide, self._level = slide, level
        self.levels: tuple[Level, ...] = (slide.levels[level],)

    def read(self, level: int, x: int, y: int, w: int, h: int) -> np.ndarray:
        """Window of the view's only level; `level` is ignored."""
        return self._slide.read(self._level, x, y, w, h)


def best_level(levels: tuple[Level, ...], grid: Grid) -> int:
    """Index of the coarsest usable level that is no coarser than the grid; 0 if there is none."""
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
    slide : Pixels
        The slide.
    grid : Grid
        The grid.
    x, y, w, h : int
        Window in grid pixels; it may reach outside the slide, where it is white.

    Returns
    -------
    numpy.ndarray
        RGB, uint8, shape (h, w, 3). Pixels are area-averaged from the coarsest level that is no coarser than the grid;
        a pixel that the slide covers only in part is the mean of that part. Where the slide is coarser than the grid,
        they are interpolated bilinearly.

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
        # The usual case: a window that lies on the slide entirely needs no white canvas.
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
    # First the grid pixels that lie on the level entirely, then those cut by its right and lower edge.
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
    """Average blocks of ``down x across`` pixels: uint8 (h * down, w * across, 3) to (h, w, 3)."""
    if across == down == 1:
        return pixels
    h, w = pixels.shape[0] // down, pixels.shape[1] // across
    # For blocks of whole pixels OpenCV sums integers, so that the result is the same at every place of the image.
    return np.asarray(cv2.resize(pixels, (w, h), interpolation=cv2.INTER_AREA))


def _taps(start: int, n: int, ratio: float, size: int) -> Taps:
    """Level pixels and integer weights of `n` grid pixels from `start` along one axis.

    The weights of a grid pixel add up to `_WEIGHT`. `ratio` is the number of level pixels per grid pixel, `size` the
    length of the level along the axis.

    Returns
    -------
    first : numpy.ndarray
        First level pixel of each grid pixel, int64, shape (n,).
    weights : numpy.ndarray
        Weights of that level pixel and of the k - 1 after it, int64, shape (n, k); 0 outside ``[0, size)``.
    """
    j = np.arange(start, start + n, dtype=np.float64)
    if ratio < 1:
        # The slide is coarser than the grid: interpolate between pixel centres, and extend the outermost pixels.
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
    # Round the running sum, not the weights, so that each row adds up to _WEIGHT exactly.
    running = np.rint(np.cumsum(share, axis=1) * _WEIGHT).astype(np.int64)
    running[:, -1] = _WEIGHT
    return first, np.diff(running, axis=1, prepend=0)


def _weighted(slide: Pixels, index: int, grid: Grid, x: int, y: int, w: int, h: int) -> np.ndarray:
    """Do `read_region` by weighted sums, for a window of which every pixel touches the slide."""
    level = slide.levels[index]
    (left, across), (top, down) = (
        _taps(x, w, grid.scale_x / level.scale_x, level.width),
        _taps(y, h, grid.scale_y / level.scale_y, level.height),
    )
    x0, y0 = int(left[0]), int(top[0])
    x1, y1 = min(int(left[-1]) + across.shape[1], level.width), min(int(top[-1]) + down.shape[1], level.height)
    return resample(slide.read(index, x0, y0, x1 - x0, y1 - y0), (top - y0, down), (left - x0, across))


def resample(pixels: np.ndarray, down: Taps, across: Taps) -> np.ndarray:
    """Weighted sums of neighbouring pixels along both axes of an image, exact but for rounding.

    Parameters
    ----------
    pixels : numpy.ndarray
        RGB, uint8, shape (h0, w0, 3).
    down, across : tuple of numpy.ndarray
        For each row and each column of the result, the first pixel, int64, shape (n,), ascending, and its integer
        weights, int64, shape (n, k), which add up to 2048. Pixels beyond the image must have weight 0.

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
            # Sums are at most 255 * 2^11. Rounded to 13 bits, they keep the sums of the second pass below 2^24.
            middle = np.empty((len(to_top), *block.shape[1:]), np.uint16)
            _sums(block, to_top, by_row, np.rint, middle)
            # `_sums` adds up lines, which is fast: transpose the columns into lines for the second pass, and back.
            turned = np.empty((len(to_left), len(to_top), 3), np.uint8)
            _sums(cv2.transpose(middle), to_left, by_column, _half_up, turned)
            out[i : i + high, j : j + wide] = cv2.transpose(turned)
    return out


def _half_up(values: np.ndarray, **how: Any) -> None:
    """Round positive values: add a half, as the cast to integers that follows truncates."""
    np.add(values, np.float32(0.5), **how)


def _sums(
    image: np.ndarray, first: np.ndarray, weights: np.ndarray, rounded: Callable[..., Any], out: np.ndarray
) -> None:
    """Write weighted sums of neighbouring lines of an image to `out`; they are exact until `rounded` rounds them."""
    lines, results = image.reshape(len(image), -1), out.reshape(len(out), -1)
    (n, k), size = weights.shape, lines.shape[1]
    step = max(1, _PRODUCTS // (k * size))
    chosen = np.minimum(first[:, None] + np.arange(k), len(lines) - 1)  # lines beyond have weight 0
    factors = weights.astype(np.float32)[:, None]
    # Buffers are reused in every step, so that they stay in the cache.
    taken, values = np.empty((step, k, size), lines.dtype), np.empty((step, k, size), np.float32)
    total = np.empty((step, 1, size), np.float32)
    for i in range(0, n, step):
        m = min(step, n - i)
        np.take(lines, chosen[i : i + m], axis=0, out=taken[:m], mode="clip")  # other modes make one more copy
        values[:m] = taken[:m]
        np.matmul(factors[i : i + m], values[:m], out=total[:m])
        rounded(total[:m, 0], out=results[i : i + m], casting="unsafe")
