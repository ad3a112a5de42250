"""The stages of one slide, each by its own command line, in this process."""

from __future__ import annotations

from pathlib import Path

from pipeline import cli
from pipeline.layout import SlideLayout

STAGES = ("inspect", "tissue", "tiles", "stain", "infer", "instances", "measure", "export", "summary")


def arguments(stage: str, path: Path, before: SlideLayout, out: SlideLayout, model: Path) -> list[str]:
    """Command line of a stage that reads results from one folder and writes to another."""
    lists: dict[str, dict[str, Path]] = {
        "inspect": {"path": path, "out": out.inspect},
        "tissue": {
            "inspect": before.inspect, "out": out.tissue, "geojson": out.tissue_geojson, "png": out.tissue_png,
        },
        "tiles": {
            "inspect": before.inspect, "tissue": before.tissue, "geojson": before.tissue_geojson, "model": model,
            "out": out.tiles, "zarr": out.tiles_zarr,
        },
        "stain": {
            "tiles": before.tiles, "zarr": before.tiles_zarr, "model": model, "out": out.stain, "png": out.stain_png,
        },
        "infer": {
            "tiles": before.tiles, "zarr": before.tiles_zarr, "stain": before.stain, "model": model, "out": out.maps,
            "zarr-out": out.maps_zarr,
        },
        "instances": {
            "maps": before.maps_zarr, "maps-manifest": before.maps, "tissue": before.tissue_geojson, "model": model,
            "manifest": out.instances, "out": out.instances_parquet,
        },
        "measure": {
            "instances": before.instances, "parquet": before.instances_parquet, "tiles": before.tiles,
            "zarr": before.tiles_zarr, "stain": before.stain, "out": out.measure, "nuclei": out.nuclei,
        },
        "export": {
            "measure": before.measure, "nuclei": before.nuclei, "out": out.export, "geojson": out.nuclei_geojson,
        },
        "summary": {
            **{name: getattr(before, name) for name in (*STAGES[:4], "maps", *STAGES[5:8])}, "nuclei": before.nuclei,
            "tissue-geojson": before.tissue_geojson, "tiles-zarr": before.tiles_zarr, "out": out.metrics,
            "png": out.overview,
        },
    }  # fmt: skip
    return [stage, "--slide=s", *(f"--{name}={value}" for name, value in lists[stage].items())]


def run_chain(path: Path, layout: SlideLayout, model: Path, stages: tuple[str, ...] = STAGES) -> None:
    """Run stages, one after another, in one folder."""
    for stage in stages:
        assert cli.main(arguments(stage, path, layout, layout, model)) == 0, stage
