"""HRank: Lin, Ji, Wang, Zhang, Zhang, Tian, Shao, "HRank: Filter Pruning using High-Rank Feature Map" (CVPR 2020)."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.criteria.registry import criterion


def as_matrices(maps: Tensor) -> Tensor:
    """View feature maps of any number of spatial dimensions as one matrix a sample and channel, in fp32 at least.

    Returns:
        Shape ``(N, C, H, W)``; the last spatial dimension is W, the ones before it together are H.
    """
    if maps.dim() == 2:
        maps = maps[..., None]
    if maps.dim() == 3:
        maps = maps[..., None, :]
    if maps.dim() > 4:
        maps = maps.flatten(2, -2)
    return maps if maps.dtype in (torch.float32, torch.float64) else maps.float()


@criterion("hrank", needs=["maps"], source="Lin et al. 2020, mean rank of the feature map")
def hrank(maps: Tensor) -> Tensor:
    r"""Score every channel by the rank of its feature map.

    Lin et al. 2020, eq. 5: :math:`\frac{1}{g} \sum_{n \le g} \mathrm{Rank}(o_{i,n})` over g images; the paper takes
    g = 640 (five batches of 128), and finds that few already suffice. A singular value counts when it exceeds
    ``max(H, W)·eps·σ_max``.

    Departures: the map is taken where the next layer reads it, so after any pooling; in front of a linear layer that
    reads one value a channel every rank is 1 or 0, and the ranking says little.

    Args:
        maps: One batch, shape ``(N, C, H, W)``.

    Returns:
        Rank of each map, shape ``(N, C)``, in fp64; averaged over samples by the caller. Higher = keep.
    """
    matrices = as_matrices(maps)
    sigma = torch.linalg.svdvals(matrices)
    tolerance = max(matrices.shape[-2:]) * torch.finfo(sigma.dtype).eps * sigma.amax(-1, keepdim=True)
    rank: Tensor = (sigma > tolerance).sum(-1).double()
    return rank
