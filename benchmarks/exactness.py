"""Measure what tiling does to nuclei: the pipeline and other ways to put tiles together, on the same maps."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
from scipy import ndimage

from benchmarks import material
from benchmarks.harness import Figure
from benchmarks.speed import Options, not_refined
from pipeline.census import slide as census
from pipeline.census.slide import slide_nuclei
from pipeline.census.worker import Block
from pipeline.instances import write_instances
from pipeline.kernels.instances import InstanceRules, segment
from pipeline.models.package import ModelPackage
from pipeline.stores.maps import MapStore

SIZES = {"full": (6144, 1024), "quick": (1536, 512)}
"""Side of the maps and of a tile, in pixels."""

MARGIN = 64
"""Margin around tiles that overlap, and half the width of strips over tile borders, in pixels."""


WAYS = (
    "tiles side by side",
    "overlap, by the centre",
    "overlap, scaled by each tile's extremes",
    "strips over borders",
    "the pipeline",
)
"""Names of the ways to put tiles together, as in the table."""


@dataclass(frozen=True, eq=False)
class Nucleus:
    """A nucleus on the slide.

    Parameters
    ----------
    y, x : int
        First row and column of its bounding box.
    mask : numpy.ndarray
        bool, shape of the box: the nucleus' pixels.
    """

    y: int
    x: int
    mask: np.ndarray

    @property
    def bottom(self) -> int:
        """Row after the last one of the box."""
        return self.y + self.mask.shape[0]

    @property
    def right(self) -> int:
        """Column after the last one of the box."""
        return self.x + self.mask.shape[1]


@dataclass(frozen=True)
class Damage:
    """Numbers of differences between found and known nuclei, which match if their IoU is above 0.5.

    Parameters
    ----------
    lost : int
        Known nuclei without a match.
    doubled : int
        Found nuclei that match a known one, beyond the first match of each.
    changed : int
        Known nuclei with a match, but none of exactly the same pixels.
    invented : int
        Found nuclei without a match, such as pieces of nuclei, or several in one.
    """

    lost: int
    doubled: int
    changed: int
    invented: int


def damage(known: np.ndarray, found: list[Nucleus]) -> Damage:
    """Compare found nuclei with a label map of known ones."""
    areas = np.bincount(known.ravel())
    hits, same = np.zeros(len(areas), np.int64), np.zeros(len(areas), bool)
    invented = 0
    for nucleus in found:
        under = np.bincount(known[nucleus.y : nucleus.bottom, nucleus.x : nucleus.right][nucleus.mask])
        under[0] = 0
        best, area = int(under.argmax()), int(nucleus.mask.sum())
        if 2 * under[best] > areas[best] + area - under[best]:
            hits[best] += 1
            same[best] |= under[best] == area == areas[best]
        else:
            invented += 1
    hits, same = hits[1:], same[1:]
    return Damage(int((hits == 0).sum()), int(np.maximum(hits - 1, 0).sum()), int(((hits > 0) & ~same).sum()), invented)


class Tiling:
    """Ways to find the nuclei of maps tile by tile.

    Parameters
    ----------
    maps : numpy.ndarray
        uint8 ``(C, H, W)``.
    rules : InstanceRules
        Thresholds.
    tile : int
        Side of a tile in pixels.
    """

    def __init__(self, maps: np.ndarray, rules: InstanceRules, tile: int) -> None:
        self.maps, self.rules, self.tile = maps, rules, tile
        self.height, self.width = maps.shape[1:]
        self.corners = [(y, x) for y in range(0, self.height, tile) for x in range(0, self.width, tile)]

    def window(self, y0: int, x0: int, y1: int, x1: int, scaled: bool = False) -> list[Nucleus]:
        """Nuclei of a window, which is cut to the slide; if `scaled`, its maps are first stretched to 0..255."""
        y0, x0, y1, x1 = max(y0, 0), max(x0, 0), min(y1, self.height), min(x1, self.width)
        window = self.maps[:, y0:y1, x0:x1]
        if scaled:
            low, high = window.min(axis=(1, 2), keepdims=True), window.max(axis=(1, 2), keepdims=True)
            window = np.rint(255.0 * (window - low) / np.maximum(high - low, 1)).astype(np.uint8)
        labels = segment(window, self.rules)
        boxes = enumerate(ndimage.find_objects(labels), start=1)
        return [Nucleus(y0 + box[0].start, x0 + box[1].start, labels[box] == label) for label, box in boxes if box]

    def cut(self) -> list[Nucleus]:
        """Nuclei of tiles side by side, cut at their borders."""
        side = self.tile
        return [n for y, x in self.corners for n in self.window(y, x, y + side, x + side)]

    def centred(self, scaled: bool = False) -> list[Nucleus]:
        """Nuclei of overlapping tiles; a nucleus belongs to the tile that its centre lies in."""
        found = []
        for y, x in self.corners:
            for n in self.window(y - MARGIN, x - MARGIN, y + self.tile + MARGIN, x + self.tile + MARGIN, scaled):
                rows, columns = np.nonzero(n.mask)
                middle = n.y + rows.mean(), n.x + columns.mean()
                if y <= middle[0] < y + self.tile and x <= middle[1] < x + self.tile:
                    found.append(n)
        return found

    def strips(self) -> list[Nucleus]:
        """Nuclei of tiles side by side, then of strips over their borders, then of squares over the strips' crossings.

        This is the scheme of TIAToolbox's engines (its ``NucleusInstanceSegmentor``, four kinds of tiles), and decides
        by bounding boxes as they do: nuclei within the margin of a tile are replaced by those of the strip over the
        border, of which those that touch its sides are dropped.
        """
        m, side, found = MARGIN, self.tile, []
        inner_y, inner_x = range(side, self.height, side), range(side, self.width, side)
        for y, x in self.corners:
            top, bottom = (y + m if y in inner_y else 0), (y + side - m if y + side in inner_y else self.height)
            left, right = (x + m if x in inner_x else 0), (x + side - m if x + side in inner_x else self.width)
            for n in self.window(y, x, y + side, x + side):
                if n.bottom > top and n.y < bottom and n.right > left and n.x < right:
                    found.append(n)
        for y, x in self.corners:
            top, bottom = (y + m if y in inner_y else -1), (y + side - m if y + side in inner_y else self.height + 1)
            left, right = (x + m if x in inner_x else -1), (x + side - m if x + side in inner_x else self.width + 1)
            if x in inner_x:
                for n in self.window(y, x - m, y + side, x + m):
                    if n.x > x - m and n.right < x + m and n.y > top and n.bottom < bottom:
                        found.append(n)
            if y in inner_y:
                for n in self.window(y - m, x, y + m, x + side):
                    if n.y > y - m and n.bottom < y + m and n.x > left and n.right < right:
                        found.append(n)
        for y in inner_y:
            for x in inner_x:
                found = [n for n in found if not _crosses(n, y - m, x - m, y + m, x + m)]
                for n in self.window(y - 2 * m, x - 2 * m, y + 2 * m, x + 2 * m):
                    if n.bottom > y - m and n.y < y + m and n.right > x - m and n.x < x + m:
                        found.append(n)
        return found


def _crosses(n: Nucleus, top: int, left: int, bottom: int, right: int) -> bool:
    """Whether the box of a nucleus meets the outline of a square."""
    if n.bottom <= top or n.y > bottom or n.right <= left or n.x > right:
        return False
    return not (n.y > top and n.bottom <= bottom and n.x > left and n.right <= right)


def of_table(table: pa.Table) -> list[Nucleus]:
    """Nuclei of a table that has their pixels as runs: row, start and end."""
    found = []
    for runs in table.column("runs").to_pylist():
        rows, starts, ends = np.array(runs, np.int64).reshape(-1, 3).T
        y, x = int(rows.min()), int(starts.min())
        mask = np.zeros((int(rows.max()) - y + 1, int(ends.max()) - x), bool)
        for row, start, end in zip(rows - y, starts - x, ends - x, strict=True):
            mask[row, start:end] = True
        found.append(Nucleus(y, x, mask))
    return found


def seams(options: Options) -> Iterator[Figure]:
    """Nuclei that differ from those of the whole maps, for common ways of tiling and for the pipeline."""
    folder = options.place("seams")
    package = ModelPackage.load(options.model)
    rules = not_refined(package).thresholds
    side, tile = SIZES["quick" if options.quick else "full"]
    material.write_maps(folder / "maps.zarr", material.field(package.mpp), side, side, package.mpp, 1.0)
    maps = MapStore.open(folder / "maps.zarr").read(0, 0, side, side)
    whole = segment(maps, rules)
    tiling = Tiling(maps, rules, tile)
    note = f"{whole.max()} nuclei, {side} x {side} px, tiles of {tile} px, margins of {MARGIN} px"
    found = [
        tiling.cut(),
        tiling.centred(),
        tiling.centred(scaled=True),
        tiling.strips(),
        of_table(slide_nuclei(folder / "maps.zarr", rules, block=tile, halo=MARGIN)),
    ]
    for name, nuclei in zip(WAYS, found, strict=True):
        target = "value <= 0" if name == WAYS[-1] else ""
        for what, count in vars(damage(whole, nuclei)).items():
            yield Figure("seams", f"{name}: {what}", count, "nuclei", target=target, note=note)
    yield _digests(folder, package, 2 if options.quick else 4)


def _digests(folder: Path, package: ModelPackage, several: int) -> Figure:
    """Count the different files that result from different blocks, halos, numbers of workers and block orders."""
    digests = set()
    runs = [(256, 16, 1), (512, 128, several), (1000, 64, 2), (2048, 128, 1), (100_000, 0, 1)]
    in_order = census.slide_blocks
    for number, (block, halo, workers) in enumerate(runs):
        out = folder / f"{block}.parquet"

        def shuffled(store: Any, side: int, number: int = number) -> list[Block]:
            return random.Random(number).sample(blocks := in_order(store, side), len(blocks))

        with (
            mock.patch.object(census, "slide_blocks", shuffled),
            mock.patch.object(census, "WORKER_MEGAPIXELS", 0.1),  # so low that all workers asked for are started
        ):
            write_instances(folder / "maps.zarr", package, out, slide="s", block=block, halo=halo, workers=workers)
        digests.add(hashlib.sha256(out.read_bytes()).hexdigest())
    note = f"blocks 256, 512, 1000, 2048, whole; 1 to {several} workers, orders shuffled; sha256 {min(digests)}"
    return Figure("seams", "different files for different blocks", len(digests), "", target="value <= 1", note=note)
