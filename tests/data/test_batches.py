"""An epoch's batches follow from seed and epoch, and from nothing else."""

from __future__ import annotations

import os
import random
import signal
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import Dataset

from secateur.data import Batches, CropFlip, ImageTensors, Normalise
from secateur.data.batches import _subordinate
from secateur.errors import DataError, UsageError


def tensors(count: int = 10, side: int = 5, augmentation: CropFlip | None = None) -> ImageTensors:
    """Images that all differ, each labelled by its number."""
    images = (torch.arange(count * 2 * side * side) * 7 % 256).to(torch.uint8).reshape(count, 2, side, side)
    return ImageTensors(images, torch.arange(count), Normalise((0.4, 0.5), (0.2, 0.25)), augmentation)


class Noisy(Dataset[tuple[Tensor, int]]):
    """Elements that draw from every generator there is, as foreign transforms do."""

    def __len__(self) -> int:
        return 7

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.tensor([torch.rand(()), random.random(), np.random.rand()], dtype=torch.float64), index  # noqa: NPY002


def equal(a: list, b: list) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(a, b, strict=True)
    )


def whole(batches: Batches) -> tuple[Tensor, Tensor]:
    inputs, targets = zip(*batches, strict=True)
    return torch.cat(inputs), torch.cat(targets)


@pytest.mark.parametrize("dataset", [tensors(augmentation=CropFlip(2)), Noisy()], ids=["tensors", "files"])
def test_an_epoch_is_a_function_of_seed_and_epoch(dataset):
    def epoch(number: int, seed: int = 3) -> list:
        batches = Batches(dataset, 4, shuffle=True, augment=True, seed=seed)
        batches.set_epoch(number)
        return list(batches)

    first = epoch(5)
    torch.manual_seed(99)
    random.seed(99)
    np.random.seed(99)  # noqa: NPY002
    walked = Batches(dataset, 4, shuffle=True, augment=True, seed=3)
    for number in (0, 1, 5):
        walked.set_epoch(number)
        again = list(walked)
    assert equal(again, first), "what was read before doesn't matter"
    assert equal(epoch(5), first), "nor do the global generators"
    assert not equal(epoch(6), first)
    assert not equal(epoch(5, seed=4), first)
    assert equal(list(walked), list(walked)), "the same epoch until told"


@pytest.mark.parametrize("dataset", [tensors(augmentation=CropFlip(2)), Noisy()], ids=["tensors", "files"])
def test_no_generator_is_moved(dataset):
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    expected = torch.rand(()), random.random(), np.random.rand()  # noqa: NPY002
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    list(Batches(dataset, 3, shuffle=True, augment=True))
    assert (torch.rand(()), random.random(), np.random.rand()) == expected  # noqa: NPY002


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_the_number_of_workers_changes_nothing():
    alone = list(Batches(Noisy(), 3, shuffle=True, seed=2))
    assert equal(list(Batches(Noisy(), 3, shuffle=True, seed=2, workers=2)), alone)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 30), st.integers(1, 12), st.booleans(), st.booleans(), st.integers(0, 2**63 - 1))
def test_every_example_comes_once(count, size, shuffle, drop_last, epoch):
    dataset = tensors(count)
    if drop_last and count < size:
        with pytest.raises(DataError, match=f"not one full batch of {size}"):
            Batches(dataset, size, drop_last=True)
        return
    batches = Batches(dataset, size, shuffle=shuffle, drop_last=drop_last)
    batches.set_epoch(epoch)
    sizes = [len(y) for _, y in batches]
    assert len(sizes) == len(batches)
    assert set(sizes[:-1]) <= {size}
    images, labels = whole(batches)
    numbers = labels.tolist()
    assert len(set(numbers)) == len(numbers) == (count // size * size if drop_last else count)
    assert shuffle or numbers == list(range(len(numbers)))
    for image, number in zip(images, numbers, strict=True):
        assert torch.equal(image, dataset[number][0])


def test_augmentation_belongs_to_the_example_not_to_the_batch():
    dataset = tensors(12, augmentation=CropFlip(1))
    coarse, fine = (Batches(dataset, size, shuffle=True, augment=True) for size in (12, 5))
    assert torch.equal(whole(coarse)[0], whole(fine)[0])
    ordered = Batches(dataset, 12, augment=True)
    assert not torch.equal(whole(ordered)[0], whole(Batches(dataset, 12))[0])
    ordered.set_epoch(1)
    one = whole(ordered)[0]
    ordered.set_epoch(2)
    assert not torch.equal(one, whole(ordered)[0])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 4), st.booleans(), st.integers(1, 6), st.integers(1, 6), st.integers(0, 1000))
