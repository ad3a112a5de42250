"""Blend the maps of overlapping windows in integers.

Windows lie on a fixed grid. The predictions for each pixel, rounded to uint8, are summed with integer weights that add
up to the same constant everywhere. Integer sums do not depend on the order of their terms, and so neither do the maps.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PatchGrid:
    """Grid of equal windows that overlap by a fixed number of pixels and cover a slide completely.

    The first window begins `overlap` pixels before the slide, so that the weights are complete at every pixel of the
    slide.

    Parameters
    ----------
    width, height : int
        Size of the slide's grid in pixels.
    patch, overlap : int
        Side of a window and overlap of neighbouring windows in pixels.
    """

    width: int
    height: int
    patch: int
    overlap: int

    def __post_init__(self) -> None:
        if not 0 < 2 * self.overlap <= self.patch:
            raise ValueError(f"overlap must be within 1 and half the patch ({self.patch}), got {self.overlap}")

    @property
    def stride(self) -> int:
        """Distance between the origins of neighbouring windows, in pixels."""
        return self.patch - self.overlap

    @property
    def columns(self) -> int:
        """Number of windows in a row."""
        return -(-(self.width + self.overlap) // self.stride)

    @property
    def rows(self) -> int:
        """Number of rows of windows."""
        return -(-(self.height + self.overlap) // self.stride)

    def origin(self, row: int, column: int) -> tuple[int, int]:
        """Left and top of a window in grid pixels; may be negative."""
        return column * self.stride - self.overlap, row * self.stride - self.overlap


def ramp_weights(patch: int, overlap: int) -> np.ndarray:
    """Integer weights of a window along one axis.

    Weights rise over `overlap` pixels, stay constant and fall over `overlap` pixels. The falling weights of a window
    and the rising weights of the next one add up to ``overlap + 1``, the constant weight in between.

    Returns
    -------
    numpy.ndarray
        int32 ``(patch,)``.
    """
    weights = np.full(patch, overlap + 1, np.int32)
    rise = np.arange(1, overlap + 1, dtype=np.int32)
    weights[:overlap] = rise
    weights[patch - overlap :] = rise[::-1]
    return weights


def blend_weights(patch: int, overlap: int) -> np.ndarray:
    """Integer weights of a window, int32 ``(patch, patch)``; with those of all neighbours they sum to `weight_sum`."""
    line = ramp_weights(patch, overlap)
    return line[:, None] * line[None, :]


def weight_sum(overlap: int) -> int:
    """Return the sum of the weights of all windows at a pixel."""
    return (overlap + 1) ** 2


class Blender:
    """Blend windows that arrive in raster order, keeping only the overlaps of two rows of windows in memory.

    A window that is never added counts as 0 at all its pixels, and the pixels that its `add` would return are never
    returned.

    Parameters
    ----------
    grid : PatchGrid
        Positions of the windows.
    largest : bool
        Take the largest value of the windows at a pixel instead of their weighted mean; for maps of instances, where
        each window draws only the instances that belong to it.
    """

    def __init__(self, grid: PatchGrid, largest: bool = False) -> None:
        self.grid = grid
        self._largest = largest
        self._weights = blend_weights(grid.patch, grid.overlap)
        self._sum = weight_sum(grid.overlap)
        # Lower overlaps of windows by column: those of the row above that are not yet joined, and those of this row.
        self._above: dict[int, np.ndarray] = {}
        self._below: dict[int, np.ndarray] = {}
        self._left = np.empty(0, np.int32)
        self._left_of = (-2, -2)

    def add(self, row: int, column: int, prediction: np.ndarray) -> np.ndarray:
        """Add a window and return the pixels that are then final.

        Parameters
        ----------
        row, column : int
            Position of the window in the grid; windows must be added in raster order.
        prediction : numpy.ndarray
            uint8 ``(C, patch, patch)``.

        Returns
        -------
        numpy.ndarray
            uint8 ``(C, stride, stride)``: the pixels from the window's origin on, which no later window overlaps.
        """
        stride, overlap = self.grid.stride, self.grid.overlap
        join = np.maximum if self._largest else np.add
        total = prediction.astype(np.int32) if self._largest else prediction * self._weights
        if self._left_of == (row, column - 1):
            edge = total[:, :, :overlap]
            join(edge, self._left, out=edge)
        if row != self._left_of[0]:
            self._above = self._below if row == self._left_of[0] + 1 else {}
            self._below = {}
        self._left = total[:, :, stride:].copy()
        self._left_of = row, column
        strip = total[:, :, :stride]
        above = self._above.pop(column, None)
        if above is not None:
            edge = strip[:, :overlap]
            join(edge, above, out=edge)
        self._below[column] = strip[:, stride:].copy()
        done = strip[:, :stride]
        return (done if self._largest else (done + self._sum // 2) // self._sum).astype(np.uint8)
