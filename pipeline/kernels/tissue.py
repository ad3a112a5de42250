"""Find tissue on a low-resolution view of a slide.

Tissue is what has a higher optical density than the glass around it and is coloured as by hematoxylin and eosin.
Neutral objects (dust, shadows, black borders) and ink are not tissue.
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
_BLOCK = 1 << 19  # pixels processed at once


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
        Whether the view shows any glass; if not, `background` is a typical colour.
    threshold : float
        Decadic optical density in green above which a pixel counts as tissue.
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
        False when no such colour fills 1 % of the view; `colour` is then a typical one.
    """
    flat = rgb.reshape(-1, 3)
    is_glass, coloured = np.empty(len(flat), bool), np.empty(len(flat), bool)
    for part in _blocks(len(flat), _BLOCK):
        red, green, blue = (flat[part, channel].astype(np.int16) for channel in range(3))
        least = np.minimum(np.minimum(red, green), blue)  # ten times as fast as NumPy's min along an axis of three
        neutral = np.maximum(np.maximum(red, green), blue) - least <= 14
        # Pale stroma is nearly neutral too, but absorbs green more than red and blue, and is darker than most glass.
        tinge = red + blue - 2 * green
        is_glass[part] = neutral & (least >= 170) & (tinge <= np.where(green >= 228, 10, 5))
        coloured[part] = is_glass[part] & (least < 255)
    # Pure white may be filler where nothing was scanned, so it is ignored when there is glass of another colour.
    if np.count_nonzero(coloured) >= 0.01 * len(flat) and glass_is_darker(_histogram(flat[:, 1], coloured)):
        is_glass = coloured
    counts = _histogram(flat[:, 1], is_glass).astype(np.float64)
    near_counts = np.convolve(counts, np.ones(9), "same")
    common = np.nonzero(near_counts >= 0.01 * len(flat))[0]
    if not len(common):
        return _BACKGROUND, False
    # Glass is the brightest common colour; its most frequent value is searched from there downwards.
    top = int(common[-1])
    peak = top - int(near_counts[max(top - 8, 0) : top + 1][::-1].argmax())
    greens = flat[:, 1]
    mean = flat[is_glass & (greens >= max(peak - 4, 0)) & (greens <= min(peak + 4, 255))].mean(axis=0)
    return (float(mean[0]), float(mean[1]), float(mean[2])), True


def _blocks(length: int, step: int) -> Iterator[slice]:
    """Return slices of at most `step` items that cover `length` items."""
    return (slice(start, start + step) for start in range(0, length, step))


