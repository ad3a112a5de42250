"""Mean scores of many fields, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.evaluation.metrics import METRICS, class_scores

PIXEL_SCORES = ("pixel_accuracy", "pixel_dice", "pixel_iou")
"""Scores of the thresholded nucleus map, before it is divided into instances."""

ROUNDS = 2000
"""Number of bootstrap samples for an interval."""


def bootstrap_interval(values: np.ndarray, groups: Sequence[Hashable] | None = None) -> tuple[float, float]:
    """95 % bootstrap interval of the mean (percentile method).

    Parameters
    ----------
    values : numpy.ndarray
        One value for each field.
    groups : sequence, optional
        The patient of each field. Fields of one patient are alike, so whole patients are drawn instead of fields. If
        there is only one patient, fields are drawn, and the interval tells nothing about other patients.

    Returns
    -------
    (float, float)
        Lower and upper bound.

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
    """The patient of each field, see `summarise`. As in splits, a name is the same patient in every data source."""
    return [("patient", i["patient"]) if i.get("patient") else ("field", name) for name, i in images.items()]


def types_of(images: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """``types``: `pipeline.evaluation.metrics.class_scores` of all fields together; empty if none has class counts."""
    rows = [i["type_counts"] for i in images.values() if "type_counts" in i]
    return {"types": rounded(class_scores(rows))} if rows else {}


def rounded(value: Any) -> Any:
    """Round all floats in a value, however deeply nested in mappings, to four decimals."""
    if isinstance(value, Mapping):
        return {key: rounded(one) for key, one in value.items()}
    return round(value, 4) if isinstance(value, float) else value


def summarise(images: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Average the scores of fields, with 95 % bootstrap intervals over patients, overall and by organ.

    Parameters
    ----------
    images : mapping of str to mapping
        Scores of each field, with its ``organ`` and, if known, its ``patient``. A field without a patient counts as a
        patient of its own.

    Returns
    -------
    dict
        ``mean`` and ``interval_95`` of the scores that all fields have; ``organs``: mean scores and number of
        ``fields`` of each organ; and ``types``, see `types_of`.
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
        if len(images) > 1  # a single field tells nothing about others
    }
    return {
        "mean": mean(list(images.values())),
        "interval_95": interval,
        "organs": {organ: mean(rows) | {"fields": len(rows)} for organ, rows in sorted(organs.items())},
    } | types_of(images)
