"""Networks that only training needs: discriminators, and the generator that paints H&E."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from pipeline.networks.pix2pix import begin_small


class PatchDiscriminator(nn.Module):
    """Discriminator that returns a logit for each patch of an image: how real the patch looks.

    With three layers the patches are 70 x 70 pixels.

    Parameters
    ----------
    channels : int
        Channels of the image; for a conditional discriminator, those of input and output together.
    width : int
        Channels of the first layer, doubled in each following layer up to eight times as many.
    layers : int
        Number of convolutions of stride 2.
    spectral : bool
        Apply spectral normalisation to every convolution; otherwise instance normalisation between them, as in
        CycleGAN.

    References
    ----------
    Isola et al., "Image-to-image translation with conditional adversarial networks", CVPR 2017; Miyato et al.,
    "Spectral normalization for generative adversarial networks", ICLR 2018.
    """

    def __init__(self, channels: int, width: int = 64, layers: int = 3, spectral: bool = True) -> None:
        super().__init__()
        widths = [channels, *(width * min(2**level, 8) for level in range(layers + 1)), 1]
        parts: list[nn.Module] = []
        for level, (inputs, outputs) in enumerate(pairwise(widths)):
            parts.append(nn.Conv2d(inputs, outputs, 4, stride=2 if level < layers else 1, padding=1))
            if level <= layers:
                if level and not spectral:
                    parts.append(nn.InstanceNorm2d(outputs))
                parts.append(nn.LeakyReLU(0.2))
        self.layers = nn.Sequential(*parts)
        begin_small(self)
        if spectral:
            for part in self.layers:
                if isinstance(part, nn.Conv2d):
                    spectral_norm(part)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.layers(x)
        return logits


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *_conv_norm_relu(width, width, 3, padding=1, padding_mode="reflect"),
            *_conv_norm_relu(width, width, 3, padding=1, padding_mode="reflect")[:-1],
        )

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.layers(x)
        return result


def _conv_norm_relu(inputs: int, outputs: int, kernel: int, **how: object) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, kernel, **how), nn.InstanceNorm2d(outputs), nn.ReLU()]  # type: ignore[arg-type]


class ResNetGenerator(nn.Module):
    """Generator that turns one image into another of the same size; values of both are in -1..1.

    The resolution is halved twice, then follow residual blocks, then it is doubled twice.

    Parameters
    ----------
    width : int
        Channels at full resolution.
    blocks : int
        Number of residual blocks, which are at a quarter of the resolution.

    References
    ----------
    Zhu et al., "Unpaired image-to-image translation using cycle-consistent adversarial networks", ICCV 2017.
    """

    def __init__(self, width: int = 64, blocks: int = 9) -> None:
        super().__init__()
        parts = _conv_norm_relu(3, width, 7, padding=3, padding_mode="reflect")
        for level in range(2):
            parts += _conv_norm_relu(width * 2**level, 2 * width * 2**level, 3, stride=2, padding=1)
        parts += [_Residual(4 * width) for _ in range(blocks)]
        for level in (1, 0):
            outputs = width * 2**level
            parts += [
                nn.ConvTranspose2d(2 * outputs, outputs, 3, stride=2, padding=1, output_padding=1),
                nn.InstanceNorm2d(outputs),
                nn.ReLU(),
            ]
        parts += [nn.Conv2d(width, 3, 7, padding=3, padding_mode="reflect"), nn.Tanh()]
        self.layers = nn.Sequential(*parts)
        begin_small(self)

    def forward(self, x: Tensor) -> Tensor:
        picture: Tensor = self.layers(x)
        return picture
