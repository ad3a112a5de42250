"""Adversarial training: who learns from what, and what is kept of whom."""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.errors import PipelineError
from pipeline.kernels.instances import InstanceRules
from pipeline.slides.synthetic import make_field
from pipeline.training.experiment import AdversarialSettings, Experiment
from pipeline.training.field import Field
from pipeline.training.samples import Augmentation, prepare_field
from pipeline.training.schedule import Schedule
from pipeline.training.targets import Targets

torch = pytest.importorskip("torch")

from torch import Tensor, nn  # noqa: E402
from torch.nn.utils.parametrize import is_parametrized  # noqa: E402

from pipeline.networks.gan import PatchDiscriminator, ResNetGenerator  # noqa: E402
from pipeline.networks.outputs import Outputs, map_names  # noqa: E402
from pipeline.networks.registry import build_network  # noqa: E402
from pipeline.training.adversary import Adversary, ImagePool, gan_loss, gradient_penalty, true_maps  # noqa: E402
from pipeline.training.fit import Examined, Job, TrainingModule, fit  # noqa: E402
from pipeline.training.losses import CombinedLoss  # noqa: E402

HEADS = ("nucleus", "distance")
FIELD = Field("f", "s", "p", "", 0.5, *make_field(96, 96, 0.5, seed=0))
PREPARED = prepare_field(FIELD, 0.5)
SHORT = Schedule(steps=2, batch=1, size=64, validate_every=2, workers=0, optimizer="adam", betas=(0.5, 0.999))

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning", "ignore:.*:UserWarning"
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def convolutions(network: nn.Module) -> list[nn.Conv2d]:
    return [part for part in network.modules() if isinstance(part, nn.Conv2d)]


def small(**how: Any) -> Adversary:
    torch.manual_seed(0)
    return Adversary(PatchDiscriminator(2, width=4, layers=1), SHORT, **how)


def job(weight: float = 1.0) -> Job:
    torch.manual_seed(0)
    network = build_network("pix2pix", 2, {"widths": [4, 6, 8]})
    settings = AdversarialSettings(weight=weight, width=4, layers=1, pool=2)
    loss = CombinedLoss([{"loss": "l1", "head": head, "weight": 35} for head in HEADS], HEADS)
    outputs = Outputs(map_names(HEADS))
    return Job(network, loss, Targets(), outputs, InstanceRules(), None, Augmentation(), settings)


def train(folder: Path, schedule: Schedule = SHORT, what: Job | None = None) -> nn.Module:
    return fit(
        what or job(), [PREPARED], np.ones(1), [Examined(FIELD, PREPARED)], schedule=schedule, folder=folder,
        accelerator="cpu",
    )  # fmt: skip


