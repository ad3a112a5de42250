"""Instances stage: from maps to nuclei, exactly, whatever the blocks.

The unit of work is the foreground component. A block looks at its core and a halo around it; a component belongs to
the block whose core holds the component's first pixel in raster order. One that runs out of the halo is followed on a
window that grows with it, by every block it reaches, until it is whole or found to begin elsewhere. Nothing is merged
and nothing is dropped: the nuclei do not depend on blocks, halo, workers or order.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import shapely

from pipeline.errors import PipelineError
from pipeline.kernels.contours import drop_collinear, mask_runs, outline
from pipeline.kernels.instances import (
    Channels,
    InstanceRules,
    fill_small_holes,
    foreground_components,
    split_component,
)
from pipeline.maps import MapStore
from pipeline.models.package import ModelPackage
from pipeline.nuclei import COMPRESSION, RUNS_FIELD, nuclei_schema
from pipeline.progress import Progress
from pipeline.stage import run_stage
from pipeline.tissue import read_tissue

log = logging.getLogger(__name__)

DEFAULT_BLOCK = 2048
DEFAULT_HALO = 128

ROW_GROUP = 1 << 15
"""Nuclei in a row group of the table."""


@dataclass(frozen=True)
class Block:
    """A square of the slide's grid: its core.

    Parameters
    ----------
    x, y, width, height : int
        Core in grid pixels.
    """

    x: int
    y: int
    width: int
    height: int


@dataclass(frozen=True, eq=False)
class Nuclei:
    """Nuclei of a block as flat arrays.

    Parameters
    ----------
    ids : numpy.ndarray
        uint64 ``(n,)``.
    geometry : numpy.ndarray
        WKB polygons in level-0 pixels, object ``(n,)``.
    class_ids : numpy.ndarray
        uint8 ``(n,)``.
    probability : numpy.ndarray
        float32 ``(n,)``.
    runs : list of numpy.ndarray
        int32 ``(k, 3)`` pixel runs of each nucleus in grid pixels.
    """

    ids: np.ndarray
    geometry: np.ndarray
    class_ids: np.ndarray
    probability: np.ndarray
    runs: list[np.ndarray]


class _Collector:
    """Gather the nuclei of a block."""

    def __init__(self, n_classes: int, channels: Channels) -> None:
        self.n_classes = n_classes
        self.channels = channels
        self.ids: list[int] = []
        self.class_ids: list[int] = []
        self.probability: list[float] = []
        self.runs: list[np.ndarray] = []
        self.points: list[np.ndarray] = []
        self.ring_of: list[int] = []

    def add(self, labels: np.ndarray, maps: np.ndarray, x: int, y: int) -> None:
        """Add the nuclei of a component, whose box begins at grid pixel (x, y)."""
        from scipy import ndimage

        for label, box in enumerate(ndimage.find_objects(labels), start=1):
            if box is None:
                continue
            mask = labels[box] == label
            top, left = box[0].start + y, box[1].start + x
            rings = list(outline(mask))
            runs = mask_runs(mask) + np.array([top, left, left], np.int32)
            self.runs.append(runs)
            self.ids.append(int(runs[0, 0]) << 32 | int(runs[0, 1]))
            inside = maps[(slice(None), *box)][:, mask]
            nucleus = inside[self.channels.nucleus]
            self.probability.append(float(nucleus.sum(dtype=np.int64)) / (255.0 * len(nucleus)))
            kind = 0
            if self.n_classes > 1 and self.channels.types is not None:
                first = self.channels.types + 1  # after the background
                kind = int(inside[first : first + self.n_classes].sum(axis=1, dtype=np.int64).argmax())
            self.class_ids.append(kind)
            # Watershed and components are 4-connected, so a nucleus has one shell; its holes follow.
            for points, _ in rings:
                self.points.append(points + np.array([2 * left, 2 * top], np.int32))
                self.ring_of.append(len(self.ids) - 1)

    def finish(self, scale: tuple[float, float], tissue: Any) -> Nuclei:
        """Polygons in level-0 pixels; nuclei whose centre lies outside `tissue` are left out."""
        if not self.ids:
            empty = np.array([], object)
            return Nuclei(np.array([], np.uint64), empty, np.array([], np.uint8), np.array([], np.float32), [])
        offsets = np.concatenate([[0], np.cumsum([len(p) for p in self.points])])
        points, offsets = drop_collinear(np.concatenate(self.points), offsets)
        ring_index = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
        rings = shapely.linearrings(points * (0.5 * scale[0], 0.5 * scale[1]), indices=ring_index)
        polygons = shapely.polygons(rings, indices=np.array(self.ring_of))
        broken = ~shapely.is_valid(polygons)
        if broken.any():
            polygons[broken] = [_largest(p) for p in shapely.make_valid(polygons[broken])]
        keep = np.ones(len(polygons), bool)
        if tissue is not None:
            centres = shapely.centroid(polygons)
            keep = shapely.contains_xy(tissue, shapely.get_x(centres), shapely.get_y(centres))
        chosen = np.flatnonzero(keep)
        return Nuclei(
            np.array(self.ids, np.uint64)[keep],
            np.asarray(shapely.to_wkb(polygons[keep]), object),
            np.array(self.class_ids, np.uint8)[keep],
            np.array(self.probability, np.float32)[keep],
            [self.runs[i] for i in chosen],
        )


def _largest(geometry: Any) -> Any:
    parts = [g for g in shapely.get_parts(geometry) if g.geom_type == "Polygon"]
    nested = [p for g in shapely.get_parts(geometry) if g.geom_type == "MultiPolygon" for p in g.geoms]
    return max([*parts, *nested], key=lambda p: p.area)


def _first_pixel(mask: np.ndarray) -> tuple[int, int]:
    """Row and column of the first pixel in raster order; `mask` is cut to its bounding box."""
    return 0, int(mask[0].argmax())


def _follow(
    store: MapStore,
    nucleus: int,
    threshold: int,
    seed: tuple[int, int],
    box: tuple[int, int, int, int],
    core: Block,
) -> tuple[np.ndarray, np.ndarray, int, int] | None:
    """Follow a component that runs out of its window until it is whole.

    Parameters
    ----------
    store : MapStore
        The maps.
    nucleus, threshold : int
        Channel of the nucleus map, and what its foreground reaches.
    seed : (int, int)
        x, y of one of its pixels.
    box : (int, int, int, int)
        Left, top, right, bottom of what is known of it, in grid pixels.
    core : Block
        The block that asks.

    Returns
    -------
    tuple or None
        Maps and components of the window, the component's number, and the window's left and top, packed as
        ``(maps, mask, x, y)`` cut to the component's box; None when the component begins before the block's core.
    """
    grid = store.grid
    left, top, right, bottom = box
    while True:
        if top < core.y:
            return None
        # Twice its size in every direction that is open, so that the work stays in proportion.
        grow_x, grow_y = max(right - left, 256), max(bottom - top, 256)
        x0, y0 = max(left - grow_x, 0), max(top - grow_y, 0)
        x1, y1 = min(right + grow_x, grid.width), min(bottom + grow_y, grid.height)
        maps = store.read(x0, y0, x1 - x0, y1 - y0)
        components, boxes = foreground_components(maps[nucleus], threshold)
        index = int(components[seed[1] - y0, seed[0] - x0])
        bx, by, bw, bh, _ = (int(v) for v in boxes[index - 1])
        left, top, right, bottom = x0 + bx, y0 + by, x0 + bx + bw, y0 + by + bh
        open_side = (
            (bx == 0 and x0 > 0)
            or (by == 0 and y0 > 0)
            or (bx + bw == x1 - x0 and x1 < grid.width)
            or (by + bh == y1 - y0 and y1 < grid.height)
        )
        if not open_side:
            window = np.s_[by : by + bh, bx : bx + bw]
            here = components[window]
            labelled = np.where(here == index, 1, np.where(here > 0, 2, 0)).astype(np.uint8)
            return maps[:, by : by + bh, bx : bx + bw], labelled, left, top


def find_nuclei(
    store: MapStore, block: Block, halo: int, rules: InstanceRules, n_classes: int = 1, tissue: Any = None
) -> Nuclei:
    """The nuclei whose components begin in a block's core.

    Parameters
    ----------
    store : MapStore
        The maps.
    block : Block
        The core.
    halo : int
        Pixels around the core that are looked at first.
    rules : InstanceRules
        Thresholds.
    n_classes : int
        Classes of the model.
    tissue : shapely geometry, optional
        Nuclei whose centre lies outside are left out; level-0 pixels.
    """
    grid = store.grid
    channels = Channels.of(store.channels)
    collector = _Collector(n_classes, channels)
    x0, y0 = max(block.x - halo, 0), max(block.y - halo, 0)
    x1, y1 = min(block.x + block.width + halo, grid.width), min(block.y + block.height + halo, grid.height)
    maps = store.read(x0, y0, x1 - x0, y1 - y0)
    components, boxes = foreground_components(maps[channels.nucleus], rules.nucleus)
    core_x0, core_y0 = block.x - x0, block.y - y0
    core_x1, core_y1 = core_x0 + block.width, core_y0 + block.height
    followed: set[tuple[int, int]] = set()
    for index, (bx, by, bw, bh, area) in enumerate(boxes.tolist(), start=1):
        if bx >= core_x1 or by >= core_y1 or bx + bw <= core_x0 or by + bh <= core_y0:
            continue
        runs_out = (
            (bx == 0 and x0 > 0)
            or (by == 0 and y0 > 0)
            or (bx + bw == x1 - x0 and x1 < grid.width)
            or (by + bh == y1 - y0 and y1 < grid.height)
        )
        if by < core_y0 or (area < rules.min_area and not runs_out):
            continue
        window = np.s_[by : by + bh, bx : bx + bw]
        here = components[window]
        mask = here == index
        if runs_out:
            inside = np.argwhere(mask & _core_mask(mask.shape, by, bx, core_y0, core_x0, core_y1, core_x1))
            if len(inside) == 0:
                continue
            seed = (int(inside[0, 1]) + bx + x0, int(inside[0, 0]) + by + y0)
            known = (x0 + bx, y0 + by, x0 + bx + bw, y0 + by + bh)
            whole = _follow(store, channels.nucleus, rules.nucleus, seed, known, block)
            if whole is None:
                continue
            part, labelled, left, top = whole
            mask, other = labelled == 1, labelled == 2
        else:
            part, left, top = maps[:, by : by + bh, bx : bx + bw], x0 + bx, y0 + by
            other = (here != 0) & ~mask
        row, column = _first_pixel(mask)
        row, column = row + top, column + left
        if not (block.y <= row < block.y + block.height and block.x <= column < block.x + block.width):
            continue
        if runs_out:
            if (row, column) in followed:  # the window held two pieces of it
                continue
            followed.add((row, column))
        mask = fill_small_holes(mask, other, rules.max_hole)
        labels = split_component(part, mask, rules, channels)
        collector.add(labels, part, left, top)
    return collector.finish((grid.scale_x, grid.scale_y), tissue)


def _core_mask(shape: tuple[int, ...], top: int, left: int, y0: int, x0: int, y1: int, x1: int) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[max(y0 - top, 0) : max(y1 - top, 0), max(x0 - left, 0) : max(x1 - left, 0)] = True
    return mask


_worker: dict[str, Any] = {}
"""What a worker process keeps between blocks."""


def _start_worker(maps: Path, rules: InstanceRules, halo: int, n_classes: int, tissue: bytes | None) -> None:
    geometry = None if tissue is None else shapely.from_wkb(tissue)
    if geometry is not None:
        shapely.prepare(geometry)
    _worker.update(store=MapStore.open(maps), rules=rules, halo=halo, n_classes=n_classes, tissue=geometry)


def _run_block(block: Block) -> Nuclei:
    return find_nuclei(
        _worker["store"], block, _worker["halo"], _worker["rules"], _worker["n_classes"], _worker["tissue"]
    )


class _Inline(Executor):
    """Runs what it is given at once."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


