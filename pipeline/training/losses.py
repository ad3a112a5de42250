"""Losses of the heads, by name, and their weighted sum.

The loss of one head takes the head's logits ``(N, C, H, W)``, all targets by name (see
`pipeline.training.targets.Targets.unpack`) and the head's name, and returns a scalar. `CombinedLoss` converts the
logits to float32, whatever precision the network ran in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.errors import PipelineError
from pipeline.networks.outputs import HEAD_MAPS
from pipeline.training.targets import IGNORED

BINARY = ("nucleus", "distance", "contour")
"""Heads with a single map in [0, 1]."""


OWN = ("nucleus", "distance")
"""Heads of the pipeline's own loss, `nucleus_distance_loss`."""


def soft_dice(probability: Tensor, target: Tensor, smooth: float = 1.0) -> Tensor:
    """One minus the soft Dice coefficient over the whole batch."""
    overlap = 2 * (probability * target).sum() + smooth
    return 1 - overlap / (probability.sum() + target.sum() + smooth)


def nucleus_distance_loss(logits: Tensor, targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The pipeline's own loss of the nucleus and distance heads.

    Parameters
    ----------
    logits : torch.Tensor
        ``(N, 2, H, W)``: nucleus, distance.
    targets : mapping of str to torch.Tensor
        ``nucleus``, ``distance``, ``seam``: float ``(N, H, W)`` in [0, 1].

    Returns
    -------
    dict of str to torch.Tensor
        ``loss`` and its parts: binary cross-entropy, with a higher weight on seams, plus soft Dice for the nucleus
        head; smooth L1, with a higher weight on nuclei and seams, plus gradient difference for the distance head.
    """
    nucleus, distance, seam = targets["nucleus"], targets["distance"], targets["seam"]
    cross_entropy = functional.binary_cross_entropy_with_logits(logits[:, 0], nucleus, reduction="none")
    cross_entropy = (cross_entropy * (1 + 2 * seam)).mean()
    dice = soft_dice(torch.sigmoid(logits[:, 0]), nucleus)
    predicted = torch.sigmoid(logits[:, 1])
    error = functional.smooth_l1_loss(predicted, distance, reduction="none", beta=0.1)
    depth = (error * (1 + nucleus + 2 * seam)).mean()
    slope = _slope(predicted, distance)
    loss = cross_entropy + dice + 4 * depth + 2 * slope
    return {"loss": loss, "cross_entropy": cross_entropy, "dice": dice, "distance": depth, "slope": slope}


def _slope(predicted: Tensor, target: Tensor) -> Tensor:
    return sum(
        (functional.l1_loss(predicted.diff(dim=axis), target.diff(dim=axis)) for axis in (1, 2)),
        start=predicted.new_zeros(()),
    )


def _edges(nucleus: Tensor, radius: int) -> Tensor:
    """1 within `radius` of the border of the foreground, else 0."""
    hard = (nucleus >= 0.5).float()[:, None]
    side, kernel = radius, 2 * radius + 1
    outer = functional.max_pool2d(hard, kernel, stride=1, padding=side)
    inner = -functional.max_pool2d(-hard, kernel, stride=1, padding=side)
    return (outer - inner)[:, 0]


def bce(logits: Tensor, targets: Mapping[str, Tensor], head: str, *, seam: float = 0.0, edge: float = 0.0) -> Tensor:
    """Binary cross-entropy; `seam` and `edge` are additional weights between nuclei and around their borders.

    References
    ----------
    Ronneberger et al., "U-Net", MICCAI 2015, for higher weights near borders.
    """
    error = functional.binary_cross_entropy_with_logits(logits[:, 0], targets[head], reduction="none")
    if seam or edge:
        weight = 1 + seam * targets["seam"]
        if edge:
            weight = weight + edge * _edges(targets["nucleus"], 2)
        return (error * weight).sum() / weight.sum()
    return error.mean()


def focal(
    logits: Tensor, targets: Mapping[str, Tensor], head: str, *, alpha: float = 0.25, gamma: float = 2.0
) -> Tensor:
    """Focal loss: ``mean(alpha * (1 - p_t) ** gamma * BCE)``, with the same `alpha` for both classes.

    References
    ----------
    Lin et al., "Focal loss for dense object detection", ICCV 2017, without its ``1 - alpha`` for the background.
    """
    error = functional.binary_cross_entropy_with_logits(logits[:, 0], targets[head], reduction="none")
    # exp(-BCE) is the probability of the true class, and generalises it to soft targets.
    return (alpha * (1 - torch.exp(-error)) ** gamma * error).mean()


def dice(logits: Tensor, targets: Mapping[str, Tensor], head: str, *, smooth: float = 1e-6) -> Tensor:
    """One minus the soft Dice coefficient over the whole batch.

    References
    ----------
    Milletari et al., "V-Net", 3DV 2016.
    """
    return soft_dice(torch.sigmoid(logits[:, 0]), targets[head], smooth)


def _regression(error: Tensor, targets: Mapping[str, Tensor], foreground: float) -> Tensor:
    if foreground == 1:
        return error.mean()
    weight = 1 + (foreground - 1) * targets["nucleus"]
    return (error * weight).sum() / weight.sum()


def mse(logits: Tensor, targets: Mapping[str, Tensor], head: str, *, foreground: float = 1.0) -> Tensor:
    """Mean squared error of a map in [0, 1]; nuclei weigh `foreground` times as much as background."""
    error = (torch.sigmoid(logits[:, 0]) - targets[head]) ** 2
    return _regression(error, targets, foreground)


def smooth_l1(
    logits: Tensor, targets: Mapping[str, Tensor], head: str, *, foreground: float = 1.0, beta: float = 0.1
) -> Tensor:
    """Smooth L1 error of a map in [0, 1], quadratic below `beta`; see `mse` for `foreground`."""
    error = functional.smooth_l1_loss(torch.sigmoid(logits[:, 0]), targets[head], reduction="none", beta=beta)
    return _regression(error, targets, foreground)


def l1(logits: Tensor, targets: Mapping[str, Tensor], head: str, *, foreground: float = 1.0) -> Tensor:
    """Mean absolute error of a map in [0, 1]; see `mse` for `foreground`."""
    error = (torch.sigmoid(logits[:, 0]) - targets[head]).abs()
    return _regression(error, targets, foreground)


def slope(logits: Tensor, targets: Mapping[str, Tensor], head: str) -> Tensor:
    """Gradient difference of a map in [0, 1]: mean absolute error of the differences between neighbouring pixels.

    The errors of horizontal and vertical neighbours are added.
    """
    return _slope(torch.sigmoid(logits[:, 0]), targets[head])


def hv_mse(logits: Tensor, targets: Mapping[str, Tensor], head: str) -> Tensor:
    """Mean squared error of the h/v maps in [-1, 1].

    References
    ----------
    Graham et al., "HoVer-Net", Medical Image Analysis 2019.
    """
    return functional.mse_loss(2 * torch.sigmoid(logits) - 1, torch.stack([targets["h"], targets["v"]], 1))


def hv_msge(logits: Tensor, targets: Mapping[str, Tensor], head: str) -> Tensor:
    """Mean squared error, inside nuclei, of the gradients of the h map along x and the v map along y (Sobel 5x5).

    References
    ----------
    Graham et al., "HoVer-Net", Medical Image Analysis 2019.
    """
    difference = 2 * torch.sigmoid(logits) - 1 - torch.stack([targets["h"], targets["v"]], 1)
    place = torch.arange(-2, 3, dtype=torch.float32, device=logits.device)
    x, y = torch.meshgrid(place, place, indexing="xy")
    kernel = x / (x**2 + y**2).clamp(min=1)
    kernels = torch.stack([kernel, kernel.T])[:, None]
    slopes = functional.conv2d(difference, kernels, padding=2, groups=2) ** 2
    inside = (targets["nucleus"] >= 0.5).float()[:, None]
    return (slopes * inside).sum() / (2 * inside.sum() + 1e-8)


def _known(targets: Mapping[str, Tensor]) -> Tensor:
    return targets["type"] != IGNORED


def type_ce(
    logits: Tensor, targets: Mapping[str, Tensor], head: str, *, class_weights: Sequence[float] | None = None
) -> Tensor:
    """Cross-entropy over background and classes, where the class is known.

    `class_weights` are the weights of the background and of each class, in this order.
    """
    known = _known(targets)
    if not known.any():
        return logits.sum() * 0.0
    weight = None if class_weights is None else logits.new_tensor(list(class_weights))
    pixels = logits.permute(0, 2, 3, 1)[known]
    return functional.cross_entropy(pixels, targets["type"][known], weight=weight)


def type_bce(logits: Tensor, targets: Mapping[str, Tensor], head: str) -> Tensor:
    """Binary cross-entropy of background and each class separately, where the class is known."""
    known = _known(targets)
    if not known.any():
        return logits.sum() * 0.0
    truth = functional.one_hot(targets["type"][known], logits.shape[1]).float()
    return functional.binary_cross_entropy_with_logits(logits.permute(0, 2, 3, 1)[known], truth)


def type_dice(logits: Tensor, targets: Mapping[str, Tensor], head: str, *, smooth: float = 1e-3) -> Tensor:
    """One minus the soft Dice coefficient, averaged over background and classes, where the class is known."""
    known = _known(targets)
    if not known.any():
        return logits.sum() * 0.0
    probability = torch.softmax(logits, dim=1).permute(0, 2, 3, 1)[known]
    truth = functional.one_hot(targets["type"][known], logits.shape[1]).float()
    overlap = 2 * (probability * truth).sum(0) + smooth
    return (1 - overlap / (probability.sum(0) + truth.sum(0) + smooth)).mean()


def type_focal(logits: Tensor, targets: Mapping[str, Tensor], head: str, *, gamma: float = 2.0) -> Tensor:
    """Focal loss over background and classes, where the class is known."""
    known = _known(targets)
    if not known.any():
        return logits.sum() * 0.0
    error = functional.cross_entropy(logits.permute(0, 2, 3, 1)[known], targets["type"][known], reduction="none")
    return ((1 - torch.exp(-error)) ** gamma * error).mean()


LOSSES: dict[str, tuple[Any, tuple[str, ...]]] = {
    "bce": (bce, BINARY),
    "focal": (focal, BINARY),
    "dice": (dice, BINARY),
    "mse": (mse, BINARY),
    "smooth_l1": (smooth_l1, BINARY),
    "l1": (l1, BINARY),
    "slope": (slope, BINARY),
    "hv_mse": (hv_mse, ("hv",)),
    "hv_msge": (hv_msge, ("hv",)),
    "type_ce": (type_ce, ("type",)),
    "type_bce": (type_bce, ("type",)),
    "type_dice": (type_dice, ("type",)),
    "type_focal": (type_focal, ("type",)),
}
"""Losses by name, each with the heads that it is for."""

DEFAULT_TERMS: dict[str, tuple[dict[str, Any], ...]] = {
    "nucleus": ({"loss": "bce", "seam": 2}, {"loss": "dice", "smooth": 1}),
    "contour": ({"loss": "bce"}, {"loss": "dice", "smooth": 1}),
    "hv": ({"loss": "hv_mse", "weight": 2}, {"loss": "hv_msge", "weight": 2}),
    "type": ({"loss": "type_ce"}, {"loss": "type_dice"}),
}
"""Terms of each head when the experiment gives no loss; nucleus and distance together are trained with
`nucleus_distance_loss` instead."""


@dataclass(frozen=True)
class Term:
    """One term of a loss.

    Parameters
    ----------
    loss, head : str
        A key of `LOSSES`, and the head whose loss it is.
    weight : float
        Factor of the term.
    args : dict
        Keyword arguments of the loss.
    """

    loss: str
    head: str
    weight: float = 1.0
    args: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of the term in the logs."""
        return f"{self.head}_{self.loss.removeprefix(f'{self.head}_')}"


def loss_terms(entries: Sequence[Mapping[str, Any]], heads: Sequence[str]) -> tuple[Term, ...]:
    """Return the terms that an experiment's ``loss`` lists.

    Parameters
    ----------
    entries : sequence of mapping
        Each with ``loss`` and, optionally, ``head`` (by default the first one that the loss is for), ``weight`` and
        arguments of the loss.
    heads : sequence of str
        The network's heads.

    Raises
    ------
    PipelineError
        When a loss is unknown, does not suit its head or has no such argument, or when a head has no loss.
    """
    terms = []
    for entry in entries:
        args = {key: value for key, value in entry.items() if key not in ("loss", "head", "weight")}
        name = str(entry.get("loss"))
        if name not in LOSSES:
            raise PipelineError(f"loss: unknown loss {name!r}", f"choose from {', '.join(LOSSES)}")
        function, suits = LOSSES[name]
        head = entry.get("head") or next((h for h in heads if h in suits), None)
        if head not in heads or head not in suits:
            raise PipelineError(
                f"loss: {name} of head {head!r}", f"it is for {', '.join(suits)}; the heads are {', '.join(heads)}"
            )
        known = set(function.__kwdefaults__ or {})
        if set(args) - known:
            raise PipelineError(
                f"loss: {name} has no argument {min(set(args) - known)!r}",
                f"it has {', '.join(sorted(known)) or 'none'}",
            )
        terms.append(Term(name, head, float(entry.get("weight", 1.0)), args))
    bare = [head for head in heads if head not in {term.head for term in terms}]
    if bare:
        raise PipelineError(f"loss: none for head {bare[0]!r}", "name one, or leave the head out")
    return tuple(terms)


class CombinedLoss:
    """Weighted sum of the loss terms of an experiment.

    Parameters
    ----------
    entries : sequence of mapping
        See `loss_terms`; when empty, `nucleus_distance_loss` for nucleus and distance together and `DEFAULT_TERMS` for
        other heads.
    heads, classes : sequence of str
        The network's heads and classes.

    Raises
    ------
    PipelineError
        When the entries do not suit the heads or classes.
    """

    def __init__(self, entries: Sequence[Mapping[str, Any]], heads: Sequence[str], classes: Sequence[str] = ()) -> None:
        self.own = not entries and {*OWN} <= {*heads}
        others = [head for head in heads if not (self.own and head in OWN)]
        self.terms = loss_terms(entries or [term | {"head": h} for h in others for term in DEFAULT_TERMS[h]], others)
        self.slices: dict[str, slice] = {}
        start = 0
        for head in heads:
            stop = start + (len(classes) + 1 if head == "type" else len(HEAD_MAPS[head]))
            self.slices[head] = slice(start, stop)
            start = stop
        for term in self.terms:
            weights = term.args.get("class_weights")
            if weights is not None and len(weights) != len(classes) + 1:
                raise PipelineError(
                    f"loss: {len(weights)} class_weights for {len(classes)} classes",
                    "give background's, then each one's",
                )

    def __call__(self, logits: Tensor, targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the total ``loss`` and its terms, before weighting, by name.

        Parameters
        ----------
        logits : torch.Tensor
            ``(N, C, H, W)``.
        targets : mapping of str to torch.Tensor
            See `pipeline.training.targets.Targets.unpack`.
        """
        # In full precision, also where a training step computes with less: a loss may hold convolutions.
        with torch.autocast(logits.device.type, enabled=False):
            logits = logits.float()
            parts: dict[str, Tensor] = {}
            if self.own:
                parts = nucleus_distance_loss(torch.cat([logits[:, self.slices[head]] for head in OWN], dim=1), targets)
            total = parts.pop("loss", logits.new_zeros(()))
            for term in self.terms:
                value = LOSSES[term.loss][0](logits[:, self.slices[term.head]], targets, term.head, **term.args)
                parts[term.name] = value
                total = total + term.weight * value
        return {"loss": total, **parts}
