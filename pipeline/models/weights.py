"""Networks of model packages, with their weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.errors import PipelineError
from pipeline.models.package import ModelPackage

if TYPE_CHECKING:
    from torch import Tensor, nn


def load_weights(network: nn.Module, state: dict[str, Tensor]) -> None:
    """Load weights by name.

    Raises
    ------
    PipelineError
        When they belong to another network.
    """
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        first = " ".join(str(error).split())[:200]
        raise PipelineError(
            f"the weights belong to another network: {first}", "check the network's name and arguments"
        ) from None


def load_network(package: ModelPackage) -> nn.Module:
    """Build a package's network and load its weights, in evaluation mode on the CPU.

    Raises
    ------
    PipelineError
        When the weights are not those of the card or belong to another network.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from pipeline.networks.registry import build_network, head_channels

    channels = head_channels(package.heads, len(package.classes))
    network = build_network(package.network, channels, package.network_args, pretrained=False)
    try:
        state = load_file(package.weights)
    except (SafetensorError, OSError) as error:
        raise PipelineError(f"model {package.folder}: the weights cannot be read: {error}", "fetch it again") from None
    # Counters of batch normalisation play no part in inference and are not packed.
    counters = {k: v for k, v in network.state_dict().items() if k.endswith("num_batches_tracked")}
    load_weights(network, state | counters)
    return network.eval()
