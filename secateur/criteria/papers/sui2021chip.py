"""CHIP: Sui et al., "CHIP: CHannel Independence-based Pruning for Compact Neural Networks" (NeurIPS 2021)."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.criteria.papers.lin2020hrank import as_matrices
from secateur.criteria.registry import criterion

CHUNK = 2**24
"""Numbers held at once while rows are zeroed; bounds memory at 128 MiB in fp64."""


@criterion("chip", needs=["maps"], source="Sui et al. 2021, channel independence")
def chip(maps: Tensor) -> Tensor:
    r"""Score every channel by what the nuclear norm of all maps loses without it.

    Sui et al. 2021, eq. 3: with the sample's maps flattened to the rows of A,
    :math:`CI_i = \lVert A \rVert_* - \lVert M_i \odot A \rVert_*`, where :math:`M_i` zeroes row i.

    Departures: where a map has more positions than there are channels, A is replaced by the triangular factor of its
    LQ decomposition, which has the same singular values with and without a zeroed row.

    Args:
        maps: One batch, shape ``(N, C, H, W)``.

    Returns:
        Independence of each channel in each sample, shape ``(N, C)``, in the maps' unit, in fp64; averaged over
        samples by the caller. Higher = keep.
    """
    rows = as_matrices(maps).double().flatten(2)
    _, channels, positions = rows.shape
    if positions > channels:
        rows = torch.linalg.qr(rows.mT, mode="r").R.mT
    whole: Tensor = torch.linalg.svdvals(rows).sum(-1, keepdim=True)
    step = max(1, CHUNK // max(1, rows.numel()))
    without = []
    for start in range(0, channels, step):
        index = torch.arange(start, min(start + step, channels), device=rows.device)
        zeroed = rows[:, None].repeat(1, len(index), 1, 1)
        zeroed[:, torch.arange(len(index), device=rows.device), index] = 0.0
        without.append(torch.linalg.svdvals(zeroed).sum(-1))
    return whole - torch.cat(without, 1)
