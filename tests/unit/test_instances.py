"""Exactness: the nuclei do not depend on blocks, halo, workers or order."""

from __future__ import annotations

import hashlib
import heapq
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shapely
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import ndimage

from pipeline import instances
from pipeline.census import slide as census_module
from pipeline.census.seams import Seams
from pipeline.census.slide import slide_nuclei
from pipeline.census.worker import Block, Seam, Setup
from pipeline.cli import main
from pipeline.errors import PipelineError
from pipeline.evaluation.metrics import score
from pipeline.export import write_geojson
from pipeline.instances import write_instances
from pipeline.kernels.instances import (
    MARKER_SOURCES,
    Channels,
    InstanceRules,
    marker_map,
    refined,
    segment,
    standing_out,
)
from pipeline.models.package import ModelPackage, NucleusClass
from pipeline.stores.grid import Grid
from pipeline.stores.maps import MapStore
from pipeline.stores.nuclei import grid_of, read_nuclei

ROOT = Path(__file__).parents[2]


def geometries(table: pa.Table) -> np.ndarray:
    """Polygons of a table of nuclei."""
    return np.asarray(shapely.from_wkb(table.column("geometry").to_numpy(zero_copy_only=False)))


RULES = InstanceRules(nucleus=128, marker=140, min_marker=2, min_area=4, max_hole=20)


def random_maps(height: int, width: int, seed: int, density: float = 0.5) -> np.ndarray:
    """Maps with nuclei and clumps of every size, some cut by the slide's edges."""
    rng = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(rng.normal(size=(height, width)), rng.uniform(1.0, 4.0))
    nucleus = smooth / max(np.abs(smooth).max(), 1e-9)
    nucleus = np.clip((nucleus * 1.2 + density) * 255, 0, 255).astype(np.uint8)
    distance = np.clip(ndimage.gaussian_filter(rng.normal(size=(height, width)), 2) * 600 + 128, 0, 255)
    return np.stack([nucleus, distance.astype(np.uint8)])


