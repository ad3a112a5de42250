"""The container image: what `.dockerignore` lets into it is enough for a run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from runs import ROOT, read_json, write_slide

pytestmark = [pytest.mark.workflow, pytest.mark.timeout(1800)]


def _kept() -> list[str]:
    """Names that `.dockerignore` lets through."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in lines  # nothing else is let through
    return [line[1:] for line in lines if line.startswith("!")]


def test_what_is_in_the_image_runs_a_slide(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.mkdir()
    for name in _kept():
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, image / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, image / name)
    work = tmp_path / "work"
    (work / "slides").mkdir(parents=True)
    write_slide(work / "slides" / "a.svs", seed=3, size=(320, 256))
    settings = ["--config", "slides=slides", "model=models/hematoxylin"]
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", "--snakefile", image / "Snakefile", "--cores", "2", *settings],
        cwd=work,
        env=os.environ | {"PYTHONPATH": str(image)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1700,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert read_json(work / "results" / "slides" / "a" / "metrics.json")["nuclei"] > 0
    assert (work / "results" / "report.html").is_file()
