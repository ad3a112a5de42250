"""LinkNet on ResNet-34."""

from __future__ import annotations

from torch import Tensor, nn

from pipeline.networks.blocks import ImageNetNormalise
from pipeline.networks.encoders import ResNet34Encoder


def decoder_block(inputs: int, outputs: int) -> nn.Sequential:
    """Narrow, double the resolution, project; each convolution with batch normalisation, none with ReLU."""
    narrow = inputs // 4
    return nn.Sequential(
        nn.Conv2d(inputs, narrow, 1),
        nn.BatchNorm2d(narrow),
        nn.ConvTranspose2d(narrow, outputs, 4, stride=2, padding=1),
        nn.BatchNorm2d(outputs),
        nn.Conv2d(outputs, outputs, 1),
        nn.BatchNorm2d(outputs),
    )


class LinkNet34(nn.Module):
    """LinkNet: ResNet-34 encoder, additive skips.

    Parameters
    ----------
    out_channels : int
        Logit channels.
    encoder_weights : str or None
        ``imagenet``, a file with torchvision's names, or None.
    normalise : bool
        Normalise the image to ImageNet's mean and standard deviation first. The comparison from which this network is
        taken did not do so.

    References
    ----------
    Chaurasia and Culurciello, "LinkNet: exploiting encoder representations for efficient semantic segmentation",
    VCIP 2017.
    """

    def __init__(self, out_channels: int, encoder_weights: str | None = None, normalise: bool = True) -> None:
        super().__init__()
        self.normalise = ImageNetNormalise() if normalise else nn.Identity()
        self.encoder = ResNet34Encoder(encoder_weights)
        self.decode4 = decoder_block(512, 256)
        self.decode3 = decoder_block(256, 128)
        self.decode2 = decoder_block(128, 64)
        self.decode1 = decoder_block(64, 64)
        self.tail = nn.Sequential(
            nn.ConvTranspose2d(64, 32, 3, stride=2, padding=1, output_padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(32, 16, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(16, out_channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        e2, e3, e4, e5 = self.encoder(self.normalise(x))
        x = self.decode4(e5) + e4
        x = self.decode3(x) + e3
        x = self.decode2(x) + e2
        logits: Tensor = self.tail(self.decode1(x))
        return logits
