"""A slide's nuclei against the known ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.evaluation.readers import compare, load


def evaluate_slide(nuclei: Path, truth: Path) -> dict[str, Any]:
    """Scores of a slide, in level-0 pixels.

    Parameters
    ----------
    nuclei : pathlib.Path
        ``nuclei.parquet``.
    truth : pathlib.Path
        Known nuclei: GeoJSON in level-0 pixels, or a label map of level 0.

    Returns
    -------
    dict
        See `pipeline.evaluation.metrics.score`.

    Raises
    ------
    pipeline.errors.PipelineError
        When `truth` cannot be read.
    """
    return compare(load(truth), load(nuclei))
