"""Stage ``measure``: shape and stain of each nucleus.

The table of nuclei is read, measured and written in batches of rows, and the tiles are read block by block, so memory
does not grow with the slide. A block that several waiting batches need is read once for all of them.
"""

from __future__ import annotations

import argparse
import logging
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.batch.stage import add_stage_arguments, keywords, read_manifest, run_stage
from pipeline.kernels.contours import wkb_rings
from pipeline.kernels.instances import expand
from pipeline.kernels.measure import (
    STAIN_COLUMNS,
    Pieces,
    StainSums,
    cut_runs,
    hull_areas,
    hull_diameters,
    hulls,
    polygon_shapes,
)
from pipeline.machine.allocator import keep_freed_memory
from pipeline.progress import Progress
from pipeline.stain import stain_matrix
from pipeline.stores.grid import Grid

if TYPE_CHECKING:
    import pyarrow as pa

    from pipeline.stores.tile_store import Tiles

log = logging.getLogger(__name__)

BATCH_ROWS = 16_384
"""Nuclei measured at once."""

BATCHES_AT_ONCE = 4
"""Batches that may wait for further blocks at the same time: on a wide slide, several batches share a row of blocks."""

SHAPES_AT_ONCE = 1024
"""Nuclei whose outlines are measured at once: few enough to fit into the processor's caches."""

BLOCK = 1024
"""Side of the blocks in which tiles are read, in grid pixels."""

COLUMNS = (
    "area_um2",
    "perimeter_um",
    "major_axis_um",
    "minor_axis_um",
    "max_diameter_um",
    "min_diameter_um",
    "eccentricity",
    "solidity",
    "circularity",
    "orientation",
    *STAIN_COLUMNS,
)
"""Measurements, float32, after ``centroid_x`` and ``centroid_y`` (level-0 pixels, float64)."""


def measure_shapes(geometry: pa.Array, grid: Grid) -> dict[str, np.ndarray]:
    """Measure the shape of polygons.

    Parameters
    ----------
    geometry : pyarrow.BinaryArray
        Polygons in level-0 pixels, WKB, ``(n,)``.
    grid : Grid
        The grid that the polygons were made on; it gives the size of a level-0 pixel in both directions.

    Returns
    -------
    dict of str to numpy.ndarray
        float64 ``(n,)``: the columns of `pipeline.kernels.measure.polygon_shapes`, the centroid in level-0 pixels;
        ``solidity``, the area divided by that of the convex hull; and ``max_diameter_um`` and ``min_diameter_um`` of
        `pipeline.kernels.measure.hull_diameters`.
    """
    from pipeline.stores.nuclei import wkb_of

    um = np.array([grid.mpp / grid.scale_x, grid.mpp / grid.scale_y])
    points, rings, polygons = wkb_rings(*wkb_of(geometry))
    values = polygon_shapes(points * um, rings[:-1], polygons[:-1])
    values["centroid_x"] /= um[0]
    values["centroid_y"] /= um[1]
    corners, starts, unit = _hulls(points, rings, polygons, grid)
    hull = hull_areas(corners, starts) * (unit * um).prod()  # the hull of scaled points is the scaled hull
    with np.errstate(invalid="ignore", divide="ignore"):
        values["solidity"] = np.where(hull > 0, np.minimum(values["area_um2"] / hull, 1), 0)
    values["max_diameter_um"], values["min_diameter_um"] = hull_diameters(corners * (unit * um), starts)
    return values


