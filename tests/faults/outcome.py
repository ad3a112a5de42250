"""What a run leaves: is every file under its final name whole, and is it the same as another run's?"""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

TIMES = {"seconds", "peak_rss_mb", "mp_per_s", "nuclei_per_s", "stages"}
"""Keys of manifests that tell of the machine and the hour."""

SPACE = ("logs", "benchmarks", "so-far")


def timeless(value: Any) -> Any:
    """Plain JSON without times."""
    if isinstance(value, dict):
        return {key: timeless(item) for key, item in value.items() if key not in TIMES}
    return [timeless(item) for item in value] if isinstance(value, list) else value


def finals(results: Path) -> list[Path]:
    """Files and stores under final names in the slides' folders."""
    found = []
    for slide in sorted((results / "slides").glob("*")):
        found += [path for path in sorted(slide.iterdir()) if not path.name.startswith(".")]
    return found


def check_whole(path: Path) -> None:
    """Read a file or store completely; raises whatever is wrong with it."""
    if path.suffix == ".zarr":
        import zarr

        from pipeline.seal import SEAL, check_seal

        assert (path / SEAL).is_file() or (path / "FAILED.txt").is_file(), f"{path} has no seal"
        check_seal(path)
        for inner in path.glob("*/zarr.json"):
            zarr.open_array(inner.parent, mode="r")[...]
    elif path.suffix == ".json":
        assert json.loads(path.read_text(encoding="utf-8"))["status"] in ("ok", "failed")
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


def outcome(results: Path) -> dict[str, str]:
    """Every result of a finished run by its name: a hash of its bytes, of manifests without the times in them."""
    found = {}
    for path in finals(results):
        name = str(path.relative_to(results))
        if path.suffix == ".json":
            data = json.dumps(timeless(json.loads(path.read_text(encoding="utf-8"))), sort_keys=True).encode()
        elif path.is_dir():
            continue
        else:
            data = path.read_bytes()
        found[name] = hashlib.sha256(data).hexdigest()
    for name in ("cohort.tsv", "failed.tsv"):
        lines = (results / name).read_text(encoding="utf-8").splitlines()
        header = lines[0].split("\t")
        kept = [i for i, column in enumerate(header) if column not in TIMES]
        text = "\n".join("\t".join(line.split("\t")[i] for i in kept) for line in lines)
        found[name] = hashlib.sha256(text.encode()).hexdigest()
    return found
