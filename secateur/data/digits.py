"""The 1,797 handwritten digits that scikit-learn brings along: real data with nothing to fetch."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from secateur.data.bundle import TEST_SEED, DataBundle, Normalise, stratified, thinned
from secateur.data.tensors import ImageTensors
from secateur.errors import UsageError

NORMALISE = Normalise((0.3053,), (0.3247,))
"""Mean and deviation of all pixels at 28×28."""


def digits(
    *, validation: float | None = None, seed: int = 0, size: int = 28, train_size: int | None = None
) -> DataBundle:
    """Load the digits of the UCI repository (Alpaydin and Kaynak 1998), enlarged from 8×8 by bilinear interpolation.

    Args:
        validation: Share of the training images held out; a quarter where None, which makes 60 : 20 : 20.
        seed: Seed of that split; the test set, a fifth of each class, doesn't depend on it.
        size: Height and width of the images, in pixels.
        train_size: Number of training images to take, every class in proportion; all where None.

    Raises:
        UsageError: If ``size`` is below 8, or ``train_size`` is out of range.
    """
    from sklearn.datasets import load_digits

    if size < 8:
        raise UsageError(f"digits: size is at least the 8 pixels that the images have, found {size}.")
    source = load_digits()
    small = torch.from_numpy(source.images)[:, None] * (255 / 16)
    # Half-pixel centres, as image libraries have it.
    large = F.interpolate(small, (size, size), mode="bilinear", align_corners=False)
    labels = torch.from_numpy(source.target).long()
    everything = ImageTensors(large.round().to(torch.uint8), labels, NORMALISE)
    names = labels.tolist()
    rest, test = stratified(names, 0.2, TEST_SEED, "digits")
    kept, held = stratified(
        [names[i] for i in rest.tolist()], 0.25 if validation is None else validation, seed, "digits"
    )
    train = thinned(names, rest[kept], train_size, seed, "digits")
    return DataBundle(
        "digits",
        everything.subset(train),
        everything.subset(rest[held]),
        everything.subset(test),
        (1, size, size),
        tuple(str(n) for n in range(10)),
        NORMALISE,
    )