def _hulls(
    points: np.ndarray, rings: np.ndarray, polygons: np.ndarray, grid: Grid
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Corners of the convex hulls of the polygons' exteriors, where each begins, and their unit in level-0 pixels."""
    lengths = np.diff(rings)[polygons[:-1]]
    shells = points if len(rings) == len(polygons) else points[expand(rings[polygons[:-1]], lengths)]
    # Outlines from the stage `instances` have their points on half pixels of the grid: integers suffice for the hulls.
    half = np.array([grid.scale_x, grid.scale_y]) / 2
    places = shells / half
    lattice = np.rint(places)
    if np.abs(lattice - places).max(initial=0) <= 1e-6:
        return *hulls(lattice.astype(np.int64), np.concatenate([[0], np.cumsum(lengths)])), half
    import shapely

    lines = shapely.linestrings(shells, indices=np.repeat(np.arange(len(lengths)), lengths))
    corners, whose = shapely.get_coordinates(
        shapely.orient_polygons(shapely.convex_hull(lines), exterior_cw=True), return_index=True
    )
    starts = np.searchsorted(whose, np.arange(len(lengths) + 1))
    # A polygon's first corner is its last one too; a hull of points on a line is a line, and of one point a point.
    last = starts[1:] - 1
    last = last[(last > starts[:-1]) & (corners[last] == corners[starts[:-1]]).all(axis=1)]
    keep = np.delete(np.arange(len(corners)), last)
    return corners[keep], np.searchsorted(keep, starts), np.ones(2)


@dataclass
class Batch:
    """Rows of ``instances.parquet`` that are being measured.

    Parameters
    ----------
    rows : pyarrow.RecordBatch
        The rows, without their runs.
    shapes : dict of str to numpy.ndarray
        What `measure_shapes` returned for the rows.
    pieces : Pieces
        The runs of the nuclei, cut into blocks.
    stains : StainSums
        Sums over the pixels of the blocks that have been read.
    done : int
        Number of blocks that have been read.
    """

    rows: pa.RecordBatch
    shapes: dict[str, np.ndarray]
    pieces: Pieces
    stains: StainSums
    done: int = 0

    @property
    def finished(self) -> bool:
        """Whether all blocks of this batch have been read."""
        return self.done == len(self.pieces.blocks)

    @property
    def values(self) -> dict[str, np.ndarray]:
        """``centroid_x``, ``centroid_y`` and `COLUMNS`, float64."""
        return self.shapes | self.stains.columns()


def begin_batch(batch: pa.RecordBatch, grid: Grid, matrix: np.ndarray, white: np.ndarray | None = None) -> Batch:
    """Start a batch of rows of ``instances.parquet``: measure the shapes, which need no pixels, and cut the runs."""
    geometry, lists = batch.column("geometry"), batch.column("runs")
    parts = [measure_shapes(geometry.slice(at, SHAPES_AT_ONCE), grid) for at in range(0, len(lists), SHAPES_AT_ONCE)]
    shapes = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    lengths = np.diff(lists.offsets.to_numpy()) // 3
    runs = lists.flatten().to_numpy().reshape(-1, 3)
    pieces = cut_runs(runs, np.repeat(np.arange(len(lengths)), lengths), BLOCK)
    return Batch(batch.drop_columns(["runs"]), shapes, pieces, StainSums(len(lengths), matrix, white))


def read_blocks(batches: Sequence[Batch], tiles: Tiles, before: int) -> None:
    """Add pixels to the stain sums of `batches`, for all unread blocks in the rows of blocks above row `before`.

    A block that several batches need is read once.
    """
    blocks: dict[tuple[int, int], list[tuple[Batch, slice]]] = {}
    for batch in batches:
        pieces = batch.pieces
        end = int(np.searchsorted(pieces.blocks[:, 0], before))
        for number in range(batch.done, end):
            row, column = pieces.blocks[number].tolist()
            part = slice(int(pieces.starts[number]), int(pieces.ends[number]))
            blocks.setdefault((row, column), []).append((batch, part))
        batch.done = max(batch.done, end)
    for _, users in sorted(blocks.items(), key=lambda item: item[0]):
        left, top = (min(int(getattr(b.pieces, name)[part].min()) for b, part in users) for name in ("x0", "y"))
        right, bottom = (max(int(getattr(b.pieces, name)[part].max()) for b, part in users) for name in ("x1", "y"))
        rgb = np.ascontiguousarray(tiles.read(left, top, right - left, bottom + 1 - top))
        for batch, part in users:
            found = batch.pieces
            batch.stains.add(
                rgb, found.nucleus[part], found.y[part] - top, found.x0[part] - left, found.x1[part] - left
            )


def measured_batches(
    source: Any, tiles: Tiles, matrix: np.ndarray, white: np.ndarray | None, schema: pa.Schema
) -> Iterator[pa.RecordBatch]:
    """Yield batches of rows for ``nuclei.parquet``, measured from an open ``instances.parquet``."""
    import pyarrow as pa

    from pipeline.stores.nuclei import grid_of

    def finish(batch: Batch) -> pa.RecordBatch:
        values = batch.values
        columns = [
            pa.array(values[field.name].astype(field.type.to_pandas_dtype()))
            if field.name in values
            else batch.rows.column(field.name)
            for field in schema
        ]
        return pa.record_batch(columns, schema=schema)

    grid = grid_of(source)
    refine = round(tiles.grid.mpp / grid.mpp)
    waiting: deque[Batch] = deque()
    for rows in source.iter_batches(batch_size=BATCH_ROWS):
        if rows.num_rows == 0:
            continue
        waiting.append(begin_batch(rows, grid, matrix, white))
        # Rows are ordered by id, so no later nucleus begins above the last one: rows of blocks above it are complete.
        last = (int(rows.column("id")[-1].as_py()) >> 32) // refine
        read_blocks(waiting, tiles, last // BLOCK)
        if len(waiting) > BATCHES_AT_ONCE:
            read_blocks(waiting, tiles, int(waiting[0].pieces.blocks[-1, 0]) + 1)
        while waiting and waiting[0].finished:
            yield finish(waiting.popleft())
    read_blocks(waiting, tiles, np.iinfo(np.int64).max)
    yield from map(finish, waiting)


def measured_schema(schema: pa.Schema) -> pa.Schema:
    """Return the schema of ``nuclei.parquet`` for a schema of ``instances.parquet``; the metadata is kept."""
    import pyarrow as pa

    fields = [field for field in schema if field.name != "runs"]
    fields += [pa.field(name, pa.float64(), nullable=False) for name in ("centroid_x", "centroid_y")]
    fields += [pa.field(name, pa.float32(), nullable=False) for name in COLUMNS]
    return pa.schema(fields, metadata=schema.metadata)


def write_measured(
    instances: Path, tiles: Tiles, matrix: np.ndarray, out: Path, white: np.ndarray | None = None
) -> int:
    """Measure the nuclei of a file and write them.

    Parameters
    ----------
    instances : pathlib.Path
        ``instances.parquet``.
    tiles : Tiles
        The slide's tiles.
    matrix : numpy.ndarray
        Stain matrix, ``(2, 3)``.
    out : pathlib.Path
        ``nuclei.parquet`` to write, with one row group per batch.
    white : numpy.ndarray, optional
        OD of the glass, ``(3,)``; subtracted before stains are measured.

    Returns
    -------
    int
        Number of nuclei.
    """
    import pyarrow.parquet as pq

    from pipeline.stores.nuclei import COMPRESSION, open_nuclei

    with open_nuclei(instances) as source:
        schema = measured_schema(source.schema_arrow)
        count = source.metadata.num_rows
        with pq.ParquetWriter(out, schema, **COMPRESSION) as writer, Progress(count, "measure", "nuclei") as progress:
            for batch in measured_batches(source, tiles, matrix, white, schema):
                writer.write_batch(batch)
                progress.advance(batch.num_rows)
    return count


def run_measure(
    slide: str,
    instances: Path,
    parquet: Path,
    tiles: Path,
    zarr: Path,
    stain: Path,
    out: Path,
    nuclei: Path,
    **how: Any,
) -> dict[str, Any]:
    """Run the stage.

    Parameters
    ----------
    slide : str
        Name of the slide.
    instances, parquet : pathlib.Path
        Outputs of the stage ``instances``.
    tiles, zarr : pathlib.Path
        Outputs of the stage ``tiles``.
    stain : pathlib.Path
        Manifest of the stage ``stain``.
    out, nuclei : pathlib.Path
        The manifest and the table to write.
    **how : Any
        `on_bad_slide`, `minutes` and `again` of `pipeline.batch.stage.run_stage`.

    Returns
    -------
    dict
        The manifest, with ``nuclei`` (count), ``stains`` (the 2 x 3 matrix of stain vectors used), ``white`` (OD of the
        glass, subtracted first) and ``stains_origin`` (``slide`` or ``ruifrok``).
    """

    def body(staged: dict[str, Path]) -> dict[str, Any]:
        from pipeline.stores.tile_store import TileStore

        matrix, white, origin = stain_matrix(read_manifest(stain))
        count = write_measured(parquet, TileStore.open(zarr), matrix, staged["nuclei"], white)
        stains = np.round(matrix, 6).tolist()
        return {"nuclei": count, "stains": stains, "white": white.tolist(), "stains_origin": origin}

    return run_stage(
        "measure",
        slide,
        manifest=out,
        outputs={"nuclei": nuclei},
        upstream=[instances, tiles, stain],
        stores={zarr: tiles},
        body=body,
        **how,
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``python -m pipeline measure``."""
    add_stage_arguments(parser)
    parser.add_argument("--instances", type=Path, required=True, metavar="FILE", help="instances.json")
    parser.add_argument("--parquet", type=Path, required=True, metavar="FILE", help="instances.parquet")
    parser.add_argument("--tiles", type=Path, required=True, metavar="FILE", help="tiles.json")
    parser.add_argument("--zarr", type=Path, required=True, metavar="DIR", help="tiles.zarr")
    parser.add_argument("--stain", type=Path, required=True, metavar="FILE", help="stain.json")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="manifest to write")
    parser.add_argument("--nuclei", type=Path, required=True, metavar="FILE", help="nuclei.parquet to write")


def main(args: argparse.Namespace) -> int:
    """Run ``python -m pipeline measure``."""
    keep_freed_memory()
    run_measure(**keywords(args))
    return 0
