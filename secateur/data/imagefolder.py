"""Folders of images, one folder a class."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from secateur.data.bundle import TEST_SEED, DataBundle, Normalise, stratified, thinned
from secateur.data.image import opened
from secateur.errors import DataError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

NORMALISE = Normalise((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""ImageNet's."""

VALIDATION_FOLDERS = ("val", "valid", "validation")

_PARTS = {"train", "training", "test", "testing", "eval", *VALIDATION_FOLDERS}

Samples = list[tuple[str, int]]


class ImageFiles(Dataset[tuple[Tensor, int]]):
    """Labelled image files, decoded when they are read.

    Args:
        samples: Path and class of each image.
        plain: From a PIL image to what the model takes.
        training: The same with augmentation, drawn from torch's global generator; None for none.
    """

    def __init__(
        self, samples: Samples, plain: Callable[[Any], Tensor], training: Callable[[Any], Tensor] | None = None
    ) -> None:
        self.samples, self.plain, self.training = samples, plain, training

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._get(index, self.plain)

    def augmented(self, index: int) -> tuple[Tensor, int]:
        """Return an element as training sees it."""
        return self._get(index, self.training or self.plain)

    def _get(self, index: int, transform: Callable[[Any], Tensor]) -> tuple[Tensor, int]:
        path, label = self.samples[index]
        return transform(opened(Path(path), path)), label


def imagefolder(
    root: Path,
    *,
    validation: float | None = None,
    seed: int = 0,
    train_size: int | None = None,
    size: int = 224,
    resize: int | None = None,
    augment: bool = True,
    mean: Sequence[float] = NORMALISE.mean,
    std: Sequence[float] = NORMALISE.std,
) -> DataBundle:
    """Load folders of images, a class each.

    ``root`` holds one of these, the validation folder being named ``val``, ``valid`` or ``validation``:

    - ``train``, ``val`` and ``test``: the three parts;
    - ``train`` and ``test``: validation is split off ``train``;
    - ``train`` and ``val``, as ImageNet has it: ``val`` is the test set, and validation is split off ``train``;
    - the folders of the classes: a fifth of each class is the test set, and validation is split off the rest.

    Images are resized to ``resize`` on the shorter side and cropped in the middle; for training, a random part is
    resized to ``size`` and half of the images are mirrored (Szegedy et al. 2015, as torchvision does it).

    Args:
        root: Folder.
        validation: Share of the training images held out; a tenth where None.
        seed: Seed of that split; a test set doesn't depend on it.
        train_size: Number of training images to take, every class in proportion; all where None.
        size: Height and width of what the model sees, in pixels.
        resize: Shorter side before the crop; ``size`` · 256 / 224 where None.
        augment: Whether training batches may be augmented.
        mean: Of each channel of images in [0, 1].
        std: Of each channel of images in [0, 1].

    Raises:
        DataError: If folders are missing, empty, or name different classes.
        UsageError: If an option is out of range, or ``validation`` is given beside a validation folder.
    """
    root = Path(root)
    normalise = Normalise(tuple(mean), tuple(std))
    resize = round(size * 256 / 224) if resize is None else resize
    if not 1 <= size <= resize or len(normalise.mean) != 3:
        raise UsageError(
            f"imagefolder: expected 1 <= size <= resize and three means, found {size}, {resize} and {normalise.mean}."
        )
    classes, train, held, test = _parts(root, validation, seed)
    labels = [label for _, label in train]
    thin = thinned(labels, torch.arange(len(train)), train_size, seed, f"imagefolder:{root}")
    plain, training = _transforms(size, resize, normalise)
    return DataBundle(
        "imagefolder",
        ImageFiles(_at(train, thin), plain, training if augment else None),
        ImageFiles(held, plain),
        ImageFiles(test, plain),
        (3, size, size),
        classes,
        normalise,
    )


def _parts(root: Path, validation: float | None, seed: int) -> tuple[tuple[str, ...], Samples, Samples, Samples]:
    where = f"imagefolder:{root}"
    if not root.is_dir():
        raise DataError(
            f"{root}: no such folder; expected train, val and test, or a folder for each class. ImageNet's archives, "
            "from image-net.org, are unpacked so by torchvision.datasets.ImageNet(root, split) for train and val."
        )
    held: Samples | None = None
    if (root / "train").is_dir():
        classes, train = _folder(root / "train")
        val = next((root / name for name in VALIDATION_FOLDERS if (root / name).is_dir()), None)
        tests = root / "test" if (root / "test").is_dir() else None
        if val is not None and tests is not None:
            held = _same_classes(root / "train", classes, val)
            if validation is not None:
                raise UsageError(f"{where}: validation={validation:g} contradicts the folder {val.name}; leave it out.")
        if val is None and tests is None:
            raise DataError(f"{root}: beside train, expected a folder test or val.")
        test = _same_classes(root / "train", classes, tests or val)
    else:
        classes, everything = _folder(root)
        if len(classes) > 1 and {name.lower() for name in classes} <= _PARTS:
            raise DataError(
                f"{root}: {' and '.join(classes)} look like parts of a data set and would be read as its classes; name "
                "them train, val and test."
            )
        rest, chosen = stratified([label for _, label in everything], 0.2, TEST_SEED, where)
        train, test = _at(everything, rest), _at(everything, chosen)
    if held is None:
        kept, out = stratified([label for _, label in train], 0.1 if validation is None else validation, seed, where)
        train, held = _at(train, kept), _at(train, out)
    return classes, train, held, test


def _folder(folder: Path) -> tuple[tuple[str, ...], Samples]:
    from torchvision.datasets import ImageFolder

    try:
        found = ImageFolder(str(folder))
    except (FileNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{folder}: expected a folder of images for each class: {reason}") from error
    return tuple(found.classes), found.samples


def _same_classes(reference: Path, classes: tuple[str, ...], folder: Path | None) -> Samples:
    assert folder is not None
    found, samples = _folder(folder)
    if found != classes:
        odd = sorted(set(found) ^ set(classes))
        raise DataError(f"{folder}: its classes aren't those of {reference}: {odd[0]} is in one of them only.")
    return samples


def _at(samples: Samples, indices: Tensor) -> Samples:
    return [samples[i] for i in indices.tolist()]


def _transforms(
    size: int, resize: int, normalise: Normalise
) -> tuple[Callable[[Any], Tensor], Callable[[Any], Tensor]]:
    from torchvision.transforms import v2

    finish = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(normalise.mean, normalise.std)]
    plain = v2.Compose([v2.Resize(resize), v2.CenterCrop(size), *finish])
    training = v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), *finish])
    return plain, training
