"""Shape and stain of many nuclei at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.kernels.stain import OD_TABLE, unmixing

SHAPE_COLUMNS = (
    "area_um2",
    "perimeter_um",
    "major_axis_um",
    "minor_axis_um",
    "eccentricity",
    "circularity",
    "orientation",
)
"""Columns of `polygon_shapes` besides the centroid."""

STAIN_COLUMNS = ("hematoxylin_mean", "hematoxylin_std", "eosin_mean", "eosin_std")
"""Columns of `StainSums.columns`."""


def polygon_shapes(points: np.ndarray, ring_starts: np.ndarray, polygon_starts: np.ndarray) -> dict[str, np.ndarray]:
    """Shape of polygons by their corners (Green's theorem), no pixels involved.

    Parameters
    ----------
    points : numpy.ndarray
        Corners in µm of all rings one after another, each ring closed (last point = first), float64 ``(p, 2)``, x
        first, y down.
    ring_starts : numpy.ndarray
        Where each ring begins in `points`, int ``(r,)``.
    polygon_starts : numpy.ndarray
        Where each polygon begins among the rings, int ``(n,)``: its shell, then its holes, in any direction of turn.

    Returns
    -------
    dict of str to numpy.ndarray
        float64 ``(n,)`` each: ``centroid_x``, ``centroid_y`` in µm; ``area_um2`` without holes; ``perimeter_um`` of the
        shell; ``major_axis_um``, ``minor_axis_um``, ``eccentricity`` and ``orientation`` of the ellipse with the same
        second moments (axes are whole lengths, four times the standard deviation; orientation is the major axis'
        angle to the x axis, towards y, in (-pi/2, pi/2]); ``circularity`` 4 pi area / perimeter², at most 1. A polygon
        without area has the centroid of its first corner and zeros.

    References
    ----------
    Moments of polygons: Steger, On the calculation of arbitrary moments of polygons, FGBV-96-05, TU München, 1996.
    """
    names = ("centroid_x", "centroid_y", *SHAPE_COLUMNS)
    if not len(polygon_starts):
        return {name: np.empty(0) for name in names}
    ring_of_polygon = np.zeros(len(ring_starts), np.int64)
    ring_of_polygon[polygon_starts[1:]] = 1
    ring_of_polygon = np.cumsum(ring_of_polygon)
    ring_sizes = np.diff(np.r_[ring_starts, len(points)])
    # Coordinates from each polygon's first corner on: moments of small shapes far out would cancel otherwise.
    origin = points[ring_starts[polygon_starts]]
    x, y = (points - np.repeat(origin[ring_of_polygon], ring_sizes, axis=0)).T
    x0, y0, x1, y1 = x[:-1], y[:-1], x[1:], y[1:]
    cross = x0 * y1 - x1 * y0
    length = np.hypot(x1 - x0, y1 - y0)
    between = ring_starts[1:] - 1  # from one ring's last point to the next one's first
    cross[between] = 0
    length[between] = 0
    sx, sy = x0 + x1, y0 + y1

    def per_ring(values: np.ndarray) -> np.ndarray:
        return np.add.reduceat(values, ring_starts)

    area = per_ring(cross) / 2
    shell = np.zeros(len(ring_starts), bool)
    shell[polygon_starts] = True
    sign = np.where(shell, 1.0, -1.0) * np.where(area < 0, -1.0, 1.0)

    def per_polygon(values: np.ndarray, divisor: float) -> np.ndarray:
        return np.add.reduceat(per_ring(values) * sign, polygon_starts) / divisor

    total = np.add.reduceat(area * sign, polygon_starts)
    some = total > 0
    safe = np.where(some, total, 1.0)
    mean_x = np.where(some, per_polygon(cross * sx, 6) / safe, 0)
    mean_y = np.where(some, per_polygon(cross * sy, 6) / safe, 0)
    var_x = np.where(some, per_polygon(cross * (x0 * x0 + x1 * sx), 12) / safe - mean_x**2, 0)
    var_y = np.where(some, per_polygon(cross * (y0 * y0 + y1 * sy), 12) / safe - mean_y**2, 0)
    cov = np.where(some, per_polygon(cross * (sx * sy + x0 * y0 + x1 * y1), 24) / safe - mean_x * mean_y, 0)
    middle, half = (var_x + var_y) / 2, np.hypot((var_x - var_y) / 2, cov)
    large, small = middle + half, np.maximum(middle - half, 0)
    perimeter = per_ring(length)[polygon_starts]
    with np.errstate(divide="ignore", invalid="ignore"):
        eccentricity = np.where(large > 0, np.sqrt(np.maximum(1 - small / large, 0)), 0)
        circularity = np.where(perimeter > 0, np.minimum(4 * np.pi * total / perimeter**2, 1), 0)
    return {
        "centroid_x": mean_x + origin[:, 0],
        "centroid_y": mean_y + origin[:, 1],
        "area_um2": np.maximum(total, 0),
        "perimeter_um": perimeter,
        "major_axis_um": 4 * np.sqrt(large),
        "minor_axis_um": 4 * np.sqrt(small),
        "eccentricity": eccentricity,
        "circularity": np.maximum(circularity, 0),
        "orientation": np.arctan2(2 * cov, var_x - var_y) / 2,
    }


@dataclass(frozen=True)
class Pieces:
    """Pixel runs cut at the borders of square blocks and grouped by block.

    Parameters
    ----------
    nucleus, y, x0, x1 : numpy.ndarray
        For each piece: index of its nucleus, row, first column, column after the last; int64 ``(p,)``.
    blocks : numpy.ndarray
        Row and column of each block that has pieces, int64 ``(b, 2)``, in raster order.
    starts, ends : numpy.ndarray
        Where each block's pieces begin and end, int64 ``(b,)``; within a block they are ordered by nucleus.
    """

    nucleus: np.ndarray
    y: np.ndarray
    x0: np.ndarray
    x1: np.ndarray
    blocks: np.ndarray
    starts: np.ndarray
    ends: np.ndarray


def cut_runs(runs: np.ndarray, nucleus: np.ndarray, block: int) -> Pieces:
    """Cut runs at the borders of blocks.

    Parameters
    ----------
    runs : numpy.ndarray
        Row, first column, column after the last; int ``(m, 3)``, coordinates not negative.
    nucleus : numpy.ndarray
        Index of each run's nucleus, int ``(m,)``, never falling.
    block : int
        Side of a block.
    """
    y, x0, x1 = runs.astype(np.int64).T.reshape(3, -1)
    first, last = x0 // block, np.maximum(x1 - 1, x0) // block
    parts = last - first + 1
    which = np.repeat(np.arange(len(y)), parts)
    column = first[which] + np.arange(len(which)) - np.repeat(np.cumsum(parts) - parts, parts)
    row = y[which] // block
    left, right = np.maximum(x0[which], column * block), np.minimum(x1[which], (column + 1) * block)
    columns = int(column.max(initial=0)) + 1
    key = row * columns + column
    order = np.argsort(key, kind="stable")
    blocks, starts, counts = np.unique(key[order], return_index=True, return_counts=True)
    which = which[order]
    return Pieces(
        nucleus=np.asarray(nucleus, np.int64)[which],
        y=y[which],
        x0=left[order],
        x1=right[order],
        blocks=np.stack([blocks // columns, blocks % columns], axis=1),
        starts=starts,
        ends=starts + counts,
    )


class StainSums:
    """Sums of hematoxylin and eosin over the pixels of nuclei.

    Concentrations are taken from tables of integers and summed as integers, so the sums do not depend on how the
    pixels are cut into blocks nor on their order.

    Parameters
    ----------
    count : int
        Number of nuclei.
    matrix : numpy.ndarray
        Stain matrix, ``(2, 3)``, rows hematoxylin and eosin.
    """

    SCALE = 4096
    """Integer steps of one unit of (natural) OD."""

    def __init__(self, count: int, matrix: np.ndarray) -> None:
        vectors = unmixing(matrix)
        table = np.rint(OD_TABLE.astype(np.float64)[:, None, None] * vectors * self.SCALE).astype(np.int64)
        # Both stains in one number, eosin in the lower half: one look-up a channel. The halves are small enough that
        # no sum of three spills over.
        if np.abs(table).max() * 3 >= 1 << 30:
            raise ValueError("the stain vectors are too close to each other to be told apart")
        self._table = (table[..., 0] << 32) + table[..., 1]
        self.pixels = np.zeros(count, np.int64)
        self.sums = np.zeros((2, count), np.int64)
        self.squares = np.zeros((2, count), np.int64)

    def add(self, rgb: np.ndarray, nucleus: np.ndarray, y: np.ndarray, x0: np.ndarray, x1: np.ndarray) -> None:
        """Add the pixels of runs.

        Parameters
        ----------
        rgb : numpy.ndarray
            uint8, shape ``(h, w, 3)``.
        nucleus : numpy.ndarray
            Index of each run's nucleus, never falling.
        y, x0, x1 : numpy.ndarray
            Runs within `rgb`.
        """
        lengths = x1 - x0
        total = int(lengths.sum())
        if not total:
            return
        begins = np.cumsum(lengths) - lengths
        flat = np.repeat(y * rgb.shape[1] + x0 - begins, lengths) + np.arange(total)
        colour = np.take(rgb.reshape(-1, 3), flat, axis=0)
        packed = self._table[colour[:, 0], 0]
        packed += self._table[colour[:, 1], 1]
        packed += self._table[colour[:, 2], 2]
        eosin = packed.astype(np.int32).astype(np.int64)  # the lower half with its sign
        hematoxylin = (packed - eosin) >> 32
        change = np.flatnonzero(np.r_[True, nucleus[1:] != nucleus[:-1]])
        # Empty runs would repeat a start; such a nucleus has no pixels here.
        size = np.add.reduceat(lengths, change)
        change, size = change[size > 0], size[size > 0]
        whose, starts = nucleus[change], np.cumsum(size) - size
        self.pixels[whose] += size
        for stain, values in enumerate((hematoxylin, eosin)):
            self.sums[stain, whose] += np.add.reduceat(values, starts)
            self.squares[stain, whose] += np.add.reduceat(values * values, starts)

    def columns(self) -> dict[str, np.ndarray]:
        """Mean and standard deviation of each nucleus, float64, as decadic OD; NaN for a nucleus without pixels.

        Absorption is counted in powers of ten here, as in QuPath and in photometry; one decadic unit is ln 10 natural
        ones.
        """
        values: dict[str, np.ndarray] = {}
        unit = self.SCALE * np.log(10)
        with np.errstate(invalid="ignore", divide="ignore"):
            for name, sums, squares in zip(("hematoxylin", "eosin"), self.sums, self.squares, strict=True):
                mean = sums / self.pixels
                variance = np.maximum(squares / self.pixels - mean * mean, 0)
                values[f"{name}_mean"] = mean / unit
                values[f"{name}_std"] = np.sqrt(variance) / unit
        return values
