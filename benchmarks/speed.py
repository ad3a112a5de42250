"""Measure the speed of each stage, beside a limit: the speed of the work that it cannot avoid, done alone."""

from __future__ import annotations

import hashlib
import itertools
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numcodecs import CRC32C, Blosc

from benchmarks import material
from benchmarks.harness import ROOT, Figure, Run, Spent, best, best_in_turns, run_command, spent, stage, stage_here
from pipeline.batch.settings import check_settings, load_schema
from pipeline.batch.stage import read_manifest
from pipeline.kernels.blend import PatchGrid
from pipeline.kernels.stain import StainTransform
from pipeline.machine.cores import available_cores
from pipeline.models.package import ModelPackage
from pipeline.prediction.predictors import Finish, SlideMaps, Strip
from pipeline.summary import MANIFESTS

DEFAULT = ROOT / "models/default"
BASELINE = ROOT / "models/hematoxylin"


@dataclass(frozen=True)
class Options:
    """Options of the benchmarks.

    Parameters
    ----------
    folder : pathlib.Path
        Folder for inputs and results.
    quick : bool
        Whether to use small inputs.
    model : pathlib.Path
        Model package for the rows with a network.
    slide : pathlib.Path, optional
        Slide for the rows `tiles`, `slide`, `slide-gpu` and `tiatoolbox`; a synthetic one by default.
    peer : pathlib.Path, optional
        Python interpreter of an environment with TIAToolbox, for the row `tiatoolbox`.
    cores : int
        Number of CPU cores that may be used.
    precision : str
        Number format that networks compute in, see `pipeline.networks.precision.PRECISIONS`.
    count : int
        Number of slides of the row `cohort`.
    """

    folder: Path
    quick: bool
    model: Path = DEFAULT
    slide: Path | None = None
    peer: Path | None = None
    cores: int = available_cores()
    precision: str = "auto"
    count: int = 40

    def slide_file(self, folder: Path, side: int, share: float, mpp: float = 0.25) -> tuple[Path, str]:
        """Return the path of the given slide, or of a synthetic one written to `folder`, and a description of it."""
        if self.slide is not None:
            return self.slide.absolute(), self.slide.name
        material.write_slide(folder / "slide.svs", material.field(0.25), side, side, mpp, share)
        return folder / "slide.svs", f"{side} x {side} px JPEG at {mpp:g} µm/px, {100 * share:.0f} % tissue"

    def place(self, name: str) -> Path:
        """Create a new folder and return its path."""
        path = self.folder / name
        path.mkdir(parents=True)
        return path


def tiles_row(options: Options) -> Iterator[Figure]:
    """Slide to tiles, against decoding the same windows alone, at a whole and at a fractional ratio of pixel sizes."""
    yield _slide_to_tiles(options, "slide to tiles", 0.25, "ratio >= 0.7")
    if options.slide is None:
        # Hardly any scanner has exactly 0.25 µm/px, so that most slides need weighted averages.
        yield _slide_to_tiles(options, "slide at 0.2525 µm/px to tiles", 0.2525, "ratio >= 0.4")


