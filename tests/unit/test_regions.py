"""Windows of a slide on a grid: right averages, and the same whatever window is asked for."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.slides.regions import best_level, read_region
from pipeline.slides.slide import Level
from pipeline.slides.synthetic import make_field
from pipeline.stores.grid import Grid


class ArraySlide:
    """A slide of arrays, one a level."""

    def __init__(self, *levels: np.ndarray) -> None:
        self.arrays = levels
        height, width = levels[0].shape[:2]
        self.levels = tuple(
            Level(a.shape[1], a.shape[0], float(round(width / a.shape[1])), float(round(height / a.shape[0])))
            for a in levels
        )

    def read(self, level: int, x: int, y: int, w: int, h: int) -> np.ndarray:
        array = self.arrays[level]
        assert x >= 0
        assert y >= 0
        assert x + w <= array.shape[1]
        assert y + h <= array.shape[0]
        return np.ascontiguousarray(array[y : y + h, x : x + w])


def noise(width: int, height: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def exact_mean(pixels: np.ndarray, ratio_x: float, ratio_y: float, x: int, y: int) -> np.ndarray:
    """Mean over the area of grid pixel (x, y), as float, by the definition."""

    def shares(start: float, end: float, size: int) -> np.ndarray:
        edges = np.clip(np.arange(size + 1), start, end)
        return np.diff(edges)

    wy, wx = (
        shares(y * ratio_y, (y + 1) * ratio_y, pixels.shape[0]),
        shares(x * ratio_x, (x + 1) * ratio_x, pixels.shape[1]),
    )
    return np.einsum("i,j,ijc->c", wy, wx, pixels.astype(float)) / (wy.sum() * wx.sum())


RATIOS = [1.0, 2.0, 3.0, 4.0, 7.0, 1.002004008, 1.37, 1.9784, 2.5, 5.31]


@settings(max_examples=60, deadline=None)
@given(
    ratio_x=st.sampled_from([*RATIOS, 0.5, 0.73]),
    same=st.booleans(),
    other=st.sampled_from(RATIOS),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_any_window_is_a_crop(ratio_x: float, same: bool, other: float, seed: int, data: st.DataObject) -> None:
    slide = ArraySlide(noise(211, 173, seed))
    ratio_y = ratio_x if same else other
    grid = Grid(max(1, int(211 / ratio_x)), max(1, int(173 / ratio_y)), 1.0, ratio_x, ratio_y)
    whole = read_region(slide, grid, -20, -20, grid.width + 60, grid.height + 60)
    x, y = data.draw(st.integers(-20, grid.width + 20)), data.draw(st.integers(-20, grid.height + 20))
    w, h = data.draw(st.integers(1, grid.width + 39 - x)), data.draw(st.integers(1, grid.height + 39 - y))
    np.testing.assert_array_equal(read_region(slide, grid, x, y, w, h), whole[y + 20 : y + 20 + h, x + 20 : x + 20 + w])


@settings(max_examples=40, deadline=None)
@given(ratio=st.floats(0.2, 12), long=st.booleans(), data=st.data())
def test_any_window_is_a_crop_at_any_ratio(ratio: float, long: bool, data: st.DataObject) -> None:
    # Long enough for several of the blocks that are resampled together, one way or the other.
    width, height = int(2600 * min(ratio, 1)) if long else 31, 31 if long else int(700 * min(ratio, 1))
    slide = ArraySlide(noise(width, height))
    grid = Grid(max(1, int(width / ratio)), max(1, int(height / ratio)), 1.0, ratio, ratio)
    whole = read_region(slide, grid, 0, 0, grid.width, grid.height)
    x, y = data.draw(st.integers(0, grid.width - 1)), data.draw(st.integers(0, grid.height - 1))
    w, h = data.draw(st.integers(1, grid.width - x)), data.draw(st.integers(1, grid.height - y))
    np.testing.assert_array_equal(read_region(slide, grid, x, y, w, h), whole[y : y + h, x : x + w])


def shares(ratio: float, n: int, size: int) -> np.ndarray:
    """Share of each level pixel in each grid pixel along one axis, float64 (n, size), by the definition."""
    j = np.arange(n)[:, None]
    if ratio >= 1:
        covered = np.diff(np.clip(np.arange(size + 1), j * ratio, (j + 1) * ratio), axis=1)
        return np.asarray(covered / covered.sum(axis=1, keepdims=True))
    centre = np.clip((j + 0.5) * ratio - 0.5, 0, size - 1)
    return np.asarray(np.maximum(0, 1 - np.abs(np.arange(size) - centre)))


@pytest.mark.parametrize("ratio", [0.47, 0.9901, 1.37, 1.9786, 2.0619, 2.2275, 3.957, 4.117, 7.7, 41.3])
def test_tissue_is_the_mean_in_float64(ratio: float) -> None:
    pixels = make_field(640, 560, 0.25, 5, density=5000.0, background=False)[0]
    height, width = int(560 / max(ratio, 1)), int(640 / max(ratio, 1))
    got = read_region(ArraySlide(pixels), Grid(width, height, 1.0, ratio, ratio), 0, 0, width, height)
    down, across = shares(ratio, height, 560), shares(ratio, width, 640)
    off = got - np.einsum("iy,yjc->ijc", down, np.einsum("jx,yxc->yjc", across, pixels.astype(float)))
    assert np.abs(off).max() < 0.65
    assert abs(off.mean()) < 0.02 + 0.5 / off.size**0.5  # rounding leaves some in a few pixels


def test_little_memory_besides_the_window() -> None:
    slide = ArraySlide(noise(3000, 2000))
    for ratio, most in ((1.9786, 16), (31.7, 32)):
        grid = Grid(int(3000 / ratio), int(2000 / ratio), 1.0, ratio, ratio)
        tracemalloc.start()
        got = read_region(slide, grid, 0, 0, grid.width, grid.height)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < got.nbytes + 3000 * 2000 * 3 + most * 1e6


@pytest.mark.parametrize("ratio", RATIOS)
def test_area_average(ratio: float) -> None:
    pixels = noise(97, 83)
    grid = Grid(int(97 / ratio), int(83 / ratio), 1.0, ratio, ratio)
    # One more than the grid each way: pixels that the slide covers in part are the mean of that part.
    width, height = -(-97 // ratio), -(-83 // ratio)
    got = read_region(ArraySlide(pixels), grid, 0, 0, int(width), int(height))
    for y in {*range(0, int(height), 7), int(height) - 1}:
        for x in {*range(0, int(width), 5), int(width) - 1}:
            assert np.abs(got[y, x] - exact_mean(pixels, ratio, ratio, x, y)).max() < 0.75


def test_constants_stay(ratio: float = 1.777) -> None:
    for value in (0, 1, 127, 254, 255):
        slide = ArraySlide(np.full((100, 90, 3), value, np.uint8))
        for r in (ratio, 3.0, 0.6, 40.5):
            grid = Grid(max(1, int(90 / r)), max(1, int(100 / r)), 1.0, r, r)
            assert (read_region(slide, grid, 0, 0, grid.width, grid.height) == value).all()


def test_two_by_two_is_exact() -> None:
    pixels = noise(64, 48)
    got = read_region(ArraySlide(pixels), Grid(32, 24, 0.5, 2.0, 2.0), 0, 0, 32, 24)
    total = pixels.reshape(24, 2, 32, 2, 3).astype(int).sum(axis=(1, 3))
    np.testing.assert_array_equal(got, (total + 2) >> 2)


def test_enlarging_is_bilinear() -> None:
    ramp = np.repeat(np.arange(0, 200, 10, dtype=np.uint8)[None, :, None], 3, axis=2).repeat(4, axis=0)
    got = read_region(ArraySlide(ramp), Grid(40, 8, 1.0, 0.5, 0.5), 0, 0, 40, 8)[0, :, 0].astype(float)
    expected = np.clip((np.arange(40) + 0.5) * 5 - 5, 0, 190)
    assert np.abs(got - expected).max() <= 0.51


def test_best_level() -> None:
    slide = ArraySlide(noise(400, 400), noise(100, 100), noise(25, 25))
    for scale, level in ((0.5, 0), (1.0, 0), (2.0, 0), (3.999, 0), (4.0, 1), (8.0, 1), (16.0, 2), (50.0, 2)):
        assert best_level(slide.levels, Grid(4, 4, 1.0, scale, scale)) == level
    assert best_level(slide.levels, Grid(4, 4, 1.0, 16.0, 4.0)) == 1
    turned = (*slide.levels[:2], Level(20, 40, 20.0, 10.0))
    assert best_level(turned, Grid(4, 4, 1.0, 50.0, 50.0)) == 1
