"""GeoJSON files, plain or gzipped, as they come from here, from QuPath and from others."""

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
"""Beginnings of names and classes of annotations that outline what is completely annotated."""

IGNORED = "ignore"
"""Beginning of the class of objects that are no nuclei."""

MAX_COORDINATE = 1e7
"""Pixels beyond which a coordinate is taken for damage."""

ORIGIN = "level0_origin"
"""Member of a collection whose coordinates count from another pixel of level 0 than (0, 0): its x and y."""


def read_geojson(path: Path) -> Any:
    """Read a file as JSON.

    Raises
    ------
    PipelineError
        When it is missing, damaged or no JSON.
    """
    import orjson

    try:
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
        return orjson.loads(data.removeprefix(b"\xef\xbb\xbf"))
    except FileNotFoundError:
        raise PipelineError(f"{path} is missing", "give a GeoJSON file") from None
    except (OSError, EOFError, zlib.error, orjson.JSONDecodeError) as error:
        if of_the_machine(error):
            raise
        raise PipelineError(f"{path} is not GeoJSON: {error}", "is it damaged?") from None


@contextmanager
def reading(path: Path, what: str, hint: str) -> Iterator[Any]:
    """A file's content, whose features are walked inside: an error that their shape raises is told as the file's.

    Parameters
    ----------
    path : pathlib.Path
        The file.
    what, hint : str
        What it should be, and what to do where it is not.

    Raises
    ------
    PipelineError
        When it is missing, damaged or of another shape.
    """
    value = read_geojson(path)
    try:
        yield value
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RecursionError) as error:
        raise PipelineError(f"{path} is not {what}: {type(error).__name__} {error}", hint) from None


def iter_features(value: Any) -> Iterator[dict[str, Any]]:
    """The features of a file: of a collection, a list of features or collections, or a bare geometry.

    Yields
    ------
    dict
        With ``geometry``, which may be None, as the format allows.

    Raises
    ------
    KeyError, TypeError, AttributeError
        When `value` is not GeoJSON.
    """
    if isinstance(value, list):  # as QuPath wrote once
        for item in value:
            yield from iter_features(item)
    elif value["type"] == "FeatureCollection":
        yield from iter_features(value["features"])
    elif value["type"] == "Feature":
        value["geometry"]  # a KeyError tells that it is none
        yield value
    elif value["type"] == "GeometryCollection":
        yield from iter_features(value["geometries"])
    else:
        yield {"type": "Feature", "geometry": value}


def stated_origin(value: Any, origin: tuple[float, float] = (0, 0)) -> tuple[float, float]:
    """Level-0 pixel from which the coordinates of a file count: as it says itself, else `origin`."""
    x, y = value.get(ORIGIN, origin) if isinstance(value, dict) else origin
    return float(x), float(y)


def origin_of(info: Mapping[str, Any], origin: str) -> tuple[int, int]:
    """Level-0 pixel from which coordinates count that go to QuPath or come from there.

    Parameters
    ----------
    info : mapping
        ``slide.json``.
    origin : {"slide", "bounds"}
        The corner of level 0, or that of the bounds where the slide has them, from which on QuPath shows it.
    """
    bounds = info.get("bounds") if origin == "bounds" else None
    return (int(bounds[0]), int(bounds[1])) if bounds else (0, 0)


def scanned(info: Mapping[str, Any]) -> BaseGeometry:
    """The part of level 0 that was scanned, by ``slide.json``."""
    import shapely

    x, y, width, height = info.get("bounds") or (0, 0, info["width"], info["height"])
    return shapely.box(x, y, x + width, y + height)


def polygonal(shape: BaseGeometry) -> BaseGeometry:
    """The polygons of a valid shape as a MultiPolygon, without the points and lines that cutting leaves."""
    import shapely

    parts = shapely.get_parts(shapely.get_parts(shape))  # of collections of multipolygons
    return shapely.MultiPolygon([part for part in parts if part.geom_type == "Polygon" and part.area > 0])


def class_names(feature: dict[str, Any]) -> list[str]:
    """Classes of a QuPath object, the base class first: ``[Tumor, Positive]``; empty where it has none."""
    value = (feature.get("properties") or {}).get("classification") or {}
    names = value if isinstance(value, str) else value.get("names") or value.get("name") or ""
    names = [names] if isinstance(names, str) else names
    return [part.strip() for name in names for part in str(name).split(":") if part.strip()]


def base_class(feature: dict[str, Any]) -> str:
    """The base class of a QuPath object, empty where it has none."""
    return next(iter(class_names(feature)), "")


def object_type(feature: dict[str, Any]) -> str:
    """Type that QuPath gives an object, in lower case (``annotation``, ``detection``, ``cell``); empty where none."""
    # Before 0.4, QuPath told the type by the feature's id; others' ids may be any text.
    old = str(feature.get("id") or "")
    told = (feature.get("properties") or {}).get("objectType")
    return str(told or (old if old.endswith("Object") else "")).casefold()


def role(feature: dict[str, Any], regions: tuple[str, ...] = REGIONS) -> str:
    """What an object of QuPath is there for.

    Parameters
    ----------
    feature : dict
        The feature.
    regions : tuple of str
        Beginnings of names and classes, in lower case, of what outlines an annotated region.

    Returns
    -------
    {"nucleus", "region", "other"}
        ``other`` are QuPath's own frames (root, tiles, TMA cores) and objects of classes to be ignored.
    """
    properties = feature.get("properties") or {}
    kind = object_type(feature)
    if "root" in kind or "tile" in kind or "tma" in kind:
        return "other"
    name, title = base_class(feature).casefold(), str(properties.get("name") or "").casefold()
    if (name.startswith(regions) or title.startswith(regions)) and "detection" not in kind and "cell" not in kind:
        return "region"
    return "other" if name.startswith(IGNORED) or name.endswith("*") else "nucleus"


def nucleus_geometry(feature: dict[str, Any]) -> Any:
    """Geometry of a feature; of a QuPath cell, that of its nucleus."""
    return feature.get("nucleusGeometry") or feature["geometry"]


def no_areas(what: str, path: Path, why: str) -> SlideError:
    """That a file does not outline what it is there for."""
    return SlideError(f"{what} {path}: {why}", "give GeoJSON polygons in level-0 pixels")


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a number")


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
        GeoJSON, ``.gz`` too.
    what : str
        What it is, for messages.
    wanted : callable
        Whether a feature counts.
    origin : tuple of int
        Level-0 pixel from which the file counts, where it does not say so itself.

    Returns
    -------
    list of (dict, list of shapely.Polygon)
        The features that have a geometry, and the polygons of each in pixels of level 0, valid or not.

    Raises
    ------
    SlideError
        When it is missing or no GeoJSON.
    OSError
        When the disk or the file server failed.
    """
    import shapely
    from shapely.geometry import shape

    try:
        data = path.read_bytes()
        text = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
        value = json.loads(text, parse_constant=_refuse)  # NaN and Infinity are not coordinates
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
                    parts = shapely.get_parts(shapely.get_parts(shape(feature["geometry"])))  # of collections as well
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
        raise no_areas(what, path, f"no GeoJSON ({type(error).__name__}: {error})") from None
    if any(not np.isfinite(shapely.get_coordinates(polygons)).all() for _, polygons in found):
        raise no_areas(what, path, "coordinates that are not numbers")
    return found
