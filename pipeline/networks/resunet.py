"""Residual U-Net: the pipeline's own small network."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from pipeline.networks.blocks import fold_norm, fold_sequences
from pipeline.networks.fused import norm_relu, relu_of_sum


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
        self.norm1: nn.Module = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2: nn.Module = nn.BatchNorm2d(channels)

    def fold_norms(self) -> None:
        """Fold the batch normalisations into the convolutions, for inference only."""
        self.conv1, self.conv2 = fold_norm(self.conv1, self.norm1), fold_norm(self.conv2, self.norm2)
        self.norm1 = self.norm2 = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = norm_relu(self.conv1, self.norm1, x)
        return norm_relu(self.conv2, self.norm2, y, x)


class ResidualUNet(nn.Module):
    """U-Net of residual blocks with additive skips, made for CPUs.

    The number of channels changes at the lower resolution of each pair of levels, where this is cheap. All operations
    are local, so an output pixel depends only on its neighbourhood.

    Parameters
    ----------
    out_channels : int
        Logit channels.
    widths : sequence of int
        Channels of each level, the first at full resolution (that of the folded image).
    blocks : sequence of int
        Residual blocks of each level on the way down, by default one. On the way up each level has one.
    fold : int
        Side of the squares of pixels that are folded into channels before the first level and unfolded after the last
        (1: none). With 2 the network's images and maps have twice the resolution, at nearly the same cost for the same
        area of tissue.

    References
    ----------
    Ronneberger et al., MICCAI 2015; He et al., CVPR 2016; Shi et al., CVPR 2016, for folding.
    """

    def __init__(
        self,
        out_channels: int,
        widths: Sequence[int] = (24, 48, 96, 192, 256),
        blocks: Sequence[int] = (),
        fold: int = 1,
    ) -> None:
        super().__init__()
        if blocks and len(blocks) != len(widths):
            raise ValueError(f"blocks has {len(blocks)} levels, widths has {len(widths)}")
        if not widths:
            raise ValueError("widths lists no level")
        pairs = list(itertools.pairwise(widths))
        self.fold = fold
        self.stem = nn.Sequential(
            nn.Conv2d(3 * fold**2, widths[0], 3, padding=1, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(inplace=True),
        )
        self.encode = nn.ModuleList(ResidualBlock(width) for width in widths)
        self.deeper = nn.ModuleList(
            nn.Sequential(*(ResidualBlock(width) for _ in range(1, count)))
            for width, count in zip(widths, blocks or [1] * len(widths), strict=True)
        )
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
            nn.Conv2d(widths[0], out_channels * fold**2, 1),
        )

    def grown_from(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return weights with which this network computes what a smaller one of its kind does, to train on from.

        Parameters
        ----------
        state : mapping of str to torch.Tensor
            Weights of a network with the same heads and levels, and at most as many channels and blocks. Its fold must
            be that of this network, or 1. In the latter case this network returns the same maps, enlarged `fold` times,
            for an image that is enlarged `fold` times.

        Returns
        -------
        dict of str to torch.Tensor
            Weights of this network.

        Raises
        ------
        ValueError
            When the weights are those of another kind of network, or of a larger one.

        References
        ----------
        Chen et al., "Net2Net", ICLR 2016.
        """
        own = {name: weight.clone() for name, weight in self.state_dict().items()}
        if set(state) - set(own):
            raise ValueError(f"no {min(set(state) - set(own))} in this network")
        stem, head = "stem.0.weight", "head.3"
        for name in (stem, f"{head}.weight", f"{head}.bias"):
            if name not in state:
                raise ValueError(f"{name} is missing")
        old = dict(state)
        if own[stem].shape[1] != state[stem].shape[1]:
            if state[stem].shape[1] != 3:
                raise ValueError("folded by another factor")
            old[stem] = state[stem].repeat_interleave(self.fold**2, dim=1) / self.fold**2
            for part in ("weight", "bias"):
                old[f"{head}.{part}"] = state[f"{head}.{part}"].repeat_interleave(self.fold**2, dim=0)
        for name, weight in own.items():
            if name not in old:
                if name.endswith("norm2.weight"):  # makes the new residual block an identity
                    weight.zero_()
                continue
            small = old[name]
            if any(a > b for a, b in zip(small.shape, weight.shape, strict=True)):
                raise ValueError(f"{name} is {tuple(small.shape)}, here it is {tuple(weight.shape)}")
            if weight.ndim == 4:  # existing output channels ignore new input channels
                weight[: small.shape[0], small.shape[1] :] = 0
            weight[tuple(slice(n) for n in small.shape)] = small
        return own

    def fold_norms(self) -> None:
        """See `pipeline.networks.outputs.Folding`."""
        fold_sequences(self)
        for part in list(self.modules()):
            if isinstance(part, ResidualBlock):
                part.fold_norms()

    def forward(self, x: Tensor) -> Tensor:
        stem: Any = self.stem[0]
        x = x.to(stem.weight.dtype)
        if self.fold > 1:
            x = functional.pixel_unshuffle(x, self.fold)
        x = self.deeper[0](self.encode[0](norm_relu(stem, self.stem[1], x)))
        skips = [x]
        down: Any
        for down, encode, deeper in zip(self.down, self.encode[1:], self.deeper[1:], strict=True):
            x = deeper(encode(norm_relu(down[0], down[1], x)))
            skips.append(x)
        skips.pop()
        for up, decode in zip(self.up, self.decode, strict=True):
            x = functional.interpolate(up(x), scale_factor=2.0, mode="nearest")
            x = decode(relu_of_sum(x, skips.pop()))
        logits: Tensor = self.head[3](norm_relu(self.head[0], self.head[1], x))
        return functional.pixel_shuffle(logits, self.fold) if self.fold > 1 else logits
