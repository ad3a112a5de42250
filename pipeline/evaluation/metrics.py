"""Agreement of two instance segmentations.

All scores are computed from one sparse table of overlaps: the number of pixels that each truth shares with each
prediction. A million-pixel field takes milliseconds, and a slide can be compared band by band.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

METRICS = ("aji", "aji_plus", "pq", "sq", "dq", "dice", "iou", "f1")
"""Names of the scores that `score` returns, all in 0..1."""

COUNTS = ("tp", "fp", "fn", "n_truth", "n_pred")
"""Names of the counts that `score` returns."""

MATCHED_PAIRS = 4096
"""Number of overlapping pairs that are matched at once, unless more are connected."""


@dataclass(frozen=True)
class Overlaps:
    """Sparse table of the overlaps of two label maps.

    Parameters
    ----------
    truth_area, pred_area : numpy.ndarray
        Area of each instance in pixels, int64, shapes ``(n_truth,)`` and ``(n_pred,)``. Instances are in the order of
        their first pixels.
    truth_index, pred_index, pixels : numpy.ndarray
        For each pair of a truth and a prediction that share pixels: the indices of both and the number of shared
        pixels, int64, shape ``(n_pairs,)``, sorted by truth, then by prediction.
    truth_ids, pred_ids : numpy.ndarray
        Label of each instance, int64.
    """

    truth_area: np.ndarray
    pred_area: np.ndarray
    truth_index: np.ndarray
    pred_index: np.ndarray
    pixels: np.ndarray
    truth_ids: np.ndarray
    pred_ids: np.ndarray

    @classmethod
    def of(cls, truth: np.ndarray, pred: np.ndarray) -> Overlaps:
        """Overlaps of two label maps of the same shape (non-negative integers, 0 is background)."""
        return cls.of_bands([(truth, pred)])

    @classmethod
    def of_bands(cls, bands: Iterable[tuple[np.ndarray, np.ndarray]]) -> Overlaps:
        """Overlaps of two label maps that are given in bands, from top to bottom.

        Parameters
        ----------
        bands : iterable of tuple of numpy.ndarray
            Truth and prediction of each band, of the same shape. A label is the same instance in all bands.

        Raises
        ------
        ValueError
            When the shapes differ or a map holds anything but non-negative integers.
        """
        areas: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
        labels: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
        pairs: list[np.ndarray] = []
        counts: list[np.ndarray] = []
        for truth, pred in bands:
            if truth.shape != pred.shape:
                raise ValueError(f"truth has shape {truth.shape}, prediction {pred.shape}")
            flats, tables = [], []
            for side, values in enumerate((truth, pred)):
                flat, found, area, table = _compact(values)
                flats.append(flat)
                tables.append(table)
                labels[side].append(found)
                areas[side].append(area)
            both = (flats[0] != 0) & (flats[1] != 0)
            n_pred = max(len(labels[1][-1]), 1)
            keys = tables[0][flats[0][both]] * n_pred + tables[1][flats[1][both]]
            keys, count = np.unique(keys, return_counts=True)
            pairs.append(np.stack([labels[0][-1][keys // n_pred], labels[1][-1][keys % n_pred]]))
            counts.append(count)
        truth_ids, truth_area = _first_seen(labels[0], areas[0])
        pred_ids, pred_area = _first_seen(labels[1], areas[1])
        pair = np.concatenate(pairs, axis=1) if pairs else np.empty((2, 0), np.int64)
        key = _positions(truth_ids, pair[0]) * max(len(pred_ids), 1) + _positions(pred_ids, pair[1])
        key, inverse = np.unique(key, return_inverse=True)
        count = np.concatenate(counts) if counts else np.empty(0, np.int64)
        pixels = np.zeros(len(key), np.int64)
        np.add.at(pixels, inverse, count)
        n_pred = max(len(pred_ids), 1)
        return cls(truth_area, pred_area, key // n_pred, key % n_pred, pixels, truth_ids, pred_ids)

    @property
    def union(self) -> np.ndarray:
        """Area of the union of each pair in pixels, int64."""
        return self.truth_area[self.truth_index] + self.pred_area[self.pred_index] - self.pixels

    @property
    def iou(self) -> np.ndarray:
        """Intersection over union of each pair, float64."""
        return self.pixels / self.union


def _compact(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """List the labels of a label map and their areas.

    Returns
    -------
    flat : numpy.ndarray
        The flattened map, renumbered if its labels are too large for lookup tables.
    ids, area : numpy.ndarray
        Original labels in the order of their first pixels, and the number of pixels of each, int64.
    table : numpy.ndarray
        Position in `ids` of each label of `flat`, int64.
    """
    flat = np.ascontiguousarray(labels).ravel()
    if flat.dtype == np.bool_:
        flat = flat.astype(np.uint8)
    if flat.dtype.kind not in "iu":
        raise ValueError(f"a label map holds integers, not {labels.dtype}")
    if flat.dtype.kind == "i" and flat.size and flat.min() < 0:
        raise ValueError("a label map holds no negative labels")
    names = None
    if int(flat.max(initial=0)) >= max(1024, 2 * flat.size):  # too large for lookup tables
        names, flat = np.unique(np.r_[flat.dtype.type(0), flat], return_inverse=True)
        flat = flat[1:]
    inside = flat[flat != 0]
    count = np.bincount(inside)
    first = np.empty(len(count), np.int64)
    first[inside[::-1]] = np.arange(inside.size - 1, -1, -1)  # reversed, so that the first pixel is assigned last
    ids = np.flatnonzero(count)
    ids = ids[np.argsort(first[ids])]
    table = np.zeros(max(len(count), 1), np.int64)
    table[ids] = np.arange(len(ids))
    area = count[ids].astype(np.int64)
    return flat, (ids if names is None else names[ids]).astype(np.int64), area, table


def _first_seen(labels: list[np.ndarray], areas: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Join the labels of all bands in the order of their first appearance, and sum their areas."""
    if not labels:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    ids, first, inverse = np.unique(np.concatenate(labels), return_index=True, return_inverse=True)
    area = np.zeros(len(ids), np.int64)
    np.add.at(area, inverse, np.concatenate(areas))
    order = np.argsort(first)
    return ids[order], area[order]


