"""Annotated fields, to which every kind of training data is converted."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import cv2
import numpy as np

from pipeline.errors import PipelineError

TYPICAL_NUCLEUS_UM2 = 32.0
"""Median area of nuclei in µm² that is assumed when the pixel size of a field is guessed."""


@dataclass(frozen=True, eq=False)
class Field:
    """An annotated field.

    Parameters
    ----------
    name : str
        Name, unique within a training set.
    source : str
        Name of the data source that the field belongs to.
    patient : str
        Patient; fields of one patient are never in different parts of a split.
    organ : str
        Organ, or an empty string.
    mpp : float
        Pixel size in µm.
    image : numpy.ndarray
        uint8 ``(H, W, 3)`` RGB.
    labels : numpy.ndarray
        int32 label map ``(H, W)``, 0 is background.
    types : numpy.ndarray, optional
        uint8 class map ``(H, W)``: pixels of a nucleus of class ``classes[i - 1]`` are ``i``; those of the background
        and of nuclei of unknown class are 0.
    classes : tuple of str
        Names of the classes in `types`.
    cohort : str
        Collection that the field is from, in a data set of several collections, or an empty string.
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
    cohort: str = ""

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
            raise PipelineError(f"field {self.name}: mpp {self.mpp} is not a pixel size in µm", "set the source's mpp")


def at_mpp(image: np.ndarray, mpp: float, wanted: float) -> np.ndarray:
    """Resize an image or maps ``(H, W, ...)`` from pixels of `mpp` µm to pixels of `wanted` µm."""
    factor = mpp / wanted
    size = (max(1, round(image.shape[1] * factor)), max(1, round(image.shape[0] * factor)))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR)


def guess_mpp(labels: np.ndarray) -> float | None:
    """Return the pixel size at which the median nucleus of a label map has a typical area, within 0.15 to 0.6 µm.

    None if the label map has no nucleus.
    """
    areas = np.bincount(labels.ravel())[1:]
    areas = areas[areas > 0]
    if areas.size == 0:
        return None
    return float(np.clip(math.sqrt(TYPICAL_NUCLEUS_UM2 / np.median(areas)), 0.15, 0.6))
