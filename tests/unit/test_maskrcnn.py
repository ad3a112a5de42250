"""Mask R-CNN: targets, loss, detections drawn as maps, pretrained weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.errors import PipelineError
from pipeline.slides.synthetic import make_field

torch = pytest.importorskip("torch")

from pipeline.networks.command import describe  # noqa: E402
from pipeline.networks.maskrcnn import MaskRCNNetwork, instance_targets  # noqa: E402
from pipeline.networks.registry import build_network  # noqa: E402

TINY: dict[str, Any] = {"backbone": "resnet18", "channels": 8, "hidden": 8, "convolutions": 1, "proposals": 60}


def tiny(**args: Any) -> MaskRCNNetwork:
    torch.manual_seed(0)
    return MaskRCNNetwork(2, **TINY | args)


def test_targets_are_boxes_at_pixel_edges_and_masks() -> None:
    labels = torch.zeros(20, 30, dtype=torch.int64)
    labels[2:7, 3:13] = 5
    labels[10:20, 20:30] = 300
    labels[0, 0:5] = 9  # too small
    targets = instance_targets(labels)
    assert targets["boxes"].tolist() == [[3, 2, 13, 7], [20, 10, 30, 20]]
    assert targets["labels"].tolist() == [1, 1]
    for mask, label in zip(targets["masks"], (5, 300), strict=True):
        torch.testing.assert_close(mask.bool(), labels == label)
    empty = instance_targets(torch.zeros(20, 30, dtype=torch.int64))
    assert empty["boxes"].shape == (0, 4)
    assert empty["masks"].shape == (0, 20, 30)


def test_every_parameter_learns() -> None:
    network = tiny().train()
    image, labels = make_field(96, 96, 0.5, seed=1)
    images = torch.from_numpy(image).permute(2, 0, 1)[None].float().div(255).repeat(2, 1, 1, 1)
    truth = torch.from_numpy(labels).long()[None].repeat(2, 1, 1)
    truth[1] = 0  # one field of the batch is empty
    parts = network.loss(images, truth)
    assert set(parts) == {"loss", "objectness", "rpn_box_reg", "classifier", "box_reg", "mask"}
    torch.testing.assert_close(parts["loss"], sum(v for k, v in parts.items() if k != "loss"))
    parts["loss"].backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


def test_a_batch_without_nuclei_changes_nothing() -> None:
    network = tiny().train()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    loss = network.loss(torch.rand(2, 3, 64, 64), torch.zeros(2, 64, 64, dtype=torch.int64))["loss"]
    loss.backward()
    assert loss == 0
    assert all(p.grad is not None and not p.grad.any() for p in network.parameters())
    torch.testing.assert_close(network.state_dict(), before)


def test_maps_are_drawn_whatever_the_batch() -> None:
    network = tiny(score=0.0).eval()
    images = torch.rand(3, 3, 64, 96)
    with torch.inference_mode():
        logits = network(images)
        alone = torch.cat([network(one[None]) for one in images])
    assert logits.shape == (3, 2, 64, 96)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, alone)
    maps = torch.sigmoid(logits).mul(255)
    torch.testing.assert_close(maps, maps.round(), atol=1e-3, rtol=0)  # the drawing comes back exactly
    assert maps[:, 0].max() > 0
    with torch.inference_mode():
        found = network.detect(images[0])
    assert set(np.unique(maps[0, 0].round()).astype(int)) <= {0, *(max(1, round(255 * s)) for s in found.scores)}


def test_a_window_keeps_to_its_core() -> None:
    network = tiny(score=0.0).eval()
    image = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        whole = network(image)
        network.margin = 20
        core = network(image)
    assert (core <= whole).all()
    assert (core < whole).any()


def test_args_are_heeded() -> None:
    network = tiny(anchors=[4, 8, 16, 32, 64], detections=3, score=0.0).eval()
    assert network.network.rpn.anchor_generator.sizes == ((4,), (8,), (16,), (32,), (64,))
    with torch.inference_mode():
        assert len(network.detect(torch.rand(3, 64, 64)).scores) <= 3
    with pytest.raises(RuntimeError, match="its own loss"):
        tiny().train()(torch.rand(1, 3, 64, 64))
    for args, message in (
        ({"anchors": [8, 16]}, "one side for each of five levels"),
        ({"backbone": "vgg"}, "backbone 'vgg'"),
    ):
        with pytest.raises(PipelineError, match=message):
            build_network("maskrcnn", 2, TINY | args)
    with pytest.raises(PipelineError, match="its heads are nucleus and distance"):
        build_network("maskrcnn", 3, TINY)


def test_size_is_torchvisions() -> None:
    from torchvision.models.detection import maskrcnn_resnet50_fpn_v2

    with torch.device("meta"):
        reference = maskrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None, num_classes=2)
    listed = describe("maskrcnn")
    assert listed["parameters"] == sum(p.numel() for p in reference.parameters())
    assert listed["multiply_adds_per_pixel"] > describe("maskrcnn-small")["multiply_adds_per_pixel"] > 0


def test_weights_of_a_whole_network_from_a_file(tmp_path: Path) -> None:
    source = tiny()
    torch.manual_seed(7)
    state = {k: torch.rand_like(v) if v.is_floating_point() else v for k, v in source.network.state_dict().items()}
    # A file of 91 classes, as of COCO.
    state["roi_heads.box_predictor.cls_score.weight"] = torch.rand(91, 8)
    torch.save(state, tmp_path / "coco.pth")
    network = tiny(encoder_weights=str(tmp_path / "coco.pth"))
    for name, tensor in network.network.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        if "predictor" in name:
            torch.testing.assert_close(tensor, source.network.state_dict()[name])
        else:
            torch.testing.assert_close(tensor, state[name])
    # It does not fit a wider network.
    with pytest.raises(PipelineError, match="of Mask R-CNN on resnet18 are missing or of another shape"):
        tiny(encoder_weights=str(tmp_path / "coco.pth"), channels=16)


def test_weights_of_a_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.models import resnet18

    torch.manual_seed(3)
    state = dict(resnet18(weights=None).state_dict())
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: state)
    body = tiny(encoder_weights="imagenet").network.backbone.body
    torch.testing.assert_close(body.layer4[1].conv2.weight, state["layer4.1.conv2.weight"])
    with pytest.raises(PipelineError, match="encoder_weights coco"):
        tiny(encoder_weights="coco")  # another network's
