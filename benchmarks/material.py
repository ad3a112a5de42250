"""Make inputs for the benchmarks: one painted field of tissue, repeated over stores and slides of any size.

Empty tiles take no space in stores, and equal tiles of a slide are stored once, so that a slide of 100,000 x 80,000
pixels takes some 100 MB.
"""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from pipeline.stores.grid import Grid
from pipeline.stores.lattice import CELL
from pipeline.stores.maps import MapStore

SIDE = 2048
"""Side of the field, and of the squares of tissue on a slide, in pixels."""


@dataclass(frozen=True, eq=False)
class Field:
    """A field of tissue with its nuclei, and maps like those of a good model.

    Parameters
    ----------
    rgb : numpy.ndarray
        uint8 ``(SIDE, SIDE, 3)``.
    labels : numpy.ndarray
        int32 ``(SIDE, SIDE)``: the nuclei.
    maps : numpy.ndarray
        uint8 ``(2, SIDE, SIDE)``: nucleus and distance map.
    """

    rgb: np.ndarray
    labels: np.ndarray
    maps: np.ndarray


@lru_cache(2)
def field(mpp: float, density: float = 5000.0, seed: int = 3) -> Field:
    """Paint a field full of tissue.

    Parameters
    ----------
    mpp : float
        µm per pixel.
    density : float
        Approximate number of nuclei per mm².
    seed : int
        The same seed gives the same field.
    """
    from pipeline.slides.synthetic import make_field
    from pipeline.training.labels import craft_distance

    rgb, labels = make_field(SIDE, SIDE, mpp, seed, density=density, background=False)
    rng = np.random.default_rng(seed)
    noise = cv2.GaussianBlur(rng.normal(0, 60, labels.shape).astype(np.float32), (0, 0), 2.0)
    soft = cv2.GaussianBlur((labels > 0).astype(np.float32), (0, 0), 1.0 / (2 * mpp))
    nucleus = np.clip(255 * soft + noise, 0, 255)
    distance = np.clip(255 * cv2.GaussianBlur(craft_distance(labels), (0, 0), 0.5 / (2 * mpp)) + noise, 0, 255)
    return Field(rgb, labels, np.rint(np.stack([nucleus, distance])).astype(np.uint8))


