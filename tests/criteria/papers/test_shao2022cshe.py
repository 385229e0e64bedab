"""CSHE: clusters, budgets, and the scores that stand in for them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.criteria.papers.shao2022cshe import cluster, cshe, cshe_scores, share
from secateur.errors import CriterionError, UsageError

seeds = st.integers(0, 2**31 - 1)


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_as_many_clusters_as_filters_are_singletons() -> None:
    assert sorted(cluster(drawn(0, 6, 4), 6).tolist()) == list(range(6))


def test_duplicates_share_a_cluster_even_where_there_are_clusters_to_spare() -> None:
    rows = drawn(0, 3, 4).repeat(2, 1)
    labels = cluster(rows, 6)
    assert labels[:3].tolist() == labels[3:].tolist()
    assert len(set(labels.tolist())) == 3


def test_cosine_clusters_by_direction() -> None:
    rows = torch.tensor([[1.0, 0.0], [9.0, 0.1], [0.0, 1.0], [0.1, 9.0]])
    labels = cluster(rows, 2, "cosine").tolist()
    assert labels[0] == labels[1] != labels[2] == labels[3]


def test_one_cluster_is_plain_ranking() -> None:
    energy = drawn(1, 8)
    chosen = cshe(drawn(0, 8, 5), energy, 3, clusters=1)
    assert list(chosen.removed) == energy.argsort()[:3].tolist()
    assert cshe_scores(drawn(0, 8, 5), energy, clusters=1).argsort().tolist() == energy.argsort().tolist()


@settings(max_examples=20)
@given(seeds, st.integers(1, 11), st.sampled_from(["proportional", "representative"]))
def test_the_budget_is_met_exactly_and_every_cluster_keeps_its_best(seed: int, remove: int, budget: str) -> None:
    rows, energy = drawn(seed, 12, 4), drawn(seed + 1, 12).abs()
    gone = set(cshe(rows, energy, remove, budget).removed)
    assert len(gone) == remove
    clusters = min(3, 12 - remove) if budget == "proportional" else 12 - remove
    labels = cluster(rows, clusters)
    for c in set(labels.tolist()):
        members = np.flatnonzero(labels == c)
        kept = [i for i in members if i not in gone]
        assert kept, "a cluster lost all its filters"
        assert max(members, key=lambda i: energy[i]) in kept
        assert all(energy[i] >= energy[j] for i in kept for j in members if j in gone)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.data())
def test_shares_are_proportional_to_within_one(sizes: list[int], data: st.DataObject) -> None:
    counts = np.array(sizes)
    remove = data.draw(st.integers(0, int(counts.sum()) - len(sizes)))
    taken = share(counts, remove, np.arange(len(sizes), dtype=float))
    assert taken.sum() == remove
    assert (taken <= counts - 1).all()
    assert (taken >= np.minimum(np.floor(remove * counts / counts.sum()), counts - 1)).all()


@settings(max_examples=20)
@given(seeds)
def test_permuting_filters_permutes_selection_and_scores(seed: int) -> None:
    rows, energy = drawn(seed, 10, 4), drawn(seed + 1, 10)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(seed))
    for budget in ("proportional", "representative"):
        plain = set(cshe(rows, energy, 4, budget).removed)
        assert {int(order[i]) for i in cshe(rows[order], energy[order], 4, budget).removed} == plain
    torch.testing.assert_close(cshe_scores(rows[order], energy[order]), cshe_scores(rows, energy)[order])


def test_the_best_of_a_cluster_outlasts_all_that_are_not() -> None:
    rows, energy = drawn(4, 12, 4), drawn(5, 12)
    labels, scores = cluster(rows, 3), cshe_scores(rows, energy)
    best = [int(max(np.flatnonzero(labels == c), key=lambda i: energy[i])) for c in set(labels.tolist())]
    rest = [i for i in range(12) if i not in best]
    assert scores[best].min() > scores[rest].max()


def test_bad_requests_are_refused() -> None:
    rows, energy = drawn(0, 4, 3), drawn(1, 4)
    with pytest.raises(UsageError, match="proportional or representative"):
        cshe(rows, energy, 1, "greedy")
    with pytest.raises(UsageError, match="5 clusters of 4"):
        cshe(rows, energy, 1, clusters=5)
    with pytest.raises(UsageError, match="euclidean or cosine"):
        cluster(rows, 2, "manhattan")
    with pytest.raises(CriterionError, match="NaN"):
        cluster(rows.fill_(float("nan")), 2)
