"""Speed of each stage beside the limit that is set by what it cannot do without."""

from __future__ import annotations

import os
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import material
from benchmarks.harness import ROOT, Figure, Run, best, run_command, spent, stage
from pipeline.models.package import ModelPackage
from pipeline.stage import write_json

DEFAULT = ROOT / "models/default"
BASELINE = ROOT / "models/hematoxylin"


@dataclass(frozen=True)
class Options:
    """How to measure.

    Parameters
    ----------
    folder : pathlib.Path
        Where to put what is worked on.
    quick : bool
        Small inputs.
    model : pathlib.Path
        Model package for the rows with a network.
    peer : pathlib.Path, optional
        Python of an environment with TIAToolbox.
    cores : int
        CPU cores that may be used.
    """

    folder: Path
    quick: bool
    model: Path = DEFAULT
    peer: Path | None = None
    cores: int = os.cpu_count() or 1

    def place(self, name: str) -> Path:
        """A new folder."""
        path = self.folder / name
        path.mkdir(parents=True)
        return path


def tiles(options: Options) -> Iterator[Figure]:
    """Slide at 0.25 µm/px to tiles at 0.5, against decoding the same windows."""
    from pipeline import tiles as module
    from pipeline.slides.inspect import reopen
    from pipeline.stage import read_manifest

    folder = options.place("tiles")
    side = 4096 if options.quick else 8192
    material.write_slide(folder / "slide.svs", material.field(0.25), side, side, 0.25, 1.0)
    stage("inspect", slide="s", path=folder / "slide.svs", out=folder / "slide.json")
    _write_tissue(folder, side, side)
    info = read_manifest(folder / "slide.json")
    windows: list[tuple[int, int, int, int, int]] = []

    class Recorder:
        def __init__(self, slide: Any) -> None:
            self.slide = slide

        def __getattr__(self, name: str) -> Any:
            return getattr(self.slide, name)

        def read(self, *window: int) -> np.ndarray:
            windows.append(window)  # type: ignore[arg-type]
            return np.asarray(self.slide.read(*window))

    def run() -> dict[str, Any]:
        return module.run_tiles(
            "s", folder / "slide.json", folder / "tissue.json", folder / "tissue.geojson", options.model,
            folder / "tiles.json", folder / "tiles.zarr", workers=1,
        )  # fmt: skip

    original = module.reopen
    module.reopen = lambda info: Recorder(original(info))  # type: ignore[assignment, return-value]
    try:
        run()
    finally:
        module.reopen = original
    wanted = list(dict.fromkeys(windows))

    def decode() -> None:
        with reopen(info) as slide:
            for window in wanted:
                slide.read(*window)

    manifest, ours = best(run, 2)
    _, limit = best(decode, 2)
    megapixels = sum(w * h for _, _, _, w, h in wanted) / 1e6
    yield Figure(
        "tiles", "slide to tiles", megapixels / ours.cpu, "MP/s a core", megapixels / limit.cpu, "decoding alone",
        "ratio >= 0.7", f"{side} x {side} px JPEG at 0.25 µm/px, {info['backend']}, {manifest['megapixels']} MP out",
    )  # fmt: skip


def _write_tissue(folder: Path, width: int, height: int) -> None:
    ring = [[0, 0], [width, 0], [width, height], [0, height], [0, 0]]
    feature = {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}, "properties": {}}
    write_json(folder / "tissue.geojson", {"type": "FeatureCollection", "features": [feature]})
    write_json(folder / "tissue.json", {"stage": "tissue", "slide": "s", "status": "ok", "failure": None})


