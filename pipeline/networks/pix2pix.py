"""Generator of pix2pix: a U-Net of strided convolutions down to a single pixel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


@torch.no_grad()
def begin_small(network: nn.Module) -> None:
    """Initialise weights as pix2pix and CycleGAN do: normal, mean 0 (1 for batch normalisation), deviation 0.02."""
    for part in network.modules():
        if isinstance(part, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.normal_(part.weight, 0.0, 0.02)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.weight, 1.0, 0.02)
            nn.init.zeros_(part.bias)


class Pix2PixUNet(nn.Module):
    """U-Net-256: 4x4 convolutions of stride 2 on the way down, transposed ones on the way up, concatenated skips.

    Unlike pix2pix, which ends in a tanh, it returns logits as all networks of this package do. The sigmoid that follows
    is the same curve as the tanh, but from 0 to 1.

    Parameters
    ----------
    out_channels : int
        Logit channels.
    widths : sequence of int
        Channels of each level, the first at half the resolution; the last is the bottleneck's.
    dropout : float
        Dropout in training, on the way up: after each step whose output is as wide as the bottleneck, except the step
        out of the bottleneck itself.

    References
    ----------
    Isola et al., "Image-to-image translation with conditional adversarial networks", CVPR 2017.
    """

    def __init__(
        self,
        out_channels: int,
        widths: Sequence[int] = (64, 128, 256, 512, 512, 512, 512, 512),
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        widths = tuple(widths)
        if len(widths) < 2:
            raise ValueError(f"widths {list(widths)}: use two levels or more")
        self.down = nn.ModuleList()
        self.up = nn.ModuleList()
        last = len(widths) - 1
        for level, width in enumerate(widths):
            outer = 3 if level == 0 else widths[level - 1]
            norm = 0 < level < last  # the bottleneck may be a single pixel, which has no variance
            layers: list[nn.Module] = [] if level == 0 else [nn.LeakyReLU(0.2)]
            layers.append(nn.Conv2d(outer, width, 4, stride=2, padding=1, bias=False))
            self.down.append(nn.Sequential(*layers, *([nn.BatchNorm2d(width)] if norm else [])))
            inside = width if level == last else 2 * width
            if level == 0:
                self.up.append(
                    nn.Sequential(nn.ReLU(), nn.ConvTranspose2d(inside, out_channels, 4, stride=2, padding=1))
                )
                continue
            block = [nn.ReLU(), nn.ConvTranspose2d(inside, outer, 4, stride=2, padding=1, bias=False)]
            wide = level < last and outer == widths[last]
            self.up.append(nn.Sequential(*block, nn.BatchNorm2d(outer), *([nn.Dropout(dropout)] if wide else [])))
        begin_small(self)

    def forward(self, x: Tensor) -> Tensor:
        x = 2 * x - 1
        skips = []
        for down in self.down:
            x = down(x)
            skips.append(x)
        x = self.up[-1](skips[-1])
        for up, skip in zip(reversed(self.up[:-1]), reversed(skips[:-1]), strict=True):
            x = up(torch.cat([skip, x], dim=1))
        return x
