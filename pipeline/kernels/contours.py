"""Compute pixel runs, outlines and polygons of many instances at once."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from pipeline.kernels.instances import Packing, Pixels, expand

_KERNEL = np.ones((3, 3), np.uint8)


def pixel_runs(pixels: Pixels) -> tuple[np.ndarray, np.ndarray]:
    """Horizontal runs of instances.

    Parameters
    ----------
    pixels : Pixels
        Pixels of the instances.

    Returns
    -------
    runs : numpy.ndarray
        int32 ``(m, 3)``: row, first column, column after the last; ordered by label, then in raster order.
    starts : numpy.ndarray
        int64 ``(count + 1,)``: where the runs of each instance begin in `runs`, and `m`.
    """
    index, label = pixels.index, pixels.label
    if len(index) == 0:
        return np.zeros((0, 3), np.int32), np.zeros(pixels.count + 1, np.int64)
    first = np.flatnonzero(np.r_[True, (index[1:] != index[:-1] + 1) | (label[1:] != label[:-1])])
    lengths = np.diff(np.r_[first, len(index)])
    owner = label[first]
    order = np.argsort(owner, kind="stable")
    rows, starts = np.divmod(index[first], pixels.stride)
    runs = np.stack([rows, starts, starts + lengths], axis=1).astype(np.int32)[order]
    return runs, np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=pixels.count + 1)[1:])])


def every_second(runs: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Resample runs to pixels of twice the size, keeping every second pixel of every second row.

    Parameters
    ----------
    runs, starts : numpy.ndarray
        As returned by `pixel_runs`, with coordinates from the slide's corner.

    Returns
    -------
    runs, starts : numpy.ndarray
        Runs of the larger pixels, in the same form; no two instances share a pixel, and an instance may have none.
    """
    thin = np.stack([runs[:, 0], runs[:, 1] + 1, runs[:, 2] + 1], axis=1) >> 1
    kept = (runs[:, 0] % 2 == 0) & (thin[:, 1] < thin[:, 2])
    return thin[kept], np.concatenate([[0], np.cumsum(kept)])[starts]


