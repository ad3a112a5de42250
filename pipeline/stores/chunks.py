"""Write and read chunks of zarr arrays from many threads at once, without the time that zarr spends in Python."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numcodecs import CRC32C, Blosc, blosc
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec

# One thread a chunk, in the main thread too: blosc's own threads would not survive the fork of a worker.
blosc.use_threads = False


@dataclass(frozen=True)
class ChunkFiles:
    """Write whole uint8 chunks as the same files that zarr would write: lz4, then a checksum.

    zarr itself spends 1 to 2 ms per chunk in Python code, during which all other threads wait; a GPU computes the
    windows of a chunk in less.

    Parameters
    ----------
    level : int
        Compression level of lz4, 1 to 9.
    """

    level: int

    @property
    def compressors(self) -> tuple[BloscCodec, Crc32cCodec]:
        """Codecs to pass to `zarr.Group.create_array` as ``compressors``."""
        return BloscCodec(typesize=1, cname="lz4", clevel=self.level, shuffle="noshuffle"), Crc32cCodec()

    def write(self, array: Path, index: tuple[int, ...], pixels: np.ndarray) -> None:
        """Write one chunk.

        Parameters
        ----------
        array : pathlib.Path
            Folder of the array.
        index : tuple of int
            Index of the chunk along each axis.
        pixels : numpy.ndarray
            uint8, of the full shape of a chunk.
        """
        data: Any = np.ascontiguousarray(pixels)
        for codec in (Blosc(cname="lz4", clevel=self.level, shuffle=Blosc.NOSHUFFLE), CRC32C()):
            data = codec.encode(data)
        file = array.joinpath("c", *map(str, index))
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)


@dataclass(frozen=True, eq=False)
class ChunkReader:
    """Read windows of a uint8 array whose chunks are files of `ChunkFiles`; of other arrays through zarr.

    zarr takes three times as long for a chunk, most of it in Python code, during which all other threads wait.

    Parameters
    ----------
    path : pathlib.Path
        Folder of the array.
    array : zarr.Array
        The array.
    """

    path: Path
    array: Any

    @property
    def direct(self) -> bool:
        """Whether chunks are read here, without zarr."""
        metadata = self.array.metadata
        codecs = [type(codec) for codec in getattr(metadata, "codecs", ())]
        naming = getattr(metadata, "chunk_key_encoding", None)
        return (
            codecs == [BytesCodec, BloscCodec, Crc32cCodec]
            and self.array.dtype == np.uint8
            and getattr(naming, "name", None) == "default"
            and getattr(naming, "separator", None) == "/"
        )

    def read(self, *window: tuple[int, int]) -> np.ndarray:
        """Read a window.

        Parameters
        ----------
        *window : (int, int)
            First and last index along each axis, the last excluded; inside the array.

        Returns
        -------
        numpy.ndarray
            uint8, of the shape of the window; the fill value where there is no chunk.

        Raises
        ------
        RuntimeError, ValueError
            When a chunk is damaged. For arrays that zarr reads, any exception of its codecs.
        """
        if not self.direct:
            return np.asarray(self.array[tuple(slice(*ends) for ends in window)])
        sides = self.array.chunks
        out = np.empty([end - start for start, end in window], np.uint8)
        across = [range(start // side, -(-end // side)) for (start, end), side in zip(window, sides, strict=True)]
        for index in itertools.product(*across):
            place, inside = [], []
            for (start, end), side, at in zip(window, sides, index, strict=True):
                first, last = max(start, at * side), min(end, (at + 1) * side)
                place.append(slice(first - start, last - start))
                inside.append(slice(first - at * side, last - at * side))
            try:
                stored = self.path.joinpath("c", *map(str, index)).read_bytes()
            except FileNotFoundError:
                out[tuple(place)] = self.array.fill_value
                continue
            data = Blosc().decode(CRC32C().decode(stored))
            out[tuple(place)] = np.frombuffer(data, np.uint8).reshape(sides)[tuple(inside)]
        return out
