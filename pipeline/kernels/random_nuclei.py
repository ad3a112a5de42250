"""Make instance label maps of random nuclei, for which images are to be synthesised."""

from __future__ import annotations

import math
from collections.abc import Sequence

import cv2
import numpy as np

SPACING = 0.8
"""Smallest distance between two centres, as a share of the sum of both radii."""

TRIES = 30
"""Positions that are tried for a nucleus before it is left out."""

MIN_PIXELS = 12
"""Fewest pixels that a nucleus has within the map."""

OVERLAP = 0.1
"""Largest share of a nucleus that other nuclei may already cover, see `paint_nucleus`."""

LEAST_PIXELS = 30
"""Fewest pixels of a nucleus whose shape is reused."""


def drawn_nucleus(radius: float, rng: np.random.Generator) -> np.ndarray:
    """Draw an ellipse whose outline is displaced by up to 10 to 20 % at 8 to 12 points, with a spline between them.

    Parameters
    ----------
    radius : float
        Radius of the circle with the ellipse's area, in pixels.
    rng : numpy.random.Generator
        Source of randomness.

    Returns
    -------
    numpy.ndarray
        bool ``(H, W)``, the nucleus in the middle.
    """
    from scipy.interpolate import CubicSpline
    from skimage.draw import polygon

    corners = int(rng.integers(8, 13))
    moved = rng.uniform(0.1, 0.2) * rng.uniform(-1, 1, corners)
    spline = CubicSpline(np.linspace(0, 2 * math.pi, corners + 1), np.append(moved, moved[0]), bc_type="periodic")
    around = np.linspace(0, 2 * math.pi, 72, endpoint=False)
    aspect, turn = math.sqrt(rng.uniform(0.55, 1)), rng.uniform(0, math.pi)
    x, y = radius / aspect * np.cos(around), radius * aspect * np.sin(around)
    points = (1 + spline(around)) * np.stack(
        [math.cos(turn) * x - math.sin(turn) * y, math.sin(turn) * x + math.cos(turn) * y]
    )
    reach = math.ceil(np.abs(points).max()) + 1
    mask = np.zeros((2 * reach + 1, 2 * reach + 1), bool)
    mask[polygon(points[1] + reach, points[0] + reach, mask.shape)] = True
    return mask