def _positions(ids: np.ndarray, values: np.ndarray) -> np.ndarray:
    order = np.argsort(ids)
    return order[np.searchsorted(ids, values, sorter=order)]


def _best_per_truth(overlaps: Overlaps) -> np.ndarray:
    """For each truth that overlaps a prediction, index of its pair of largest IoU; ties go to the first prediction."""
    order = np.lexsort((overlaps.pred_index, -overlaps.iou, overlaps.truth_index))
    truth = overlaps.truth_index[order]
    return order[np.flatnonzero(np.r_[True, truth[1:] != truth[:-1]])] if len(order) else order


def _one_to_one(overlaps: Overlaps) -> np.ndarray:
    """Indices of the pairs of the one-to-one matching that maximises the sum of IoU.

    Instances that are not connected by overlaps do not compete, so groups of connected ones are matched by themselves:
    the time of a matching grows with the square of the number of instances.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    if not len(overlaps.pixels):
        return np.empty(0, np.int64)
    n_truth, n_pred = len(overlaps.truth_area), len(overlaps.pred_area)
    edges = (np.ones(len(overlaps.pixels), bool), (overlaps.truth_index, n_truth + overlaps.pred_index))
    _, group = connected_components(coo_array(edges, shape=(n_truth + n_pred,) * 2), directed=False)
    group = group[overlaps.truth_index]
    alone = np.bincount(group)[group] == 1
    order = np.flatnonzero(~alone)
    order = order[np.argsort(group[order], kind="stable")]
    # Groups are joined to batches of some thousand pairs.
    starts = np.flatnonzero(np.diff(group[order], prepend=-1))
    batches = starts[np.flatnonzero(np.diff(starts // MATCHED_PAIRS, prepend=-1))]
    matched = [part[_best_matching(overlaps, part)] for part in np.split(order, batches) if len(part)]
    return np.sort(np.concatenate([np.flatnonzero(alone), *matched]))


def _best_matching(overlaps: Overlaps, pairs: np.ndarray) -> np.ndarray:
    """Indices into `pairs` of the one-to-one matching among them that maximises the sum of IoU.

    A truth may stay unmatched: each has an extra column of its own, at an IoU of 0. Memory therefore grows with the
    number of pairs, not with the square of the number of nuclei.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import min_weight_full_bipartite_matching

    truths, row = np.unique(overlaps.truth_index[pairs], return_inverse=True)
    preds, column = np.unique(overlaps.pred_index[pairs], return_inverse=True)
    n_truth, n_pred = len(truths), len(preds)
    free = np.arange(n_truth)
    cost = np.r_[2 - overlaps.iou[pairs], np.full(n_truth, 2.0)]  # costs above 0: the sparse matrix has no edge at 0
    table = coo_array((cost, (np.r_[row, free], np.r_[column, n_pred + free])), shape=(n_truth, n_pred + n_truth))
    truth, pred = min_weight_full_bipartite_matching(table.tocsr())
    real = pred < n_pred
    keys = row.astype(np.int64) * n_pred + column
    order = np.argsort(keys)
    found: np.ndarray = order[np.searchsorted(keys, truth[real].astype(np.int64) * n_pred + pred[real], sorter=order)]
    return found


