"""Active cells: every cell that touches tissue, however thin."""

from __future__ import annotations

import numpy as np
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.stores.grid import Grid
from pipeline.stores.lattice import CELL, active_cells, lattice_shape

GRID = Grid(1000, 700, 0.5, 2.0, 1.5)


def by_definition(tissue: list[shapely.Geometry], grid: Grid) -> np.ndarray:
    rows, columns = lattice_shape(grid)
    whole = shapely.union_all(tissue)
    out = np.zeros((rows, columns), bool)
    for row in range(rows):
        for column in range(columns):
            x0, y0 = column * CELL * grid.scale_x, row * CELL * grid.scale_y
            x1 = min((column + 1) * CELL, grid.width) * grid.scale_x
            y1 = min((row + 1) * CELL, grid.height) * grid.scale_y
            out[row, column] = shapely.box(x0, y0, x1, y1).intersection(whole).area > 1e-9
    return out


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(1, 6), thin=st.booleans())
def test_every_touched_cell(seed: int, count: int, thin: bool) -> None:
    rng = np.random.default_rng(seed)
    tissue = []
    for _ in range(count):
        points = rng.uniform((-200, -200), (2300, 1300), (rng.integers(3, 9), 2))
        if thin:
            tissue.append(shapely.LineString(points[:2]).buffer(0.05))
        else:
            tissue.append(shapely.make_valid(shapely.Polygon(points)))
    got = active_cells(tissue, GRID, margin_cells=0)
    expected = by_definition(tissue, GRID)
    assert (got | ~expected).all(), "a cell that holds tissue is missing"
    # An edge exactly through a corner may add a cell, no more.
    assert np.count_nonzero(got & ~expected) <= 2


def test_holes_and_margin() -> None:
    ring = shapely.Polygon(
        [(0, 0), (2000, 0), (2000, 1050), (0, 1050)], [[(300, 300), (1500, 300), (1500, 800), (300, 800)]]
    )
    plain = active_cells([ring], GRID, margin_cells=0)
    np.testing.assert_array_equal(plain, by_definition([ring], GRID))
    assert not plain.all()
    grown = active_cells([ring], GRID)
    assert grown.sum() > plain.sum()
    assert (grown | ~plain).all()


def test_nothing_and_everything() -> None:
    assert not active_cells([], GRID).any()
    assert not active_cells([shapely.box(5000, 5000, 6000, 6000)], GRID).any()
    assert active_cells([shapely.box(-10, -10, 6000, 6000)], GRID).all()
    one = active_cells([shapely.box(1, 1, 1.001, 1.001)], GRID, margin_cells=0)
    assert one.sum() == 1
    assert one[0, 0]


def test_overlapping_parts_add_up() -> None:
    parts = [shapely.box(0, 0, 1200, 900), shapely.box(300, 300, 1900, 1000)]
    np.testing.assert_array_equal(active_cells(parts, GRID, margin_cells=0), by_definition(parts, GRID))


def test_cells_on_the_edge_lines() -> None:
    # Edges on cell borders: the cells inside count, and no tissue is lost.
    box = shapely.box(128, 96, 256, 192)
    got = active_cells([box], GRID, margin_cells=0)
    assert (got | ~by_definition([box], GRID)).all()
