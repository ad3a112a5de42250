"""Multi-task U-Net: multi-dilated residual blocks, bottleneck transformer, gated skips, and a branch for each map."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.networks.blocks import MapTransformer, bilinear, conv_norm_relu


class MultiDilatedBlock(nn.Module):
    """Parallel 3x3 convolutions of several dilations, joined by a 1x1 convolution, with a shortcut.

    Parameters
    ----------
    inputs, outputs : int
        Channels. Each branch has an equal part of `outputs`; the last one also has the remainder.
    dilations : sequence of int
        Dilation of each branch.
    """

    def __init__(self, inputs: int, outputs: int, dilations: Sequence[int] = (1, 2, 4)) -> None:
        super().__init__()
        part = outputs // len(dilations)
        parts = [part] * (len(dilations) - 1)
        parts.append(outputs - sum(parts))
        self.branches = nn.ModuleList(
            conv_norm_relu(inputs, n, dilation=d) for n, d in zip(parts, dilations, strict=True)
        )
        self.join = nn.Sequential(nn.Conv2d(outputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        self.shortcut = (
            nn.Identity()
            if inputs == outputs
            else nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.join(torch.cat([branch(x) for branch in self.branches], dim=1))
        return functional.relu(y + self.shortcut(x))


class AttentionGate(nn.Module):
    """Attention gate: weight each pixel of a skip, depending on the decoder's map.

    Parameters
    ----------
    channels : int
        Channels of the skip and of the decoder's map.

    References
    ----------
    Oktay et al., "Attention U-Net: learning where to look for the pancreas", MIDL 2018.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = max(channels // 2, 1)
        self.of_skip = nn.Sequential(nn.Conv2d(channels, inner, 1, bias=False), nn.BatchNorm2d(inner))
        self.of_gate = nn.Sequential(nn.Conv2d(channels, inner, 1, bias=False), nn.BatchNorm2d(inner))
        self.score = nn.Sequential(nn.Conv2d(inner, 1, 1, bias=False), nn.BatchNorm2d(1))

    def forward(self, skip: Tensor, gate: Tensor) -> Tensor:
        return skip * self.weight(skip, gate)

    def weight(self, skip: Tensor, gate: Tensor) -> Tensor:
        """Weights in (0, 1), one for each pixel."""
        return torch.sigmoid(self.score(functional.relu(self.of_skip(skip) + self.of_gate(gate))))


class BottleneckTransformer(nn.Module):
    """Transformer over the pixels of the bottleneck, whose output is added to its input.

    Parameters
    ----------
    channels : int
        Channels in and out.
    width, depth, heads : int
        Width of a token, number of blocks, number of attention heads.
    side : int
        Side of the position table.
    dropout : float
        Dropout of the transformer.
    """

    def __init__(self, channels: int, width: int, depth: int, heads: int, side: int, dropout: float) -> None:
        super().__init__()
        self.project_in = nn.Conv2d(channels, width, 1)
        self.transformer = MapTransformer(width, depth, heads, 4 * width, side, dropout)
        self.project_out = nn.Conv2d(width, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.project_out(self.transformer(self.project_in(x)))
        return x + y


class MultiTaskUNet(nn.Module):
    """One encoder, one decoder, and a small branch for each map.

    The publication describes the architecture in words only. This network has every part that is named there:
    multi-dilated residual blocks, attention gates, a transformer in the bottleneck, and a head for each task.

    Parameters
    ----------
    out_channels : int
        Logit channels, each with a branch of its own.
    widths : sequence of int
        Channels of each level; the last is the bottleneck's.
    dilations : sequence of int
        Dilations of the residual blocks. The bottleneck has only the first two, because its pixels are already 16 px
        wide (with five levels).
    blocks : int
        Residual blocks of each level.
    width, depth, heads : int
        Width of a token, number of blocks, number of attention heads of the transformer.
    image : int
        Side of the image for which the position table is made; for other sizes the table is interpolated.
    dropout : float
        Dropout of the transformer.

    References
    ----------
    After "Style transformation and distance map-guided nucleus instance segmentation", Biomedical Signal Processing
    and Control 112, 2026; blocks after Gu et al. 2019 and Chen et al. 2018, gates after Oktay et al. 2018.
    """

    def __init__(
        self,
        out_channels: int,
        widths: Sequence[int] = (32, 64, 128, 256, 512),
        dilations: Sequence[int] = (1, 2, 4),
        blocks: int = 1,
        width: int = 256,
        depth: int = 4,
        heads: int = 8,
        image: int = 256,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()

        def level(inputs: int, outputs: int, rates: Sequence[int]) -> nn.Sequential:
            sizes = [inputs, *[outputs] * blocks]
            return nn.Sequential(*(MultiDilatedBlock(a, b, rates) for a, b in itertools.pairwise(sizes)))

        *levels, bottleneck = widths
        self.stem = conv_norm_relu(3, widths[0])
        self.encode = nn.ModuleList(
            level(a, b, dilations) for a, b in zip([widths[0], *levels[:-1]], levels, strict=True)
        )
        self.pool = nn.MaxPool2d(2)
        self.bottleneck = level(levels[-1], bottleneck, dilations[:2])
        self.transformer = BottleneckTransformer(bottleneck, width, depth, heads, image >> len(levels), dropout)
        pairs = list(zip(reversed(levels), reversed([*levels[1:], bottleneck]), strict=True))
        self.up = nn.ModuleList(conv_norm_relu(b, a) for a, b in pairs)
        self.gates = nn.ModuleList(AttentionGate(a) for a, _ in pairs)
        self.decode = nn.ModuleList(level(2 * a, a, dilations) for a, _ in pairs)
        self.branches = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(widths[0], widths[0], 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(widths[0], 1, 1)
            )
            for _ in range(out_channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        skips = []
        for encode in self.encode:
            x = encode(x)
            skips.append(x)
            x = self.pool(x)
        x = self.transformer(self.bottleneck(x))
        for up, gate, decode, skip in zip(self.up, self.gates, self.decode, reversed(skips), strict=True):
            x = up(bilinear(x, scale_factor=2.0))
            x = decode(torch.cat([gate(skip, x), x], dim=1))
        return torch.cat([branch(x) for branch in self.branches], dim=1)
