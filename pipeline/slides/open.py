"""Open any slide, with OpenSlide, tiffslide or, for plain images, Pillow.

All three readers give the same `Slide`: levels, µm per pixel, and windows of a level as RGB. Coordinates are those of
OpenSlide's level 0. If a format has bounds (MIRAX, Leica SCN), `Slide.bounds` is the part of level 0 that holds the
scan; the origin stays OpenSlide's, so that coordinates agree with every other tool built on it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from pipeline.batch.slide_table import MPP_RANGE
from pipeline.errors import PipelineError, SlideError, of_the_machine
from pipeline.slides.image_reader import ImageReader
from pipeline.slides.integrity import check_tiff, is_tiff
from pipeline.slides.openslide_reader import OpenSlideReader
from pipeline.slides.slide import Slide, gone, plausible, quiet, raise_for_machine
from pipeline.slides.tiff_reader import TiffSlideReader, examine

log = logging.getLogger(__name__)

READERS = ("auto", "openslide", "tiffslide", "image")

MOST_UNEQUAL = 2
"""Largest ratio of a pixel's sides that is believed."""

_MPP_HINT = (
    "give it in the `mpp` column of the slide table, such as a copy of the results' slides.tsv, or, for all slides, "
    "also those whose files state one: --config mpp=NUMBER"
)

_STITCHED = ("ventana", "trestle")
"""Formats with tiles that overlap: no reader but OpenSlide puts them in their places."""

_CLASSES: dict[str, type[Slide]] = {"openslide": OpenSlideReader, "tiffslide": TiffSlideReader, "image": ImageReader}


def open_slide(path: Path | str, reader: str = "auto", *, before: bool = False) -> Slide:
    """Open a slide.

    Parameters
    ----------
    path : pathlib.Path or str
        The file.
    reader : {"auto", "openslide", "tiffslide", "image"}
        Reader to use; ``auto`` takes the one that reads the file best.
    before : bool
        Whether the file could be read before: if it cannot be read now, the slide is not to blame.

    Returns
    -------
    Slide

    Raises
    ------
    SlideError
        When the file cannot be read; the message says why.
    PipelineError
        When there is no such reader, or a file that could be read before is gone.
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
                examine(path, slide)
            except (PipelineError, OSError):
                slide.close()
                raise
    if slide is None:
        raise SlideError(
            "is not a slide that OpenSlide, tiffslide or Pillow can read"
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
            raise SlideError(f"{path.name} is not a regular file", "give the slide's file")
        with path.open("rb") as file:
            if not file.read(1):
                raise SlideError("file is empty", "copy the slide again")
        check_tiff(path)
    except OSError as error:
        if of_the_machine(error):
            raise
        if before:
            raise gone(path, error) from None
        if isinstance(error, FileNotFoundError):
            if path.is_symlink():
                raise SlideError(
                    f"{path} is a link to {path.readlink()}, which does not exist", "fix the link"
                ) from None
            raise SlideError(f"{path} does not exist", "check the path in the slide table") from None
        if isinstance(error, PermissionError):
            raise SlideError(f"no permission to read {path}", "make the file readable") from None
        raise SlideError(f"cannot read {path}: {error.strerror or error}") from None


def _open_with(path: Path, reader: str, why: list[str] | None = None) -> Slide | None:
    """Open the slide with one reader; None if the reader cannot open it, with the reason added to `why`."""
    try:
        return _CLASSES[reader](path)
    except PipelineError:
        raise
    except MemoryError:
        raise SlideError(f"{reader} asks for more memory than there is to open the file") from None
    except Exception as error:  # broken files cause errors of any type in the libraries
        raise_for_machine(error, path)
        log.debug("%s cannot open %s: %s: %s", reader, path, type(error).__name__, error)
        if why is not None:
            why.append(" ".join(str(error).split()))
        return None


def _vendor(path: Path) -> str | None:
    """Vendor of a format that OpenSlide alone reads, by the look of the file; None if it is none of these."""
    import openslide

    try:
        vendor: str | None = openslide.OpenSlide.detect_format(path)
    except Exception as error:
        raise_for_machine(error, path)
        return None
    return None if vendor in ("generic-tiff", "aperio") else vendor


def _open_auto(path: Path) -> Slide | None:
    why: list[str] = []
    first = _open_with(path, "openslide", why)
    vendor = _vendor(path) if first is None else None
    refused = SlideError(
        f"is a slide of format {vendor!r} that OpenSlide cannot open: {', '.join(why)}",
        "export it as a pyramidal TIFF",
    )
    if vendor in _STITCHED:
        raise refused
    if first is not None and not (first.vendor in ("aperio", "generic-tiff") and is_tiff(path)):
        return first
    if first is None and path.suffix.lower() == ".mrxs":  # its file alone is a JPEG of the overview
        if path.with_suffix("").is_dir() and vendor is not None:
            raise refused
        raise SlideError(
            f"is a MIRAX slide whose folder {path.stem!r} is missing or damaged", "copy the folder beside the file"
        )
    try:
        second = _open_with(path, "tiffslide") if first is None or is_tiff(path) else None
    except SlideError:
        if first is None:
            raise
        second = None
    if first is None:
        second = second or _open_with(path, "image")
        if second is None and vendor is not None:
            raise refused
        return second
    if second is None or not _prefer_tiffslide(first, second):
        if second is not None:
            second.close()
        return first
    # Keep what only OpenSlide knows: the quick hash, and the objective of more formats.
    second.properties = {**second.properties, **first.properties}
    second.mpp = second.mpp or first.mpp
    second.objective = second.objective or first.objective
    if second.vendor == "generic-tiff":
        second.vendor = first.vendor
    first.close()
    return second


def _prefer_tiffslide(first: Slide, second: Slide) -> bool:
    """Whether tiffslide (`second`) should read a tiled TIFF that OpenSlide (`first`) opens as well.

    tiffslide has these advantages:

    - OpenSlide opens an OME-TIFF as a generic TIFF and does not see the levels in its SubIFDs.
    - OpenSlide shows a thumbnail if it is the first image, and takes any fourth sample for transparency.
    - Decoding tiles directly is two to four times as fast, and addresses every pixel of every level exactly, whereas
      OpenSlide interpolates at scales that are not whole.
    """
    if isinstance(second, TiffSlideReader) and second.unlike_openslide:
        return True
    if (first.width, first.height) != (second.width, second.height) or len(second.levels) < len(first.levels):
        return False
    if isinstance(second, TiffSlideReader) and second.leaves_out:
        return False
    if first.vendor == "aperio" and first.mpp is not None and second.mpp is None:
        return False
    # Both must give the same colours: tiffslide may decode a rare compression wrongly.
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
    """Handles of one slide, one for each thread that asks for it.

    Parameters
    ----------
    opener : callable
        Function that opens the slide.
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
            with self._lock:  # opening changes the warning filters, which all threads share
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


def resolve_mpp(slide: Slide, given: float | None, source: str = "table") -> tuple[tuple[float, float], str]:
    """µm per level-0 pixel: as given, or else as in the file's metadata.

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
        `source`, or ``"metadata"`` if the file's metadata is used.

    Raises
    ------
    SlideError
        When there is no pixel size, or it is not plausible for a slide.
    """
    if given is not None:
        mpp: tuple[float, float] | None = (given, given)
    else:
        mpp, source = slide.mpp, "metadata"
    if mpp is None:
        told = slide.refused_mpp
        raise SlideError(
            "no pixel size (mpp) in the file's metadata"
            + (f"; its resolution tags say {told[0]:.4g} µm/px, as of a printer or a screen" if told else ""),
            _MPP_HINT,
        )
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
