"""CIFAR-10, from Parquet files as the Hugging Face hub lays them out."""

from __future__ import annotations

import json
import re
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from secateur.checkpoint import write_atomic
from secateur.data.bundle import DataBundle, Normalise, stratified, thinned
from secateur.data.image import decode
from secateur.data.tensors import CropFlip, ImageTensors
from secateur.errors import DataError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

NORMALISE = Normalise((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""ImageNet's, which the published CIFAR ResNets were trained with."""

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

_SHARD = re.compile(r"-(\d+)-of-(\d+)\.parquet$")


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
            classes in ``label``. Every shard of ``-of-N`` must be there.
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
    root = Path(root)
    normalise = Normalise(tuple(mean), tuple(std))
    parts = {part: _read(root, part, None if cache is None else Path(cache).expanduser()) for part in ("train", "test")}
    (train_images, train_labels), (test_images, test_labels) = parts["train"], parts["test"]
    train = ImageTensors(train_images, train_labels, normalise, CropFlip() if augment else None)
    labels = train_labels.tolist()
    kept, held = stratified(labels, 0.1 if validation is None else validation, seed, f"cifar10:{root}")
    kept = thinned(labels, kept, train_size, seed, f"cifar10:{root}")
    return DataBundle(
        "cifar10",
        train.subset(kept),
        train.subset(held).plain(),
        ImageTensors(test_images, test_labels, normalise),
        (3, 32, 32),
        CLASSES,
        normalise,
    )


def _read(root: Path, part: str, cache: Path | None) -> tuple[Tensor, Tensor]:
    files = sorted(root.glob(f"{part}-*.parquet"))
    if not files:
        raise DataError(
            f"{root}: no {part}-*.parquet; expected CIFAR-10 in Parquet files, as train-00000-of-00002.parquet."
        )
    announced = [_SHARD.search(file.name) for file in files]
    counts = {int(found[2]) for found in announced if found}
    if counts and counts != {len(files)}:
        wanted = sorted(counts)
        raise DataError(f"{root}: {len(files)} {part} files of {', '.join(map(str, wanted))} announced in their names.")
    stamps = tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files)
    return _decoded(stamps, None if cache is None else str(cache / f"cifar10-{part}.safetensors"))


@lru_cache(maxsize=4)
def _decoded(stamps: tuple[tuple[str, int, int], ...], cache: str | None) -> tuple[Tensor, Tensor]:
    """Decode files, or read their images from a cache file made of files of the same sizes and times."""
    mark = json.dumps([[Path(name).name, size, time] for name, size, time in stamps])
    if cache is not None and (stored := _from_cache(Path(cache), mark)) is not None:
        return stored
    images, labels = [], []
    for name, _, _ in stamps:
        more, classes = _decode_file(Path(name))
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


def _decode_file(path: Path) -> tuple[Tensor, Tensor]:
    contents, labels = _columns(path)
    images = torch.empty((len(contents), 3, 32, 32), dtype=torch.uint8)
    for row, content in enumerate(contents):
        image = decode(content, f"{path}: row {row}")
        if image.shape != (3, 32, 32):
            raise DataError(f"{path}: row {row}: expected an image of 32x32, found {image.shape[2]}x{image.shape[1]}.")
        images[row] = image
    return images, torch.tensor(labels, dtype=torch.long)


def _columns(path: Path) -> tuple[list[Any], list[int]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UsageError("cifar10: reading Parquet needs pyarrow; pip install 'secateur[data]'.") from None
    try:
        table = parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file: {str(error).splitlines()[0]}") from error
    column = next((name for name in ("img", "image") if name in table.column_names), None)
    if column is None or "label" not in table.column_names:
        raise DataError(f"{path}: expected columns img (or image) and label, found {', '.join(table.column_names)}.")
    rows = table[column].to_pylist()
    contents = [row.get("bytes") if isinstance(row, dict) else row for row in rows]
    labels = table["label"].to_pylist()
    if not rows:
        raise DataError(f"{path}: holds no image.")
    for row, (content, label) in enumerate(zip(contents, labels, strict=True)):
        if not isinstance(content, bytes) or not isinstance(label, int) or not 0 <= label < len(CLASSES):
            raise DataError(f"{path}: row {row}: expected image bytes and a class from 0 to 9, found class {label!r}.")
    return contents, labels
