"""Synthetic H&E slides with known nuclei, written in real pyramidal formats.

A field is painted in optical density: maps of hematoxylin and eosin concentration are mixed by the two vectors of a
stain and turned into light, so that stain normalisation, segmentation and measurement work on it as on real slides. The
label map is exact to the pixel.
"""

from __future__ import annotations

import gzip
import io
import math
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class StainLook:
    """Colours of a laboratory's H&E.

    Parameters
    ----------
    hematoxylin, eosin : tuple of float
        Optical density (natural logarithm) of one unit of the stain in red, green and blue.
    strength : tuple of float
        Factors on the concentrations of hematoxylin and eosin.
    white : tuple of float
        Background light in red, green and blue, 0..255.
    """

    hematoxylin: tuple[float, float, float]
    eosin: tuple[float, float, float]
    strength: tuple[float, float] = (1.0, 1.0)
    white: tuple[float, float, float] = (243.0, 243.0, 244.0)

    def __post_init__(self) -> None:
        for name in ("hematoxylin", "eosin", "strength"):
            if min(getattr(self, name)) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not 0 < min(self.white) <= max(self.white) <= 255:
            raise ValueError(f"white must be within 0..255, got {self.white}")


STAINS = {
    "classic": StainLook((0.60, 0.70, 0.38), (0.20, 0.80, 0.56)),
    "rose": StainLook((0.55, 0.76, 0.42), (0.12, 0.82, 0.46), (0.92, 1.05), (240.0, 237.0, 241.0)),
    "violet": StainLook((0.68, 0.69, 0.30), (0.28, 0.82, 0.42), (1.05, 0.80), (241.0, 242.0, 246.0)),
}
"""Stain looks by name; each demo slide has a different one."""


@dataclass(frozen=True)
class _Nucleus:
    x: float
    y: float
    a: float  # semi-axes, µm
    b: float
    angle: float
    kind: str  # epithelial, lymphocyte or fibroblast


@dataclass(frozen=True)
class _Gland:
    x: float
    y: float
    a: float  # semi-axes, µm
    b: float
    angle: float
    seed: int


@dataclass(frozen=True)
class _Ground:
    """Maps that decide where nuclei lie, with pixels of `pixel` µm, over a field of `extent` µm (width and height).

    `shape` is positive in tissue, `epithelium` above -0.3 in and around glands, `open` above -0.38 in and around lumens
    and fat; `fibre` is the direction of the fibres in radians.
    """

    shape: F32
    epithelium: F32
    open: F32
    fibre: F32
    pixel: float
    extent: tuple[float, float]

    def at(self, x: float, y: float) -> tuple[int, int]:
        """Row and column of the map pixel at a place in µm, or of the nearest one."""
        rows, cols = self.shape.shape
        return min(rows - 1, max(0, int(y / self.pixel))), min(cols - 1, max(0, int(x / self.pixel)))


def _smooth_noise(rng: np.random.Generator, height: int, width: int, period: float) -> F32:
    """Noise with a standard deviation of about 1 and features `period` pixels wide."""
    period = max(1.0, period)
    rows, cols = math.ceil(height / period) + 3, math.ceil(width / period) + 3
    coarse = rng.standard_normal((rows, cols)).astype(np.float32)
    if period == 1.0:
        return coarse[:height, :width]
    matrix = np.array([[period, 0, -period], [0, period, -period]], dtype=np.float64)
    noise = cv2.warpAffine(coarse, matrix, (width, height), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT)
    return np.asarray(noise / 0.72, dtype=np.float32)  # cubic interpolation reduces the variance


def _enlarge(field: F32, height: int, width: int) -> F32:
    return np.asarray(cv2.resize(field, (width, height), interpolation=cv2.INTER_CUBIC), dtype=np.float32)


