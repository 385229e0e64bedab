"""Photographs with boxes in PASCAL VOC's layout, such as the blood cells of BCCD."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from torch import Tensor
from torch.utils.data import Dataset

from secateur.data.bundle import DataBundle
from secateur.data.image import decode
from secateur.errors import DataError, UsageError

Target = dict[str, Tensor]


@dataclass(frozen=True)
class _Annotation:
    image: Path
    size: tuple[int, int]
    boxes: list[tuple[str, tuple[float, float, float, float], bool]]
    degenerate: int


class DetectionFiles(Dataset[tuple[Tensor, Target]]):
    """Photographs with boxes; elements are what torchvision's detectors take.

    An element is an image, ``float32`` in [0, 1], shape ``(3, H, W)``, and a target: ``boxes``, shape ``(n, 4)``,
    corners x₁ y₁ x₂ y₂ in pixels; ``labels``, shape ``(n,)``, from 1, since 0 is the background; ``iscrowd``, shape
    ``(n,)``, 1 for objects marked as difficult; ``image_id``.
    """

    def __init__(self, annotations: list[_Annotation], classes: tuple[str, ...]) -> None:
        self._annotations, self.classes = annotations, classes
        self.degenerate = sum(a.degenerate for a in annotations)
        """Number of boxes without area, which detectors refuse and which are left out."""

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
        target = {
            "boxes": torch.tensor([box for _, box, _ in found.boxes], dtype=torch.float32).reshape(-1, 4),
            "labels": torch.tensor([numbers[name] for name, _, _ in found.boxes], dtype=torch.long),
            "iscrowd": torch.tensor([int(hard) for _, _, hard in found.boxes], dtype=torch.long),
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


def voc(root: Path, *, validation: float | None = None, seed: int = 0, train_size: int | None = None) -> DataBundle:
    """Load photographs with boxes in PASCAL VOC's layout (Everingham et al. 2010), with their published split.

    Args:
        root: Folder with ``JPEGImages``, ``Annotations`` and ``ImageSets/Main/{train,val,test}.txt``.
        validation: Must be None: the validation set is ``val.txt``.
        seed: Seed of the draw of ``train_size`` photographs.
        train_size: Number of training photographs to take; all where None.

    Raises:
        DataError: If a file is missing or damaged, a list is empty, a name leads out of the folder, or a photograph is
            listed twice, be it under two names.
        UsageError: If ``validation`` is given, or there aren't as many photographs as ``train_size``.
    """
    root = Path(root)
    if validation is not None:
        raise UsageError("voc: the validation set is published (ImageSets/Main/val.txt); leave validation out.")
    names = {part: _list(root, part) for part in ("train", "val", "test")}
    seen: dict[str, str] = {}
    for part, members in names.items():
        for name in members:
            if name in seen:
                raise DataError(
                    f"{root}: {name} is in {seen[name]}.txt and in {part}.txt; a photograph belongs to one."
                )
            seen[name] = part
    parts = {part: [_annotation(root, name) for name in members] for part, members in names.items()}
    files: dict[tuple[int, int], Path] = {}
    for found in (annotation for members in parts.values() for annotation in members):
        stat = found.image.stat()
        twin = files.setdefault((stat.st_dev, stat.st_ino), found.image)
        if twin is not found.image:
            raise DataError(f"{root}: {twin.name} and {found.image.name} are one file; a photograph is listed once.")
    classes = tuple(sorted({name for found in parts.values() for a in found for name, _, _ in a.boxes}))
    if not classes:
        raise DataError(f"{root}/Annotations: not one box in {len(seen)} files.")
    if train_size is not None:
        # Drawn after the classes are known, since a part of the photographs may lack some.
        parts["train"] = _drawn(parts["train"], train_size, seed)
    train, held, test = (DetectionFiles(parts[part], classes) for part in ("train", "val", "test"))
    width, height = parts["train"][0].size
    return DataBundle("voc", train, held, test, (3, height, width), classes, None, "detection")


def _drawn(photographs: list[_Annotation], size: int, seed: int) -> list[_Annotation]:
    if not 0 < size <= len(photographs):
        raise UsageError(f"voc: train_size is between 1 and the {len(photographs)} training photographs, found {size}.")
    order = torch.randperm(len(photographs), generator=torch.Generator().manual_seed(seed))
    return [photographs[i] for i in sorted(order[:size].tolist())]


def _list(root: Path, part: str) -> list[str]:
    path = root / "ImageSets" / "Main" / f"{part}.txt"
    try:
        names = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: can't be read; expected JPEGImages, Annotations and ImageSets/Main/{{train,val,test}}.txt, as "
            "PASCAL VOC has them."
        ) from error
    if not names:
        raise DataError(f"{path}: names no photograph.")
    for name in names:
        parts = name.split("/")
        if "\0" in name or "\\" in name or not {"", ".", ".."}.isdisjoint(parts) or Path(name).is_absolute():
            raise DataError(f"{path}: {name!r} is no name of a photograph; names lead nowhere but into JPEGImages.")
    return names


def _annotation(root: Path, name: str) -> _Annotation:
    path = root / "Annotations" / f"{name}.xml"
    try:
        tree = ElementTree.parse(path).getroot()
    except OSError as error:
        raise DataError(f"{path}: is missing, and ImageSets/Main names it.") from error
    except (ElementTree.ParseError, LookupError, ValueError) as error:  # the last two of encodings
        raise DataError(f"{path}: not readable as XML: {error}") from error
    image = root / "JPEGImages" / f"{name}.jpg"
    if not image.is_file():
        raise DataError(f"{image}: is missing, and ImageSets/Main names it.")
    try:
        size = int(_text(tree, "size/width")), int(_text(tree, "size/height"))
        boxes = [_box(node) for node in tree.iter("object")]
        if min(size) < 1:
            raise ValueError(f"a photograph of {size[0]}x{size[1]}")
    except (KeyError, ValueError) as error:
        raise DataError(f"{path}: expected VOC's size and bndbox entries: {error}") from error
    kept = [(n, (x1, y1, x2, y2), hard) for n, (x1, y1, x2, y2), hard in boxes if x1 < x2 and y1 < y2]
    outside = next((b for _, b, _ in kept if min(b) < 0 or b[2] > size[0] or b[3] > size[1]), None)
    if outside is not None:
        raise DataError(f"{path}: box {outside} lies outside the photograph of {size[0]}x{size[1]}.")
    return _Annotation(image, size, kept, len(boxes) - len(kept))


def _box(node: Any) -> tuple[str, tuple[float, float, float, float], bool]:
    x1, y1, x2, y2 = (float(_text(node, f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax"))
    if not all(map(math.isfinite, (x1, y1, x2, y2))):
        raise ValueError(f"a box of {x1}, {y1}, {x2}, {y2}")
    return _text(node, "name").strip(), (x1, y1, x2, y2), node.findtext("difficult", "0").strip() == "1"


def _text(node: Any, path: str) -> str:
    found = node.findtext(path)
    if found is None:
        raise KeyError(path)
    return str(found)
