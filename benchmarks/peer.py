"""Compare the pipeline with TIAToolbox, which needs an environment of its own, on the same slide and network."""

from __future__ import annotations

import gzip
import json
import sys
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT, Figure, best, run_command
from benchmarks.speed import Options, all_stages, not_refined
from pipeline.instances import write_instances
from pipeline.models.package import ModelPackage


def tiatoolbox(options: Options) -> Iterator[Figure]:
    """A slide full of tissue to GeoJSON, through TIAToolbox's nucleus engine and through the pipeline."""
    if options.peer is None:
        print("tiatoolbox: skipped, give --peer the Python of an environment with tiatoolbox", file=sys.stderr)
        return
    folder = options.place("tiatoolbox")
    package = ModelPackage.load(options.model)
    slide, what = options.slide_file(folder, 2048 if options.quick else 5000, 1.0)
    trace(package, folder / "network.pt")
    settings: dict[str, Any] = {
        "slide": str(slide), "network": str(folder / "network.pt"), "rules": asdict(package.thresholds),
        "mpp": package.mpp, "patch": package.patch, "overlap": package.overlap, "threads": options.cores, "batch": 8,
        "out": str(folder / "out"), "seconds": str(folder / "seconds.json"),
    }  # fmt: skip
    (folder / "settings.json").write_text(json.dumps(settings))
    theirs = run_command([options.peer, ROOT / "benchmarks/tiatoolbox_run.py", folder / "settings.json"])
    seconds = json.loads((folder / "seconds.json").read_text())
    # With the toolbox's precision, and without the overview, which the toolbox does not draw.
    ours = all_stages(folder, options.model, options.cores, slide, summary=False, precision="float32")
    features = [
        json.loads(gzip.decompress((folder / "nuclei.geojson.gz").read_bytes())),
        json.loads(next((folder / "out").glob("*.json")).read_bytes()),
    ]
    counts = [len(collection["features"]) for collection in features]
    note = f"{what}, {package.name}, {options.cores} cores, nuclei: {counts[0]}, theirs {counts[1]}; no stage summary"
    cpu, wall = (sum(getattr(run, key) for run in ours.values()) for key in ("cpu", "wall"))
    yield Figure(
        "tiatoolbox", "slide to GeoJSON, seconds by the clock", theirs.wall, "s", wall, "the pipeline", "ratio >= 1.4",
        note + "; theirs: " + ", ".join(f"{key} {value:.1f}" for key, value in seconds.items()),
    )  # fmt: skip
    yield Figure("tiatoolbox", "the same, CPU seconds", theirs.cpu, "s", cpu, "the pipeline")
    # Without imports, like the toolbox's time, and first on the pixels of the maps, on which the toolbox works.
    ways = [(not_refined(package), "maps to polygons, seconds by the clock", "ratio >= 10")]
    if package.thresholds.refine > 1:
        ways.append((package, "the same, the pipeline on pixels of half the size", ""))
    for one, words, target in ways:
        work = partial(
            write_instances, folder / "maps.zarr", one, folder / "again.parquet", slide="s", block=2048, halo=128,
            workers=1,
        )  # fmt: skip
        _, alone = best(work, 2)
        yield Figure(
            "tiatoolbox", words, seconds["post_process_wsi"], "s", alone.wall,
            f"the pipeline on one core; its stage, start included: {ours['instances'].wall:.1f} s", target,
        )  # fmt: skip
    yield Figure("tiatoolbox", "most memory", theirs.rss_mb, "MB", max(run.rss_mb for run in ours.values()),
                 "the pipeline's largest stage")  # fmt: skip


def trace(package: ModelPackage, path: Path) -> None:
    """Write a package's network as TorchScript, from RGB in 0 to 1, float32 ``(N, 3, H, W)``, to maps in 0 to 1."""
    import torch

    from pipeline.models.weights import load_network

    network = torch.nn.Sequential(load_network(package), torch.nn.Sigmoid()).eval()
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # deprecated, but loads without the network's code
        torch.jit.trace(network, torch.rand(1, 3, package.patch, package.patch)).save(str(path))
