"""Check that a TIFF file is complete by walking its directories, without decoding anything.

A slide whose copy was cut short often still opens: its directory lies at the front, but the tiles that it lists are
missing. Every table read here is bounded by the size of the file, so that a directory that claims millions of tiles
costs nothing.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from pipeline.errors import SlideError

MAX_PIXELS = 500_000_000_000
"""Largest image that is believed, some 700,000 x 700,000 pixels; the largest slides of scanners have a tenth of it."""

MAX_SEGMENT_PIXELS = 64_000_000
"""Largest tile or strip of a TIFF file that may be decoded."""

_COPY_AGAIN = "copy or export the slide again"
_TYPES = {1: "u1", 3: "u2", 4: "u4", 6: "i1", 7: "u1", 8: "i2", 9: "i4", 13: "u4", 16: "u8", 17: "i8", 18: "u8"}
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_WIDTH, _LENGTH, _STRIP_OFFSETS, _SAMPLES, _ROWS_PER_STRIP, _STRIP_BYTES, _PLANAR = 256, 257, 273, 277, 278, 279, 284
_TILE_WIDTH, _TILE_LENGTH, _TILE_OFFSETS, _TILE_BYTES, _SUB_IFDS, _NDPI = 322, 323, 324, 325, 330, 65420
_MAX_DIRECTORIES = 100_000


@dataclass(frozen=True)
class _Layout:
    order: str
    big: bool

    @property
    def count(self) -> tuple[str, int]:
        return (self.order + "Q", 8) if self.big else (self.order + "H", 2)

    @property
    def offset(self) -> tuple[str, int]:
        return (self.order + "Q", 8) if self.big else (self.order + "I", 4)

    @property
    def entry(self) -> int:
        return 20 if self.big else 12


def is_tiff(path: Path) -> bool:
    """Whether the file starts with the signature of TIFF or BigTIFF."""
    with path.open("rb") as file:
        return _layout(file.read(4)) is not None


def _layout(magic: bytes) -> _Layout | None:
    orders = {b"II": "<", b"MM": ">"}
    if len(magic) < 4 or magic[:2] not in orders:
        return None
    order = orders[magic[:2]]
    version = struct.unpack(order + "H", magic[2:4])[0]
    return _Layout(order, version == 43) if version in (42, 43) else None


def check_tiff(path: Path) -> None:
    """Check that every tile or strip that a TIFF file lists lies inside the file.

    Parameters
    ----------
    path : pathlib.Path
        A TIFF or BigTIFF file. Other files are not checked, nor are files from 4 GiB on that are not BigTIFF.

    Raises
    ------
    SlideError
        When the file is cut short, or the image size that it states is impossible or does not fit its tile tables.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        layout = _layout(file.read(4))
        if layout is None:
            return
        if not layout.big and size >= 2**32:
            return  # NDPI, which stores the upper halves of its offsets elsewhere, that of the first directory too
        file.seek(8 if layout.big else 4)
        first = _unpack(file, *layout.offset, size)
        pending = [first]
        seen: set[int] = set()
        ndpi = False
        while pending and len(seen) < _MAX_DIRECTORIES:
            at = pending.pop()
            if at == 0 or at in seen:
                continue
            seen.add(at)
            tags, following = _directory(file, layout, at, size)
            ndpi = ndpi or _NDPI in tags
            if not ndpi:
                pending.append(following)
            pending += [int(v) for v in _values(file, layout, tags, _SUB_IFDS, size)]
            _check_image(file, layout, tags, size)


def _truncated(what: str) -> SlideError:
    return SlideError(f"file is truncated: {what}", _COPY_AGAIN)


def _unpack(file: BinaryIO, code: str, length: int, size: int) -> int:
    data = file.read(length)
    if len(data) < length:
        raise _truncated(f"its directory lies past its end ({size} bytes)")
    return int(struct.unpack(code, data)[0])


def _directory(file: BinaryIO, layout: _Layout, at: int, size: int) -> tuple[dict[int, tuple[int, int, bytes]], int]:
    if at >= size:
        raise _truncated(f"a directory at byte {at} lies past its end ({size} bytes)")
    file.seek(at)
    count = _unpack(file, *layout.count, size)
    if count * layout.entry > size - at:
        raise _truncated(f"a directory at byte {at} reaches past its end ({size} bytes)")
    block = file.read(count * layout.entry)
    following = _unpack(file, *layout.offset, size)
    tags = {}
    for i in range(count):
        entry = block[i * layout.entry : (i + 1) * layout.entry]
        tag, kind = struct.unpack(layout.order + "HH", entry[:4])
        number = struct.unpack(layout.order + ("Q" if layout.big else "I"), entry[4 : 12 if layout.big else 8])[0]
        tags[tag] = (kind, number, entry[12 if layout.big else 8 :])
    return tags, following


