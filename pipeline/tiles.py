"""Stage ``tiles``: store the slide's tissue at the model's mpp, once, as a sparse zarr array on the slide's grid."""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import threading
import zlib
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.batch.parts import Part, link_chunks, manifest_of, read_parts
from pipeline.batch.stage import add_stage_arguments, keywords, read_manifest, run_stage
from pipeline.errors import PipelineError, SlideError
from pipeline.kernels.borders import RUN
from pipeline.machine.allocator import keep_freed_memory
from pipeline.machine.cores import available_cores
from pipeline.progress import Progress
from pipeline.slides.damage import (
    Jump,
    Tolerant,
    cell_at,
    cells_near,
    comparable_level,
    disagreement,
    torn_cells,
    unreadable_windows,
)
from pipeline.slides.inspect import reopen
from pipeline.slides.open import SlidePool
from pipeline.slides.regions import best_level, read_region
from pipeline.slides.slide import Level, Slide
from pipeline.stores.grid import Grid
from pipeline.stores.lattice import CELL, active_cells, active_pixels
from pipeline.stores.tile_store import create_tiles, write_tile
from pipeline.tissue import read_tissue

log = logging.getLogger(__name__)

MOST_ENLARGED = 4
"""Largest ratio of the slide's mpp to the model's mpp; coarser slides are refused."""

ENLARGED_WELL = 2.2
"""Ratio up to which there is no warning: slides of a 20x objective, some 0.5 µm/px, with a model of 0.25 µm/px."""

MOST_READERS = 16
"""Most reader threads when their number is not given."""

_SUPER_PIXELS = 10_000_000
"""Level pixels that a reader decodes at once: 30 MB of RGB."""


def model_mpp(model: Path) -> float:
    """µm per pixel of a model package."""
    from pipeline.models.package import ModelPackage

    return float(ModelPackage.load(model).mpp)


Block = tuple[slice, slice]
"""Rows and columns of the lattice whose tiles are read together."""


