"""Find all nuclei of a slide in its maps, with a result that does not depend on how the slide is split into blocks.

The unit of work is the foreground component. A worker reads a block with a halo around it, and makes the nuclei of the
components whose first pixel in raster order lies in the block and that lie entirely within block and halo. For all
other components the worker reports which of them reach the edges of the block. Joining these reports (`Seams`) across
blocks gives the bounding box of each component, and a component that no block contained entirely is processed in a
second pass, on a window that covers its box. Nuclei are never merged or dropped between blocks: they do not depend on
block size, halo, workers or order, and the work grows only with the area of the slide.

A component whose box holds more than `MAX_COMPONENT` pixels is neither a nucleus nor a clump of nuclei, and would not
fit into memory. It is cut along a grid of `CUT` pixels that starts at the slide's corner, each piece counts as a
component, and the manifest records how many components were cut.
"""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
import threading
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing import get_all_start_methods, get_context, parent_process
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import shapely

from pipeline.batch.parts import Part
from pipeline.census.seams import SURVEY, Seams, read_survey, whole_components, write_survey
from pipeline.census.worker import BATCH_SCHEMA, Block, Entry, Seam, Setup, Task, Worker
from pipeline.errors import PipelineError
from pipeline.kernels.instances import InstanceRules
from pipeline.machine.allocator import keep_freed_memory
from pipeline.progress import Progress
from pipeline.stores.maps import Maps, open_maps

DEFAULT_BLOCK = 2048
DEFAULT_HALO = 128

WORKER_MEGAPIXELS = 32
"""Megapixels of blocks (two to three seconds of work) that make it worth starting one more process."""

LIBRARIES = ("pyarrow.compute", "scipy.sparse.csgraph", "skimage.morphology", "skimage.segmentation")
"""Modules that are imported on first use by the worker processes and by the process that joins seams."""


def _windows(first: np.ndarray, boxes: np.ndarray, limit: int) -> list[Task]:
    """Tasks for components: neighbours share a window of at most `limit` pixels, a larger component has its own."""
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


def slide_blocks(store: Maps, side: int) -> list[Block]:
    """Squares of the grid that contain pixels the network has processed, in raster order."""
    width, height = store.grid.width, store.grid.height
    squares = [
        Block(x, y, min(side, width - x), min(side, height - y))
        for y in range(0, height, side)
        for x in range(0, width, side)
    ]
    return [b for b in squares if store.is_active(b.x, b.y, b.width, b.height)]


_setup: list[Setup] = []
_worker: list[Worker] = []
"""Setup and worker of this process: at most one of each, and no worker before the first task."""


def _begin(setup: Setup) -> None:
    import cv2

    cv2.setNumThreads(1)
    _setup[:], _worker[:] = [setup], []


def _begin_process(setup: Setup) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    keep_freed_memory()
    _begin(setup)


def _end_with_parent() -> None:
    """End this process when its parent ends: a parent that is killed cannot stop its workers."""
    if (parent := parent_process()) is not None:
        parent.join()
        os._exit(1)


def _run_task(task: Task) -> tuple[Seam | None, dict[int, Entry]]:
    if not _worker:
        _worker.append(Worker(_setup[0]))
    return _worker[0].run(task)


class _Inline(Executor):
    """Executor that runs each task immediately, in the calling thread."""

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
    """Start processes for a slide. Call this before opening its maps, which starts threads and so prevents forking."""
    if workers == 1:
        return _here(setup)
    if sys.platform == "linux" and threading.active_count() == 1:
        return _forked(setup, workers)
    # A fork server imports everything once and has no threads, so its forks are safe and start quickly.
    method = "forkserver" if "forkserver" in get_all_start_methods() else "spawn"
    context = get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload([__name__, *LIBRARIES])
    return ProcessPoolExecutor(workers, context, initializer=_begin_process, initargs=(setup,))


def _forked(setup: Setup, workers: int) -> Executor:
    """Fork processes from this one after importing `LIBRARIES`, so that they are ready immediately."""
    import cv2

    for name in LIBRARIES:
        importlib.import_module(name)
    pool = ProcessPoolExecutor(workers, get_context("fork"), initializer=_begin_process, initargs=(setup,))
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)  # a forked process would wait for ever for OpenCV threads, which are not copied
    with warnings.catch_warnings():
        # Python 3.12 warns if there is any thread. Only OpenBLAS and Arrow can have any here, and both handle forks.
        warnings.simplefilter("ignore", DeprecationWarning)
        pool.submit(os.getpid)  # the first task starts all processes
    cv2.setNumThreads(threads)
    return pool