def turned_nucleus(shape: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Rotate a known nucleus by a random angle, mirror it at random and scale it by a random factor of 0.8 to 1.2.

    Parameters
    ----------
    shape : numpy.ndarray
        bool ``(h, w)``, the nucleus.
    rng : numpy.random.Generator
        Source of randomness.

    Returns
    -------
    numpy.ndarray
        bool ``(H, W)``, the nucleus in the middle.
    """
    scale, angle = rng.uniform(0.8, 1.2), rng.uniform(0, 2 * math.pi)
    reach = math.ceil(scale * math.hypot(*shape.shape) / 2) + 1
    turn = scale * np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    turn[:, 0] *= rng.choice([-1, 1])
    middle = np.array([(shape.shape[1] - 1) / 2, (shape.shape[0] - 1) / 2])
    matrix = np.column_stack([turn, np.full(2, reach) - turn @ middle])
    side = 2 * reach + 1
    return np.asarray(cv2.warpAffine(shape.astype(np.float32), matrix, (side, side)) >= 0.5)


def paint_nucleus(labels: np.ndarray, mask: np.ndarray, place: tuple[int, int], overlap: float) -> bool:
    """Add a nucleus to a label map if there is room; nuclei that are already there keep their pixels.

    Parameters
    ----------
    labels : numpy.ndarray
        int32 label map ``(H, W)``, changed in place: the nucleus gets the next free label.
    mask : numpy.ndarray
        bool, the nucleus; both sides are odd.
    place : (int, int)
        Row and column of the mask's centre; what lies outside the map is cut off.
    overlap : float
        Largest share of the nucleus' pixels in the map that may be lost because other nuclei cover them or separate
        them from its largest free part, which is what is painted.

    Returns
    -------
    bool
        Whether the nucleus was added.
    """
    top, left = (at - side // 2 for at, side in zip(place, mask.shape, strict=True))
    window = labels[max(0, top) : top + mask.shape[0], max(0, left) : left + mask.shape[1]]
    part = mask[max(0, -top) :, max(0, -left) :][: window.shape[0], : window.shape[1]]
    area = int(part.sum())
    count, pieces, stats, _ = cv2.connectedComponentsWithStats((part & (window == 0)).astype(np.uint8), connectivity=4)
    if count < 2:
        return False
    largest = 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax())
    kept = int(stats[largest, cv2.CC_STAT_AREA])
    if kept < max(MIN_PIXELS, (1 - overlap) * area):
        return False
    window[pieces == largest] = labels.max() + 1
    return True


def random_nuclei(
    shape: tuple[int, int],
    rng: np.random.Generator,
    *,
    count: int,
    radius: tuple[float, float],
    known: Sequence[np.ndarray] = (),
    share: float = 0.0,
) -> np.ndarray:
    """Make a label map of nuclei at random positions, with a minimum distance between centres (Poisson disc).

    Parameters
    ----------
    shape : (int, int)
        Height and width.
    rng : numpy.random.Generator
        Source of randomness.
    count : int
        Number of nuclei to place; those that find no room are left out.
    radius : (float, float)
        Range of the radii of drawn nuclei in pixels.
    known : sequence of numpy.ndarray
        Shapes of real nuclei, bool, see `nucleus_shapes`.
    share : float
        Share of nuclei that have a shape from `known`.

    Returns
    -------
    numpy.ndarray
        int32 ``(H, W)``: 0 is background, nuclei are 1 to n, each one 4-connected part.

    References
    ----------
    Positions: Cook, "Stochastic sampling in computer graphics", ACM Transactions on Graphics 1986. Synthetic masks:
    Mahmood et al., "Deep adversarial training for multi-organ nuclei segmentation in histopathology images", IEEE TMI
    2020; their mask generator is not published.
    """
    labels = np.zeros(shape, np.int32)
    centres = np.empty((0, 3))
    for _ in range(count):
        if known and rng.random() < share:
            mask = turned_nucleus(known[int(rng.integers(len(known)))], rng)
        else:
            mask = drawn_nucleus(rng.uniform(*radius), rng)
        own = math.sqrt(mask.sum() / math.pi)
        for _ in range(TRIES):
            row, column = int(rng.integers(shape[0])), int(rng.integers(shape[1]))
            apart = np.hypot(centres[:, 0] - row, centres[:, 1] - column)
            if (apart >= SPACING * (centres[:, 2] + own)).all() and paint_nucleus(labels, mask, (row, column), OVERLAP):
                centres = np.vstack([centres, (row, column, own)])
                break
    return labels


def nucleus_shapes(labels: np.ndarray) -> list[np.ndarray]:
    """Shapes of the nuclei of a label map, except those at its edge and those of fewer than `LEAST_PIXELS` pixels.

    Parameters
    ----------
    labels : numpy.ndarray
        int32 label map ``(H, W)``.

    Returns
    -------
    list of numpy.ndarray
        bool masks, each cropped to the bounding box of its nucleus.
    """
    from scipy import ndimage

    height, width = labels.shape
    shapes = []
    for label, box in enumerate(ndimage.find_objects(labels), start=1):
        if box is None or min(box[0].start, box[1].start) == 0 or box[0].stop == height or box[1].stop == width:
            continue
        crop = labels[box] == label
        if crop.sum() >= LEAST_PIXELS:
            shapes.append(crop)
    return shapes


def mask_picture(labels: np.ndarray) -> np.ndarray:
    """Draw nuclei in black on white, dark as hematoxylin makes them, with a white line where two nuclei touch.

    Parameters
    ----------
    labels : numpy.ndarray
        int32 label map ``(H, W)``.

    Returns
    -------
    numpy.ndarray
        uint8 ``(H, W)``, 0 or 255.
    """
    picture = np.where(labels > 0, 0, 255).astype(np.uint8)
    for axis in (0, 1):
        first, second = (np.moveaxis(labels, axis, 0)[part] for part in (np.s_[:-1], np.s_[1:]))
        touch = (first != second) & (first > 0) & (second > 0)
        np.moveaxis(picture, axis, 0)[:-1][touch] = 255
    return picture
