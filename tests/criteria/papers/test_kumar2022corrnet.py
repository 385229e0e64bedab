"""CorrNet: selectors on correlation matrices, symmetrical uncertainty, the fast correlation-based filter."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.criteria.moments import Moments
from secateur.criteria.papers.kumar2022corrnet import (
    bin_equally,
    corrnet,
    corrnet_scores,
    full,
    su,
    su_scores,
    successive,
    successive_scores,
    symmetrical_uncertainty,
)
from secateur.errors import CriterionError, UsageError

seeds = st.integers(0, 2**31 - 1)


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments(rows: torch.Tensor) -> Moments:
    result = Moments.empty(rows.shape[1])
    result.update(rows)
    return result


def mixed(seed: int, channels: int) -> Moments:
    return moments(drawn(seed, 50, channels) @ drawn(seed + 1, channels, channels))


def slow_full(rho: np.ndarray, dead: list[int], remove: int, threshold: float) -> list[int]:
    """Literally: take the largest remaining |ρ| ≥ θ, drop the end with the larger mean |ρ| to what remains."""
    left = [i for i in range(len(rho)) if i not in dead[:remove]]
    removed = dead[:remove]
    while len(removed) < remove and len(left) > 1:
        i, j = max(itertools.combinations(left, 2), key=lambda pair: abs(rho[pair]))
        if abs(rho[i, j]) < threshold:
            break
        mean = {k: np.mean([abs(rho[k, m]) for m in left if m != k]) for k in (i, j)}
        if mean[i] == pytest.approx(mean[j], abs=1e-9):
            mean = {k: np.abs(rho[k]).sum() for k in (i, j)}
        drop = i if mean[i] > mean[j] else j
        left.remove(drop)
        removed = [*removed, drop]
    return removed


@settings(max_examples=40)
@given(seeds, st.integers(1, 7), st.sampled_from([0.0, 0.3, 0.6]))
def test_full_follows_its_definition(seed: int, remove: int, threshold: float) -> None:
    found = mixed(seed, 8)
    chosen = corrnet(found, remove, threshold)
    assert list(chosen.removed) == slow_full(found.correlation.numpy(), [], remove, threshold)
    for pair in chosen.pairs:
        assert pair.strength == pytest.approx(float(found.correlation[pair.kept, pair.dropped]))
    if threshold == 0.0:
        assert len(chosen.removed) == remove


def test_a_channel_is_dropped_while_its_partner_remains() -> None:
    found = mixed(3, 8)
    removed = list(corrnet(found, 7, 0.0).removed)
    for place, pair in enumerate(corrnet(found, 7, 0.0).pairs):
        assert pair.dropped == removed[place]
        assert pair.kept not in removed[:place]


def test_dead_channels_go_first_and_have_no_correlation() -> None:
    rows = drawn(0, 40, 5)
    rows[:, 3] = 2.5
    rows[:, 1] = 0.0
    found = moments(rows)
    assert found.constant.tolist() == [False, True, False, True, False]
    assert float(found.correlation[3].abs().sum()) == 1.0
    assert corrnet(found, 1).removed == (1,)
    assert corrnet(found, 3, 0.0).removed[:2] == (1, 3)
    # Above the threshold nothing else is redundant: the budget is not spent.
    assert corrnet(found, 4, 0.9).removed == (1, 3)


def test_a_duplicate_has_correlation_one_and_goes() -> None:
    rows = drawn(1, 60, 4)
    rows[:, 2] = -3 * rows[:, 0] + 1
    chosen = corrnet(moments(rows), 1)
    assert set(chosen.removed) <= {0, 2}
    assert chosen.pairs[0].strength == pytest.approx(-1.0)


@given(seeds)
def test_permuting_channels_permutes_selection_and_scores(seed: int) -> None:
    rows = drawn(seed, 50, 7) @ drawn(seed + 1, 7, 7)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(seed))
    plain, permuted = moments(rows), moments(rows[:, order])
    assert [int(order[i]) for i in corrnet(permuted, 4, 0.0).removed] == list(corrnet(plain, 4, 0.0).removed)
    labels = (drawn(seed, 50, 1).flatten() > 0).long()
    torch.testing.assert_close(su_scores(rows[:, order], labels, 4), su_scores(rows, labels, 4)[order])


def test_scores_are_the_order_of_removal() -> None:
    found = mixed(9, 6)
    removed = list(corrnet(found, 5, 0.0).removed)
    assert corrnet_scores(found).argsort().tolist()[:5] == removed


def test_successive_looks_at_signed_neighbours_only() -> None:
    base = drawn(2, 200, 3)
    rows = torch.stack((base[:, 0], base[:, 0] + 0.1 * base[:, 1], base[:, 2], -base[:, 2], base[:, 1]), 1)
    found = moments(rows)
    assert successive(found, 4).removed == (1,)  # 3 is the negative of 2: full sees it, successive does not
    assert set(corrnet(found, 4).removed) & {2, 3}
    assert successive_scores(found).argsort().tolist()[0] == 1
    assert len(successive(found, 3, -1.0).removed) == 3


@given(seeds)
def test_full_is_the_same_for_any_signs(seed: int) -> None:
    found = mixed(seed, 6)
    sign = torch.sign(drawn(seed, 6))
    flipped = found.correlation * torch.outer(sign, sign)
    dead = torch.zeros(6, dtype=torch.bool)
    assert full(flipped, dead, 5, 0.0).removed == full(found.correlation, dead, 5, 0.0).removed


def slow_su(x: list[int], y: list[int]) -> float:
    def entropy(values: list) -> float:
        return -sum(p * math.log2(p) for v in set(values) for p in [values.count(v) / len(values)])

    joint = entropy(list(zip(x, y, strict=True)))
    both = entropy(x) + entropy(y)
    return 2 * (both - joint) / both if both else 0.0


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 2)), min_size=1, max_size=30))
def test_symmetrical_uncertainty_follows_its_definition(values: list[tuple[int, int, int]]) -> None:
    x, y, z = (list(column) for column in zip(*values, strict=True))
    found = symmetrical_uncertainty(torch.tensor(x), torch.tensor([y, z]).T)
    assert found.tolist() == pytest.approx([slow_su(x, y), slow_su(x, z)], abs=1e-9)


@given(st.lists(st.integers(0, 4), min_size=2, max_size=20), st.permutations(range(5)), st.data())
def test_symmetrical_uncertainty_is_symmetric_and_blind_to_names(
    x: list[int], names: list[int], data: st.DataObject
) -> None:
    y = data.draw(st.lists(st.integers(0, 4), min_size=len(x), max_size=len(x)))
    a, b = torch.tensor(x), torch.tensor(y)
    one = float(symmetrical_uncertainty(a, b[:, None]))
    assert float(symmetrical_uncertainty(b, a[:, None])) == pytest.approx(one, abs=1e-9)
    assert float(symmetrical_uncertainty(torch.tensor(names)[a], b[:, None])) == pytest.approx(one, abs=1e-9)
    if len(set(x)) > 1:
        assert float(symmetrical_uncertainty(a, a[:, None])) == pytest.approx(1.0)


def test_independent_full_factorial_shares_nothing() -> None:
    grid = torch.cartesian_prod(torch.arange(3), torch.arange(4))
    assert float(symmetrical_uncertainty(grid[:, 0], grid[:, 1:])) == pytest.approx(0.0, abs=1e-12)


@given(seeds)
def test_bins_hold_equally_many(seed: int) -> None:
    codes = bin_equally(drawn(seed, 64, 3))
    for column in codes.T:
        assert torch.bincount(column, minlength=16).tolist() == [4] * 16
    assert set(bin_equally(torch.ones(20, 1)).flatten().tolist()) == {15}, "equal values share a bin"


def test_fcbf_drops_what_a_more_relevant_channel_predominates() -> None:
    labels = torch.arange(4).repeat(16)
    noise = drawn(0, 64, 2)
    informative = labels.double()
    pooled = torch.stack((noise[:, 0], informative, 2 * informative + 1, noise[:, 1]), 1)
    chosen = su(pooled, labels, 3, bins=4)
    assert 1 in chosen.removed, "it tells nothing that channel 2, which varies more, doesn't"
    assert 2 not in chosen.removed
    assert {pair.dropped for pair in chosen.pairs} == set(chosen.removed)
    scores = su_scores(pooled, labels, bins=4)
    assert int(scores.argmax()) == 2


def test_bad_requests_are_refused() -> None:
    for bad in (-0.1, 1.1):
        with pytest.raises(UsageError, match="threshold"):
            corrnet(mixed(0, 3), 1, bad)
    with pytest.raises(UsageError, match="bins"):
        su(drawn(0, 4, 2), torch.zeros(4, dtype=torch.long), 1, bins=1)
    with pytest.raises(CriterionError, match="4 samples but 3 labels"):
        su(drawn(0, 4, 2), torch.zeros(3, dtype=torch.long), 1)
