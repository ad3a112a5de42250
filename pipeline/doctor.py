"""Command ``doctor``: check whether this machine has all that the pipeline needs."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline import __version__
from pipeline.batch.settings import check_model
from pipeline.errors import PipelineError
from pipeline.machine.cores import available_cores

MIN_FREE_GB = 5.0
"""Free disk space in GB below which a run may not finish: the tiles of one slide alone can take a few GB."""

MIN_MEMORY_GB = 4.0
"""Memory in GB that the stages need."""

SETUP = "set the environment up again: make .venv, or envs/pipeline.yaml with conda"


@dataclass(frozen=True)
class Finding:
    """Result of one check.

    Parameters
    ----------
    name : str
        What was checked.
    state : {"ok", "warning", "missing"}
        ``ok``; ``warning`` for something worth knowing; ``missing`` if the pipeline cannot run without it.
    detail : str
        What was found.
    advice : str
        What to do; empty if there is nothing to do.
    """

    name: str
    state: str
    detail: str
    advice: str = ""


def _first_line(error: BaseException) -> str:
    return next(iter(f"{type(error).__name__}: {error}".splitlines()))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "version unknown"


def check_python() -> Finding:
    """Check the version of Python; the detail names the system as well."""
    found = f"Python {platform.python_version()} on {platform.platform()}"
    if [int(part) for part in platform.python_version_tuple()[:2]] < [3, 11]:
        return Finding("python", "missing", found, "Python 3.11 or newer is needed")
    return Finding("python", "ok", found)


def check_reader(name: str, package: str, opener: Callable[[Path], tuple[int, int]]) -> Finding:
    """Check that a slide reader can open a tiny slide, which is written for this check."""
    import numpy as np

    size = (96, 64)
    try:
        import tifffile

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "tiny.tif"
            pixels = np.full((size[1], size[0], 3), 200, np.uint8)
            tifffile.imwrite(path, pixels, tile=(32, 32), photometric="rgb")
            opened = opener(path)
    except Exception as error:  # a broken library can raise anything
        return Finding(name, "missing", _first_line(error), SETUP)
    if opened != size:
        return Finding(name, "missing", f"{package} {_version(package)} opened a {size} slide as {opened}", SETUP)
    return Finding(name, "ok", f"{_version(package)}, opens a test slide")


def _openslide(path: Path) -> tuple[int, int]:
    import openslide

    with openslide.OpenSlide(str(path)) as slide:
        width, height = slide.dimensions
        slide.read_region((0, 0), 0, (8, 8))
    return int(width), int(height)


def _tiffslide(path: Path) -> tuple[int, int]:
    import tiffslide

    with tiffslide.TiffSlide(str(path)) as slide:
        width, height = slide.dimensions
        slide.read_region((0, 0), 0, (8, 8))
    return int(width), int(height)


def check_torch() -> Finding:
    """Check PyTorch; the detail names the GPUs or the number of CPU threads that it will use."""
    try:
        import torch
    except Exception as error:  # a broken PyTorch can raise anything
        return Finding("torch", "missing", _first_line(error), SETUP)
    if torch.cuda.is_available():
        from pipeline.prediction.predictors import unfit_card

        if unfit := unfit_card():
            return Finding(
                "torch",
                "warning",
                f"{torch.__version__}: {unfit}",
                "networks run on the CPU here",
            )
        cards = []
        for index in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(index)
            cards.append(f"{card.name} ({card.total_memory / 2**30:.0f} GiB)")
        return Finding(
            "torch", "ok", f"{torch.__version__}, GPU: {', '.join(cards)}; model=models/accurate is for GPUs"
        )
    from pipeline.networks.precision import bfloat16_unit

    unit = bfloat16_unit()
    threads = f"{torch.get_num_threads()} CPU threads{f' with {unit}' if unit else ''}"
    return Finding("torch", "ok", f"{torch.__version__}, no CUDA GPU: {threads}")


def check_stain() -> Finding:
    """Check the optional package staintools; stain method macenko does not need it."""
    try:
        importlib.import_module("staintools")
        importlib.import_module("spams")
    except Exception as error:  # a broken library can raise anything
        return Finding(
            "stain extractors",
            "warning",
            f"staintools: {_first_line(error)}",
            "only stain method vahadane needs it: pip install --no-deps staintools spams-bin",
        )
    return Finding("stain extractors", "ok", f"staintools {_version('staintools')}: macenko, vahadane")


def check_packages() -> list[Finding]:
    """Check the other libraries that the stages import."""
    findings = []
    for module, package in (
        ("cv2", "opencv-python-headless"),
        ("geopandas", "geopandas"),
        ("matplotlib", "matplotlib"),
        ("pyarrow", "pyarrow"),
        ("scipy", "scipy"),
        ("shapely", "shapely"),
        ("skimage", "scikit-image"),
        ("zarr", "zarr"),
    ):
        try:
            importlib.import_module(module)
        except Exception as error:  # a broken library can raise anything
            findings.append(Finding(package, "missing", _first_line(error), SETUP))
    return findings or [Finding("libraries", "ok", "all import")]


def check_snakemake() -> Finding:
    """Check the workflow engine, which is missing in a conda environment that Snakemake creates for its rules."""
    try:
        version = importlib.metadata.version("snakemake")
    except importlib.metadata.PackageNotFoundError:
        return Finding("snakemake", "warning", "not in this environment", "only the single stages can be run from here")
    if tuple(int(part) for part in version.split(".")[:2]) < (9, 18):
        return Finding("snakemake", "missing", version, "9.18 or newer is needed")
    return Finding("snakemake", "ok", version)


def check_package(folder: Path) -> Finding:
    """Check card and hash of the model package."""
    if not folder.exists() and not folder.is_absolute():
        beside = Path(__file__).resolve().parents[1] / folder
        folder = beside if beside.exists() else folder
    try:
        card = check_model(folder)
    except PipelineError as error:
        return Finding("model", "missing", str(error), "another one: --model FOLDER")
    licence = card.get("licence") or "not stated"
    return Finding(
        "model", "ok", f"{card.get('name', folder.name)}: {card.get('mpp')} µm/px, hash matches, licence {licence}"
    )


def check_disk(folder: Path) -> Finding:
    """Check the free disk space of the results folder, or of its closest parent that exists."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free / 1e9
    detail = f"{free:.0f} GB free in {existing}"
    if not os.access(existing, os.W_OK):
        return Finding("disk", "missing", f"{existing} cannot be written to", "choose another folder: --results FOLDER")
    if free < MIN_FREE_GB:
        return Finding("disk", "warning", detail, "make room, or choose another folder: --results FOLDER")
    return Finding("disk", "ok", detail)


