"""Instances from maps, all foreground components of a window at once.

The nuclei of a foreground component depend on the component's own pixels (and the background pixels of its holes)
and on nothing else: thresholds are fixed integers, markers are connected components, and a flood never leaves its
component nor depends on what else is flooded in the same call. Whoever holds the whole component gets the same
nuclei.

Regions are runs and lists of pixels here, hardly ever masks of the window, so that the work is in proportion to the
foreground.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Real

import cv2
import numpy as np

MARKER_SOURCES = ("distance", "hv", "contour", "nucleus")
"""What markers can be made from, the best first."""

RISE = 32
"""Sobel response (5x5, map values) that is one step of the marker map made from the h/v maps: a quarter of a map value
a pixel, since a slope of one gives 128."""

DEPTH_STEPS = 8
"""Steps of the marker map made from the nucleus map alone, a pixel of depth."""

MARKER_REACH = 2
"""Pixels around a component that `marker_map` looks at: half of the Sobel operator's."""


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
        Sigma in pixels by which the marker map is smoothed, 0 outside the component; 0 for none.
    depth : int
        Markers are the maxima that stand out by more than this (h-maxima) instead of all that reaches `marker`; 0 for
        all. Ways from one maximum to the next stay in the component.
    refine : int
        1, or 2: maps are brought to pixels of half the size first, see `refined`; for markers of ``distance`` or
        ``contour``. All sizes here stay in pixels of the maps as they are.
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
        if self.refine > 1 and self.markers not in ("distance", "contour"):
            raise ValueError(f"refine must be 1 with markers of {self.markers}, got {self.refine}")
        if self.markers not in MARKER_SOURCES:
            raise ValueError(f"markers must be one of {', '.join(MARKER_SOURCES)}, got {self.markers!r}")
        for name in ("nucleus", "marker", "min_marker", "min_area", "max_hole", "smooth", "depth"):
            if not isinstance(getattr(self, name), Real):
                raise ValueError(f"{name} must be a number, got {getattr(self, name)!r}")
        for name in ("nucleus", "marker"):
            if not 1 <= getattr(self, name) <= 255:
                raise ValueError(f"{name} must be within 1 and 255, got {getattr(self, name)}")
        for name in ("min_marker", "min_area", "max_hole", "smooth", "depth"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")

    @property
    def fine(self) -> InstanceRules:
        """These rules for maps that have been `refined`."""
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
        """Rules to begin with for a model of this pixel size (µm) whose markers come from these maps."""
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
    """The pixels of labelled regions of a window in raster order.

    Parameters
    ----------
    index : numpy.ndarray
        int64 ``(n,)``: ``row * stride + column``, growing. The window's last column is empty, so that pixels with
        consecutive numbers are neighbours.
    label : numpy.ndarray
        int32 ``(n,)``: 1 to `count`.
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
        int64 ``(m,)``: horizontal runs in raster order, as ``row * W + column`` of the first pixel and after the last.
    label : numpy.ndarray
        int32 ``(m,)``: component of each run.
    first : numpy.ndarray
        int64 ``(n,)``: first pixel of components 1 to n in raster order, ``row * W + column``.
    boxes : numpy.ndarray
        int64 ``(n, 4)``: left, top, width, height of the components.
    areas : numpy.ndarray
        int64 ``(n,)``: pixels.
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
    """Number of components and background, and their numbers at each pixel, int32."""
    # Without OpenCV's statistics, which take three times as long as the labels.
    count, image = cv2.connectedComponentsWithAlgorithm(mask, connectivity, cv2.CV_32S, cv2.CCL_SPAGHETTI)
    return count, image


def foreground(nucleus: np.ndarray, threshold: int) -> Foreground:
    """4-connected components of the foreground.

    Parameters
    ----------
    nucleus : numpy.ndarray
        uint8 nucleus map ``(H, W)``; its last column is 0.
    threshold : int
        Foreground is at least this.
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
    # Where several values go to one place the last one stays.
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
    """Numbers of runs: `lengths` numbers from each of `starts` on, `step` apart; int64."""
    if len(starts) == 0:
        return np.zeros(0, np.int64)
    ends = np.cumsum(lengths, dtype=np.int64)
    numbers = np.repeat(starts - step * (ends - lengths), lengths)
    numbers += np.arange(0, step * int(ends[-1]), step)
    return numbers


@dataclass(frozen=True, eq=False)
class Packing:
    """Boxes side by side in an image of their own, some pixels apart from each other and from its edges.

    Parameters
    ----------
    shape : (int, int)
        Rows and columns of the image.
    down, right : numpy.ndarray
        int64 ``(n + 1,)``: rows and columns from the window to the image for boxes 1 to n.
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
            bool ``(n,)``: the boxes that need a place.
        gap : int
            Pixels between them.
        """
        down, right = np.zeros(len(boxes) + 1, np.int64), np.zeros(len(boxes) + 1, np.int64)
        chosen = np.arange(len(boxes)) if used is None else np.flatnonzero(used)
        if len(chosen) == 0:
            return cls((1, 1), down, right)
        # Shelves of boxes of falling height; a shelf's last box may reach beyond its nominal width.
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
        """Numbers in the image of pixels of the window, int64."""
        return np.asarray((rows + self.down[label]) * self.shape[1] + columns + self.right[label])


def _holes(
    front: Foreground, packing: Packing, place: np.ndarray, label: np.ndarray, largest: int
) -> tuple[np.ndarray, np.ndarray]:
    """Pixels of small holes in raster order, and the component around each.

    A hole that holds another component is none.
    """
    none = np.zeros(0, np.int64), np.zeros(0, np.int32)
    image = np.ones(packing.shape, np.uint8)
    image.ravel()[place] = 0
    count, regions = _components(image, 8)
    if count <= 2:  # the components and what is around them
        return none
    found = np.flatnonzero((regions != 0) & (regions != regions[0, 0]))
    number = regions.ravel()[found]
    small = np.bincount(number, minlength=count) <= largest
    found, number = found[small[number]], number[small[number]]
    if len(found) == 0:
        return none
    # Above a hole's first pixel is the component that it belongs to.
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
    """Marker-controlled watershed of components, each on its own.

    Markers flood in raster order, then pixel by pixel in the order of the highest `priority` on the way to it, and
    among equals in the order in which they were reached; over 4-neighbours.

    Parameters
    ----------
    index, label : numpy.ndarray
        Pixels of the components and their component, as in `Pixels`.
    stride : int
        Columns of the window.
    boxes : numpy.ndarray
        Boxes of all components of the window.
    marker : numpy.ndarray
        int32 ``(n,)``: number of the marker that a pixel belongs to, or 0. Each component has at least one.
    priority : numpy.ndarray
        uint8 ``(n,)``: low comes first.

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
    # Inside a marker there is nothing left to flood: only its rim needs to enter the queue.
    solid = markers > 0
    inner = np.zeros_like(solid)
    inner[1:-1, 1:-1] = solid[:-2, 1:-1] & solid[2:, 1:-1] & solid[1:-1, :-2] & solid[1:-1, 2:] & solid[1:-1, 1:-1]
    mask &= ~inner
    rim = np.where(inner, 0, markers)
    # Of equal entries that are in the queue from the start, which comes first would depend on what else is in it: each
    # pixel of a marker gets a value of its own, below all others.
    value = np.zeros(packing.shape, np.float64)
    value.ravel()[place] = priority
    starts = np.flatnonzero(rim)
    value.ravel()[starts] = np.arange(-len(starts), 0)
    labels = watershed(value, rim, mask=mask)
    return np.where(marker > 0, marker, labels.ravel()[place]).astype(np.int32)


def marker_map(maps: np.ndarray, mask: np.ndarray, markers: str, channels: Channels) -> np.ndarray:
    """Where nuclei have their middles: high there, low at their borders.

    ``distance``: the distance map as it is. ``contour``: the nucleus map where there is no contour. ``hv``: how fast
    the horizontal map rises to the right and the vertical one downwards, the smaller of both; inside a nucleus both
    rise, from one nucleus to the next they fall. ``nucleus``: the depth within the component. Scales are fixed, so
    a component's values depend on it alone, as long as no other is within `MARKER_REACH` pixels.

    Parameters
    ----------
    maps : numpy.ndarray
        uint8 ``(C, H, W)``.
    mask : numpy.ndarray
        bool ``(H, W)``: the components.
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
        # Background is the middle of the range, and so is what lies beyond the image.
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
        uint8 or int16 ``(H, W)``, all far from the ends of int16.
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
    padded = np.pad(flattened, 1, constant_values=flattened.min() - 1)
    return np.asarray(local_maxima(padded, connectivity=2)[1:-1, 1:-1], bool)


def _marker_values(
    maps: np.ndarray, index: np.ndarray, label: np.ndarray, boxes: np.ndarray, rules: InstanceRules, channels: Channels
) -> tuple[np.ndarray, np.ndarray]:
    """The marker map at pixels of components, uint8 ``(n,)``, and whether they belong to a marker, bool ``(n,)``."""
    stride = maps.shape[2]
    if rules.markers == "distance" and not rules.smooth and not rules.depth and channels.distance is not None:
        values = maps[channels.distance].ravel()[index]
        return values, values >= rules.marker
    # Far enough apart that no component is within the other's reach.
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
        bool ``(n,)``: those to divide, each of them whole in the window.
    rules : InstanceRules
        Thresholds.
    channels : Channels
        Where the maps are.

    Returns
    -------
    Pixels
        The nuclei's pixels, nuclei in no particular order.
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
    if rules.markers != "distance":  # which alone can tell where there is hardly room for two nuclei
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
    """Maps on pixels of half the size, by bilinear interpolation.

    Outlines that follow the edges of pixels come nearer to where the nucleus map crosses its threshold. A value depends
    on its pixel and those around it alone, and is the same whatever else is in the window.

    Parameters
    ----------
    maps : numpy.ndarray
        uint8 ``(C, H, W)``, none of them 0.

    Returns
    -------
    numpy.ndarray
        uint8 ``(C, 2 H, 2 W)``; beyond the window's edges, its outermost pixels are taken to go on.
    """
    size = 2 * maps.shape[2], 2 * maps.shape[1]
    return np.stack([cv2.resize(one, size, interpolation=cv2.INTER_LINEAR_EXACT) for one in maps])


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
        int32 label map ``(H, W)``, 0 is background; ``(2 H, 2 W)`` with ``rules.refine`` of 2.
    """
    if rules.refine > 1:
        maps, rules = refined(maps), rules.fine
    padded = np.pad(maps, ((0, 0), (0, 0), (0, 1)))
    front = foreground(padded[channels.nucleus], rules.nucleus)
    pixels = split_components(padded, front, front.areas >= rules.min_area, rules, channels)
    result = np.zeros(padded.shape[1:], np.int32)
    result.ravel()[pixels.index] = pixels.label
    return np.ascontiguousarray(result[:, :-1])
