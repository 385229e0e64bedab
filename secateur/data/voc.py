"""Photographs with boxes in PASCAL VOC's layout, such as the blood cells of BCCD."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from secateur.data.boxes import Box, DetectionFiles, Photograph, drawn
from secateur.data.bundle import DataBundle
from secateur.errors import DataError, UsageError


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
    classes = tuple(sorted({box.name for found in parts.values() for a in found for box in a.boxes}))
    if not classes:
        raise DataError(f"{root}/Annotations: not one box in {len(seen)} files.")
    # Drawn after the classes are known, since a part of the photographs may lack some.
    parts["train"] = drawn(parts["train"], train_size, seed, "voc")
    train, held, test = (DetectionFiles(parts[part], classes) for part in ("train", "val", "test"))
    width, height = parts["train"][0].size
    return DataBundle("voc", train, held, test, (3, height, width), classes, None, "detection")


def _list(root: Path, part: str) -> list[str]:
    path = root / "ImageSets" / "Main" / f"{part}.txt"
    try:
        names = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: can't be read; expected JPEGImages, Annotations and ImageSets/Main/{{train,val,test}}.txt, as "
            "PASCAL VOC has them, and BCCD_Dataset on GitHub in its folder BCCD."
        ) from error
    if not names:
        raise DataError(f"{path}: names no photograph.")
    for name in names:
        parts = name.split("/")
        if "\0" in name or "\\" in name or not {"", ".", ".."}.isdisjoint(parts) or Path(name).is_absolute():
            raise DataError(f"{path}: {name!r} is no name of a photograph; names lead nowhere but into JPEGImages.")
    return names


def _annotation(root: Path, name: str) -> Photograph:
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
    kept = [b for b in boxes if b.corners[0] < b.corners[2] and b.corners[1] < b.corners[3]]
    outside = next(
        (b.corners for b in kept if min(b.corners) < 0 or b.corners[2] > size[0] or b.corners[3] > size[1]), None
    )
    if outside is not None:
        raise DataError(f"{path}: box {outside} lies outside the photograph of {size[0]}x{size[1]}.")
    return Photograph(image, size, kept, len(boxes) - len(kept))


def _box(node: Any) -> Box:
    x1, y1, x2, y2 = (float(_text(node, f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax"))
    if not all(map(math.isfinite, (x1, y1, x2, y2))):
        raise ValueError(f"a box of {x1}, {y1}, {x2}, {y2}")
    return Box(_text(node, "name").strip(), (x1, y1, x2, y2), node.findtext("difficult", "0").strip() == "1")


def _text(node: Any, path: str) -> str:
    found = node.findtext(path)
    if found is None:
        raise KeyError(path)
    return str(found)
