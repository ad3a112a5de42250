"""From maps to nuclei, exactly, whatever the blocks.

The unit of work is the foreground component. A block looks at its core and a halo around it, and makes the nuclei of
the components whose first pixel in raster order lies in its core and that it sees whole. The others are found by their
seams: blocks hand in which of their components reach the edges of their cores, joining these across blocks gives each
component's box, and what no block has seen whole is looked at once more, on a window of just that size. Nothing is
merged and nothing is dropped: the nuclei do not depend on blocks, halo, workers or order, and the work grows with the
slide's area alone.

A component whose box holds more than `MAX_COMPONENT` pixels is no nucleus nor a clump of nuclei, and would not fit the
memory: it is cut along the lines of a grid of `CUT` pixels that is tied to the slide, each piece counts as a component,
and the manifest says so.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import tempfile
import threading
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from multiprocessing import get_all_start_methods, get_context, parent_process
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import shapely

from pipeline.allocator import keep_freed_memory
from pipeline.errors import PipelineError
from pipeline.kernels.contours import centroids, outlines, pixel_runs, polygon_wkb
from pipeline.kernels.instances import Channels, Foreground, InstanceRules, foreground, split_components
from pipeline.maps import MapStore
from pipeline.nuclei import RUNS_FIELD, nuclei_schema
from pipeline.parts import Part
from pipeline.progress import Progress

log = logging.getLogger(__name__)

DEFAULT_BLOCK = 2048
DEFAULT_HALO = 128

WORKER_MEGAPIXELS = 32
"""Megapixels of blocks, two to three seconds of work, below which a process is not worth its start."""

MAX_COMPONENT = 1 << 23
"""Pixels in the box of the largest component that is looked at whole: 1.4 mm by 1.4 mm at 0.5 µm."""

CUT = 2048
"""Side of the squares that larger components are cut into."""

PIXELS_AT_ONCE = 1 << 19
"""Pixels of components that are divided into nuclei at once: their arrays outweigh a block's images."""

LIBRARIES = ("pyarrow.compute", "scipy.sparse.csgraph", "skimage.morphology", "skimage.segmentation")
"""What is imported late in each process that does tasks, or joins their seams."""

BAND = 256
"""Rows of the grid whose nuclei are sorted at once."""

SURVEY = "survey.npz"
"""What the blocks of a part told, in the part's folder."""


@dataclass(frozen=True)
class Block:
    """A rectangle of the slide's grid.

    Parameters
    ----------
    x, y, width, height : int
        In grid pixels.
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
        Where to look.
    halo : int
        Pixels around the block that are looked at with it.
    chosen : tuple of int, optional
        First pixels (``row << 32 | column``) of the components to make nuclei of, all of them whole within the block.
        Without them: those that begin in the block and do not run out of the halo.
    survey : bool
        Tell which components reach the block's edges; not together with `chosen`.
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
    """Components that reach the edges of a block, or begin in it and are too large to be looked at whole.

    Parameters
    ----------
    sides : tuple of numpy.ndarray
        int32: number of the component at each pixel of the top, bottom, left and right side of the block; 0 is none.
    first : numpy.ndarray
        int64 ``(k,)``: first pixel (``row << 32 | column``) of what the block sees of components 1 to k.
    boxes : numpy.ndarray
        int64 ``(k, 4)``: left, top, right, bottom of what the block sees of them, in grid pixels.
    done : numpy.ndarray
        bool ``(k,)``: the block has made its nuclei.
    """

    sides: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
    first: np.ndarray
    boxes: np.ndarray
    done: np.ndarray


@dataclass(frozen=True)
class Entry:
    """Nuclei of one band in a file.

    Parameters
    ----------
    path : str
        The file.
    offset, size : int
        Where in it, in bytes.
    """

    path: str
    offset: int
    size: int


@dataclass(frozen=True, eq=False)
class Setup:
    """What all tasks of a slide have in common.

    Parameters
    ----------
    maps : pathlib.Path
        Store of maps.
    rules : InstanceRules
        Thresholds.
    classes : tuple of str
        Names of the model's classes.
    spool : pathlib.Path
        Folder for nuclei that are not yet in order.
    tissue : bytes, optional
        WKB in level-0 pixels; nuclei whose centre lies outside are left out.
    max_component, cut : int
        See `MAX_COMPONENT` and `CUT`. Unlike blocks, they are part of what a nucleus is.
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
"""Columns of nuclei on their way to the table."""


