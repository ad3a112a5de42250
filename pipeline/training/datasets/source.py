"""Data sources, and the helpers that all importers share."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from pipeline.errors import PipelineError
from pipeline.exchange.label_maps import read_instances
from pipeline.training.field import Field, guess_mpp

IMAGE_SUFFIXES = (".tif", ".tiff", ".png", ".jpg", ".jpeg")

COMMON = ("kind", "path", "name", "mpp", "mpp_of", "weight", "licence", "limit", "table", "empty")
"""Keys that a source of any kind may have."""

TABLE_COLUMNS = ("field", "patient", "organ", "mpp")
"""Columns of a source's table that are read; other columns are ignored."""

TCGA_PATIENT = re.compile(r"[A-Z0-9]{2}-[A-Z0-9]{4}")
"""Form of the patient codes that `tcga_patient` returns."""

Lazy = Callable[[], Field]
"""A function that reads a field when it is called."""


@dataclass(frozen=True)
class Source:
    """An entry of the setting ``train.data``.

    Parameters
    ----------
    kind : str
        Name of the importer that reads the source.
    path : pathlib.Path
        Folder of the data.
    name : str
        Name of the source; its kind by default.
    mpp : float or None
        µm per pixel of all fields.
    mpp_of : dict of str to float
        µm per pixel by the beginning of a field's name, before `mpp`.
    limit : int or None
        Largest number of fields to take, spread evenly over the source.
    rows : dict of str to dict, or None
        Rows of the source's table by ``field``.
    empty : bool
        The fields hold no nuclei, only things that may be mistaken for nuclei.
    options : dict
        Further keys, which only the importer knows.
    """

    kind: str
    path: Path
    name: str
    mpp: float | None = None
    mpp_of: Mapping[str, float] = field(default_factory=dict)
    limit: int | None = None
    rows: Mapping[str, Mapping[str, str]] | None = None
    empty: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_json(cls, value: Mapping[str, Any], options: tuple[str, ...] = ()) -> Source:
        """Build a source from an entry of ``train.data``.

        Parameters
        ----------
        value : mapping
            The entry.
        options : tuple of str
            Keys that the importer knows beside the common ones.

        Raises
        ------
        PipelineError
            When a key is unknown, the folder is missing, or the limit or the table is wrong.
        """
        name = str(value.get("name", value["kind"]))
        unknown = [key for key in value if key not in COMMON + options]
        if unknown:
            raise PipelineError(
                f"data source {name!r}: unknown key {unknown[0]!r}", f"known are {', '.join(COMMON + options)}"
            )
        path = Path(value["path"]).expanduser()
        if not path.is_dir():
            raise PipelineError(f"{path} is not a folder", f"set the path of the data source {name!r}")
        limit = value.get("limit")
        if limit is not None and not (isinstance(limit, int) and limit > 0):
            raise PipelineError(f"data source {name!r}: limit {limit!r} is not a positive number of fields")
        table = value.get("table")
        return cls(
            kind=str(value["kind"]),
            path=path,
            name=name,
            mpp=None if value.get("mpp") is None else float(value["mpp"]),
            mpp_of={str(k): float(v) for k, v in (value.get("mpp_of") or {}).items()},
            limit=limit,
            # A table of slides instead of fields is read by the importer.
            rows=None if table is None or "slides" in options else read_table(Path(table).expanduser()),
            empty=bool(value.get("empty", False)),
            options={key: value[key] for key in options if key in value},
        )

    def stated_mpp(self, name: str) -> float | None:
        """Return the pixel size that the settings state for a field, or None; `name` is the field's full name."""
        return next((value for start, value in self.mpp_of.items() if name.startswith(start)), self.mpp)

    def field(
        self,
        stem: str,
        image: np.ndarray,
        labels: np.ndarray,
        *,
        name: str | None = None,
        patient: str | None = None,
        organ: str = "",
        mpp: float | None = None,
        types: np.ndarray | None = None,
        classes: tuple[str, ...] = (),
        cohort: str = "",
    ) -> Field:
        """Build a field of this source; entries in the source's table override `patient`, `organ` and `mpp`.

        Parameters
        ----------
        stem : str
            Name of the field within the source and in the source's table.
        image, labels, types, classes
            See `Field`.
        name : str, optional
            Name among the fields of all sources; by default it is made of the names of the source and the field.
        patient : str, optional
            Patient; a TCGA barcode in `stem` comes before it. By default the field is a patient of its own.
        organ, cohort : str
            Organ, and the collection that the field is from.
        mpp : float, optional
            Pixel size in µm if neither table nor settings state one; without it, the size is guessed from the nuclei.

        Raises
        ------
        PipelineError
            When the table has no row for the field, or its pixel size is neither stated nor can be guessed.
        """
        name = f"{self.name}-{stem}" if name is None else name
        row: Mapping[str, str] = {}
        if self.rows is not None:
            if stem not in self.rows:
                raise PipelineError(f"field {stem!r} of {self.name} is not in its table", "add a row for it")
            row = self.rows[stem]
        labels = as_labels(labels)
        size = float(row["mpp"]) if row.get("mpp") else self.stated_mpp(name) or mpp or guess_mpp(labels)
        if size is None:
            raise PipelineError(
                f"field {name}: nothing states its pixel size, and it holds no nucleus to guess it from",
                f"check its annotations, or set mpp of the data source {self.name!r}",
            )
        whose = row.get("patient") or patient or name
        return Field(
            name=name,
            source=self.name,
            patient=tcga_patient(whose) or (not row.get("patient") and tcga_patient(stem)) or whose,
            organ=row.get("organ") or organ,
            mpp=size,
            image=image,
            labels=labels,
            types=types,
            classes=classes,
            cohort=cohort,
        )


