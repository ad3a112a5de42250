"""Overlap blending in integers.

Patches lie on a fixed grid; each pixel's predictions, rounded to uint8, are summed with integer weights that add up to
the same constant everywhere. Integer sums do not depend on order, so neither do the maps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class PatchGrid:
    """Windows of one size that overlap by a fixed number of pixels and cover a slide completely.

    The first window begins `overlap` pixels before the slide, so that every pixel of the slide has its full weight.

    Parameters
    ----------
    width, height : int
        Size of the slide's grid in pixels.
    patch, overlap : int
        Side of a window and overlap of neighbours in pixels.
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
        """Distance between windows."""
        return self.patch - self.overlap

    @property
    def columns(self) -> int:
        """Windows in a row."""
        return -(-(self.width + self.overlap) // self.stride)

    @property
    def rows(self) -> int:
        """Rows of windows."""
        return -(-(self.height + self.overlap) // self.stride)

    def origin(self, row: int, column: int) -> tuple[int, int]:
        """Left and top of a window in grid pixels; may be negative."""
        return column * self.stride - self.overlap, row * self.stride - self.overlap


def ramp_weights(patch: int, overlap: int) -> np.ndarray:
    """Integer weights of a window along one axis.

    They rise over `overlap` pixels, stay, and fall over `overlap` pixels; the falling end of one window and the
    rising end of the next add up to ``overlap + 1``, the weight in between.

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
    """Integer weights of a window, int32 ``(patch, patch)``; with all neighbours they add up to `weight_sum`."""
    line = ramp_weights(patch, overlap)
    return line[:, None] * line[None, :]


def weight_sum(overlap: int) -> int:
    """What the weights of all windows over a pixel add up to."""
    return (overlap + 1) ** 2


class Blender:
    """Blend windows that arrive in raster order, in memory of the overlap of those in two rows.

    A window that is never added counts as having nothing to say about its pixels; they come out as 0 or as what the
    windows beside it say of them.

    Parameters
    ----------
    grid : PatchGrid
        Where the windows lie.
    largest : bool
        Take the largest value of the windows over a pixel instead of their weighted mean; for maps of instances, of
        which each window draws its own alone.
    """

    def __init__(self, grid: PatchGrid, largest: bool = False) -> None:
        self.grid = grid
        self._largest = largest
        self._weights: Any = blend_weights(grid.patch, grid.overlap)
        self._sum = weight_sum(grid.overlap)
        # Lower edges of windows by column: those of the row above that are still to be met, and those of this row.
        self._above: dict[int, Any] = {}
        self._below: dict[int, Any] = {}
        self._left: Any = None
        self._left_of = (-2, -2)

    def add(self, row: int, column: int, prediction: np.ndarray) -> np.ndarray:
        """Add a window.

        Parameters
        ----------
        row, column : int
            Its place; windows come in raster order.
        prediction : numpy.ndarray
            uint8 ``(C, patch, patch)``.

        Returns
        -------
        numpy.ndarray
            uint8 ``(C, stride, stride)``: the pixels that no later window reaches, from the window's origin on.
        """
        stride, overlap = self.grid.stride, self.grid.overlap
        total = self._weigh(prediction)
        if self._left_of == (row, column - 1):
            self._join(total[:, :, :overlap], self._left)
        if row != self._left_of[0]:
            self._above = self._below if row == self._left_of[0] + 1 else {}
            self._below = {}
        self._left = self._keep(total[:, :, stride:])
        self._left_of = row, column
        strip = total[:, :, :stride]
        above = self._above.pop(column, None)
        if above is not None:
            self._join(strip[:, :overlap], above)
        self._below[column] = self._keep(strip[:, stride:])
        done: np.ndarray = self._finish(strip[:, :stride])
        return done

    # What differs where the arrays are a GPU's.

    def _weigh(self, prediction: Any) -> Any:
        return prediction.astype(np.int32) if self._largest else prediction * self._weights

    def _join(self, edge: Any, other: Any) -> None:
        (np.maximum if self._largest else np.add)(edge, other, out=edge)

    def _keep(self, part: Any) -> Any:
        return part.copy()

    def _finish(self, done: Any) -> Any:
        return (done if self._largest else (done + self._sum // 2) // self._sum).astype(np.uint8)
