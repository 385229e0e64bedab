"""The geometry of a view: which old dimensions make which new ones, whatever lies along them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from secateur.tracing.labels import Labels


class Piece(NamedTuple):
    """The shortest run of old dimensions whose elements make a run of new ones."""

    old: list[int]
    new: list[int]


def pieces(old: Sequence[int], new: Sequence[int]) -> list[Piece]:
    """Cut two shapes of equal size into the shortest runs of dimensions with equal products.

    Dimensions of size 1 belong to no run: they carry no labels.

    >>> for piece in pieces((2, 6, 1, 5), (2, 3, 2, 5)):
    ...     print(piece.old, piece.new)
    [0] [0]
    [1] [1, 2]
    [3] [3]
    """
    left = [d for d, size in enumerate(old) if size != 1]
    right = [d for d, size in enumerate(new) if size != 1]
    result = []
    i = j = 0
    while i < len(left) and j < len(right):
        a, b = [left[i]], [right[j]]
        product_a, product_b = old[left[i]], new[right[j]]
        i, j = i + 1, j + 1
        while product_a != product_b:
            if product_a < product_b:
                a.append(left[i])
                product_a *= old[left[i]]
                i += 1
            else:
                b.append(right[j])
                product_b *= new[right[j]]
                j += 1
        result.append(Piece(a, b))
    return result


def merged(labels: Labels, dims: Sequence[int], dim: int, shape: Sequence[int]) -> Labels:
    """Return the labels of several dimensions merged into one, of which only ``dim`` carries labels."""
    laid_out = labels.reshape([labels.size if d == dim else 1 for d in dims])
    return np.broadcast_to(laid_out, [shape[d] for d in dims]).reshape(-1)


def varying(labels: Labels) -> list[int]:
    """Return the axes of a label array along which labels differ."""
    return [
        axis
        for axis, size in enumerate(labels.shape)
        if size > 1 and not np.array_equal(np.broadcast_to(labels.take([0], axis=axis), labels.shape), labels)
    ]


def rows_along(labels: Labels, shape: Sequence[int], axis: int) -> Labels:
    """Return a vector cut to ``shape``, one row for each index along ``axis``: what loses an index, loses its row."""
    return np.moveaxis(labels.reshape(shape), axis, 0).reshape(shape[axis], -1)
