"""Read plain images, which are decoded whole."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np

from pipeline.errors import SlideError
from pipeline.slides.slide import Level, Slide, as_rgb, not_8_bit, raise_for_machine

MAX_IMAGE_PIXELS = 400_000_000
"""Largest plain image that is accepted. It takes 1.2 GB as RGB, and 1.6 GB more while it is decoded."""

_ROWS = 1024
"""Number of rows that are converted to RGB at once."""

_decoded: dict[tuple[str, int, int], np.ndarray] = {}
"""Pixels of the last decoded image, uint8 (h, w, 3), by its path, size in bytes and modification time."""

_decoding = threading.Lock()


class ImageReader(Slide):
    """A plain PNG, JPEG or TIFF image, decoded whole; handles of the same file share its pixels."""

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
    """Bits per sample of a PNG, from its header."""
    with path.open("rb") as file:
        return file.read(25)[24]


def _decode_image(path: Path) -> np.ndarray:
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None  # the limit below replaces Pillow's
    with Image.open(path) as image:
        width, height = image.size
        if width * height > MAX_IMAGE_PIXELS:
            raise SlideError(
                f"is a plain image of {width} x {height} pixels, too large to decode whole",
                "convert it to a tiled pyramidal TIFF",
            )
        if image.format == "PNG" and _png_bits(path) > 8:  # Pillow keeps the upper eight bits of colours
            raise not_8_bit(np.dtype(np.uint16), len(image.getbands()))
        try:
            image.load()
        except Exception as error:  # each format's decoder raises errors of its own types
            raise_for_machine(error, path)
            raise SlideError(
                f"is a {image.format} of {width} x {height} pixels that is damaged or cut short: {error}",
                "copy or export the image again",
            ) from None
        if image.mode.startswith(("I", "F")):
            raise not_8_bit(np.asarray(image).dtype, 1)
        mode = "RGBA" if "A" in image.mode or "a" in image.mode or "transparency" in image.info else "RGB"
        pixels = np.empty((height, width, 3), np.uint8)
        for top in range(0, height, _ROWS):  # whole, the conversion and its copy would take twice the memory
            bottom = min(top + _ROWS, height)
            pixels[top:bottom] = as_rgb(np.asarray(image.crop((0, top, width, bottom)).convert(mode)))
        return pixels
