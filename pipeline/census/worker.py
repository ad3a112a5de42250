"""Process one block of maps: make the nuclei of complete components and report the components at the block's edges.

`pipeline.census.slide` assigns the blocks to workers and joins the reports.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import shapely

from pipeline.kernels.contours import centroids, every_second, outlines, pixel_runs, polygon_wkb
from pipeline.kernels.instances import Channels, Foreground, InstanceRules, foreground, split_components
from pipeline.stores.maps import open_maps
from pipeline.stores.nuclei import RUNS_FIELD, nuclei_schema

MAX_COMPONENT = 1 << 23
"""Largest bounding box, in pixels, of a component that is processed whole: 0.7 mm by 0.7 mm at 0.25 µm."""

CUT = 2048
"""Side of the squares that larger components are cut into."""

_PIXELS_AT_ONCE = 1 << 19
"""Component pixels that are split into nuclei at once: the arrays for this need more memory than the block's images."""

BAND = 256
"""Height of a band, in rows of the grid: nuclei are sorted one band at a time."""


@dataclass(frozen=True)
class Block:
    """A rectangle of the grid that nuclei are made on.

    This is the slide's grid, or one with pixels of half the size where the rules refine the maps.

    Parameters
    ----------
    x, y, width, height : int
        Corner and size in pixels of that grid.
    """

    x: int
    y: int
    width: int
    height: int


@dataclass(frozen=True)
class Task:
    """What a worker does with a block.

    Parameters
    ----------
    block : Block
        The block to process.
    halo : int
        Width of the margin, in pixels, that is read around the block.
    chosen : tuple of int, optional
        First pixels (``row << 32 | column``) of the components to make nuclei of; all of them must lie entirely within
        the block. By default, components whose first pixel lies in the block and that do not extend beyond the halo.
    survey : bool
        Return the block's seam; not together with `chosen`.
    nuclei : bool
        Make nuclei.
    """

    block: Block
    halo: int = 0
    chosen: tuple[int, ...] | None = None
    survey: bool = False
    nuclei: bool = True


@dataclass(frozen=True, eq=False)
class Seam:
    """Components that reach the edges of a block, or begin in it and are too large to process whole.

    Parameters
    ----------
    sides : tuple of numpy.ndarray
        int32: number of the component at each pixel of the top, bottom, left and right side of the block; 0 is none.
    first : numpy.ndarray
        int64 ``(k,)``: first pixel (``row << 32 | column``) of components 1 to k, as far as block and halo show them.
    boxes : numpy.ndarray
        int64 ``(k, 4)``: left, top, right, bottom of these components, as far as block and halo show them, in grid
        pixels.
    done : numpy.ndarray
        bool ``(k,)``: whether this block has made the component's nuclei.
    """

    sides: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
    first: np.ndarray
    boxes: np.ndarray
    done: np.ndarray


@dataclass(frozen=True)
class Entry:
    """Location of nuclei of one band in a file.

    Parameters
    ----------
    path : str
        The file.
    offset, size : int
        Position and length of the record batch in the file, in bytes.
    """

    path: str
    offset: int
    size: int


@dataclass(frozen=True, eq=False)
class Setup:
    """What all tasks of a slide share.

    Parameters
    ----------
    maps : pathlib.Path
        Store of maps.
    rules : InstanceRules
        Thresholds.
    classes : tuple of str
        Names of the model's classes.
    spool : pathlib.Path
        Folder for nuclei that are not yet sorted.
    tissue : bytes, optional
        WKB in level-0 pixels; nuclei whose centre lies outside are left out.
    max_component, cut : int
        See `MAX_COMPONENT` and `CUT`. Unlike the block size, they affect the result.
    """

    maps: Path
    rules: InstanceRules
    classes: tuple[str, ...]
    spool: Path
    tissue: bytes | None = None
    max_component: int = MAX_COMPONENT
    cut: int = CUT

    def __post_init__(self) -> None:
        if not 1 <= self.cut**2 <= self.max_component:
            raise ValueError(f"cut must be within 1 and {self.max_component**0.5:.0f}, got {self.cut}")