def hard_maps(size: int, seed: int = 1) -> np.ndarray:
    """Maps with everything that is hard at seams, on a field of ``size x size`` pixels."""
    rng = np.random.default_rng(seed)
    maps = random_maps(size, size, seed, 0.42)
    for x, y in itertools.product((0, size // 2, size - 1), repeat=2):  # borders, corners, middles of sides
        maps[:, max(y - 6, 0) : y + 7, max(x - 6, 0) : x + 7] = 255
    # A clump larger than most blocks: rings around the middle, joined by spokes, holes of all sizes between them.
    y, x = np.mgrid[:size, :size] - size // 2
    radius = np.hypot(x, y)
    clump = (radius < 0.37 * size) & ((radius % 40 < 17) | (np.abs(x) < 3) | (np.abs(y) < 3))
    maps[0][clump] = np.maximum(maps[0][clump], 180)
    ones = rng.integers(0, size, (2, size))  # nuclei of one pixel, and holes of one pixel
    maps[0, ones[0], ones[1]] = np.where(rng.random(size) < 0.5, 255, 0)
    # Whole empty tiles.
    maps[:, size // 2 : size // 2 + 256, : size // 8] = 0
    maps[:, : size // 10, size // 2 + 40 :] = 0
    return maps


ALL_MAPS = ("nucleus", "distance", "contour", "h", "v")
MODES = {
    "hv": InstanceRules(marker=132, min_marker=2, min_area=4, max_hole=20, markers="hv"),
    "contour": InstanceRules(marker=70, min_marker=2, min_area=4, max_hole=20, markers="contour"),
    "nucleus": InstanceRules(marker=8, min_marker=1, min_area=4, max_hole=20, markers="nucleus", depth=4, smooth=1.0),
    "smooth distance": InstanceRules(marker=100, min_marker=2, min_area=4, max_hole=20, smooth=1.5, depth=10),
}


def all_maps(height: int, width: int, seed: int, density: float = 0.5) -> np.ndarray:
    """Maps of every head; h and v bend back and forth as they do over many nuclei."""
    rng = np.random.default_rng(seed + 1)
    waves = [ndimage.gaussian_filter(rng.normal(size=(height, width)), 3) * 1500 + 128 for _ in range(2)]
    contour = ndimage.gaussian_filter(rng.normal(size=(height, width)), 1.5) * 500 + 60
    extra = np.clip(np.stack([contour, *waves]), 0, 255).astype(np.uint8)
    return np.concatenate([random_maps(height, width, seed, density), extra])


def make_store(
    path: Path,
    maps: np.ndarray,
    chunk: tuple[int, int] = (37, 53),
    names: tuple[str, ...] = ("nucleus", "distance"),
) -> Path:
    height, width = maps.shape[1:]
    grid = Grid(width, height, 0.5, 2.0, 2.0)
    cells = np.pad(maps[0], ((0, -height % 64), (0, -width % 64))).reshape(-(-height // 64), 64, -(-width // 64), 64)
    store = MapStore.create(path, grid, names, cells.any(axis=(1, 3)), chunk)
    store.array[:] = maps
    return path


def label_map(nuclei: pa.Table, height: int, width: int) -> np.ndarray:
    labels = np.zeros((height, width), np.int32)
    for index, runs in enumerate(nuclei.column("runs").to_pylist(), start=1):
        for row, start, end in np.array(runs, np.int32).reshape(-1, 3):
            assert (labels[row, start:end] == 0).all(), "two nuclei share a pixel"
            labels[row, start:end] = index
    return labels


def same_partition(a: np.ndarray, b: np.ndarray) -> bool:
    pairs = np.unique(np.stack([a.ravel(), b.ravel()]), axis=1)
    return len(np.unique(pairs[0])) == len(np.unique(pairs[1])) == pairs.shape[1]


def plain_flood(distance: np.ndarray, mask: np.ndarray, markers: np.ndarray) -> np.ndarray:
    """The flood as its definition says it: markers in raster order, then by the height of the way, then by time."""
    labels = markers.copy()
    queue = [(-1, rank, int(p)) for rank, p in enumerate(np.flatnonzero(markers))]
    time, (height, width) = len(queue), mask.shape
    while queue:
        height_here, _, place = heapq.heappop(queue)
        row, column = divmod(place, width)
        for r, c in ((row - 1, column), (row, column - 1), (row, column + 1), (row + 1, column)):
            if 0 <= r < height and 0 <= c < width and mask[r, c] and not labels[r, c]:
                labels[r, c] = labels[row, column]
                heapq.heappush(queue, (max(255 - int(distance[r, c]), height_here), time, r * width + c))
                time += 1
    return labels


def plain_nuclei(maps: np.ndarray, rules: InstanceRules) -> np.ndarray:
    """Nuclei component by component, as the documentation has it."""
    result, used = np.zeros(maps.shape[1:], np.int32), 0
    front = maps[0] >= rules.nucleus
    components, count = ndimage.label(front)
    for component in range(1, count + 1):
        mask = components == component
        if mask.sum() < rules.min_area:
            continue
        holes, found = ndimage.label(~np.pad(mask, 1), np.ones((3, 3)))
        outside, holes = holes[0, 0], holes[1:-1, 1:-1]
        for hole in set(range(1, found + 1)) - {outside}:
            here = holes == hole
            if here.sum() <= rules.max_hole and not front[here].any():
                mask = mask | here
        markers, found = ndimage.label(mask & (maps[1] >= rules.marker), np.ones((3, 3)))
        for marker in range(1, found + 1):
            if (markers == marker).sum() < rules.min_marker:
                markers[markers == marker] = 0
        labels = mask.astype(np.int32)
        if len(np.unique(markers)) > 2:
            labels = plain_flood(maps[1], mask, markers)
        for label in np.unique(labels[labels > 0]):
            if (labels == label).sum() >= rules.min_area:
                used += 1
                result[labels == label] = used
    return result


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    height=st.integers(1, 60),
    width=st.integers(1, 60),
    density=st.floats(0.3, 0.7),
    marker=st.integers(1, 255),
    smallest=st.integers(0, 6),
    hole=st.integers(0, 40),
)
def test_nuclei_are_what_the_definition_says(
    seed: int, height: int, width: int, density: float, marker: int, smallest: int, hole: int
) -> None:
    maps = random_maps(height, width, seed, density)
    rules = InstanceRules(128, marker, smallest, smallest, hole)
    found, expected = segment(maps, rules), plain_nuclei(maps, rules)
    np.testing.assert_array_equal(found > 0, expected > 0)
    assert same_partition(found, expected)


def test_markers_of_components_that_touch_at_a_corner_stay_apart() -> None:
    # Each component has two markers; those in the middle touch those of the other component at the corners.
    maps = np.zeros((2, 12, 12), np.uint8)
    maps[0, :6, :6] = maps[0, 6:, 6:] = 200
    maps[1, 5, 5] = maps[1, 6, 6] = maps[1, 0, 0] = maps[1, 11, 11] = 200
    rules = InstanceRules(128, 150, 1, 1, 0)
    found = segment(maps, rules)
    assert found.max() == 4
    assert same_partition(found, plain_nuclei(maps, rules))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**31),
    height=st.integers(1, 150),
    width=st.integers(1, 150),
    density=st.floats(0.3, 0.7),
    block=st.integers(8, 160),
    halo=st.integers(0, 40),
    shuffle=st.randoms(use_true_random=False),
)
def test_any_blocks_in_any_order_give_the_whole(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    height: int,
    width: int,
    density: float,
    block: int,
    halo: int,
    shuffle: random.Random,
) -> None:
    maps = random_maps(height, width, seed, density)
    path = make_store(tmp_path_factory.mktemp("maps") / "maps.zarr", maps)
    whole = slide_nuclei(path, RULES, block=1000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(census_module, "slide_blocks", shuffled(shuffle))
        assert slide_nuclei(path, RULES, block=block, halo=halo).equals(whole)
    ids = whole.column("id").to_numpy()
    assert (ids[1:] > ids[:-1]).all()
    assert same_partition(label_map(whole, height, width), segment(maps, RULES))


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**31),
    height=st.integers(1, 120),
    width=st.integers(1, 120),
    density=st.floats(0.35, 0.7),
    block=st.integers(16, 120),
    halo=st.integers(0, 30),
)
def test_any_blocks_give_the_whole_for_every_kind_of_marker(
    tmp_path_factory: pytest.TempPathFactory,
    mode: str,
    seed: int,
    height: int,
    width: int,
    density: float,
    block: int,
    halo: int,
) -> None:
    rules = MODES[mode]
    maps = all_maps(height, width, seed, density)
    path = make_store(tmp_path_factory.mktemp("maps") / "maps.zarr", maps, names=ALL_MAPS)
    whole = slide_nuclei(path, rules, block=1000)
    assert slide_nuclei(path, rules, block=block, halo=halo).equals(whole)
    assert same_partition(label_map(whole, height, width), segment(maps, rules, Channels.of(ALL_MAPS)))


@pytest.mark.parametrize("mode", MODES)
def test_every_kind_of_marker_divides(mode: str) -> None:
    maps = all_maps(250, 250, 4, 0.62)
    components = ndimage.label(maps[0] >= 128)[1]
    assert segment(maps, MODES[mode], Channels.of(ALL_MAPS)).max() > components


def shuffled(source: random.Random) -> Callable[[MapStore, int], list[Block]]:
    blocks = census_module.slide_blocks

    def shuffled_blocks(store: MapStore, side: int) -> list[Block]:
        return source.sample(found := blocks(store, side), len(found))

    return shuffled_blocks


def package(folder: Path, rules: InstanceRules = RULES, classes: int = 1) -> Path:
    """A model's folder as the instances stage needs it."""
    import json

    names = tuple(NucleusClass(f"c{i}", (i, 2, 3)) for i in range(classes))
    weights = b"none"
    card = ModelPackage(
        "m", 0.5, 64, 8, "resunet", {}, ("nucleus", "distance", "type")[: 2 + (classes > 1)], names,
        {"method": "none", "reference": {}}, rules, "CC0", "", (), {}, hashlib.sha256(weights).hexdigest(),
    )  # fmt: skip
    folder.mkdir()
    (folder / "model.json").write_text(json.dumps(card.to_json()))
    (folder / "weights.safetensors").write_bytes(weights)
    return folder


def test_one_digest_of_the_whole_slide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command gives the same bytes for all blocks, halos, workers and orders."""
    size = 2100
    maps = hard_maps(size)
    rng = np.random.default_rng(3)
    types = [ndimage.zoom(rng.integers(0, 256, (size // 30, size // 30)), 30, order=0) for _ in range(3)]
    maps = np.concatenate([maps, np.array(types, np.uint8)])
    store = make_store(
        tmp_path / "maps.zarr", maps, (256, 1024), ("nucleus", "distance", "type:background", "type:0", "type:1")
    )
    model = package(tmp_path / "model", InstanceRules(128, 140, 2, 1, 20), classes=2)
    digests = set()
    runs = [*itertools.product((256, 512, 1000, 2048, 10_000), (1,)), (256, 2), (512, 4), (1000, 4), (2048, 2)]
    for number, (block, workers) in enumerate(runs):
        monkeypatch.setattr(census_module, "WORKER_MEGAPIXELS", 0.1)
        if number % 2:
            monkeypatch.setattr(census_module, "slide_blocks", shuffled(random.Random(number)))
        out = tmp_path / f"{number}" / "nuclei.parquet"
        out.parent.mkdir()
        options = [f"--block={block}", f"--halo={(0, 16, 128)[number % 3]}", f"--workers={workers}"]
        assert main(["instances", f"--maps={store}", f"--model={model}", f"--out={out}", *options]) == 0
        write_geojson(out, geojson := out.with_suffix(".geojson.gz"), "s")
        digests.add((hashlib.sha256(out.read_bytes()).hexdigest(), hashlib.sha256(geojson.read_bytes()).hexdigest()))
        monkeypatch.undo()
    assert len(digests) == 1
    nuclei = read_nuclei(out)
    classes, areas = nuclei.column("class_id").to_numpy(), shapely.area(geometries(nuclei)) / 4
    assert nuclei.num_rows > 5000
    assert (areas == 0.5).sum() > 20, "nuclei of one pixel"
    assert set(classes.tolist()) == {0, 1}
    first = nuclei.column("id").to_numpy()
    rows, columns = (first >> np.uint64(32)).astype(int), (first & np.uint64(0xFFFFFFFF)).astype(int)
    ends = np.array([np.array(r).reshape(-1, 3).max(axis=0) for r in nuclei.column("runs").to_pylist()])
    assert {rows.min(), columns.min(), ends[:, 0].max() + 1 - size, ends[:, 2].max() - size} == {0}


def test_workers_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(census_module, "WORKER_MEGAPIXELS", 0.01)
    path = make_store(tmp_path / "maps.zarr", random_maps(200, 200, 7, 0.5))
    whole = slide_nuclei(path, RULES, block=200)
    assert whole.num_rows > 20
    assert slide_nuclei(path, RULES, block=64, workers=2).equals(whole)


def test_maps_of_another_model_are_refused(tmp_path: Path) -> None:
    # A training may replace the package between two stages of a slide.
    maps, manifest = make_store(tmp_path / "maps.zarr", random_maps(64, 64, 7)), tmp_path / "maps.json"
    package = ModelPackage.load(ROOT / "models" / "hematoxylin")
    options = {"slide": "a", "maps": maps, "model": package.folder, "maps_manifest": manifest}
    for sha256, fine in ((package.sha256, True), ("0" * 64, False)):
        about = {"stage": "infer", "status": "ok", "model": {"name": "other", "sha256": sha256}}
        manifest.write_text(json.dumps(about))
        if fine:
            instances.run_instances(out=tmp_path / "a.parquet", **options)
            continue
        with pytest.raises(PipelineError, match=r"hematoxylin holds another model .*\(other, 000000000000\)"):
            instances.run_instances(out=tmp_path / "b.parquet", **options)
    assert not (tmp_path / "b.parquet").exists()


PROCESSES = """
import os, signal, sys, threading, time
from pathlib import Path
import pipeline.census.slide as census
from pipeline.census.worker import Setup
from pipeline.kernels.instances import InstanceRules

if __name__ == "__main__":
    census.WORKER_MEGAPIXELS = 0.01
    maps, how, what = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    if how != "fork":
        threading.Thread(target=time.sleep, args=(600,), daemon=True).start()  # with which no process is forked
    forked = census._forked
    census._forked = lambda *args: print("fork") or forked(*args)
    if what == "nuclei":
        print(len(census.slide_nuclei(maps, InstanceRules(min_area=1), block=64, workers=3)))
    else:
        setup = Setup(maps, InstanceRules(), ("Nucleus",), maps.parent)
        pool = census._processes(setup, 2)
        print(pool.submit(os.getpid).result() != os.getpid(), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
"""
"""A program that does something with processes of both kinds."""


@pytest.mark.parametrize("how", ["fork", "forkserver"])
def test_processes_of_both_kinds(tmp_path: Path, how: str) -> None:
    path = make_store(tmp_path / "maps.zarr", random_maps(200, 200, 7, 0.5))
    (tmp_path / "program.py").write_text(PROCESSES)
    program = [sys.executable, tmp_path / "program.py", path, how]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}

    def say(what: str) -> tuple[int, list[str]]:
        # What is written ends when all processes have ended.
        pipe = subprocess.PIPE
        done = subprocess.run([*program, what], env=environment, stdout=pipe, text=True, timeout=300, check=False)
        return done.returncode, done.stdout.split()

    forks = ["fork"] * (how == "fork" and sys.platform == "linux")
    whole = slide_nuclei(path, InstanceRules(min_area=1), block=200)
    assert say("nuclei") == (0, [*forks, str(len(whole))])
    assert say("be killed") == (-signal.SIGKILL, [*forks, "True"])


def test_small_slides_are_not_spread_over_processes() -> None:
    blocks = [Block(0, 0, 2048, 2048)] * 12
    assert [census_module.useful_workers(4, blocks[:n]) for n in (0, 1, 12)] == [1, 1, 1]
    assert [census_module.useful_workers(n, blocks * 10) for n in (1, 2, 4, 64)] == [1, 2, 4, 15]


def test_one_component_over_the_whole_slide(tmp_path: Path) -> None:
    maps = random_maps(200, 300, 11)
    maps[0] = 255
    path = make_store(tmp_path / "maps.zarr", maps)
    whole = slide_nuclei(path, RULES, block=500)
    assert whole.num_rows > 5
    assert slide_nuclei(path, RULES, block=32, halo=4).equals(whole)


class TestGiants:
    """Components that are too large to be looked at whole."""

    @staticmethod
    def nuclei(path: Path, block: int, halo: int = 4) -> pa.Table:
        return slide_nuclei(path, RULES, block=block, halo=halo, max_component=3000, cut=50)

    @settings(max_examples=6, deadline=None)
    @given(seed=st.integers(0, 2**31), density=st.floats(0.4, 0.65))
    def test_cut_the_same_for_all_blocks(
        self, tmp_path_factory: pytest.TempPathFactory, seed: int, density: float
    ) -> None:
        maps = random_maps(170, 230, seed, density)
        path = make_store(tmp_path_factory.mktemp("maps") / "maps.zarr", maps)
        whole = self.nuclei(path, 1000)
        for block in (23, 50, 64, 171):
            assert self.nuclei(path, block, block // 3).equals(whole)
        # Cut along the lines, and only there and only where the component is too large.
        expected = segment(maps, RULES)
        components, _ = ndimage.label(maps[0] >= RULES.nucleus)
        sides = [(y, x) for y in range(0, 170, 50) for x in range(0, 230, 50)]
        squares = {(y, x): np.s_[y : y + 50, x : x + 50] for y, x in sides}
        for label, box in enumerate(ndimage.find_objects(components), start=1):
            if np.prod([side.stop - side.start for side in box]) > 3000:
                names = np.unique(expected[(components == label) & (expected > 0)])
                expected[np.isin(expected, names)] = 0
                for number, square in enumerate(squares.values()):
                    pieces = segment(maps[(slice(None), *square)], RULES)
                    chosen = np.isin(pieces, np.unique(pieces[(components[square] == label) & (pieces > 0)]))
                    expected[square][chosen] = pieces[chosen] + 100_000 * (number + 1)
        found = label_map(whole, 170, 230)
        np.testing.assert_array_equal(found > 0, expected > 0)
        assert same_partition(found, expected)

    def test_are_counted_and_told_of(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        maps = np.zeros((2, 300, 300), np.uint8)
        maps[0, :, :200] = 255  # larger than max_component
        maps[:, 20:40, 220:240] = 255
        path = make_store(tmp_path / "maps.zarr", maps)
        monkeypatch.setattr(instances, "Setup", lambda *a: Setup(*a, max_component=10_000, cut=100))
        card = ModelPackage.load(package(tmp_path / "model"))
        found = write_instances(path, card, tmp_path / "out.parquet", slide="s", block=64, halo=8, workers=1)
        assert (found["components_cut"], found["nuclei"]) == (1, 7)
        assert "cut along a grid of 100 pixels" in caplog.text

    def test_work_grows_with_the_area_only(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        read: list[int] = []
        original = MapStore.read
        monkeypatch.setattr(MapStore, "read", lambda s, x, y, w, h: (read.append(w * h), original(s, x, y, w, h))[1])
        shares = []
        for size in (512, 1024):
            maps = np.full((2, size, size), 200, np.uint8)
            path = make_store(tmp_path / f"{size}.zarr", maps, (256, 256))
            read.clear()
            slide_nuclei(path, RULES, block=64, halo=8, max_component=128 * 128, cut=128)
            assert max(read) <= 129 * 128
            shares.append(sum(read) / size**2)
        assert shares[1] < 1.05 * shares[0] < 5

    def test_memory_does_not_grow_with_a_component_over_the_whole_slide(self, tmp_path: Path) -> None:
        peaks = []
        for size in (384, 768):
            maps = np.full((2, size, size), 200, np.uint8)
            path = make_store(tmp_path / f"{size}.zarr", maps, (256, 256))
            spool = tmp_path / f"{size}"
            spool.mkdir()
            setup = Setup(path, RULES, ("Nucleus",), spool, max_component=128 * 128, cut=128)
            tracemalloc.start()
            census = census_module.take_census(setup, block=64, halo=8)
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
            assert census.cut == 1
            assert sum(table.num_rows for table in census.batches()) == (size // 128) ** 2
        assert peaks[1] < 1.5 * peaks[0]


def test_seams_join_in_any_order() -> None:
    # A ladder of three blocks: a component in all of them, another in the first alone.
    def side(*values: int) -> np.ndarray:
        return np.array(values, np.int32)

    none = side(0, 0, 0)
    parts = {
        0: Seam(
            (none, side(1, 0, 2), none, none),
            np.array([5, 7]),
            np.array([[0, 0, 1, 3], [2, 0, 3, 3]]),
            np.array([False, True]),
        ),
        3: Seam((side(1, 1, 0), side(1, 0, 0), none, none), np.array([9]), np.array([[0, 3, 2, 6]]), np.array([False])),
        6: Seam((side(1, 0, 0), none, none, none), np.array([11]), np.array([[0, 6, 2, 7]]), np.array([False])),
    }
    for order in itertools.permutations(parts):
        seams = Seams(3)
        for y in order:
            seams.add(Block(0, y, 3, 3), parts[y])
        group, first, boxes, done = seams.parts()
        of = dict(zip(first.tolist(), group.tolist(), strict=True))
        assert of[5] == of[9] == of[11] != of[7]
        assert (len(boxes), done.sum()) == (4, 1)


@pytest.mark.parametrize("value", [0, 127])
def test_no_nuclei(tmp_path: Path, value: int) -> None:
    path = make_store(tmp_path / "maps.zarr", np.full((2, 50, 60), value, np.uint8))
    assert slide_nuclei(path, RULES, block=16).num_rows == 0
    card = ModelPackage.load(package(tmp_path / "model"))
    found = write_instances(path, card, tmp_path / "out.parquet", slide="s", block=64, halo=8, workers=1)
    assert found["nuclei"] == read_nuclei(tmp_path / "out.parquet").num_rows == 0


def test_one_pixel_nuclei(tmp_path: Path) -> None:
    maps = np.zeros((2, 64, 64), np.uint8)
    maps[:, ::4, ::4] = 255
    path = make_store(tmp_path / "maps.zarr", maps)
    rules = InstanceRules(min_area=1, min_marker=1)
    found = slide_nuclei(path, rules, block=16, halo=0)
    assert found.num_rows == 256
    assert (shapely.area(geometries(found)) == 0.5 * 4).all()  # half a grid pixel of 2 x 2 level-0 pixels


def test_touching_nuclei_are_divided(tmp_path: Path) -> None:
    maps = np.zeros((2, 40, 60), np.uint8)
    maps[0, 10:30, 10:50] = 255
    maps[1, 15:25, 14:26] = 250
    maps[1, 15:25, 34:46] = 250
    path = make_store(tmp_path / "maps.zarr", maps)
    areas = shapely.area(geometries(slide_nuclei(path, RULES, block=25))) / 4
    np.testing.assert_allclose(areas, [400, 400], atol=25)


def test_nuclei_outside_the_tissue_are_left_out(tmp_path: Path) -> None:
    maps = np.zeros((2, 40, 60), np.uint8)
    maps[:, 5:12, 5:12] = 255
    maps[:, 5:12, 40:47] = 255
    path = make_store(tmp_path / "maps.zarr", maps)
    found = slide_nuclei(path, RULES, tissue=shapely.box(0, 0, 60, 80))
    assert found.num_rows == 1
    assert geometries(found)[0].bounds == (10, 10, 24, 24)


class TestHoles:
    RING = np.pad(np.zeros((3, 3), bool), 2, constant_values=True)

    @staticmethod
    def filled(mask: np.ndarray, largest: int) -> np.ndarray:
        maps = np.pad(mask, 1).astype(np.uint8) * 255
        return (
            segment(np.stack([maps, maps]), InstanceRules(min_marker=1, min_area=3, max_hole=largest))[1:-1, 1:-1] > 0
        )

    def test_small_hole_is_filled(self) -> None:
        assert self.filled(self.RING, 9).all()

    def test_large_hole_is_left(self) -> None:
        np.testing.assert_array_equal(self.filled(self.RING, 8), self.RING)

    def test_hole_with_another_component_is_left(self) -> None:
        other = self.RING.copy()
        other[3, 3] = True
        np.testing.assert_array_equal(self.filled(other, 100), self.RING)

    def test_bay_is_no_hole(self) -> None:
        bay = self.RING.copy()
        bay[3, 4:] = False
        np.testing.assert_array_equal(self.filled(bay, 100), bay)

    def test_hole_at_the_slides_edge_is_left(self) -> None:
        maps = self.RING[2:].astype(np.uint8) * 255
        np.testing.assert_array_equal(
            segment(np.stack([maps, maps]), InstanceRules(min_area=1, max_hole=100)) > 0, self.RING[2:]
        )


def test_table_is_a_geoparquet(tmp_path: Path) -> None:
    path = make_store(tmp_path / "maps.zarr", random_maps(120, 100, 2))
    out = tmp_path / "out.parquet"
    found = write_instances(
        path, ModelPackage.load(package(tmp_path / "model")), out, slide="s", block=32, halo=8, workers=1
    )
    table = read_nuclei(out)
    assert found["nuclei"] == table.num_rows > 10
    digest = hashlib.sha256(table.column("id").to_numpy().tobytes() + table.column("class_id").to_numpy().tobytes())
    for polygon in table.column("geometry").to_pylist():
        digest.update(polygon)
    assert found["digest"] == digest.hexdigest()
    assert grid_of(table) == Grid(100, 120, 0.5, 2.0, 2.0)
    assert (shapely.get_type_id(geometries(table)) == 3).all()
    assert 0.5 < table.column("probability").to_numpy().min() <= table.column("probability").to_numpy().max() <= 1
    assert b"geo" in pq.read_schema(out).metadata
    assert list(tmp_path.glob(".part-*")) == []


def test_groups_in_a_table_do_not_tell_of_the_blocks() -> None:
    table = pa.table({"id": np.arange(100)})
    for pieces in ([100], [1, 99], [30, 30, 40], [10] * 10):
        starts = np.cumsum([0, *pieces[:-1]])
        parts = [table.slice(a, n) for a, n in zip(starts, pieces, strict=True)]
        groups = list(instances.regroup(parts, 32))
        assert [g.num_rows for g in groups] == [32, 32, 32, 4]
        assert pa.concat_tables(groups).equals(table)
        assert all(g.column("id").num_chunks == 1 for g in groups)


def two_discs(radius: int = 12, apart: int = 20) -> np.ndarray:
    """Label map of two nuclei that touch."""
    y, x = np.mgrid[:50, :80]
    labels = np.zeros((50, 80), np.int32)
    labels[(y - 25) ** 2 + (x - 28 - apart) ** 2 <= radius**2] = 2
    labels[((y - 25) ** 2 + (x - 28) ** 2 <= radius**2) & ((x < 28 + apart / 2) | (labels == 0))] = 1
    return labels


@pytest.mark.parametrize("markers", MARKER_SOURCES)
def test_true_maps_give_the_nuclei_back(markers: str) -> None:
    from pipeline.training.labels import craft_contour, craft_distance, craft_hv

    labels = two_discs()
    assert ndimage.label(labels)[1] == 1
    hv = np.round(128 + 127 * np.moveaxis(craft_hv(labels), 2, 0))
    plain = np.round(255 * np.stack([labels > 0, craft_distance(labels), craft_contour(labels)]))
    maps = np.concatenate([plain, hv]).astype(np.uint8)
    found = segment(maps, InstanceRules.default_for(markers), Channels.of(ALL_MAPS))
    assert found.max() == 2
    assert score(labels, found)["aji"] > 0.9


def test_the_channels_are_found_by_name() -> None:
    names = ("nucleus", "h", "v", "type:background", "type:a")
    channels = Channels.of(names)
    assert (channels.nucleus, channels.hv, channels.types, channels.distance) == (0, 1, 3, None)
    assert channels.marker_source == "hv"
    with pytest.raises(ValueError, match="contour map, which is not there"):
        marker_map(np.zeros((5, 4, 4), np.uint8), np.ones((4, 4), bool), "contour", channels)


def test_h_and_v_rise_within_a_nucleus_and_fall_between_two() -> None:
    h = np.tile(np.r_[np.linspace(0, 255, 21), np.linspace(0, 255, 21)].astype(np.uint8), (40, 1))
    v = np.tile(np.linspace(0, 255, 40).astype(np.uint8)[:, None], (1, 42))
    maps = np.stack([np.full_like(h, 255), h, v])
    found = marker_map(maps, np.ones(h.shape, bool), "hv", Channels(hv=1))
    assert found[5:-5, 5:15].min() > 140
    assert found[5:-5, 20:22].max() < 60


def test_standing_out() -> None:
    values = np.array([[0, 9, 7, 8, 3, 20, 0]], np.uint8)
    assert standing_out(values, 1).tolist() == [[False, True, False, False, False, True, False]]
    assert standing_out(values, 3)[0].nonzero()[0].tolist() == [1, 2, 3, 5]  # down to 7, the lower top goes along
    assert standing_out(values, 8)[0].nonzero()[0].tolist() == [5]
    assert standing_out(np.full((3, 3), 5, np.uint8), 9).all()


def test_small_components_are_not_divided_by_their_depth() -> None:
    mask = two_discs(4, 6) > 0
    rules = InstanceRules.default_for("nucleus")
    assert segment(255 * mask[None].astype(np.uint8), rules, Channels()).max() == 1


def test_rules_know_their_markers() -> None:
    with pytest.raises(ValueError, match="markers must be one of"):
        InstanceRules(markers="magic")
    with pytest.raises(ValueError, match="depth must not be negative"):
        InstanceRules(depth=-1)
    assert InstanceRules.default_for("distance") == InstanceRules()


def test_classes_come_from_the_maps_of_the_types(tmp_path: Path) -> None:
    names = ("nucleus", "h", "v", "type:background", "type:a", "type:b", "type:c")
    maps = np.zeros((7, 40, 60), np.uint8)
    for column, kind in ((5, 4), (25, 6)):
        maps[[0, 3], 5:15, column : column + 10] = 200  # the background's own map plays no part
        maps[kind, 5:15, column : column + 10] = 55
    path = make_store(tmp_path / "maps.zarr", maps, names=names)
    found = slide_nuclei(path, InstanceRules(markers="hv"), classes=("a", "b", "c"))
    assert found.column("class_id").to_pylist() == [0, 2]
    assert found.column("class").to_pylist() == ["a", "c"]
    assert found.column("probability")[0].as_py() == pytest.approx(200 / 255)


FINE = InstanceRules(nucleus=128, marker=140, min_marker=1, min_area=2, max_hole=5, refine=2)


def test_pixels_of_half_the_size_are_between_those_around_them() -> None:
    maps = np.array([[[0, 100], [200, 40]]], np.uint8)
    fine = refined(maps)[0]
    assert fine.shape == (4, 4)
    assert fine[0, 0] == 0 and fine[3, 0] == 200  # nothing beyond the edge pulls at it
    assert fine[0].tolist() == [0, 25, 75, 100]
    assert fine[1, 1] == round((9 * 0 + 3 * 100 + 3 * 200 + 40) / 16)


def test_discs_are_nearer_to_the_truth_on_finer_pixels() -> None:
    rng = np.random.default_rng(5)
    fine_y, fine_x = (np.mgrid[:240, :240] + 0.5) / 8
    y, x = np.mgrid[:30, :30] + 0.5
    rules = InstanceRules(marker=200, min_area=20)
    agreement: dict[int, list[float]] = {1: [], 2: []}
    for cx, cy, radius in rng.uniform((13, 13, 4), (17, 17, 9), (20, 3)):
        maps = np.clip(127.5 + (radius - np.hypot(x - cx, y - cy)) * 60, 0, 255)
        true = np.hypot(fine_x - cx, fine_y - cy) < radius
        for refine, scores in agreement.items():
            found = segment(np.stack([maps, maps]).astype(np.uint8), replace(rules, refine=refine)) > 0
            found = found.repeat(8 // refine, axis=0).repeat(8 // refine, axis=1)
            scores.append((found & true).sum() / (found | true).sum())
    assert np.mean(agreement[1]) < 0.93 < 0.95 < np.mean(agreement[2])


@pytest.mark.parametrize("markers", ["distance", "contour"])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**31),
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    density=st.floats(0.3, 0.7),
    block=st.integers(8, 190),
    halo=st.integers(0, 40),
    threshold=st.integers(1, 200),
)
def test_any_blocks_give_the_whole_on_finer_pixels(
    tmp_path_factory: pytest.TempPathFactory,
    markers: str,
    seed: int,
    height: int,
    width: int,
    density: float,
    block: int,
    halo: int,
    threshold: int,
) -> None:
    maps = all_maps(height, width, seed, density)
    maps[:, : height // 2, width // 3 : width // 2] = 0  # whole cells that nobody looked at, some of them
    rules = replace(FINE, nucleus=threshold, markers=markers, marker=70 if markers == "contour" else 140)
    path = make_store(tmp_path_factory.mktemp("maps") / "maps.zarr", maps, names=ALL_MAPS)
    whole = slide_nuclei(path, rules, block=1000)
    assert slide_nuclei(path, rules, block=block, halo=halo).equals(whole)
    # The runs are on the slide's grid.
    assert same_partition(label_map(whole, height, width), segment(maps, rules, Channels.of(ALL_MAPS))[::2, ::2])


def test_rules_that_cannot_be_refined_are_refused() -> None:
    with pytest.raises(ValueError, match="refine must be 1 or 2, got 3"):
        InstanceRules(refine=3)
    with pytest.raises(ValueError, match="refine must be 1 with markers of hv"):
        InstanceRules(markers="hv", refine=2)
    assert replace(FINE, smooth=1.5).fine == replace(FINE, min_marker=4, min_area=8, max_hole=20, smooth=3.0, refine=1)