def _jaccard(overlaps: Overlaps, pairs: np.ndarray) -> float:
    """Aggregated Jaccard index of the given pairs; instances in none of them add their areas to the union."""
    rest_truth = np.ones(len(overlaps.truth_area), bool)
    rest_truth[overlaps.truth_index[pairs]] = False
    rest_pred = np.ones(len(overlaps.pred_area), bool)
    rest_pred[overlaps.pred_index[pairs]] = False
    union = overlaps.union[pairs].sum() + overlaps.truth_area[rest_truth].sum() + overlaps.pred_area[rest_pred].sum()
    return float(overlaps.pixels[pairs].sum() / union)


def score_overlaps(overlaps: Overlaps) -> dict[str, Any]:
    """Compute the scores of `score` from a table of overlaps."""
    n_truth, n_pred = len(overlaps.truth_area), len(overlaps.pred_area)
    if n_truth == 0 or n_pred == 0:
        value = 1.0 if n_truth == n_pred else 0.0
        counts = {"tp": 0, "fp": n_pred, "fn": n_truth, "n_truth": n_truth, "n_pred": n_pred}
        return dict.fromkeys(METRICS, value) | counts
    iou = overlaps.iou
    over = iou > 0.5  # an instance is in at most one such pair
    matched = int(over.sum())
    sq = float(iou[over].mean()) if matched else 0.0
    dq = 2 * matched / (n_truth + n_pred)
    # An instance can have an IoU of exactly 0.5 with two others; such a group of two pairs counts as one match.
    half = iou >= 0.5
    tp = len(np.unique(overlaps.truth_index[half])) + len(np.unique(overlaps.pred_index[half])) - int(half.sum())
    area = int(overlaps.truth_area.sum() + overlaps.pred_area.sum())
    shared = int(overlaps.pixels.sum())
    return {
        "aji": _jaccard(overlaps, _best_per_truth(overlaps)),
        "aji_plus": _jaccard(overlaps, _one_to_one(overlaps)),
        "pq": sq * dq,
        "sq": sq,
        "dq": dq,
        "dice": 2 * shared / area,
        "iou": shared / (area - shared),
        "f1": 2 * tp / (n_truth + n_pred),
        "tp": tp,
        "fp": n_pred - tp,
        "fn": n_truth - tp,
        "n_truth": n_truth,
        "n_pred": n_pred,
    }


