"""Find damaged tiles of an image by jumps of its colours at the borders between tiles."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import cv2
import numpy as np

RUN = 64
"""Pixels along a border that are judged together; each such run begins at a multiple of this."""

_ASIDE = 8
"""Side of a JPEG block: the step at a border is compared with the steps between neighbouring blocks."""

_REACH = 2 * _ASIDE + 2
"""Pixels on each side of a border that are read."""

_NEAR = _REACH + np.arange(-2, 3)[:, None] * _ASIDE + np.arange(-2, 2)
"""Columns of a strip next to its border and to two block borders on either side, two left and two right of each."""

_GREY = 12.0
"""Grey levels by which the step at a border must exceed `_TIMES` times the largest step beside it."""

_TIMES = 2.0
"""Factor of the largest step beside a border in the comparison with the step at the border, see `_GREY`."""


def jumps(strip: np.ndarray) -> np.ndarray:
    """Find where an image jumps at a vertical border.

    A decoder that has lost its position in the data of a tile continues with wrong brightness or with blocks from
    elsewhere. Inside the tile this may look like a picture, but at the border to an intact tile it makes a straight
    step, whereas tissue continues across borders. A step is not a jump when there is similar contrast one or two
    blocks away, which belongs to the tissue, or when one side has a single colour, which is a tile that was never
    scanned.

    Parameters
    ----------
    strip : numpy.ndarray
        RGB, uint8, shape (h, 36, 3): 18 columns on each side of the border.

    Returns
    -------
    numpy.ndarray
        bool, shape (h // 64,): whether the image jumps in both halves of each run of 64 rows.
    """
    runs = len(strip) // RUN
    halves = np.ascontiguousarray(strip[: runs * RUN]).reshape(runs * 2, RUN // 2, 2 * _REACH, 3)
    means = halves.sum(axis=1, dtype=np.uint16)[:, _NEAR].astype(np.float32) / (RUN // 2)
    before, left, right, after = np.moveaxis(means, 2, 0)
    # The step between the two pixels at a border, less what the slopes on both sides explain.
    step = np.abs((right - left) - (left - before + after - right) / 2).max(axis=-1)
    beside = step[:, [0, 1, 3, 4]].max(axis=-1)
    found = step[:, 2] > _GREY + _TIMES * beside
    for half in np.flatnonzero(found).tolist():
        sides = halves[half, :, : _REACH - 2], halves[half, :, _REACH + 2 :]
        found[half] = all((side != side[0, 0]).any() for side in sides)
    return np.asarray(found.reshape(runs, 2).all(axis=1))


def surroundings(start: int, stop: int, side: int, size: int) -> tuple[int, int]:
    """Range of pixels along one axis that is needed to judge the borders in a window.

    Parameters
    ----------
    start, stop : int
        First pixel of the window and the pixel after its last.
    side, size : int
        Length of a tile and of the image along the axis.

    Returns
    -------
    tuple of int
        Start and stop of the window, extended to whole runs and to both sides of each border. A border exactly at
        `stop` does not count, so that no tile is read only because the window ends at its border.
    """
    first, last = -(-start // side) * side, (stop - 1) // side * side
    start, stop = start // RUN * RUN, -(-stop // RUN) * RUN
    if first <= last:
        start, stop = min(start, first - _REACH), max(stop, last + _REACH)
    return max(start, 0), min(stop, size)


def border_jumps(pixels: np.ndarray, x: int, y: int, across: int, down: int) -> list[tuple[int, int, bool]]:
    """Jumps at the borders of tiles of ``across x down`` pixels in a window of an image.

    Parameters
    ----------
    pixels : numpy.ndarray
        The window, RGB, uint8, shape (h, w, 3).
    x, y : int
        Position of the window in the image.
    across, down : int
        Width and height of a tile.

    Returns
    -------
    list of tuple of (int, int, bool)
        Of each run of 64 pixels that jumps, x and y in the image of the pixel at its middle, right of a vertical or
        below a horizontal border, and whether the border is vertical.
    """
    found = []
    h, w = pixels.shape[:2]
    for at, size, start, length, side, upright in ((x, w, y, h, across, True), (y, h, x, w, down, False)):
        first = -(-start // RUN) * RUN
        if first + RUN > start + length:
            continue
        for border in range(-(-(at + _REACH) // side) * side, at + size - _REACH + 1, side):
            near, runs = slice(border - at - _REACH, border - at + _REACH), slice(first - start, None)
            strip = pixels[runs, near] if upright else cv2.transpose(pixels[near, runs])
            middles = first + RUN // 2 + RUN * np.flatnonzero(jumps(strip))
            found += [(border, m, True) if upright else (m, border, False) for m in middles.tolist()]
    return found


def torn_tiles(sides: Iterable[tuple[int, int, bool]]) -> set[tuple[int, int]]:
    """Find tiles with a jump to at least two of their neighbours.

    A jump at a single side may be the end of a fold or a seam of the scan; damage shows on all sides.

    Parameters
    ----------
    sides : iterable of tuple of (int, int, bool)
        Column and row of a tile that jumps, and whether it jumps at its left (true) or at its upper side.

    Returns
    -------
    set of tuple of (int, int)
        Columns and rows of the tiles.
    """
    count: Counter[tuple[int, int]] = Counter()
    for column, row, left in set(sides):
        count.update([(column, row), (column - left, row - (not left))])
    return {tile for tile, jumping in count.items() if jumping > 1}