def useful_workers(workers: int, blocks: Sequence[Block]) -> int:
    """Number of processes, up to `workers`, that are worth starting: two of them take three seconds of CPU time."""
    megapixels = sum(block.width * block.height for block in blocks) / 1e6
    return min(workers, max(1, int(megapixels / WORKER_MEGAPIXELS)))


@dataclass
class Census:
    """All nuclei of a slide, in files on disk and not yet sorted.

    Parameters
    ----------
    entries : dict of int to list of Entry
        Where the nuclei are stored, by the band that contains their first pixel.
    followed : int
        Number of components that no block contained entirely.
    cut : int
        Number of components that were too large to process whole.
    """

    entries: dict[int, list[Entry]] = field(default_factory=lambda: defaultdict(list))
    followed: int = 0
    cut: int = 0

    def add(self, entries: dict[int, Entry]) -> None:
        """Add the entries of a block, by band."""
        for band, entry in entries.items():
            self.entries[band].append(entry)

    def batches(self) -> Iterator[pa.Table]:
        """Yield the nuclei in the order of their ids, one band at a time."""
        for band in sorted(self.entries):
            pieces = []
            for entry in self.entries[band]:
                with open(entry.path, "rb") as file:
                    file.seek(entry.offset)
                    pieces.append(pa.ipc.read_record_batch(pa.py_buffer(file.read(entry.size)), BATCH_SCHEMA))
            table = pa.Table.from_batches(pieces)
            yield table.take(pa.array(np.argsort(table.column("id").to_numpy())))


def check_blocks(block: int, halo: int, workers: int) -> None:
    """Check that block, halo and number of workers are not too small.

    Raises
    ------
    PipelineError
        When one of them is.
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
        Side of a block and width of its halo in grid pixels. They affect the speed, never the result.
    workers : int
        Number of processes.
    parts : sequence of pathlib.Path
        Folders that `take_survey` wrote for all parts of the slide, with the same `block`. Blocks are not processed
        again then.

    Returns
    -------
    Census
        The nuclei.
    """
    check_blocks(block, halo, workers)
    census = Census()
    limit, cut = setup.max_component, setup.cut
    with ExitStack() as stack:
        pool = stack.enter_context(_processes(setup, workers))
        store = open_maps(setup.maps, setup.rules.refine)
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
        first, boxes, finished = whole_components(group, *seen)
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
            _, boxes, _ = whole_components(group, *seen)
            giant = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) > limit
            pieces = defaultdict(list)
            for pixel in seen[0][giant[group]].tolist():
                pieces[(pixel >> 32) // cut, (pixel & 0xFFFFFFFF) // cut].append(pixel)
            tasks = [Task(s, chosen=tuple(pieces[s.y // cut, s.x // cut])) for s in squares]
            for _ in results(t for t in tasks if t.chosen):
                pass
    return census


def take_survey(setup: Setup, part: Part, *, block: int, halo: int, workers: int) -> None:
    """Process the blocks of one part of a slide, and write their nuclei and seams to the setup's spool folder.

    Parameters
    ----------
    setup : Setup
        The slide and the spool folder.
    part : Part
        The part of the slide's blocks to process.
    block, halo, workers : int
        See `take_census`.
    """
    check_blocks(block, halo, workers)
    with ExitStack() as stack:
        pool = stack.enter_context(_processes(setup, workers))
        blocks = slide_blocks(open_maps(setup.maps, setup.rules.refine), block)
        blocks = [blocks[i] for i in part.of([b.width * b.height for b in blocks])]
        if useful_workers(workers, blocks) == 1:
            pool = _here(setup)
        tasks = (Task(b, halo, survey=True) for b in blocks)
        write_survey(
            setup.spool / SURVEY, ((task.block, seam, entries) for task, seam, entries in _results(pool, tasks))
        )


def _squares(store: Maps, boxes: np.ndarray, side: int) -> list[Block]:
    """Squares of the grid that intersect any of the boxes."""
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
    """Return all nuclei of a slide in memory, in the order of their ids.

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

    Returns
    -------
    pyarrow.Table
        The nuclei, with the columns of `BATCH_SCHEMA`.
    """
    outline = None if tissue is None else shapely.to_wkb(tissue)
    with tempfile.TemporaryDirectory() as spool:
        setup = Setup(maps, rules, tuple(classes), Path(spool), outline, **limits)
        found = take_census(setup, block=block, halo=halo, workers=workers)
        return pa.concat_tables([BATCH_SCHEMA.empty_table(), *found.batches()]).combine_chunks()
