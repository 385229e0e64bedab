"""Detectors: their loss and their metric, where a network finds boxes in place of one class.

A detector is a network as those of torchvision: called on a list of images it returns a mapping of boxes, scores and
labels for each; in train mode, called on images and targets, it returns a mapping of its losses.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics.detection import MeanAveragePrecision as _Metric

from secateur.errors import DataError, UsageError, install


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
    COCO's other eleven numbers, and the average precision of each class, are :attr:`details`.

    Args:
        classes: Names of the classes, from label 1 on; a class without a name is called by its label.

    Raises:
        UsageError: If pycocotools is not installed.
    """

    name = "mAP"
    """The metric's name in tables and reports."""
    details: dict[str, Any]
    """Further figures that :meth:`compute` sets, fractions; None where there was nothing of that kind to find.

    ``AP50`` and ``AP75``, at one overlap; ``APs``, ``APm`` and ``APl`` of objects of less than 32², up to 96², and more
    pixels; ``AR1``, ``AR10``, ``AR100``, the recall of so many boxes an image, averaged over overlaps and classes;
    ``ARs``, ``ARm``, ``ARl``. ``classes`` holds by name of each class what is its own of AP and AP50;
    classes that are in no image and that nothing was taken for are left out.
    """

    def __init__(self, classes: Sequence[str] = ()) -> None:
        if importlib.util.find_spec("pycocotools") is None:
            raise UsageError(f"mAP: pycocotools is not installed; {install('detection')}.")
        # pycocotools' own numbers: torchmetrics rounds them to fp32, so that a recall of 7/50 misses the level 0.14.
        super().__init__(
            iou_thresholds=np.linspace(0.5, 0.95, 10).tolist(),
            rec_thresholds=np.linspace(0.0, 1.0, 101).tolist(),
            extended_summary=True,
        )
        self.classes = tuple(classes)
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
        self.details = {name: _measured(found[key]) for name, key in _NUMBERS.items()}
        # Overlaps × recalls × classes, of objects of all sizes and 100 boxes an image.
        precision = found["precision"][:, :, :, 0, -1]
        names = dict(enumerate(self.classes, start=1))
        self.details["classes"] = {
            names.get(label, str(label)): {"AP": _measured(own.mean()), "AP50": _measured(own[0].mean())}
            for label, own in zip(found["classes"].reshape(-1).tolist(), precision.unbind(2), strict=True)
        }
        return found["map"]


_NUMBERS = {
    "AP50": "map_50", "AP75": "map_75", "APs": "map_small", "APm": "map_medium", "APl": "map_large",
    "AR1": "mar_1", "AR10": "mar_10", "AR100": "mar_100", "ARs": "mar_small", "ARm": "mar_medium", "ARl": "mar_large",
}  # fmt: skip
"""COCO's numbers beside AP -> what torchmetrics calls them."""


def _measured(value: Tensor) -> float | None:
    """Return a figure; None for -1, which stands for one that nothing was there for."""
    return None if float(value) < 0 else float(value)
