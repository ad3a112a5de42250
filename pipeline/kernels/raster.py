"""Convert polygons to pixel runs and paint runs into label maps."""

from __future__ import annotations

import numpy as np

_CROSSINGS_AT_ONCE = 4_000_000


def polygon_runs(
    points: np.ndarray,
    ring_starts: np.ndarray,
    polygon_starts: np.ndarray,
    rows: tuple[int, int] | None = None,
    *,
    even_ties: bool = False,
) -> np.ndarray:
    """Convert polygons to pixel runs.

    A pixel belongs to a polygon when its centre lies inside, by the even-odd rule over all rings. A centre on an
    outline belongs to the area to its right or, on a horizontal edge, to the area below, so that polygons with a common
    edge neither share a pixel nor leave a gap. Pixel (x, y) covers ``[x, x+1) x [y, y+1)``.

    Parameters
    ----------
    points : numpy.ndarray
        Corners of all rings one after another, float64 ``(p, 2)``, x first. Rings may be closed or open.
    ring_starts : numpy.ndarray
        Where each ring begins in `points`, int ``(r,)``.
    polygon_starts : numpy.ndarray
        Index of each polygon's first ring, int ``(n,)``.
    rows : (int, int), optional
        First row and row after the last to rasterise; all rows by default.
    even_ties : bool
        Assign a centre on an outline to the area to its right in even columns and to that on its left in odd columns.
        When outlines of a label map are enlarged by an even factor, all their diagonals run through pixel centres.
        Assigning these always to the right shifts the shape by a quarter of a pixel; assigning them by column does not,
        and at a factor of 2 each pixel becomes exactly four.

    Returns
    -------
    numpy.ndarray
        int64 ``(m, 4)``: polygon, row, first column, column after the last; ordered by polygon, row, column.
    """
    points = np.asarray(points, np.float64)
    if not len(points):
        return np.empty((0, 4), np.int64)
    ring_sizes = np.diff(np.r_[ring_starts, len(points)])
    following = np.arange(1, len(points) + 1)
    filled = ring_sizes > 0
    following[(ring_starts + ring_sizes - 1)[filled]] = ring_starts[filled]
    ring_polygon = np.repeat(np.arange(len(polygon_starts)), np.diff(np.r_[polygon_starts, len(ring_starts)]))
    polygon = np.repeat(ring_polygon, ring_sizes)
    x0, y0 = points.T
    x1, y1 = points[following].T
    # All edges point downwards, so that two polygons with a common edge compute the same crossings.
    flip = y1 < y0
    x0, x1 = np.where(flip, x1, x0), np.where(flip, x0, x1)
    y0, y1 = np.where(flip, y1, y0), np.where(flip, y0, y1)
    first, last = np.ceil(y0 - 0.5).astype(np.int64), np.ceil(y1 - 0.5).astype(np.int64)
    if rows is not None:
        first, last = np.clip(first, *rows), np.clip(last, *rows)
    counts = last - first  # centres with y0 <= row + 0.5 < y1
    parts = []
    for start, end in _batches(counts, polygon):
        count = counts[start:end]
        edge = np.repeat(np.arange(start, end), count)
        row = first[edge] + np.arange(len(edge)) - np.repeat(np.cumsum(count) - count, count)
        x = x0[edge] + (row + 0.5 - y0[edge]) * ((x1[edge] - x0[edge]) / (y1[edge] - y0[edge]))
        column = np.ceil(x - 0.5).astype(np.int64)
        if even_ties:
            column += (column == x - 0.5) & (column % 2 == 1)
        order = np.lexsort((column, row, polygon[edge]))
        edge, row, column = edge[order], row[order], column[order]
        # Closed rings cross every row an even number of times.
        runs = np.stack([polygon[edge[::2]], row[::2], column[::2], column[1::2]], axis=1)
        parts.append(runs[runs[:, 3] > runs[:, 2]])
    return np.concatenate(parts) if parts else np.empty((0, 4), np.int64)


def _batches(rows: np.ndarray, polygon: np.ndarray) -> list[tuple[int, int]]:
    """Ranges of edges with at most `_CROSSINGS_AT_ONCE` crossings each, or more for a single larger polygon.

    The edges of a polygon are never split between ranges.
    """
    total = np.cumsum(rows)
    borders = np.r_[0, np.flatnonzero(np.diff(polygon)) + 1, len(polygon)]
    work = np.r_[0, total][borders]
    ranges, start = [], 0
    while start < len(borders) - 1:
        end = int(np.searchsorted(work, work[start] + _CROSSINGS_AT_ONCE, side="right")) - 1
        end = min(max(end, start + 1), len(borders) - 1)
        ranges.append((int(borders[start]), int(borders[end])))
        start = end
    return ranges


def paint_runs(runs: np.ndarray, labels: np.ndarray, out: np.ndarray, top: int = 0, left: int = 0) -> None:
    """Paint runs into a label map; where runs overlap, the first one is kept.

    Parameters
    ----------
    runs : numpy.ndarray
        Row, first column, column after the last, int ``(m, 3)``; parts outside `out` are ignored.
    labels : numpy.ndarray
        Label of each run, ``(m,)``.
    out : numpy.ndarray
        Label map to paint into, ``(h, w)``, C-contiguous.
    top, left : int
        Row and column of the first pixel of `out`.
    """
    height, width = out.shape
    row, x0, x1 = np.asarray(runs, np.int64).T.reshape(3, -1)
    row = row - top
    x0, x1 = np.clip(x0 - left, 0, width), np.clip(x1 - left, 0, width)
    keep = np.flatnonzero((row >= 0) & (row < height) & (x1 > x0))[::-1]  # reversed: the last write wins
    lengths = (x1 - x0)[keep]
    begins = np.cumsum(lengths) - lengths
    target = np.repeat((row * width + x0)[keep] - begins, lengths) + np.arange(int(lengths.sum()))
    out.reshape(-1)[target] = np.repeat(np.asarray(labels)[keep], lengths)
