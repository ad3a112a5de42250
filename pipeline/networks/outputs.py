"""Turn a network's logits into named maps, with averaging over mirrored and transposed inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from pipeline.errors import PipelineError

if TYPE_CHECKING:
    from torch import Tensor, nn

HEAD_MAPS = {"nucleus": ("nucleus",), "distance": ("distance",), "contour": ("contour",), "hv": ("h", "v")}
"""Maps of each head; the ``type`` head has a map for the background and one for each class."""

TTA = {"none": 1, "flips": 4, "dihedral": 8}
"""Test-time augmentations, with the number of mirrored (and transposed) inputs over which maps are averaged."""


def map_names(heads: Sequence[str], classes: Sequence[str] = ()) -> tuple[str, ...]:
    """Names of the maps of `heads`, in the order of the network's channels.

    >>> map_names(["nucleus", "hv", "type"], ["Tumour"])
    ('nucleus', 'h', 'v', 'type:background', 'type:Tumour')

    Raises
    ------
    PipelineError
        When a head is unknown or listed twice, the nucleus head is not the first, or the type head is not the last.
    """
    names: list[str] = []
    for head in heads:
        if head == "type":
            names += ["type:background", *(f"type:{name}" for name in classes)]
        elif head in HEAD_MAPS:
            names += HEAD_MAPS[head]
        else:
            raise PipelineError(f"unknown head {head!r}", f"choose from {', '.join([*HEAD_MAPS, 'type'])}")
    if not names or heads[0] != "nucleus" or "type" in heads[:-1] or len(set(names)) != len(names):
        raise PipelineError(
            f"heads {', '.join(heads) or 'none'}", "list each once, nucleus first, type last (where there is one)"
        )
    return tuple(names)


@runtime_checkable
class FindsInstances(Protocol):
    """A network that finds instances itself and draws its maps from them.

    The maps of overlapping windows are then joined by taking the larger value.
    """

    margin: int
    """Pixels from a window's border to its core; a window draws the nuclei whose middle lies in its core.

    See `pipeline.kernels.draw.draw_instances`.
    """

    def loss(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Compute the ``loss`` and its parts for images ``(N, 3, H, W)`` in [0, 1] and label maps ``(N, H, W)``."""


@runtime_checkable
class Folding(Protocol):
    """A network that can fold batch normalisations into preceding convolutions, which saves a tenth of the time."""

    def fold_norms(self) -> None:
        """Fold all batch normalisations in place, for inference only. Maps change only by rounding."""


@dataclass(frozen=True)
class Outputs:
    """How logits become maps.

    Parameters
    ----------
    names : tuple of str
        Names of the maps, see `map_names`. The type maps share one softmax; each other map has a sigmoid of its own.
        The maps ``h`` and ``v`` go from 0 to 1, with the middle of the nucleus at 0.5.
    tta : str
        A key of `TTA`.
    """

    names: tuple[str, ...]
    tta: str = "none"

    def __post_init__(self) -> None:
        if self.tta not in TTA:
            raise PipelineError(f"unknown test-time augmentation {self.tta!r}", f"choose from {', '.join(TTA)}")

    def activate(self, logits: Tensor) -> Tensor:
        """Turn logits ``(N, C, H, W)`` into maps in [0, 1], float32 of the same shape."""
        import torch

        count = sum(not name.startswith("type:") for name in self.names)
        maps = torch.sigmoid(logits[:, :count].float())
        if logits.shape[1] > count:
            maps = torch.cat([maps, torch.softmax(logits[:, count:].float(), dim=1)], dim=1)
        return maps

    def predict(self, network: nn.Module, images: Tensor) -> Tensor:
        """Predict the maps of images, averaged over the test-time augmentation `tta`.

        Parameters
        ----------
        network : torch.nn.Module
            Network that returns logits.
        images : torch.Tensor
            float ``(N, 3, H, W)`` in [0, 1].

        Raises
        ------
        PipelineError
            When maps would be averaged that the network draws from instances.
        """
        if self.tta != "none" and isinstance(network, FindsInstances):
            raise PipelineError(
                f"test-time augmentation {self.tta!r} of a network that finds instances itself", "use none"
            )
        total: Tensor | None = None
        for index in range(TTA[self.tta]):
            turned, rows, columns = bool(index & 4), bool(index & 1), bool(index & 2)
            flips = tuple(axis for axis, on in ((2, rows), (3, columns)) if on)
            x = images.transpose(2, 3) if turned else images
            maps = self.activate(network(x.flip(flips) if flips else x))
            maps = self._back(maps.flip(flips) if flips else maps, turned, rows, columns)
            total = maps if total is None else total + maps
        assert total is not None
        return total if TTA[self.tta] == 1 else total / TTA[self.tta]

    def _back(self, maps: Tensor, turned: bool, rows: bool, columns: bool) -> Tensor:
        """Undo what augmentation does to the directions ``h`` and ``v``, and undo the transposition.

        The pixels of `maps` have already been flipped back.
        """
        if "h" in self.names and (turned or rows or columns):
            h, v = self.names.index("h"), self.names.index("v")
            maps = maps.clone()
            if columns:
                maps[:, h] = 1 - maps[:, h]
            if rows:
                maps[:, v] = 1 - maps[:, v]
            if turned:
                maps[:, [h, v]] = maps[:, [v, h]]
        return maps.transpose(2, 3) if turned else maps
