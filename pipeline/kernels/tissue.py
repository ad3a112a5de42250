"""Where is tissue on a low-resolution view of a slide?

Decided by optical density: what absorbs more than the glass around it, and absorbs green the most, as hematoxylin and
eosin do. Neutral things (dust, shadows, black borders) and ink do not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np

from pipeline.kernels.stain import glass_is_darker

_BACKGROUND = (245.0, 245.0, 245.0)
_THRESHOLDS = (0.035, 0.06)
_SMOOTH_UM = 6.0
_CLOSE_UM = 16.0
_INK_MARGIN_UM = 24.0
_MAX_PIXELS = 64e6  # of the view
_BLOCK = 1 << 19  # pixels worked on at once


@dataclass(frozen=True)
class TissueMask:
    """Tissue on a low-resolution view.

    Parameters
    ----------
    mask : numpy.ndarray
        bool, shape (h, w).
    background : tuple of float
        Colour of the glass, RGB.
    background_found : bool
        Whether the view shows glass at all; a typical colour stands in where it does not.
    threshold : float
        Optical density in green above which a pixel counts.
    ink : numpy.ndarray
        bool, shape (h, w): pen marks.
    """

    mask: np.ndarray
    background: tuple[float, float, float]
    background_found: bool
    threshold: float
    ink: np.ndarray


def background_colour(rgb: np.ndarray) -> tuple[tuple[float, float, float], bool]:
    """Colour of the empty glass: the brightest neutral colour that is common.

    Parameters
    ----------
    rgb : numpy.ndarray
        uint8, shape (h, w, 3).

    Returns
    -------
    colour : tuple of float
        RGB, 0 to 255.
    found : bool
        False when no such colour fills 1 % of the view; `colour` is a typical one then.
    """
    flat = rgb.reshape(-1, 3)
    is_glass, coloured = np.empty(len(flat), bool), np.empty(len(flat), bool)
    for part in _blocks(len(flat), _BLOCK):
        red, green, blue = (flat[part, channel].astype(np.int16) for channel in range(3))
        least = np.minimum(np.minimum(red, green), blue)  # NumPy takes ten times as long along an axis of three
        neutral = np.maximum(np.maximum(red, green), blue) - least <= 14
        # Pale stroma is nearly neutral too, but takes more green than red and blue, and is less bright than most glass.
        tinge = red + blue - 2 * green
        is_glass[part] = neutral & (least >= 170) & (tinge <= np.where(green >= 228, 10, 5))
        coloured[part] = is_glass[part] & (least < 255)
    # What is wholly white may be filler, where nothing was scanned: it does not count beside glass of a colour.
    if np.count_nonzero(coloured) >= 0.01 * len(flat) and glass_is_darker(_histogram(flat[:, 1], coloured)):
        is_glass = coloured
    counts = _histogram(flat[:, 1], is_glass).astype(np.float64)
    near_counts = np.convolve(counts, np.ones(9), "same")
    common = np.nonzero(near_counts >= 0.01 * len(flat))[0]
    if not len(common):
        return _BACKGROUND, False
    # Glass is the brightest thing that is common; its own commonest colour is found from there downwards.
    top = int(common[-1])
    peak = top - int(near_counts[max(top - 8, 0) : top + 1][::-1].argmax())
    greens = flat[:, 1]
    mean = flat[is_glass & (greens >= max(peak - 4, 0)) & (greens <= min(peak + 4, 255))].mean(axis=0)
    return (float(mean[0]), float(mean[1]), float(mean[2])), True


def _blocks(length: int, step: int) -> Iterator[slice]:
    """Slices of at most `step` that cover `length`."""
    return (slice(start, start + step) for start in range(0, length, step))


def _histogram(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """How often each 8-bit value occurs where a mask holds, int64 ``(256,)``; by blocks, as `bincount` widens them."""
    counts = np.zeros(256, np.int64)
    for part in _blocks(len(values), _BLOCK):
        counts += np.bincount(values[part][mask[part]], minlength=256)
    return counts


def optical_density(rgb: np.ndarray, background: tuple[float, float, float]) -> np.ndarray:
    """Optical density over a background, float32, shape of `rgb`; never negative."""
    levels = np.arange(256, dtype=np.float64)
    out = np.empty(rgb.shape, np.float32)
    for channel in range(3):
        table = np.maximum(-np.log10((levels + 1) / (background[channel] + 1)), 0).astype(np.float32)
        out[..., channel] = table[rgb[..., channel]]
    return out


def ink_mask(od: np.ndarray) -> np.ndarray:
    """Pen marks: strong absorption in proportions that no histological stain has.

    Parameters
    ----------
    od : numpy.ndarray
        Optical density, float32, shape (h, w, 3).

    Returns
    -------
    numpy.ndarray
        bool, shape (h, w). Blue and green ink take red more than green light, where hematoxylin takes as much green;
        red ink takes green and blue alike, where eosin leaves blue; black ink takes all alike.
    """
    red, green, blue = od[..., 0], od[..., 1], od[..., 2]
    darkest, lightest = np.maximum(np.maximum(red, green), blue), np.minimum(np.minimum(red, green), blue)
    strong = darkest > 0.25
    cold = (red > 1.3 * green + 0.03) | ((red > 1.02 * green) & (blue < 0.38 * red) & (red > 0.4))
    warm = (green > 0.65) & (blue > 0.8 * green) & (red < 0.25 * green)
    # Black and grey: the three agree within a sixth.
    neutral = (darkest > 0.45) & (lightest > 0.84 * darkest)
    black = lightest > 0.72
    return np.asarray((strong & cold) | warm | neutral | black)


def otsu(values: np.ndarray) -> float:
    """Otsu's threshold of values, float.

    Otsu, IEEE Trans. Syst. Man Cybern. 9 (1979), over 256 bins.
    """
    top = float(values.max(initial=0.0))
    if top <= 0:
        return 0.0
    counts, edges = np.histogram(values, bins=256, range=(0.0, top))
    middle = (edges[:-1] + edges[1:]) / 2
    weight = np.cumsum(counts, dtype=np.float64)
    total, mean = weight[-1], np.cumsum(counts * middle)
    with np.errstate(divide="ignore", invalid="ignore"):
        between = (mean[-1] * weight / total - mean) ** 2 / (weight * (total - weight))
    return float(middle[int(np.nanargmax(np.where(np.isfinite(between), between, -1.0)))])


def _disk(um: float, mpp: float) -> np.ndarray | None:
    radius = round(um / mpp)
    if radius < 1:
        return None
    return np.asarray(cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1)))


def _morph(mask: np.ndarray, operation: int, um: float, mpp: float) -> np.ndarray:
    kernel = _disk(um, mpp)
    if kernel is None:
        return mask
    pad = kernel.shape[0]
    # Tissue goes on beyond the edge of the view: its own edge pixels stand in for it.
    padded = cv2.copyMakeBorder(mask.astype(np.uint8), pad, pad, pad, pad, cv2.BORDER_REPLICATE)
    return np.asarray(cv2.morphologyEx(padded, operation, kernel)[pad:-pad, pad:-pad].astype(bool))


def remove_small(mask: np.ndarray, pixels: float) -> np.ndarray:
    """Drop 8-connected parts of a bool mask that are smaller than a number of pixels."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    keep = stats[:, cv2.CC_STAT_AREA] >= pixels
    keep[0] = False
    return np.asarray(keep[labels]) if count > 1 else np.zeros_like(mask)


