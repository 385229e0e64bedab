"""A fingerprint of data: two runs over the same examples have the same, and a changed, missing or added one is seen."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from secateur.checkpoint.digest import add
from secateur.data.tensors import ImageTensors
from secateur.training.passes import Batches, length_of, order, seeded

LOOKED_AT = 16
"""Elements that are read of a data set which is not known to be in memory, spread over its length."""


def fingerprint(batches: Batches) -> dict[str, Any]:
    """Return what tells data from others: ``examples`` (or ``batches``), their number, and ``sha256``, a digest.

    Of images in memory all count; of image files all names and labels; of any other data set some elements, and of
    batches without a data set the first. What is not the same when it is read twice (augmented, say) is left out.

    Args:
        batches: As in :func:`secateur.training.stages.fit`.
    """
    dataset = getattr(batches, "dataset", None)
    counted = batches if dataset is None else dataset
    found = {"batches" if dataset is None else "examples": length_of(counted)}
    digest = hashlib.sha256()
    if isinstance(dataset, ImageTensors):
        for tensor in (dataset.images[dataset.indices], dataset.labels[dataset.indices]):
            _add(digest, tensor)
    elif isinstance(samples := getattr(dataset, "samples", None), list) and all(_is_sample(s) for s in samples):
        for path, label in samples:
            digest.update(f"{Path(path).parent.name}/{Path(path).name} {label}\n".encode())
    else:
        for first, second in zip(_elements(batches), _elements(batches), strict=False):
            for leaf, again in zip(tree_leaves(first), tree_leaves(second), strict=False):
                if _same(leaf, again):
                    _add(digest, leaf)
    return {**found, "sha256": digest.hexdigest()[:16]}


def _is_sample(sample: Any) -> bool:
    return isinstance(sample, tuple) and len(sample) == 2 and isinstance(sample[0], (str, Path))


def _elements(batches: Batches) -> Iterator[Any]:
    """Yield some elements of the data set, or the first of the batches, under the same seed each time."""
    dataset = getattr(batches, "dataset", batches)
    length = length_of(dataset)
    with seeded(0) as seed:
        if length and hasattr(dataset, "__getitem__"):
            for index in sorted({i * length // LOOKED_AT for i in range(LOOKED_AT)}):
                yield dataset[index]
        else:
            order(batches, seed)
            yield from islice(iter(batches), 1)


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first.shape == second.shape and torch.equal(first, second)
    return isinstance(first, (int, float, str)) and bool(first == second)


def _add(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        add(digest, value)
    else:
        digest.update(f"{value!r}\n".encode())