def _slide_to_tiles(options: Options, name: str, mpp: float, target: str) -> Figure:
    from pipeline import tiles
    from pipeline.machine.allocator import keep_freed_memory
    from pipeline.slides.inspect import reopen

    module: Any = tiles
    folder = options.place(f"tiles-{mpp:g}")
    path, what = options.slide_file(folder, 4096 if options.quick else 8192, 0.5, mpp)
    stage("inspect", slide="s", path=path, out=folder / "slide.json")
    stage("tissue", **tissue_options(folder))
    info = read_manifest(folder / "slide.json")
    windows: list[tuple[int, int, int, int, int]] = []

    def recorded(info: dict[str, Any]) -> Any:
        slide = reopen(info)
        read = slide.read

        def note(*window: int) -> Any:
            windows.append(window)  # type: ignore[arg-type]
            return read(*window)

        slide.read = note  # type: ignore[assignment, method-assign]
        return slide

    runs = itertools.count()

    def run() -> dict[str, Any]:
        out = folder / f"{next(runs)}.zarr"  # a new path, so that no run has to remove an earlier run's store
        return module.run_tiles(
            "s", folder / "slide.json", folder / "tissue.json", folder / "tissue.geojson", options.model,
            out.with_suffix(".json"), out, workers=1,
        )  # fmt: skip

    original = module.reopen
    module.reopen = recorded
    try:
        run()
    finally:
        module.reopen = original
    wanted = list(dict.fromkeys(windows))

    def decode() -> None:
        with reopen(info) as slide:
            for window in wanted:
                slide.read(*window)

    keep_freed_memory()  # as the stage does; here for both
    (manifest, ours), (_, limit) = best_in_turns([run, decode], 6)
    megapixels = sum(w * h for _, _, _, w, h in wanted) / 1e6
    return Figure(
        "tiles", name, megapixels / ours.cpu, "MP/s a core", megapixels / limit.cpu, "decoding alone", target,
        f"{what}, {info['backend']}, {manifest['megapixels']} MP out, {ours.cpu:.2f} CPU s",
    )  # fmt: skip


def tissue_options(folder: Path) -> dict[str, Any]:
    """Options of the stage `tissue` for a slide whose manifest is in `folder`, with the default settings."""
    settings = check_settings({}, load_schema(ROOT / "workflow/schemas/config.schema.yaml"))["tissue"]
    return {
        "slide": "s", "inspect": folder / "slide.json", "mpp": settings["mpp"], "min_area": settings["min_area_um2"],
        "min_hole": settings["min_hole_um2"],
        "out": folder / "tissue.json", "geojson": folder / "tissue.geojson", "png": folder / "tissue.png",
    }  # fmt: skip


