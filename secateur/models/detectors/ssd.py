"""SSD300 and SSD512 on the convolutions of a VGG, of whatever widths."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.ssd import SSD
from torchvision.ops import FrozenBatchNorm2d

from secateur.errors import UsageError


@dataclass(frozen=True)
class Layout:
    """What SSD adds to its base at one size of image (Liu et al. 2016, figure 2 and footnote 5)."""

    size: int
    """Height and width to which images are brought, in pixels."""
    extras: tuple[tuple[int, int, int, int, int], ...]
    """Blocks behind conv7, each a 1×1 and a larger convolution: filters of both; the latter's size, stride, padding."""
    ratios: tuple[tuple[int, ...], ...]
    """Aspect ratios of the default boxes of each source beside 1, each taken upright and lying."""
    scales: tuple[float, ...]
    """Sides of the default boxes, as shares of the image's; one more than there are sources."""
    steps: tuple[int, ...]
    """Pixels between two positions of each source."""

    @property
    def sources(self) -> tuple[str, ...]:
        """Layers whose maps boxes are read from, as the paper counts them."""
        return ("conv4_3", "conv7", *(f"conv{8 + i}_2" for i in range(len(self.extras))))


LAYOUTS = {
    "ssd300": Layout(
        300,
        ((256, 512, 3, 2, 1), (128, 256, 3, 2, 1), (128, 256, 3, 1, 0), (128, 256, 3, 1, 0)),
        ((2,), (2, 3), (2, 3), (2, 3), (2,), (2,)),
        (0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05),
        (8, 16, 32, 64, 100, 300),
    ),
    "ssd512": Layout(
        512,
        ((256, 512, 3, 2, 1), (128, 256, 3, 2, 1), (128, 256, 3, 2, 1), (128, 256, 3, 2, 1), (128, 256, 4, 1, 1)),
        ((2,), (2, 3), (2, 3), (2, 3), (2, 3), (2,), (2,)),
        (0.07, 0.15, 0.30, 0.45, 0.60, 0.75, 0.90, 1.05),
        (8, 16, 32, 64, 128, 256, 512),
    ),
}
"""SSD300 is torchvision's. SSD512, which torchvision lacks, has the layers and boxes of the paper's code for VOC."""

_BASE = (nn.Conv2d, nn.BatchNorm2d, FrozenBatchNorm2d, nn.ReLU, nn.MaxPool2d)


class VGGFeatures(nn.Module):
    """A VGG's convolutions and SSD's own behind them: the maps that boxes are read from, first to last.

    The first is conv4_3's, divided at each position by its norm over the channels, times a weight for each channel,
    which is 20 at first. Pooling behind it halves; that behind conv5_3 does not, since conv6 is dilated. Names are
    those of torchvision's SSD300. Layers behind the base are drawn by Glorot and Bengio 2010, with a bias of 0.

    Args:
        features: The layers of the base, of which none may be shared with another network: convolutions, batch norms,
            ReLUs, and at least five poolings.
        layout: What is added.
        last: The last source.
    """

    def __init__(self, features: nn.Sequential, layout: Layout, last: str) -> None:
        super().__init__()
        pools = _pools(features)
        wide = _width(features[: pools[3]])
        # So that an image of 300 pixels gives a map of 38, as in the paper.
        cast("nn.MaxPool2d", features[pools[2]]).ceil_mode = True
        self.scale_weight = nn.Parameter(torch.full((wide,), 20.0))
        self.features = features[: pools[3]]
        self.extra = nn.ModuleList()
        self.out_channels = [wide]
        if last != "conv4_3":
            into = _width(features[: pools[4]])
            head = nn.Sequential(
                nn.MaxPool2d(3, stride=1, padding=1),
                nn.Conv2d(into, 1024, 3, padding=6, dilation=6), nn.ReLU(inplace=True),
                nn.Conv2d(1024, 1024, 1), nn.ReLU(inplace=True),
            )  # fmt: skip
            _draw(head)
            self.extra.append(nn.Sequential(*features[pools[3] : pools[4]], head))
            self.out_channels.append(1024)
        for narrow, out, kernel, stride, padding in layout.extras[: max(0, layout.sources.index(last) - 1)]:
            block = nn.Sequential(
                nn.Conv2d(self.out_channels[-1], narrow, 1), nn.ReLU(inplace=True),
                nn.Conv2d(narrow, out, kernel, stride, padding), nn.ReLU(inplace=True),
            )  # fmt: skip
            _draw(block)
            self.extra.append(block)
            self.out_channels.append(out)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the maps by their number, ``(N, C, H, W)`` each."""
        x = self.features(x)
        found = [self.scale_weight.view(1, -1, 1, 1) * F.normalize(x)]
        for block in self.extra:
            x = block(x)
            found.append(x)
        return OrderedDict((str(i), value) for i, value in enumerate(found))


def build(features: nn.Sequential, layout: Layout, num_classes: int, last: str, **options: Any) -> SSD:
    """Build an SSD on the layers of a VGG; see :class:`VGGFeatures`. Options are those of torchvision's ``SSD``."""
    count = layout.sources.index(last) + 1
    boxes = DefaultBoxGenerator(
        [list(r) for r in layout.ratios[:count]], scales=list(layout.scales[: count + 1]),
        steps=list(layout.steps[:count]),
    )  # fmt: skip
    backbone = VGGFeatures(features, layout, last)
    return SSD(backbone, boxes, (layout.size, layout.size), num_classes, **options)


def places(features: nn.Sequential, last: str) -> tuple[dict[str, str], dict[str, str]]:
    """Return what the base's modules are called in the detector, and which of its layers each reader there reads.

    Args:
        features: As the classifier holds them, under the name ``features``.
        last: The last source.
    """
    pools = _pools(features)
    end = pools[3] if last == "conv4_3" else pools[4]
    names = {
        f"features.{i}": f"backbone.features.{i}" if i < pools[3] else f"backbone.extra.0.{i - pools[3]}"
        for i in range(end)
    }
    convs = [i for i, layer in enumerate(features) if isinstance(layer, nn.Conv2d)]
    fourth, fifth = (f"features.{max(i for i in convs if i < end)}" for end in pools[3:5])
    heads = [f"head.{kind}_head.module_list.0" for kind in ("classification", "regression")]
    readers = dict.fromkeys(["backbone.scale_weight", *heads], fourth)
    if last != "conv4_3":
        readers[f"backbone.extra.0.{pools[4] - pools[3]}.1"] = fifth
    return names, readers


def _pools(features: Any) -> list[int]:
    """Return the places of a VGG's poolings.

    Raises:
        UsageError: If the layers are not those of a VGG.
    """
    if not isinstance(features, nn.Sequential):
        raise UsageError(f"ssd: the base is a VGG, with its layers in `features`, found {type(features).__name__}.")
    for place, layer in enumerate(features):
        if not isinstance(layer, _BASE):
            raise UsageError(
                f"ssd: features.{place} is a {type(layer).__name__}; a VGG's are convolutions, batch norms, ReLUs and "
                "poolings."
            )
    pools = [i for i, layer in enumerate(features) if isinstance(layer, nn.MaxPool2d)]
    if len(pools) != 5:
        raise UsageError(f"ssd: a VGG has five poolings, found {len(pools)} in features.")
    return pools


def _width(layers: nn.Sequential) -> int:
    return [layer.out_channels for layer in layers if isinstance(layer, nn.Conv2d)][-1]


def _draw(layers: nn.Module) -> None:
    for layer in layers.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