def _merge(parts: list[Nuclei]) -> Nuclei:
    ids = np.concatenate([p.ids for p in parts])
    order = np.argsort(ids, kind="stable")
    runs = [r for p in parts for r in p.runs]
    return Nuclei(
        ids[order],
        np.concatenate([p.geometry for p in parts])[order],
        np.concatenate([p.class_ids for p in parts])[order],
        np.concatenate([p.probability for p in parts])[order],
        [runs[i] for i in order],
    )


def _take(nuclei: Nuclei, chosen: np.ndarray) -> Nuclei:
    return Nuclei(
        nuclei.ids[chosen],
        nuclei.geometry[chosen],
        nuclei.class_ids[chosen],
        nuclei.probability[chosen],
        [nuclei.runs[i] for i in np.flatnonzero(chosen)],
    )


def slide_nuclei(
    maps: Path,
    rules: InstanceRules,
    *,
    block: int = DEFAULT_BLOCK,
    halo: int = DEFAULT_HALO,
    workers: int = 1,
    n_classes: int = 1,
    tissue: Any = None,
) -> Iterator[Nuclei]:
    """All nuclei of a slide in the order of their ids, a row of blocks at a time.

    Parameters
    ----------
    maps : pathlib.Path
        Store of maps.
    rules : InstanceRules
        Thresholds.
    block, halo : int
        Side of a block and width of its halo in grid pixels. They change the speed, never the result.
    workers : int
        Processes.
    n_classes : int
        Classes of the model.
    tissue : shapely geometry, optional
        Nuclei whose centre lies outside are left out; level-0 pixels.
    """
    if block < 1 or halo < 0 or workers < 1:
        raise PipelineError(f"block {block}, halo {halo}, workers {workers}", "use at least 1, 0 and 1")
    store = MapStore.open(maps)
    grid = store.grid
    start = (maps, rules, halo, n_classes, None if tissue is None else shapely.to_wkb(tissue))
    rows: list[list[Block]] = []
    for y in range(0, grid.height, block):
        row = [
            Block(x, y, min(block, grid.width - x), min(block, grid.height - y)) for x in range(0, grid.width, block)
        ]
        rows.append([b for b in row if store.is_active(b.x, b.y, b.width, b.height)])
    pool: Executor
    if workers == 1:
        _start_worker(*start)
        pool = _Inline()
    else:
        pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_start_worker, initargs=start)
    total = sum(b.width * b.height for row in rows for b in row) / 1e6
    with pool, Progress(total, "instances", "MP") as progress:
        running: list[list[tuple[Block, Future[Nuclei]]]] = []
        waiting: Nuclei | None = None
        for index in range(len(rows)):
            while len(running) <= 1 and index + len(running) < len(rows):  # this row and the next
                running.append([(b, pool.submit(_run_block, b)) for b in rows[index + len(running)]])
            parts = [] if waiting is None else [waiting]
            for one, future in running.pop(0):
                parts.append(future.result())
                progress.advance(one.width * one.height / 1e6)
            if not parts:
                continue
            merged = _merge(parts)
            # Components of later rows begin later, so what begins above the next row is complete.
            ready = merged.ids < np.uint64(min((index + 1) * block, grid.height) << 32)
            waiting = _take(merged, ~ready)
            if ready.any():
                yield _take(merged, ready)
        if waiting is not None and len(waiting.ids):
            yield waiting


