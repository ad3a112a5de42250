"""Windows of a slide on any grid, area-averaged, the same whatever window is asked for.

A grid pixel is the mean of the slide over the area it covers, each level pixel weighted by its share of it. Weights
come from absolute coordinates and all sums are exact (whole numbers that their type holds), so that a pixel's value
depends neither on the window nor on the order of summation.
"""

from __future__ import annotations

import math
from typing import Protocol

import cv2
import numpy as np

from pipeline.grid import Grid
from pipeline.slides.slide import Level

_WEIGHT_BITS = 11
_WEIGHT = 1 << _WEIGHT_BITS
_MIDDLE_BITS = 5
"""Fraction bits kept between the two passes: 8 + 5 + 11 bits are what float32 holds exactly."""


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


def _taps(start: int, n: int, ratio: float, size: int) -> tuple[np.ndarray, np.ndarray]:
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


def _matrix(start: int, n: int, ratio: float, size: int) -> tuple[np.ndarray, int, int]:
    """Weights as a matrix, float32 (n, level pixels), and the range of level pixels."""
    first, weights = _taps(start, n, ratio, size)
    low = int(first.min())
    columns = first[:, None] + np.arange(weights.shape[1])
    columns = np.minimum(columns, size - 1)  # those beyond weigh nothing
    high = int(columns.max()) + 1
    matrix = np.zeros((n, high - low), np.float32)
    np.add.at(matrix, (np.arange(n)[:, None], columns - low), weights.astype(np.float32))
    return matrix, low, high


def _weighted(slide: Pixels, index: int, grid: Grid, x: int, y: int, w: int, h: int) -> np.ndarray:
    """`read_region` by weights, for windows whose every pixel touches the slide."""
    level = slide.levels[index]
    across, x0, x1 = _matrix(x, w, grid.scale_x / level.scale_x, level.width)
    down, y0, y1 = _matrix(y, h, grid.scale_y / level.scale_y, level.height)
    return resample(slide.read(index, x0, y0, x1 - x0, y1 - y0), down, across)


def resample(pixels: np.ndarray, down: np.ndarray, across: np.ndarray) -> np.ndarray:
    """Apply banded weight matrices along both axes of an image, exactly.

    Parameters
    ----------
    pixels : numpy.ndarray
        RGB, uint8, shape (h0, w0, 3).
    down, across : numpy.ndarray
        Whole weights as float32, shapes (h, h0) and (w, w0); rows sum to 2048 and their non-zeros are contiguous.

    Returns
    -------
    numpy.ndarray
        RGB, uint8, shape (h, w, 3).
    """
    h, w = len(down), len(across)
    out = np.empty((h, w, 3), np.uint8)
    turned = np.ascontiguousarray(across.T)
    columns = _bands(across, _COLUMNS)
    # A few rows at a time, through both passes: what one pass leaves is still in the cache for the next.
    for i, k, r0, r1 in _bands(down, _ROWS):
        source = np.empty((r1 - r0, 3, pixels.shape[1]), np.float32)
        for channel, plane in enumerate(cv2.split(pixels[r0:r1])):
            source[:, channel] = plane
        flat = source.reshape(r1 - r0, -1)
        middle = np.empty((k - i, flat.shape[1]), np.float32)
        weights = down[i:k, r0:r1]
        step = max(64, _PRODUCT // weights.size)
        for s in range(0, flat.shape[1], step):
            np.matmul(weights, flat[:, s : s + step], out=middle[:, s : s + step])
        # Sums of at most 255 * 2^11; rounded to 13 bits, so that the second pass stays below 2^24.
        middle *= 2.0 ** (_MIDDLE_BITS - _WEIGHT_BITS)
        np.rint(middle, out=middle)
        middle = middle.reshape(3 * (k - i), -1)
        total = np.empty((len(middle), w), np.float32)
        for j, n, c0, c1 in columns:
            np.matmul(middle[:, c0:c1], turned[c0:c1, j:n], out=total[:, j:n])
        total += 2.0 ** (_MIDDLE_BITS + _WEIGHT_BITS - 1)
        total *= 2.0 ** -(_MIDDLE_BITS + _WEIGHT_BITS)
        planes = total.astype(np.uint8).reshape(k - i, 3, w)
        cv2.merge([np.ascontiguousarray(planes[:, channel]) for channel in range(3)], out[i:k])
    return out


_ROWS = 16
_COLUMNS = 32
_PRODUCT = 250_000
"""Products of matrices this small stay on one thread in every BLAS: the readers are the threads."""


def _bands(matrix: np.ndarray, rows: int) -> list[tuple[int, int, int, int]]:
    """Blocks of rows of a banded matrix with the columns that they use."""
    used = matrix != 0
    first = used.argmax(axis=1)
    last = matrix.shape[1] - used[:, ::-1].argmax(axis=1)
    return [
        (i, min(i + rows, len(matrix)), int(first[i : i + rows].min()), int(last[i : i + rows].max()))
        for i in range(0, len(matrix), rows)
    ]
