"""Borders between the pieces that a picture is stored in: damage inside of one makes it jump there."""

from __future__ import annotations

import numpy as np

RUN = 32
"""Pixels along a border that are looked at together."""

_ASIDE = 8
"""Side of a JPEG block: the steps at a border are compared with those between blocks beside it."""

_SMALLEST = 64
"""Narrower tiles and lower strips have no borders to speak of."""

_GREY = 20.0
"""Grey levels by which the step at a border must exceed..."""

_TIMES = 2.0
"""... so many times the largest of those beside it."""


def jumps(pixels: np.ndarray, borders: np.ndarray) -> np.ndarray:
    """Where an image jumps at borders from top to bottom.

    A decoder that has lost its place in the data of a tile goes on with wrong brightness, or with blocks that belong
    elsewhere. Inside a tile that may be a picture; at its border to a sound one it is a straight step, where tissue
    goes on in both directions. Contrast that is as strong one and two blocks away is the tissue's own, and a side of
    one colour is a tile that was never scanned.

    Parameters
    ----------
    pixels : numpy.ndarray
        RGB, uint8, shape (h, w, 3).
    borders : numpy.ndarray
        First columns right of borders, int, shape (n,). Those within 18 pixels of an edge are left out.

    Returns
    -------
    numpy.ndarray
        bool, shape (h // 32, n): 32 rows of a border that belong to a jump of 64 rows or more.
    """
    runs, count = len(pixels) // RUN, len(borders)
    torn = np.zeros((runs, count), bool)
    inside = (borders >= 2 * _ASIDE + 2) & (borders + 2 * _ASIDE + 2 <= pixels.shape[1])
    if not inside.any() or not runs:
        return torn
    columns = borders[inside, None, None] + np.arange(-2, 3)[:, None] * _ASIDE + np.arange(-2, 2)
    near = pixels[: runs * RUN, columns.ravel()].reshape(runs, RUN, *columns.shape, 3)
    before, left, right, after = np.moveaxis(near.mean(axis=1, dtype=np.float32), 3, 0)
    # The step from one pixel to the next beyond what the slope on both sides makes of it.
    step = np.abs((right - left) - (left - before + after - right) / 2).max(axis=-1)
    beside = step[..., [0, 1, 3, 4]].max(axis=-1)
    sides = near[..., :2, :, :], near[..., 3:, :, :]
    plain = np.any([(side == side[:, :1, :, :1, :1]).all(axis=(1, 3, 4, 5)) for side in sides], axis=0)
    found = (step[..., 2] > _GREY + _TIMES * beside) & ~plain
    both = found[1:] & found[:-1]
    long = np.zeros_like(found)
    long[1:] |= both
    long[:-1] |= both
    torn[:, inside] = long
    return torn


def border_jumps(pixels: np.ndarray, x: int, y: int, across: int, down: int) -> list[tuple[int, int, int, int]]:
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
    list of tuple of int
        Pieces of borders that belong to jumps, in pixels of the image: x, y, width, height.
    """
    found = []
    turned = np.swapaxes(pixels, 0, 1)
    for image, at, start, side, upright in ((pixels, x, y, across, True), (turned, y, x, down, False)):
        if side < _SMALLEST:
            continue
        first = -(-start // RUN) * RUN  # the same pieces in every window
        borders = np.arange(-(-(at + 1) // side) * side, at + image.shape[1], side)
        for run, border in np.argwhere(jumps(image[first - start :], borders - at)).tolist():
            place = (int(borders[border]) - 1, first + run * RUN, 2, RUN)
            found.append(place if upright else (place[1], place[0], RUN, 2))
    return found
