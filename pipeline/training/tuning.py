"""Thresholds of a model, chosen on the validation fields."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from pipeline.kernels.instances import InstanceRules
from pipeline.training.data import Field
from pipeline.training.fit import score_maps

TUNING_GRID = {
    "nucleus": (96, 112, 128, 144, 160),
    "marker": (90, 110, 130, 150, 170, 190),
    "min_area": (12, 20, 30),
}
"""Thresholds tried on the validation fields (map values 0 to 255, pixels)."""


def tune_rules(maps: list[np.ndarray], fields: list[Field]) -> tuple[InstanceRules, dict[str, float]]:
    """Thresholds with the best mean of AJI and PQ, one at a time around the defaults.

    Parameters
    ----------
    maps : list of numpy.ndarray
        uint8 ``(C, H, W)`` maps of each field.
    fields : list of Field
        Validation fields.
    """

    def quality(rules: InstanceRules) -> float:
        results = [score_maps(m, f, rules) for m, f in zip(maps, fields, strict=True)]
        return float(np.mean([(r["aji"] + r["pq"]) / 2 for r in results]))

    rules = InstanceRules()
    best = quality(rules)
    for _ in range(2):
        for name, values in TUNING_GRID.items():
            for value in values:
                tried = replace(rules, **{name: value})
                if tried != rules and (found := quality(tried)) > best:
                    best, rules = found, tried
    return rules, {"aji_pq_mean": best}
