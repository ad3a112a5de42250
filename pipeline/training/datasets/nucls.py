"""Importer of NuCLS: breast cancer fields with outlines, boxes and classes (Amgad et al., GigaScience 11, 2022)."""

from __future__ import annotations

import csv
import logging
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import PipelineError
from pipeline.exchange.geojson import polygonal
from pipeline.exchange.label_maps import load_npy
from pipeline.training.annotations import burn, repair
from pipeline.training.datasets.source import Lazy, Source, beside, images_in, read_image, tcga_patient
from pipeline.training.field import Field

log = logging.getLogger(__name__)

MPP = 0.2
"""µm per pixel of all NuCLS fields."""

UNKNOWN = {"", "unlabeled", "ambiguous"}
"""Class names of nuclei whose class is not known, in lower case."""

FOV_CODE = 253
"""Code, in the first channel of the published masks, of annotated pixels without a nucleus."""

_ELLIPSE = np.linspace(0, 2 * np.pi, 32, endpoint=False)


def nucls(source: Source) -> list[Lazy]:
    """List the fields of NuCLS, in either of two layouts.

    As published: ``rgb/`` with ``csv/STEM.csv``, which holds outlines and boxes with their ``main_classification``. A
    box is drawn as the ellipse inside it. Images are larger than what was annotated, and are cut to it: the box of the
    row ``fov``, or of the pixels of that code in ``mask/STEM.png``. Or converted: ``images/`` with
    ``annotations/STEM.npy``, dicts of ``inst_map`` and ``type_map``, and class names in ``meta/label_map.yaml``.
    """
    if (source.path / "rgb").is_dir():
        tables = {p: _read_csv(source.path / "csv", p.stem) for p in images_in(source.path / "rgb")}
        names = {row["main_classification"] for rows in tables.values() for row in rows if not _is_fov(row)}
        classes = tuple(sorted(name for name in names if name.casefold() not in UNKNOWN))
        return [partial(_csv_field, source, path, rows, classes) for path, rows in tables.items()]
    classes = _class_names(source.path / "meta" / "label_map.yaml")
    return [partial(_npy_field, source, path, classes) for path in images_in(source.path / "images")]


def _class_names(path: Path) -> tuple[str, ...]:
    import yaml

    if not path.is_file():
        return ()
    try:
        names = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise PipelineError(f"{path} cannot be read: {error}", "it names the classes: 1: NAME") from None
    if not isinstance(names, dict) or set(names) != set(range(1, len(names) + 1)):
        raise PipelineError(f"{path} does not name the classes from 1 on", "write 1: NAME, 2: NAME")
    return tuple(str(names[number]) for number in sorted(names))


def _npy_field(source: Source, path: Path, classes: tuple[str, ...]) -> Field:
    file = beside(source.path / "annotations", path.stem, (".npy",))
    if file is None:
        raise PipelineError(f"{path.name} has no annotations/{path.stem}.npy", "complete the data folder")
    content = load_npy(file)
    if not isinstance(content, dict) or "inst_map" not in content:
        raise PipelineError(f"{file} has no inst_map", "is it of NuCLS?")
    for name, array in content.items():
        if array.ndim != 2 or array.dtype.kind not in "biu" or array.min(initial=0) < 0:
            raise PipelineError(f"{file}: {name} is {array.dtype} {array.shape}, no map of whole numbers")
    types = content.get("type_map") if classes else None
    if types is not None and int(types.max(initial=0)) > 255:
        raise PipelineError(f"{file}: type_map has class {types.max()}", f"known are 1 to {len(classes)}")
    return source.field(
        path.stem,
        read_image(path),
        content["inst_map"],
        patient=tcga_patient(path.stem),
        organ="breast",
        mpp=MPP,
        types=None if types is None else types.astype(np.uint8),
        classes=classes if types is not None else (),
    )


def _read_csv(folder: Path, stem: str) -> list[dict[str, str]]:
    path = folder / f"{stem}.csv"
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            rows = list(csv.DictReader(stream))
    except FileNotFoundError:
        raise PipelineError(f"{path} is missing", "complete the data folder") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise PipelineError(f"{path} cannot be read: {error}", "copy it again") from None
    needed = ("raw_classification", "main_classification", "type", "xmin", "ymin", "xmax", "ymax")
    for row in rows:
        lacking = [name for name in needed if row.get(name) is None]
        if lacking:
            raise PipelineError(f"{path} has no column {lacking[0]!r}", "is it of NuCLS?")
    return rows


