"""The lattice of cells of a grid: which cells are active, that is, close to tissue.

Only pixels of active cells are stored and analysed. Cells have one fixed size, so no result depends on the tile size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from pipeline.stores.grid import Grid

if TYPE_CHECKING:
    from shapely.geometry.base import BaseGeometry

CELL = 64
"""Side of a cell in grid pixels."""


def lattice_shape(grid: Grid) -> tuple[int, int]:
    """Rows and columns of the lattice of a grid."""
    return -(-grid.height // CELL), -(-grid.width // CELL)


def active_pixels(active: np.ndarray, grid: Grid) -> int:
    """Number of grid pixels in active cells; a block of the lattice counts as if it began at the slide's (0, 0)."""
    heights = np.minimum(CELL, grid.height - CELL * np.arange(active.shape[0]))
    widths = np.minimum(CELL, grid.width - CELL * np.arange(active.shape[1]))
    return int(heights @ active @ widths)


def active_cells(tissue: Sequence[BaseGeometry], grid: Grid, margin_cells: int = 1) -> np.ndarray:
    """Cells that touch tissue, and their neighbours.

    Parameters
    ----------
    tissue : sequence of shapely geometries
        Polygons or multipolygons in level-0 pixels.
    grid : Grid
        The slide's grid.
    margin_cells : int
        Number of cells added on each side.

    Returns
    -------
    numpy.ndarray
        bool, shape (ceil(height / 64), ceil(width / 64)). Exact: a cell counts even if only a sliver of it is tissue.
    """
    import shapely

    rows, columns = lattice_shape(grid)
    active = np.zeros((rows, columns), bool)
    box = shapely.box(0, 0, grid.width * grid.scale_x, grid.height * grid.scale_y)
    # The even-odd rule of `_inside` needs polygons that do not overlap.
    area = shapely.intersection(shapely.union_all(list(tissue)), box) if len(tissue) else None
    if area is not None and not area.is_empty:
        polygons = [part for part in shapely.get_parts(area) if part.geom_type == "Polygon" and not part.is_empty]
        rings = [shapely.get_coordinates(ring) for ring in shapely.get_rings(polygons)]
        if rings:
            cell = np.array([grid.scale_x * CELL, grid.scale_y * CELL])
            start = np.concatenate([ring[:-1] for ring in rings]) / cell
            end = np.concatenate([ring[1:] for ring in rings]) / cell
            active = _crossed(start, end, rows, columns) | _inside(start, end, rows, columns)
    if margin_cells > 0 and active.any():
        import cv2

        side = 2 * margin_cells + 1
        active = cv2.dilate(active.astype(np.uint8), np.ones((side, side), np.uint8)).astype(bool)
    return active


def _crossed(start: np.ndarray, end: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Cells that edges run through; `start` and `end` are in cells, shape (n, 2), x first."""
    edges, ts = [np.arange(len(start)), np.arange(len(start))], [np.zeros(len(start)), np.ones(len(start))]
    for axis in (0, 1):
        low, high = np.minimum(start[:, axis], end[:, axis]), np.maximum(start[:, axis], end[:, axis])
        first = np.floor(low).astype(np.int64) + 1
        count = np.maximum(np.ceil(high).astype(np.int64) - first, 0)
        edge = np.repeat(np.arange(len(start)), count)
        line = first[edge] + np.arange(len(edge)) - np.repeat(np.cumsum(count) - count, count)
        edges.append(edge)
        ts.append((line - start[edge, axis]) / (end[edge, axis] - start[edge, axis]))
    edge, t = np.concatenate(edges), np.concatenate(ts)
    order = np.lexsort((t, edge))
    edge, t = edge[order], t[order]
    # Between two crossings of cell borders an edge stays in one cell, the one that holds the midpoint.
    same = edge[1:] == edge[:-1]
    edge, t = edge[1:][same], ((t[1:] + t[:-1]) / 2)[same]
    points = start[edge] + t[:, None] * (end[edge] - start[edge])
    column = np.clip(np.floor(points[:, 0]).astype(np.int64), 0, columns - 1)
    row = np.clip(np.floor(points[:, 1]).astype(np.int64), 0, rows - 1)
    out = np.zeros((rows, columns), bool)
    out[row, column] = True
    return out


def _inside(start: np.ndarray, end: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Cells whose centre lies inside the rings, by the even-odd rule; exact for cells that no edge crosses."""
    low, high = np.minimum(start[:, 1], end[:, 1]), np.maximum(start[:, 1], end[:, 1])
    first = np.ceil(low - 0.5).astype(np.int64)  # first row whose centre line the edge crosses, low end included
    count = np.maximum(np.ceil(high - 0.5).astype(np.int64) - first, 0)
    edge = np.repeat(np.arange(len(start)), count)
    row = first[edge] + np.arange(len(edge)) - np.repeat(np.cumsum(count) - count, count)
    a, b = start[edge], end[edge]
    x = a[:, 0] + (row + 0.5 - a[:, 1]) / (b[:, 1] - a[:, 1]) * (b[:, 0] - a[:, 0])
    column = np.clip(np.ceil(x - 0.5).astype(np.int64), 0, columns)
    keep = (row >= 0) & (row < rows)
    toggles = np.zeros((rows, columns + 1), np.int64)
    np.add.at(toggles, (row[keep], column[keep]), 1)
    return (np.cumsum(toggles, axis=1) % 2 == 1)[:, :columns]
