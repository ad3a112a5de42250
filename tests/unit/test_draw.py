"""Instances drawn as maps: found again, once, whatever the windows."""

from __future__ import annotations

import itertools

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.evaluation.metrics import score
from pipeline.kernels.blend import Blender, PatchGrid
from pipeline.kernels.draw import LEVELS, Detections, depth_map, draw_instances, paste_mask
from pipeline.kernels.instances import InstanceRules, segment
from pipeline.slides.synthetic import make_field

RULES = InstanceRules(min_area=12)


def detections(labels: np.ndarray, x: int = 0, y: int = 0, side: int = 28) -> Detections:
    """What a perfect network would say of a label map that lies at (x, y) of a larger one."""
    boxes, masks, scores = [], [], []
    for label in np.unique(labels[labels > 0]):
        rows, columns = np.nonzero(labels == label)
        left, top, right, bottom = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
        inside = (labels[top:bottom, left:right] == label).astype(np.float32)
        boxes.append([left, top, right, bottom])
        masks.append(cv2.resize(inside, (side, side), interpolation=cv2.INTER_LINEAR))
        scores.append(0.6 + 0.4 * ((label * 37) % 101) / 101)
    return Detections(
        np.array(boxes, float).reshape(-1, 4), np.array(scores), np.array(masks, np.float32).reshape(-1, side, side)
    )


def test_masks_are_pasted_where_their_boxes_are() -> None:
    full = np.ones((28, 28), np.float32)
    inside, top, left = paste_mask(full, np.array([3.0, 5.0, 13.0, 12.0]), (40, 40), 0.5)
    assert (top, left, inside.shape) == (5, 3, (7, 10))
    assert inside.all()
    half = full.copy()
    half[:, 14:] = 0
    inside, _, _ = paste_mask(half, np.array([0.0, 0.0, 20.0, 10.0]), (40, 40), 0.5)
    np.testing.assert_array_equal(inside, np.arange(20)[None].repeat(10, 0) < 10)
    # What is outside the window is cut off, and the rest stays where it is.
    inside, top, left = paste_mask(half, np.array([-10.0, 34.0, 10.0, 44.0]), (40, 40), 0.5)
    assert (top, left, inside.shape) == (34, 0, (6, 10))
    assert not inside.any()
    for box in ([50.0, 0.0, 60.0, 10.0], [5.0, 5.0, 5.0, 9.0], [-9.0, -9.0, -1.0, -1.0]):
        assert paste_mask(full, np.array(box), (40, 40), 0.5)[0].size == 0


@given(st.integers(0, 2**32 - 1), st.integers(2, 5))
def test_depth_has_one_peak(seed: int, lobes: int) -> None:
    rng = np.random.default_rng(seed)
    canvas = np.zeros((60, 60), np.uint8)
    points = rng.integers(10, 50, (lobes, 2))
    for point in points:
        cv2.circle(canvas, tuple(map(int, point)), int(rng.integers(2, 9)), 1, -1)
    for a, b in itertools.pairwise(points):
        cv2.line(canvas, tuple(map(int, a)), tuple(map(int, b)), 1, 1)
    values = depth_map(canvas > 0)
    np.testing.assert_array_equal(values > 0, canvas > 0)
    assert values.max() == 255
    for level in LEVELS:
        count, _ = cv2.connectedComponents((values >= level).astype(np.uint8), connectivity=8)
        assert count == 2, level


def crowded(seed: int, side: int = 256) -> np.ndarray:
    """A label map of nuclei that touch and cover each other."""
    rng = np.random.default_rng(seed)
    labels = np.zeros((side, side), np.int32)
    for label in range(1, 151):
        mask = np.zeros((side, side), np.uint8)
        centre, axes = rng.integers(15, side - 15, 2), rng.integers(6, 12, 2)
        cv2.ellipse(mask, tuple(map(int, centre)), tuple(map(int, axes)), rng.uniform(0, 180), 0, 360, 1, -1)
        free = (mask > 0) & (labels == 0)
        if free.sum() > 0.8 * mask.sum():
            labels[free] = label
    return labels


