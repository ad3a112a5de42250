"""Importer of nuclei that a user has outlined or corrected in QuPath, on their own slides."""

from __future__ import annotations

import itertools
import logging
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.batch.slide_table import SlideEntry, SlideTable, resolve_slides
from pipeline.errors import PipelineError, SlideError
from pipeline.exchange.geojson import (
    MAX_COORDINATE,
    ORIGIN,
    REGIONS,
    UNTYPED,
    bare_cells,
    base_class,
    iter_features,
    nucleus_geometry,
    polygonal,
    reading,
    role,
    stated_origin,
)
from pipeline.stores.grid import Grid
from pipeline.training.annotations import burn, repair
from pipeline.training.datasets.source import Lazy, Source
from pipeline.training.field import Field

if TYPE_CHECKING:
    from pipeline.slides.slide import Slide

log = logging.getLogger(__name__)

SUFFIXES = (".geojson.gz", ".geojson", ".json.gz", ".json")

QUPATH = ("GeoJSON of QuPath", "export objects as GeoJSON (File, Export objects)")
"""What an export is, and what to do if a file is not one; see `pipeline.exchange.geojson.reading`."""

OPTIONS = ("slides", "regions", "field_size", "table", "origin")
"""Keys of a source that this importer knows beside the common ones."""

FIELD_SIZE = 1024
"""Default of the longest side of a field in pixels."""

MIN_MPP = 0.2
"""Pixel size in µm below which a slide is read at 0.25 µm, unless the settings state a pixel size."""

MAX_NUCLEUS_UM2 = 2000.0
"""Area in µm² above which an outline is not taken for a nucleus (a nucleus 50 µm across)."""

ENOUGH = 20
"""Fewest nuclei of a field on which it is checked that they are darker than what lies between them.

In each of 180 fields they are darker by 15 grey levels or more.
"""

MIN_FIELD = 32
"""Shortest side in pixels of a field; smaller pieces of a region are left out."""


@dataclass
class _Objects:
    """Objects of an export, in level-0 pixels that count from `origin` (None if the file does not state one).

    `names` are the classes of `nuclei`, `dropped` is the number of nuclei that enclose no area.
    """

    nuclei: list[Any] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    regions: list[Any] = field(default_factory=list)
    dropped: int = 0
    origin: tuple[float, float] | None = None


def polygon(geometry: Any) -> Any:
    """Return a GeoJSON geometry as a valid shapely Polygon or MultiPolygon, or None if it encloses no area.

    Raises
    ------
    ValueError
        When a ring is not a list of points, or a coordinate is not finite or beyond `MAX_COORDINATE`.
    """
    import shapely

    kind = geometry["type"]
    if kind not in ("Polygon", "MultiPolygon"):
        return None
    parts = []
    for rings in geometry["coordinates"] if kind == "MultiPolygon" else [geometry["coordinates"]]:
        arrays = [np.array(ring, np.float64) for ring in rings]
        for ring in arrays:
            if ring.ndim != 2 or ring.shape[1] < 2 or not (np.abs(ring[:, :2]) < MAX_COORDINATE).all():
                raise ValueError("a ring is not a list of points")
        arrays = [ring[:, :2] for ring in arrays if len(ring) >= 3]
        if arrays and (part := repair(shapely.Polygon(arrays[0], arrays[1:]))) is not None:
            parts.append(part)
    return shapely.union_all(parts) if parts else None


def _read(path: Path, regions: tuple[str, ...]) -> _Objects:
    found = _Objects()
    with reading(path, *QUPATH) as value:
        found.origin = stated_origin(value) if isinstance(value, dict) and ORIGIN in value else None
        bare = bare_cells(value)
        for number, feature in enumerate(iter_features(value)):
            kind = role(feature, regions)
            if kind == "other" or number in bare:
                continue
            name = base_class(feature)
            outline = nucleus_geometry(feature)
            shape = None if outline is None else polygon(outline)
            if kind == "region":
                if shape is None:
                    title = (feature.get("properties") or {}).get("name") or name
                    raise PipelineError(f"{path}: region {title!r} encloses nothing", "draw it as an area")
                found.regions.append(shape)
            elif shape is None:
                found.dropped += 1
            else:
                found.nuclei.append(shape)
                found.names.append("" if name == UNTYPED else name)
    if bare:
        log.warning("%s: %d cells without a nucleus are left out", path.name, len(bare))
    if found.dropped:
        log.warning("%s: %d objects enclose no area (points, lines, damage) and are left out", path.name, found.dropped)
    return found


