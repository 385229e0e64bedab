"""A data set in its three parts, and how it is split."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor

from secateur.errors import DataError, UsageError

if TYPE_CHECKING:
    from torch.utils.data import Dataset

TEST_SEED = 0
"""Seed of the test split where none is published: a constant, so that every run is measured on the same images."""


class Sized(Protocol):
    """A data set with a length, whose elements are pairs (input, target)."""

    def __len__(self) -> int:
        """Return the number of elements."""

    def __getitem__(self, index: int) -> Any:
        """Return an element."""


@dataclass(frozen=True)
class Normalise:
    """Per-channel normalisation of images in [0, 1]: subtract ``mean``, divide by ``std``."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            UsageError: If there aren't as many means as deviations, or a deviation isn't above 0.
        """
        object.__setattr__(self, "mean", tuple(float(m) for m in self.mean))
        object.__setattr__(self, "std", tuple(float(s) for s in self.std))
        if len(self.mean) != len(self.std) or not self.mean or not min(self.std) > 0:
            raise UsageError(f"normalise: one mean and one std above 0 a channel, found {self.mean} and {self.std}.")

    def __call__(self, images: Tensor) -> Tensor:
        """Turn ``uint8`` images, shape ``(..., C, H, W)``, into normalised ``float32`` ones."""
        mean = torch.tensor(self.mean, device=images.device)[:, None, None]
        std = torch.tensor(self.std, device=images.device)[:, None, None]
        return images.to(torch.float32).div_(255).sub_(mean).div_(std)


@dataclass(frozen=True)
class DataBundle:
    """A data set in its parts: one to train on, one to decide on, one to report."""

    name: str
    train: Sized | Dataset[Any]
    validation: Sized | Dataset[Any]
    """Held out of the training set; tolerances and early decisions are measured here."""
    test: Sized | Dataset[Any]
    """Measured at the end; no decision is taken on it."""
    input_shape: tuple[int, ...]
    """Shape of one input, ``(C, H, W)``."""
    classes: tuple[str, ...]
    """Names of the classes, by index; without the background for detection, where labels begin at 1."""
    normalise: Normalise | None = None
    """What was done to the images; None where the model does it itself, as torchvision's detectors do."""
    task: Literal["classification", "detection", "dense"] = "classification"
    """One class an image; boxes; or a class for every pixel."""
    with_channels: Callable[[int], DataBundle] | None = field(default=None, compare=False, repr=False)
    """Gives the same images decoded to another number of channels; None where that is settled."""

    def __post_init__(self) -> None:
        """Refuse parts that are no data sets, a shape that is none, and classes without names.

        Raises:
            DataError: If one is not what it has to be.
        """
        where = f"data {self.name}"
        for part in ("train", "validation", "test"):
            require_dataset(getattr(self, part), f"{where}: {part}")
        shape: Any = self.input_shape
        if not isinstance(shape, Sequence) or not shape or not all(isinstance(n, int) and n > 0 for n in shape):
            raise DataError(f"{where}: input_shape: expected that of one input, such as (3, 32, 32); found {shape!r}.")
        names: Any = self.classes
        if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(n, str) for n in names):
            raise DataError(f'{where}: classes: expected their names, such as ("cat", "dog"); found {names!r}.')


def require_dataset(value: Any, where: str) -> None:
    """Refuse what is no data set: it has a length, and gives an element by its number.

    Args:
        value: What is to be one.
        where: What it is called.

    Raises:
        DataError: If it is something else, such as batches or a tensor.
    """
    array = hasattr(value, "__array__") or isinstance(value, (str, bytes, Mapping))
    lone = isinstance(value, (list, tuple)) and bool(value) and hasattr(value[0], "__array__")
    if hasattr(value, "__len__") and hasattr(value, "__getitem__") and not array and not lone:
        return
    found = type(value).__name__ + (f" of {type(value[0]).__name__}" if lone else "")
    loader = type(value).__name__ == "DataLoader"
    remedy = "give its .dataset; batches are made of it." if loader else "TensorDataset(inputs, targets) is one."
    raise DataError(f"{where}: expected a data set of pairs (input, target), with a length; found {found}: {remedy}")


def stratified(labels: Sequence[int], share: float | int, seed: int, where: str) -> tuple[Tensor, Tensor]:
    """Split indices so that both parts hold every class in the same proportion.

    Args:
        labels: Class of each example.
        share: Share of the examples that go to the second part, in (0, 1); or their number.
        seed: Seed of the choice.
        where: Data set, for errors.

    Returns:
        Ascending indices of the first and of the second part.

    Raises:
        DataError: If a class is too small to be in both parts.
    """
    from sklearn.model_selection import train_test_split

    indices = list(range(len(labels)))
    try:
        first, second = train_test_split(indices, test_size=share, random_state=seed, stratify=labels)
    except ValueError as error:
        raise DataError(
            f"{where}: {len(labels)} images can't be split at {share:g} with every class on both sides "
            f"({error}); add images, or split off more."
        ) from error
    return torch.tensor(sorted(first)), torch.tensor(sorted(second))


def thinned(labels: Sequence[int], indices: Tensor, size: int | None, seed: int, where: str) -> Tensor:
    """Return ``size`` of the training indices, every class in the same proportion; all of them for None.

    Raises:
        UsageError: If there aren't that many.
        DataError: If a class would be left without an example.
    """
    if size is None or size == len(indices):
        return indices
    if not 0 < size < len(indices):
        raise UsageError(f"{where}: train_size is between 1 and the {len(indices)} training images, found {size}.")
    kept, _ = stratified([labels[i] for i in indices.tolist()], len(indices) - size, seed, where)
    return indices[kept]
