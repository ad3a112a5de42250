"""Residual U-Net: the pipeline's own small network."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch normalisation and a shortcut.

    Parameters
    ----------
    channels : int
        Channels in and out.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.norm1(self.conv1(x)))
        return functional.relu(x + self.norm2(self.conv2(y)))


class ResidualUNet(nn.Module):
    """U-Net of residual blocks with additive skips, made for CPUs.

    Widening and narrowing happen at the lower resolution of each pair of levels, where they are cheap. Every
    operation is local, so a pixel depends on its neighbourhood alone.

    Parameters
    ----------
    out_channels : int
        Logit channels.
    widths : sequence of int
        Channels of each level, the first at full resolution.

    References
    ----------
    Ronneberger et al., MICCAI 2015; He et al., CVPR 2016.
    """

    def __init__(self, out_channels: int, widths: Sequence[int] = (24, 48, 96, 192, 256)) -> None:
        super().__init__()
        pairs = list(itertools.pairwise(widths))
        self.stem = nn.Sequential(
            nn.Conv2d(3, widths[0], 3, padding=1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU(inplace=True)
        )
        self.encode = nn.ModuleList(ResidualBlock(width) for width in widths)
        self.down = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 2, stride=2, bias=False), nn.BatchNorm2d(b), nn.ReLU(inplace=True))
            for a, b in pairs
        )
        self.up = nn.ModuleList(
            nn.Sequential(nn.Conv2d(b, a, 1, bias=False), nn.BatchNorm2d(a)) for a, b in reversed(pairs)
        )
        self.decode = nn.ModuleList(ResidualBlock(a) for a, _ in reversed(pairs))
        self.head = nn.Sequential(
            nn.Conv2d(widths[0], widths[0], 3, padding=1, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(inplace=True),
            nn.Conv2d(widths[0], out_channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.encode[0](self.stem(x))
        skips = [x]
        for down, encode in zip(self.down, self.encode[1:], strict=True):
            x = encode(down(x))
            skips.append(x)
        skips.pop()
        for up, decode in zip(self.up, self.decode, strict=True):
            x = functional.interpolate(up(x), scale_factor=2.0, mode="nearest")
            x = decode(torch.relu(x + skips.pop()))
        logits: Tensor = self.head(x)
        return logits
