"""CSHE: Shao et al., "CSHE: network pruning by using cluster similarity and matrix eigenvalues" (IJMLC 2022).

Filters are clustered by similarity; within its cluster a filter is ranked by the large eigenvalues of its feature
maps; the low-ranked ones go.

Open in the paper, and how it is read here: k-means++ on flattened filters, ten starts, seeded; the eigenvalues are
singular values, since a map may be non-square and its eigenvalues complex; a budget is met exactly.
"""

from __future__ import annotations

import random
import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from secateur.criteria.papers.lin2020hrank import as_matrices
from secateur.criteria.registry import Criterion, Need, Returns, Selection, register
from secateur.errors import CriterionError, UsageError

Labels = NDArray[np.int64]


def spectral_energy(maps: Tensor, energy: float = 0.9, terms: int | str | None = None) -> Tensor:
    r"""Sum the large singular values of every map.

    :math:`\sum_{i \le t} \sigma_i` with :math:`\sigma = \sqrt{\mathrm{eig}(A A^T)}` and t the smallest with
    :math:`\sum_{i \le t} \sigma_i^2 \ge e \lVert A \rVert_F^2`.

    Args:
        maps: One batch, shape ``(N, C, H, W)``.
        energy: e, in (0, 1].
        terms: t itself where it is to be fixed: a number (1 = spectral norm), or ``"all"`` (nuclear norm).

    Returns:
        Shape ``(N, C)``, in the maps' unit, in fp64.

    Raises:
        UsageError: If ``energy`` or ``terms`` is out of range.
    """
    if not 0.0 < energy <= 1.0:
        raise UsageError(f"criterion cshe: energy is {energy}, not in (0, 1]. The default is 0.9.")
    sigma: Tensor = torch.linalg.svdvals(as_matrices(maps)).double()
    if terms == "all":
        return sigma.sum(-1)
    if isinstance(terms, int) and terms >= 1:
        return sigma[..., :terms].sum(-1)
    if terms is not None:
        raise UsageError(f"criterion cshe: terms is {terms!r}. Use a number of at least 1, or all.")
    power = sigma.square()
    # A term belongs to the sum while the terms before it hold less than the wanted share; the slack keeps rounding
    # from asking for one more.
    before = power.cumsum(-1) - power
    wanted = energy * power.sum(-1, keepdim=True)
    return (sigma * (before < wanted * (1 - 1e-6))).sum(-1)


def cluster(filters: Tensor, clusters: int, metric: str = "euclidean", seed: int = 0) -> Labels:
    """Cluster filters by k-means++ with ten starts.

    The filters are sorted by content first, so that the clusters do not depend on the order of the channels.

    Args:
        filters: Shape ``(C, F)``.
        clusters: Wanted number; fewer come back where fewer filters are distinct.
        metric: ``euclidean``, or ``cosine`` (the filters are scaled to unit length first).
        seed: Seed of the starts.

    Returns:
        Cluster of each filter, shape ``(C,)``.

    Raises:
        UsageError: If ``metric`` is neither.
        CriterionError: If a filter holds NaN or an infinity.
    """
    if metric not in ("euclidean", "cosine"):
        raise UsageError(f"criterion cshe: unknown metric {metric!r}. Use euclidean or cosine.")
    rows = filters.detach().double().cpu().numpy()
    if not np.isfinite(rows).all():
        raise CriterionError(
            "criterion cshe: a filter holds NaN or infinity, and can't be clustered. Check the weights."
        )
    if metric == "cosine":
        rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.finfo(float).tiny)
    probe = np.random.default_rng(0).standard_normal(rows.shape[1])
    order = np.lexsort(((rows * probe).sum(1), np.linalg.norm(rows, axis=1)))
    distinct = len(np.unique(rows, axis=0))
    found = _kmeans()(min(clusters, distinct), n_init=10, random_state=seed).fit_predict(rows[order])
    labels = np.empty(len(rows), dtype=np.int64)
    labels[order] = found
    return labels


def _kmeans() -> Any:
    """Import k-means where it is used: it takes seconds, draws random numbers and sets filters for warnings."""
    drawn = random.getstate()
    with warnings.catch_warnings():
        from sklearn.cluster import KMeans
    random.setstate(drawn)
    return KMeans


