"""Networks of model packages, with their weights."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
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
    from safetensors.torch import load

    from pipeline.networks.registry import build_network, head_channels

    channels = head_channels(package.heads, len(package.classes))
    network = build_network(package.network, channels, package.network_args, pretrained=False)
    try:
        state = load(package.weights.read_bytes())  # load_file tells any trouble of the machine as a missing file
    except SafetensorError as error:
        raise PipelineError(f"model {package.folder}: the weights cannot be read: {error}", "fetch it again") from None
    # Counters of batch normalisation play no part in inference and are not packed.
    counters = {k: v for k, v in network.state_dict().items() if k.endswith("num_batches_tracked")}
    load_weights(network, state | counters)
    return network.eval()


def weights_for(package: ModelPackage, names: Sequence[str]) -> dict[str, Tensor]:
    """A package's weights for a network of its kind that draws other maps.

    Maps of the same name keep what draws them; new ones begin at random, and those that are not wanted go.

    Parameters
    ----------
    package : ModelPackage
        The package.
    names : sequence of str
        The maps, see `pipeline.networks.outputs.map_names`.

    Returns
    -------
    dict of str to torch.Tensor
        Weights of the package's network with one channel for each of `names`.

    Raises
    ------
    PipelineError
        When the weights are not those of the card or belong to another network.
    """
    from pipeline.networks.outputs import map_names
    from pipeline.networks.registry import ENSEMBLES, build_network

    if package.network in ENSEMBLES:
        raise PipelineError(
            f"model {package.folder} is an ensemble: there is no one network in it to train on from",
            "start from one of its members (python -m pipeline ensemble --apart), or let it be the teacher",
        )
    state = load_network(package).state_dict()
    known = map_names(package.heads, [one.name for one in package.classes])
    if known == tuple(names):
        return state

    def build(channels: int) -> dict[str, Tensor]:
        return build_network(package.network, channels, package.network_args, pretrained=False).state_dict()

    fresh = build(len(names))
    try:
        wider = build(len(names) + 1)
    except PipelineError:  # a network of so many heads, whatever they draw
        wider = fresh
    for name, weight in fresh.items():
        branch = re.match(r"branches\.(\d+)", name)
        if branch is not None:  # one for each map, whose number may be another here
            map_name = names[int(branch[1])]
            if map_name in known:
                weight.copy_(state[f"branches.{known.index(map_name)}{name[branch.end() :]}"])
            continue
        if name not in state:
            continue
        if wider[name].shape == weight.shape:
            if state[name].shape == weight.shape:
                weight.copy_(state[name])
            continue
        # Where the maps are: first, or second of a transposed convolution.
        axis = [a == b for a, b in zip(weight.shape, wider[name].shape, strict=True)].index(False)
        drawn, before = weight.movedim(axis, 0), state[name].movedim(axis, 0)
        rows = len(drawn) // len(names)  # more than one where pixels are folded into channels
        for new, map_name in enumerate(names):
            if map_name in known:
                old = known.index(map_name)
                drawn[new * rows : (new + 1) * rows] = before[old * rows : (old + 1) * rows]
    return fresh
