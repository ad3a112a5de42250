"""Join components across the edges of blocks, and store what blocks report for another process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from pipeline.census.worker import Block, Entry, Seam

SURVEY = "survey.npz"
"""Name of the file in a part's folder that holds what its blocks report."""


class Seams:
    """Joins components across the edges of blocks, which may be added in any order.

    Parameters
    ----------
    block : int
        Spacing of the blocks: their corners lie at multiples of it.
    """

    def __init__(self, block: int) -> None:
        self.block = block
        self.count = 0
        self._first: list[np.ndarray] = []
        self._boxes: list[np.ndarray] = []
        self._done: list[np.ndarray] = []
        self._pairs: list[np.ndarray] = []
        # Sides whose neighbour has not been added yet, by edge: row, column, and whether the edge is vertical.
        self._waiting: dict[tuple[int, int, bool], np.ndarray] = {}

    def add(self, block: Block, seam: Seam | None) -> None:
        """Add the seam of a block; None if no component reaches its edges."""
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
        """Group the parts of components that the blocks have reported by the component they belong to.

        Returns
        -------
        group : numpy.ndarray
            int32 ``(n,)``: number of the component of each part, from 0.
        first, boxes, done : numpy.ndarray
            First pixel, box and state of each part, see `Seam`.
        """
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        if self.count == 0:
            return np.zeros(0, np.int32), np.zeros(0, np.int64), np.zeros((0, 4), np.int64), np.zeros(0, bool)
        pairs = np.concatenate([np.zeros((0, 2), np.int64), *self._pairs])
        graph = coo_array((np.ones(len(pairs), np.int8), (pairs[:, 0], pairs[:, 1])), shape=(self.count, self.count))
        _, group = connected_components(graph, directed=False)
        return group, np.concatenate(self._first), np.concatenate(self._boxes), np.concatenate(self._done)


def whole_components(
    group: np.ndarray, first: np.ndarray, boxes: np.ndarray, done: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Combine first pixels, boxes and states of parts (see `Seams.parts`) into those of whole components."""
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


def write_survey(path: Path, surveyed: Iterable[tuple[Block, Seam | None, dict[int, Entry]]]) -> None:
    """Write what blocks report to an archive of plain arrays, which another process reads.

    Parameters
    ----------
    path : pathlib.Path
        The file (``.npz``), in the same folder as the files of nuclei.
    surveyed : iterable
        Each block with its seam and the entries of its nuclei.
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
    """Yield each block with its seam and entries from the file that `write_survey` wrote into the folder `path`."""
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
