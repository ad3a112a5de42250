"""Jumps at the borders of tiles."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.kernels.borders import border_jumps
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
    # From the 96th row of the middle tile to its end, as after a fault in its data.
    found = border_jumps(darker(field, 200, 296, 400, 400, 70), 0, 0, 200, 200)
    assert found
    assert {(x, w, h) for x, _, w, h in found if h > w} <= {(199, 2, 32), (399, 2, 32)}
    assert {(y, w, h) for _, y, w, h in found if h < w} == {(399, 32, 2)}
    assert all(y % 32 == 0 and 288 <= y < 400 for _, y, w, h in found if h > w)


def test_the_window_does_not_matter(field: np.ndarray) -> None:
    damaged = darker(field, 200, 200, 400, 400, 70)
    whole = border_jumps(damaged, 0, 0, 200, 200)
    part = border_jumps(damaged[100:, 50:], 50, 100, 200, 200)
    assert part
    assert set(part) <= set(whole)


def test_jumps_elsewhere_are_the_tissue_s_own(field: np.ndarray) -> None:
    damaged = darker(field, 210, 200, 390, 400, 70)
    assert [place for place in border_jumps(damaged, 0, 0, 200, 600) if place[3] > place[2]] == []


def test_a_tile_of_one_colour_was_not_scanned(field: np.ndarray) -> None:
    white = field.copy()
    white[200:400, 200:400] = 255
    assert border_jumps(white, 0, 0, 200, 200) == []


def test_strips_of_a_few_rows_have_no_borders(field: np.ndarray) -> None:
    assert border_jumps(darker(field, 0, 64, 600, 72, 70), 0, 0, 600, 8) == []
