"""Parts that several networks share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Mean and standard deviation of ImageNet's pixels, RGB in [0, 1], as torchvision's weights expect them."""


def bilinear(x: Tensor, **to: Any) -> Tensor:
    """Resize by bilinear interpolation; `to` is ``size`` or ``scale_factor``.

    In deterministic mode, torch does without its own kernel on GPUs, as the gradients of that are not deterministic.
    What it does instead takes many times the memory, so without gradients the kernel is used.
    """
    mode = torch.get_deterministic_debug_mode()
    if x.device.type == "cpu" or not mode or torch.is_grad_enabled():
        return functional.interpolate(x, mode="bilinear", align_corners=False, **to)
    torch.set_deterministic_debug_mode(0)
    try:
        return functional.interpolate(x, mode="bilinear", align_corners=False, **to)
    finally:
        torch.set_deterministic_debug_mode(mode)


class ImageNetNormalise(nn.Module):
    """Normalise RGB in [0, 1] by the mean and standard deviation of ImageNet.

    The constants are not part of the state dict, so packages do not contain them.
    """

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


def conv_norm_relu(inputs: int, outputs: int, kernel: int = 3, dilation: int = 1) -> nn.Sequential:
    """Convolution that keeps the size, batch normalisation and ReLU.

    Parameters
    ----------
    inputs, outputs : int
        Channels.
    kernel, dilation : int
        Kernel size (odd) and dilation of the convolution.
    """
    padding = dilation * (kernel // 2)
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=padding, dilation=dilation, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


def fold_norm(conv: nn.Conv2d, norm: Any) -> nn.Conv2d:
    """Fold a batch normalisation in evaluation mode into the convolution before it."""
    return fuse_conv_bn_eval(conv, norm)


def fold_sequences(network: nn.Module) -> None:
    """Fold every batch normalisation that follows a convolution in a `torch.nn.Sequential` of a network, in place."""
    for part in list(network.modules()):
        if isinstance(part, nn.Sequential):
            for index in range(len(part) - 1):
                conv, norm = part[index], part[index + 1]
                if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                    part[index], part[index + 1] = fold_norm(conv, norm), nn.Identity()


class PositionTable(nn.Module):
    """Learned two-dimensional positions that are added to a feature map, and interpolated if its size differs.

    Parameters
    ----------
    channels : int
        Channels of the map.
    side : int
        Height and width of the table.
    """

    def __init__(self, channels: int, side: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(1, channels, side, side))
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        table: Tensor = self.table
        if x.shape[2:] != table.shape[2:]:
            table = functional.interpolate(table, size=x.shape[2:], mode="bicubic", align_corners=False)
        return x + table


class SelfAttention(nn.Module):
    """Multi-head self-attention over tokens ``(N, L, C)``.

    Parameters
    ----------
    channels, heads : int
        Width of a token, which must be a multiple of the number of heads, and number of heads.
    dropout : float
        Dropout of the attention weights.

    References
    ----------
    Vaswani et al., "Attention is all you need", NeurIPS 2017.
    """

    def __init__(self, channels: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(f"{channels} channels cannot be divided among {heads} heads")
        self.heads = heads
        self.dropout = dropout
        self.project_in = nn.Linear(channels, 3 * channels)
        self.project_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        count, length, channels = x.shape
        parts = self.project_in(x).view(count, length, 3, self.heads, channels // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(
            query, key, value, dropout_p=self.dropout if self.training else 0.0
        )
        result: Tensor = self.project_out(mixed.transpose(1, 2).reshape(count, length, channels))
        return result


class TransformerBlock(nn.Module):
    """Pre-norm transformer block over tokens ``(N, L, C)``.

    Parameters
    ----------
    channels, heads, hidden : int
        Width of a token, number of attention heads, width of the perceptron's hidden layer.
    dropout : float
        Dropout after attention and in the perceptron.

    References
    ----------
    Dosovitskiy et al., "An image is worth 16x16 words", ICLR 2021.
    """

    def __init__(self, channels: int, heads: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attention = SelfAttention(channels, heads, dropout)
        self.drop = nn.Dropout(dropout)
        self.norm2 = nn.LayerNorm(channels)
        self.perceptron = nn.Sequential(
            nn.Linear(channels, hidden),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, channels),
            nn.Dropout(dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.attention(self.norm1(x)))
        result: Tensor = x + self.perceptron(self.norm2(x))
        return result


class MapTransformer(nn.Module):
    """Transformer over the pixels of a feature map ``(N, C, H, W)``, with learned positions.

    Parameters
    ----------
    channels, depth, heads, hidden : int
        Width of a token, number of blocks, number of attention heads, width of the perceptrons' hidden layers.
    side : int
        Side of the position table, which is interpolated for maps of other sizes.
    dropout : float
        Dropout after adding the positions and in every block.
    """

    def __init__(self, channels: int, depth: int, heads: int, hidden: int, side: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.position = PositionTable(channels, side)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(TransformerBlock(channels, heads, hidden, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        count, channels, height, width = x.shape
        tokens = self.drop(self.position(x)).flatten(2).transpose(1, 2)
        for block in self.blocks:
            tokens = block(tokens)
        mixed: Tensor = self.norm(tokens).transpose(1, 2)
        return mixed.reshape(count, channels, height, width)
