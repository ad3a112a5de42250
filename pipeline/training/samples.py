"""Random training samples: augmented crops of annotated fields."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from pipeline.training.data import Field
from pipeline.training.field import at_mpp
from pipeline.training.style import random_style, tones
from pipeline.training.targets import Targets, class_map

RUIFROK = np.array([[0.650, 0.704, 0.286], [0.072, 0.990, 0.105], [0.268, 0.570, 0.776]], np.float32)
"""Hematoxylin, eosin and residual OD vectors (Ruifrok and Johnston 2001)."""


NUCLEUS_DISTANCE = Targets()

FLIPS = ("horizontal", "vertical")

MARGIN = 24
"""Width in pixels of the margin around a sample within which targets are crafted, so that nuclei on its edges are
whole."""


def gaussian_blur(image: np.ndarray, rng: np.random.Generator, largest: float) -> np.ndarray:
    """Blur an image by a Gaussian with a sigma of up to `largest` pixels."""
    return cv2.GaussianBlur(image, (0, 0), rng.uniform(min(0.2, largest), largest))


def median_blur(image: np.ndarray, rng: np.random.Generator, largest: float) -> np.ndarray:
    """Median over squares with a side of ``2 * largest + 1`` pixels, at least 3."""
    return cv2.medianBlur(image, 2 * max(1, round(largest)) + 1)


def motion_blur(image: np.ndarray, rng: np.random.Generator, largest: float) -> np.ndarray:
    """Mean along a line of ``2 * largest + 1`` pixels, at least 3, in a random direction."""
    reach = max(1, round(largest))
    line = np.zeros((2 * reach + 1, 2 * reach + 1), np.uint8)
    angle = rng.uniform(0, math.pi)
    tip = round(reach * math.cos(angle)), round(reach * math.sin(angle))
    cv2.line(line, (reach - tip[0], reach - tip[1]), (reach + tip[0], reach + tip[1]), 1)
    return cv2.filter2D(image, -1, line.astype(np.float32) / line.sum(), borderType=cv2.BORDER_REFLECT_101)


BLURS = {"gaussian": gaussian_blur, "median": median_blur, "motion": motion_blur}
"""Ways to blur a sample, by name."""


@dataclass(frozen=True)
class Augmentation:
    """Ranges of the random changes to a sample.

    Parameters
    ----------
    scale : (float, float)
        Range of the zoom factor, drawn log-uniformly.
    rotation : float
        Largest rotation in degrees, beyond quarter turns and flips.
    quarter_turns : bool
        Whether to rotate by a random multiple of 90 degrees as well.
    flips : tuple of str
        Directions in which samples are mirrored, each with probability 1/2: ``horizontal``, ``vertical``.
    shear : float
        Largest shear in degrees.
    style : float
        Share of samples that take on the look of another field, see `pipeline.training.style`.
    stain : float
        Largest relative change of each stain's OD; offsets of up to a tenth of it are added. 0 for none.
    brightness, contrast, saturation : float
        Largest relative change of each.
    hue : float
        Largest shift of the hue in degrees.
    blur, noise : float
        Largest blur (px; the sigma of a Gaussian, the reach of the other kinds) and camera noise (grey levels).
    blur_share : float
        Share of the samples that are blurred.
    blurs : tuple of str
        Kinds of blur, keys of `BLURS`, all equally likely.
    """

    scale: tuple[float, float] = (0.7, 1.4)
    rotation: float = 180.0
    quarter_turns: bool = False
    flips: tuple[str, ...] = ("horizontal",)
    shear: float = 0.0
    style: float = 0.0
    stain: float = 0.25
    brightness: float = 0.08
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    blur: float = 1.0
    noise: float = 4.0
    blur_share: float = 0.3
    blurs: tuple[str, ...] = ("gaussian",)

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale must be a growing positive range, got {self.scale}")
        if not 0 <= self.style <= 1:
            raise ValueError(f"style is a share of the samples, got {self.style}")
        if not 0 <= self.shear < 45:
            raise ValueError(f"shear must be 0 to 45 degrees, got {self.shear}")
        unknown = set(self.flips) - set(FLIPS)
        if unknown:
            raise ValueError(f"flips are horizontal and vertical, got {min(unknown)!r}")
        if not 0 <= self.blur_share <= 1:
            raise ValueError(f"blur_share is a share of the samples, got {self.blur_share}")
        if not self.blurs or set(self.blurs) - set(BLURS):
            raise ValueError(f"blurs are {', '.join(BLURS)}, got {', '.join(self.blurs) or 'none'}")


@dataclass(frozen=True, eq=False)
class PreparedField:
    """A field at the model's pixel size with its targets.

    Parameters
    ----------
    name : str
        Name of the field.
    images : tuple of numpy.ndarray
        uint8 ``(H, W, 3)`` versions of the image (as scanned, stain-normalised); each sample uses one of them.
    targets : numpy.ndarray
        uint8 ``(H, W, n)``: the warped targets; 255 is 1.
    spec : Targets
        Says which targets the field has.
    labels, types : numpy.ndarray, optional
        float32 label map and uint8 class map ``(H, W)``, if targets are crafted from them for each sample.
    tones : tuple of numpy.ndarray or None
        Tones of each of `images`, see `pipeline.training.style.tones`; empty without style augmentation.
    """

    name: str
    images: tuple[np.ndarray, ...]
    targets: np.ndarray
    spec: Targets = NUCLEUS_DISTANCE
    labels: np.ndarray | None = None
    types: np.ndarray | None = None
    tones: tuple[np.ndarray | None, ...] = ()


def prepare_field(
    field: Field,
    mpp: float,
    versions: tuple[np.ndarray, ...] = (),
    spec: Targets = NUCLEUS_DISTANCE,
    class_names: Mapping[str, str] | None = None,
    styled: bool = False,
    taught: Mapping[str, np.ndarray] | None = None,
    share: float = 0.5,
) -> PreparedField:
    """Bring a field to the model's pixel size and craft its targets.

    Parameters
    ----------
    field : Field
        The field.
    mpp : float
        The model's pixel size in µm.
    versions : tuple of numpy.ndarray
        Further versions of the field's image.
    spec : Targets
        Targets to craft.
    class_names : mapping of str to str, optional
        Class of the type head by class of the field, where they differ.
    styled : bool
        Whether to prepare for samples that take on the look of other fields.
    taught, share
        A teacher's maps and their share in the targets, see `Targets.of_field`.
    """
    images = tuple(at_mpp(image, field.mpp, mpp) for image in (field.image, *versions))
    size = images[0].shape[1::-1]
    labels = types = None
    if spec.crafted:
        # OpenCV cannot warp int32; float32 is exact up to 2**24.
        labels = cv2.resize(field.labels.astype(np.float32), size, interpolation=cv2.INTER_NEAREST_EXACT)
        types = class_map(field, spec.classes, class_names)
        if types is not None:
            types = cv2.resize(types, size, interpolation=cv2.INTER_NEAREST_EXACT)
    return PreparedField(
        field.name,
        images,
        np.round(at_mpp(spec.of_field(field, taught, share), field.mpp, mpp) * 255).astype(np.uint8),
        spec,
        labels,
        types,
        tuple(tones(image) for image in images) if styled else (),
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
    return np.clip(np.rint(256.0 * np.exp(-changed) - 1.0), 0, 255).astype(np.uint8)


def jitter_colour(
    image: np.ndarray, rng: np.random.Generator, *, hue: float = 0, saturation: float = 0, contrast: float = 0
) -> np.ndarray:
    """Change hue (degrees), saturation and contrast (relative) of a uint8 RGB image by up to these amounts."""
    if hue > 0 or saturation > 0:
        hsv = cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2HSV)
        hsv[..., 0] = (hsv[..., 0] + rng.uniform(-hue, hue)) % 360
        hsv[..., 1] = np.clip(hsv[..., 1] * (1 + rng.uniform(-saturation, saturation)), 0, 1)
        image = np.round(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB) * 255).astype(np.uint8)
    if contrast > 0:
        gain = 1 + rng.uniform(-contrast, contrast)
        mean = image.mean()
        image = np.clip(np.rint((image - mean) * gain + mean), 0, 255).astype(np.uint8)
    return image


def draw_sample(
    field: PreparedField,
    size: int,
    augmentation: Augmentation,
    rng: np.random.Generator,
    stride: int = 0,
    styles: Sequence[np.ndarray] = (),
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
    stride : int
        Spacing in pixels of the grid on which crops lie, the last ones at the field's end; 0: anywhere.
    styles : sequence of numpy.ndarray
        Tones that the sample may take on, see `pipeline.training.style.tones`.

    Returns
    -------
    image : numpy.ndarray
        uint8 ``(size, size, 3)``.
    targets : numpy.ndarray
        uint8 ``(size, size, n)``, see `Targets`.
    """
    version = int(rng.integers(len(field.images)))
    image = field.images[version]
    height, width = image.shape[:2]
    zoom = math.exp(rng.uniform(math.log(augmentation.scale[0]), math.log(augmentation.scale[1])))
    angle = math.radians(rng.uniform(-augmentation.rotation, augmentation.rotation))
    mirror = [-1.0 if name in augmentation.flips and rng.random() >= 0.5 else 1.0 for name in FLIPS]
    if augmentation.quarter_turns:
        angle += math.pi / 2 * rng.integers(4)
    # The matrix maps crop pixels to field pixels: it rotates, mirrors and scales about the crop's centre, which is
    # placed at random inside the field.
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]) @ np.diag(mirror)
    if augmentation.shear > 0:
        slant = math.tan(math.radians(rng.uniform(-augmentation.shear, augmentation.shear)))
        turn = turn @ np.array([[1.0, slant], [0.0, 1.0]])
    if stride:
        centre = np.array([_on_grid(side, size, stride, rng) for side in (width, height)])
    else:
        reach = min(size / zoom / 2, width / 2, height / 2)
        centre = np.array([rng.uniform(reach, width - reach), rng.uniform(reach, height - reach)])
    matrix = turn / zoom
    offset = centre - matrix @ np.array([size / 2, size / 2])
    affine = np.column_stack([matrix, offset]).astype(np.float32)
    options: dict[str, Any] = {"borderMode": cv2.BORDER_REFLECT_101}
    linear = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    image = cv2.warpAffine(image, affine, dsize=(size, size), flags=linear, **options)
    targets = cv2.warpAffine(field.targets, affine, dsize=(size, size), flags=linear, **options)
    if field.labels is not None:
        wide = np.column_stack([matrix, offset - matrix @ np.full(2, MARGIN)]).astype(np.float32)
        options |= {"dsize": (size + 2 * MARGIN,) * 2, "flags": cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP}
        labels = cv2.warpAffine(field.labels, wide, **options).astype(np.int32)
        types = None if field.types is None else cv2.warpAffine(field.types, wide, **options)
        inner = np.s_[MARGIN : MARGIN + size, MARGIN : MARGIN + size]
        targets = np.dstack([targets, field.spec.of_sample(labels, types)[inner]])
    if augmentation.style > 0 and field.tones and rng.random() < augmentation.style:
        image = random_style(image, field.tones[version], styles, rng)
    if augmentation.blur > 0 and rng.random() < augmentation.blur_share:
        kinds = augmentation.blurs
        kind = kinds[int(rng.integers(len(kinds)))] if len(kinds) > 1 else kinds[0]
        image = BLURS[kind](image, rng, augmentation.blur)
    if augmentation.stain > 0:
        image = jitter_stain(image, rng, augmentation.stain)
    if augmentation.brightness > 0:
        gain = 1 + rng.uniform(-augmentation.brightness, augmentation.brightness)
        image = cv2.convertScaleAbs(image, alpha=gain)
    colour = {name: getattr(augmentation, name) for name in ("hue", "saturation", "contrast")}
    if any(colour.values()):
        image = jitter_colour(image, rng, **colour)
    if augmentation.noise > 0 and rng.random() < 0.3:
        noise = rng.normal(0, rng.uniform(0, augmentation.noise), image.shape)
        image = np.clip(np.rint(image + noise), 0, 255).astype(np.uint8)
    return image, targets


def _on_grid(side: int, size: int, stride: int, rng: np.random.Generator) -> float:
    """Centre of a random crop along one axis, whose start is a multiple of `stride` or the last one that fits."""
    last = max(0, side - size)
    start = min(int(rng.integers(-(-last // stride) + 1)) * stride, last)
    return min(start + size / 2, side - min(size, side) / 2)
