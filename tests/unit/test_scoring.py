"""Scores of maps: pixels, batches, classes, and what the card repeats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.evaluation.means import summarise
from pipeline.kernels.instances import Channels, InstanceRules
from pipeline.slides.synthetic import make_field
from pipeline.training.field import Field

torch = pytest.importorskip("torch")

from pipeline.training.losses import CombinedLoss  # noqa: E402
from pipeline.training.samples import prepare_field  # noqa: E402
from pipeline.training.scoring import (  # noqa: E402
    as_logits,
    batchwise_scores,
    field_loss,
    pixel_scores,
    score_maps,
    type_scores,
)
from pipeline.training.targets import Targets, class_map  # noqa: E402
from pipeline.training.tuning import TUNING_GRIDS, tune_rules, tuning_grid  # noqa: E402


def field(labels: np.ndarray, name: str = "f", **more: object) -> Field:
    image = np.full((*labels.shape, 3), 200, np.uint8)
    return Field(name, "s", "p", "", 0.5, image, labels, **more)  # type: ignore[arg-type]


def test_pixel_scores() -> None:
    found, truth = np.zeros((10, 10), bool), np.zeros((10, 10), bool)
    found[:4], truth[2:6] = True, True
    scores = pixel_scores(found, truth)
    assert scores == pytest.approx({"pixel_accuracy": 0.6, "pixel_dice": 0.5, "pixel_iou": 1 / 3})
    nothing = np.zeros((3, 3), bool)
    assert pixel_scores(nothing, nothing) == {"pixel_accuracy": 1, "pixel_dice": 1, "pixel_iou": 1}


def test_batchwise_scores_are_sums_over_eight_patches() -> None:
    labels = np.zeros((1024, 1024), np.int32)
    labels[:512] = 1  # the first batch of eight patches is all nucleus, the second has none
    maps = np.zeros((1024, 1024), np.uint8)
    maps[:256] = 255  # half of the first batch is found
    maps[768:, :512] = 255  # a quarter of the second is made up
    scores = batchwise_scores([maps], [field(labels)])
    assert scores["batches"] == 2
    # By batch: Dice 2 * 0.5 / 1.5 and 0; IoU 0.5 and 0; accuracy 0.5 and 0.75.
    assert scores["dice"] == pytest.approx((2 / 3 + 0) / 2, abs=1e-4)
    assert scores["iou"] == pytest.approx(0.25, abs=1e-4)
    assert scores["accuracy"] == pytest.approx(0.625, abs=1e-4)
    # Over the image it would be Dice 0.5 and IoU 0.375: another number.
    assert pixel_scores(maps >= 128, labels > 0)["pixel_dice"] == pytest.approx(2 * 4 / (8 + 6), abs=1e-3)


def test_fractional_edges_count_as_wrong_in_batchwise_accuracy() -> None:
    labels = np.zeros((512, 512), np.int32)
    labels[100:300, 100:300] = 1
    maps = np.where(labels > 0, 255, 0).astype(np.uint8)
    scores = batchwise_scores([maps], [field(labels)])
    assert pixel_scores(maps >= 128, labels > 0)["pixel_accuracy"] == 1
    assert 0.99 < scores["accuracy"] < 1  # stretched by bilinear interpolation
    assert scores["dice"] < 1


def test_logits_and_loss_of_maps() -> None:
    maps = np.array([0, 64, 255], np.uint8).reshape(1, 1, 3)
    np.testing.assert_allclose(torch.sigmoid(as_logits(maps))[0, 0, 0], [0.5 / 256, 64.5 / 256, 255.5 / 256], rtol=1e-5)
    types = np.array([[[200]], [[55]]], np.uint8)
    found = torch.softmax(as_logits(np.concatenate([types[:1], types]), 2)[:, 1:], dim=1)
    assert float(found[0, 0, 0, 0]) == pytest.approx(200.5 / 256, abs=0.01)
    image, labels = make_field(64, 64, 0.5, seed=0)
    prepared = prepare_field(Field("f", "s", "p", "", 0.5, image, labels), 0.5)
    loss = CombinedLoss((), ("nucleus", "distance"))
    right = np.moveaxis(prepared.targets[..., :2], 2, 0)
    assert field_loss(right, prepared, loss) < 0.3 * field_loss(255 - right, prepared, loss)


def test_loss_of_every_head() -> None:
    image, labels = make_field(64, 64, 0.5, seed=0)
    heads = ("nucleus", "distance", "contour", "hv", "type")
    spec = Targets(heads, ("a",))
    types = (labels > 0).astype(np.uint8)
    prepared = prepare_field(Field("f", "s", "p", "", 0.5, image, labels, types, ("a",)), 0.5, spec=spec)
    maps = np.full((7, 64, 64), 128, np.uint8)
    assert 0 < field_loss(maps, prepared, CombinedLoss((), heads, ("a",))) < 50


def test_classes_of_matched_nuclei() -> None:
    labels = np.zeros((40, 60), np.int32)
    for index, left in enumerate((2, 22, 42), start=1):
        labels[5:15, left : left + 10] = index
    types = np.select([labels == 1, labels == 2], [1, 2], 0).astype(np.uint8)  # the third is of unknown class
    one = field(labels, types=types, classes=("a", "b"))
    spec = Targets(("nucleus", "type"), ("a", "b"))
    truth = class_map(one, spec.classes)
    assert truth is not None
    maps = np.zeros((3, 40, 60), np.uint8)
    maps[1, :, :20] = 200  # a, right
    maps[1, :, 20:40] = 150  # a, should be b
    maps[2, :, 40:] = 200  # b, cannot be judged
    scores = type_scores(labels, maps, one, spec, truth)
    assert scores["type_accuracy"] == 0.5
    assert scores["type_f1"] == {"a": pytest.approx(2 / 3), "b": 0.0}
    nothing = type_scores(np.zeros_like(labels), maps, one, spec, truth)
    assert nothing["type_accuracy"] is None
    assert nothing["type_f1"] == {"a": 0.0, "b": 0.0}
    images = {"one": {"aji": 1.0, **scores}, "two": {"aji": 0.0, **nothing}, "three": {"aji": 0.5}}
    types = summarise(images)["types"]
    assert (types["accuracy"], types["matched"]) == (0.5, 2)
    assert scores["type_counts"]["classes"] == {"a": (1, 1, 2, 1.0), "b": (0, 1, 0, 0.0)}
    assert types["classes"] == {
        "a": {"n_truth": 2, "n_pred": 2, "f1": 0.5, "sq": 1, "pq": 0.5, "r2": 0},  # 2 and 0 found, 1 and 1 there
        "b": {"n_truth": 2, "n_pred": 0, "f1": 0, "sq": 0, "pq": 0, "r2": 0},
    }
    assert (types["mpq_plus"], types["r2"]) == (0.25, 0)


def test_composition_of_the_middle_of_a_field() -> None:
    labels = np.zeros((40, 60), np.int32)
    for index, left in enumerate((0, 13, 42), start=1):  # the middle of 30 pixels begins at column 15 and ends at 45
        labels[10:20, left : left + 10] = index
    one = field(labels, types=(labels > 0).astype(np.uint8), classes=("a",))
    spec = Targets(("nucleus", "type"), ("a",))
    truth = class_map(one, spec.classes)
    assert truth is not None
    maps = np.full((2, 40, 60), 200, np.uint8)
    counts = type_scores(np.where(labels == 3, 0, labels), maps, one, spec, truth, within=30)["type_counts"]
    assert counts["composition"] == {"a": (2, 1)}
    assert counts["classes"]["a"][1:3] == (3, 2)
    assert "composition" not in type_scores(labels, maps, one, spec, truth)["type_counts"]
    two = counts | {"composition": {"a": (1, 0)}}
    assert summarise({"one": {"type_counts": counts}, "two": {"type_counts": two}})["types"]["r2"] == -3


def test_means_of_fields_and_organs() -> None:
    images = {f"f{i}": {"aji": i / 10, "pq": 0.5, "organ": "ab"[i % 2]} for i in range(6)}
    result = summarise(images)
    assert result["mean"] == {"aji": 0.25, "pq": 0.5}
    assert result["organs"]["a"] == {"aji": 0.2, "pq": 0.5, "fields": 3}
    low, high = result["interval_95"]["aji"]
    assert low < 0.25 < high
    assert result["interval_95"]["pq"] == [0.5, 0.5]
    single = summarise({"f0": images["f0"]})
    assert (single["mean"]["aji"], single["interval_95"]) == (0.0, {})
    pairs = {
        f"{source}{p}": {"aji": p / 6, "source": source, "patient": f"A7-A13{p}"} for source in "ab" for p in range(6)
    }
    once = {name: one for name, one in pairs.items() if name.startswith("a")}
    assert summarise(pairs)["interval_95"] == summarise(once)["interval_95"]  # two sources, the same patients
    assert summarise({}) == {"mean": {}, "interval_95": {}, "organs": {}}


def test_tuning_finds_better_thresholds() -> None:
    _, labels = make_field(120, 120, 0.5, seed=3)
    maps = np.stack([np.where(labels > 0, 120, 10), np.where(labels > 0, 200, 0)]).astype(np.uint8)
    one, channels = field(labels), Channels(distance=1)
    start = InstanceRules(min_area=12)  # the foreground reaches 120 alone
    rules, found = tune_rules([maps], [one], start, channels, 0.5)
    assert rules.nucleus < 120
    assert found["aji_pq_mean"] > 0.7
    assert score_maps(maps, one, start, channels).scores["aji"] == 0


@pytest.mark.parametrize("markers", TUNING_GRIDS)
def test_every_grid_holds_rules(markers: str) -> None:
    from dataclasses import replace

    for name, values in tuning_grid(markers, 0.25).items():
        for value in values:
            changed: dict[str, Any] = {name: value}
            assert getattr(replace(InstanceRules.default_for(markers), **changed), name) == value


def test_sizes_of_nuclei_keep_their_area_at_another_pixel_size() -> None:
    rules = InstanceRules.default_for("distance", 0.25)
    assert (rules.min_marker, rules.min_area, rules.max_hole) == (16, 120, 800)
    assert tuning_grid("distance", 0.25)["min_area"] == tuple(4 * n for n in tuning_grid("distance", 0.5)["min_area"])


@pytest.mark.parametrize("strength", [-1, 2, "x"])
def test_card_with_an_impossible_strength_is_refused(tmp_path: Path, strength: object) -> None:
    import json

    from pipeline.errors import PipelineError
    from pipeline.models.package import CARD, ModelPackage
    from pipeline.testing import write_package

    card = write_package(tmp_path / "m", "resunet", {"widths": [4, 6]}).to_json()
    card["stain"]["strength"] = strength
    (tmp_path / "m" / CARD).write_text(json.dumps(card))
    with pytest.raises(PipelineError, match="the card is damaged: "):
        ModelPackage.load(tmp_path / "m")


def test_inference_repeats_the_flips_of_the_card(tmp_path: Path) -> None:
    import json
    from dataclasses import replace

    from pipeline.models.package import CARD, ModelPackage
    from pipeline.models.weights import load_network
    from pipeline.networks.outputs import Outputs
    from pipeline.prediction.batches import BatchPredictor
    from pipeline.prediction.predictors import channel_names
    from pipeline.testing import write_package

    package = write_package(tmp_path / "m", "resunet", {"widths": [4, 6]}, heads=("nucleus", "hv"))
    (tmp_path / "m" / CARD).write_text(json.dumps(replace(package, tta="flips").to_json()))
    loaded = ModelPackage.load(tmp_path / "m")
    assert loaded.tta == "flips"
    network = load_network(loaded)
    patch = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), np.uint8)
    averaged = BatchPredictor(network, "cpu", 1, Outputs(channel_names(loaded), loaded.tta), torch.float32)(patch)[0]
    averaged = averaged.astype(float)
    plain = BatchPredictor(network, "cpu", 1, Outputs(channel_names(loaded)), torch.float32)
    total = np.zeros_like(averaged)
    for rows in (1, -1):
        for columns in (1, -1):
            maps = plain(np.ascontiguousarray(patch[:, ::rows, ::columns]))[0][:, ::rows, ::columns].astype(float)
            maps[1] = maps[1] if columns == 1 else 255 - maps[1]
            maps[2] = maps[2] if rows == 1 else 255 - maps[2]
            total += maps / 4
    np.testing.assert_allclose(averaged, total, atol=1.01)
