"""German traffic signs in whole photographs, in the benchmark's three classes."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from secateur.data.boxes import Box, DetectionFiles, Photograph, drawn, held_out
from secateur.data.bundle import DataBundle
from secateur.errors import DataError

SIGNS = {
    "prohibitory": frozenset({0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 15, 16}),
    "mandatory": frozenset(range(33, 41)),
    "danger": frozenset({11, *range(18, 32)}),
}
"""Class of the benchmark -> the signs that it is made of, by their numbers; other signs are of none."""

ALL_SIGNS = 43
"""Number of kinds of signs."""

TRAINING = 600
"""Photographs before this number are the training set, the others the test set."""


def gtsdb(root: Path, *, validation: float | None = None, seed: int = 0, train_size: int | None = None) -> DataBundle:
    """Load the German Traffic Sign Detection Benchmark (Houben et al. 2013).

    Its layout is ``gt.txt``, a line ``00000.ppm;x1;y1;x2;y2;sign`` for each sign, beside the photographs
    ``00000.ppm`` …, of which some show no sign. Signs are of the benchmark's classes prohibitory, mandatory and danger;
    what is of none is left out. Corners are taken as they stand. Of the photographs, 0 to 599 are the training set and
    the others the test set, as published.

    Args:
        root: Folder.
        validation: Share of the training photographs held out; a tenth where None.
        seed: Seed of that split, and of the draw of ``train_size`` photographs.
        train_size: Number of training photographs to take; all where None.

    Raises:
        DataError: If a file is missing or damaged, a line is none of the benchmark's, a box lies outside its
            photograph, there is no sign of the three classes, or a part is empty.
        UsageError: If there aren't as many photographs as ``train_size``.
    """
    root = Path(root)
    path = root / "gt.txt"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: can't be read; expected gt.txt beside 00000.ppm …, as in FullIJCNN2013.zip "
            "of the German Traffic Sign Detection Benchmark."
        ) from error
    boxes: dict[str, list[Box]] = {image.name: [] for image in sorted(root.glob("[0-9]" * 5 + ".ppm"))}
    without_area = dict.fromkeys(boxes, 0)
    for number, line in enumerate(lines, start=1):
        if line.strip():
            name, box = _sign(line, f"{path}:{number}")
            if name not in boxes:
                raise DataError(f"{root / name}: is missing, and {path.name}:{number} names it.")
            if box is not None and (box.corners[0] >= box.corners[2] or box.corners[1] >= box.corners[3]):
                without_area[name] += 1
            elif box is not None:
                boxes[name].append(box)
    photographs = {name: _photograph(root / name, own, without_area[name]) for name, own in boxes.items()}
    if not any(p.boxes for p in photographs.values()):
        raise DataError(f"{path}: not one sign of {', '.join(SIGNS)} in {len(boxes)} photographs.")
    train = [p for name, p in photographs.items() if int(name[:5]) < TRAINING]
    test = [p for name, p in photographs.items() if int(name[:5]) >= TRAINING]
    if not train or not test:
        raise DataError(
            f"{root}: {len(train)} photographs before 00{TRAINING}.ppm, to train on, and {len(test)} from it on, to "
            "test on; expected both."
        )
    train, held = held_out(train, validation, seed, "gtsdb")
    train = drawn(train, train_size, seed, "gtsdb")
    width, height = train[0].size
    sets = [DetectionFiles(part, tuple(SIGNS)) for part in (train, held, test)]
    return DataBundle("gtsdb", sets[0], sets[1], sets[2], (3, height, width), tuple(SIGNS), None, "detection")


def _sign(line: str, where: str) -> tuple[str, Box | None]:
    """Return a line's photograph and box; None where the sign is of no class."""
    try:
        name, *numbers = line.strip().split(";")
        x1, y1, x2, y2, sign = map(int, numbers)
    except ValueError as error:
        raise DataError(f"{where}: expected 00000.ppm;x1;y1;x2;y2;sign, found {line.strip()!r}.") from error
    if not 0 <= sign < ALL_SIGNS:
        raise DataError(f"{where}: sign {sign} is none of the {ALL_SIGNS}, which are 0 to {ALL_SIGNS - 1}.")
    kind = next((kind for kind, signs in SIGNS.items() if sign in signs), None)
    return name, None if kind is None else Box(kind, (x1, y1, x2, y2))


def _photograph(image: Path, boxes: list[Box], degenerate: int) -> Photograph:
    try:
        with Image.open(image) as opened:
            width, height = opened.size
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{image}: can't be decoded as an image; repair it or take it away.") from error
    for box in boxes:
        x1, y1, x2, y2 = box.corners
        if min(x1, y1) < 0 or x2 > width or y2 > height:
            raise DataError(f"{image}: box {box.corners} lies outside the photograph of {width}x{height}.")
    return Photograph(image, (width, height), boxes, degenerate)
