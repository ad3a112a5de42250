"""Compute nucleus and distance maps from hematoxylin alone, without learning: a baseline that a model must beat.

All operations are local and have a fixed scale: a pixel's values depend only on pixels at most
`HematoxylinRules.reach` away.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from pipeline.kernels.stain import MAX_OD, OD_TABLE, RUIFROK, unmixing

_MAX_DEPTH = 24
"""Distances to the background are limited to this many pixels."""


@dataclass(frozen=True)
class HematoxylinRules:
    """Scales in pixels and thresholds in natural optical density of hematoxylin.

    Parameters
    ----------
    smooth : float
        Standard deviation of the first smoothing.
    surround : int
        Half the side of the square whose mean density is the local background.
    contrast : float
        A nucleus is at least this much denser than the local background.
    density : float
        A nucleus has at least this density, whatever its surroundings.
    softness : float
        Increase in density over which the nucleus map rises from 0.5 to 0.73.
    depth_smooth : float
        Standard deviation of the smoothing of distances to the background.
    peak : int
        Radius of the disk in which a distance is compared with the largest one.
    """

    smooth: float = 1.5
    surround: int = 32
    contrast: float = 0.05
    density: float = 0.65
    softness: float = 0.1
    depth_smooth: float = 1.5
    peak: int = 8

    def __post_init__(self) -> None:
        for name in ("smooth", "softness", "depth_smooth"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("surround", "peak"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def reach(self) -> int:
        """Distance in pixels beyond which no pixel affects a pixel's values."""
        return 2 * (round(4 * self.smooth) + self.surround) + _MAX_DEPTH + round(4 * self.depth_smooth) + self.peak


def hematoxylin_density(rgb: np.ndarray) -> np.ndarray:
    """Natural optical density of hematoxylin of RGB uint8 ``(H, W, 3)`` by Ruifrok's vectors, float32 ``(H, W)``."""
    weights = unmixing(RUIFROK)[:, 0].astype(np.float32)
    return np.asarray(cv2.transform(cv2.LUT(rgb, OD_TABLE), weights[None]))


def hematoxylin_maps(rgb: np.ndarray, rules: HematoxylinRules) -> np.ndarray:
    """Compute the nucleus map and the distance map of an image.

    Parameters
    ----------
    rgb : numpy.ndarray
        uint8 ``(H, W, 3)``.
    rules : HematoxylinRules
        Scales and thresholds.

    Returns
    -------
    numpy.ndarray
        uint8 ``(2, H, W)``: the nucleus map is at least 128 where hematoxylin is dense enough, both in absolute terms
        and compared with its surroundings. The distance map is the depth inside the nucleus divided by the largest
        depth nearby, so that it is 255 in the middle of nuclei and falls towards necks between them.

    References
    ----------
    Stain vectors: Ruifrok and Johnston, Anal. Quant. Cytol. Histol. 23, 2001.
    """
    density = cv2.GaussianBlur(hematoxylin_density(rgb), (0, 0), rules.smooth, borderType=cv2.BORDER_REFLECT)
    np.clip(density, 0, np.float32(MAX_OD), out=density)
    side = 2 * rules.surround + 1
    level = cv2.blur(density, (side, side), borderType=cv2.BORDER_REFLECT) + np.float32(rules.contrast)
    np.maximum(level, np.float32(rules.density), out=level)
    nucleus = 255 / (1 + np.exp((level - density) / np.float32(rules.softness)))
    depth = cv2.distanceTransform((density >= level).view(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_5)
    np.minimum(depth, _MAX_DEPTH, out=depth)
    depth = cv2.GaussianBlur(depth, (0, 0), rules.depth_smooth, borderType=cv2.BORDER_REFLECT)
    side = 2 * rules.peak + 1
    highest = cv2.dilate(depth, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side)))
    distance = np.where(highest > 0, 255 * depth / np.maximum(highest, np.float32(1)), 0)
    return np.rint(np.stack([nucleus, distance])).astype(np.uint8)