def fill_small(mask: np.ndarray, pixels: float) -> np.ndarray:
    """Fill 4-connected holes of a bool mask of fewer than a number of pixels; bays at the edge are not holes."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats((~mask).astype(np.uint8), connectivity=4)
    small = stats[:, cv2.CC_STAT_AREA] < pixels
    left, top = stats[:, cv2.CC_STAT_LEFT], stats[:, cv2.CC_STAT_TOP]
    right, bottom = left + stats[:, cv2.CC_STAT_WIDTH], top + stats[:, cv2.CC_STAT_HEIGHT]
    edge = (left == 0) | (top == 0) | (right == mask.shape[1]) | (bottom == mask.shape[0])
    fill = small & ~edge
    fill[0] = False
    return mask | fill[labels] if count > 1 else mask


def find_tissue(rgb: np.ndarray, mpp: float, min_area_um2: float = 10_000, min_hole_um2: float = 5_000) -> TissueMask:
    """Find tissue.

    Parameters
    ----------
    rgb : numpy.ndarray
        View of the slide, uint8, shape (h, w, 3).
    mpp : float
        µm per pixel of the view, some 2 to 16.
    min_area_um2 : float
        Parts smaller than this are dropped; at most a fiftieth of the view, so that a small image keeps its tissue.
    min_hole_um2 : float
        Holes smaller than this are filled.

    Returns
    -------
    TissueMask
    """
    background, found = background_colour(rgb)
    sigma = _SMOOTH_UM / mpp / 2
    smooth = cv2.GaussianBlur(rgb, (0, 0), sigma, borderType=cv2.BORDER_REPLICATE) if sigma > 0.3 else rgb
    # By rows, so that the optical density of the whole view is never held.
    green, ink, stained = (
        np.empty(rgb.shape[:2], np.float32),
        np.empty(rgb.shape[:2], bool),
        np.empty(rgb.shape[:2], bool),
    )
    for rows in _blocks(len(rgb), max(1, _BLOCK // max(1, rgb.shape[1]))):
        od = optical_density(np.asarray(smooth[rows]), background)
        ink[rows] = ink_mask(od)
        green[rows] = od[..., 1]
        red, blue = od[..., 0], od[..., 2]
        spread = np.maximum(np.maximum(red, green[rows]), blue) - np.minimum(np.minimum(red, green[rows]), blue)
        stained[rows] = spread > np.maximum(0.015, 0.12 * green[rows])
    if ink.any():
        ink = _morph(remove_small(ink, 400 / mpp**2), cv2.MORPH_DILATE, _INK_MARGIN_UM, mpp)
    # Without glass to compare with, Otsu would split the tissue itself.
    threshold = _THRESHOLDS[0]
    if found and not ink.all():
        threshold = float(np.clip(otsu(green[~ink]), *_THRESHOLDS))
    mask = (green > threshold) & stained & ~ink
    # Nothing is opened: that would cut thin strands, and crumbs go by their area.
    mask = _morph(mask, cv2.MORPH_CLOSE, _CLOSE_UM, mpp) & ~ink
    view_um2 = mask.size * mpp**2
    mask = fill_small(mask, min_hole_um2 / mpp**2)
    mask = remove_small(mask, max(1.0, min(min_area_um2, 0.02 * view_um2) / mpp**2))
    return TissueMask(mask, background, found, threshold, ink)


def thumbnail_mpp(width_um: float, height_um: float, mpp0: float, mpp: float) -> float:
    """µm per pixel of the view to look at.

    `mpp`, finer on small images (64 pixels along the shorter side, never finer than the slide), coarser on giants.
    """
    fine = max(mpp0, min(mpp, min(width_um, height_um) / 64))
    return max(fine, math.sqrt(width_um * height_um / _MAX_PIXELS))
