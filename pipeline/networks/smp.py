"""Networks of segmentation-models-pytorch: U-Net and U-Net++ on any of its encoders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from pipeline.errors import PipelineError
from pipeline.networks.blocks import ImageNetNormalise
from pipeline.networks.encoders import IMAGENET, load_encoder

DEPTH = 5
"""How many times the encoders halve the resolution."""


class _Segmenter(nn.Module):
    """A network of segmentation-models-pytorch, preceded by ImageNet's normalisation."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.normalise = ImageNetNormalise()
        self.encoder = network.encoder
        self.decoder = network.decoder
        self.head = network.segmentation_head

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.decoder(self.encoder(self.normalise(x))))
        return logits


def _build(
    architecture: str, out_channels: int, encoder: str, encoder_weights: str | None, decoder: Sequence[int]
) -> nn.Module:
    import segmentation_models_pytorch as smp
    from segmentation_models_pytorch.encoders import get_encoder

    if len(decoder) != DEPTH:  # fewer would leave stages of the encoder without a gradient
        raise ValueError(f"decoder_channels {list(decoder)}: use {DEPTH} values")
    try:
        network = getattr(smp, architecture)(
            encoder, encoder_weights=None, classes=out_channels, decoder_channels=tuple(decoder)
        )
    except (KeyError, RuntimeError) as error:
        raise PipelineError(
            f"unknown encoder {encoder!r}: {' '.join(str(error).split())[:80]}",
            "use an encoder's name of segmentation-models-pytorch, e.g. resnet34 or tu-convnext_tiny",
        ) from None

    for name in ("_conv_head", "_bn1"):  # of EfficientNet's classifier; they would never get a gradient
        if hasattr(network.encoder, name):
            delattr(network.encoder, name)

    def fetch() -> dict[str, Tensor]:
        # The name of a timm encoder may include that of its weights.
        weights = True if encoder.startswith("tu-") else "imagenet"
        return dict(get_encoder(encoder, weights=weights).state_dict())

    load_encoder(network.encoder, encoder_weights, {IMAGENET: fetch}, encoder)
    return _Segmenter(network)


def unet(
    out_channels: int,
    encoder: str = "resnet34",
    encoder_weights: str | None = None,
    decoder_channels: Sequence[int] = (256, 128, 64, 32, 16),
) -> nn.Module:
    """U-Net on an encoder of segmentation-models-pytorch.

    Parameters
    ----------
    out_channels : int
        Logit channels.
    encoder : str
        Name of the encoder in segmentation-models-pytorch; ``tu-NAME`` for one of timm.
    encoder_weights : str or None
        ``imagenet``, a file of the encoder's weights, or None.
    decoder_channels : sequence of int
        Channels of the five levels of the decoder, from the bottom up.

    Raises
    ------
    PipelineError
        When the encoder is unknown or its weights cannot be loaded.

    References
    ----------
    Ronneberger et al., MICCAI 2015.
    """
    return _build("Unet", out_channels, encoder, encoder_weights, decoder_channels)


def unet_plus_plus(
    out_channels: int,
    encoder: str = "efficientnet-b4",
    encoder_weights: str | None = None,
    decoder_channels: Sequence[int] = (256, 128, 64, 32, 16),
) -> nn.Module:
    """U-Net++ on an encoder of segmentation-models-pytorch; see `unet` for the parameters.

    References
    ----------
    Zhou et al., "UNet++: redesigning skip connections to exploit multiscale features in image segmentation", IEEE TMI
    2020; Tan and Le, "EfficientNet", ICML 2019.
    """
    return _build("UnetPlusPlus", out_channels, encoder, encoder_weights, decoder_channels)
