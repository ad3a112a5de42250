"""Memory and time against the size of the slide and the number of nuclei; a peer on the same slide."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import material
from benchmarks.harness import ROOT, Figure, run_command, stage
from benchmarks.speed import BASELINE, Options, all_stages
from pipeline.models.package import ModelPackage

SMALL = (10_000, 8_000)
LARGE = (100_000, 80_000)


def memory(options: Options) -> Iterator[Figure]:
    """Most memory of each stage on a slide of 100,000 x 80,000 px, less that on one of 10,000 x 8,000; 10 % tissue."""
    held: dict[str, dict[str, float]] = {}
    for name, (width, height) in {"small": SMALL, "large": LARGE}.items():
        if name == "large" and options.quick:
            width, height = width // 2, height // 2
        folder = options.place(f"memory-{name}")
        material.write_slide(folder / "slide.svs", material.field(0.25), width, height, 0.25, 0.1)
        runs = all_stages(folder, BASELINE)
        held[name] = {key: run.rss_mb for key, run in runs.items()}
        shutil.rmtree(folder)
        # A network is too slow for all of it: a strip as wide as the slide has the same buffers.
        folder = options.place(f"network-{name}")
        material.write_tiles(folder / "tiles.zarr", material.field(0.5), width // 2, 512, 0.5, 0.02)
        material.write_manifests(folder, width // 2, 512, 0.5)
        held[name]["infer, network"] = stage(
            "infer", slide="s", tiles=folder / "tiles.json", zarr=folder / "tiles.zarr", stain=folder / "stain.json",
            model=options.model, device="cpu", threads=1, out=folder / "out.json", zarr_out=folder / "maps.zarr",
        ).rss_mb  # fmt: skip
        shutil.rmtree(folder)
    for key, large in held["large"].items():
        small = held["small"][key]
        yield Figure(
            "memory", f"{key}: large less small slide", large - small, "MB", target="value <= 200",
            note=f"{large:.0f} MB against {small:.0f}",
        )  # fmt: skip


def million(options: Options) -> Iterator[Figure]:
    """Nuclei by the million through instances, measure and export on two workers."""
    field = material.field(0.5)
    per_square = int(field.labels.max())
    took: dict[int, dict[str, Any]] = {}
    for thousands in (20, 100) if options.quick else (100, 1000):
        squares = -(-thousands * 1000 // per_square)
        across = max(1, round(squares**0.5))
        width, height = across * material.SIDE, -(-squares // across) * material.SIDE
        folder = options.place(f"million-{thousands}")
        material.write_maps(folder / "maps.zarr", field, width, height, 0.5, 1.0)
        material.write_tiles(folder / "tiles.zarr", field, width, height, 0.5, 1.0)
        material.write_manifests(folder, width, height, 0.5)
        parquet, nuclei = folder / "instances.parquet", folder / "nuclei.parquet"
        runs = {
            "instances": stage(
                "instances", maps=folder / "maps.zarr", model=options.model, out=parquet, workers=2,
                manifest=folder / "instances.json",
            ),
            "measure": stage(
                "measure", slide="s", instances=folder / "instances.json", parquet=parquet,
                tiles=folder / "tiles.json", zarr=folder / "tiles.zarr", stain=folder / "stain.json",
                out=folder / "measure.json", nuclei=nuclei,
            ),
            "export": stage(
                "export", slide="s", measure=folder / "measure.json", nuclei=nuclei, out=folder / "export.json",
                geojson=folder / "nuclei.geojson.gz", workers=2,
            ),
        }  # fmt: skip
        count = json.loads((folder / "export.json").read_text())["nuclei"]
        sizes = {p.name: p.stat().st_size / 1e6 for p in (parquet, nuclei, folder / "nuclei.geojson.gz")}
        took[thousands] = {"runs": runs, "nuclei": count}
        shutil.rmtree(folder)
        for name, run in runs.items():
            yield Figure("million", f"{name}, {count:,} nuclei", run.cpu, "CPU s", note=f"{run.wall:.1f} s")
            yield Figure("million", f"{name}, {count:,} nuclei: memory", run.rss_mb, "MB", target="value <= 2000",
                         note="all processes")  # fmt: skip
        for name, size in sizes.items():
            yield Figure("million", f"{name}, {count:,} nuclei", size, "MB")
    few, many = took.values()
    for name in few["runs"]:
        growth = many["runs"][name].cpu / few["runs"][name].cpu / (many["nuclei"] / few["nuclei"])
        yield Figure("million", f"{name}: CPU time a nucleus, many against few", growth, "times", target="value <= 1.1")


def peer(options: Options) -> Iterator[Figure]:
    """TIAToolbox's engine for nuclei around the same network, same slide, same pixel size and stride, same cores."""
    if options.peer is None:
        print("peer: skipped, give --peer PYTHON of an environment with tiatoolbox")
        return
    folder = options.place("peer")
    package = ModelPackage.load(options.model)
    side = 2048 if options.quick else 4096
    material.write_slide(folder / "slide.svs", material.field(0.25), side, side, 0.25, 1.0)
    runs = all_stages(folder, options.model, workers=options.cores)
    ours = sum(run.wall for run in runs.values())
    script = ROOT / "benchmarks" / "tiatoolbox_engine.py"
    result = folder / "peer.json"
    run_command(
        [options.peer, script, folder / "slide.svs", options.model, result, str(options.cores)],
        {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(options.cores)},
    )
    found = json.loads(Path(result).read_text())
    post = sum(runs[name].wall for name in ("instances", "measure", "export"))
    note = f"{side} x {side} px at 0.25 µm/px, {package.name}; TIAToolbox {found['version']}, {found['nuclei']} nuclei"
    yield Figure(
        "peer", "slide to polygons", side**2 / 1e6 / ours, "MP/s", side**2 / 1e6 / found["seconds"], "TIAToolbox",
        "ratio >= 1.4", note,
    )  # fmt: skip
    yield Figure(
        "peer", "maps to polygons", side**2 / 1e6 / post, "MP/s", side**2 / 1e6 / found["post"], "TIAToolbox",
        "ratio >= 10", note,
    )  # fmt: skip