def exports(root: Path) -> dict[str, Path]:
    """Find QuPath exports in the ``annotations/`` or ``geojson/`` of a folder, or else in the folder itself.

    Returns
    -------
    dict of str to pathlib.Path
        Exports by the names of their slides, which are the file names without suffixes.

    Raises
    ------
    PipelineError
        When there is no export, or there are two of one slide.
    """
    folder = next((f for f in (root / "annotations", root / "geojson") if f.is_dir()), root)
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        suffix = next((s for s in SUFFIXES if path.name.lower().endswith(s)), None)
        if suffix is None or path.name.startswith("."):
            continue
        name = path.name[: -len(suffix)]
        if name in found:
            raise PipelineError(f"{found[name]} and {path} are of one slide", "keep one of them")
        found[name] = path
    if not found:
        raise PipelineError(f"no GeoJSON in {folder}", "export the corrected nuclei of each slide as SLIDE.geojson")
    return found


def _slides(source: Source) -> SlideTable:
    setting = source.options.get("slides") or source.options.get("table")
    if setting is None:
        setting = source.path / "slides" if (source.path / "slides").is_dir() else source.path
    return resolve_slides(str(setting))


def qupath(source: Source) -> list[Lazy]:
    """List the fields of slides with nuclei exported from QuPath as ``annotations/SLIDE.geojson``.

    Detections, annotations and the nuclei of cells are nuclei, with the class of the object. Annotations whose name or
    class begins with ``Region`` or ``Training`` (or as the setting ``regions`` says) outline the areas in which every
    nucleus is annotated; without any, this is the bounding box of all nuclei. Objects of class ``Ignore*`` are left
    out. The areas are cut into fields of at most ``field_size`` pixels a side.
    """
    size = source.options.get("field_size", FIELD_SIZE)
    if not (isinstance(size, int) and size >= MIN_FIELD):
        raise PipelineError(f"data source {source.name!r}: field_size {size!r}", f"a number of at least {MIN_FIELD}")
    starts = tuple(str(name).casefold().rstrip("*") for name in source.options.get("regions", REGIONS))
    if not all(starts) or not starts:
        raise PipelineError(f"data source {source.name!r}: regions name nothing", "give beginnings of names")
    slides = _slides(source)
    by_name = {name: entry for entry in slides for name in (entry.name, entry.path.name)}
    objects: dict[str, tuple[SlideEntry, _Objects]] = {}
    used: dict[str, Path] = {}
    for name, path in exports(source.path).items():
        if name not in by_name:
            more = ", ..." if len(slides.entries) > 3 else ""
            raise PipelineError(
                f"{path.name} has no slide, there are {', '.join(list(slides.entries)[:3])}{more}",
                "name the export as the slide, capitals included",
            )
        entry = by_name[name]
        if (first := used.setdefault(entry.name, path)) != path:
            raise PipelineError(f"{first} and {path} are of one slide, {entry.name}", "keep one of them")
        objects[entry.name] = (entry, _read(path, starts))
    classes = _classes(source, [name for _, one in objects.values() for name in one.names])
    fields: list[Lazy] = []
    for entry, one in objects.values():
        own = list(_fields_of(source, entry, one, classes, size))
        if not own:
            log.warning("%s: no region of %d pixels lies on the slide, which is left out", entry.name, MIN_FIELD)
        fields += own
    return fields


def _classes(source: Source, names: list[str]) -> tuple[str, ...]:
    """Return the classes of a source's nuclei.

    They are logged, with a warning of names that differ only in capitals or spaces, as these are different classes.
    """
    count = Counter(names)
    classes = tuple(sorted(count.keys() - {""}))
    if len(classes) > 255:
        raise PipelineError(f"data source {source.name!r} has {len(classes)} classes", "at most 255")
    if classes:
        told = [f"{name or 'none'} {number}" for name, number in count.most_common(20)]
        log.info("%s: classes %s", source.name, ", ".join(told))
    spelt: dict[str, list[str]] = {}
    for name in classes:
        spelt.setdefault("".join(name.casefold().split()), []).append(name)
    for alike in (group for group in spelt.values() if len(group) > 1):
        log.warning(
            "%s: %s are taken for different classes (name them alike, in QuPath or by train.class_names)",
            source.name, " and ".join(map(repr, alike)),
        )  # fmt: skip
    return classes