def infer(options: Options, device: str = "cpu") -> Iterator[Figure]:
    """Tiles to maps, against the network's forward pass alone on windows of the same tiles."""
    from pipeline.inference import active_windows, infer_slide
    from pipeline.machine.allocator import keep_freed_memory
    from pipeline.prediction.predictors import choose_predictor, one_result
    from pipeline.stores.tile_store import TileStore

    folder = options.place(f"infer-{device}")
    package = ModelPackage.load(options.model)
    side = {("cpu", True): 1024, ("cpu", False): 2048, ("cuda", True): 8192, ("cuda", False): 16384}[
        device, options.quick
    ]
    material.write_tiles(folder / "tiles.zarr", material.field(package.mpp), side, side, package.mpp, 1.0)
    store = TileStore.open(folder / "tiles.zarr")
    transform = StainTransform("matrix", matrix=((0.98, 0.01, 0.01), (0.01, 0.98, 0.01), (0.01, 0.01, 0.98)))
    grid = PatchGrid(side, side, package.patch, package.overlap)
    windows = list(active_windows(grid, store.active))
    if device == "cpu":
        keep_freed_memory()  # as the command does
    with one_result():
        predictor, about = choose_predictor(package, device, 0, options.cores, options.precision)
        how = f"{about['device']}, {about['precision']}"
        count = len(windows) // predictor.batch * predictor.batch or predictor.batch
        chosen = [windows[i % len(windows)] for i in range(min(count, 8 * predictor.batch))]
        patches = np.stack([store.read(*grid.origin(*w), grid.patch, grid.patch) for w in chosen])
        batches = np.split(patches, len(patches) // predictor.batch)
        forward = _forward_alone(predictor, batches)
        forward()
        times = max(1, round(len(windows) / len(patches)))
        _, alone = spent(lambda: [forward() for _ in range(times)])
        (found, ours) = spent(
            lambda: infer_slide(store, transform, predictor, package, folder / "maps.zarr", threads=options.cores)
        )
    rate, limit = found["windows"] / ours.wall, times * len(patches) / alone.wall
    note = f"{side} x {side} px, {package.name}, windows of {package.patch} px, {how}, {options.cores} threads"
    if device == "cpu":
        yield Figure(
            "infer", "windows by CPU time", found["windows"] / ours.cpu, "/s a core", times * len(patches) / alone.cpu,
            "forward alone", "ratio >= 0.9", note,
        )  # fmt: skip
    yield Figure("infer", f"windows, {device}", rate, "/s", limit, "forward alone",
                 "" if device == "cpu" else "ratio >= 0.8", note)  # fmt: skip
    if "gpu_busy" in found:
        yield Figure("infer", "GPU busy", 100 * found["gpu_busy"], "%", target="value >= 85", note=note)
    megapixels = found["windows"] * grid.stride**2 / 1e6
    yield Figure("infer", f"tissue, {device}", megapixels * package.mpp**2 / ours.wall, "mm²/s", note=note)


def _forward_alone(predictor: Any, batches: Sequence[np.ndarray]) -> Callable[[], None]:
    """Return a function that runs the network on batches of windows; on a GPU, the batches are loaded beforehand."""
    if predictor.busy is None:

        def on_cpu() -> None:
            for batch in batches:
                predictor(batch)

        return on_cpu
    import torch

    loaded = [predictor.load(batch) for batch in batches]

    def on_gpu() -> None:
        for batch in loaded:
            predictor.forward(batch)
        torch.cuda.synchronize()

    return on_gpu


def infer_gpu(options: Options) -> Iterator[Figure]:
    """Tiles to maps on a GPU, as in `infer`; skipped on machines without one."""
    import torch

    if not torch.cuda.is_available():
        print("infer-gpu: skipped, this machine has no GPU", file=sys.stderr)
        return
    yield from infer(options, "cuda")


class _NoNetwork:
    """Predictor that stands for a GPU that takes no time: the maps of each window are cut from those of the field."""

    per_pass = batch = 64
    network = None
    busy = 0.0

    def __init__(self, maps: np.ndarray) -> None:
        self._maps = maps

    def slide(self, grid: PatchGrid, transform: StainTransform) -> SlideMaps:
        self._stride = grid.stride
        return self

    def prepare(self, strips: Sequence[Strip]) -> Callable[[], Finish]:
        # Copy, as a GPU's predictor does into the memory that the GPU reads from.
        strips = [replace(strip, pixels=strip.pixels.copy()) for strip in strips]
        return lambda: lambda: (self._window(*place) for strip in strips for place in strip.places)

    def _window(self, row: int, column: int) -> np.ndarray:
        fit = material.SIDE // self._stride
        top, left = row % fit * self._stride, column % fit * self._stride
        return self._maps[:, top : top + self._stride, left : left + self._stride]

    def __call__(self, patches: np.ndarray) -> np.ndarray:
        raise NotImplementedError


def infer_host(options: Options) -> Iterator[Figure]:
    """Tiles to maps without a network, against the libraries' work alone: each tile decoded, each map encoded once."""
    from pipeline.inference import infer_slide
    from pipeline.machine.allocator import keep_freed_memory
    from pipeline.stores.maps import MapStore
    from pipeline.stores.tile_store import TileStore

    keep_freed_memory()
    folder = options.place("infer-host")
    package = ModelPackage.load(options.model)
    field = material.field(package.mpp)
    side, small = (4096 if options.quick else 8192), 8

    def run(name: str, package: ModelPackage, side: int, tile: int) -> tuple[dict[str, Any], Spent]:
        material.write_tiles(folder / f"{name}.zarr", field, side, side, package.mpp, 1.0, tile)
        store, free = TileStore.open(folder / f"{name}.zarr"), _NoNetwork(field.maps)
        maps = folder / f"{name}-maps.zarr"

        def work() -> dict[str, Any]:
            shutil.rmtree(maps, ignore_errors=True)
            return infer_slide(store, StainTransform(), free, package, maps, threads=options.cores)

        return best(work, 3)

    found, ours = run("tiles", package, side, 1024)
    tiles = [path for path in (folder / "tiles.zarr/rgb/c").rglob("*") if path.is_file()]
    store = MapStore.open(folder / "tiles-maps.zarr")
    _, down, across = store.array.chunks
    chunks = [store.read(x, y, across, down) for y in range(0, side, down) for x in range(0, side, across)]

    def libraries() -> None:
        check, press = CRC32C(), Blosc("lz4", 5, Blosc.NOSHUFFLE)
        digest = hashlib.sha256()
        for path in tiles:
            press.decode(check.decode(path.read_bytes()))
        for number, chunk in enumerate(chunks):
            digest.update(chunk.data)
            (folder / f"{number}.chunk").write_bytes(check.encode(press.encode(chunk)))

    _, limit = best(libraries, 3)
    megapixels = found["megapixels"]
    note = f"{side} x {side} px, {package.name}, windows of {package.patch} px, no network"
    yield Figure(
        "infer-host", "tiles to maps but the network", megapixels / ours.cpu, "MP/s a core", megapixels / limit.cpu,
        "libraries alone", "ratio >= 0.4", note,
    )  # fmt: skip
    # With as many windows, tiles and chunks but hardly any pixels, the time left is that of Python itself, which
    # threads cannot share.
    scaled = replace(package, patch=package.patch // small, overlap=package.overlap // small)
    few, python = run("small", scaled, side // small, 1024 // small)
    yield Figure(
        "infer-host", "by what Python does", megapixels / found["windows"] * few["windows"] / python.cpu, "MP/s",
        target="value >= 320", note=f"the same at 1/{small} of the size, CPU time as if of pixels of full size",
    )  # fmt: skip


def not_refined(package: ModelPackage) -> ModelPackage:
    """Return the package without refinement: nuclei are made on the pixels of its maps, as those compared with are."""
    return replace(package, thresholds=replace(package.thresholds, refine=1))


def instances(options: Options) -> Iterator[Figure]:
    """Maps to the table of nuclei, against connected components and a watershed on the whole maps at once."""
    from skimage.measure import label
    from skimage.segmentation import watershed

    from pipeline.instances import write_instances
    from pipeline.machine.allocator import keep_freed_memory
    from pipeline.stores.maps import MapStore

    folder = options.place("instances")
    keep_freed_memory()  # as the stage does; here for both
    side = 4096 if options.quick else 8192
    refined = ModelPackage.load(options.model)
    package = not_refined(refined)
    rules = package.thresholds
    material.write_maps(folder / "maps.zarr", material.field(package.mpp), side, side, package.mpp, 1.0)
    maps = MapStore.open(folder / "maps.zarr").read(0, 0, side, side)

    def raw() -> None:
        front = maps[0] >= rules.nucleus
        label(front, connectivity=1)
        markers = label(front & (maps[1] >= rules.marker), connectivity=2)
        watershed(255 - maps[1], markers, mask=front)

    def ours(package: ModelPackage) -> dict[str, Any]:
        return write_instances(
            folder / "maps.zarr", package, folder / "1.parquet", slide="s", block=2048, halo=128, workers=1
        )

    found, one = best(lambda: ours(package), 2)
    _, limit = best(raw, 2)
    note = f"{side} x {side} px, {found['nuclei']} nuclei"
    yield Figure(
        "instances", "maps to nuclei.parquet", side**2 / 1e6 / one.cpu, "MP/s a core", side**2 / 1e6 / limit.cpu,
        "labels and watershed of scikit-image, no polygons", "ratio >= 2.5", note,
    )  # fmt: skip
    yield Figure("instances", "nuclei", found["nuclei"] / one.cpu, "/s a core", note=note)
    if refined != package:
        _, fine = best(lambda: ours(refined), 2)
        yield Figure(
            "instances", "the same on pixels of half the size", side**2 / 1e6 / fine.cpu, "MP/s a core", note=note
        )
    if options.quick:
        return  # starting workers would take longer than their work
    side = 16384
    material.write_maps(folder / "large.zarr", material.field(package.mpp), side, side, package.mpp, 1.0)
    runs: dict[int, Run] = {}
    for workers in (1, 2, 1, 2):  # keep the quicker of two runs each
        run = stage(
            "instances", slide="s", maps=folder / "large.zarr", model=options.model,
            out=folder / f"{workers}-large.parquet", workers=workers,
        )  # fmt: skip
        runs[workers] = min(runs.get(workers, run), run, key=lambda r: r.wall)
    if len({(folder / f"{workers}-large.parquet").read_bytes() for workers in runs}) > 1:
        raise RuntimeError("two workers found other nuclei than one")
    single, double = runs[1], runs[2]
    note = (
        f"{side} x {side} px, with all start-up; CPU seconds {single.cpu:.1f} and {double.cpu:.1f}, of which "
        f"{double.path:.1f} one after another: {single.cpu / double.path:.2f} times less"
    )
    yield Figure(
        "instances", "by the clock, 1 worker", single.wall, "s", double.wall, "2 workers", "ratio >= 1.7", note
    )


REGIONPROPS = (
    "centroid", "area", "perimeter", "axis_major_length", "axis_minor_length", "eccentricity", "solidity",
    "orientation", "intensity_mean", "intensity_std",
)  # fmt: skip
"""Properties of scikit-image that correspond to the columns of the stage `measure`."""


def measure(options: Options) -> Iterator[Figure]:
    """Measurement of nuclei, all columns, against scikit-image's regionprops_table with the same properties."""
    from skimage.measure import regionprops_table

    from pipeline.instances import write_instances
    from pipeline.kernels.stain import RUIFROK, concentrations
    from pipeline.machine.allocator import keep_freed_memory
    from pipeline.measure import write_measured
    from pipeline.stores.tile_store import TileStore

    keep_freed_memory()  # as the stage does
    for mpp in (0.5, 0.25):
        folder = options.place(f"measure-{mpp}")
        side = (4096 if options.quick else 8192) * (1 if mpp == 0.5 else 2)
        field = material.field(mpp)
        package = replace(not_refined(ModelPackage.load(options.model)), mpp=mpp)
        material.write_maps(folder / "maps.zarr", field, side, side, mpp, 1.0)
        material.write_tiles(folder / "tiles.zarr", field, side, side, mpp, 1.0)
        write_instances(
            folder / "maps.zarr", package, folder / "instances.parquet", slide="s", block=2048, halo=128, workers=1
        )
        store = TileStore.open(folder / "tiles.zarr")
        work = partial(write_measured, folder / "instances.parquet", store, RUIFROK, folder / "nuclei.parquet")
        count, ours = best(work, 2)
        crop = field.labels[:512, :512]
        stains = concentrations(field.rgb[:512, :512], RUIFROK)
        listed, limit = spent(partial(regionprops_table, crop, stains, properties=REGIONPROPS))
        pixels = np.count_nonzero(field.labels) / field.labels.max()
        yield Figure(
            "measure", f"nuclei at {mpp} µm/px", count / ours.cpu, "/s a core", len(listed["area"]) / limit.cpu,
            "regionprops_table", "ratio >= 10", f"{count} nuclei of {pixels:.0f} px",
        )  # fmt: skip
        yield Figure("measure", f"nuclei at {mpp} µm/px", count / ours.cpu, "/s a core", target="value >= 25000")


def export(options: Options) -> Iterator[Figure]:
    """nuclei.parquet to gzipped GeoJSON, against orjson and zlib alone on features that are ready in memory."""
    import orjson

    from pipeline import export as module
    from pipeline import testing
    from pipeline.stores.grid import Grid
    from pipeline.stores.nuclei import open_nuclei

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
    """A whole slide, stage by stage as in the workflow, against the network's forward pass alone."""
    folder = options.place("slide")
    package = ModelPackage.load(options.model)
    path, what = options.slide_file(folder, 4096 if options.quick else 16384, 0.5)
    runs = all_stages(folder, options.model, options.cores, path, precision=options.precision)
    alone, precision = _forward_seconds(folder, package, options.cores, options.precision)
    cpu = {name: run.cpu for name, run in runs.items()}
    total = sum(cpu.values())
    note = "CPU seconds: " + ", ".join(f"{name} {seconds:.1f}" for name, seconds in cpu.items())
    yield Figure(
        "slide", "all but the forward pass", total - alone, "CPU s", alone, "forward", "ratio <= 0.25",
        f"{what}, {package.name}, {precision}; {note}",
    )  # fmt: skip
    yield Figure("slide", "whole slide", sum(r.wall for r in runs.values()), "s", note=note)


def all_stages(
    folder: Path,
    model: Path,
    workers: int = 1,
    slide: Path | None = None,
    mpp: float | None = None,
    summary: bool = True,
    precision: str = "auto",
    device: str = "cpu",
    run: Callable[..., Run] = stage,
) -> dict[str, Run]:
    """Run all stages of one slide.

    Parameters
    ----------
    folder : pathlib.Path
        Folder for the results.
    model : pathlib.Path
        Model package.
    workers : int
        Number of cores that a stage may use.
    slide : pathlib.Path, optional
        File of the slide; by default ``slide.svs`` in `folder`.
    mpp : float, optional
        µm per level-0 pixel, for a file that does not state it.
    summary : bool
        Whether to run the last stage, which draws the overview, as well.
    precision : str
        Number format that the network computes in.
    device : {"cpu", "cuda"}
        Device that the network runs on.
    run : callable
        Function that runs a stage; by default each stage runs in a process of its own.

    Returns
    -------
    dict of str to Run
        Time and memory of each stage.
    """
    names = ("slide", "tissue", "tiles", "stain", "maps", "instances", "measure", "export")
    f = {name: folder / f"{name}.json" for name in names}
    runs: dict[str, Run] = {}

    def do(name: str, **arguments: Any) -> None:
        runs[name] = run(name, **{"slide": "s"} | arguments)

    tissue, tiles, maps = folder / "tissue.geojson", folder / "tiles.zarr", folder / "maps.zarr"
    stated = {} if mpp is None else {"mpp": mpp, "mpp_source": "config"}
    do("inspect", path=slide or folder / "slide.svs", out=f["slide"], **stated)
    do("tissue", **tissue_options(folder))
    do(
        "tiles", inspect=f["slide"], tissue=f["tissue"], geojson=tissue, model=model, workers=workers, out=f["tiles"],
        zarr=tiles,
    )  # fmt: skip
    do("stain", tiles=f["tiles"], zarr=tiles, model=model, out=f["stain"], png=folder / "stain.png")
    do(
        "infer", tiles=f["tiles"], zarr=tiles, stain=f["stain"], model=model, device=device, precision=precision,
        threads=workers, out=f["maps"], zarr_out=maps,
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
        "export", measure=f["measure"], nuclei=folder / "nuclei.parquet", out=f["export"],
        geojson=folder / "nuclei.geojson.gz", workers=workers,
    )  # fmt: skip
    if summary:
        do("summary", **summary_options(folder))
    return runs


def whole_gpu(options: Options) -> Iterator[Figure]:
    """A whole slide with the network on a GPU: wall time of its stages, against the GPU's busy time alone."""
    import torch

    if not torch.cuda.is_available():
        print("slide-gpu: skipped, this machine has no GPU", file=sys.stderr)
        return
    folder = options.place("slide-gpu")
    path, what = options.slide_file(folder, 4096 if options.quick else 16384, 0.5)
    runs = all_stages(folder, options.model, options.cores, path, precision=options.precision, device="cuda")
    maps = read_manifest(folder / "maps.json")
    busy = maps["gpu_busy"] * maps["megapixels"] / maps["mp_per_s"]
    total = sum(run.wall for run in runs.values())
    note = ", ".join(f"{name} {run.wall:.1f}" for name, run in runs.items())
    yield Figure(
        "slide-gpu", "whole slide", total, "s", busy, "the GPU's work alone",
        note=f"{what}, {options.model.name}, {maps['device']}, {options.cores} cores; seconds: {note}",
    )  # fmt: skip


def summary_options(folder: Path) -> dict[str, Any]:
    """Options of the stage `summary` for a slide whose results are in `folder`, named as by `all_stages`."""
    manifests = {name: folder / f"{'slide' if name == 'inspect' else name}.json" for name in MANIFESTS}
    return manifests | {
        "nuclei": folder / "nuclei.parquet", "tissue_geojson": folder / "tissue.geojson",
        "tiles_zarr": folder / "tiles.zarr", "out": folder / "metrics.json", "png": folder / "overview.png",
    }  # fmt: skip


def _forward_seconds(folder: Path, package: ModelPackage, threads: int, precision: str) -> tuple[float, str]:
    """CPU seconds of the network alone on all windows of a slide, extrapolated from a few, and its precision."""
    from pipeline.inference import active_windows
    from pipeline.prediction.predictors import choose_predictor, one_result
    from pipeline.stores.tile_store import TileStore

    store = TileStore.open(folder / "tiles.zarr")
    grid = PatchGrid(store.grid.width, store.grid.height, package.patch, package.overlap)
    windows = list(active_windows(grid, store.active))
    with one_result():
        predictor, about = choose_predictor(package, "cpu", 0, threads, precision)
        some = windows[:: max(1, len(windows) // 32)][:32]
        patches = np.stack([store.read(*grid.origin(*w), grid.patch, grid.patch) for w in some])
        predictor(patches[:threads])
        _, found = spent(lambda: predictor(patches))
    return found.cpu / len(patches) * len(windows), about["precision"]


def startup(options: Options) -> Iterator[Figure]:
    """A slide of one tile through all stages, against only starting as many processes."""
    from PIL import Image

    bare = min(run_command([sys.executable, "-c", "import pipeline.cli"]).cpu for _ in range(3))
    folder = options.place("startup")
    field = material.field(0.5)
    Image.fromarray(field.rgb[:1000, :1000]).save(folder / "slide.png")
    models = {"no network": BASELINE} if options.quick else {"no network": BASELINE, "default model": options.model}
    for name, model in models.items():
        runs = all_stages(folder, model, slide=folder / "slide.png", mpp=0.5)
        note = ", ".join(f"{key} {run.cpu:.2f}" for key, run in runs.items())
        total = sum(r.cpu for r in runs.values())
        yield Figure("startup", f"slide of 1 MP, {name}", total, "CPU s", len(runs) * bare, "bare starts", note=note)


def cohort(options: Options) -> Iterator[Figure]:
    """Many tiny slides through the workflow on two cores, with and without warm start, against their work alone."""
    from PIL import Image

    count = 2 if options.quick else options.count
    field = material.field(0.5)
    slides = options.place("cohort")
    for number in range(count):
        y, x = 100 * (number % 8), 100 * (number // 8 % 8)
        Image.fromarray(field.rgb[y : y + 1000, x : x + 1000]).save(slides / f"{number:03}.png")
    # Run the slide twice in this process and keep the second run, when all libraries are loaded.
    tries = [
        all_stages(options.place(f"cohort-here-{number}"), BASELINE, slide=slides / "000.png", mpp=0.5, run=stage_here)
        for number in range(2)
    ]
    work = sum(run.cpu for run in tries[1].values())
    for ways, warm in {"warm_start": True, "cold": False}.items():
        folder = options.place(f"cohort-{ways}")
        settings = [
            f"slides={slides}", f"results={folder / 'results'}", f"model={BASELINE}", "mpp=0.5", f"warm_start={warm}"
        ]  # fmt: skip
        run = run_command([
            sys.executable, "-m", "snakemake", "--quiet", "all", "--cores", "2", "--snakefile", ROOT / "Snakefile",
            "--directory", folder, "--config", *settings,
        ])  # fmt: skip
        manifests = [read_manifest(path) for path in (folder / "results" / "slides").glob("*/*.json")]
        assert all(manifest["status"] == "ok" for manifest in manifests)
        note = f"{count} slides of 1 MP, no network"
        yield Figure("cohort", f"a tiny slide, {ways}", run.cpu / count, "CPU s", work, "its work alone", note=note)
        yield Figure("cohort", f"of it Snakemake, {ways}", run.own / count, "CPU s", note=note)
        starts = run.cpu / count - run.own / count - work
        yield Figure("cohort", f"of it starts of processes, {ways}", starts, "CPU s", note=note)
        yield Figure("cohort", f"overhead, {ways}", 100 * (1 - count * work / run.cpu), "% of the CPU time", note=note)
        yield Figure("cohort", f"tiny slides by the clock, {ways}", 60 * count / run.wall, "a minute", note=note)
        yield Figure("cohort", f"jobs, {ways}", 60 * len(manifests) / run.wall, "a minute", note=note)
