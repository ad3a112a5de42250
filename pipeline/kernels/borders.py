"""Borders between the pieces that a picture is stored in: damage inside of one makes it jump there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import cv2
import numpy as np

RUN = 64
"""Pixels along a border that are looked at together, from multiples of it."""

_ASIDE = 8
"""Side of a JPEG block: the steps at a border are compared with those between blocks beside it."""

_REACH = 2 * _ASIDE + 2
"""Pixels on each side of a border that are looked at."""

_NEAR = _REACH + np.arange(-2, 3)[:, None] * _ASIDE + np.arange(-2, 2)
"""Of these, two on each side of the border, and of the blocks' borders beside it."""

_GREY = 12.0
"""Grey levels by which the step at a border must exceed..."""

_TIMES = 2.0
"""... so many times the largest of those beside it."""


def jumps(strip: np.ndarray) -> np.ndarray:
    """Where an image jumps at a border from top to bottom.

    A decoder that has lost its place in the data of a tile goes on with wrong brightness, or with blocks that belong
    elsewhere. Inside a tile that may be a picture; at its border to a sound one it is a straight step, where tissue
    goes on in both directions. Contrast that is as strong one and two blocks away is the tissue's own, and a side of
    one colour is a tile that was never scanned.

    Parameters
    ----------
    strip : numpy.ndarray
        RGB, uint8, shape (h, 36, 3): 18 columns on each side of the border.

    Returns
    -------
    numpy.ndarray
        bool, shape (h // 64,): 64 rows that jump in both of their halves.
    """
    runs = len(strip) // RUN
    halves = np.ascontiguousarray(strip[: runs * RUN]).reshape(runs * 2, RUN // 2, 2 * _REACH, 3)
    means = halves.sum(axis=1, dtype=np.uint16)[:, _NEAR].astype(np.float32) / (RUN // 2)
    before, left, right, after = np.moveaxis(means, 2, 0)
    # The step from one pixel to the next beyond what the slope on both sides makes of it.
    step = np.abs((right - left) - (left - before + after - right) / 2).max(axis=-1)
    beside = step[:, [0, 1, 3, 4]].max(axis=-1)
    found = step[:, 2] > _GREY + _TIMES * beside
    for half in np.flatnonzero(found).tolist():
        sides = halves[half, :, : _REACH - 2], halves[half, :, _REACH + 2 :]
        found[half] = all((side != side[0, 0]).any() for side in sides)
    return np.asarray(found.reshape(runs, 2).all(axis=1))


def surroundings(start: int, stop: int, side: int, size: int) -> tuple[int, int]:
    """What must be known along one axis to judge the borders in a window.

    Parameters
    ----------
    start, stop : int
        The window.
    side, size : int
        Of a tile, and of the image.

    Returns
    -------
    tuple of int
        The window with whole runs, and with both sides of each border. No tile is met for the first time on the
        right where the window ends at one's border.
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
        RGB, uint8, shape (h, w, 3).
    x, y : int
        Its place in the image.
    across, down : int
        Size of a tile.

    Returns
    -------
    list of tuple of (int, int, bool)
        The middle of each run of 64 pixels right of a border from top to bottom (true), or below one from left to
        right: x and y in the image.
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
    """Tiles that jump to at least two of their neighbours: columns and rows.

    At one side alone it may be the end of a fold or a seam of the scan; damage is seen from all around.

    Parameters
    ----------
    sides : iterable of tuple of (int, int, bool)
        Column and row of tiles, and whether they jump on the left (true) or at the top.
    """
    count: Counter[tuple[int, int]] = Counter()
    for column, row, left in set(sides):
        count.update([(column, row), (column - left, row - (not left))])
    return {tile for tile, jumping in count.items() if jumping > 1}