def checkpoint(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(folder / "last.ckpt", weights_only=True)
    return found


def test_every_convolution_of_the_discriminator_has_spectral_norm() -> None:
    torch.manual_seed(0)
    network = PatchDiscriminator(5, width=8)
    layers = convolutions(network)
    assert len(layers) == 5
    assert all(is_parametrized(layer, "weight") for layer in layers)
    assert not any("Norm2d" in type(part).__name__ for part in network.modules())
    x = torch.rand(1, 5, 32, 32)
    for _ in range(30):
        network(x)
    for layer in layers:
        largest = torch.linalg.matrix_norm(layer.weight.detach().flatten(1), ord=2)
        assert largest == pytest.approx(1, abs=0.05)
    other = PatchDiscriminator(3, width=8, spectral=False)
    assert not any(is_parametrized(layer) for layer in convolutions(other))


def test_the_discriminator_sees_patches_of_70_pixels() -> None:
    network = PatchDiscriminator(1, width=2).double()
    x = torch.rand(1, 1, 256, 256, dtype=torch.float64, requires_grad=True)
    logits = network(x)
    assert logits.shape == (1, 1, 30, 30)
    (slope,) = torch.autograd.grad(logits[0, 0, 15, 15], x)
    rows, columns = (slope[0, 0].abs().sum(dim=axis).nonzero().ravel() for axis in (1, 0))
    assert rows.max() - rows.min() + 1 == columns.max() - columns.min() + 1 == 70
    assert sum(p.numel() for p in PatchDiscriminator(6).parameters()) == 2_767_809


def test_losses_of_the_game() -> None:
    even = torch.zeros(2, 1, 3, 3)
    assert float(gan_loss(even, True)) == pytest.approx(math.log(2))
    assert gan_loss(even + 9, True) < 0.01 < 8 < gan_loss(even + 9, False)
    assert float(gan_loss(even, True, "lsgan")) == 1
    assert float(gan_loss(even, False, "lsgan")) == 0


def test_gradients_reach_the_right_network() -> None:
    adversary = small()
    weights = copy.deepcopy(adversary.network.state_dict())
    maker = nn.Conv2d(2, 2, 1)
    made = maker(torch.rand(2, 2, 16, 16))
    adversary.judge(made).backward()
    assert maker.weight.grad is not None
    assert maker.weight.grad.any()
    assert all(p.grad is None and p.requires_grad for p in adversary.network.parameters())
    names = {name for name, _ in adversary.network.named_parameters()}
    assert all((weights[name] == adversary.network.state_dict()[name]).all() for name in names)
    maker.zero_grad()
    adversary.learn(torch.rand(2, 2, 16, 16), maker(torch.rand(2, 2, 16, 16)), 0)
    assert maker.weight.grad is None
    assert all((weights[name] != adversary.network.state_dict()[name]).any() for name in names if "weight" in name)


@pytest.mark.parametrize("kind", ["vanilla", "lsgan"])
def test_the_discriminator_learns_to_tell(kind: str) -> None:
    adversary = small(kind=kind)
    adversary.schedule = replace(SHORT, steps=20, warmup=0, decay="constant", learning_rate=0.05)
    real, fake = torch.ones(2, 2, 16, 16), -torch.ones(2, 2, 16, 16)
    losses = [float(adversary.learn(real, fake, step)) for step in range(20)]
    assert losses[-1] < 0.7 * losses[0]
    assert adversary.judge(real) < adversary.judge(fake)


def test_the_penalty_is_on_slopes_other_than_one() -> None:
    class Sum(nn.Module):
        def __init__(self, slope: float) -> None:
            super().__init__()
            self.slope = nn.Parameter(torch.tensor(slope))

        def forward(self, x: Tensor) -> Tensor:
            return self.slope * x.flatten(1).sum(dim=1) / math.sqrt(x[0].numel())

    real, fake, share = torch.rand(2, 1, 4, 4), torch.rand(2, 1, 4, 4), torch.rand(2, 1, 1, 1)
    assert float(gradient_penalty(Sum(1.0), real, fake, share)) == pytest.approx(0, abs=1e-9)
    steep = Sum(3.0)
    penalty = gradient_penalty(steep, real, fake, share)
    assert float(penalty) == pytest.approx(4, rel=1e-5)
    penalty.backward()
    assert steep.slope.grad == pytest.approx(4, rel=1e-4)  # 2 (3 - 1)
    images = torch.rand(2, 2, 64, 64), torch.rand(2, 2, 64, 64)
    plain, penalised = (float(small(penalty=weight).learn(*images, 0)) for weight in (0.0, 10.0))
    assert penalised > plain + 0.1


def test_the_pool_gives_back_what_it_was_given() -> None:
    pool, rng = ImagePool(3), np.random.default_rng(0)
    images = torch.arange(40.0).view(40, 1, 1, 1)
    shown = torch.cat([pool.swap(images[i : i + 1], rng) for i in range(40)]).ravel()
    assert shown[:3].tolist() == [0, 1, 2]  # while it fills, the newest
    later = shown[3:] != images[3:].ravel()
    assert 0.25 < later.float().mean() < 0.75
    assert (shown[3:][later] < images[3:].ravel()[later]).all()
    assert len(pool.images) == 3
    assert ImagePool(0).swap(images, rng) is images


def test_true_maps() -> None:
    square = torch.rand(1, 4, 4)
    targets = {"nucleus": square, "h": 2 * square - 1, "v": torch.zeros_like(square), "seam": square}
    maps = true_maps(targets, ("nucleus", "h", "v"))
    torch.testing.assert_close(maps, torch.stack([square, square, torch.full_like(square, 0.5)], dim=1))


def test_the_network_learns_from_the_discriminator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    learn = Adversary.learn

    def watched(self: Adversary, real: Tensor, fake: Tensor, *more: Any) -> Tensor:
        seen.append((real, fake.detach()))
        return learn(self, real, fake, *more)

    monkeypatch.setattr(Adversary, "learn", watched)
    trained = train(tmp_path / "with")
    assert len(seen) == 2
    for pair in seen:
        for one in pair:
            assert one.shape == (1, 5, 64, 64)
            assert -1 <= one.min() < 0 < one.max() <= 1
        torch.testing.assert_close(pair[0][:, :3], pair[1][:, :3])  # the same image, other maps
    plain = train(tmp_path / "without", what=job(0.0))
    assert "adversary" not in checkpoint(tmp_path / "without")
    assert any((a != b).any() for a, b in zip(trained.parameters(), plain.parameters(), strict=True))
    # What is kept and packed is the network alone.
    assert trained.state_dict().keys() == plain.state_dict().keys()
    header = next((tmp_path / "with").glob("log-*/metrics.csv")).read_text().splitlines()[0]
    assert {"train/adversarial", "train/discriminator", "train/nucleus_l1"} <= set(header.split(","))


def test_a_resumed_training_takes_up_the_discriminator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path)
    kept = checkpoint(tmp_path)["adversary"]
    assert kept["pool"].shape == (2, 5, 64, 64)
    moments = kept["optimizer"]["state"]
    assert moments
    assert all(int(state["step"]) == 2 for state in moments.values())
    begun: list[dict[str, Any]] = []
    learn = Adversary.learn

    def watched(self: Adversary, *args: Any) -> Tensor:
        begun.append(copy.deepcopy(self.state_dict()))
        return learn(self, *args)

    monkeypatch.setattr(Adversary, "learn", watched)
    train(tmp_path, replace(SHORT, steps=3))
    (first,) = begun
    torch.testing.assert_close(first, kept, rtol=0, atol=0)
    assert int(checkpoint(tmp_path)["adversary"]["optimizer"]["state"][0]["step"]) == 3


