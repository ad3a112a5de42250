"""Scores of many fields as means with intervals."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.evaluation.metrics import METRICS, class_scores

PIXEL_SCORES = ("pixel_accuracy", "pixel_dice", "pixel_iou")
"""Scores of the thresholded nucleus map, before nuclei are made of it."""

ROUNDS = 2000
"""How often fields are drawn for an interval."""


def bootstrap_interval(values: np.ndarray, groups: Sequence[Hashable] | None = None) -> tuple[float, float]:
    """95 % bootstrap interval of the mean (percentile method).

    Parameters
    ----------
    values : numpy.ndarray
        A value for each field.
    groups : sequence, optional
        The patient of each field. Fields of one patient are alike: whole patients are drawn, not fields, unless there
        is but one, whose interval tells nothing of others.

    References
    ----------
    Davison and Hinkley, Bootstrap Methods and their Application, 1997, section 3.8.
    """
    names = groups if groups is not None and len(set(groups)) > 1 else range(len(values))
    order = {name: index for index, name in enumerate(dict.fromkeys(names))}
    owner = np.array([order[name] for name in names])
    sums, counts = np.bincount(owner, values), np.bincount(owner)
    drawn = np.random.default_rng(0).integers(len(sums), size=(ROUNDS, len(sums)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def patients_of(images: Mapping[str, Mapping[str, Any]]) -> list[Hashable]:
    """The patient of each field, see `summarise`: as in splits, one of the same name is the same in every source."""
    return [("patient", i["patient"]) if i.get("patient") else ("field", name) for name, i in images.items()]


def types_of(images: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """``types`` of all fields together, where they have any: see `pipeline.evaluation.metrics.class_scores`."""
    rows = [i["type_counts"] for i in images.values() if "type_counts" in i]
    return {"types": rounded(class_scores(rows))} if rows else {}


def rounded(value: Any) -> Any:
    """A value with its numbers, however deep in mappings, rounded to four decimals."""
    if isinstance(value, Mapping):
        return {key: rounded(one) for key, one in value.items()}
    return round(value, 4) if isinstance(value, float) else value


def summarise(images: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Mean of the scores of fields with 95 % bootstrap intervals over patients, and the mean of each organ's.

    Parameters
    ----------
    images : mapping of str to mapping
        Scores of each field, with ``organ``, and ``patient`` where it is known: a field without is one of its own.
    """
    if not images:
        return {"mean": {}, "interval_95": {}, "organs": {}}
    names = [name for name in (*METRICS, *PIXEL_SCORES, "loss") if all(name in i for i in images.values())]
    organs: dict[str, list[Mapping[str, Any]]] = {}
    for one in images.values():
        organs.setdefault(one.get("organ") or "", []).append(one)

    def mean(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        return {name: round(float(np.mean([row[name] for row in rows])), 4) for name in names}

    patients = patients_of(images)
    interval = {
        name: [round(v, 4) for v in bootstrap_interval(np.array([i[name] for i in images.values()]), patients)]
        for name in names
        if len(images) > 1  # a single field tells nothing of others
    }
    return {
        "mean": mean(list(images.values())),
        "interval_95": interval,
        "organs": {organ: mean(rows) | {"fields": len(rows)} for organ, rows in sorted(organs.items())},
    } | types_of(images)
