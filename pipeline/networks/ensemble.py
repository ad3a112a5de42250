"""Ensemble: several trained networks as one, whose maps are the mean of their maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.networks.blocks import bilinear
from pipeline.networks.outputs import FindsInstances, Folding, Outputs
from pipeline.networks.registry import build_network

LEAST = 1e-6
"""Probabilities are kept at least this far from 0 and 1, so that their logits are finite."""


class Ensemble(nn.Module):
    """A network whose maps are the mean of its members' maps, returned as logits like those of any network.

    A member that works at a coarser pixel size gets the image averaged over squares of pixels, and its maps are
    interpolated.

    Parameters
    ----------
    out_channels : int
        Logit channels.
    maps : sequence of str
        Names of the maps, the same for all members, see `pipeline.networks.outputs.map_names`.
    members : sequence of mapping
        For each member ``network`` and ``args``, its name in the registry and its arguments; ``tta``, its test-time
        augmentation; and ``factor``, the side of its pixels in pixels of the ensemble.
    """

    def __init__(self, out_channels: int, maps: Sequence[str], members: Sequence[Mapping[str, Any]]) -> None:
        super().__init__()
        if len(maps) != out_channels or not members:
            raise ValueError(f"{len(members)} members with {len(maps)} maps, asked for {out_channels}")
        self.members = nn.ModuleList(
            build_network(one["network"], out_channels, one["args"], pretrained=False) for one in members
        )
        if any(isinstance(one, FindsInstances) for one in self.members):
            raise ValueError("a member finds instances itself: its maps have no mean")
        self.outputs = [Outputs(tuple(maps), one["tta"]) for one in members]
        self.factors = [int(one["factor"]) for one in members]
        self.binary = sum(not name.startswith("type:") for name in maps)

    def fold_norms(self) -> None:
        """See `pipeline.networks.outputs.Folding`."""
        for one in self.members:
            if isinstance(one, Folding):
                one.fold_norms()

    def forward(self, x: Tensor) -> Tensor:
        total = x.new_zeros(())
        for network, outputs, factor in zip(self.members, self.outputs, self.factors, strict=True):
            if factor == 1:
                total = total + outputs.predict(network, x)
            else:
                maps = outputs.predict(network, functional.avg_pool2d(x, factor))
                total = total + bilinear(maps, scale_factor=float(factor))
        mean = total / len(self.members)
        independent, types = mean[:, : self.binary], mean[:, self.binary :]
        return torch.cat([torch.logit(independent, LEAST), torch.log(types.clamp(min=LEAST))], dim=1)
