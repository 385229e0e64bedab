"""The networks of the papers, by name; every other network comes from torchvision, timm or the user.

Each factory takes the network's widths, so that a pruned configuration of a paper can be built from scratch, and
``num_classes``. Weights are drawn from torch's global generator: call ``torch.manual_seed`` first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from secateur.models.cifar_resnet import CifarResNet, projected, resnet20, resnet56, resnet110
from secateur.models.lenet import LeNet5, lenet5
from secateur.models.pad_shortcut import PadShortcut
from secateur.models.vgg import CifarVGG, vgg16

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import nn

MODELS: Mapping[str, Callable[..., nn.Module]] = {
    "lenet5": lenet5,
    "vgg16": vgg16,
    "resnet20": resnet20,
    "resnet56": resnet56,
    "resnet110": resnet110,
}
"""Name -> factory."""

__all__ = [
    "MODELS",
    "CifarResNet",
    "CifarVGG",
    "LeNet5",
    "PadShortcut",
    "lenet5",
    "projected",
    "resnet20",
    "resnet56",
    "resnet110",
    "vgg16",
]
