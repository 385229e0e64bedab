"""Tiny detectors of torchvision's families, and photographs with boxes that they run on in a fraction of a second."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.ssd import SSD
from torchvision.ops import FrozenBatchNorm2d

from secateur.data import DataBundle, DetectionBatches

CLASSES = ("dark", "light")
# Padded to hardly more than they are: torchvision rounds a map's scale from its size, on the first image that it sees.
SIZES: Any = {"min_size": 48, "max_size": 64, "size_divisible": 8}
FEW: Any = {
    "rpn_pre_nms_top_n_train": 60, "rpn_post_nms_top_n_train": 30,
    "rpn_pre_nms_top_n_test": 40, "rpn_post_nms_top_n_test": 20, "box_batch_size_per_image": 16,
}  # fmt: skip


def backbone(width: int = 16) -> nn.Sequential:
    """Two convolutions to a map of an eighth of the image."""
    found = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2),
    )  # fmt: skip
    found.out_channels = width
    return found


def anchors() -> AnchorGenerator:
    return AnchorGenerator(((8, 16, 24),), ((1.0,),))


def ssd() -> nn.Module:
    body = backbone()
    body.out_channels = [16]  # type: ignore[assignment]
    return SSD(body, DefaultBoxGenerator([[2]], scales=[0.2, 0.4]), (64, 64), 3, score_thresh=0.001)


def faster_rcnn() -> nn.Module:
    return FasterRCNN(
        backbone(), None, rpn_anchor_generator=anchors(), box_score_thresh=0.001,
        box_head=TwoMLPHead(16 * 7 * 7, 24), box_predictor=FastRCNNPredictor(24, 3), **FEW, **SIZES,
    )  # fmt: skip


def mask_rcnn() -> nn.Module:
    return MaskRCNN(backbone(), 3, rpn_anchor_generator=anchors(), **FEW, **SIZES)


def retinanet() -> nn.Module:
    return RetinaNet(backbone(), 3, anchor_generator=anchors(), score_thresh=0.001, **SIZES)


def frozen_retinanet() -> nn.Module:
    """A RetinaNet with frozen norms, which learns the squares from random weights within half a minute."""
    body = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1), FrozenBatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 24, 3, 2, 1), FrozenBatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 32, 3, 2, 1), nn.ReLU(),
    )  # fmt: skip
    body.out_channels = 32  # type: ignore[assignment]
    found = RetinaNet(body, 3, anchor_generator=anchors(), score_thresh=0.001, **SIZES)
    for head in (found.head.classification_head.conv, found.head.regression_head.conv):
        for layer in head.modules():
            if isinstance(layer, nn.Conv2d):  # torchvision's own begin too small to learn from nothing
                nn.init.kaiming_normal_(layer.weight)
    return found


def fcos() -> nn.Module:
    body = backbone(32)
    return FCOS(body, 3, anchor_generator=AnchorGenerator(((8,),), ((1.0,),)), score_thresh=0.001, **SIZES)


MAKES: dict[str, Callable[[], nn.Module]] = {
    "ssd": ssd, "faster_rcnn": faster_rcnn, "retinanet": retinanet, "fcos": fcos,
}  # fmt: skip


class Squares:
    """Noise with squares of two shades, none, one or two an image, in images of two sizes."""

    def __init__(self, count: int, boxes: bool = True) -> None:
        self.count, self.boxes = count, boxes

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(index)
        height, width = (48, 64) if index % 2 else (40, 56)
        image = 0.4 + 0.2 * torch.rand(3, height, width, generator=generator)
        number = index % 3 if self.boxes else 0
        corners = torch.randint(0, 20, (number, 2), generator=generator)
        boxes = torch.cat([corners, corners + torch.randint(10, 18, (number, 1), generator=generator)], 1)
        labels = torch.randint(1, 3, (number,), generator=generator)
        for (x1, y1, x2, y2), label in zip(boxes.tolist(), labels.tolist(), strict=True):
            image[:, y1:y2, x1:x2] = float(label - 1)
        return image, {"boxes": boxes.float(), "labels": labels}


def bundle(train: int = 6, validation: int = 5, test: int = 3, boxes: bool = True) -> DataBundle:
    parts = [Squares(count, boxes) for count in (train, validation, test)]
    return DataBundle("squares", *parts, (3, 48, 64), CLASSES, None, "detection")


def batches() -> dict[str, DetectionBatches]:
    data = bundle()
    train = DetectionBatches(data.train, 3, shuffle=True)
    return {"train": train, "validation": DetectionBatches(data.validation, 3), "test": DetectionBatches(data.test, 3)}
