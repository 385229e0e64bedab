"""Correlated filter pairs: Singh, Verma, Rai, Namboodiri, "Leveraging Filter Correlations for Deep Model Compression".

WACV 2020 (CFP). The filters of a layer are paired by Pearson's correlation; the most correlated pairs are the least
important. They are trained towards |ρ| = 1, so that what one filter knows moves into the other, and one filter of each
pair is dropped. Everything here is a pure function of tensors.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from secateur.criteria.registry import NotDefinedError, Pair, Selection, criterion
from secateur.errors import CriterionError

Form = Literal["paper", "pair", "layer_mean", "log"]
"""Name of a form of the regulariser; see :func:`regulariser`."""

Order = Literal["correlation", "residual"]
"""What pairs are ordered by: |ρ|, as in the paper, or :func:`residual`."""

PAPER_SUM_LIMIT = 10.0
"""Σ|ρ| above which the form ``paper`` has practically no gradient left, exp(-10) = 4.5e-5."""

_LOG = logging.getLogger(__name__)


def _unit(rows: Tensor) -> Tensor:
    """Centre each row and scale it to length 1; a constant row becomes 0."""
    if rows.shape[-1] < 2:
        raise CriterionError(
            f"pearson: a filter needs at least 2 elements to have a correlation, found {rows.shape[-1]}; "
            "leave this layer out."
        )
    if not rows.is_floating_point():
        raise CriterionError(f"pearson: filters must be floating point, found {rows.dtype}.")
    rows = rows if rows.dtype in (torch.float32, torch.float64) else rows.float()
    centred = rows - rows.mean(dim=-1, keepdim=True)
    norm = torch.linalg.vector_norm(centred, dim=-1, keepdim=True)
    # Rounding leaves a constant filter with a residue that is noise, not direction.
    floor = 4 * torch.finfo(rows.dtype).eps * torch.linalg.vector_norm(rows.detach(), dim=-1, keepdim=True)
    alive = norm > floor
    return torch.where(alive, centred, 0.0) / torch.where(alive, norm, 1.0)


def pearson(filters: Tensor) -> Tensor:
    r"""Correlate every pair of filters.

    Singh et al. 2020, eq. 7, on filters flattened to vectors:
    :math:`\rho_{ij} = \frac{(w_i - \bar w_i)\cdot(w_j - \bar w_j)}{\|w_i - \bar w_i\|\,\|w_j - \bar w_j\|}`.
    Departures: none. Half precision is computed in fp32, under autocast too.

    Args:
        filters: Weight of a convolution or linear layer, shape ``(C_out, ...)``.

    Returns:
        ρ, shape ``(C_out, C_out)``, dimensionless, in [-1, 1], with a unit diagonal; the row of a constant filter is 0
        off the diagonal.

    Raises:
        CriterionError: If a filter has fewer than two elements or holds NaN, or ``filters`` is not floating point.

    Example:
        >>> weight = torch.tensor([[1.0, 2.0, 3.0], [2.0, 4.0, 6.0], [3.0, 2.0, 1.0]])
        >>> pearson(weight)[0].round(decimals=4)
        tensor([ 1.,  1., -1.])
    """
    if filters.ndim < 2:
        raise CriterionError(f"pearson: filters must have shape (C_out, ...), found {tuple(filters.shape)}.")
    if not bool(torch.isfinite(filters.detach()).all()):
        raise CriterionError("pearson: a filter holds NaN or infinity. Check the weights.")
    with torch.autocast(filters.device.type, enabled=False):
        unit = _unit(filters.flatten(1))
        # A matrix product may round ρ_ij and ρ_ji differently; the upper half is mirrored.
        upper = (unit @ unit.T).clamp(-1.0, 1.0).triu(diagonal=1)
        return upper + upper.T + torch.eye(len(unit), dtype=unit.dtype, device=unit.device)


def pair_correlation(first: Tensor, second: Tensor) -> Tensor:
    r"""Correlate the filters of given pairs only: eq. 7 in time O(pairs · filter size).

    Args:
        first: One filter of each pair, shape ``(pairs, elements)``.
        second: The other filter of each pair, shape ``(pairs, elements)``.

    Returns:
        ρ of each pair, shape ``(pairs,)``, in [-1, 1], differentiable, in fp32 or wider.

    Raises:
        CriterionError: If a filter has fewer than two elements, or the filters are not floating point.
    """
    with torch.autocast(first.device.type, enabled=False):
        # The gradient of clamp is zero outside its range, which rounding reaches only at |ρ| = 1: it is zero there.
        return (_unit(first) * _unit(second)).sum(dim=-1).clamp(-1.0, 1.0)


def regulariser(correlations: Sequence[Tensor], form: Form = "pair") -> Tensor:
    r"""Turn the correlations of an episode's pairs into the term that is added to the loss.

    Singh et al. 2020, eqs. 10-11: :math:`C(\Theta) + \lambda\,e^{-\sum|\rho|}` over all pairs of the episode.

    Departures: as written, each pair's gradient carries the factor :math:`e^{-\sum|\rho|}`, 4e-17 for the 63 pairs of
    one ResNet-56 episode, so nothing is learned. Forms, all with their minimum at every ``|ρ| = 1``:

    * ``paper``: :math:`e^{-\sum|\rho|}`, exact; warns when the sum exceeds 10.
    * ``pair`` (default): :math:`\sum_p e^{-|\rho_p|}`; each pair gets the gradient that eq. 10 gives a lone pair.
    * ``layer_mean``: :math:`\sum_i e^{-\mathrm{mean}_i|\rho|}` over layers i.
    * ``log``: :math:`-\sum|\rho|`, the logarithm of ``paper``.

    Args:
        correlations: For each layer (coupled group) its pairs' scores, shape ``(pairs,)``: |ρ|, or ρ for ``signed``.
        form: One of ``paper``, ``pair``, ``layer_mean``, ``log``.

    Returns:
        A scalar in the dtype of the correlations (fp32 or wider).

    Raises:
        CriterionError: If ``form`` is unknown, or there is no pair at all.

    Example:
        >>> regulariser([torch.ones(3), torch.ones(1)], "paper").log()
        tensor(-4.)
    """
    layers = [rho for rho in correlations if rho.numel()]
    if not layers:
        raise CriterionError("regulariser: the episode has no pair; select at least one.")
    if form == "layer_mean":
        return torch.stack([torch.exp(-rho.mean()) for rho in layers]).sum()
    rho = torch.cat(layers)
    if form == "pair":
        return torch.exp(-rho).sum()
    total = rho.sum()
    if form == "log":
        return -total
    if form == "paper":
        if float(total.detach()) > PAPER_SUM_LIMIT:
            _LOG.warning(
                "regulariser 'paper': the sum of |rho| over %d pairs is %.1f, above %g, so its gradient carries "
                "exp(-%.1f) and vanishes; use 'pair', or fewer pairs an episode.",
                rho.numel(), float(total.detach()), PAPER_SUM_LIMIT, float(total.detach()),
            )  # fmt: skip
        return torch.exp(-total)
    raise CriterionError(f"regulariser: unknown form {form!r}; choose one of {', '.join(get_args(Form))}.")


def group_score(
    correlations: Sequence[Tensor], weights: Sequence[float] | None = None, *, signed: bool = False
) -> Tensor:
    r"""Score the pairs of a coupled group: the mean of |ρ| over the layers that produce its channels.

    Open in the paper (residual streams, where one channel is one filter in each of several layers); read here as
    :math:`s = \sum_m a_m |\rho_m| / \sum_m a_m`. Equal weights give the mean, MACs the MAC-weighted mean, and
    ``(1, 0, 0, …)`` the first producer only.

    Args:
        correlations: ρ in each producer, all of one shape.
        weights: Weight a_m of each producer, not negative; equal when None.
        signed: Take ρ instead of |ρ|: a negative pair can't be merged through a ReLU.

    Returns:
        The scores, of the shape of one element of ``correlations``; in [0, 1], or [-1, 1] when ``signed``.

    Raises:
        CriterionError: If there is no producer, shapes differ, or the weights are not positive in sum.
    """
    if not correlations:
        raise CriterionError("group_score: a group needs at least one producer.")
    shares = [1.0] * len(correlations) if weights is None else [float(w) for w in weights]
    total = sum(shares)
    if len(shares) != len(correlations) or min(shares) < 0 or not total > 0:
        raise CriterionError(f"group_score: {len(correlations)} producers need as many weights >= 0, found {shares}.")
    if len({tuple(rho.shape) for rho in correlations}) > 1:
        raise CriterionError("group_score: the producers of a group must have the same number of channels.")
    terms = [(rho if signed else rho.abs()) * (share / total) for rho, share in zip(correlations, shares, strict=True)]
    return torch.stack(terms).sum(dim=0)


def residual(filters: Tensor, *, signed: bool = False) -> Tensor:
    r"""Measure what is lost of each filter where a multiple of another stands in for it.

    :math:`R_{pk} = \min_{a,b} \|w_p - a\,w_k - b\|^2 = \|w_p - \bar w_p\|^2\,(1 - \rho_{pk}^2)`; with ``signed``,
    where only :math:`a \ge 0` may stand in, :math:`\max(\rho_{pk}, 0)` takes the place of ρ.

    Not in the paper, which orders pairs by |ρ| alone: two filters of little weight are then as costly to pair as two
    that the network lives on. Among filters of one norm, the order by residual is that by |ρ|.

    Args:
        filters: Weight of a convolution or linear layer, shape ``(C_out, ...)``.
        signed: Whether a negative multiple can't stand in, as behind a ReLU.

    Returns:
        R, shape ``(C_out, C_out)``, in squared units of the weights; p is the row. The diagonal is 0.

    Raises:
        CriterionError: If a filter has fewer than two elements or holds NaN, or ``filters`` is not floating point.
    """
    rho = pearson(filters)
    rho = rho.clamp_min(0.0) if signed else rho
    rows = filters.flatten(1).to(rho.dtype)
    lengths = (rows - rows.mean(dim=1, keepdim=True)).square().sum(dim=1)
    return lengths[:, None] * (1 - rho.square())


def _size(what: str, table: Tensor) -> int:
    """Return the number of filters that a table of pairs is of, once it is seen to be square and finite."""
    size = len(table)
    if table.ndim != 2 or table.shape != (size, size):
        raise CriterionError(f"{what} must be square, found {tuple(table.shape)}.")
    if not bool(torch.isfinite(table).all()):
        raise CriterionError(f"{what} must be finite; a filter holds NaN or infinity.")
    return size


def select_pairs(
    scores: Tensor,
    count: int,
    *,
    norms: Tensor | None = None,
    removable: Tensor | None = None,
    blocks: Tensor | None = None,
) -> list[tuple[int, int]]:
    r"""Choose ``count`` filters to drop, each with a surviving partner that takes over what it knows.

    Singh et al. 2020, section 3: pairs are ordered by |ρ|, the largest is the least important, and of several highly
    correlated pairs the filter that they share is the one pruned.

    Open in the paper, read as: walk the unordered pairs by falling score (equal scores: lower indices first); skip a
    pair with a dropped end or with both ends locked; drop the unlocked end that occurs in more of the top pairs, ties
    by larger Σ|ρ|, then smaller L1 norm, then higher index; lock the survivor; stop at ``count`` drops. The top pairs
    are the ``max(count, 3)`` best, as with fewer no filter is in several. When more than half the filters are to go,
    locks run out: the walk starts again over the survivors, and a partner that goes hands its filters to its own.

    Args:
        scores: Symmetric pair scores, shape ``(C, C)``: |ρ|, or ρ for ``signed``; the diagonal is not read.
        count: Number of filters to drop; at most C - 1 (a layer keeps at least one).
        norms: L1 norm of each filter, shape ``(C,)``; ties are not broken by norm when None.
        removable: False for filters that must stay, shape ``(C,)``; they may be partners.
        blocks: Block of each filter, shape ``(C,)``: partners are of one block, and every block loses the same
            fraction and keeps one filter.

    Returns:
        ``(dropped, kept)`` in the order chosen; no filter is dropped twice, and no kept one is dropped.

    Raises:
        CriterionError: If ``scores`` is not square, ``count`` is not within what may be dropped, or the blocks can't
            lose the same fraction each.

    Example:
        >>> star = torch.tensor([[1.0, 0.9, 0.8, 0.7], [0.9, 1, 0, 0], [0.8, 0, 1, 0], [0.7, 0, 0, 1]])
        >>> select_pairs(star, 1)  # filter 0 is in all three top pairs
        [(0, 1)]
    """
    size = _size("select_pairs: scores", scores)
    if blocks is not None and len(set(blocks.tolist())) > 1:
        return _select_in_blocks(select_pairs, scores, count, blocks, norms=norms, removable=removable)
    fixed = torch.zeros(size, dtype=torch.bool) if removable is None else ~removable.bool().cpu()
    free = size - int(fixed.sum())
    most = min(free, size - 1)
    if not 0 <= count <= most:
        raise CriterionError(f"select_pairs: cannot drop {count} of {size} filters; at most {most} may go.")
    if count == 0:
        return []

    table = scores.detach().double().cpu()
    walk = _by_falling_score(table)
    ranks = _drop_ranks(table, walk[: max(count, 3)], norms)
    return _dropped_along(walk, count, ranks, fixed.tolist())


def _by_falling_score(table: Tensor) -> list[tuple[int, int]]:
    """Return the unordered pairs by falling score; equal scores: lower indices first."""
    rows, columns = torch.triu_indices(len(table), len(table), offset=1)
    order = torch.sort(table[rows, columns], descending=True, stable=True).indices
    return list(zip(rows[order].tolist(), columns[order].tolist(), strict=True))


def _drop_ranks(
    table: Tensor, top: Sequence[tuple[int, int]], norms: Tensor | None
) -> list[tuple[int, float, float, int]]:
    """Rank each filter: of two ends of a pair, the one of the higher rank is dropped.

    What counts, in this order: in how many of the top pairs the filter occurs, its Σ|ρ|, its L1 norm, its index.
    """
    occurrences = Counter(end for pair in top for end in pair)
    sums = (table.abs().sum(dim=1) - table.diagonal().abs()).tolist()
    lengths = [0.0] * len(table) if norms is None else norms.detach().double().cpu().tolist()
    return [(occurrences[end], sums[end], -lengths[end], end) for end in range(len(table))]


def _dropped_along(
    walk: Sequence[tuple[int, int]], count: int, ranks: Sequence[tuple[int, float, float, int]], fixed: Sequence[bool]
) -> list[tuple[int, int]]:
    """Walk the pairs and drop one end of each, until ``count`` are dropped; survivors are locked for one walk."""
    partner: dict[int, int] = {}
    while len(partner) < count:
        locked = list(fixed)
        for i, j in walk:
            if i in partner or j in partner or (locked[i] and locked[j]):
                continue
            first_goes = locked[j] or (not locked[i] and ranks[i] > ranks[j])
            dropped, kept = (i, j) if first_goes else (j, i)
            for orphan in [end for end, owner in partner.items() if owner == dropped]:
                partner[orphan] = kept
            partner[dropped] = kept
            locked[kept] = True
            if len(partner) == count:
                break
    return list(partner.items())


def select_least_lost(
    residuals: Tensor, count: int, *, removable: Tensor | None = None, blocks: Tensor | None = None
) -> list[tuple[int, int]]:
    r"""Choose ``count`` filters to drop by :func:`residual`, each with the survivor that can best stand in for it.

    Backward elimination: of the filters that are left, the one goes of which the least is lost with another that is
    left standing in, :math:`\arg\min_p \min_k R_{pk}`; equal losses: the higher index goes. Of two filters alike, the
    one of less weight goes first, so that what its partner took over is not lost after it. In place of the rule of
    :func:`select_pairs`, where it is |ρ| that orders the pairs and a pair does not say which end costs less.

    Args:
        residuals: R, shape ``(C, C)``, p is the row; the diagonal is not read.
        count: Number of filters to drop; at most C - 1 (a layer keeps at least one).
        removable: False for filters that must stay, shape ``(C,)``; they may be partners.
        blocks: Block of each filter, shape ``(C,)``: partners are of one block, and every block loses the same
            fraction and keeps one filter.

    Returns:
        ``(dropped, kept)`` in the order chosen; no filter is dropped twice, and no kept one is dropped.

    Raises:
        CriterionError: If ``residuals`` is not square or finite, ``count`` is not within what may be dropped, or the
            blocks can't lose the same fraction each.

    Example:
        >>> select_least_lost(torch.tensor([[0.0, 0.5, 0.4], [9.0, 0.0, 8.0], [7.0, 1.0, 0.0]]), 1)
        [(0, 2)]
    """
    size = _size("select_least_lost: residuals", residuals)
    if blocks is not None and len(set(blocks.tolist())) > 1:
        return _select_in_blocks(select_least_lost, residuals, count, blocks, removable=removable)
    free = torch.ones(size, dtype=torch.bool) if removable is None else removable.bool().cpu()
    most = min(int(free.sum()), size - 1)
    if not 0 <= count <= most:
        raise CriterionError(f"select_least_lost: cannot drop {count} of {size} filters; at most {most} may go.")
    table = residuals.detach().double().cpu().clone().fill_diagonal_(math.inf)
    lost = table.clone()
    lost[~free] = math.inf
    dropped: list[int] = []
    for _ in range(count):
        best = lost.min(dim=1).values
        goes = size - 1 - int(best.flip(0).argmin())
        dropped.append(goes)
        lost[goes], lost[:, goes], table[:, goes] = math.inf, math.inf, math.inf
    return [(p, int(table[p].argmin())) for p in dropped]


def _select_in_blocks(
    select: Callable[..., list[tuple[int, int]]],
    table: Tensor,
    count: int,
    blocks: Tensor,
    **vectors: Tensor | None,
) -> list[tuple[int, int]]:
    """Select the same fraction of every block, partners within the block."""
    labels = sorted(set(blocks.tolist()))
    sizes = [int((blocks == label).sum()) for label in labels]
    quota = [size // math.gcd(*sizes) for size in sizes]
    share, rest = divmod(count, sum(quota))
    if rest:
        raise CriterionError(
            f"{select.__name__}: blocks of {sizes} filters must lose the same fraction each; "
            f"{count} is not a multiple of {sum(quota)}."
        )
    pairs = []
    for label, part in zip(labels, quota, strict=True):
        index = torch.nonzero(blocks.cpu() == label).flatten()
        inside = select(
            table.cpu()[index][:, index],
            share * part,
            **{name: None if vector is None else vector.cpu()[index] for name, vector in vectors.items()},
        )
        pairs += [(int(index[dropped]), int(index[kept])) for dropped, kept in inside]
    return pairs


def pairs_by_width(width: int, fraction: float = 1 / 16) -> int:
    r"""Number of pairs of a layer an episode: :math:`n_i = \max(1, \mathrm{round}(p\,c_i))`, halves to even.

    Open in the paper ("proportional to the layer's FLOPs, to reduce the same % of FLOPs from every layer"); its
    example, 1:2:4 pairs for layers of equal MACs, shows that the aim is the same fraction of each layer. The count is
    of the original width and stays fixed over the episodes.

    Args:
        width: Original number of filters c_i.
        fraction: p, the fraction of the original width that goes in one episode, in (0, 1).

    Returns:
        The number of pairs, at least 1.

    Raises:
        CriterionError: If ``fraction`` is not in (0, 1).

    Example:
        >>> [pairs_by_width(width) for width in (16, 32, 64)]
        [1, 2, 4]
    """
    if not 0 < fraction < 1:
        raise CriterionError(f"pairs_by_width: the fraction must be in (0, 1), found {fraction}.")
    return max(1, round(fraction * width))


def pairs_by_macs(macs: Sequence[int], widths: Sequence[int], fraction: float = 1 / 16) -> list[int]:
    r"""Pairs per layer by MAC share: the literal reading of "proportional to the layer's FLOPs".

    :math:`n_i = \max(1, \mathrm{round}(N m_i / \sum m))` with :math:`N = p \sum c_i` pairs in all, at most c_i - 1.

    Args:
        macs: MACs of each layer (of a group: of its producers together).
        widths: Original number of filters of each layer.
        fraction: p, the fraction of all filters that goes in one episode, in (0, 1).

    Returns:
        The number of pairs of each layer.

    Raises:
        CriterionError: If ``fraction`` is not in (0, 1), the lists differ in length, or no layer has MACs.

    Example:
        >>> pairs_by_macs([300, 100], [32, 32])
        [3, 1]
    """
    if not 0 < fraction < 1:
        raise CriterionError(f"pairs_by_macs: the fraction must be in (0, 1), found {fraction}.")
    total = sum(macs)
    if len(macs) != len(widths) or total <= 0:
        raise CriterionError(
            f"pairs_by_macs: needs MACs and a width for every layer, found {len(macs)} and {len(widths)}."
        )
    pairs = fraction * sum(widths)
    return [min(max(1, round(pairs * m / total)), max(c - 1, 0)) for m, c in zip(macs, widths, strict=True)]


@criterion("cfp", needs=["producers"], returns="pairs", source="Singh et al. 2020, correlated filter pairs")
def correlated_pairs(producers: Sequence[Tensor], remove: int, *, signed: bool = False) -> Selection:
    r"""Select the filters that CFP would drop next, without the training that moves them into their partners.

    Singh et al. 2020, eq. 7 and the rule of :func:`select_pairs`; a coupled group is scored by the mean of |ρ| over its
    producers. Departures: a layer with one element a filter has no correlation and does not count.

    Args:
        producers: One tensor a producer, shape ``(C, F_m)``.
        remove: Number of filters to remove, at most C - 1.
        signed: Pair by ρ instead of |ρ|.

    Returns:
        The dropped filters in order, each with the partner that stays and their score.

    Raises:
        NotDefinedError: If no producer has two elements a filter.
        CriterionError: If a filter holds NaN.
    """
    layers = [weights for weights in producers if weights.shape[1] >= 2]
    if not layers:
        raise NotDefinedError("none of its filters has 2 elements, and fewer have no correlation")
    scores = group_score([pearson(weights).double().cpu() for weights in layers], signed=signed)
    norms = torch.stack([weights.double().abs().sum(dim=1).cpu() for weights in layers]).sum(dim=0)
    pairs = select_pairs(scores, remove, norms=norms)
    return Selection(
        tuple(dropped for dropped, _ in pairs),
        tuple(Pair(kept, dropped, float(scores[dropped, kept])) for dropped, kept in pairs),
    )
