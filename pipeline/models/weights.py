"""Networks of model packages, with their weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from pipeline.errors import PipelineError
from pipeline.models.package import ModelPackage

if TYPE_CHECKING:
    from torch import Tensor, nn


@runtime_checkable
class Growing(Protocol):
    """A network that can take up a smaller one's weights."""

    def grown_from(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights with which it computes what the smaller one does."""


def load_weights(network: nn.Module, state: dict[str, Tensor], *, grow: bool = False) -> None:
    """Load weights by name.

    Parameters
    ----------
    network : torch.nn.Module
        Gets them.
    state : dict of str to torch.Tensor
        The weights.
    grow : bool
        Take weights of a smaller network of the same kind too, if the network can (``grown_from``).

    Raises
    ------
    PipelineError
        When they belong to another network.
    """
    try:
        if grow and isinstance(network, Growing):
            state = network.grown_from(state)
        network.load_state_dict(state)
    except (RuntimeError, ValueError) as error:
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
