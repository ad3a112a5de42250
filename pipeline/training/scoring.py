"""Scores of maps against annotated fields: by nucleus, by pixel, by class and over batches of patches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch

from pipeline.evaluation.errors import kinds_of_error
from pipeline.evaluation.metrics import Overlaps, central, class_counts, class_scores, score_overlaps
from pipeline.kernels.instances import Channels, InstanceRules, segment
from pipeline.training.data import Field
from pipeline.training.losses import CombinedLoss, bce, dice, focal
from pipeline.training.predict import to_field
from pipeline.training.samples import PreparedField
from pipeline.training.targets import Targets


@dataclass(frozen=True)
class Scored:
    """Nuclei found in a field, and their scores.

    Parameters
    ----------
    labels : numpy.ndarray
        int32 label map ``(H, W)`` at the field's own resolution.
    scores : dict
        Scores, counts and kinds of error by name.
    """

    labels: np.ndarray
    scores: dict[str, Any]


def score_maps(maps: np.ndarray, field: Field, rules: InstanceRules, channels: Channels) -> Scored:
    """Score a field's maps against its labels, at the field's own resolution.

    Parameters
    ----------
    maps : numpy.ndarray
        uint8 ``(C, h, w)`` at the model's pixel size.
    field : Field
        The field.
    rules : InstanceRules
        Thresholds.
    channels : Channels
        Indices of the maps in `maps`.
    """
    labels = to_field(segment(maps, rules, channels), field.labels.shape)
    overlaps = Overlaps.of(field.labels, labels)
    nucleus = to_field(maps[channels.nucleus], field.labels.shape) >= rules.nucleus
    scores = score_overlaps(overlaps) | pixel_scores(nucleus, field.labels > 0) | kinds_of_error(overlaps)
    return Scored(labels, scores)


def pixel_scores(found: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Accuracy, Dice and IoU of two masks, bool ``(H, W)``; all are 1 when both masks are empty."""
    both, total = int((found & truth).sum()), int(found.sum() + truth.sum())
    return {
        "pixel_accuracy": float((found == truth).mean()),
        "pixel_dice": 2 * both / total if total else 1.0,
        "pixel_iou": both / (total - both) if total else 1.0,
    }


def as_logits(maps: np.ndarray, n_types: int = 0) -> torch.Tensor:
    """Reconstruct logits ``(1, C, H, W)`` from uint8 maps ``(C, H, W)``; the last `n_types` maps form one softmax."""
    values = torch.from_numpy(np.ascontiguousarray(maps)).float()[None].add(0.5).div(256)
    count = values.shape[1] - n_types
    return torch.cat([torch.logit(values[:, :count]), torch.log(values[:, count:])], dim=1)


def field_loss(maps: np.ndarray, prepared: PreparedField, loss: CombinedLoss) -> float:
    """Return the training's loss on the uint8 maps of a whole field.

    Because of the 8 bits, probabilities are limited to between 1/512 and 511/512.
    """
    spec = prepared.spec
    target = prepared.targets
    if prepared.labels is not None:
        target = np.dstack([target, spec.of_sample(prepared.labels.astype(np.int32), prepared.types)])
    n_types = len(spec.classes) + 1 if "type" in spec.heads else 0
    with torch.inference_mode():
        return float(loss(as_logits(maps, n_types), spec.unpack(torch.from_numpy(target)[None]))["loss"])


