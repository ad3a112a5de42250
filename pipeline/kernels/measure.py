"""Measure shape and stain of many nuclei at once."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from pipeline.kernels.instances import expand
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

_TURN = 1 << 42
"""A whole turn in the integers of `hull_diameters`."""

_NOISE = 1e-9
"""Second moments below this share of the mean variance may be rounding errors, even far from the slide's corner."""

STAIN_COLUMNS = ("hematoxylin_mean", "hematoxylin_std", "eosin_mean", "eosin_std")
"""Columns of `StainSums.columns`."""


def polygon_shapes(points: np.ndarray, ring_starts: np.ndarray, polygon_starts: np.ndarray) -> dict[str, np.ndarray]:
    """Shape of polygons, computed from their corners (Green's theorem) without rasterising them.

    Parameters
    ----------
    points : numpy.ndarray
        Corners in µm of all rings one after another, each ring closed (last point = first), float64 ``(p, 2)``, x
        first, y down.
    ring_starts : numpy.ndarray
        Where each ring begins in `points`, int ``(r,)``.
    polygon_starts : numpy.ndarray
        Index of each polygon's first ring, its shell, int ``(n,)``; its holes follow. Rings may have any orientation.

    Returns
    -------
    dict of str to numpy.ndarray
        float64 ``(n,)`` each: ``centroid_x``, ``centroid_y`` in µm; ``area_um2`` without holes; ``perimeter_um`` of the
        shell; ``major_axis_um``, ``minor_axis_um``, ``eccentricity`` and ``orientation`` of the ellipse with the same
        second moments (axes are full lengths, four times the standard deviation; orientation is the angle of the major
        axis to the x axis, towards y, in (-pi/2, pi/2], and 0 when both axes are equal); ``circularity``
        4 pi area / perimeter², at most 1. A polygon without area has its first corner as centroid and zeros for
        everything but the perimeter.

    References
    ----------
    Moments of polygons: Steger, On the calculation of arbitrary moments of polygons, FGBV-96-05, TU München, 1996.
    """
    names = ("centroid_x", "centroid_y", *SHAPE_COLUMNS)
    if not len(polygon_starts):
        return {name: np.empty(0) for name in names}
    polygon_of_ring = np.zeros(len(ring_starts), np.int64)
    polygon_of_ring[polygon_starts[1:]] = 1
    polygon_of_ring = np.cumsum(polygon_of_ring)
    ring_sizes = np.diff(np.r_[ring_starts, len(points)])
    # Coordinates are relative to each polygon's first corner: moments of small shapes far from the origin would
    # otherwise suffer from cancellation.
    origin = points[ring_starts[polygon_starts]]
    x, y = (points[:, axis] - np.repeat(origin[polygon_of_ring, axis], ring_sizes) for axis in (0, 1))
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
    middle, apart = (var_x + var_y) / 2, var_x - var_y
    # Rounding errors must not determine the orientation of symmetrical shapes.
    cov, apart = (np.where(np.abs(value) > _NOISE * middle, value, 0.0) for value in (cov, apart))
    half = np.hypot(apart / 2, cov)
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
        "orientation": np.arctan2(2 * cov, apart) / 2,
    }


