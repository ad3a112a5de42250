"""Stage ``instances``: find the nuclei in a slide's maps and write their table, see `pipeline.census.slide`."""

from __future__ import annotations

import argparse
import hashlib
import logging
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import shapely

from pipeline.batch.parts import Part, manifest_of, read_parts
from pipeline.batch.stage import add_stage_arguments, keywords, read_manifest, run_stage
from pipeline.census.slide import DEFAULT_BLOCK, DEFAULT_HALO, take_census, take_survey
from pipeline.census.worker import Setup
from pipeline.errors import PipelineError
from pipeline.machine.allocator import keep_freed_memory
from pipeline.models.package import ModelPackage
from pipeline.stores.maps import open_maps
from pipeline.stores.nuclei import COMPRESSION, RUNS_FIELD, nuclei_schema, wkb_of
from pipeline.tissue import read_tissue

if TYPE_CHECKING:
    from shapely.geometry.base import BaseGeometry

log = logging.getLogger(__name__)

ROW_GROUP = 1 << 14
"""Nuclei per row group of the table."""


def regroup(parts: Iterable[pa.Table], size: int) -> Iterator[pa.Table]:
    """Yield tables of exactly `size` nuclei (the last may be smaller), each with contiguous columns."""
    held: list[pa.Table] = []
    count = 0
    for part in parts:
        held.append(part)
        count += part.num_rows
        while count >= size:
            joined = pa.concat_tables(held)
            yield joined.slice(0, size).combine_chunks()
            held, count = [joined.slice(size)], count - size
    if count:
        yield pa.concat_tables(held).combine_chunks()