def infer(options: Options, device: str = "cpu") -> Iterator[Figure]:
    """Tiles to maps, against the network's forward pass alone on the same windows."""
    from pipeline.inference import active_windows, choose_predictor, infer_slide, one_result
    from pipeline.kernels.blend import PatchGrid
    from pipeline.kernels.stain import StainTransform
    from pipeline.lattice import CELL
    from pipeline.tiles import TileStore

    folder = options.place(f"infer-{device}")
    package = ModelPackage.load(options.model)
    side = {("cpu", True): 1024, ("cpu", False): 2048, ("cuda", True): 8192, ("cuda", False): 16384}[
        device, options.quick
    ]
    material.write_tiles(folder / "tiles.zarr", material.field(package.mpp), side, side, package.mpp, 1.0)
    store = TileStore.open(folder / "tiles.zarr")
    transform = StainTransform("matrix", matrix=((0.98, 0.01, 0.01), (0.01, 0.98, 0.01), (0.01, 0.01, 0.98)))
    grid = PatchGrid(side, side, package.patch, package.overlap)
    windows = list(active_windows(grid, store.active, CELL))
    with one_result():
        predictor, name = choose_predictor(package, device, 0, options.cores)
        count = len(windows) // predictor.batch * predictor.batch or predictor.batch
        chosen = [windows[i % len(windows)] for i in range(min(count, 8 * predictor.batch))]
        patches = np.stack([store.read(*grid.origin(*w), grid.patch, grid.patch) for w in chosen])
        batches = np.split(patches, len(patches) // predictor.batch)
        predictor(batches[0])
        times = max(1, round(len(windows) / len(patches)))
        _, alone = spent(lambda: [predictor(batch) for _ in range(times) for batch in batches])
        (found, ours) = spent(lambda: infer_slide(store, transform, predictor, package, folder / "maps.zarr"))
    rate, limit = found["windows"] / ours.wall, times * len(patches) / alone.wall
    note = f"{side} x {side} px, {package.name}, windows of {package.patch} px, {name}, {options.cores} threads"
    if device == "cpu":
        yield Figure(
            "infer", "windows by CPU time", found["windows"] / ours.cpu, "/s a core", times * len(patches) / alone.cpu,
            "forward alone", "ratio >= 0.9", note,
        )  # fmt: skip
    yield Figure("infer", f"windows, {device}", rate, "/s", limit, "forward alone",
                 "" if device == "cpu" else "ratio >= 0.8", note)  # fmt: skip
    megapixels = found["windows"] * grid.stride**2 / 1e6
    yield Figure("infer", f"tissue, {device}", megapixels * package.mpp**2 / ours.wall, "mm²/s", note=note)


def infer_gpu(options: Options) -> Iterator[Figure]:
    """The same on a GPU, where there is one."""
    import torch

    if not torch.cuda.is_available():
        print("infer-gpu: skipped, this machine has no GPU", file=sys.stderr)
        return
    yield from infer(options, "cuda")


def instances(options: Options) -> Iterator[Figure]:
    """Maps to the table of nuclei, against components and a watershed of the whole maps at once."""
    from skimage.measure import label
    from skimage.segmentation import watershed

    from pipeline.instances import write_instances
    from pipeline.maps import MapStore

    folder = options.place("instances")
    side = 4096 if options.quick else 8192
    package = ModelPackage.load(options.model)
    rules = package.thresholds
    material.write_maps(folder / "maps.zarr", material.field(package.mpp), side, side, package.mpp, 1.0)
    maps = MapStore.open(folder / "maps.zarr").read(0, 0, side, side)

    def raw() -> None:
        front = maps[0] >= rules.nucleus
        label(front, connectivity=1)
        markers = label(front & (maps[1] >= rules.marker), connectivity=2)
        watershed(255 - maps[1], markers, mask=front)

    def ours(workers: int) -> dict[str, Any]:
        return write_instances(
            folder / "maps.zarr", package, folder / f"{workers}.parquet", slide="s", block=2048, halo=128,
            workers=workers,
        )  # fmt: skip

    found, one = best(lambda: ours(1), 2)
    _, limit = best(raw, 2)
    note = f"{side} x {side} px, {found['nuclei']} nuclei"
    yield Figure(
        "instances", "maps to nuclei.parquet", side**2 / 1e6 / one.cpu, "MP/s a core", side**2 / 1e6 / limit.cpu,
        "labels and watershed of scikit-image, no polygons", "ratio >= 2.5", note,
    )  # fmt: skip
    yield Figure("instances", "nuclei", found["nuclei"] / one.cpu, "/s a core", note=note)
    again, two = best(lambda: ours(2), 2)
    if again["digest"] != found["digest"]:
        raise RuntimeError("two workers found other nuclei than one")
    yield Figure("instances", "seconds, 2 workers for 1", one.wall / two.wall, "times", target="value >= 1.7",
                 note=f"{note}; {os.cpu_count()} cores, start-up of the workers included")  # fmt: skip


REGIONPROPS = (
    "centroid", "area", "perimeter", "axis_major_length", "axis_minor_length", "eccentricity", "solidity",
    "orientation", "intensity_mean", "intensity_std",
)  # fmt: skip
"""Columns of scikit-image that say what the stage `measure` says."""


def measure(options: Options) -> Iterator[Figure]:
    """Nuclei measured, all columns, against scikit-image's regionprops_table with the same."""
    from skimage.measure import regionprops_table

    from pipeline.instances import write_instances
    from pipeline.kernels.stain import RUIFROK, concentrations
    from pipeline.measure import write_measured
    from pipeline.tiles import TileStore

    for mpp in (0.5, 0.25):
        folder = options.place(f"measure-{mpp}")
        side = (4096 if options.quick else 8192) * (1 if mpp == 0.5 else 2)
        field = material.field(mpp)
        package = replace(ModelPackage.load(options.model), mpp=mpp)
        material.write_maps(folder / "maps.zarr", field, side, side, mpp, 1.0)
        material.write_tiles(folder / "tiles.zarr", field, side, side, mpp, 1.0)
        write_instances(
            folder / "maps.zarr", package, folder / "instances.parquet", slide="s", block=2048, halo=128, workers=1
        )
        store = TileStore.open(folder / "tiles.zarr")
        count, ours = best(
            lambda folder=folder, store=store: write_measured(
                folder / "instances.parquet", store, RUIFROK, folder / "nuclei.parquet"
            ),
            2,
        )
        crop = field.labels[:512, :512]
        stains = concentrations(field.rgb[:512, :512], RUIFROK)
        listed, limit = spent(lambda crop=crop, stains=stains: regionprops_table(crop, stains, properties=REGIONPROPS))
        pixels = np.count_nonzero(field.labels) / field.labels.max()
        yield Figure(
            "measure", f"nuclei at {mpp} µm/px", count / ours.cpu, "/s a core", len(listed["area"]) / limit.cpu,
            "regionprops_table", "ratio >= 10", f"{count} nuclei of {pixels:.0f} px",
        )  # fmt: skip
        yield Figure("measure", f"nuclei at {mpp} µm/px", count / ours.cpu, "/s a core", target="value >= 25000")


def export(options: Options) -> Iterator[Figure]:
    """nuclei.parquet to gzipped GeoJSON, against orjson and zlib on features that are there already."""
    import orjson

    from pipeline import export as module
    from pipeline import testing
    from pipeline.grid import Grid
    from pipeline.nuclei import open_nuclei

    folder = options.place("export")
    count = 30_000 if options.quick else 200_000
    side = 20_000
    table = testing.nuclei_table(count, side, side)
    testing.write_nuclei(folder / "nuclei.parquet", table, Grid(side, side, 0.25, 1.0, 1.0), "s")
    _, ours = best(lambda: module.write_geojson(folder / "nuclei.parquet", folder / "n.geojson.gz", "s"), 2)
    known = module.classifications(testing.CLASSES)
    columns = ["id", "geometry", "class", *module.MEASUREMENTS]
    with open_nuclei(folder / "nuclei.parquet") as file:
        blocks = [module.features(batch, "s", known) for batch in file.iter_batches(module.BATCH_ROWS, columns=columns)]

    def raw() -> int:
        size = 0
        for block in blocks:
            text = orjson.dumps(block, option=orjson.OPT_SERIALIZE_NUMPY)
            machine = zlib.compressobj(module.GZIP_LEVEL)
            size += len(machine.compress(text) + machine.flush())
        return size

    _, limit = best(raw, 2)
    size = (folder / "n.geojson.gz").stat().st_size
    yield Figure(
        "export", "nuclei to GeoJSON", count / ours.cpu, "/s a core", count / limit.cpu, "orjson and zlib",
        "ratio >= 0.6", f"{count} nuclei, {size / count:.0f} bytes each, level {module.GZIP_LEVEL}",
    )  # fmt: skip


def whole(options: Options) -> Iterator[Figure]:
    """A whole slide, stage by stage as the workflow runs them, against the forward pass alone."""
    folder = options.place("slide")
    package = ModelPackage.load(options.model)
    side = 4096 if options.quick else 8192
    material.write_slide(folder / "slide.svs", material.field(0.25), side, side, 0.25, 0.5)
    runs = all_stages(folder, options.model, workers=options.cores)
    alone = _forward_seconds(folder, package, options.cores)
    cpu = {name: run.cpu for name, run in runs.items()}
    total = sum(cpu.values())
    note = "CPU seconds: " + ", ".join(f"{name} {seconds:.1f}" for name, seconds in cpu.items())
    yield Figure(
        "slide", "all but the forward pass", total - alone, "CPU s", alone, "forward", "ratio <= 0.25",
        f"{side} x {side} px at 0.25 µm/px, half of it tissue, {package.name}; {note}",
    )  # fmt: skip
    yield Figure("slide", "whole slide", sum(r.wall for r in runs.values()), "s", note=note)


def all_stages(
    folder: Path, model: Path, workers: int = 1, sink: Callable[[str, Run], None] | None = None
) -> dict[str, Run]:
    """Run the stages of one slide, ``slide.svs`` in `folder`, each as a process of its own; what each took."""
    f = {
        name: folder / f"{name}.json" for name in ("slide", "tissue", "tiles", "stain", "maps", "instances", "measure")
    }
    runs: dict[str, Run] = {}

    def do(name: str, **arguments: Any) -> None:
        runs[name] = stage(name, slide="s", **arguments)
        if sink is not None:
            sink(name, runs[name])

    tissue, tiles, maps = folder / "tissue.geojson", folder / "tiles.zarr", folder / "maps.zarr"
    do("inspect", path=folder / "slide.svs", out=f["slide"])
    do(
        "tissue", inspect=f["slide"], mpp=8, min_area=20_000, min_hole=20_000, out=f["tissue"], geojson=tissue,
        png=folder / "tissue.png",
    )  # fmt: skip
    do(
        "tiles", inspect=f["slide"], tissue=f["tissue"], geojson=tissue, model=model, workers=workers, out=f["tiles"],
        zarr=tiles,
    )  # fmt: skip
    do("stain", tiles=f["tiles"], zarr=tiles, model=model, out=f["stain"], png=folder / "stain.png")
    do(
        "infer", tiles=f["tiles"], zarr=tiles, stain=f["stain"], model=model, device="cpu", threads=workers,
        out=f["maps"], zarr_out=maps,
    )  # fmt: skip
    do(
        "instances", maps=maps, maps_manifest=f["maps"], tissue=tissue, model=model, workers=workers,
        manifest=f["instances"], out=folder / "instances.parquet",
    )  # fmt: skip
    do(
        "measure", instances=f["instances"], parquet=folder / "instances.parquet", tiles=f["tiles"], zarr=tiles,
        stain=f["stain"], out=f["measure"], nuclei=folder / "nuclei.parquet",
    )  # fmt: skip
    do(
        "export", measure=f["measure"], nuclei=folder / "nuclei.parquet", out=folder / "export.json",
        geojson=folder / "nuclei.geojson.gz", workers=workers,
    )  # fmt: skip
    return runs


def _forward_seconds(folder: Path, package: ModelPackage, threads: int) -> float:
    """CPU seconds of the network alone on the windows of a slide's tiles."""
    from pipeline.inference import active_windows, choose_predictor, one_result
    from pipeline.kernels.blend import PatchGrid
    from pipeline.lattice import CELL
    from pipeline.tiles import TileStore

    store = TileStore.open(folder / "tiles.zarr")
    grid = PatchGrid(store.grid.width, store.grid.height, package.patch, package.overlap)
    windows = list(active_windows(grid, store.active, CELL))
    with one_result():
        predictor, _ = choose_predictor(package, "cpu", 0, threads)
        some = windows[:: max(1, len(windows) // 32)][:32]
        patches = np.stack([store.read(*grid.origin(*w), grid.patch, grid.patch) for w in some])
        predictor(patches[:threads])
        _, found = spent(lambda: predictor(patches))
    return found.cpu / len(patches) * len(windows)


def startup(options: Options) -> Iterator[Figure]:
    """What it costs to start a stage, and to take a slide of one tile through all of them."""
    code = "import sys; from pipeline.cli import STAGES; import importlib; importlib.import_module(sys.argv[1])"
    bare = min(run_command([sys.executable, "-c", "import pipeline.cli"]).cpu for _ in range(3))
    from pipeline.cli import STAGES

    for name, command in STAGES.items():
        took = min(run_command([sys.executable, "-c", code, command.module]).cpu for _ in range(2))
        yield Figure("startup", f"import {name}", took, "CPU s", bare, "the command line alone")
    folder = options.place("startup")
    material.write_slide(folder / "slide.svs", material.field(0.25), 2048, 2048, 0.25, 1.0)
    runs = all_stages(folder, BASELINE)
    note = ", ".join(f"{name} {run.cpu:.1f}" for name, run in runs.items())
    yield Figure("startup", "slide of 1 MP, no network", sum(r.cpu for r in runs.values()), "CPU s", note=note)
