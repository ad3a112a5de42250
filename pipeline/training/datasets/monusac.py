"""Importer of MoNuSAC: one folder per patient, each image with an ImageScope XML whose layers are classes."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

import numpy as np

from pipeline.errors import PipelineError
from pipeline.training.annotations import rasterise, read_imagescope_xml
from pipeline.training.datasets.source import IMAGE_SUFFIXES, Lazy, Source, beside, read_image, tcga_patient
from pipeline.training.field import Field

log = logging.getLogger(__name__)

MONUSAC_CLASSES = ("Epithelial", "Lymphocyte", "Macrophage", "Neutrophil")
"""Classes of MoNuSAC (Verma et al., IEEE TMI 40(12), 2021); the layer Ambiguous is left out."""


def monusac(source: Source) -> list[Lazy]:
    """List the fields of MoNuSAC: ``PATIENT/STEM.tif`` with ``PATIENT/STEM.xml``."""
    found = sorted(p for p in source.path.rglob("*.xml") if not p.name.startswith("."))
    if not found:
        raise PipelineError(f"no XML under {source.path}", "check the path of the data source")
    return [partial(_field, source, path) for path in found]


def _field(source: Source, xml: Path) -> Field:
    path = beside(xml.parent, xml.stem, IMAGE_SUFFIXES)
    if path is None:
        raise PipelineError(f"{xml.name} has no image beside it", f"one of {xml.stem}{{{','.join(IMAGE_SUFFIXES)}}}")
    image = read_image(path)
    regions = [one for one in read_imagescope_xml(xml) if one.name.casefold() != "ambiguous"]
    labels, report = rasterise(regions, (image.shape[0], image.shape[1]))
    log.info("%s: %s", xml.name, report)
    known = {name.casefold(): code for code, name in enumerate(MONUSAC_CLASSES, start=1)}
    codes = np.array([0, *(known.get(one.name.casefold(), 0) for one in regions)], np.uint8)
    return source.field(
        xml.stem,
        image,
        labels,
        patient=tcga_patient(xml.stem) or f"{source.name}-{xml.parent.name}",
        mpp=0.25,
        types=codes[labels],
        classes=MONUSAC_CLASSES,
    )
