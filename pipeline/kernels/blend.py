"""Overlap blending in integers.

Patches lie on a fixed grid; each pixel's predictions, rounded to uint8, are summed with integer weights that add up to
the same constant everywhere. Integer sums do not depend on order, so neither do the maps.
"""

from __future__ import annotations

from dataclasses import dataclass

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
        return -(-self.width // self.stride)

    @property
    def rows(self) -> int:
        """Rows of windows."""
        return -(-self.height // self.stride)

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
