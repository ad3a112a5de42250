"""The slide's grid."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.stores.grid import Grid


@pytest.mark.parametrize(
    ("size", "mpp0", "mpp", "expected"),
    [((1000, 1000), 0.25, 0.5, (500, 500)), ((7, 5), 1.0, 0.5, (14, 10)), ((3, 3), 0.1, 5.0, (1, 1))],
)
def test_size(size: tuple[int, int], mpp0: float, mpp: float, expected: tuple[int, int]) -> None:
    grid = Grid.for_slide(*size, mpp0, mpp0, mpp)
    assert (grid.width, grid.height) == expected


def test_non_square_pixels() -> None:
    grid = Grid.for_slide(1000, 1000, 0.25, 0.5, 0.5)
    assert (grid.width, grid.height) == (500, 1000)
    assert (grid.scale_x, grid.scale_y) == (2, 1)


@given(
    st.integers(1, 200_000),
    st.integers(1, 200_000),
    st.floats(0.1, 4),
    st.floats(0.1, 4),
    st.sampled_from([0.25, 0.5, 1]),
)
def test_whole_pixels_lie_inside(width: int, height: int, mpp_x: float, mpp_y: float, mpp: float) -> None:
    grid = Grid.for_slide(width, height, mpp_x, mpp_y, mpp)
    assert grid.width == 1 or grid.width * grid.scale_x <= width + 1e-3
    assert grid.height == 1 or grid.height * grid.scale_y <= height + 1e-3
    assert Grid.from_json(grid.to_json()) == grid


@pytest.mark.parametrize("field", ["mpp", "scale_x", "scale_y"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_refuses_no_size(field: str, value: float) -> None:
    values = {"width": 1, "height": 1, "mpp": 0.5, "scale_x": 1.0, "scale_y": 1.0, field: value}
    with pytest.raises(ValueError, match=field):
        Grid(**values)  # type: ignore[arg-type]
