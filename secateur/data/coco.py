"""Photographs with boxes in COCO's format: folders of images, and a JSON file of instances for each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from secateur.data.boxes import Box, DetectionFiles, Photograph, clipped, drawn, held_out, read_json, to_train_on
from secateur.data.bundle import DataBundle
from secateur.errors import DataError, UsageError

NO_CLASS = "N/A"
"""Name of a label that no category has: COCO numbers its 80 categories from 1 to 90."""

_TABLES = ("images", "annotations", "categories")


def coco(
    root: Path,
    *,
    validation: float | None = None,
    seed: int = 0,
    train_size: int | None = None,
    contiguous: bool = False,
) -> DataBundle:
    """Load photographs with boxes in COCO's format (Lin et al. 2014).

    ``annotations/instances_NAME.json`` belongs to the images in ``NAME`` or ``images/NAME``, or where there is neither,
    in ``images``; one NAME begins with ``train``, one with ``val``, and one may begin with ``test``. Without such a
    third, ``val`` is the test set, as COCO's own test set has no public boxes, and validation is split off ``train``.

    In the training set, boxes are clipped to their image and crowds are left out; elsewhere boxes are as in the file,
    so that what is measured is what COCO's own code measures, and crowds count neither way. A box without area in its
    image is left out everywhere, and counted. An image without boxes stays.

    Args:
        root: Folder.
        validation: Share of the training photographs held out; a tenth where None.
        seed: Seed of that split, and of the draw of ``train_size`` photographs.
        train_size: Number of training photographs to take; all where None.
        contiguous: Number the categories 1, 2, 3 … in the order of their ids. Unless set, ids are the labels, as in
            torchvision's detectors, and a label that no category has is called ``N/A``.

    Raises:
        DataError: If a file is missing, damaged or no file of instances, a category or an image of a box is unknown,
            ids don't begin at 1 or twice as many labels as categories would be needed, or there is no box.
        UsageError: If ``validation`` is given beside a third file, or there aren't as many photographs.
    """
    root = Path(root)
    files = {part: _file(root, part) for part in ("train", "val", "test")}
    if files["train"] is None or files["val"] is None:
        lacking = "train" if files["train"] is None else "val"
        raise DataError(f"{root}/annotations: no instances_{lacking}*.json; expected COCO's layout, with the images of "
                        f"instances_{lacking}2017.json in {lacking}2017; both are at cocodataset.org.")  # fmt: skip
    if files["test"] is not None and validation is not None:
        raise UsageError(f"coco: validation={validation:g} contradicts {files['test'].name}, beside which "
                         f"{files['val'].name} is the validation set; leave validation out.")  # fmt: skip
    names: dict[int, str] | None = None
    parts: dict[str, list[Photograph]] = {}
    for part, path in files.items():
        if path is not None:
            own, parts[part] = _read(path, root)
            if names is not None and own != names:
                raise DataError(f"{path}: its categories aren't those of {files['train'].name}.")
            names = own
    assert names is not None
    classes = _classes(names, contiguous, files["train"])
    if not any(photograph.boxes for photograph in parts["train"]):
        raise DataError(f"{files['train']}: not one box in {len(parts['train'])} photographs.")
    if "test" in parts:
        train, held, test = parts["train"], parts["val"], parts["test"]
    else:
        (train, held), test = held_out(parts["train"], validation, seed, "coco"), parts["val"]
    train = drawn(to_train_on(train), train_size, seed, "coco")
    width, height = train[0].size
    sets = [DetectionFiles(photographs, classes) for photographs in (train, held, test)]
    return DataBundle("coco", sets[0], sets[1], sets[2], (3, height, width), classes, None, "detection")


def _file(root: Path, part: str) -> Path | None:
    found = sorted((root / "annotations").glob(f"instances_{part}*.json"))
    if len(found) > 1:
        raise DataError(f"{root}/annotations: {found[0].name} and {found[1].name}; leave one instances_{part}*.json.")
    return found[0] if found else None


def _read(path: Path, root: Path) -> tuple[dict[int, str], list[Photograph]]:
    """Read a file of instances: the names of its categories by id, and its photographs in their order."""
    tables = read_json(path)
    if not isinstance(tables, Mapping) or not all(isinstance(tables.get(name), list) for name in _TABLES):
        found = ", ".join(tables) if isinstance(tables, Mapping) else type(tables).__name__
        raise DataError(f"{path}: is no file of instances, which has images, annotations, categories; found {found}.")
    if not tables["images"]:
        raise DataError(f"{path}: names no photograph.")
    try:
        names = {int(c["id"]): str(c["name"]) for c in tables["categories"]}
        folder = _folder(root, path.stem.removeprefix("instances_"), str(tables["images"][0]["file_name"]))
        photographs = {
            int(image["id"]): Photograph(
                folder / str(image["file_name"]), (int(image["width"]), int(image["height"])), []
            )
            for image in tables["images"]
        }
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: expected COCO's entries of images and categories: {error!r}.") from error
    double = next((n for n in names.values() if [*names.values()].count(n) > 1), None)
    if double is not None or len(photographs) != len(tables["images"]):
        what = f"two categories are called {double}" if double is not None else "two images have one id"
        raise DataError(f"{path}: {what}.")
    lost = next((p.image for p in photographs.values() if not p.image.is_file()), None)
    if lost is not None:
        raise DataError(f"{lost}: is missing, and {path.name} names it.")
    empty = dict.fromkeys(photographs, 0)
    for place, entry in enumerate(tables["annotations"]):
        image, box = _box(entry, f"{path}: annotation {place}", names, photographs)
        if box is None:
            empty[image] += 1
        else:
            photographs[image].boxes.append(box)
    return names, [
        Photograph(p.image, p.size, p.boxes, degenerate)
        for p, degenerate in zip(photographs.values(), empty.values(), strict=True)
    ]


def _folder(root: Path, name: str, first: str) -> Path:
    """Return the folder of a file's images: the first that holds the first of them, or where they belong."""
    places = (root / name, root / "images" / name, root / "images")
    return next((place for place in places if (place / first).is_file()), places[0])


