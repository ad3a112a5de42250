"""Arrays in chunks: what is written here is zarr, and what zarr writes is read here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.chunks import MASK, ChunkedArray, create_group, group_attributes

PIXELS = np.random.default_rng(0).integers(0, 256, (100, 70, 3), np.uint8)
PIXELS[32:64, :32] = 255


def write(path: Path) -> ChunkedArray:
    create_group(path, {"cell": 64})
    array = ChunkedArray.create(path / "rgb", PIXELS.shape, (32, 32, 3), "uint8", 255)
    array[...] = PIXELS
    return array


def test_zarr_reads_it(tmp_path: Path) -> None:
    write(tmp_path / "a.zarr")
    mask = PIXELS[..., 0] > 100
    ChunkedArray.create(tmp_path / "a.zarr" / "mask", mask.shape, mask.shape, "bool", False, MASK)[...] = mask
    group = zarr.open_group(tmp_path / "a.zarr", mode="r")
    assert dict(group.attrs) == group_attributes(tmp_path / "a.zarr") == {"cell": 64}
    assert np.array_equal(group["rgb"][...], PIXELS)  # type: ignore[index]
    assert np.array_equal(group["mask"][...], mask)  # type: ignore[index]


def test_the_files_are_those_of_zarr(tmp_path: Path) -> None:
    write(tmp_path / "ours")
    group = zarr.create_group(tmp_path / "theirs", attributes={"cell": 64})
    codecs = [
        zarr.codecs.BloscCodec(typesize=1, cname="lz4", clevel=1, shuffle="noshuffle"),
        zarr.codecs.Crc32cCodec(),
    ]
    group.create_array(
        "rgb", shape=PIXELS.shape, chunks=(32, 32, 3), dtype="uint8", fill_value=255, compressors=codecs
    )[...] = PIXELS  # fmt: skip
    names = {path.relative_to(tmp_path / "theirs") for path in (tmp_path / "theirs").rglob("*") if path.is_file()}
    assert names == {path.relative_to(tmp_path / "ours") for path in (tmp_path / "ours").rglob("*") if path.is_file()}
    assert len(names) == 2 + 4 * 3 - 1, "the white chunk is left out"
    for name in ("zarr.json", "rgb/zarr.json"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()


@settings(max_examples=60, deadline=None)
@given(
    rows=st.tuples(st.integers(0, 100), st.integers(0, 100)), columns=st.tuples(st.integers(0, 70), st.integers(0, 70))
)
def test_windows(tmp_path_factory: pytest.TempPathFactory, rows: tuple[int, int], columns: tuple[int, int]) -> None:
    path = tmp_path_factory.getbasetemp() / "windows.zarr"
    array = ChunkedArray.open(path / "rgb") if path.exists() else write(path)
    key = slice(*sorted(rows)), slice(*sorted(columns))
    assert np.array_equal(array[key], PIXELS[key])


@pytest.mark.parametrize("compressors", [None, "auto"])
def test_what_zarr_writes_is_read(tmp_path: Path, compressors: str | None) -> None:
    group = zarr.create_group(tmp_path)
    group.create_array("a", data=PIXELS, chunks=(32, 32, 3), compressors=compressors)
    assert np.array_equal(ChunkedArray.open(tmp_path / "a")[...], PIXELS)


def test_other_kinds_are_refused(tmp_path: Path) -> None:
    group = zarr.create_group(tmp_path)
    group.create_array("wide", data=PIXELS.astype(np.uint16))
    group.create_array("gzip", data=PIXELS, compressors=zarr.codecs.GzipCodec())
    group.create_array("shards", data=PIXELS, chunks=(20, 70, 3), shards=(40, 70, 3))
    for name in ("wide", "gzip", "shards"):
        with pytest.raises(ValueError, match="values or codecs"):
            ChunkedArray.open(tmp_path / name)
    with pytest.raises(ValueError, match="is no group"):
        group_attributes(tmp_path / "wide")


def test_chunks_are_written_whole(tmp_path: Path) -> None:
    array = write(tmp_path)
    with pytest.raises(ValueError, match="no whole chunks"):
        array[0:32, 0:31] = PIXELS[:32, :31]
    array[96:100, 64:70] = np.zeros((4, 6, 3), np.uint8)
    assert not array[96:, 64:].any()
    assert np.array_equal(array[:96], PIXELS[:96])


def test_tiles_are_read_without_zarr(tmp_path: Path) -> None:
    from pipeline.grid import Grid
    from pipeline.testing import write_tiles

    write_tiles(tmp_path / "tiles.zarr", Grid(300, 200, 0.5, 1.0, 1.0))
    code = (
        "import sys; from pathlib import Path; from pipeline.tiles import TileStore;"
        f"assert TileStore.open(Path({str(tmp_path / 'tiles.zarr')!r})).read(0, 0, 300, 200).min() < 255;"
        "sys.exit('zarr is imported' if 'zarr' in sys.modules else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
