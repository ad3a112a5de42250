"""Paths of all files of a run. No other module knows their names.

Imported while Snakemake parses the workflow, so it depends only on the standard library.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

STAGES = ("inspect", "tissue", "tiles", "stain", "infer", "instances", "measure", "export", "summary")
"""Per-slide stages in the order in which they run."""

OPTIONAL_STAGES = ("labels", "classify", "regions")
"""Per-slide stages that run only if the settings or the slide table ask for them. None of `STAGES` waits for them."""


_ESCAPED = frozenset("{}<>,'\"\\$`%")


def folder_name(slide: str) -> str:
    """Name of a slide's results folder: the slide's own name, with some characters as ``~`` and their code.

    - Snakemake would read ``{b}`` as a wildcard and ``<b>`` as a path variable.
    - On a cluster, it passes the name to the job's own Snakemake on a command line. There it splits names at commas,
      strips quotes, and quotes as Python does and not the shell: quotes, backslashes, ``$``, backticks and characters
      that cannot be printed would arrive changed, or be run as a command.
    - SLURM replaces ``%j`` and the like in the path of a job's log.

    >>> folder_name("T23 H&E (2)"), folder_name("a{b}<c>"), folder_name("patient 7, block A")
    ('T23 H&E (2)', 'a~7Bb~7D~3Cc~3E', 'patient 7~2C block A')
    """
    return "".join(f"~{ord(c):02X}" if c in _ESCAPED or not c.isprintable() else c for c in slide)


class _File:
    """Descriptor of a file in a slide's results folder; on a layout it gives the file's path."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, layout: SlideLayout, owner: type[SlideLayout]) -> Path:
        return layout.root / self.name


@dataclass(frozen=True)
class SlideLayout:
    """Paths of one slide's results.

    Parameters
    ----------
    root : pathlib.Path
        ``{results}/slides/{slide}``.
    """

    root: Path

    inspect = _File("slide.json")
    tissue = _File("tissue.json")
    tissue_geojson = _File("tissue.geojson")
    tissue_png = _File("tissue.png")
    tiles = _File("tiles.json")
    tiles_zarr = _File("tiles.zarr")
    stain = _File("stain.json")
    stain_png = _File("stain.png")
    maps = _File("maps.json")
    maps_zarr = _File("maps.zarr")
    instances = _File("instances.json")
    instances_parquet = _File("instances.parquet")
    measure = _File("measure.json")
    nuclei = _File("nuclei.parquet")
    export = _File("export.json")
    nuclei_geojson = _File("nuclei.geojson.gz")
    labels = _File("labels.json")
    labels_zarr = _File("nuclei.ome.zarr")
    classify = _File("classify.json")
    classified = _File("classified.parquet")
    classified_geojson = _File("classified.geojson.gz")
    classified_png = _File("classified.png")
    regions = _File("regions.json")
    regions_png = _File("regions.png")
    metrics = _File("metrics.json")
    overview = _File("overview.png")

    def part(self, stage: str, part: str) -> Path:
        """Store of one part of a stage of a huge slide; `part` is such as ``1-of-4``. Its manifest adds ``.json``."""
        return self.root / "parts" / f"{stage}-{part}.zarr"

    def parts(self) -> list[Path]:
        """Stores of parts that exist, without those that are still being written."""
        return sorted(self.root.glob("parts/[!.]*.zarr"))


@dataclass(frozen=True)
class RunLayout:
    """Paths of one run.

    Parameters
    ----------
    results : pathlib.Path
        The results folder.
    """

    results: Path

    def slide(self, name: str) -> SlideLayout:
        """Paths of the slide called `name`."""
        return self.folder(folder_name(name))

    def folder(self, folder: str) -> SlideLayout:
        """Paths of the slide whose results folder is called `folder`, which may be a pattern."""
        return SlideLayout(self.results / "slides" / folder)

    def log(self, stage: str, folder: str) -> Path:
        """Log file of one stage of the slide whose results folder is called `folder`."""
        return self.results / "logs" / stage / f"{folder}.log"

    def benchmark(self, stage: str, folder: str) -> Path:
        """Snakemake benchmark table of one stage of the slide whose results folder is called `folder`."""
        return self.results / "benchmarks" / stage / f"{folder}.tsv"

    @property
    def slide_table(self) -> Path:
        """Table of the run's slides, as resolved from the setting ``slides`` (tsv)."""
        return self.results / "slides.tsv"

    @property
    def settings(self) -> Path:
        """The settings of the run (JSON)."""
        return self.results / "settings.json"

    @property
    def damaged(self) -> Path:
        """List of the damaged stores that stages of the last run have removed, one per line; missing if none were."""
        return self.results / ".damaged"

    @property
    def unreadable(self) -> Path:
        """List of the slides that could not be read when the last run started, one per line."""
        return self.results / ".unreadable"

    def training(self, name: str) -> Path:
        """Folder for checkpoints, logs and scores of the training `name`."""
        return self.results / "training" / name

    def training_settings(self, name: str) -> Path:
        """Settings of the training `name` (JSON)."""
        return self.results / "training" / f"{name}.json"

    def synthesis(self, name: str) -> Path:
        """Folder of the synthetic fields `name` (in ``fields``) and of the training of the network that paints them."""
        return self.results / "synthesis" / name

    @property
    def cohort_tsv(self) -> Path:
        return self.results / "cohort.tsv"

    @property
    def cohort_parquet(self) -> Path:
        return self.results / "cohort.parquet"

    @property
    def regions_tsv(self) -> Path:
        return self.results / "regions.tsv"

    @property
    def regions_parquet(self) -> Path:
        return self.results / "regions.parquet"

    @property
    def failed(self) -> Path:
        return self.results / "failed.tsv"

    @property
    def report(self) -> Path:
        return self.results / "report.html"

    @property
    def manifest(self) -> Path:
        return self.results / "manifest.json"
