"""Scores of a network on fields it has not seen."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from pipeline.kernels.instances import InstanceRules
from pipeline.training.data import Field
from pipeline.training.experiment import Experiment
from pipeline.training.fit import predict_field, resize_to_model, score_maps
from pipeline.training.reference import normalise

log = logging.getLogger(__name__)

SCORES = ("aji", "aji_plus", "pq", "sq", "dq", "dice", "iou", "f1")


def bootstrap_interval(values: np.ndarray, seed: int = 0, rounds: int = 2000) -> tuple[float, float]:
    """95 % bootstrap interval of the mean (percentile method)."""
    rng = np.random.default_rng(seed)
    means = values[rng.integers(len(values), size=(rounds, len(values)))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def evaluate(
    network: Any, fields: list[Field], experiment: Experiment, reference: dict[str, Any], rules: InstanceRules
) -> dict[str, Any]:
    """Scores of each field, their mean and its bootstrap interval."""
    images: dict[str, Any] = {}
    for one in fields:
        version = normalise(one.image, experiment.stain, reference)
        image = resize_to_model(one.image if version is None else version, one.mpp, experiment.mpp)
        result = score_maps(predict_field(network, image), one, rules)
        images[one.name] = {name: round(float(result[name]), 4) for name in SCORES} | {"organ": one.organ}
        log.info(
            "%s (%s): AJI %.3f, PQ %.3f, Dice %.3f", one.name, one.organ, *(result[k] for k in ("aji", "pq", "dice"))
        )
    mean = {name: round(float(np.mean([i[name] for i in images.values()])), 4) for name in SCORES}
    interval = {
        name: [round(v, 4) for v in bootstrap_interval(np.array([i[name] for i in images.values()]))]
        for name in ("aji", "pq", "dice")
    }
    return {"mean": mean, "interval_95": interval, "images": images}
