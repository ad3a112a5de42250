"""The table of nuclei of one slide: GeoParquet, polygons in level-0 pixels.

Columns: ``id`` (uint64: row and column of the nucleus' first pixel in raster order on the grid that nuclei were made
on, ``row << 32 | column``), ``geometry`` (WKB), ``class``, ``class_id``, ``probability`` (mean of the nucleus map
inside, 0 to 1); between the instances and the measure stage also ``runs`` (pixels of the slide's grid: row, first
column, column after the last, one after another). Rows are ordered by id. What the table belongs to stands in the
file's metadata under ``nuclei``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import PipelineError, of_the_machine
from pipeline.grid import Grid

META_KEY = b"nuclei"

GEO_META = {
    "version": "1.1.0",
    "primary_column": "geometry",
    "columns": {"geometry": {"encoding": "WKB", "geometry_types": ["Polygon"], "crs": None, "edges": "planar"}},
}
"""GeoParquet metadata; coordinates are level-0 pixels, so there is no reference system."""

BASE_FIELDS = [
    pa.field("id", pa.uint64(), nullable=False),
    pa.field("geometry", pa.binary(), nullable=False),
    pa.field("class", pa.string(), nullable=False),
    pa.field("class_id", pa.uint8(), nullable=False),
    pa.field("probability", pa.float32(), nullable=False),
]
RUNS_FIELD = pa.field("runs", pa.list_(pa.field("item", pa.int32(), nullable=False)), nullable=False)

COMPRESSION = {"compression": "zstd", "compression_level": 1, "use_dictionary": ["class", "class_id"]}
"""How nuclei are packed in a file. Dictionaries of values that hardly repeat take as long as all the rest."""


def nuclei_schema(about: dict[str, Any], extra: list[pa.Field] | None = None) -> pa.Schema:
    """Schema of a table of nuclei.

    Parameters
    ----------
    about : dict
        JSON values for the file's metadata: ``slide``, ``grid``, ``classes``, ``model``.
    extra : list of pyarrow.Field, optional
        Columns beyond the basic ones.
    """
    metadata = {b"geo": json.dumps(GEO_META).encode(), META_KEY: json.dumps(about, sort_keys=True).encode()}
    return pa.schema([*BASE_FIELDS, *(extra or [])], metadata=metadata)


def open_nuclei(path: Path) -> pq.ParquetFile:
    """Open a file of nuclei for reading in parts.

    Raises
    ------
    PipelineError
        When it is missing or no such file.
    """
    try:
        file = pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        if of_the_machine(error):
            raise
        raise PipelineError(f"{path} is not a table of nuclei: {error}", "delete it and run again") from None
    if META_KEY not in (file.schema_arrow.metadata or {}):
        raise PipelineError(f"{path} is not a table of nuclei", "give the nuclei.parquet of a run")
    return file


def about_nuclei(schema: pa.Schema) -> dict[str, Any]:
    """What a table of nuclei belongs to."""
    value: dict[str, Any] = json.loads(schema.metadata[META_KEY])
    return value


def read_nuclei(path: Path, columns: list[str] | None = None) -> pa.Table:
    """Read a file of nuclei, or some of its columns."""
    with open_nuclei(path) as file:
        return file.read(columns=columns)


def wkb_of(column: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """The polygons of a column in one piece: bytes uint8, and where each begins in them, int64 ``(n + 1,)``."""
    offsets = np.frombuffer(column.buffers()[1], np.int32)[column.offset : column.offset + len(column) + 1]
    first, last = (int(offsets[0]), int(offsets[-1])) if len(column) else (0, 0)
    data = np.frombuffer(column.buffers()[2] or b"", np.uint8)[first:last]
    return data, offsets.astype(np.int64) - first


def grid_of(table: pa.Table | pq.ParquetFile) -> Grid:
    """The grid that nuclei were made on: the slide's, or one of half its pixels where the model's rules refine."""
    schema = table.schema if isinstance(table, pa.Table) else table.schema_arrow
    return Grid.from_json(about_nuclei(schema)["grid"])
