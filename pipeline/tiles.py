"""Stage ``tiles``: the slide's tissue at the model's pixel size, stored once, as a sparse zarr array on the grid."""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import threading
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.allocator import keep_freed_memory
from pipeline.cores import available_cores
from pipeline.errors import DamagedStore, PipelineError, SlideError
from pipeline.grid import Grid
from pipeline.guard import add_time_arguments
from pipeline.lattice import CELL, active_cells
from pipeline.parts import Part, link_chunks, manifest_of, read_parts
from pipeline.progress import Progress
from pipeline.seal import check_seal, is_sealed
from pipeline.slides.inspect import reopen
from pipeline.slides.open import SlidePool
from pipeline.slides.regions import OneLevel, best_level, read_region
from pipeline.slides.slide import Level, Slide
from pipeline.stage import read_manifest, run_stage
from pipeline.tissue import read_tissue

log = logging.getLogger(__name__)

MOST_ENLARGED = 4
"""How much coarser than the model a slide may be."""

ENLARGED_WELL = 2.2
"""Up to here no warning: slides of a 20x objective, some 0.5 µm/px, before a model of 0.25."""

Window = Callable[[int, int, int, int], np.ndarray]

_COMPARE = 16
"""Side, in grid pixels, of the squares whose means are compared between two levels."""

_COMPARE_GREY = 24
"""Difference of two such means, in grey levels, that resampling and compression do not make."""

_COMPARE_SQUARES = 2
"""So many of the 16 squares of a cell that differ make the cell doubtful."""

_SUPER_PIXELS = 10_000_000
"""Level pixels that a reader decodes at once: 30 MB of RGB."""


def reflect(start: int, n: int, size: int) -> np.ndarray:
    """Indices of `n` places from `start` on an axis of `size`, reflected at its ends.

    The edge pixel is repeated, as by ``numpy.pad(..., mode="symmetric")``, however far outside.

    Returns
    -------
    numpy.ndarray
        int64, shape (n,), values in ``[0, size)``.
    """
    index = np.arange(start, start + n) % (2 * size)
    return np.asarray(np.where(index < size, index, 2 * size - 1 - index))


