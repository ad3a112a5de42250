"""Stage ``labels``: write the nuclei as a label map, an OME-Zarr pyramid. The stage is optional, see the settings.

The map is painted from the outlines of ``nuclei.parquet``. They run between the centres of pixels, so each nucleus has
exactly the pixels that it was found with. Bands of the height of a chunk are painted in parallel; each reads the row
groups of the table that reach into it.

References
----------
OME-Zarr 0.5, https://ngff.openmicroscopy.org/0.5/
"""

from __future__ import annotations

import argparse
import logging
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.batch.stage import add_stage_arguments, keywords, run_stage
from pipeline.kernels.contours import wkb_rings
from pipeline.kernels.measure import cut_runs
from pipeline.kernels.raster import paint_runs, polygon_runs
from pipeline.progress import Progress
from pipeline.stores.grid import Grid
from pipeline.stores.nuclei import about_nuclei, open_nuclei, wkb_of

log = logging.getLogger(__name__)

CHUNK = 1024
"""Side of a chunk in pixels."""

SMALLEST = 1024
"""Levels are added until the longer side of the last one is at most this, in pixels."""

VERSION = "0.5"
"""Version of OME-Zarr that is written."""


class OutlineReader:
    """Reads outlines from a table of nuclei, one row group at a time; safe to use from several threads.

    Parameters
    ----------
    path : pathlib.Path
        ``nuclei.parquet``.
    """

    def __init__(self, path: Path) -> None:
        self._file = open_nuclei(path)
        self._lock = threading.Lock()
        self.about = about_nuclei(self._file.schema_arrow)
        self.grid = Grid.from_json(self.about["grid"])
        metadata = self._file.metadata
        counts = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self.starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        """First row of each row group in the table, and at the end the total number of rows."""

    def outlines(self, group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Points (in grid pixels), rings and polygons of a row group, see `pipeline.kernels.contours.wkb_rings`."""
        with self._lock:
            column = self._file.read_row_group(group, ["geometry"]).column("geometry")
        points, rings, polygons = wkb_rings(*wkb_of(column.combine_chunks()))
        # Points lie on half pixels of the grid. Rounding undoes the error of scaling to level 0 and back.
        return np.rint(points * (2 / self.grid.scale_x, 2 / self.grid.scale_y)) / 2, rings, polygons

    def rows(self, group: int) -> tuple[int, int]:
        """First row of the grid that the nuclei of a row group reach, and the row after the last."""
        y = self.outlines(group)[0][:, 1]
        return (int(np.floor(y.min())), int(np.ceil(y.max()))) if len(y) else (0, 0)


def paint_band(nuclei: OutlineReader, groups: Iterable[int], top: int, array: Any) -> int:
    """Paint the nuclei of one band of chunks into a label map.

    Parameters
    ----------
    nuclei : OutlineReader
        The nuclei.
    groups : iterable of int
        Row groups to read; must include all that reach into the band.
    top : int
        First row of the band, a multiple of `CHUNK`.
    array : zarr.Array
        Label map to write into, uint32 ``(height, width)``. Chunks without a nucleus are not written.

    Returns
    -------
    int
        Number of pixels of the band.
    """
    height, width = array.shape
    bottom = min(top + CHUNK, height)
    found: dict[int, list[tuple[np.ndarray, np.ndarray]]] = defaultdict(list)
    for group in groups:
        points, rings, polygons = nuclei.outlines(group)
        runs = polygon_runs(points, rings[:-1], polygons[:-1], (top, bottom))
        pieces = cut_runs(runs[:, 1:] - (top, 0, 0), runs[:, 0], CHUNK)
        for column, start, end in zip(pieces.blocks[:, 1].tolist(), pieces.starts, pieces.ends, strict=True):
            part = slice(start, end)
            places = np.stack([pieces.y[part], pieces.x0[part], pieces.x1[part]], axis=1).astype(np.int32)
            found[column].append((places, (pieces.nucleus[part] + nuclei.starts[group] + 1).astype(np.uint32)))
    for column, parts in found.items():
        left = column * CHUNK
        right = min(left + CHUNK, width)
        tile = np.zeros((bottom - top, right - left), np.uint32)
        for places, labels in parts:
            paint_runs(places, labels, tile, 0, left)
        array[top:bottom, left:right] = tile  # exactly one chunk, which no other thread writes
    return (bottom - top) * int(width)


def level_shapes(height: int, width: int) -> list[tuple[int, int]]:
    """Rows and columns of each level: halved and rounded up until the longer side is at most `SMALLEST`."""
    shapes = [(height, width)]
    while max(shapes[-1]) > SMALLEST:
        shapes.append((-(-shapes[-1][0] // 2), -(-shapes[-1][1] // 2)))
    return shapes


def ome_metadata(grid: Grid, levels: int) -> dict[str, Any]:
    """OME-Zarr metadata of a label map with the given number of levels."""
    datasets = []
    for level in range(levels):
        factor = 2**level
        transforms: list[dict[str, Any]] = [{"type": "scale", "scale": [factor * grid.mpp] * 2}]
        if level:
            # Centre of the first pixel, which covers factor x factor pixels of level 0.
            transforms.append({"type": "translation", "translation": [(factor - 1) / 2 * grid.mpp] * 2})
        datasets.append({"path": str(level), "coordinateTransformations": transforms})
    return {
        "version": VERSION,
        "multiscales": [
            {
                "name": "nuclei",
                "axes": [{"name": name, "type": "space", "unit": "micrometer"} for name in "yx"],
                "datasets": datasets,
                "type": "nearest",
                "metadata": {"description": "every second pixel of the level before, in both directions"},
            }
        ],
        "image-label": {"version": VERSION, "source": {"table": "../nuclei.parquet", "row": "label - 1"}},
    }


def _create(path: Path, about: dict[str, Any], grid: Grid) -> list[Any]:
    """Create an empty store and return the arrays of its levels."""
    import zarr
    from zarr.codecs import Crc32cCodec, ZstdCodec

    shapes = level_shapes(grid.height, grid.width)
    group = zarr.create_group(path, attributes={"ome": ome_metadata(grid, len(shapes)), "nuclei": about})
    return [
        group.create_array(
            str(level),
            shape=shape,
            chunks=(CHUNK, CHUNK),
            dtype="uint32",
            fill_value=0,
            dimension_names=["y", "x"],
            compressors=[ZstdCodec(level=1), Crc32cCodec()],  # half the size of Blosc with shuffled bytes
        )
        for level, shape in enumerate(shapes)
    ]


def _compute(function: Callable[..., Any], arguments: Iterable[tuple[Any, ...]], workers: int) -> list[Any]:
    """Return the values of a function for each tuple of arguments, computed on `workers` threads."""
    from dask.base import compute
    from dask.delayed import delayed

    # Without these options dask would hash the arguments and copy them into the graph.
    calls = delayed(function, pure=False, traverse=False)
    return list(compute(*[calls(*each) for each in arguments], scheduler="threads", num_workers=workers))


def write_labels(source: Path, target: Path, *, workers: int = 1) -> dict[str, Any]:
    """Write the nuclei of a table as a label map.

    Parameters
    ----------
    source : pathlib.Path
        ``nuclei.parquet``.
    target : pathlib.Path
        The store to write.
    workers : int
        Number of threads. The bytes written do not depend on it.

    Returns
    -------
    dict
        ``nuclei`` (count), ``shape`` (rows and columns of the first level), ``levels`` (count), and ``mp_per_s``,
        megapixels of the first level per second.
    """
    import dask.array as da
    from dask.callbacks import Callback

    nuclei = OutlineReader(source)
    grid = nuclei.grid
    levels = _create(target, nuclei.about, grid)
    megapixels = grid.height * grid.width / 1e6
    with Progress(megapixels, "labels", "MP") as progress:
        rows = _compute(nuclei.rows, [(group,) for group in range(len(nuclei.starts) - 1)], workers)
        first, last = np.array(rows, np.int64).reshape(-1, 2).T
        bands = [
            (nuclei, np.flatnonzero((first < top + CHUNK) & (last > top)).tolist(), top, levels[0])
            for top in range(0, grid.height, CHUNK)
        ]
        with Callback(posttask=lambda key, pixels, *_: progress.advance(pixels / 1e6)):
            _compute(paint_band, bands, workers)
        for finer, coarser in pairwise(levels):
            # Four chunks of the finer level make one of the coarser level.
            pixels = da.from_zarr(finer, chunks=(2 * CHUNK, 2 * CHUNK))[::2, ::2]
            da.store(pixels, coarser, lock=False, scheduler="threads", num_workers=workers)
        return {
            "nuclei": int(nuclei.starts[-1]),
            "shape": [grid.height, grid.width],
            "levels": len(levels),
            "mp_per_s": round(megapixels / max(progress.seconds, 1e-9), 3),
        }


def run_labels(
    slide: str,
    measure: Path,
    nuclei: Path,
    out: Path,
    zarr: Path,
    *,
    workers: int = 1,
    **how: Any,
) -> dict[str, Any]:
    """Run the stage.

    Parameters
    ----------
    slide : str
        Name of the slide.
    measure, nuclei : pathlib.Path
        Outputs of the stage ``measure``.
    out, zarr : pathlib.Path
        The manifest and the store to write.
    workers : int
        Number of threads.
    **how : Any
        `on_bad_slide`, `minutes` and `again` of `pipeline.batch.stage.run_stage`.

    Returns
    -------
    dict
        The manifest, with what `write_labels` returned.
    """

    def body(staged: dict[str, Path]) -> dict[str, Any]:
        done = write_labels(nuclei, staged["zarr"], workers=max(1, workers))
        log.info("slide %r: label map of %d nuclei, %.1f MP/s", slide, done["nuclei"], done["mp_per_s"])
        return done

    return run_stage(
        "labels",
        slide,
        manifest=out,
        outputs={"zarr": zarr},
        upstream=[measure],
        body=body,
        **how,
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``python -m pipeline labels``."""
    add_stage_arguments(parser)
    parser.add_argument("--measure", type=Path, required=True, metavar="FILE", help="measure.json")
    parser.add_argument("--nuclei", type=Path, required=True, metavar="FILE", help="nuclei.parquet")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="manifest to write")
    parser.add_argument("--zarr", type=Path, required=True, metavar="DIR", help="label map to write (.ome.zarr)")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="threads (default: 1)")


def main(args: argparse.Namespace) -> int:
    """Run ``python -m pipeline labels``."""
    run_labels(**keywords(args))
    return 0
