"""Thresholds of a model, chosen on the validation fields."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from pipeline.kernels.instances import Channels, InstanceRules
from pipeline.training.data import Field
from pipeline.training.scoring import score_maps

TUNING_GRIDS: dict[str, dict[str, tuple[int, ...]]] = {
    "distance": {"marker": (60, 90, 110, 130, 150, 170, 190), "depth": (0, 5, 10, 20)},
    "contour": {"marker": (90, 110, 130, 150, 170, 190)},
    "hv": {"marker": (115, 125, 135, 145, 155, 165)},
    "nucleus": {"depth": (3, 5, 8, 12, 16)},
}
"""Values tried of what divides touching nuclei (see `InstanceRules`), by where the markers come from."""


MIN_AREA_UM2 = (3, 5, 7.5, 10)
"""Values tried of the area in µm² below which nuclei are dropped."""


def tuning_grid(markers: str, mpp: float) -> dict[str, tuple[int, ...]]:
    """Thresholds tried on the validation fields (map values 0 to 255; pixels of `mpp` µm)."""
    areas = tuple(round(area / mpp**2) for area in MIN_AREA_UM2)
    return {"nucleus": (96, 112, 128, 144, 160, 176), **TUNING_GRIDS[markers], "min_area": areas}


def tune_rules(
    maps: list[np.ndarray], fields: list[Field], rules: InstanceRules, channels: Channels, mpp: float
) -> tuple[InstanceRules, dict[str, float]]:
    """Thresholds with the best mean of AJI and PQ, one at a time around those given.

    Parameters
    ----------
    maps : list of numpy.ndarray
        uint8 ``(C, H, W)`` maps of each field.
    fields : list of Field
        Validation fields.
    rules : InstanceRules
        Where to begin.
    channels : Channels
        Where the maps are.
    mpp : float
        Their pixel size in µm.
    """

    def quality(tried: InstanceRules) -> float:
        scores = [score_maps(m, f, tried, channels).scores for m, f in zip(maps, fields, strict=True)]
        return float(np.mean([(s["aji"] + s["pq"]) / 2 for s in scores]))

    best = quality(rules)
    for _ in range(2):
        for name, values in tuning_grid(rules.markers, mpp).items():
            for value in values:
                tried = replace(rules, **{name: value})  # type: ignore[arg-type]
                if tried != rules and (found := quality(tried)) > best:
                    best, rules = found, tried
    return rules, {"aji_pq_mean": best}
