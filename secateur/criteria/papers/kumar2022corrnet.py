"""CorrNet: Kumar, Yin, Shaikh et al., "CorrNet: pearson correlation based pruning …" (IJMLC 2022).

Filters are removed by the amount of information in their feature maps; correlation measures how much of it is
duplicated. Pruning and fine-tuning are cycled.

Open in the paper, and how it is read here: the maps are taken after batch norm and activation, in eval mode; a channel
is correlated over all samples and positions; a constant channel is dead, has ρ = 0 to all others, and goes first;
|ρ| ≥ 0.9 marks a pair as redundant, at most 10% of a group go in a round, for three rounds. A threshold of 0 spends
the budget exactly.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from secateur.criteria.moments import Moments
from secateur.criteria.registry import Criterion, Need, Pair, Returns, Selection, register
from secateur.errors import CriterionError, UsageError

THRESHOLD = 0.9
RATIO_PER_ROUND = 0.1
ROUNDS = 3
BINS = 16


def full(correlation: Tensor, dead: Tensor, remove: int, threshold: float = THRESHOLD) -> Selection:
    """Drop one end of the most correlated pair of all, until no pair reaches the threshold.

    Take the largest remaining |ρ| ≥ θ, drop the end with the larger mean |ρ| to what remains, repeat. Dead channels go
    before any pair. Ends with equal means (the last two always are) are told apart by their mean |ρ| to all channels.

    Args:
        correlation: ρ, shape ``(C, C)``.
        dead: Which channels are constant, shape ``(C,)``.
        remove: The most channels to remove, less than C.
        threshold: θ, in [0, 1]; 0 removes exactly ``remove``.

    Returns:
        The channels in the order of removal, each but the dead with its partner.
    """
    size = correlation.abs().double().cpu().clone()
    size.fill_diagonal_(0.0)
    signed = correlation.double().cpu()
    alive = torch.ones(len(size), dtype=torch.bool)
    removed: list[int] = []
    pairs: list[Pair] = []
    for channel in dead.nonzero().flatten().tolist()[:remove]:
        alive[channel] = False
        removed.append(channel)
    size[~alive] = -1.0
    size[:, ~alive] = -1.0
    total = size.clamp(min=0.0).sum(1)
    at_first = total.clone()
    # The best partner of every channel; only those whose partner is dropped look for another, so a step costs O(C)
    # on average, not O(C²).
    best, partner = size.masked_fill(torch.eye(len(size), dtype=torch.bool), -1.0).max(1)
    best[~alive] = -1.0
    while len(removed) < remove:
        first = int(best.argmax())
        strength = float(best[first])
        if strength < threshold or strength < 0.0:
            break
        second = int(partner[first])
        low, high = min(first, second), max(first, second)
        lead = float(total[low] - total[high])
        if abs(lead) < 1e-9:  # what is left of a sum after subtractions differs by rounding
            lead = float(at_first[low] - at_first[high])
        drop, keep = (low, high) if lead > 0 else (high, low)
        removed.append(drop)
        pairs.append(Pair(keep, drop, float(signed[keep, drop])))
        alive[drop] = False
        total -= size[drop].clamp(min=0.0)
        best[drop] = -1.0
        stale = (alive & (partner == drop)).nonzero().flatten()
        if len(stale):
            rows = size[stale].masked_fill(~alive, -1.0)
            rows[torch.arange(len(stale)), stale] = -1.0
            best[stale], partner[stale] = rows.max(1)
    return Selection(tuple(removed), tuple(pairs))


def corrnet(moments: Moments, remove: int, threshold: float = THRESHOLD) -> Selection:
    r"""Select channels by :func:`full` on Pearson's ρ of the feature maps.

    Args:
        moments: Moments of the group's feature maps.
        remove: The most channels to remove.
        threshold: θ on |ρ|, in [0, 1]; 0 spends the budget exactly.

    Returns:
        At most ``remove`` channels, in the order of removal.

    Raises:
        UsageError: If the threshold is out of range.
        CriterionError: If a channel was observed once only.
    """
    _check(threshold)
    _require_observations(moments)
    return full(moments.correlation, moments.constant, remove, threshold)


def corrnet_scores(moments: Moments) -> Tensor:
    """Score every channel by when :func:`full` would remove it with no threshold.

    Returns:
        Shape ``(C,)``, a permutation of 1/C ... 1, in fp64; higher = keep.

    Raises:
        CriterionError: If a channel was observed once only.
    """
    _require_observations(moments)
    return _order(full(moments.correlation, moments.constant, moments.size - 1, 0.0).removed, moments.size)


def _order(removed: tuple[int, ...], size: int) -> Tensor:
    rest = [i for i in range(size) if i not in set(removed)]
    scores = torch.empty(size, dtype=torch.float64)
    for place, channel in enumerate([*removed, *rest], start=1):
        scores[channel] = place / size
    return scores


def successive(moments: Moments, remove: int, threshold: float = THRESHOLD) -> Selection:
    """Drop channel i+1 where its signed correlation to its neighbour i exceeds the threshold.

    It depends on the order of the channels, and is here for comparison only. Pairs go by falling ρ, so that a cap on
    the number keeps the strongest; a dead channel goes first.

    Args:
        moments: Moments of the group's feature maps.
        remove: The most channels to remove.
        threshold: θ on signed ρ, in [-1, 1]; at -1 every neighbour is taken.

    Returns:
        At most ``remove`` channels.

    Raises:
        UsageError: If the threshold is out of range.
        CriterionError: If a channel was observed once only.
    """
    _check(threshold, lowest=-1.0)
    _require_observations(moments)
    rho, dead = moments.correlation.cpu(), moments.constant.cpu()
    removed = dead.nonzero().flatten().tolist()[:remove]
    neighbours = [
        Pair(i, i + 1, float(rho[i, i + 1]))
        for i in range(moments.size - 1)
        if not dead[i + 1] and (float(rho[i, i + 1]) > threshold or threshold == -1.0)
    ]
    chosen = sorted(neighbours, key=lambda pair: -pair.strength)[: remove - len(removed)]
    return Selection((*removed, *(pair.dropped for pair in chosen)), tuple(chosen))


def successive_scores(moments: Moments) -> Tensor:
    """Score every channel by when :func:`successive` would remove it with no threshold; as :func:`corrnet_scores`."""
    return _order(successive(moments, moments.size - 1, -1.0).removed, moments.size)


def bin_equally(values: Tensor, bins: int = BINS) -> Tensor:
    """Put every column into bins that hold equally many values; equal values share a bin.

    Args:
        values: Shape ``(N, C)``.
        bins: Number of bins.

    Returns:
        Bin of each value, shape ``(N, C)``, integers from 0.
    """
    columns = values.double().mT.contiguous()
    places = torch.arange(1, bins, device=values.device) * len(values) // bins
    edges = columns.sort(1).values[:, places].contiguous()
    return torch.searchsorted(edges, columns, right=True).mT


def _entropy(counts: Tensor) -> Tensor:
    """Entropy in bits along the last dimension of a table of counts."""
    p = counts / counts.sum(-1, keepdim=True)
    bits: Tensor = torch.special.entr(p).sum(-1) / math.log(2.0)
    return bits


def symmetrical_uncertainty(first: Tensor, others: Tensor) -> Tensor:
    r"""Correlate one discrete variable with several by mutual information.

    :math:`SU = 2\,[H(X) + H(Y) - H(X,Y)] / [H(X) + H(Y)]`, 1 where each tells the other, 0 where they are independent.
    A pair of constants, which tell nothing, has 0.

    Args:
        first: X, shape ``(N,)``, integers from 0.
        others: Several Y, shape ``(N, C)``, integers from 0.

    Returns:
        Shape ``(C,)``, dimensionless, in [0, 1], in fp64.
    """
    levels_x, levels_y = int(first.max()) + 1, int(others.max()) + 1
    x = torch.nn.functional.one_hot(first, levels_x).double()
    y = torch.nn.functional.one_hot(others, levels_y).double()
    joint = torch.einsum("na,ncb->cab", x, y)
    both = _entropy(x.sum(0)) + _entropy(y.sum(0))
    shared = both - _entropy(joint.flatten(1))
    return torch.where(both > 0, 2 * shared / both.clamp(min=1e-300), torch.zeros_like(both)).clamp(0.0, 1.0)


def _fcbf(pooled: Tensor, labels: Tensor, bins: int) -> tuple[list[Pair], Tensor]:
    """Run the fast correlation-based filter.

    Returns:
        The predominated channels with their predominators, the least relevant first, and all relevances.
    """
    if bins < 2:
        raise UsageError(f"criterion corrnet_su: {bins} bins can't tell values apart. Use at least 2.")
    if len(pooled) != len(labels):
        raise CriterionError(
            f"criterion corrnet_su: {len(pooled)} samples but {len(labels)} labels. Give one label a sample."
        )
    codes = bin_equally(pooled.cpu(), bins)
    classes = torch.unique(labels.cpu(), return_inverse=True)[1]
    if not bool(classes.any()):
        raise CriterionError(
            f"criterion corrnet_su: all {len(labels)} samples are of one class, which no channel tells apart. Give "
            "samples of several classes; a loader that doesn't shuffle may hold them in order."
        )
    relevance = symmetrical_uncertainty(classes, codes)
    spread = pooled.double().cpu().var(0, correction=0)
    # Equal relevance is told apart by variance, so that the order of the channels decides nothing.
    ranked = sorted(range(codes.shape[1]), key=lambda i: (-round(float(relevance[i]), 9), -float(spread[i]), i))
    dropped: list[Pair] = []
    waiting = ranked
    while waiting:
        head, waiting = waiting[0], waiting[1:]
        if waiting:
            index = torch.tensor(waiting)
            shared = symmetrical_uncertainty(codes[:, head], codes[:, index])
            gone = shared >= relevance[index] - 1e-9
            dropped += [Pair(head, j, float(s)) for j, s, g in zip(waiting, shared, gone, strict=True) if g]
            waiting = [j for j, g in zip(waiting, gone, strict=True) if not g]
    return sorted(dropped, key=lambda pair: -ranked.index(pair.dropped)), relevance


def su(pooled: Tensor, labels: Tensor, remove: int, bins: int = BINS) -> Selection:
    """Drop channels that a more relevant channel predominates, by the fast correlation-based filter.

    Channels are ranked by SU(pooled channel, label); j goes when a kept i has SU(i, j) ≥ SU(j, label). See
    :func:`symmetrical_uncertainty`.

    Args:
        pooled: Every sample's maps averaged over positions, shape ``(N, C)``.
        labels: Class of each sample, shape ``(N,)``.
        remove: The most channels to remove.
        bins: Equal-frequency bins of a pooled channel.

    Returns:
        At most ``remove`` channels, the least relevant first.

    Raises:
        UsageError: If there are fewer than two bins.
        CriterionError: If samples and labels differ in number, or all labels are the same.
    """
    chosen = _fcbf(pooled, labels, bins)[0][:remove]
    return Selection(tuple(pair.dropped for pair in chosen), tuple(chosen))


def su_scores(pooled: Tensor, labels: Tensor, bins: int = BINS) -> Tensor:
    """Score the predominated channels below the others, each by its relevance.

    Returns:
        Shape ``(C,)``: SU(channel, label), plus 1 where no kept channel predominates it; higher = keep.
    """
    pairs, relevance = _fcbf(pooled, labels, bins)
    kept = torch.ones(len(relevance), dtype=torch.float64)
    kept[[pair.dropped for pair in pairs]] = 0.0
    return relevance + kept


def _require_observations(moments: Moments) -> None:
    # Of one observation every channel would seem constant, and all be dead.
    if int(moments.count.diagonal().min()) < 2:
        raise CriterionError("criterion corrnet: one observation of a channel has no correlation. Give more images.")


def _check(threshold: float, lowest: float = 0.0) -> None:
    if not lowest <= threshold <= 1.0:
        raise UsageError(
            f"criterion corrnet: threshold is {threshold}, not in [{lowest:g}, 1]. The default is {THRESHOLD}."
        )


_SOURCE = "Kumar et al. 2022, Pearson correlation of feature maps"
register(Criterion("corrnet", corrnet, frozenset({Need.MOMENTS}), Returns.SELECTION, _SOURCE, scores=corrnet_scores))
register(
    Criterion(
        "corrnet_successive",
        successive,
        frozenset({Need.MOMENTS}),
        Returns.SELECTION,
        f"{_SOURCE}, neighbours only",
        scores=successive_scores,
    )
)
register(
    Criterion(
        "corrnet_su",
        su,
        frozenset({Need.POOLED, Need.LABELS}),
        Returns.SELECTION,
        "Kumar et al. 2022, symmetrical uncertainty",
        scores=su_scores,
    )
)
