"""Convolution, sum and ReLU in one pass give what they give one after another."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from pipeline.networks import fused  # noqa: E402
from pipeline.networks.fused import norm_relu, relu_of_sum  # noqa: E402
from pipeline.networks.outputs import Outputs  # noqa: E402
from pipeline.networks.registry import build_network  # noqa: E402
from pipeline.prediction.predictors import network_on_cpu  # noqa: E402

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.03}


def noise(*shape: int, seed: int = 0) -> Any:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("kernel", "stride", "groups"), [(3, 1, 1), (2, 2, 1), (1, 1, 1), (3, 1, 4)])
def test_one_pass_is_what_the_operations_are(dtype: Any, kernel: int, stride: int, groups: int) -> None:
    conv = torch.nn.Conv2d(8, 8, kernel, stride, padding=kernel // 2 * (stride == 1), groups=groups)
    conv.to(dtype).to(memory_format=torch.channels_last)
    x = noise(2, 8, 20, 24).to(dtype).to(memory_format=torch.channels_last)
    norm = torch.nn.Identity()
    with torch.inference_mode():
        y = conv(x).float()
        shortcut = noise(*y.shape, seed=1).to(dtype).to(memory_format=torch.channels_last)
        before = shortcut.clone()
        for more, expected in ((None, y.relu()), (shortcut, (y + shortcut.float()).relu())):
            found = norm_relu(conv, norm, x, more)
            assert found.dtype == dtype
            torch.testing.assert_close(found.float(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
        assert shortcut.equal(before)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_sign_bit_is_the_relu(dtype: Any) -> None:
    x, y = noise(1, 4, 9, 7).to(dtype), noise(1, 4, 9, 7, seed=1).to(dtype)
    x[0, 0, 0, :3], y[0, 0, 0, :3] = torch.tensor([-0.0, 1.0, -1e30]), torch.tensor([-0.0, -1.0, -1e30])
    before = x.clone(), y.clone()
    with torch.inference_mode():
        assert relu_of_sum(x, y).equal(torch.relu(x + y))
    assert (x.equal(before[0]), y.equal(before[1])) == (True, True)


def test_training_is_left_alone() -> None:
    conv, norm = torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)
    x = noise(2, 3, 8, 8).requires_grad_()
    norm_relu(conv, norm, x).sum().backward()
    found = x.grad.clone()
    x.grad = None
    torch.relu(norm(conv(x))).sum().backward()
    torch.testing.assert_close(found, x.grad)
    a, b = noise(5), noise(5, seed=1)
    total = relu_of_sum(a.requires_grad_(), b)
    total.sum().backward()
    assert a.grad.equal((a + b > 0).float())


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("fold", [1, 2])
def test_maps_do_not_depend_on_what_the_library_has(dtype: Any, fold: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    args = {"widths": [8, 16, 24], "blocks": [2, 1, 1], "fold": fold}
    state = build_network("resunet", 2, args).state_dict()
    window = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    found = []
    for has in (True, False):
        if not has:
            monkeypatch.setattr(fused, "_fuses", lambda dtype: False)
        network = build_network("resunet", 2, args).eval()
        network.load_state_dict(state)
        network.fold_norms()  # type: ignore[operator]
        found.append(network_on_cpu(network, Outputs(("nucleus", "distance")), dtype)(window).astype(int))
    assert np.abs(found[0] - found[1]).max() <= (0 if dtype is torch.float32 else 4) + 1
    assert found[0].std() > 0


def test_a_library_without_them_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> Any:
        raise RuntimeError("could not create a primitive")

    fused._fuses.cache_clear()
    monkeypatch.setattr(fused, "_fused", broken)
    assert not fused._fuses(torch.float32)
    fused._fuses.cache_clear()
    monkeypatch.setattr(fused, "_fused", lambda conv, x, shortcut: conv(x))  # without the ReLU
    assert not fused._fuses(torch.float32)
    fused._fuses.cache_clear()
