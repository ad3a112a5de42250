"""Build the networks of model packages and load their weights."""

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
    """A network that can take over the weights of a smaller one."""

    def grown_from(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return weights with which this network computes what the smaller one computes with `state`."""


def load_weights(network: nn.Module, state: dict[str, Tensor], *, grow: bool = False) -> None:
    """Load weights into a network by name.

    Parameters
    ----------
    network : torch.nn.Module
        The network.
    state : dict of str to torch.Tensor
        The weights.
    grow : bool
        Also accept the weights of a smaller network of the same kind, if the network is `Growing`.

    Raises
    ------
    PipelineError
        When the weights belong to another network.
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
        When the weights cannot be read or belong to another network.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    from pipeline.networks.registry import build_network, head_channels

    channels = head_channels(package.heads, len(package.classes))
    network = build_network(package.network, channels, package.network_args, pretrained=False)
    try:
        state = load(package.weights.read_bytes())  # load_file reports any I/O error as a missing file
    except SafetensorError as error:
        raise PipelineError(f"model {package.folder}: the weights cannot be read: {error}", "fetch it again") from None
    # Inference does not use the counters of batch normalisation, so packages leave them out.
    counters = {k: v for k, v in network.state_dict().items() if k.endswith("num_batches_tracked")}
    load_weights(network, state | counters)
    return network.eval()


def weights_for(package: ModelPackage, names: Sequence[str]) -> dict[str, Tensor]:
    """Adapt a package's weights to a network of its kind with other maps.

    Maps that the package has keep their weights, new maps have random ones, and maps that are not wanted are dropped.

    Parameters
    ----------
    package : ModelPackage
        The package.
    names : sequence of str
        Names of the wanted maps, see `pipeline.networks.outputs.map_names`.

    Returns
    -------
    dict of str to torch.Tensor
        Weights of the package's network with one output channel for each of `names`.

    Raises
    ------
    PipelineError
        When the package is an ensemble, or its weights cannot be read or belong to another network.
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

    # Tensors that depend on the number of maps have another shape in a network with one map more.
    fresh = build(len(names))
    try:
        wider = build(len(names) + 1)
    except PipelineError:  # the network's number of maps is fixed
        wider = fresh
    for name, weight in fresh.items():
        branch = re.match(r"branches\.(\d+)", name)
        if branch is not None:  # a branch for each map, whose index may differ between the networks
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
        # The axis of the maps: the first, or the second of a transposed convolution.
        axis = [a == b for a, b in zip(weight.shape, wider[name].shape, strict=True)].index(False)
        drawn, before = weight.movedim(axis, 0), state[name].movedim(axis, 0)
        rows = len(drawn) // len(names)  # rows of each map: several where pixels are folded into channels
        for new, map_name in enumerate(names):
            if map_name in known:
                old = known.index(map_name)
                drawn[new * rows : (new + 1) * rows] = before[old * rows : (old + 1) * rows]
    return fresh
