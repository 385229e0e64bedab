"""Magnitude: Li, Kadav, Durdanovic, Samet, Graf, "Pruning Filters for Efficient ConvNets" (ICLR 2017); and chance."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.criteria.registry import criterion


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
    return filters.double().abs().sum(1)


@criterion("l2", needs=["filters"], source="smallest Euclidean norm")
def l2(filters: Tensor) -> Tensor:
    r"""Score every filter by :math:`\sqrt{\sum w^2}`; arguments and shapes are those of :func:`l1`."""
    norm: Tensor = torch.linalg.vector_norm(filters.double(), dim=1)
    return norm


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