def score(truth: np.ndarray, pred: np.ndarray) -> dict[str, Any]:
    """Compare two instance label maps.

    Parameters
    ----------
    truth, pred : numpy.ndarray
        Label maps of the same shape, usually ``(H, W)``: any non-negative integers, 0 is background.

    Returns
    -------
    dict
        Floats in 0..1:

        ``aji``
            Aggregated Jaccard Index [1]_ as the MoNuSeg challenge's script and HoVer-Net's ``get_fast_aji`` compute it.
            Each truth takes the prediction with which it has the largest IoU, even if another truth has taken the same
            prediction (so a prediction over two truths counts in two unions, and the order of the truths does not
            matter). Truths that overlap no prediction and predictions that no truth took add their areas to the union.
            Ties of IoU go to the prediction whose first pixel comes first.
        ``aji_plus``
            The same, with the one-to-one matching that has the largest sum of IoU [2]_.
        ``pq``, ``sq``, ``dq``
            Panoptic, segmentation and detection quality; pairs match at IoU > 0.5 [3]_.
        ``dice``, ``iou``
            Dice and IoU of the foregrounds.
        ``f1``
            F1 of the detections, matched one to one at IoU >= 0.5. Where an instance has an IoU of exactly 0.5 with two
            others, only one of them counts. Differs from ``dq`` only where an IoU is exactly 0.5.

        Integers: ``tp``, ``fp``, ``fn`` (as used for ``f1``), ``n_truth``, ``n_pred``. Two empty maps have a score of 1
        throughout; if only one map is empty, all scores are 0.

    Raises
    ------
    ValueError
        When the shapes differ or a map holds anything but non-negative integers.

    References
    ----------
    .. [1] Kumar et al., A dataset and a technique for generalized nuclear segmentation for computational pathology,
       IEEE TMI 36(7), 2017.
    .. [2] Graham et al., HoVer-Net: simultaneous segmentation and classification of nuclei in multi-tissue histology
       images, Medical Image Analysis 58, 2019.
    .. [3] Kirillov et al., Panoptic segmentation, CVPR 2019.
    """
    return score_overlaps(Overlaps.of(truth, pred))


def class_counts(
    overlaps: Overlaps,
    truth_classes: np.ndarray,
    pred_classes: np.ndarray,
    names: Sequence[str],
    counted: tuple[np.ndarray, np.ndarray] | None = None,
) -> dict[str, Any]:
    """Count what `class_scores` needs, for one image.

    Parameters
    ----------
    overlaps : Overlaps
        Overlaps of truth and prediction.
    truth_classes, pred_classes : numpy.ndarray
        Class of each instance, integers in the order of `overlaps`: ``i + 1`` is ``names[i]``, 0 is unknown.
    names : sequence of str
        Names of the classes.
    counted : (numpy.ndarray, numpy.ndarray), optional
        Labels of the truths and of the predictions that are counted for R²; all of them when not given.

    Returns
    -------
    dict
        ``matched``
            Number of pairs of IoU > 0.5 whose truth has a known class.
        ``right``
            Number of these pairs whose classes agree.
        ``classes``
            By name: number of pairs whose classes agree, of truths and of predictions, and summed IoU of the pairs.
        ``composition``
            By name: number of truths and of predictions that are `counted`. Only when `counted` is given.

        A prediction that matches a truth of unknown class is neither right nor wrong and is not counted at all.
    """
    over = overlaps.iou > 0.5  # an instance is in at most one such pair
    iou, t, p = overlaps.iou[over], overlaps.truth_index[over], overlaps.pred_index[over]
    known = truth_classes[t] > 0
    agree = known & (truth_classes[t] == pred_classes[p])
    judged = np.ones(len(pred_classes), bool)
    judged[p[~known]] = False

    def by_class(classes: np.ndarray, weights: np.ndarray | None = None) -> list[Any]:
        return list(np.bincount(classes, weights, len(names) + 1)[1:].tolist())

    columns = (
        by_class(truth_classes[t[agree]]),
        by_class(truth_classes),
        by_class(pred_classes[judged]),
        by_class(truth_classes[t[agree]], iou[agree]),
    )
    rows = zip(*columns, strict=True)
    found = {"right": int(agree.sum()), "matched": int(known.sum()), "classes": dict(zip(names, rows, strict=True))}
    if counted is None:
        return found
    truth = by_class(truth_classes[np.isin(overlaps.truth_ids, counted[0])])
    pred = by_class(pred_classes[judged & np.isin(overlaps.pred_ids, counted[1])])
    return found | {"composition": dict(zip(names, zip(truth, pred, strict=True), strict=True))}