def _box(
    entry: Any, where: str, names: Mapping[int, str], photographs: Mapping[int, Photograph]
) -> tuple[int, Box | None]:
    """Return the image of an annotation and its box; None for one without area in it."""
    if not isinstance(entry, Mapping) or "bbox" not in entry:
        keys = ", ".join(map(str, entry)) if isinstance(entry, Mapping) else type(entry).__name__
        raise DataError(f"{where} has no bbox, as captions and panoptic segments have none; give COCO's instances. "
                        f"It has {keys}.")  # fmt: skip
    try:
        image, category, crowd = int(entry["image_id"]), int(entry["category_id"]), bool(entry.get("iscrowd", 0))
        x, y, width, height = map(float, entry["bbox"])
        area = float(entry["area"]) if entry.get("area") is not None else None
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{where}: expected image_id, category_id and bbox, [x, y, width, height]: {error!r}."
        ) from error
    if category not in names:
        raise DataError(f"{where} is of category {category}, and categories has no such id.")
    if image not in photographs:
        raise DataError(f"{where} is in image {image}, and images has no such id.")
    if not all(map(math.isfinite, (x, y, width, height))):
        raise DataError(f"{where}: its bbox {entry['bbox']} isn't finite.")
    corners = x, y, x + width, y + height
    x1, y1, x2, y2 = clipped(corners, photographs[image].size)
    if x1 >= x2 or y1 >= y2:
        return image, None
    return image, Box(names[category], corners, crowd, area)


def _classes(names: Mapping[int, str], contiguous: bool, path: Path) -> tuple[str, ...]:
    """Return the names of the labels from 1 on."""
    if not names:
        raise DataError(f"{path}: has no categories.")
    if contiguous:
        return tuple(names[i] for i in sorted(names))
    if min(names) < 1 or max(names) > 2 * len(names):
        raise DataError(f"{path}: {len(names)} categories have ids from {min(names)} to {max(names)}, and labels are "
                        "from 1; number them anew: contiguous=true.")  # fmt: skip
    return tuple(names.get(i, NO_CLASS) for i in range(1, max(names) + 1))
