"""The table of nuclei of one slide: GeoParquet, polygons in level-0 pixels.

The columns are ``id`` (uint64: row and column of the nucleus' first pixel in raster order on the grid that nuclei were
made on, ``row << 32 | column``), ``geometry`` (WKB), ``class``, ``class_id`` and ``probability`` (mean of the nucleus
map inside the nucleus, 0 to 1). Between the stages ``instances`` and ``measure`` the table also has ``runs``: the
pixels of the slide's grid as a flat list of row, first column and column after the last of each run. Rows are ordered
by id. The file's metadata holds slide, grid, classes and model under the key ``nuclei``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import PipelineError, of_the_machine
from pipeline.stores.grid import Grid

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
"""Options for writing Parquet. Dictionaries of columns whose values hardly repeat would double the time of writing."""


def nuclei_schema(about: dict[str, Any], extra: list[pa.Field] | None = None) -> pa.Schema:
    """Schema of a table of nuclei.

    Parameters
    ----------
    about : dict
        JSON values for the file's metadata: ``slide``, ``grid``, ``classes``, ``model``.
    extra : list of pyarrow.Field, optional
        Columns besides `BASE_FIELDS`.

    Returns
    -------
    pyarrow.Schema
        The schema, with the metadata of GeoParquet.
    """
    metadata = {b"geo": json.dumps(GEO_META).encode(), META_KEY: json.dumps(about, sort_keys=True).encode()}
    return pa.schema([*BASE_FIELDS, *(extra or [])], metadata=metadata)


def open_nuclei(path: Path) -> pq.ParquetFile:
    """Open a table of nuclei, to be read in parts.

    Raises
    ------
    PipelineError
        When the file is missing or not a table of nuclei.
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
    """Metadata of a table of nuclei: ``slide``, ``grid``, ``classes`` and ``model``."""
    value: dict[str, Any] = json.loads(schema.metadata[META_KEY])
    return value


def read_nuclei(path: Path, columns: list[str] | None = None) -> pa.Table:
    """Read a table of nuclei, or some of its columns."""
    with open_nuclei(path) as file:
        return file.read(columns=columns)


def wkb_of(column: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """WKB of a column of polygons: all bytes as uint8, and the offset of each polygon in them, int64 ``(n + 1,)``."""
    offsets = np.frombuffer(column.buffers()[1], np.int32)[column.offset : column.offset + len(column) + 1]
    first, last = (int(offsets[0]), int(offsets[-1])) if len(column) else (0, 0)
    data = np.frombuffer(column.buffers()[2] or b"", np.uint8)[first:last]
    return data, offsets.astype(np.int64) - first


def grid_of(table: pa.Table | pq.ParquetFile) -> Grid:
    """Grid that the nuclei were made on.

    This is the slide's grid, or one with pixels of half the size where the model's rules refine the maps.
    """
    schema = table.schema if isinstance(table, pa.Table) else table.schema_arrow
    return Grid.from_json(about_nuclei(schema)["grid"])
