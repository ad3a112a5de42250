"""The interface of a slide, whichever library reads it: levels, µm per pixel, and windows of a level as RGB."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from pipeline.batch.slide_table import MPP_RANGE
from pipeline.errors import PipelineError, SlideError, of_the_machine
from pipeline.slides.integrity import quick_hash


@dataclass(frozen=True)
class Level:
    """One level of a slide's pyramid.

    Parameters
    ----------
    width, height : int
        Size in pixels of the level.
    scale_x, scale_y : float
        Level-0 pixels per pixel of the level; a whole number if the level's size was merely rounded.
    """

    width: int
    height: int
    scale_x: float
    scale_y: float

    @property
    def usable(self) -> bool:
        """Whether the level shows the same as level 0: with other proportions it is rotated, or another image."""
        return abs(self.scale_x / self.scale_y - 1) < 0.05


def level_of(width: int, height: int, width0: int, height0: int) -> Level:
    """Level of ``width x height`` pixels of a slide of ``width0 x height0``, with a whole scale if one fits.

    A level of 462 pixels of a slide of 7400 has scale 16 (7400 / 16 = 462.5), not 16.017: pyramids drop the rest that
    does not fill a pixel.
    """
    nearest = round(max(width0 / width, height0 / height))
    whole = [
        n
        for n in (nearest, nearest - 1, nearest + 1)
        if n >= 1 and abs(width0 / n - width) < 1 and abs(height0 / n - height) < 1
    ]
    if whole:
        powers = [n for n in whole if n & (n - 1) == 0]
        scale = float((powers or whole)[0])
        return Level(width, height, scale, scale)
    return Level(width, height, width0 / width, height0 / height)


class Slide(ABC):
    """A slide open for reading; a handle may be used by one thread only.

    Attributes
    ----------
    path : pathlib.Path
        The file.
    backend : {"openslide", "tiffslide", "image"}
        Reader of the pixels.
    vendor : str
        Name of the format, as the library calls it.
    levels : tuple of Level
        Level 0 first.
    mpp : tuple of float or None
        µm per level-0 pixel, x and y, from the file's metadata.
    refused_mpp : tuple of float or None
        The same from the resolution tags, if not plausible for a slide.
    objective : float or None
        Magnification of the objective.
    bounds : tuple of int or None
        Part of level 0 that was scanned: x, y, width, height.
    properties : dict
        The library's own metadata.
    warnings : list of str
        Messages for the user of the slide.
    """

    backend: str

    def __init__(self, path: Path) -> None:
        self.path = path
        self.vendor = "unknown"
        self.levels: tuple[Level, ...] = ()
        self.mpp: tuple[float, float] | None = None
        self.refused_mpp: tuple[float, float] | None = None
        self.objective: float | None = None
        self.bounds: tuple[int, int, int, int] | None = None
        self.properties: dict[str, Any] = {}
        self.warnings: list[str] = []

    @property
    def width(self) -> int:
        """Width of level 0 in pixels."""
        return self.levels[0].width

    @property
    def height(self) -> int:
        """Height of level 0 in pixels."""
        return self.levels[0].height

    @cached_property
    def quick_hash(self) -> str:
        """OpenSlide's quickhash-1, or else a hash of the file's size, beginning and end."""
        return str(self.properties.get("openslide.quickhash-1") or quick_hash(self.path))

    def tile_size(self, level: int) -> tuple[int, int]:
        """Width and height of the tiles in which a level is decoded; a damaged tile is unreadable as a whole."""
        return 256, 256

    def in_strips(self, level: int) -> bool:
        """Whether the tiles in which a level is decoded are as wide as the level."""
        return self.tile_size(level)[0] >= self.levels[level].width

    def read(self, level: int, x: int, y: int, w: int, h: int) -> np.ndarray:
        """Read a window of a level.

        Parameters
        ----------
        level : int
            Index of the level.
        x, y, w, h : int
            Window in pixels of the level; it may reach outside the level, where it is white.

        Returns
        -------
        numpy.ndarray
            RGB, uint8, shape (h, w, 3).

        Raises
        ------
        SlideError
            When the data cannot be decoded; other windows can still be read.
        """
        size = self.levels[level]
        x0, y0 = max(x, 0), max(y, 0)
        x1, y1 = min(x + w, size.width), min(y + h, size.height)
        if (x0, y0, x1, y1) == (x, y, x + w, y + h):
            return self._read(level, x, y, w, h)
        out = np.full((h, w, 3), 255, np.uint8)
        if x1 > x0 and y1 > y0:
            out[y0 - y : y1 - y, x0 - x : x1 - x] = self._read(level, x0, y0, x1 - x0, y1 - y0)
        return out

    @abstractmethod
    def _read(self, level: int, x: int, y: int, w: int, h: int) -> np.ndarray:
        """Do `read` for a window that lies inside the level."""

    @abstractmethod
    def close(self) -> None:
        """Close the file."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def over_white(rgba: np.ndarray) -> np.ndarray:
    """Lay RGBA with straight alpha, uint8 (h, w, 4), over white: RGB, uint8 (h, w, 3)."""
    import cv2

    alpha = rgba[..., 3]
    if alpha.size and int(alpha.min()) == 255:
        return np.asarray(cv2.cvtColor(rgba, cv2.COLOR_RGBA2RGB))  # 20 times as fast as NumPy's copy of three channels
    a = alpha[..., None].astype(np.uint16)
    return ((rgba[..., :3] * a + 255 * (255 - a) + 127) // 255).astype(np.uint8)


def premultiplied_over_white(rgba: np.ndarray) -> np.ndarray:
    """Lay RGBA with premultiplied alpha, uint8 (h, w, 4), over white: RGB, uint8 (h, w, 3)."""
    return np.minimum(rgba[..., :3].astype(np.uint16) + (255 - rgba[..., 3:]), 255).astype(np.uint8)


def number(value: Any) -> float | None:
    """Parse a positive number in a slide's metadata; None if the value is anything else."""
    try:
        found = float(str(value).strip().rstrip(";"))
    except ValueError:
        return None
    return found if math.isfinite(found) and found > 0 else None


def pair(x: Any, y: Any) -> tuple[float, float] | None:
    """Parse two positive numbers in a slide's metadata; None if either is anything else."""
    first, second = number(x), number(y)
    return (first, second) if first and second else None


def plausible(mpp: tuple[float, float] | None) -> bool:
    """Whether both µm per pixel lie in `MPP_RANGE`."""
    return mpp is not None and all(MPP_RANGE[0] <= value <= MPP_RANGE[1] for value in mpp)


def raise_for_machine(error: Exception, path: Path) -> None:
    """Raise if the machine, not the slide, is to blame for an error: read another time, the slide may be sound.

    Raises
    ------
    PipelineError
        When memory ran out, or the file can no longer be read at all.
    OSError
        When the disk or the file server failed.
    """
    if isinstance(error, MemoryError):
        raise PipelineError("there is not enough memory to read the slide", "give the job more memory") from None
    if of_the_machine(error):
        raise error
    try:  # libraries raise errors of their own types for a file that is gone
        with path.open("rb") as file:
            file.read(1)
    except OSError as why:
        raise gone(path, why) from None


def gone(path: Path, error: OSError) -> PipelineError:
    """Error to raise when a file that could be read before cannot be read now."""
    return PipelineError(
        f"{path} could be read before, and now: {error.strerror or error}",
        "check that its folder is mounted, and run the same command again",
    )


def not_8_bit(kind: np.dtype[Any], samples: int) -> SlideError:
    """Error to raise for pixels of `samples` samples of type `kind`, which is not 8-bit."""
    hint = "convert it to 8-bit RGB"
    if kind == np.uint16:
        hint += ", as by: vips msb OLD.tif 'NEW.tif[tile,pyramid,compression=jpeg,Q=90]'"
    return SlideError(f"holds {samples} x {kind.name} a pixel, where 8-bit grey, RGB or RGBA can be read", hint)


def as_rgb(pixels: np.ndarray) -> np.ndarray:
    """Convert 8-bit grey, RGB or RGBA, samples last, to RGB, uint8 (h, w, 3).

    Raises
    ------
    SlideError
        When the pixels have another shape or type.
    """
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] not in (1, 2, 3, 4):
        raise not_8_bit(pixels.dtype, pixels.shape[-1])
    if pixels.shape[2] == 4:
        return over_white(pixels)
    if pixels.shape[2] < 3:
        return np.repeat(pixels[..., :1], 3, axis=2)
    return np.ascontiguousarray(pixels)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the warnings of image libraries: whatever matters is raised as a `SlideError`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
