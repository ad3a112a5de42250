"""Label maps of the nuclei: the very pixels, whatever the chunks and workers, and what other programs read of them."""

from __future__ import annotations

import errno
import itertools
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from pipeline import label_export
from pipeline import testing as fabricated
from pipeline.cli import main
from pipeline.errors import PipelineError
from pipeline.kernels.contours import outlines, pixel_runs, polygon_wkb
from pipeline.label_export import OutlineReader, level_shapes, paint_band, run_labels, write_labels
from pipeline.layout import RunLayout
from pipeline.stores.grid import Grid
from pipeline.stores.nuclei import nuclei_schema
from pipeline.stores.seal import check_seal
from pipeline.testing import pixels_of


def in_order(labels: np.ndarray) -> np.ndarray:
    """The instances numbered by their first pixels, as ids are."""
    values, first = np.unique(labels, return_index=True)
    values, first = values[values > 0], first[values > 0]
    numbers = np.zeros(int(labels.max(initial=0)) + 1, np.int32)
    numbers[values[np.argsort(first)]] = np.arange(1, len(values) + 1)
    return numbers[labels]


def field(height: int, width: int, seed: int, smooth: float = 1.5) -> np.ndarray:
    """Instances of every size that touch at sides and corners, with holes and others in them."""
    rng = np.random.default_rng(seed)
    noise = ndimage.gaussian_filter(rng.normal(size=(height, width)), smooth)
    kinds = np.digitize(noise, np.quantile(noise, [0.3, 0.7])) if height * width > 1 else np.ones((1, 1), int)
    labels = np.zeros((height, width), np.int32)
    for kind in (1, 2):
        found, _ = ndimage.label(kinds == kind, np.ones((3, 3)))
        labels += np.where(found > 0, found + labels.max(), 0).astype(np.int32)
    return in_order(labels)


def write_table(path: Path, labels: np.ndarray, grid: Grid, rows: int = 1 << 14) -> Path:
    """Write a label map's instances as the stages do, in row groups of so many."""
    runs, starts = pixel_runs(pixels_of(labels))
    shapes = outlines(runs, starts)
    shapes = replace(shapes, points=shapes.points * np.array([grid.scale_x, grid.scale_y]) / 2)
    data, offsets = polygon_wkb(shapes)
    first = runs[starts[:-1]].astype(np.uint64)
    count = len(first)
    schema = nuclei_schema({"slide": "a", "grid": grid.to_json(), "classes": [], "model": {}})
    geometry = pa.BinaryArray.from_buffers(
        pa.binary(), count, [None, pa.py_buffer(offsets.astype(np.int32)), pa.py_buffer(data)]
    )
    columns = [
        pa.array(first[:, 0] << np.uint64(32) | first[:, 1]), geometry, pa.array(["x"] * count, pa.string()),
        pa.array(np.zeros(count, np.uint8)), pa.array(np.ones(count, np.float32)),
    ]  # fmt: skip
    pq.write_table(pa.table(columns, schema=schema), path, row_group_size=rows)
    return path


