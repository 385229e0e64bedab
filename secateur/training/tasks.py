"""What follows from the task of a data set, classes, boxes or masks: how examples are batched, the loss, the metric."""

from __future__ import annotations

import inspect
import itertools
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from secateur import criteria
from secateur.criteria import Criterion, Need
from secateur.data import Batches, DataBundle, DetectionBatches, ImageTensors
from secateur.errors import UsageError

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.data import Dataset

    from secateur.data.bundle import Sized
    from secateur.training.dense import DenseLoss, MeanIoU
    from secateur.training.detection import DetectionLoss, MeanAveragePrecision

TRAINING_BATCH = {"classification": 128, "detection": 8, "dense": 16}
"""Examples a training step, unless a run gives a number."""

EVALUATION_BATCH = {"classification": 256, "detection": 8, "dense": 16}
"""Examples a batch of evaluation."""

SAMPLE_BATCH = {"classification": 64, "detection": 8, "dense": 8}
"""Examples a batch for criteria and compensation."""

Part = Literal["train", "validation", "test"]


def training_batches(bundle: DataBundle, size: int | None, seed: int, workers: int | None = None) -> Batches:
    """Make shuffled, augmented batches of the training data, in an order that follows from seed and epoch alone.

    Args:
        bundle: The data.
        size: Examples a batch; that of :data:`TRAINING_BATCH` when None.
        seed: Seed of order and augmentation.
        workers: Processes that read files, see :func:`readers`.
    """
    size = size or TRAINING_BATCH[bundle.task]
    count = len(bundle.train)  # type: ignore[arg-type]
    # Last maps of a detector, or pooled ones of a network for masks, may have one position, and a batch norm can't be
    # trained on one value a channel.
    lone = bundle.task != "classification" and count > size and count % size == 1
    return _batches(bundle, bundle.train, size, shuffle=True, augment=True, seed=seed, workers=workers, drop_last=lone)


def evaluation_batches(bundle: DataBundle, part: Part, workers: int | None = None) -> Batches:
    """Make batches of the validation or the test set, as they come."""
    return _batches(bundle, getattr(bundle, part), EVALUATION_BATCH[bundle.task], workers=workers)


def sample(bundle: DataBundle, count: int, seed: int) -> list[Any]:
    """Take ``count`` batches of the training data at random, without augmentation, for criteria and compensation."""
    batches = _batches(bundle, bundle.train, SAMPLE_BATCH[bundle.task], shuffle=True, seed=seed)
    return list(itertools.islice(batches, count))


def labelled(dataset: Sized | Dataset[Any]) -> bool:
    """Tell whether a data set's elements hold what a metric compares with: they are pairs, or mappings with labels."""
    first = dataset[0]
    return "labels" in first if isinstance(first, Mapping) else isinstance(first, (tuple, list)) and len(first) == 2


def readers(dataset: Sized | Dataset[Any], size: int) -> int:
    """Return how many processes read a data set: one a core of this process's share; none for images in memory.

    A few batches are read sooner than processes are started. Processes of one machine that train together share its
    cores.
    """
    if isinstance(dataset, ImageTensors) or len(dataset) <= _FEW * size:  # type: ignore[arg-type]
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


_FEW = 8
"""Batches that the run's own process reads."""


def _batches(
    bundle: DataBundle, dataset: Sized | Dataset[Any], size: int, workers: int | None = None, **options: Any
) -> Batches:
    options["workers"] = readers(dataset, size) if workers is None else workers
    return (DetectionBatches if bundle.task == "detection" else Batches)(dataset, size, **options)


def loss(bundle: DataBundle) -> DetectionLoss | DenseLoss | None:
    """Return the loss of the data's task; None for cross entropy."""
    if bundle.task == "classification":
        return None
    if bundle.task == "dense":
        from secateur.training.dense import DenseLoss

        return DenseLoss()
    from secateur.training.detection import DetectionLoss

    return DetectionLoss()


def metric(bundle: DataBundle) -> MeanAveragePrecision | MeanIoU | None:
    """Return the metric of the data's task; None for accuracy.

    Raises:
        UsageError: If a package that measures it is not installed.
    """
    if bundle.task == "classification":
        return None
    if bundle.task == "dense":
        from secateur.training.dense import MeanIoU

        return MeanIoU(bundle.classes)
    from secateur.training.detection import MeanAveragePrecision

    return MeanAveragePrecision(bundle.classes)


def is_detector(model: nn.Module) -> bool:
    """Tell whether a network is called as torchvision's detectors are: ``model(images, targets)``."""
    try:
        return {"images", "targets"} <= inspect.signature(model.forward).parameters.keys()
    except (TypeError, ValueError):  # a compiled forward has no signature
        return False


def needed_targets(model: nn.Module) -> set[str]:
    """Return the targets that a detector is trained on: ``boxes`` and ``labels``; for Mask R-CNN ``masks``, too."""
    heads = getattr(model, "roi_heads", None)
    more = {"masks": "mask_head", "keypoints": "keypoint_head"}
    return {"boxes", "labels"} | {key for key, head in more.items() if getattr(heads, head, None) is not None}


def require_fit(model: nn.Module, name: str, bundle: DataBundle) -> None:
    """Refuse a network for data of another task, before any work is done for it.

    Args:
        model: The network.
        name: What it is called.
        bundle: The data.

    Raises:
        UsageError: If one is for boxes and the other is not, or the data lack what the network is trained on.
    """
    boxes = bundle.task == "detection"
    if not is_detector(model):
        if boxes:
            raise UsageError(
                f"{name}: is no detector, which is called on images and targets, and {bundle.name} holds boxes; give a "
                "detector, such as torchvision:ssdlite320_mobilenet_v3_large, or data of classes."
            )
        return
    if not boxes:
        raise UsageError(f"{name}: is a detector, and {bundle.name} holds no boxes; give data that do, voc:ROOT.")
    _, target = bundle.train[0]
    missing = needed_targets(model) - set(target)
    if missing:
        raise UsageError(
            f"{name}: is trained on {' and '.join(sorted(missing))}, which {bundle.name} doesn't hold; give a detector "
            "of boxes alone, such as torchvision:fasterrcnn_resnet50_fpn."
        )


def require_classes(bundle: DataBundle, method: str | Criterion = "cfp", **weights: float) -> None:
    """Refuse what needs one class an image, before any work is done for it, where the data hold none.

    Args:
        bundle: The data.
        method: ``cfp``, or a criterion or its name.
        weights: Settings that are about class scores unless 0, by name.

    Raises:
        UsageError: If the data hold boxes or masks, and the criterion or a setting is for one class an image.
    """
    if bundle.task == "classification":
        return
    criterion = criteria.get(method)
    held = "boxes" if bundle.task == "detection" else "masks"
    if Need.LABELS in criterion.needs:
        raise UsageError(
            f"method: {criterion.name} needs one class an image, and {bundle.name} holds {held}; choose "
            "another, such as corrnet."
        )
    for name, weight in weights.items():
        if weight:
            raise UsageError(f"{name}: is about class scores, and {bundle.name} holds {held}; leave it 0.")
