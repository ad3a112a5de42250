from __future__ import annotations

import itertools
import time
import tracemalloc
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import linear_sum_assignment

from pipeline.evaluation import metrics
from pipeline.evaluation.metrics import (
    METRICS,
    Overlaps,
    class_counts,
    class_scores,
    r_squared,
    score,
    score_overlaps,
)

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


def reference_scores(truth: np.ndarray, pred: np.ndarray) -> dict[str, float]:
    """All scores but AJI by their definitions, from sets of pixels; matchings by trying every one."""
    truths = [set(np.flatnonzero(truth == t).tolist()) for t in np.unique(truth[truth > 0])]
    preds = [set(np.flatnonzero(pred == p).tolist()) for p in np.unique(pred[pred > 0])]

    def iou(t: set[int], p: set[int]) -> float:
        return len(t & p) / len(t | p)

    def plus(pairs: list[tuple[int, int]]) -> float:
        union = sum(len(truths[t] | preds[p]) for t, p in pairs)
        union += sum(len(truths[t]) for t in range(len(truths)) if t not in {t for t, _ in pairs})
        union += sum(len(preds[p]) for p in range(len(preds)) if p not in {p for _, p in pairs})
        return sum(len(truths[t] & preds[p]) for t, p in pairs) / union

    slots = [*range(len(preds)), *[None] * len(truths)]
    matchings = {
        tuple((t, p) for t, p in enumerate(order) if p is not None and truths[t] & preds[p])
        for order in itertools.permutations(slots, len(truths))
    }
    best = max(sum(iou(truths[t], preds[p]) for t, p in pairs) for pairs in matchings)
    over = [iou(t, p) for t in truths for p in preds if iou(t, p) > 0.5]
    half = max(sum(iou(truths[t], preds[p]) >= 0.5 for t, p in pairs) for pairs in matchings)
    dq = len(over) / (len(over) + (len(preds) - len(over)) / 2 + (len(truths) - len(over)) / 2)
    sq = sum(over) / len(over) if over else 0.0
    a, b = set().union(*truths), set().union(*preds)
    return {
        "aji_plus": [plus(list(m)) for m in matchings if sum(iou(truths[t], preds[p]) for t, p in m) > best - 1e-9],
        "pq": sq * dq,
        "sq": sq,
        "dq": dq,
        "dice": 2 * len(a & b) / (len(a) + len(b)),
        "iou": len(a & b) / len(a | b),
        "f1": half / (half + (len(preds) - half) / 2 + (len(truths) - half) / 2),
    }  # type: ignore[dict-item]


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


@settings(deadline=None, max_examples=150)
@given(arrays(np.int32, (5, 6), elements=st.integers(0, 4)), arrays(np.int32, (5, 6), elements=st.integers(0, 4)))
def test_scores_agree_with_their_definitions(truth: np.ndarray, pred: np.ndarray) -> None:
    if truth.any() and pred.any():
        result, expected = score(truth, pred), reference_scores(truth, pred)
        # Of several best matchings any one will do.
        assert any(result["aji_plus"] == pytest.approx(value) for value in expected.pop("aji_plus"))  # type: ignore[attr-defined]
        assert {name: result[name] for name in expected} == pytest.approx(expected)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 4, 50, 4096]), st.integers(2, 60))
def test_matching_in_groups_is_the_best(seed: int, at_once: int, count: int) -> None:
    # Chains of neighbours that overlap, with gaps between them: groups of all sizes.
    rng = np.random.default_rng(seed)
    truth, pred = np.zeros((2, 1, 40 * count), np.int32)
    for labels in (truth, pred):
        ends = np.sort(rng.choice(labels.size, 2 * count, replace=False))
        for label, (start, end) in enumerate(itertools.pairwise(ends), 1):
            labels[0, start:end] = label * (rng.random() < 0.7)
    table = Overlaps.of_bands([(truth, pred)])
    with mock.patch.object(metrics, "MATCHED_PAIRS", at_once):
        pairs = metrics._one_to_one(table)
    dense = np.zeros((len(table.truth_area), len(table.pred_area)))
    dense[table.truth_index, table.pred_index] = table.iou
    best = dense[linear_sum_assignment(dense, maximize=True)].sum()
    assert table.iou[pairs].sum() == pytest.approx(best)
    for index in (table.truth_index[pairs], table.pred_index[pairs]):
        assert len(set(index)) == len(index)


