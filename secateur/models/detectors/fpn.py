"""Faster R-CNN with a feature pyramid on the stages of a ResNet, of whatever widths."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import MultiScaleRoIAlign

from secateur.errors import UsageError
from secateur.network.isolation import left_as_found

SOURCES = ("layer1", "layer2", "layer3", "layer4")
"""Stages whose maps the pyramid reads."""

CHANNELS = 256
"""Channels of the pyramid."""

SIZES = (32, 64, 128, 256, 512)
"""Sides of the anchors of each level, in pixels; the last level is the one before it, pooled."""


def build(base: nn.Module, num_classes: int, last: str, **options: Any) -> FasterRCNN:
    """Build a Faster R-CNN with a feature pyramid (Lin et al. 2017) and RoI Align on a ResNet.

    Where the base ends with layer4 it is torchvision's ``fasterrcnn_resnet50_fpn``, but for the widths that the pyramid
    reads: these are what the base gives. torchvision computes them from ``inplanes``, which no longer holds where the
    stages of a ResNet were pruned.

    Args:
        base: A ResNet that no other network shares layers with.
        num_classes: Classes, with the background.
        last: The last stage; later ones are left out.
        **options: Of torchvision's ``FasterRCNN``.

    Raises:
        UsageError: If the base is no ResNet.
    """
    count = SOURCES.index(last) + 1
    named = {name: str(i) for i, name in enumerate(SOURCES[:count])}
    body = BackboneWithFPN(base, named, widths(base, last), CHANNELS)
    levels = tuple((size,) for size in SIZES[: count + 1])
    options.setdefault("rpn_anchor_generator", AnchorGenerator(levels, ((0.5, 1.0, 2.0),) * len(levels)))
    options.setdefault("box_roi_pool", MultiScaleRoIAlign(list(named.values()), output_size=7, sampling_ratio=2))
    return FasterRCNN(body, num_classes, **options)


def widths(base: nn.Module, last: str) -> list[int]:
    """Return the channels of each stage's map, up to the last stage, as a forward shows them.

    Raises:
        UsageError: If the base has no such stages, or computes more than its layers one after another up to there.
    """
    named = {name: name for name in SOURCES[: SOURCES.index(last) + 1]}
    children = dict(base.named_children())
    lacking = next((name for name in named if name not in children), None)
    if lacking is not None:
        raise UsageError(f"faster_rcnn: the base is a ResNet with {', '.join(SOURCES)}, and this "
                         f"{type(base).__name__} has no {lacking}.")  # fmt: skip
    seen: dict[str, Tensor] = {}
    hooks = [
        children[name].register_forward_hook(lambda _m, _i, out, name=name: seen.__setitem__(name, out))
        for name in named
    ]
    parameter = next(base.parameters())
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)).to(parameter)
    try:
        with left_as_found(base), torch.no_grad():
            base.eval()
            base(image)
            whole = dict(seen)
            IntermediateLayerGetter(base, dict(named)).eval()(image)
    finally:
        for hook in hooks:
            hook.remove()
    wrong = next((name for name in named if name not in whole or not torch.equal(whole[name], seen[name])), None)
    if wrong is not None:
        raise UsageError(f"faster_rcnn: {type(base).__name__} computes more than its layers one after another before "
                         f"{wrong} is done, so that it can't be cut there.")  # fmt: skip
    return [whole[name].shape[1] for name in named]


def places(base: nn.Module, last: str) -> tuple[dict[str, str], dict[str, str]]:
    """Return what the base's modules are called in the detector, and which of its layers each reader there reads."""
    names: dict[str, str] = {}
    for child, module in base.named_children():
        names |= {f"{child}.{name}".rstrip("."): f"backbone.body.{child}.{name}".rstrip(".")
                  for name, _ in module.named_modules()}  # fmt: skip
        if child == last:
            break
    readers = {}
    for i, stage in enumerate(SOURCES[: SOURCES.index(last) + 1]):
        convs = [name for name, m in base.get_submodule(stage).named_modules() if isinstance(m, nn.Conv2d)]
        readers[f"backbone.fpn.inner_blocks.{i}.0"] = f"{stage}.{convs[-1]}"
    return names, readers
