"""VGG-16 with batch norm for 32×32 images, the network of CFP's experiments."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from secateur.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

VGG16_WIDTHS = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
"""Filters of the thirteen convolutions (Simonyan and Zisserman 2015, configuration D)."""

POOL_AFTER = frozenset({1, 3, 6, 9, 12})
"""Convolutions, counted from 0, that 2×2 max pooling follows."""


class CifarVGG(nn.Module):
    """Thirteen 3×3 convolutions, each with batch norm and ReLU, and two linear layers.

    VGG-16 for CIFAR-10 as Li et al. 2017 prune it, and CFP after them: configuration D of Simonyan and Zisserman
    2015 in Zagoruyko's form for 32×32 images, with batch norm after every convolution and after the first linear
    layer, without dropout. The convolutions take 313,196,544 MACs for an image of 32×32. Weights are drawn by He et
    al. 2015, fan-out for convolutions, and N(0, 0.01) for linear layers. Departures: none.

    Args:
        widths: Filters of the thirteen convolutions.
        hidden: Outputs of the first linear layer; 0 leaves it out, so that one linear layer classifies.
        num_classes: Outputs of the last linear layer.
        in_channels: Channels of the image.
        in_size: Height and width of the image, in pixels; a multiple of 32.

    Shapes:
        input ``(N, in_channels, in_size, in_size)``, output (logits) ``(N, num_classes)``.

    Raises:
        UsageError: If ``widths`` doesn't hold thirteen numbers of at least 1, another size is out of range, or
            ``in_size`` isn't a positive multiple of 32.
    """

    def __init__(
        self,
        widths: Sequence[int] = VGG16_WIDTHS,
        hidden: int = 512,
        num_classes: int = 10,
        in_channels: int = 3,
        in_size: int = 32,
    ) -> None:
        super().__init__()
        if len(widths) != len(VGG16_WIDTHS) or min(widths) < 1:
            raise UsageError(f"vgg16: expected {len(VGG16_WIDTHS)} widths of at least 1, found {tuple(widths)}")
        if hidden < 0 or min(num_classes, in_channels) < 1:
            raise UsageError(
                f"vgg16: expected hidden >= 0 and num_classes, in_channels >= 1, found hidden={hidden}, "
                f"num_classes={num_classes}, in_channels={in_channels}"
            )
        if in_size < 32 or in_size % 32:
            raise UsageError(f"vgg16: five poolings need an image side that is a multiple of 32, found {in_size}")
        layers: list[nn.Module] = []
        channels = in_channels
        for index, width in enumerate(widths):
            # No bias: batch norm's own would make it redundant.
            layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            if index in POOL_AFTER:
                layers.append(nn.MaxPool2d(2))
            channels = width
        self.features = nn.Sequential(*layers)
        flat = channels * (in_size // 32) ** 2
        self.classifier = (
            nn.Sequential(
                nn.Linear(flat, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, num_classes)
            )
            if hidden
            else nn.Sequential(nn.Linear(flat, num_classes))
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of a batch of images."""
        logits: Tensor = self.classifier(torch.flatten(self.features(x), 1))
        return logits


def vgg16(
    widths: Sequence[int] = VGG16_WIDTHS,
    hidden: int = 512,
    num_classes: int = 10,
    in_channels: int = 3,
    in_size: int = 32,
) -> CifarVGG:
    """Build a :class:`CifarVGG` with fresh weights; arguments and errors are the class's."""
    return CifarVGG(widths, hidden, num_classes, in_channels, in_size)