def crowd(shift: int, seed: int = 0) -> np.ndarray:
    """A field of 1000 x 1000 pixels with 800 nuclei."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[-9:10, -9:10]
    labels = np.zeros((1020, 1020), np.int32)
    places = rng.permutation(np.stack(np.mgrid[10:990:33, 10:990:33], axis=-1).reshape(-1, 2))[:800]
    for label, (row, column) in enumerate(places, 1):
        radius = rng.integers(5, 9)
        window = labels[row + shift : row + shift + 19, column : column + 19]
        window[x**2 + y**2 <= radius**2] = label
    return labels[:1000, :1000]


def test_a_dense_field_is_fast_and_right() -> None:
    truth, pred = crowd(0), crowd(2)
    assert len(np.unique(truth)) == 801
    start = time.process_time()
    result = score(truth, pred)
    assert time.process_time() - start < 2  # some 30 ms on an idle core
    assert result["aji"] == pytest.approx(reference_aji(truth[:200, :200], pred[:200, :200]), abs=0.05)
    assert result["aji"] == pytest.approx(result["aji_plus"])
    assert result["tp"] == 800


def test_memory_grows_with_the_overlaps() -> None:
    rows, columns = np.mgrid[:600, :600] // 10
    truth = rows * 60 + columns + 1
    pred = np.roll(truth, (3, 4), (0, 1))  # every nucleus touches four others: one component
    tracemalloc.start()
    result = score(truth, pred)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert result["aji_plus"] == pytest.approx(result["aji"], abs=0.05)
    assert peak < 60e6  # tables of 3,600 by 3,600 would be 200 MB


def test_nothing_matches() -> None:
    far = score(boxes((0, 5), (10, 15)), boxes((20, 25), (30, 35), (36, 39)))
    assert all(far[name] == 0 for name in METRICS)
    assert (far["tp"], far["fp"], far["fn"]) == (0, 3, 2)
    # They meet, but nowhere by half.
    near = score(boxes((0, 10), (20, 30)), boxes((7, 17), (27, 37)))
    assert near["pq"] == near["sq"] == near["dq"] == near["f1"] == 0
    assert near["aji"] == near["iou"] == pytest.approx(6 / 34)


NAMES = ("a", "b", "c")
KINDS = st.lists(st.integers(0, 3), min_size=5, max_size=5)
CLASSED = st.lists(st.tuples(LABELS, LABELS, KINDS, KINDS), min_size=1, max_size=4)
Classed = list[tuple[np.ndarray, np.ndarray, list[int], list[int]]]


def counts_of(images: Classed) -> list[dict[str, Any]]:
    found = []
    for truth, pred, truth_kinds, pred_kinds in images:
        overlaps = Overlaps.of(truth, pred)
        kinds = [np.array([0, *k])[i] for k, i in ((truth_kinds, overlaps.truth_ids), (pred_kinds, overlaps.pred_ids))]
        found.append(class_counts(overlaps, *kinds, NAMES))
    return found


def reference_classes(images: Classed) -> dict[str, Any]:
    """Scores of classes by CoNIC's definition: each class alone, in masks of it, images summed before dividing."""
    result: dict[str, Any] = {"pq": [], "r2": [], "f1": []}
    for kind in (1, 2, 3):
        tp, fp, fn, total = 0, 0, 0, 0.0
        pairs: list[tuple[int, int]] = []
        for truth, pred, truth_kinds, pred_kinds in images:
            truths = {i: truth == i for i in np.unique(truth[truth > 0])}
            preds = {i: pred == i for i in np.unique(pred[pred > 0])}
            iou = {(i, j): (t & p).sum() / (t | p).sum() for i, t in truths.items() for j, p in preds.items()}
            unsure = {j for (i, j), v in iou.items() if v > 0.5 and not truth_kinds[i - 1]}
            own = [i for i in truths if truth_kinds[i - 1] == kind]
            found = [j for j in preds if pred_kinds[j - 1] == kind and j not in unsure]
            over = [iou[i, j] for i in own for j in found if iou[i, j] > 0.5]
            tp, fp, fn = tp + len(over), fp + len(found) - len(over), fn + len(own) - len(over)
            total += sum(over)
            pairs.append((len(own), len(found)))
        some = tp + fp + fn > 0
        dq, sq = (tp / (tp + fp / 2 + fn / 2) if some else None), (total / tp if tp else 0.0)
        result["f1"].append(dq)
        result["pq"].append(dq * sq if dq is not None else None)
        mean = sum(n for n, _ in pairs) / len(pairs)
        square, error = sum((n - mean) ** 2 for n, _ in pairs), sum((n - m) ** 2 for n, m in pairs)
        result["r2"].append(None if len(pairs) < 2 else 1 - error / square if square > 1e-9 else float(error == 0))
        result.setdefault("known", []).append(tp + fn > 0)
    return result


@settings(deadline=None)
@given(CLASSED)
def test_classes_agree_with_their_definition(images: Classed) -> None:
    result, expected = class_scores(counts_of(images)), reference_classes(images)
    for key in ("pq", "f1", "r2"):
        assert [result["classes"][name][key] for name in NAMES] == [
            None if value is None else pytest.approx(value) for value in expected[key]
        ]
    for key, mean in (("pq", "mpq_plus"), ("r2", "r2")):
        known = [v for v, there in zip(expected[key], expected["known"], strict=True) if there and v is not None]
        assert result[mean] == (pytest.approx(sum(known) / len(known)) if known else None)