def type_scores(
    labels: np.ndarray, maps: np.ndarray, field: Field, spec: Targets, truth: np.ndarray, within: int = 0
) -> dict[str, Any]:
    """Score the classes of the nuclei found: accuracy over matched nuclei (IoU > 0.5), and F1 of each class.

    Parameters
    ----------
    labels : numpy.ndarray
        Nuclei found, int32 ``(H, W)``, at the field's resolution.
    maps : numpy.ndarray
        uint8 ``(1 + classes, h, w)``: maps of background and classes at the model's resolution.
    field : Field
        The field.
    spec : Targets
        Heads and classes.
    truth : numpy.ndarray
        Known classes, see `pipeline.training.targets.class_map`.
    within : int
        Nuclei are counted for R² when they have a pixel in the central square with this side in pixels; 0 counts all.

    Returns
    -------
    dict
        ``type_accuracy`` over matched nuclei of known class and ``type_f1`` by class, None where there are none; and
        the ``type_counts`` that both are computed from, see `pipeline.evaluation.metrics.class_counts`.
    """
    from scipy import ndimage

    overlaps = Overlaps.of(field.labels, labels)
    sums = [ndimage.sum_labels(to_field(m, labels.shape), labels, overlaps.pred_ids) for m in maps[1:]]
    found = np.argmax(sums, axis=0) + 1 if len(overlaps.pred_ids) else np.zeros(0, int)
    values, first = np.unique(field.labels, return_index=True)
    known = truth.ravel()[first[np.searchsorted(values, overlaps.truth_ids)]].astype(int)
    known[known > len(spec.classes)] = 0  # IGNORED: another or unknown class
    counted = None
    if within:
        left, top, right, bottom = central((0, 0, labels.shape[1], labels.shape[0]), within)
        counted = (np.unique(field.labels[top:bottom, left:right]), np.unique(labels[top:bottom, left:right]))
    counts = class_counts(overlaps, known, found, spec.classes, counted)
    scores = class_scores([counts])
    return {
        "type_accuracy": scores["accuracy"],
        "type_f1": {name: row["f1"] for name, row in scores["classes"].items()},
        "type_counts": counts,
    }


def batchwise_scores(maps: Sequence[np.ndarray], fields: Sequence[Field]) -> dict[str, float]:
    """Pixel scores averaged over batches of patches instead of images.

    The probability map and the mask of each field are resized to 1024 x 1024 pixels by bilinear interpolation and cut
    into patches of 256 x 256. Loss, Dice, accuracy and IoU are computed over each batch of eight consecutive patches,
    and their means over the batches are returned. Interpolation makes the mask fractional at its edges, where accuracy,
    which demands equality, counts every pixel as wrong. These scores cannot be compared with means over images.

    Parameters
    ----------
    maps : sequence of numpy.ndarray
        uint8 nucleus maps ``(h, w)``, in the order of `fields`.
    fields : sequence of Field
        The fields.

    Returns
    -------
    dict
        ``loss`` (BCE + focal + Dice), ``dice``, ``accuracy``, ``iou``, ``batches``.
    """
    side, patch, batch = 1024, 256, 8
    probabilities: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    for one, field in zip(maps, fields, strict=True):
        for patches, source in ((probabilities, one), (masks, (field.labels > 0).astype(np.uint8) * 255)):
            square = cv2.resize(source.astype(np.float32), (side, side), interpolation=cv2.INTER_LINEAR)
            cut = square.reshape(side // patch, patch, side // patch, patch).swapaxes(1, 2)
            patches.extend(cut.reshape(-1, patch, patch))
    rows = []
    for start in range(0, len(probabilities), batch):
        p = torch.from_numpy(np.stack(probabilities[start : start + batch])).add(0.5).div(256)
        y = torch.from_numpy(np.stack(masks[start : start + batch])).div(255)
        logits, target = torch.logit(p)[:, None], {"nucleus": y}
        loss = float(sum((f(logits, target, "nucleus") for f in (bce, focal, dice)), start=torch.zeros(())))
        found = (p > 0.5).float()
        both, total = float((found * y).sum()), float(found.sum() + y.sum())
        rows.append(
            {
                "loss": loss,
                "dice": (2 * both + 1e-6) / (total + 1e-6),
                "accuracy": float((found == y).float().mean()),
                "iou": (both + 1e-6) / (total - both + 1e-6),
            }
        )
    mean = {name: round(float(np.mean([row[name] for row in rows])), 4) for name in rows[0]}
    return mean | {"batches": len(rows)}
