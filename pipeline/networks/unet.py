"""U-Net, and U-Net with a vision transformer beside its encoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pipeline.networks.blocks import MapTransformer


def double_conv(inputs: int, outputs: int, norm: bool) -> nn.Sequential:
    """Two 3x3 convolutions with ReLU, with batch normalisation if `norm`."""
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        layers.append(nn.Conv2d(channels, outputs, 3, padding=1, bias=not norm))
        if norm:
            layers.append(nn.BatchNorm2d(outputs))
        layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """U-Net with same-size convolutions.

    Parameters
    ----------
    out_channels : int
        Logit channels.
    widths : sequence of int
        Channels of each level; the last is the bottleneck's.
    norm : bool
        Batch normalisation after each 3x3 convolution.

    References
    ----------
    Ronneberger et al., "U-Net: convolutional networks for biomedical image segmentation", MICCAI 2015.
    """

    def __init__(
        self, out_channels: int, widths: Sequence[int] = (64, 128, 256, 512, 1024), norm: bool = False
    ) -> None:
        super().__init__()
        *levels, bottleneck = widths
        self.encode = nn.ModuleList(double_conv(a, b, norm) for a, b in zip([3, *levels[:-1]], levels, strict=True))
        self.pool = nn.MaxPool2d(2)
        self.bottleneck = double_conv(levels[-1], bottleneck, norm)
        below = [*levels[1:], bottleneck]
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(b, a, 2, stride=2) for a, b in zip(reversed(levels), reversed(below), strict=True)
        )
        self.decode = nn.ModuleList(double_conv(2 * a, a, norm) for a in reversed(levels))
        self.head = nn.Conv2d(levels[0], out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoded(*self.encoded(x))

    def encoded(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Input of the bottleneck, and the skips from the top level down."""
        skips = []
        for encode in self.encode:
            x = encode(x)
            skips.append(x)
            x = self.pool(x)
        return x, skips

    def decoded(self, x: Tensor, skips: list[Tensor]) -> Tensor:
        """Logits from the input of the bottleneck and the skips."""
        x = self.bottleneck(x)
        for up, decode, skip in zip(self.up, self.decode, reversed(skips), strict=True):
            x = decode(torch.cat([skip, up(x)], dim=1))
        logits: Tensor = self.head(x)
        return logits


class UNetViT(UNet):
    """U-Net with a vision transformer on the image, whose output is added to the input of the bottleneck.

    Parameters
    ----------
    out_channels : int
        Logit channels.
    widths, norm
        As in `UNet`.
    depth, heads, hidden : int
        Number of blocks, number of attention heads and hidden width of the transformer. Its tokens are as wide as the
        level above the bottleneck, so that both can be added.
    image : int
        Side of the image for which the position table is made; for other sizes the table is interpolated.
    dropout : float
        Dropout of the transformer.

    References
    ----------
    Dosovitskiy et al., "An image is worth 16x16 words", ICLR 2021.
    """

    def __init__(
        self,
        out_channels: int,
        widths: Sequence[int] = (64, 128, 256, 512, 1024),
        norm: bool = False,
        depth: int = 18,
        heads: int = 4,
        hidden: int = 2048,
        image: int = 256,
        dropout: float = 0.1,
    ) -> None:
        super().__init__(out_channels, widths, norm)
        patch = 2 ** (len(widths) - 1)
        self.embed = nn.Conv2d(3, widths[-2], patch, stride=patch)
        self.transformer = MapTransformer(widths[-2], depth, heads, hidden, image // patch, dropout)

    def forward(self, x: Tensor) -> Tensor:
        inner, skips = self.encoded(x)
        return self.decoded(inner + self.transformer(self.embed(x)), skips)
