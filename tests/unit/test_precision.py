"""Numbers that networks compute with: which are chosen, and what they change."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from pipeline.errors import PipelineError  # noqa: E402
from pipeline.networks import precision  # noqa: E402
from pipeline.networks.outputs import Outputs, map_names  # noqa: E402
from pipeline.networks.registry import build_network  # noqa: E402
from pipeline.prediction.predictors import choose_device, network_on_cpu, one_result  # noqa: E402


@pytest.fixture
def flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the machine says of its CPU."""
    path = tmp_path / "cpuinfo"
    monkeypatch.setattr(precision, "CPUINFO", path)
    precision.bfloat16_unit.cache_clear()
    monkeypatch.setattr(precision, "bfloat16_unit", precision.bfloat16_unit.__wrapped__)
    return path


def test_auto_on_a_cpu_is_what_its_hardware_multiplies(flags: Path) -> None:
    network = build_network("resunet", 2, {"widths": [4, 6]})
    assert precision.choose_precision("auto", "cpu", network) is torch.float32  # nothing is known of it
    flags.write_text("model name: amx_bf16\nflags: sse avx512f\n")
    assert precision.choose_precision("auto", "cpu", network) is torch.float32
    assert precision.choose_precision("bfloat16", "cpu", network) is torch.bfloat16
    for found, name in (("avx512_bf16", "AVX-512 BF16"), ("avx512_bf16 amx_bf16 amx_tile", "AMX")):
        flags.write_text(f"flags\t\t: sse avx512f {found}\n")
        assert precision.bfloat16_unit() == name
        assert precision.choose_precision("auto", "cpu", network) is torch.bfloat16
        assert precision.choose_precision("float32", "cpu", network) is torch.float32


def test_a_network_that_finds_instances_computes_with_float32_on_cpus(flags: Path) -> None:
    flags.write_text("flags: amx_bf16\n")
    args = {"backbone": "resnet18", "channels": 8, "hidden": 8, "convolutions": 1}
    assert precision.choose_precision("bfloat16", "cpu", build_network("maskrcnn-small", 2, args)) is torch.float32


def test_a_gpu_without_bfloat16_uses_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    network = torch.nn.Identity()
    for has, expected in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True, has=has: has)
        assert precision.choose_precision("auto", "cuda", network) is expected
        assert precision.choose_precision("float32", "cuda", network) is torch.float32


def test_fewer_bits_move_maps_by_little() -> None:
    torch.manual_seed(0)
    network = build_network("resunet", 2, {"widths": [8, 12, 16]})
    window = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    outputs = Outputs(map_names(["nucleus", "distance"]))
    exact, fast = (network_on_cpu(network, outputs, p)(window).astype(int) for p in (torch.float32, torch.bfloat16))
    assert 0 < np.abs(exact - fast).mean() < 1
    assert np.abs(exact - fast).max() < 16


@pytest.mark.parametrize(
    ("built", "capability", "fits"),
    [
        (["sm_75", "sm_80", "sm_86", "sm_90"], (8, 9), True),  # code of the same generation
        (["sm_75", "sm_80", "sm_86", "sm_90"], (7, 0), False),
        (["sm_86"], (8, 0), False),
        (["sm_90", "compute_90"], (12, 0), True),  # PTX is translated for later ones
        (["sm_100", "sm_120a"], (12, 0), True),
        (["gfx90a"], (9, 0), True),  # not CUDA
    ],
)
def test_a_card_that_this_torch_has_no_code_for(
    built: list[str], capability: tuple[int, int], fits: bool, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Old card")
    assert choose_device("cpu") == "cpu"
    assert choose_device("auto") == ("cuda" if fits else "cpu")
    assert ("no code for Old card" in caplog.text) is not fits
    if fits:
        assert choose_device("cuda") == "cuda"
        return
    with pytest.raises(PipelineError, match=r"device cuda: this PyTorch has no code for Old card \(compute"):
        choose_device("cuda")


def test_bfloat16_on_a_gpu_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    network = build_network("resunet", 2, {"widths": [4, 6]})
    for able, auto in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda emulated, able=able: able)
        assert precision.choose_precision("auto", "cuda", network) is auto
        assert precision.choose_precision("float32", "cuda", network) is torch.float32
    with pytest.raises(PipelineError, match="this GPU does not compute with it"):
        precision.choose_precision("bfloat16", "cuda", network)


def test_float32_is_float32() -> None:
    before = torch.backends.cudnn.allow_tf32
    with one_result():
        assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.allow_tf32 is before
