"""Draw the instances found by a network as maps from which the stage `instances` recovers them."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

LEVELS = range(32, 256, 16)
"""Values of the distance map at each of which the pixels of at least that value form one connected part."""

SLACK = 2
"""Distance in pixels beyond its core within which a window also draws nuclei."""


@dataclass(frozen=True, eq=False)
class Detections:
    """Nuclei that a network of the Mask R-CNN type detects in a window.

    Parameters
    ----------
    boxes : numpy.ndarray
        float ``(n, 4)``: left, top, right, bottom in pixels; whole numbers are edges of pixels.
    scores : numpy.ndarray
        float ``(n,)`` in [0, 1].
    masks : numpy.ndarray
        float32 ``(n, m, m)`` in [0, 1]: probability of the nucleus, on a grid that covers its box.
    """

    boxes: np.ndarray
    scores: np.ndarray
    masks: np.ndarray


def paste_mask(
    mask: np.ndarray, box: np.ndarray, shape: tuple[int, int], threshold: float
) -> tuple[np.ndarray, int, int]:
    """Resample a mask from its box to the pixels of a window.

    Parameters
    ----------
    mask : numpy.ndarray
        float32 ``(m, m)`` in [0, 1], on a grid that covers `box`.
    box : numpy.ndarray
        Left, top, right, bottom in pixels.
    shape : (int, int)
        Height and width of the window.
    threshold : float
        Mask value from which a pixel is inside.

    Returns
    -------
    inside : numpy.ndarray
        bool ``(h, w)``: pixels whose centre is inside; empty when the box lies outside the window.
    top, left : int
        Row and column of the first pixel of `inside` in the window.
    """
    x0, y0, x1, y1 = (float(v) for v in box)
    left, top = max(int(np.floor(x0)), 0), max(int(np.floor(y0)), 0)
    right, bottom = min(int(np.ceil(x1)), shape[1]), min(int(np.ceil(y1)), shape[0])
    if right <= left or bottom <= top or x1 <= x0 or y1 <= y0:
        return np.zeros((0, 0), bool), top, left
    side = mask.shape[0]
    scale_x, scale_y = side / (x1 - x0), side / (y1 - y0)
    affine = np.array(
        [
            [scale_x, 0, (left + 0.5 - x0) * scale_x - 0.5],
            [0, scale_y, (top + 0.5 - y0) * scale_y - 0.5],
        ]
    )
    values = cv2.warpAffine(
        mask,
        affine,
        dsize=(right - left, bottom - top),
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_REPLICATE,
    )
    return values >= threshold, top, left


def _largest_part(mask: np.ndarray) -> np.ndarray:
    count, parts, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=4, ltype=cv2.CV_32S)
    if count <= 2:
        return mask
    return np.asarray(parts == 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax()))


def depth_map(mask: np.ndarray) -> np.ndarray:
    """Distance to the mask's border, scaled to 255 at the deepest point, with a single peak.

    A mask with a waist has two peaks, from which the watershed would make two nuclei. Lower peaks are therefore cut
    down to the height at which they join the highest one, in the steps of `LEVELS`.

    Parameters
    ----------
    mask : numpy.ndarray
        bool ``(H, W)``, connected.

    Returns
    -------
    numpy.ndarray
        uint8 ``(H, W)``, 0 outside the mask.
    """
    padded = np.pad(mask, 1).astype(np.uint8)
    depth = cv2.distanceTransform(padded, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)[1:-1, 1:-1]
    values = np.ceil(depth / depth.max() * 255).astype(np.uint8)
    peak = np.unravel_index(int(depth.argmax()), depth.shape)
    for level in LEVELS:
        count, parts = cv2.connectedComponents((values >= level).astype(np.uint8), connectivity=8)
        if count > 2:
            values[(parts != parts[peak]) & (parts > 0)] = level - 1
    return values


def draw_instances(found: Detections, shape: tuple[int, int], margin: int = 0, threshold: float = 0.5) -> np.ndarray:
    """Draw the nuclei that belong to a window.

    Nuclei take their pixels in descending order of score. A nucleus with at least half of its pixels already taken is a
    duplicate and is left out. A nucleus belongs to the window when the middle of its bounding box lies in the window's
    core. The cores of neighbouring windows adjoin; each window also draws nuclei up to `SLACK` pixels beyond its core,
    so that none is lost when two windows locate its middle slightly differently. A nucleus that both windows draw
    coincides with itself: the maps of neighbouring windows are joined by their maximum, which does not depend on order.

    Parameters
    ----------
    found : Detections
        All nuclei that the network detects in the window.
    shape : (int, int)
        Height and width of the window.
    margin : int
        Distance in pixels between the window's edges and its core; with 0, all nuclei are drawn.
    threshold : float
        Mask value from which a pixel is inside.

    Returns
    -------
    numpy.ndarray
        uint8 ``(2, H, W)``: the nucleus map, which has the score (255 is 1) at all pixels of a nucleus, and the
        distance map.
    """
    maps = np.zeros((2, *shape), np.uint8)
    taken = np.zeros(shape, bool)
    low = margin - SLACK if margin else 0
    high = (shape[0] - low, shape[1] - low)
    for index in np.argsort(-found.scores, kind="stable"):
        inside, top, left = paste_mask(found.masks[index], found.boxes[index], shape, threshold)
        if not inside.any():
            continue
        window = np.s_[top : top + inside.shape[0], left : left + inside.shape[1]]
        free = inside & ~taken[window]
        if 2 * np.count_nonzero(free) <= np.count_nonzero(inside):
            continue
        free = _largest_part(free)
        taken[window] |= free
        rows, columns = np.flatnonzero(free.any(axis=1)), np.flatnonzero(free.any(axis=0))
        middle = (top + (int(rows[0]) + int(rows[-1])) // 2, left + (int(columns[0]) + int(columns[-1])) // 2)
        if not (low <= middle[0] < high[0] and low <= middle[1] < high[1]):
            continue
        score = max(1, round(255 * float(found.scores[index])))
        np.copyto(maps[0][window], np.uint8(score), where=free)
        np.copyto(maps[1][window], depth_map(free), where=free)
    return maps
