"""Style transfer as augmentation: samples take on the colour distributions of other fields."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.kernels.stain import MIN_PIXELS, StainTransform, cumulative, matching_table, tissue_pixels

ALPHA = (0.5, 1.0)
"""Range of the strength of a random style."""


def tones(image: np.ndarray) -> np.ndarray | None:
    """Cumulative distribution of each channel over a field's tissue.

    Parameters
    ----------
    image : numpy.ndarray
        uint8 ``(H, W, 3)`` RGB.

    Returns
    -------
    numpy.ndarray or None
        float64 ``(3, 256)``; None when there is too little tissue.
    """
    pixels = tissue_pixels(image)
    return cumulative(pixels) if len(pixels) >= MIN_PIXELS else None


def restyle(image: np.ndarray, own: np.ndarray, target: np.ndarray, alpha: float) -> np.ndarray:
    """Match the histogram of a sample to another field's; the background is unchanged.

    The look-up tables are those of the whole field, not of the sample.

    Parameters
    ----------
    image : numpy.ndarray
        uint8 ``(H, W, 3)``, part of a field.
    own, target : numpy.ndarray
        `tones` of the sample's field and of the field whose style it takes on.
    alpha : float
        Strength: 0 leaves the image as it is, 1 gives it the target's distributions.
    """
    table = matching_table(own, target, alpha)
    return StainTransform("lut", lut=tuple(map(tuple, table.tolist()))).apply(image)


def random_style(
    image: np.ndarray, own: np.ndarray | None, targets: Sequence[np.ndarray], rng: np.random.Generator
) -> np.ndarray:
    """Apply `restyle` with a random target and strength (see `ALPHA`); no change when `own` or targets are missing."""
    if own is None or not targets:
        return image
    return restyle(image, own, targets[int(rng.integers(len(targets)))], float(rng.uniform(*ALPHA)))
