"""CE-Net: context encoder network."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.networks.blocks import ImageNetNormalise, bilinear
from pipeline.networks.encoders import ResNet34Encoder

POOLS = (2, 3, 5, 6)
"""Sides and strides of the pooling windows; a smaller map is pooled as a whole."""


class DenseAtrousConvolution(nn.Module):
    """Dense atrous convolution (DAC): four branches that share dilated convolutions and are added to the input.

    Parameters
    ----------
    channels : int
        Channels in and out.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dilate1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.dilate3 = nn.Conv2d(channels, channels, 3, padding=3, dilation=3)
        self.dilate5 = nn.Conv2d(channels, channels, 3, padding=5, dilation=5)
        self.project = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.dilate1(x)
        second = self.dilate3(first)
        branches = (
            first,
            self.project(self.dilate3(x)),
            self.project(second),
            self.project(self.dilate5(second)),
        )
        for branch in branches:
            x = x + functional.relu(branch)
        return x


class ResidualMultiPooling(nn.Module):
    """Residual multi-kernel pooling (RMP): max-pooling at several sizes, concatenated to the input.

    One shared projection reduces each pooled map to one channel.

    Parameters
    ----------
    channels : int
        Input channels; the output has one more for each pooling size.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.project = nn.Conv2d(channels, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        parts = [x]
        for side in POOLS:
            pooled = functional.max_pool2d(x, (min(side, height), min(side, width)))
            parts.append(bilinear(self.project(pooled), size=(height, width)))
        return torch.cat(parts, dim=1)


def decoder_block(inputs: int, outputs: int) -> nn.Sequential:
    """Narrow, double the resolution, widen; each convolution with batch normalisation and ReLU."""
    narrow = inputs // 4
    return nn.Sequential(
        nn.Conv2d(inputs, narrow, 1),
        nn.BatchNorm2d(narrow),
        nn.ReLU(inplace=True),
        nn.ConvTranspose2d(narrow, narrow, 3, stride=2, padding=1, output_padding=1),
        nn.BatchNorm2d(narrow),
        nn.ReLU(inplace=True),
        nn.Conv2d(narrow, outputs, 1),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class CENet(nn.Module):
    """CE-Net: ResNet-34 encoder, dense atrous convolution, residual multi-kernel pooling, additive skips.

    Parameters
    ----------
    out_channels : int
        Logit channels.
    encoder_weights : str or None
        ``imagenet``, a file with torchvision's names, or None.
    normalise : bool
        Normalise the input to ImageNet's mean and standard deviation; otherwise scale it to -1.6..1.6, as CE-Net's
        code does.

    References
    ----------
    Gu et al., "CE-Net: context encoder network for 2D medical image segmentation", IEEE TMI 2019.
    """

    def __init__(self, out_channels: int, encoder_weights: str | None = None, normalise: bool = True) -> None:
        super().__init__()
        self.normalise = ImageNetNormalise() if normalise else None
        self.encoder = ResNet34Encoder(encoder_weights)
        self.atrous = DenseAtrousConvolution(512)
        self.pooling = ResidualMultiPooling(512)
        self.decode4 = decoder_block(512 + len(POOLS), 256)
        self.decode3 = decoder_block(256, 128)
        self.decode2 = decoder_block(128, 64)
        self.decode1 = decoder_block(64, 64)
        self.tail = nn.Sequential(
            nn.ConvTranspose2d(64, 32, 4, stride=2, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(32, out_channels, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        e1, e2, e3, e4 = self.encoder(x * 3.2 - 1.6 if self.normalise is None else self.normalise(x))
        x = self.decode4(self.pooling(self.atrous(e4))) + e3
        x = self.decode3(x) + e2
        x = self.decode2(x) + e1
        logits: Tensor = self.tail(self.decode1(x))
        return logits
