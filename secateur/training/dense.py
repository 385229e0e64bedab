"""Networks that give a class to every pixel: their loss and their metric.

Such a network returns scores, shape ``(N, classes, H, W)``; or, as those of torchvision do, a mapping with the scores
under ``out`` and, where it has an auxiliary head, under ``aux``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.classification import MulticlassConfusionMatrix as _Confusion

from secateur.data.masks import IGNORED
from secateur.errors import DataError

AUXILIARY = 0.5
"""Weight of the auxiliary head's loss, as torchvision trains its networks."""


def scores_of(output: Any, target: Tensor) -> Tensor:
    """Return the scores of each pixel.

    Args:
        output: What the network returned.
        target: Classes of the pixels, shape ``(N, H, W)``.

    Raises:
        DataError: If there are none, or not one for each pixel of the target.
    """
    found = output.get("out") if isinstance(output, Mapping) else output
    if not isinstance(found, Tensor) or found.ndim != 4:
        kind = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise DataError(f"dense: scores are (N, classes, H, W), as such or under 'out'; the network returned {kind}.")
    if found.shape[-2:] != target.shape[-2:]:
        (h, w), (mask_h, mask_w) = found.shape[-2:], target.shape[-2:]
        raise DataError(
            f"dense: the network scores {w}x{h} pixels, and the masks have {mask_w}x{mask_h}; let it resize its scores."
        )
    return found


class DenseLoss:
    """Mean cross entropy over the pixels that count; of an auxiliary head, half as much on top."""

    def __call__(self, output: Any, target: Tensor) -> Tensor:
        """Return the loss of a batch.

        Raises:
            DataError: If the output has no score for each pixel.
        """
        loss = self._mean(scores_of(output, target), target)
        aux = output.get("aux") if isinstance(output, Mapping) else None
        return loss if aux is None else loss + AUXILIARY * self._mean(scores_of(aux, target), target)

    @staticmethod
    def _mean(scores: Tensor, target: Tensor) -> Tensor:
        # A mean over no pixel would be no number: a batch may hold none that counts.
        counted = (target != IGNORED).sum().clamp_min(1)
        return F.cross_entropy(scores, target, ignore_index=IGNORED, reduction="sum") / counted


class MeanIoU(_Confusion):
    r"""Mean over the classes of intersection over union, of all pixels that count (Everingham et al. 2010).

    With :math:`n_{ij}` the pixels of class i that were taken for class j,

    .. math:: \text{IoU}_i = n_{ii} / (\textstyle\sum_j n_{ij} + \sum_j n_{ji} - n_{ii}).

    Classes that are in no mask and that nothing was taken for don't count. :attr:`details` holds ``pixels``, the share
    of pixels that are right, and the IoU of each class.

    Args:
        classes: Names of the classes, by index.
    """

    name = "mIoU"
    """The metric's name in tables and reports."""
    details: dict[str, Any]
    """Further figures that :meth:`compute` sets, fractions."""

    def __init__(self, classes: Sequence[str]) -> None:
        super().__init__(num_classes=len(classes), ignore_index=IGNORED, validate_args=False)
        self.classes, self.details = tuple(classes), {}

    def update(self, output: Any, target: Tensor) -> None:
        """Count a batch.

        Raises:
            DataError: If the output has no score of each class for each pixel.
        """
        scores = scores_of(output, target)
        if scores.shape[1] != len(self.classes):
            raise DataError(
                f"dense: the network scores {scores.shape[1]} classes, and the data have {len(self.classes)}."
            )
        super().update(scores.argmax(1), target)

    def compute(self) -> Tensor:
        """Return the mean, in [0, 1].

        Raises:
            DataError: If no pixel counts.
        """
        counts = super().compute().double()
        right, union = counts.diagonal(), counts.sum(0) + counts.sum(1) - counts.diagonal()
        if not float(counts.sum()):
            raise DataError("mIoU: not one pixel counts in the images measured.")
        there = union > 0
        each = right / union
        self.details = {"pixels": float(right.sum() / counts.sum())}
        self.details["classes"] = {
            name: {"IoU": float(value)}
            for name, value, is_there in zip(self.classes, each, there, strict=True)
            if is_there
        }
        return torch.mean(each[there])
