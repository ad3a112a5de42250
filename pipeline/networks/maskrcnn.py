"""Mask R-CNN: a network that finds nuclei as instances."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.kernels.draw import Detections, draw_instances
from pipeline.networks.blocks import ImageNetNormalise
from pipeline.networks.encoders import IMAGENET, load_encoder, read_state

BACKBONES = {"resnet50": (256, 512, 1024, 2048), "resnet18": (64, 128, 256, 512)}
"""ResNets, with the channels of their four stages."""

COCO = "coco"
"""Value of ``encoder_weights`` that fetches torchvision's Mask R-CNN of COCO, without the layers for its classes."""

LEAST_AREA = 10
"""Smallest target in pixels; smaller pieces are remains of nuclei that the border of a crop cuts off."""


class MaskRCNNetwork(nn.Module):
    """Mask R-CNN with a feature pyramid, whose instances are drawn as maps.

    In evaluation mode it returns logits of two maps like any other network: the nucleus map, which holds the score of
    each nucleus on its pixels, and a distance map computed from the mask of each nucleus (`pipeline.kernels.draw`). The
    threshold ``nucleus`` of a package is therefore the lowest accepted score, and the instances stage recovers each
    nucleus once. Windows are processed one by one, so that the result does not depend on the batch. Training uses
    `loss`.

    Parameters
    ----------
    out_channels : int
        Must be 2: nucleus, distance.
    backbone : str
        ``resnet50`` or ``resnet18``.
    encoder_weights : str or None
        ``imagenet``, ``coco`` (ResNet-50 only), a file with torchvision's names, or None. From a file of a whole Mask
        R-CNN everything but the last layers is loaded.
    channels : int
        Channels of the feature pyramid and of the heads' convolutions.
    hidden : int
        Width of the box head's linear layer.
    convolutions : int
        Number of 3x3 convolutions of the box head and of the mask head.
    anchors : sequence of int
        Sides of the anchors in pixels, one for each of the five levels of the pyramid, the finest of which is at 1/4 of
        the resolution; each in the ratios 1/2, 1 and 2.
    proposals : int
        Maximum number of regions that the heads process.
    detections : int
        Maximum number of nuclei in a window.
    score : float
        Nuclei with a lower score are dropped before drawing.
    nms : float
        Of two boxes that overlap by a larger IoU, the one with the lower score is dropped.
    mask : float
        Threshold in 0..1 from which on a pixel of a mask belongs to the nucleus.

    References
    ----------
    He et al., "Mask R-CNN", ICCV 2017; Li et al., "Benchmarking detection transfer learning with vision transformers",
    2021, for torchvision's second version.
    """

    def __init__(
        self,
        out_channels: int,
        backbone: str = "resnet50",
        encoder_weights: str | None = None,
        channels: int = 256,
        hidden: int = 1024,
        convolutions: int = 4,
        anchors: Sequence[int] = (8, 16, 32, 64, 128),
        proposals: int = 1000,
        detections: int = 1000,
        score: float = 0.3,
        nms: float = 0.3,
        mask: float = 0.5,
    ) -> None:
        super().__init__()
        from torchvision.models import detection, get_model
        from torchvision.models.detection.backbone_utils import BackboneWithFPN
        from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
        from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
        from torchvision.models.detection.rpn import AnchorGenerator, RPNHead

        if out_channels != 2:
            raise ValueError("its heads are nucleus and distance")
        if backbone not in BACKBONES:
            raise ValueError(f"backbone {backbone!r} is none of {', '.join(BACKBONES)}")
        if len(anchors) != 5:
            raise ValueError(f"anchors {list(anchors)}: use one side for each of five levels")
        self.mask = mask
        self.margin = 0
        """Pixels from a window's border to its core; set by the code that cuts overlapping windows."""
        stages = {f"layer{i + 1}": str(i) for i in range(4)}
        pyramid = BackboneWithFPN(
            get_model(backbone, weights=None), stages, list(BACKBONES[backbone]), channels, norm_layer=nn.BatchNorm2d
        )
        layers = [channels] * convolutions
        self.normalise = ImageNetNormalise()
        self.network = detection.MaskRCNN(
            pyramid,
            rpn_anchor_generator=AnchorGenerator(tuple((side,) for side in anchors), ((0.5, 1.0, 2.0),) * 5),
            rpn_head=RPNHead(channels, 3, conv_depth=2),
            box_head=FastRCNNConvFCHead((channels, 7, 7), layers, [hidden], norm_layer=nn.BatchNorm2d),
            box_predictor=detection.faster_rcnn.FastRCNNPredictor(hidden, 2),
            mask_head=MaskRCNNHeads(channels, layers, 1, norm_layer=nn.BatchNorm2d),
            mask_predictor=MaskRCNNPredictor(channels, channels, 2),
            rpn_post_nms_top_n_test=proposals,
            rpn_pre_nms_top_n_test=proposals,
            box_detections_per_img=detections,
            box_score_thresh=score,
            box_nms_thresh=nms,
        )
        self._load(backbone, encoder_weights)

    def _load(self, backbone: str, weights: str | None) -> None:
        from torchvision.models import get_weight

        def imagenet() -> dict[str, Tensor]:
            name = {"resnet50": "ResNet50_Weights.IMAGENET1K_V2", "resnet18": "ResNet18_Weights.IMAGENET1K_V1"}
            return dict(get_weight(name[backbone]).get_state_dict(progress=False, check_hash=True))

        def coco() -> dict[str, Tensor]:
            name = "MaskRCNN_ResNet50_FPN_V2_Weights.COCO_V1"
            return dict(get_weight(name).get_state_dict(progress=False, check_hash=True))

        whole = weights == COCO
        if weights not in (None, IMAGENET, COCO):
            whole = any(name.startswith("roi_heads.") for name in read_state(Path(weights).expanduser()))
        if not whole:
            load_encoder(self.network.backbone.body, weights, {IMAGENET: imagenet}, backbone)
            return
        heads: Any = self.network.roi_heads
        last = heads.box_predictor, heads.mask_predictor
        heads.box_predictor = heads.mask_predictor = None
        load_encoder(self.network, weights, {COCO: coco}, f"Mask R-CNN on {backbone}", dict)
        heads.box_predictor, heads.mask_predictor = last

    def _features(self, images: Tensor) -> tuple[Any, OrderedDict[str, Tensor]]:
        """Images as torchvision expects them, and their features in float32, the precision that boxes need."""
        from torchvision.models.detection.image_list import ImageList

        pixels = self.normalise(images)
        features = self.network.backbone(pixels)
        shape = (int(images.shape[2]), int(images.shape[3]))
        return (
            ImageList(pixels, [shape] * len(images)),
            OrderedDict((name, value.float()) for name, value in features.items()),
        )

    def loss(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Compute the loss of a batch.

        Parameters
        ----------
        images : torch.Tensor
            float ``(N, 3, H, W)`` in [0, 1].
        labels : torch.Tensor
            int64 ``(N, H, W)``: label maps, 0 is background.

        Returns
        -------
        dict of str to torch.Tensor
            ``loss`` and its parts: objectness and boxes of the proposals; classes, boxes and masks of the regions.
        """
        targets = [instance_targets(one) for one in labels]
        if not any(len(one["boxes"]) for one in targets):
            # Without nuclei the heads' batch normalisation has no input; a loss of zero gives gradients of zero.
            return {"loss": sum((p.sum() for p in self.parameters()), start=images.new_zeros(())) * 0.0}
        pixels, features = self._features(images)
        with torch.autocast(images.device.type, enabled=False):
            proposals, first = self.network.rpn(pixels, features, targets)
            _, second = self.network.roi_heads(features, proposals, pixels.image_sizes, targets)
        parts = {name.removeprefix("loss_"): value for name, value in (first | second).items()}
        return {"loss": torch.stack(list(parts.values())).sum(), **parts}

    def detect(self, image: Tensor) -> Detections:
        """Detect the nuclei of one image ``(3, H, W)`` in [0, 1]."""
        pixels, features = self._features(image[None])
        with torch.autocast(image.device.type, enabled=False):
            proposals, _ = self.network.rpn(pixels, features, None)
            found, _ = self.network.roi_heads(features, proposals, pixels.image_sizes, None)
        return Detections(
            found[0]["boxes"].double().cpu().numpy(),
            found[0]["scores"].double().cpu().numpy(),
            found[0]["masks"][:, 0].float().cpu().numpy(),
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            raise RuntimeError("Mask R-CNN is trained through its own loss")
        shape = (int(x.shape[2]), int(x.shape[3]))
        maps = np.stack([draw_instances(self.detect(one), shape, self.margin, threshold=self.mask) for one in x])
        return torch.logit(torch.from_numpy(maps).to(x.device).float() / 255, eps=1e-6)

    def dry_run(self, x: Tensor) -> None:
        """Pass data through all layers to count operations, for 250 proposals and 50 nuclei in 256 x 256 pixels."""
        _, features = self._features(x)
        self.network.rpn.head(list(features.values()))
        heads: Any = self.network.roi_heads
        share = x.shape[2] * x.shape[3] / 256**2
        boxes = x.new_empty(round(250 * share), features["0"].shape[1], 7, 7)
        heads.box_predictor(heads.box_head(boxes))
        masks = x.new_empty(round(50 * share), features["0"].shape[1], 14, 14)
        heads.mask_predictor(heads.mask_head(masks))


def instance_targets(labels: Tensor) -> dict[str, Tensor]:
    """Boxes and masks of one label map, in the form on which torchvision's networks are trained.

    Parameters
    ----------
    labels : torch.Tensor
        int64 ``(H, W)``, 0 is background.

    Returns
    -------
    dict of str to torch.Tensor
        ``boxes`` float ``(n, 4)``, left, top, right, bottom at the outer edges of the pixels; ``labels`` int64
        ``(n,)``, all 1; ``masks`` uint8 ``(n, H, W)``.
    """
    values, counts = torch.unique(labels, return_counts=True)
    values = values[(values > 0) & (counts >= LEAST_AREA)]
    masks = labels[None] == values[:, None, None]
    rows, columns = masks.any(dim=2), masks.any(dim=1)
    height, width = labels.shape
    boxes = torch.stack(
        [
            columns.int().argmax(dim=1),
            rows.int().argmax(dim=1),
            width - columns.flip(1).int().argmax(dim=1),
            height - rows.flip(1).int().argmax(dim=1),
        ],
        dim=1,
    )
    return {"boxes": boxes.float(), "labels": torch.ones_like(values), "masks": masks.to(torch.uint8)}
