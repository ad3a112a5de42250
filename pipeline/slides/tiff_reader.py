"""Slides read by tiffslide, whose tiles are decoded here, and what a TIFF file says of itself."""

from __future__ import annotations

import logging
import os
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import SlideError
from pipeline.slides.integrity import MAX_SEGMENT_PIXELS
from pipeline.slides.slide import (
    Slide,
    as_rgb,
    level_of,
    not_8_bit,
    number,
    over_white,
    pair,
    plausible,
    premultiplied_over_white,
    quiet,
    raise_for_machine,
)

log = logging.getLogger(__name__)

_CACHED_SEGMENT_PIXELS = 1_000_000
"""Tiles and strips that are larger are kept, two of them: neighbouring windows meet the same ones."""


class _Page:
    """One image of a TIFF file, its tiles or strips decoded one by one."""

    def __init__(self, page: Any, path: Path) -> None:
        self.page = page
        self.path = path
        self.width, self.height = int(page.imagewidth), int(page.imagelength)
        if page.is_tiled:
            self.tile = (int(page.tilewidth), int(page.tilelength))
        else:
            self.tile = (self.width, min(self.height, max(1, int(page.rowsperstrip))))
        if self.tile[0] * self.tile[1] > MAX_SEGMENT_PIXELS:
            raise SlideError(
                f"is stored in pieces of {self.tile[0]} x {self.tile[1]} pixels, too large to read by region",
                "convert it to a tiled pyramidal TIFF",
            )
        self.across = -(-self.width // self.tile[0])
        self.samples = int(page.samplesperpixel)
        self.arguments = {"jpegtables": page.jpegtables}
        if getattr(page, "jpegheader", None) is not None:
            self.arguments["jpegheader"] = page.jpegheader
        extra = tuple(int(value) for value in page.extrasamples)
        self.premultiplied = extra[:1] == (1,)
        self.inverted = int(page.photometric) == 0
        self.offsets, self.counts = page.dataoffsets, page.databytecounts
        self._cache: OrderedDict[int, np.ndarray] = OrderedDict()

    @staticmethod
    def supports(page: Any) -> bool:
        """Whether the page holds 8-bit grey, RGB or RGBA, the samples of a pixel together."""
        return (
            hasattr(page, "decode")
            and page.dtype == np.uint8
            and int(page.bitspersample) == 8
            and int(page.planarconfig) == 1
            and int(page.samplesperpixel) in (1, 3, 4)
            and int(page.photometric) in (0, 1, 2, 6)
            and int(page.imagedepth) == 1
            and len(page.dataoffsets) > 0
        )

    def segment(self, file: int, index: int) -> np.ndarray | None:
        """One tile or strip as RGB, uint8; None where the file leaves it out."""
        if index in self._cache:
            return self._cache[index]
        offset, count = int(self.offsets[index]), int(self.counts[index])
        if count == 0:
            return None
        data = os.pread(file, count, offset)
        if len(data) < count:
            raise ValueError("the file is truncated")
        decoded = self.page.decode(data, index, **self.arguments)[0]
        if decoded is None:
            return None
        pixels = np.asarray(decoded)[0]
        if self.inverted:
            pixels = 255 - pixels
        if self.samples == 1:
            pixels = np.broadcast_to(pixels, (*pixels.shape[:2], 3))
        elif self.samples == 4:
            pixels = premultiplied_over_white(pixels) if self.premultiplied else over_white(pixels)
        if self.tile[0] * self.tile[1] > _CACHED_SEGMENT_PIXELS:
            self._cache[index] = pixels
            if len(self._cache) > 2:
                self._cache.popitem(last=False)
        return pixels

    def read(self, file: int, x: int, y: int, w: int, h: int) -> np.ndarray:
        """A window inside the image: RGB, uint8, shape (h, w, 3)."""
        out = np.empty((h, w, 3), np.uint8)
        across, down = self.tile
        for row in range(y // down, -(-(y + h) // down)):
            for column in range(x // across, -(-(x + w) // across)):
                pixels = self.segment(file, row * self.across + column)
                tx, ty = column * across, row * down
                x0, y0 = max(x, tx), max(y, ty)
                x1, y1 = min(x + w, tx + across), min(y + h, ty + down)
                place = out[y0 - y : y1 - y, x0 - x : x1 - x]
                if pixels is None or pixels.shape[0] < y1 - ty or pixels.shape[1] < x1 - tx:
                    place[...] = 255
                if pixels is not None:
                    part = pixels[y0 - ty : y1 - ty, x0 - tx : x1 - tx]
                    place[: part.shape[0], : part.shape[1]] = part
        return out


class TiffSlideReader(Slide):
    """A slide that tiffslide opened.

    tiffslide says what the levels are. Where a level is one TIFF page of 8-bit samples, its tiles are decoded here,
    which takes half the time of tiffslide's way through zarr and does not hold Python's global lock.
    """

    backend = "tiffslide"

    def __init__(self, path: Path) -> None:
        import tiffslide

        super().__init__(path)
        self._slide: Any = tiffslide.TiffSlide(path)
        self._file = os.open(path, os.O_RDONLY)
        try:
            self._describe()
        except BaseException:
            self.close()
            raise

    def _describe(self) -> None:
        slide = self._slide
        properties = dict(slide.properties)
        self.properties = {key: value for key, value in properties.items() if value is not None}
        width, height = (int(value) for value in slide.dimensions)
        self.levels = tuple(level_of(int(w), int(h), width, height) for w, h in slide.level_dimensions)
        self.vendor = str(properties.get("tiffslide.vendor") or "generic-tiff")
        tif = slide.ts_tifffile
        declared = pair(properties.get("tiffslide.mpp-x"), properties.get("tiffslide.mpp-y"))
        from_tags = self.vendor == "generic-tiff" or (self.vendor == "aperio" and "aperio.MPP" not in properties)
        self.mpp = None if from_tags and not plausible(declared) else declared
        if tif.is_ome:
            self.vendor = "ome-tiff"
            self.mpp = _ome_mpp(tif.ome_metadata or "") or self.mpp
        self.objective = number(properties.get("tiffslide.objective-power"))
        series = tif.series[int(properties.get("tiffslide.series-index") or 0)]
        self._pages: list[_Page | None] = []
        for level in series.levels:
            page = level.pages[0]
            single = len(level.pages) == 1 and _Page.supports(page)
            self._pages.append(_Page(page, self.path) if single else None)
        if "tiffslide.series-composition" in properties or len(self._pages) != len(self.levels):
            self._pages = [None] * len(self.levels)
        if any(page is None for page in self._pages):
            if series.dtype != np.uint8:
                raise not_8_bit(series.dtype, series.keyframe.samplesperpixel)
            if int(series.keyframe.photometric) not in (0, 1, 2, 6):
                raise ValueError("a palette or an unusual colour space, left to Pillow")

    def tile_size(self, level: int) -> tuple[int, int]:
        page = self._pages[level]
        return page.tile if page is not None else (256, 256)

    def _read(self, level: int, x: int, y: int, w: int, h: int) -> np.ndarray:
        page = self._pages[level]
        try:
            if page is not None:
                return page.read(self._file, x, y, w, h)
            size, base = self.levels[level], self.levels[0]
            # tiffslide rounds level-0 coordinates down to the level's: the smallest that gives this pixel.
            corner = (-(-x * base.width // size.width), -(-y * base.height // size.height))
            with quiet():
                pixels = np.asarray(self._slide.read_region(corner, level, (w, h), as_array=True))
            return as_rgb(pixels)
        except Exception as error:
            raise_for_machine(error, self.path)
            raise SlideError(f"cannot decode {w} x {h} pixels at ({x}, {y}) of level {level}: {error}") from None

    def close(self) -> None:
        if self._slide is not None:
            self._slide.close()
            self._slide = None
            os.close(self._file)


def _ome_mpp(xml: str) -> tuple[float, float] | None:
    """µm per pixel that OME-XML gives its first image."""
    tag = re.search(r"<(?:\w+:)?Pixels\b[^>]*>", xml)
    if tag is None:
        return None
    unit_um = {"m": 1e6, "cm": 1e4, "mm": 1e3, "µm": 1.0, "μm": 1.0, "um": 1.0, "&#181;m": 1.0, "nm": 1e-3, "pm": 1e-6}
    found = []
    for side in ("X", "Y"):
        size = re.search(rf"""\bPhysicalSize{side}\s*=\s*["']([^"']+)["']""", tag[0])
        unit = re.search(rf"""\bPhysicalSize{side}Unit\s*=\s*["']([^"']+)["']""", tag[0])
        factor = unit_um.get(unit[1]) if unit else 1.0
        value = number(size[1]) if size else None
        if value is None or factor is None:
            return None
        found.append(value * factor)
    return found[0], found[1]


def mpp_beside(path: Path) -> tuple[float, float] | None:
    """What the OME-XML of a TIFF states whose pixels another reader reads, as where colours lie in planes."""
    import tifffile

    try:
        with tifffile.TiffFile(path) as tif:
            return _ome_mpp(tif.ome_metadata or "") if tif.is_ome else None
    except Exception as error:
        _stumbled(path, error)
        return None


def _stumbled(path: Path, error: Exception) -> None:
    """Take note of what a broken file made tifffile stumble over; sizes may be broken, too, and ask for much memory."""
    if not isinstance(error, MemoryError):
        raise_for_machine(error, path)
    log.debug("tifffile does not understand %s: %s", path, error)


def check_samples(path: Path, backend: str) -> None:
    """Refuse a TIFF whose pixels a reader would not show as they are.

    Of a picture for each channel it shows the first as grey, or takes four for RGBA; of 16 bits OpenSlide and Pillow
    show the upper eight, which are nearly black where a camera fills twelve. Pixels that are stored turned or mirrored
    OpenSlide mirrors tile by tile, each in its place.
    """
    import tifffile

    try:
        with tifffile.TiffFile(path) as tif:
            series = tif.series[0] if tif.is_ome or tif.is_imagej else None
            channels = 1 if series is None or "C" not in series.axes else series.shape[series.axes.index("C")]
            page = tif.pages.first
            kind, samples = page.dtype, page.samplesperpixel
            turned = page.tags.valueof("Orientation", 1)
    except Exception as error:
        _stumbled(path, error)
        return
    if channels > 1:
        raise SlideError(
            f"holds {channels} channels as pictures of their own, as of fluorescence; grey, RGB and RGBA can be read",
            "if it is H&E, save it as RGB, as ImageJ does with Image > Type > RGB Color",
        )
    if kind is not None and kind not in (np.uint8, np.bool_):
        raise not_8_bit(kind, samples)
    if backend == "openslide" and turned != 1:
        raise SlideError(
            f"is stored turned or mirrored (its orientation tag is {turned}), which OpenSlide shows wrongly",
            "save it upright; `reader: tiffslide` shows it as it is stored",
        )