def _histogram(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Count how often each 8-bit value occurs where a mask is true, int64 ``(256,)``."""
    # By blocks, because `bincount` widens its input to 64 bits.
    counts = np.zeros(256, np.int64)
    for part in _blocks(len(values), _BLOCK):
        counts += np.bincount(values[part][mask[part]], minlength=256)
    return counts


def optical_density(rgb: np.ndarray, background: tuple[float, float, float]) -> np.ndarray:
    """Decadic optical density relative to a background, float32, shape of `rgb`; never negative."""
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
        bool, shape (h, w). Blue and green ink absorb red more than green, whereas hematoxylin absorbs as much green;
        red ink absorbs green and blue equally, whereas eosin hardly absorbs blue; black ink absorbs all equally.
    """
    red, green, blue = od[..., 0], od[..., 1], od[..., 2]
    darkest, lightest = np.maximum(np.maximum(red, green), blue), np.minimum(np.minimum(red, green), blue)
    strong = darkest > 0.25
    cold = (red > 1.3 * green + 0.03) | ((red > 1.02 * green) & (blue < 0.38 * red) & (red > 0.4))
    warm = (green > 0.65) & (blue > 0.8 * green) & (red < 0.25 * green)
    # Black and grey: the three channels agree within a sixth.
    neutral = (darkest > 0.45) & (lightest > 0.84 * darkest)
    black = lightest > 0.72
    return np.asarray((strong & cold) | warm | neutral | black)


def otsu(values: np.ndarray) -> float:
    """Otsu's threshold of values, from a histogram of 256 bins.

    References
    ----------
    Otsu, IEEE Trans. Syst. Man Cybern. 9, 1979.
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
    # Tissue may continue beyond the edge of the view: repeat the edge pixels there.
    padded = cv2.copyMakeBorder(mask.astype(np.uint8), pad, pad, pad, pad, cv2.BORDER_REPLICATE)
    return np.asarray(cv2.morphologyEx(padded, operation, kernel)[pad:-pad, pad:-pad].astype(bool))


def remove_small(mask: np.ndarray, pixels: float) -> np.ndarray:
    """Remove 8-connected parts of fewer than `pixels` pixels from a bool mask."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    keep = stats[:, cv2.CC_STAT_AREA] >= pixels
    keep[0] = False
    return np.asarray(keep[labels]) if count > 1 else np.zeros_like(mask)


def fill_small(mask: np.ndarray, pixels: float) -> np.ndarray:
    """Fill 4-connected holes of fewer than `pixels` pixels in a bool mask, except those that touch the mask's edge."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats((~mask).astype(np.uint8), connectivity=4)
    small = stats[:, cv2.CC_STAT_AREA] < pixels
    left, top = stats[:, cv2.CC_STAT_LEFT], stats[:, cv2.CC_STAT_TOP]
    right, bottom = left + stats[:, cv2.CC_STAT_WIDTH], top + stats[:, cv2.CC_STAT_HEIGHT]
    edge = (left == 0) | (top == 0) | (right == mask.shape[1]) | (bottom == mask.shape[0])
    fill = small & ~edge
    fill[0] = False
    return mask | fill[labels] if count > 1 else mask


def find_tissue(rgb: np.ndarray, mpp: float, min_area_um2: float = 10_000, min_hole_um2: float = 5_000) -> TissueMask:
    """Find tissue on a view of a slide.

    Parameters
    ----------
    rgb : numpy.ndarray
        View of the slide, uint8, shape (h, w, 3).
    mpp : float
        µm per pixel of the view, about 2 to 16.
    min_area_um2 : float
        Parts smaller than this are dropped. The limit is capped at 2 % of the view, so that small images keep their
        tissue.
    min_hole_um2 : float
        Holes smaller than this are filled.

    Returns
    -------
    TissueMask
    """
    background, found = background_colour(rgb)
    sigma = _SMOOTH_UM / mpp / 2
    smooth = cv2.GaussianBlur(rgb, (0, 0), sigma, borderType=cv2.BORDER_REPLICATE) if sigma > 0.3 else rgb
    # By blocks of rows, so that the optical density of the whole view is never in memory.
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
    # Otsu's method needs glass to compare with: without it, the tissue itself would be split.
    threshold = _THRESHOLDS[0]
    if found and not ink.all():
        threshold = float(np.clip(otsu(green[~ink]), *_THRESHOLDS))
    mask = (green > threshold) & stained & ~ink
    # No opening, which would cut thin strands; crumbs are removed by their area.
    mask = _morph(mask, cv2.MORPH_CLOSE, _CLOSE_UM, mpp) & ~ink
    view_um2 = mask.size * mpp**2
    mask = fill_small(mask, min_hole_um2 / mpp**2)
    mask = remove_small(mask, max(1.0, min(min_area_um2, 0.02 * view_um2) / mpp**2))
    return TissueMask(mask, background, found, threshold, ink)


def thumbnail_mpp(width_um: float, height_um: float, mpp0: float, mpp: float) -> float:
    """µm per pixel of the view on which tissue is found.

    This is `mpp`, except that small images get a finer view (at least 64 pixels along the shorter side, but never finer
    than level 0) and very large ones a coarser view.
    """
    fine = max(mpp0, min(mpp, min(width_um, height_um) / 64))
    return max(fine, math.sqrt(width_um * height_um / _MAX_PIXELS))
