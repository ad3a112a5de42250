"""Read GeoJSON files, plain or gzipped, as this pipeline, QuPath and other programs write them."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import PipelineError, SlideError, of_the_machine

if TYPE_CHECKING:
    from shapely.geometry.base import BaseGeometry

REGIONS = ("region", "training")
"""Prefixes of the names and classes of annotations that outline a completely annotated region."""

IGNORED = "ignore"
"""Prefix of the class of objects that are to be ignored."""

UNTYPED = "Nucleus"
"""Class of all nuclei in exports of models without a type head."""

EXPORTED = "Classified as"
"""Metadata of an exported nucleus: the class that a classifier gave it. QuPath keeps them from version 0.5 on."""

CLASS_PROBABILITY = "Class probability"
"""Measurement of an exported nucleus that a classifier has given its class."""

MAX_COORDINATE = 1e7
"""Largest plausible coordinate in pixels; a larger one means that the file is damaged."""

ORIGIN = "level0_origin"
"""Member of a collection that gives the origin of its coordinates, x and y in level-0 pixels, if not (0, 0)."""


def read_geojson(path: Path) -> Any:
    """Read a file as JSON.

    Raises
    ------
    PipelineError
        When the file is missing, damaged or not JSON.
    """
    import orjson

    try:
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
        data = data.removeprefix(b"\xef\xbb\xbf")
        try:
            return orjson.loads(data)
        except orjson.JSONDecodeError:
            return json.loads(data)  # before version 0.5, QuPath writes measurements without a value as NaN
    except FileNotFoundError:
        raise PipelineError(f"{path} is missing", "give a GeoJSON file") from None
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
        if of_the_machine(error):
            raise
        raise PipelineError(f"{path} is not GeoJSON: {error}", "is it damaged?") from None


@contextmanager
def reading(path: Path, what: str, hint: str) -> Iterator[Any]:
    """Open a GeoJSON file as a context; errors that its unexpected content causes within become a `PipelineError`.

    Parameters
    ----------
    path : pathlib.Path
        The file.
    what, hint : str
        What the file should be, and what to do if it is something else; for the error message.

    Yields
    ------
    object
        The parsed JSON.

    Raises
    ------
    PipelineError
        When the file is missing or damaged, or when its content has an unexpected structure.
    """
    value = read_geojson(path)
    try:
        yield value
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError, RecursionError) as error:
        raise PipelineError(f"{path} is not {what}: {type(error).__name__} {error}", hint) from None


def iter_features(value: Any) -> Iterator[dict[str, Any]]:
    """Yield the features of a feature collection, a feature, a list of either, or a bare geometry.

    Yields
    ------
    dict
        A feature; its ``geometry`` may be None, as the format allows.

    Raises
    ------
    KeyError, TypeError, AttributeError
        When `value` is not GeoJSON.
    """
    if isinstance(value, list):  # as old versions of QuPath write
        for item in value:
            yield from iter_features(item)
    elif value["type"] == "FeatureCollection":
        yield from iter_features(value["features"])
    elif value["type"] == "Feature":
        value["geometry"]  # raises a KeyError if there is none
        yield value
        yield from iter_features((value.get("properties") or {}).get("childObjects") or [])  # of an object of QuPath
    elif value["type"] == "GeometryCollection":
        yield from iter_features(value["geometries"])
    else:
        yield {"type": "Feature", "geometry": value}


def stated_origin(value: Any, origin: tuple[float, float] = (0, 0)) -> tuple[float, float]:
    """Origin of a file's coordinates as a level-0 pixel: the one that the file states, else `origin`."""
    x, y = value.get(ORIGIN, origin) if isinstance(value, dict) else origin
    if not (np.isfinite(float(x)) and np.isfinite(float(y))):
        raise ValueError(f"{ORIGIN} is {x}, {y}")
    return float(x), float(y)


