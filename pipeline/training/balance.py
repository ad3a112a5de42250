"""Sampling weights of fields, so that rare classes of nuclei are seen more often."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from pipeline.training.field import Field
from pipeline.training.targets import class_map


def repeats(present: np.ndarray, share: float) -> np.ndarray:
    """Return how many times as often each field is drawn, because of the rare classes in it.

    Parameters
    ----------
    present : numpy.ndarray
        bool ``(fields, classes)``: which field has a nucleus of which class. Only fields with known classes take part.
    share : float
        A class is rare if fewer than this share of the fields have it.

    Returns
    -------
    numpy.ndarray
        float64 ``(fields,)``: the square root of `share` divided by the share of fields that have the rarest class of
        this field; at least 1.

    References
    ----------
    Gupta et al., "LVIS: a dataset for large vocabulary instance segmentation", CVPR 2019.
    """
    own = np.maximum(present.mean(axis=0), 1 / len(present))
    factors = np.maximum(1, np.sqrt(share / own))
    found: np.ndarray = np.where(present, factors, 1).max(axis=1, initial=1)
    return found


def classes_present(fields: Sequence[Field], classes: Sequence[str], class_names: Mapping[str, str]) -> np.ndarray:
    """Return which field has a nucleus of which class, bool ``(fields, classes)``."""
    present = np.zeros((len(fields), len(classes)), bool)
    for row, field in zip(present, fields, strict=True):
        known = class_map(field, classes, class_names)
        if known is not None:
            row[:] = np.bincount(known.ravel(), minlength=256)[1 : len(classes) + 1] > 0
    return present
