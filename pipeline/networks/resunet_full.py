"""Residual U-Net of a published comparison with U-Net and LinkNet: pre-activation blocks, concatenated skips."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


class PreActivationBlock(nn.Module):
    """Residual block: batch normalisation, ReLU and 3x3 convolution, twice; then the shortcut is added, and a ReLU.

    Parameters
    ----------
    inputs, outputs : int
        Channels. Where they differ, the shortcut is a 1x1 convolution.

    References
    ----------
    He et al., "Identity mappings in deep residual networks", ECCV 2016.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.shortcut = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(functional.relu(self.norm1(x)))
        y = self.conv2(functional.relu(self.norm2(y)))
        return functional.relu(y + self.shortcut(x))


class PreActivationUNet(nn.Module):
    """U-Net whose double convolutions are pre-activation residual blocks.

    Parameters
    ----------
    out_channels : int
        Logit channels.
    widths : sequence of int
        Channels of each level; the last is the bottleneck's.

    References
    ----------
    Zhang et al., "Road extraction by deep residual U-Net", IEEE GRSL 2018.
    """

    def __init__(self, out_channels: int, widths: Sequence[int] = (64, 128, 256, 512, 1024)) -> None:
        super().__init__()
        self.encode = nn.ModuleList(PreActivationBlock(a, b) for a, b in zip([3, *widths[:-1]], widths, strict=True))
        self.pool = nn.MaxPool2d(2)
        pairs = list(zip(reversed(widths[:-1]), reversed(widths[1:]), strict=True))
        self.up = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, stride=2) for a, b in pairs)
        self.decode = nn.ModuleList(PreActivationBlock(2 * a, a) for a, _ in pairs)
        self.head = nn.Conv2d(widths[0], out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips: list[Tensor] = []
        for encode in self.encode:
            x = encode(self.pool(x) if skips else x)
            skips.append(x)
        skips.pop()
        for up, decode, skip in zip(self.up, self.decode, reversed(skips), strict=True):
            x = decode(torch.cat([skip, up(x)], dim=1))
        logits: Tensor = self.head(x)
        return logits