def regroup(parts: Iterator[Nuclei], size: int) -> Iterator[Nuclei]:
    """Nuclei in groups of exactly `size` (the last may be smaller), so that files do not tell of the blocks."""
    held: list[Nuclei] = []
    count = 0
    for part in parts:
        held.append(part)
        count += len(part.ids)
        while count >= size:
            merged = _merge(held)
            first = np.arange(count) < size
            yield _take(merged, first)
            held, count = [_take(merged, ~first)], count - size
    if count:
        yield _merge(held)


def _table(nuclei: Nuclei, schema: pa.Schema, names: list[str]) -> pa.Table:
    lengths = np.array([r.size for r in nuclei.runs], np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    flat = np.concatenate([r.ravel() for r in nuclei.runs]) if nuclei.runs else np.array([], np.int32)
    runs = pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat, pa.int32()), type=RUNS_FIELD.type)
    return pa.Table.from_arrays(
        [
            pa.array(nuclei.ids, pa.uint64()),
            pa.array(nuclei.geometry, pa.binary()),
            pa.array([names[i] for i in nuclei.class_ids], pa.string()),
            pa.array(nuclei.class_ids, pa.uint8()),
            pa.array(nuclei.probability, pa.float32()),
            runs,
        ],
        schema=schema,
    )


