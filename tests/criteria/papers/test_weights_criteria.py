"""Criteria of weights, each against its equation written as a slow loop."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateur.criteria import get
from secateur.criteria.papers.he2019fpgm import fpgm
from secateur.criteria.papers.li2017l1 import l1, l2, random
from secateur.criteria.papers.molchanov2019taylor import taylor
from secateur.errors import UsageError

seeds = st.integers(0, 2**31 - 1)


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(seeds)
def test_norms_are_sums_over_the_filter(seed: int) -> None:
    rows = drawn(seed, 4, 7)
    for i, row in enumerate(rows.tolist()):
        assert l1(rows)[i] == pytest.approx(sum(abs(w) for w in row))
        assert l2(rows)[i] == pytest.approx(sum(w * w for w in row) ** 0.5)


def test_random_is_a_permutation_that_the_seed_fixes() -> None:
    rows = torch.zeros(9, 2)
    first, again, other = (random(rows, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert sorted((first * 9).round().tolist()) == list(range(1, 10))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_fpgm_by_hand() -> None:
    scores = fpgm(torch.tensor([[0.0], [1.0], [10.0]]))
    assert int(scores.argmin()) == 1
    # Unpowered weights: squared ones would score 1, -1, 5 as 24, 24, 48.
    torch.testing.assert_close(fpgm(torch.tensor([[1.0], [-1.0], [5.0]])), torch.tensor([6.0, 8.0, 10.0]).double())


@given(seeds)
def test_fpgm_sums_distances(seed: int) -> None:
    rows = drawn(seed, 5, 3)
    for i in range(5):
        expected = sum(float(sum((rows[i, f] - rows[j, f]) ** 2 for f in range(3))) ** 0.5 for j in range(5))
        assert fpgm(rows)[i] == pytest.approx(expected)


@given(seeds)
def test_taylor_is_the_squared_first_order_change(seed: int) -> None:
    rows, gradients = drawn(seed, 4, 6), drawn(seed + 1, 4, 6)
    for i in range(4):
        changes = [float(rows[i, f] * gradients[i, f]) for f in range(6)]
        assert taylor(rows, gradients)[i] == pytest.approx(sum(changes) ** 2)
        assert taylor(rows, gradients, "sum")[i] == pytest.approx(sum(c * c for c in changes))
    with pytest.raises(UsageError, match="Use gate or sum"):
        taylor(rows, gradients, "product")


@pytest.mark.parametrize("name", ["l1", "l2", "fpgm", "taylor"])
@given(seed=seeds)
def test_permuting_filters_permutes_scores(name: str, seed: int) -> None:
    rows, order = drawn(seed, 6, 5), torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    extra = {"gradients": drawn(seed + 1, 6, 5)} if name == "taylor" else {}
    scores = get(name).function(filters=rows, **extra)
    permuted = get(name).function(filters=rows[order], **{k: v[order] for k, v in extra.items()})
    torch.testing.assert_close(permuted, scores[order])


def test_scores_are_of_fp64_whatever_the_weights_are() -> None:
    rows = drawn(3, 4, 6)
    for name, dtype in itertools.product(("l1", "l2", "fpgm"), (torch.float16, torch.bfloat16, torch.float32)):
        assert get(name).function(filters=rows.to(dtype)).dtype == torch.float64
