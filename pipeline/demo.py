"""Commands ``demo-slides`` and ``demo-table``: write synthetic slides with known nuclei, and show a run's results."""

from __future__ import annotations

import argparse
import csv
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.cohort import gather
from pipeline.errors import PipelineError
from pipeline.layout import RunLayout

SMALLEST, LARGEST = 0.1, 20.0
"""Range of the factor on the sides of the demo slides."""


@dataclass(frozen=True)
class DemoSlide:
    """A demo slide.

    Parameters
    ----------
    file : str
        File name; its ending determines the format.
    width, height : int
        Size in pixels.
    mpp : float
        µm per pixel.
    stain : str
        A key of `pipeline.slides.synthetic.STAINS`.
    seed : int
        Seed of the synthetic tissue.
    """

    file: str
    width: int
    height: int
    mpp: float
    stain: str
    seed: int

    @property
    def name(self) -> str:
        """Name of the slide."""
        return self.file.split(".")[0]


SLIDES = (
    DemoSlide("demo-1.svs", 3000, 2400, 0.25, "classic", 11),
    DemoSlide("demo 2.tiff", 1800, 1500, 0.5, "rose", 12),
    DemoSlide("demo-3.ome.tiff", 2000, 1600, 0.37, "violet", 13),
)
"""One slide of each format, with different stains, sizes and pixel sizes; one name contains a space."""


def write_demo_slides(folder: Path, size: float = 1.0) -> Path:
    """Write the demo slides, their known nuclei and their slide table.

    Parameters
    ----------
    folder : pathlib.Path
        Folder to write to; created if it does not exist.
    size : float
        Factor on the sides of the slides.

    Returns
    -------
    pathlib.Path
        The slide table.

    Raises
    ------
    PipelineError
        When `size` is out of range.
    """
    from pipeline.slides import synthetic

    if not SMALLEST <= size <= LARGEST:
        raise PipelineError(f"--size must be within {SMALLEST} and {LARGEST:g}, got {size}")
    writers = {".svs": synthetic.write_svs, ".tiff": synthetic.write_tiff, ".ome.tiff": synthetic.write_ome_tiff}
    (folder / "truth").mkdir(parents=True, exist_ok=True)
    rows = []
    for slide in SLIDES:
        rgb, labels = synthetic.make_field(
            round(slide.width * size), round(slide.height * size), slide.mpp, slide.seed, stain=slide.stain
        )
        truth = Path("truth", f"{slide.name}.geojson.gz")
        with tempfile.TemporaryDirectory(prefix=".part-", dir=folder) as beside:
            staged = Path(beside, slide.file)  # under its final name, which some formats store in the file
            writers[slide.file.removeprefix(slide.name)](staged, rgb, slide.mpp)
            staged.rename(folder / slide.file)
        (folder / truth).write_bytes(synthetic.truth_geojson(labels, name=slide.name))
        rows.append((slide.name, slide.file, truth.as_posix()))
    table = folder / "slides.tsv"
    with table.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, delimiter="\t", lineterminator="\n")
        writer.writerows([("slide", "path", "truth"), *rows])
    return table


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Format rows of cells as text in columns: the first column is left-aligned, the others are right-aligned.

    >>> print(aligned([("slide", "n"), ("a", "12")]))
    slide   n
    a      12
    """
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    lines = []
    for row in rows:
        first, *others = (
            text.rjust(width) if index else text.ljust(width)
            for index, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join([first, *others]).rstrip())
    return "\n".join(lines)


def _cells(metrics: dict[str, Any]) -> tuple[str, ...]:
    density, scores = metrics["nuclei_per_mm2"], metrics.get("evaluation")
    return (
        f"{metrics['tissue_mm2']:.3f}",
        f"{metrics['nuclei']}",
        "-" if density is None else f"{density:.0f}",
        f"{scores['f1']:.3f}" if scores else "-",
        f"{metrics['total_seconds']:.1f}",
    )


def results_table(results: Path) -> str:
    """Format the results of a run as text: one line per slide, then failures and the location of the results.

    Parameters
    ----------
    results : pathlib.Path
        The results folder.

    Returns
    -------
    str
        The text. Columns: slide, tissue mm², nuclei, nuclei/mm², F1 against the known nuclei, seconds of all stages.

    Raises
    ------
    PipelineError
        When there is no run in the folder.
    """
    layout = RunLayout(results)
    if not layout.slide_table.exists():
        raise PipelineError(f"{str(results)!r} holds no results", "run snakemake first")
    cohort = gather(results, layout.slide_table)
    good = {row["slide"]: row for row in cohort.good}
    rows = [("slide", "tissue mm²", "nuclei", "nuclei/mm²", "F1", "seconds")]
    rows += [(name, *(_cells(good[name]) if name in good else ["-"] * 5)) for name in cohort.table.entries]
    notes = [f"{item['slide']}: failed at {item['stage']}: {item['reason']}" for item in cohort.failed]
    where = f"results: {os.path.abspath(results)}   report: {os.path.abspath(layout.report)}"
    return "\n".join([aligned(rows), *notes, where])


def add_slides_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``python -m pipeline demo-slides``."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="where to write the slides")
    parser.add_argument(
        "--size", type=float, default=1.0, metavar="FACTOR", help="factor on the sides of the slides (default: 1)"
    )


def main_slides(args: argparse.Namespace) -> int:
    """Run ``python -m pipeline demo-slides``."""
    print(write_demo_slides(args.folder, args.size))
    return 0


def add_table_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``python -m pipeline demo-table``."""
    parser.add_argument("results", type=Path, metavar="RESULTS", help="results folder of a finished run")


def main_table(args: argparse.Namespace) -> int:
    """Run ``python -m pipeline demo-table``."""
    print(results_table(args.results))
    return 0
