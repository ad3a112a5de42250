"""Overlap blending: integer weights, no dependence on anything but the pixel."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.kernels.blend import Blender, PatchGrid, blend_weights, weight_sum

grids = st.builds(
    lambda width, height, overlap, extra: PatchGrid(width, height, 2 * overlap + extra, overlap),
    st.integers(1, 90),
    st.integers(1, 90),
    st.integers(1, 12),
    st.integers(0, 20),
)


def blend_all(grid: PatchGrid, predict, skip=lambda row, column: False) -> np.ndarray:  # type: ignore[no-untyped-def]
    """Blend `predict(x, y)` windows and put them together, cut to the slide."""
    blender = Blender(grid)
    step, o = grid.stride, grid.overlap
    whole = np.zeros((grid.rows * step, grid.columns * step), np.uint8)
    for row in range(grid.rows):
        for column in range(grid.columns):
            if not skip(row, column):
                done = blender.add(row, column, predict(*grid.origin(row, column)))[0]
                whole[row * step : (row + 1) * step, column * step : (column + 1) * step] = done
    return whole[o : o + grid.height, o : o + grid.width]


@given(grids)
def test_weights_add_up_to_a_constant(grid: PatchGrid) -> None:
    total = np.zeros((grid.height + 4 * grid.patch, grid.width + 4 * grid.patch), np.int64)
    for row in range(grid.rows):
        for column in range(grid.columns):
            x, y = grid.origin(row, column)
            x, y = x + grid.patch, y + grid.patch
            total[y : y + grid.patch, x : x + grid.patch] += blend_weights(grid.patch, grid.overlap)
    p = grid.patch
    assert (total[p : p + grid.height, p : p + grid.width] == weight_sum(grid.overlap)).all()


@settings(deadline=None)
@given(grids, st.integers(0, 2**31))
def test_agreeing_windows_give_the_field_itself(grid: PatchGrid, seed: int) -> None:
    pad = grid.patch + grid.overlap
    field = np.random.default_rng(seed).integers(0, 256, (grid.height + 2 * pad, grid.width + 2 * pad), np.uint8)

    def predict(x: int, y: int) -> np.ndarray:
        return field[None, y + pad : y + pad + grid.patch, x + pad : x + pad + grid.patch]

    result = blend_all(grid, predict)
    np.testing.assert_array_equal(result, field[pad : pad + grid.height, pad : pad + grid.width])


@settings(deadline=None)
@given(grids, st.integers(0, 2**31))
def test_equals_the_plain_weighted_mean(grid: PatchGrid, seed: int) -> None:
    rng = np.random.default_rng(seed)
    windows = {
        grid.origin(r, c): rng.integers(0, 256, (1, grid.patch, grid.patch), np.uint8)
        for r in range(grid.rows)
        for c in range(grid.columns)
    }
    total = np.zeros((grid.height + 4 * grid.patch, grid.width + 4 * grid.patch), np.int64)
    order = list(windows)
    rng.shuffle(order)
    for x, y in order:
        here = np.s_[y + grid.patch : y + 2 * grid.patch, x + grid.patch : x + 2 * grid.patch]
        total[here] += windows[x, y][0].astype(np.int64) * blend_weights(grid.patch, grid.overlap)
    p, s = grid.patch, weight_sum(grid.overlap)
    expected = (total[p : p + grid.height, p : p + grid.width] + s // 2) // s
    np.testing.assert_array_equal(blend_all(grid, lambda x, y: windows[x, y]), expected)


def test_skipped_windows_leave_others_whole() -> None:
    grid = PatchGrid(100, 100, 20, 4)
    field = np.full((1, 20, 20), 200, np.uint8)
    result = blend_all(grid, lambda x, y: field, skip=lambda row, column: (row, column) == (2, 2))
    x, y = grid.origin(2, 2)
    assert (result[y + 4 : y + 16, x + 4 : x + 16] == 0).all()
    untouched = np.ones_like(result, bool)
    untouched[y : y + 20, x : x + 20] = False
    assert (result[untouched] == 200).all()


@pytest.mark.parametrize("overlap", [0, 6])
def test_refuses_impossible_overlap(overlap: int) -> None:
    with pytest.raises(ValueError, match="overlap"):
        PatchGrid(10, 10, 10, overlap)
