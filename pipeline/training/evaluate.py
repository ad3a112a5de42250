"""Evaluation of a trained network on fields that it has not seen."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from pipeline.evaluation.errors import ERRORS
from pipeline.evaluation.means import PIXEL_SCORES, summarise
from pipeline.evaluation.metrics import COUNTS, METRICS
from pipeline.kernels.instances import Channels, InstanceRules
from pipeline.networks.outputs import Outputs
from pipeline.training.data import Field
from pipeline.training.experiment import Experiment
from pipeline.training.field import at_mpp
from pipeline.training.losses import CombinedLoss
from pipeline.training.predict import predict_field
from pipeline.training.reference import normalise
from pipeline.training.samples import prepare_field
from pipeline.training.scoring import batchwise_scores, field_loss, score_maps, type_scores
from pipeline.training.targets import Targets, class_map

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Evaluator:
    """Predicts fields with networks and scores them, with the settings of an experiment.

    Parameters
    ----------
    experiment : Experiment
        The experiment.
    spec : Targets
        Heads and classes of the networks.
    outputs : Outputs
        Maps that the networks' logits stand for, and test-time augmentation.
    reference : dict
        Stain reference of the model.
    loss : CombinedLoss
        Loss of the training.
    accelerator : str
        ``auto``, ``cpu`` or ``gpu``.
    """

    experiment: Experiment
    spec: Targets
    outputs: Outputs
    reference: dict[str, Any]
    loss: CombinedLoss
    accelerator: str = "auto"

    @property
    def channels(self) -> Channels:
        """Positions of the maps in their stack."""
        return Channels.of(self.outputs.names)

    @property
    def window(self) -> tuple[int, int] | None:
        """Side and overlap of the prediction windows, or None to predict a field in one pass."""
        one = self.experiment
        return (one.patch, one.overlap) if one.evaluation.windows else None

    def normalised(self, image: np.ndarray) -> np.ndarray:
        """Normalise the stain of an image, at the model's pixel size, as inference does."""
        version = normalise(image, self.experiment.stain, self.reference, self.experiment.stain_strength)
        return image if version is None else version

    def maps(self, network: nn.Module, fields: Sequence[Field]) -> list[np.ndarray]:
        """Return the maps of each field as inference makes them, uint8 ``(C, H, W)`` at the model's pixel size."""
        device = "cuda" if self.accelerator != "cpu" and torch.cuda.is_available() else "cpu"
        network.to(device)
        found = []
        for one in fields:
            image = self.normalised(at_mpp(one.image, one.mpp, self.experiment.mpp))
            found.append(predict_field(network, image, self.outputs, self.window))
        network.cpu()
        return found

    def score(
        self, network: nn.Module, fields: Sequence[Field], rules: InstanceRules
    ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Predict and score fields.

        Returns
        -------
        scores : dict
            Scores of each field (``images``) with their means and intervals, scores over batches of patches
            (``batchwise``), and the thresholds (``rules``).
        found : dict of str to numpy.ndarray
            Label map of the nuclei found, int32 ``(H, W)``, by name of the field.
        """
        images: dict[str, Any] = {}
        found: dict[str, np.ndarray] = {}
        maps = self.maps(network, fields)
        for one, values in zip(fields, maps, strict=True):
            scored = score_maps(values, one, rules, self.channels)
            row = {name: round(float(scored.scores[name]), 4) for name in (*METRICS, *PIXEL_SCORES)}
            row |= {name: int(scored.scores[name]) for name in (*COUNTS, *ERRORS)}
            prepared = prepare_field(one, self.experiment.mpp, spec=self.spec, class_names=self.experiment.class_names)
            row["loss"] = round(field_loss(values, prepared, self.loss), 4)
            truth = class_map(one, self.spec.classes, self.experiment.class_names)
            if self.channels.types is not None and truth is not None:
                within = self.experiment.evaluation.count_within
                row |= type_scores(scored.labels, values[self.channels.types :], one, self.spec, truth, within)
            images[one.name] = row | {"organ": one.organ, "source": one.source, "patient": one.patient}
            found[one.name] = scored.labels
            log.info(
                "%s%s: AJI %.3f, PQ %.3f, Dice %.3f",
                one.name,
                f" ({one.organ})" if one.organ else "",
                *(row[k] for k in ("aji", "pq", "dice")),
            )
        batchwise = batchwise_scores([m[self.channels.nucleus] for m in maps], fields)
        return {**summarise(images), "batchwise": batchwise, "images": images, "rules": asdict(rules)}, found
