"""Measure how memory and time grow with the size of the slide and the number of nuclei."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from typing import Any

from benchmarks import material
from benchmarks.harness import Figure, stage
from benchmarks.speed import BASELINE, Options, all_stages, summary_options

SMALL = (10_000, 8_000)
LARGE = (100_000, 80_000)


def memory(options: Options) -> Iterator[Figure]:
    """Peak memory of each stage on a slide of 100,000 x 80,000 px minus that on one of 10,000 x 8,000; 10 % tissue."""
    held: dict[str, dict[str, float]] = {}
    for name, (width, height) in {"small": SMALL, "large": LARGE}.items():
        if name == "large" and options.quick:
            width, height = width // 2, height // 2
        folder = options.place(f"memory-{name}")
        material.write_slide(folder / "slide.svs", material.field(0.25), width, height, 0.25, 0.1)
        runs = all_stages(folder, BASELINE)
        held[name] = {key: run.rss_mb for key, run in runs.items()}
        shutil.rmtree(folder)
        # A network is too slow for the whole slide, but needs the same buffers for a strip as wide as the slide.
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
    """Up to a million nuclei through instances, measure, export and summary, with two workers if a stage can have them.

    The figures are the CPU time and peak memory of the stages, the sizes of their files, and the growth of the CPU time
    per nucleus from few nuclei to many.
    """
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
        material.write_tissue(folder, width, height, 0.5, 1.0)
        parquet, nuclei = folder / "instances.parquet", folder / "nuclei.parquet"
        runs = {
            "instances": stage(
                "instances", slide="s", maps=folder / "maps.zarr", model=options.model, out=parquet, workers=2,
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
            "summary": stage("summary", slide="s", **summary_options(folder)),
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