def _open(source: Source, entry: SlideEntry) -> tuple[Slide, tuple[float, float]]:
    from pipeline.slides.open import open_slide, resolve_mpp

    try:
        slide = open_slide(entry.path)
        try:
            given = entry.mpp
            if given is None and slide.mpp is None:
                given = source.stated_mpp(f"{source.name}-{entry.name}")
                if given is None:
                    raise PipelineError(
                        f"slide {entry.name}: no pixel size (mpp) in the file's metadata",
                        f"give it as mpp of the data source {source.name!r}, or in the column mpp of a slide table",
                    )
            return slide, resolve_mpp(slide, given)[0]
        except BaseException:
            slide.close()
            raise
    except SlideError as error:
        raise PipelineError(f"slide {entry.name}: {error.reason}", error.hint) from None


def _fields_of(
    source: Source, entry: SlideEntry, objects: _Objects, classes: tuple[str, ...], size: int
) -> Iterator[Lazy]:
    """Cut the completely annotated areas of a slide into fields."""
    import shapely

    slide, (mpp_x, mpp_y) = _open(source, entry)
    with slide:
        width, height, bounds = slide.width, slide.height, slide.bounds
    corner = bounds[:2] if bounds and source.options.get("origin") == "bounds" else (0, 0)
    _check_sizes(entry, objects.nuclei, mpp_x * mpp_y)
    outlines, whole = _placed(entry, objects, np.array(objects.origin or corner, np.float64), (width, height))
    native = math.sqrt(mpp_x * mpp_y)
    mpp = source.stated_mpp(f"{source.name}-{entry.name}") or (native if native >= MIN_MPP else 0.25)
    grid = Grid.for_slide(width, height, mpp_x, mpp_y, mpp)
    # All coordinates below are in grid pixels.
    scale = np.array([1 / grid.scale_x, 1 / grid.scale_y])
    whole = shapely.transform(whole, lambda points: points * scale)
    whole = whole.intersection(shapely.box(0, 0, grid.width, grid.height))
    nuclei = shapely.transform(outlines, lambda points: points * scale)
    tree = shapely.STRtree(nuclei)
    codes = np.array([classes.index(name) + 1 if name else 0 for name in objects.names], np.uint8)
    for part in shapely.get_parts(polygonal(whole)):
        for window in _windows(part.bounds, size):
            x, y, w, h = window
            box = shapely.box(x, y, x + w, y + h)
            known = part.intersection(box)
            near = np.sort(tree.query(known, predicate="intersects"))
            if min(w, h) < MIN_FIELD or known.area == 0 or (not objects.regions and not len(near)):
                continue
            yield partial(
                _read_field,
                source,
                entry,
                grid,
                window,
                known,
                nuclei[near],
                codes[near],
                classes if codes.any() else (),
            )


def _check_sizes(entry: SlideEntry, nuclei: list[Any], pixel_um2: float) -> None:
    """Refuse outlines that are too large for a nucleus; `pixel_um2` is the area of a level-0 pixel in µm²."""
    import shapely

    areas = shapely.area(np.array(nuclei, object)) * pixel_um2
    if len(areas) and areas.max() > MAX_NUCLEUS_UM2:
        x, y = nuclei[int(areas.argmax())].bounds[:2]
        raise PipelineError(
            f"{entry.name}: the object at ({x:.0f}, {y:.0f}) of {areas.max():.0f} µm² is not a nucleus",
            "classify it as Region* where it outlines what is annotated, as Ignore* otherwise",
        )


