"""What tiling does to nuclei: ways to put tiles together again, and the pipeline's, on the same maps."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from scipy import ndimage

from benchmarks import material
from benchmarks.harness import Figure
from benchmarks.speed import Options
from pipeline.instances import slide_nuclei, write_instances
from pipeline.kernels.instances import InstanceRules, segment
from pipeline.maps import MapStore
from pipeline.models.package import ModelPackage


def seams(options: Options) -> Iterator[Figure]:
    """Nuclei that differ from those of the maps taken whole, for three ways of tiling that are in use and for ours."""
    folder = options.place("seams")
    package = ModelPackage.load(options.model)
    rules = package.thresholds
    side = 3072 if options.quick else 6144
    material.write_maps(folder / "maps.zarr", material.field(package.mpp), side, side, package.mpp, 1.0)
    maps = MapStore.open(folder / "maps.zarr").read(0, 0, side, side)
    whole = segment(maps, rules)
    known = _shapes(whole, 0, 0)
    tile, overlap = 1024, 64
    note = f"{len(known)} nuclei, {side} x {side} px, tiles of {tile} px"
    ways = {
        "cut at the tiles' borders": (0, False),
        "overlap of 64 px, each nucleus to the tile with its centre": (overlap, False),
        "the same, maps scaled by each tile's extremes": (overlap, True),
    }
    for name, (margin, scaled) in ways.items():
        found: set[bytes] = set()
        count = 0
        for y in range(0, side, tile):
            for x in range(0, side, tile):
                shapes = _tile(maps, rules, (y, x), tile, margin, scaled)
                count += len(shapes)
                found |= shapes
        yield from _figures(name, known, found, count, note)
    ours = slide_nuclei(folder / "maps.zarr", rules, block=tile, halo=overlap)
    runs = [np.array(r, np.int64).reshape(-1, 3) for r in ours.column("runs").to_pylist()]
    shapes = [hashlib.sha256(r.tobytes()).digest() for r in runs]
    yield from _figures("the pipeline", known, set(shapes), len(shapes), note, "value <= 0")
    yield _digests(folder, package, options)


def _figures(
    name: str, known: set[bytes], found: set[bytes], count: int, note: str, target: str = ""
) -> Iterator[Figure]:
    yield Figure("seams", f"{name}: not there as they are", len(known - found), "nuclei", target=target, note=note)
    yield Figure(
        "seams", f"{name}: there that are none", count - len(known & found), "nuclei", target=target, note=note
    )


def _shapes(labels: np.ndarray, top: int, left: int) -> set[bytes]:
    """Each nucleus as the hash of its runs on the slide."""
    found = set()
    for label, box in enumerate(ndimage.find_objects(labels), start=1):
        if box is not None:
            found.add(_shape(labels[box] == label, top + box[0].start, left + box[1].start))
    return found


def _shape(mask: np.ndarray, top: int, left: int) -> bytes:
    steps = np.diff(np.pad(mask.astype(np.int8), ((0, 0), (1, 1))), axis=1)
    rows, starts = np.nonzero(steps == 1)
    ends = np.nonzero(steps == -1)[1]
    runs = np.stack([rows + top, starts + left, ends + left], axis=1).astype(np.int64)
    return hashlib.sha256(runs.tobytes()).digest()


def _tile(
    maps: np.ndarray, rules: InstanceRules, origin: tuple[int, int], tile: int, margin: int, scaled: bool
) -> set[bytes]:
    y, x = origin
    top, left = max(y - margin, 0), max(x - margin, 0)
    window = maps[:, top : y + tile + margin, left : x + tile + margin]
    if scaled:
        low, high = window.min(axis=(1, 2), keepdims=True), window.max(axis=(1, 2), keepdims=True)
        window = np.rint(255.0 * (window - low) / np.maximum(high - low, 1)).astype(np.uint8)
    labels = segment(window, rules)
    if margin:
        index = np.arange(1, labels.max(initial=0) + 1)
        centres = np.array(ndimage.center_of_mass(labels > 0, labels, index)).reshape(-1, 2) + np.array([top, left])
        inside = ((centres >= (y, x)) & (centres < (y + tile, x + tile))).all(axis=1)
        labels[~np.r_[True, inside][labels]] = 0
    return _shapes(labels, top, left)


def _digests(folder: Path, package: ModelPackage, options: Options) -> Figure:
    """How many different files come of blocks, halos and workers."""
    digests = set()
    runs = [(256, 16, 1), (512, 128, 2), (1000, 64, 1), (2048, 128, 2), (100_000, 0, 1)]
    for block, halo, workers in runs:
        out = folder / f"{block}.parquet"
        write_instances(folder / "maps.zarr", package, out, slide="s", block=block, halo=halo, workers=workers)
        digests.add(hashlib.sha256(out.read_bytes()).hexdigest())
    note = f"blocks 256, 512, 1000, 2048, whole; 1 and 2 workers; sha256 {min(digests)[:16]}…"
    return Figure("seams", "different files for different blocks", len(digests), "", target="value <= 1", note=note)