BATCH_SCHEMA = pa.schema(nuclei_schema({}, [RUNS_FIELD]), metadata={})
"""Columns of the nuclei that workers write."""


class Worker:
    """Runs tasks of one slide, one after another.

    Parameters
    ----------
    setup : Setup
        The slide.
    """

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.store = open_maps(setup.maps, setup.rules.refine)
        self.rules = setup.rules.fine
        self.names = pa.array(list(setup.classes), pa.string())
        self.channels = Channels.of(self.store.channels)
        first = None if self.channels.types is None else self.channels.types + 1  # the first is the background
        several = len(setup.classes) > 1
        self.types = range(first, first + len(setup.classes)) if several and first is not None else range(0)
        self.tissue = None if setup.tissue is None else shapely.from_wkb(setup.tissue)
        if self.tissue is not None:
            shapely.prepare(self.tissue)
        self.path = setup.spool / f"{os.getpid()}.spool"

    def run(self, task: Task) -> tuple[Seam | None, dict[int, Entry]]:
        """Run a task.

        Parameters
        ----------
        task : Task
            The task.

        Returns
        -------
        seam : Seam or None
            The block's seam; None without `Task.survey`, or if there is nothing to report.
        entries : dict of int to Entry
            Where the block's nuclei are stored, by band.
        """
        grid, block = self.store.grid, task.block
        x0, y0 = max(block.x - task.halo, 0), max(block.y - task.halo, 0)
        x1 = min(block.x + block.width + task.halo, grid.width)
        y1 = min(block.y + block.height + task.halo, grid.height)
        maps = self.store.read(x0, y0, x1 - x0 + 1, y1 - y0)
        maps[:, :, -1] = 0  # the read is one column wider: `foreground` needs the last column to be empty
        front = foreground(maps[self.channels.nucleus], self.rules.nucleus)
        if front.count == 0:
            return None, {}
        row, column = np.divmod(front.first, maps.shape[2])
        row, column = row + y0, column + x0
        if task.chosen is not None:
            pixels = np.array(task.chosen, np.int64)
            make = np.zeros(front.count, bool)
            make[front.image[(pixels >> 32) - y0, (pixels & 0xFFFFFFFF) - x0] - 1] = True
            giant = np.zeros_like(make)
        else:
            mine = (row >= block.y) & (row < block.y + block.height)
            mine &= (column >= block.x) & (column < block.x + block.width)
            left, top, width, height = front.boxes.T
            right, bottom = left + width, top + height
            out = ((left == 0) & (x0 > 0)) | ((top == 0) & (y0 > 0))
            out |= ((right == x1 - x0) & (x1 < grid.width)) | ((bottom == y1 - y0) & (y1 < grid.height))
            large = width * height > self.setup.max_component
            make, giant = mine & ~out & ~large, mine & large
        seam = None
        if task.survey:
            core = front.image[block.y - y0 :, block.x - x0 :][: block.height, : block.width]
            boxes = front.boxes.copy()
            boxes[:, 2:] += boxes[:, :2]
            seam = _seam(core, row << 32 | column, boxes + np.array([x0, y0, x0, y0]), make, giant)
        make &= front.areas >= self.rules.min_area
        if not task.nuclei or not make.any():
            return seam, {}
        chosen = np.flatnonzero(make)
        # A long, winding component has a box much larger than its area, and the box then determines the memory.
        boxes = front.boxes[chosen, 2].astype(np.int64) * front.boxes[chosen, 3]
        load = np.cumsum(np.maximum(front.areas[chosen], boxes // 8))
        pieces = np.split(chosen, np.flatnonzero(np.diff(load // _PIXELS_AT_ONCE)) + 1)
        return seam, self._spool(pa.concat_batches([self._nuclei(maps, front, piece, x0, y0) for piece in pieces]))

    def _nuclei(self, maps: np.ndarray, front: Foreground, chosen: np.ndarray, x: int, y: int) -> pa.RecordBatch:
        """Nuclei of the `chosen` components of a window whose corner is grid pixel (x, y), unsorted."""
        grid = self.store.grid
        make = np.zeros(front.count, bool)
        make[chosen] = True
        pixels = split_components(maps, front, make, self.rules, self.channels)
        runs, starts = pixel_runs(pixels)
        shapes = outlines(runs, starts)

        def total(channel: np.ndarray) -> np.ndarray:
            return np.bincount(pixels.label, channel.ravel()[pixels.index], pixels.count + 1)[1:]  # exact: integers

        areas = np.bincount(pixels.label, minlength=pixels.count + 1)[1:]
        probability = (total(maps[self.channels.nucleus]) / (255.0 * areas)).astype(np.float32)
        class_ids = np.zeros(pixels.count, np.uint8)
        if self.types:
            class_ids = np.argmax([total(maps[i]) for i in self.types], axis=0).astype(np.uint8)
        runs += np.array([y, x, x], np.int32)
        firsts = runs[starts[:-1]].astype(np.uint64)
        ids = firsts[:, 0] << np.uint64(32) | firsts[:, 1]
        if self.setup.rules.refine > 1:  # stains are measured on the slide's own, coarser grid
            runs, starts = every_second(runs, starts)
        half = np.array([grid.scale_x, grid.scale_y]) / 2
        shapes = replace(shapes, points=(shapes.points + np.array([2 * x, 2 * y])) * half)
        data, offsets = polygon_wkb(shapes)
        batch = pa.RecordBatch.from_arrays(
            [
                pa.array(ids, pa.uint64()),
                pa.BinaryArray.from_buffers(
                    pa.binary(), len(ids), [None, pa.py_buffer(offsets.astype(np.int32)), pa.py_buffer(data)]
                ),
                self.names.take(pa.array(class_ids, pa.uint8())),
                pa.array(class_ids, pa.uint8()),
                pa.array(probability, pa.float32()),
                pa.ListArray.from_arrays(
                    pa.array((3 * starts).astype(np.int32)), pa.array(runs.ravel(), pa.int32()), type=RUNS_FIELD.type
                ),
            ],
            schema=BATCH_SCHEMA,
        )
        if self.tissue is not None:
            centres = centroids(shapes)
            batch = batch.filter(pa.array(shapely.contains_xy(self.tissue, centres[:, 0], centres[:, 1])))
        return batch

    def _spool(self, batch: pa.RecordBatch) -> dict[int, Entry]:
        """Append nuclei to the worker's file in the order of their ids, as one record batch per band."""
        entries: dict[int, Entry] = {}
        if batch.num_rows == 0:
            return entries
        batch = batch.take(pa.array(np.argsort(batch.column("id").to_numpy())))
        bands = (batch.column("id").to_numpy() >> np.uint64(32)).astype(np.int64) // BAND
        found, begins = np.unique(bands, return_index=True)
        with self.path.open("ab") as file:
            for band, start, stop in zip(found, begins, np.r_[begins[1:], len(bands)], strict=True):
                buffer = batch.slice(start, stop - start).serialize()
                entries[int(band)] = Entry(str(self.path), file.tell(), buffer.size)
                file.write(buffer)
        return entries


def _seam(core: np.ndarray, first: np.ndarray, corners: np.ndarray, done: np.ndarray, giant: np.ndarray) -> Seam | None:
    sides = [core[0], core[-1], core[:, 0], core[:, -1]]
    used = np.unique(np.concatenate([*sides, np.flatnonzero(giant) + 1]))
    used = used[used > 0]
    if len(used) == 0:
        return None
    number = np.zeros(len(first) + 1, np.int32)
    number[used] = np.arange(1, len(used) + 1)
    top, bottom, left, right = (number[side] for side in sides)
    return Seam((top, bottom, left, right), first[used - 1], corners[used - 1], done[used - 1])
