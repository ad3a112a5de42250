"""Damage to a slide's file: native tiles that cannot be decoded, and those that decode to something else than scanned.

Tiles that cannot be decoded are left white and listed. The others are found by comparing two levels of the pyramid
(`disagreement`) or, where no level is fit for that, by jumps of the image at the borders of native tiles
(`torn_cells`). A native tile is what the file stores as one piece: see `pipeline.slides.slide.Slide.tile_size`.
"""

from __future__ import annotations

import logging

import cv2
import numpy as np

from pipeline.errors import SlideError
from pipeline.kernels.borders import border_jumps, surroundings, torn_tiles
from pipeline.slides.regions import OneLevel, best_level, read_region
from pipeline.slides.slide import Level, Slide
from pipeline.stores.grid import Grid
from pipeline.stores.lattice import CELL, active_pixels

log = logging.getLogger(__name__)

_COMPARE = 16
"""Side, in grid pixels, of the squares whose means are compared between two levels."""

_COMPARE_GREY = 24
"""Difference between two such means, in grey levels, that resampling and compression alone do not cause."""

_COMPARE_SQUARES = 2
"""Number of the 16 squares of a cell that must differ for the cell to be doubtful; one suffices if it differs by twice
as much."""

_COMPARE_CELL = 10
"""Difference between the means of a whole cell that makes it doubtful, in grey levels. Damage can shift the colour of
the rest of a JPEG tile by too little to be seen in a single square; between whole levels the means differ by 1 or 2."""

Jump = tuple[int, int, bool]
"""A jump of the image at a border of tiles: x, y and direction as in `border_jumps`, or with the column and row of the
tile to the right of the border (or below it) in place of x and y."""


