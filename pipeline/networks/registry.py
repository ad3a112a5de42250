"""Networks by name.

A network is a `torch.nn.Module` that maps a float tensor ``(N, 3, H, W)`` in [0, 1] to logits ``(N, C, H, W)``, one
channel for each output of its heads, in the order of `HEAD_CHANNELS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from pipeline.errors import PipelineError

if TYPE_CHECKING:
    from torch import nn

HEAD_CHANNELS = {"nucleus": 1, "distance": 1}
"""Channels of the heads with a fixed number; the ``type`` head has one channel a class, background first."""


@dataclass(frozen=True)
class NetworkFamily:
    """How to build a family of networks.

    Parameters
    ----------
    module, factory : str
        Where its constructor is; imported only when the network is built.
    source : str
        Where the design comes from.
    stride : int
        Patch sides must be a multiple of it.
    """

    module: str
    factory: str
    source: str
    stride: int


NETWORKS = {
    "resunet": NetworkFamily(
        module="pipeline.networks.resunet",
        factory="ResidualUNet",
        source="U-Net (Ronneberger et al. 2015) with residual blocks (He et al. 2016) and additive skips",
        stride=16,
    ),
}


def head_channels(heads: Sequence[str], n_types: int = 0) -> int:
    """Output channels that `heads` need together.

    Raises
    ------
    PipelineError
        When a head is unknown.
    """
    total = 0
    for head in heads:
        if head == "type":
            total += n_types + 1
        elif head in HEAD_CHANNELS:
            total += HEAD_CHANNELS[head]
        else:
            raise PipelineError(f"unknown head {head!r}", f"choose from {', '.join([*HEAD_CHANNELS, 'type'])}")
    return total


def build_network(name: str, out_channels: int, args: dict[str, Any] | None = None) -> nn.Module:
    """Build the network called `name`.

    Parameters
    ----------
    name : str
        A key of `NETWORKS`.
    out_channels : int
        Logit channels.
    args : dict, optional
        Further arguments of the constructor.

    Raises
    ------
    PipelineError
        When the name is unknown or an argument does not fit.
    """
    if name not in NETWORKS:
        raise PipelineError(f"unknown network {name!r}", f"choose from {', '.join(sorted(NETWORKS))}")
    family = NETWORKS[name]
    factory: Callable[..., nn.Module] = getattr(import_module(family.module), family.factory)
    try:
        return factory(out_channels=out_channels, **(args or {}))
    except TypeError as error:
        raise PipelineError(f"network {name!r}: {error}", "check the network's arguments") from error
