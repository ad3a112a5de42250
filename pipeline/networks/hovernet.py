"""HoVer-style network with one shared decoder on SE-ResNeXt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.errors import PipelineError
from pipeline.networks.blocks import ImageNetNormalise
from pipeline.networks.encoders import IMAGENET, load_encoder

PRETRAINED: dict[tuple[int, ...], str] = {
    (3, 4, 6, 3): "seresnext50_32x4d.racm_in1k",
    (3, 4, 23, 3): "seresnext101_32x4d.gluon_in1k",
}
"""Names of timm's ImageNet weights by the number of blocks in each stage."""


class SEResNeXt(nn.Module):
    """SE-ResNeXt 32x4d whose stem keeps the resolution; feature maps at 1, 1/2, 1/4 and 1/8.

    Parameters
    ----------
    layers : sequence of int
        Number of blocks in each stage: (3, 4, 6, 3) is SE-ResNeXt-50, (3, 4, 23, 3) is SE-ResNeXt-101.
    weights : str or None
        ``imagenet``, a file with timm's names, or None.

    References
    ----------
    Xie et al., CVPR 2017 (ResNeXt); Hu et al., CVPR 2018 (squeeze and excitation).
    """

    channels = (256, 512, 1024, 2048)

    def __init__(self, layers: Sequence[int], weights: str | None) -> None:
        super().__init__()
        from timm import create_model
        from timm.models.resnet import Bottleneck, ResNet

        network: Any = ResNet(
            Bottleneck,  # type: ignore[arg-type]
            tuple(layers),
            num_classes=0,
            cardinality=32,
            base_width=4,
            block_args={"attn_layer": "se"},
        )
        network.conv1.stride = (1, 1)
        self.conv1, self.bn1 = network.conv1, network.bn1
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            network.layer1, network.layer2, network.layer3, network.layer4,
        )  # fmt: skip
        name = f"SE-ResNeXt with {'-'.join(map(str, layers))} blocks"

        def fetch() -> dict[str, Tensor]:
            if tuple(layers) not in PRETRAINED:
                raise PipelineError(f"encoder_weights imagenet: there are none for {name}", "use null or a file")
            return dict(create_model(PRETRAINED[tuple(layers)], pretrained=True).state_dict())

        load_encoder(self, weights, {IMAGENET: fetch}, name)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = functional.relu(self.bn1(self.conv1(x)))
        features = []
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
            features.append(x)
        return features


class DenseUnit(nn.Module):
    """Pre-activation 1x1 and grouped 3x3 convolutions whose output is concatenated to their input.

    Parameters
    ----------
    inputs : int
        Input channels; the output has 32 more.
    """

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.BatchNorm2d(inputs),
            nn.ReLU(),
            nn.Conv2d(inputs, 128, 1, bias=False),
            nn.BatchNorm2d(128),
            nn.ReLU(inplace=True),
            nn.Conv2d(128, 32, 3, padding=1, groups=4, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.layers(x)], dim=1)


def dense_stage(inputs: int, start: int, units: int) -> nn.Sequential:
    """3x3 convolution, dense units, and a 1x1 convolution that keeps their ``start + 32 * units`` channels."""
    width = start + 32 * units
    return nn.Sequential(
        nn.Conv2d(inputs, start, 3, padding=1, bias=False),
        *(DenseUnit(start + 32 * i) for i in range(units)),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.Conv2d(width, width, 1, bias=False),
    )


class SharedHoVerNet(nn.Module):
    """HoVer-Net with one decoder for all maps, on SE-ResNeXt at full resolution.

    Parameters
    ----------
    out_channels : int
        Logit channels.
    layers, encoder_weights
        As in `SEResNeXt`.
    dropout : float
        Share of the channels that are dropped before each stage of the decoder.
    normalise : bool
        Normalise the input to ImageNet's mean and standard deviation first. The entry to the CoNIC challenge that is
        cited below did not do so.

    References
    ----------
    Graham et al., "HoVer-Net: simultaneous segmentation and classification of nuclei in multi-tissue histology
    images", Medical Image Analysis 2019; with the shared decoder of the CoNIC 2022 entry "Pathology AI".
    """

    def __init__(
        self,
        out_channels: int,
        layers: Sequence[int] = (3, 4, 6, 3),
        encoder_weights: str | None = None,
        dropout: float = 0.5,
        normalise: bool = True,
    ) -> None:
        super().__init__()
        self.normalise = ImageNetNormalise() if normalise else nn.Identity()
        self.encoder = SEResNeXt(layers, encoder_weights)
        self.narrow = nn.Conv2d(2048, 1024, 1, bias=False)
        self.drop = nn.Dropout2d(dropout)
        self.decode3 = dense_stage(1024, 256, 8)
        self.decode2 = dense_stage(512, 128, 4)
        self.decode1 = nn.Conv2d(256, 64, 3, padding=1, bias=False)
        self.head = nn.Sequential(nn.BatchNorm2d(64), nn.ReLU(inplace=True), nn.Conv2d(64, out_channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        e1, e2, e3, e4 = self.encoder(self.normalise(x))
        x = self.narrow(e4)
        for decode, skip in ((self.decode3, e3), (self.decode2, e2), (self.decode1, e1)):
            x = decode(self.drop(functional.interpolate(x, scale_factor=2.0, mode="nearest")) + skip)
        logits: Tensor = self.head(x)
        return logits
