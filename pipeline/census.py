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

from pipeline.allocator import keep_freed_memory
from pipeline.census_worker import BATCH_SCHEMA, Block, Entry, Seam, Setup, Task, Worker
from pipeline.errors import PipelineError
from pipeline.kernels.instances import InstanceRules
from pipeline.maps import Maps, open_maps
from pipeline.parts import Part
from pipeline.progress import Progress
from pipeline.seams import SURVEY, Seams, read_survey, whole_components, write_survey

DEFAULT_BLOCK = 2048
DEFAULT_HALO = 128

WORKER_MEGAPIXELS = 32
"""Megapixels of blocks, two to three seconds of work, below which a process is not worth its start."""

LIBRARIES = ("pyarrow.compute", "scipy.sparse.csgraph", "skimage.morphology", "skimage.segmentation")
"""What is imported late in each process that does tasks, or joins their seams."""


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


def slide_blocks(store: Maps, side: int) -> list[Block]:
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
        blocks = slide_blocks(open_maps(setup.maps, setup.rules.refine), block)
        blocks = [blocks[i] for i in part.of([b.width * b.height for b in blocks])]
        if useful_workers(workers, blocks) == 1:
            pool = _here(setup)
        tasks = (Task(b, halo, survey=True) for b in blocks)
        write_survey(
            setup.spool / SURVEY, ((task.block, seam, entries) for task, seam, entries in _results(pool, tasks))
        )


def _squares(store: Maps, boxes: np.ndarray, side: int) -> list[Block]:
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
