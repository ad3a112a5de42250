"""Losses of the heads."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def soft_dice(probability: Tensor, target: Tensor) -> Tensor:
    """One minus the soft Dice coefficient over the whole batch."""
    overlap = 2 * (probability * target).sum() + 1.0
    return 1 - overlap / (probability.sum() + target.sum() + 1.0)


def nucleus_distance_loss(logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Loss of the nucleus and distance heads.

    Parameters
    ----------
    logits : torch.Tensor
        ``(N, 2, H, W)``: nucleus, distance.
    targets : torch.Tensor
        float ``(N, 3, H, W)`` in [0, 1]: nucleus, distance, seam weight.

    Returns
    -------
    dict of str to torch.Tensor
        ``loss`` and its parts: binary cross-entropy (weighted towards seams) plus soft Dice for the nucleus head,
        weighted L1 plus gradient difference for the distance head.
    """
    nucleus, distance, seam = targets.unbind(1)
    cross_entropy = functional.binary_cross_entropy_with_logits(logits[:, 0], nucleus, reduction="none")
    cross_entropy = (cross_entropy * (1 + 2 * seam)).mean()
    dice = soft_dice(torch.sigmoid(logits[:, 0]), nucleus)
    predicted = torch.sigmoid(logits[:, 1])
    error = functional.smooth_l1_loss(predicted, distance, reduction="none", beta=0.1)
    depth = (error * (1 + nucleus + 2 * seam)).mean()
    slope = sum(
        (functional.l1_loss(predicted.diff(dim=axis), distance.diff(dim=axis)) for axis in (1, 2)),
        start=predicted.new_zeros(()),
    )
    loss = cross_entropy + dice + 4 * depth + 2 * slope
    return {"loss": loss, "cross_entropy": cross_entropy, "dice": dice, "distance": depth, "slope": slope}
