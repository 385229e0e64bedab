"""Folders of images with a mask each: the class of every pixel."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from secateur.data.bundle import DataBundle, Normalise
from secateur.data.image import opened
from secateur.data.imagefolder import NORMALISE
from secateur.errors import DataError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

IGNORED = 255
"""Class of the pixels that count neither way."""
NAMES = "classes.txt"
"""The file of the classes' names, a line each."""
IMAGES, MASKS = "images", "masks"
_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".tif", ".tiff", ".webp")

Pairs = list[tuple[Path, Path]]


class MaskFiles(Dataset[tuple[Tensor, Tensor]]):
    """Images and the classes of their pixels, decoded when they are read.

    An element is an image, ``float32``, shape ``(3, H, W)``, and a mask, ``int64``, shape ``(H, W)``.

    Args:
        pairs: Files of each image and of its mask.
        classes: How many classes there are.
        normalise: What is done to the images.
        size: Height and width that both are resized to; as they are stored where None.
        mirrored: Whether :meth:`augmented` mirrors half of them, drawn from torch's global generator.
    """

    def __init__(
        self, pairs: Pairs, classes: int, normalise: Normalise, size: int | None = None, mirrored: bool = False
    ) -> None:
        self.pairs, self.classes, self.normalise = pairs, classes, normalise
        self.size, self.mirrored = size, mirrored

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        from PIL import Image

        image_file, mask_file = self.pairs[index]
        image, mask = opened(image_file, str(image_file)), opened(mask_file, str(mask_file), None)
        if image.size != mask.size:
            (w, h), (mask_w, mask_h) = image.size, mask.size
            raise DataError(f"{mask_file}: is {mask_w}x{mask_h}, and its image {w}x{h}; a mask has its image's size.")
        if self.size is not None:
            # A class is no number: what lies between two classes is none, so masks take the nearest pixel's.
            image = image.resize((self.size, self.size), Image.Resampling.BILINEAR)
            mask = mask.resize((self.size, self.size), Image.Resampling.NEAREST)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        return self.normalise(pixels), self._classes(np.array(mask), mask_file)

    def augmented(self, index: int) -> tuple[Tensor, Tensor]:
        """Return an element as training sees it."""
        image, mask = self[index]
        if self.mirrored and float(torch.rand(())) < 0.5:
            return image.flip(-1), mask.flip(-1)
        return image, mask

    def _classes(self, values: Any, file: Path) -> Tensor:
        if values.ndim != 2 or values.dtype.kind not in "biu":
            raise DataError(f"{file}: a mask has one whole number a pixel, its class (grey or palette); found colours.")
        found = torch.from_numpy(values.astype(np.int64))
        odd = (found >= self.classes) & (found != IGNORED)
        if bool(odd.any()):
            raise DataError(
                f"{file}: holds class {int(found[odd][0])}; there are {self.classes}, from 0, and {IGNORED} for pixels "
                "that don't count."
            )
        return found

    @staticmethod
    def collate(elements: list[tuple[Tensor, Tensor]]) -> Any:
        """Make a batch of images of one size."""
        sizes = sorted({tuple(image.shape[-2:]) for image, _ in elements})
        if len(sizes) > 1:
            (h, w), (other_h, other_w) = sizes[:2]
            raise DataError(
                f"masks: a batch holds images of one size, found {w}x{h} and {other_w}x{other_h}; resize them by the "
                "option size."
            )
        return default_collate(elements)