class Tolerant:
    """A slide that can be read despite damage: native tiles that cannot be decoded are white.

    Parameters
    ----------
    slide : Slide
        The slide.
    unreadable : set of tuple of int
        Receives level, column and row of each tile that cannot be decoded.
    jumps : list of tuple of (int, int, bool), optional
        Receives the jumps at the borders of tiles, see `border_jumps`; by default they are not searched for.
    """

    def __init__(self, slide: Slide, unreadable: set[tuple[int, int, int]], jumps: list[Jump] | None = None) -> None:
        self._slide = slide
        self._unreadable = unreadable
        self._jumps = jumps

    @property
    def levels(self) -> tuple[Level, ...]:
        return self._slide.levels

    def read(self, level: int, x: int, y: int, w: int, h: int) -> np.ndarray:
        if self._jumps is None:
            return self._read(level, x, y, w, h)
        # Read the surroundings as well: whether a border jumps must not depend on where the window ends.
        (across, down), size = self._slide.tile_size(level), self._slide.levels[level]
        x0, x1 = surroundings(x, x + w, across, size.width)
        y0, y1 = surroundings(y, y + h, down, size.height)
        pixels = self._read(level, x0, y0, x1 - x0, y1 - y0)
        self._jumps += border_jumps(pixels, x0, y0, across, down)
        return pixels[y - y0 : y - y0 + h, x - x0 : x - x0 + w]

    def _read(self, level: int, x: int, y: int, w: int, h: int) -> np.ndarray:
        try:
            return self._slide.read(level, x, y, w, h)
        except SlideError:
            pass
        out = np.full((h, w, 3), 255, np.uint8)
        across, down = self._slide.tile_size(level)
        for row in range(y // down, -(-(y + h) // down)):
            for column in range(x // across, -(-(x + w) // across)):
                tx, ty = column * across, row * down
                x0, y0, x1, y1 = max(x, tx), max(y, ty), min(x + w, tx + across), min(y + h, ty + down)
                try:
                    tile = self._slide.read(level, tx, ty, across, down)
                    out[y0 - y : y1 - y, x0 - x : x1 - x] = tile[y0 - ty : y1 - ty, x0 - tx : x1 - tx]
                except SlideError as error:
                    if (level, column, row) not in self._unreadable:
                        log.debug("unreadable: %s", error)
                    self._unreadable.add((level, column, row))
        return out


def unreadable_windows(
    tiles: set[tuple[int, int, int]], slide: Slide, grid: Grid, active: np.ndarray
) -> tuple[list[list[int]], float]:
    """List the unreadable native tiles that meet active cells.

    Parameters
    ----------
    tiles : set of tuple of int
        Level, column and row of native tiles.
    slide : Slide
        The slide.
    grid : Grid
        The slide's grid.
    active : numpy.ndarray
        bool lattice of the active cells.

    Returns
    -------
    windows : list of list of int
        The tiles' windows ``[x, y, width, height]`` in grid pixels, ordered from the top.
    share : float
        Share of the pixels of active cells that lie in these windows.
    """
    rects = []
    covered = 0
    cells = active.astype(np.uint8)
    for level, column, row in tiles:
        across, down = slide.tile_size(level)
        scale_x, scale_y = slide.levels[level].scale_x / grid.scale_x, slide.levels[level].scale_y / grid.scale_y
        x0, y0 = int(np.floor(column * across * scale_x + 1e-9)), int(np.floor(row * down * scale_y + 1e-9))
        x1 = min(int(np.ceil((column + 1) * across * scale_x - 1e-9)), grid.width)
        y1 = min(int(np.ceil((row + 1) * down * scale_y - 1e-9)), grid.height)
        if x1 <= x0 or y1 <= y0:
            continue
        part = cells[y0 // CELL : -(-y1 // CELL), x0 // CELL : -(-x1 // CELL)]
        if not part.any():
            continue
        full = cv2.resize(part, None, fx=CELL, fy=CELL, interpolation=cv2.INTER_NEAREST)
        top, left = y0 - y0 // CELL * CELL, x0 - x0 // CELL * CELL
        covered += int(np.count_nonzero(full[top : top + y1 - y0, left : left + x1 - x0]))
        rects.append([x0, y0, x1 - x0, y1 - y0])
    return sorted(rects, key=lambda r: (r[1], r[0])), min(1.0, covered / max(active_pixels(active, grid), 1))


def cells_near(rects: list[list[int]], shape: tuple[int, ...]) -> np.ndarray:
    """Cells that grid windows touch, and their neighbours, into which resampling carries the pixels of the windows."""
    cells = np.zeros(shape, bool)
    for x, y, w, h in rects:
        rows = slice(max(0, y // CELL - 1), -(-(y + h) // CELL) + 1)
        cells[rows, max(0, x // CELL - 1) : -(-(x + w) // CELL) + 1] = True
    return cells


def cell_at(level: Level, grid: Grid, x: int, y: int) -> tuple[int, int]:
    """Row and column of the cell that holds the centre of pixel ``(x, y)`` of a level."""
    across, down = level.scale_x / grid.scale_x / CELL, level.scale_y / grid.scale_y / CELL
    return int((y + 0.5) * down), int((x + 0.5) * across)


def torn_cells(sides: set[Jump], slide: Slide, grid: Grid, shape: tuple[int, ...]) -> np.ndarray:
    """Cells that lie in torn native tiles: those with jumps at two or more of their borders, see `torn_tiles`."""
    index = best_level(slide.levels, grid)
    level, (across, down) = slide.levels[index], slide.tile_size(index)
    cells = np.zeros(shape, bool)
    for column, row in torn_tiles(sides):
        top, left = cell_at(level, grid, max(column * across, 0), max(row * down, 0))
        bottom, right = cell_at(level, grid, (column + 1) * across - 1, (row + 1) * down - 1)
        cells[top : bottom + 1, left : right + 1] = True
    return cells


def comparable_level(slide: Slide, grid: Grid) -> int | None:
    """The level to compare with the level that is read; None when there is none.

    It is the finest one that is at least 3.5 times coarser: finer ones take too long to read. Levels of more than 8
    grid pixels per pixel have too few pixels in a square to be compared.
    """
    own = slide.levels[best_level(slide.levels, grid)]
    fit = [
        i
        for i, level in enumerate(slide.levels)
        if level.usable and 3.5 * own.scale_x <= level.scale_x <= _COMPARE / 2 * grid.scale_x
    ]
    return min(fit, key=lambda i: slide.levels[i].scale_x) if fit else None


def disagreement(slide: Slide, level: int, grid: Grid, pixels: np.ndarray, x0: int, y0: int) -> np.ndarray:
    """Find cells whose pixels differ from what another level of the slide shows.

    Most damage to a JPEG tile decodes without an error. But the levels of a pyramid are stored separately, so that
    damage to one leaves the other as it was.

    Parameters
    ----------
    slide : Slide
        The slide.
    level : int
        Index of the other level.
    grid : Grid
        The slide's grid.
    pixels : numpy.ndarray
        RGB, uint8, shape (h, w, 3), of a window of the grid.
    x0, y0 : int
        Left and top of the window in grid pixels, multiples of 64.

    Returns
    -------
    numpy.ndarray
        bool, shape (ceil(h / 64), ceil(w / 64)): cells that differ; all cells when the other level cannot be decoded.
    """
    h, w = (size // _COMPARE for size in pixels.shape[:2])
    cells = np.zeros((-(-pixels.shape[0] // CELL), -(-pixels.shape[1] // CELL)), bool)
    if not h or not w:
        return cells
    fine = cv2.resize(pixels[: h * _COMPARE, : w * _COMPARE], (w, h), interpolation=cv2.INTER_AREA)
    coarse_grid = Grid(
        -(-grid.width // _COMPARE), -(-grid.height // _COMPARE), grid.mpp * _COMPARE,
        grid.scale_x * _COMPARE, grid.scale_y * _COMPARE,
    )  # fmt: skip
    try:
        other = read_region(OneLevel(slide, level), coarse_grid, x0 // _COMPARE, y0 // _COMPARE, w, h)
    except SlideError:
        return ~cells
    step = CELL // _COMPARE
    edge = ((0, cells.shape[0] * step - h), (0, cells.shape[1] * step - w), (0, 0))
    difference = np.pad(fine.astype(np.int16) - other, edge).reshape(cells.shape[0], step, cells.shape[1], step, 3)
    squares = np.abs(difference).max(axis=4)
    doubtful = (squares > _COMPARE_GREY).sum(axis=(1, 3)) >= _COMPARE_SQUARES
    doubtful |= squares.max(axis=(1, 3)) > 2 * _COMPARE_GREY
    doubtful |= np.abs(difference.mean(axis=(1, 3))).max(axis=2) > _COMPARE_CELL
    return np.asarray(doubtful)