def tissue_squares(width: int, height: int, share: float) -> np.ndarray:
    """Which squares of `SIDE` pixels are tissue, bool ``(rows, columns)``: a central block of about this share."""
    rows, columns = -(-height // SIDE), -(-width // SIDE)
    chosen = np.zeros((rows, columns), bool)
    down = max(1, min(rows, round(rows * share**0.5)))
    across = max(1, min(columns, round(share * rows * columns / down)))
    top, left = (rows - down) // 2, (columns - across) // 2
    chosen[top : top + down, left : left + across] = True
    return chosen


def active_cells(squares: np.ndarray, width: int, height: int) -> np.ndarray:
    """Lattice cells that lie in these squares, bool ``(rows, columns)``, as the stores need them."""
    cells = np.kron(squares, np.ones((SIDE // CELL, SIDE // CELL), bool))
    return np.ascontiguousarray(cells[: -(-height // CELL), : -(-width // CELL)])


def _chunks(squares: np.ndarray, width: int, height: int, side: int) -> Iterator[tuple[slice, slice, slice, slice]]:
    """Chunks of `side` pixels in these squares: rows and columns in the store, then in the field."""
    for row, column in np.argwhere(squares):
        for y in range(row * SIDE, min((row + 1) * SIDE, height), side):
            for x in range(column * SIDE, min((column + 1) * SIDE, width), side):
                bottom, right = min(y + side, height), min(x + side, width)
                top, left = y % SIDE, x % SIDE
                yield slice(y, bottom), slice(x, right), slice(top, top + bottom - y), slice(left, left + right - x)


def write_maps(path: Path, field: Field, width: int, height: int, mpp: float, share: float) -> None:
    """Write a store of maps of a slide with this share of tissue."""
    squares = tissue_squares(width, height, share)
    grid = Grid(width, height, mpp, 1.0, 1.0)
    cells = active_cells(squares, width, height)
    store = MapStore.create(path, grid, ("nucleus", "distance"), cells, (1024, 1024))
    for rows, columns, top, left in _chunks(squares, width, height, 1024):
        store.array[:, rows, columns] = field.maps[:, top, left]


def write_tiles(path: Path, field: Field, width: int, height: int, mpp: float, share: float, tile: int = 1024) -> None:
    """Write a store of tiles of a slide with this share of tissue."""
    from pipeline.stores.tile_store import create_tiles

    squares = tissue_squares(width, height, share)
    array = create_tiles(path, Grid(width, height, mpp, 1.0, 1.0), active_cells(squares, width, height), tile)
    for rows, columns, top, left in _chunks(squares, width, height, tile):
        array[rows, columns] = field.rgb[top, left]


def write_manifests(folder: Path, width: int, height: int, mpp: float) -> None:
    """Write the manifests of the stages that would have made these stores."""
    grid = Grid(width, height, mpp, 1.0, 1.0).to_json()
    transform = {"method": "none"}
    manifests: dict[str, dict[str, Any]] = {
        "slide": {"width": width, "height": height, "mpp": [mpp, mpp]},
        "tiles": {"grid": grid},
        "stain": {"transform": transform, "method": "none", "stains": None},
        "maps": {"grid": grid, "model": {"name": "none", "sha256": ""}},
    }
    for name, value in manifests.items():
        _write_manifest(folder, name, value)


def _write_manifest(folder: Path, name: str, value: dict[str, Any]) -> None:
    stage = {"slide": "inspect", "maps": "infer"}.get(name, name)
    record: dict[str, Any] = {"stage": stage, "slide": "s", "status": "ok", "failure": None}
    record |= {"seconds": 0.0, "peak_rss_mb": 0.0}
    (folder / f"{name}.json").write_text(json.dumps(record | value))


def write_tissue(folder: Path, width: int, height: int, mpp: float, share: float) -> None:
    """Write the manifest and the GeoJSON of the stage `tissue` for a slide with this share of tissue."""
    squares = tissue_squares(width, height, share)
    rows, columns = (np.flatnonzero(squares.any(axis=axis)) for axis in (1, 0))
    left, right = int(columns[0]) * SIDE, min((int(columns[-1]) + 1) * SIDE, width)
    top, bottom = int(rows[0]) * SIDE, min((int(rows[-1]) + 1) * SIDE, height)
    ring = [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]
    feature = {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}, "properties": {}}
    (folder / "tissue.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": [feature]}))
    pixels = (right - left) * (bottom - top)
    area = {"area_mm2": pixels * mpp**2 / 1e6, "fraction": pixels / (width * height), "parts": 1}
    _write_manifest(folder, "tissue", area)


# A slide is a pyramidal TIFF in which each distinct tile is stored once and shared by all places that show it.

_TILE = 256
_LEVELS = (1, 4, 16)


def write_slide(path: Path, field: Field, width: int, height: int, mpp: float, share: float) -> None:
    """Write an Aperio-style slide with this share of tissue: a BigTIFF of JPEG tiles with levels /4 and /16."""
    from imagecodecs import jpeg_encode

    def encode(pixels: np.ndarray) -> bytes:
        return bytes(jpeg_encode(pixels, level=90, colorspace="RGB", outcolorspace="YCBCR", subsampling="444"))

    squares = tissue_squares(width, height, share)
    known: dict[bytes, tuple[int, int]] = {}
    shrunk = {f: cv2.resize(field.rgb, (SIDE // f, SIDE // f), interpolation=cv2.INTER_AREA) for f in _LEVELS}
    with path.open("wb") as file:
        file.write(b"II" + struct.pack("<HHHQ", 43, 8, 0, 0))
        images = []
        for factor in _LEVELS:
            columns, rows = -(-width // factor // _TILE), -(-height // factor // _TILE)
            places = []
            for row in range(rows):
                for column in range(columns):
                    key, make = _tile(shrunk[factor], squares, factor, row, column)
                    if key not in known:
                        known[key] = _append(file, encode(make()))
                    places.append(known[key])
            images.append(_Image(width // factor, height // factor, places))
        # Aperio's files have a thumbnail in strips after level 0. Without it tifffile would take the next level for the
        # thumbnail, and the slide would be read by OpenSlide, which is slower.
        tissue = np.where(squares[..., None], field.rgb.mean(axis=(0, 1)), 243).astype(np.uint8)
        thumbnail = cv2.resize(tissue, (_TILE, max(1, _TILE * height // width)), interpolation=cv2.INTER_NEAREST)
        place = _append(file, encode(thumbnail))
        images.insert(1, _Image(thumbnail.shape[1], thumbnail.shape[0], [place], tiled=False))
        _write_directories(file, images, mpp)


@dataclass(frozen=True)
class _Image:
    """An image of a TIFF file, with offset and size in bytes of each of its tiles, or of its only strip."""

    width: int
    height: int
    places: list[tuple[int, int]]
    tiled: bool = True


def _append(file: io.BufferedWriter, data: bytes) -> tuple[int, int]:
    """Write data at the current end of a file; return its offset and size in bytes."""
    place = file.tell(), len(data)
    file.write(data)
    return place


def _tile(
    small: np.ndarray, squares: np.ndarray, factor: int, row: int, column: int
) -> tuple[bytes, Callable[[], np.ndarray]]:
    """Key of a tile, equal for tiles of the same pixels, and a function that paints the tile."""
    side = SIDE // factor
    y, x = row * _TILE, column * _TILE
    rows, columns = np.arange(y, y + _TILE) // side, np.arange(x, x + _TILE) // side
    rows, columns = np.minimum(rows, squares.shape[0] - 1), np.minimum(columns, squares.shape[1] - 1)
    inside = squares[np.ix_(np.unique(rows), np.unique(columns))]
    key = bytes([factor]) + (struct.pack("<II", y % side, x % side) + inside.tobytes() if inside.any() else b"white")

    def make() -> np.ndarray:
        pixels = small[np.ix_(np.arange(y, y + _TILE) % side, np.arange(x, x + _TILE) % side)]
        return np.where(squares[np.ix_(rows, columns)][..., None], pixels, np.uint8(243))

    return key, make


def _write_directories(file: io.BufferedWriter, images: list[_Image], mpp: float) -> None:
    link = 8
    for number, image in enumerate(images):
        size = f"{images[0].width}x{images[0].height} [0,0 {images[0].width}x{images[0].height}] (256x256)"
        if number:
            size += f" -> {image.width}x{image.height}"
        text = f"Aperio Image Library v12.0.16\r\n{size} JPEG/RGB Q=90|AppMag = 40|MPP = {mpp:.4f}\0".encode()
        offsets, counts = np.array(image.places, "<u8").T
        entries: list[tuple[int, int, bytes]] = [
            (254, 4, struct.pack("<I", 0)),
            (256, 4, struct.pack("<I", image.width)),
            (257, 4, struct.pack("<I", image.height)),
            (258, 3, struct.pack("<HHH", 8, 8, 8)),
            (259, 3, struct.pack("<H", 7)),
            (262, 3, struct.pack("<H", 6)),  # YCbCr
            (270, 2, text),
            (277, 3, struct.pack("<H", 3)),
            (530, 3, struct.pack("<HH", 1, 1)),  # colours at full resolution
        ]
        if image.tiled:
            entries += [(tag, 4, struct.pack("<I", _TILE)) for tag in (322, 323)]
            entries += [(324, 16, offsets.tobytes()), (325, 16, counts.tobytes())]
        else:
            rows = struct.pack("<I", image.height)
            entries += [(273, 16, offsets.tobytes()), (278, 4, rows), (279, 16, counts.tobytes())]
        entries.sort()
        sizes = {2: 1, 3: 2, 4: 4, 16: 8}
        body, rest = b"", b""
        file.seek(0, io.SEEK_END)
        start = file.tell() + 8 + 20 * len(entries) + 8
        for tag, kind, value in entries:
            count = len(value) // sizes[kind]
            if len(value) <= 8:
                field = value.ljust(8, b"\0")
            else:
                field = struct.pack("<Q", start + len(rest))
                rest += value + b"\0" * (-len(value) % 8)
            body += struct.pack("<HHQ", tag, kind, count) + field
        here = file.tell()
        file.write(struct.pack("<Q", len(entries)) + body + struct.pack("<Q", 0) + rest)
        file.seek(link)
        file.write(struct.pack("<Q", here))
        link = here + 8 + 20 * len(entries)
