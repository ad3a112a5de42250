"""What every importer shares: the description of a data source and the fields made from it."""

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
from pipeline.label_maps import read_instances
from pipeline.training.field import Field, guess_mpp

IMAGE_SUFFIXES = (".tif", ".tiff", ".png", ".jpg", ".jpeg")

COMMON = ("kind", "path", "name", "mpp", "mpp_of", "weight", "licence", "limit", "table", "empty")
"""Keys that a source of any kind may have."""

TABLE_COLUMNS = ("field", "patient", "organ", "mpp")
"""Columns of a source's table; others are left alone."""

TCGA_PATIENT = re.compile(r"[A-Z0-9]{2}-[A-Z0-9]{4}")
"""What `tcga_patient` gives."""

Lazy = Callable[[], Field]
"""A field that is yet to be read."""


@dataclass(frozen=True)
class Source:
    """An entry of the setting ``train.data``.

    Parameters
    ----------
    kind : str
        Which importer reads it.
    path : pathlib.Path
        Its folder.
    name : str
        Name of the source; its kind unless stated.
    mpp : float or None
        µm per pixel of all its fields.
    mpp_of : dict of str to float
        µm per pixel by the beginning of a field's name.
    limit : int or None
        Most fields to take, spread evenly.
    rows : dict of str to dict, or None
        Rows of its table by ``field``.
    empty : bool
        Its fields hold no nucleus, but what is taken for one.
    options : dict
        Further keys, for the importer.
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
        """The source that an entry of ``train.data`` describes.

        Parameters
        ----------
        value : mapping
            The entry.
        options : tuple of str
            Keys that its importer knows beside the common ones.

        Raises
        ------
        PipelineError
            When a key is unknown, the folder is missing or the table is wrong.
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
            # The table of slides is read where the slides are.
            rows=None if table is None or "slides" in options else read_table(Path(table).expanduser()),
            empty=bool(value.get("empty", False)),
            options={key: value[key] for key in options if key in value},
        )

    def stated_mpp(self, name: str) -> float | None:
        """Pixel size that the settings state for the field of that name."""
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
        """A field of this source, with what the table and the settings say of it.

        Parameters
        ----------
        stem : str
            Its name within the source, by which the table knows it.
        image, labels, types, classes
            See `Field`.
        name : str, optional
            Name among all fields; source and stem by default.
        patient : str, optional
            By default the field is a patient of its own.
        organ, cohort : str
            Organ, and which of several collections it is from.
        mpp : float, optional
            Pixel size in µm where neither table nor settings state one; without, it is guessed from the nuclei.

        Raises
        ------
        PipelineError
            When the table has no row for it, or nothing tells the pixel size.
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
    """Rows of a table by their column ``field``: ``.csv`` with commas, anything else with tabs.

    Raises
    ------
    PipelineError
        When it cannot be read, has no such column, a field twice or a wrong pixel size.
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
    """Tissue source site and participant of a TCGA barcode (``A7-A13E``), the same in every data set; else None."""
    match = re.search(rf"TCGA-({TCGA_PATIENT.pattern})", name)
    return match[1] if match else None


def read_image(path: Path) -> np.ndarray:
    """Read an RGB image, uint8 ``(H, W, 3)``.

    Raises
    ------
    PipelineError
        When it cannot be read.
    """
    image = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if image is None:
        raise PipelineError(f"image {path} cannot be read", "give a PNG, JPEG or TIFF image")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def as_labels(labels: np.ndarray) -> np.ndarray:
    """A label map as int32; numbers much larger than needed are replaced.

    Raises
    ------
    PipelineError
        When numbers are negative or none.
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
    """Read a label map as int32 ``(H, W)``; a mask is taken apart, see `pipeline.label_maps.read_instances`.

    Raises
    ------
    PipelineError
        When it cannot be read.
    """
    return as_labels(read_instances(path))


def components(mask: np.ndarray) -> np.ndarray:
    """4-connected parts of a mask as labels, int32."""
    return np.asarray(cv2.connectedComponents((mask > 0).astype(np.uint8), connectivity=4)[1], np.int32)


def images_in(folder: Path) -> list[Path]:
    """The images of a folder by name.

    Raises
    ------
    PipelineError
        When there is none.
    """
    if not folder.is_dir():
        raise PipelineError(f"{folder} is not a folder", "check the path of the data source")
    found = sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith("."))
    if not found:
        raise PipelineError(f"no images in {folder}", "check the path of the data source")
    return found


def beside(folder: Path, stem: str, suffixes: tuple[str, ...]) -> Path | None:
    """The file of that stem with the first of these suffixes that there is."""
    return next((p for p in (folder / f"{stem}{s}" for s in suffixes) if p.is_file()), None)
