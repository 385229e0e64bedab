"""CIFAR-10 and CIFAR-100, from the files of the Hugging Face repositories, of torchvision, or plain Parquet files."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from secateur.checkpoint import write_atomic
from secateur.data import cifar_files
from secateur.data.bundle import DataBundle, Normalise, stratified, thinned
from secateur.data.tensors import CropFlip, ImageTensors

if TYPE_CHECKING:
    from collections.abc import Sequence

NORMALISE = Normalise((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""ImageNet's, which the published CIFAR ResNets were trained with."""

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

_NAMES_100 = (
    "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can "
    "castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin "
    "elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster "
    "man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck "
    "pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk "
    "skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger "
    "tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm "
)
CLASSES_100 = tuple(_NAMES_100.split())


def cifar10(
    root: Path,
    *,
    validation: float | None = None,
    seed: int = 0,
    train_size: int | None = None,
    augment: bool = True,
    mean: Sequence[float] = NORMALISE.mean,
    std: Sequence[float] = NORMALISE.std,
    cache: str | None = None,
) -> DataBundle:
    """Load CIFAR-10 (Krizhevsky 2009) with its published test set.

    Args:
        root: Folder with ``train-*.parquet`` and ``test-*.parquet``: image bytes in a column ``img`` or ``image``,
            classes in ``label``, every shard of ``-of-N``; or that holds such files in ``plain_text`` or ``data``, as
            the Hugging Face repository does; or ``cifar-10-batches-py``, as torchvision unpacks it.
        validation: Share of the training images held out; a tenth where None.
        seed: Seed of that split.
        train_size: Number of training images to take, every class in proportion; all where None.
        augment: Whether training batches may be augmented: padded by 4, cropped, flipped.
        mean: Of each channel of images in [0, 1].
        std: Of each channel of images in [0, 1].
        cache: Folder for the decoded images, so that the next process needn't decode them; None for none. Within a
            process they are decoded once.

    Raises:
        DataError: If files or shards are missing, damaged or empty, or hold other images.
        UsageError: If an option is out of range, or pyarrow isn't installed.
    """
    return _load(cifar_files.CIFAR10, CLASSES, root, validation, seed, train_size, augment, mean, std, cache)


def cifar100(
    root: Path,
    *,
    validation: float | None = None,
    seed: int = 0,
    train_size: int | None = None,
    augment: bool = True,
    mean: Sequence[float] = NORMALISE.mean,
    std: Sequence[float] = NORMALISE.std,
    cache: str | None = None,
) -> DataBundle:
    """Load CIFAR-100 (Krizhevsky 2009) in its hundred fine classes, with its published test set.

    Args:
        root: As of ``cifar10``: Parquet files there, or in ``cifar100`` or ``data``, with classes in ``fine_label`` or
            ``label``; or ``cifar-100-python``, as torchvision unpacks it.
        validation: Share of the training images held out; a tenth where None.
        seed: Seed of that split.
        train_size: Number of training images to take, every class in proportion; all where None.
        augment: Whether training batches may be augmented: padded by 4, cropped, flipped.
        mean: Of each channel of images in [0, 1].
        std: Of each channel of images in [0, 1].
        cache: Folder for the decoded images, as of ``cifar10``.

    Raises:
        DataError: As of ``cifar10``.
        UsageError: As of ``cifar10``.
    """
    return _load(cifar_files.CIFAR100, CLASSES_100, root, validation, seed, train_size, augment, mean, std, cache)


def _load(
    kind: cifar_files.Kind,
    classes: tuple[str, ...],
    root: Path,
    validation: float | None,
    seed: int,
    train_size: int | None,
    augment: bool,
    mean: Sequence[float],
    std: Sequence[float],
    cache: str | None,
) -> DataBundle:
    root = Path(root)
    normalise = Normalise(tuple(mean), tuple(std))
    folder = None if cache is None else Path(cache).expanduser()
    files = {part: kind.find(root, part) for part in ("train", "test")}
    parts = {}
    for part, found in files.items():
        stamps = tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in found)
        kept = None if folder is None else str(folder / f"{kind.name}-{part}.safetensors")
        parts[part] = _decoded(kind, stamps, kept)
    (train_images, train_labels), (test_images, test_labels) = parts["train"], parts["test"]
    train = ImageTensors(train_images, train_labels, normalise, CropFlip() if augment else None)
    labels = train_labels.tolist()
    rest, held = stratified(labels, 0.1 if validation is None else validation, seed, f"{kind.name}:{root}")
    rest = thinned(labels, rest, train_size, seed, f"{kind.name}:{root}")
    return DataBundle(
        kind.name,
        train.subset(rest),
        train.subset(held).plain(),
        ImageTensors(test_images, test_labels, normalise),
        (3, 32, 32),
        classes,
        normalise,
    )


@lru_cache(maxsize=4)
def _decoded(
    kind: cifar_files.Kind, stamps: tuple[tuple[str, int, int], ...], cache: str | None
) -> tuple[Tensor, Tensor]:
    """Decode files, or read their images from a cache file made of files of the same sizes and times."""
    mark = json.dumps([[Path(name).name, size, time] for name, size, time in stamps])
    if cache is not None and (stored := _from_cache(Path(cache), mark)) is not None:
        return stored
    images, labels = [], []
    for name, _, _ in stamps:
        more, classes = kind.read(Path(name))
        images.append(more)
        labels.append(classes)
    result = torch.cat(images), torch.cat(labels)
    if cache is not None:
        from safetensors.torch import save

        write_atomic(cache, save({"images": result[0], "labels": result[1]}, {"sources": mark}))
    return result


def _from_cache(path: Path, mark: str) -> tuple[Tensor, Tensor] | None:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("sources") != mark:
                return None
            return file.get_tensor("images"), file.get_tensor("labels")
    except SafetensorError:
        # A cache file that can't be read is made anew.
        return None
