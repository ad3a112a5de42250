"""Stage ``infer``: run the network over the slide's tiles, window by window, and store the blended maps.

Windows lie on a fixed grid that the model package sets, so the maps do not depend on the tile size. Threads read a
bounded number of batches ahead and, where no GPU does it, normalise their stain. While one batch is written, the next
ones are computed.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.batch.parts import Part, link_chunks, manifest_of, read_parts
from pipeline.batch.stage import add_stage_arguments, keywords, read_manifest, run_stage
from pipeline.errors import PipelineError
from pipeline.kernels.blend import PatchGrid
from pipeline.kernels.stain import StainTransform
from pipeline.machine.allocator import keep_freed_memory
from pipeline.machine.cores import available_cores
from pipeline.machine.gpus import borrow
from pipeline.models.package import ModelPackage
from pipeline.networks.outputs import FindsInstances
from pipeline.networks.precision import PRECISIONS
from pipeline.networks.registry import needs_torch
from pipeline.prediction.predictors import (
    Finish,
    Places,
    Predictor,
    Strip,
    channel_names,
    choose_predictor,
    one_result,
    runs,
)
from pipeline.progress import Progress
from pipeline.stores.lattice import CELL
from pipeline.stores.maps import MapStore
from pipeline.stores.tile_store import RasterReader, TileStore

log = logging.getLogger(__name__)

MOST_READERS = 8
"""Most threads that read tiles for a GPU."""

GPU_WRITERS = 4
"""Threads that compress maps while a GPU computes."""

MOST_WAITING = 8 * GPU_WRITERS
"""Most chunks that wait to be written, more than a batch has; beyond that, the writer waits for the oldest."""

UNDER_WAY = 3
"""Batches that are begun before the first is waited for, so that the GPU has work while that one is written."""

HELD_FOR_GPU = 128 * 3 * 1024**2
"""Bytes of decoded tiles that are kept for a GPU: two rows of tiles on a slide 65,536 grid pixels wide."""

CHUNK_COLUMNS = 4
"""Width of a chunk of the maps, in strides of the windows; a chunk is one stride high."""


def active_windows(grid: PatchGrid, active: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield row and column, in raster order, of each window that touches an active cell.

    Parameters
    ----------
    grid : PatchGrid
        The windows.
    active : numpy.ndarray
        bool lattice.
    """
    # A summed-area table gives the number of active cells in any rectangle.
    table = np.zeros((active.shape[0] + 1, active.shape[1] + 1), np.int64)
    table[1:, 1:] = active.cumsum(0).cumsum(1)

    def span(index: int, cells: int) -> tuple[int, int]:
        first = index * grid.stride - grid.overlap
        return max(first, 0) // CELL, min(-(-(first + grid.patch) // CELL), cells)

    columns = [span(column, active.shape[1]) for column in range(grid.columns)]
    for row in range(grid.rows):
        top, bottom = span(row, active.shape[0])
        line = table[bottom] - table[top]
        for column, (left, right) in enumerate(columns):
            if line[right] - line[left] > 0:
                yield row, column


def _batches(windows: Iterator[tuple[int, int]], size: int) -> Iterator[Places]:
    while batch := list(islice(windows, size)):
        yield batch