def test_a_resumed_training_ends_with_the_same_bytes(tmp_path: Path) -> None:
    six = replace(SHORT, steps=6, validate_every=3, decay="constant", warmup=0)
    train(tmp_path / "whole", six)
    train(tmp_path / "parts", replace(six, steps=3))
    train(tmp_path / "parts", six)
    whole, parts = (checkpoint(tmp_path / name) for name in ("whole", "parts"))
    for part in ("state_dict", "adversary", "optimizer_states", "current_model_state"):
        torch.testing.assert_close(parts[part], whole[part], rtol=0, atol=0)


SHARED = """
import sys
from dataclasses import replace
from pathlib import Path
import numpy as np
import test_adversarial as one
from pipeline.training.fit import fit

long = replace(one.SHORT, steps=6, batch=2, validate_every=3, decay="constant", warmup=0, devices=2)
for name, steps in (("whole", 6), ("parts", 3), ("parts", 6)):
    schedule, folder = replace(long, steps=steps), Path(sys.argv[1], name)
    fit(one.job(), [one.PREPARED], np.ones(1), [], schedule=schedule, folder=folder, accelerator="cpu")
"""


def test_every_process_takes_up_its_own_pool(tmp_path: Path) -> None:
    script = tmp_path / "shared.py"
    script.write_text(SHARED)
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": f"{Path(__file__).parents[2]}:{Path(__file__).parent}", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    whole, parts = (checkpoint(tmp_path / name)["adversary"] for name in ("whole", "parts"))
    assert len(whole["pool"]) == 4
    torch.testing.assert_close(parts, whole, rtol=0, atol=0)


def test_averages_are_of_the_network_alone() -> None:
    module = TrainingModule(job(), SHORT, [])
    averaged = copy.deepcopy(module)
    assert averaged.network is not module.network
    assert averaged.adversary is module.adversary
    assert not any("adversary" in name for name in module.state_dict())
    again = TrainingModule(job(), SHORT, []).adversary
    assert again is not None
    assert module.adversary is not None
    torch.testing.assert_close(again.network.state_dict(), module.adversary.network.state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"network": "maskrcnn-small", "patch": 320}, "adversarial.weight with network maskrcnn-small"),
        ({"heads": ("nucleus", "type")}, "adversarial.weight with network resunet, heads nucleus, type"),
        ({"network": "pix2pix", "patch": 320}, "patch 320 does not suit pix2pix .use a multiple of 256"),
        ({"adversarial": {"loss": "hinge"}}, "adversarial.loss 'hinge' .choose from vanilla, lsgan"),
        ({"adversarial": {"pool": -1}}, "adversarial: weight, pool"),
    ],
)
def test_what_cannot_be_trained_so_is_one_line(change: dict[str, Any], message: str) -> None:
    section = {"name": "a", "data": ({"kind": "labels", "path": "x"},), "adversarial": {"weight": 1}, **change}
    with pytest.raises(PipelineError, match=message):
        Experiment.from_json(section)


def test_painter_keeps_size_and_range() -> None:
    network = ResNetGenerator(width=4, blocks=1)
    with torch.inference_mode():
        made = network(torch.rand(1, 3, 32, 48) * 2 - 1)
    assert made.shape == (1, 3, 32, 48)
    assert made.abs().max() <= 1
    assert 11e6 < sum(p.numel() for p in ResNetGenerator().parameters()) < 12e6
