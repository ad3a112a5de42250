"""GeoJSON files, plain or gzipped, as they come from here, from QuPath and from others."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import PipelineError


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
        return orjson.loads(data)
    except FileNotFoundError:
        raise PipelineError(f"{path} is missing", "give a GeoJSON file") from None
    except (OSError, EOFError, zlib.error, orjson.JSONDecodeError) as error:
        raise PipelineError(f"{path} is no GeoJSON: {error}", "is it damaged?") from None


def iter_features(value: Any) -> Iterator[dict[str, Any]]:
    """The features of a file: of a collection, a list of features or collections, or a bare geometry.

    Yields
    ------
    dict
        With ``geometry``, which may be None, as the format allows.

    Raises
    ------
    KeyError, TypeError, AttributeError
        When `value` is no GeoJSON.
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


def class_names(feature: dict[str, Any]) -> list[str]:
    """Classes of a QuPath object, the base class first: ``[Tumor, Positive]``; empty where it has none."""
    value = (feature.get("properties") or {}).get("classification") or {}
    names = [value] if isinstance(value, str) else value.get("names") or [value.get("name") or ""]
    return [part.strip() for name in names for part in str(name).split(":") if part.strip()]


def nucleus_geometry(feature: dict[str, Any]) -> Any:
    """Geometry of a feature; of a QuPath cell, that of its nucleus."""
    return feature.get("nucleusGeometry") or feature["geometry"]