@dataclass(frozen=True)
class TileStore:
    """Pixels of a slide's grid as stage ``tiles`` stored them; safe to read from several threads.

    Parameters
    ----------
    path : pathlib.Path
        ``tiles.zarr``.
    grid : Grid
        The slide's grid.
    active : numpy.ndarray
        bool, shape (ceil(height / 64), ceil(width / 64)): cells that hold pixels. All others are white.
    tile : int
        Side of a stored tile in grid pixels.
    """

    path: Path
    grid: Grid
    active: np.ndarray
    tile: int
    _rgb: Any

    @classmethod
    def open(cls, path: Path) -> TileStore:
        """Open a store for reading.

        Raises
        ------
        PipelineError
            When it is missing or damaged.
        """
        import zarr

        check_seal(Path(path))
        try:
            group = zarr.open_group(path, mode="r")
            if group.attrs["cell"] != CELL:
                raise ValueError(f"cells of {group.attrs['cell']} pixels")
            grid = Grid.from_json(group.attrs["grid"])  # type: ignore[arg-type]
            rgb, active = group["rgb"], np.asarray(group["active"][:])  # type: ignore[index]
            return cls(Path(path), grid, active, int(rgb.chunks[0]), rgb)  # type: ignore[union-attr]
        except FileNotFoundError:
            raise PipelineError(f"{path} is missing", "run the stage `tiles` first") from None
        except Exception as error:
            raise _damaged(Path(path), error) from None

    def read(self, x: int, y: int, w: int, h: int, window: Window | None = None) -> np.ndarray:
        """Read a window.

        Parameters
        ----------
        x, y, w, h : int
            Window in grid pixels. Where it reaches outside the grid, pixels come by reflection at the grid's edge
            (the edge pixel repeated), so that a patch at the slide's edge sees more of the same tissue, not a border.
        window : callable, optional
            What reads windows within the grid: `window`, or another that gives the same.

        Returns
        -------
        numpy.ndarray
            RGB, uint8, shape (h, w, 3); white where no cell is active.

        Raises
        ------
        PipelineError
            When a stored tile is damaged.
        """
        window = window or self.window
        if x >= 0 and y >= 0 and x + w <= self.grid.width and y + h <= self.grid.height:
            return window(x, y, x + w, y + h)
        columns, rows = reflect(x, w, self.grid.width), reflect(y, h, self.grid.height)
        x0, y0 = int(columns.min()), int(rows.min())
        pixels = window(x0, y0, int(columns.max()) + 1, int(rows.max()) + 1)[rows - y0]
        # Pixel by pixel only what is outside: the rest would take as long as everything else that is done to it.
        left = min(max(-x, 0), w)
        right = max(left, min(self.grid.width - x, w))
        out = np.empty((h, w, 3), np.uint8)
        out[:, left:right] = pixels[:, x + left - x0 : x + right - x0]
        for outside in (slice(left), slice(right, w)):
            out[:, outside] = pixels[:, columns[outside] - x0]
        return out

    def window(self, x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
        """Pixels of columns `x0` to `x1` and rows `y0` to `y1` of the grid, the last ones excluded."""
        cells = self.active[y0 // CELL : -(-y1 // CELL), x0 // CELL : -(-x1 // CELL)]
        if not cells.any():
            return np.full((y1 - y0, x1 - x0, 3), 255, np.uint8)
        try:
            return np.asarray(self._rgb[y0:y1, x0:x1])
        except Exception as error:  # zarr's codecs raise what they like over a damaged chunk
            raise _damaged(self.path, error) from None


class RasterReader:
    """Reads windows of a store in raster order, from several threads, and decodes each tile once.

    Tiles are held up to a limit, at which those above a window give way to its own; where there are none above, a tile
    is decoded for each window.

    Parameters
    ----------
    store : TileStore
        What is read.
    memory : int
        Bytes of tiles that are held at most; four tiles are, however large.
    """

    def __init__(self, store: TileStore, memory: int = 12 * 3 * 1024**2) -> None:
        self.store = store
        self.limit = max(4, memory // (3 * store.tile**2))  # four meet in a corner
        self._held: dict[tuple[int, int], Future[np.ndarray]] = {}
        self._lock = threading.Lock()

    def read(self, x: int, y: int, w: int, h: int) -> np.ndarray:
        """Read a window that does not lie more than a tile above an earlier one; see `TileStore.read`."""
        return self.store.read(x, y, w, h, self._window)

    def _window(self, x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
        tile = self.store.tile
        out = np.empty((y1 - y0, x1 - x0, 3), np.uint8)
        for row in range(y0 // tile, -(-y1 // tile)):
            for column in range(x0 // tile, -(-x1 // tile)):
                top, left = row * tile, column * tile
                a, b, c, d = max(y0, top), min(y1, top + tile), max(x0, left), min(x1, left + tile)
                part = out[a - y0 : b - y0, c - x0 : d - x0]
                if not self.store.active[a // CELL : -(-b // CELL), c // CELL : -(-d // CELL)].any():
                    part[:] = 255
                elif (pixels := self._tile(row, column, y0 // tile)) is None:
                    part[:] = self.store.window(c, a, d, b)
                else:
                    part[:] = pixels[a - top : b - top, c - left : d - left]
        return out

    def _tile(self, row: int, column: int, first: int) -> np.ndarray | None:
        """A tile, or None where there is no room; `first` is the window's first row of tiles."""
        with self._lock:
            found = self._held.get((row, column))
            if found is None:
                if len(self._held) >= self.limit:
                    # Not before: other threads may still be at the rows above.
                    above = next((key for key in self._held if key[0] < first), None)
                    if above is None:
                        return None
                    del self._held[above]
                mine = self._held[row, column] = Future()
        if found is not None:
            return found.result()
        tile, grid = self.store.tile, self.store.grid
        x, y = column * tile, row * tile
        try:
            pixels = self.store.window(x, y, min(x + tile, grid.width), min(y + tile, grid.height))
        except BaseException as error:
            mine.set_exception(error)
            raise
        mine.set_result(pixels)
        return pixels


def _damaged(path: Path, error: Exception) -> Exception:
    if isinstance(error, (MemoryError, OSError)):
        return error  # of the machine, not of the store
    why = f"{type(error).__name__}: {error}"
    if is_sealed(path):
        return DamagedStore(path, why)
    return PipelineError(f"{path} is damaged: {why}", "delete it and run again")


def model_mpp(model: Path) -> float:
    """µm per pixel of a model package."""
    from pipeline.models.package import ModelPackage

    return float(ModelPackage.load(model).mpp)


class _Tolerant:
    """A slide whose native tiles that cannot be decoded are white and noted."""

    def __init__(self, slide: Slide, unreadable: set[tuple[int, int, int]]) -> None:
        self._slide = slide
        self._unreadable = unreadable

    @property
    def levels(self) -> tuple[Level, ...]:
        return self._slide.levels

    def read(self, level: int, x: int, y: int, w: int, h: int) -> np.ndarray:
        try:
            return self._slide.read(level, x, y, w, h)
        except SlideError:
            pass
        out = np.full((h, w, 3), 255, np.uint8)
        across, down = self._slide.tile_size(level)
        for row in range(y // down, -(-(y + h) // down)):
            for column in range(x // across, -(-(x + w) // across)):
                tx, ty = column * across, row * down
                x0, y0, x1, y1 = max(x, tx), max(y, ty), min(x + w, tx + across), min(y + h, ty + down)
                try:
                    tile = self._slide.read(level, tx, ty, across, down)
                    out[y0 - y : y1 - y, x0 - x : x1 - x] = tile[y0 - ty : y1 - ty, x0 - tx : x1 - tx]
                except SlideError as error:
                    if (level, column, row) not in self._unreadable:
                        log.debug("unreadable: %s", error)
                    self._unreadable.add((level, column, row))
        return out


def _unreadable_rects(
    tiles: set[tuple[int, int, int]], slide: Slide, grid: Grid, active: np.ndarray
) -> tuple[list[list[int]], float]:
    """Grid windows of native tiles that cannot be read, where they meet active cells, and their share of those."""
    import cv2

    rects = []
    covered = 0
    cells = active.astype(np.uint8)
    for level, column, row in tiles:
        across, down = slide.tile_size(level)
        scale_x, scale_y = slide.levels[level].scale_x / grid.scale_x, slide.levels[level].scale_y / grid.scale_y
        x0, y0 = int(np.floor(column * across * scale_x + 1e-9)), int(np.floor(row * down * scale_y + 1e-9))
        x1 = min(int(np.ceil((column + 1) * across * scale_x - 1e-9)), grid.width)
        y1 = min(int(np.ceil((row + 1) * down * scale_y - 1e-9)), grid.height)
        if x1 <= x0 or y1 <= y0:
            continue
        part = cells[y0 // CELL : -(-y1 // CELL), x0 // CELL : -(-x1 // CELL)]
        if not part.any():
            continue
        full = cv2.resize(part, None, fx=CELL, fy=CELL, interpolation=cv2.INTER_NEAREST)
        top, left = y0 - y0 // CELL * CELL, x0 - x0 // CELL * CELL
        covered += int(np.count_nonzero(full[top : top + y1 - y0, left : left + x1 - x0]))
        rects.append([x0, y0, x1 - x0, y1 - y0])
    return sorted(rects, key=lambda r: (r[1], r[0])), min(1.0, covered / max(_active_pixels(active, grid), 1))


def _cells_of(rects: list[list[int]], shape: tuple[int, ...]) -> np.ndarray:
    """Cells that grid windows touch, and their neighbours: resampling reaches over."""
    cells = np.zeros(shape, bool)
    for x, y, w, h in rects:
        rows = slice(max(0, y // CELL - 1), -(-(y + h) // CELL) + 1)
        cells[rows, max(0, x // CELL - 1) : -(-(x + w) // CELL) + 1] = True
    return cells


def _places(cells: np.ndarray, grid: Grid, count: int = 3) -> str:
    """Level-0 corners of the first few cells."""
    found = np.argwhere(cells)[:count] * CELL
    return ", ".join(f"({round(x * grid.scale_x)}, {round(y * grid.scale_y)})" for y, x in found.tolist())


def _active_pixels(active: np.ndarray, grid: Grid) -> int:
    heights = np.minimum(CELL, grid.height - CELL * np.arange(active.shape[0]))
    widths = np.minimum(CELL, grid.width - CELL * np.arange(active.shape[1]))
    return int(heights @ active @ widths)


@dataclass(frozen=True)
class _Block:
    """Tiles that are read together: a range of the lattice."""

    row0: int
    row1: int
    column0: int
    column1: int


def _active_pixels_of(block: _Block, active: np.ndarray, grid: Grid) -> int:
    """Pixels of a block's active cells, as many as if it lay in the slide's corner."""
    return _active_pixels(active[block.row0 : block.row1, block.column0 : block.column1], grid)


def _blocks(active: np.ndarray, tile: int, side: int) -> list[_Block]:
    """Blocks of `side` grid pixels (whole tiles) that hold active cells."""
    step = side // CELL
    rows, columns = active.shape
    return [
        _Block(row, min(row + step, rows), column, min(column + step, columns))
        for row in range(0, rows, step)
        for column in range(0, columns, step)
        if active[row : row + step, column : column + step].any()
    ]


def _super_side(slide: Slide, grid: Grid, tile: int) -> int:
    """Side of a super-tile in grid pixels: whole tiles, about `_SUPER_PIXELS` of the level read."""
    level = slide.levels[best_level(slide.levels, grid)]
    native = grid.scale_x * grid.scale_y / (level.scale_x * level.scale_y)
    return max(1, round((_SUPER_PIXELS / max(native, 1.0)) ** 0.5 / tile)) * tile


def comparable_level(slide: Slide, grid: Grid) -> int | None:
    """The level to compare the one that is read with: the finest that is at least 3.5 times coarser, if there is one.

    Finer ones cost too much, coarser ones hold too few pixels in a square to be compared.
    """
    own = slide.levels[best_level(slide.levels, grid)]
    fit = [
        i
        for i, level in enumerate(slide.levels)
        if level.usable and 3.5 * own.scale_x <= level.scale_x <= _COMPARE / 2 * grid.scale_x
    ]
    return min(fit, key=lambda i: slide.levels[i].scale_x) if fit else None


def disagreement(slide: Slide, level: int, grid: Grid, pixels: np.ndarray, x0: int, y0: int) -> np.ndarray:
    """Where pixels are not what another level of the slide shows.

    A decoder takes most damage to a JPEG tile for a picture. What tells is that the levels of a pyramid are stored
    apart, so that damage to one leaves the other as it was.

    Parameters
    ----------
    slide : Slide
        The slide.
    level : int
        The other level.
    grid : Grid
        The slide's grid.
    pixels : numpy.ndarray
        RGB, uint8, shape (h, w, 3), of the grid.
    x0, y0 : int
        Their place, multiples of 64.

    Returns
    -------
    numpy.ndarray
        bool, shape (ceil(h / 64), ceil(w / 64)): cells that differ; all where the other level cannot be decoded.
    """
    import cv2

    h, w = (size // _COMPARE for size in pixels.shape[:2])
    cells = np.zeros((-(-pixels.shape[0] // CELL), -(-pixels.shape[1] // CELL)), bool)
    if not h or not w:
        return cells
    fine = cv2.resize(pixels[: h * _COMPARE, : w * _COMPARE], (w, h), interpolation=cv2.INTER_AREA)
    coarse_grid = Grid(
        -(-grid.width // _COMPARE), -(-grid.height // _COMPARE), grid.mpp * _COMPARE,
        grid.scale_x * _COMPARE, grid.scale_y * _COMPARE,
    )  # fmt: skip
    try:
        other = read_region(OneLevel(slide, level), coarse_grid, x0 // _COMPARE, y0 // _COMPARE, w, h)
    except SlideError:
        return ~cells
    differ = (cv2.absdiff(fine, other).max(axis=2) > _COMPARE_GREY).astype(np.uint8)
    step = CELL // _COMPARE
    padded = np.pad(differ, ((0, cells.shape[0] * step - h), (0, cells.shape[1] * step - w)))
    counts = padded.reshape(cells.shape[0], step, cells.shape[1], step).sum(axis=(1, 3))
    return np.asarray(counts >= _COMPARE_SQUARES)


class _Writer:
    """Reads blocks of a slide and writes their tiles, in any number of threads."""

    def __init__(self, pool: SlidePool, grid: Grid, active: np.ndarray, tile: int, array: Any) -> None:
        self.pool, self.grid, self.active, self.tile, self.array = pool, grid, active, tile, array
        self.sums = np.zeros(active.shape, np.uint32)
        self.unreadable: set[tuple[int, int, int]] = set()
        self.other_level = comparable_level(pool.get(), grid)
        self.doubtful = np.zeros(active.shape, bool)
        self.tiles = 0
        self._lock = threading.Lock()

    def block(self, block: _Block) -> float:
        """Read and write one block; the megapixels of its active cells."""
        cells = self.active[block.row0 : block.row1, block.column0 : block.column1]
        # Only the part that holds tissue is read.
        rows, columns = np.nonzero(cells.any(axis=1))[0], np.nonzero(cells.any(axis=0))[0]
        y0, x0 = (block.row0 + int(rows[0])) * CELL, (block.column0 + int(columns[0])) * CELL
        y1 = min((block.row0 + int(rows[-1]) + 1) * CELL, self.grid.height)
        x1 = min((block.column0 + int(columns[-1]) + 1) * CELL, self.grid.width)
        missed: set[tuple[int, int, int]] = set()
        slide = self.pool.get()
        pixels = read_region(_Tolerant(slide, missed), self.grid, x0, y0, x1 - x0, y1 - y0)
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
        return _active_pixels_of(block, self.active, self.grid) / 1e6

    def _whiten(self, pixels: np.ndarray, x0: int, y0: int) -> None:
        """White where no cell is active; sums of those that are."""
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
        h, w = min(self.tile, self.grid.height - ty), min(self.tile, self.grid.width - tx)
        ax0, ay0 = max(tx, x0), max(ty, y0)
        ax1, ay1 = min(tx + w, x0 + pixels.shape[1]), min(ty + h, y0 + pixels.shape[0])
        part = pixels[ay0 - y0 : ay1 - y0, ax0 - x0 : ax1 - x0]
        if part.shape[:2] != (h, w):
            full = np.full((h, w, 3), 255, np.uint8)
            full[ay0 - ty : ay1 - ty, ax0 - tx : ax1 - tx] = part
            part = full
        if part.min() < 255:
            self.array[ty : ty + h, tx : tx + w] = part  # a chunk of its own: no two threads write the same
        return 1


def _create(path: Path, grid: Grid, active: np.ndarray, tile: int) -> Any:
    import zarr
    from zarr.codecs import BloscCodec, Crc32cCodec

    group = zarr.create_group(path, overwrite=True, attributes={"grid": grid.to_json(), "cell": CELL})
    group.create_array("active", data=active)
    return group.create_array(
        "rgb",
        shape=(grid.height, grid.width, 3),
        chunks=(tile, tile, 3),
        dtype="uint8",
        fill_value=255,
        compressors=[BloscCodec(typesize=1, cname="lz4", clevel=1, shuffle="noshuffle"), Crc32cCodec()],
        # Whoever writes leaves white chunks out: zarr's own look at each takes longer than all else about it.
        config={"write_empty_chunks": True},
    )


def default_workers() -> int:
    """Reader threads: one a core, at most 16."""
    return min(16, available_cores())


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
    on_bad_slide: str = "continue",
    minutes: float | None = None,
    again: bool = False,
) -> dict[str, Any]:
    """Store the tissue of a slide at a model's pixel size.

    Parameters
    ----------
    slide : str
        Name of the slide.
    inspect, tissue, geojson : pathlib.Path
        ``slide.json``, ``tissue.json`` and ``tissue.geojson`` of the stages before.
    model : pathlib.Path
        Model package, for its pixel size.
    out, zarr : pathlib.Path
        The outputs: manifest and store.
    tile : int
        Side of a stored tile in grid pixels, a multiple of 64. The pixels are the same for every size.
    workers : int, optional
        Reader threads; by default one a core, at most 16.
    max_unreadable : float
        Share of the tissue's pixels that may be unreadable. They are white then, and listed.
    part : Part, optional
        Store this part of the slide alone.
    parts : sequence of pathlib.Path
        Stores of all parts, to be put together; nothing is read from the slide then.
    on_bad_slide : {"continue", "stop"}
        See `pipeline.stage.run_stage`.
    minutes : float, optional
        Minutes that the job may take, see `pipeline.stage.run_stage`.
    again : bool
        Whether the job is tried again with more, see there.

    Returns
    -------
    dict
        The manifest.

    Raises
    ------
    PipelineError
        For a wrong setting.
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
        array = _create(staged["zarr"], grid, active, tile)
        if parts:
            done = _gather(parts, grid, tile, staged["zarr"], active)
        else:
            done = _read(info, grid, active, tile, array, workers or default_workers(), part)
            if part is not None:
                return _store_part(done, part, grid, tile, staged["zarr"])
        with reopen(info) as handle:
            rects, share = _unreadable_rects(done.unreadable, handle, grid, active)
        if share > max_unreadable:
            raise SlideError(
                f"{100 * share:.3g} % of the tissue cannot be decoded ({len(rects)} tiles), "
                f"more than the {100 * max_unreadable:g} % allowed",
                "copy or export the slide again, or raise `max_unreadable`",
            )
        if rects:
            log.warning("slide %r: %d tiles cannot be decoded, left white (%.3g %%)", slide, len(rects), 100 * share)
        doubtful = np.zeros(active.shape, bool) if done.doubtful is None else done.doubtful
        doubtful = doubtful & active & ~_cells_of(rects, active.shape)
        warnings = _warnings(mpp, wanted, doubtful, active, grid)
        for warning in warnings:
            log.warning("slide %r: %s", slide, warning)
        total = _active_pixels(active, grid)
        rate = total / 1e6 / max(done.seconds, 1e-9)
        log.info("slide %r: %d tiles, %.1f MP in %.1f s, %.1f MP/s", slide, done.tiles, total / 1e6, done.seconds, rate)
        digest = hashlib.sha256(json.dumps(grid.to_json(), sort_keys=True).encode())
        digest.update(np.packbits(active).tobytes() + done.sums.astype("<u4").tobytes())
        return {
            "grid": grid.to_json(),
            "tile": tile,
            "tiles": done.tiles,
            "active_cells": int(active.sum()),
            "unreadable": rects,
            "unreadable_share": round(share, 6),
            "doubtful_cells": None if done.doubtful is None else int(doubtful.sum()),
            "warnings": warnings,
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
        on_bad_slide=on_bad_slide,
        minutes=minutes,
        again=again,
    )


@dataclass(frozen=True, eq=False)
class _Read:
    """What came of reading a slide, or a part of it: see `_Writer`."""

    sums: np.ndarray
    doubtful: np.ndarray | None
    unreadable: set[tuple[int, int, int]]
    tiles: int
    seconds: float


def _read(
    info: dict[str, Any], grid: Grid, active: np.ndarray, tile: int, array: Any, workers: int, part: Part | None
) -> _Read:
    """Read a slide's tissue, or a part of it, into the array."""
    with SlidePool(lambda: reopen(info)) as pool:
        writer = _Writer(pool, grid, active, tile, array)
        blocks = _blocks(active, tile, _super_side(pool.get(), grid, tile))
        pixels = [_active_pixels_of(block, active, grid) for block in blocks]
        chosen = range(len(blocks)) if part is None else part.of(pixels)
        with Progress(sum(pixels[i] for i in chosen) / 1e6, "tiles", "MP") as done:
            _run(writer, [blocks[i] for i in chosen], workers, done)
            doubtful = None if writer.other_level is None else writer.doubtful
            return _Read(writer.sums, doubtful, writer.unreadable, writer.tiles, done.seconds)


def _store_part(done: _Read, part: Part, grid: Grid, tile: int, store: Path) -> dict[str, Any]:
    """Add to a part's store what `_gather` wants of it besides the pixels; what its manifest tells."""
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
    }


def _warnings(mpp: float, wanted: float, doubtful: np.ndarray, active: np.ndarray, grid: Grid) -> list[str]:
    """What makes a slide's results less sure: pixels too coarse for the model, cells that look damaged."""
    warnings = []
    if mpp / wanted > ENLARGED_WELL:
        warnings.append(
            f"the slide's {mpp:g} µm/px are {mpp / wanted:.2g} times as coarse as the model's {wanted:g}: "
            "small nuclei are missed, outlines are coarse; take a model of larger pixels, if there is one"
        )
    if doubtful.any():
        warnings.append(
            f"{int(doubtful.sum())} of {int(active.sum())} cells of 64 pixels differ between the levels of the "
            f"slide, or one does not decode: is the file damaged? The first: {_places(doubtful, grid)}"
        )
    return warnings


def _gather(parts: Sequence[Path], grid: Grid, tile: int, store: Path, active: np.ndarray) -> _Read:
    """Put the stores of all parts together."""
    import zarr

    sums = np.zeros(active.shape, np.uint32)
    doubtful: np.ndarray | None = None
    unreadable: set[tuple[int, int, int]] = set()
    manifests = read_parts(parts, grid=grid.to_json(), tile=tile)
    for path, manifest in zip(parts, manifests, strict=True):
        link_chunks(path, store, "rgb")
        group: Any = zarr.open_group(path, mode="r")
        sums += group["sums"][:]
        if "doubtful" in group:
            doubtful = group["doubtful"][:] if doubtful is None else doubtful | group["doubtful"][:]
        unreadable |= {(level, column, row) for level, column, row in manifest["undecoded"]}
    seconds = sum(manifest["seconds_reading"] for manifest in manifests)
    return _Read(sums, doubtful, unreadable, sum(manifest["tiles"] for manifest in manifests), seconds)


def _run(writer: _Writer, blocks: list[_Block], workers: int, progress: Progress) -> None:
    """Do all blocks on a pool of threads, few in flight at a time."""
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Command line of the stage."""
    parser.add_argument("--slide", required=True, help="name of the slide")
    parser.add_argument("--inspect", required=True, type=Path, metavar="SLIDE.JSON", help="manifest of stage inspect")
    parser.add_argument("--tissue", required=True, type=Path, metavar="TISSUE.JSON", help="manifest of stage tissue")
    parser.add_argument("--geojson", required=True, type=Path, metavar="TISSUE.GEOJSON", help="tissue polygons")
    parser.add_argument("--model", required=True, type=Path, metavar="DIR", help="model package, for its pixel size")
    parser.add_argument("--tile", type=int, default=1024, help="side of a stored tile in pixels (default: 1024)")
    parser.add_argument("--workers", type=int, help="reader threads (default: one a core, at most 16)")
    parser.add_argument(
        "--max-unreadable", type=float, default=0.02, metavar="SHARE", help="tolerated share of unreadable tissue"
    )
    parser.add_argument("--on-bad-slide", choices=("continue", "stop"), default="continue")
    add_time_arguments(parser)
    parser.add_argument("--part", type=Part.parse, metavar="I/N", help="only this part of the slide")
    parser.add_argument("--parts", type=Path, nargs="+", default=[], metavar="DIR", help="put these parts together")
    parser.add_argument("--out", required=True, type=Path, metavar="TILES.JSON")
    parser.add_argument("--zarr", required=True, type=Path, metavar="TILES.ZARR")


def main(args: argparse.Namespace) -> int:
    """Run the stage from the command line."""
    keep_freed_memory()
    run_tiles(
        args.slide,
        args.inspect,
        args.tissue,
        args.geojson,
        args.model,
        args.out,
        args.zarr,
        tile=args.tile,
        workers=args.workers,
        max_unreadable=args.max_unreadable,
        part=args.part,
        parts=args.parts,
        on_bad_slide=args.on_bad_slide,
        minutes=args.job_minutes,
        again=args.again,
    )
    return 0