def write_instances(
    maps: Path, package: ModelPackage, out: Path, *, slide: str, block: int, halo: int, workers: int, tissue: Any = None
) -> dict[str, Any]:
    """Find a slide's nuclei and write their table.

    Returns
    -------
    dict
        ``nuclei``, ``nuclei_per_s`` and ``digest``, the sha256 of ids, polygons and classes.
    """
    store = MapStore.open(maps)
    about = {
        "slide": slide,
        "grid": store.grid.to_json(),
        "classes": package.colors,
        "model": {"name": package.name, "sha256": package.sha256},
    }
    schema = nuclei_schema(about, [RUNS_FIELD])
    names = [c.name for c in package.classes]
    digest = hashlib.sha256()
    count = 0
    with Progress(1, "nuclei", "slide") as clock, pq.ParquetWriter(out, schema, **COMPRESSION) as writer:
        found = slide_nuclei(
            maps,
            package.thresholds,
            block=block,
            halo=halo,
            workers=workers,
            n_classes=len(names),
            tissue=tissue,
        )
        for nuclei in regroup(found, ROW_GROUP):
            count += len(nuclei.ids)
            digest.update(nuclei.ids.tobytes())
            digest.update(nuclei.class_ids.tobytes())
            for polygon in nuclei.geometry:
                digest.update(polygon)
            writer.write_table(_table(nuclei, schema, names))
        return {
            "nuclei": count,
            "nuclei_per_s": round(count / max(clock.seconds, 1e-9), 1),
            "digest": digest.hexdigest(),
        }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the stage's arguments."""
    parser.add_argument("--maps", type=Path, required=True, help="maps.zarr")
    parser.add_argument("--model", type=Path, required=True, help="model package")
    parser.add_argument("--out", type=Path, required=True, help="table of nuclei to write (GeoParquet)")
    parser.add_argument("--slide", default="slide", help="name of the slide")
    parser.add_argument("--maps-manifest", type=Path, help="maps.json")
    parser.add_argument("--manifest", type=Path, help="manifest to write")
    parser.add_argument("--tissue", type=Path, help="tissue.geojson; nuclei outside are left out")
    parser.add_argument("--block", type=int, default=DEFAULT_BLOCK, help="side of a block in grid pixels")
    parser.add_argument("--halo", type=int, default=DEFAULT_HALO, help="width of a block's halo in grid pixels")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--on-bad-slide", choices=("continue", "stop"), default="continue")


def main(args: argparse.Namespace) -> int:
    """Run the stage from the command line."""

    def body(staged: dict[str, Path]) -> dict[str, Any]:
        found = write_instances(
            args.maps,
            ModelPackage.load(args.model),
            staged["nuclei"],
            slide=args.slide,
            block=args.block,
            halo=args.halo,
            workers=args.workers,
            tissue=shapely.union_all(read_tissue(args.tissue)) if args.tissue else None,
        )
        log.info("slide %r: %d nuclei, %.0f a second", args.slide, found["nuclei"], found["nuclei_per_s"])
        return found

    run_stage(
        "instances",
        args.slide,
        manifest=args.manifest or args.out.with_suffix(".json"),
        outputs={"nuclei": args.out},
        upstream=[args.maps_manifest] if args.maps_manifest else [],
        on_bad_slide=args.on_bad_slide,
        body=body,
    )
    return 0