def origin_of(info: Mapping[str, Any], origin: str) -> tuple[int, int]:
    """Origin, as a level-0 pixel, of coordinates that are exchanged with QuPath.

    Parameters
    ----------
    info : mapping
        ``slide.json``.
    origin : {"slide", "bounds"}
        ``slide`` is the corner of level 0. ``bounds`` is the corner of the slide's bounds, from which QuPath shows the
        slide, or the corner of level 0 if the slide has no bounds.

    Returns
    -------
    tuple of int
        x and y.
    """
    bounds = info.get("bounds") if origin == "bounds" else None
    return (int(bounds[0]), int(bounds[1])) if bounds else (0, 0)


def scanned(info: Mapping[str, Any]) -> BaseGeometry:
    """Scanned area of a slide in level-0 pixels: its bounds in ``slide.json``, or all of level 0 if it has none."""
    import shapely

    x, y, width, height = info.get("bounds") or (0, 0, info["width"], info["height"])
    return shapely.box(x, y, x + width, y + height)


def polygonal(shape: BaseGeometry) -> BaseGeometry:
    """Polygons of a valid shape as a MultiPolygon, without points and lines that are left from intersections."""
    import shapely

    parts = shapely.get_parts(shapely.get_parts(shape))  # twice: collections may contain multipolygons
    return shapely.MultiPolygon([part for part in parts if part.geom_type == "Polygon" and part.area > 0])


def enclosed(polygons: Any) -> BaseGeometry:
    """Union of all that polygons enclose; what an outline that crosses itself goes around twice is inside, too."""
    import shapely

    # By default, `make_valid` takes what is enclosed twice for outside.
    valid = shapely.make_valid(np.asarray(polygons, dtype=object), method="structure", keep_collapsed=False)
    return shapely.union_all(valid)


def class_names(feature: dict[str, Any]) -> list[str]:
    """Classes of a QuPath object, the base class first, such as ``[Tumor, Positive]``; empty if it has none."""
    return _names_of((feature.get("properties") or {}).get("classification") or {})


def _names_of(value: Any) -> list[str]:
    names = value.get("names") or value.get("name") if isinstance(value, dict) else value
    names = names if isinstance(names, list) else [names] if isinstance(names, str) else []  # else of another program
    # Before version 0.4, a derived class had only the last part of its name, and the class that it is derived from.
    above = _names_of(value["parentClass"]) if isinstance(value, dict) and value.get("parentClass") else []
    return above + [part.strip() for name in names for part in str(name).split(":") if part.strip()]


def base_class(feature: dict[str, Any]) -> str:
    """Base class of a QuPath object; empty if it has none."""
    return next(iter(class_names(feature)), "")


def object_type(feature: dict[str, Any]) -> str:
    """Type of a QuPath object in lower case (``annotation``, ``detection``, ``cell``); empty if it has none."""
    # Version 0.3 of QuPath has another key, and 0.2 the feature's id. Ids of other programs can be any text.
    old = str(feature.get("id") or "")
    properties = feature.get("properties") or {}
    told = properties.get("objectType") or properties.get("object_type")
    return str(told or (old if old.endswith("Object") else "")).casefold()


def kind_of(feature: dict[str, Any]) -> str:
    """Kind of a QuPath object on a slide.

    Returns
    -------
    {"annotation", "detection", "ignored", "frame"}
        ``detection`` also stands for cells, ``ignored`` for objects of class ``Ignore*``, and ``frame`` for QuPath's
        own frames (root, tiles, TMA cores). What does not state its type is an annotation.
    """
    kind = object_type(feature)
    if _is_frame(kind):
        return "frame"
    if base_class(feature).casefold().startswith(IGNORED):
        return "ignored"
    return "detection" if "detection" in kind or "cell" in kind else "annotation"


def _is_frame(kind: str) -> bool:
    return "root" in kind or "tile" in kind or "tma" in kind