def _values(
    file: BinaryIO, layout: _Layout, tags: dict[int, tuple[int, int, bytes]], tag: int, size: int
) -> np.ndarray:
    """Values of an integer tag; empty when the tag is missing or of another type."""
    if tag not in tags:
        return np.empty(0, np.uint64)
    kind, number, inline = tags[tag]
    if kind not in _TYPES:
        return np.empty(0, np.uint64)
    length = number * _SIZES[kind]
    if length > len(inline):
        at = int(struct.unpack(layout.offset[0], inline)[0])
        if at + length > size:
            raise _truncated(f"the table of tag {tag} lies past its end ({size} bytes)")
        file.seek(at)
        inline = file.read(length)
    return np.frombuffer(inline[:length], np.dtype(layout.order + _TYPES[kind])).astype(np.uint64)


def _check_image(file: BinaryIO, layout: _Layout, tags: dict[int, tuple[int, int, bytes]], size: int) -> None:
    def one(tag: int, default: int) -> int:
        # Do not read the table of a damaged entry that claims several values for a scalar.
        if tag not in tags or tags[tag][1] != 1:
            return default
        values = _values(file, layout, tags, tag, size)
        return int(values[0]) if len(values) else default

    width, length = one(_WIDTH, 0), one(_LENGTH, 0)
    if not width or not length:
        return
    if width * length > MAX_PIXELS:
        raise SlideError(f"claims {width} x {length} pixels, more than any slide has", _COPY_AGAIN)
    tiled = _TILE_OFFSETS in tags
    if tiled:
        across, down = one(_TILE_WIDTH, 0), one(_TILE_LENGTH, 0)
        if not across or not down:
            raise SlideError("its TIFF directory has tiles of no size", _COPY_AGAIN)
        if across * down > MAX_SEGMENT_PIXELS:
            # OpenSlide would try to allocate the tile, and end the process when there is not enough memory.
            raise SlideError(f"claims tiles of {across} x {down} pixels, more than any slide has", _COPY_AGAIN)
        expected = -(-width // across) * -(-length // down)
    else:
        expected = -(-length // min(length, max(1, one(_ROWS_PER_STRIP, length))))
    if one(_PLANAR, 1) == 2:
        expected *= max(1, one(_SAMPLES, 1))
    kind = "tiles" if tiled else "strips"
    present = tags.get(_TILE_OFFSETS if tiled else _STRIP_OFFSETS, (0, 0, b""))[1]
    if present < expected:
        raise SlideError(f"claims {width} x {length} pixels but holds {present} of {expected} {kind}", _COPY_AGAIN)
    if tiled and present > expected:
        # The stated size must have been changed: the image would be read with a part missing, or sheared.
        raise SlideError(f"claims {width} x {length} pixels, {expected} tiles, but holds {present}", _COPY_AGAIN)
    offsets = _values(file, layout, tags, _TILE_OFFSETS if tiled else _STRIP_OFFSETS, size)
    counts = _values(file, layout, tags, _TILE_BYTES if tiled else _STRIP_BYTES, size)
    n = min(len(offsets), len(counts))
    if 0 < len(counts) < expected:
        # Tiles without a byte count would be taken for tiles that were never scanned.
        raise SlideError(
            f"claims {width} x {length} pixels but states the size of {len(counts)} of {expected} {kind}", _COPY_AGAIN
        )
    # float64 is exact up to 2^53 bytes and cannot overflow, as a sum of uint64 can.
    past = int(np.count_nonzero(offsets[:n].astype(np.float64) + counts[:n].astype(np.float64) > size))
    if past:
        raise _truncated(f"{past} of {n} {kind} lie past its end")
    if n and not counts[:n].any():
        raise SlideError(f"claims {width} x {length} pixels but none of its {n} {kind} holds data", _COPY_AGAIN)


def quick_hash(path: Path) -> str:
    """SHA-256 (hex) of a file's size and its first and last MiB: tells slides apart without reading them whole."""
    import hashlib

    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        digest.update(file.read(1 << 20))
        if size > 1 << 20:
            file.seek(max(1 << 20, size - (1 << 20)), os.SEEK_SET)
            digest.update(file.read(1 << 20))
    return digest.hexdigest()
