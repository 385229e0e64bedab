"""Detectors: their loss and their metric, where a network finds boxes in place of one class.

A detector is a network as those of torchvision: called on a list of images it returns a mapping of boxes, scores and
labels for each; in train mode, called on images and targets, it returns a mapping of its losses.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.detection import MeanAveragePrecision as _Metric

from secateur.errors import DataError, UsageError


class DetectionLoss:
    """Sum of the losses that a detector returns in train mode, unweighted, as torchvision trains its own."""

    def __call__(self, output: Any, targets: Any) -> Tensor:
        """Add up a detector's losses; ``targets`` are in them already.

        Raises:
            DataError: If the output is no mapping of losses.
        """
        if not isinstance(output, Mapping) or not output:
            raise DataError(
                f"detection: the network returned {type(output).__name__} in place of a mapping of losses; a detector "
                "gives them in train mode, called on images and targets, see secateur.data.DetectionBatches."
            )
        return torch.stack(list(output.values())).sum()

    def prepare(self, model: nn.Module) -> None:
        """Make a network in eval mode return its losses: modules go into train mode, but layers stay as they are.

        So batch norms keep to their running moments and leave them alone, and nothing is dropped out.
        """
        for module in model.modules():
            module.training = next(module.children(), None) is not None


class MeanAveragePrecision(_Metric):
    """Mean average precision of boxes as COCO has it (Lin et al. 2014), by pycocotools, as one number.

    The mean over the classes, and over the overlaps IoU = 0.5, 0.55 … 0.95 from which a box counts as found, of the
    area under precision against recall, of at most 100 boxes an image. Objects with ``iscrowd`` count neither way.

    Raises:
        UsageError: If pycocotools is not installed.
    """

    name = "mAP"
    """The metric's name in tables and reports."""
    details: Mapping[str, float]
    """Further figures that :meth:`compute` sets: AP50, the same at IoU 0.5 alone."""

    def __init__(self) -> None:
        if importlib.util.find_spec("pycocotools") is None:
            raise UsageError("mAP: pycocotools is not installed; pip install 'secateur[detection]'.")
        super().__init__()
        self.details = {}
        # SSD gives 200 boxes an image; that the best 100 count is COCO's rule.
        self.warn_on_many_detections = False

    def compute(self) -> Tensor:  # type: ignore[override]
        """Return the mean average precision, in [0, 1].

        Raises:
            DataError: If no image had a box to find.
        """
        found: dict[str, Tensor] = super().compute()
        if float(found["map"]) < 0:
            raise DataError("mAP: not one box in the images measured; there is nothing to find.")
        self.details = {"AP50": float(found["map_50"])}
        return found["map"]
