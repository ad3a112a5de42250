"""Choose the precision of a network: float32, or a 16-bit type where the hardware multiplies it faster."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import PipelineError
from pipeline.networks.outputs import FindsInstances

if TYPE_CHECKING:
    import torch
    from torch import nn

PRECISIONS = ("auto", "float32", "bfloat16")
"""Values of the setting ``infer.precision``."""

CPUINFO = Path("/proc/cpuinfo")


BFLOAT16_UNITS = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512 BF16"}
"""What a CPU multiplies bfloat16 matrices with, fastest first: its flag on Linux, and its name."""


@cache
def bfloat16_unit() -> str | None:
    """What this machine's CPU multiplies bfloat16 matrices with, or None (detected on Linux only).

    A network is about four times as fast in bfloat16 as in float32 with AMX, and twice as fast with AVX-512 BF16.
    """
    try:
        lines = CPUINFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    return next((name for flag, name in BFLOAT16_UNITS.items() if flag in flags), None)


def choose_precision(name: str, device: str, network: nn.Module) -> torch.dtype:
    """Resolve the `precision` setting for a network on a device.

    Parameters
    ----------
    name : {"auto", "float32", "bfloat16"}
        The setting. ``auto`` means bfloat16 on a GPU that supports it, else float16; and bfloat16 on a CPU that
        multiplies it in hardware (`bfloat16_unit`), else float32.
    device : str
        ``cpu`` or ``cuda``.
    network : torch.nn.Module
        The network. One that finds instances itself always has float32 on CPUs, because its boxes need it.

    Returns
    -------
    torch.dtype
        Type in which convolutions and matrix products are computed.

    Raises
    ------
    PipelineError
        When bfloat16 is asked for on a GPU that does not compute with it.
    """
    import torch

    if device == "cpu":
        wanted = name == "bfloat16" or (name == "auto" and bfloat16_unit() is not None)
        return torch.bfloat16 if wanted and not isinstance(network, FindsInstances) else torch.float32
    if name == "float32":
        return torch.float32
    if torch.cuda.is_bf16_supported(False):
        return torch.bfloat16
    if name == "bfloat16":
        raise PipelineError("infer.precision bfloat16: this GPU does not compute with it", "use auto or float32")
    return torch.float16
