"""Random training samples: crops of annotated fields under augmentation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from pipeline.training.data import Field
from pipeline.training.labels import craft_distance, seam_weight

RUIFROK = np.array([[0.650, 0.704, 0.286], [0.072, 0.990, 0.105], [0.268, 0.570, 0.776]], np.float32)
"""Hematoxylin, eosin and residual OD vectors (Ruifrok and Johnston 2001)."""


@dataclass(frozen=True)
class Augmentation:
    """Ranges of the random changes to a sample.

    Parameters
    ----------
    scale : (float, float)
        Range of the zoom factor, drawn log-uniformly.
    rotation : float
        Largest rotation in degrees, beyond quarter turns and flips.
    stain : float
        Spread of the stain jitter (factor on each stain's OD; half of it as an offset), 0 for none.
    brightness : float
        Spread of the brightness factor.
    blur, noise : float
        Largest Gaussian blur (sigma, px) and camera noise (grey levels).
    """

    scale: tuple[float, float] = (0.7, 1.4)
    rotation: float = 180.0
    stain: float = 0.25
    brightness: float = 0.08
    blur: float = 1.0
    noise: float = 4.0

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale must be a growing positive range, got {self.scale}")


@dataclass(frozen=True, eq=False)
class PreparedField:
    """A field at the model's pixel size with what the network learns.

    Parameters
    ----------
    name : str
        Name of the field.
    images : tuple of numpy.ndarray
        uint8 ``(H, W, 3)`` versions of the image (as scanned, stain-normalised); each sample takes one.
    targets : numpy.ndarray
        uint8 ``(H, W, 3)``: nucleus, distance, seam weight; 255 is 1.
    """

    name: str
    images: tuple[np.ndarray, ...]
    targets: np.ndarray


def prepare_field(field: Field, mpp: float, versions: tuple[np.ndarray, ...] = ()) -> PreparedField:
    """Bring a field to the model's pixel size and craft its targets.

    Parameters
    ----------
    field : Field
        The field.
    mpp : float
        The model's pixel size in µm.
    versions : tuple of numpy.ndarray
        Further versions of the field's image.
    """
    factor = field.mpp / mpp
    size = (max(1, round(field.image.shape[1] * factor)), max(1, round(field.image.shape[0] * factor)))
    targets = np.dstack(
        [(field.labels > 0).astype(np.float32), craft_distance(field.labels), seam_weight(field.labels)]
    )
    how = cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR
    return PreparedField(
        field.name,
        tuple(cv2.resize(image, size, interpolation=how) for image in (field.image, *versions)),
        np.round(cv2.resize(targets, size, interpolation=how) * 255).astype(np.uint8),
    )


def jitter_stain(image: np.ndarray, rng: np.random.Generator, spread: float) -> np.ndarray:
    """Change the amount of each stain at random.

    Parameters
    ----------
    image : numpy.ndarray
        uint8 ``(H, W, 3)`` RGB.
    rng : numpy.random.Generator
        Source of randomness.
    spread : float
        Largest relative change of each stain; offsets are a tenth of it.

    References
    ----------
    Tellez et al., "Whole-slide mitosis detection in H&E breast histology using PHH3 as a reference", IEEE TMI 2018.
    """
    od = -np.log((image.astype(np.float32) + 1.0) / 256.0)
    factors = 1 + rng.uniform(-spread, spread, 3)
    offsets = rng.uniform(-spread, spread, 3) * 0.1
    mix = np.linalg.inv(RUIFROK) @ np.diag(factors) @ RUIFROK
    changed = od @ mix.astype(np.float32) + (offsets @ RUIFROK).astype(np.float32)
    return np.clip(256.0 * np.exp(-changed) - 1.0, 0, 255).astype(np.uint8)


def draw_sample(
    field: PreparedField, size: int, augmentation: Augmentation, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draw one augmented crop.

    Parameters
    ----------
    field : PreparedField
        Where to draw from.
    size : int
        Side of the crop in pixels.
    augmentation : Augmentation
        Ranges of the changes.
    rng : numpy.random.Generator
        Source of randomness.

    Returns
    -------
    image : numpy.ndarray
        uint8 ``(size, size, 3)``.
    targets : numpy.ndarray
        uint8 ``(size, size, 3)``: nucleus, distance, seam weight; 255 is 1.
    """
    image = field.images[rng.integers(len(field.images))]
    height, width = image.shape[:2]
    zoom = math.exp(rng.uniform(math.log(augmentation.scale[0]), math.log(augmentation.scale[1])))
    angle = math.radians(rng.uniform(-augmentation.rotation, augmentation.rotation))
    flip = 1.0 if rng.random() < 0.5 else -1.0
    # Crop pixel -> field pixel: turn, mirror and shrink about the crop's centre, which lands anywhere inside.
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]) @ np.diag([flip, 1.0])
    reach = min(size / zoom / 2, width / 2, height / 2)
    centre = np.array([rng.uniform(reach, width - reach), rng.uniform(reach, height - reach)])
    matrix = turn / zoom
    offset = centre - matrix @ np.array([size / 2, size / 2])
    affine = np.column_stack([matrix, offset]).astype(np.float32)
    options: dict[str, Any] = {
        "dsize": (size, size),
        "flags": cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        "borderMode": cv2.BORDER_REFLECT_101,
    }
    image = cv2.warpAffine(image, affine, **options)
    targets = cv2.warpAffine(field.targets, affine, **options)
    if augmentation.blur > 0 and rng.random() < 0.3:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.2, augmentation.blur))
    if augmentation.stain > 0:
        image = jitter_stain(image, rng, augmentation.stain)
    if augmentation.brightness > 0:
        gain = 1 + rng.uniform(-augmentation.brightness, augmentation.brightness)
        image = cv2.convertScaleAbs(image, alpha=gain)
    if augmentation.noise > 0 and rng.random() < 0.3:
        noise = rng.normal(0, rng.uniform(0, augmentation.noise), image.shape)
        image = np.clip(image + noise, 0, 255).astype(np.uint8)
    return image, targets
