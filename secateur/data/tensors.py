"""Images that fit in memory: batches are sliced out of one tensor, augmented and normalised as a whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from secateur.errors import DataError

if TYPE_CHECKING:
    from secateur.data.bundle import Normalise


@dataclass(frozen=True)
class CropFlip:
    """Pad with black, crop the old size at random, and flip every second image (He et al. 2016, section 4.2).

    What happens to each image is drawn beforehand, for a whole epoch at once, so that a batch doesn't depend on those
    before it.
    """

    padding: int = 4
    """Pixels on every side."""
    flip: bool = True
    """Whether half of the images, drawn at random, are mirrored left to right."""

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw row offset, column offset and flip of each image, shape ``(count, 3)``."""
        offsets = torch.randint(0, 2 * self.padding + 1, (count, 2), generator=generator)
        flips = torch.randint(0, 2, (count, 1), generator=generator)
        return torch.cat([offsets, flips if self.flip else torch.zeros_like(flips)], dim=1)

    def __call__(self, images: Tensor, drawn: Tensor) -> Tensor:
        """Augment images, shape ``(N, C, H, W)``, as ``drawn``, shape ``(N, 3)``, says."""
        rows, columns, flips = drawn.to(images.device).unbind(1)
        height, width = images.shape[-2:]
        padded = F.pad(images, (self.padding,) * 4)
        # Every possible crop is a view; picking one of each image copies nothing but the result.
        crops = padded.unfold(2, height, 1).unfold(3, width, 1)
        picked = crops[torch.arange(len(images), device=images.device), :, rows, columns]
        return torch.where(flips.bool()[:, None, None, None], picked.flip(-1), picked)


class ImageTensors(Dataset[tuple[Tensor, int]]):
    """Labelled images in memory, as bytes; elements and batches come out normalised.

    Args:
        images: Shape ``(N, C, H, W)``, ``uint8``.
        labels: Class of each image, shape ``(N,)``, ``int64``.
        normalise: Applied to elements and batches.
        augmentation: Applied to training batches that ask for augmentation; None for none.
        indices: The images that belong to this set, in its order; None for all. The tensors are shared, not copied.

    Raises:
        DataError: If the tensors don't fit each other.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        normalise: Normalise,
        augmentation: CropFlip | None = None,
        indices: Tensor | None = None,
    ) -> None:
        if images.ndim != 4 or images.dtype != torch.uint8 or labels.shape != images.shape[:1]:
            raise DataError(
                f"images: expected uint8 of shape (N, C, H, W) and N labels, found {images.dtype} of "
                f"{tuple(images.shape)} and labels of {tuple(labels.shape)}."
            )
        if len(normalise.mean) != images.shape[1]:
            raise DataError(f"images: {images.shape[1]} channels, but {len(normalise.mean)} means to normalise them.")
        self.images, self.labels = images, labels
        self.normalise, self.augmentation = normalise, augmentation
        self.indices = torch.arange(len(images)) if indices is None else indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        images, labels = self.take(torch.tensor([range(len(self))[index]]))
        return images[0], int(labels[0])

    def take(self, positions: Tensor, drawn: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the images at positions of this set, normalised, and their labels.

        Args:
            positions: Shape ``(B,)``.
            drawn: What :attr:`augmentation` drew for each, shape ``(B, 3)``; None for the images as they are.
        """
        where = self.indices[positions].to(self.images.device)
        images = self.images[where]
        if drawn is not None and self.augmentation is not None:
            images = self.augmentation(images, drawn)
        return self.normalise(images), self.labels[where]

    def subset(self, positions: Tensor) -> ImageTensors:
        """Return the images at positions of this set as a set of their own."""
        return ImageTensors(self.images, self.labels, self.normalise, self.augmentation, self.indices[positions])

    def plain(self) -> ImageTensors:
        """Return this set without augmentation."""
        return ImageTensors(self.images, self.labels, self.normalise, None, self.indices)

    def to(self, device: torch.device | str) -> ImageTensors:
        """Return this set with its images on a device, where batches are then made too."""
        images, labels = self.images[self.indices].to(device), self.labels[self.indices].to(device)
        return ImageTensors(images, labels, self.normalise, self.augmentation)
