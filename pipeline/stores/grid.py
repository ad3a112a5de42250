"""The slide's grid: pixels of the model's mpp, anchored at the slide's (0, 0)."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Grid:
    """Pixels of one size laid over a slide.

    Grid pixel ``(x, y)`` covers the level-0 rectangle from ``(x * scale_x, y * scale_y)`` to
    ``((x + 1) * scale_x, (y + 1) * scale_y)``.

    Parameters
    ----------
    width, height : int
        Size in grid pixels.
    mpp : float
        Side of a grid pixel in µm.
    scale_x, scale_y : float
        Level-0 pixels per grid pixel.
    """

    width: int
    height: int
    mpp: float
    scale_x: float
    scale_y: float

    def __post_init__(self) -> None:
        if self.width < 1 or self.height < 1:
            raise ValueError(f"a grid needs at least one pixel, got {self.width} x {self.height}")
        for name in ("mpp", "scale_x", "scale_y"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be finite and positive, got {value}")

    @classmethod
    def for_slide(cls, width: int, height: int, mpp_x: float, mpp_y: float, mpp: float) -> Grid:
        """Grid of pixels of `mpp` µm over a slide of ``width x height`` level-0 pixels of ``mpp_x x mpp_y`` µm."""
        scale_x, scale_y = mpp / mpp_x, mpp / mpp_y
        # Whole grid pixels only; the epsilon keeps 1000 / (0.5 / 0.25) at 500.
        return cls(
            width=max(1, math.floor(width / scale_x + 1e-6)),
            height=max(1, math.floor(height / scale_y + 1e-6)),
            mpp=float(mpp),
            scale_x=scale_x,
            scale_y=scale_y,
        )

    def finer(self, factor: int) -> Grid:
        """The same grid with each pixel divided into ``factor x factor``."""
        scale_x, scale_y = self.scale_x / factor, self.scale_y / factor
        return Grid(self.width * factor, self.height * factor, self.mpp / factor, scale_x, scale_y)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Grid:
        """The grid that `to_json` described."""
        return cls(**value)

    def to_json(self) -> dict[str, Any]:
        """The grid as plain JSON values."""
        return asdict(self)