def check_memory() -> Finding:
    """Check the memory; the detail gives the number of processor cores as well."""
    import psutil

    memory = psutil.virtual_memory()
    total, free = memory.total / 1e9, memory.available / 1e9
    detail = f"{total:.0f} GB, {free:.0f} GB of it free; {available_cores()} processor cores"
    if total < MIN_MEMORY_GB:
        return Finding("memory", "warning", detail, f"{MIN_MEMORY_GB:.0f} GB are needed")
    return Finding("memory", "ok", detail)


def examine(model: Path, results: Path) -> list[Finding]:
    """Run every check.

    Parameters
    ----------
    model : pathlib.Path
        Model package.
    results : pathlib.Path
        Folder for results, which need not exist.

    Returns
    -------
    list of Finding
        The findings; a failed check does not prevent the others.
    """
    checks: list[tuple[str, Callable[[], Finding | list[Finding]]]] = [
        ("python", check_python),
        ("openslide", lambda: check_reader("openslide", "openslide-python", _openslide)),
        ("tiffslide", lambda: check_reader("tiffslide", "tiffslide", _tiffslide)),
        ("torch", check_torch),
        ("stain extractors", check_stain),
        ("libraries", check_packages),
        ("snakemake", check_snakemake),
        ("model", lambda: check_package(model)),
        ("disk", lambda: check_disk(results)),
        ("memory", check_memory),
    ]
    findings: list[Finding] = []
    for name, check in checks:
        try:
            found = check()
        except Exception as error:  # a check that fails to run is a finding as well
            found = Finding(name, "missing", _first_line(error), SETUP)
        findings += found if isinstance(found, list) else [found]
    return findings


def report(findings: list[Finding]) -> str:
    """Format findings as lines of text, followed by advice for those that are not ok."""
    marks = {"ok": "ok     ", "warning": "warning", "missing": "MISSING"}
    width = max(len(finding.name) for finding in findings)
    lines = [f"{marks[f.state]}  {f.name:<{width}}  {f.detail}" for f in findings]
    wrong = [f for f in findings if f.state != "ok"]
    lines += [""] + (
        [f"{f.name}: {f.advice}" for f in wrong] if wrong else [f"nucleus-pipeline {__version__}: all well"]
    )
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``python -m pipeline doctor``."""
    parser.add_argument(
        "--model", type=Path, default=Path("models/default"), metavar="FOLDER", help="model package to check"
    )
    parser.add_argument(
        "--results", type=Path, default=Path("results"), metavar="FOLDER", help="where results will be written"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def main(args: argparse.Namespace) -> int:
    """Print the findings; 1 when something needed is missing."""
    findings = examine(args.model, args.results)
    missing = [finding for finding in findings if finding.state == "missing"]
    if args.json:
        value: dict[str, Any] = {
            "version": __version__,
            "well": not missing,
            "findings": [asdict(finding) for finding in findings],
        }
        print(json.dumps(value, indent=1, ensure_ascii=False))
    else:
        print(report(findings))
    return 1 if missing else 0
