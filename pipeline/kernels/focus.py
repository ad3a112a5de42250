"""How sharp is an image of H&E tissue? Told by the width of its edges, in µm.

A blur of standard deviation `b` makes an edge a Gaussian ramp. Seen through a further Gaussian of `s` its slope is
proportional to ``1 / sqrt(b² + s²)``, so the ratio of its slopes through two of them gives `b`, whatever the edge's
height: neither the strength of the stain nor the amount of texture has a say, as it has in the energy of a Laplacian.
"""

from __future__ import annotations

import cv2
import numpy as np

from pipeline.kernels.hematoxylin import hematoxylin_density

FINE_UM, COARSE_UM = 0.5, 1.0
"""Standard deviations of the two Gaussians; the finer one is wide enough for noise and JPEG blocks to hardly count."""

EDGE_SHARE = 0.1
"""Share of the pixels, those with the steepest slopes, that count as edges."""

LEAST_SLOPE = 0.04
"""Natural OD of hematoxylin per µm below which there is no edge to judge by."""

LARGEST_UM = 4.0
"""Wider edges are told as so wide."""

SMALLEST_SIDE = 32
"""Pixels; smaller images are not judged."""

COARSEST_MPP = 0.8
"""µm per pixel up to which the finer Gaussian can be told from none."""

BLURRED_UM = 0.75
"""Wider edges are out of focus: blurred so far, scans lose a tenth of the nuclei that are found, and soon many more."""


def edge_blur(rgb: np.ndarray, mpp: float) -> float | None:
    """Width of the edges of hematoxylin in an image.

    Parameters
    ----------
    rgb : numpy.ndarray
        uint8, shape (h, w, 3).
    mpp : float
        µm per pixel.

    Returns
    -------
    float or None
        Standard deviation in µm, 0 to `LARGEST_UM`, of the Gaussian that would make a step as wide as the steepest
        edges are; some 0.4 for a sharp scan, as no nucleus ends in a step. None where nothing can be judged: without
        edges, below `SMALLEST_SIDE`, above `COARSEST_MPP`.

    References
    ----------
    Ratio of slopes: Zhuo and Sim, Defocus map estimation from a single image, Pattern Recognition 44, 2011.
    Other measures: Pertuz et al., Analysis of focus measure operators for shape-from-focus, Pattern Recognition 46,
    2013.
    """
    if min(rgb.shape[:2]) < SMALLEST_SIDE or mpp > COARSEST_MPP:
        return None
    density = hematoxylin_density(rgb)
    fine, coarse = (_slopes(density, sigma / mpp) for sigma in (FINE_UM, COARSE_UM))
    count = int(EDGE_SHARE * coarse.size)
    edges = coarse >= np.partition(coarse.ravel(), -count)[-count]
    fine_slope, coarse_slope = (float(slopes[edges].mean(dtype=np.float64)) for slopes in (fine, coarse))
    if coarse_slope < LEAST_SLOPE * mpp:
        return None
    ratio = (fine_slope / coarse_slope) ** 2
    if ratio <= 1:
        return LARGEST_UM
    # A difference over two pixels is a slope through a box of that width, of variance 1/3 pixel².
    variance = (COARSE_UM**2 - ratio * FINE_UM**2) / (ratio - 1) - mpp**2 / 3
    return min(LARGEST_UM, max(0.0, variance) ** 0.5)


def _slopes(values: np.ndarray, sigma: float) -> np.ndarray:
    """Slope at each pixel, per pixel, of values seen through a Gaussian; float32."""
    smooth = cv2.GaussianBlur(values, (0, 0), sigma, borderType=cv2.BORDER_REFLECT)
    across, down = (
        cv2.Sobel(smooth, cv2.CV_32F, *axis, ksize=1, scale=0.5, borderType=cv2.BORDER_REFLECT)
        for axis in ((1, 0), (0, 1))
    )
    # Not cv2.magnitude, whose last bits depend on where in memory the image lies.
    return np.asarray(np.sqrt(across * across + down * down))
