"""Magnitude: Li, Kadav, Durdanovic, Samet, Graf, "Pruning Filters for Efficient ConvNets" (ICLR 2017); and chance."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from secateur.criteria.registry import criterion

BLOCK = 2**17
"""Weights that are in fp64 at once: a linear layer may have 100 million."""


def by_blocks(filters: Tensor, norm: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply a function of rows to the filters in fp64, a block of rows at a time in the same memory.

    The function may change the block that it gets.
    """
    rows = max(1, min(len(filters), BLOCK // max(1, filters.shape[1])))
    memory = filters.new_empty((rows, filters.shape[1]), dtype=torch.float64)
    return torch.cat([norm(memory[: len(block)].copy_(block)) for block in torch.split(filters.detach(), rows)])


@criterion("l1", needs=["filters"], source="Li et al. 2017, smallest L1 norm")
def l1(filters: Tensor) -> Tensor:
    r"""Score every filter by :math:`\sum |w|`.

    Departures: for coupled channels the sum runs over all producers, where the paper takes the indices from the
    projection shortcut alone.

    Args:
        filters: Shape ``(C, F)``.

    Returns:
        Shape ``(C,)``, in the weights' unit, in fp64; higher = keep.
    """
    return by_blocks(filters, lambda block: block.abs_().sum(1))


@criterion("l2", needs=["filters"], source="smallest Euclidean norm")
def l2(filters: Tensor) -> Tensor:
    r"""Score every filter by :math:`\sqrt{\sum w^2}`; arguments and shapes are those of :func:`l1`."""
    return by_blocks(filters, lambda block: torch.linalg.vector_norm(block, dim=1))


@criterion("random", needs=["filters", "generator"], source="a permutation drawn at random: the baseline to beat")
def random(filters: Tensor, generator: torch.Generator) -> Tensor:
    """Score the filters by a random permutation, without ties.

    Args:
        filters: Shape ``(C, F)``; only ``C`` is read.
        generator: Where the permutation is drawn from.

    Returns:
        Shape ``(C,)``, a permutation of 1/C ... 1, in fp64.
    """
    count = filters.shape[0]
    return (torch.randperm(count, generator=generator) + 1).double().to(filters.device) / count
