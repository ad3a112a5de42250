"""Choose the precision of a network: float32, or a 16-bit type where the hardware multiplies it faster."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.networks.outputs import FindsInstances

if TYPE_CHECKING:
    import torch
    from torch import nn

PRECISIONS = ("auto", "float32", "bfloat16")
"""Values of the setting ``infer.precision``."""

CPUINFO = Path("/proc/cpuinfo")


@cache
def has_amx() -> bool:
    """Whether this machine's CPU multiplies bfloat16 matrices in hardware (Intel AMX; detected on Linux only).

    With AMX a network is about four times as fast in bfloat16 as in float32. CPUs that only have AVX-512 BF16 have not
    been measured and count as not having it.
    """
    try:
        lines = CPUINFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    return any("amx_bf16" in line.split() for line in lines if line.startswith("flags"))


def choose_precision(name: str, device: str, network: nn.Module) -> torch.dtype:
    """Resolve the `precision` setting for a network on a device.

    Parameters
    ----------
    name : {"auto", "float32", "bfloat16"}
        The setting. ``auto`` means bfloat16 on a GPU that supports it, else float16; and bfloat16 on a CPU that has
        AMX, else float32.
    device : str
        ``cpu`` or ``cuda``.
    network : torch.nn.Module
        The network. One that finds instances itself always has float32 on CPUs, because its boxes need it.

    Returns
    -------
    torch.dtype
        Type in which convolutions and matrix products are computed.
    """
    import torch

    if device == "cpu":
        wanted = name == "bfloat16" or (name == "auto" and has_amx())
        return torch.bfloat16 if wanted and not isinstance(network, FindsInstances) else torch.float32
    if name == "float32":
        return torch.float32
    return torch.bfloat16 if name == "bfloat16" or torch.cuda.is_bf16_supported(False) else torch.float16