def _placed(entry: SlideEntry, objects: _Objects, by: np.ndarray, slide: tuple[int, int]) -> tuple[np.ndarray, Any]:
    """Move the objects of an export to level-0 pixels that count from the corner of the slide.

    Parameters
    ----------
    entry : SlideEntry
        The slide, for messages.
    objects : _Objects
        Objects of its export.
    by : numpy.ndarray
        The level-0 pixel from which the export counts.
    slide : (int, int)
        Width and height of the slide.

    Returns
    -------
    outlines : numpy.ndarray
        Outlines of the nuclei.
    whole : shapely.Geometry
        The completely annotated area: the union of all regions, or without any the box around the nuclei.

    Raises
    ------
    PipelineError
        When more than half of the nuclei lie outside the slide, or there is neither a region nor a nucleus.
    """
    import shapely

    outlines = shapely.transform(np.array(objects.nuclei, object), lambda points: points + by)
    inside = shapely.intersects(outlines, shapely.box(0, 0, *slide))
    outside = int((~inside).sum())
    if 2 * outside > len(inside):
        raise PipelineError(
            f"{entry.name}: {outside} of {len(inside)} nuclei lie outside the slide of {slide[0]} x {slide[1]} pixels",
            "export in pixels, from the image that this slide is",
        )
    if outside:
        log.warning("%s: %d nuclei lie outside the slide and are left out", entry.name, outside)
    if objects.regions:
        return outlines, shapely.transform(shapely.union_all(objects.regions), lambda points: points + by)
    if not objects.nuclei:
        raise PipelineError(f"{entry.name}: the export holds no nucleus", "export detections or annotations")
    log.warning(
        "%s: no region tells what is annotated; the box around all outlines is taken to be complete (if it is not, "
        "outline what is as Region*)", entry.name,
    )  # fmt: skip
    return outlines, shapely.box(*shapely.total_bounds(outlines[inside]))


def _windows(bounds: tuple[float, float, float, float], size: int) -> Iterator[tuple[int, int, int, int]]:
    """Divide a box evenly into windows of at most `size` pixels a side; yield each as ``x, y, width, height``."""
    x0, y0, x1, y1 = (math.floor(v + 1e-6) if i < 2 else math.ceil(v - 1e-6) for i, v in enumerate(bounds))
    columns, rows = max(1, -(-(x1 - x0) // size)), max(1, -(-(y1 - y0) // size))
    xs, ys = np.linspace(x0, x1, columns + 1).round().astype(int), np.linspace(y0, y1, rows + 1).round().astype(int)
    for top, bottom in itertools.pairwise(ys):
        for left, right in itertools.pairwise(xs):
            yield int(left), int(top), int(right - left), int(bottom - top)


def _read_field(
    source: Source,
    entry: SlideEntry,
    grid: Grid,
    window: tuple[int, int, int, int],
    known: Any,
    nuclei: np.ndarray,
    codes: np.ndarray,
    classes: tuple[str, ...],
) -> Field:
    import shapely

    from pipeline.slides.regions import read_region

    x, y, w, h = window
    slide, _ = _open(source, entry)
    with slide:
        try:
            image = read_region(slide, grid, x, y, w, h)
        except SlideError as error:
            raise PipelineError(f"slide {entry.name}: {error.reason}", error.hint) from None
    cut = [polygonal(one) for one in shapely.intersection(nuclei, known)]
    labels = burn(list(shapely.transform(np.array(cut, object), lambda points: points - (x, y))), (h, w))
    # Pixels outside the region become white, as nuclei there may not be annotated and would be learned as background.
    shown = burn([shapely.transform(known, lambda points: points - (x, y))], (h, w)) > 0
    if len(nuclei) >= ENOUGH and image[labels > 0].mean() >= image[shown & (labels == 0)].mean():
        raise PipelineError(
            f"{entry.name}: the {len(nuclei)} outlines around ({x * grid.scale_x:.0f}, {y * grid.scale_y:.0f}) are no "
            "darker than what lies between them",
            "is the export of this slide, in its pixels?",
        )
    image[~shown] = 255
    return source.field(
        f"{entry.name}-{x}-{y}",
        image,
        labels,
        patient=entry.extra.get("patient", "").strip() or f"{source.name}-{entry.name}",
        organ=entry.extra.get("organ", "").strip(),
        mpp=grid.mpp,
        types=np.r_[np.uint8(0), codes][labels] if classes else None,
        classes=classes,
    )