def hulls(points: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Corners of the convex hulls of many sets of integer points.

    Parameters
    ----------
    points : numpy.ndarray
        int64 ``(p, 2)``, x first: the points of all sets one after another; no set is empty.
    starts : numpy.ndarray
        int ``(n + 1,)``: where each set begins in `points`, and `p`.

    Returns
    -------
    corners : numpy.ndarray
        int64 ``(c, 2)``: the corners of all hulls one after another, each hull in order around it, anticlockwise
        where y points down.
    starts : numpy.ndarray
        int64 ``(n + 1,)``: where each hull begins in `corners`, and `c`.

    References
    ----------
    Hulls from chains of points sorted by one coordinate: Andrew, Information Processing Letters 9, 1979.
    """
    if len(starts) < 2:
        return np.zeros((0, 2), np.int64), np.zeros(1, np.int64)
    x, y = np.ascontiguousarray(points.T)
    owner = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    top = np.minimum.reduceat(y, starts[:-1])
    levels = np.maximum.reduceat(y, starts[:-1]) - top + 1
    base = np.cumsum(levels) - levels
    place = base[owner] + y - top[owner]
    used = np.zeros(int(levels.sum()), bool)
    used[place] = True
    row = np.flatnonzero(used)
    owners = np.repeat(np.arange(len(levels)), levels)[row]
    place = (np.cumsum(used) - 1)[place]
    # Two chains of points bound the hull: one through the smallest and one through the largest x of each row.
    chains = []
    for side in (x, -x):
        cx, cy, whose = np.full(len(row), np.iinfo(np.int64).max), row, owners
        np.minimum.at(cx, place, side)
        while len(cx) > 2:
            # A point that is not outside the line through its neighbours is no corner of the hull, and a corner of the
            # hull is outside the line through any two other points: all points found here can be removed at once.
            dx, dy = cx[2:] - cx[:-2], cy[2:] - cy[:-2]
            inside = (cx[1:-1] - cx[:-2]) * dy >= dx * (cy[1:-1] - cy[:-2])
            inside &= whose[2:] == whose[:-2]
            if not inside.any():
                break
            keep = np.flatnonzero(np.concatenate([[True], ~inside, [True]]))
            cx, cy, whose = cx[keep], cy[keep], whose[keep]
        chains.append((cx, cy - base[whose] + top[whose], np.bincount(whose, minlength=len(levels))))
    (left_x, left_y, left), (right_x, right_y, right) = chains
    ends = np.cumsum(left + right)
    first = ends - left - right
    corners = np.empty((int(ends[-1]), 2), np.int64)
    corners[expand(first, left)] = np.stack([left_x, left_y], axis=1)  # down on the left
    corners[expand(ends - 1, right, -1)] = np.stack([-right_x, right_y], axis=1)  # up on the right
    starts = np.concatenate([[0], ends])
    # A row that has one corner has it in both chains.
    twice = (corners == corners[_following(starts)]).all(axis=1)
    twice[first] = False
    keep = np.flatnonzero(~twice)
    return corners[keep], np.searchsorted(keep, starts)


def hull_areas(corners: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Areas of hulls from the `corners` and `starts` of `hulls`, float64 ``(n,)``."""
    if len(starts) < 2:
        return np.zeros(0)
    x, y = np.ascontiguousarray(corners.T)
    following = _following(starts)
    twice = (x[following] + x) * (y[following] - y)
    return np.abs(np.add.reduceat(twice, starts[:-1])) / 2


def hull_diameters(corners: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Largest and smallest diameters of convex polygons, as between the jaws of a calliper.

    Parameters
    ----------
    corners : numpy.ndarray
        float64 ``(c, 2)``: the corners of all polygons one after another, each polygon in order around it,
        anticlockwise where y points down. A polygon of one or two corners is a point or a line.
    starts : numpy.ndarray
        int ``(n + 1,)``: where each polygon begins in `corners`, and `c`; none is empty.

    Returns
    -------
    largest, smallest : numpy.ndarray
        float64 ``(n,)`` each, in the unit of `corners`: the largest distance between two corners, and the smallest
        distance between two parallel lines that hold the polygon between them.

    References
    ----------
    One of those lines runs along an edge, and the largest distance is between corners that such lines touch: Shamos,
    Computational Geometry, Yale University, 1978.
    """
    if len(starts) < 2:
        return np.zeros(0), np.zeros(0)
    first = starts[:-1]
    sizes = np.diff(starts)
    x, y = np.ascontiguousarray(corners.T)
    after = _following(starts)
    before = np.empty_like(after)
    before[after] = np.arange(len(after))
    x1, y1 = x[after], y[after]
    dx, dy = x1 - x, y1 - y
    with np.errstate(invalid="ignore"):
        # Grows with the angle of the edge; only its order matters. Integers, so that other polygons change nothing.
        slope = dx / (np.abs(dx) + np.abs(dy))
        angle = (np.where(dy <= 0, 1 - slope, 3 + slope) * (_TURN / 4)).astype(np.int64)
    angle -= np.repeat(angle[first], sizes)
    angle &= _TURN - 1
    # The corner opposite of an edge lies between the two edges whose angles are half a turn from its own.
    base = np.repeat(np.arange(len(sizes)) * _TURN, sizes)
    opposite = np.searchsorted(angle + base, ((angle + _TURN // 2) & (_TURN - 1)) + base)
    begin = np.repeat(first, sizes)
    beyond = (opposite >= np.repeat(starts[1:], sizes)) | (opposite < begin)
    opposite[beyond] = begin[beyond]
    ax, ay = x[opposite] - x, y[opposite] - y
    with np.errstate(invalid="ignore", divide="ignore"):
        width = (dx * ay - dy * ax) ** 2 / (dx * dx + dy * dy)
    width[first[sizes == 1]] = 0
    farthest = np.maximum(ax * ax + ay * ay, (ax - dx) ** 2 + (ay - dy) ** 2)
    # An edge parallel to this one has two opposite corners, of which rounding has chosen one.
    for corner, to_x, to_y in ((before[opposite], x, y), (after[opposite], x1, y1)):
        np.maximum(farthest, (x[corner] - to_x) ** 2 + (y[corner] - to_y) ** 2, out=farthest)
    return np.sqrt(np.maximum.reduceat(farthest, first)), np.sqrt(np.minimum.reduceat(width, first))


def _following(starts: np.ndarray) -> np.ndarray:
    """Index of the corner after each corner, around each of the polygons that begin at `starts`."""
    following = np.arange(1, int(starts[-1]) + 1)
    following[starts[1:] - 1] = starts[:-1]
    return following


@dataclass(frozen=True)
class Pieces:
    """Pixel runs cut at the borders of square blocks and grouped by block.

    Parameters
    ----------
    nucleus, y, x0, x1 : numpy.ndarray
        Of each piece: index of its nucleus, row, first column, column after the last; int32 ``(p,)``.
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
    """Cut pixel runs at the borders of square blocks.

    Parameters
    ----------
    runs : numpy.ndarray
        Row, first column, column after the last; int ``(m, 3)``, not negative.
    nucleus : numpy.ndarray
        Index of each run's nucleus, int ``(m,)``, in ascending order.
    block : int
        Side of a block in pixels.

    Returns
    -------
    Pieces
        The pieces of all runs.
    """
    y, x0, x1 = np.ascontiguousarray(runs.T, np.int32)
    nucleus = np.asarray(nucleus, np.int32)
    column = x0 // block
    border = (column + 1) * block
    left, right = x0, np.minimum(x1, border)
    cut = np.flatnonzero(x1 > border)  # few: their parts in further blocks become separate pieces
    if len(cut):
        further = (x1[cut] - 1) // block - column[cut]
        which = np.repeat(cut, further)
        more = expand(column[cut] + 1, further).astype(np.int32)
        y, nucleus, column = (
            np.concatenate([v, w]) for v, w in ((y, y[which]), (nucleus, nucleus[which]), (column, more))
        )
        left = np.concatenate([left, more * block])
        right = np.concatenate([right, np.minimum(x1[which], (more + 1) * block)])
    columns = int(column.max(initial=0)) + 1
    key = (y // block).astype(np.int64) * columns + column
    order = np.argsort(key * (int(nucleus.max(initial=0)) + 1) + nucleus, kind="stable")
    key = key[order]
    starts = np.flatnonzero(np.r_[len(key) > 0, key[1:] != key[:-1]])
    return Pieces(
        nucleus=nucleus[order],
        y=y[order],
        x0=left[order],
        x1=right[order],
        blocks=np.stack([key[starts] // columns, key[starts] % columns], axis=1),
        starts=starts,
        ends=np.r_[starts[1:], len(key)][: len(starts)],
    )


class StainSums:
    """Sums of hematoxylin and eosin over the pixels of nuclei.

    Concentrations are looked up in integer tables and their sums are exact, so that the sums depend neither on how the
    pixels are divided into blocks nor on their order.

    Parameters
    ----------
    count : int
        Number of nuclei.
    matrix : numpy.ndarray
        Stain matrix, ``(2, 3)``, rows hematoxylin and eosin.
    white : numpy.ndarray, optional
        OD of the glass in each channel, ``(3,)``, which is subtracted first; nothing is subtracted without it.
    """

    SCALE = 4096
    """Integer steps per unit of natural OD."""

    _LIMIT = 1 << 24
    """Concentration in integer steps that no pixel reaches unless the stain vectors are too close to each other."""

    def __init__(self, count: int, matrix: np.ndarray, white: np.ndarray | None = None) -> None:
        vectors = unmixing(matrix)
        glass = np.zeros(3) if white is None else np.asarray(white, np.float64)
        od = np.maximum(OD_TABLE.astype(np.float64)[:, None] - glass, 0)
        table = np.rint(od[:, :, None] * vectors * self.SCALE).astype(np.int64)
        if np.abs(table).max() * 3 >= self._LIMIT:
            raise ValueError("the stain vectors are too close to each other to be told apart")
        table = table.astype(np.int32)
        # Two look-ups per pixel give both stains: one table is indexed by red and green, the other by blue.
        self._red_green = (table[:, 1][:, None] + table[:, 0][None, :]).reshape(-1, 2)
        self._blue = np.ascontiguousarray(table[:, 2])
        self.pixels = np.zeros(count, np.int64)
        self.sums = np.zeros((2, count), np.int64)
        self.squares = np.zeros((2, count), np.int64)

    def add(self, rgb: np.ndarray, nucleus: np.ndarray, y: np.ndarray, x0: np.ndarray, x1: np.ndarray) -> None:
        """Add the pixels of runs to the sums.

        Parameters
        ----------
        rgb : numpy.ndarray
            uint8, shape ``(h, w, 3)``.
        nucleus : numpy.ndarray
            Index of each run's nucleus, in ascending order.
        y, x0, x1 : numpy.ndarray
            Row, first column and column after the last of each run in `rgb`.
        """
        some = x1 > x0
        if not some.all():
            nucleus, y, x0, x1 = nucleus[some], y[some], x0[some], x1[some]
        if not len(y):
            return
        lengths = x1 - x0
        colours = cv2.cvtColor(rgb, cv2.COLOR_RGB2RGBA).view("<u4").ravel()
        colours = np.take(colours, expand(y * rgb.shape[1] + x0, lengths))
        stains = np.take(self._red_green, colours.view("<u2")[::2], axis=0)
        stains += np.take(self._blue, colours.view(np.uint8)[2::4], axis=0)
        change = np.flatnonzero(np.r_[True, nucleus[1:] != nucleus[:-1]])
        size = np.add.reduceat(lengths, change)
        whose, starts = nucleus[change], np.cumsum(size) - size
        self.pixels[whose] += size
        # Integers below 2**53 and their sums in any order are exact in float64. A complex number holds both stains.
        values = stains.astype(np.float64)
        for power, total in enumerate((self.sums, self.squares), start=1):
            if power == 2:
                values *= values
            both = np.add.reduceat(values.view(np.complex128)[:, 0], starts)
            total[0, whose] += both.real.astype(np.int64)
            total[1, whose] += both.imag.astype(np.int64)

    def columns(self) -> dict[str, np.ndarray]:
        """Mean and standard deviation of both stains for each nucleus, float64; NaN for a nucleus without pixels.

        Values are decadic OD, as in QuPath and in photometry; one decadic unit is ln 10 natural units.
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
