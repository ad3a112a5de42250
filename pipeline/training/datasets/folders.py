"""Importers of images with label maps, masks or outlines in files of the same name.

MoNuSeg, TNBC, Data Science Bowl, NuInsSeg, and a user's own data.
"""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

from pipeline.errors import PipelineError
from pipeline.exchange.label_maps import SUFFIXES as LABEL_SUFFIXES
from pipeline.exchange.label_maps import read_label_map
from pipeline.training.annotations import rasterise, read_imagescope_xml
from pipeline.training.datasets.source import (
    Lazy,
    Source,
    beside,
    components,
    images_in,
    read_image,
    read_labels,
    tcga_patient,
)
from pipeline.training.field import Field
from pipeline.training.origin import read_origin

log = logging.getLogger(__name__)

MONUSEG_ORGANS = {
    "breast": ("A7-A13E", "A7-A13F", "AR-A1AK", "AR-A1AS", "E2-A14V", "E2-A1B5"),
    "kidney": ("B0-5698", "B0-5710", "B0-5711", "HE-7128", "HE-7129", "HE-7130"),
    "liver": ("18-5592", "21-5784", "21-5786", "38-6178", "49-4488", "50-5931"),
    "prostate": ("CH-5767", "G9-6336", "G9-6348", "G9-6356", "G9-6362", "G9-6363"),
    "bladder": ("DK-A2I6", "G2-A2EK"),
    "colon": ("AY-A8YK", "NH-A8F7"),
    "stomach": ("KB-A93J", "RD-A8N9"),
}
"""Organ of each MoNuSeg 2018 training patient (Kumar et al., IEEE TMI 2017)."""

_ORGAN_OF = {patient: organ for organ, patients in MONUSEG_ORGANS.items() for patient in patients}


def monuseg(source: Source) -> list[Lazy]:
    """List the fields of MoNuSeg: ``images/`` with label maps ``labels/STEM.*`` or ImageScope ``annotations/STEM.xml``.

    A field that has both is read from its label map.
    """
    return [partial(_monuseg_field, source, path) for path in images_in(source.path / "images")]


def _monuseg_field(source: Source, path: Path) -> Field:
    image = read_image(path)
    label_map = beside(source.path / "labels", path.stem, LABEL_SUFFIXES)
    xml = beside(source.path / "annotations", path.stem, (".xml",))
    if label_map is not None:
        labels = read_labels(label_map)
    elif xml is not None:
        labels, report = rasterise(read_imagescope_xml(xml), image.shape[:2])
        log.info("%s: %s", xml.name, report)
    else:
        raise PipelineError(f"{path.name} has neither an XML nor a label map", "complete the data folder")
    patient = tcga_patient(path.stem)
    organ = _ORGAN_OF.get(patient or "", "")
    return source.field(path.stem, image, labels, name=path.stem, patient=patient, organ=organ, mpp=0.25)


def tnbc(source: Source) -> list[Lazy]:
    """List the fields of TNBC: ``images/PATIENT_N.png`` with masks ``annotations/PATIENT_N.png``.

    The connected parts of a mask are nuclei.
    """
    return [partial(_tnbc_field, source, path) for path in images_in(source.path / "images")]


def _tnbc_field(source: Source, path: Path) -> Field:
    mask = beside(source.path / "annotations", path.stem, (".png",))
    if mask is None:
        raise PipelineError(f"{path.name} has no mask", "complete the data folder")
    patient = f"{source.name}-{path.stem.split('_')[0]}"
    labels = components(read_label_map(mask))
    return source.field(path.stem, read_image(path), labels, patient=patient, organ="breast", mpp=0.25)


def label_maps(source: Source) -> list[Lazy]:
    """List fields of ``images/`` with label maps of the same stems in ``labels/`` or ``annotations/``."""
    folder = next((f for f in (source.path / n for n in ("labels", "annotations")) if f.is_dir()), None)
    images = images_in(source.path / "images")
    if folder is None:
        raise PipelineError(f"{source.path} has neither labels nor annotations", "complete the data folder")
    return [partial(_label_map_field, source, path, folder) for path in images]


def _label_map_field(source: Source, path: Path, folder: Path) -> Field:
    label_map = beside(folder, path.stem, LABEL_SUFFIXES)
    if label_map is None:
        raise PipelineError(f"{path.name} has no label map in {folder}", "complete the data folder")
    made_at = read_origin(source.path).get("mpp")
    return source.field(path.stem, read_image(path), read_labels(label_map), mpp=made_at)


def nuinsseg(source: Source) -> list[Lazy]:
    """List the fields of NuInsSeg.

    Images are ``ORGAN/tissue images/STEM.png``, label maps ``ORGAN/label masks modify/STEM.tif`` (or ``label masks``).
    NuInsSeg does not name patients, so all fields of one organ of one species count as one patient.
    """
    folders = sorted(p for p in source.path.iterdir() if (p / "tissue images").is_dir())
    if not folders:
        raise PipelineError(f"{source.path} has no folder ORGAN/tissue images", "check the path of the data source")
    return [
        partial(_nuinsseg_field, source, path, folder)
        for folder in folders
        for path in images_in(folder / "tissue images")
    ]


def _nuinsseg_field(source: Source, path: Path, folder: Path) -> Field:
    candidates = (beside(folder / name, path.stem, LABEL_SUFFIXES) for name in ("label masks modify", "label masks"))
    label_map = next((found for found in candidates if found is not None), None)
    if label_map is None:
        raise PipelineError(f"{folder.name}: {path.name} has no label mask", "complete the data folder")
    labels = read_labels(label_map)
    organ = folder.name.removeprefix("human ").removeprefix("mouse ")
    patient = f"{source.name}-{folder.name}"
    return source.field(path.stem, read_image(path), labels, patient=patient, organ=organ)
