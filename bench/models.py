"""The networks of the zoo sweep: how each is built, what it is fed, which layers give its output."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.others import OTHERS

CLASSES = 1000
HEADS = re.compile(
    r"(cls_logits|bbox_reg|bbox_pred|cls_score|bbox_ctrness|mask_fcn_logits|kps_score_lowres)(\.\d+)*$"
    r"|head\.(classification|regression)_head\.module_list(\.\d+)+$"
)
"""Names of the layers that give a torchvision detector's outputs."""

TIMM = (Path(__file__).parent / "timm.txt").read_text().split()
"""A broad sample over timm's families."""


@dataclass(frozen=True)
class Entry:
    """One network of the sweep."""

    name: str
    """``library/kind/model``."""
    build: Callable[[], nn.Module]
    inputs: Callable[[nn.Module], Any]

    @property
    def installed(self) -> bool:
        """Whether the library that the network comes from is here."""
        return find_spec(self.name.partition("/")[0]) is not None


def image(size: int) -> Callable[[nn.Module], Any]:
    """Return a maker of one image."""
    return lambda model: torch.randn(1, 3, size, size)


def clip(frames: int, size: int) -> Callable[[nn.Module], Any]:
    """Return a maker of one video clip."""
    return lambda model: torch.randn(1, 3, frames, size, size)


def _torchvision(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from torchvision.models import get_model

        if name in ("googlenet", "inception_v3"):
            return get_model(name, weights=None, init_weights=False)
        return get_model(name, weights=None, **options)

    return build


def _timm(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        return timm.create_model(name, pretrained=False)

    return build


def _timm_image(model: Any) -> Any:
    """Feed the model's own size where it is fixed, and 128 pixels (96 where that divides better) otherwise."""
    config = model.pretrained_cfg
    size = int(config["input_size"][-1])
    fixed = bool(config.get("fixed_input_size")) or hasattr(model, "pos_embed")
    least = int((config.get("min_input_size") or (3, 128, 128))[-1])
    return torch.randn(1, 3, *([size] * 2 if fixed else [min(size, max(128, least))] * 2))


def entries() -> list[Entry]:
    """List all networks of the sweep."""
    from torchvision import models

    found = []
    for name in models.list_models(module=models):
        found.append(Entry(f"torchvision/classification/{name}", _torchvision(name),
                           image(299 if name == "inception_v3" else 256 if "swin_v2" in name else 224)))  # fmt: skip
    for name in models.list_models(module=models.segmentation):
        found.append(Entry(f"torchvision/segmentation/{name}", _torchvision(name, weights_backbone=None), image(128)))
    for name in models.list_models(module=models.detection):
        options: dict[str, Any] = {"weights_backbone": None}
        if not name.startswith("ssd"):
            options |= {"min_size": 256, "max_size": 256}
        if "rcnn" in name:
            options["box_score_thresh"] = -1.0  # untrained, they would find nothing, and not run their last heads
        size = 320 if "320" in name else 300 if name.startswith("ssd") else 256
        found.append(
            Entry(
                f"torchvision/detection/{name}",
                _torchvision(name, **options),
                lambda model, size=size: ([torch.rand(3, size, size)],),
            )
        )
    for name in models.list_models(module=models.video):
        maker = clip(16, 224) if name.startswith(("mvit", "s3d")) else clip(8, 112)
        found.append(Entry(f"torchvision/video/{name}", _torchvision(name), maker))
    found += [Entry(f"timm/{name}", _timm(name), _timm_image) for name in TIMM]
    found += [Entry(name, build, inputs) for name, (build, inputs) in OTHERS.items()]
    return found


def output_layers(model: nn.Module) -> list[str]:
    """Name the layers that give the output: those as wide as the classes, and detectors' heads by name."""
    widths = {CLASSES, int(getattr(model, "num_classes", CLASSES) or CLASSES), 400, 21}
    found = []
    ends = ("classifier", "aux_classifier", "head", "heads", "fc", "last_linear", "linear", "head_dist", "l")
    for name, module in model.named_modules():
        width = getattr(module, "out_features", getattr(module, "out_channels", None))
        if not isinstance(width, int):
            continue
        path = name.split(".")
        last = path[-1] in ends or len(path) == 1 or path[-2] in ends
        if (width in widths and (last or width == CLASSES)) or HEADS.search(name):
            found.append(name)
    return found
