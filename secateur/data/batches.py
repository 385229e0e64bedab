"""Batches whose content is a function of the seed and the epoch, from memory or from files."""

from __future__ import annotations

import random
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from secateur.data.bundle import require_dataset
from secateur.data.tensors import ImageTensors
from secateur.errors import DataError, UsageError

if TYPE_CHECKING:
    from secateur.data.bundle import Sized


class Batches:
    """Walk through a data set in batches, as often as asked for.

    Which examples make up batch b of epoch e, in which order, and how they are augmented follow from ``(seed, e)``
    alone: neither the generators of torch, numpy and Python, nor what was read before, nor the number of worker
    processes matters, and none of the generators is moved. A run that was killed goes on by :meth:`set_epoch`.
    Iterating twice without it gives the same epoch twice.

    Args:
        dataset: An :class:`~secateur.data.ImageTensors`, whose batches are sliced out of memory; or any data set with
            a length, whose elements a ``DataLoader`` collects (by ``dataset.collate`` where it has one).
        batch_size: Examples a batch; the last one may hold fewer.
        shuffle: Whether each epoch has an order of its own.
        augment: Whether to augment: by the tensors' augmentation, or by ``dataset.augmented(index)``. A data set with
            neither is taken as it is.
        seed: Seed of order and augmentation.
        drop_last: Whether to leave out a last batch that isn't full.
        workers: Processes that read files; of no use for images in memory.

    Raises:
        UsageError: If the batch size is below 1 or the number of workers below 0.
        DataError: If it is no data set or empty, or holds no full batch where only full ones are taken.
    """

    def __init__(
        self,
        dataset: Sized | Dataset[Any],
        batch_size: int,
        *,
        shuffle: bool = False,
        augment: bool = False,
        seed: int = 0,
        drop_last: bool = False,
        workers: int = 0,
    ) -> None:
        require_dataset(dataset, "batches")
        if batch_size < 1 or workers < 0:
            raise UsageError(f"batches: batch_size is at least 1 and workers 0, found {batch_size} and {workers}.")
        self.dataset, self.batch_size = dataset, batch_size
        self.shuffle, self.augment, self.seed = shuffle, augment, seed
        self.drop_last, self.workers = drop_last, workers
        self.epoch = 0
        if not len(self):
            rule = f" full batch of {batch_size}" if drop_last and self._examples else " example"
            raise DataError(f"batches: the data set holds not one{rule}.")

    @property
    def _examples(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __len__(self) -> int:
        full, rest = divmod(self._examples, self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration walks through: any integer of 64 bits."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        seeds = np.random.SeedSequence([self.seed & _WORD, self.epoch & _WORD])
        own, loader = (int(s) for s in seeds.generate_state(2, np.uint64))
        generator = torch.Generator().manual_seed(own)
        count = self._examples
        order = torch.randperm(count, generator=generator) if self.shuffle else torch.arange(count)
        if self.drop_last:
            order = order[: len(self) * self.batch_size]
        if isinstance(self.dataset, ImageTensors):
            yield from self._sliced(self.dataset, order, generator)
        else:
            yield from self._collected(order, own, torch.Generator().manual_seed(loader))

    def _sliced(self, dataset: ImageTensors, order: torch.Tensor, generator: torch.Generator) -> Iterator[Any]:
        augmentation = dataset.augmentation if self.augment else None
        drawn = None if augmentation is None else augmentation.draw(len(dataset), generator)
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            # What is drawn belongs to the example, not to its place in the order.
            yield dataset.take(chosen, None if drawn is None else drawn[chosen])

    def _collected(self, order: torch.Tensor, seed: int, generator: torch.Generator) -> Iterator[Any]:
        loader: DataLoader[Any] = DataLoader(
            _Seeded(self.dataset, seed, self.augment),
            self.batch_size,
            sampler=order.tolist(),
            num_workers=self.workers,
            collate_fn=self._collate(),
            generator=generator,
            worker_init_fn=_subordinate if self.workers else None,
        )
        yield from loader

    def _collate(self) -> Callable[[list[Any]], Any] | None:
        return getattr(self.dataset, "collate", None)


class DetectionBatches(Batches):
    """Walk through photographs with boxes in batches as torchvision's detectors take them.

    A detector's losses are computed inside of it, from the boxes, so these are among its arguments. A batch is a
    mapping: ``images``, a list of tensors ``(C, H, W)``, each of a size of its own; ``targets``, a list of mappings,
    each with ``boxes``, ``(n, 4)``, corners x₁ y₁ x₂ y₂ in pixels, and ``labels``, ``(n,)``, from 1; and the same
    targets as ``labels``, for the metric.

    Args:
        dataset: Elements ``(image, target)``, such as those of :class:`~secateur.data.DetectionFiles`.
        batch_size: Images a batch.
        shuffle: As in :class:`Batches`.
        augment: As in :class:`Batches`.
        seed: As in :class:`Batches`.
        drop_last: As in :class:`Batches`. Networks with batch norms on a map of one position, such as SSDlite, can't
            be trained on a lone last image.
        workers: As in :class:`Batches`.

    Raises:
        UsageError: As :class:`Batches`.
        DataError: As :class:`Batches`; or if an element is no such pair.
    """

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for images, targets in super().__iter__():
            yield {"images": images, "targets": targets, "labels": targets}

    @property
    def example_inputs(self) -> tuple[list[torch.Tensor]]:
        """The first image, as a detector is called on it without boxes."""
        images, _ = _listed([self.dataset[0]])
        return (images,)

    def _collate(self) -> Callable[[list[Any]], Any]:
        return _listed


def _listed(elements: list[Any]) -> tuple[list[torch.Tensor], list[Any]]:
    """Make a batch of two lists: images, which may differ in size, and targets."""
    for element in elements:
        image, target = element if isinstance(element, (tuple, list)) and len(element) == 2 else (None, None)
        if not isinstance(image, torch.Tensor) or image.dim() != 3 or not isinstance(target, Mapping):
            raise DataError(_NO_PAIR)
        if not {"boxes", "labels"} <= target.keys():
            raise DataError(f"{_NO_PAIR[:-1]}; this target has {', '.join(target) or 'nothing'}.")
        _require_boxes(target["boxes"], target["labels"])
    return [image for image, _ in elements], [target for _, target in elements]


def _require_boxes(boxes: Any, labels: Any) -> None:
    """Refuse boxes that no detector can be trained on; an image may have none, and a box may lie beyond its image."""
    count = len(boxes) if isinstance(boxes, torch.Tensor) and boxes.dim() == 2 and boxes.shape[1] == 4 else -1
    if count < 0 or not isinstance(labels, torch.Tensor) or labels.shape != (count,):
        shapes = " and ".join(str(tuple(v.shape)) if isinstance(v, torch.Tensor) else type(v).__name__
                              for v in (boxes, labels))  # fmt: skip
        raise DataError(f"batches: a target has boxes (n, 4), also where n is 0, and n labels; found {shapes}.")
    flat = ~(torch.isfinite(boxes).all(1) & (boxes[:, :2] < boxes[:, 2:]).all(1))
    if bool(flat.any()):
        raise DataError(f"batches: a box is x1 < x2 and y1 < y2, in pixels; found {boxes[flat][0].tolist()}. Leave "
                        "boxes without area out.")  # fmt: skip
    if count and (labels.is_floating_point() or int(labels.min()) < 1):
        raise DataError(f"batches: labels of boxes are whole numbers from 1, as 0 is the background; found "
                        f"{labels.min().item()}.")  # fmt: skip


_NO_PAIR = "batches: an element is an image (C, H, W) and a mapping of its boxes and labels."


def _subordinate(_: int) -> None:
    """In a process that reads: leave Ctrl-C to the process that started it, which may end while they talk."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    hook = sys.excepthook

    def unless_cut_off(kind: type[BaseException], value: BaseException, trace: TracebackType | None) -> None:
        if not issubclass(kind, (ConnectionError, EOFError)):
            hook(kind, value, trace)

    sys.excepthook = unless_cut_off


_WORD = 0xFFFFFFFFFFFFFFFF


class _Seeded(Dataset[Any]):
    """A data set whose every element draws from generators seeded for it alone."""

    def __init__(self, dataset: Sized | Dataset[Any], seed: int, augment: bool) -> None:
        self.dataset, self.seed = dataset, seed
        augmented = getattr(dataset, "augmented", None)
        self.get = augmented if augment and augmented is not None else dataset.__getitem__

    def __getitem__(self, index: int) -> Any:
        with _seeded(self.seed, index):
            return self.get(index)


@contextmanager
def _seeded(seed: int, index: int) -> Iterator[None]:
    """Seed the generators of the CPU for one element, and put them back.

    The accelerator's are left alone: a forked worker can't touch them.
    """
    (mixed,) = np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002 - transforms draw from it
    torch.default_generator.manual_seed(int(mixed))
    random.seed(int(mixed))
    np.random.seed(int(mixed) & 0xFFFFFFFF)  # noqa: NPY002
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])  # noqa: NPY002
