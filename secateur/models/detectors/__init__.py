"""Detectors on a classifier's layers: SSD300 and SSD512 on a VGG, Faster R-CNN with a feature pyramid on a ResNet.

A classifier that was pruned keeps its widths as the base of a detector; what reads it there is made to fit.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from secateur import checkpoint
from secateur.errors import UsageError
from secateur.models import MODELS
from secateur.models.detectors import fpn, ssd
from secateur.models.detectors.placing import note_plans
from secateur.network.copies import replica
from secateur.network.inputs import unwrapped

if TYPE_CHECKING:
    import os

KINDS = {**{name: layout.sources for name, layout in ssd.LAYOUTS.items()}, "faster_rcnn": fpn.SOURCES}
"""Kind of detector -> its sources: layers of the base, or behind it, whose maps boxes are read from."""


def from_backbone(
    classifier: nn.Module,
    kind: str,
    num_classes: int,
    *,
    weights: str | os.PathLike[str] | None = None,
    last: str | None = None,
    freeze_norms: bool | None = None,
    **options: Any,
) -> nn.Module:
    """Build a detector on the layers of a classifier, pruned or not.

    The base keeps weights and widths; all that reads it takes the widths that are there, and is drawn anew. The
    detector knows the plans that made its base, so that :func:`secateur.save` writes one file, which
    :func:`secateur.load` reads into the same detector on the unpruned classifier.

    Singh et al. 2020, tables 6 and 7: SSD512 on the VGG-16 of their CIFAR-10 experiment, cut after conv4_3
    (``last="conv4_3"``), and Faster R-CNN on their ResNet-50.

    Args:
        classifier: A VGG (torchvision's, or :class:`secateur.models.CifarVGG`) for SSD; a ResNet of torchvision for
            Faster R-CNN. It is left as it is.
        kind: ``ssd300``, ``ssd512`` or ``faster_rcnn``.
        num_classes: Classes, with the background, as torchvision counts.
        weights: File that :func:`secateur.save` wrote of the pruned classifier, or a plain state dict; ``classifier``
            is then the original network, as its class builds it.
        last: The last of the sources, see :data:`KINDS`. The base, or what SSD adds to it, is cut behind it, and the
            later sources are left out; all of them where None.
        freeze_norms: Whether the base's batch norms keep their moments and factors, as in torchvision's detectors on a
            trained base. Where None, Faster R-CNN's do, which trains on few images a step, and SSD's learn.
        **options: Of torchvision's ``SSD`` or ``FasterRCNN``, such as ``score_thresh`` or ``image_mean``. Images are
            normalised by ImageNet's means unless these are given.

    Returns:
        The detector, in train mode, on the device of the classifier.

    Raises:
        UsageError: If the kind or the source is unknown, the classifier is none that the kind takes, or there is no
            such file.
        CheckpointError: If the file is damaged, or holds another network.

    Example:
        >>> from secateur.models import vgg16
        >>> detector = from_backbone(vgg16(), "ssd512", num_classes=4, last="conv4_3")
        >>> detector.backbone.out_channels
        [512]
    """
    if kind not in KINDS:
        raise UsageError(f"{kind}: no such kind of detector{_close(kind, KINDS)} Known are {', '.join(KINDS)}.")
    last = KINDS[kind][-1] if last is None else last
    if last not in KINDS[kind]:
        raise UsageError(f"last: {kind} has no source {last!r}{_close(last, KINDS[kind])} "
                         f"Known are {', '.join(KINDS[kind])}.")  # fmt: skip
    if num_classes < 2:
        raise UsageError(f"num_classes: counts the background, so it is at least 2, found {num_classes}.")
    classifier = _filled(unwrapped(classifier), weights)
    base = replica(classifier)
    if freeze_norms or (freeze_norms is None and kind == "faster_rcnn"):
        _freeze_norms(base)
    detector: nn.Module
    # Building moves the base's layers into the detector, so what they were called is looked up in the classifier.
    if kind == "faster_rcnn":
        detector = fpn.build(base, num_classes, last, **options)
        places = fpn.places(classifier, last)
    else:
        detector = ssd.build(getattr(base, "features", base), ssd.LAYOUTS[kind], num_classes, last, **options)
        places = ssd.places(cast("nn.Sequential", classifier.features), last)
    note_plans(classifier, detector, *places)
    return detector.to(next(classifier.parameters()).device).train()


def ssd300(num_classes: int = 21, base: str = "torchvision:vgg16", **options: Any) -> nn.Module:
    """Build an SSD300; see :func:`on_base`."""
    return on_base("ssd300", num_classes, base, **options)


def ssd512(num_classes: int = 21, base: str = "torchvision:vgg16", **options: Any) -> nn.Module:
    """Build an SSD512; see :func:`on_base`."""
    return on_base("ssd512", num_classes, base, **options)


def faster_rcnn(num_classes: int = 91, base: str = "torchvision:resnet50", **options: Any) -> nn.Module:
    """Build a Faster R-CNN; see :func:`on_base`."""
    return on_base("faster_rcnn", num_classes, base, **options)


DETECTORS: Mapping[str, Callable[..., nn.Module]] = {"ssd300": ssd300, "ssd512": ssd512, "faster_rcnn": faster_rcnn}
"""Name -> factory, for whoever names a detector in one word."""


def on_base(
    kind: str,
    num_classes: int,
    base: str,
    *,
    base_options: Mapping[str, Any] | None = None,
    base_weights: str | None = None,
    **options: Any,
) -> nn.Module:
    """Build a detector on a classifier that is named; see :func:`from_backbone`.

    Args:
        kind: As in :func:`from_backbone`.
        num_classes: As in :func:`from_backbone`.
        base: One of :data:`secateur.models.MODELS`, or ``torchvision:NAME``.
        base_options: Keyword arguments of the classifier, as it was built when its file was saved.
        base_weights: As ``weights`` in :func:`from_backbone`; fresh weights where None.
        **options: As in :func:`from_backbone`.

    Raises:
        UsageError: If there is no such base; and as :func:`from_backbone`.
        CheckpointError: As :func:`from_backbone`.
    """
    from torchvision.models import get_model, list_models

    library, _, name = base.rpartition(":")
    known = list_models() if library == "torchvision" else MODELS if not library else ()
    if name not in known:
        raise UsageError(f"base: no network {base}{_close(name, known)} Known are {', '.join(MODELS)} and "
                         "torchvision:NAME; for another, call secateur.models.detectors.from_backbone.")  # fmt: skip
    given = dict(base_options or {})
    try:
        classifier = get_model(name, weights=None, **given) if library else MODELS[name](**given)
    except TypeError as error:
        raise UsageError(f"base: {base} can't be built with base_options {given}: {error}.") from error
    return from_backbone(classifier, kind, num_classes, weights=base_weights, **options)


def _filled(classifier: nn.Module, weights: str | os.PathLike[str] | None) -> nn.Module:
    if weights is None:
        return classifier
    if checkpoint.is_checkpoint(weights):
        return checkpoint.load(classifier, weights)
    filled: nn.Module = replica(classifier)
    try:
        filled.load_state_dict(checkpoint.load_weights(weights))
    except RuntimeError as error:
        raise UsageError(f"{weights}: not the weights of this {type(classifier).__name__}: "
                         f"{' '.join(str(error).split())}") from error  # fmt: skip
    return filled


def _freeze_norms(base: nn.Module) -> None:
    """Put a frozen batch norm in the place of each batch norm; tensors keep their names."""
    for module in [*base.modules()]:
        for name, norm in [*module.named_children()]:
            if isinstance(norm, nn.BatchNorm2d):
                frozen = FrozenBatchNorm2d(norm.num_features, norm.eps).to(norm.weight)
                frozen.load_state_dict(norm.state_dict())
                setattr(module, name, frozen)


def _close(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else "."