def _is_fov(row: dict[str, str]) -> bool:
    return row["raw_classification"].casefold() == "fov"


def _annotated(source: Source, stem: str, rows: list[dict[str, str]], shape: tuple[int, ...]) -> tuple[slice, slice]:
    """Rows and columns of an image that were annotated; all of it, with a warning, where the data do not say."""
    from PIL import Image

    height, width = shape[:2]
    box = next(([float(row[key]) for key in ("xmin", "ymin", "xmax", "ymax")] for row in rows if _is_fov(row)), None)
    mask = source.path / "mask" / f"{stem}.png"
    if box is None and mask.is_file():
        with Image.open(mask) as image:
            codes = np.asarray(image)
        inside = (codes if codes.ndim == 2 else codes[..., 0]) == FOV_CODE
        if inside.shape == (height, width) and inside.any():
            down, across = (np.flatnonzero(inside.any(axis=axis)) for axis in (1, 0))
            box = [across[0], down[0], across[-1] + 1, down[-1] + 1]
    if box is None:
        log.warning("%s: neither csv nor mask says which part was annotated: all of the image is learned from", stem)
        return slice(0, height), slice(0, width)
    left, top = max(0, math.floor(box[0])), max(0, math.floor(box[1]))
    right, bottom = min(width, math.ceil(box[2])), min(height, math.ceil(box[3]))
    if right - left < 1 or bottom - top < 1:
        raise PipelineError(f"{stem}: the annotated part, {box}, lies outside of the image", "copy the data again")
    return slice(top, bottom), slice(left, right)


def _shape(row: dict[str, str]) -> Any:
    import shapely

    if row["type"] == "polyline" and (row.get("coords_x") or "").strip():
        x, y = ([float(value) for value in row[key].split(",")] for key in ("coords_x", "coords_y"))
        points = np.array([x, y]).T
        if not np.isfinite(points).all():
            raise ValueError("a coordinate is not finite")
        return repair(shapely.Polygon(points)) if len(points) >= 3 else None
    x0, y0, x1, y1 = (float(row[key]) for key in ("xmin", "ymin", "xmax", "ymax"))
    centre, half = np.array([x0 + x1, y0 + y1]) / 2, np.array([x1 - x0, y1 - y0]) / 2
    if not (half > 0).all() or not np.isfinite(centre).all():
        return None
    return shapely.Polygon(centre + half * np.stack([np.cos(_ELLIPSE), np.sin(_ELLIPSE)], axis=1))


def _csv_field(source: Source, path: Path, rows: list[dict[str, str]], classes: tuple[str, ...]) -> Field:
    import shapely

    image = read_image(path)
    try:
        part = _annotated(source, path.stem, rows, image.shape)
    except (ValueError, OverflowError, OSError) as error:
        raise PipelineError(f"{path.stem}: its annotated part cannot be read: {error}", "copy it again") from None
    rows = [row for row in rows if not _is_fov(row)]
    bounds = shapely.box(0, 0, image.shape[1], image.shape[0])
    try:
        shapes = [_shape(row) for row in rows]
    except ValueError as error:
        raise PipelineError(f"{path.stem}.csv: a coordinate is damaged: {error}", "copy it again") from None
    cut = [None if one is None else polygonal(one.intersection(bounds)) for one in shapes]
    labels = burn(cut, (image.shape[0], image.shape[1]))
    codes = [classes.index(name) + 1 if name in classes else 0 for name in (r["main_classification"] for r in rows)]
    boxes = sum(row["type"] != "polyline" for row in rows)
    log.info("%s: %d nuclei, %d of them boxes", path.stem, len(rows), boxes)
    return source.field(
        path.stem,
        image[part],
        labels[part],
        patient=tcga_patient(path.stem),
        organ="breast",
        mpp=MPP,
        types=np.array([0, *codes], np.uint8)[labels[part]],
        classes=classes,
    )
