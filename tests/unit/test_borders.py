"""Jumps at the borders of tiles."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.kernels.borders import border_jumps, surroundings, torn_tiles
from pipeline.slides.synthetic import make_field


@pytest.fixture(scope="module")
def field() -> np.ndarray:
    return make_field(600, 600, 0.5, 4)[0]


def darker(rgb: np.ndarray, x0: int, y0: int, x1: int, y1: int, grey: int) -> np.ndarray:
    out = rgb.copy()
    out[y0:y1, x0:x1] -= np.minimum(out[y0:y1, x0:x1], grey).astype(np.uint8)
    return out


def test_tissue_goes_on_from_tile_to_tile(field: np.ndarray) -> None:
    for side in (64, 96, 240, 256):
        assert border_jumps(field, 0, 0, side, side) == []


def test_a_jump_is_found_where_it_is(field: np.ndarray) -> None:
    # From the 56th row of the middle tile to its end, as after a fault in its data.
    found = border_jumps(darker(field, 200, 256, 400, 400, 70), 0, 0, 200, 200)
    assert {(x, y) for x, y, upright in found if upright} == {(x, y) for x in (200, 400) for y in (288, 352)}
    assert {(x, y) for x, y, upright in found if not upright} <= {(x, 400) for x in (224, 288, 352)}
    assert len(found) > 5


def test_what_is_found_does_not_depend_on_the_window(field: np.ndarray) -> None:
    damaged = darker(field, 200, 200, 400, 400, 70)
    whole = set(border_jumps(damaged, 0, 0, 200, 200))
    assert len(whole) > 6
    for at, stop in ((0, 600), (50, 390), (200, 400), (185, 401), (215, 530), (399, 520)):
        x0, x1 = surroundings(at, stop, 200, 600)
        y0, y1 = surroundings(at, 600, 200, 600)
        found = set(border_jumps(damaged[y0:y1, x0:x1], x0, y0, 200, 200))
        assert found <= whole
        # Those that reach into the window are all there.
        assert found >= {
            (x, y, upright)
            for x, y, upright in whole
            if y >= at - (32 if upright else 0) and at - (0 if upright else 32) <= x < stop + (0 if upright else 32)
        }


def test_no_tile_is_read_for_a_window_that_ends_at_its_border() -> None:
    assert surroundings(256, 512, 256, 9999) == (238, 512)
    assert surroundings(0, 512, 256, 9999) == (0, 512)
    assert surroundings(300, 500, 256, 9999) == (256, 512)
    assert surroundings(300, 520, 256, 525) == (256, 525)


def test_jumps_elsewhere_are_the_tissue_s_own(field: np.ndarray) -> None:
    damaged = darker(field, 210, 200, 390, 400, 70)
    assert [upright for _, _, upright in border_jumps(damaged, 0, 0, 200, 600)] == []


def test_a_tile_of_one_colour_was_not_scanned(field: np.ndarray) -> None:
    white = field.copy()
    white[200:400, 200:400] = 255
    assert border_jumps(white, 0, 0, 200, 200) == []
    white[250:350:5, 190:410:3] = 200
    assert border_jumps(white, 0, 0, 200, 200) != []


def test_a_torn_tile_jumps_at_two_sides() -> None:
    assert torn_tiles([]) == set()
    assert torn_tiles([(3, 2, True)]) == torn_tiles([(3, 2, True), (3, 2, True)]) == set()
    assert torn_tiles([(3, y, True) for y in range(5)]) == set()  # a seam of the scan
    assert torn_tiles([(3, 2, True), (3, 2, False)]) == {(3, 2)}
    assert torn_tiles([(3, 2, True), (4, 2, True)]) == {(3, 2)}
    assert torn_tiles([(4, 2, True), (3, 3, False)]) == {(3, 2)}


def test_images_too_small_for_a_run_have_no_jumps(field: np.ndarray) -> None:
    assert border_jumps(field[:50, :50], 0, 0, 20, 20) == []
    assert border_jumps(field[:100, :100], 30, 30, 64, 64) == []
    assert border_jumps(field[:20, :300], 10, 10, 64, 64) == []
