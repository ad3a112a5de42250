"""Stage ``export``: write the nuclei as GeoJSON that QuPath opens as editable detections.

The table is read in batches of rows and the text is compressed while the next batch is made, so memory does not grow
with the number of nuclei.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import logging
import struct
import uuid
import zlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, Self

import numpy as np
import numpy.typing as npt

from pipeline.batch.stage import add_origin_argument, add_stage_arguments, keywords, read_manifest, run_stage
from pipeline.errors import PipelineError
from pipeline.exchange.geojson import CLASS_PROBABILITY, EXPORTED, ORIGIN, origin_of
from pipeline.kernels.contours import wkb_rings
from pipeline.stores.nuclei import about_nuclei, open_nuclei, wkb_of

if TYPE_CHECKING:
    import pyarrow as pa

log = logging.getLogger(__name__)

MEASUREMENTS = {
    "area_um2": "Area µm^2",
    "perimeter_um": "Perimeter µm",
    "major_axis_um": "Major axis µm",
    "minor_axis_um": "Minor axis µm",
    "max_diameter_um": "Max diameter µm",
    "min_diameter_um": "Min diameter µm",
    "eccentricity": "Eccentricity",
    "solidity": "Solidity",
    "circularity": "Circularity",
    "orientation": "Orientation rad",
    "hematoxylin_mean": "Hematoxylin OD mean",
    "hematoxylin_std": "Hematoxylin OD std dev",
    "eosin_mean": "Eosin OD mean",
    "eosin_std": "Eosin OD std dev",
    "probability": "Probability",
}
"""Columns of the table and their names in QuPath, in the order of the export."""

RANKED = tuple(name for name in MEASUREMENTS if name != "orientation")
"""Measurements that have percentiles: all but the orientation, since angles are periodic and have no order."""

SHOWN = MEASUREMENTS | {"class_probability": CLASS_PROBABILITY}
"""`MEASUREMENTS` and those that only some tables have."""

BATCH_ROWS = 8192
"""Nuclei converted to text at once, some 6 MB."""

GZIP_LEVEL = 4
"""Measured on nuclei: level 4 compresses 69 MB/s per core to 25 % of the size; level 6, 30 MB/s to 23 %."""

DIGITS = 2
"""Decimals of a coordinate in level-0 pixels."""

DEFAULT_COLOUR = (46, 160, 67)
"""Colour of a class for which the model defines none."""


def _mix(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    # The finaliser of splitmix64 (Steele, Lea, Flood 2014): a bijection of 64-bit words.
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def nucleus_uuids(slide: str, ids: npt.NDArray[np.uint64]) -> list[str]:
    """UUIDs of nuclei, which are the same in every run of the same slide.

    Parameters
    ----------
    slide : str
        Name of the slide.
    ids : numpy.ndarray of uint64, shape (n,)
        Ids of the slide's nuclei.

    Returns
    -------
    list of str
        UUIDs of version 8 (RFC 9562): each half is computed from a UUID of the slide and the id of the nucleus.
    """
    high, low = struct.unpack(">QQ", uuid.uuid5(uuid.NAMESPACE_URL, f"slide:{slide}").bytes)
    ids = np.asarray(ids, dtype=np.uint64)
    with np.errstate(over="ignore"):
        words = np.stack([_mix(ids ^ np.uint64(high)), _mix(ids + np.uint64(low))], axis=1)
    data = words.astype(">u8").view(np.uint8).reshape(-1, 16)
    data[:, 6] = (data[:, 6] & 0x0F) | 0x80
    data[:, 8] = (data[:, 8] & 0x3F) | 0x80
    digits = np.frombuffer(b"0123456789abcdef", dtype=np.uint8)
    text = np.full((len(ids), 36), ord("-"), dtype=np.uint8)
    places = np.delete(np.arange(36), [8, 13, 18, 23])
    text[:, places[0::2]] = digits[data >> 4]
    text[:, places[1::2]] = digits[data & 15]
    joined = text.tobytes().decode("ascii")
    return [joined[start : start + 36] for start in range(0, len(joined), 36)]


def classifications(classes: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """QuPath's ``classification`` of each class, by the name of the class."""
    result = {}
    for item in classes:
        colour = item.get("color") or DEFAULT_COLOUR
        result[str(item["name"])] = {"name": str(item["name"]), "color": [int(value) for value in colour]}
    return result