def masks(
    root: Path,
    *,
    validation: float | None = None,
    seed: int = 0,
    train_size: int | None = None,
    classes: int | Sequence[str] | None = None,
    size: int | None = None,
    augment: bool = True,
    mean: Sequence[float] = NORMALISE.mean,
    std: Sequence[float] = NORMALISE.std,
) -> DataBundle:
    """Load images with a mask each, for networks that give a class to every pixel.

    ``root`` holds ``images/PART`` and ``masks/PART``, with files of the same name: an image in RGB, and a mask as PNG
    whose values, grey or of a palette, are classes from 0; 255 is for pixels that count neither way. Parts are
    ``train`` and ``test``, where validation is split off ``train``; ``val``, too, which then is the validation set; or
    ``train`` and ``val``, where ``val`` is the test set.

    Args:
        root: Folder.
        validation: Share of the training images held out; a tenth where None.
        seed: Seed of that split.
        train_size: Number of training images to take; all where None.
        classes: How many there are, or their names; the lines of ``root/classes.txt`` where None.
        size: Height and width that images and masks are resized to, in pixels; as they are stored where None, all of
            one size then.
        augment: Whether training batches may be mirrored.
        mean: Of each channel of images in [0, 1].
        std: Of each channel of images in [0, 1].

    Raises:
        DataError: If folders, masks or classes are missing.
        UsageError: If an option is out of range, or ``validation`` is given beside a validation folder.
    """
    root = Path(root)
    where, names = f"masks:{root}", _names(root, classes)
    if size is not None and size < 1:
        raise UsageError(f"{where}: size is at least 1 pixel, found {size}.")
    parts = {part: _pairs(root, part) for part in ("train", "val", "test") if (root / IMAGES / part).is_dir()}
    if "train" not in parts or len(parts) < 2:
        raise DataError(f"{root}: expected images/train, and images/test or images/val, with a mask each in masks.")
    train, test = parts["train"], parts.get("test", parts.get("val", []))
    if len(parts) == 3:
        if validation is not None:
            raise UsageError(f"{where}: validation={validation:g} contradicts the folder val; leave it out.")
        held = parts["val"]
    else:
        train, held = _split(train, 0.1 if validation is None else validation, seed, where)
    if train_size is not None:
        if not 0 < train_size <= len(train):
            raise UsageError(f"{where}: train_size is between 1 and {len(train)} training images, found {train_size}.")
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:train_size]
        train = [train[i] for i in sorted(order.tolist())]
    normalise = Normalise(tuple(mean), tuple(std))
    if len(normalise.mean) != 3:
        raise UsageError(f"{where}: images are RGB; give three means, found {normalise.mean}.")
    first = MaskFiles(train, len(names), normalise, size, mirrored=augment)
    second, third = (MaskFiles(pairs, len(names), normalise, size) for pairs in (held, test))
    return DataBundle("masks", first, second, third, tuple(first[0][0].shape), names, normalise, task="dense")


def _names(root: Path, classes: int | Sequence[str] | None) -> tuple[str, ...]:
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; expected images/train and masks/train.")
    if classes is None:
        if not (root / NAMES).is_file():
            raise DataError(
                f"{root}: how many classes are there? Give the option classes, or {NAMES} with a line each."
            )
        classes = [line.strip() for line in (root / NAMES).read_text("utf-8").splitlines() if line.strip()]
    names = tuple(map(str, range(classes))) if isinstance(classes, int) else tuple(map(str, classes))
    if not 2 <= len(names) <= IGNORED:
        raise UsageError(f"masks:{root}: classes are 2 to {IGNORED}, found {len(names)}.")
    return names


def _pairs(root: Path, part: str) -> Pairs:
    images = sorted(p for p in (root / IMAGES / part).iterdir() if p.suffix.lower() in _SUFFIXES)
    if not images:
        raise DataError(f"{root / IMAGES / part}: holds no image.")
    found = [(image, root / MASKS / part / f"{image.stem}.png") for image in images]
    lost = [mask for _, mask in found if not mask.is_file()]
    if lost:
        raise DataError(f"{lost[0]}: is missing, the mask of an image; {len(lost)} of {len(found)} of {part} are.")
    return found


def _split(pairs: Pairs, share: float, seed: int, where: str) -> tuple[Pairs, Pairs]:
    held = round(share * len(pairs))
    if not 0 < held < len(pairs):
        raise DataError(f"{where}: {len(pairs)} images can't be split at {share:g}; add images, or split off more.")
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed)).tolist()
    return [pairs[i] for i in sorted(order[held:])], [pairs[i] for i in sorted(order[:held])]
