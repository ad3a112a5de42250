"""Runs of the workflow as a user starts it: Snakemake in a process of its own, on small synthetic slides."""

from __future__ import annotations

import csv
import gzip
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
MPP = 0.5


@dataclass(frozen=True)
class Run:
    """A finished Snakemake process."""

    code: int
    output: str

    @property
    def counts(self) -> dict[str, int]:
        """Jobs by rule, as a dry run's table says; empty when there is nothing to do."""
        counts: dict[str, int] = {}
        lines = self.output.splitlines()
        for start, line in enumerate(lines):
            if line.split() == ["job", "count"]:
                for row in lines[start + 2 :]:
                    if len(row.split()) != 2:
                        break
                    counts[row.split()[0]] = int(row.split()[1])
                break
        return counts

    @property
    def changed(self) -> set[str]:
        """Rules whose parameters have changed, as a dry run tells."""
        found = re.search(r"params have changed since last execution:\n +(.*)", self.output)
        return set(found[1].split(", ")) if found else set()

    @property
    def nothing(self) -> bool:
        """Whether everything was up to date."""
        return "Nothing to be done" in self.output


def command(config: dict[str, Any], *options: str, cores: int = 2) -> list[str]:
    """A Snakemake command line."""
    settings = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in config.items()]
    snakemake = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--cores", str(cores)]
    return [*snakemake, *options, "--config", *settings]


def run(folder: Path, config: dict[str, Any], *options: str, cores: int = 2, before: Sequence[str] = ()) -> Run:
    """Run Snakemake in a folder, with settings, and wait for it."""
    done = subprocess.run(
        [*before, *command(config, *options, cores=cores)],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1700,
        check=False,
    )
    return Run(done.returncode, done.stdout)


def leaves(schema: dict[str, Any], above: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Names of the settings of a schema that have none below them, such as ``tissue.mpp``, and what it says of each."""
    for key, value in schema["properties"].items():
        name = f"{above}{key}"
        if "properties" in value:
            yield from leaves(value, f"{name}.")
        else:
            yield name, value


def write_toy_model(folder: Path) -> Path:
    """Write a package whose weights match its card."""
    from pipeline.batch.settings import file_sha256

    folder.mkdir()
    (folder / "weights.safetensors").write_bytes(b"no weights")
    card = json.loads((ROOT / "models/hematoxylin/model.json").read_text(encoding="utf-8"))
    card |= {"name": "toy", "mpp": MPP, "licence": "CC0", "sha256": file_sha256(folder / "weights.safetensors")}
    (folder / "model.json").write_text(json.dumps(card), encoding="utf-8")
    return folder


def write_slide(path: Path, seed: int, size: tuple[int, int] = (640, 512), stain: str = "classic") -> bytes:
    """Write a synthetic slide in the format that its name says; returns its known nuclei as GeoJSON.gz."""
    from pipeline.slides.synthetic import make_field, truth_geojson, write_ome_tiff, write_svs, write_tiff

    rgb, labels = make_field(*size, MPP, seed, stain=stain)
    if path.suffix == ".png":
        import imageio.v3

        imageio.v3.imwrite(path, rgb)
    else:
        writers = {".svs": write_svs, ".tif": write_tiff, ".tiff": write_tiff}
        writer = write_ome_tiff if ".ome." in path.name else writers[path.suffix]
        writer(path, rgb, MPP)
    return truth_geojson(labels)


def read_tsv(path: Path) -> list[dict[str, str]]:
    """Rows of a table."""
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream, delimiter="\t"))


def read_json(path: Path) -> Any:
    """Content of a JSON file, gzipped or not."""
    data = path.read_bytes()
    return json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)
