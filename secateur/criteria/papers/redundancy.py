"""Redundancy: which channel do the others together explain best, seen by the layers that read it.

Backward elimination on the second moments of the feature maps. Where correlation compares a channel with its best
single partner, this compares it with all that remain.
"""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.criteria.moments import Moments
from secateur.criteria.registry import NotDefinedError, criterion
from secateur.errors import UsageError

BLOCK = 64
"""Downdates gathered before they are applied at once, as one matrix product."""


@criterion("redundancy", needs=["moments", "consumers"], source="multi-way linear dependence of feature maps")
def redundancy(
    moments: Moments, consumers: tuple[Tensor, ...], ridge: float = 1e-4, centred: bool = False, relative: bool = False
) -> Tensor:
    r"""Score every channel by the error of the consumers' outputs when it goes, the others being refitted.

    With M the second moment of the maps and W the consumers' weights, the least error without the channels R is
    :math:`\min_{W'_R = 0} \mathrm{tr}\,(W - W') M (W - W')^T`. Channels are eliminated one by one: with W' the current
    fit and :math:`P = (M_{KK})^{-1}` over the kept set K, removing p adds :math:`\lVert W'_p \rVert^2 / P_{pp}`, and
    leaves :math:`W' - W'_p P_p / P_{pp}` and :math:`P - P_p^T P_p / P_{pp}`.

    M is that of single positions, so the kernel positions of a convolution are taken as uncorrelated; for 1×1
    convolutions and linear layers the error is exact. Dead channels cost nothing and go first. With fewer samples than
    channels M is singular, and ``ridge`` decides between channels that the samples can't tell apart.

    Args:
        moments: Moments of the group's feature maps.
        consumers: Weights that read the channels, each of shape ``(C_out, C, K)``.
        ridge: Added to the diagonal of M, as a fraction of its mean.
        centred: Use the covariance in place of the second moment, as if a bias took up every mean.
        relative: Scale every output of a consumer to unit second moment first, so that each counts the same.

    Returns:
        Shape ``(C,)``, in fp64: the error up to and with the channel's removal, as a fraction of the outputs' second
        moment; rises in the order of elimination. Higher = keep.

    Raises:
        NotDefinedError: If no consumer reads the channels.
        UsageError: If the ridge is negative.
    """
    if not consumers:
        raise NotDefinedError("no consumer with weights reads its channels")
    if ridge < 0:
        raise UsageError(f"criterion redundancy: ridge is {ridge}. Use 0 or more.")
    second = moments.covariance if centred else moments.second
    gram = torch.zeros_like(second)
    for weight in consumers:
        # In the weights' own precision: their products dominate the time, and gain nothing from more digits.
        rows = weight.detach().to(second.device).movedim(1, 2)
        rows = rows if rows.dtype in (torch.float32, torch.float64) else rows.float()
        if relative:
            # One scale for an output, over all kernel positions: they add up to the same sum.
            power = ((rows @ second.to(rows)) * rows).sum((1, 2))
            rows = rows / power.clamp(min=1e-12 * power.mean().clamp(min=1e-30)).sqrt()[:, None, None]
        rows = rows.flatten(0, 1)
        gram += (rows.mT @ rows).to(gram)
    dead = second.diagonal() <= 1e-12 * second.diagonal().mean()
    gram[dead] = 0.0
    gram[:, dead] = 0.0
    total = (gram * second).sum()
    costs, order = eliminate(second, gram, ridge)
    scores = torch.empty_like(costs)
    scores[order] = costs[order].cumsum(0)
    return scores / total if total > 0 else scores


def eliminate(second: Tensor, gram: Tensor, ridge: float = 1e-4) -> tuple[Tensor, Tensor]:
    """Eliminate all channels one by one, the cheapest first.

    Downdates of the inverse and of the Gram matrix are rank-one and rank-two. They are gathered and applied
    :data:`BLOCK` at a time; in between only the diagonals and the one row that a step reads are kept current.

    Args:
        second: M, shape ``(C, C)``, symmetric, positive semi-definite.
        gram: WᵀW, shape ``(C, C)``.
        ridge: See :func:`redundancy`.

    Returns:
        Cost of each channel when it went, shape ``(C,)``; channels in the order of elimination, shape ``(C,)``.
    """
    count = len(second)
    scale = second.diagonal().mean().clamp(min=1e-300)
    inverse = torch.linalg.inv(second + max(ridge, 1e-12) * scale * torch.eye(count).to(second))
    gram = gram.clone()
    costs = torch.zeros(count).to(second)
    order: list[int] = []
    index = torch.arange(count, device=second.device)
    while len(index):
        steps = min(BLOCK, len(index))
        gone = torch.zeros(len(index), dtype=torch.bool, device=second.device)
        diag_p, diag_g = inverse.diagonal().clone(), gram.diagonal().clone()
        v = torch.zeros(len(index), steps).to(second)
        u, a = torch.zeros_like(v), torch.zeros_like(v)
        for step in range(steps):
            cost = (diag_g.clamp(min=0) / diag_p).masked_fill(gone, float("inf"))
            p = int(cost.argmin())
            gone[p] = True
            costs[index[p]] = cost[p]
            order.append(int(index[p]))
            row = inverse[p] - v[:, :step] @ v[p, :step]
            g = gram[p] - a[:, :step] @ u[p, :step] - u[:, :step] @ a[p, :step]
            v[:, step] = row / row[p].sqrt()
            u[:, step] = row / row[p]
            a[:, step] = g - 0.5 * g[p] * u[:, step]
            diag_p -= v[:, step] ** 2
            diag_g -= 2 * a[:, step] * u[:, step]
        keep = ~gone
        v, u, a = v[keep], u[keep], a[keep]
        inverse = inverse[keep][:, keep] - v @ v.mT
        cross = a @ u.mT
        gram = gram[keep][:, keep] - cross - cross.mT
        index = index[keep]
    return costs, torch.tensor(order, device=second.device)
