"""What the losses compare a network's output with, and how it travels from the fields to them.

Maps that keep their values when a sample is turned, mirrored or zoomed (nucleus, distance, contour, seam) are crafted
once a field and warped along with the image. What does not (h/v, classes, instances) is crafted again from the warped
label map, so that the h/v maps of a mirrored nucleus point the right way. Samples are uint8 throughout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pipeline.errors import PipelineError
from pipeline.training.data import Field
from pipeline.training.labels import craft_contour, craft_distance, craft_hv, seam_weight

if TYPE_CHECKING:
    from torch import Tensor

IGNORED = 255
"""Class of pixels that the loss of the type head leaves out."""

CONTOUR_UM = 0.5
"""Half the width of a contour in µm."""


@dataclass(frozen=True)
class Targets:
    """Which targets a training needs.

    Parameters
    ----------
    heads : tuple of str
        The network's heads.
    classes : tuple of str
        Classes of the type head.
    instances : bool
        Whether the label map itself is needed, by networks that find instances themselves.
    """

    heads: tuple[str, ...] = ("nucleus", "distance")
    classes: tuple[str, ...] = ()
    instances: bool = False

    @property
    def warped(self) -> tuple[str, ...]:
        """Maps that are crafted once a field."""
        return ("nucleus", *(head for head in ("distance", "contour") if head in self.heads), "seam")

    @property
    def crafted(self) -> tuple[str, ...]:
        """Maps that are crafted for each sample from its label map."""
        names = [*(("h", "v") if "hv" in self.heads else ()), *(("type",) if "type" in self.heads else ())]
        return (*names, "label_high", "label_low") if self.instances else tuple(names)

    @property
    def names(self) -> tuple[str, ...]:
        """All of them, in the order of a sample's channels."""
        return self.warped + self.crafted

    def of_field(self, field: Field, taught: Mapping[str, np.ndarray] | None = None, share: float = 0.5) -> np.ndarray:
        """The warped targets of a field at its own resolution.

        Parameters
        ----------
        field : Field
            The field.
        taught : mapping of str to numpy.ndarray, optional
            A teacher's maps by name, float32 ``(H, W)`` in [0, 1], see `pipeline.training.teacher`.
        share : float
            Their share in the targets of the same name.

        Returns
        -------
        numpy.ndarray
            float32 ``(H, W, n)`` in [0, 1].
        """
        made = {
            "nucleus": lambda: (field.labels > 0).astype(np.float32),
            "distance": lambda: craft_distance(field.labels),
            "contour": lambda: craft_contour(field.labels, max(1, round(CONTOUR_UM / field.mpp))),
            "seam": lambda: seam_weight(field.labels),
        }
        maps = {name: made[name]() for name in self.warped}
        for name in set(maps).intersection(taught or {}):
            maps[name] = (1 - share) * maps[name] + share * taught[name]  # type: ignore[index]
        return np.dstack([maps[name] for name in self.warped])

    def of_sample(self, labels: np.ndarray, types: np.ndarray | None) -> np.ndarray:
        """The crafted targets of a sample.

        Parameters
        ----------
        labels : numpy.ndarray
            int32 label map ``(H, W)``.
        types : numpy.ndarray, optional
            uint8 ``(H, W)``, see `class_map`.

        Returns
        -------
        numpy.ndarray
            uint8 ``(H, W, n)``: h/v with 0 at 128, the class or `IGNORED`, the label's high and low byte.
        """
        from skimage.measure import label

        parts = []
        if "hv" in self.heads or self.instances:
            # Mirrored borders and rough edges may tear a label apart: each piece is an instance of its own.
            labels = label(labels, background=0, connectivity=2)
        if "hv" in self.heads:
            parts.append(np.round(128 + 127 * craft_hv(labels)).astype(np.uint8))
        if "type" in self.heads:
            parts.append(np.full(labels.shape, IGNORED, np.uint8) if types is None else types)
        if self.instances:
            if labels.max(initial=0) > 0xFFFF:
                raise PipelineError("a sample with more than 65535 nuclei", "use a smaller schedule.size")
            parts += [(labels >> 8).astype(np.uint8), (labels & 0xFF).astype(np.uint8)]
        return np.dstack(parts)

    def unpack(self, sample: Tensor) -> dict[str, Tensor]:
        """Targets by name from a batch of samples.

        Parameters
        ----------
        sample : torch.Tensor
            uint8 ``(N, H, W, C)``.

        Returns
        -------
        dict of str to torch.Tensor
            ``(N, H, W)`` each: float in [0, 1] of the warped maps, float in [-1, 1] of h and v, int64 of ``type`` and
            ``label``.
        """
        sample = sample.permute(0, 3, 1, 2)
        maps = dict(zip(self.names, sample.unbind(1), strict=True))
        warped = sample[:, : len(self.warped)].float().div(255).unbind(1)
        result = dict(zip(self.warped, warped, strict=True))
        for name in self.crafted:
            if name in ("h", "v"):
                result[name] = maps[name].float().sub(128).div(127)
            elif name == "type":
                result[name] = maps[name].long()
        if self.instances:
            result["label"] = maps["label_high"].long() * 256 + maps["label_low"].long()
        return result


def class_map(field: Field, classes: Sequence[str], names: Mapping[str, str] | None = None) -> np.ndarray | None:
    """Classes of a field's pixels as the type head's channels.

    Parameters
    ----------
    field : Field
        The field.
    classes : sequence of str
        Classes of the type head.
    names : mapping of str to str, optional
        Class of the head by class of the field, where they differ.

    Returns
    -------
    numpy.ndarray or None
        uint8 ``(H, W)``: 0 is background, ``i + 1`` is ``classes[i]``, `IGNORED` a nucleus of another or unknown class.
        None when the field has no classes.
    """
    if field.types is None:
        return None
    table = np.full(len(field.classes) + 1, IGNORED, np.uint8)
    for index, name in enumerate(field.classes, start=1):
        name = (names or {}).get(name, name)
        if name in classes:
            table[index] = list(classes).index(name) + 1
    return np.where(field.labels > 0, table[field.types], 0).astype(np.uint8)


def classes_of(fields: Sequence[Field], names: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """Classes of fields in the order in which they come up, under the names of the head."""
    found = ((names or {}).get(name, name) for field in fields for name in field.classes)
    return tuple(dict.fromkeys(found))
