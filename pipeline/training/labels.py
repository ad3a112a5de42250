"""Training targets made from instance label maps."""

from __future__ import annotations

import cv2
import numpy as np


def instance_boxes(labels: np.ndarray) -> list[tuple[int, tuple[slice, slice]]]:
    """Label and bounding box of every instance.

    Parameters
    ----------
    labels : numpy.ndarray
        int32 label map ``(H, W)``, 0 is background.

    Returns
    -------
    list of (int, (slice, slice))
        Label, and rows and columns of its bounding box.
    """
    from scipy import ndimage

    return [(i + 1, box) for i, box in enumerate(ndimage.find_objects(labels)) if box is not None]


def craft_distance(labels: np.ndarray) -> np.ndarray:
    """Distance of each pixel to the border of its instance, 1 at the instance's deepest point, 0 in the background.

    Every instance is transformed by itself, so that the value falls to nearly 0 where two nuclei touch. The field's
    edge is not a border: samples that reach beyond it are mirrored there, so that a nucleus cut by it looks whole.

    Parameters
    ----------
    labels : numpy.ndarray
        int32 label map ``(H, W)``.

    Returns
    -------
    numpy.ndarray
        float32 ``(H, W)`` in [0, 1].

    References
    ----------
    Naylor et al., "Segmentation of nuclei in histopathology images by deep regression of the distance map", IEEE TMI
    2019; here normalised by the largest distance in each nucleus.
    """
    distance = np.zeros(labels.shape, np.float32)
    for label, (rows, columns) in instance_boxes(labels):
        # Include one pixel around the box, so that its edge counts as a border; there is none at the field's edge.
        around = tuple(slice(max(side.start - 1, 0), side.stop + 1) for side in (rows, columns))
        mask = (labels[around] == label).astype(np.uint8)
        depth = cv2.distanceTransform(mask, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
        window = distance[around]
        np.maximum(window, depth / depth.max(), out=window)
    return distance


def seam_weight(labels: np.ndarray, radius: int = 2) -> np.ndarray:
    """Mask of the seams between nuclei: 1 within `radius` of two different nuclei, else 0.

    Parameters
    ----------
    labels : numpy.ndarray
        int32 label map ``(H, W)``.
    radius : int
        Half the width in pixels of the widest gap that counts as a seam.

    Returns
    -------
    numpy.ndarray
        float32 ``(H, W)``.
    """
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))
    signed = labels.astype(np.float32)
    highest = cv2.dilate(signed, kernel)
    lowest = -cv2.dilate(np.where(signed > 0, -signed, -np.float32(2**30)), kernel)
    return ((highest > 0) & (lowest < 2**30) & (highest != lowest)).astype(np.float32)


def craft_contour(labels: np.ndarray, radius: int = 2) -> np.ndarray:
    """Outlines of the nuclei: 1 within `radius` of a nucleus's border, inside and outside, else 0.

    Parameters
    ----------
    labels : numpy.ndarray
        int32 label map ``(H, W)``.
    radius : int
        Half the width of the outline in pixels.

    Returns
    -------
    numpy.ndarray
        float32 ``(H, W)``.

    References
    ----------
    Chen et al., "DCAN: deep contour-aware networks for accurate gland segmentation", CVPR 2016.
    """
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))
    signed = labels.astype(np.float32)
    return (cv2.dilate(signed, kernel) != cv2.erode(signed, kernel)).astype(np.float32)


def craft_hv(labels: np.ndarray, min_area: int = 8) -> np.ndarray:
    """Horizontal and vertical position of each pixel in its nucleus.

    Values go from -1 at the left (top) end to 0 at the centre of mass to 1 at the right (bottom) end.

    Parameters
    ----------
    labels : numpy.ndarray
        int32 label map ``(H, W)``.
    min_area : int
        Nuclei of fewer pixels are 0 throughout.

    Returns
    -------
    numpy.ndarray
        float32 ``(H, W, 2)``: horizontal, vertical; 0 in the background.

    References
    ----------
    Graham et al., "HoVer-Net: simultaneous segmentation and classification of nuclei in multi-tissue histology images",
    Medical Image Analysis 2019.
    """
    result = np.zeros((*labels.shape, 2), np.float32)
    for label, box in instance_boxes(labels):
        rows, columns = np.nonzero(labels[box] == label)
        if len(rows) < min_area:
            continue
        for axis, place in enumerate((columns, rows)):
            offset = place - np.round(place.mean())
            low, high = -offset.min(), offset.max()
            offset = np.where(offset < 0, offset / max(low, 1), offset / max(high, 1))
            result[box[0].start + rows, box[1].start + columns, axis] = offset
    return result
