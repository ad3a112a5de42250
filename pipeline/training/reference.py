"""Which field's stain the others are brought to."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from pipeline.errors import PipelineError
from pipeline.kernels.stain import (
    StainFitError,
    extract_macenko,
    fit_reference,
    fit_stains,
    fit_transform,
    tissue_pixels,
)
from pipeline.training.data import Field

log = logging.getLogger(__name__)


def choose_reference(fields: list[Field]) -> tuple[Field, dict[str, Any]]:
    """The field whose stain is nearest to the middle of all, and its stain reference.

    Parameters
    ----------
    fields : list of Field
        Candidates.

    Raises
    ------
    PipelineError
        When no field's stain can be fitted.
    """
    candidates, features = [], []
    for one in fields:
        try:
            stains = fit_stains(tissue_pixels(one.image), extract_macenko)
        except StainFitError as error:
            log.info("%s is no candidate for the stain reference: %s", one.name, error)
            continue
        candidates.append(one)
        features.append(np.concatenate([np.ravel(stains["matrix"]), np.log(stains["max_concentrations"])]))
    if not candidates:
        raise PipelineError("no training field's stain can be fitted", "use stain: none")
    table = np.array(features)
    spread = table.std(axis=0) + 1e-6
    chosen = candidates[int(np.argmin((((table - np.median(table, axis=0)) / spread) ** 2).sum(axis=1)))]
    return chosen, fit_reference(chosen.image)


def normalise(image: np.ndarray, method: str, reference: dict[str, Any]) -> np.ndarray | None:
    """A field's image in the model's stain, or None when its own cannot be fitted."""
    if method == "none":
        return None
    try:
        transform, _ = fit_transform(tissue_pixels(image), method, reference)
    except StainFitError:
        return None
    return transform.apply(image)
