"""Read instances from label maps (PNG, TIFF, npy) and outlines (GeoJSON, the pipeline's parquet), and overlay them."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import PipelineError, of_the_machine
from pipeline.evaluation.metrics import Overlaps, central, class_counts, score_overlaps
from pipeline.exchange.geojson import (
    MAX_COORDINATE,
    UNTYPED,
    bare_cells,
    base_class,
    iter_features,
    nucleus_geometry,
    object_type,
    reading,
    role,
    stated_origin,
)
from pipeline.exchange.label_maps import SUFFIXES as LABEL_MAPS
from pipeline.exchange.label_maps import instances_of, load_npy, read_instances
from pipeline.kernels.raster import paint_runs, polygon_runs

log = logging.getLogger(__name__)

SUFFIXES = (".geojson.gz", ".geojson", ".json.gz", ".json", ".parquet", *LABEL_MAPS)
"""Suffixes of the files that `load` reads."""

BAND_PIXELS = 1 << 24
"""Number of pixels that are compared at once."""

FRAME = 50
"""A QuPath annotation whose area is more than this many times the median of the file's outlines is not a nucleus."""

_POLYGONS_AT_ONCE = 50_000

Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels, the latter two exclusive."""


@dataclass(frozen=True, eq=False)
class Classes:
    """Classes of instances that are numbered from 1.

    Parameters
    ----------
    names : tuple of str
        Names of the classes.
    codes : numpy.ndarray
        Class of each instance, int32: ``i + 1`` is ``names[i]``, 0 is none.
    """

    names: tuple[str, ...]
    codes: np.ndarray

    @classmethod
    def of(cls, names: Iterable[str]) -> Classes:
        """Build from the class name of each instance, empty where it has none."""
        table = {"": 0}
        codes = np.array([table.setdefault(name, len(table)) for name in names], np.int32)
        return cls(tuple(table)[1:], codes)

    def among(self, names: Sequence[str], labels: np.ndarray) -> np.ndarray:
        """Class codes of the instances `labels`, numbered by `names`, which must contain all names of this object."""
        table = np.array([0, *(names.index(name) + 1 for name in self.names)])
        return table[self.codes[labels - 1]]

    def without(self, name: str) -> Classes:
        """Return the same classes, but none for the instances of class `name`."""
        if name not in self.names:
            return self
        code = self.names.index(name) + 1
        kept = tuple(one for one in self.names if one != name)
        return Classes(kept, np.where(self.codes == code, 0, self.codes - (self.codes > code)))


@dataclass(frozen=True, eq=False)
class LabelMap:
    """Instances as a label map.

    Parameters
    ----------
    labels : numpy.ndarray
        Integers ``(H, W)``, 0 is background.
    classes : Classes or None
        Classes of the instances; None where the file has none.
    """

    labels: np.ndarray
    classes: Classes | None = None

    @property
    def box(self) -> Box:
        """The box of the whole image."""
        return 0, 0, self.labels.shape[1], self.labels.shape[0]

    def paint(self, box: Box) -> np.ndarray:
        """Labels within a box, which must lie inside the image."""
        left, top, right, bottom = box
        return np.asarray(self.labels[top:bottom, left:right])

    def busy(self, top: int, bottom: int) -> bool:
        """Whether there is an instance in the rows from `top` up to, but without, `bottom`."""
        return bool(np.any(self.labels[top:bottom]))


@dataclass(frozen=True, eq=False)
class Outlines:
    """Instances as polygons, kept as pixel runs.

    Parameters
    ----------
    runs : numpy.ndarray
        Row, first column and column after the last of each run, int32 ``(m, 3)``, ordered by row.
    labels : numpy.ndarray
        Instance of each run, int32 ``(m,)``, numbered from 1. Where instances overlap, the lowest number gets the
        pixel.
    classes : Classes or None
        Classes of all instances; None where they have not been read.
    """

    runs: np.ndarray
    labels: np.ndarray
    classes: Classes | None = None

    @classmethod
    def of(cls, points: np.ndarray, ring_starts: np.ndarray, polygon_starts: np.ndarray) -> Outlines:
        """Build from polygons given as flat arrays, see `pipeline.kernels.raster.polygon_runs`."""
        runs = polygon_runs(points, ring_starts, polygon_starts, even_ties=True)
        order = np.argsort(runs[:, 1], kind="stable")
        return cls(runs[order, 1:].astype(np.int32), (runs[order, 0] + 1).astype(np.int32))

    @property
    def box(self) -> Box:
        """The smallest box around all pixels."""
        if not len(self.runs):
            return 0, 0, 0, 0
        row, first, last = self.runs.T
        return int(first.min()), int(row[0]), int(last.max()), int(row[-1]) + 1

    def cut(self, box: Box) -> tuple[Outlines, np.ndarray, np.ndarray]:
        """Cut the outlines at a box.

        Returns
        -------
        kept : Outlines
            The part of the outlines that lies within the box.
        outside, pixels : numpy.ndarray
            Labels and areas in pixels of the instances that have no pixel in the box, int64.
        """
        left, top, right, bottom = box
        row, first, last = self.runs.T
        pixels = np.bincount(self.labels, weights=last - first).astype(np.int64)
        first, last = np.clip(first, left, right), np.clip(last, left, right)
        inside = (row >= top) & (row < bottom) & (last > first)
        pixels[self.labels[inside]] = 0
        outside = np.flatnonzero(pixels)
        kept = replace(self, runs=np.stack([row, first, last], axis=1)[inside], labels=self.labels[inside])
        return kept, outside, pixels[outside]

    def paint(self, box: Box) -> np.ndarray:
        """Labels within a box; instances are cut off at its edges."""
        left, top, right, bottom = box
        out = np.zeros((bottom - top, right - left), np.int32)
        here = slice(*np.searchsorted(self.runs[:, 0], (top, bottom)))
        order = np.argsort(self.labels[here], kind="stable")
        paint_runs(self.runs[here][order], self.labels[here][order], out, top, left)
        return out

    def busy(self, top: int, bottom: int) -> bool:
        """Whether there is an instance in the rows from `top` up to, but without, `bottom`."""
        first, last = np.searchsorted(self.runs[:, 0], (top, bottom))
        return bool(last > first)


Instances = LabelMap | Outlines


def stem(path: Path) -> str:
    """Name of a file without its folder, its suffix, and a ``.truth`` before the suffix."""
    name = path.name
    suffix = next((suffix for suffix in SUFFIXES if name.lower().endswith(suffix)), path.suffix)
    return name[: len(name) - len(suffix)].removesuffix(".truth")


def load(path: Path, origin: tuple[int, int] = (0, 0)) -> Instances:
    """Read the instances of one image or slide.

    Parameters
    ----------
    path : pathlib.Path
        A label map (``.png``, ``.tif``, ``.npy``, see `pipeline.exchange.label_maps.read_instances`), polygons in
        level-0 pixels (``.geojson``, ``.geojson.gz``: features with Polygon or MultiPolygon), or ``nuclei.parquet``.
    origin : tuple of int
        Level-0 pixel at which the coordinates of a GeoJSON begin, unless the file states its own origin.

    Raises
    ------
    PipelineError
        When the file is missing, damaged, or of another kind.
    """
    name = path.name.lower()
    if not name.endswith(SUFFIXES):
        raise PipelineError(f"{path}: unknown kind of file", f"known are {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise PipelineError(f"{path} is missing", "give a file or a folder of them")
    if name.endswith((".geojson", ".json", ".gz")):
        return _geojson(path, origin)
    if name.endswith(".parquet"):
        return _parquet(path)
    if not name.endswith(".npy"):
        return LabelMap(read_instances(path))
    content = load_npy(path)
    labels = instances_of(content, path)
    kinds = _kinds(content, labels, path)
    return LabelMap(labels) if kinds is None else classed(labels, kinds)


def _kinds(content: Any, labels: np.ndarray, path: Path) -> np.ndarray | None:
    """Class of each pixel of a ``.npy``, from ``type_map`` beside ``inst_map`` or a second channel; else None."""
    if isinstance(content, dict):
        kinds = content.get("type_map")
    else:
        kinds = content[..., 1] if content.shape == (*labels.shape, 2) else None
    if kinds is None:
        return None
    whole = np.asarray(kinds).astype(np.int64)
    if whole.shape != labels.shape or np.any(whole != kinds) or whole.min(initial=0) < 0:
        shape = " x ".join(map(str, kinds.shape))
        raise PipelineError(
            f"{path}: the classes are not whole numbers from 0 on, one for each pixel of the instances ({shape})",
            "save both maps of one image",
        )
    return whole


def classed(labels: np.ndarray, kinds: np.ndarray) -> LabelMap:
    """Build a label map in which each instance has the most frequent class of its pixels, named by its number.

    Parameters
    ----------
    labels, kinds : numpy.ndarray
        Instance and class of each pixel, non-negative integers ``(H, W)``; 0 is background and no class.
    """
    inside = labels > 0
    ids, index = np.unique(labels[inside], return_inverse=True)
    base = int(kinds.max(initial=0)) + 1
    pairs, count = np.unique(index * base + kinds[inside], return_counts=True)
    pairs = pairs[np.argsort(count, kind="stable")]
    codes = np.zeros(len(ids), np.int64)
    codes[pairs // base] = pairs % base  # sorted by count, so that the most frequent class is assigned last
    numbered = np.zeros(labels.shape, np.int32)
    numbered[inside] = index + 1
    return LabelMap(numbered, Classes.of(str(code) if code else "" for code in codes.tolist()))


def some_nuclei(path: Path, wanted: np.ndarray) -> Outlines:
    """Read selected nuclei of a ``nuclei.parquet``; memory grows with the selection, not with the file.

    Parameters
    ----------
    path : pathlib.Path
        The file.
    wanted : numpy.ndarray
        Whether to read each nucleus, bool, one for each nucleus of the file.

    Raises
    ------
    PipelineError
        When the file is missing or damaged.
    """
    return _parquet(path, wanted)


def nuclei_within(path: Path, box: Box) -> Outlines:
    """Read the nuclei of a ``nuclei.parquet`` whose centroids lie in a box, or all of a table without centroids."""
    from pipeline.stores.nuclei import open_nuclei

    names = ["centroid_x", "centroid_y"]
    with open_nuclei(path) as file:
        if not {*names} <= {*file.schema_arrow.names}:  # `instances.parquet`
            return _parquet(path)
        table = file.read(columns=names)
    x, y = (table[name].to_numpy() for name in names)
    left, top, right, bottom = box
    return some_nuclei(path, (x >= left) & (x < right) & (y >= top) & (y < bottom))


def _parquet(path: Path, wanted: np.ndarray | None = None) -> Outlines:
    import pyarrow as pa
    import shapely

    from pipeline.stores.nuclei import open_nuclei

    with open_nuclei(path) as file:
        parts, start = [], 0
        names: list[str] = []
        try:
            for batch in file.iter_batches(batch_size=_POLYGONS_AT_ONCE, columns=["geometry", "class"]):
                count = batch.num_rows
                if wanted is not None:
                    batch = batch.take(pa.array(np.flatnonzero(wanted[start : start + count])))
                start += count
                if not batch.num_rows:
                    continue
                column, kinds = batch.column("geometry"), batch.column("class").dictionary_encode()
                table = [base_class({"properties": {"classification": name}}) for name in kinds.dictionary.to_pylist()]
                names.extend(table[index] for index in kinds.indices.to_pylist())
                polygons = shapely.from_wkb(column.to_numpy(zero_copy_only=False))
                _, points, offsets = shapely.to_ragged_array(polygons, include_z=False)
                parts.append((len(polygons), Outlines.of(points, offsets[0][:-1], offsets[1][:-1])))
        except (OSError, pa.ArrowException, shapely.errors.ShapelyError, KeyError, ValueError) as error:
            if of_the_machine(error):
                raise
            first = " ".join(str(error).split())[:160]
            raise PipelineError(f"{path} is damaged or holds no polygons: {first}", "write it again") from None
    return replace(_join(parts), classes=Classes.of(names))


def _join(parts: list[tuple[int, Outlines]]) -> Outlines:
    if len(parts) == 1:
        return parts[0][1]
    before = np.cumsum([0, *(count for count, _ in parts)])
    runs = np.concatenate([np.empty((0, 3), np.int32), *(part.runs for _, part in parts)])
    labels = [part.labels + np.int32(first) for (_, part), first in zip(parts, before, strict=False)]
    order = np.argsort(runs[:, 0], kind="stable")
    return Outlines(runs[order], np.concatenate([np.empty(0, np.int32), *labels])[order])


def _geojson(path: Path, origin: tuple[int, int]) -> Outlines:
    names: list[str] = []
    drawn: list[bool] = []
    with reading(path, "GeoJSON of polygons", "features hold Polygon or MultiPolygon") as value:
        outlines = _join(list(_polygon_batches(value, stated_origin(value, origin), names, drawn)))
        outlines = _without_frames(outlines, np.array(drawn, bool), path)
    return replace(outlines, classes=Classes.of(names))


def _without_frames(outlines: Outlines, drawn: np.ndarray, path: Path) -> Outlines:
    """Leave out QuPath annotations that are so large that they must frame others, see `FRAME`.

    `drawn` (bool, one for each outline) tells which outlines are annotations.
    """
    pixels = np.bincount(outlines.labels, np.diff(outlines.runs[:, 1:])[:, 0], len(drawn) + 1)[1:]
    if not pixels.any():
        return outlines
    frames = drawn & (pixels > FRAME * np.percentile(pixels[pixels > 0], 50, method="lower"))
    if not frames.any():
        return outlines
    log.warning(
        "%s: %d annotations are left out, being more than %d times as large as most outlines, the largest of %d pixels "
        "(classify what outlines a region as Region*)", path, frames.sum(), FRAME, pixels[frames].max(),
    )  # fmt: skip
    kept = ~frames[outlines.labels - 1]
    return replace(outlines, runs=outlines.runs[kept], labels=outlines.labels[kept])


def _polygon_batches(
    value: Any, origin: tuple[float, float], names: list[str], drawn: list[bool]
) -> Iterator[tuple[int, Outlines]]:
    """Yield the polygons of a GeoJSON file in batches: the number of polygons, and their outlines.

    For each polygon, its class is appended to `names`, and to `drawn` whether it is an annotation of QuPath.
    """
    points: list[np.ndarray] = []
    polygons: list[int] = []
    others: list[str] = []
    any_polygon = False
    left_out = 0
    bare = bare_cells(value)
    for number, feature in enumerate(iter_features(value)):
        geometry = nucleus_geometry(feature)
        if geometry is None:
            continue
        if role(feature) != "nucleus":
            left_out += 1
            continue
        if number in bare:
            continue
        if geometry["type"] not in ("Polygon", "MultiPolygon"):
            others.append(str(geometry["type"]))
            continue
        any_polygon = True
        parts = geometry["coordinates"] if geometry["type"] == "MultiPolygon" else [geometry["coordinates"]]
        polygons.append(len(points))
        names.append(base_class(feature))
        drawn.append("annotation" in object_type(feature))
        for ring in (ring for part in parts for ring in part):
            corners = np.array(ring, np.float64)
            if corners.ndim != 2 or corners.shape[1] < 2:
                raise ValueError("a ring is not a list of points")
            if not (np.abs(corners[:, :2]) < MAX_COORDINATE).all():
                raise ValueError("a corner is not a number of pixels")
            points.append(corners[:, :2] + origin)
        if len(polygons) == _POLYGONS_AT_ONCE:
            yield len(polygons), _outlines(points, polygons)
            points, polygons = [], []
    if bare:
        log.warning("%d cells without a nucleus are left out", len(bare))
    if left_out:
        log.info("%d objects are regions, frames or to be ignored, and are left out", left_out)
    if others and not any_polygon:
        raise ValueError(f"found a {others[0]}")
    if others:
        log.warning("%d objects that are not polygons are left out, first a %s", len(others), others[0])
    if polygons:
        yield len(polygons), _outlines(points, polygons)


def _outlines(points: list[np.ndarray], polygons: list[int]) -> Outlines:
    sizes = np.array([len(ring) for ring in points], np.int64)
    flat = np.concatenate(points) if points else np.empty((0, 2))
    return Outlines.of(flat, np.cumsum(sizes) - sizes, np.array(polygons, np.int64))


def canvas(truth: Instances, pred: Instances) -> Box:
    """The box on which truth and prediction are compared.

    Two label maps must have the same size. Outlines that are compared with a label map are cut off at the edges of its
    image. Two sets of outlines are compared on the box around both.

    Raises
    ------
    PipelineError
        When two label maps differ in size.
    """
    a, b = truth.box, pred.box
    if isinstance(truth, LabelMap) and isinstance(pred, LabelMap):
        if a != b:
            raise PipelineError(
                f"sizes differ: the truth has {a[2]} x {a[3]} pixels, the prediction {b[2]} x {b[3]}",
                "compare the same image",
            )
        return a
    if isinstance(truth, LabelMap) or isinstance(pred, LabelMap):
        return a if isinstance(truth, LabelMap) else b
    if a[2] <= a[0] or b[2] <= b[0]:
        return a if b[2] <= b[0] else b
    return min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])


def slide_box(path: Path) -> Box | None:
    """Box of the slide that a ``nuclei.parquet`` belongs to, in level-0 pixels.

    The box may exceed the slide by up to two grid pixels, as the size of the grid is rounded down to whole pixels. None
    for other files, and for files that do not state their grid.
    """
    if not path.name.lower().endswith(".parquet"):
        return None
    from pipeline.stores.grid import Grid
    from pipeline.stores.nuclei import about_nuclei, open_nuclei

    with open_nuclei(path) as file:
        try:
            grid = Grid.from_json(about_nuclei(file.schema_arrow)["grid"])
        except (KeyError, TypeError, ValueError):
            return None
    return 0, 0, math.ceil((grid.width + 2) * grid.scale_x), math.ceil((grid.height + 2) * grid.scale_y)


def same_nuclei(classified: Path, nuclei: Path) -> bool:
    """Whether a ``classified.parquet`` holds the nuclei of a ``nuclei.parquet``, by their number and their model."""
    from pipeline.stores.nuclei import about_nuclei, open_nuclei

    told = []
    for path in (classified, nuclei):
        with open_nuclei(path) as file:
            told.append((file.metadata.num_rows, about_nuclei(file.schema_arrow).get("model")))
    return told[0] == told[1]


def on_same_part(truth: Instances, path: Path, slide: Box) -> Instances:
    """Read the nuclei of a ``nuclei.parquet`` whose centroids lie in the box around the known nuclei on the slide.

    So it suffices to annotate a part of a slide. All nuclei are read if the truth is a label map or knows none there.
    """
    inside = None if isinstance(truth, LabelMap) else truth.cut(slide)[0]
    return load(path) if inside is None or not len(inside.runs) else nuclei_within(path, inside.box)


def told_outside(outside: int, known: int) -> str:
    """Message for the case that `outside` of the `known` nuclei lie outside the slide."""
    question = "are they in level-0 pixels?"
    return f"{outside} of {known} known nuclei lie outside of the slide and count as missed: {question}"


def overlay(truth: Instances, pred: Instances, slide: Box | None = None) -> tuple[Overlaps, int]:
    """Compute the overlaps of truth and prediction, in bands, so that memory does not grow with the image.

    Parameters
    ----------
    truth, pred : LabelMap or Outlines
        Known and predicted instances.
    slide : Box, optional
        Box of the slide. Known outlines are cut at its edges; those that lie outside count as missed, and the canvas is
        not enlarged to include them.

    Returns
    -------
    overlaps : Overlaps
        Overlaps of truth and prediction.
    outside : int
        Number of truths that lie outside the slide.

    Raises
    ------
    PipelineError
        When two label maps differ in size.
    """
    outside = pixels = np.empty(0, np.int64)
    if slide is not None and isinstance(truth, Outlines):
        truth, outside, pixels = truth.cut(slide)
    left, top, right, bottom = canvas(truth, pred)
    step = max(1, BAND_PIXELS // max(1, right - left))

    def bands() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for y in range(top, bottom, step):
            end = min(y + step, bottom)
            if truth.busy(y, end) or pred.busy(y, end):
                yield truth.paint((left, y, right, end)), pred.paint((left, y, right, end))

    overlaps = Overlaps.of_bands(bands())
    missed = {"truth_area": pixels, "truth_ids": outside}
    more = {name: np.concatenate([getattr(overlaps, name), values]) for name, values in missed.items()}
    return replace(overlaps, **more), len(outside)


def compare(truth: Instances, pred: Instances, slide: Box | None = None) -> dict[str, Any]:
    """Scores of `pipeline.evaluation.metrics.score`, and ``n_outside``, the truths outside the slide; see `overlay`."""
    overlaps, outside = overlay(truth, pred, slide)
    return score_overlaps(overlaps) | {"n_outside": outside}


def count_classes(truth: Instances, pred: Instances, overlaps: Overlaps, within: int = 0) -> dict[str, Any] | None:
    """`pipeline.evaluation.metrics.class_counts` of truth and prediction, given their `overlaps`.

    None where the file of either side has no classes, or there are truths of which none has a class. If `within` is not
    0, only nuclei that have a pixel in the central square of this side (in pixels) are counted for R².

    Raises
    ------
    PipelineError
        When `within` is not 0 and neither side is a label map, which alone has the size of its image.
    """
    if within and not (isinstance(truth, LabelMap) or isinstance(pred, LabelMap)):
        raise PipelineError(
            f"--count-within {within}: polygons do not tell the size of the patch", "give one side as label maps"
        )
    if truth.classes is None or pred.classes is None or (len(overlaps.truth_ids) and not truth.classes.names):
        return None
    named = truth.classes.without(UNTYPED)  # nobody has named these
    if len(overlaps.truth_ids) and not named.names:
        return None
    names = list(dict.fromkeys((*named.names, *pred.classes.names)))
    known, found = named.among(names, overlaps.truth_ids), pred.classes.among(names, overlaps.pred_ids)
    middle = central(canvas(truth, pred), within)
    counted = (np.unique(truth.paint(middle)), np.unique(pred.paint(middle))) if within else None
    return class_counts(overlaps, known, found, names, counted)
