"""Read slides with OpenSlide, which knows the formats of many vendors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import SlideError
from pipeline.slides.slide import Slide, level_of, number, over_white, pair, plausible, raise_for_machine

_BLOCK = 512


class OpenSlideReader(Slide):
    """A slide read by OpenSlide."""

    backend = "openslide"

    def __init__(self, path: Path) -> None:
        import openslide

        super().__init__(path)
        self._open: Callable[[], Any] = lambda: openslide.OpenSlide(path)
        self._slide: Any = self._open()
        properties = dict(self._slide.properties)
        width, height = self._slide.dimensions
        self.levels = tuple(level_of(w, h, width, height) for w, h in self._slide.level_dimensions)
        self._downsamples = tuple(float(value) for value in self._slide.level_downsamples)
        self.properties = properties
        self.vendor = properties.get("openslide.vendor", "unknown")
        self.mpp = pair(properties.get("openslide.mpp-x"), properties.get("openslide.mpp-y"))
        if self.vendor == "generic-tiff" and not plausible(self.mpp):
            self.mpp = None  # taken from the resolution tags, which often hold the dpi of a printer or screen
        self.objective = number(properties.get("openslide.objective-power"))
        self.bounds = _bounds(properties, width, height)
        if properties.get("zeiss.Information.Image.PixelType", "").casefold() == "bgr48":
            self.close()  # OpenSlide shows the upper eight bits, nearly black if the camera fills only twelve
            raise SlideError("holds 3 x uint16 a pixel, where 8-bit RGB can be read", "export it as 8-bit RGB")
        if self.vendor == "dicom" and properties.get("dicom.ImageType[3]") == "RESAMPLED":
            self.warnings.append(
                f"the finest level of the series, {width} x {height} pixels, calls itself resampled: are all of its "
                "files there?"
            )

    def tile_size(self, level: int) -> tuple[int, int]:
        if self._downsamples[level] != int(self._downsamples[level]):
            return _BLOCK, _BLOCK
        size = [number(self.properties.get(f"openslide.level[{level}].tile-{side}")) for side in ("width", "height")]
        return (int(size[0]), int(size[1])) if size[0] and size[1] else (256, 256)

    def _read(self, level: int, x: int, y: int, w: int, h: int) -> np.ndarray:
        down = self._downsamples[level]
        if down == int(down):
            return self._region(level, x * int(down), y * int(down), w, h)
        # OpenSlide takes level-0 coordinates, which cannot address every pixel of a level whose scale is not whole; it
        # interpolates between pixels. Reading blocks at fixed places makes pixel values independent of the window.
        out = np.empty((h, w, 3), np.uint8)
        size = self.levels[level]
        for by in range(y // _BLOCK * _BLOCK, y + h, _BLOCK):
            for bx in range(x // _BLOCK * _BLOCK, x + w, _BLOCK):
                bw, bh = min(_BLOCK, size.width - bx), min(_BLOCK, size.height - by)
                block = self._region(level, round(bx * down), round(by * down), bw, bh)
                x0, y0, x1, y1 = max(x, bx), max(y, by), min(x + w, bx + bw), min(y + h, by + bh)
                out[y0 - y : y1 - y, x0 - x : x1 - x] = block[y0 - by : y1 - by, x0 - bx : x1 - bx]
        return out

    def _region(self, level: int, x0: int, y0: int, w: int, h: int) -> np.ndarray:
        try:
            if self._slide is None:
                self._slide = self._open()
            return over_white(np.asarray(self._slide.read_region((x0, y0), level, (w, h))))
        except Exception as error:
            raise_for_machine(error, self.path)
            # After an error, OpenSlide repeats it for every read from the same handle; the next read opens another.
            self.close()
            raise SlideError(f"cannot decode {w} x {h} pixels at ({x0}, {y0}) of level {level}: {error}") from None

    def close(self) -> None:
        if self._slide is not None:
            self._slide.close()
            self._slide = None


def _bounds(properties: Mapping[str, Any], width: int, height: int) -> tuple[int, int, int, int] | None:
    try:
        x, y, w, h = (int(float(properties[f"openslide.bounds-{key}"])) for key in ("x", "y", "width", "height"))
    except (KeyError, ValueError, OverflowError):
        return None
    x, y = max(x, 0), max(y, 0)
    w, h = min(w, width - x), min(h, height - y)
    return (x, y, w, h) if w > 0 and h > 0 else None