def features(
    batch: pa.RecordBatch,
    slide: str,
    known: Mapping[str, dict[str, Any]],
    origin: tuple[int, int] = (0, 0),
) -> list[dict[str, Any]]:
    """GeoJSON features of a batch of nuclei.

    Parameters
    ----------
    batch : pyarrow.RecordBatch
        Rows of ``nuclei.parquet``.
    slide : str
        Name of the slide.
    known : mapping
        What `classifications` returned.
    origin : tuple of int
        Origin of the coordinates as a level-0 pixel, x and y.

    Returns
    -------
    list of dict
        One feature per row. Rings are float64 arrays of shape (k, 2), since a list for each point would cost more time
        in the garbage collector than the work itself. A measurement that is not finite is left out, because QuPath
        accepts only numbers.
    """
    if batch.num_rows == 0:
        return []
    points, ring_starts, shape_starts = wkb_rings(*wkb_of(batch.column("geometry")))
    coordinates = np.round(points - origin, DIGITS)
    rings = [coordinates[start:stop] for start, stop in itertools.pairwise(ring_starts.tolist())]

    columns = {key: name for key, name in SHOWN.items() if key in batch.schema.names}
    classified = "class_probability" in columns
    names = list(columns.values())
    values = np.empty((batch.num_rows, len(names)))
    for index, key in enumerate(columns):
        values[:, index] = batch.column(key).to_numpy(zero_copy_only=False)
    values = np.round(values, 4)
    finite = np.isfinite(values)
    measurements = [dict(zip(names, row, strict=True)) for row in values.tolist()]
    for row in np.flatnonzero(~finite.all(axis=1)):
        measurements[row] = {name: measurements[row][name] for i, name in enumerate(names) if finite[row, i]}

    result = []
    kinds = batch.column("class").to_pylist()
    uuids = nucleus_uuids(slide, batch.column("id").to_numpy(zero_copy_only=False))
    outlines = [rings[start:stop] for start, stop in itertools.pairwise(shape_starts.tolist())]
    for identity, name, measured, outline in zip(uuids, kinds, measurements, outlines, strict=True):
        kind = known.get(name) or {"name": name, "color": DEFAULT_COLOUR}
        properties = {"objectType": "detection", "classification": kind, "measurements": measured}
        if classified:
            properties["metadata"] = {EXPORTED: name}
        geometry = {"type": "Polygon", "coordinates": outline}
        result.append({"type": "Feature", "id": identity, "geometry": geometry, "properties": properties})
    return result


