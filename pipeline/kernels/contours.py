"""Outlines of instances as polygons."""

from __future__ import annotations

import cv2
import numpy as np

_KERNEL = np.ones((3, 3), np.uint8)


def outline(mask: np.ndarray) -> list[tuple[np.ndarray, bool]]:
    """Outlines of one instance through the middles of its border pixels' outer edges.

    This is the marching-squares outline of a binary image: its area is the number of pixels less a half for an
    instance without holes, unlike outlines through pixel centres, which lose half a pixel all round.

    Parameters
    ----------
    mask : numpy.ndarray
        bool or uint8 ``(h, w)``.

    Returns
    -------
    list of (numpy.ndarray, bool)
        Open rings, int32 ``(n, 2)`` of x, y in *half* pixels from the mask's corner, and whether the ring is a hole.
        Each hole follows its shell.
    """
    height, width = mask.shape
    # On a lattice of half pixels, pixel centres are odd, edges and corners even; one step of padding all round.
    lattice = np.zeros((2 * height + 3, 2 * width + 3), np.uint8)
    lattice[2 : 2 * height + 1 : 2, 2 : 2 * width + 1 : 2] = mask
    lattice = cv2.dilate(lattice, _KERNEL)
    contours, hierarchy = cv2.findContours(lattice, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    rings: list[tuple[np.ndarray, bool]] = []
    if not contours:
        return rings
    links = np.reshape(hierarchy, (-1, 4))
    index = 0
    while index >= 0:
        rings.append((_midpoints(contours[index]), False))
        hole = int(links[index, 2])
        while hole >= 0:
            rings.append((_midpoints(contours[hole]), True))
            hole = int(links[hole, 0])
        index = int(links[index, 0])
    return [ring for ring in rings if len(ring[0]) >= 3]


def _midpoints(contour: np.ndarray) -> np.ndarray:
    points = contour.reshape(-1, 2) - 1
    return points[((points[:, 0] ^ points[:, 1]) & 1) == 1]


def drop_collinear(points: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Leave out points in the middle of straight runs, of many rings at once.

    Parameters
    ----------
    points : numpy.ndarray
        int ``(n, 2)``: the points of all open rings one after another.
    offsets : numpy.ndarray
        int ``(k + 1,)``: where each ring begins, and `n`.

    Returns
    -------
    points, offsets
        As given, with fewer points; every ring keeps its shape.
    """
    if len(points) == 0:
        return points, offsets
    before = np.arange(-1, len(points) - 1)
    after = np.arange(1, len(points) + 1)
    filled = offsets[:-1] < offsets[1:]
    before[offsets[:-1][filled]] = offsets[1:][filled] - 1
    after[offsets[1:][filled] - 1] = offsets[:-1][filled]
    a = points - points[before]
    b = points[after] - points
    keep = (a[:, 0] * b[:, 1] != a[:, 1] * b[:, 0]) | ((a * b).sum(axis=1) < 0)
    count = np.concatenate([[0], np.cumsum(keep)])
    return points[keep], count[offsets]


def mask_runs(mask: np.ndarray) -> np.ndarray:
    """Horizontal runs of an instance.

    Parameters
    ----------
    mask : numpy.ndarray
        bool ``(h, w)``.

    Returns
    -------
    numpy.ndarray
        int32 ``(n, 3)``: row, first column, column after the last; in raster order.
    """
    edges = np.zeros((mask.shape[0], mask.shape[1] + 2), np.int8)
    edges[:, 1:-1] = mask
    steps = np.diff(edges, axis=1)
    rows, starts = np.nonzero(steps == 1)
    ends = np.nonzero(steps == -1)[1]
    return np.column_stack([rows, starts, ends]).astype(np.int32)
