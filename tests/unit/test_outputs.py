"""Logits as maps; test-time augmentation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pipeline.errors import PipelineError

torch = pytest.importorskip("torch")

from pipeline.networks.outputs import TTA, Outputs, map_names  # noqa: E402
from pipeline.networks.registry import head_channels  # noqa: E402
from pipeline.training.predict import predict_field  # noqa: E402

HEADS = ("nucleus", "hv", "type")
NAMES = map_names(HEADS, ("a",))


def test_names_agree_with_the_registry() -> None:
    heads = ("nucleus", "distance", "contour", "hv", "type")
    assert len(map_names(heads, ("a", "b"))) == head_channels(heads, 2)


@pytest.mark.parametrize("heads", [(), ("distance",), ("nucleus", "type", "hv"), ("nucleus", "nucleus"), ("edge",)])
def test_wrong_heads_are_one_line(heads: tuple[str, ...]) -> None:
    with pytest.raises(PipelineError, match="head"):
        map_names(heads)
    with pytest.raises(PipelineError, match="unknown test-time augmentation 'spin'"):
        Outputs(NAMES, "spin")


class Slopes(torch.nn.Module):
    """A network whose h and v are slopes of what it sees, as those of a nucleus are."""

    def __init__(self) -> None:
        super().__init__()
        self.still = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x: Any) -> Any:
        grey = x.mean(1, keepdim=True)
        pad = torch.nn.functional.pad(grey, (1, 1, 1, 1), mode="replicate")
        h = pad[:, :, 1:-1, 2:] - pad[:, :, 1:-1, :-2]
        v = pad[:, :, 2:, 1:-1] - pad[:, :, :-2, 1:-1]
        return torch.cat([grey * 4 - 2, h * 5, v * 5, grey, 1 - grey], 1) + self.still


@pytest.mark.parametrize("tta", TTA)
def test_turning_the_input_turns_the_maps_back(tta: str) -> None:
    # This network sees a turned image as it sees the image, so averaging must change nothing.
    x = torch.rand(2, 3, 12, 16, generator=torch.Generator().manual_seed(0))
    plain = Outputs(NAMES).predict(Slopes(), x)
    torch.testing.assert_close(Outputs(NAMES, tta).predict(Slopes(), x), plain)
    torch.testing.assert_close(plain[:, 3:].sum(1), torch.ones(2, 12, 16))


def test_a_network_that_looks_one_way_is_averaged() -> None:
    class Shift(Slopes):
        def forward(self, x: Any) -> Any:
            return super().forward(x).roll(1, dims=3)

    x = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    plain, flips = (Outputs(NAMES, tta).predict(Shift(), x) for tta in ("none", "flips"))
    assert not torch.allclose(plain, flips, atol=0.01)


def test_windows_agree_with_one_pass() -> None:
    image = np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)
    outputs = Outputs(NAMES)
    whole = predict_field(Slopes(), image, outputs)
    windows = predict_field(Slopes(), image, outputs, (32, 8))
    assert whole.shape == windows.shape == (5, 70, 90)
    # A window's outermost pixels do not see their neighbours; their weight is small.
    difference = np.abs(whole.astype(int) - windows)
    assert difference.mean() < 2
    np.testing.assert_array_equal(whole[[0, 3, 4]], windows[[0, 3, 4]])
