"""Make nucleus instances from maps, for all foreground components of a window at once.

The nuclei of a foreground component depend only on the component's own pixels and the background pixels of its holes:
thresholds are fixed integers, markers are connected components, and a flood neither leaves its component nor depends
on what else is flooded in the same call. Every window that contains the whole component therefore yields the same
nuclei.

Regions are stored as runs or lists of pixels and hardly ever as masks of the window, so that the amount of work is
proportional to the foreground.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Real

import cv2
import numpy as np

MARKER_SOURCES = ("distance", "hv", "contour", "nucleus")
"""Maps that markers can be made from, best first."""

RISE = 32
"""Sobel response (5x5, map values) per step of the marker map that is made from the h/v maps.

A slope of one map value per pixel has a response of 128, so that one step is a quarter of a map value per pixel.
"""

DEPTH_STEPS = 8
"""Steps per pixel of depth of the marker map that is made from the nucleus map alone."""

MARKER_REACH = 2
"""Pixels around a component that `marker_map` reads: the radius of the 5x5 Sobel operator."""


@dataclass(frozen=True)
class Channels:
    """Positions of the maps in a stack ``(C, H, W)``.

    Parameters
    ----------
    nucleus : int
        The nucleus map.
    distance, contour, hv : int, optional
        The maps of the further heads; `hv` is the horizontal map, and the vertical map follows it.
    types : int, optional
        The first class map, which is that of the background; the maps of the classes follow it.
    """

    nucleus: int = 0
    distance: int | None = None
    contour: int | None = None
    hv: int | None = None
    types: int | None = None

    @classmethod
    def of(cls, names: Sequence[str]) -> Channels:
        """Return the positions of the maps in a list of their names."""
        place = {name: index for index, name in reversed(list(enumerate(names)))}
        types = next((index for index, name in enumerate(names) if name.startswith("type:")), None)
        return cls(place.get("nucleus", 0), place.get("distance"), place.get("contour"), place.get("h"), types)

    @property
    def marker_source(self) -> str:
        """The best available map to make markers from, one of `MARKER_SOURCES`."""
        return next(name for name in MARKER_SOURCES if getattr(self, name) is not None)


@dataclass(frozen=True)
class InstanceRules:
    """Thresholds and sizes for making instances from maps; part of the model package.

    Parameters
    ----------
    nucleus : int
        Foreground is where the nucleus map is at least this (0 to 255).
    marker : int
        Markers are where the marker map is at least this (0 to 255).
    min_marker : int
        Smaller markers (pixels) are ignored.
    min_area : int
        Smaller nuclei (pixels) are dropped.
    max_hole : int
        Holes of at most this many pixels are filled.
    markers : str
        The map that markers are made from, see `marker_map`.
    smooth : float
        Standard deviation in pixels of the Gaussian that smooths the marker map, which is set to 0 outside the
        component; 0 for no smoothing.
    depth : int
        If above 0, only the maxima of the marker map that reach `marker` and stand out by more than this (h-maxima)
        are markers; with 0, all pixels that reach `marker` are. Paths between maxima stay within the component.
    refine : int
        1, or 2 to resample the maps to pixels of half the size first, see `refined`; 2 requires markers from
        ``distance`` or ``contour``. The other sizes remain in pixels of the original maps.
    """

    nucleus: int = 128
    marker: int = 128
    min_marker: int = 4
    min_area: int = 30
    max_hole: int = 200
    markers: str = "distance"
    smooth: float = 0.0
    depth: int = 0
    refine: int = 1

    def __post_init__(self) -> None:
        if self.refine not in (1, 2):
            raise ValueError(f"refine must be 1 or 2, got {self.refine}")
        if self.markers not in MARKER_SOURCES:
            raise ValueError(f"markers must be one of {', '.join(MARKER_SOURCES)}, got {self.markers!r}")
        if self.refine > 1 and self.markers not in ("distance", "contour"):
            raise ValueError(f"refine must be 1 with markers of {self.markers}, got {self.refine}")
        for name in ("nucleus", "marker", "min_marker", "min_area", "max_hole", "smooth", "depth"):
            if not isinstance(getattr(self, name), Real):
                raise ValueError(f"{name} must be a number, got {getattr(self, name)!r}")
        for name in ("nucleus", "marker"):
            if not 1 <= getattr(self, name) <= 255:
                raise ValueError(f"{name} must be within 1 and 255, got {getattr(self, name)}")
        for name in ("min_marker", "min_area", "max_hole", "smooth", "depth"):
            if not getattr(self, name) >= 0:  # nor NaN
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")

    @property
    def fine(self) -> InstanceRules:
        """These rules, with sizes in pixels of the `refined` maps."""
        area = self.refine**2
        return replace(
            self,
            min_marker=self.min_marker * area,
            min_area=self.min_area * area,
            max_hole=self.max_hole * area,
            smooth=self.smooth * self.refine,
            refine=1,
        )

    @classmethod
    def default_for(cls, markers: str, mpp: float = 0.5) -> InstanceRules:
        """Return initial rules for a model with this pixel size (µm) and source of markers."""
        area = (0.5 / mpp) ** 2
        sizes = {"min_marker": round(4 * area), "min_area": round(30 * area), "max_hole": round(200 * area)}
        started: dict[str, dict[str, float]] = {
            "distance": {},
            "contour": {},
            "hv": {"marker": 140},
            "nucleus": {"marker": DEPTH_STEPS, "depth": 6, "smooth": 1.0, "min_marker": 1},
        }
        return cls(**{"markers": markers, **sizes, **started.get(markers, {})})  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class Pixels:
    """Pixels of the labelled regions of a window, in raster order.

    Parameters
    ----------
    index : numpy.ndarray
        int64 ``(n,)``: ``row * stride + column``, ascending. The window's last column is empty, so that consecutive
        indices are always neighbouring pixels.
    label : numpy.ndarray
        int32 ``(n,)``: label of each pixel, 1 to `count`.
    count : int
        Number of labels.
    stride : int
        Columns of the window.
    """

    index: np.ndarray
    label: np.ndarray
    count: int
    stride: int


@dataclass(frozen=True, eq=False)
class Foreground:
    """The 4-connected components of a window's foreground.

    Parameters
    ----------
    image : numpy.ndarray
        int32 ``(H, W)``: number of the component at each pixel, 0 is background. The last column is empty.
    starts, ends : numpy.ndarray
        int64 ``(m,)``: horizontal runs in raster order; ``row * W + column`` of the first pixel and of the pixel after
        the last.
    label : numpy.ndarray
        int32 ``(m,)``: component of each run.
    first : numpy.ndarray
        int64 ``(n,)``: first pixel of components 1 to n in raster order, ``row * W + column``.
    boxes : numpy.ndarray
        int64 ``(n, 4)``: left, top, width, height of the components.
    areas : numpy.ndarray
        int64 ``(n,)``: number of pixels of the components.
    """

    image: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    label: np.ndarray
    first: np.ndarray
    boxes: np.ndarray
    areas: np.ndarray

    @property
    def count(self) -> int:
        """Number of components."""
        return len(self.first)


def _components(mask: np.ndarray, connectivity: int) -> tuple[int, np.ndarray]:
    """Number of components, including the background, and their label image, int32."""
    # OpenCV's statistics are not requested: they take three times as long as the labels.
    count, image = cv2.connectedComponentsWithAlgorithm(mask, connectivity, cv2.CV_32S, cv2.CCL_SPAGHETTI)
    return count, image


def foreground(nucleus: np.ndarray, threshold: int) -> Foreground:
    """Find the 4-connected components of the foreground.

    Parameters
    ----------
    nucleus : numpy.ndarray
        uint8 nucleus map ``(H, W)``; its last column must be below the threshold.
    threshold : int
        Foreground is where the nucleus map is at least this.
    """
    width = nucleus.shape[1]
    mask = (nucleus >= threshold).view(np.uint8)
    if mask[:, -1].any():
        raise ValueError("the last column of a window must be empty")
    count, image = _components(mask, 4)
    flat = mask.ravel()
    borders = np.flatnonzero(np.concatenate([flat[:1] != 0, flat[1:] != flat[:-1]]))
    starts, ends = borders[0::2], borders[1::2]
    label = image.ravel()[starts]
    rows = starts // width
    left, right = starts - rows * width, ends - rows * width
    # When several values are assigned to one element, the last one stays.
    order = np.arange(len(starts))
    first, last = np.zeros(count, np.int64), np.zeros(count, np.int64)
    first[label[::-1]], last[label] = order[::-1], order
    first, last = first[1:], last[1:]
    low, high = np.full(count, width), np.zeros(count, np.int64)
    np.minimum.at(low, label, left)
    np.maximum.at(high, label, right)
    boxes = np.stack([low[1:], rows[first], (high - low)[1:], rows[last] - rows[first] + 1], axis=1)
    areas = np.bincount(label, ends - starts, count)[1:].astype(np.int64)
    return Foreground(image, starts, ends, label, starts[first], boxes, areas)


def expand(starts: np.ndarray, lengths: np.ndarray, step: int = 1) -> np.ndarray:
    """Concatenate arithmetic sequences: `lengths` numbers from each of `starts`, `step` apart; int64."""
    if len(starts) == 0:
        return np.zeros(0, np.int64)
    ends = np.cumsum(lengths, dtype=np.int64)
    numbers = np.repeat(starts - step * (ends - lengths), lengths)
    numbers += np.arange(0, step * int(ends[-1]), step)
    return numbers


@dataclass(frozen=True, eq=False)
class Packing:
    """Placement of boxes side by side in a packed image, with a gap between them and at the image's edges.

    Parameters
    ----------
    shape : (int, int)
        Rows and columns of the image.
    down, right : numpy.ndarray
        int64 ``(n + 1,)``: offsets from rows and columns of the window to those of the image, for boxes 1 to n.
    """

    shape: tuple[int, int]
    down: np.ndarray
    right: np.ndarray

    @classmethod
    def of(cls, boxes: np.ndarray, used: np.ndarray | None = None, gap: int = 1) -> Packing:
        """Pack boxes.

        Parameters
        ----------
        boxes : numpy.ndarray
            int ``(n, 4)``: left, top, width, height.
        used : numpy.ndarray, optional
            bool ``(n,)``: the boxes to place; all by default.
        gap : int
            Pixels between neighbouring boxes, and between boxes and the edges of the image.
        """
        down, right = np.zeros(len(boxes) + 1, np.int64), np.zeros(len(boxes) + 1, np.int64)
        chosen = np.arange(len(boxes)) if used is None else np.flatnonzero(used)
        if len(chosen) == 0:
            return cls((1, 1), down, right)
        # Fill shelves with boxes in descending order of height; a shelf's last box may exceed its nominal width.
        width, height = boxes[chosen, 2] + gap, boxes[chosen, 3] + gap
        order = np.argsort(-height, kind="stable")
        chosen, width, height = chosen[order], width[order], height[order]
        begins = np.cumsum(width) - width
        shelf = begins // (int(float((width * height).sum()) ** 0.5) + 1)
        change = np.r_[True, shelf[1:] != shelf[:-1]]
        shelf = np.cumsum(change) - 1
        tall = height[change]
        left = begins - begins[change][shelf] + gap
        down[chosen + 1] = (np.cumsum(tall) - tall)[shelf] + gap - boxes[chosen, 1]
        right[chosen + 1] = left - boxes[chosen, 0]
        return cls((int(tall.sum()) + gap, int((left + width).max())), down, right)

    def place(self, rows: np.ndarray, columns: np.ndarray, label: np.ndarray) -> np.ndarray:
        """Flat indices in the packed image of pixels of the window, int64."""
        return np.asarray((rows + self.down[label]) * self.shape[1] + columns + self.right[label])


def _holes(
    front: Foreground, packing: Packing, place: np.ndarray, label: np.ndarray, largest: int
) -> tuple[np.ndarray, np.ndarray]:
    """Pixels of holes of at most `largest` pixels in raster order, and the component around each pixel.

    Holes that contain another component of the window are left out.
    """
    none = np.zeros(0, np.int64), np.zeros(0, np.int32)
    image = np.ones(packing.shape, np.uint8)
    image.ravel()[place] = 0
    count, regions = _components(image, 8)
    if count <= 2:  # only the components and their surroundings
        return none
    found = np.flatnonzero((regions != 0) & (regions != regions[0, 0]))
    number = regions.ravel()[found]
    small = np.bincount(number, minlength=count) <= largest
    found, number = found[small[number]], number[small[number]]
    if len(found) == 0:
        return none
    # The pixel above a hole's first pixel belongs to the component around the hole.
    names = np.zeros(packing.shape, np.int32)
    names.ravel()[place] = label
    owner = np.zeros(count, np.int32)
    owner[number[::-1]] = names.ravel()[found[::-1] - packing.shape[1]]
    around = owner[number]
    rows, columns = np.divmod(found, packing.shape[1])
    index = (rows - packing.down[around]) * front.image.shape[1] + columns - packing.right[around]
    empty = np.ones(count, bool)
    empty[number[front.image.ravel()[index] != 0]] = False
    index, around = index[empty[number]], around[empty[number]]
    order = np.argsort(index)
    return index[order], around[order]


def _flood(
    index: np.ndarray, label: np.ndarray, stride: int, boxes: np.ndarray, marker: np.ndarray, priority: np.ndarray
) -> np.ndarray:
    """Marker-controlled watershed of components, each independent of the others.

    Flooding spreads over 4-neighbours. The markers' own pixels come first, in raster order; each further pixel is
    flooded in the order of the highest `priority` on the path to it, and pixels of equal priority in the order in which
    they were reached.

    Parameters
    ----------
    index, label : numpy.ndarray
        Pixels, as in `Pixels`, and the component of each.
    stride : int
        Columns of the window.
    boxes : numpy.ndarray
        Boxes of all components of the window, as in `Foreground`.
    marker : numpy.ndarray
        int32 ``(n,)``: number of the marker that a pixel belongs to, or 0. Each component has at least one.
    priority : numpy.ndarray
        uint8 ``(n,)``: low values are flooded first.

    Returns
    -------
    numpy.ndarray
        int32 ``(n,)``: the marker that each pixel falls to.

    References
    ----------
    Meyer and Beucher, J. Vis. Commun. Image Represent. 1990.
    """
    from skimage.segmentation import watershed

    packing = Packing.of(boxes, np.bincount(label, minlength=len(boxes) + 1)[1:] > 0)
    rows, columns = np.divmod(index, stride)
    place = packing.place(rows, columns, label)
    mask = np.zeros(packing.shape, bool)
    mask.ravel()[place] = True
    markers = np.zeros(packing.shape, np.int32)
    markers.ravel()[place] = marker
    # There is nothing to flood inside a marker, so only its rim needs to enter the queue.
    solid = markers > 0
    inner = np.zeros_like(solid)
    inner[1:-1, 1:-1] = solid[:-2, 1:-1] & solid[2:, 1:-1] & solid[1:-1, :-2] & solid[1:-1, 2:] & solid[1:-1, 1:-1]
    mask &= ~inner
    rim = np.where(inner, 0, markers)
    # The order of equal entries that are in the queue from the start would depend on what else is in the queue, so
    # each marker pixel gets a unique value below all others.
    value = np.zeros(packing.shape, np.float64)
    value.ravel()[place] = priority
    starts = np.flatnonzero(rim)
    value.ravel()[starts] = np.arange(-len(starts), 0)
    labels = watershed(value, rim, mask=mask)
    return np.where(marker > 0, marker, labels.ravel()[place]).astype(np.int32)


def marker_map(maps: np.ndarray, mask: np.ndarray, markers: str, channels: Channels) -> np.ndarray:
    """Map that is high in the middle of nuclei and low at their borders.

    ``distance``: the distance map, unchanged. ``contour``: the nucleus map, multiplied by the inverted contour map.
    ``hv``: the smaller of the slope of the horizontal map to the right and that of the vertical map downwards; inside a
    nucleus both maps rise, from one nucleus to the next they fall. ``nucleus``: the depth within the component. Scales
    are fixed, so that a component's values depend on that component alone as long as no other component is within
    `MARKER_REACH` pixels.

    Parameters
    ----------
    maps : numpy.ndarray
        uint8 ``(C, H, W)``.
    mask : numpy.ndarray
        bool ``(H, W)``: the components.
    markers : str
        One of `MARKER_SOURCES`.
    channels : Channels
        Positions of the maps.

    Returns
    -------
    numpy.ndarray
        uint8 ``(H, W)``.

    Raises
    ------
    ValueError
        When the map that markers come from is missing.

    References
    ----------
    ``hv``: Graham et al., "HoVer-Net", Medical Image Analysis 2019; they scale gradients by the extremes of each image.
    ``contour``: Chen et al., "DCAN", CVPR 2016.
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
        # Background and the area beyond the image are set to the middle of the range.
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
        uint8 or int16 ``(H, W)``, far from the limits of int16.
    depth : int
        A maximum is left out when a path that descends by at most this leads from it to a higher one.

    References
    ----------
    Extended maxima: Soille, "Morphological Image Analysis", 2003, section 6.3.
    """
    from skimage.morphology import local_maxima, reconstruction

    # Both images are raised by the depth, so that maxima below the depth count as well.
    raised = values.astype(np.int16) + depth
    flattened = reconstruction(raised - depth, raised, method="dilation")
    padded = np.pad(flattened, 1, constant_values=flattened.min() - 1)
    return np.asarray(local_maxima(padded, connectivity=2)[1:-1, 1:-1], bool)


def _marker_values(
    maps: np.ndarray, index: np.ndarray, label: np.ndarray, boxes: np.ndarray, rules: InstanceRules, channels: Channels
) -> tuple[np.ndarray, np.ndarray]:
    """Marker map at the pixels of components, uint8 ``(n,)``, and which of them belong to a marker, bool ``(n,)``."""
    stride = maps.shape[2]
    if rules.markers == "distance" and not rules.smooth and not rules.depth and channels.distance is not None:
        values = maps[channels.distance].ravel()[index]
        return values, values >= rules.marker
    # With this gap, no component is within the reach of another one's filters.
    gap = MARKER_REACH + 4 * int(np.ceil(rules.smooth))
    packing = Packing.of(boxes, np.bincount(label, minlength=len(boxes) + 1)[1:] > 0, gap)
    rows, columns = np.divmod(index, stride)
    place = packing.place(rows, columns, label)
    mask = np.zeros(packing.shape, bool)
    mask.ravel()[place] = True
    source: int | None = getattr(channels, rules.markers)
    planes = [channels.nucleus]
    if rules.markers != "nucleus" and source is not None:
        planes += [source, source + 1] if rules.markers == "hv" else [source]
    packed = np.zeros((len(planes), *packing.shape), np.uint8)
    for plane, target in zip(planes, packed, strict=True):
        target.ravel()[place] = maps[plane].ravel()[index]
    places = {rules.markers: 1} if len(planes) > 1 else {}
    image = marker_map(packed, mask, rules.markers, Channels(**places))
    if rules.smooth > 0:
        image = cv2.GaussianBlur(np.where(mask, image, 0).astype(np.uint8), (0, 0), rules.smooth)
    values = image.ravel()[place]
    seeds = values >= rules.marker
    if rules.depth > 0 and seeds.any():
        seeds &= standing_out(np.where(mask, image, -1000).astype(np.int16), rules.depth).ravel()[place]
    return values, seeds


def split_components(
    maps: np.ndarray, front: Foreground, chosen: np.ndarray, rules: InstanceRules, channels: Channels
) -> Pixels:
    """Divide components into nuclei.

    Parameters
    ----------
    maps : numpy.ndarray
        uint8 maps ``(C, H, W)`` of a window whose last column is empty.
    front : Foreground
        The components of the window.
    chosen : numpy.ndarray
        bool ``(n,)``: the components to divide, each of which lies completely in the window.
    rules : InstanceRules
        Thresholds.
    channels : Channels
        Positions of the maps.

    Returns
    -------
    Pixels
        Pixels of the nuclei, which are labelled in no particular order.
    """
    stride, count = front.image.shape[1], front.count
    used = np.r_[False, chosen][front.label]
    starts, label = front.starts[used], front.label[used]
    lengths = front.ends[used] - starts
    packing = Packing.of(front.boxes, chosen)
    rows, columns = np.divmod(starts, stride)
    place = expand(packing.place(rows, columns, label), lengths)
    index, label = expand(starts, lengths), np.repeat(label, lengths)
    if rules.max_hole:
        filled, around = _holes(front, packing, place, label, rules.max_hole)
        if len(filled):
            before = np.searchsorted(index, filled)
            index, label = np.insert(index, before, filled), np.insert(label, before, around)
            rows, columns = np.divmod(filled, stride)
            place = np.insert(place, before, packing.place(rows, columns, around))

    here: np.ndarray | slice = slice(None)
    if rules.markers != "distance":  # only the distance map separates nuclei where there is hardly room for two
        here = np.flatnonzero((np.bincount(label, minlength=count + 1) >= 2 * rules.min_area)[label])
    part, owner, at = index[here], label[here], place[here]
    values, seeds = _marker_values(maps, part, owner, front.boxes, rules, channels)
    image = np.zeros(packing.shape, np.uint8)
    image.ravel()[at[seeds]] = 1
    markers, found = _components(image, 8)
    number = found.ravel()[at[seeds]]
    component = np.zeros(markers, np.int32)
    component[number] = owner[seeds]
    keep = np.bincount(number, minlength=markers) >= max(rules.min_marker, 1)
    several = np.bincount(component[keep], minlength=count + 1) > 1
    result = label.copy()
    where = np.flatnonzero(several[owner])
    if len(where):
        marker = np.zeros(len(part), np.int32)
        marker[seeds] = np.where(keep[number], number, 0)
        flooded = _flood(part[where], owner[where], stride, front.boxes, marker[where], 255 - values[where])
        result[where if isinstance(here, slice) else here[where]] = count + flooded
    keep = np.bincount(result, minlength=1) >= max(rules.min_area, 1)
    numbers = np.cumsum(keep, dtype=np.int32)
    if not keep[result].all():
        index, result = index[keep[result]], result[keep[result]]
    return Pixels(index, numbers[result], int(numbers[-1]), stride)


def refined(maps: np.ndarray) -> np.ndarray:
    """Resample maps to pixels of half the size by bilinear interpolation.

    On smaller pixels, outlines come closer to where the nucleus map crosses its threshold. A value depends only on its
    pixel and the pixels around it, not on the rest of the window.

    Parameters
    ----------
    maps : numpy.ndarray
        uint8 ``(C, H, W)``; no dimension is 0.

    Returns
    -------
    numpy.ndarray
        uint8 ``(C, 2 H, 2 W)``; beyond the window's edges, its outermost pixels are repeated.
    """
    size = 2 * maps.shape[2], 2 * maps.shape[1]
    return np.stack([cv2.resize(one, size, interpolation=cv2.INTER_LINEAR_EXACT) for one in maps])


def segment(maps: np.ndarray, rules: InstanceRules, channels: Channels = Channels(distance=1)) -> np.ndarray:
    """Segment all nuclei of maps that fit into memory.

    Parameters
    ----------
    maps : numpy.ndarray
        uint8 ``(C, H, W)``.
    rules : InstanceRules
        Thresholds.
    channels : Channels
        Positions of the maps.

    Returns
    -------
    numpy.ndarray
        int32 label map, 0 is background; ``(H, W)``, or ``(2 H, 2 W)`` with ``rules.refine`` of 2.
    """
    if rules.refine > 1:
        maps, rules = refined(maps), rules.fine
    padded = np.pad(maps, ((0, 0), (0, 0), (0, 1)))
    front = foreground(padded[channels.nucleus], rules.nucleus)
    pixels = split_components(padded, front, front.areas >= rules.min_area, rules, channels)
    result = np.zeros(padded.shape[1:], np.int32)
    result.ravel()[pixels.index] = pixels.label
    return np.ascontiguousarray(result[:, :-1])
