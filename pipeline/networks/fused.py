"""Convolution, sum and ReLU in one pass over memory, where the library for CPUs (oneDNN) can do so.

In inference on CPUs the sums and ReLUs between convolutions take a third of a small network's time in bfloat16, and a
tenth in float32: they read and write whole feature maps for one operation per value.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


def norm_relu(conv: Any, norm: nn.Module, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
    """Return ``relu(norm(conv(x)))``, or ``relu(shortcut + norm(conv(x)))``.

    Parameters
    ----------
    conv : torch.nn.Conv2d
        The convolution.
    norm : torch.nn.Module
        The normalisation after it; `torch.nn.Identity` once it has been folded into the convolution.
    x : torch.Tensor
        ``(N, C, H, W)``.
    shortcut : torch.Tensor, optional
        What is added before the ReLU, of the shape of the result.
    """
    plain = isinstance(norm, nn.Identity) and conv.groups == 1 and conv.weight.dtype == x.dtype
    if plain and _in_inference(x) and _fuses(x.dtype):
        return _fused(conv, x, shortcut)
    y = norm(conv(x))
    return functional.relu(y if shortcut is None else shortcut + y, inplace=True)


def relu_of_sum(x: Tensor, y: Tensor) -> Tensor:
    """Return ``relu(x + y)``."""
    total = x + y
    if total.dtype == torch.bfloat16 and _in_inference(total):
        # Negative numbers have the sign bit of negative integers. PyTorch's ReLU converts to float32 and back.
        total.view(torch.int16).clamp_(min=0)
        return total
    return functional.relu(total, inplace=True)


def _in_inference(x: Tensor) -> bool:
    return torch.is_inference_mode_enabled() and x.device.type == "cpu"


def _fused(conv: nn.Conv2d, x: Tensor, shortcut: Tensor | None) -> Tensor:
    # PyTorch's compiler calls these; they are not part of its public interface, hence `_fuses`.
    how = conv.padding, conv.stride, conv.dilation, conv.groups
    convolve = torch.ops.mkldnn._convolution_pointwise
    if shortcut is None:
        found: Tensor = convolve(x, conv.weight, conv.bias, *how, "relu", [], "")
    else:
        found = convolve.binary(x, shortcut, conv.weight, conv.bias, *how, "add", 1.0, "relu", [], "")
    return found


@cache
def _fuses(dtype: torch.dtype) -> bool:
    """Whether this machine's PyTorch has the fused operations for a type, and they give what single ones do."""
    conv = nn.Conv2d(8, 8, 3, padding=1)
    with torch.no_grad():
        for index, values in enumerate((conv.weight, conv.bias)):
            assert values is not None
            values.copy_(torch.linspace(-1, 1, values.numel()).add(0.1 * index).sin().reshape(values.shape))
        x = torch.linspace(-3, 3, 8 * 81).cos().reshape(1, 8, 9, 9)
        conv.to(dtype).to(memory_format=torch.channels_last)
        x = x.to(dtype).to(memory_format=torch.channels_last)
        try:
            found = [_fused(conv, x, shortcut).float() for shortcut in (None, x)]
        except (AttributeError, RuntimeError, NotImplementedError, TypeError):
            return False
        y = conv(x).float()
        expected = [y.relu(), (y + x.float()).relu()]
    return all(torch.allclose(a, b, rtol=0.02, atol=0.02) for a, b in zip(found, expected, strict=True))
