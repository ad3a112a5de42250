"""What a run leaves: is every file under its final name whole, and is it the same as another run's?"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

from pipeline.layout import RunLayout

TIMES = {"seconds", "peak_rss_mb", "mp_per_s", "nuclei_per_s", "stages", "git"}
"""Keys of manifests that tell of the machine, the hour and the checkout."""


def timeless(value: Any) -> Any:
    """Plain JSON without times."""
    if isinstance(value, dict):
        return {key: timeless(item) for key, item in value.items() if key not in TIMES}
    return [timeless(item) for item in value] if isinstance(value, list) else value


def finals(results: Path) -> list[Path]:
    """Files and stores under final names: the slides', and those of the run."""
    found = [path for path in sorted(results.glob("*")) if path.is_file()]
    for slide in sorted((results / "slides").glob("*")):
        found += sorted(slide.iterdir())
    return [path for path in found if not path.name.startswith(".") and path.suffix != ".part"]


def check_whole(path: Path) -> None:
    """Read a file or store completely; raises whatever is wrong with it."""
    if path.suffix == ".zarr":
        import zarr

        from pipeline.stores.seal import SEAL, check_seal

        assert (path / SEAL).is_file() or (path / "FAILED.txt").is_file(), f"{path} has no seal"
        check_seal(path)
        for inner in path.glob("*/zarr.json"):
            zarr.open_array(inner.parent, mode="r")[...]
    elif path.suffix == ".json":
        content = json.loads(path.read_text(encoding="utf-8"))
        assert path.parent.parent.name != "slides" or content["status"] in ("ok", "failed")
    elif path.suffix == ".tsv":
        text = path.read_text(encoding="utf-8")
        assert text.endswith("\n"), path
        header, *rows = csv.reader(text.splitlines(), delimiter="\t", strict=True)
        assert all(len(row) == len(header) for row in rows), path
    elif path.suffix == ".html":
        assert path.read_text(encoding="utf-8").rstrip().endswith("</html>"), path
    elif path.suffix == ".geojson":
        json.loads(path.read_text(encoding="utf-8"))
    elif path.suffix == ".gz":
        json.loads(gzip.decompress(path.read_bytes()))
    elif path.suffix == ".parquet":
        import pyarrow.parquet

        pyarrow.parquet.read_table(path)
    elif path.suffix == ".png":
        from PIL import Image

        with Image.open(path) as image:
            image.load()
    else:
        raise AssertionError(f"{path}: of no known kind")


def content(path: Path) -> bytes:
    """What must not depend on the machine and the hour: the bytes, of manifests and tables those without times."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and file.name != ".snakemake_timestamp")
        return b"".join(str(file.relative_to(path)).encode() + file.read_bytes() for file in files)
    if path.suffix == ".json":
        return json.dumps(timeless(json.loads(path.read_text(encoding="utf-8"))), sort_keys=True).encode()
    if path.name in ("cohort.tsv", "failed.tsv"):
        with path.open(encoding="utf-8", newline="") as stream:
            rows = list(csv.DictReader(stream, delimiter="\t"))
        return json.dumps([{key: row[key] for key in row if key not in TIMES} for row in rows]).encode()
    if path.name == "cohort.parquet":
        import pyarrow.parquet

        table = pyarrow.parquet.read_table(path)
        return json.dumps(table.drop_columns(sorted(TIMES.intersection(table.column_names))).to_pydict()).encode()
    return path.read_bytes()


def outcome(results: Path) -> dict[str, str]:
    """Every result of a finished run by its name: a hash of its `content`.

    Of the run's own files, its tables: report and manifest tell of times and folders.
    """
    run = RunLayout(results)
    left_out = {run.report, run.manifest, run.settings, run.slide_table}
    kept = [path for path in finals(results) if path not in left_out]
    assert {run.cohort_tsv, run.cohort_parquet, run.failed} <= {*kept}
    return {str(path.relative_to(results)): hashlib.sha256(content(path)).hexdigest() for path in kept}
