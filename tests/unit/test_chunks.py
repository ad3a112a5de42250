"""Chunks written and read without zarr are those of zarr."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.stores.chunks import ChunkFiles, ChunkReader

FILES = ChunkFiles(level=1)


def stored(path: Path, compressors: object = FILES.compressors) -> tuple[np.ndarray, zarr.Array]:
    """Random pixels of 50 x 70 in chunks of 16 x 32, of which one is left out."""
    pixels = np.random.default_rng(0).integers(0, 255, (50, 70, 3), np.uint8)
    pixels[16:32, 32:64] = 200
    group = zarr.create_group(path, overwrite=True)
    array = group.create_array(
        "rgb", shape=pixels.shape, chunks=(16, 32, 3), dtype="uint8", fill_value=200, compressors=compressors
    )
    array[:] = pixels
    return pixels, array


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> tuple[np.ndarray, ChunkReader]:
    path = tmp_path_factory.mktemp("chunks") / "a.zarr"
    pixels, array = stored(path)
    (path / "rgb" / "c" / "1" / "1" / "0").unlink(missing_ok=True)
    return pixels, ChunkReader(path / "rgb", array)


def ends(size: int) -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(st.integers(0, size), st.integers(0, size)).map(lambda pair: (min(pair), max(pair)))


@settings(deadline=None)
@given(ends(50), ends(70), ends(3))
def test_any_window_is_read_as_zarr_reads_it(
    example: tuple[np.ndarray, ChunkReader], rows: tuple[int, int], columns: tuple[int, int], channels: tuple[int, int]
) -> None:
    pixels, reader = example
    assert reader.direct
    found = reader.read(rows, columns, channels)
    np.testing.assert_array_equal(found, pixels[slice(*rows), slice(*columns), slice(*channels)])
    found[...] = 0  # it belongs to the caller


def test_chunks_written_here_have_the_bytes_of_those_of_zarr(tmp_path: Path) -> None:
    pixels, _ = stored(tmp_path / "a.zarr")
    FILES.write(tmp_path / "mine", (2, 0, 0), pixels[32:48, :32])
    file = "c/2/0/0"
    assert (tmp_path / "mine" / file).read_bytes() == (tmp_path / "a.zarr" / "rgb" / file).read_bytes()


def test_other_arrays_are_left_to_zarr(tmp_path: Path) -> None:
    pixels, array = stored(tmp_path / "zstd.zarr", "auto")
    reader = ChunkReader(tmp_path / "zstd.zarr" / "rgb", array)
    assert not reader.direct
    np.testing.assert_array_equal(reader.read((3, 50), (0, 70), (0, 3)), pixels[3:])


@pytest.mark.parametrize("damage", ["one bit", "cut", "empty"])
def test_a_damaged_chunk_is_noticed(tmp_path: Path, damage: str) -> None:
    _, array = stored(tmp_path / "a.zarr")
    file = tmp_path / "a.zarr" / "rgb" / "c" / "0" / "0" / "0"
    data = bytearray(file.read_bytes())
    if damage == "one bit":
        data[100] ^= 1
    file.write_bytes(data if damage == "one bit" else data[: 50 if damage == "cut" else 0])
    reader = ChunkReader(tmp_path / "a.zarr" / "rgb", array)
    reader.read((16, 50), (0, 70), (0, 3))
    with pytest.raises((RuntimeError, ValueError)):
        reader.read((0, 50), (0, 70), (0, 3))
