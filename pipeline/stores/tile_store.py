"""The store of one slide's tiles: the pixels of its tissue on its grid."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pipeline.errors import DamagedStore, PipelineError
from pipeline.stores.chunks import ChunkFiles, ChunkReader
from pipeline.stores.grid import Grid
from pipeline.stores.lattice import CELL
from pipeline.stores.seal import check_seal, is_sealed

Window = Callable[[int, int, int, int], np.ndarray]

_CHUNKS = ChunkFiles(level=1)


class Tiles(Protocol):
    """What measuring and drawing need of a slide's pixels: a `TileStore`, or an array wrapped to look like it."""

    @property
    def grid(self) -> Grid:
        """The slide's grid."""

    @property
    def active(self) -> np.ndarray:
        """bool lattice of the cells that hold pixels."""

    def read(self, x: int, y: int, w: int, h: int, /) -> np.ndarray:
        """A window in grid pixels, RGB, uint8, shape (h, w, 3)."""


def reflect(start: int, n: int, size: int) -> np.ndarray:
    """Indices of `n` pixels from `start` along an axis of `size`, reflected at its ends.

    The edge pixel is repeated, as by ``numpy.pad(..., mode="symmetric")``. Indices may lie any distance outside.

    Returns
    -------
    numpy.ndarray
        int64, shape (n,), values in ``[0, size)``.
    """
    index = np.arange(start, start + n) % (2 * size)
    return np.asarray(np.where(index < size, index, 2 * size - 1 - index))


def create_tiles(path: Path, grid: Grid, active: np.ndarray, tile: int) -> Any:
    """Create an empty store.

    Returns
    -------
    zarr.Array
        Its pixels, uint8 ``(height, width, 3)``, filled with 255; one chunk per tile of `tile` x `tile` grid pixels.
    """
    import zarr

    group = zarr.create_group(path, overwrite=True, attributes={"grid": grid.to_json(), "cell": CELL})
    group.create_array("active", data=active)
    return group.create_array(
        "rgb",
        shape=(grid.height, grid.width, 3),
        chunks=(tile, tile, 3),
        dtype="uint8",
        fill_value=255,
        compressors=_CHUNKS.compressors,
    )


def write_tile(path: Path, row: int, column: int, pixels: np.ndarray) -> None:
    """Write a tile into a store; safe from several threads that write different tiles.

    Parameters
    ----------
    path : pathlib.Path
        The store.
    row, column : int
        Place of the tile among the tiles.
    pixels : numpy.ndarray
        uint8, shape (tile, tile, 3), in full size at the grid's edge too. A tile that is all white is not stored.
    """
    if pixels.min() < 255:
        _CHUNKS.write(path / "rgb", (row, column, 0), pixels)


@dataclass(frozen=True)
class TileStore:
    """Pixels of a slide as the stage ``tiles`` stored them; safe to read from several threads.

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
    _rgb: ChunkReader

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
            reader = ChunkReader(Path(path) / "rgb", rgb)
            return cls(Path(path), grid, active, int(rgb.chunks[0]), reader)  # type: ignore[union-attr]
        except FileNotFoundError:
            raise PipelineError(f"{path} is missing", "run the stage `tiles` first") from None
        except Exception as error:
            raise _damaged(Path(path), error) from None

    def read(self, x: int, y: int, w: int, h: int, window: Window | None = None) -> np.ndarray:
        """Read a window.

        Parameters
        ----------
        x, y, w, h : int
            Window in grid pixels. Outside the grid, pixels are reflected at its edge (the edge pixel is repeated), so
            that a patch at the slide's edge shows more of the same tissue instead of a border.
        window : callable, optional
            Function that reads windows within the grid; by default the method `window`.

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
        # Only columns outside the grid are copied by index: to do so with all would double the time spent on a window.
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
            return self._rgb.read((y0, y1), (x0, x1), (0, 3))
        except Exception as error:  # codecs raise many kinds over a damaged chunk
            raise _damaged(self.path, error) from None


class RasterReader:
    """Read windows of a store in raster order, from several threads, and decode each tile only once.

    Decoded tiles are kept up to a limit. Once it is reached, tiles above a window make room for those of the window;
    when none are left above, a tile is decoded anew for every window that needs it.

    Parameters
    ----------
    store : TileStore
        The store to read.
    memory : int
        Most bytes of decoded tiles that are kept; four tiles are kept however large they are.
    """

    def __init__(self, store: TileStore, memory: int = 12 * 3 * 1024**2) -> None:
        self.store = store
        self.limit = max(4, memory // (3 * store.tile**2))  # four tiles meet at a corner
        self._held: dict[tuple[int, int], Future[np.ndarray]] = {}
        self._lock = threading.Lock()

    def read(self, x: int, y: int, w: int, h: int) -> np.ndarray:
        """Read a window that lies at most one tile above any earlier one; see `TileStore.read`."""
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
        """Return a tile, or None where there is no room for it; `first` is the window's first row of tiles."""
        with self._lock:
            found = self._held.get((row, column))
            if found is None:
                if len(self._held) >= self.limit:
                    # Tiles above are dropped only now: until then, other threads may still need them.
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
        return error  # the machine's fault, not the store's
    why = f"{type(error).__name__}: {error}"
    if is_sealed(path):
        return DamagedStore(path, why)
    return PipelineError(f"{path} is damaged: {why}", "delete it and run again")
