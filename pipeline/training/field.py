"""An annotated field, what every kind of training data becomes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import cv2
import numpy as np

from pipeline.errors import PipelineError

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
    cohort : str
        Which of several collections in its data set it is from, or an empty string.
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
    """An image or maps ``(H, W, ...)`` of pixels of `mpp` µm at another pixel size."""
    factor = mpp / wanted
    size = (max(1, round(image.shape[1] * factor)), max(1, round(image.shape[0] * factor)))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR)


def guess_mpp(labels: np.ndarray) -> float | None:
    """Pixel size at which the median nucleus of a label map has a typical area, within 0.15 to 0.6 µm; None without."""
    areas = np.bincount(labels.ravel())[1:]
    areas = areas[areas > 0]
    if areas.size == 0:
        return None
    return float(np.clip(math.sqrt(TYPICAL_NUCLEUS_UM2 / np.median(areas)), 0.15, 0.6))
