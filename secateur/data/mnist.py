"""MNIST, from the four IDX files."""

from __future__ import annotations

from pathlib import Path

import torch

from secateur.data.bundle import DataBundle, Normalise, stratified, thinned
from secateur.data.tensors import ImageTensors
from secateur.errors import DataError

NORMALISE = Normalise((0.1307,), (0.3081,))
"""Mean and deviation of the training pixels."""

FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def mnist(root: Path, *, validation: float | None = None, seed: int = 0, train_size: int | None = None) -> DataBundle:
    """Load MNIST (LeCun et al. 1998) with its published test set.

    Args:
        root: Folder that holds ``MNIST/raw``, as ``torchvision.datasets.MNIST`` lays it out.
        validation: Share of the 60,000 training images held out; a tenth where None.
        seed: Seed of that split.
        train_size: Number of training images to take, every class in proportion; all where None.

    Raises:
        DataError: If a file is missing, damaged or empty.
        UsageError: If ``train_size`` is out of range.
    """
    root = Path(root)
    for file in FILES:
        if not (root / "MNIST" / "raw" / file).is_file():
            raise DataError(
                f"{root}: MNIST/raw/{file} is missing; expected the four unpacked IDX files as "
                "torchvision.datasets.MNIST(root, download=True) lays them out."
            )
    train, test = _part(root, True), _part(root, False)
    labels = train.labels.tolist()
    kept, held = stratified(labels, 0.1 if validation is None else validation, seed, f"mnist:{root}")
    kept = thinned(labels, kept, train_size, seed, f"mnist:{root}")
    shape = tuple(train.images.shape[1:])
    names = tuple(str(n) for n in range(10))
    return DataBundle("mnist", train.subset(kept), train.subset(held), test, shape, names, NORMALISE)


def _part(root: Path, train: bool) -> ImageTensors:
    # Not through torchvision's MNIST itself, which reads a pickle in place of these files where it finds one.
    from torchvision.datasets.mnist import read_image_file, read_label_file

    names = FILES[:2] if train else FILES[2:]
    what = " and ".join(f"MNIST/raw/{file}" for file in names)
    try:
        images, labels = (
            read(str(root / "MNIST" / "raw" / file))
            for read, file in zip((read_image_file, read_label_file), names, strict=True)
        )
    except Exception as error:  # damaged bytes raise errors of any kind
        found = " ".join(str(error).split()) or "the file ends before the images its header announces"
        raise DataError(f"{root}: {what}: not readable as IDX: {found}; unpack them anew.") from error
    if images.ndim != 3 or images.dtype != torch.uint8 or len(images) != len(labels) or not len(images):
        raise DataError(
            f"{root}: {what}: expected as many images as labels, at least one; found shapes {tuple(images.shape)} and "
            f"{tuple(labels.shape)}."
        )
    if int(labels.max()) > 9:
        raise DataError(f"{root}: {what}: labels are digits, 0 to 9; found {int(labels.max())}.")
    return ImageTensors(images[:, None], labels.long(), NORMALISE)
