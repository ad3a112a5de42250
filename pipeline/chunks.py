"""Chunks of zarr arrays, compressed and written from many threads at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numcodecs import CRC32C, Blosc
from zarr.codecs import BloscCodec, Crc32cCodec


@dataclass(frozen=True)
class ChunkFiles:
    """Whole chunks of uint8, as files that are those zarr would write: lz4, then a checksum.

    zarr takes 1 to 2 ms of Python a chunk, in which all other threads wait: more than a GPU takes for its windows.

    Parameters
    ----------
    level : int
        How hard lz4 tries, 1 to 9.
    """

    level: int

    @property
    def compressors(self) -> tuple[BloscCodec, Crc32cCodec]:
        """What `zarr.Group.create_array` is given as ``compressors``."""
        return BloscCodec(typesize=1, cname="lz4", clevel=self.level, shuffle="noshuffle"), Crc32cCodec()

    def write(self, array: Path, index: tuple[int, ...], pixels: np.ndarray) -> None:
        """Write one chunk.

        Parameters
        ----------
        array : pathlib.Path
            Folder of the array.
        index : tuple of int
            The chunk's place among the chunks, one number an axis.
        pixels : numpy.ndarray
            uint8, the chunk's own shape.
        """
        data: Any = np.ascontiguousarray(pixels)
        for codec in (Blosc(cname="lz4", clevel=self.level, shuffle=Blosc.NOSHUFFLE), CRC32C()):
            data = codec.encode(data)
        file = array.joinpath("c", *map(str, index))
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
