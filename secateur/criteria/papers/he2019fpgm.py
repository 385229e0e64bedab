"""FPGM: He, Liu, Wang, Hu, Yang, "Filter Pruning via Geometric Median" (CVPR 2019)."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.criteria.registry import criterion


@criterion("fpgm", needs=["filters"], source="He et al. 2019, nearest to the geometric median")
def fpgm(filters: Tensor) -> Tensor:
    r"""Score every filter by its summed distance to all others.

    He et al. 2019, eq. 6: :math:`g(i) = \sum_j \lVert f_i - f_j \rVert_2`. The filter with the smallest sum is nearest
    to the geometric median, so the others represent it best. The weights are taken as they are, neither squared nor
    normalised.

    Departures: coupled channels are compared on the filters of all producers side by side.

    Args:
        filters: Shape ``(C, F)``.

    Returns:
        Shape ``(C,)``, in the weights' unit, in fp64; higher = keep.
    """
    rows = filters.double()
    return torch.cdist(rows, rows, compute_mode=_mode(rows)).sum(1)


def _mode(rows: Tensor) -> str:
    # Distances by matrix products are fast and lose digits only where filters coincide; where the direct form is
    # affordable there is no reason to lose any.
    return "donot_use_mm_for_euclid_dist" if rows.shape[0] ** 2 * rows.shape[1] < 2**28 else "use_mm_for_euclid_dist"