def run_boxes(runs: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Left, top, width, height of non-empty instances from the result of `pixel_runs`, int64 ``(n, 4)``."""
    if len(starts) < 2:
        return np.zeros((0, 4), np.int64)
    left = np.minimum.reduceat(runs[:, 1], starts[:-1])
    right = np.maximum.reduceat(runs[:, 2], starts[:-1])
    top, bottom = runs[starts[:-1], 0], runs[starts[1:] - 1, 0] + 1
    return np.stack([left, top, right - left, bottom - top], axis=1).astype(np.int64)


@dataclass(frozen=True, eq=False)
class Outlines:
    """Polygons as flat arrays.

    Parameters
    ----------
    points : numpy.ndarray
        ``(p, 2)`` of x, y: the points of all rings one after another; rings are open.
    rings : numpy.ndarray
        int64 ``(r + 1,)``: where each ring begins in `points`, and `p`.
    polygons : numpy.ndarray
        int64 ``(n + 1,)``: index of each polygon's first ring, its shell, and `r`; its holes follow the shell.
    """

    points: np.ndarray
    rings: np.ndarray
    polygons: np.ndarray


def outlines(runs: np.ndarray, starts: np.ndarray) -> Outlines:
    """Outlines of instances through the midpoints of their border pixels' outer edges.

    This is the marching-squares outline of a binary image. For an instance without holes its area is the number of
    pixels less a half, whereas outlines through pixel centres lose half a pixel all round. Each midpoint lies on one
    ring only, so the polygons are valid; pixels that touch at a corner are joined there.

    Parameters
    ----------
    runs, starts : numpy.ndarray
        As returned by `pixel_runs`; each instance is 8-connected and none is empty.

    Returns
    -------
    Outlines
        Points are int32 in *half* pixels from the window's corner; those in the middle of straight runs are left out.
    """
    count = len(starts) - 1
    if count == 0:
        return Outlines(np.zeros((0, 2), np.int32), np.zeros(1, np.int64), np.zeros(1, np.int64))
    # Instances are drawn into a packed image, in which neighbours do not touch.
    packing = Packing.of(run_boxes(runs, starts))
    owner = np.repeat(np.arange(1, count + 1), np.diff(starts))
    rows, columns = runs[:, 0] + packing.down[owner], runs[:, 1] + packing.right[owner]
    # Lattice of half pixels with one step of padding all round: without the padding, coordinates of pixel centres are
    # odd and those of edges and corners even.
    lattice = np.zeros((2 * packing.shape[0] + 3, 2 * packing.shape[1] + 3), np.uint8)
    stride = lattice.shape[1]
    lattice.ravel()[expand((2 * rows + 2) * stride + 2 * columns + 2, runs[:, 2] - runs[:, 1], 2)] = 1
    contours, hierarchy = cv2.findContours(cv2.dilate(lattice, _KERNEL), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    parent = np.reshape(hierarchy, (-1, 4))[:, 3]
    lengths = np.fromiter(map(len, contours), np.int64, len(contours))
    begins = np.cumsum(lengths) - lengths
    points = np.concatenate(contours).reshape(-1, 2).astype(np.int32, copy=False) - 1
    # Rings are identified by their first point in raster order; for a shell, this is the corner of its instance's first
    # pixel.
    key = np.minimum.reduceat(points[:, 1].astype(np.int64) * stride + points[:, 0], begins)
    corners = 2 * rows[starts[:-1]] * stride + 2 * columns[starts[:-1]]
    order = np.argsort(corners)
    shell = parent < 0
    label = np.zeros(len(contours), np.int64)
    label[shell] = order[np.searchsorted(corners[order], key[shell])]
    label[~shell] = label[parent[~shell]]
    order = np.lexsort((key, ~shell, label))

    middle = ((points[:, 0] ^ points[:, 1]) & 1) == 1
    kept = np.add.reduceat(middle, begins, dtype=np.int64)
    points, begins = points[middle], np.cumsum(kept) - kept
    lengths = kept[order]
    points = points[expand(begins[order], lengths)]
    back = -2 * np.stack([packing.right, packing.down], axis=1).astype(np.int32)[1:]
    points += np.repeat(back[label[order]], lengths, axis=0)
    points, rings = drop_collinear(points, np.concatenate([[0], np.cumsum(lengths)]))
    return Outlines(points, rings, np.concatenate([[0], np.cumsum(np.bincount(label, minlength=count))]))


def drop_collinear(points: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Remove points in the middle of straight runs from many rings at once.

    Parameters
    ----------
    points : numpy.ndarray
        int ``(n, 2)``: the points of all open rings one after another.
    offsets : numpy.ndarray
        int ``(k + 1,)``: where each ring begins in `points`, and `n`.

    Returns
    -------
    points, offsets : numpy.ndarray
        The remaining points, in the same form; every ring keeps its shape.
    """
    if len(points) == 0:
        return points, offsets
    filled = offsets[:-1] < offsets[1:]
    first, last = offsets[:-1][filled], offsets[1:][filled] - 1
    step = np.empty_like(points)  # from each point to the next
    np.subtract(points[1:], points[:-1], out=step[:-1])
    step[last] = points[first] - points[last]
    came = np.empty_like(step)
    came[1:] = step[:-1]
    came[first] = step[last]
    keep = (came[:, 0] * step[:, 1] != came[:, 1] * step[:, 0]) | ((came * step).sum(axis=1) < 0)
    count = np.concatenate([[0], np.cumsum(keep)])
    return points[keep], count[offsets]


def centroids(shapes: Outlines) -> np.ndarray:
    """Centroids of polygons, float64 ``(n, 2)``; holes are subtracted, and no polygon may have an area of 0."""
    n = len(shapes.polygons) - 1
    if n == 0:
        return np.zeros((0, 2))
    first, last = shapes.rings[:-1], shapes.rings[1:] - 1
    shell = shapes.polygons[:-1]
    # Coordinates are relative to each polygon's first point: sums of small shapes far from the origin would otherwise
    # suffer from cancellation.
    origin = shapes.points[first[shell]].astype(np.float64)
    owner = np.repeat(np.arange(n), np.diff(shapes.polygons))
    here = shapes.points - np.repeat(origin[owner], np.diff(shapes.rings), axis=0)
    following = np.empty_like(here)
    following[:-1] = here[1:]
    following[last] = here[first]
    cross = here[:, 0] * following[:, 1] - following[:, 0] * here[:, 1]
    area = np.add.reduceat(cross, first)
    moments = np.add.reduceat((here + following) * cross[:, None], first)
    # Add shells and subtract holes, whatever the orientation of their rings.
    sign = np.where(area < 0, -1.0, 1.0)
    sign[np.setdiff1d(np.arange(len(area)), shell)] *= -1
    total = np.add.reduceat(area * sign, shell)
    return np.asarray(origin + np.add.reduceat(moments * sign[:, None], shell) / (3 * total)[:, None])


def polygon_wkb(shapes: Outlines) -> tuple[np.ndarray, np.ndarray]:
    """Encode polygons as little-endian well-known binary (WKB).

    Parameters
    ----------
    shapes : Outlines
        Polygons.

    Returns
    -------
    data : numpy.ndarray
        uint8: all polygons one after another.
    offsets : numpy.ndarray
        int64 ``(n + 1,)``: where each polygon begins in `data`, and the size of `data`.

    References
    ----------
    OGC 06-103r4, Simple feature access, part 1, section 8.
    """
    lengths = np.diff(shapes.rings)
    # A ring is its number of points, followed by the points, with the first point repeated at the end.
    ring_sizes = 4 + 16 * (lengths + 1)
    ring_ends = np.concatenate([[0], np.cumsum(ring_sizes)])
    polygons = len(shapes.polygons) - 1
    offsets = ring_ends[shapes.polygons] + 9 * np.arange(polygons + 1)
    data = np.zeros(int(offsets[-1]), np.uint8)
    if polygons == 0:
        return data, offsets
    counts = np.diff(shapes.polygons)
    ring_at = ring_ends[:-1] + 9 * (np.repeat(np.arange(polygons), counts) + 1)
    words = np.ndarray((len(data) - 3,), "<u4", data, strides=(1,))
    data[offsets[:-1]] = 1
    words[offsets[:-1] + 1] = 3
    words[offsets[:-1] + 5] = counts
    words[ring_at] = lengths + 1
    # Both coordinates of a point are copied together, as one item of 16 bytes.
    places = np.ndarray((len(data) - 15,), "V16", data, strides=(1,))
    values = np.ascontiguousarray(shapes.points, "<f8").view("V16").ravel()
    at = np.repeat(ring_at + 4 - 16 * shapes.rings[:-1], lengths) + 16 * np.arange(len(values))
    places[at] = values
    places[ring_at + 4 + 16 * lengths] = values[shapes.rings[:-1]]
    return data, offsets


def wkb_rings(data: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Decode polygons of two dimensions from little-endian well-known binary (WKB).

    Parameters
    ----------
    data : numpy.ndarray
        uint8: all polygons one after another.
    offsets : numpy.ndarray
        int ``(n + 1,)``: where each polygon begins in `data`, and where the last one ends.

    Returns
    -------
    points : numpy.ndarray
        float64 ``(p, 2)``: the points of all rings one after another, each ring closed (last point = first).
    rings, polygons : numpy.ndarray
        int64 ``(r + 1,)`` and ``(n + 1,)``: where each ring begins in `points`, and the index of each polygon's first
        ring; the last values are `p` and `r`.

    Raises
    ------
    ValueError
        When a geometry is not such a polygon.
    """
    offsets = np.asarray(offsets, np.int64)
    if len(offsets) < 2:
        return np.zeros((0, 2)), np.zeros(1, np.int64), np.zeros(1, np.int64)
    starts = offsets[:-1]
    words = np.ndarray((len(data) - 3,), "<u4", data, strides=(1,))
    if not ((data[starts] == 1) & (words[starts + 1] == 3)).all():
        raise ValueError("nuclei must be polygons of two dimensions in little-endian WKB")
    counts = words[starts + 5].astype(np.int64)
    polygons = np.concatenate([[0], np.cumsum(counts)])
    lengths, places = np.zeros(polygons[-1], np.int64), np.zeros(polygons[-1], np.int64)
    at, left = starts + 9, np.arange(len(starts))
    for number in range(int(counts.max())):  # all shells, then all first holes, and so on
        left = left[counts[left] > number]
        found = words[at[left]].astype(np.int64)
        lengths[polygons[left] + number], places[polygons[left] + number] = found, at[left] + 4
        at[left] += 4 + 16 * found
    values = np.ndarray((len(data) - 15,), "V16", data, strides=(1,))
    points = values[expand(places, lengths, 16)].view("<f8").reshape(-1, 2)
    return points, np.concatenate([[0], np.cumsum(lengths)]), polygons
