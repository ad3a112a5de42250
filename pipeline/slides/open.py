"""Open any slide: OpenSlide, then tiffslide, then a plain image.

All three give the same `Slide`: levels, µm per pixel, and windows of a level as RGB. Coordinates are those of
OpenSlide's level 0. Where a format has bounds (MIRAX, Leica SCN), the part of level 0 that holds the scan is in
`Slide.bounds`; the origin stays OpenSlide's, so that coordinates agree with every other tool built on it.
"""

from __future__ import annotations

import logging
import math
import os
import re
import threading
import warnings
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from pipeline.errors import PipelineError, SlideError, of_the_machine
from pipeline.slide_table import MPP_RANGE
from pipeline.slides.integrity import MAX_SEGMENT_PIXELS, check_tiff, is_tiff, quick_hash

log = logging.getLogger(__name__)


def raise_for_machine(error: Exception, path: Path) -> None:
    """Raise an error again that is the machine's and not the slide's: read another time, the slide may be sound.

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
    try:  # libraries have errors of their own for a file that has gone
        with path.open("rb") as file:
            file.read(1)
    except OSError as why:
        raise _gone(path, why) from None


def _gone(path: Path, error: OSError) -> PipelineError:
    return PipelineError(
        f"{path} could be read before, and now: {error.strerror or error}",
        "see that its folder is mounted, and run the same command again",
    )


READERS = ("auto", "openslide", "tiffslide", "image")
MAX_IMAGE_PIXELS = 400_000_000
"""Largest plain image, which is decoded whole: 1.2 GB of RGB."""

MOST_UNEQUAL = 2
"""How much longer than wide a pixel may be, or the other way round."""

_CACHED_SEGMENT_PIXELS = 1_000_000
_BLOCK = 512
_MPP_HINT = "give it in the `mpp` column of the slide table, or as `mpp=` in the config for all slides"


@dataclass(frozen=True)
class Level:
    """One level of a slide's pyramid.

    Parameters
    ----------
    width, height : int
        Size in pixels of the level.
    scale_x, scale_y : float
        Level-0 pixels per pixel of the level; whole where the level's size was merely rounded down.
    """

    width: int
    height: int
    scale_x: float
    scale_y: float

    @property
    def usable(self) -> bool:
        """Whether the level shows the slide as level 0 does: one of other proportions is rotated, or another image."""
        return abs(self.scale_x / self.scale_y - 1) < 0.05


def level_of(width: int, height: int, width0: int, height0: int) -> Level:
    """Level of ``width x height`` pixels of a slide of ``width0 x height0``, its scale made whole where it was rounded.

    462 of 7400 pixels is a level of scale 16 (7400 / 16 = 462.5), not 16.017: pyramids drop what does not fill a pixel.
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
    """A slide that is open for reading; one handle serves one thread.

    Attributes
    ----------
    path : pathlib.Path
        The file.
    backend : {"openslide", "tiffslide", "image"}
        What reads the pixels.
    vendor : str
        Format as the library names it.
    levels : tuple of Level
        Level 0 first.
    mpp : tuple of float or None
        µm per level-0 pixel, x and y, by the file's metadata.
    objective : float or None
        Magnification of the objective.
    bounds : tuple of int or None
        Part of level 0 that was scanned: x, y, width, height.
    properties : dict
        The library's own metadata.
    """

    backend: str

    def __init__(self, path: Path) -> None:
        self.path = path
        self.vendor = "unknown"
        self.levels: tuple[Level, ...] = ()
        self.mpp: tuple[float, float] | None = None
        self.objective: float | None = None
        self.bounds: tuple[int, int, int, int] | None = None
        self.properties: dict[str, Any] = {}

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
        """OpenSlide's quickhash-1, else a hash of the file's size, begin and end."""
        return str(self.properties.get("openslide.quickhash-1") or quick_hash(self.path))

    def tile_size(self, level: int) -> tuple[int, int]:
        """Width and height of what is decoded at once on a level: a tile that cannot be read spoils as much."""
        return 256, 256

    def read(self, level: int, x: int, y: int, w: int, h: int) -> np.ndarray:
        """Read a window of a level.

        Parameters
        ----------
        level : int
            Level.
        x, y, w, h : int
            Window in pixels of the level; it may reach outside, where the slide is white.

        Returns
        -------
        numpy.ndarray
            RGB, uint8, shape (h, w, 3).

        Raises
        ------
        SlideError
            When the data cannot be decoded. The slide can still be read elsewhere.
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
        """`read`, with a window inside the level."""

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
    """RGBA with straight alpha, uint8 (h, w, 4), over white: RGB, uint8 (h, w, 3)."""
    import cv2

    alpha = rgba[..., 3]
    if alpha.size and int(alpha.min()) == 255:
        return np.asarray(cv2.cvtColor(rgba, cv2.COLOR_RGBA2RGB))  # 20 times as fast as NumPy's copy of three channels
    a = alpha[..., None].astype(np.uint16)
    return ((rgba[..., :3] * a + 255 * (255 - a) + 127) // 255).astype(np.uint8)


def premultiplied_over_white(rgba: np.ndarray) -> np.ndarray:
    """RGBA with premultiplied alpha, uint8 (h, w, 4), over white: RGB, uint8 (h, w, 3)."""
    return np.minimum(rgba[..., :3].astype(np.uint16) + (255 - rgba[..., 3:]), 255).astype(np.uint8)


def _number(value: Any) -> float | None:
    try:
        number = float(str(value).strip().rstrip(";"))
    except ValueError:
        return None
    return number if math.isfinite(number) and number > 0 else None


def _pair(x: Any, y: Any) -> tuple[float, float] | None:
    first, second = _number(x), _number(y)
    return (first, second) if first and second else None


def plausible(mpp: tuple[float, float] | None) -> bool:
    """Whether both µm per pixel lie in `MPP_RANGE`."""
    return mpp is not None and all(MPP_RANGE[0] <= value <= MPP_RANGE[1] for value in mpp)


# --- OpenSlide -------------------------------------------------------------------------------------------------------


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
        self.mpp = _pair(properties.get("openslide.mpp-x"), properties.get("openslide.mpp-y"))
        if self.vendor == "generic-tiff" and not plausible(self.mpp):
            self.mpp = None  # from the resolution tags: dots per inch of some printer
        self.objective = _number(properties.get("openslide.objective-power"))
        self.bounds = _bounds(properties, width, height)

    def tile_size(self, level: int) -> tuple[int, int]:
        if self._downsamples[level] != int(self._downsamples[level]):
            return _BLOCK, _BLOCK
        size = [_number(self.properties.get(f"openslide.level[{level}].tile-{side}")) for side in ("width", "height")]
        return (int(size[0]), int(size[1])) if size[0] and size[1] else (256, 256)

    def _read(self, level: int, x: int, y: int, w: int, h: int) -> np.ndarray:
        down = self._downsamples[level]
        if down == int(down):
            return self._region(level, x * int(down), y * int(down), w, h)
        # OpenSlide wants level-0 coordinates, which cannot name every pixel of this level; it interpolates between
        # pixels by what is left over. Blocks at fixed places make a pixel's value independent of the window.
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
            # A handle that met an error answers nothing but this error from then on.
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


# --- tiffslide -------------------------------------------------------------------------------------------------------


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
            # Neighbouring windows meet the same large strip again and again.
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
        declared = _pair(properties.get("tiffslide.mpp-x"), properties.get("tiffslide.mpp-y"))
        from_tags = self.vendor == "generic-tiff" or (self.vendor == "aperio" and "aperio.MPP" not in properties)
        self.mpp = None if from_tags and not plausible(declared) else declared
        if tif.is_ome:
            self.vendor = "ome-tiff"
            self.mpp = _ome_mpp(tif.ome_metadata or "") or self.mpp
        self.objective = _number(properties.get("tiffslide.objective-power"))
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
                raise _not_8_bit(series.dtype, series.keyframe.samplesperpixel)
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
        value = _number(size[1]) if size else None
        if value is None or factor is None:
            return None
        found.append(value * factor)
    return found[0], found[1]


def _mpp_beside(path: Path) -> tuple[float, float] | None:
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


def _check_samples(path: Path, backend: str) -> None:
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
        raise _not_8_bit(kind, samples)
    if backend == "openslide" and turned != 1:
        raise SlideError(
            f"is stored turned or mirrored (its orientation tag is {turned}), which OpenSlide shows wrongly",
            "save it upright; `reader: tiffslide` shows it as it is stored",
        )


# --- plain images ----------------------------------------------------------------------------------------------------


def _not_8_bit(kind: np.dtype[Any], samples: int) -> SlideError:
    hint = "convert it to 8-bit RGB"
    if kind == np.uint16:
        hint += ", as by: vips msb OLD.tif 'NEW.tif[tile,pyramid,compression=jpeg,Q=90]'"
    return SlideError(f"holds {samples} x {kind.name} a pixel, where 8-bit grey, RGB or RGBA can be read", hint)


def as_rgb(pixels: np.ndarray) -> np.ndarray:
    """Grey, RGB or RGBA of 8 bits, samples last, as RGB, uint8 (h, w, 3).

    Raises
    ------
    SlideError
        For other shapes and types.
    """
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] not in (1, 2, 3, 4):
        raise _not_8_bit(pixels.dtype, pixels.shape[-1])
    if pixels.shape[2] == 4:
        return over_white(pixels)
    if pixels.shape[2] < 3:
        return np.repeat(pixels[..., :1], 3, axis=2)
    return np.ascontiguousarray(pixels)


_decoded: OrderedDict[tuple[str, int, int], np.ndarray] = OrderedDict()
_decoding = threading.Lock()


class ImageReader(Slide):
    """A plain PNG, JPEG or TIFF image, decoded whole; handles of one file share its pixels."""

    backend = "image"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        status = path.stat()
        key = (str(path.resolve()), status.st_size, status.st_mtime_ns)
        with _decoding:
            if key not in _decoded:
                _decoded.clear()
                _decoded[key] = _decode_image(path)
            self._pixels = _decoded[key]
        height, width = self._pixels.shape[:2]
        self.levels = (Level(width, height, 1.0, 1.0),)
        self.vendor = "image"

    def _read(self, level: int, x: int, y: int, w: int, h: int) -> np.ndarray:
        return self._pixels[y : y + h, x : x + w].copy()

    def close(self) -> None:
        """Nothing to close."""


def _png_bits(path: Path) -> int:
    """Bits a sample of a PNG, from its header."""
    with path.open("rb") as file:
        return file.read(25)[24]


def _decode_image(path: Path) -> np.ndarray:
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None  # the limit below holds instead
    with Image.open(path) as image:
        width, height = image.size
        if width * height > MAX_IMAGE_PIXELS:
            raise SlideError(
                f"is a plain image of {width} x {height} pixels, too large to decode whole",
                "convert it to a tiled pyramidal TIFF",
            )
        if image.format == "PNG" and _png_bits(path) > 8:  # of colours, Pillow shows the upper eight
            raise _not_8_bit(np.dtype(np.uint16), len(image.getbands()))
        try:
            image.load()
        except Exception as error:  # what each format's decoder stumbles over
            raise_for_machine(error, path)
            raise SlideError(
                f"is a {image.format} of {width} x {height} pixels that is damaged or cut short: {error}",
                "copy or export the image again",
            ) from None
        if image.mode.startswith(("I", "F")):
            raise _not_8_bit(np.asarray(image).dtype, 1)
        mode = "RGBA" if "A" in image.mode or "a" in image.mode or "transparency" in image.info else "RGB"
        return as_rgb(np.asarray(image.convert(mode)))


# --- opening ---------------------------------------------------------------------------------------------------------


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the image libraries' warnings to themselves: what matters ends in a `SlideError`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


_CLASSES: dict[str, type[Slide]] = {"openslide": OpenSlideReader, "tiffslide": TiffSlideReader, "image": ImageReader}


def open_slide(path: Path | str, reader: str = "auto", *, before: bool = False) -> Slide:
    """Open a slide.

    Parameters
    ----------
    path : pathlib.Path or str
        The file.
    reader : {"auto", "openslide", "tiffslide", "image"}
        What reads it. ``auto`` takes the first that can.
    before : bool
        Whether the file could be read before: when it cannot now, the slide is not to blame.

    Returns
    -------
    Slide

    Raises
    ------
    SlideError
        When the file cannot be read, and why.
    PipelineError
        When there is no such reader, or the file has gone since it could be read.
    OSError
        When the disk or the file server failed.
    """
    path = Path(path)
    if reader not in READERS:
        raise PipelineError(f"there is no reader {reader!r}", f"take one of {', '.join(READERS)}")
    _check_file(path, before)
    with quiet():
        slide = _open_auto(path) if reader == "auto" else _open_with(path, reader)
        if slide is not None and slide.vendor in ("generic-tiff", "ome-tiff", "image") and is_tiff(path):
            try:
                _check_samples(path, slide.backend)
                slide.mpp = slide.mpp or _mpp_beside(path)
            except (PipelineError, OSError):
                slide.close()
                raise
    if slide is None:
        raise SlideError(
            "is no slide that OpenSlide, tiffslide or Pillow can read"
            if reader == "auto"
            else f"{reader} cannot read this file",
            "check that the file is a whole-slide image or an image" if reader == "auto" else "try `reader: auto`",
        )
    return slide


def _check_file(path: Path, before: bool) -> None:
    try:
        if path.is_dir():
            raise SlideError(f"{path.name} is a folder, not a slide file", "give the slide's file")
        if path.exists() and not path.is_file():
            raise SlideError(f"{path.name} is no regular file", "give the slide's file")
        with path.open("rb") as file:
            if not file.read(1):
                raise SlideError("file is empty", "copy the slide again")
        check_tiff(path)
    except OSError as error:
        if of_the_machine(error):
            raise
        if before:
            raise _gone(path, error) from None
        if isinstance(error, FileNotFoundError):
            if path.is_symlink():
                raise SlideError(
                    f"{path} is a link to {path.readlink()}, which does not exist", "mend the link"
                ) from None
            raise SlideError(f"{path} does not exist", "check the path in the slide table") from None
        if isinstance(error, PermissionError):
            raise SlideError(f"no permission to read {path}", "make the file readable") from None
        raise SlideError(f"cannot read {path}: {error.strerror or error}") from None


def _open_with(path: Path, reader: str) -> Slide | None:
    """The slide, or None when this reader cannot open it."""
    try:
        return _CLASSES[reader](path)
    except SlideError:
        raise
    except MemoryError:
        raise SlideError(f"{reader} asks for more memory than there is to open the file") from None
    except Exception as error:  # the libraries raise whatever a broken file makes them stumble over
        raise_for_machine(error, path)
        log.debug("%s cannot open %s: %s: %s", reader, path, type(error).__name__, error)
        return None


def _open_auto(path: Path) -> Slide | None:
    first = _open_with(path, "openslide")
    if first is not None and not (first.vendor in ("aperio", "generic-tiff") and is_tiff(path)):
        return first
    try:
        second = _open_with(path, "tiffslide") if first is None or is_tiff(path) else None
    except SlideError:
        if first is None:
            raise
        second = None
    if first is None:
        return second or _open_with(path, "image")
    if second is None or not _prefer_tiffslide(first, second):
        if second is not None:
            second.close()
        return first
    # What only OpenSlide knows stays: the quick hash, the objective of more formats.
    second.properties = {**second.properties, **first.properties}
    second.mpp = second.mpp or first.mpp
    second.objective = second.objective or first.objective
    if second.vendor == "generic-tiff":
        second.vendor = first.vendor
    first.close()
    return second


def _prefer_tiffslide(first: Slide, second: Slide) -> bool:
    """Whether tiffslide shall read a tiled TIFF that OpenSlide opens too.

    For two reasons. OpenSlide opens an OME-TIFF as a generic TIFF and does not see the levels in its SubIFDs, nor the
    pixel size in its XML. And decoding tiles directly is two to four times as fast as OpenSlide and names every pixel
    of every level exactly, where OpenSlide interpolates at scales that are not whole.
    """
    if (first.width, first.height) != (second.width, second.height) or len(second.levels) < len(first.levels):
        return False
    if first.mpp is not None and second.mpp is None:
        return False
    # The two must agree on colours, lest a rare compression be misread.
    w, h = min(256, first.width), min(256, first.height)
    x, y = (first.width - w) // 2, (first.height - h) // 2
    try:
        ours = second.read(0, x, y, w, h).astype(np.int16)
    except SlideError:
        return False
    try:
        difference = np.abs(ours - first.read(0, x, y, w, h))
    except SlideError:
        return True
    return float(difference.mean()) < 2


class SlidePool:
    """Handles of one slide, one for each thread that asks.

    Parameters
    ----------
    opener : callable
        Opens the slide.
    """

    def __init__(self, opener: Callable[[], Slide]) -> None:
        self._opener = opener
        self._local = threading.local()
        self._all: list[Slide] = []
        self._lock = threading.Lock()

    def get(self) -> Slide:
        """This thread's handle."""
        slide: Slide | None = getattr(self._local, "slide", None)
        if slide is None:
            with self._lock:  # opening silences warnings, which is global
                slide = self._opener()
                self._all.append(slide)
            self._local.slide = slide
        return slide

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for slide in self._all:
            slide.close()


