"""Arrays of zarr stores (version 3), as far as the stages themselves write and read them.

The import of the zarr library takes most of the start of a stage, and with it a chunk goes through an event loop and
several copies. Whatever is written here it opens, and what it writes with these codecs is read here.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import Any

import numpy as np

ABOUT = "zarr.json"
"""The description in the folder of a group or an array."""

LEVEL = 1
"""Of Blosc: the fastest."""

PIXELS: tuple[dict[str, Any], ...] = (
    {"name": "bytes"},
    {
        "name": "blosc",
        "configuration": {"typesize": 1, "cname": "lz4", "clevel": LEVEL, "shuffle": "noshuffle", "blocksize": 0},
    },
    {"name": "crc32c"},
)
"""Codecs of pixels: each chunk carries a checksum."""

MASK: tuple[dict[str, Any], ...] = (
    {"name": "bytes"},
    {"name": "zstd", "configuration": {"level": 0, "checksum": False}},
)
"""Codecs of masks: those that zarr takes where none are given."""

Key = EllipsisType | slice | tuple[slice, ...]


def create_group(path: Path, attributes: dict[str, Any]) -> None:
    """Make a store: a folder with attributes, for arrays in it."""
    path.mkdir(parents=True, exist_ok=True)
    _describe(path, {"attributes": attributes, "zarr_format": 3, "node_type": "group"})


def group_attributes(path: Path) -> dict[str, Any]:
    """Attributes of a store.

    Raises
    ------
    FileNotFoundError
        When there is none.
    ValueError, KeyError
        When its description is damaged.
    """
    about = json.loads((path / ABOUT).read_bytes())
    if (about["zarr_format"], about["node_type"]) != (3, "group"):
        raise ValueError(f"{path} is no group of zarr, version 3")
    return dict(about["attributes"])


def _describe(path: Path, about: dict[str, Any]) -> None:
    (path / ABOUT).write_text(json.dumps(about, indent=2), encoding="utf-8")


@dataclass(frozen=True, eq=False)
class ChunkedArray:
    """An array in chunks, one file each; safe to read, and to write different chunks, from several threads.

    Parameters
    ----------
    path : pathlib.Path
        Its folder.
    shape, chunks : tuple of int
        Size of the array and of a chunk.
    dtype : numpy.dtype
        Type of the values, one byte each.
    fill : int or bool
        Value where no chunk is stored.
    codecs : tuple of str
        Names of those after ``bytes``.
    """

    path: Path
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: np.dtype[Any]
    fill: int | bool
    codecs: tuple[str, ...]

    @classmethod
    def create(
        cls,
        path: Path,
        shape: Sequence[int],
        chunks: Sequence[int],
        dtype: str,
        fill: int | bool,
        codecs: Sequence[dict[str, Any]] = PIXELS,
    ) -> ChunkedArray:
        """Make an empty array in a new folder."""
        path.mkdir()
        about = {
            "shape": list(shape),
            "data_type": dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunks)}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": fill,
            "codecs": list(codecs),
            "attributes": {},
            "zarr_format": 3,
            "node_type": "array",
            "storage_transformers": [],
        }
        _describe(path, about)
        return cls.open(path)

    @classmethod
    def open(cls, path: Path) -> ChunkedArray:
        """Open an array.

        Raises
        ------
        Exception
            When there is none, or it is damaged or of another kind than those that are written here.
        """
        about = json.loads((path / ABOUT).read_bytes())
        dtype, names = np.dtype(about["data_type"]), [codec["name"] for codec in about["codecs"]]
        key = about["chunk_key_encoding"]
        plain = dtype.itemsize == 1 and (key["name"], key["configuration"]["separator"]) == ("default", "/")
        if not plain or names[0] != "bytes" or not {*names[1:]} <= {"blosc", "zstd", "crc32c"}:
            raise ValueError(f"{path} has values or codecs that are not known here: {names}")
        chunks = about["chunk_grid"]["configuration"]["chunk_shape"]
        return cls(path, (*about["shape"],), (*chunks,), dtype, about["fill_value"], (*names[1:],))

    def __getitem__(self, key: Key) -> np.ndarray:
        """A window.

        Raises
        ------
        Exception
            When a chunk is damaged.
        """
        bounds = self._bounds(key)
        result = np.empty([stop - start for start, stop in bounds], self.dtype)
        for name, inside, outside in self._pieces(bounds):
            try:
                data = (self.path / name).read_bytes()
            except FileNotFoundError:
                result[outside] = self.fill
            else:
                result[outside] = self._decoded(data)[inside]
        return result

    def __setitem__(self, key: Key, values: np.ndarray) -> None:
        """Write a window of whole chunks, those at the array's ends as far as they go.

        Chunks that hold `fill` alone are left out.

        Raises
        ------
        ValueError
            When it cuts a chunk.
        """
        bounds = self._bounds(key)
        for (start, stop), size, chunk in zip(bounds, self.shape, self.chunks, strict=True):
            if start % chunk or (stop % chunk and stop != size):
                raise ValueError(f"{start} to {stop} are no whole chunks of {chunk}")
        values = np.broadcast_to(values, [stop - start for start, stop in bounds])
        for name, inside, outside in self._pieces(bounds):
            part = values[outside]
            if (part == self.fill).all():
                continue
            if part.shape != self.chunks:
                whole = np.full(self.chunks, self.fill, self.dtype)
                whole[inside] = part
                part = whole
            (self.path / name).parent.mkdir(parents=True, exist_ok=True)
            (self.path / name).write_bytes(self._encoded(np.ascontiguousarray(part, self.dtype)))

    def _bounds(self, key: Key) -> list[tuple[int, int]]:
        """First index and the one after the last, along each axis."""
        given = () if key is ... else key if isinstance(key, tuple) else (key,)
        slices = [*given, *[slice(None)] * (len(self.shape) - len(given))]
        return [part.indices(size)[:2] for part, size in zip(slices, self.shape, strict=True)]

    def _pieces(self, bounds: list[tuple[int, int]]) -> Iterator[tuple[str, tuple[slice, ...], tuple[slice, ...]]]:
        """Chunks of a window: the file, and the part in the chunk and in the window."""
        axes = []
        for (start, stop), chunk in zip(bounds, self.chunks, strict=True):
            axis = []
            for number in range(start // chunk, -(-stop // chunk)):
                first, last = max(start, number * chunk), min(stop, (number + 1) * chunk)
                inside = slice(first - number * chunk, last - number * chunk)
                axis.append((str(number), inside, slice(first - start, last - start)))
            axes.append(axis)
        for piece in itertools.product(*axes):
            numbers, inside, outside = zip(*piece, strict=True)
            yield "/".join(("c", *numbers)), inside, outside

    def _encoded(self, part: np.ndarray) -> bytes:
        """A chunk as it is stored."""
        import google_crc32c
        import imagecodecs

        data: Any = part
        for name in self.codecs:
            if name == "blosc":
                data = imagecodecs.blosc_encode(
                    data, LEVEL, compressor="lz4", shuffle=0, typesize=1, blocksize=0, numthreads=1
                )
            elif name == "zstd":
                data = imagecodecs.zstd_encode(data, level=0)
            else:
                data += google_crc32c.value(data).to_bytes(4, "little")
        return bytes(data)

    def _decoded(self, stored: bytes) -> np.ndarray:
        """`_encoded` backwards."""
        import google_crc32c
        import imagecodecs

        data: Any = stored
        for name in reversed(self.codecs):
            if name == "blosc":
                data = imagecodecs.blosc_decode(data, numthreads=1)
            elif name == "zstd":
                data = imagecodecs.zstd_decode(data)
            else:
                data, checksum = data[:-4], data[-4:]
                if google_crc32c.value(data) != int.from_bytes(checksum, "little"):
                    raise ValueError("a chunk is not what its checksum says")
        return np.frombuffer(data, self.dtype).reshape(self.chunks)
