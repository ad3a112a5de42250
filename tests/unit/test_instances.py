"""Exactness: the nuclei do not depend on blocks, halo, workers or order."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import shapely
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import ndimage

from pipeline.grid import Grid
from pipeline.instances import Block, find_nuclei, slide_nuclei
from pipeline.kernels.instances import (
    MARKER_SOURCES,
    Channels,
    InstanceRules,
    fill_small_holes,
    marker_map,
    segment,
    split_component,
    standing_out,
)
from pipeline.maps import MapStore

RULES = InstanceRules(nucleus=128, marker=140, min_marker=2, min_area=4, max_hole=20)


def random_maps(height: int, width: int, seed: int, density: float = 0.5) -> np.ndarray:
    """Maps with nuclei and clumps of every size, some cut by the slide's edges."""
    rng = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(rng.normal(size=(height, width)), rng.uniform(1.0, 4.0))
    nucleus = smooth / max(np.abs(smooth).max(), 1e-9)
    nucleus = np.clip((nucleus * 1.2 + density) * 255, 0, 255).astype(np.uint8)
    distance = np.clip(ndimage.gaussian_filter(rng.normal(size=(height, width)), 2) * 600 + 128, 0, 255)
    return np.stack([nucleus, distance.astype(np.uint8)])


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
    active = np.ones((-(-height // 64), -(-width // 64)), bool)
    store = MapStore.create(path, grid, names, active, 64, chunk)
    store.array[:] = maps
    return path


def flat(parts: list) -> list[tuple]:  # type: ignore[type-arg]
    """Nuclei as comparable values, in order."""
    return [
        (int(i), bytes(g), int(c), float(p), r.tobytes())
        for part in parts
        for i, g, c, p, r in zip(part.ids, part.geometry, part.class_ids, part.probability, part.runs, strict=True)
    ]


def label_map(nuclei: list[tuple], height: int, width: int) -> np.ndarray:  # type: ignore[type-arg]
    labels = np.zeros((height, width), np.int32)
    for index, (_, _, _, _, runs) in enumerate(nuclei, start=1):
        for row, start, end in np.frombuffer(runs, np.int32).reshape(-1, 3):
            assert (labels[row, start:end] == 0).all(), "two nuclei share a pixel"
            labels[row, start:end] = index
    return labels


def same_partition(a: np.ndarray, b: np.ndarray) -> bool:
    pairs = np.unique(np.stack([a.ravel(), b.ravel()]), axis=1)
    return len(np.unique(pairs[0])) == len(np.unique(pairs[1])) == pairs.shape[1]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**31),
    height=st.integers(1, 150),
    width=st.integers(1, 150),
    density=st.floats(0.3, 0.7),
    block=st.integers(16, 160),
    halo=st.integers(0, 40),
)
def test_any_blocks_give_the_whole(
    tmp_path_factory: pytest.TempPathFactory, seed: int, height: int, width: int, density: float, block: int, halo: int
) -> None:
    maps = random_maps(height, width, seed, density)
    path = make_store(tmp_path_factory.mktemp("maps") / "maps.zarr", maps)
    whole = flat(list(slide_nuclei(path, RULES, block=1000)))
    parts = flat(list(slide_nuclei(path, RULES, block=block, halo=halo)))
    assert parts == whole
    assert [n[0] for n in whole] == sorted({n[0] for n in whole})
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
    whole = flat(list(slide_nuclei(path, rules, block=1000)))
    assert flat(list(slide_nuclei(path, rules, block=block, halo=halo))) == whole
    assert same_partition(label_map(whole, height, width), segment(maps, rules, Channels.of(ALL_MAPS)))


@pytest.mark.parametrize("mode", MODES)
def test_every_kind_of_marker_divides(mode: str) -> None:
    maps = all_maps(250, 250, 4, 0.62)
    components = ndimage.label(maps[0] >= 128)[1]
    assert segment(maps, MODES[mode], Channels.of(ALL_MAPS)).max() > components


def test_blocks_in_any_order(tmp_path: Path) -> None:
    maps = random_maps(300, 260, 5, 0.55)
    path = make_store(tmp_path / "maps.zarr", maps)
    store = MapStore.open(path)
    blocks = [Block(x, y, min(64, 260 - x), min(64, 300 - y)) for y in range(0, 300, 64) for x in range(0, 260, 64)]
    random.Random(3).shuffle(blocks)
    found = sorted(flat([find_nuclei(store, b, 8, RULES) for b in blocks]))
    assert found == flat(list(slide_nuclei(path, RULES, block=4096)))


def test_workers_change_nothing(tmp_path: Path) -> None:
    path = make_store(tmp_path / "maps.zarr", random_maps(200, 200, 7, 0.5))
    assert flat(list(slide_nuclei(path, RULES, block=64, workers=2))) == flat(
        list(slide_nuclei(path, RULES, block=200))
    )


def test_one_component_over_the_whole_slide(tmp_path: Path) -> None:
    maps = random_maps(200, 300, 11)
    maps[0] = 255
    path = make_store(tmp_path / "maps.zarr", maps)
    whole = flat(list(slide_nuclei(path, RULES, block=500)))
    assert len(whole) > 5
    assert flat(list(slide_nuclei(path, RULES, block=32, halo=4))) == whole


@pytest.mark.parametrize("value", [0, 127])
def test_no_nuclei(tmp_path: Path, value: int) -> None:
    path = make_store(tmp_path / "maps.zarr", np.full((2, 50, 60), value, np.uint8))
    assert flat(list(slide_nuclei(path, RULES, block=16))) == []


def test_one_pixel_nuclei(tmp_path: Path) -> None:
    maps = np.zeros((2, 64, 64), np.uint8)
    maps[:, ::4, ::4] = 255
    path = make_store(tmp_path / "maps.zarr", maps)
    rules = InstanceRules(min_area=1, min_marker=1)
    found = flat(list(slide_nuclei(path, rules, block=16, halo=0)))
    assert len(found) == 256
    assert shapely.from_wkb(found[0][1]).area == 0.5 * 4  # half a grid pixel of 2 x 2 level-0 pixels


def test_touching_nuclei_are_divided(tmp_path: Path) -> None:
    maps = np.zeros((2, 40, 60), np.uint8)
    maps[0, 10:30, 10:50] = 255
    maps[1, 15:25, 14:26] = 250
    maps[1, 15:25, 34:46] = 250
    path = make_store(tmp_path / "maps.zarr", maps)
    areas = [shapely.from_wkb(n[1]).area / 4 for n in flat(list(slide_nuclei(path, RULES, block=25)))]
    np.testing.assert_allclose(areas, [400, 400], atol=25)


def test_nuclei_outside_the_tissue_are_left_out(tmp_path: Path) -> None:
    maps = np.zeros((2, 40, 60), np.uint8)
    maps[:, 5:12, 5:12] = 255
    maps[:, 5:12, 40:47] = 255
    path = make_store(tmp_path / "maps.zarr", maps)
    tissue = shapely.box(0, 0, 60, 80)
    found = flat(list(slide_nuclei(path, RULES, tissue=tissue)))
    assert len(found) == 1
    assert shapely.from_wkb(found[0][1]).bounds == (10, 10, 24, 24)


class TestHoles:
    RING = np.pad(np.zeros((3, 3), bool), 2, constant_values=True)

    def test_small_hole_is_filled(self) -> None:
        assert fill_small_holes(self.RING, np.zeros_like(self.RING), 9).all()

    def test_large_hole_is_left(self) -> None:
        np.testing.assert_array_equal(fill_small_holes(self.RING, np.zeros_like(self.RING), 8), self.RING)

    def test_hole_with_another_component_is_left(self) -> None:
        other = np.zeros_like(self.RING)
        other[3, 3] = True
        np.testing.assert_array_equal(fill_small_holes(self.RING, other, 100), self.RING)

    def test_bay_is_no_hole(self) -> None:
        bay = self.RING.copy()
        bay[3, 4:] = False
        np.testing.assert_array_equal(fill_small_holes(bay, np.zeros_like(bay), 100), bay)


def test_table_is_a_geoparquet(tmp_path: Path) -> None:
    from pipeline.instances import write_instances
    from pipeline.models.package import ModelPackage, NucleusClass
    from pipeline.nuclei import geometries, grid_of, read_nuclei

    path = make_store(tmp_path / "maps.zarr", random_maps(120, 100, 2))
    package = ModelPackage(
        "m", 0.5, 64, 8, "resunet", {}, ("nucleus", "distance"), (NucleusClass("Nucleus", (1, 2, 3)),),
        {"method": "none", "reference": {}}, RULES, "CC0", "", (), {}, "0",
    )  # fmt: skip
    digests, files = set(), set()
    for block in (32, 200):
        out = tmp_path / f"{block}.parquet"
        digests.add(write_instances(path, package, out, slide="s", block=block, halo=8, workers=1)["digest"])
        files.add(out.read_bytes())
        table = read_nuclei(out)
        assert grid_of(table) == Grid(100, 120, 0.5, 2.0, 2.0)
        assert (shapely.get_type_id(geometries(table)) == 3).all()
        assert table.column("probability").to_numpy().max() <= 1
        assert b"geo" in pq.read_schema(out).metadata
    assert len(digests) == len(files) == 1


def two_discs(radius: int = 12, apart: int = 20) -> np.ndarray:
    """Label map of two nuclei that touch."""
    y, x = np.mgrid[:50, :80]
    labels = np.zeros((50, 80), np.int32)
    labels[(y - 25) ** 2 + (x - 28 - apart) ** 2 <= radius**2] = 2
    labels[((y - 25) ** 2 + (x - 28) ** 2 <= radius**2) & ((x < 28 + apart / 2) | (labels == 0))] = 1
    return labels


@pytest.mark.parametrize("markers", MARKER_SOURCES)
def test_true_maps_give_the_nuclei_back(markers: str) -> None:
    from pipeline.evaluation.metrics import score
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
    assert split_component(np.zeros((1, *mask.shape), np.uint8), mask, rules, Channels()).max() == 1


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
    found = flat(list(slide_nuclei(path, InstanceRules(markers="hv"), n_classes=3)))
    assert [n[2] for n in found] == [0, 2]
    assert found[0][3] == pytest.approx(200 / 255)
