"""Annotated fields from the data sets that the pipeline knows."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from pipeline.errors import PipelineError
from pipeline.training.annotations import rasterise, read_imagescope_xml

log = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".tif", ".tiff", ".png", ".jpg", ".jpeg")

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

TYPICAL_NUCLEUS_UM2 = 32.0
"""Median nuclear area by which the pixel size of a field without one is guessed."""


@dataclass(frozen=True, eq=False)
class Field:
    """An annotated field.

    Parameters
    ----------
    name : str
        Unique within a training set.
    source : str
        The data set it belongs to.
    patient : str
        Fields of one patient never stand on both sides of a split.
    organ : str
        Organ, or an empty string.
    mpp : float
        Pixel size in µm.
    image : numpy.ndarray
        uint8 ``(H, W, 3)`` RGB.
    labels : numpy.ndarray
        int32 ``(H, W)``, 0 is background.
    types : numpy.ndarray, optional
        uint8 ``(H, W)``, the class of each nucleus on its pixels: ``classes[i - 1]`` for ``i``; 0 is background, or a
        nucleus of unknown class.
    classes : tuple of str
        Names of the classes of `types`.
    """

    name: str
    source: str
    patient: str
    organ: str
    mpp: float
    image: np.ndarray = field(repr=False)
    labels: np.ndarray = field(repr=False)
    types: np.ndarray | None = field(default=None, repr=False)
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.image.shape != (*self.labels.shape, 3):
            raise PipelineError(
                f"field {self.name}: the image is {self.image.shape[:2]}, its labels {self.labels.shape}",
                "give a label map of the image's size",
            )
        if self.types is not None:
            if self.types.shape != self.labels.shape:
                raise PipelineError(
                    f"field {self.name}: the class map is {self.types.shape}, its labels {self.labels.shape}",
                    "give a class map of the image's size",
                )
            if int(self.types.max(initial=0)) > len(self.classes):
                raise PipelineError(
                    f"field {self.name}: class {int(self.types.max())} has no name, there are {len(self.classes)}",
                    "give every class a name",
                )
        if not (math.isfinite(self.mpp) and 0.05 <= self.mpp <= 5):
            raise PipelineError(f"field {self.name}: mpp {self.mpp} is no pixel size in µm", "set the source's mpp")


def read_image(path: Path) -> np.ndarray:
    """Read an RGB image, uint8 ``(H, W, 3)``.

    Raises
    ------
    PipelineError
        When it cannot be read.
    """
    image = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if image is None:
        raise PipelineError(f"image {path} cannot be read", "give a PNG, JPEG or TIFF image")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def read_labels(path: Path) -> np.ndarray:
    """Read a label map image (8 or 16 bit, one channel) as int32 ``(H, W)``.

    Raises
    ------
    PipelineError
        When it cannot be read or has several channels.
    """
    labels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    if labels is None or labels.ndim != 2:
        raise PipelineError(f"label map {path} cannot be read", "give a PNG or TIFF with one channel")
    return labels.astype(np.int32)


def guess_mpp(labels: np.ndarray) -> float:
    """Pixel size at which the median nucleus of a label map has a typical area, within 0.15 to 0.6 µm."""
    areas = np.bincount(labels.ravel())[1:]
    areas = areas[areas > 0]
    if areas.size == 0:
        return 0.25
    return float(np.clip(math.sqrt(TYPICAL_NUCLEUS_UM2 / np.median(areas)), 0.15, 0.6))


def _images(folder: Path) -> list[Path]:
    found = sorted(p for p in folder.glob("*") if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith("."))
    if not found:
        raise PipelineError(f"no images in {folder}", "check the path of the data source")
    return found


def _beside(folder: Path, stem: str, suffixes: tuple[str, ...]) -> Path | None:
    return next((p for p in (folder / f"{stem}{s}" for s in suffixes) if p.is_file()), None)


def _monuseg(root: Path, mpp: float | None) -> Iterator[Field]:
    organs = {patient: organ for organ, patients in MONUSEG_ORGANS.items() for patient in patients}
    for path in _images(root / "images"):
        image = read_image(path)
        xml = _beside(root / "annotations", path.stem, (".xml",))
        label_map = _beside(root / "labels", path.stem, (".png", ".tif"))
        if label_map is not None:
            labels = read_labels(label_map)
        elif xml is not None:
            labels, report = rasterise(read_imagescope_xml(xml), image.shape[:2])
            log.info("%s: %s", xml.name, report)
        else:
            raise PipelineError(f"{path.name} has neither an XML nor a label map", "complete the data folder")
        patient = "-".join(path.stem.split("-")[1:3])
        yield Field(path.stem, "monuseg", patient, organs.get(patient, ""), mpp or 0.25, image, labels)


def _components(mask: np.ndarray) -> np.ndarray:
    return np.asarray(cv2.connectedComponents((mask > 0).astype(np.uint8), connectivity=4)[1], np.int32)


def _tnbc(root: Path, mpp: float | None) -> Iterator[Field]:
    for path in _images(root / "images"):
        mask = _beside(root / "annotations", path.stem, (".png",))
        if mask is None:
            raise PipelineError(f"{path.name} has no mask", "complete the data folder")
        patient = path.stem.split("_")[0]
        yield Field(
            f"tnbc-{path.stem}", "tnbc", f"tnbc-{patient}", "breast", mpp or 0.25, read_image(path),
            _components(read_labels(mask)),
        )  # fmt: skip


def _label_maps(root: Path, mpp: float | None, source: str = "labels") -> Iterator[Field]:
    folder = next((root / name for name in ("labels", "annotations") if (root / name).is_dir()), root / "labels")
    for path in _images(root / "images"):
        label_map = _beside(folder, path.stem, (".png", ".tif", ".tiff"))
        if label_map is None:
            raise PipelineError(f"{path.name} has no label map in {folder}", "complete the data folder")
        labels = read_labels(label_map)
        name = path.stem[:40]
        yield Field(
            f"{source}-{name}", source, f"{source}-{name}", "", mpp or guess_mpp(labels), read_image(path), labels
        )


def _dsb2018(root: Path, mpp: float | None) -> Iterator[Field]:
    return _label_maps(root, mpp, "dsb2018")


IMPORTERS: dict[str, Callable[[Path, float | None], Iterator[Field]]] = {
    "monuseg": _monuseg,
    "tnbc": _tnbc,
    "dsb2018": _dsb2018,
    "labels": _label_maps,
}
"""Importers by the name used in the ``train.data`` setting."""


def source_name(source: dict[str, Any]) -> str:
    """Name of a data source: its own, or its kind."""
    return str(source.get("name", source["kind"]))


def load_fields(sources: list[dict[str, Any]]) -> list[Field]:
    """Read the annotated fields of all data sources.

    Parameters
    ----------
    sources : list of dict
        Each with ``kind`` (a key of `IMPORTERS`), ``path``, and optionally ``name`` (of the source; its kind without
        one), ``mpp`` (µm) and ``mpp_of`` (µm by the start of a field's name, for fields that differ from the rest).

    Raises
    ------
    PipelineError
        When a source is unknown, missing, empty or half there.
    """
    fields: list[Field] = []
    names = [source_name(source) for source in sources]
    if len(set(names)) != len(names):
        raise PipelineError(f"two data sources are called {max(names, key=names.count)!r}", "give each a name")
    for source in sources:
        kind, root = source["kind"], Path(source["path"]).expanduser()
        if kind not in IMPORTERS:
            raise PipelineError(f"unknown kind of training data {kind!r}", f"choose from {', '.join(IMPORTERS)}")
        if not (root / "images").is_dir():
            raise PipelineError(f"{root / 'images'} is no folder", f"set the path of the {kind} data source")
        overrides = source.get("mpp_of") or {}
        for one in IMPORTERS[kind](root, source.get("mpp")):
            own = next((mpp for start, mpp in overrides.items() if one.name.startswith(start)), one.mpp)
            fields.append(replace(one, source=source_name(source), mpp=float(own)))
    if not any(f.labels.any() for f in fields):
        raise PipelineError("the training data hold no nucleus", "check the annotations")
    log.info("%d fields, %d nuclei", len(fields), sum(len(np.unique(f.labels)) - 1 for f in fields))
    return fields