def share(sizes: Labels, remove: int, priority: NDArray[np.float64]) -> Labels:
    """Share a number of removals among clusters in proportion to their sizes, at least one channel staying in each.

    Largest-remainder rounding meets ``remove`` exactly; a cluster that is down to its last channel passes its turn on.

    Args:
        sizes: Channels in each cluster, shape ``(K,)``.
        remove: Channels to remove, at most ``sizes.sum() - K``.
        priority: Which of two clusters with equal remainders goes first (the smaller), shape ``(K,)``.

    Returns:
        Removals in each cluster, shape ``(K,)``.
    """
    quota = remove * sizes / sizes.sum()
    taken: Labels = np.minimum(np.floor(quota + 1e-9).astype(np.int64), sizes - 1)
    turn = np.lexsort((priority, -np.round(quota - taken, 9)))
    while taken.sum() < remove:
        for index in turn:
            if taken.sum() < remove and taken[index] < sizes[index] - 1:
                taken[index] += 1
    return taken


def _clusters(filters: Tensor, clusters: int | None, most: int, metric: str, seed: int) -> Labels:
    count = filters.shape[0]
    wanted = max(1, round(count / 4)) if clusters is None else clusters
    if not 1 <= wanted <= count:
        raise UsageError(f"criterion cshe: {wanted} clusters of {count} filters. Use 1 to {count}.")
    return cluster(filters, min(wanted, most), metric, seed)


def cshe(
    filters: Tensor,
    average: Tensor,
    remove: int,
    budget: str = "proportional",
    clusters: int | None = None,
    metric: str = "euclidean",
    seed: int = 0,
) -> Selection:
    """Select the filters whose maps hold the least energy among filters that are alike.

    Budgets, by name:

    - ``proportional``: about C/4 clusters; in each the lowest share goes, at least one stays, and largest-remainder
      rounding meets the count exactly. Where fewer channels are kept than there would be clusters, there are only as
      many clusters as kept channels.
    - ``representative``: as many clusters as kept channels; the top scorer of each stays. Where fewer filters are
      distinct than are to be kept, the next best scorers stay too.

    Args:
        filters: Shape ``(C, F)``.
        average: :func:`spectral_energy`, averaged over samples, shape ``(C,)``.
        remove: Number of channels to remove.
        budget: ``proportional`` or ``representative``.
        clusters: Number of clusters of the proportional budget; C/4 by default.
        metric: See :func:`cluster`.
        seed: See :func:`cluster`.

    Returns:
        Exactly ``remove`` channels, by rising score.

    Raises:
        UsageError: If an option is out of range.
    """
    score = average.detach().double().cpu().numpy()
    count = len(score)
    if budget == "representative":
        labels = cluster(filters, count - remove, metric, seed)
        best = {int(c): int(max(np.flatnonzero(labels == c), key=lambda i: score[i])) for c in np.unique(labels)}
        spare = sorted(set(range(count)) - set(best.values()), key=lambda i: score[i])
        return Selection(tuple(spare[:remove]))
    if budget != "proportional":
        raise UsageError(f"criterion cshe: unknown budget {budget!r}. Use proportional or representative.")
    labels = _clusters(filters, clusters, count - remove, metric, seed)
    members = [sorted(np.flatnonzero(labels == c).tolist(), key=lambda i: score[i]) for c in np.unique(labels)]
    sizes = np.array([len(m) for m in members])
    taken = share(sizes, remove, np.array([score[m[0]] for m in members]))
    gone = [i for m, n in zip(members, taken, strict=True) for i in m[:n]]
    return Selection(tuple(sorted(gone, key=lambda i: score[i])))


def cshe_scores(
    filters: Tensor, average: Tensor, clusters: int | None = None, metric: str = "euclidean", seed: int = 0
) -> Tensor:
    """Score every filter by its place within its cluster, so that any number of lowest scores is shared fairly.

    A filter with rank r of n in its cluster (1 = least energy) scores r/n, less a fraction of 1/n that falls with its
    energy among all filters of equal place. The best of every cluster outlasts all that are not best.

    Args:
        filters: Shape ``(C, F)``.
        average: :func:`spectral_energy`, averaged over samples, shape ``(C,)``.
        clusters: Number of clusters; C/4 by default.
        metric: See :func:`cluster`.
        seed: See :func:`cluster`.

    Returns:
        Shape ``(C,)``, dimensionless, in [0, 1], in fp64; higher = keep.
    """
    score = average.detach().double().cpu().numpy()
    count = len(score)
    labels = _clusters(filters, clusters, count, metric, seed)
    place = np.empty(count)
    for c in np.unique(labels):
        index = np.flatnonzero(labels == c)
        place[index[np.argsort(score[index])]] = np.arange(1, len(index) + 1) / len(index)
    order = np.lexsort((score, place))
    result = np.empty(count)
    result[order] = np.arange(1, count + 1) / count
    return torch.from_numpy(result).to(average.device)


register(
    Criterion(
        "cshe",
        cshe,
        frozenset({Need.FILTERS, Need.MAPS}),
        Returns.SELECTION,
        "Shao et al. 2022, cluster similarity and matrix eigenvalues",
        per_batch=spectral_energy,
        scores=cshe_scores,
    )
)
