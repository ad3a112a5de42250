"""The store of blended maps of one slide."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from pipeline.errors import DamagedStore, PipelineError
from pipeline.kernels.instances import refined
from pipeline.stores.chunks import ChunkFiles, ChunkReader
from pipeline.stores.grid import Grid
from pipeline.stores.lattice import CELL
from pipeline.stores.seal import check_seal, is_sealed

_CHUNKS = ChunkFiles(level=5)


@dataclass(frozen=True, eq=False)
class MapStore:
    """uint8 maps ``(C, H, W)`` on a slide's grid; 255 is probability 1.

    Parameters
    ----------
    path : pathlib.Path
        The zarr group.
    grid : Grid
        The slide's grid.
    channels : tuple of str
        Name of each map, e.g. ``nucleus``, ``distance``, ``type:Lymphocyte``.
    active : numpy.ndarray
        bool lattice of the active cells; only these have maps.
    array : zarr.Array
        The maps.
    """

    path: Path
    grid: Grid
    channels: tuple[str, ...]
    active: np.ndarray
    array: Any

    @classmethod
    def create(
        cls, path: Path, grid: Grid, channels: tuple[str, ...], active: np.ndarray, chunk: tuple[int, int]
    ) -> MapStore:
        """Create an empty store with chunks of ``chunk`` (rows, columns) pixels."""
        group = zarr.create_group(path, attributes={"grid": grid.to_json(), "channels": list(channels), "cell": CELL})
        array = group.create_array(
            "maps",
            shape=(len(channels), grid.height, grid.width),
            chunks=(len(channels), *chunk),
            dtype=np.uint8,
            fill_value=0,
            compressors=_CHUNKS.compressors,
        )
        group.create_array("active", data=active)
        return cls(path, grid, channels, active, array)

    @classmethod
    def open(cls, path: Path) -> MapStore:
        """Open a store for reading.

        Raises
        ------
        PipelineError
            When it is missing, no store of maps, or damaged.
        """
        check_seal(Path(path))
        try:
            group = zarr.open_group(path, mode="r")
            attributes = group.attrs
            if attributes["cell"] != CELL:
                raise ValueError(f"cells of {attributes['cell']} pixels")
            return cls(
                Path(path),
                Grid.from_json(dict(attributes["grid"])),  # type: ignore[arg-type]
                tuple(attributes["channels"]),  # type: ignore[arg-type]
                np.asarray(group["active"][:], bool),  # type: ignore[index]
                group["maps"],
            )
        except (KeyError, ValueError, TypeError, FileNotFoundError) as error:  # other OSErrors are the machine's fault
            if is_sealed(Path(path)) and not isinstance(error, FileNotFoundError):
                raise DamagedStore(Path(path), str(error)) from None
            raise PipelineError(f"{path} is not a store of maps: {error}", "delete it and run again") from None

    def write(self, x: int, y: int, pixels: np.ndarray) -> None:
        """Write a whole chunk; safe from any thread.

        Parameters
        ----------
        x, y : int
            Left and top of the chunk in grid pixels.
        pixels : numpy.ndarray
            uint8 ``(C, rows, columns)``: the chunk, cut off at the slide's right and lower edges.

        Raises
        ------
        ValueError
            When the pixels are not a whole chunk.
        """
        channels, rows, columns = self.array.chunks
        shape = channels, min(rows, self.grid.height - y), min(columns, self.grid.width - x)
        if x % columns or y % rows or pixels.shape != shape:
            raise ValueError(f"{pixels.shape} at ({x}, {y}) is not a whole chunk of {self.array.chunks}")
        if not pixels.any():
            return  # a chunk without a file reads as 0
        if pixels.shape[1:] != (rows, columns):
            pixels = np.pad(pixels, ((0, 0), (0, rows - pixels.shape[1]), (0, columns - pixels.shape[2])))
        _CHUNKS.write(self.path / "maps", (0, y // rows, x // columns), pixels)

    def read(self, x: int, y: int, width: int, height: int) -> np.ndarray:
        """Maps of any window, uint8 ``(C, height, width)``; 0 outside the slide.

        Raises
        ------
        PipelineError
            When a chunk is damaged.
        """
        x0, y0 = max(x, 0), max(y, 0)
        x1, y1 = min(x + width, self.grid.width), min(y + height, self.grid.height)
        result = np.zeros((len(self.channels), height, width), np.uint8)
        if x0 < x1 and y0 < y1:
            try:
                part = ChunkReader(self.path / "maps", self.array).read((0, len(result)), (y0, y1), (x0, x1))
            except (MemoryError, OSError):
                raise  # the machine's fault, not the store's
            except Exception as error:  # codecs raise many kinds
                if is_sealed(self.path):
                    raise DamagedStore(self.path, f"{type(error).__name__}: {error}") from None
                raise PipelineError(f"{self.path} is damaged: {error}", "delete it and run again") from error
            result[:, y0 - y : y1 - y, x0 - x : x1 - x] = part
        return result

    def is_active(self, x: int, y: int, width: int, height: int) -> bool:
        """Whether a window touches an active cell."""
        rows = slice(max(y, 0) // CELL, -(-(y + height) // CELL))
        columns = slice(max(x, 0) // CELL, -(-(x + width) // CELL))
        return bool(self.active[rows, columns].any())


@dataclass(frozen=True, eq=False)
class FineMaps:
    """The maps of a store, interpolated to pixels of half the size: see `pipeline.kernels.instances.refined`.

    Parameters
    ----------
    store : MapStore
        The store.
    """

    store: MapStore

    @property
    def grid(self) -> Grid:
        """The slide's grid with pixels of half the size."""
        return self.store.grid.finer(2)

    @property
    def channels(self) -> tuple[str, ...]:
        """Name of each map."""
        return self.store.channels

    def read(self, x: int, y: int, width: int, height: int) -> np.ndarray:
        """Maps of any window, uint8 ``(C, height, width)``; 0 outside the slide."""
        grid = self.store.grid
        result = np.zeros((len(self.channels), height, width), np.uint8)
        x0, y0 = max(x, 0), max(y, 0)
        x1, y1 = min(x + width, 2 * grid.width), min(y + height, 2 * grid.height)
        if x0 < x1 and y0 < y1:
            # Read one pixel more on each side, except at the slide's edge: interpolation uses neighbouring pixels.
            left, top = max(x0 // 2 - 1, 0), max(y0 // 2 - 1, 0)
            right, bottom = min((x1 + 1) // 2 + 1, grid.width), min((y1 + 1) // 2 + 1, grid.height)
            fine = refined(self.store.read(left, top, right - left, bottom - top))
            rows, columns = slice(y0 - 2 * top, y1 - 2 * top), slice(x0 - 2 * left, x1 - 2 * left)
            result[:, y0 - y : y1 - y, x0 - x : x1 - x] = fine[:, rows, columns]
        return result

    def is_active(self, x: int, y: int, width: int, height: int) -> bool:
        """Whether a window touches an active cell, or lies next to one so that its maps may be other than 0."""
        left, top = x // 2 - 1, y // 2 - 1
        return self.store.is_active(left, top, (x + width + 1) // 2 + 1 - left, (y + height + 1) // 2 + 1 - top)


Maps = MapStore | FineMaps


def open_maps(path: Path, refine: int) -> Maps:
    """Open a store to find nuclei in its maps: as they are with `refine` 1, on pixels of half the size with 2."""
    store = MapStore.open(path)
    return store if refine == 1 else FineMaps(store)