@contextmanager
def _no_collector() -> Iterator[None]:
    """Disable the garbage collector: features have no reference cycles, yet it would traverse them repeatedly."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class GzipWriter:
    """Write one gzip member whose blocks are compressed on threads.

    Blocks are compressed independently and joined at byte boundaries. The bytes written depend on how the text is
    divided into blocks, but not on the number of threads or the time of day.

    Parameters
    ----------
    stream : binary file
        Where to write.
    workers : int
        Number of threads; at most twice as many blocks are in memory.
    """

    def __init__(self, stream: BinaryIO, workers: int = 1) -> None:
        self._stream = stream
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="gzip")
        self._pending: deque[Future[bytes]] = deque()
        self._limit = 2 * workers
        self._crc = 0
        self._size = 0
        # Header of RFC 1952: deflate, no name, time 0, unknown system.
        stream.write(b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                while self._pending:
                    self._stream.write(self._pending.popleft().result())
                # An empty last block, then checksum and size.
                self._stream.write(b"\x03\x00" + struct.pack("<II", self._crc, self._size & 0xFFFFFFFF))
        finally:
            self._pool.shutdown(cancel_futures=True)

    def _compress(self, block: bytes) -> bytes:
        machine = zlib.compressobj(GZIP_LEVEL, zlib.DEFLATED, -zlib.MAX_WBITS)
        return machine.compress(block) + machine.flush(zlib.Z_FULL_FLUSH)

    def write(self, block: bytes) -> None:
        """Add a block of text; a few megabytes compress best."""
        self._crc = zlib.crc32(block, self._crc)
        self._size += len(block)
        self._pending.append(self._pool.submit(self._compress, block))
        while len(self._pending) > self._limit:
            self._stream.write(self._pending.popleft().result())


def _blocks(
    source: Path, slide: str, columns: Sequence[str], known: Mapping[str, dict[str, Any]], origin: tuple[int, int]
) -> Iterator[Any]:
    import orjson

    with open_nuclei(source) as file:
        for batch in file.iter_batches(BATCH_ROWS, columns=list(columns)):
            if batch.num_rows:
                with _no_collector():
                    found = features(batch, slide, known, origin=origin)
                    text = orjson.dumps(found, option=orjson.OPT_SERIALIZE_NUMPY)
                yield batch.num_rows, text[1:-1]


def write_geojson(source: Path, target: Path, slide: str, *, origin: tuple[int, int] = (0, 0), workers: int = 1) -> int:
    """Write the nuclei of a table as gzipped GeoJSON.

    Parameters
    ----------
    source : pathlib.Path
        ``nuclei.parquet``.
    target : pathlib.Path
        The file to write.
    slide : str
        Name of the slide.
    origin : tuple of int
        Origin of the coordinates as a level-0 pixel, x and y. It is stored in the collection unless it is (0, 0).
    workers : int
        Number of threads that compress. The bytes written do not depend on it.

    Returns
    -------
    int
        Number of nuclei.
    """
    with open_nuclei(source) as file:
        schema = file.schema_arrow
    known = classifications(about_nuclei(schema).get("classes") or [])
    columns = [name for name in ("id", "geometry", "class", *SHOWN) if name in schema.names]
    count = 0
    with target.open("wb") as stream, GzipWriter(stream, workers=workers) as out:
        about = b'"%s":[%d,%d],' % (ORIGIN.encode(), *origin) if any(origin) else b""
        lead = b'{"type":"FeatureCollection",' + about + b'"features":[\n'
        for rows, text in _blocks(source, slide, columns, known, origin):
            out.write(lead + text)
            lead = b",\n"
            count += rows
        out.write(b"\n]}\n" if count else lead + b"]}\n")
    return count


def run_export(
    slide: str,
    measure: Path,
    nuclei: Path,
    out: Path,
    geojson: Path,
    *,
    inspect: Path | None = None,
    origin: str = "slide",
    workers: int = 1,
    **how: Any,
) -> dict[str, Any]:
    """Run the stage.

    Parameters
    ----------
    slide : str
        Name of the slide.
    measure, nuclei : pathlib.Path
        Outputs of the stage ``measure``.
    out, geojson : pathlib.Path
        The manifest and the GeoJSON to write.
    inspect : pathlib.Path, optional
        ``slide.json``, which holds the bounds; required for `origin` ``"bounds"``.
    origin : {"slide", "bounds"}
        See `pipeline.exchange.geojson.origin_of`.
    workers : int
        Number of threads that compress.
    **how : Any
        `on_bad_slide`, `minutes` and `again` of `pipeline.batch.stage.run_stage`.

    Returns
    -------
    dict
        The manifest, with ``nuclei`` (count), ``bytes`` and ``origin`` (x and y in level-0 pixels).

    Raises
    ------
    PipelineError
        When `origin` is ``"bounds"`` and `inspect` is missing.
    """
    if origin == "bounds" and inspect is None:
        raise PipelineError(f"slide {slide!r}: origin 'bounds' without a slide.json", "give it with --inspect")

    def body(staged: dict[str, Path]) -> dict[str, Any]:
        corner = (0, 0) if inspect is None else origin_of(read_manifest(inspect), origin)
        count = write_geojson(nuclei, staged["geojson"], slide, origin=corner, workers=max(1, workers))
        size = staged["geojson"].stat().st_size
        log.info("slide %r: %d nuclei exported, %.1f MB", slide, count, size / 1e6)
        return {"nuclei": count, "bytes": size, "origin": list(corner)}

    return run_stage(
        "export",
        slide,
        manifest=out,
        outputs={"geojson": geojson},
        upstream=[measure],
        body=body,
        **how,
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``python -m pipeline export``."""
    add_stage_arguments(parser)
    parser.add_argument("--measure", type=Path, required=True, metavar="FILE", help="measure.json")
    parser.add_argument("--nuclei", type=Path, required=True, metavar="FILE", help="nuclei.parquet")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="manifest to write")
    parser.add_argument("--geojson", type=Path, required=True, metavar="FILE", help="GeoJSON to write (.geojson.gz)")
    parser.add_argument("--inspect", type=Path, metavar="FILE", help="slide.json, for its bounds")
    add_origin_argument(parser)
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="threads that compress (default: 1)")


def main(args: argparse.Namespace) -> int:
    """Run ``python -m pipeline export``."""
    run_export(**keywords(args))
    return 0
