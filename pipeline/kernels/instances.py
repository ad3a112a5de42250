"""Instances from maps, one foreground component at a time.

The nuclei of a foreground component depend on the component's own pixels (and the background pixels of its holes)
and on nothing else: thresholds are fixed integers, markers are connected components, and the watershed runs on the
component's own bounding box. Whoever holds the whole component gets the same nuclei.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np


@dataclass(frozen=True)
class InstanceRules:
    """How maps become instances; travels in the model package.

    Parameters
    ----------
    nucleus : int
        Foreground is where the nucleus map is at least this (0 to 255).
    marker : int
        Markers are where the distance map is at least this (0 to 255).
    min_marker : int
        Smaller markers (pixels) do not count.
    min_area : int
        Smaller nuclei (pixels) are dropped.
    max_hole : int
        Holes of at most this many pixels are filled.
    """

    nucleus: int = 128
    marker: int = 128
    min_marker: int = 4
    min_area: int = 30
    max_hole: int = 200

    def __post_init__(self) -> None:
        for name in ("nucleus", "marker"):
            if not 1 <= getattr(self, name) <= 255:
                raise ValueError(f"{name} must be within 1 and 255, got {getattr(self, name)}")
        for name in ("min_marker", "min_area", "max_hole"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")


def foreground_components(nucleus: np.ndarray, threshold: int) -> tuple[np.ndarray, np.ndarray]:
    """4-connected components of the foreground.

    Parameters
    ----------
    nucleus : numpy.ndarray
        uint8 nucleus map ``(H, W)``.
    threshold : int
        Foreground is at least this.

    Returns
    -------
    components : numpy.ndarray
        int32 ``(H, W)``, 0 is background.
    boxes : numpy.ndarray
        int32 ``(n, 5)``: left, top, width, height, area of components 1 to n.
    """
    mask = (nucleus >= threshold).astype(np.uint8)
    _, components, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=4, ltype=cv2.CV_32S)
    return components, stats[1:]


def fill_small_holes(mask: np.ndarray, other: np.ndarray, max_hole: int) -> np.ndarray:
    """Fill the holes of one component.

    Parameters
    ----------
    mask : numpy.ndarray
        bool ``(H, W)``: the component, within its bounding box.
    other : numpy.ndarray
        bool ``(H, W)``: foreground of other components; a hole that holds some is left open.
    max_hole : int
        Larger holes (pixels) are left open.

    Returns
    -------
    numpy.ndarray
        bool ``(H, W)``.
    """
    # The frame joins all background that reaches the box's edge, which is no hole.
    background = np.pad(~mask, 1, constant_values=True).astype(np.uint8)
    count, holes, stats, _ = cv2.connectedComponentsWithStats(background, connectivity=8, ltype=cv2.CV_32S)
    if count <= 2:
        return mask
    holes = holes[1:-1, 1:-1]
    fill = stats[:, cv2.CC_STAT_AREA] <= max_hole
    outside = np.bincount(
        np.concatenate([holes[0], holes[-1], holes[:, 0], holes[:, -1]])[
            ~np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
        ],
        minlength=count,
    )
    fill &= outside == 0
    fill &= np.bincount(holes[other], minlength=count) == 0
    fill[0] = False  # label 0 is the component itself
    return np.asarray(mask | fill[holes])


def split_component(distance: np.ndarray, mask: np.ndarray, rules: InstanceRules) -> np.ndarray:
    """Divide one component into nuclei.

    Parameters
    ----------
    distance : numpy.ndarray
        uint8 distance map ``(H, W)`` on the component's bounding box.
    mask : numpy.ndarray
        bool ``(H, W)``: the component.
    rules : InstanceRules
        Thresholds.

    Returns
    -------
    numpy.ndarray
        int32 ``(H, W)``: 1 to n in no particular order; too small nuclei are 0.

    References
    ----------
    Marker-controlled watershed: Meyer and Beucher, J. Vis. Commun. Image Represent. 1990.
    """
    seeds = (mask & (distance >= rules.marker)).astype(np.uint8)
    count, markers, stats, _ = cv2.connectedComponentsWithStats(seeds, connectivity=8, ltype=cv2.CV_32S)
    keep = stats[:, cv2.CC_STAT_AREA] >= rules.min_marker
    keep[0] = False
    if count > 2 and keep.sum() > 1:
        from skimage.segmentation import watershed

        markers[~keep[markers]] = 0
        labels = watershed(255 - distance, markers, mask=mask).astype(np.int32)
    else:
        labels = mask.astype(np.int32)
    if rules.min_area > 1:
        labels[(np.bincount(labels.ravel()) < rules.min_area)[labels]] = 0
    return labels


def segment(nucleus: np.ndarray, distance: np.ndarray, rules: InstanceRules) -> np.ndarray:
    """All nuclei of maps that fit into memory.

    Parameters
    ----------
    nucleus, distance : numpy.ndarray
        uint8 maps ``(H, W)``.
    rules : InstanceRules
        Thresholds.

    Returns
    -------
    numpy.ndarray
        int32 label map ``(H, W)``, 0 is background.
    """
    components, boxes = foreground_components(nucleus, rules.nucleus)
    result = np.zeros(nucleus.shape, np.int32)
    used = 0
    for index, (left, top, width, height, area) in enumerate(boxes, start=1):
        if area < rules.min_area:
            continue
        box = np.s_[top : top + height, left : left + width]
        here = components[box]
        mask = here == index
        if area < width * height:
            mask = fill_small_holes(mask, (here != 0) & ~mask, rules.max_hole)
        labels = split_component(distance[box], mask, rules)
        window = result[box]
        np.copyto(window, labels + used, where=labels > 0)
        used += int(labels.max(initial=0))
    return result
