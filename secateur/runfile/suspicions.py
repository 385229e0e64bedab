"""What is likely a mistake and costs an afternoon, told as a warning before the afternoon is spent."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from torch import Tensor

from secateur.models import MODELS
from secateur.models.detectors import DETECTORS
from secateur.pruning.comparison import outputs

if TYPE_CHECKING:
    from secateur.data import DataBundle
    from secateur.runfile.sources import SourceModel

_LOG = logging.getLogger(__name__)

_TRAINED = ("weights", "pretrained", "checkpoint_path")
"""Options by which torchvision and timm build a network with trained weights."""


def of_fresh_weights(found: SourceModel, weights: str | None, command: str) -> None:
    """Say that a network has the weights that it is built with: random ones, where it is known by name.

    What a user's own function returns may be trained.

    Args:
        found: The network.
        weights: Where its weights are from.
        command: What is done with it.
    """
    if weights is not None or any(found.options.get(name) for name in _TRAINED):
        return
    known = found.name in (*MODELS, *DETECTORS) or found.name.partition(":")[0] in ("torchvision", "timm")
    if known:
        _LOG.warning(
            "%s: %s has fresh random weights, so that the result says nothing of a trained network; give --weights.",
            command,
            found.name,
        )
    else:
        _LOG.warning(
            "%s: no --weights, so that the weights are those that %s makes, random ones unless it loads others; give "
            "--weights FILE.",
            command,
            found.name,
        )


def of_classes(found: SourceModel, bundle: DataBundle) -> None:
    """Say that a network scores more classes than the data has, as one does whose head was left as it was.

    Args:
        found: The network.
        bundle: The data.
    """
    if bundle.task != "classification" or found.example_inputs is None or not bundle.classes:
        return
    scores = next(iter(outputs(found.model, found.example_inputs)), None)
    if isinstance(scores, Tensor) and scores.ndim == 2 and scores.shape[1] > len(bundle.classes):
        _LOG.warning(
            "%s: scores %d classes, and %s has %d: give it a head of that many, or check that its first %d are these.",
            found.name,
            scores.shape[1],
            bundle.name,
            len(bundle.classes),
            len(bundle.classes),
        )
