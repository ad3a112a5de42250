"""Outlines of instances."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from pipeline.kernels.contours import drop_collinear, mask_runs, outline


def polygon(mask: np.ndarray) -> shapely.Polygon:
    rings = outline(mask)
    points, offsets = drop_collinear(
        np.concatenate([r for r, _ in rings]), np.concatenate([[0], np.cumsum([len(r) for r, _ in rings])])
    )
    parts = [points[a:b] / 2 for a, b in itertools.pairwise(offsets)]
    return shapely.Polygon(parts[0], parts[1:])


def blob(seed: int, size: int = 24) -> np.ndarray:
    """A random 4-connected region."""
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(size, size)), 1.5)
    labels, _ = ndimage.label(noise > 0)
    counts = np.bincount(labels.ravel())
    counts[0] = 0
    mask = labels == counts.argmax()
    rows, columns = np.nonzero(mask)
    return mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]


@settings(deadline=None)
@given(st.integers(0, 2**31))
def test_area_and_place(seed: int) -> None:
    mask = blob(seed)
    shape = polygon(mask)
    assert shape.is_valid
    # Half a pixel less for the shell, half a pixel more of hole for each hole.
    loops = 1 + len(shape.interiors)
    assert abs(shape.area - mask.sum()) <= 0.5 * loops + 0.25 * mask.sum()
    ys, xs = np.nonzero(np.ones_like(mask))
    inside = shapely.contains_xy(shape, xs + 0.5, ys + 0.5).reshape(mask.shape)
    np.testing.assert_array_equal(inside, mask)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 7), (7, 1), (4, 5)])
def test_rectangles(height: int, width: int) -> None:
    shape = polygon(np.ones((height, width), bool))
    assert shape.area == height * width - 0.5
    assert shape.bounds == (0, 0, width, height)
    assert len(shape.exterior.coords) <= 9


def test_hole_is_kept() -> None:
    mask = np.ones((7, 7), bool)
    mask[2:5, 2:5] = False
    shape = polygon(mask)
    assert len(shape.interiors) == 1
    assert not shape.contains(shapely.Point(3.5, 3.5))


@given(st.integers(0, 2**31))
def test_runs_are_the_mask(seed: int) -> None:
    mask = blob(seed)
    again = np.zeros_like(mask)
    for row, start, end in mask_runs(mask):
        assert not again[row, start:end].any()
        again[row, start:end] = True
    np.testing.assert_array_equal(again, mask)


def test_drop_collinear_without_points() -> None:
    points, offsets = drop_collinear(np.zeros((0, 2), int), np.zeros(1, int))
    assert len(points) == 0
    assert offsets.tolist() == [0]