def one_ahead(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Yield `tables`, computing each in a thread while the caller uses the previous one."""
    source = iter(tables)
    with ThreadPoolExecutor(1, "ahead") as pool:
        future = pool.submit(next, source, None)
        while (table := future.result()) is not None:
            future = pool.submit(next, source, None)
            yield table


def _setup(maps: Path, package: ModelPackage, spool: Path, tissue: BaseGeometry | None) -> Setup:
    outline = None if tissue is None else shapely.to_wkb(tissue)
    return Setup(maps, package.thresholds, tuple(c.name for c in package.classes), spool, outline)


def write_part(
    maps: Path,
    package: ModelPackage,
    out: Path,
    part: Part,
    *,
    block: int,
    halo: int,
    workers: int,
    tissue: BaseGeometry | None = None,
) -> dict[str, Any]:
    """Process the blocks of one part of a slide, and write their nuclei and seams to the folder `out`.

    Returns
    -------
    dict
        ``part``, ``block`` and ``model`` (hash of the model).
    """
    out.mkdir()
    take_survey(_setup(maps, package, out, tissue), part, block=block, halo=halo, workers=workers)
    return {"part": part.to_json(), "block": block, "model": package.sha256}


def write_instances(
    maps: Path,
    package: ModelPackage,
    out: Path,
    *,
    slide: str,
    block: int,
    halo: int,
    workers: int,
    tissue: BaseGeometry | None = None,
    parts: Sequence[Path] = (),
) -> dict[str, Any]:
    """Find a slide's nuclei and write their table; for `parts` see `take_census`.

    Returns
    -------
    dict
        ``nuclei`` (count), ``nuclei_per_s``, ``components_followed`` (number that no block contained entirely),
        ``components_cut`` (number that were too large to process whole) and ``digest``, the sha256 of ids, polygons and
        classes.
    """
    digest = hashlib.sha256()
    count, start = 0, time.monotonic()
    # The folder lies beside the table, and `run_stage` recognises its name and removes it after a killed run.
    with tempfile.TemporaryDirectory(prefix=".part-spool-", suffix=f"-{out.name}", dir=out.parent) as spool:
        setup = _setup(maps, package, Path(spool), tissue)
        # This must come first: it may fork, and a process with threads or open files cannot be forked safely.
        census = take_census(setup, block=block, halo=halo, workers=workers, parts=parts)
        about = {
            "slide": slide,
            "grid": open_maps(maps, package.thresholds.refine).grid.to_json(),
            "classes": package.colors,
            "model": {"name": package.name, "sha256": package.sha256},
        }
        schema = nuclei_schema(about, [RUNS_FIELD])
        tables = regroup(census.batches(), ROW_GROUP)
        with pq.ParquetWriter(out, schema, **COMPRESSION) as writer:
            for table in one_ahead(tables) if workers > 1 else tables:
                count += table.num_rows
                digest.update(table.column("id").to_numpy().tobytes())
                digest.update(table.column("class_id").to_numpy().tobytes())
                digest.update(wkb_of(table.column("geometry").chunk(0))[0].data)
                writer.write_table(table.replace_schema_metadata(schema.metadata), ROW_GROUP)
    rate = count / max(time.monotonic() - start, 1e-9)
    log.info("slide %r: %d nuclei, %.0f a second", slide, count, rate)
    if census.cut:
        log.warning(
            "slide %r: %d components of more than %d pixels were cut along a grid of %d pixels: is the nucleus map "
            "sound?", slide, census.cut, setup.max_component, setup.cut,
        )  # fmt: skip
    return {
        "nuclei": count,
        "nuclei_per_s": round(rate, 1),
        "components_followed": census.followed,
        "components_cut": census.cut,
        "digest": digest.hexdigest(),
    }


def _check_same_model(maps_manifest: Path, package: ModelPackage) -> None:
    """Refuse maps that another model has made than the one whose thresholds and classes would be applied to them."""
    made = read_manifest(maps_manifest).get("model", {})
    if made.get("sha256", package.sha256) != package.sha256:
        raise PipelineError(
            f"{package.folder} holds another model than the one that made {maps_manifest.parent / 'maps.zarr'} "
            f"({made.get('name')}, {made['sha256'][:12]})",
            "it was replaced during the run: run the same command again",
        )


def run_instances(
    slide: str,
    maps: Path,
    model: Path,
    out: Path,
    *,
    maps_manifest: Path | None = None,
    manifest: Path | None = None,
    tissue: Path | None = None,
    block: int = DEFAULT_BLOCK,
    halo: int = DEFAULT_HALO,
    workers: int = 1,
    part: Part | None = None,
    parts: Sequence[Path] = (),
    **how: Any,
) -> dict[str, Any]:
    """Run the stage.

    Parameters
    ----------
    slide : str
        Name of the slide.
    maps : pathlib.Path
        ``maps.zarr``.
    model : pathlib.Path
        Folder of the model package.
    out : pathlib.Path
        The table of nuclei to write; with `part`, a folder to write.
    maps_manifest : pathlib.Path, optional
        ``maps.json``. Without it, the maps are used without looking for a failed earlier stage or damage.
    manifest : pathlib.Path, optional
        The manifest to write; by default beside `out`.
    tissue : pathlib.Path, optional
        ``tissue.geojson``; nuclei whose centre lies outside are left out.
    block, halo, workers : int
        See `pipeline.census.slide.take_census`.
    part : Part, optional
        Process only this part of the slide.
    parts : sequence of pathlib.Path
        Folders of all parts, to be combined. Blocks are not processed again then.
    **how : Any
        `on_bad_slide`, `minutes` and `again` of `pipeline.batch.stage.run_stage`.

    Returns
    -------
    dict
        The manifest, with what `write_instances` or `write_part` returns.
    """
    stores = {path: manifest_of(path) for path in parts}
    if maps_manifest is not None:
        stores = {maps: maps_manifest} | stores

    def body(staged: dict[str, Path]) -> dict[str, Any]:
        package = ModelPackage.load(model)
        if maps_manifest is not None:
            _check_same_model(maps_manifest, package)
        area = None if tissue is None else shapely.union_all(read_tissue(tissue))
        options: dict[str, Any] = {"block": block, "halo": halo, "workers": workers, "tissue": area}
        if part is not None:
            return write_part(maps, package, staged["nuclei"], part, **options)
        read_parts(parts, block=block, model=package.sha256)
        return write_instances(maps, package, staged["nuclei"], slide=slide, parts=parts, **options)

    return run_stage(
        "instances",
        slide,
        manifest=manifest or out.with_suffix(".json"),
        outputs={"nuclei": out},
        upstream=[*stores.values()],
        stores=stores,
        body=body,
        **how,
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the stage's arguments."""
    add_stage_arguments(parser, slide="slide")
    parser.add_argument("--maps", type=Path, required=True, help="maps.zarr")
    parser.add_argument("--model", type=Path, required=True, help="model package")
    parser.add_argument("--out", type=Path, required=True, help="table of nuclei to write (GeoParquet)")
    parser.add_argument("--maps-manifest", type=Path, help="maps.json")
    parser.add_argument("--manifest", type=Path, help="manifest to write")
    parser.add_argument("--tissue", type=Path, help="tissue.geojson; nuclei outside are left out")
    parser.add_argument("--block", type=int, default=DEFAULT_BLOCK, help="side of a block in grid pixels")
    parser.add_argument("--halo", type=int, default=DEFAULT_HALO, help="width of a block's halo in grid pixels")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--part", type=Part.parse, metavar="I/N", help="only this part of the slide, into a folder OUT")
    parser.add_argument("--parts", type=Path, nargs="+", default=[], metavar="DIR", help="put these parts together")


def main(args: argparse.Namespace) -> int:
    """Run the stage from the command line."""
    keep_freed_memory()
    run_instances(**keywords(args))
    return 0
