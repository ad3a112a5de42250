"""The one place that knows the file names of a run.

Imported while Snakemake parses the workflow, so it depends on the standard library alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

STAGES = ("inspect", "tissue", "tiles", "stain", "infer", "instances", "measure", "export", "summary")
"""Per-slide stages in the order in which they run."""

OPTIONAL_STAGES = ("labels", "classify", "regions")
"""Further ones, which run where the settings or the slide table ask for them. No stage above waits for them."""


def folder_name(slide: str) -> str:
    """Name of a slide's results folder: the slide's own, but for braces and angle brackets.

    Snakemake would read ``{b}`` as a wildcard and ``<b>`` as a path variable.

    >>> folder_name("T23, H&E (2)"), folder_name("a{b}<c>")
    ('T23, H&E (2)', 'a%7Bb%7D%3Cc%3E')
    """
    return slide.replace("{", "%7B").replace("}", "%7D").replace("<", "%3C").replace(">", "%3E")


class _File:
    """A file of a slide's results folder."""

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
        """Store of one part of a stage of a huge slide, `part` being ``1-of-4``; its manifest ends in ``.json``."""
        return self.root / "parts" / f"{stage}-{part}.zarr"

    def parts(self) -> list[Path]:
        """The stores of parts that are there; those that are being written are not."""
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
        """The slides of the run as they were resolved from the configuration (tsv)."""
        return self.results / "slides.tsv"

    @property
    def settings(self) -> Path:
        """The settings of the run (JSON)."""
        return self.results / "settings.json"

    @property
    def damaged(self) -> Path:
        """Damaged stores that stages of the last run have removed, a line each; not there where there were none."""
        return self.results / ".damaged"

    @property
    def unreadable(self) -> Path:
        """Slides that could not be read when the last run started, a line each."""
        return self.results / ".unreadable"

    def training(self, name: str) -> Path:
        """Folder for checkpoints, logs and scores of training the model `name`."""
        return self.results / "training" / name

    def training_settings(self, name: str) -> Path:
        """The settings of that training (JSON)."""
        return self.results / "training" / f"{name}.json"

    def synthesis(self, name: str) -> Path:
        """Folder of the synthetic fields `name` (``fields``) and of what learns to paint them."""
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
