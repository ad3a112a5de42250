"""Losses: their formulas, where they are least, and what cannot be combined."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pipeline.errors import PipelineError
from pipeline.slides.synthetic import make_field

torch = pytest.importorskip("torch")

from pipeline.networks.outputs import map_names  # noqa: E402
from pipeline.training import losses  # noqa: E402
from pipeline.training.data import Field  # noqa: E402
from pipeline.training.losses import DEFAULT_TERMS, LOSSES, CombinedLoss  # noqa: E402
from pipeline.training.samples import prepare_field  # noqa: E402
from pipeline.training.targets import IGNORED, Targets  # noqa: E402

HEADS = ("nucleus", "distance", "contour", "hv", "type")
CLASSES = ("a", "b")


@pytest.fixture(scope="module")
def truth() -> dict[str, Any]:
    """Targets of a field with two classes."""
    image, labels = make_field(96, 96, 0.5, seed=1)
    types = (labels % 3).astype(np.uint8)  # every third nucleus is of unknown class
    field = Field("f", "s", "p", "", 0.5, image, labels, types, CLASSES)
    prepared = prepare_field(field, 0.5, spec=Targets(HEADS, CLASSES))
    sample = prepared.spec.of_sample(labels, prepared.types)
    return prepared.spec.unpack(torch.from_numpy(np.dstack([prepared.targets, sample]))[None])


def logits_of(truth: dict[str, Any], sign: float = 1.0) -> Any:
    """Logits that say what the targets say, or the opposite."""
    maps = [truth["nucleus"], truth["distance"], truth["contour"], (truth["h"] + 1) / 2, (truth["v"] + 1) / 2]
    sigmoid = torch.logit(torch.stack(maps, 1).clamp(1e-4, 1 - 1e-4))
    kinds = [(truth["type"] == k).float() * 16 - 8 for k in range(len(CLASSES) + 1)]
    return sign * torch.cat([sigmoid, torch.stack(kinds, 1)], 1)


@pytest.mark.parametrize("name", LOSSES)
def test_least_at_the_truth(name: str, truth: dict[str, Any]) -> None:
    for head in LOSSES[name][1]:
        others = [h for h in HEADS if h not in (head, "type")]
        entries = [
            {"loss": name, "head": head},
            *(t | {"head": h, "weight": 0} for h in others for t in DEFAULT_TERMS.get(h, ({"loss": "l1"},))),
        ]
        heads = HEADS if head == "type" else HEADS[:-1]
        combined = CombinedLoss(entries, heads, CLASSES if head == "type" else ())
        channels = len(map_names(heads, CLASSES if head == "type" else ()))
        right, wrong = (float(combined(logits_of(truth, s)[:, :channels], truth)["loss"]) for s in (1, -1))
        # A soft map has an entropy of its own, which cross-entropy cannot go below.
        assert 0 <= right < 0.5 * wrong, (name, head)


def test_focal_is_that_of_the_formula() -> None:
    logits, target = torch.tensor([[[[0.3, -2.0]]]]), {"nucleus": torch.tensor([[[1.0, 0.0]]])}
    p = torch.sigmoid(torch.tensor([0.3, 2.0]))  # probability of the true class
    expected = (0.25 * (1 - p) ** 2 * -torch.log(p)).mean()
    torch.testing.assert_close(losses.focal(logits, target, "nucleus"), expected)


def test_dice_is_of_the_whole_batch() -> None:
    logits = torch.full((2, 1, 1, 2), 50.0)
    target = {"nucleus": torch.tensor([[[1.0, 1.0]], [[0.0, 0.0]]])}
    value = losses.dice(logits, target, "nucleus")
    torch.testing.assert_close(value, torch.tensor(1 - 4 / 6))  # of each image and averaged: 0.5


def test_sum_of_three(truth: dict[str, Any]) -> None:
    combined = CombinedLoss([{"loss": name} for name in ("bce", "focal", "dice")], ["nucleus"])
    parts = combined(logits_of(truth)[:, :1], truth)
    assert set(parts) == {"loss", "nucleus_bce", "nucleus_focal", "nucleus_dice"}
    torch.testing.assert_close(parts["loss"], parts["nucleus_bce"] + parts["nucleus_focal"] + parts["nucleus_dice"])
    weighted = CombinedLoss([{"loss": "bce", "weight": 3}], ["nucleus"])(logits_of(truth)[:, :1], truth)
    torch.testing.assert_close(weighted["loss"], 3 * weighted["nucleus_bce"])


def test_edges_weigh_more(truth: dict[str, Any]) -> None:
    logits = logits_of(truth)[:, :1].clone()
    edge = losses._edges(truth["nucleus"], 1) > 0
    assert 0 < edge.float().mean() < 0.5
    logits[:, 0][edge] *= -1  # wrong at the borders alone
    plain, towards = (losses.bce(logits, truth, "nucleus", edge=w) for w in (0.0, 5.0))
    assert towards > 1.5 * plain


def test_slopes_of_h_and_v_count_inside_nuclei_alone(truth: dict[str, Any]) -> None:
    hv = logits_of(truth)[:, 3:5].clone()
    background = (truth["nucleus"] < 0.5).float()
    far = -torch.nn.functional.max_pool2d(-background[:, None], 9, 1, 4) > 0
    before = losses.hv_msge(hv, truth, "hv")
    hv[far.expand_as(hv)] += 3 * torch.rand(int(2 * far.sum()))
    torch.testing.assert_close(losses.hv_msge(hv, truth, "hv"), before)
    assert losses.hv_mse(hv, truth, "hv") > 0.1


def test_losses_are_computed_in_full_precision(truth: dict[str, Any]) -> None:
    logits = logits_of(truth)[:, 3:5] + 0.123
    loss = CombinedLoss([{"loss": "hv_msge", "head": "hv"}], ["hv"])
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(logits, truth)["loss"]
    assert found.equal(loss(logits, truth)["loss"])


@pytest.mark.parametrize("name", ["type_ce", "type_bce", "type_dice", "type_focal"])
def test_unknown_classes_play_no_part(name: str, truth: dict[str, Any]) -> None:
    function = LOSSES[name][0]
    logits = logits_of(truth)[:, 5:].clone().requires_grad_()
    unknown = truth["type"] == IGNORED
    assert unknown.any()
    function(logits, truth, "type").backward()
    assert not logits.grad[unknown[:, None].expand_as(logits)].any()
    nothing = {"type": torch.full_like(truth["type"], IGNORED)}
    value = function(logits, nothing, "type")
    assert not value.detach()
    value.backward()  # a batch of fields without classes trains on all the same


def test_class_weights(truth: dict[str, Any]) -> None:
    heads = ["nucleus", "type"]
    terms = [{"loss": "bce"}, {"loss": "type_ce", "class_weights": [0.1, 1, 2]}]
    logits = torch.randn(1, 4, 96, 96, generator=torch.Generator().manual_seed(0))
    combined = CombinedLoss(terms, heads, CLASSES)(logits, truth)
    plain = CombinedLoss([{"loss": "bce"}, {"loss": "type_ce"}], heads, CLASSES)(logits, truth)
    assert float(combined["type_ce"]) != pytest.approx(float(plain["type_ce"]), rel=1e-3)
    with pytest.raises(PipelineError, match="3 class_weights for 1 classes"):
        CombinedLoss(terms, heads, CLASSES[:1])


def test_defaults_of_the_heads(truth: dict[str, Any]) -> None:
    wrong = logits_of(truth, -1)
    own = CombinedLoss((), ("nucleus", "distance"))(wrong[:, :2], truth)
    assert set(own) == {"loss", "cross_entropy", "dice", "distance", "slope"}
    # Heads beside these two change nothing in what the two are trained with.
    parts = CombinedLoss((), HEADS, CLASSES)(wrong, truth)
    more = [term.name for term in CombinedLoss((), ("nucleus", *HEADS[2:]), CLASSES).terms if term.head != "nucleus"]
    assert set(parts) == {*own, *more}
    assert all(parts[name] == own[name] for name in own if name != "loss")
    assert parts["loss"] > own["loss"]


@pytest.mark.parametrize(
    ("entries", "heads", "message"),
    [
        ([{"loss": "magic"}], ["nucleus"], "unknown loss 'magic'"),
        ([{"loss": "hv_mse"}], ["nucleus"], "hv_mse of head None"),
        ([{"loss": "bce", "head": "hv"}], ["nucleus", "hv"], "bce of head 'hv'"),
        ([{"loss": "bce"}], ["nucleus", "distance"], "none for head 'distance'"),
        ([{"loss": "dice", "gamma": 2}], ["nucleus"], "dice has no argument 'gamma'.*smooth"),
    ],
)
def test_what_cannot_be_combined_is_one_line(entries: list[Any], heads: list[str], message: str) -> None:
    with pytest.raises(PipelineError, match=message) as caught:
        CombinedLoss(entries, heads)
    assert "\n" not in str(caught.value)