def central(box: tuple[int, int, int, int], side: int) -> tuple[int, int, int, int]:
    """Central square, `side` pixels wide, of a box (left, top, right, bottom), cut off where the box is smaller."""
    edges = []
    for low, high in ((box[0], box[2]), (box[1], box[3])):
        start = low + max(0, high - low - side) // 2
        edges.append((start, min(start + side, high)))
    return edges[0][0], edges[1][0], edges[0][1], edges[1][1]


def r_squared(truth: Sequence[float], pred: Sequence[float]) -> float | None:
    """Coefficient of determination of predicted numbers: 1 - sum of squared errors / sum of squares around the mean.

    None for fewer than two numbers. Where all true numbers are the same, it is 1 if all predictions are right, else 0.
    This is the definition of scikit-learn, which CoNIC uses.
    """
    if len(truth) < 2:
        return None
    values = np.asarray(truth, np.float64)
    errors, spread = float(np.sum((values - pred) ** 2)), float(np.sum((values - values.mean()) ** 2))
    return 1 - errors / spread if spread else float(not errors)


def class_scores(images: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Compute the scores of the classes over all images together.

    Parameters
    ----------
    images : sequence of mapping
        Result of `class_counts` for each image. A class that an image does not name has no nuclei there.

    Returns
    -------
    dict
        ``accuracy``
            Share of the ``matched`` nuclei whose class is right.
        ``mpq_plus``
            Multi-class PQ+ [1]_: true positives, false positives, false negatives and IoU of each class are summed over
            all images before its PQ is computed; the result is the mean over the classes with a truth in any image.
        ``r2``
            Mean R² [1]_ over the same classes.
        ``matched``
            Number of matched nuclei whose truth has a known class.
        ``classes``
            By name: ``n_truth``, ``n_pred``; ``f1`` (which is the DQ), ``sq`` and ``pq`` of the pairs of IoU > 0.5
            whose classes agree; and ``r2``, the `r_squared` of the number of nuclei of the class in each image (of
            ``composition`` where images have it).

        Values that cannot be computed are None. A class that is predicted but has no truth has a PQ of 0 and is left
        out of the means, as in PanNuke's metrics [2]_: its nuclei already count as missed in the classes of their
        truths.

    References
    ----------
    .. [1] Graham et al., CoNIC Challenge: pushing the frontiers of nuclear detection, segmentation, classification and
       counting, Medical Image Analysis 92, 2024. Its classes all have truths.
    .. [2] Gamper et al., PanNuke dataset extension, insights and baselines, arXiv:2003.10778, 2020.
    """
    classes: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(name for image in images for name in image["classes"]):
        columns = list(zip(*(image["classes"].get(name, (0, 0, 0, 0.0)) for image in images), strict=True))
        hits, truth, found, iou = map(sum, columns)
        counts = [image["composition"].get(name, (0, 0)) for image in images if "composition" in image]
        classes[name] = {
            "n_truth": truth,
            "n_pred": found,
            "f1": 2 * hits / (truth + found) if truth + found else None,
            "sq": iou / hits if hits else 0.0 if truth + found else None,
            "pq": 2 * iou / (truth + found) if truth + found else None,
            "r2": r_squared(*(zip(*counts, strict=True) if counts else columns[1:3])),
        }
    right, matched = (sum(image[key] for image in images) for key in ("right", "matched"))
    known = [row for row in classes.values() if row["n_truth"]]

    def mean(key: str) -> float | None:
        values = [row[key] for row in known if row[key] is not None]
        return sum(values) / len(values) if values else None

    return {
        "accuracy": right / matched if matched else None,
        "matched": matched,
        "mpq_plus": mean("pq"),
        "r2": mean("r2"),
        "classes": classes,
    }
