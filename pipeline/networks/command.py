"""``python -m pipeline networks``: list the networks with their size and cost."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from pipeline.errors import PipelineError

if TYPE_CHECKING:
    from torch import Tensor, nn

IMAGE = 256
"""Side of the image on which operations are counted, in pixels."""


def count_multiply_adds(network: nn.Module, image: Tensor) -> int:
    """Count the multiply-adds of convolutions and matrix products in one forward pass.

    Parameters
    ----------
    network : torch.nn.Module
        The network; may be on the device ``meta``, which holds no data.
    image : torch.Tensor
        Its input, on the same device.
    """
    import torch
    from torch import nn

    from pipeline.networks.blocks import SelfAttention

    total = 0

    def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        if isinstance(module, nn.Linear):
            total += output.numel() * module.in_features
        elif isinstance(module, nn.Conv2d):
            total += output.numel() * module.weight[0].numel()
        elif isinstance(module, nn.ConvTranspose2d):
            total += inputs[0].numel() * module.weight[0].numel()
        elif isinstance(module, SelfAttention):
            total += 2 * output.numel() * output.shape[1]

    handles = [module.register_forward_hook(add) for module in network.modules()]
    with torch.no_grad():
        getattr(network, "dry_run", network)(image)
    for handle in handles:
        handle.remove()
    return total


def describe(name: str) -> dict[str, Any]:
    """Describe a network's size and cost, without allocating its weights.

    Parameters
    ----------
    name : str
        Name of the network in the registry.

    Returns
    -------
    dict
        ``parameters``, their number; ``heads`` and ``channels`` that it is trained with by default;
        ``multiply_adds_per_pixel`` of convolutions and matrix products in one forward pass over an image with sides of
        ``image`` pixels; ``stride``, the number that sides of windows must be a multiple of; ``pretrained``, whether it
        takes ``encoder_weights``; ``args``; and ``source``.
    """
    import torch

    from pipeline.networks.registry import NETWORKS, build_network, head_channels

    family = NETWORKS[name]
    channels = head_channels(family.heads)
    with torch.device("meta"):
        network = build_network(name, channels, pretrained=False).eval()
        pixels = torch.empty(1, 3, IMAGE, IMAGE)
    return {
        "parameters": sum(p.numel() for p in network.parameters()),
        "heads": list(family.heads),
        "channels": channels,
        "multiply_adds_per_pixel": round(count_multiply_adds(network, pixels) / IMAGE**2),
        "image": IMAGE,
        "stride": family.stride,
        "pretrained": family.pretrained,
        "args": family.args,
        "source": family.source,
    }


def table(networks: dict[str, dict[str, Any]]) -> str:
    """Format the networks as text, one per line."""
    rows = [("network", "parameters", "multiply-adds/px", "stride", "heads", "source")]
    rows += [
        (
            name,
            f"{one['parameters']:,}",
            f"{one['multiply_adds_per_pixel']:,}",
            str(one["stride"]),
            " ".join(one["heads"]),
            one["source"],
        )
        for name, one in networks.items()
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = []
    for name, parameters, operations, stride, heads, source in rows:
        numbers = f"{parameters:>{widths[1]}}  {operations:>{widths[2]}}  {stride:>{widths[3]}}"
        lines.append(f"{name:<{widths[0]}}  {numbers}  {heads:<{widths[4]}}  {source}")
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("names", nargs="*", metavar="NAME", help="networks to tell of; all when none is given")
    parser.add_argument("--json", action="store_true", help="print a JSON object by name")


def main(args: argparse.Namespace) -> int:
    """Run the command."""
    from pipeline.networks.registry import NETWORKS

    for name in args.names:
        if name not in NETWORKS:
            raise PipelineError(f"unknown network {name!r}", f"choose from {', '.join(sorted(NETWORKS))}")
    found = {name: describe(name) for name in args.names or NETWORKS}
    print(json.dumps(found, indent=2) if args.json else table(found))
    return 0
