"""Classes of nuclei from their measurements: features, and a linear model of them and their products.

What a nucleus is shows in its size, shape and stain, and in what lies around it: lymphocytes lie close together and are
small, dark and round, as their neighbours are. The classifier is multinomial logistic regression on these features and
all their products of two, with an L2 penalty: as many numbers as fit into a small file, learned from some dozens of
nuclei a class in a second, and no code in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

OWN = {
    "area_um2": "log",
    "major_axis_um": "log",
    "minor_axis_um": "log",
    "eccentricity": "",
    "solidity": "",
    "circularity": "",
    "hematoxylin_mean": "",
    "hematoxylin_std": "",
    "eosin_mean": "",
    "eosin_std": "",
    "probability": "",
}
"""Columns of a nucleus that are features, and those of which it is the logarithm."""

AROUND = ("area_um2", "eccentricity", "hematoxylin_mean", "eosin_mean")
"""Columns whose mean over the neighbours is a feature, too."""

COLUMNS = (*OWN, "orientation")
"""What of a table of nuclei is needed, beside the centroids."""

FEATURES = (*OWN, "crowding", *(f"{name} around" for name in AROUND), "alignment")
"""Names of the features, in order."""

NEIGHBOURS = 8
"""Nearest nuclei that are what lies around one."""

LIMIT = 5.0
"""Standard deviations at which features are cut off: products of two of an odd nucleus would outweigh all else."""


def nearest(points: np.ndarray, rows: np.ndarray, tree: Any) -> tuple[np.ndarray, np.ndarray]:
    """Nearest other points.

    Parameters
    ----------
    points : numpy.ndarray
        Centroids in µm, float64 ``(n, 2)``.
    rows : numpy.ndarray
        Those of which the neighbours are asked for, int64 ``(m,)``.
    tree : scipy.spatial.cKDTree
        Of all points.

    Returns
    -------
    index : numpy.ndarray
        int64 ``(m, k)``, k the lesser of `NEIGHBOURS` and n - 1, the nearest first.
    distance : numpy.ndarray
        To the last of them in µm, float64 ``(m,)``; infinite where there are none.
    """
    k = min(NEIGHBOURS, len(points) - 1)
    if k < 1:
        return np.empty((len(rows), 0), np.int64), np.full(len(rows), np.inf)
    distance, index = tree.query(points[rows], k=k + 1)
    # Itself is among them, the first but for others on the same place.
    other = index != rows[:, None]
    other[other.all(axis=1), -1] = False
    return index[other].reshape(-1, k), distance[other].reshape(-1, k)[:, -1]


def features(
    columns: Mapping[str, np.ndarray], rows: np.ndarray, index: np.ndarray, distance: np.ndarray
) -> np.ndarray:
    """Features of nuclei.

    Parameters
    ----------
    columns : mapping of str to numpy.ndarray
        `COLUMNS` of all nuclei of a slide, ``(n,)``.
    rows : numpy.ndarray
        Those that are asked for, int64 ``(m,)``.
    index, distance : numpy.ndarray
        What `nearest` returned for these.

    Returns
    -------
    numpy.ndarray
        float64 ``(m, len(FEATURES))``, NaN where there is no such value. *Crowding* is the logarithm of the density of
        nuclei within the last neighbour (per µm²), *alignment* the mean over the neighbours of ``cos 2 d``, d being the
        angle between two major axes: 1 in a bundle, 0 in disorder, -1 across it.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        logarithms = {name: np.log(columns[name]) for name, how in OWN.items() if how}
        values = {name: logarithms.get(name, columns[name]) for name in OWN}
        found = [values[name][rows] for name in OWN]
        if index.shape[1]:
            found.append(np.log(index.shape[1] / (np.pi * distance**2)))
            found += [values[name][index].mean(axis=1) for name in AROUND]
            angle = columns["orientation"]
            found.append(np.cos(2 * (angle[index] - angle[rows][:, None])).mean(axis=1))
        else:
            found += [np.full(len(found[0]), np.nan)] * (len(FEATURES) - len(OWN))
    matrix = np.column_stack(found).astype(np.float64)
    matrix[~np.isfinite(matrix)] = np.nan
    return matrix


def scale_of(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of features, each float64 ``(f,)``; one that never varies has 0 and 1."""
    known = np.isfinite(matrix)
    count = known.sum(axis=0)
    filled = np.where(known, matrix, 0)
    mean = filled.sum(axis=0) / np.maximum(count, 1)
    spread = np.sqrt((np.where(known, matrix - mean, 0) ** 2).sum(axis=0) / np.maximum(count, 1))
    return mean, np.where(spread > 1e-9, spread, 1.0)


def design(matrix: np.ndarray, mean: np.ndarray, spread: np.ndarray) -> np.ndarray:
    """What the model is linear in: 1, the scaled features, and all products of two.

    Parameters
    ----------
    matrix : numpy.ndarray
        Features, ``(n, f)``; NaN counts as the mean.
    mean, spread : numpy.ndarray
        See `scale_of`.

    Returns
    -------
    numpy.ndarray
        float64 ``(n, 1 + f + f (f + 1) / 2)``.
    """
    scaled = np.clip(np.nan_to_num((matrix - mean) / spread, nan=0.0), -LIMIT, LIMIT)
    first, second = np.triu_indices(scaled.shape[1])
    return np.hstack([np.ones((len(scaled), 1)), scaled, scaled[:, first] * scaled[:, second]])


def probabilities(terms: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Softmax of a linear model: ``(n, t)`` terms and ``(t, c)`` weights to ``(n, c)``, rows of sum 1."""
    logits = terms @ weights
    logits -= logits.max(axis=1, keepdims=True)
    np.exp(logits, out=logits)
    return np.asarray(logits / logits.sum(axis=1, keepdims=True))


def fit_weights(terms: np.ndarray, kinds: np.ndarray, classes: int, penalty: float) -> np.ndarray:
    """Weights of the multinomial logistic regression, all classes counting alike.

    Parameters
    ----------
    terms : numpy.ndarray
        What `design` returned, ``(n, t)``.
    kinds : numpy.ndarray
        Class of each row, int ``(n,)``.
    classes : int
        How many there are. Each occurs.
    penalty : float
        Of the mean square of the weights but the first term's, beside the mean log-loss.

    Returns
    -------
    numpy.ndarray
        float64 ``(t, classes)``.
    """
    from scipy.optimize import minimize

    share = 1 / (classes * np.bincount(kinds, minlength=classes))[kinds]
    truth = np.eye(classes)[kinds]
    held = np.ones((terms.shape[1], 1))
    held[0] = 0  # how common a class is, nobody knows

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights = flat.reshape(-1, classes)
        found = probabilities(terms, weights)
        told = np.log(np.maximum(found[np.arange(len(kinds)), kinds], 1e-300))
        slope = terms.T @ ((found - truth) * share[:, None]) + penalty * held * weights
        return float(-(share * told).sum() + penalty / 2 * (held * weights**2).sum()), slope.ravel()

    start = np.zeros(terms.shape[1] * classes)
    result = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 2000})
    return np.asarray(result.x).reshape(-1, classes)