@pytest.mark.parametrize("seed", [0, 1])
def test_drawn_nuclei_are_found_again(seed: int) -> None:
    _, apart = make_field(300, 260, 0.5, seed=seed)
    for labels, least in ((apart, 1.0), (crowded(seed), 0.99)):
        found = segment(draw_instances(detections(labels), labels.shape), RULES)
        assert found.max() == len(np.unique(labels)) - 1
        result = score(labels, found)
        assert result["aji"] >= least
        assert result["dq"] == 1


def test_the_threshold_of_the_nucleus_map_is_the_least_score() -> None:
    labels = np.zeros((60, 60), np.int32)
    labels[5:25, 5:25], labels[30:50, 30:50] = 1, 2
    found = detections(labels)
    maps = draw_instances(Detections(found.boxes, np.array([0.9, 0.4]), found.masks), (60, 60))
    assert set(np.unique(maps[0])) == {0, round(0.9 * 255), round(0.4 * 255)}
    assert segment(maps, InstanceRules(nucleus=128)).max() == 1
    assert segment(maps, InstanceRules(nucleus=90)).max() == 2


def test_a_second_view_of_a_nucleus_is_left_out() -> None:
    full = np.ones((3, 28, 28), np.float32)
    boxes = np.array([[10.0, 10, 30, 30], [12, 11, 31, 31], [26, 10, 46, 30]])
    maps = draw_instances(Detections(boxes, np.array([0.8, 0.9, 0.7]), full), (64, 64))
    # The better of the two views is drawn; the neighbour keeps what is left.
    assert set(np.unique(maps[0])) == {0, round(0.9 * 255), round(0.7 * 255)}
    assert (maps[0][11:31, 12:31] == round(0.9 * 255)).all()
    assert segment(maps, InstanceRules()).max() == 2


def test_equal_scores_keep_their_order() -> None:
    full = np.ones((2, 28, 28), np.float32)
    boxes = np.array([[10.0, 10, 30, 30], [25, 10, 45, 30]])
    maps = draw_instances(Detections(boxes, np.array([0.8, 0.8]), full), (64, 64))
    assert maps[1][20, 25:30].argmin() == 4  # the first one's border


@pytest.mark.parametrize(("patch", "overlap"), [(128, 64), (160, 48), (96, 48)])
def test_windows_draw_each_nucleus_once(patch: int, overlap: int) -> None:
    """A perfect network in overlapping windows gives what it gives of the whole."""
    labels = crowded(4)[:, :230]
    height, width = labels.shape
    whole = draw_instances(detections(labels), labels.shape)
    grid = PatchGrid(width, height, patch, overlap)
    wide = np.pad(labels, patch)
    blender = Blender(grid, largest=True)
    rows: list[list[np.ndarray]] = [[] for _ in range(grid.rows)]
    for row in range(grid.rows):
        for column in range(grid.columns):
            x, y = grid.origin(row, column)
            window = wide[y + patch : y + 2 * patch, x + patch : x + 2 * patch]
            drawn = draw_instances(detections(window), window.shape, margin=overlap // 2)
            rows[row].append(blender.add(row, column, drawn))
    maps = np.block(rows)[:, overlap : overlap + height, overlap : overlap + width]
    found, expected = (segment(m, RULES) for m in (maps, whole))
    assert found.max() == expected.max()
    assert score(expected, found)["aji"] > 0.97


def test_largest_does_not_depend_on_what_the_others_say() -> None:
    grid = PatchGrid(100, 40, 32, 8)
    rng = np.random.default_rng(0)
    windows = rng.integers(0, 256, (grid.rows, grid.columns, 1, 32, 32), np.uint8)
    expected = np.zeros((1, grid.rows * 24 + 8, grid.columns * 24 + 8), np.uint8)
    blender = Blender(grid, largest=True)
    rows: list[list[np.ndarray]] = [[] for _ in range(grid.rows)]
    for row in range(grid.rows):
        for column in range(grid.columns):
            part = expected[:, row * 24 : row * 24 + 32, column * 24 : column * 24 + 32]
            np.maximum(part, windows[row, column], out=part)
            rows[row].append(blender.add(row, column, windows[row, column]))
    np.testing.assert_array_equal(np.block(rows), expected[:, : grid.rows * 24, : grid.columns * 24])
