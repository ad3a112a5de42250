"""Random nuclei: what holds for every label map of them."""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.kernels.random_nuclei import (
    MIN_PIXELS,
    SPACING,
    drawn_nucleus,
    mask_picture,
    nucleus_shapes,
    paint_nucleus,
    random_nuclei,
    turned_nucleus,
)

SHAPES = [cv2.circle(np.zeros((31, 31), np.uint8), (15, 15), r, 1, -1).astype(bool) for r in (7, 12)]


def parts(mask: np.ndarray) -> int:
    """4-connected parts."""
    return cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)[0] - 1


@settings(max_examples=12)
@given(
    seed=st.integers(0, 2**32),
    shape=st.tuples(st.integers(32, 160), st.integers(32, 160)),
    count=st.integers(1, 60),
    radius=st.tuples(st.floats(3, 8), st.floats(8, 20)),
    share=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_nuclei_are_whole_and_apart(
    seed: int, shape: tuple[int, int], count: int, radius: tuple[float, float], share: float
) -> None:
    def made() -> np.ndarray:
        return random_nuclei(shape, np.random.default_rng(seed), count=count, radius=radius, known=SHAPES, share=share)

    labels = made()
    assert labels.shape == shape
    assert labels.dtype == np.int32
    areas = np.bincount(labels.ravel())[1:]
    assert len(areas) <= count
    assert (areas >= MIN_PIXELS).all()  # numbered without gaps
    assert all(parts(labels == label) == 1 for label in range(1, len(areas) + 1))
    largest = max(1.25 * radius[1], 1.2 * 12) if share else 1.25 * radius[1]
    assert areas.max(initial=0) <= math.pi * (largest + 1) ** 2
    assert parts(mask_picture(labels) == 0) >= len(areas)
    np.testing.assert_array_equal(labels, made())
    if not share and len(areas) > 1:
        other = random_nuclei(shape, np.random.default_rng(seed + 1), count=count, radius=radius)
        assert (other != labels).any()


def test_as_many_as_are_asked_for_where_there_is_room() -> None:
    labels = random_nuclei((256, 256), np.random.default_rng(0), count=30, radius=(8, 12))
    assert labels.max() == 30
    middles = np.array([np.argwhere(labels == label).mean(axis=0) for label in range(1, 31)])
    apart = np.linalg.norm(middles[:, None] - middles[None], axis=2)[np.triu_indices(30, 1)]
    assert apart.min() > SPACING * 8  # not one on top of another


def test_drawn_nuclei() -> None:
    rng = np.random.default_rng(0)
    for radius in (5.0, 12.0, 20.0):
        areas = np.array([drawn_nucleus(radius, rng).sum() for _ in range(50)]) / (math.pi * radius**2)
        assert 0.9 < areas.mean() < 1.15
        assert areas.std() > 0.01  # no two are the same
    mask = drawn_nucleus(12.0, rng)
    assert parts(mask) == parts(~mask) == 1
    assert not mask[[0, -1]].any()


def test_turned_nuclei_keep_their_shape() -> None:
    rng = np.random.default_rng(0)
    bar = np.ones((5, 20), bool)
    for _ in range(20):
        mask = turned_nucleus(bar, rng)
        assert 0.8**2 * 100 * 0.85 < mask.sum() < 1.2**2 * 100 * 1.15
        assert parts(mask) == 1
        (_, sides, _) = cv2.minAreaRect(np.argwhere(mask).astype(np.float32))
        assert 2.5 < (max(sides) + 1) / (min(sides) + 1) < 6
        assert abs(np.argwhere(mask).mean(axis=0) - mask.shape[0] // 2).max() < 1


def test_no_nucleus_on_top_of_another() -> None:
    labels = np.zeros((40, 40), np.int32)
    square = np.ones((11, 11), bool)
    assert paint_nucleus(labels, square, (10, 10), 0.1)
    before = labels.copy()
    assert not paint_nucleus(labels, square, (10, 19), 0.1)  # two columns of eleven are taken
    np.testing.assert_array_equal(labels, before)
    assert paint_nucleus(labels, square, (10, 20), 0.1)  # one column is
    assert (labels == 1).sum() == 121
    assert (labels == 2).sum() == 110
    assert paint_nucleus(labels, square, (39, 39), 0.1)  # a corner of it is in the map
    assert (labels == 3).sum() == 36
    ring = np.pad(np.zeros((9, 9), bool), 1, constant_values=True)
    cut = np.zeros((11, 11), np.int32)
    cut[5] = 1  # taken are two pixels alone, but there would be two parts
    assert not paint_nucleus(cut, ring, (5, 5), 0.1)


def test_shapes_of_known_nuclei() -> None:
    labels = np.zeros((40, 40), np.int32)
    labels[0:10, 10:20] = 1  # at the edge
    labels[20:28, 10:20] = 2
    labels[30:32, 30:32] = 4  # too small
    labels[22:26, 20:30] = 7
    assert [shape.shape for shape in nucleus_shapes(labels)] == [(8, 10), (4, 10)]


@pytest.mark.parametrize("axis", [0, 1])
def test_a_line_between_nuclei_that_touch(axis: int) -> None:
    labels = np.zeros((12, 12), np.int32)
    labels[2:6, 3:9], labels[6:10, 3:9] = 1, 2
    picture = mask_picture(labels if axis == 0 else labels.T)
    assert set(np.unique(picture)) == {0, 255}
    assert parts(picture == 0) == 2
    assert (picture == 0).sum() == 48 - 6
    assert (picture[0] == 255).all()  # nuclei are dark, as in H&E