# --- pixel size ------------------------------------------------------------------------------------------------------


def resolve_mpp(slide: Slide, given: float | None, source: str = "table") -> tuple[tuple[float, float], str]:
    """µm per level-0 pixel: the one given, else the one in the file's metadata.

    Parameters
    ----------
    slide : Slide
        The slide.
    given : float or None
        µm per pixel from the slide table or the configuration.
    source : str
        Where `given` comes from, ``"table"`` or ``"config"``.

    Returns
    -------
    mpp : tuple of float
        x and y.
    source : str
        `source`, or ``"metadata"``.

    Raises
    ------
    SlideError
        When there is none, or when it is not plausible for a slide.
    """
    if given is not None:
        mpp: tuple[float, float] | None = (given, given)
    else:
        mpp, source = slide.mpp, "metadata"
    if mpp is None:
        raise SlideError("no pixel size (mpp) in the file's metadata", _MPP_HINT)
    if not plausible(mpp):
        wrong = next(value for value in mpp if not MPP_RANGE[0] <= value <= MPP_RANGE[1])
        raise SlideError(
            f"mpp {wrong:g} µm/px of the {source} is not plausible, slides have {MPP_RANGE[0]:g} to {MPP_RANGE[1]:g}",
            _MPP_HINT,
        )
    if max(mpp) > MOST_UNEQUAL * min(mpp):
        raise SlideError(
            f"pixels of {mpp[0]:g} x {mpp[1]:g} µm by the {source} are not plausible, slides have square ones",
            _MPP_HINT,
        )
    return mpp, source
