"""Classify nuclei by their measurements with a linear model of features and their products.

The class of a nucleus shows in its size, shape and stain, and in the nuclei around it: lymphocytes are small, dark and
round, and so are their neighbours, which lie close by. The classifier is multinomial logistic regression with an L2
penalty on these features and all products of two features. It is learned in a second from some dozens of nuclei per
class, and is stored as a small file of numbers without any code.
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
"""Columns that are features of a nucleus; of those marked ``log``, the feature is the logarithm."""

AROUND = ("area_um2", "eccentricity", "hematoxylin_mean", "eosin_mean")
"""Columns whose mean over the neighbours is a feature as well."""

COLUMNS = (*OWN, "orientation")
"""Columns that are needed of a table of nuclei, besides the centroids."""

FEATURES = (*OWN, "crowding", *(f"{name} around" for name in AROUND), "alignment")
"""Names of the features, in order."""

NEIGHBOURS = 8
"""Number of nearest nuclei that count as the neighbours of a nucleus."""

LIMIT = 5.0
"""Standard deviations at which features are clipped, so that products of outliers do not outweigh everything else."""


def nearest(points: np.ndarray, rows: np.ndarray, tree: Any) -> tuple[np.ndarray, np.ndarray]:
    """Find the nearest neighbours of points.

    Parameters
    ----------
    points : numpy.ndarray
        Centroids in µm, float64 ``(n, 2)``.
    rows : numpy.ndarray
        Indices of the points whose neighbours are wanted, int64 ``(m,)``.
    tree : scipy.spatial.cKDTree
        Tree of all points.

    Returns
    -------
    index : numpy.ndarray
        Indices of the neighbours, nearest first, int64 ``(m, k)``; k is the smaller of `NEIGHBOURS` and n - 1.
    distance : numpy.ndarray
        Distance to the farthest of these neighbours in µm, float64 ``(m,)``; infinite if there are none.
    """
    k = min(NEIGHBOURS, len(points) - 1)
    if k < 1:
        return np.empty((len(rows), 0), np.int64), np.full(len(rows), np.inf)
    distance, index = tree.query(points[rows], k=k + 1)
    # A point is usually its own first neighbour, but others at the same position may precede or even displace it.
    other = index != rows[:, None]
    other[other.all(axis=1), -1] = False
    return index[other].reshape(-1, k), distance[other].reshape(-1, k)[:, -1]


def features(
    columns: Mapping[str, np.ndarray], rows: np.ndarray, index: np.ndarray, distance: np.ndarray
) -> np.ndarray:
    """Compute the features of nuclei.

    Parameters
    ----------
    columns : mapping of str to numpy.ndarray
        `COLUMNS` of all nuclei of a slide, ``(n,)``.
    rows : numpy.ndarray
        Indices of the nuclei whose features are wanted, int64 ``(m,)``.
    index, distance : numpy.ndarray
        Results of `nearest` for these nuclei.

    Returns
    -------
    numpy.ndarray
        float64 ``(m, len(FEATURES))``, NaN for values that are missing or not finite. *Crowding* is the logarithm of
        the density of nuclei (per µm²) within the distance of the farthest neighbour. *Alignment* is the mean over the
        neighbours of ``cos 2 d``, with d the angle between the major axes of nucleus and neighbour: 1 for parallel
        axes, 0 in disorder, -1 for a nucleus at right angles to its neighbours.
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
    """Mean and standard deviation of each feature, float64 ``(f,)``; the deviation of a constant feature is 1."""
    known = np.isfinite(matrix)
    count = known.sum(axis=0)
    filled = np.where(known, matrix, 0)
    mean = filled.sum(axis=0) / np.maximum(count, 1)
    spread = np.sqrt((np.where(known, matrix - mean, 0) ** 2).sum(axis=0) / np.maximum(count, 1))
    return mean, np.where(spread > 1e-9, spread, 1.0)


def design(matrix: np.ndarray, mean: np.ndarray, spread: np.ndarray) -> np.ndarray:
    """Terms of the linear model: 1, the scaled features and all products of two of them.

    Parameters
    ----------
    matrix : numpy.ndarray
        Features, ``(n, f)``; NaN is replaced by the mean.
    mean, spread : numpy.ndarray
        Mean and standard deviation of the features, see `scale_of`.

    Returns
    -------
    numpy.ndarray
        float64 ``(n, 1 + f + f (f + 1) / 2)``.
    """
    scaled = np.clip(np.nan_to_num((matrix - mean) / spread, nan=0.0), -LIMIT, LIMIT)
    first, second = np.triu_indices(scaled.shape[1])
    return np.hstack([np.ones((len(scaled), 1)), scaled, scaled[:, first] * scaled[:, second]])


def probabilities(terms: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Softmax of the linear model with ``(n, t)`` terms and ``(t, c)`` weights; ``(n, c)``, each row sums to 1."""
    logits = terms @ weights
    logits -= logits.max(axis=1, keepdims=True)
    np.exp(logits, out=logits)
    return np.asarray(logits / logits.sum(axis=1, keepdims=True))


def fit_weights(terms: np.ndarray, kinds: np.ndarray, classes: int, penalty: float) -> np.ndarray:
    """Fit the weights of the multinomial logistic regression, giving all classes the same total weight.

    Parameters
    ----------
    terms : numpy.ndarray
        Result of `design`, ``(n, t)``.
    kinds : numpy.ndarray
        Class of each row, int ``(n,)``.
    classes : int
        Number of classes, each of which occurs in `kinds`.
    penalty : float
        Factor of half the sum of squared weights, which is added to the mean log-loss; the weights of the first term
        are not penalised.

    Returns
    -------
    numpy.ndarray
        float64 ``(t, classes)``.
    """
    from scipy.optimize import minimize

    share = 1 / (classes * np.bincount(kinds, minlength=classes))[kinds]
    truth = np.eye(classes)[kinds]
    held = np.ones((terms.shape[1], 1))
    held[0] = 0  # the intercept is not penalised: nothing is known about how common a class is

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights = flat.reshape(-1, classes)
        found = probabilities(terms, weights)
        told = np.log(np.maximum(found[np.arange(len(kinds)), kinds], 1e-300))
        slope = terms.T @ ((found - truth) * share[:, None]) + penalty * held * weights
        return float(-(share * told).sum() + penalty / 2 * (held * weights**2).sum()), slope.ravel()

    start = np.zeros(terms.shape[1] * classes)
    result = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 2000})
    return np.asarray(result.x).reshape(-1, classes)
