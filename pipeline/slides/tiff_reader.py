"""Read TIFF slides with tiffslide, decoding most tiles directly, and check a TIFF's metadata against its reader."""

from __future__ import annotations

import logging
import math
import os
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import SlideError
from pipeline.slides.image_reader import MAX_IMAGE_PIXELS
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
"""Larger tiles and strips are cached, the last two of a page, as neighbouring windows need the same ones."""

_VALUES_STAY = (1, 5, 8, 32773, 32946, 34925, 50000)
"""Compressions that return the stored values (none, LZW, Deflate, PackBits, LZMA, Zstandard).

With these YCbCr stays YCbCr, whereas JPEG decoders convert it to RGB.
"""


def _known_colours(page: Any) -> bool:
    """Whether a page decodes to grey or RGB."""
    kind = int(page.photometric)
    return kind in (0, 1, 2) or (kind == 6 and int(page.compression) not in _VALUES_STAY)


class _Page:
    """One image of a TIFF file, whose tiles or strips are decoded one by one."""

    def __init__(self, page: Any, path: Path) -> None:
        self.page = page
        self.path = path
        self.width, self.height = int(page.imagewidth), int(page.imagelength)
        if page.is_tiled:
            self.tile = (int(page.tilewidth), int(page.tilelength))
        else:
            self.tile = (self.width, min(self.height, max(1, int(page.rowsperstrip))))
        if self.tile[0] * self.tile[1] > MAX_SEGMENT_PIXELS:
            if not page.is_tiled and self.width * self.height <= MAX_IMAGE_PIXELS:
                raise ValueError("a single large strip, left to Pillow")
            raise SlideError(
                f"is stored in pieces of {self.tile[0]} x {self.tile[1]} pixels, too large to read by region",
                "convert it to a tiled pyramidal TIFF",
            )
        self.across = -(-self.width // self.tile[0])
        self.samples = int(page.samplesperpixel)
        self.arguments = {"jpegtables": page.jpegtables}
        if getattr(page, "jpegheader", None) is not None:
            self.arguments["jpegheader"] = page.jpegheader
        self.inverted = int(page.photometric) == 0
        self.offsets, self.counts = page.dataoffsets, page.databytecounts
        self._cache: OrderedDict[int, np.ndarray] = OrderedDict()

    @staticmethod
    def supports(page: Any) -> bool:
        """Whether the page holds 8-bit grey, RGB or RGBA, with the samples of a pixel stored together."""
        return (
            hasattr(page, "decode")
            and page.dtype == np.uint8
            and int(page.bitspersample) == 8
            and int(page.planarconfig) == 1
            and int(page.samplesperpixel) in (1, 3, 4)
            and _known_colours(page)
            and int(page.imagedepth) == 1
            and len(page.dataoffsets) > 0
        )

    def segment(self, file: int, index: int) -> np.ndarray | None:
        """Decode one tile or strip to RGB, uint8; None if the file leaves it out."""
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
            pixels = _without_fourth(pixels, self.page)
        if self.tile[0] * self.tile[1] > _CACHED_SEGMENT_PIXELS:
            self._cache[index] = pixels
            if len(self._cache) > 2:
                self._cache.popitem(last=False)
        return pixels

    def read(self, file: int, x: int, y: int, w: int, h: int) -> np.ndarray:
        """Read a window inside the image as RGB, uint8, shape (h, w, 3)."""
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
    """A slide opened by tiffslide.

    The levels are those that tiffslide finds or, in a generic TIFF, those of the main image. If a level is a single
    TIFF page of 8-bit samples, its tiles are decoded here, which takes half the time of tiffslide's way through zarr
    and does not hold Python's global lock.
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
        self.vendor = str(properties.get("tiffslide.vendor") or "generic-tiff")
        self.objective = number(properties.get("tiffslide.objective-power"))
        tif = slide.ts_tifffile
        index = first = int(properties.get("tiffslide.series-index") or 0)
        sizes = list(slide.level_dimensions)
        if self.vendor == "generic-tiff":  # `examine` sets the pixel size of these
            index = main_image(tif)[0]
            sizes = [_size(level) for level in tif.series[index].levels]
            if tif.is_ome:
                self.vendor = "ome-tiff"
        else:
            declared = pair(properties.get("tiffslide.mpp-x"), properties.get("tiffslide.mpp-y"))
            from_tags = self.vendor == "aperio" and "aperio.MPP" not in properties
            self.mpp = None if from_tags and not plausible(declared) else declared
        self.levels = tuple(level_of(int(w), int(h), *sizes[0]) for w, h in sizes)
        series = tif.series[index]
        key = series.keyframe
        tagged = self.vendor != "aperio" and _holds_ycbcr(key)
        self.unlike_openslide = index != first or _fourth_is_nothing(key) or tagged
        self._pages: list[_Page | None] = []
        for level in series.levels:
            page = level.pages[0]
            single = len(level.pages) == 1 and _Page.supports(page)
            self._pages.append(_Page(page, self.path) if single else None)
        if "tiffslide.series-composition" in properties or len(self._pages) != len(self.levels):
            self._pages = [None] * len(self.levels)
        # OpenSlide fills in tiles that a reduced level leaves out from the finer one.
        self.leaves_out = any(page is not None and 0 in page.counts for page in self._pages[1:])
        if any(page is None for page in self._pages):
            if series.dtype != np.uint8:
                raise not_8_bit(series.dtype, series.keyframe.samplesperpixel)
            if not _known_colours(series.keyframe):
                raise ValueError("a palette or an unusual colour space, left to Pillow")
            if index != first:
                raise _not_the_slide(_size(tif.series[first]), series, self.backend)

    def tile_size(self, level: int) -> tuple[int, int]:
        page = self._pages[level]
        return page.tile if page is not None else (256, 256)

    def _read(self, level: int, x: int, y: int, w: int, h: int) -> np.ndarray:
        page = self._pages[level]
        try:
            if page is not None:
                return page.read(self._file, x, y, w, h)
            size, base = self.levels[level], self.levels[0]
            # tiffslide rounds level-0 coordinates down to pixels of the level: take the smallest that give (x, y).
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


_UNIT_UM = {
    "m": 1e6, "cm": 1e4, "mm": 1e3, "nm": 1e-3, "pm": 1e-6, "µm": 1.0, "μm": 1.0, "um": 1.0, "&#181;m": 1.0,
    "\\u00B5m": 1.0, "micron": 1.0, "microns": 1.0, "micrometer": 1.0,
}  # fmt: skip
"""Length in µm of the units that OME-XML and ImageJ use."""

_TAG_UNIT_UM = {2: 25400.0, 3: 1e4, 4: 1e3, 5: 1.0}
"""Length in µm of the units that the ResolutionUnit tag stands for."""

_BESIDE_THE_SLIDE = re.compile(r"(?<![a-z])(label|macro|overview|thumbnail|barcode)(?![a-z])", re.IGNORECASE)


def _size(series: Any) -> tuple[int, int]:
    return int(series.keyframe.imagewidth), int(series.keyframe.imagelength)


def _fourth_is_nothing(page: Any) -> bool:
    """Whether the page has a fourth sample of unspecified meaning: neither transparency nor the black of CMYK."""
    extra = [int(value) for value in page.extrasamples[:1]]
    return int(page.samplesperpixel) == 4 and int(page.photometric) != 5 and extra not in ([1], [2])


def _holds_ycbcr(page: Any) -> bool:
    """Whether the page is tagged RGB, but holds JPEGs in JFIF, which are YCbCr, as Bio-Formats and QuPath write it."""
    return int(page.photometric) == 2 and int(page.compression) in (6, 7) and not page.extrasamples and page.is_jfif


def _without_fourth(pixels: np.ndarray, page: Any) -> np.ndarray:
    """Convert pixels of four samples to RGB: over white if the page declares the fourth as transparency."""
    if _fourth_is_nothing(page):
        return pixels[..., :3]
    return premultiplied_over_white(pixels) if int(page.extrasamples[0]) == 1 else over_white(pixels)


def main_image(tif: Any) -> tuple[int, int]:
    """Find the largest image, in a TIFF opened by tifffile, that is not a label, macro or thumbnail.

    Returns
    -------
    index : int
        Its index in ``tif.series``.
    others : int
        Number of further images that could be slides: tiled or at least a quarter of its size, and neither labels,
        macros or thumbnails nor smaller copies of it.
    """
    series = tif.series
    own = [i for i, one in enumerate(series) if one.keyframe.parent is tif]  # OME-XML may list other files' images
    slides = [i for i in own if not (series[i].keyframe.is_reduced or _BESIDE_THE_SLIDE.search(series[i].name))] or own
    index = max(slides, key=lambda i: math.prod(_size(series[i])))
    size = _size(series[index])
    others = len(series[index].pages) - 1
    for i in slides:
        one = series[i]
        copy = len(one.levels) == 1 and _size(one) != size and level_of(*_size(one), *size).usable
        slide_like = one.keyframe.is_tiled or 4 * math.prod(_size(one)) >= math.prod(size)
        if i != index and slide_like and not copy:
            others += len(one.pages)
    return index, others


def _not_the_slide(shown: tuple[int, int], main: Any, backend: str) -> SlideError:
    width, height = _size(main)
    return SlideError(
        f"holds several images, of which {backend} shows one of {shown[0]} x {shown[1]} pixels, not the main one of "
        f"{width} x {height}",
        "`reader: auto` takes the main one where it can; else save that alone, as by: "
        f"vips copy 'OLD.tif[page={main.keyframe.index}]' 'NEW.tif[tile,pyramid]'",
    )


def _ome_mpp(xml: str, width: int, height: int) -> tuple[float, float] | None:
    """µm per pixel that OME-XML states for its first image of this size."""

    def value(of: str, name: str) -> str | None:
        found = re.search(rf"""\b{name}\s*=\s*["']([^"']+)["']""", of)
        return found[1] if found else None

    for tag in re.findall(r"<(?:\w+:)?Pixels\b[^>]*>", xml):
        if (value(tag, "SizeX"), value(tag, "SizeY")) == (str(width), str(height)):
            sides = (
                (number(value(tag, f"PhysicalSize{side}")), _UNIT_UM.get(value(tag, f"PhysicalSize{side}Unit") or "µm"))
                for side in ("X", "Y")
            )
            return pair(*(size * unit if size and unit else None for size, unit in sides))
    return None


def _tag_mpp(page: Any, unit: float | None) -> tuple[float, float] | None:
    """µm per pixel by the resolution tags, whose unit is `unit` µm long."""
    x, y = page.resolution if "XResolution" in page.tags and "YResolution" in page.tags else (0, 0)
    return pair(unit / x, unit / y) if unit and x and y else None


def examine(path: Path, slide: Slide) -> None:
    """Set a slide's pixel size from its TIFF metadata, and refuse a file that its reader shows wrongly.

    Readers show some kinds of TIFF wrongly, without an error:

    - Channels stored as separate images: the first is shown as grey, or four are taken for RGBA.
    - Samples of 16 bits: OpenSlide and Pillow show the upper eight, nearly black if the camera fills only twelve.
    - Pixels stored turned or mirrored: OpenSlide mirrors each tile in its place instead of the whole image.
    - A fourth sample: OpenSlide takes it for transparency, whatever it is.
    - Several images: OpenSlide and Pillow show the first.

    Raises
    ------
    SlideError
        When the file is one of these and the slide's reader does not show it correctly.
    """
    import tifffile

    try:
        with tifffile.TiffFile(path) as tif:
            index, others = main_image(tif)
            main = tif.series[index]
            page = main.keyframe
            channels = main.shape[main.axes.index("C")] if (tif.is_ome or tif.is_imagej) and "C" in main.axes else 1
            kind, samples = page.dtype, page.samplesperpixel
            turned = page.tags.valueof("Orientation", 1)
            ycbcr = _holds_ycbcr(page)
            mpp = _ome_mpp(tif.ome_metadata or "", *_size(main)) if tif.is_ome else None
            by_tags = _tag_mpp(page, _TAG_UNIT_UM.get(page.resolutionunit))
            if tif.is_imagej and not plausible(by_tags):
                by_tags = _tag_mpp(page, _UNIT_UM.get((tif.imagej_metadata or {}).get("unit", ""))) or by_tags
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
    if slide.width * slide.height != math.prod(_size(main)):
        raise _not_the_slide((slide.width, slide.height), main, slide.backend)
    if slide.backend == "openslide" and turned != 1:
        raise SlideError(
            f"is stored turned or mirrored (its orientation tag is {turned}), which OpenSlide shows wrongly",
            "save it upright; `reader: tiffslide` shows it as it is stored",
        )
    if slide.backend == "openslide" and ycbcr:
        raise SlideError(
            "is tagged RGB, but holds YCbCr, which OpenSlide shows in wrong colours",
            "`reader: auto` and `reader: tiffslide` show the right ones",
        )
    if slide.backend == "openslide" and _fourth_is_nothing(page):
        raise SlideError(
            "has a fourth sample that it does not call transparency, which OpenSlide takes for it",
            "`reader: auto` leaves that out where it can; else save it as RGB, as by: "
            "vips extract_band OLD.tif 'NEW.tif[tile,pyramid]' 0 --n 3",
        )
    if others:
        slide.warnings.append(
            f"the file holds {others} more image{'s' * (others > 1)} beside the one of {slide.width} x {slide.height} "
            "pixels that is read: to have their nuclei, save each as a file of its own"
        )
    slide.mpp = mpp or by_tags
    if mpp is None and not plausible(by_tags):
        slide.mpp, slide.refused_mpp = None, by_tags


def _stumbled(path: Path, error: Exception) -> None:
    """Log an error that a broken file caused in tifffile, or raise it if the machine is to blame.

    A `MemoryError` is logged as well: broken sizes can ask for any amount of memory.
    """
    if not isinstance(error, MemoryError):
        raise_for_machine(error, path)
    log.debug("tifffile does not understand %s: %s", path, error)