def _blocks(active: np.ndarray, shape: tuple[int, int]) -> list[Block]:
    """Blocks of `shape` grid pixels (whole tiles) that hold active cells."""
    rows, columns = (
        [slice(at, at + side // CELL) for at in range(0, size, side // CELL)]
        for size, side in zip(active.shape, shape, strict=True)
    )
    return [(row, column) for row in rows for column in columns if active[row, column].any()]


def _super_shape(slide: Slide, grid: Grid, tile: int) -> tuple[int, int]:
    """Height and width of a super-tile in grid pixels: whole tiles, about `_SUPER_PIXELS` of the level read.

    It is wide where the level is stored in strips, as each strip is decoded once for every super-tile that meets it.
    """
    index = best_level(slide.levels, grid)
    level = slide.levels[index]
    native = grid.scale_x * grid.scale_y / (level.scale_x * level.scale_y)
    side = max(1, round((_SUPER_PIXELS / max(native, 1.0)) ** 0.5 / tile))
    return (tile, side * side * tile) if slide.in_strips(index) else (side * tile, side * tile)


@dataclass(frozen=True, eq=False)
class _Read:
    """Result of reading a slide or a part of it: what `_Writer` collected, and the seconds that it took."""

    sums: np.ndarray
    doubtful: np.ndarray | None
    jumps: set[Jump] | None
    unreadable: set[tuple[int, int, int]]
    tiles: int
    seconds: float


class _Writer:
    """Read blocks of a slide and write their tiles, in any number of threads."""

    def __init__(self, pool: SlidePool, grid: Grid, active: np.ndarray, tile: int, store: Path) -> None:
        self.pool, self.grid, self.active, self.tile, self.store = pool, grid, active, tile, store
        self.sums = np.zeros(active.shape, np.uint32)
        self.unreadable: set[tuple[int, int, int]] = set()
        slide = pool.get()
        self.level = best_level(slide.levels, grid)
        self.native = slide.tile_size(self.level)
        self.other_level = comparable_level(slide, grid)
        self.doubtful = np.zeros(active.shape, bool)
        # Tiles smaller than `RUN`, such as strips of a few rows, have borders too short to be judged.
        self.jumps: set[Jump] | None = set() if self.other_level is None and min(self.native) >= RUN else None
        self.tiles = 0
        self._lock = threading.Lock()

    def block(self, block: Block) -> float:
        """Read and write one block; return the megapixels of its active cells."""
        cells = self.active[block]
        # Read only the rectangle around the active cells.
        rows, columns = np.nonzero(cells.any(axis=1))[0], np.nonzero(cells.any(axis=0))[0]
        top, left = block[0].start, block[1].start
        y0, x0 = (top + int(rows[0])) * CELL, (left + int(columns[0])) * CELL
        y1 = min((top + int(rows[-1]) + 1) * CELL, self.grid.height)
        x1 = min((left + int(columns[-1]) + 1) * CELL, self.grid.width)
        missed: set[tuple[int, int, int]] = set()
        slide = self.pool.get()
        jumps: list[Jump] | None = None if self.jumps is None else []
        pixels = read_region(Tolerant(slide, missed, jumps), self.grid, x0, y0, x1 - x0, y1 - y0)
        if self.other_level is not None:
            found = disagreement(slide, self.other_level, self.grid, pixels, x0, y0)
            top, left = y0 // CELL, x0 // CELL
            self.doubtful[top : top + found.shape[0], left : left + found.shape[1]] |= found
        self._whiten(pixels, x0, y0)
        written = 0
        for ty in range(y0 // self.tile * self.tile, y1, self.tile):
            for tx in range(x0 // self.tile * self.tile, x1, self.tile):
                written += self._write(pixels, x0, y0, tx, ty)
        with self._lock:
            self.tiles += written
            self.unreadable |= missed
            if self.jumps is not None:
                self.jumps |= self._sides(slide.levels[self.level], jumps or [])
        return active_pixels(cells, self.grid) / 1e6

    def _sides(self, level: Level, jumps: list[Jump]) -> set[Jump]:
        """Native tiles that jump at their left or upper border, from jumps in active cells.

        These are the same however the slide is cut into blocks.
        """
        across, down = self.native
        return {(x // across, y // down, left) for x, y, left in jumps if self.active[cell_at(level, self.grid, x, y)]}

    def _whiten(self, pixels: np.ndarray, x0: int, y0: int) -> None:
        """Make cells white that are not active; store a checksum of each active one in `sums`."""
        h, w = pixels.shape[:2]
        for row in range(y0 // CELL, -(-(y0 + h) // CELL)):
            for column in range(x0 // CELL, -(-(x0 + w) // CELL)):
                top, left = row * CELL - y0, column * CELL - x0
                cell = pixels[top : top + CELL, left : left + CELL]
                if self.active[row, column]:
                    self.sums[row, column] = zlib.crc32(cell.tobytes())
                else:
                    cell[...] = 255

    def _write(self, pixels: np.ndarray, x0: int, y0: int, tx: int, ty: int) -> int:
        step = self.tile // CELL
        cells = self.active[ty // CELL : ty // CELL + step, tx // CELL : tx // CELL + step]
        if not cells.any():
            return 0
        ax0, ay0 = max(tx, x0), max(ty, y0)
        ax1, ay1 = min(tx + self.tile, x0 + pixels.shape[1]), min(ty + self.tile, y0 + pixels.shape[0])
        part = pixels[ay0 - y0 : ay1 - y0, ax0 - x0 : ax1 - x0]
        if part.shape[:2] != (self.tile, self.tile):
            full = np.full((self.tile, self.tile, 3), 255, np.uint8)
            full[ay0 - ty : ay1 - ty, ax0 - tx : ax1 - tx] = part
            part = full
        write_tile(self.store, ty // self.tile, tx // self.tile, part)
        return 1


def _read(
    info: dict[str, Any], grid: Grid, active: np.ndarray, tile: int, store: Path, workers: int, part: Part | None
) -> _Read:
    """Read a slide's tissue, or a part of it, into the store."""
    with SlidePool(lambda: reopen(info)) as pool:
        writer = _Writer(pool, grid, active, tile, store)
        blocks = _blocks(active, _super_shape(pool.get(), grid, tile))
        pixels = [active_pixels(active[block], grid) for block in blocks]
        chosen = range(len(blocks)) if part is None else part.of(pixels)
        with Progress(sum(pixels[i] for i in chosen) / 1e6, "tiles", "MP") as done:
            _run(writer, [blocks[i] for i in chosen], workers, done)
            doubtful = None if writer.other_level is None else writer.doubtful
            return _Read(writer.sums, doubtful, writer.jumps, writer.unreadable, writer.tiles, done.seconds)


def _run(writer: _Writer, blocks: list[Block], workers: int, progress: Progress) -> None:
    """Read and write all blocks on a pool of threads; at most one more is in flight than there are threads."""
    if workers == 1:
        for block in blocks:
            progress.advance(writer.block(block))
        return
    pending: set[Future[float]] = set()
    with ThreadPoolExecutor(workers, thread_name_prefix="tiles") as threads:
        try:
            for block in blocks:
                if len(pending) >= workers + 1:
                    ready, pending = wait(pending, return_when=FIRST_COMPLETED)
                    for future in ready:
                        progress.advance(future.result())
                pending.add(threads.submit(writer.block, block))
            for future in pending:
                progress.advance(future.result())
        except BaseException:
            threads.shutdown(cancel_futures=True)
            raise


def _store_part(done: _Read, part: Part, grid: Grid, tile: int, store: Path) -> dict[str, Any]:
    """Add to a part's store what `_gather` needs besides the pixels; return the entries of its manifest."""
    import zarr

    group = zarr.open_group(store, mode="r+")
    group.create_array("sums", data=done.sums)
    if done.doubtful is not None:
        group.create_array("doubtful", data=done.doubtful)
    return {
        "part": part.to_json(),
        "grid": grid.to_json(),
        "tile": tile,
        "tiles": done.tiles,
        "seconds_reading": round(done.seconds, 3),
        "undecoded": sorted(map(list, done.unreadable)),
        "jumps": None if done.jumps is None else sorted(map(list, done.jumps)),
    }


def _gather(parts: Sequence[Path], grid: Grid, tile: int, store: Path, active: np.ndarray) -> _Read:
    """Join the stores of all parts."""
    import zarr

    sums = np.zeros(active.shape, np.uint32)
    doubtful: np.ndarray | None = None
    jumps: set[Jump] | None = None
    unreadable: set[tuple[int, int, int]] = set()
    manifests = read_parts(parts, grid=grid.to_json(), tile=tile)
    for path, manifest in zip(parts, manifests, strict=True):
        link_chunks(path, store, "rgb")
        group: Any = zarr.open_group(path, mode="r")
        sums += group["sums"][:]
        if "doubtful" in group:
            doubtful = group["doubtful"][:] if doubtful is None else doubtful | group["doubtful"][:]
        unreadable |= {(level, column, row) for level, column, row in manifest["undecoded"]}
        if manifest["jumps"] is not None:
            jumps = (jumps or set()) | {(column, row, left) for column, row, left in manifest["jumps"]}
    seconds = sum(manifest["seconds_reading"] for manifest in manifests)
    return _Read(sums, doubtful, jumps, unreadable, sum(manifest["tiles"] for manifest in manifests), seconds)


def _damage(
    slide: str, done: _Read, info: dict[str, Any], grid: Grid, active: np.ndarray, max_unreadable: float
) -> dict[str, Any]:
    """Entries of the manifest about native tiles that cannot be decoded or that look damaged.

    Raises
    ------
    SlideError
        When a share of the tissue larger than `max_unreadable` cannot be decoded.
    """
    with reopen(info) as handle:
        rects, share = unreadable_windows(done.unreadable, handle, grid, active)
        found = done.doubtful
        if found is None and done.jumps is not None:
            found = torn_cells(done.jumps, handle, grid, active.shape)
    if share > max_unreadable:
        raise SlideError(
            f"{100 * share:.3g} % of the tissue cannot be decoded ({len(rects)} tiles), "
            f"more than the {100 * max_unreadable:g} % allowed",
            "copy or export the slide again, or raise `max_unreadable`",
        )
    if rects:
        log.warning("slide %r: %d tiles cannot be decoded, left white (%.3g %%)", slide, len(rects), 100 * share)
    doubtful = (np.zeros(active.shape, bool) if found is None else found) & active & ~cells_near(rects, active.shape)
    warnings = _warnings(max(info["mpp"]), doubtful, active, grid, compared=done.doubtful is not None)
    for warning in warnings:
        log.warning("slide %r: %s", slide, warning)
    return {
        "unreadable": rects,
        "unreadable_share": round(share, 6),
        "doubtful_cells": None if found is None else int(doubtful.sum()),
        "warnings": warnings,
    }


def _warnings(mpp: float, doubtful: np.ndarray, active: np.ndarray, grid: Grid, *, compared: bool) -> list[str]:
    """Warnings about pixels too coarse for the model and about cells that look damaged."""
    warnings = []
    if mpp / grid.mpp > ENLARGED_WELL:
        warnings.append(
            f"the slide's {mpp:g} µm/px are {mpp / grid.mpp:.2g} times as coarse as the model's {grid.mpp:g}: "
            "small nuclei are missed, outlines are coarse; take a model of larger pixels, if there is one"
        )
    if doubtful.any():
        why = (
            "differ between the levels of the slide, or one does not decode"
            if compared
            else "lie in tiles of the file that do not continue those beside them"
        )
        warnings.append(
            f"{int(doubtful.sum())} of {int(active.sum())} cells of 64 pixels {why}: is the file damaged? "
            f"The first: {_places(doubtful, grid)}"
        )
    return warnings


def _places(cells: np.ndarray, grid: Grid) -> str:
    """Level-0 corners of the first three cells."""
    found = np.argwhere(cells)[:3] * CELL
    return ", ".join(f"({round(x * grid.scale_x)}, {round(y * grid.scale_y)})" for y, x in found.tolist())


def run_tiles(
    slide: str,
    inspect: Path,
    tissue: Path,
    geojson: Path,
    model: Path,
    out: Path,
    zarr: Path,
    *,
    tile: int = 1024,
    workers: int | None = None,
    max_unreadable: float = 0.02,
    part: Part | None = None,
    parts: Sequence[Path] = (),
    **how: Any,
) -> dict[str, Any]:
    """Store the tissue of a slide at the mpp of a model.

    Parameters
    ----------
    slide : str
        Name of the slide.
    inspect, tissue, geojson : pathlib.Path
        ``slide.json``, ``tissue.json`` and ``tissue.geojson`` of the previous stages.
    model : pathlib.Path
        Model package, which sets the mpp.
    out, zarr : pathlib.Path
        The outputs: manifest and store.
    tile : int
        Side of a stored tile in grid pixels, a multiple of 64. It does not change the pixels.
    workers : int, optional
        Reader threads; by default one per core, at most `MOST_READERS`.
    max_unreadable : float
        Largest share of the tissue's pixels that may be unreadable. Such pixels are left white and listed.
    part : Part, optional
        Store only this part of the slide.
    parts : sequence of pathlib.Path
        Stores of all parts; when given, they are joined and no pixels are read from the slide.
    **how : Any
        `on_bad_slide`, `minutes` and `again` of `pipeline.batch.stage.run_stage`.

    Returns
    -------
    dict
        The manifest.

    Raises
    ------
    PipelineError
        When a setting is out of range.
    """
    if tile < CELL or tile % CELL:
        raise PipelineError(f"tile {tile} is not a multiple of {CELL}", f"give {CELL}, 512, 1024, ...")
    if not 0 <= max_unreadable <= 1:
        raise PipelineError(f"max_unreadable {max_unreadable} is not a share", "give a number from 0 to 1")
    if workers is not None and workers < 1:
        raise PipelineError(f"workers {workers} is not a number of threads", "give 1 or more")

    def body(staged: dict[str, Path]) -> dict[str, Any]:
        info, wanted = read_manifest(inspect), model_mpp(model)
        mpp_x, mpp_y = info["mpp"]
        mpp = max(mpp_x, mpp_y)
        if mpp / wanted > MOST_ENLARGED:
            raise SlideError(
                f"{mpp:g} µm/px is too coarse for a model of {wanted:g}: no nucleus can be told",
                "is it an overview? give the scan itself, or its true mpp in the slide table",
            )
        grid = Grid.for_slide(info["width"], info["height"], mpp_x, mpp_y, wanted)
        active = active_cells(read_tissue(geojson), grid)
        create_tiles(staged["zarr"], grid, active, tile)
        if parts:
            done = _gather(parts, grid, tile, staged["zarr"], active)
        else:
            threads = workers or min(MOST_READERS, available_cores())
            done = _read(info, grid, active, tile, staged["zarr"], threads, part)
            if part is not None:
                return _store_part(done, part, grid, tile, staged["zarr"])
        total = active_pixels(active, grid)
        rate = total / 1e6 / max(done.seconds, 1e-9)
        log.info("slide %r: %d tiles, %.1f MP in %.1f s, %.1f MP/s", slide, done.tiles, total / 1e6, done.seconds, rate)
        digest = hashlib.sha256(json.dumps(grid.to_json(), sort_keys=True).encode())
        digest.update(np.packbits(active).tobytes() + done.sums.astype("<u4").tobytes())
        return {
            "grid": grid.to_json(),
            "tile": tile,
            "tiles": done.tiles,
            "active_cells": int(active.sum()),
            **_damage(slide, done, info, grid, active, max_unreadable),
            "megapixels": round(total / 1e6, 6),
            "mp_per_s": round(rate, 3),
            "digest": digest.hexdigest(),
        }

    return run_stage(
        "tiles",
        slide,
        manifest=out,
        outputs={"zarr": zarr},
        upstream=[inspect, tissue, *map(manifest_of, parts)],
        stores={part: manifest_of(part) for part in parts},
        body=body,
        **how,
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the stage's arguments."""
    add_stage_arguments(parser, reads_slide=True)
    parser.add_argument("--inspect", required=True, type=Path, metavar="SLIDE.JSON", help="manifest of stage inspect")
    parser.add_argument("--tissue", required=True, type=Path, metavar="TISSUE.JSON", help="manifest of stage tissue")
    parser.add_argument("--geojson", required=True, type=Path, metavar="TISSUE.GEOJSON", help="tissue polygons")
    parser.add_argument("--model", required=True, type=Path, metavar="DIR", help="model package, for its pixel size")
    parser.add_argument("--tile", type=int, default=1024, help="side of a stored tile in pixels (default: 1024)")
    parser.add_argument("--workers", type=int, help=f"reader threads (default: one a core, at most {MOST_READERS})")
    parser.add_argument(
        "--max-unreadable", type=float, default=0.02, metavar="SHARE", help="tolerated share of unreadable tissue"
    )
    parser.add_argument("--part", type=Part.parse, metavar="I/N", help="only this part of the slide")
    parser.add_argument("--parts", type=Path, nargs="+", default=[], metavar="DIR", help="put these parts together")
    parser.add_argument("--out", required=True, type=Path, metavar="TILES.JSON")
    parser.add_argument("--zarr", required=True, type=Path, metavar="TILES.ZARR")


def main(args: argparse.Namespace) -> int:
    """Run the stage from the command line."""
    keep_freed_memory()
    run_tiles(**keywords(args))
    return 0
