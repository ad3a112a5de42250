"""Synthetic outputs of stages, for tests and benchmarks of the stages that read them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import shapely

from pipeline.batch.settings import file_sha256
from pipeline.batch.stage import write_json
from pipeline.kernels.instances import InstanceRules, Pixels
from pipeline.kernels.stain import RUIFROK, od_to_rgb
from pipeline.layout import RunLayout, SlideLayout
from pipeline.models.package import CARD, WEIGHTS, ModelPackage, NucleusClass
from pipeline.stores.grid import Grid
from pipeline.stores.lattice import CELL

MODEL = {"name": "default", "sha256": "ab" * 32}
CLASSES = [{"name": "tumour", "color": [200, 0, 0]}, {"name": "other <&>", "color": [0, 120, 200]}]


def pixels_of(labels: np.ndarray) -> Pixels:
    """Convert a label map, int ``(H, W)``, to `Pixels`."""
    padded = np.pad(labels, ((0, 0), (0, 1)))
    index = np.flatnonzero(padded)
    return Pixels(index, padded.ravel()[index].astype(np.int32), int(labels.max(initial=0)), padded.shape[1])


def digest(folder: Path) -> str:
    """SHA-256 of the names and contents of all files in a folder."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            found.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return found.hexdigest()


def nuclei_table(count: int, width: float, height: float, seed: int = 0) -> pa.Table:
    """Make a table of random nuclei on a slide of ``width x height`` level-0 pixels of 0.25 µm."""
    mpp = 0.25
    rng = np.random.default_rng(seed)
    x = rng.uniform(40, width - 40, count)
    y = np.sort(rng.uniform(40, height - 40, count))
    a, b = rng.uniform(8, 20, count), rng.uniform(6, 12, count)
    turn = np.linspace(0, 2 * np.pi, 30, endpoint=False)
    points = np.stack([x[:, None] + a[:, None] * np.cos(turn), y[:, None] + b[:, None] * np.sin(turn)], axis=-1)
    shapes = shapely.polygons(np.round(points, 2)) if count else np.array([], dtype=object)
    kind = rng.integers(0, 2, count)
    table: dict[str, Any] = {
        "id": (y.astype(np.uint64) << np.uint64(32)) | np.arange(count, dtype=np.uint64),
        "geometry": pa.array(shapely.to_wkb(shapes), pa.binary()),
        "class": pa.array([CLASSES[k]["name"] for k in kind], pa.string()),
        "class_id": kind.astype(np.uint8),
        "probability": rng.uniform(0.5, 1, count).astype(np.float32),
        "centroid_x": x,
        "centroid_y": y,
        "area_um2": (np.pi * a * b * mpp**2).astype(np.float32),
        "perimeter_um": (2 * np.pi * np.sqrt(a * b) * mpp).astype(np.float32),
        "major_axis_um": (2 * a * mpp).astype(np.float32),
        "minor_axis_um": (2 * b * mpp).astype(np.float32),
        "max_diameter_um": (2 * a * mpp).astype(np.float32),
        "min_diameter_um": (2 * b * mpp).astype(np.float32),
        "orientation": np.zeros(count, dtype=np.float32),
    }
    for name in ("eccentricity", "solidity", "circularity"):
        table[name] = rng.uniform(0.4, 1, count).astype(np.float32)
    for name in ("hematoxylin_mean", "hematoxylin_std", "eosin_mean", "eosin_std"):
        table[name] = rng.uniform(0.1, 1, count).astype(np.float32)
    return pa.table(table)


def write_nuclei(path: Path, table: pa.Table, grid: Grid, slide: str) -> None:
    """Write `table` as ``nuclei.parquet``."""
    about = json.dumps({"grid": grid.to_json(), "slide": slide, "classes": CLASSES, "model": MODEL}).encode()
    pq.write_table(table.replace_schema_metadata({b"nuclei": about}), path)


