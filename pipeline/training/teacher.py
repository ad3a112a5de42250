"""Knowledge distillation: the maps of a trained model, the teacher, become part of what a smaller network learns.

Annotations are drawn by hand and vary; a larger network's maps show how certain a border is. They are made once per
field and mixed into its targets, so they are warped along with the image and add no cost during training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from torch import nn

from pipeline.models.package import ModelPackage
from pipeline.models.weights import load_network
from pipeline.networks.outputs import Outputs
from pipeline.prediction.predictors import channel_names
from pipeline.training.field import Field, at_mpp
from pipeline.training.predict import predict_field
from pipeline.training.reference import normalise

TAUGHT = ("nucleus", "distance", "contour")
"""Maps that a teacher contributes to. Classes, and h and v, which cannot be warped, come from the annotations alone."""


@dataclass(frozen=True, eq=False)
class Teacher:
    """A trained model that acts as a teacher.

    Parameters
    ----------
    package : ModelPackage
        The model.
    network : torch.nn.Module
        Network of the model.
    device : str
        Device that the network runs on.
    """

    package: ModelPackage
    network: nn.Module
    device: str

    @classmethod
    def of(cls, package: ModelPackage, accelerator: str) -> Teacher:
        """Load a model for the device that `accelerator` names (``auto``, ``cpu`` or ``gpu``)."""
        device = "cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu"
        return cls(package, load_network(package).to(device), device)

    def maps(self, field: Field) -> dict[str, np.ndarray]:
        """Predict the maps of a field, by name: float32 ``(H, W)`` at the field's own size, in [0, 1]."""
        one = self.package
        image = at_mpp(field.image, field.mpp, one.mpp)
        stain: Mapping[str, Any] = one.stain
        version = normalise(image, stain["method"], stain["reference"], float(stain.get("strength", 1)))
        names = channel_names(one)
        found = predict_field(
            self.network, image if version is None else version, Outputs(names, one.tta), (one.patch, one.overlap)
        )
        height, width = field.labels.shape
        return {
            name: cv2.resize(values.astype(np.float32) / 255, (width, height), interpolation=cv2.INTER_LINEAR)
            for name, values in zip(names, found, strict=True)
            if name in TAUGHT
        }