@settings(deadline=None)
@given(CLASSED, st.permutations(range(1, 4)))
def test_names_of_classes_and_order_of_images_change_nothing(images: Classed, order: list[int]) -> None:
    table = [0, *order]
    renamed = [(t, p, [table[k] for k in a], [table[k] for k in b]) for t, p, a, b in images]
    one, two = class_scores(counts_of(images)), class_scores(counts_of(renamed[::-1]))
    for key in ("accuracy", "matched", "mpq_plus", "r2"):
        assert one[key] == (None if two[key] is None else pytest.approx(two[key]))


@settings(deadline=None)
@given(LABELS, LABELS)
def test_a_single_class_scores_as_no_classes(truth: np.ndarray, pred: np.ndarray) -> None:
    result, plain = class_scores(counts_of([(truth, pred, [1] * 5, [1] * 5)])), score(truth, pred)
    assert (result["classes"]["a"]["n_truth"], result["classes"]["a"]["n_pred"]) == (plain["n_truth"], plain["n_pred"])
    if truth.any():
        assert result["mpq_plus"] == result["classes"]["a"]["pq"] == pytest.approx(plain["pq"])
        assert result["classes"]["a"]["f1"] == pytest.approx(plain["dq"])
        assert result["r2"] is None  # of one image


@settings(deadline=None)
@given(st.lists(st.tuples(LABELS, KINDS), min_size=2, max_size=3))
def test_perfect_classes(images: list[tuple[np.ndarray, list[int]]]) -> None:
    result = class_scores(counts_of([(labels, labels, kinds, kinds) for labels, kinds in images]))
    some = any(row["n_truth"] for row in result["classes"].values())
    assert {result[key] for key in ("accuracy", "mpq_plus", "r2")} == ({1.0} if some else {None})


def test_known_classes() -> None:
    # First image: a found (IoU 8/12), a found as b, b missed. Second: b found (IoU 1), c made up.
    images: Classed = [
        (boxes((0, 10), (14, 20), (24, 28)), boxes((2, 12), (14, 20)), [1, 1, 2], [1, 2]),
        (boxes((0, 10)), boxes((0, 10), (20, 24)), [2], [2, 3]),
    ]
    counts = counts_of(images)
    assert counts[0] == {
        "right": 1, "matched": 2, "classes": {"a": (1, 2, 1, 8 / 12), "b": (0, 1, 1, 0.0), "c": (0, 0, 0, 0.0)},
    }  # fmt: skip
    result = class_scores(counts)
    classes = result["classes"]
    assert classes["a"]["pq"] == pytest.approx(8 / 12 / (1 + 1 / 2))
    assert classes["b"]["pq"] == pytest.approx(1 / (1 + 1 / 2 + 1 / 2))  # a mean of the images' would be 1/2 * (0 + 1)
    assert (classes["a"]["sq"], classes["b"]["sq"]) == (pytest.approx(8 / 12), 1)
    assert (classes["c"]["pq"], classes["c"]["n_pred"]) == (0, 1)  # no truth anywhere: in no mean
    assert result["mpq_plus"] == pytest.approx((8 / 18 + 1 / 2) / 2)
    assert result["accuracy"] == pytest.approx(2 / 3)
    # a: 2 and 0 known, 1 and 0 found: 1 - 1/2; b: 1 and 1 known, both found.
    assert (classes["a"]["r2"], classes["b"]["r2"], result["r2"]) == (0.5, 1.0, 0.75)


def test_truths_of_unknown_class_are_left_out() -> None:
    [counts] = counts_of([(boxes((0, 10), (20, 25)), boxes((0, 10), (20, 25), (30, 33)), [0, 1], [1, 0, 1])])
    # The first is neither right nor wrong; the second was given no class; the third is made up.
    assert counts == {
        "right": 0, "matched": 1, "classes": {"a": (0, 1, 1, 0.0), "b": (0, 0, 0, 0.0), "c": (0, 0, 0, 0.0)},
    }  # fmt: skip
    assert class_scores([counts])["classes"]["b"]["pq"] is None


def test_coefficient_of_determination() -> None:
    assert r_squared([1, 2, 3], [1, 2, 3]) == 1
    assert r_squared([1, 2, 3], [2, 2, 2]) == 0
    assert r_squared([1, 2, 3], [3, 2, 1]) == -3
    assert (r_squared([4, 4], [4, 4]), r_squared([4, 4], [4, 5])) == (1, 0)
    assert r_squared([4], [4]) is None
