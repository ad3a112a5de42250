"""Stage ``classify``: assign a class to each nucleus with a classifier. It runs if the settings name a classifier.

The stage only reads measurements, so with another classifier the earlier stages of a run are not repeated.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.batch.stage import add_origin_argument, add_stage_arguments, keywords, read_manifest, run_stage
from pipeline.errors import PipelineError
from pipeline.exchange.geojson import origin_of
from pipeline.export import write_geojson
from pipeline.machine.allocator import keep_freed_memory
from pipeline.models.classifier import Classifier, Measured
from pipeline.progress import Progress

log = logging.getLogger(__name__)

BATCH_ROWS = 16_384
"""Nuclei whose features are in memory at once: some 20 MB, including the products of features."""


def write_classified(nuclei: Path, classifier: Classifier, out: Path) -> int:
    """Write a copy of a table of nuclei with classes assigned by a classifier.

    Parameters
    ----------
    nuclei : pathlib.Path
        ``nuclei.parquet``.
    classifier : Classifier
        The classifier.
    out : pathlib.Path
        ``classified.parquet`` to write: the same rows with new ``class`` and ``class_id``, and a further column
        ``class_probability``, float32.

    Returns
    -------
    int
        Number of nuclei.

    Raises
    ------
    PipelineError
        When the nuclei are from another model than the classifier was made for.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    from pipeline.stores.nuclei import COMPRESSION, META_KEY, about_nuclei, open_nuclei

    names = pa.array([one.name for one in classifier.classes])
    with open_nuclei(nuclei) as source:
        about = about_nuclei(source.schema_arrow)
        if about["model"]["sha256"] != classifier.model["sha256"]:
            raise PipelineError(
                f"{nuclei} holds nuclei of model {about['model']['name']!r}, the classifier {classifier.name!r} knows "
                f"those of {classifier.model['name']!r}",
                "make it again with nuclei of this model: python -m pipeline classifier",
            )
        about["classes"] = [{"name": one.name, "color": list(one.color)} for one in classifier.classes]
        about["classifier"] = {"name": classifier.name, "sha256": classifier.sha256}
        schema = source.schema_arrow.append(pa.field("class_probability", pa.float32(), nullable=False))
        told = json.dumps(about, sort_keys=True).encode()
        schema = schema.with_metadata({**source.schema_arrow.metadata, META_KEY: told})
        measured = Measured(source.read(columns=list(Measured.COLUMNS)))
        start = 0
        with (
            pq.ParquetWriter(out, schema, **COMPRESSION) as writer,
            Progress(len(measured), "classify", "nuclei") as on,
        ):
            for batch in source.iter_batches(batch_size=BATCH_ROWS):
                rows = np.arange(start, start := start + batch.num_rows)
                found = classifier.probabilities(measured.features(rows))
                kinds = found.argmax(axis=1)
                own = {
                    "class": names.take(pa.array(kinds)),
                    "class_id": pa.array(kinds.astype(np.uint8)),
                    "class_probability": pa.array(found.max(axis=1).astype(np.float32)),
                }
                columns = [own[f.name] if f.name in own else batch.column(f.name) for f in schema]
                writer.write_batch(pa.record_batch(columns, schema=schema))
                on.advance(batch.num_rows)
    return len(measured)


def run_classify(
    slide: str,
    inspect: Path,
    tissue: Path,
    tissue_geojson: Path,
    measure: Path,
    nuclei: Path,
    classifier: Path,
    out: Path,
    parquet: Path,
    geojson: Path,
    png: Path,
    *,
    origin: str = "slide",
    workers: int = 1,
    **how: Any,
) -> dict[str, Any]:
    """Run the stage.

    Parameters
    ----------
    slide : str
        Name of the slide.
    inspect, tissue, tissue_geojson : pathlib.Path
        ``slide.json``, ``tissue.json`` and ``tissue.geojson``.
    measure, nuclei : pathlib.Path
        Outputs of the stage ``measure``.
    classifier : pathlib.Path
        The classifier's file.
    out, parquet, geojson, png : pathlib.Path
        The manifest, ``classified.parquet``, ``classified.geojson.gz`` and ``classified.png`` to write.
    origin : {"slide", "bounds"}
        See `pipeline.exchange.geojson.origin_of`.
    workers : int
        Number of threads that compress.
    **how : Any
        `on_bad_slide`, `minutes` and `again` of `pipeline.batch.stage.run_stage`.

    Returns
    -------
    dict
        The manifest, with ``nuclei`` (count), ``composition`` (count, share, density and colour of each class),
        ``origin`` and ``classifier`` (name and hash).
    """

    def body(staged: dict[str, Path]) -> dict[str, Any]:
        from pipeline.pictures.class_map import draw_classes
        from pipeline.summary import Nuclei
        from pipeline.tissue import read_tissue

        known = Classifier.load(classifier)
        count = write_classified(nuclei, known, staged["parquet"])
        corner = origin_of(read_manifest(inspect), origin)
        write_geojson(staged["parquet"], staged["geojson"], slide, origin=corner, workers=max(1, workers))
        found = Nuclei.open(staged["parquet"])
        composition = found.composition(float(read_manifest(tissue)["area_mm2"]))
        draw_classes(
            staged["png"],
            slide=slide,
            grid=found.grid,
            tissue=read_tissue(tissue_geojson),
            centroids=found.centroids,
            kinds=found.kinds,
            composition=composition,
        )
        told = ", ".join(f"{name} {item['count']}" for name, item in composition.items())
        log.info("slide %r: %d nuclei classified: %s", slide, count, told)
        return {
            "nuclei": count,
            "composition": composition,
            "origin": list(corner),
            "classifier": {"name": known.name, "sha256": known.sha256},
        }

    return run_stage(
        "classify",
        slide,
        manifest=out,
        outputs={"parquet": parquet, "geojson": geojson, "png": png},
        upstream=[inspect, tissue, measure],
        body=body,
        **how,
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``python -m pipeline classify``."""
    add_stage_arguments(parser)
    for name, what in (
        ("inspect", "slide.json"),
        ("tissue", "tissue.json"),
        ("tissue-geojson", "tissue.geojson"),
        ("measure", "measure.json"),
        ("nuclei", "nuclei.parquet"),
        ("classifier", "the classifier"),
        ("out", "manifest to write"),
        ("parquet", "classified.parquet to write"),
        ("geojson", "GeoJSON to write (.geojson.gz)"),
        ("png", "picture to write"),
    ):
        parser.add_argument(f"--{name}", type=Path, required=True, metavar="FILE", help=what)
    add_origin_argument(parser)
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="threads that compress (default: 1)")


def main(args: argparse.Namespace) -> int:
    """Run ``python -m pipeline classify``."""
    keep_freed_memory()
    run_classify(**keywords(args))
    return 0
