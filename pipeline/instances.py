"""Stage ``instances``: from maps to the table of nuclei. How: `pipeline.census`."""

from __future__ import annotations

import argparse
import hashlib
import logging
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import shapely

from pipeline.allocator import keep_freed_memory
from pipeline.census import DEFAULT_BLOCK, DEFAULT_HALO, check_blocks, take_census, take_survey
from pipeline.census_worker import Setup
from pipeline.maps import MapStore
from pipeline.models.package import ModelPackage
from pipeline.nuclei import COMPRESSION, RUNS_FIELD, nuclei_schema, wkb_of
from pipeline.parts import Part, manifest_of, read_parts
from pipeline.progress import Progress
from pipeline.stage import add_stage_arguments, run_stage
from pipeline.tissue import read_tissue

log = logging.getLogger(__name__)

ROW_GROUP = 1 << 14
"""Nuclei in a row group of the table."""


def regroup(parts: Iterable[pa.Table], size: int) -> Iterator[pa.Table]:
    """Nuclei in groups of exactly `size` (the last may be smaller), each in one piece."""
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
    """`tables`, each made in a thread while the one before it is used."""
    source = iter(tables)
    with ThreadPoolExecutor(1, "ahead") as pool:
        future = pool.submit(next, source, None)
        while (table := future.result()) is not None:
            future = pool.submit(next, source, None)
            yield table


def write_part(
    maps: Path, package: ModelPackage, out: Path, part: Part, *, block: int, halo: int, workers: int, tissue: Any = None
) -> dict[str, Any]:
    """Look at some of a slide's blocks, and leave their nuclei and seams in a folder.

    Returns
    -------
    dict
        ``part``, ``block`` and ``model``, its hash.
    """
    check_blocks(block, halo, workers)
    out.mkdir()
    outline = None if tissue is None else shapely.to_wkb(tissue)
    setup = Setup(maps, package.thresholds, tuple(c.name for c in package.classes), out, outline)
    take_survey(setup, part, block=block, halo=halo, workers=workers)
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
    tissue: Any = None,
    parts: Sequence[Path] = (),
) -> dict[str, Any]:
    """Find a slide's nuclei and write their table; `parts`: see `take_census`.

    Returns
    -------
    dict
        ``nuclei``, ``nuclei_per_s``, ``components_followed`` (that no block saw whole), ``components_cut`` (too large)
        and ``digest``, the sha256 of ids, polygons and classes.
    """
    digest = hashlib.sha256()
    count = 0
    # Beside the table, under a name that `run_stage` clears away after a killed run.
    with (
        Progress(1, "nuclei", "slide") as clock,
        tempfile.TemporaryDirectory(prefix=".part-spool-", suffix=f"-{out.name}", dir=out.parent) as spool,
    ):
        outline = None if tissue is None else shapely.to_wkb(tissue)
        setup = Setup(maps, package.thresholds, tuple(c.name for c in package.classes), Path(spool), outline)
        # First of all: it may fork, which wants a process without threads and open files.
        census = take_census(setup, block=block, halo=halo, workers=workers, parts=parts)
        about = {
            "slide": slide,
            "grid": MapStore.open(maps).grid.to_json(),
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
        if census.cut:
            log.warning(
                "slide %r: %d components of more than %d pixels were cut along a grid of %d pixels: is the nucleus "
                "map sound?", slide, census.cut, setup.max_component, setup.cut,
            )  # fmt: skip
        return {
            "nuclei": count,
            "nuclei_per_s": round(count / max(clock.seconds, 1e-9), 1),
            "components_followed": census.followed,
            "components_cut": census.cut,
            "digest": digest.hexdigest(),
        }


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

    def body(staged: dict[str, Path]) -> dict[str, Any]:
        package = ModelPackage.load(args.model)
        how = {
            "block": args.block,
            "halo": args.halo,
            "workers": args.workers,
            "tissue": shapely.union_all(read_tissue(args.tissue)) if args.tissue else None,
        }
        if args.part is not None:
            return write_part(args.maps, package, staged["nuclei"], args.part, **how)
        read_parts(args.parts, block=args.block, model=package.sha256)
        found = write_instances(args.maps, package, staged["nuclei"], slide=args.slide, parts=args.parts, **how)
        log.info("slide %r: %d nuclei, %.0f a second", args.slide, found["nuclei"], found["nuclei_per_s"])
        return found

    stores = {part: manifest_of(part) for part in args.parts}
    if args.maps_manifest is not None:
        stores = {args.maps: args.maps_manifest} | stores
    run_stage(
        "instances",
        args.slide,
        manifest=args.manifest or args.out.with_suffix(".json"),
        outputs={"nuclei": args.out},
        upstream=[*stores.values()],
        stores=stores,
        body=body,
        on_bad_slide=args.on_bad_slide,
    )
    return 0
