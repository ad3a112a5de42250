"""Training targets: the maps that the losses compare a network's output with.

Maps that keep their values when a sample is rotated, mirrored or zoomed (nucleus, distance, contour, seam) are crafted
once per field and warped along with the image. The others (h/v, classes, instances) are crafted for each sample from
the warped label map, so that the h/v maps of a mirrored nucleus point the right way. Samples are stored as uint8.
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
"""Class of pixels that the losses of the type head ignore."""

CONTOUR_UM = 0.5
"""Half the width of a contour in µm."""


@dataclass(frozen=True)
class Targets:
    """The targets that a training needs.

    Parameters
    ----------
    heads : tuple of str
        The network's heads.
    classes : tuple of str
        Classes of the type head.
    instances : bool
        Whether the label map itself is a target, as needed by networks that find instances themselves.
    """

    heads: tuple[str, ...] = ("nucleus", "distance")
    classes: tuple[str, ...] = ()
    instances: bool = False

    @property
    def warped(self) -> tuple[str, ...]:
        """Names of the maps that are crafted once per field."""
        return ("nucleus", *(head for head in ("distance", "contour") if head in self.heads), "seam")

    @property
    def crafted(self) -> tuple[str, ...]:
        """Names of the maps that are crafted for each sample from its label map."""
        names = [*(("h", "v") if "hv" in self.heads else ()), *(("type",) if "type" in self.heads else ())]
        return (*names, "label_high", "label_low") if self.instances else tuple(names)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all maps, in the order of a sample's channels."""
        return self.warped + self.crafted

    def of_field(self, field: Field, taught: Mapping[str, np.ndarray] | None = None, share: float = 0.5) -> np.ndarray:
        """Craft the targets of a field that are warped later, at the field's own resolution.

        Parameters
        ----------
        field : Field
            The field.
        taught : mapping of str to numpy.ndarray, optional
            A teacher's maps by name, float32 ``(H, W)`` in [0, 1], see `pipeline.training.teacher`.
        share : float
            Share of the teacher's maps in the targets of the same name.

        Returns
        -------
        numpy.ndarray
            float32 ``(H, W, n)`` in [0, 1], in the order of `warped`.
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
        """Craft the targets of a sample that depend on its warped label map.

        Parameters
        ----------
        labels : numpy.ndarray
            int32 label map ``(H, W)``.
        types : numpy.ndarray, optional
            uint8 class map ``(H, W)``, see `class_map`.

        Returns
        -------
        numpy.ndarray
            uint8 ``(H, W, n)``, in the order of `crafted`: h and v as ``128 + 127 * value``, the class or `IGNORED`,
            the high and low byte of the label.

        Raises
        ------
        PipelineError
            When the label map is a target and has more than 65535 instances.
        """
        from skimage.measure import label

        parts = []
        if "hv" in self.heads or self.instances:
            # Mirroring at the field's edge and rough outlines may split a label: make each piece its own instance.
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
        """Unpack a batch of samples into targets by name.

        Parameters
        ----------
        sample : torch.Tensor
            uint8 ``(N, H, W, C)``, with the channels `names`.

        Returns
        -------
        dict of str to torch.Tensor
            ``(N, H, W)`` each: float in [0, 1] for the warped maps, float in [-1, 1] for ``h`` and ``v``, int64 for
            ``type`` and ``label``.
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
    """Map each pixel of a field to its class in the type head.

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
        uint8 ``(H, W)``: 0 is background, ``i + 1`` is ``classes[i]``, `IGNORED` is a nucleus of another or unknown
        class. None when the field has no classes.
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
    """Classes of fields in order of first appearance, renamed by `names` (class of the head by class of the field)."""
    found = ((names or {}).get(name, name) for field in fields for name in field.classes)
    return tuple(dict.fromkeys(found))
