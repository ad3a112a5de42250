"""Registry that builds networks by name.

A network is a `torch.nn.Module` that maps a float tensor ``(N, 3, H, W)`` in [0, 1] to logits ``(N, C, H, W)``, one
channel for each output of its heads, see `pipeline.networks.outputs.map_names`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from math import lcm
from typing import TYPE_CHECKING, Any

from pipeline.errors import PipelineError
from pipeline.networks.outputs import map_names

if TYPE_CHECKING:
    import numpy as np
    from torch import nn


@dataclass(frozen=True)
class NetworkFamily:
    """How to build a family of networks.

    Parameters
    ----------
    module, factory : str
        Module and name of the constructor; the module is imported only when a network is built.
    source : str
        Where the design comes from.
    stride : int
        Number that patch sides must be a multiple of, unless the arguments change it, see `stride_of`.
    heads : tuple of str
        Heads that the network is trained with by default.
    args : dict
        Arguments that distinguish this family from others with the same constructor.
    pretrained : bool
        Whether the constructor takes ``encoder_weights``.
    levels : bool
        Whether the argument ``widths`` lists levels, each at half the resolution of the one before.
    halved : bool
        Whether the first of these levels is already at half the image's resolution.
    instances : bool
        Whether the network finds instances itself; it then draws its maps from them and has a loss of its own.
    """

    module: str
    factory: str
    source: str
    stride: int
    heads: tuple[str, ...] = ("nucleus", "distance")
    args: dict[str, Any] = field(default_factory=dict)
    pretrained: bool = False
    levels: bool = False
    halved: bool = False
    instances: bool = False


def _unet_plus_plus(size: str) -> NetworkFamily:
    return NetworkFamily(
        module="pipeline.networks.smp",
        factory="unet_plus_plus",
        source=f"U-Net++ (Zhou et al. 2020) on EfficientNet-{size.upper()} (Tan and Le 2019)",
        stride=32,
        args={"encoder": f"efficientnet-{size}"},
        pretrained=True,
    )


NETWORKS = {
    "resunet": NetworkFamily(
        module="pipeline.networks.resunet",
        factory="ResidualUNet",
        source="U-Net (Ronneberger et al. 2015) with residual blocks (He et al. 2016) and additive skips",
        stride=16,
        levels=True,
    ),
    "unet": NetworkFamily(
        module="pipeline.networks.unet",
        factory="UNet",
        source="U-Net (Ronneberger et al. 2015), same-size convolutions",
        stride=16,
        levels=True,
    ),
    "resunet-full": NetworkFamily(
        module="pipeline.networks.resunet_full",
        factory="PreActivationUNet",
        source="ResUNet (Zhang et al. 2018), pre-activation blocks",
        stride=16,
        levels=True,
    ),
    "linknet34": NetworkFamily(
        module="pipeline.networks.linknet",
        factory="LinkNet34",
        source="LinkNet (Chaurasia and Culurciello 2017) on ResNet-34 (He et al. 2016)",
        stride=32,
        pretrained=True,
    ),
    "unet-vit": NetworkFamily(
        module="pipeline.networks.unet",
        factory="UNetViT",
        source="U-Net with a vision transformer (Dosovitskiy et al. 2021) added at the bottleneck",
        stride=16,
        levels=True,
    ),
    "cenet": NetworkFamily(
        module="pipeline.networks.cenet",
        factory="CENet",
        source="CE-Net (Gu et al. 2019) on ResNet-34",
        stride=32,
        heads=("nucleus", "contour"),
        pretrained=True,
    ),
    "mtl": NetworkFamily(
        module="pipeline.networks.mtl",
        factory="MultiTaskUNet",
        source="multi-dilated residual U-Net with bottleneck transformer and attention gates (BSPC 112, 2026)",
        stride=16,
        levels=True,
    ),
    "mtl-base": NetworkFamily(
        module="pipeline.networks.mtl",
        factory="MultiTaskUNet",
        source="multi-dilated residual U-Net as mtl, twice as wide",
        stride=16,
        levels=True,
        args={"widths": (64, 128, 256, 512, 1024), "width": 512},
    ),
    "unetplusplus-b3": _unet_plus_plus("b3"),
    "unetplusplus-b4": _unet_plus_plus("b4"),
    "unetplusplus-b5": _unet_plus_plus("b5"),
    "smp-unet": NetworkFamily(
        module="pipeline.networks.smp",
        factory="unet",
        source="U-Net on any encoder of segmentation-models-pytorch, by default ResNet-34",
        stride=32,
        pretrained=True,
    ),
    "squeeze-unet": NetworkFamily(
        module="pipeline.networks.squeeze",
        factory="SqueezeUNet",
        source="U-Net on SqueezeNet 1.0 (Iandola et al. 2016)",
        stride=16,
        pretrained=True,
    ),
    "hovernet-se": NetworkFamily(
        module="pipeline.networks.hovernet",
        factory="SharedHoVerNet",
        source="HoVer-Net (Graham et al. 2019) with one decoder, on SE-ResNeXt-50 (Hu et al. 2018)",
        stride=8,
        heads=("nucleus", "hv"),
        pretrained=True,
    ),
    "hovernet-se-101": NetworkFamily(
        module="pipeline.networks.hovernet",
        factory="SharedHoVerNet",
        source="HoVer-Net with one decoder as hovernet-se, on SE-ResNeXt-101",
        stride=8,
        heads=("nucleus", "hv"),
        args={"layers": (3, 4, 23, 3)},
        pretrained=True,
    ),
    "pix2pix": NetworkFamily(
        module="pipeline.networks.pix2pix",
        factory="Pix2PixUNet",
        source="generator of pix2pix (Isola et al. 2017): U-Net of eight strided convolutions",
        stride=256,
        levels=True,
        halved=True,
    ),
    "maskrcnn": NetworkFamily(
        module="pipeline.networks.maskrcnn",
        factory="MaskRCNNetwork",
        source="Mask R-CNN (He et al. 2017), torchvision's second version on ResNet-50, anchors 8 to 128 px",
        stride=32,
        pretrained=True,
        instances=True,
    ),
    "maskrcnn-small": NetworkFamily(
        module="pipeline.networks.maskrcnn",
        factory="MaskRCNNetwork",
        source="Mask R-CNN on ResNet-18 with a narrow pyramid and light heads, for CPUs",
        stride=32,
        args={"backbone": "resnet18", "channels": 64, "hidden": 256, "convolutions": 2, "proposals": 500},
        pretrained=True,
        instances=True,
    ),
}


ENSEMBLES = {
    "ensemble": NetworkFamily(
        module="pipeline.networks.ensemble",
        factory="Ensemble",
        source="mean of the maps of several trained networks",
        stride=1,
    ),
}
"""Networks that ``python -m pipeline ensemble`` builds from trained networks; they cannot be trained."""


@dataclass(frozen=True)
class Method:
    """A method that computes maps by rules, without training and without torch.

    Parameters
    ----------
    module, rules, maps : str
        Module, name of the class of the rules, and name of the function that computes uint8 maps ``(C, H, W)`` from an
        RGB image uint8 ``(H, W, 3)`` and rules.
    source : str
        Where the method comes from.
    heads : tuple of str
        Heads whose maps the method computes.
    """

    module: str
    rules: str
    maps: str
    source: str
    heads: tuple[str, ...]


METHODS = {
    "hematoxylin": Method(
        module="pipeline.kernels.hematoxylin",
        rules="HematoxylinRules",
        maps="hematoxylin_maps",
        source="density of hematoxylin (Ruifrok and Johnston 2001) against its surroundings",
        heads=("nucleus", "distance"),
    ),
}
"""Methods that a model package may name in place of a network."""


def needs_torch(name: str) -> bool:
    """Whether `name` needs torch: networks and ensembles do, methods do not."""
    return name not in METHODS


def build_method(name: str, args: dict[str, Any] | None = None) -> Callable[[np.ndarray], np.ndarray]:
    """Return the method called `name` as a function from an image to its maps.

    Parameters
    ----------
    name : str
        A key of `METHODS`.
    args : dict, optional
        Rules that differ from the defaults.

    Raises
    ------
    PipelineError
        When an argument does not fit.
    """
    method = METHODS[name]
    module = import_module(method.module)
    try:
        rules = getattr(module, method.rules)(**(args or {}))
    except (TypeError, ValueError) as error:
        raise PipelineError(f"method {name!r}: {error}", "check the card's network.args") from None
    return partial(getattr(module, method.maps), rules=rules)


def head_channels(heads: Sequence[str], n_types: int = 0) -> int:
    """Number of output channels that `heads` need together, with `n_types` classes of nuclei.

    Raises
    ------
    PipelineError
        When `pipeline.networks.outputs.map_names` does not accept the heads.
    """
    return len(map_names(heads, [str(number) for number in range(n_types)]))


def stride_of(name: str, args: Mapping[str, Any]) -> int:
    """Return the number that the patch sides of a network must be a multiple of.

    It depends on the number of levels, on pixels that are folded into channels, and on the members of an ensemble.
    """
    if name in ENSEMBLES:
        return lcm(*(stride_of(one["network"], one["args"]) * one["factor"] for one in args["members"]))
    family = NETWORKS[name]
    widths = args.get("widths") if family.levels else None
    stride = 2 ** (len(widths) - (not family.halved)) if widths else family.stride
    if (fold := int(args.get("fold", 1))) < 1:
        raise PipelineError(f"network {name!r}: fold {fold}", "use 1 or more")
    return stride * fold


def build_network(
    name: str, out_channels: int, args: dict[str, Any] | None = None, *, pretrained: bool = True
) -> nn.Module:
    """Build the network called `name`, with the result of `stride_of` as its attribute ``stride``.

    Parameters
    ----------
    name : str
        A key of `NETWORKS` or `ENSEMBLES`.
    out_channels : int
        Logit channels.
    args : dict, optional
        Further arguments of the constructor.
    pretrained : bool
        Whether to load ``encoder_weights``. Use False where all weights are loaded afterwards, so that nothing is
        downloaded or read in vain.

    Raises
    ------
    PipelineError
        When the name is unknown or an argument does not fit.
    """
    family = NETWORKS.get(name) or ENSEMBLES.get(name)
    if family is None:
        raise PipelineError(f"unknown network {name!r}", f"choose from {', '.join(sorted(NETWORKS))}")
    factory: Callable[..., Any] = getattr(import_module(family.module), family.factory)
    options = family.args | (args or {})
    if family.pretrained and not pretrained:
        options["encoder_weights"] = None
    try:
        built = factory(out_channels=out_channels, **options)
        built.stride = stride_of(name, options)
    except (TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
        raise PipelineError(f"network {name!r}: {error}", "check the network's arguments") from error
    network: nn.Module = built
    return network