def read_table(path: Path) -> dict[str, dict[str, str]]:
    """Read a table and return its rows by the column ``field``: ``.csv`` with commas, any other file with tabs.

    Raises
    ------
    PipelineError
        When the table cannot be read, has no column ``field``, names a field twice or has a wrong pixel size.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, delimiter="," if path.suffix.lower() == ".csv" else "\t", strict=True)
            columns = reader.fieldnames or []
            found = [(reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise PipelineError(f"table {path} cannot be read: {error}", "give a .tsv or .csv file") from None
    if "field" not in columns:
        raise PipelineError(f"table {path} has no column 'field', only {', '.join(map(repr, columns))}")
    rows: dict[str, dict[str, str]] = {}
    for line, row in found:
        kept = {key: (row.get(key) or "").strip() for key in TABLE_COLUMNS}
        if kept["field"] in rows:
            raise PipelineError(f"table {path}, line {line}: field {kept['field']!r} is there twice")
        try:
            float(kept["mpp"] or 1)
        except ValueError:
            raise PipelineError(f"table {path}, line {line}: mpp is not a number: {kept['mpp']!r}") from None
        rows[kept.pop("field")] = kept
    return rows


def tcga_patient(name: str) -> str | None:
    """Return tissue source site and participant (``A7-A13E``) of a TCGA barcode in a name, or None if it has none.

    They identify a patient across data sets.
    """
    match = re.search(rf"TCGA-({TCGA_PATIENT.pattern})", name)
    return match[1] if match else None


def read_image(path: Path) -> np.ndarray:
    """Read an image as RGB, uint8 ``(H, W, 3)``.

    Raises
    ------
    PipelineError
        When the image cannot be read.
    """
    image = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if image is None:
        raise PipelineError(f"image {path} cannot be read", "give a PNG, JPEG or TIFF image")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def as_labels(labels: np.ndarray) -> np.ndarray:
    """Return a label map as int32, renumbered if its labels are much larger than needed.

    Raises
    ------
    PipelineError
        When labels are negative or not finite.
    """
    if labels.dtype.kind == "f" and not np.isfinite(labels).all():
        raise PipelineError("a label map holds values that are not numbers", "give whole numbers, 0 is background")
    if labels.size and labels.min() < 0:
        raise PipelineError(f"a label map holds {labels.min()}", "give positive numbers, 0 is background")
    if labels.dtype.kind in "iu" and int(labels.max(initial=0)) > max(2 * labels.size, 1 << 16):
        index = np.unique(np.r_[labels.dtype.type(0), labels.ravel()], return_inverse=True)[1]
        labels = index[1:].reshape(labels.shape)
    return np.ascontiguousarray(labels, np.int32)


def read_labels(path: Path) -> np.ndarray:
    """Read a label map as int32 ``(H, W)``; a mask is split into parts.

    See `pipeline.exchange.label_maps.read_instances`.

    Raises
    ------
    PipelineError
        When the file cannot be read or is not a label map.
    """
    return as_labels(read_instances(path))


def components(mask: np.ndarray) -> np.ndarray:
    """Label the 4-connected parts of a mask, int32 ``(H, W)``."""
    return np.asarray(cv2.connectedComponents((mask > 0).astype(np.uint8), connectivity=4)[1], np.int32)


def images_in(folder: Path) -> list[Path]:
    """Return the paths of the images in a folder, sorted by name.

    Raises
    ------
    PipelineError
        When the folder is missing or has no image.
    """
    if not folder.is_dir():
        raise PipelineError(f"{folder} is not a folder", "check the path of the data source")
    found = sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith("."))
    if not found:
        raise PipelineError(f"no images in {folder}", "check the path of the data source")
    return found


def beside(folder: Path, stem: str, suffixes: tuple[str, ...]) -> Path | None:
    """Return the file with this stem and the first of the suffixes that exists, or None."""
    return next((p for p in (folder / f"{stem}{s}" for s in suffixes) if p.is_file()), None)
