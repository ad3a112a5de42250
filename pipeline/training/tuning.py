"""Tuning of a model's thresholds on the validation fields."""

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
"""Values tried for the rules that separate touching nuclei (see `InstanceRules`), by the source of the markers."""


MIN_AREA_UM2 = (3, 5, 7.5, 10)
"""Values tried for the area in µm² below which nuclei are dropped."""


def tuning_grid(markers: str, mpp: float) -> dict[str, tuple[int, ...]]:
    """Values tried for each rule; thresholds are map values from 0 to 255, areas are in pixels of `mpp` µm."""
    areas = tuple(round(area / mpp**2) for area in MIN_AREA_UM2)
    return {"nucleus": (96, 112, 128, 144, 160, 176), **TUNING_GRIDS[markers], "min_area": areas}


def tune_rules(
    maps: list[np.ndarray], fields: list[Field], rules: InstanceRules, channels: Channels, mpp: float
) -> tuple[InstanceRules, dict[str, float]]:
    """Find the rules with the best mean of AJI and PQ by coordinate ascent: two rounds over one rule at a time.

    Parameters
    ----------
    maps : list of numpy.ndarray
        uint8 ``(C, H, W)`` maps of each field.
    fields : list of Field
        Validation fields.
    rules : InstanceRules
        Rules to start from.
    channels : Channels
        Indices of the maps.
    mpp : float
        Pixel size of the maps in µm.

    Returns
    -------
    InstanceRules
        The best rules found.
    dict of str to float
        ``aji_pq_mean``: mean of AJI and PQ with these rules, averaged over the fields.
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