class MapWriter:
    """Assemble the blended pixels of windows into whole chunks, hash these and write them.

    Only one row of chunks is kept in memory, and of it only the chunks that windows reach.

    Parameters
    ----------
    store : MapStore
        Where to write; its chunks begin at the slide's corner.
    grid : PatchGrid
        The windows.
    rows : range, optional
        Rows of chunks to write; other rows are dropped. By default all are written.
    hashing : concurrent.futures.Executor, optional
        Executor of one thread, which masks and hashes chunks in order.
    writing : concurrent.futures.Executor, optional
        Executor whose threads then compress and write the chunks; at most `MOST_WAITING` of them wait. Unless both
        executors are given, the calling thread does all of this itself.
    """

    def __init__(
        self,
        store: MapStore,
        grid: PatchGrid,
        rows: range | None = None,
        hashing: Executor | None = None,
        writing: Executor | None = None,
    ) -> None:
        self.store = store
        self.grid = grid
        self.rows = range(grid.rows) if rows is None else rows
        self.digest = hashlib.sha256()
        # Chunks by their first column. A row of windows completes the chunks of the row above it; as each of them is
        # written, the chunk below takes its key.
        self._held: dict[int, np.ndarray] = {}
        self._row = -1
        self._written = 0
        self._waiting: deque[tuple[int, np.ndarray]] = deque()
        self._hashing = hashing
        self._pool = writing
        self._writing: deque[Future[None]] = deque()

    def add(self, row: int, column: int, pixels: np.ndarray) -> None:
        """Take the pixels that `Blender.add` returned for a window; windows come in raster order."""
        if row != self._row:
            self._begin(row)
        left, overlap = column * self.grid.stride - self.grid.overlap, self.grid.overlap
        self._write_until(left)
        self._place(left, self.grid.stride - overlap, pixels[:, :overlap])
        self._waiting.append((left, pixels[:, overlap:]))

    def close(self) -> None:
        """Write all chunks that are still in memory, and wait until they are on disk."""
        self._begin(self._row + 2)
        while self._writing:
            self._writing.popleft().result()

    def _write(self, rows: slice, columns: slice, held: np.ndarray | None) -> None:
        if self._hashing is None or self._pool is None:
            self.store.write(columns.start, rows.start, self._hashed(rows, columns, held))
            return
        hashed = self._hashing.submit(self._hashed, rows, columns, held)
        self._writing.append(self._pool.submit(lambda: self.store.write(columns.start, rows.start, hashed.result())))
        while len(self._writing) > MOST_WAITING:
            self._writing.popleft().result()

    def _hashed(self, rows: slice, columns: slice, held: np.ndarray | None) -> np.ndarray:
        """Add a chunk to the hash; return its pixels, which are 0 outside active cells."""
        shape = len(self.store.channels), rows.stop - rows.start, columns.stop - columns.start
        if held is None:
            held = np.zeros(shape, np.uint8)
        part = np.ascontiguousarray(held[:, : shape[1]])
        if (mask := _mask(self.store, rows, columns)) is not None:
            part *= mask
        _add_chunk(self.digest, rows, columns, part)
        return part

    def _begin(self, row: int) -> None:
        width = self.store.grid.width
        self._write_until(width)
        if row > self._row + 1:  # no windows in the row below the last one: the chunks of the last one are complete
            self._row, self._written = self._row + 1, 0
            self._write_until(width)
        self._row, self._written = row, 0

    def _place(self, left: int, top: int, pixels: np.ndarray) -> None:
        width, side = self.store.grid.width, CHUNK_COLUMNS * self.grid.stride
        start, stop = max(left, 0), min(left + pixels.shape[2], width)
        for first in range(start // side * side, stop, side):
            if first not in self._held:
                shape = (len(self.store.channels), self.grid.stride, min(side, width - first))
                self._held[first] = np.zeros(shape, np.uint8)
            x0, x1 = max(start, first), min(stop, first + side)
            self._held[first][:, top : top + pixels.shape[1], x0 - first : x1 - first] = pixels[
                :, :, x0 - left : x1 - left
            ]

    def _write_until(self, end: int) -> None:
        """Write the chunks of the row above up to column `end`; begin those below them with the pixels that wait."""
        width, stride = self.store.grid.width, self.grid.stride
        while self._written < width:
            rows, columns = _chunk(self.store, self.grid, self._row - 1, self._written)
            if columns.stop > end:
                break
            held = self._held.pop(columns.start, None)
            if self._row - 1 in self.rows and _is_active(self.store, rows, columns):
                self._write(rows, columns, held)
            self._written = columns.stop
            while self._waiting and min(self._waiting[0][0] + stride, width) <= columns.stop:
                left, pixels = self._waiting.popleft()
                self._place(left, 0, pixels)


def _mask(store: MapStore, rows: slice, columns: slice) -> np.ndarray | None:
    """Which pixels of a chunk lie in active cells, bool; None when all do."""
    top, left = rows.start // CELL, columns.start // CELL
    cells = store.active[top : -(-rows.stop // CELL), left : -(-columns.stop // CELL)]
    if cells.all():
        return None
    pixels = cells.repeat(CELL, 0).repeat(CELL, 1)
    return pixels[
        rows.start - top * CELL : rows.stop - top * CELL, columns.start - left * CELL : columns.stop - left * CELL
    ]


def _chunk(store: MapStore, grid: PatchGrid, chunk_row: int, left: int) -> tuple[slice, slice]:
    """Rows and columns of the chunk that begins at column `left` of a row of chunks."""
    top, (height, width) = chunk_row * grid.stride, (store.grid.height, store.grid.width)
    return slice(top, min(top + grid.stride, height)), slice(left, min(left + CHUNK_COLUMNS * grid.stride, width))


def _is_active(store: MapStore, rows: slice, columns: slice) -> bool:
    """Whether a chunk holds active cells."""
    height, width = rows.stop - rows.start, columns.stop - columns.start
    return height > 0 and store.is_active(columns.start, rows.start, width, height)


def _chunks(store: MapStore, grid: PatchGrid, chunk_row: int) -> Iterator[tuple[slice, slice]]:
    """Yield rows and columns of each chunk in a row of chunks that holds active cells."""
    for left in range(0, store.grid.width, CHUNK_COLUMNS * grid.stride):
        place = _chunk(store, grid, chunk_row, left)
        if _is_active(store, *place):
            yield place


def _add_chunk(digest: hashlib._Hash, rows: slice, columns: slice, pixels: np.ndarray) -> None:
    digest.update(f"{rows.start},{columns.start};".encode())
    digest.update(pixels.data)


def _check_kinds(manifests: Sequence[dict[str, Any]]) -> None:
    """Raise an error unless all parts have the same precision and kind of device: else seams would show in the maps.

    With the setting ``auto`` both depend on the machine.
    """
    first: dict[str, int] = {}
    for manifest in manifests:
        kind = f"{manifest['precision']} on {'a CPU' if manifest['device'] == 'cpu' else 'a GPU'}"
        first.setdefault(kind, manifest["part"][0])
    if len(first) > 1:
        found = ", ".join(f"part {number} in {kind}" for kind, number in first.items())
        raise PipelineError(
            f"the maps of the slide's parts were computed in different ways: {found}",
            "set infer.precision and infer.device to one of them, not auto, and run again",
        )


def gather_maps(parts: Sequence[Path], tiles: TileStore, package: ModelPackage, path: Path) -> dict[str, Any]:
    """Join the maps of all parts of a slide.

    Parameters
    ----------
    parts : sequence of pathlib.Path
        The parts' stores, in order.
    tiles : TileStore
        The slide's pixels.
    package : ModelPackage
        The model.
    path : pathlib.Path
        The store of maps to write.

    Returns
    -------
    dict
        What `infer_slide` returns for the whole slide.

    Raises
    ------
    PipelineError
        When a part is missing or was made with other settings, or when precision or kind of device differ between
        parts.
    DamagedStore
        When a part's files have changed or gone since it was made.
    """
    grid = PatchGrid(tiles.grid.width, tiles.grid.height, package.patch, package.overlap)
    manifests = read_parts(parts, grid=tiles.grid.to_json(), model=_about_model(package))
    _check_kinds(manifests)
    store = _create_maps(path, tiles, grid, package)
    windows = list(active_windows(grid, store.active))
    digest = hashlib.sha256()
    for number, part in enumerate(parts, start=1):
        link_chunks(part, path, "maps")
        made = MapStore.open(part)  # read from the part, so that the error for a damaged chunk names the part
        for row in _rows_of(Part(number, len(parts)), grid, windows):
            for rows, columns in _chunks(store, grid, row):
                size = columns.stop - columns.start, rows.stop - rows.start
                _add_chunk(digest, rows, columns, made.read(columns.start, rows.start, *size))
    seconds = sum(manifest["seconds"] for manifest in manifests)
    megapixels = len(windows) * grid.stride**2 / 1e6
    return {
        "windows": len(windows),
        "megapixels": round(megapixels, 3),
        "mp_per_s": round(megapixels / max(seconds, 1e-9), 3) if windows else None,
        "maps_sha256": digest.hexdigest(),
        "device": ", ".join(dict.fromkeys(manifest["device"] for manifest in manifests)),
        **{key: manifests[0][key] for key in ("precision", "batch")},
    }


def _rows_of(part: Part, grid: PatchGrid, windows: Sequence[tuple[int, int]]) -> range:
    """Rows of chunks that a part computes; parts have about the same number of windows."""
    return part.of(np.bincount([row for row, _ in windows], minlength=grid.rows))


def _create_maps(path: Path, tiles: TileStore, grid: PatchGrid, package: ModelPackage) -> MapStore:
    chunk = grid.stride, min(CHUNK_COLUMNS, grid.columns) * grid.stride
    return MapStore.create(path, tiles.grid, channel_names(package), np.asarray(tiles.active, bool), chunk)


def _about_model(package: ModelPackage) -> dict[str, Any]:
    return {"name": package.name, "sha256": package.sha256, "licence": package.licence, "mpp": package.mpp}


def _finished(
    batches: Iterator[Places], read: Callable[[Places], Future[Callable[[], Finish]]], most: int
) -> Iterator[tuple[Places, Iterator[np.ndarray]]]:
    """Yield each batch in order, with the blended pixels of its windows.

    Up to `most` batches are read ahead, and `UNDER_WAY` of those that have been read are begun.
    """
    ahead: deque[tuple[Places, Future[Callable[[], Finish]]]] = deque()
    begun: deque[tuple[Places, Finish]] = deque()
    while True:
        while len(ahead) < most and (batch := next(batches, None)):
            ahead.append((batch, read(batch)))
        while len(begun) < UNDER_WAY and ahead:
            batch, ready = ahead.popleft()
            begun.append((batch, ready.result()()))
        if not begun:
            return
        batch, finish = begun.popleft()
        yield batch, finish()


def infer_slide(
    tiles: TileStore,
    transform: StainTransform,
    predictor: Predictor,
    package: ModelPackage,
    path: Path,
    part: Part | None = None,
    threads: int = 1,
) -> dict[str, Any]:
    """Run a network over a slide's tiles and store the maps.

    Parameters
    ----------
    tiles : TileStore
        The slide's pixels.
    transform : StainTransform
        The slide's stain normalisation.
    predictor : Predictor
        The network.
    package : ModelPackage
        The network's package.
    path : pathlib.Path
        The store of maps to write.
    part : Part, optional
        Write only this part's rows of chunks.
    threads : int
        CPU threads that read while a GPU computes, within 2 and `MOST_READERS`; without a GPU, two threads read.

    Returns
    -------
    dict
        Entries of the manifest: windows, megapixels, rate and the maps' hash; where a GPU computes, also ``gpu_busy``,
        the share of the time in which it did.
    """
    grid = PatchGrid(tiles.grid.width, tiles.grid.height, package.patch, package.overlap)
    active = np.asarray(tiles.active, bool)
    store = _create_maps(path, tiles, grid, package)
    windows = list(active_windows(grid, active))
    rows = range(grid.rows)
    if part is not None:
        rows = _rows_of(part, grid, windows)
        # The row of windows below the part overlaps the lower ends of its last chunks.
        windows = [window for window in windows if rows.start <= window[0] <= rows.stop]
    if isinstance(predictor.network, FindsInstances):
        predictor.network.margin = grid.overlap // 2
    on_gpu = predictor.busy is not None
    maps = predictor.slide(grid, transform)
    reader = RasterReader(tiles, HELD_FOR_GPU) if on_gpu else RasterReader(tiles)

    def read(batch: Places) -> Callable[[], Finish]:
        strips = []
        for row, column, count in runs(batch):
            x, y = grid.origin(row, column)
            pixels = reader.read(x, y, (count - 1) * grid.stride + grid.patch, grid.patch)
            strips.append(Strip(row, column, count, pixels))
        return maps.prepare(strips)

    megapixels = grid.stride**2 / 1e6
    readers = max(2, min(threads, MOST_READERS)) if on_gpu else 2
    with (
        ThreadPoolExecutor(readers, "read") as pool,
        ThreadPoolExecutor(1, "hash") as hashing,
        ThreadPoolExecutor(GPU_WRITERS, "write") as writing,
        Progress(len(windows) * megapixels, "infer", "MP") as progress,
    ):
        writer = MapWriter(store, grid, rows, *((hashing, writing) if on_gpu else ()))
        batches = _batches(iter(windows), predictor.batch)
        for batch, blended in _finished(batches, lambda batch: pool.submit(read, batch), readers + 2):
            for (row, column), pixels in zip(batch, blended, strict=True):
                writer.add(row, column, pixels)
            progress.advance(len(batch) * megapixels)
        writer.close()
        found = {
            "windows": len(windows),
            "megapixels": round(len(windows) * megapixels, 3),
            "mp_per_s": round(progress.rate, 3) if windows else None,
            "maps_sha256": writer.digest.hexdigest(),
        }
        if predictor.busy is not None:
            found["gpu_busy"] = round(predictor.busy / max(progress.seconds, 1e-9), 3)
        return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the stage's arguments."""
    add_stage_arguments(parser)
    parser.add_argument("--tiles", type=Path, required=True, help="tiles.json")
    parser.add_argument("--zarr", type=Path, required=True, help="tiles.zarr")
    parser.add_argument("--stain", type=Path, required=True, help="stain.json")
    parser.add_argument("--model", type=Path, required=True, help="model package")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where the network runs")
    parser.add_argument(
        "--precision", choices=PRECISIONS, default="auto", help="numbers that the network computes with"
    )
    parser.add_argument("--batch", type=int, default=0, help="windows a forward pass; 0 chooses by device")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: one a core")
    parser.add_argument("--part", type=Part.parse, metavar="I/N", help="only this part of the slide")
    parser.add_argument("--parts", type=Path, nargs="+", default=[], metavar="DIR", help="put these parts together")
    parser.add_argument("--out", type=Path, required=True, help="maps.json to write")
    parser.add_argument("--zarr-out", type=Path, required=True, help="maps.zarr to write")


def run_infer(
    slide: str,
    *,
    tiles: Path,
    zarr: Path,
    stain: Path,
    model: Path,
    out: Path,
    zarr_out: Path,
    device: str = "auto",
    precision: str = "auto",
    batch: int = 0,
    threads: int = 0,
    part: Part | None = None,
    parts: Sequence[Path] = (),
    **how: Any,
) -> dict[str, Any]:
    """Run the stage.

    Parameters
    ----------
    slide : str
        Name of the slide.
    tiles, zarr : pathlib.Path
        Manifest and store of the stage ``tiles``.
    stain : pathlib.Path
        Manifest of the stage ``stain``.
    model : pathlib.Path
        Folder of the model package.
    out, zarr_out : pathlib.Path
        The manifest and the store of maps to write.
    device, precision, batch
        See `pipeline.prediction.predictors.choose_predictor`.
    threads : int
        CPU threads; 0 means one per core.
    part : Part, optional
        Compute only this part of the slide.
    parts : sequence of pathlib.Path
        Stores of all parts; when given, they are joined and nothing is computed.
    **how : Any
        `on_bad_slide`, `minutes` and `again` of `pipeline.batch.stage.run_stage`.

    Returns
    -------
    dict
        The manifest, with the entries that `infer_slide` returns.
    """

    def body(staged: dict[str, Path]) -> dict[str, Any]:
        package = ModelPackage.load(model, verify=True)
        store = TileStore.open(zarr)
        transform = StainTransform.from_json(read_manifest(stain)["transform"])
        if parts:
            found = gather_maps(parts, store, package, staged["maps"])
        else:
            if needs_torch(package.network):
                during.enter_context(borrow(device))
                during.enter_context(one_result())
            cores = threads or available_cores()
            predictor, about = choose_predictor(package, device, batch, cores, precision)
            found = infer_slide(store, transform, predictor, package, staged["maps"], part, cores)
            found |= about | {"batch": predictor.per_pass}  # smaller than the setting where memory ran out
        log.info(
            "slide %r: %.1f MP at %s MP/s on %s, %s",
            slide, found["megapixels"], found["mp_per_s"], found["device"], found["precision"],
        )  # fmt: skip
        return {
            "grid": store.grid.to_json(),
            "channels": list(channel_names(package)),
            "model": _about_model(package),
            **found,
            **({} if part is None else {"part": part.to_json()}),
        }

    # The GPU is given back when the store is written, as the process holds the GPU's memory until it ends.
    with ExitStack() as during:
        return run_stage(
            "infer",
            slide,
            manifest=out,
            outputs={"maps": zarr_out},
            upstream=[tiles, stain, *map(manifest_of, parts)],
            stores={zarr: tiles} | {part: manifest_of(part) for part in parts},
            body=body,
            **how,
        )


def main(args: argparse.Namespace) -> int:
    """Run the stage from the command line."""
    if args.device != "cuda":
        keep_freed_memory()
    run_infer(**keywords(args))
    return 0