@contextmanager
def sizes(chunk: int, smallest: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(label_export, "CHUNK", chunk)
        patch.setattr(label_export, "SMALLEST", smallest)
        yield


def levels_of(path: Path) -> list[np.ndarray]:
    group = zarr.open_group(path, mode="r")
    (multiscale,) = group.attrs["ome"]["multiscales"]  # type: ignore[index, call-overload]
    return [np.asarray(group[item["path"]]) for item in multiscale["datasets"]]  # type: ignore[index, call-overload]


def assert_levels(found: list[np.ndarray], labels: np.ndarray) -> None:
    for level, pixels in enumerate(found):
        assert pixels.dtype == np.uint32
        np.testing.assert_array_equal(pixels, labels[:: 2**level, :: 2**level])


@settings(max_examples=25)
@given(
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    seed=st.integers(0, 10**6),
    smooth=st.sampled_from([0.4, 1.5, 4.0]),
    chunk=st.sampled_from([8, 16, 30, 64]),
    rows=st.sampled_from([1, 7, 1 << 14]),
    workers=st.integers(1, 3),
    mpp=st.tuples(st.sampled_from([0.25, 0.2527, 0.1]), st.sampled_from([0.25, 0.2498, 1.1])),
)
def test_pixels_are_those_of_the_nuclei(
    height: int, width: int, seed: int, smooth: float, chunk: int, rows: int, workers: int, mpp: tuple[float, float]
) -> None:
    labels = field(height, width, seed, smooth)
    grid = Grid(width, height, 0.5, 0.5 / mpp[0], 0.5 / mpp[1])
    with tempfile.TemporaryDirectory() as folder, sizes(chunk, 20):
        table = write_table(Path(folder, "nuclei.parquet"), labels, grid, rows)
        done = write_labels(table, Path(folder, "a.zarr"), workers=workers)
        assert_levels(levels_of(Path(folder, "a.zarr")), labels)
    assert (done["nuclei"], done["shape"]) == (labels.max(), [height, width])
    assert done["levels"] == 1 + max(0, int(np.ceil(np.log2(max(height, width) / 20))))


def test_far_from_the_corner_of_a_large_slide(tmp_path: Path) -> None:
    labels = np.zeros((100_000, 40), np.int32)
    labels[-60:] = field(60, 40, 1)
    table = write_table(tmp_path / "n.parquet", labels, Grid(40, 100_000, 0.5, 0.5 / 0.2527, 0.5 / 0.2498))
    write_labels(table, tmp_path / "a.zarr")
    assert_levels(levels_of(tmp_path / "a.zarr"), labels)
    chunks = [path for path in (tmp_path / "a.zarr" / "0" / "c").rglob("*") if path.is_file()]
    assert len(chunks) == 1  # empty ones are none


def test_tall_nuclei_and_single_pixels(tmp_path: Path) -> None:
    labels = np.zeros((200, 70), np.int32)
    labels[3:190, 30:34] = 1  # over many bands
    labels[3, 5:60] = 1
    singles = [(0, 0), (199, 69), (15, 15), (16, 17), (15, 64), *((row, 36) for row in range(12, 190, 9))]
    for number, place in enumerate(singles, 2):
        labels[place] = number
    labels = in_order(labels)
    with sizes(16, 50):
        write_labels(write_table(tmp_path / "n.parquet", labels, Grid(70, 200, 0.5, 2.0, 2.0), 3), tmp_path / "a.zarr")
    assert_levels(levels_of(tmp_path / "a.zarr"), labels)


@pytest.mark.parametrize("refine", [1, 2])
def test_map_is_that_of_the_instances_stage(tmp_path: Path, refine: int) -> None:
    from pipeline.instances import write_instances
    from pipeline.kernels.instances import InstanceRules, segment
    from pipeline.models.package import ModelPackage, NucleusClass
    from pipeline.stores.maps import MapStore

    rng = np.random.default_rng(3)
    smooth = ndimage.gaussian_filter(rng.normal(size=(2, 300, 260)), (0, 3, 3))
    maps = np.clip(smooth * 1500 + 128, 0, 255).astype(np.uint8)
    grid = Grid(260, 300, 0.5, 0.5 / 0.2527, 0.5 / 0.2498)
    store = MapStore.create(tmp_path / "m.zarr", grid, ("nucleus", "distance"), np.ones((5, 5), bool), (64, 64))
    store.array[:] = maps
    package = ModelPackage(
        name="m", mpp=0.5, patch=64, overlap=16, network="unet", network_args={}, heads=("nucleus", "distance"),
        classes=(NucleusClass("Nucleus", (1, 2, 3)),), stain={}, thresholds=InstanceRules(min_area=1, refine=refine),
        licence="", description="", data=(), metrics={}, sha256="0", folder=tmp_path,
    )  # fmt: skip
    table = tmp_path / "instances.parquet"
    write_instances(tmp_path / "m.zarr", package, table, slide="a", block=128, halo=16, workers=1)
    expected = in_order(segment(maps, package.thresholds))
    assert expected.max() > 50
    with sizes(64, 100):
        write_labels(table, tmp_path / "a.zarr")
    assert_levels(levels_of(tmp_path / "a.zarr"), expected)


def test_bytes_do_not_depend_on_workers(tmp_path: Path) -> None:
    table = write_table(tmp_path / "n.parquet", field(300, 200, 5), Grid(200, 300, 0.5, 2.0, 2.0), 20)
    found = set()
    with sizes(32, 40):
        for workers in (1, 4):
            write_labels(table, tmp_path / f"{workers}.zarr", workers=workers)
            found.add(fabricated.digest(tmp_path / f"{workers}.zarr"))
    assert len(found) == 1


def test_a_band_reads_what_reaches_into_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = np.zeros((640, 40), np.int32)
    labels[np.arange(10, 640, 10), 5] = np.arange(1, 64)
    labels[15:300, 20] = 64
    labels = in_order(labels)
    table = write_table(tmp_path / "n.parquet", labels, Grid(40, 640, 0.5, 2.0, 2.0), 8)
    read: dict[int, list[int]] = {}
    outlines_of = OutlineReader.outlines

    def counting(self: OutlineReader, group: int) -> Any:
        read[-1].append(group)
        return outlines_of(self, group)

    def band(nuclei: OutlineReader, groups: list[int], top: int, array: Any) -> int:
        read[-1] = []
        pixels = paint_band(nuclei, groups, top, array)
        read[top] = read[-1]
        return pixels

    read[-1] = []
    monkeypatch.setattr(OutlineReader, "outlines", counting)
    monkeypatch.setattr(label_export, "paint_band", band)
    with sizes(64, 1000):
        write_labels(table, tmp_path / "a.zarr")
    spans = [np.flatnonzero(np.isin(labels, range(8 * g + 1, 8 * g + 9)).any(axis=1))[[0, -1]] for g in range(8)]
    for top in range(0, 640, 64):
        assert read[top] == [g for g, (first, last) in enumerate(spans) if first < top + 64 and last >= top]
    assert sum(map(len, read.values())) < 30
    assert_levels(levels_of(tmp_path / "a.zarr"), labels)


def test_what_other_programs_read(tmp_path: Path) -> None:
    labels = field(130, 90, 2)
    with sizes(64, 40):
        write_labels(write_table(tmp_path / "n.parquet", labels, Grid(90, 130, 0.5, 2.0, 2.0)), tmp_path / "a.ome.zarr")
    meta = json.loads((tmp_path / "a.ome.zarr" / "zarr.json").read_text())
    assert (meta["zarr_format"], meta["node_type"]) == (3, "group")
    ome = meta["attributes"]["ome"]
    assert ome["version"] == "0.5"
    assert ome["image-label"] == {"version": "0.5", "source": {"table": "../nuclei.parquet", "row": "label - 1"}}
    (multiscale,) = ome["multiscales"]
    assert multiscale["axes"] == [{"name": axis, "type": "space", "unit": "micrometer"} for axis in ("y", "x")]
    assert [item["path"] for item in multiscale["datasets"]] == ["0", "1", "2"]
    for level, item in enumerate(multiscale["datasets"]):
        scale, *rest = item["coordinateTransformations"]
        assert scale == {"type": "scale", "scale": [0.5 * 2**level] * 2}
        expected = [{"type": "translation", "translation": [(2**level - 1) * 0.25] * 2}] if level else []
        assert rest == expected
        array = json.loads((tmp_path / "a.ome.zarr" / str(level) / "zarr.json").read_text())
        assert (array["data_type"], array["fill_value"], array["dimension_names"]) == ("uint32", 0, ["y", "x"])
        assert array["chunk_grid"]["configuration"]["chunk_shape"] == [64, 64]
        assert [codec["name"] for codec in array["codecs"]] == ["bytes", "zstd", "crc32c"]
    assert meta["attributes"]["nuclei"]["slide"] == "a"
    # As the documentation has it.
    np.testing.assert_array_equal(da.from_zarr(tmp_path / "a.ome.zarr", component="0").compute(), labels)


@pytest.mark.parametrize(
    ("shape", "levels"), [((1, 1), 1), ((1024, 1024), 1), ((1025, 10), 2), ((10, 4096), 3), ((70_000, 5_001), 8)]
)
def test_levels(shape: tuple[int, int], levels: int) -> None:
    found = level_shapes(*shape)
    assert len(found) == levels
    assert max(found[-1]) <= 1024
    for (h, w), (small_h, small_w) in itertools.pairwise(found):
        assert (len(range(0, h, 2)), len(range(0, w, 2))) == (small_h, small_w)


def test_no_nuclei(tmp_path: Path) -> None:
    table = write_table(tmp_path / "n.parquet", np.zeros((2100, 300), np.int32), Grid(300, 2100, 0.5, 2.0, 2.0))
    done = write_labels(table, tmp_path / "a.zarr")
    assert (done["nuclei"], done["levels"]) == (0, 3)
    assert not any(pixels.any() for pixels in levels_of(tmp_path / "a.zarr"))
    assert sorted(path.name for path in (tmp_path / "a.zarr").rglob("*") if path.is_file()) == ["zarr.json"] * 4


def test_stage(tmp_path: Path) -> None:
    paths = fabricated.write_slide(tmp_path, "s 1", count=300)
    arguments = [
        "labels", "--slide=s 1", f"--measure={paths.measure}", f"--nuclei={paths.nuclei}", f"--out={paths.labels}",
        f"--zarr={paths.labels_zarr}", "--workers=2",
    ]  # fmt: skip
    assert main(arguments) == 0
    manifest = json.loads(paths.labels.read_text())
    assert (manifest["stage"], manifest["status"], manifest["nuclei"]) == ("labels", "ok", 300)
    assert (manifest["shape"], manifest["levels"]) == ([900, 1200], 2)
    assert manifest["mp_per_s"] > 0
    assert set(np.unique(levels_of(paths.labels_zarr)[0])) <= set(range(301))
    check_seal(paths.labels_zarr)
    assert not list(paths.root.glob(".part-*"))


def test_failed_slide_is_passed_on(tmp_path: Path) -> None:
    paths = fabricated.write_failed_slide(tmp_path, "bad", "inspect", "cannot be opened", "copy it again")
    paths.labels_zarr.mkdir()  # of an earlier run
    (paths.labels_zarr / "zarr.json").write_text("{}")
    manifest = run_labels("bad", paths.measure, paths.nuclei, paths.labels, paths.labels_zarr)
    assert (manifest["status"], manifest["failure"]["stage"]) == ("failed", "inspect")
    assert [path.name for path in paths.labels_zarr.iterdir()] == ["FAILED.txt"]
    assert "failed at inspect" in (paths.labels_zarr / "FAILED.txt").read_text()


def test_full_disk_is_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(label_export, "paint_runs", full)
    paths = fabricated.write_slide(tmp_path, "a", count=10)
    files = [f"--{name}={path}" for name, path in (("measure", paths.measure), ("nuclei", paths.nuclei))]
    assert main(["labels", "--slide=a", *files, f"--out={paths.labels}", f"--zarr={paths.labels_zarr}"]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert not paths.labels.exists()
    assert not list(paths.root.glob("*nuclei.ome.zarr"))


def test_what_is_no_table_is_one_line(tmp_path: Path) -> None:
    paths = RunLayout(tmp_path).slide("a")
    paths.root.mkdir(parents=True)
    paths.nuclei.write_text("nonsense")
    with pytest.raises(PipelineError, match="not a table of nuclei"):
        write_labels(paths.nuclei, tmp_path / "a.zarr")