def write_tiles(path: Path, grid: Grid, seed: int = 0) -> None:
    """Write ``tiles.zarr``: pink tissue with a white margin of 64 pixels."""
    import zarr

    rng = np.random.default_rng(seed)
    group = zarr.open_group(path, mode="w")
    group.attrs.update({"grid": grid.to_json(), "cell": 64})
    rgb = np.full((grid.height, grid.width, 3), 255, dtype=np.uint8)
    inner = rgb[64:-64, 64:-64]
    inner[:] = np.array([225, 160, 190], dtype=np.uint8) - rng.integers(0, 20, inner.shape, dtype=np.uint8)
    store = group.create_array("rgb", shape=rgb.shape, chunks=(256, 256, 3), dtype="uint8", fill_value=255)
    store[:] = rgb
    active = np.zeros((-(-grid.height // 64), -(-grid.width // 64)), dtype=bool)
    active[1:-1, 1:-1] = True
    cells = group.create_array("active", shape=active.shape, dtype="bool")
    cells[:] = active


def write_slide(
    results: Path, slide: str, *, count: int = 400, width: int = 2400, height: int = 1800, seed: int = 0
) -> SlideLayout:
    """Write the outputs of the stages up to ``export`` for a good slide of 0.25 µm/px, analysed at 0.5 µm/px."""
    paths = RunLayout(results).slide(slide)
    paths.root.mkdir(parents=True)
    grid = Grid.for_slide(width, height, 0.25, 0.25, 0.5)
    write_nuclei(paths.nuclei, nuclei_table(count, width, height, seed=seed), grid, slide)
    write_tiles(paths.tiles_zarr, grid, seed)
    outline = [[130, 130], [width - 130, 130], [width - 200, height - 130], [130, height - 130], [130, 130]]
    hole = [[700, 700], [700, 900], [900, 900], [900, 700], [700, 700]]
    tissue = {
        "type": "FeatureCollection",
        "features": [
            {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [outline, hole]}, "properties": {}}
        ],
    }
    paths.tissue_geojson.write_text(json.dumps(tissue))
    area = shapely.Polygon(outline, [hole]).area * 0.25**2 / 1e6
    payloads: dict[Path, dict[str, Any]] = {
        paths.inspect: {
            "path": f"/data/{slide}",
            "backend": "tiffslide",
            "vendor": "aperio",
            "width": width,
            "height": height,
            "levels": [{"width": width, "height": height, "scale_x": 1, "scale_y": 1}],
            "mpp": [0.25, 0.25],
            "mpp_source": "metadata",
            "objective": 40,
            "quick_hash": f"hash-{seed}",
            "bytes": 123456,
        },
        paths.tissue: {"area_mm2": area, "fraction": 0.8, "parts": 1, "method": "otsu"},
        paths.tiles: {"grid": grid.to_json(), "tile": 256, "tiles": 12, "unreadable": [], "unreadable_share": 0.0},
        paths.stain: {"method": "macenko"},
        paths.maps: {"model": MODEL, "device": "cpu"},
        paths.instances: {"nuclei": count},
        paths.measure: {"nuclei": count},
        paths.export: {"nuclei": count, "bytes": 1},
    }
    for number, (path, payload) in enumerate(payloads.items()):
        stage = {"slide": "inspect", "maps": "infer"}.get(path.stem, path.stem)
        record = {"stage": stage, "slide": slide, "status": "ok", "failure": None, "seconds": number + 0.5}
        path.write_text(json.dumps(record | {"peak_rss_mb": 100.0 + number} | payload))
    return paths


def write_failed_slide(results: Path, slide: str, stage: str, reason: str, hint: str = "") -> SlideLayout:
    """Write the manifests of a slide that failed at `stage`: all stages up to ``export`` record the same failure."""
    paths = RunLayout(results).slide(slide)
    paths.root.mkdir(parents=True)
    failure = {"stage": stage, "reason": reason, "hint": hint}
    record = {"slide": slide, "status": "failed", "failure": failure, "seconds": 0.1, "peak_rss_mb": 50.0}
    for path in (paths.inspect, paths.tissue, paths.tiles, paths.stain, paths.maps, paths.instances, paths.measure):
        path.write_text(json.dumps({"stage": path.stem} | record))
    paths.export.write_text(json.dumps({"stage": "export"} | record))
    return paths


def write_package(
    folder: Path,
    network: str,
    args: dict[str, Any] | None = None,
    *,
    heads: tuple[str, ...] = ("nucleus", "distance"),
    patch: int = 64,
    overlap: int = 16,
    mpp: float = 0.5,
    seed: int = 0,
) -> ModelPackage:
    """Write a model package with an untrained network."""
    import torch
    from safetensors.torch import save_file

    from pipeline.networks.registry import build_network, head_channels

    torch.manual_seed(seed)
    built = build_network(network, head_channels(heads, 1), args, pretrained=False)
    folder.mkdir(parents=True)
    state = {k: v.contiguous() for k, v in built.state_dict().items() if not k.endswith("num_batches_tracked")}
    save_file(state, folder / WEIGHTS)
    package = ModelPackage(
        name=network,
        mpp=mpp,
        patch=patch,
        overlap=overlap,
        network=network,
        network_args=args or {},
        heads=heads,
        classes=(NucleusClass("Nucleus", (46, 160, 67)),),
        stain={"method": "none", "reference": {}},
        thresholds=InstanceRules(),
        licence="CC0 1.0",
        description="untrained",
        data=(),
        metrics={},
        sha256=file_sha256(folder / WEIGHTS),
        folder=folder,
    )
    (folder / CARD).write_text(json.dumps(package.to_json()))
    return package


def ring_of(wkb: bytes) -> list[list[float]]:
    """Points of the exterior of a polygon given as WKB."""
    points: list[list[float]] = shapely.get_coordinates(shapely.get_exterior_ring(shapely.from_wkb(wkb))).tolist()
    return points


def stained(height: int, width: int, seed: int) -> np.ndarray:
    """Make an image of random H&E tissue, uint8 RGB."""
    from scipy import ndimage

    rng = np.random.default_rng(seed)
    amounts = np.stack([ndimage.gaussian_filter(rng.normal(size=(height, width)), s) * s for s in (3, 6)], axis=-1)
    return od_to_rgb(np.clip(amounts * 2 + 0.4, 0, 3) @ RUIFROK)


def write_inputs(folder: Path, rgb: np.ndarray, chunk: int = 128) -> dict[str, Path]:
    """Write the outputs of the stages before inference for a slide with these pixels, one corner without tissue."""
    import zarr

    height, width = rgb.shape[:2]
    grid = Grid(width, height, 0.5, 2.0, 2.0)
    folder.mkdir(parents=True)
    active = np.ones((-(-height // CELL), -(-width // CELL)), bool)
    active[:2, :2] = False
    rgb = rgb.copy()
    rgb[: 2 * CELL, : 2 * CELL] = 255
    group = zarr.create_group(folder / "tiles.zarr", attributes={"grid": grid.to_json(), "cell": CELL})
    group.create_array("rgb", shape=rgb.shape, chunks=(chunk, chunk, 3), dtype="uint8", fill_value=255)[:] = rgb
    group.create_array("active", data=active)
    transform = {"method": "matrix", "matrix": (np.eye(3) * 0.9 + 0.03).tolist()}
    write_json(folder / "tiles.json", {"stage": "tiles", "status": "ok"})
    write_json(folder / "stain.json", {"stage": "stain", "status": "ok", "transform": transform})
    return {"tiles": folder / "tiles.json", "zarr": folder / "tiles.zarr", "stain": folder / "stain.json"}
