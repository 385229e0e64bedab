"""Photographs with boxes, whatever file format names them: what detectors take."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from secateur.data.image import decode
from secateur.errors import DataError, UsageError

Target = dict[str, Tensor]


class Box(NamedTuple):
    """An object in a photograph."""

    name: str
    """Of its class."""
    corners: tuple[float, float, float, float]
    """x₁ y₁ x₂ y₂ in pixels."""
    crowd: bool = False
    """Whether it counts neither way where boxes are found: a crowd, or an object marked as difficult."""
    area: float | None = None
    """By which an object is small, medium or large, in pixels; that of the box where None."""


@dataclass(frozen=True)
class Photograph:
    """A photograph's file, and what an annotation says is in it."""

    image: Path
    size: tuple[int, int]
    """Width and height."""
    boxes: list[Box]
    degenerate: int = 0
    """Number of boxes without area, which detectors refuse and which are left out."""


class DetectionFiles(Dataset[tuple[Tensor, Target]]):
    """Photographs with boxes; elements are what torchvision's detectors take.

    An element is an image, ``float32`` in [0, 1], shape ``(3, H, W)``, and a target: ``boxes``, shape ``(n, 4)``,
    corners x₁ y₁ x₂ y₂ in pixels; ``labels``, shape ``(n,)``, from 1, since 0 is the background; ``iscrowd``, shape
    ``(n,)``, 1 for crowds and for objects marked as difficult; ``area``, shape ``(n,)``, in pixels; ``image_id``.
    """

    def __init__(self, annotations: list[Photograph], classes: tuple[str, ...]) -> None:
        self._annotations, self.classes = annotations, classes
        self.degenerate = sum(a.degenerate for a in annotations)
        """Number of boxes without area, which detectors refuse and which are left out."""

    @property
    def boxes(self) -> int:
        """Number of boxes to find: crowds and objects marked as difficult don't count."""
        return sum(not box.crowd for a in self._annotations for box in a.boxes)

    def __len__(self) -> int:
        return len(self._annotations)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        found = self._annotations[index]
        image = decode(found.image, str(found.image))
        if (image.shape[2], image.shape[1]) != found.size:
            raise DataError(
                f"{found.image}: is {image.shape[2]}x{image.shape[1]}, and its annotation says "
                f"{found.size[0]}x{found.size[1]}."
            )
        numbers = {name: i for i, name in enumerate(self.classes, start=1)}
        boxes = torch.tensor([box.corners for box in found.boxes], dtype=torch.float32).reshape(-1, 4)
        own = (boxes[:, 2:] - boxes[:, :2]).prod(1).tolist()
        areas = [area if box.area is None else box.area for box, area in zip(found.boxes, own, strict=True)]
        target = {
            "boxes": boxes,
            "labels": torch.tensor([numbers[box.name] for box in found.boxes], dtype=torch.long),
            "iscrowd": torch.tensor([int(box.crowd) for box in found.boxes], dtype=torch.long),
            "area": torch.tensor(areas, dtype=torch.float32),
            "image_id": torch.tensor(index),
        }
        return image.float() / 255, target

    def augmented(self, index: int) -> tuple[Tensor, Target]:
        """Return an element as training sees it: mirrored left to right, half of the times."""
        image, target = self[index]
        if torch.rand(()) < 0.5:
            width = image.shape[2]
            x1, y1, x2, y2 = target["boxes"].unbind(1)
            image, target = image.flip(2), {**target, "boxes": torch.stack([width - x2, y1, width - x1, y2], dim=1)}
        return image, target

    @staticmethod
    def collate(elements: list[tuple[Tensor, Target]]) -> tuple[list[Tensor], list[Target]]:
        """Make a batch: a list of images, which may differ in size, and a list of targets."""
        images, targets = zip(*elements, strict=True)
        return list(images), list(targets)


def drawn(photographs: Sequence[Photograph], size: int | None, seed: int, where: str) -> list[Photograph]:
    """Draw training photographs, in their order; all where ``size`` is None.

    Raises:
        UsageError: If there aren't as many.
    """
    if size is None:
        return list(photographs)
    if not 0 < size <= len(photographs):
        raise UsageError(
            f"{where}: train_size is between 1 and the {len(photographs)} training photographs, found {size}."
        )
    order = torch.randperm(len(photographs), generator=torch.Generator().manual_seed(seed))
    return [photographs[i] for i in sorted(order[:size].tolist())]


def held_out(
    photographs: Sequence[Photograph], share: float | None, seed: int, where: str
) -> tuple[list[Photograph], list[Photograph]]:
    """Split photographs into those to train on and those to decide on, each in their order.

    Args:
        photographs: At least two.
        share: Of those to decide on; a tenth where None.
        seed: Seed of the draw.
        where: Data set, for errors.

    Raises:
        DataError: If one part would be empty.
    """
    count = max(1, round((0.1 if share is None else share) * len(photographs)))
    if count >= len(photographs):
        raise DataError(f"{where}: {len(photographs)} training photographs can't be split; give more of them.")
    chosen = set(torch.randperm(len(photographs), generator=torch.Generator().manual_seed(seed))[:count].tolist())
    parts: tuple[list[Photograph], list[Photograph]] = ([], [])
    for i, photograph in enumerate(photographs):
        parts[i in chosen].append(photograph)
    return parts


def clipped(corners: tuple[float, float, float, float], size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Return what of a box lies in a photograph of a width and a height; where nothing does, it has no area."""
    x1, y1, x2, y2 = corners
    return max(0.0, x1), max(0.0, y1), min(float(size[0]), x2), min(float(size[1]), y2)


def to_train_on(photographs: Sequence[Photograph]) -> list[Photograph]:
    """Clip boxes, and leave crowds out, since one box around many objects teaches a detector nothing."""
    return [
        replace(p, boxes=[b._replace(corners=clipped(b.corners, p.size)) for b in p.boxes if not b.crowd])
        for p in photographs
    ]


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        DataError: If it can't be read, or is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: can't be read: {getattr(error, 'strerror', None) or error}.") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: not JSON: {error}.") from error