def role(feature: dict[str, Any], regions: tuple[str, ...] = REGIONS) -> str:
    """Role of a QuPath object.

    Parameters
    ----------
    feature : dict
        The feature.
    regions : tuple of str
        Prefixes, in lower case, of the names and classes of objects that outline an annotated region.

    Returns
    -------
    {"nucleus", "region", "other"}
        ``other`` stands for QuPath's own frames (root, tiles, TMA cores) and for objects of classes to be ignored.
    """
    properties = feature.get("properties") or {}
    kind = object_type(feature)
    if _is_frame(kind):
        return "other"
    name, title = base_class(feature).casefold(), str(properties.get("name") or "").casefold()
    if (name.startswith(regions) or title.startswith(regions)) and "detection" not in kind and "cell" not in kind:
        return "region"
    return "other" if name.startswith(IGNORED) or name.endswith("*") else "nucleus"


def nucleus_geometry(feature: dict[str, Any]) -> Any:
    """Geometry of a feature; for a QuPath cell, the geometry of its nucleus."""
    return feature.get("nucleusGeometry") or feature["geometry"]


def bare_cells(value: Any) -> set[int]:
    """Numbers of the features that are cells without a nucleus, of a file in which other cells have one.

    Where no cell has a nucleus, cells are what the program that wrote them calls nuclei.
    """
    cells = [(number, one) for number, one in enumerate(iter_features(value)) if "cell" in object_type(one)]
    if not any(one.get("nucleusGeometry") for _, one in cells):
        return set()
    return {number for number, one in cells if not one.get("nucleusGeometry")}


def no_areas(what: str, path: Path, why: str) -> SlideError:
    """Return the error for a file of outlines that cannot be used, with the reason `why`."""
    return SlideError(f"{what} {path}: {why}", "give GeoJSON polygons in level-0 pixels")


def read_areas(
    path: Path,
    what: str,
    wanted: Callable[[dict[str, Any]], bool] = lambda feature: True,
    origin: tuple[int, int] = (0, 0),
) -> list[tuple[dict[str, Any], list[BaseGeometry]]]:
    """Read areas that a user has drawn on a slide.

    Parameters
    ----------
    path : pathlib.Path
        GeoJSON, plain or gzipped.
    what : str
        What the file describes, for messages.
    wanted : callable
        Takes a feature and returns whether to include it.
    origin : tuple of int
        Origin of the coordinates as a level-0 pixel, unless the file states its own.

    Returns
    -------
    list of (dict, list of shapely.Polygon)
        The included features that have a geometry, each with its polygons in level-0 pixels, which may be invalid.

    Raises
    ------
    SlideError
        When the file is missing or not GeoJSON.
    OSError
        When the disk or the file server fails.
    """
    import shapely
    from shapely.geometry import shape

    try:
        data = path.read_bytes()
        text = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
        value = json.loads(text)
    except FileNotFoundError:
        raise SlideError(f"{what} {path} does not exist", "check the path in the slide table") from None
    except OSError as error:
        if of_the_machine(error):
            raise
        raise no_areas(what, path, error.strerror or str(error)) from None
    except (ValueError, EOFError, RecursionError, zlib.error) as error:
        raise no_areas(what, path, f"no JSON ({error})") from None
    found = []
    try:
        by = stated_origin(value, origin)
        for feature in iter_features(value):
            if feature["geometry"] is not None and wanted(feature):
                with np.errstate(invalid="ignore"):
                    parts = shapely.get_parts(shapely.get_parts(shape(feature["geometry"])))  # twice, as in `polygonal`
                polygons = [part for part in parts if part.geom_type == "Polygon"]
                found.append((feature, [shapely.transform(one, lambda points: points + by) for one in polygons]))
    except (
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        IndexError,
        OverflowError,
        RecursionError,
        shapely.errors.ShapelyError,
    ) as error:
        raise no_areas(what, path, f"it is not GeoJSON ({type(error).__name__}: {error})") from None
    if any(not np.isfinite(shapely.get_coordinates(polygons)).all() for _, polygons in found):
        raise no_areas(what, path, "coordinates that are not numbers")
    return found
