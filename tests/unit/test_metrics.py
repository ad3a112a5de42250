from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pipeline.evaluation.metrics import METRICS, Overlaps, score, score_overlaps

LABELS = arrays(np.int32, (9, 11), elements=st.integers(0, 5))


def reference_aji(truth: np.ndarray, pred: np.ndarray) -> float:
    """AJI by its definition, one truth at a time."""
    inter = union = 0
    used = set()
    for t in np.unique(truth[truth > 0]):
        mask = truth == t
        candidates = np.unique(pred[mask & (pred > 0)])
        if not len(candidates):
            union += mask.sum()
            continue
        first = {p: np.flatnonzero(pred.ravel() == p)[0] for p in candidates}
        iou = {p: (mask & (pred == p)).sum() / (mask | (pred == p)).sum() for p in candidates}
        best = max(candidates, key=lambda p: (iou[p], -first[p]))
        inter += (mask & (pred == best)).sum()
        union += (mask | (pred == best)).sum()
        used.add(best)
    union += sum((pred == p).sum() for p in np.unique(pred[pred > 0]) if p not in used)
    return inter / union


def boxes(*spans: tuple[int, int], width: int = 40) -> np.ndarray:
    """One row of instances, each from a to b."""
    labels = np.zeros((1, width), np.int64)
    for label, (a, b) in enumerate(spans, 1):
        labels[0, a:b] = label
    return labels


def test_two_truths_under_one_prediction() -> None:
    result = score(boxes((0, 10), (10, 16)), boxes((0, 16)))
    # Both truths take the one prediction: (10 + 6) / (16 + 16); one to one: 10 / (16 + 6).
    assert result["aji"] == pytest.approx(16 / 32)
    assert result["aji_plus"] == pytest.approx(10 / 22)
    assert result["dice"] == result["iou"] == 1
    assert result["pq"] == pytest.approx(10 / 16 * 2 / 3)
    assert (result["tp"], result["fp"], result["fn"]) == (1, 0, 1)


def test_one_truth_split_in_halves_counts_once() -> None:
    result = score(boxes((0, 10)), boxes((0, 5), (5, 10)))
    assert result["f1"] == pytest.approx(2 / 3)
    assert (result["tp"], result["fp"], result["fn"]) == (1, 1, 0)
    assert result["dq"] == result["pq"] == result["sq"] == 0
    assert result["aji"] == pytest.approx(5 / 15)


def test_known_case() -> None:
    # IoU 8/12, a miss, a false alarm.
    result = score(boxes((0, 10), (20, 25)), boxes((2, 12), (30, 33)))
    assert result["aji"] == result["aji_plus"] == pytest.approx(8 / (12 + 5 + 3))
    assert result["sq"] == pytest.approx(8 / 12)
    assert result["dq"] == result["f1"] == 0.5
    assert result["pq"] == pytest.approx(8 / 12 / 2)
    assert result["dice"] == pytest.approx(16 / 28)
    assert result["iou"] == pytest.approx(8 / 20)


def test_hungarian_matching_beats_greed() -> None:
    truth = np.array([[1] * 6 + [2] * 10], int)
    pred = np.array([[1] * 4 + [2] * 9 + [0] * 3], int)
    result = score(truth, pred)
    # Pairs (1,1): 4/6, (2,2): 7/12, (1,2): 2/13.
    assert result["aji_plus"] == pytest.approx(11 / 18)


def test_empty_maps() -> None:
    empty, some = np.zeros((4, 4), int), np.eye(4, dtype=int)
    assert all(score(empty, empty)[name] == 1.0 for name in METRICS)
    assert all(score(some, empty)[name] == 0.0 for name in METRICS)
    assert all(score(empty, some)[name] == 0.0 for name in METRICS)
    assert score(some, empty)["fn"] == 1
    assert score(empty, some)["fp"] == 1


def test_refuses_what_is_no_pair_of_label_maps() -> None:
    with pytest.raises(ValueError, match="shape"):
        score(np.zeros((2, 2), int), np.zeros((2, 3), int))
    with pytest.raises(ValueError, match="integers"):
        score(np.zeros((2, 2)), np.zeros((2, 2)))
    with pytest.raises(ValueError, match="negative"):
        score(np.full((2, 2), -1), np.zeros((2, 2), int))


@settings(deadline=None)
@given(LABELS, LABELS)
def test_orders_of_scores(truth: np.ndarray, pred: np.ndarray) -> None:
    result = score(truth, pred)
    assert all(0 <= result[name] <= 1 for name in METRICS)
    assert result["aji"] <= result["iou"] + 1e-12
    assert result["aji_plus"] <= result["iou"] + 1e-12
    assert result["iou"] <= result["dice"] + 1e-12
    assert result["dq"] <= result["f1"]
    back = score(pred, truth)
    assert [result[name] for name in ("dice", "iou", "pq", "f1")] == pytest.approx(
        [back[name] for name in ("dice", "iou", "pq", "f1")]
    )
    assert result["tp"] + result["fn"] == result["n_truth"]
    assert result["tp"] + result["fp"] == result["n_pred"]


@settings(deadline=None)
@given(LABELS, LABELS)
def test_aji_agrees_with_its_definition(truth: np.ndarray, pred: np.ndarray) -> None:
    if truth.any() and pred.any():
        assert score(truth, pred)["aji"] == pytest.approx(reference_aji(truth, pred))


@settings(deadline=None)
@given(LABELS, LABELS, st.permutations(range(1, 6)), st.sampled_from([1, 1000, 2**31]))
def test_labels_are_names_only(truth: np.ndarray, pred: np.ndarray, order: list[int], factor: int) -> None:
    names = np.array([0, *order], np.int64) * factor
    assert score(names[truth], pred) == score(truth, pred)
    assert score(truth, names[pred]) == score(truth, pred)


@settings(deadline=None)
@given(LABELS)
def test_perfect(labels: np.ndarray) -> None:
    result = score(labels, labels)
    assert all(result[name] == 1.0 for name in METRICS)
    assert result["fp"] == result["fn"] == 0


@settings(deadline=None)
@given(LABELS, LABELS, st.lists(st.integers(0, 9), max_size=4))
def test_bands_change_nothing(truth: np.ndarray, pred: np.ndarray, cuts: list[int]) -> None:
    rows = [0, *sorted(cuts), len(truth)]
    bands = [(truth[a:b], pred[a:b]) for a, b in itertools.pairwise(rows)]
    assert score_overlaps(Overlaps.of_bands(bands)) == score(truth, pred)
