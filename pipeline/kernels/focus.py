"""Measure the sharpness of an image of H&E tissue as the width of its edges in µm.

A blur with standard deviation ``b`` makes an edge a Gaussian ramp. After smoothing with a further Gaussian of standard
deviation ``s``, its slope is proportional to ``1 / sqrt(b² + s²)``, so that the ratio of its slopes for two values of
``s`` gives ``b``, whatever the height of the edge. Unlike the energy of a Laplacian, the result does not depend on the
strength of the stain or the amount of texture.
"""

from __future__ import annotations

import cv2
import numpy as np

from pipeline.kernels.hematoxylin import hematoxylin_density

FINE_UM, COARSE_UM = 0.5, 1.0
"""Standard deviations of the two Gaussians; the finer one suppresses most of the noise and of the JPEG blocks."""

EDGE_SHARE = 0.1
"""Share of the pixels that count as edges: those with the steepest slopes."""

LEAST_SLOPE = 0.04
"""Mean slope of edges, in natural OD of hematoxylin per µm, below which an image is not judged."""

LARGEST_UM = 4.0
"""Largest width that is returned; wider edges get this value."""

SMALLEST_SIDE = 32
"""Images with a side of fewer pixels are not judged."""

COARSEST_MPP = 0.8
"""Largest pixel size, in µm, at which the finer Gaussian still has a measurable effect."""

BLURRED_UM = 0.75
"""Width above which edges are out of focus: with this blur, a tenth of the nuclei are missed, and soon many more."""


def edge_blur(rgb: np.ndarray, mpp: float) -> float | None:
    """Measure the width of the edges of hematoxylin in an image.

    Parameters
    ----------
    rgb : numpy.ndarray
        uint8, shape (h, w, 3).
    mpp : float
        µm per pixel.

    Returns
    -------
    float or None
        Standard deviation in µm, 0 to `LARGEST_UM`, of the Gaussian that blurs a step to the width of the steepest
        edges; about 0.4 for a sharp scan, because nuclei do not end in a step. None if the image cannot be judged:
        without clear edges, smaller than `SMALLEST_SIDE`, or with pixels larger than `COARSEST_MPP`.

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
    # A difference over two pixels is the slope after a box filter of that width, which has a variance of 1/3 pixel².
    variance = (COARSE_UM**2 - ratio * FINE_UM**2) / (ratio - 1) - mpp**2 / 3
    return min(LARGEST_UM, max(0.0, variance) ** 0.5)


def _slopes(values: np.ndarray, sigma: float) -> np.ndarray:
    """Slope at each pixel, per pixel, of values smoothed by a Gaussian; float32."""
    smooth = cv2.GaussianBlur(values, (0, 0), sigma, borderType=cv2.BORDER_REFLECT)
    across, down = (
        cv2.Sobel(smooth, cv2.CV_32F, *axis, ksize=1, scale=0.5, borderType=cv2.BORDER_REFLECT)
        for axis in ((1, 0), (0, 1))
    )
    # Not cv2.magnitude, because its last bits depend on the position of the image in memory.
    return np.asarray(np.sqrt(across * across + down * down))
