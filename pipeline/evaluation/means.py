"""Scores of many fields as means with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

SCORES = ("aji", "aji_plus", "pq", "sq", "dq", "dice", "iou", "f1")
"""Scores of the nuclei."""

PIXEL_SCORES = ("pixel_accuracy", "pixel_dice", "pixel_iou")
"""Scores of the thresholded nucleus map, before nuclei are made of it."""


def bootstrap_interval(values: np.ndarray, seed: int = 0, rounds: int = 2000) -> tuple[float, float]:
    """95 % bootstrap interval of the mean (percentile method)."""
    rng = np.random.default_rng(seed)
    means = values[rng.integers(len(values), size=(rounds, len(values)))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def summarise(images: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Mean of the scores of fields with 95 % bootstrap intervals, and the mean of each organ's.

    Parameters
    ----------
    images : mapping of str to mapping
        Scores of each field, with ``organ``.
    """
    if not images:
        return {"mean": {}, "interval_95": {}, "organs": {}}
    names = [name for name in (*SCORES, *PIXEL_SCORES, "loss") if all(name in i for i in images.values())]
    organs: dict[str, list[Mapping[str, Any]]] = {}
    for one in images.values():
        organs.setdefault(one.get("organ") or "", []).append(one)

    def mean(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        return {name: round(float(np.mean([row[name] for row in rows])), 4) for name in names}

    interval = {
        name: [round(v, 4) for v in bootstrap_interval(np.array([i[name] for i in images.values()]))] for name in names
    }
    return {
        "mean": mean(list(images.values())),
        "interval_95": interval,
        "organs": {organ: mean(rows) | {"fields": len(rows)} for organ, rows in sorted(organs.items())},
    }
