"""U-Net on a SqueezeNet: the smallest network with a pretrained encoder."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.networks.blocks import IMAGENET_MEAN, IMAGENET_STD, conv_norm_relu, fold_sequences
from pipeline.networks.encoders import IMAGENET, encoder_part, load_encoder

CAFFE_MEAN = (104.0, 117.0, 123.0)
"""Means of blue, green and red in 0..255, which Caffe's ImageNet networks subtract."""

TORCHVISION_FIRES = {3: "fire2", 4: "fire3", 5: "fire4", 7: "fire5", 8: "fire6", 9: "fire7", 10: "fire8", 12: "fire9"}
"""Fire modules by their numbers in torchvision's ``features``."""


class Fire(nn.Module):
    """Fire module: a 1x1 convolution to few channels, then parallel 1x1 and 3x3 convolutions to more.

    Parameters
    ----------
    inputs, narrow, wide : int
        Channels of the input, after the first convolution, and of each of the two branches.
    """

    def __init__(self, inputs: int, narrow: int, wide: int) -> None:
        super().__init__()
        self.squeeze1x1 = nn.Conv2d(inputs, narrow, 1)
        self.expand1x1 = nn.Conv2d(narrow, wide, 1)
        self.expand3x3 = nn.Conv2d(narrow, wide, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.squeeze1x1(x))
        return functional.relu(torch.cat([self.expand1x1(x), self.expand3x3(x)], dim=1))


def from_torchvision(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert torchvision's SqueezeNet 1.0 to Caffe's names and Caffe's pixels.

    The first convolution absorbs the change from RGB normalised for ImageNet to BGR in 0..255 minus `CAFFE_MEAN`.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        group, number, *rest = name.split(".")
        if group != "features":
            continue
        module = "conv1" if number == "0" else TORCHVISION_FIRES[int(number)]
        found[".".join([module, *rest]).replace("squeeze.", "squeeze1x1.")] = tensor
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    shift = (torch.tensor(CAFFE_MEAN).flip(0) / 255 - mean) / std
    kernel = found["conv1.weight"]
    found["conv1.bias"] = found["conv1.bias"] + (kernel * shift.view(1, 3, 1, 1)).sum(dim=(1, 2, 3))
    found["conv1.weight"] = (kernel / (255 * std).view(1, 3, 1, 1)).flip(1)
    return found


def translate(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert a state dict of Caffe's or torchvision's SqueezeNet 1.0 to the encoder's names."""
    if "features.0.weight" in state:
        return from_torchvision(state)
    return encoder_part({name.replace("/", "."): tensor for name, tensor in state.items()})


class SqueezeEncoder(nn.Module):
    """SqueezeNet 1.0 without its classifier, on RGB in [0, 1]; four feature maps, each with half the previous side.

    Parameters
    ----------
    weights : str or None
        ``imagenet`` (torchvision's), a file with Caffe's or torchvision's names, or None.
    stride : int
        Stride of the first convolution: 2 as trained; 1 keeps the image's resolution.

    References
    ----------
    Iandola et al., "SqueezeNet: AlexNet-level accuracy with 50x fewer parameters and <0.5MB model size", 2016.
    """

    channels = (96, 256, 512, 512)
    mean: Tensor

    def __init__(self, weights: str | None = None, stride: int = 2) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(CAFFE_MEAN).view(1, 3, 1, 1), persistent=False)
        self.conv1 = nn.Conv2d(3, 96, 7, stride=stride, padding=3)
        self.fire2 = Fire(96, 16, 64)
        self.fire3 = Fire(128, 16, 64)
        self.fire4 = Fire(128, 32, 128)
        self.fire5 = Fire(256, 32, 128)
        self.fire6 = Fire(256, 48, 192)
        self.fire7 = Fire(384, 48, 192)
        self.fire8 = Fire(384, 64, 256)
        self.fire9 = Fire(512, 64, 256)

        def fetch() -> dict[str, Tensor]:
            from torchvision.models import SqueezeNet1_0_Weights

            return dict(SqueezeNet1_0_Weights.IMAGENET1K_V1.get_state_dict(progress=False, check_hash=True))

        load_encoder(self, weights, {IMAGENET: fetch}, "SqueezeNet 1.0", translate)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = x.flip(1) * 255 - self.mean
        x = functional.relu(self.conv1(x))
        features = [x]
        for fires in (
            (self.fire2, self.fire3, self.fire4),
            (self.fire5, self.fire6, self.fire7, self.fire8),
            (self.fire9,),
        ):
            x = functional.max_pool2d(x, 3, stride=2, padding=1)
            for fire in fires:
                x = fire(x)
            features.append(x)
        return features


class SqueezeUNet(nn.Module):
    """U-Net on SqueezeNet 1.0.

    Parameters
    ----------
    out_channels : int
        Logit channels.
    encoder_weights : str or None
        ``imagenet`` (torchvision's), a file with Caffe's or torchvision's names, or None.
    widths : sequence of int
        Channels of the decoder, from the finest map to the bottom: five values with a stem, four without; further ones
        are ignored.
    stride : int
        Stride of the encoder's first convolution: 2 as trained; 1 sees finer detail at four times the cost.
    stem : bool
        Only with stride 2: whether to add a map at full resolution beside the encoder. Without it the decoder ends at
        half the resolution, and the head predicts all four pixels of each 2 x 2 square, at two thirds of the cost.
    """

    def __init__(
        self,
        out_channels: int,
        encoder_weights: str | None = None,
        widths: Sequence[int] = (32, 48, 96, 128, 192),
        stride: int = 2,
        stem: bool = True,
    ) -> None:
        super().__init__()
        self.encoder = SqueezeEncoder(encoder_weights, stride)
        skips = [*self.encoder.channels]
        self.stem = conv_norm_relu(3, widths[0]) if stride == 2 and stem else None
        self.square = 1 if stride == 1 or stem else 2
        if self.stem is not None:
            skips.insert(0, widths[0])
        if stride not in (1, 2) or len(widths) < len(skips):
            raise ValueError(f"stride {stride} with widths {list(widths)}: use stride 1 or 2 and {len(skips)} widths")
        # The encoder has no batch normalisation, so each of its maps is first brought to a common scale.
        self.narrow = nn.ModuleList(conv_norm_relu(a, b, kernel=1) for a, b in zip(skips, widths, strict=False))
        pairs = list(itertools.pairwise(widths[: len(skips)]))
        self.up = nn.ModuleList(conv_norm_relu(b, a, kernel=1) for a, b in reversed(pairs))
        self.decode = nn.ModuleList(
            nn.Sequential(conv_norm_relu(2 * a, a), conv_norm_relu(a, a)) for a, _ in reversed(pairs)
        )
        self.head = nn.Conv2d(widths[0], out_channels * self.square**2, 1)

    def fold_norms(self) -> None:
        """See `pipeline.networks.outputs.Folding`."""
        fold_sequences(self)

    def forward(self, x: Tensor) -> Tensor:
        features = self.encoder(x)
        if self.stem is not None:
            features = [self.stem(x), *features]
        skips = [narrow(f) for narrow, f in zip(self.narrow, features, strict=True)]
        y = skips.pop()
        for up, decode in zip(self.up, self.decode, strict=True):
            y = functional.interpolate(up(y), scale_factor=2.0, mode="nearest")
            y = decode(torch.cat([skips.pop(), y], dim=1))
        logits: Tensor = functional.pixel_shuffle(self.head(y), self.square)
        return logits