class Worker:
    """Does tasks of one slide, one after another.

    Parameters
    ----------
    setup : Setup
        The slide.
    """

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.store = MapStore.open(setup.maps)
        self.names = pa.array(list(setup.classes), pa.string())
        self.channels = Channels.of(self.store.channels)
        first = None if self.channels.types is None else self.channels.types + 1  # after the background
        several = len(setup.classes) > 1
        self.types = range(first, first + len(setup.classes)) if several and first is not None else range(0)
        self.tissue = None if setup.tissue is None else shapely.from_wkb(setup.tissue)
        if self.tissue is not None:
            shapely.prepare(self.tissue)
        self.path = setup.spool / f"{os.getpid()}.spool"

    def run(self, task: Task) -> tuple[Seam | None, dict[int, Entry]]:
        """Do a task; the block's seam, if asked for, and where its nuclei are by band."""
        grid, block = self.store.grid, task.block
        x0, y0 = max(block.x - task.halo, 0), max(block.y - task.halo, 0)
        x1 = min(block.x + block.width + task.halo, grid.width)
        y1 = min(block.y + block.height + task.halo, grid.height)
        maps = self.store.read(x0, y0, x1 - x0 + 1, y1 - y0)
        maps[:, :, -1] = 0  # a window's last column is empty
        front = foreground(maps[self.channels.nucleus], self.setup.rules.nucleus)
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
        make &= front.areas >= self.setup.rules.min_area
        if not task.nuclei or not make.any():
            return seam, {}
        chosen = np.flatnonzero(make)
        # Of a component that winds through its box, the box is what takes the memory.
        boxes = front.boxes[chosen, 2].astype(np.int64) * front.boxes[chosen, 3]
        load = np.cumsum(np.maximum(front.areas[chosen], boxes // 8))
        pieces = np.split(chosen, np.flatnonzero(np.diff(load // PIXELS_AT_ONCE)) + 1)
        return seam, self._spool(pa.concat_batches([self._nuclei(maps, front, piece, x0, y0) for piece in pieces]))

    def _nuclei(self, maps: np.ndarray, front: Foreground, chosen: np.ndarray, x: int, y: int) -> pa.RecordBatch:
        """Nuclei of the `chosen` components of a window that begins at grid pixel (x, y), in no order."""
        grid = self.store.grid
        make = np.zeros(front.count, bool)
        make[chosen] = True
        pixels = split_components(maps, front, make, self.setup.rules, self.channels)
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
        """Append nuclei to the worker's file in the order of their ids, one piece a band."""
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


def write_survey(path: Path, surveyed: Iterable[tuple[Block, Seam | None, dict[int, Entry]]]) -> None:
    """Write what blocks told, for another process: an archive of plain arrays.

    Parameters
    ----------
    path : pathlib.Path
        The file (``.npz``); the nuclei's files are beside it.
    surveyed : iterable
        Of each block its seam and where its nuclei are.
    """
    blocks, entries, sides, found = [], [], [np.zeros(0, np.int32)], [np.zeros((0, 6), np.int64)]
    names: dict[str, int] = {}
    for number, (block, seam, places) in enumerate(surveyed):
        count = -1 if seam is None else len(seam.first)
        blocks.append((block.x, block.y, block.width, block.height, count))
        if seam is not None:
            sides.extend(seam.sides)
            found.append(np.column_stack([seam.first, seam.boxes, seam.done]))
        for band, place in places.items():
            file = names.setdefault(Path(place.path).name, len(names))
            entries.append((number, band, file, place.offset, place.size))
    np.savez(
        path,
        blocks=np.array(blocks, np.int64).reshape(-1, 5),
        sides=np.concatenate(sides),
        found=np.concatenate(found),
        entries=np.array(entries, np.int64).reshape(-1, 5),
        names=np.array(list(names), np.str_),
    )


def read_survey(path: Path) -> Iterator[tuple[Block, Seam | None, dict[int, Entry]]]:
    """What `write_survey` wrote into the folder `path`."""
    with np.load(path / SURVEY, allow_pickle=False) as file:
        blocks, sides, found, entries = (file[name] for name in ("blocks", "sides", "found", "entries"))
        names = [str(path / name) for name in file["names"]]
    at, used = 0, 0
    starts = np.searchsorted(entries[:, 0], np.arange(len(blocks) + 1))
    for number, (x, y, width, height, count) in enumerate(blocks.tolist()):
        block, seam = Block(x, y, width, height), None
        if count >= 0:
            pieces = np.split(sides[at : at + 2 * (width + height)], np.cumsum([width, width, height]))
            first, *_ = rows = found[used : used + count].T
            seam = Seam((pieces[0], pieces[1], pieces[2], pieces[3]), first, rows[1:5].T, rows[5].astype(bool))
            at, used = at + 2 * (width + height), used + count
        mine = entries[starts[number] : starts[number + 1]].tolist()
        yield block, seam, {band: Entry(names[file], offset, size) for _, band, file, offset, size in mine}


class Seams:
    """Joins the components of blocks across their edges; blocks come in any order.

    Parameters
    ----------
    block : int
        Distance between blocks, which begin at multiples of it.
    """

    def __init__(self, block: int) -> None:
        self.block = block
        self.count = 0
        self._first: list[np.ndarray] = []
        self._boxes: list[np.ndarray] = []
        self._done: list[np.ndarray] = []
        self._pairs: list[np.ndarray] = []
        # A side that waits for its counterpart, by the place of the edge: row, column, and whether it is vertical.
        self._waiting: dict[tuple[int, int, bool], np.ndarray] = {}

    def add(self, block: Block, seam: Seam | None) -> None:
        """Take what a block tells; None is nothing at its edges."""
        row, column = block.y // self.block, block.x // self.block
        base = self.count
        places = [(row, column, False), (row + 1, column, False), (row, column, True), (row, column + 1, True)]
        for number, place in enumerate(places):
            side = np.zeros(0, np.int64)
            if seam is not None:
                side = seam.sides[number].astype(np.int64)
                side[side > 0] += base
            other = self._waiting.pop(place, None)
            if other is None:
                self._waiting[place] = side
            elif len(side) and len(other):
                both = (side > 0) & (other > 0)
                if both.any():
                    self._pairs.append(np.unique(np.stack([side[both], other[both]], axis=1), axis=0) - 1)
        if seam is not None:
            self.count += len(seam.first)
            self._first.append(seam.first)
            self._boxes.append(seam.boxes)
            self._done.append(seam.done)

    def parts(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """What the blocks saw.

        Returns
        -------
        group, first, boxes, done : numpy.ndarray
            For each part of a component that reaches an edge: number of its component from 0 on, and as in `Seam`.
        """
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        if self.count == 0:
            return np.zeros(0, np.int32), np.zeros(0, np.int64), np.zeros((0, 4), np.int64), np.zeros(0, bool)
        pairs = np.concatenate([np.zeros((0, 2), np.int64), *self._pairs])
        graph = coo_array((np.ones(len(pairs), np.int8), (pairs[:, 0], pairs[:, 1])), shape=(self.count, self.count))
        _, group = connected_components(graph, directed=False)
        return group, np.concatenate(self._first), np.concatenate(self._boxes), np.concatenate(self._done)


def _whole(
    group: np.ndarray, first: np.ndarray, boxes: np.ndarray, done: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First pixel, box and state of each component from those of its parts."""
    count = int(group.max(initial=-1)) + 1
    start = np.full(count, np.iinfo(np.int64).max)
    np.minimum.at(start, group, first)
    box = np.empty((count, 4), np.int64)
    box[:, :2], box[:, 2:] = np.iinfo(np.int64).max, -1
    np.minimum.at(box[:, 0], group, boxes[:, 0])
    np.minimum.at(box[:, 1], group, boxes[:, 1])
    np.maximum.at(box[:, 2], group, boxes[:, 2])
    np.maximum.at(box[:, 3], group, boxes[:, 3])
    finished = np.zeros(count, bool)
    finished[group[done]] = True
    return start, box, finished


def _windows(first: np.ndarray, boxes: np.ndarray, limit: int) -> list[Task]:
    """Tasks for components: neighbours share a window of at most `limit` pixels, larger ones have their own."""
    tasks: list[Task] = []
    chosen: list[int] = []
    window: np.ndarray | None = None

    def finish() -> None:
        if window is not None:
            x0, y0, x1, y1 = (int(v) for v in window)
            tasks.append(Task(Block(x0, y0, x1 - x0, y1 - y0), chosen=tuple(chosen)))

    side = max(int(limit**0.5), 1)
    order = np.lexsort((first, boxes[:, 0] // side, boxes[:, 1] // side))
    for index in order:
        box = boxes[index]
        if window is not None:
            joined = np.r_[np.minimum(window[:2], box[:2]), np.maximum(window[2:], box[2:])]
            if np.prod(joined[2:] - joined[:2]) <= limit:
                window = joined
                chosen.append(int(first[index]))
                continue
        finish()
        window, chosen = box, [int(first[index])]
    finish()
    return tasks


def slide_blocks(store: MapStore, side: int) -> list[Block]:
    """Squares of a slide's grid that hold anything, in raster order."""
    width, height = store.grid.width, store.grid.height
    squares = [
        Block(x, y, min(side, width - x), min(side, height - y))
        for y in range(0, height, side)
        for x in range(0, width, side)
    ]
    return [b for b in squares if store.is_active(b.x, b.y, b.width, b.height)]


_setup: list[Setup] = []
_worker: list[Worker] = []
"""The slide of this process, and its worker, once there is something to do."""


def _begin(setup: Setup) -> None:
    import cv2

    cv2.setNumThreads(1)
    _setup[:], _worker[:] = [setup], []


def _begin_process(setup: Setup) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    keep_freed_memory()
    _begin(setup)


def _end_with_parent() -> None:
    """End when the process that gives the tasks ends, however it does: when killed it cannot tell."""
    if (parent := parent_process()) is not None:
        parent.join()
        os._exit(1)


def _run_task(task: Task) -> tuple[Seam | None, dict[int, Entry]]:
    if not _worker:
        _worker.append(Worker(_setup[0]))
    return _worker[0].run(task)


class _Inline(Executor):
    """Runs what it is given at once."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future

    def map(self, fn: Callable[..., Any], *iterables: Any, **kwargs: Any) -> Iterator[Any]:
        return map(fn, *iterables)


def _here(setup: Setup) -> Executor:
    _begin(setup)
    return _Inline()


def _processes(setup: Setup, workers: int) -> Executor:
    """Processes for a slide. Ask for them before its maps are opened: that starts threads."""
    if workers == 1:
        return _here(setup)
    if sys.platform == "linux" and threading.active_count() == 1:
        return _forked(setup, workers)
    # Forked from a server that has imported everything once, and has no threads.
    method = "forkserver" if "forkserver" in get_all_start_methods() else "spawn"
    context = get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload([__name__, *LIBRARIES])
    return ProcessPoolExecutor(workers, context, initializer=_begin_process, initargs=(setup,))


def _forked(setup: Setup, workers: int) -> Executor:
    """Processes that are copies of this one, with everything imported: they start at once."""
    import cv2

    for name in LIBRARIES:
        importlib.import_module(name)
    pool = ProcessPoolExecutor(workers, get_context("fork"), initializer=_begin_process, initargs=(setup,))
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)  # of those that it has, a copy would wait for ever
    with warnings.catch_warnings():
        # Python 3.12 warns of any thread. Those of OpenBLAS and Arrow, which this can only be, are made for forks.
        warnings.simplefilter("ignore", DeprecationWarning)
        pool.submit(os.getpid)  # the first task starts all processes
    cv2.setNumThreads(threads)
    return pool


def useful_workers(workers: int, blocks: Sequence[Block]) -> int:
    """How many of `workers` processes pay: to start two of them takes three seconds of CPU time."""
    megapixels = sum(block.width * block.height for block in blocks) / 1e6
    return min(workers, max(1, int(megapixels / WORKER_MEGAPIXELS)))


@dataclass
class Census:
    """All nuclei of a slide, on disk, not yet in order.

    Parameters
    ----------
    entries : dict of int to list of Entry
        Where the nuclei that begin in each band are.
    followed : int
        Components that no block saw whole.
    cut : int
        Components that were too large to be looked at whole.
    """

    entries: dict[int, list[Entry]] = field(default_factory=lambda: defaultdict(list))
    followed: int = 0
    cut: int = 0

    def add(self, entries: dict[int, Entry]) -> None:
        """Take in where the nuclei of a block are."""
        for band, entry in entries.items():
            self.entries[band].append(entry)

    def batches(self) -> Iterator[pa.Table]:
        """The nuclei in the order of their ids, a band at a time."""
        for band in sorted(self.entries):
            pieces = []
            for entry in self.entries[band]:
                with open(entry.path, "rb") as file:
                    file.seek(entry.offset)
                    pieces.append(pa.ipc.read_record_batch(pa.py_buffer(file.read(entry.size)), BATCH_SCHEMA))
            table = pa.Table.from_batches(pieces)
            yield table.take(pa.array(np.argsort(table.column("id").to_numpy())))


def check_blocks(block: int, halo: int, workers: int) -> None:
    """Refuse settings that make no sense.

    Raises
    ------
    PipelineError
        When a value is too small.
    """
    if block < 1 or halo < 0 or workers < 1:
        raise PipelineError(f"block {block}, halo {halo}, workers {workers}", "use at least 1, 0 and 1")


def _results(pool: Executor, tasks: Iterable[Task]) -> Iterator[tuple[Task, Seam | None, dict[int, Entry]]]:
    listed = list(tasks)
    for task, (seam, entries) in zip(listed, pool.map(_run_task, listed), strict=True):
        yield task, seam, entries


def take_census(
    setup: Setup,
    *,
    block: int = DEFAULT_BLOCK,
    halo: int = DEFAULT_HALO,
    workers: int = 1,
    parts: Sequence[Path] = (),
) -> Census:
    """Find all nuclei of a slide.

    Parameters
    ----------
    setup : Setup
        The slide.
    block, halo : int
        Side of a block and width of its halo in grid pixels. They change the speed, never the result.
    workers : int
        Processes.
    parts : sequence of pathlib.Path
        What `take_survey` left of all parts of the slide, with the same `block`; no block is looked at again then.
    """
    check_blocks(block, halo, workers)
    census = Census()
    limit, cut = setup.max_component, setup.cut
    with ExitStack() as stack:
        pool = stack.enter_context(_processes(setup, workers))
        store = MapStore.open(setup.maps)
        blocks = [] if parts else slide_blocks(store, block)
        if max(useful_workers(workers, blocks), min(workers, len(parts))) == 1:
            pool = _here(setup)
        total = sum(b.width * b.height for b in blocks) / 1e6
        done = stack.enter_context(Progress(total, "instances", "MP"))

        def results(tasks: Iterable[Task]) -> Iterator[tuple[Task, Seam | None]]:
            for task, seam, entries in _results(pool, tasks):
                census.add(entries)
                yield task, seam

        seams = Seams(block)
        for path in parts:
            for surveyed, seam, entries in read_survey(path):
                seams.add(surveyed, seam)
                census.add(entries)
        for task, seam in results(Task(b, halo, survey=True) for b in blocks):
            seams.add(task.block, seam)
            done.advance(task.block.width * task.block.height / 1e6)
        group, *seen = seams.parts()
        first, boxes, finished = _whole(group, *seen)
        size = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
        giant = size > limit
        follow = ~finished & ~giant
        census.followed, census.cut = int(follow.sum()), int(giant.sum())
        for _ in results(_windows(first[follow], boxes[follow], min(DEFAULT_BLOCK**2, limit))):
            pass
        if census.cut:
            squares = _squares(store, seen[1][giant[group]], cut)
            seams = Seams(cut)
            for task, seam in results(Task(s, survey=True, nuclei=False) for s in squares):
                seams.add(task.block, seam)
            group, *seen = seams.parts()
            _, boxes, _ = _whole(group, *seen)
            giant = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) > limit
            pieces = defaultdict(list)
            for pixel in seen[0][giant[group]].tolist():
                pieces[(pixel >> 32) // cut, (pixel & 0xFFFFFFFF) // cut].append(pixel)
            tasks = [Task(s, chosen=tuple(pieces[s.y // cut, s.x // cut])) for s in squares]
            for _ in results(t for t in tasks if t.chosen):
                pass
    return census


def take_survey(setup: Setup, part: Part, *, block: int, halo: int, workers: int) -> None:
    """Look at some of a slide's blocks, and leave their nuclei and seams in the setup's folder, a part's.

    Parameters
    ----------
    setup : Setup
        The slide, and the folder.
    part : Part
        Which of its blocks.
    block, halo, workers : int
        See `take_census`.
    """
    check_blocks(block, halo, workers)
    with ExitStack() as stack:
        pool = stack.enter_context(_processes(setup, workers))
        blocks = slide_blocks(MapStore.open(setup.maps), block)
        blocks = [blocks[i] for i in part.of([b.width * b.height for b in blocks])]
        if useful_workers(workers, blocks) == 1:
            pool = _here(setup)
        tasks = (Task(b, halo, survey=True) for b in blocks)
        write_survey(
            setup.spool / SURVEY, ((task.block, seam, entries) for task, seam, entries in _results(pool, tasks))
        )


def _squares(store: MapStore, boxes: np.ndarray, side: int) -> list[Block]:
    """Squares of the slide's grid that meet any of the boxes."""
    width, height = store.grid.width, store.grid.height
    met = np.zeros((-(-height // side), -(-width // side)), bool)
    for x0, y0, x1, y1 in boxes.tolist():
        met[y0 // side : -(-y1 // side), x0 // side : -(-x1 // side)] = True
    return [
        Block(c * side, r * side, min(side, width - c * side), min(side, height - r * side))
        for r, c in np.argwhere(met).tolist()
    ]


def slide_nuclei(
    maps: Path,
    rules: InstanceRules,
    *,
    block: int = DEFAULT_BLOCK,
    halo: int = DEFAULT_HALO,
    workers: int = 1,
    classes: Sequence[str] = ("Nucleus",),
    tissue: Any = None,
    **limits: int,
) -> pa.Table:
    """All nuclei of a slide that fit into memory, in the order of their ids.

    Parameters
    ----------
    maps : pathlib.Path
        Store of maps.
    rules : InstanceRules
        Thresholds.
    block, halo, workers : int
        See `take_census`.
    classes : sequence of str
        Names of the model's classes.
    tissue : shapely geometry, optional
        Nuclei whose centre lies outside are left out; level-0 pixels.
    **limits : int
        `max_component` and `cut` of `Setup`.
    """
    outline = None if tissue is None else shapely.to_wkb(tissue)
    with tempfile.TemporaryDirectory() as spool:
        setup = Setup(maps, rules, tuple(classes), Path(spool), outline, **limits)
        found = take_census(setup, block=block, halo=halo, workers=workers)
        return pa.concat_tables([BATCH_SCHEMA.empty_table(), *found.batches()]).combine_chunks()
