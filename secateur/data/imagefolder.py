"""Folders of images, one folder a class."""

from __future__ import annotations

import logging
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

USUAL = {1: Normalise((0.449,), (0.226,)), 3: NORMALISE, 4: Normalise((*NORMALISE.mean, 0.5), (*NORMALISE.std, 0.5))}
"""Channels -> normalisation unless another is given."""

MODES = {1: "L", 3: "RGB", 4: "RGBA"}

VALIDATION_FOLDERS = ("val", "valid", "validation")

_PARTS = {"train", "training", "test", "testing", "eval", *VALIDATION_FOLDERS}

_LOG = logging.getLogger(__name__)

Samples = list[tuple[str, int]]


class ImageFiles(Dataset[tuple[Tensor, int]]):
    """Labelled image files, decoded when they are read.

    Args:
        samples: Path and class of each image.
        plain: From a PIL image to what the model takes.
        training: The same with augmentation, drawn from torch's global generator; None for none.
        mode: What the files are decoded into: ``L``, ``RGB`` or ``RGBA``.
    """

    def __init__(
        self,
        samples: Samples,
        plain: Callable[[Any], Tensor],
        training: Callable[[Any], Tensor] | None = None,
        mode: str = "RGB",
    ) -> None:
        self.samples, self.plain, self.training, self.mode = samples, plain, training, mode

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._get(index, self.plain)

    def augmented(self, index: int) -> tuple[Tensor, int]:
        """Return an element as training sees it."""
        return self._get(index, self.training or self.plain)

    def _get(self, index: int, transform: Callable[[Any], Tensor]) -> tuple[Tensor, int]:
        path, label = self.samples[index]
        return transform(opened(Path(path), path, self.mode)), label


def imagefolder(
    root: Path,
    *,
    validation: float | None = None,
    seed: int = 0,
    train_size: int | None = None,
    size: int = 224,
    resize: int | None = None,
    augment: bool = True,
    channels: int | None = None,
    skip_unreadable: bool = False,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> DataBundle:
    """Load folders of images, a class each.

    ``root`` holds one of these, the validation folder being named ``val``, ``valid`` or ``validation``:

    - ``train``, ``val`` and ``test``: the three parts;
    - ``train`` and ``test``: validation is split off ``train``;
    - ``train`` and ``val``, as ImageNet has it: ``val`` is the test set, and validation is split off ``train``;
    - the folders of the classes: a fifth of each class is the test set, and validation is split off the rest.

    Capitals make no difference: ``Train`` is ``train``.

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
        channels: What images are decoded to: 1 (grey), 3 (RGB) or 4 (RGB and alpha). Where None, as many as ``mean`` or
            ``std`` has; without these as many as the first layer takes of the network that a command or a run's file
            names, else 3.
        skip_unreadable: Whether files that can't be decoded are left out, and counted in a warning; every file is read
            once to find them.
        mean: Of each channel of images in [0, 1]; ImageNet's where None, for grey their average, for alpha 0.5.
        std: Of each channel of images in [0, 1]; likewise.

    Raises:
        DataError: If folders are missing, empty, or name different classes.
        UsageError: If an option is out of range, or ``validation`` is given beside a validation folder.
    """
    root = Path(root)
    moments = std if mean is None else mean
    said = channels or (None if moments is None else len(moments))
    channels = said or 3
    usual = USUAL.get(channels, NORMALISE)
    normalise = Normalise(usual.mean if mean is None else tuple(mean), usual.std if std is None else tuple(std))
    resize = round(size * 256 / 224) if resize is None else resize
    if channels not in USUAL or len(normalise.mean) != channels:
        raise UsageError(
            f"imagefolder: channels are 1, 3 or 4, with a mean for each; found {channels} and {normalise.mean}."
        )
    if not 1 <= size <= resize:
        raise UsageError(f"imagefolder: expected 1 <= size <= resize, found {size} and {resize}.")
    classes, train, held, test = _parts(root, validation, seed)
    labels = [label for _, label in train]
    thin = thinned(labels, torch.arange(len(train)), train_size, seed, f"imagefolder:{root}")
    train = _at(train, thin)
    if skip_unreadable:
        train, held, test = _readable(root, train, held, test)

    def decoded(channels: int, normalise: Normalise, **more: Any) -> DataBundle:
        plain, training = _transforms(size, resize, normalise)
        mode = MODES[channels]
        return DataBundle(
            "imagefolder",
            ImageFiles(train, plain, training if augment else None, mode),
            ImageFiles(held, plain, mode=mode),
            ImageFiles(test, plain, mode=mode),
            (channels, size, size),
            classes,
            normalise,
            **more,
        )

    if said is not None:
        return decoded(channels, normalise)
    return decoded(channels, normalise, with_channels=lambda taken: decoded(taken, USUAL[taken]))


def _parts(root: Path, validation: float | None, seed: int) -> tuple[tuple[str, ...], Samples, Samples, Samples]:
    where = f"imagefolder:{root}"
    if not root.is_dir():
        raise DataError(
            f"{root}: no such folder; expected train, val and test, or a folder for each class. ImageNet's archives, "
            "from image-net.org, are unpacked so by torchvision.datasets.ImageNet(root, split) for train and val."
        )
    held: Samples | None = None
    # Capitals make no difference; where both are there, what is written in small letters goes before.
    folders = {path.name.lower(): path for path in sorted(root.iterdir()) if path.is_dir()}
    if (parts := folders.get("train")) is not None:
        classes, train = _folder(parts)
        val = next((folders[name] for name in VALIDATION_FOLDERS if name in folders), None)
        tests = folders.get("test")
        if val is not None and tests is not None:
            held = _same_classes(parts, classes, val)
            if validation is not None:
                raise UsageError(f"{where}: validation={validation:g} contradicts the folder {val.name}; leave it out.")
        if val is None and tests is None:
            raise DataError(f"{root}: beside train, expected a folder test or val.")
        test = _same_classes(parts, classes, tests or val)
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


def _readable(root: Path, *parts: Samples) -> list[Samples]:
    """Leave out files that can't be decoded, and say how many they are.

    Raises:
        DataError: If nothing is left of a part.
    """
    odd: list[str] = []

    def readable(path: str) -> bool:
        try:
            opened(Path(path), path)
        except DataError as error:
            odd.append(str(error).rstrip("."))
            return False
        return True

    left = [[sample for sample in part if readable(sample[0])] for part in parts]
    if odd:
        _LOG.warning(
            "imagefolder:%s: %d of %d images can't be read and are left out. The first: %s.",
            root, len(odd), sum(map(len, parts)), odd[0],
        )  # fmt: skip
    if not all(left):
        raise DataError(f"imagefolder:{root}: no readable image is left in one of the parts: {odd[0]}.")
    return left


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