def test_crop_and_flip_follow_the_draws(padding, flip, height, width, seed):
    augmentation = CropFlip(padding, flip)
    generator = torch.Generator().manual_seed(seed)
    drawn = augmentation.draw(5, generator)
    images = torch.randint(0, 256, (5, 2, height, width), generator=generator, dtype=torch.uint8)
    found = augmentation(images, drawn)
    assert found.shape == images.shape
    for image, result, (row, column, mirrored) in zip(images, found, drawn.tolist(), strict=True):
        assert 0 <= row <= 2 * padding
        assert 0 <= column <= 2 * padding
        assert mirrored in ((0, 1) if flip else (0,))
        for i in range(height):
            for j in range(width):
                y, x = row + i - padding, column + (width - 1 - j if mirrored else j) - padding
                inside = 0 <= y < height and 0 <= x < width
                expected = image[:, y, x] if inside else torch.zeros(2, dtype=torch.uint8)
                assert torch.equal(result[:, i, j], expected)


def test_draws_cover_their_range_evenly():
    drawn = CropFlip(1).draw(3000, torch.Generator().manual_seed(0))
    for column, values in ((0, 3), (1, 3), (2, 2)):
        counts = torch.bincount(drawn[:, column])
        assert len(counts) == values
        # Five standard deviations of a binomial count.
        p = 1 / values
        assert (counts - 3000 * p).abs().max() < 5 * (3000 * p * (1 - p)) ** 0.5


def test_normalisation_is_torchvisions():
    from torchvision.transforms import functional as reference

    dataset = tensors()
    image = reference.to_tensor(dataset.images[3].permute(1, 2, 0).numpy())
    assert torch.equal(dataset[3][0], reference.normalize(image, (0.4, 0.5), (0.2, 0.25)))
    assert dataset.images.dtype == torch.uint8, "the stored images stay as they are"


def test_subsets_share_the_images_and_compose():
    dataset = tensors(augmentation=CropFlip(1))
    part = dataset.subset(torch.tensor([7, 2, 5])).subset(torch.tensor([2, 0]))
    assert [part[i][1] for i in range(len(part))] == [5, 7]
    assert part.images.data_ptr() == dataset.images.data_ptr()
    assert part[-1][1] == 7
    assert part.plain().augmentation is None
    moved = part.to("cpu")
    assert len(moved.images) == 2
    assert torch.equal(moved[0][0], part[0][0])
    with pytest.raises(IndexError):
        part[2]


def test_data_without_augmentation_is_taken_as_it_is():
    assert equal(list(Batches(tensors(), 4, augment=True)), list(Batches(tensors(), 4)))
    assert equal(list(Batches(Noisy(), 4, augment=True)), list(Batches(Noisy(), 4)))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Batches(tensors(), 0), UsageError, "batch_size is at least 1"),
        (lambda: Batches(tensors(), 1, workers=-1), UsageError, "found 1 and -1"),
        (lambda: Batches([], 2), DataError, "holds not one example"),
        (lambda: Normalise((0.5,), (0.0,)), UsageError, "one std above 0"),
        (lambda: Normalise((0.5,), (1.0, 1.0)), UsageError, "one mean and one std"),
        (lambda: ImageTensors(torch.zeros(2, 1, 3, 3), torch.zeros(2), Normalise((0,), (1,))), DataError, "uint8"),
        (
            lambda: ImageTensors(torch.zeros(2, 3, 3, 3, dtype=torch.uint8), torch.zeros(2), Normalise((0,), (1,))),
            DataError,
            "3 channels, but 1 means",
        ),
    ],
)
def test_what_makes_no_batches_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_process_a_core_reads_files_and_none_reads_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    from secateur.training import tasks

    cores = len(os.sched_getaffinity(0))
    assert tasks.readers(tensors(), 1) == 0
    assert tasks.readers(range(100), 4) == cores
    assert tasks.readers(range(32), 4) == 0, "eight batches are read sooner than processes are started"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(2 * cores))
    assert tasks.readers(range(100), 4) == 1, "processes that train together share the cores"


def test_a_reader_leaves_ctrl_c_to_its_caller_and_says_nothing_when_it_hangs_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[type[BaseException]] = []
    monkeypatch.setattr(sys, "excepthook", lambda kind, *_: told.append(kind))
    before = signal.getsignal(signal.SIGINT)
    try:
        _subordinate(0)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    for error in (BrokenPipeError(), ConnectionResetError(), EOFError(), ValueError()):
        sys.excepthook(type(error), error, None)
    assert told == [ValueError]
