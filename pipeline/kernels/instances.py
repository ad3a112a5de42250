"""Instances from maps, one foreground component at a time.

The nuclei of a foreground component depend on the component's own pixels (and the background pixels of its holes)
and on nothing else: thresholds are fixed integers, markers are connected components, and the watershed runs on the
component's own bounding box. Whoever holds the whole component gets the same nuclei.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

MARKER_SOURCES = ("distance", "hv", "contour", "nucleus")
"""What markers can be made from, the best first."""

RISE = 32
"""Sobel response (5x5, map values) that is one step of the marker map made from the h/v maps: a quarter of a map value
a pixel, since a slope of one gives 128."""

DEPTH_STEPS = 8
"""Steps of the marker map made from the nucleus map alone, a pixel of depth."""


@dataclass(frozen=True)
class Channels:
    """Where the maps are in a stack of them.

    Parameters
    ----------
    nucleus : int
        The nucleus map.
    distance, contour, hv : int, optional
        Those of the further heads; `hv` is the horizontal one, the vertical one follows.
    types : int, optional
        The first of the class maps, which is the background's; the classes follow.
    """

    nucleus: int = 0
    distance: int | None = None
    contour: int | None = None
    hv: int | None = None
    types: int | None = None

    @classmethod
    def of(cls, names: Sequence[str]) -> Channels:
        """Where the maps of these names are."""
        place = {name: index for index, name in reversed(list(enumerate(names)))}
        types = next((index for index, name in enumerate(names) if name.startswith("type:")), None)
        return cls(place.get("nucleus", 0), place.get("distance"), place.get("contour"), place.get("h"), types)

    @property
    def marker_source(self) -> str:
        """The best of the maps to make markers from."""
        return next(name for name in MARKER_SOURCES if getattr(self, name) is not None)


@dataclass(frozen=True)
class InstanceRules:
    """How maps become instances; travels in the model package.

    Parameters
    ----------
    nucleus : int
        Foreground is where the nucleus map is at least this (0 to 255).
    marker : int
        Markers are where the marker map is at least this (0 to 255).
    min_marker : int
        Smaller markers (pixels) do not count.
    min_area : int
        Smaller nuclei (pixels) are dropped.
    max_hole : int
        Holes of at most this many pixels are filled.
    markers : str
        What the marker map is made from, see `marker_map`.
    smooth : float
        Sigma in pixels by which the marker map is smoothed; 0 for none.
    depth : int
        Markers are the maxima that stand out by more than this (h-maxima) instead of all that reaches `marker`; 0 for
        all.
    """

    nucleus: int = 128
    marker: int = 128
    min_marker: int = 4
    min_area: int = 30
    max_hole: int = 200
    markers: str = "distance"
    smooth: float = 0.0
    depth: int = 0

    def __post_init__(self) -> None:
        if self.markers not in MARKER_SOURCES:
            raise ValueError(f"markers must be one of {', '.join(MARKER_SOURCES)}, got {self.markers!r}")
        for name in ("nucleus", "marker"):
            if not 1 <= getattr(self, name) <= 255:
                raise ValueError(f"{name} must be within 1 and 255, got {getattr(self, name)}")
        for name in ("min_marker", "min_area", "max_hole", "smooth", "depth"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")

    @classmethod
    def default_for(cls, markers: str) -> InstanceRules:
        """Rules to begin with for a model whose markers come from these maps."""
        started: dict[str, dict[str, float]] = {
            "distance": {},
            "contour": {},
            "hv": {"marker": 140},
            "nucleus": {"marker": DEPTH_STEPS, "depth": 6, "smooth": 1.0, "min_marker": 1},
        }
        return cls(markers=markers, **started.get(markers, {}))  # type: ignore[arg-type]


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


def marker_map(maps: np.ndarray, mask: np.ndarray, markers: str, channels: Channels) -> np.ndarray:
    """Where the nuclei of one component have their middles: high there, low at their borders.

    ``distance``: the distance map as it is. ``contour``: the nucleus map where there is no contour. ``hv``: how fast
    the horizontal map rises to the right and the vertical one downwards, the smaller of both; inside a nucleus both
    rise, from one nucleus to the next they fall. ``nucleus``: the depth within the component. Scales are fixed, so
    the map depends on the component alone.

    Parameters
    ----------
    maps : numpy.ndarray
        uint8 ``(C, H, W)`` on the component's bounding box.
    mask : numpy.ndarray
        bool ``(H, W)``: the component.
    markers : str
        One of `MARKER_SOURCES`.
    channels : Channels
        Where the maps are.

    Returns
    -------
    numpy.ndarray
        uint8 ``(H, W)``.

    Raises
    ------
    ValueError
        When there is no such map.

    References
    ----------
    Graham et al., "HoVer-Net", Medical Image Analysis 2019, whose gradients are scaled by each image's extremes;
    Chen et al., "DCAN", CVPR 2016, for contours.
    """
    if markers == "nucleus":
        return _depth_map(mask)
    place: int | None = getattr(channels, markers)
    if place is None:
        raise ValueError(f"markers come from the {markers} map, which is not there")
    if markers == "distance":
        return np.asarray(maps[place])
    if markers == "contour":
        product = maps[channels.nucleus].astype(np.uint16) * (255 - maps[place])
        return np.asarray((product + 127) // 255, np.uint8)
    slopes = []
    for index, (dx, dy) in enumerate(((1, 0), (0, 1))):
        # Background is the middle of the range; beyond the box there is none but background.
        level = np.pad(np.where(mask, maps[place + index], 128).astype(np.int16) - 128, 2)
        slopes.append(cv2.Sobel(level, cv2.CV_16S, dx, dy, ksize=5)[2:-2, 2:-2])
    return np.clip(128 + np.minimum(*slopes) // RISE, 0, 255).astype(np.uint8)


def _depth_map(mask: np.ndarray) -> np.ndarray:
    depth = cv2.distanceTransform(np.pad(mask, 1).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)[1:-1, 1:-1]
    return np.minimum(np.round(depth * DEPTH_STEPS), 255).astype(np.uint8)


def standing_out(values: np.ndarray, depth: int) -> np.ndarray:
    """Maxima that stand out by more than `depth`, as a bool array.

    Parameters
    ----------
    values : numpy.ndarray
        uint8 ``(H, W)``.
    depth : int
        How far one has to go down from one maximum to get to a higher one, at most.

    References
    ----------
    Extended maxima: Soille, "Morphological Image Analysis", 2003, section 6.3.
    """
    from skimage.morphology import local_maxima, reconstruction

    # Everything is raised, so that maxima of less than the depth count too.
    raised = values.astype(np.int16) + depth
    flattened = reconstruction(raised - depth, raised, method="dilation")
    return np.asarray(local_maxima(np.pad(flattened, 1, constant_values=-1), connectivity=2)[1:-1, 1:-1], bool)


def split_component(
    maps: np.ndarray, mask: np.ndarray, rules: InstanceRules, channels: Channels = Channels(distance=1)
) -> np.ndarray:
    """Divide one component into nuclei.

    Parameters
    ----------
    maps : numpy.ndarray
        uint8 maps ``(C, H, W)`` on the component's bounding box.
    mask : numpy.ndarray
        bool ``(H, W)``: the component.
    rules : InstanceRules
        Thresholds.
    channels : Channels
        Where the maps are.

    Returns
    -------
    numpy.ndarray
        int32 ``(H, W)``: 1 to n in no particular order; too small nuclei are 0.

    References
    ----------
    Marker-controlled watershed: Meyer and Beucher, J. Vis. Commun. Image Represent. 1990.
    """
    labels = _divide(maps, mask, rules, channels)
    if rules.min_area > 1:
        labels[(np.bincount(labels.ravel()) < rules.min_area)[labels]] = 0
    return labels


def _divide(maps: np.ndarray, mask: np.ndarray, rules: InstanceRules, channels: Channels) -> np.ndarray:
    if rules.markers != "distance" and np.count_nonzero(mask) < 2 * rules.min_area:
        return mask.astype(np.int32)  # no room for two nuclei
    values = marker_map(maps, mask, rules.markers, channels)
    if rules.smooth > 0:
        values = cv2.GaussianBlur(np.where(mask, values, 0).astype(np.uint8), (0, 0), rules.smooth)
    seeds = mask & (values >= rules.marker)
    if rules.depth > 0 and seeds.any():
        seeds &= standing_out(np.where(mask, values, 0), rules.depth)
    count, markers, stats, _ = cv2.connectedComponentsWithStats(
        seeds.astype(np.uint8), connectivity=8, ltype=cv2.CV_32S
    )
    keep = stats[:, cv2.CC_STAT_AREA] >= rules.min_marker
    keep[0] = False
    if count > 2 and keep.sum() > 1:
        from skimage.segmentation import watershed

        markers[~keep[markers]] = 0
        return np.asarray(watershed(255 - values, markers, mask=mask), np.int32)
    return mask.astype(np.int32)


def segment(maps: np.ndarray, rules: InstanceRules, channels: Channels = Channels(distance=1)) -> np.ndarray:
    """All nuclei of maps that fit into memory.

    Parameters
    ----------
    maps : numpy.ndarray
        uint8 ``(C, H, W)``.
    rules : InstanceRules
        Thresholds.
    channels : Channels
        Where the maps are.

    Returns
    -------
    numpy.ndarray
        int32 label map ``(H, W)``, 0 is background.
    """
    components, boxes = foreground_components(maps[channels.nucleus], rules.nucleus)
    result = np.zeros(components.shape, np.int32)
    used = 0
    for index, (left, top, width, height, area) in enumerate(boxes, start=1):
        if area < rules.min_area:
            continue
        box = np.s_[top : top + height, left : left + width]
        here = components[box]
        mask = here == index
        if area < width * height:
            mask = fill_small_holes(mask, (here != 0) & ~mask, rules.max_hole)
        labels = split_component(maps[(slice(None), *box)], mask, rules, channels)
        window = result[box]
        np.copyto(window, labels + used, where=labels > 0)
        used += int(labels.max(initial=0))
    return result
