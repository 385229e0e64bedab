"""CFP's pure functions against the equations, in slow loops and in other people's code."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.criteria.papers import singh2020cfp as cfp
from secateur.errors import CriterionError


def slow_pearson(w: torch.Tensor) -> torch.Tensor:
    """Eq. 7, element by element."""
    rows = w.flatten(1).double().tolist()
    out = torch.eye(len(rows), dtype=torch.float64)
    for i, a in enumerate(rows):
        for j, b in enumerate(rows):
            if i == j:
                continue
            ma, mb = sum(a) / len(a), sum(b) / len(b)
            top = sum((x - ma) * (y - mb) for x, y in zip(a, b, strict=True))
            low = math.sqrt(sum((x - ma) ** 2 for x in a)) * math.sqrt(sum((y - mb) ** 2 for y in b))
            out[i, j] = top / low if low > 1e-12 else 0.0
    return out


SHAPES = [(2, 1, 1, 2), (5, 3, 3, 3), (20, 1, 5, 5), (7, 10), (4, 2, 1, 3)]


@pytest.mark.parametrize("shape", SHAPES)
def test_pearson_is_equation_7_and_numpy(shape: tuple[int, ...]) -> None:
    w = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    rho = cfp.pearson(w)
    assert torch.allclose(rho, slow_pearson(w), atol=1e-12)
    assert np.allclose(rho.numpy(), np.corrcoef(w.flatten(1).numpy()), atol=1e-12)
    assert torch.equal(rho, rho.T)
    assert torch.equal(rho.diagonal(), torch.ones(shape[0], dtype=torch.float64))
    assert torch.linalg.eigvalsh(rho).min() > -1e-12


@given(
    scale=st.floats(0.01, 100).flatmap(lambda a: st.sampled_from([a, -a])),
    shift=st.floats(-10, 10),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=50, deadline=None)
def test_affine_change_of_a_filter_changes_only_the_sign(scale: float, shift: float, seed: int) -> None:
    w = torch.randn(4, 3, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    changed = w.clone()
    changed[1] = scale * w[1] + shift
    sign = torch.ones(4, dtype=torch.float64)
    sign[1] = math.copysign(1.0, scale)
    assert torch.allclose(cfp.pearson(changed), cfp.pearson(w) * sign[:, None] * sign[None, :], atol=1e-8)


def test_duplicate_filter_has_correlation_one() -> None:
    w = torch.randn(4, 3, 3, 3, dtype=torch.float64)
    w[2] = w[0]
    assert abs(float(cfp.pearson(w)[0, 2]) - 1) < 1e-14


@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3])
def test_constant_filter_has_no_correlation_and_no_gradient(value: float) -> None:
    w = torch.randn(3, 27)
    w[1] = value
    w.requires_grad_()
    rho = cfp.pearson(w)
    assert rho[1].tolist() == [0.0, 1.0, 0.0]
    pair = cfp.pair_correlation(w[[0, 1]], w[[1, 2]])
    assert pair.tolist() == [0.0, 0.0]
    pair.sum().backward()
    assert w.grad is not None
    assert torch.isfinite(w.grad).all()


def test_pairs_only_equals_the_full_matrix() -> None:
    w = torch.randn(9, 4, 3, 3, dtype=torch.float64)
    i, j = torch.triu_indices(9, 9, offset=1)
    rows = w.flatten(1)
    assert torch.allclose(cfp.pair_correlation(rows[i], rows[j]), cfp.pearson(w)[i, j], atol=1e-14)


@pytest.mark.parametrize("seed", range(5))
def test_gradient_of_rho(seed: int) -> None:
    """Orthogonal to w and to 1, of norm sqrt(1-ρ²)/||w - mean||, and zero at |ρ| = 1."""
    generator = torch.Generator().manual_seed(seed)
    w, v = torch.randn(2, 27, dtype=torch.float64, generator=generator)
    w.requires_grad_()
    rho = cfp.pair_correlation(w[None], v[None]).sum()
    (gradient,) = torch.autograd.grad(rho, w)
    centred = (w - w.mean()).detach()
    expected = math.sqrt(1 - float(rho.detach()) ** 2) / float(centred.norm())
    assert abs(float(gradient @ w.detach())) < 1e-12
    assert abs(float(gradient.sum())) < 1e-12
    assert abs(float(gradient.norm()) - expected) < 1e-12
    for factor in (2.0, -0.5):
        (gradient,) = torch.autograd.grad(cfp.pair_correlation(w[None], (factor * w.detach() + 3)[None]).sum(), w)
        assert float(gradient.norm()) < 1e-7


def test_regulariser_forms_from_the_equations() -> None:
    rho = [torch.rand(3, dtype=torch.float64), torch.rand(1, dtype=torch.float64), torch.rand(0, dtype=torch.float64)]
    values = [float(r) for layer in rho for r in layer]
    paper = float(cfp.regulariser(rho, "paper"))
    assert paper == pytest.approx(math.exp(-sum(values)), rel=1e-12)
    assert paper == pytest.approx(math.prod(math.exp(-v) for v in values), rel=1e-12)
    assert float(cfp.regulariser(rho, "log")) == pytest.approx(math.log(paper), rel=1e-12)
    assert float(cfp.regulariser(rho, "pair")) == pytest.approx(sum(math.exp(-v) for v in values), rel=1e-12)
    mean = math.exp(-sum(values[:3]) / 3) + math.exp(-values[3])
    assert float(cfp.regulariser(rho, "layer_mean")) == pytest.approx(mean, rel=1e-12)


@pytest.mark.parametrize("pairs", [1, 2, 5, 9])
def test_paper_form_at_full_correlation(pairs: int) -> None:
    assert float(cfp.regulariser([torch.ones(pairs, dtype=torch.float64)], "paper")) == pytest.approx(math.exp(-pairs))


def test_forms_agree_at_one_pair() -> None:
    rho = [torch.tensor([0.37], dtype=torch.float64)]
    values = {form: float(cfp.regulariser(rho, form)) for form in ("paper", "pair", "layer_mean")}  # type: ignore[arg-type]
    assert len({round(v, 15) for v in values.values()}) == 1


def test_pair_form_gives_each_pair_the_gradient_of_a_lone_pair() -> None:
    rho = torch.rand(63, dtype=torch.float64, requires_grad=True)
    (many,) = torch.autograd.grad(cfp.regulariser([rho], "pair"), rho)
    for k in (0, 31, 62):
        lone = rho[k : k + 1].detach().requires_grad_()
        (alone,) = torch.autograd.grad(cfp.regulariser([lone], "paper"), lone)
        assert float(many[k]) == pytest.approx(float(alone), rel=1e-12)


def test_paper_form_warns_above_ten(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        cfp.regulariser([torch.full((10,), 1.0)], "paper")
        assert not caplog.records
        cfp.regulariser([torch.full((11,), 1.0)], "paper")
    assert "11.0, above 10" in caplog.records[0].getMessage()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast_compute_in_fp32(dtype: torch.dtype) -> None:
    w = torch.randn(6, 3, 3, 3)
    assert cfp.pearson(w.to(dtype)).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        full = cfp.pearson(w)
        pair = cfp.pair_correlation(w.flatten(1)[:3], w.flatten(1)[3:])
        total = cfp.regulariser([pair.abs()], "pair")
    assert full.dtype == pair.dtype == total.dtype == torch.float32
    assert torch.equal(full, cfp.pearson(w))


def test_group_score_means() -> None:
    first, second = cfp.pearson(torch.randn(4, 9)), cfp.pearson(torch.randn(4, 25))
    assert torch.allclose(cfp.group_score([first, second]), (first.abs() + second.abs()) / 2)
    assert torch.allclose(cfp.group_score([first, second], [3, 1]), 0.75 * first.abs() + 0.25 * second.abs())
    assert torch.allclose(cfp.group_score([first, second], [1, 0]), first.abs())
    assert torch.allclose(cfp.group_score([first], signed=True), first)


@pytest.mark.parametrize("signed", [False, True])
def test_residual_is_what_least_squares_leaves(signed: bool) -> None:
    w = torch.randn(5, 3, 2, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    w[3] = -2 * w[1] + 0.5
    w[4] = 0.01 * w[4]
    rows = w.flatten(1).numpy()
    found = cfp.residual(w, signed=signed)
    for p in range(5):
        for k in range(5):
            columns = np.stack([rows[k], np.ones(12)], axis=1)
            factors = np.linalg.lstsq(columns, rows[p], rcond=None)[0]
            if signed and factors[0] < 0:
                factors = np.array([0.0, rows[p].mean()])  # a negative multiple can't stand in, so that nothing does
            left = rows[p] - columns @ factors
            assert float(found[p, k]) == pytest.approx(float(left @ left), abs=1e-12)
    assert (float(found[3, 1]) < 1e-12) is not signed


def test_residual_orders_filters_of_one_norm_by_correlation() -> None:
    w = torch.randn(8, 27, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    w -= w.mean(dim=1, keepdim=True)
    w /= w.norm(dim=1, keepdim=True)
    upper = torch.triu_indices(8, 8, offset=1)
    rho = cfp.pearson(w).abs()[upper[0], upper[1]]
    lost = cfp.residual(w)[upper[0], upper[1]]
    assert rho.argsort(descending=True).tolist() == lost.argsort().tolist()


def slow_elimination(lost: np.ndarray, count: int, removable: np.ndarray) -> list[tuple[int, int]]:
    left = list(range(len(lost)))
    gone = []
    for _ in range(count):
        costs = {p: min(lost[p, k] for k in left if k != p) for p in left if removable[p]}
        goes = min(costs, key=lambda p: (costs[p], -p))
        left.remove(goes)
        gone.append(goes)
    return [(p, min(left, key=lambda k: lost[p, k])) for p in gone]


@given(size=st.integers(2, 9), seed=st.integers(0, 2**32 - 1), data=st.data())
@settings(max_examples=60, deadline=None)
def test_the_least_lost_go_each_with_a_surviving_partner(size: int, seed: int, data: st.DataObject) -> None:
    generator = np.random.default_rng(seed)
    lost = generator.integers(0, 6, (size, size)).astype(float)  # with ties
    removable = generator.random(size) < 0.8
    count = data.draw(st.integers(0, min(int(removable.sum()), size - 1)))
    table = torch.from_numpy(lost)
    pairs = cfp.select_least_lost(table, count, removable=torch.from_numpy(removable))
    assert pairs == slow_elimination(lost, count, removable)
    dropped, kept = [d for d, _ in pairs], {k for _, k in pairs}
    assert len(set(dropped)) == count
    assert not kept & set(dropped)
    assert all(removable[dropped])
    assert torch.equal(table, torch.from_numpy(lost))


def test_the_least_lost_of_two_alike_is_the_lighter() -> None:
    w = torch.randn(4, 9, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    w[2] = 0.3 * w[0]
    assert cfp.select_least_lost(cfp.residual(w), 1) == [(2, 0)]
    blocks = torch.tensor([0, 1, 0, 1])
    inside = cfp.select_least_lost(cfp.residual(w), 2, blocks=blocks)
    assert inside[0] == (2, 0)
    assert inside[1][0] in (1, 3)
    assert inside[1][1] in (1, 3)


def test_star_graph_drops_the_hub() -> None:
    rho = torch.full((6, 6), 0.1)
    hub = 3
    for leaf, value in ((0, 0.9), (4, 0.8), (5, 0.7)):
        rho[hub, leaf] = rho[leaf, hub] = value
    # A leaf whose other correlations sum to more than the hub's does not change who is in several top pairs.
    for other in (1, 2, 4, 5):
        rho[0, other] = rho[other, 0] = 0.69
    assert cfp.select_pairs(rho, 1) == [(hub, 0)]


def test_ties_by_sum_then_norm_then_index() -> None:
    rho = torch.eye(6)
    for i, j, value in ((0, 1, 0.9), (2, 3, 0.8), (4, 5, 0.7)):
        rho[i, j] = rho[j, i] = value
    assert cfp.select_pairs(rho, 3) == [(1, 0), (3, 2), (5, 4)]
    assert cfp.select_pairs(rho, 3, norms=torch.tensor([1.0, 2, 2, 1, 1, 1])) == [(0, 1), (3, 2), (5, 4)]
    rho[0, 4] = rho[4, 0] = 0.2
    assert cfp.select_pairs(rho, 3, norms=torch.tensor([2.0, 1, 2, 1, 1, 2]))[0] == (0, 1)
    assert cfp.select_pairs(rho, 3, norms=torch.tensor([2.0, 1, 2, 1, 2, 1]))[2] == (4, 5)


def slow_selection(rho: np.ndarray, count: int, norms: np.ndarray) -> list[tuple[int, int]]:
    """The rule in words, for at most half the filters."""
    size = len(rho)
    pairs = sorted(((i, j) for i in range(size) for j in range(i + 1, size)), key=lambda p: (-rho[p], p))
    top = pairs[: max(count, 3)]
    chosen: list[tuple[int, int]] = []
    for i, j in pairs:
        dropped = {d for d, _ in chosen}
        locked = {k for _, k in chosen}
        if i in dropped or j in dropped or (i in locked and j in locked) or len(chosen) == count:
            continue

        def key(f: int) -> tuple[float, ...]:
            return (sum(f in p for p in top), sum(rho[f, g] for g in range(size) if g != f), -norms[f], f)

        goes = j if i in locked else i if j in locked else max((i, j), key=key)
        chosen.append((goes, i + j - goes))
    return chosen


@pytest.mark.parametrize("seed", range(20))
def test_selection_is_the_rule(seed: int) -> None:
    w = torch.randn(12, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    rho, norms = cfp.pearson(w).abs(), w.abs().sum(1)
    for count in range(1, 6):
        assert cfp.select_pairs(rho, count, norms=norms) == slow_selection(rho.numpy(), count, norms.numpy())


@given(size=st.integers(2, 14), seed=st.integers(0, 2**31), data=st.data())
@settings(max_examples=150, deadline=None)
def test_exactly_count_filters_go_each_with_a_surviving_partner(size: int, seed: int, data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(seed)
    rho = cfp.pearson(torch.randn(size, 5, generator=generator)).abs()
    if data.draw(st.booleans()):
        rho = (rho * 4).round() / 4  # many ties
    removable = torch.rand(size, generator=generator) < data.draw(st.sampled_from([0.5, 1.1]))
    most = min(int(removable.sum()), size - 1)
    count = data.draw(st.integers(0, most))
    pairs = cfp.select_pairs(rho, count, removable=removable)
    dropped, kept = {d for d, _ in pairs}, {k for _, k in pairs}
    assert len(pairs) == len(dropped) == count
    assert not dropped & kept
    assert all(bool(removable[d]) for d in dropped)
    with pytest.raises(CriterionError, match=f"cannot drop {most + 1}"):
        cfp.select_pairs(rho, most + 1, removable=removable)


@pytest.mark.parametrize("seed", range(10))
def test_permuting_filters_permutes_the_selection(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(10, 8, dtype=torch.float64, generator=generator)
    order = torch.randperm(10, generator=generator)
    plain = cfp.select_pairs(cfp.pearson(w).abs(), 4, norms=w.abs().sum(1))
    moved = cfp.select_pairs(cfp.pearson(w[order]).abs(), 4, norms=w[order].abs().sum(1))
    assert [(int(order[d]), int(order[k])) for d, k in moved] == plain


def test_blocks_lose_the_same_fraction_with_partners_inside() -> None:
    rho = cfp.pearson(torch.randn(12, 9)).abs()
    blocks = torch.arange(12) % 3
    pairs = cfp.select_pairs(rho, 6, blocks=blocks)
    assert sorted(int(blocks[d]) for d, _ in pairs) == [0, 0, 1, 1, 2, 2]
    assert all(blocks[d] == blocks[k] for d, k in pairs)
    with pytest.raises(CriterionError, match="not a multiple of 3"):
        cfp.select_pairs(rho, 4, blocks=blocks)
    uneven = torch.tensor([0] * 8 + [1] * 4)
    pairs = cfp.select_pairs(rho, 6, blocks=uneven)
    assert sorted(int(uneven[d]) for d, _ in pairs) == [0, 0, 0, 0, 1, 1]
    assert all(uneven[d] == uneven[k] for d, k in pairs)


def test_counts() -> None:
    assert [cfp.pairs_by_width(w) for w in (2, 16, 20, 32, 50, 64, 500)] == [1, 1, 1, 2, 3, 4, 31]
    assert cfp.pairs_by_macs([100, 100, 100], [16, 32, 64], 1 / 16) == [2, 2, 2]
    assert cfp.pairs_by_macs([1000, 1], [2, 100]) == [1, 1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cfp.pearson(torch.ones(3, 1, 1, 1)), "at least 2 elements"),
        (lambda: cfp.pearson(torch.ones(3, 4, dtype=torch.int64)), "floating point"),
        (lambda: cfp.pearson(torch.ones(3)), "shape"),
        (lambda: cfp.pearson(torch.tensor([[1.0, 2.0], [float("nan"), 1.0]])), "NaN"),
        (lambda: cfp.correlated_pairs((torch.tensor([[1.0, 2.0], [2.0, float("inf")], [3.0, 1.0]]),), 1), "NaN"),
        (lambda: cfp.regulariser([torch.ones(2)], "square"), "unknown form 'square'"),  # type: ignore[arg-type]
        (lambda: cfp.regulariser([torch.ones(0)]), "no pair"),
        (lambda: cfp.select_pairs(torch.ones(3, 4), 1), "square"),
        (lambda: cfp.select_pairs(torch.full((3, 3), float("nan")), 1), "finite"),
        (lambda: cfp.pairs_by_width(16, 0.0), "fraction"),
        (lambda: cfp.pairs_by_macs([1], [2, 3]), "every layer"),
        (lambda: cfp.group_score([]), "at least one producer"),
        (lambda: cfp.group_score([torch.ones(2)], [0.0]), "producers need"),
        (lambda: cfp.group_score([torch.ones(2), torch.ones(3)]), "same number"),
    ],
)
def test_bad_input_is_one_clear_line(call: object, message: str) -> None:
    with pytest.raises(CriterionError, match=message) as caught:
        call()  # type: ignore[operator]
    assert "\n" not in str(caught.value)
