"""Outlines of instances."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import shapely
import shapely.affinity
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from pipeline.kernels.contours import centroids, drop_collinear, outlines, pixel_runs, polygon_wkb, wkb_rings
from pipeline.testing import pixels_of


def polygons(labels: np.ndarray) -> np.ndarray:
    shapes = outlines(*pixel_runs(pixels_of(labels)))
    data, offsets = polygon_wkb(replace(shapes, points=shapes.points / 2))
    return shapely.from_wkb([data[a:b].tobytes() for a, b in itertools.pairwise(offsets)])


def polygon(mask: np.ndarray) -> shapely.Polygon:
    return polygons(mask.astype(np.int32))[0]


def blob(seed: int, size: int = 24) -> np.ndarray:
    """A random 4-connected region."""
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(size, size)), 1.5)
    labels, _ = ndimage.label(noise > 0)
    counts = np.bincount(labels.ravel())
    counts[0] = 0
    mask = labels == counts.argmax()
    rows, columns = np.nonzero(mask)
    return mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]


@settings(deadline=None, max_examples=30)
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


def test_rings_turn_as_documented() -> None:
    for seed in range(9):
        shape = polygon(blob(seed))
        assert not shape.exterior.is_ccw
        assert all(ring.is_ccw for ring in shape.interiors)


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


def touching(seed: int) -> np.ndarray:
    """A field of 4-connected regions that touch each other, some with holes that hold others."""
    random = np.random.default_rng(seed)
    noise = ndimage.gaussian_filter(random.normal(size=(random.integers(1, 32), random.integers(1, 32))), 1.2)
    levels = np.digitize(noise, np.quantile(noise, [0.3, 0.5, 0.8]))
    labels, count = np.zeros(noise.shape, np.int32), 0
    for level in range(1, 4):
        parts, found = ndimage.label(levels == level)
        labels[parts > 0] = parts[parts > 0] + count
        count += found
    return labels


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31))
def test_many_at_once_are_each_alone(seed: int) -> None:
    labels = touching(seed)
    found = polygons(labels)
    assert len(found) == labels.max()
    assert shapely.is_valid(found).all()
    for label, shape in enumerate(found, start=1):
        rows, columns = np.nonzero(labels == label)
        top, left = rows.min(), columns.min()
        mask = labels[top : rows.max() + 1, left : columns.max() + 1] == label
        assert shapely.to_wkb(shapely.affinity.translate(polygon(mask), left, top)) == shapely.to_wkb(shape)
        assert shapely.contains_xy(shape, columns + 0.5, rows + 0.5).all()
    # Outlines of neighbours cut corners, so no two of them overlap.
    tree = shapely.STRtree(found)
    for a, b in tree.query(found, "overlaps").T:
        assert found[a].intersection(found[b]).area == 0


def test_pixels_that_touch_at_a_corner_are_joined() -> None:
    shape = polygon(np.eye(3, dtype=bool))
    assert shape.is_valid
    assert shape.area == 3 * 0.5 + 2 * 0.5


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31))
def test_runs_are_the_labels(seed: int) -> None:
    labels = touching(seed)
    runs, starts = pixel_runs(pixels_of(labels))
    again = np.zeros_like(labels)
    for label, (a, b) in enumerate(itertools.pairwise(starts), start=1):
        for row, start, end in runs[a:b]:
            assert not again[row, start:end].any()
            again[row, start:end] = label
        assert (np.diff(runs[a:b, 0].astype(np.int64) * 100 + runs[a:b, 1]) > 0).all()
    np.testing.assert_array_equal(again, labels)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31))
def test_wkb_and_centres_are_those_of_geos(seed: int) -> None:
    shapes = outlines(*pixel_runs(pixels_of(touching(seed))))
    shapes = replace(shapes, points=shapes.points * np.array([0.51, 0.49]) + 70_000)
    rings = shapely.linearrings(
        shapes.points, indices=np.repeat(np.arange(len(shapes.rings) - 1), np.diff(shapes.rings))
    )
    expected = shapely.polygons(rings, indices=np.repeat(np.arange(len(shapes.polygons) - 1), np.diff(shapes.polygons)))
    data, offsets = polygon_wkb(shapes)
    assert [data[a:b].tobytes() for a, b in itertools.pairwise(offsets)] == list(shapely.to_wkb(expected))
    np.testing.assert_allclose(centroids(shapes), shapely.get_coordinates(shapely.centroid(expected)), atol=1e-6)
    points, starts, owners = wkb_rings(data, offsets)
    _, coordinates, (ring_starts, shape_starts) = shapely.to_ragged_array(expected)
    np.testing.assert_array_equal(points, coordinates)
    np.testing.assert_array_equal(starts, ring_starts)
    np.testing.assert_array_equal(owners, shape_starts)


@pytest.mark.parametrize("shape", [shapely.Point(1, 2), shapely.Polygon([(0, 0, 1), (1, 0, 1), (1, 1, 1)])])
def test_other_wkb_is_refused(shape: shapely.Geometry) -> None:
    data = np.frombuffer(shapely.to_wkb(shape), np.uint8)
    with pytest.raises(ValueError, match="polygons of two dimensions"):
        wkb_rings(data, np.array([0, len(data)]))


def test_no_pixels() -> None:
    runs, starts = pixel_runs(pixels_of(np.zeros((4, 4), np.int32)))
    assert runs.shape == (0, 3)
    shapes = outlines(runs, starts)
    data, offsets = polygon_wkb(shapes)
    assert (len(data), offsets.tolist(), centroids(shapes).shape) == (0, [0], (0, 2))


def test_drop_collinear_without_points() -> None:
    points, offsets = drop_collinear(np.zeros((0, 2), int), np.zeros(1, int))
    assert len(points) == 0
    assert offsets.tolist() == [0]