class _Crowd:
    """Occupied circles, kept in buckets so that the time to look for room does not depend on their number."""

    def __init__(self, bucket: float) -> None:
        self._bucket = bucket
        self._taken: dict[tuple[int, int], list[tuple[float, float, float]]] = {}

    def _key(self, x: float, y: float) -> tuple[int, int]:
        return int(x // self._bucket), int(y // self._bucket)

    def room(self, x: float, y: float, radius: float, except_for: tuple[float, float] | None = None) -> bool:
        column, row = self._key(x, y)
        for i in range(column - 1, column + 2):
            for j in range(row - 1, row + 2):
                for other_x, other_y, other in self._taken.get((i, j), ()):
                    near = (x - other_x) ** 2 + (y - other_y) ** 2 < (radius + other) ** 2
                    if near and (other_x, other_y) != except_for:
                        return False
        return True

    def take(self, x: float, y: float, radius: float) -> None:
        self._taken.setdefault(self._key(x, y), []).append((x, y, radius))


def _reach(nucleus: _Nucleus) -> float:
    # Between the mean radius and the long semi-axis, so that elongated nuclei may lie side by side.
    return 0.35 * nucleus.a + 0.65 * math.sqrt(nucleus.a * nucleus.b) + 0.4


def _radius_towards(nucleus: _Nucleus, direction: float) -> float:
    turn = direction - nucleus.angle
    return nucleus.a * nucleus.b / math.hypot(nucleus.b * math.cos(turn), nucleus.a * math.sin(turn))


def _new_nucleus(rng: np.random.Generator, x: float, y: float, kind: str, fibre: float) -> _Nucleus:
    if kind == "lymphocyte":
        a = rng.uniform(2.6, 3.4)
        return _Nucleus(x, y, a, a * rng.uniform(0.86, 1.0), rng.uniform(0, math.pi), kind)
    if kind == "fibroblast":
        return _Nucleus(x, y, rng.uniform(4.8, 6.0), rng.uniform(1.9, 2.5), fibre + rng.normal(0, 0.2), kind)
    a = rng.uniform(3.6, 5.8)
    return _Nucleus(x, y, a, a * rng.uniform(0.66, 0.95), rng.uniform(0, math.pi), kind)


def make_field(
    width: int,
    height: int,
    mpp: float,
    seed: int,
    *,
    stain: str | StainLook = "classic",
    density: float = 4200.0,
    pairs: float = 0.12,
    tissue: bool = True,
    background: bool = True,
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int32]]:
    """Paint a field of H&E tissue with known nuclei.

    Parameters
    ----------
    width, height : int
        Size in pixels.
    mpp : float
        Side of a pixel in µm.
    seed : int
        The same seed gives the same field.
    stain : str or StainLook
        Name of a look in `STAINS`, or a look.
    density : float
        Approximate number of nuclei per mm² of tissue; there are fewer where they find no room.
    pairs : float
        Share of nuclei outside glands that get a touching neighbour, if there is room for it.
    tissue : bool
        Whether there is tissue; without it the slide is empty.
    background : bool
        Whether there is white around the tissue; without it tissue fills the whole field.

    Returns
    -------
    rgb : numpy.ndarray of uint8, shape (height, width, 3)
        The field.
    labels : numpy.ndarray of int32, shape (height, width)
        0 outside nuclei, else the number of the nucleus, 1..n without gaps. Every nucleus is one 4-connected part.

    Raises
    ------
    ValueError
        When a size, mpp, density or share is out of range.
    """
    if width < 16 or height < 16:
        raise ValueError(f"a field needs at least 16 x 16 pixels, got {width} x {height}")
    if not 0.05 <= mpp <= 4:
        raise ValueError(f"mpp must be within 0.05..4 µm, got {mpp}")
    if density < 0 or not 0 <= pairs <= 1:
        raise ValueError(f"density must be >= 0 and pairs within 0..1, got {density} and {pairs}")
    look = STAINS[stain] if isinstance(stain, str) else stain
    rng = np.random.default_rng(seed)
    labels = np.zeros((height, width), dtype=np.int32)
    if not tissue:
        nothing = np.zeros((height, width), dtype=np.float32)
        return _develop(rng, nothing, nothing, look, mpp), labels

    # Large shapes change slowly: about 2 µm per pixel are fine enough for them.
    step = max(1, round(2.0 / mpp))
    rows, cols = max(8, -(-height // step)), max(8, -(-width // step))
    shape = _tissue_field(rng, rows, cols, background)
    glands = _glands(rng, shape, step * mpp)
    holes = _fat(rng, shape, glands, step * mpp)
    fibre = np.float32(rng.uniform(0, math.pi)) + 0.5 * _smooth_noise(rng, rows, cols, 90 / (step * mpp))

    epithelium, lumen = _gland_maps(glands, rows, cols, step * mpp)
    open_ = np.maximum(lumen, holes)
    ground = _Ground(shape, epithelium, open_, fibre, step * mpp, (width * mpp, height * mpp))
    nuclei = _place(rng, ground, glands, density, pairs)

    tissue_alpha = np.clip(_enlarge(shape, height, width) * (60 / mpp) / 12, 0, 1)
    open_alpha = np.clip((_enlarge(open_, height, width) + 0.35) / 0.12, 0, 1)
    body = tissue_alpha * (1 - open_alpha)
    glandular = np.clip((_enlarge(epithelium, height, width) + 0.25) / 0.3, 0, 1)
    h, e = _stroma(rng, height, width, mpp, _enlarge(fibre, height, width), glandular)
    h *= body
    e *= body
    _paint_nuclei(rng, nuclei, h, e, labels, mpp)
    return _develop(rng, h, e, look, mpp), labels


def _tissue_field(rng: np.random.Generator, rows: int, cols: int, background: bool) -> F32:
    """Map that is positive inside the tissue, which has an irregular outline."""
    y, x = np.mgrid[0:rows, 0:cols].astype(np.float32)
    size = max(rows, cols)
    bumps = 0.09 * _smooth_noise(rng, rows, cols, size / 5) + 0.035 * _smooth_noise(rng, rows, cols, size / 22)
    if not background:
        return np.ones((rows, cols), dtype=np.float32)
    radius = np.sqrt(((x - cols / 2) / (cols * 0.47)) ** 2.0 + ((y - rows / 2) / (rows * 0.46)) ** 2.0)
    return np.asarray(0.93 - radius**1.6 + bumps, dtype=np.float32)


def _glands(rng: np.random.Generator, shape: F32, pixel: float) -> list[_Gland]:
    """Choose glands inside the tissue and apart from each other, from a map with pixels of `pixel` µm."""
    rows, cols = shape.shape
    crowd = _Crowd(140.0)
    glands: list[_Gland] = []
    for _ in range(round(rows * cols * pixel * pixel / 9000)):
        x, y = rng.uniform(0, cols * pixel), rng.uniform(0, rows * pixel)
        a = rng.uniform(28, 55)
        b, angle, seed = a * rng.uniform(0.6, 0.95), rng.uniform(0, math.pi), int(rng.integers(2**31))
        inside = shape[min(rows - 1, int(y / pixel)), min(cols - 1, int(x / pixel))] > 0.12
        if x < cols * pixel * 0.62 and inside and crowd.room(x, y, a * 0.95):
            crowd.take(x, y, a * 0.95)
            glands.append(_Gland(x, y, a, b, angle, seed))
    return glands


def _fat(rng: np.random.Generator, shape: F32, glands: list[_Gland], pixel: float) -> F32:
    """Map of fat cells: above -0.35 inside a cell, lower outside."""
    rows, cols = shape.shape
    field = np.full((rows, cols), -1.0, dtype=np.float32)
    centre_x, centre_y = rng.uniform(0.7, 0.88) * cols * pixel, rng.uniform(0.25, 0.75) * rows * pixel
    y, x = np.mgrid[0:rows, 0:cols].astype(np.float32) * np.float32(pixel)
    crowd = _Crowd(80.0)
    for _ in range(round(rows * cols * pixel * pixel / 2500)):
        spread = 0.09 * math.hypot(rows, cols) * pixel
        cell_x, cell_y = rng.normal(centre_x, spread), rng.normal(centre_y, spread * 1.4)
        radius = rng.uniform(15, 27)
        far = all(math.hypot(cell_x - gland.x, cell_y - gland.y) > radius + gland.a for gland in glands)
        if far and crowd.room(cell_x, cell_y, radius):
            crowd.take(cell_x, cell_y, radius)
            box = _window(cell_x, cell_y, radius * 1.6, rows, cols, pixel)
            distance = np.hypot(x[box] - cell_x, (y[box] - cell_y) * rng.uniform(0.9, 1.15)) / radius
            field[box] = np.maximum(field[box], 0.6 - distance)
    return field


def _window(x: float, y: float, radius: float, rows: int, cols: int, pixel: float) -> tuple[slice, slice]:
    top, bottom = (y - radius) / pixel, (y + radius) / pixel + 2
    left, right = (x - radius) / pixel, (x + radius) / pixel + 2
    return (
        slice(max(0, math.floor(top)), max(0, min(rows, math.ceil(bottom)))),
        slice(max(0, math.floor(left)), max(0, min(cols, math.ceil(right)))),
    )


def _gland_radius(seed: int, angle: npt.NDArray[Any] | float) -> npt.NDArray[Any]:
    rng = np.random.default_rng(seed)
    amplitude, phase = rng.normal(0, 0.05, 4), rng.uniform(0, 2 * math.pi, 4)
    wobble: npt.NDArray[Any] = np.ones_like(np.asarray(angle, dtype=np.float64))
    for k in range(4):
        wobble = wobble + amplitude[k] * np.cos((k + 2) * np.asarray(angle) + phase[k])
    return wobble


def _gland_maps(glands: list[_Gland], rows: int, cols: int, pixel: float) -> tuple[F32, F32]:
    """Maps that are above -0.25 inside glands and above -0.35 in their lumens."""
    epithelium = np.full((rows, cols), -1.0, dtype=np.float32)
    lumen = np.full((rows, cols), -1.0, dtype=np.float32)
    y, x = np.mgrid[0:rows, 0:cols].astype(np.float32) * np.float32(pixel)
    for gland in glands:
        box = _window(gland.x, gland.y, gland.a * 1.5, rows, cols, pixel)
        dx, dy = x[box] - gland.x, y[box] - gland.y
        u = (dx * math.cos(gland.angle) + dy * math.sin(gland.angle)) / gland.a
        v = (-dx * math.sin(gland.angle) + dy * math.cos(gland.angle)) / gland.b
        rho = np.hypot(u, v) / _gland_radius(gland.seed, np.arctan2(v, u))
        epithelium[box] = np.maximum(epithelium[box], (0.75 - rho).astype(np.float32))
        lumen[box] = np.maximum(lumen[box], (1 - 13 / gland.b - 0.35 - rho).astype(np.float32))
    return epithelium, lumen


class _Placed:
    """Nuclei that have found room."""

    def __init__(self, ground: _Ground) -> None:
        self.nuclei: list[_Nucleus] = []
        self._ground = ground
        self._crowd = _Crowd(16.0)

    def add(self, nucleus: _Nucleus, mate: _Nucleus | None = None) -> bool:
        """Add a nucleus if it has room in the tissue and beside all others except `mate`; return whether it has."""
        ground, margin = self._ground, nucleus.a * 1.25 + 1.0
        width, height = ground.extent
        if not (margin <= nucleus.x < width - margin and margin <= nucleus.y < height - margin):
            return False
        for turn in np.arange(0, 2 * math.pi, math.pi / 3):
            at = ground.at(nucleus.x + nucleus.a * math.cos(turn), nucleus.y + nucleus.a * math.sin(turn))
            if ground.shape[at] < 0.03 or ground.open[at] > -0.38:
                return False
        reach = _reach(nucleus)
        if not self._crowd.room(nucleus.x, nucleus.y, reach, None if mate is None else (mate.x, mate.y)):
            return False
        self.nuclei.append(nucleus)
        self._crowd.take(nucleus.x, nucleus.y, reach)
        return True


def _place(
    rng: np.random.Generator, ground: _Ground, glands: list[_Gland], density: float, pairs: float
) -> list[_Nucleus]:
    """Choose the nuclei: rings in glands, clusters of lymphocytes, fibroblasts along the fibres."""
    placed = _Placed(ground)
    rows, cols = ground.shape.shape
    clusters = np.clip(_smooth_noise(rng, rows, cols, 70 / ground.pixel) - 0.8, 0, 1.2)
    for gland in glands if density else ():
        _line(rng, gland, placed)
    tissue_mm2 = float((ground.shape > 0).sum()) * ground.pixel * ground.pixel / 1e6
    attempts = 0
    wanted = len(placed.nuclei) + round(density * 0.72 * tissue_mm2)
    while len(placed.nuclei) < wanted and attempts < 12 * wanted + 100:
        attempts += 1
        x, y = rng.uniform(0, ground.extent[0]), rng.uniform(0, ground.extent[1])
        at = ground.at(x, y)
        chance = 0.35 + clusters[at]
        if rng.random() > chance or ground.epithelium[at] > -0.3:
            continue
        crowded = rng.random() < clusters[at]
        kind = "lymphocyte" if crowded else ("fibroblast" if rng.random() < 0.6 else "epithelial")
        nucleus = _new_nucleus(rng, x, y, kind, float(ground.fibre[at]))
        if placed.add(nucleus) and rng.random() < pairs:
            placed.add(_mate(rng, nucleus, float(ground.fibre[at])), nucleus)
    return placed.nuclei


def _line(rng: np.random.Generator, gland: _Gland, placed: _Placed) -> None:
    """Line a gland with nuclei that point outwards."""
    a, b, angle = gland.a, gland.b, gland.angle
    turn = rng.uniform(0, 1)
    while turn < 2 * math.pi:
        reach = float(_gland_radius(gland.seed, turn)) * (1 - rng.uniform(6.5, 8.0) / b)
        u, v = a * reach * math.cos(turn), b * reach * math.sin(turn)
        x = gland.x + u * math.cos(angle) - v * math.sin(angle)
        y = gland.y + u * math.sin(angle) + v * math.cos(angle)
        long = rng.uniform(3.9, 5.0)
        outwards = angle + math.atan2(v * a / b, u * b / a)
        placed.add(_Nucleus(x, y, long, long * rng.uniform(0.66, 0.85), outwards, "epithelial"))
        turn += rng.uniform(7.2, 10.0) / math.hypot(u, v)


def _mate(rng: np.random.Generator, nucleus: _Nucleus, fibre: float) -> _Nucleus:
    """Make a nucleus that is of the same kind as another and touches it."""
    mate = _new_nucleus(rng, 0, 0, nucleus.kind, fibre)
    direction = rng.uniform(0, 2 * math.pi)
    gap = 0.97 * (_radius_towards(nucleus, direction) + _radius_towards(mate, direction))
    return replace(mate, x=nucleus.x + gap * math.cos(direction), y=nucleus.y + gap * math.sin(direction))


def _stroma(
    rng: np.random.Generator, height: int, width: int, mpp: float, fibre: F32, glandular: F32
) -> tuple[F32, F32]:
    """Concentrations of hematoxylin and eosin without nuclei."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    # Wavy bundles: sines across the fibres, bent by slow noise; their strength varies from place to place.
    across = (-np.sin(fibre.mean()) * x + np.cos(fibre.mean()) * y) * np.float32(mpp)
    across += 7 * _smooth_noise(rng, height, width, 45 / mpp)
    fine_bend = 1.2 * _smooth_noise(rng, height, width, 9 / mpp)
    bundles = np.sin((across + fine_bend) * np.float32(2 * math.pi / 11))
    strands = np.sin((across + 2 * fine_bend) * np.float32(2 * math.pi / 3.7))
    strength = np.clip(0.55 + 0.35 * _smooth_noise(rng, height, width, 60 / mpp), 0.1, 1.3)
    grain = 0.6 * _smooth_noise(rng, height, width, 3.0 / mpp) + 0.5 * _smooth_noise(rng, height, width, 1.1 / mpp)
    slow = _smooth_noise(rng, height, width, 120 / mpp)
    collagen = 0.60 + 0.09 * slow + strength * (0.13 * bundles + 0.07 * strands) + 0.05 * grain
    cytoplasm = 0.52 + 0.05 * slow + 0.09 * grain
    eosin = collagen + (cytoplasm - collagen) * glandular
    hematoxylin = 0.10 + 0.03 * slow + 0.025 * grain + (0.12 + 0.03 * grain) * glandular
    return np.clip(hematoxylin, 0.01, None), np.clip(eosin, 0.08, None)


def _paint_nuclei(
    rng: np.random.Generator,
    nuclei: list[_Nucleus],
    h: F32,
    e: F32,
    labels: npt.NDArray[np.int32],
    mpp: float,
) -> None:
    """Paint nuclei into both concentrations and the label map, in place; earlier nuclei keep the pixels they share."""
    height, width = labels.shape
    chromatin = 0.7 * _smooth_noise(rng, 512, 512, 1.6 / mpp) + 0.7 * _smooth_noise(rng, 512, 512, 0.7 / mpp)
    number = 0
    for nucleus in nuclei:
        amplitude = rng.normal(0, 1, 4) * (0.035, 0.03, 0.02, 0.012)
        phase = rng.uniform(0, 2 * math.pi, 4)
        base, seen = rng.normal(0, 1), rng.integers(0, 384, 2)
        spots = rng.uniform(-0.45, 0.45, (2, 2))
        x, y = nucleus.x / mpp, nucleus.y / mpp
        reach = nucleus.a * 1.3 / mpp + 3
        top, bottom = max(0, math.floor(y - reach)), min(height, math.ceil(y + reach))
        left, right = max(0, math.floor(x - reach)), min(width, math.ceil(x + reach))
        if bottom - top < 2 or right - left < 2:
            continue
        gy, gx = np.mgrid[top:bottom, left:right].astype(np.float32)
        dx, dy = (gx + 0.5 - x) * mpp, (gy + 0.5 - y) * mpp
        u = (dx * math.cos(nucleus.angle) + dy * math.sin(nucleus.angle)) / nucleus.a
        v = (-dx * math.sin(nucleus.angle) + dy * math.cos(nucleus.angle)) / nucleus.b
        turn = np.arctan2(v, u)
        outline = 1 + sum(amplitude[k] * np.cos((k + 2) * turn + phase[k]) for k in range(4))
        rho = np.hypot(u, v) / outline
        window = labels[top:bottom, left:right]
        mask = _largest_part((rho <= 1) & (window == 0))
        if mask.sum() * mpp * mpp < 6:
            continue
        number += 1
        window[mask] = number
        # The texture repeats every 512 pixels; each nucleus starts at a random place in it.
        rows = (seen[0] + np.arange(bottom - top)) % 512
        cols = (seen[1] + np.arange(right - left)) % 512
        texture = chromatin[np.ix_(rows, cols)]
        if nucleus.kind == "epithelial":
            content = 0.78 + 0.08 * base + 0.13 * texture + 0.34 * np.clip((rho - 0.72) / 0.2, 0, 1)
            for spot_u, spot_v in spots[: 1 + (base > 0.3)]:
                near = np.hypot(u - spot_u, v - spot_v) * math.sqrt(nucleus.a * nucleus.b)
                content = content + 0.5 * np.exp(-((near / 0.75) ** 4))
        elif nucleus.kind == "lymphocyte":
            content = 1.32 + 0.12 * base + 0.13 * texture + 0.06 * np.clip((rho - 0.7) / 0.2, 0, 1)
        else:
            content = 1.06 + 0.12 * base + 0.13 * texture + 0.12 * np.clip((rho - 0.7) / 0.2, 0, 1)
        soft = 0.35  # µm over which the rim fades
        radius = nucleus.a * nucleus.b / np.hypot(nucleus.b * np.cos(turn), nucleus.a * np.sin(turn))
        alpha = np.clip((1 - rho) * radius / soft + 0.5, 0, 1) * (mask | (window == 0))
        h_window, e_window = h[top:bottom, left:right], e[top:bottom, left:right]
        h_window += alpha * (np.clip(content, 0.3, None) - h_window)
        e_window += alpha * (0.42 - 0.6 * e_window)


def _largest_part(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    count, parts, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=4)
    if count <= 2:
        return mask
    return np.asarray(parts == 1 + int(np.argmax(stats[1:, cv2.CC_STAT_AREA])), dtype=bool)


def _develop(rng: np.random.Generator, h: F32, e: F32, look: StainLook, mpp: float) -> npt.NDArray[np.uint8]:
    """Turn concentrations into light, blur it as optics do, and add camera noise."""
    h, e = h * np.float32(look.strength[0]), e * np.float32(look.strength[1])
    rgb = np.empty((*h.shape, 3), dtype=np.uint8)
    sigma = max(0.45, 0.22 / mpp)
    for channel in range(3):
        density = h * np.float32(look.hematoxylin[channel]) + e * np.float32(look.eosin[channel])
        light = np.exp(-density) * np.float32(look.white[channel])
        light = np.asarray(cv2.GaussianBlur(light, (0, 0), sigma), dtype=np.float32)
        light += rng.standard_normal(h.shape, dtype=np.float32) * np.float32(1.6)
        rgb[..., channel] = np.clip(np.rint(light), 0, 255)
    return rgb


# --- Writers ---------------------------------------------------------------------------------------------------------


_JPEG_QUALITY = 90


def _shrink(rgb: npt.NDArray[np.uint8], factor: int) -> npt.NDArray[np.uint8]:
    """Average blocks of ``factor x factor`` pixels, dropping incomplete blocks at the right and lower edge."""
    height, width = rgb.shape[0] // factor, rgb.shape[1] // factor
    cut = rgb[: height * factor, : width * factor]
    return np.asarray(cv2.resize(cut, (width, height), interpolation=cv2.INTER_AREA), dtype=np.uint8)


def _pyramid(rgb: npt.NDArray[np.uint8], factor: int, smallest: int) -> list[npt.NDArray[np.uint8]]:
    levels = [rgb]
    while min(levels[-1].shape[:2]) // factor >= smallest:
        levels.append(_shrink(levels[-1], factor))
    return levels


def write_svs(path: Path, rgb: npt.NDArray[np.uint8], mpp: float, *, quality: int = _JPEG_QUALITY) -> None:
    """Write an Aperio-style SVS: JPEG tiles, levels /4, /16 …, a thumbnail, mpp and objective in the description.

    Parameters
    ----------
    path : pathlib.Path
        The file.
    rgb : numpy.ndarray of uint8, shape (height, width, 3)
        Level 0.
    mpp : float
        Side of a pixel in µm.
    quality : int
        JPEG quality, 1..100.
    """
    import tifffile

    height, width = rgb.shape[:2]
    program, power = "Aperio Image Library v12.0.16\r\n", f"AppMag = {round(10 / mpp)}"
    common: dict[str, Any] = {
        "photometric": "rgb",
        "compression": "jpeg",
        "compressionargs": {"level": quality},
        "metadata": None,
        "software": None,
    }
    with tifffile.TiffWriter(path) as tif:
        for index, level in enumerate(_pyramid(rgb, 4, 128)):
            rows, cols = level.shape[:2]
            size = f"{width}x{height} [0,0 {width}x{height}] (240x240)"
            if index:
                size += f" -> {cols}x{rows}"
            note = f"{program}{size} JPEG/RGB Q={quality}|{power}|MPP = {mpp:.4f}|Filename = {path.stem}"
            description = note.encode("ascii", "replace").decode("ascii")
            tif.write(level, tile=(240, 240), description=description, subfiletype=0, **common)
            if index == 0:  # Aperio's thumbnail is the second image, in strips
                small = _shrink(rgb, max(1, math.ceil(max(width, height) / 768)))
                note = f"{program}{width}x{height} -> {small.shape[1]}x{small.shape[0]} - |{power}"
                tif.write(small, rowsperstrip=16, description=note, subfiletype=0, **common)


def write_tiff(path: Path, rgb: npt.NDArray[np.uint8], mpp: float) -> None:
    """Write a generic tiled pyramidal TIFF with its mpp in the resolution tags (pixels per centimetre).

    Parameters
    ----------
    path : pathlib.Path
        The file.
    rgb : numpy.ndarray of uint8, shape (height, width, 3)
        Level 0.
    mpp : float
        Side of a pixel in µm.
    """
    import tifffile

    with tifffile.TiffWriter(path) as tif:
        for index, level in enumerate(_pyramid(rgb, 2, 128)):
            tif.write(
                level,
                tile=(256, 256),
                photometric="rgb",
                compression="jpeg",
                compressionargs={"level": _JPEG_QUALITY},
                resolution=(1e4 / (mpp * 2**index),) * 2,
                resolutionunit="CENTIMETER",
                subfiletype=1 if index else 0,
                metadata=None,
                software=None,
            )


def write_ome_tiff(path: Path, rgb: npt.NDArray[np.uint8], mpp: float) -> None:
    """Write an OME-TIFF whose pyramid lies in SubIFDs, with PhysicalSize in µm.

    Parameters
    ----------
    path : pathlib.Path
        The file; its name should end in ``.ome.tiff``.
    rgb : numpy.ndarray of uint8, shape (height, width, 3)
        Level 0.
    mpp : float
        Side of a pixel in µm.
    """
    import tifffile

    levels = _pyramid(rgb, 2, 128)
    common: dict[str, Any] = {
        "tile": (256, 256),
        "photometric": "rgb",
        "compression": "jpeg",
        "compressionargs": {"level": _JPEG_QUALITY},
        "software": None,
    }
    # Derive the UUID from the pixels, so that the same pixels give the same bytes.
    identity = f"urn:uuid:{zlib.crc32(rgb.tobytes()):08x}-0000-4000-8000-000000000000"
    with tifffile.TiffWriter(path, ome=True, bigtiff=False) as tif:
        tif.write(
            levels[0],
            subifds=len(levels) - 1,
            resolution=(1e4 / mpp,) * 2,
            resolutionunit="CENTIMETER",
            metadata={
                "axes": "YXS",
                "Name": path.name,
                "UUID": identity,
                "PhysicalSizeX": mpp,
                "PhysicalSizeXUnit": "µm",
                "PhysicalSizeY": mpp,
                "PhysicalSizeYUnit": "µm",
            },
            **common,
        )
        for index, level in enumerate(levels[1:], start=1):
            tif.write(
                level,
                subfiletype=1,
                resolution=(1e4 / (mpp * 2**index),) * 2,
                resolutionunit="CENTIMETER",
                **common,
            )


# --- Truth -----------------------------------------------------------------------------------------------------------


def outlines(labels: npt.NDArray[np.int32]) -> dict[int, list[list[list[int]]]]:
    """Trace every label along the edges of its pixels.

    Parameters
    ----------
    labels : numpy.ndarray of int32, shape (height, width)
        Label map; each label must be one 4-connected part.

    Returns
    -------
    dict
        Closed rings of each label (exterior first, then holes), as ``[x, y]`` of pixel corners.

    Raises
    ------
    ValueError
        When a label has several parts.
    """
    import shapely
    from scipy import ndimage

    result: dict[int, list[list[list[int]]]] = {}
    for index, box in enumerate(ndimage.find_objects(labels), start=1):
        if box is None:
            continue
        mask = np.pad(labels[box] == index, ((0, 0), (1, 1))).astype(np.int8)
        change = np.diff(mask, axis=1)
        row, start = np.nonzero(change == 1)
        _, stop = np.nonzero(change == -1)
        top, left = box[0].start, box[1].start
        runs = shapely.box(start + left, row + top, stop + left, row + top + 1)
        shape = shapely.simplify(shapely.union_all(runs), 0)
        if shape.geom_type != "Polygon":
            raise ValueError(f"label {index} has {shapely.get_num_geometries(shape)} parts, one is expected")
        rings = [shape.exterior, *shape.interiors]
        result[index] = [shapely.get_coordinates(ring).astype(int).tolist() for ring in rings]
    return result


def truth_geojson(labels: npt.NDArray[np.int32], *, name: str = "") -> bytes:
    """Encode known nuclei as a gzipped GeoJSON FeatureCollection, one polygon each, in pixels of `labels`.

    Parameters
    ----------
    labels : numpy.ndarray of int32, shape (height, width)
        Label map at level 0.
    name : str
        Name of the slide, noted in the properties of the collection.

    Returns
    -------
    bytes
        The file's content; the same labels give the same bytes.
    """
    import orjson

    features = [
        {
            "type": "Feature",
            "id": f"{index}",
            "geometry": {"type": "Polygon", "coordinates": rings},
            "properties": {"objectType": "annotation", "classification": {"name": "nucleus", "color": [46, 160, 67]}},
        }
        for index, rings in outlines(labels).items()
    ]
    text = orjson.dumps({"type": "FeatureCollection", "name": name, "features": features})
    buffer = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", fileobj=buffer, mtime=0) as stream:
        stream.write(text)
    return buffer.getvalue()
