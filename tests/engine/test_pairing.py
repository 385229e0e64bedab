"""Episodes on networks: coupled groups, constraints, and the regulariser over the selected pairs only."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc
from secateur.criteria.papers import singh2020cfp as cfp
from secateur.engine import CorrelationRegulariser, largest_correlations, pairing
from secateur.engine.settings import Share
from secateur.errors import CriterionError
from secateur.graph import cost
from tests.cases import Case, one_in
from tests.engine.nets import Residual, Small

X = torch.zeros(1, 1, 8, 8)


def residual() -> tuple[nn.Module, sc.ChannelGraph]:
    torch.manual_seed(3)
    model = Residual()
    return model, sc.trace(model, X)


def slow_rho(weight: Tensor, i: int, j: int) -> float:
    return float(np.corrcoef(weight[i].detach().flatten().numpy(), weight[j].detach().flatten().numpy())[0, 1])


def test_a_coupled_group_is_scored_over_its_producers() -> None:
    model, graph = residual()
    stream = graph.group("stem")
    stem, outer = model.get_parameter("stem.weight"), model.get_parameter("outer.weight")
    macs = {"stem": 64 * 9 * 8, "outer": 64 * 6 * 8}
    shares = {"mean": (0.5, 0.5), "first": (1.0, 0.0), "macs": tuple(v / sum(macs.values()) for v in macs.values())}
    for share, (a, b) in shares.items():
        for signed in (False, True):
            found = pairing.correlations(model, graph, stream, share=share, signed=signed)  # type: ignore[arg-type]
            assert found is not None
            for i, j in ((0, 1), (2, 7), (5, 3)):
                r, s = slow_rho(stem, i, j), slow_rho(outer, i, j)
                expected = a * r + b * s if signed else a * abs(r) + b * abs(s)
                assert float(found[i, j]) == pytest.approx(expected, abs=1e-6)


def test_pairs_by_residual_are_the_means_over_producers_and_spare_what_weighs() -> None:
    model, graph = residual()
    stream = graph.group("stem")
    weights = [model.get_parameter(name) for name in ("stem.weight", "outer.weight")]
    with torch.no_grad():
        for weight in weights:
            weight[6] *= 0.01
            weight[2] *= 0.1
    for signed in (False, True):
        lost = torch.stack([cfp.residual(w.detach(), signed=signed).double() for w in weights]).mean(0)
        expected = -lost / lost.max()
        found = pairing.correlations(model, graph, stream, share="mean", signed=signed, order="residual")
        assert found is not None
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        pairs = pairing.select_pairs(model, graph, stream, 2, share="mean", signed=signed, order="residual")
        assert [d for d, _ in pairs] == [6, 2], "the filters of least weight are the least lost"


def test_which_groups_may_go() -> None:
    _, graph = residual()
    assert [g.name for g in pairing.eligible(graph)] == ["stem", "inner"]
    assert [g.name for g in pairing.eligible(graph, internal_only=True)] == ["inner"]
    words = ("inn", "i*er", "Conv2d", "onner")
    assert [pairing.known(graph, word) for word in words] == [True, True, True, False]
    small = sc.trace(Small(), X)
    assert [g.name for g in pairing.eligible(small)] == ["conv1", "conv2"]
    assert [g.name for g in pairing.eligible(small, linear=True)] == ["conv1", "conv2", "fc1"]


class Functional(nn.Module):
    """All layers are calls of functions, within one module."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(6, 1, 3, 3))
        self.depthwise = nn.Parameter(torch.randn(6, 1, 3, 3))
        self.second = nn.Parameter(torch.randn(8, 6, 3, 3))
        self.head = nn.Parameter(torch.randn(3, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.conv2d(x, self.first))
        x = F.relu(F.conv2d(x, self.depthwise, groups=x.shape[1]))
        return F.linear(F.relu(F.conv2d(x, self.second)).mean((2, 3)), self.head)


def test_layers_that_are_calls_of_functions_are_told_apart() -> None:
    model = Functional()
    graph = sc.trace(model, X)
    names = ["first", "depthwise", "second", "head"]
    assert [layer.module for layer in cost.layer_costs(graph)] == names
    side = X.shape[-1]
    expected = [9 * 6 * (side - 2) ** 2, 9 * 6 * (side - 4) ** 2, 9 * 48 * (side - 6) ** 2, 24]
    assert pairing.layer_macs(graph) == dict(zip(names, expected, strict=True))
    assert [g.name for g in pairing.eligible(graph)] == ["first", "second"]
    assert set(pairing.largest_correlations(model, graph)) == set(names)
    batches = [(X, torch.zeros(len(X), dtype=torch.long))]
    result = sc.compress(
        model,
        "cfp",
        train=batches,
        validation=batches,
        widths={"first": 4, "second": 5},
        optimise_epochs=0,
        finetune_epochs=0,
    )
    assert result.report["final"]["widths"] == {"first": 4, "depthwise": 4, "second": 5, "head": 3}
    assert [layer["parameters"] for layer in result.report["final"]["layers"]] == [36, 36, 180, 15]


class Shuffled(nn.Module):
    """A grouped convolution reads the channels in blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 12, 3)
        self.second = nn.Conv2d(12, 8, 3, groups=2)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(F.relu(self.second(F.relu(self.first(x)))).mean((2, 3)))
        return out


def test_blocks_lose_equal_fractions_and_pair_inside() -> None:
    torch.manual_seed(0)
    model = Shuffled()
    graph = sc.trace(model, X)
    group = graph.group("first")
    assert pairing.totals(group) == [2, 4, 6, 8, 10]
    for count, expected in ((1, 2), (3, 4), (4, 4), (100, 10)):
        pairs = pairing.select_pairs(model, graph, group, count, share="mean", signed=False)
        assert len(pairs) == expected
        assert all(group.blocks[d] == group.blocks[k] for d, k in pairs)
        sc.plan_removal(graph, {"first": [d for d, _ in pairs]})
        assert pairing.whole(group, count) == expected
    assert pairing.most_removable(group, 5) == 6
    assert pairing.totals(group, round_to=4) == [4, 8]
    assert (pairing.whole(group, 1, round_to=4), pairing.whole(group, 5, floor=6, round_to=4)) == (4, 4)
    assert pairing.whole(group, 3, floor=10, round_to=4) == 0


@pytest.mark.filterwarnings("ignore")  # what torch says of old layers is no business of this test
@pytest.mark.parametrize("case", one_in(6), ids=lambda c: c.name)
def test_every_selection_is_a_valid_plan(case: Case) -> None:
    torch.manual_seed(0)
    model = case.build()
    graph = sc.trace(model, case.inputs())
    select(model, graph, "correlation")
    select(model, graph, "residual")


def select(model: nn.Module, graph: sc.ChannelGraph, order: cfp.Order) -> None:
    """Select pairs of every group, and check each pair and the plan."""
    removed = {}
    for group in pairing.eligible(graph, linear=True):
        pairs = pairing.select_pairs(
            model, graph, group, max(1, group.size // 3), share="mean", signed=False, order=order
        )
        if pairs:
            removed[group.name] = [d for d, _ in pairs]
            assert not {d for d, _ in pairs} & {k for _, k in pairs}
            assert bool(group.removable[removed[group.name]].all())
            sources = pairing.producers(model, graph, group)
            made = [tuple(bool(s.index[c] >= 0) for s in sources) for c in range(group.size)]
            assert all(made[d] == made[k] for d, k in pairs), "channels of different layers are no partners"
            assert 0 < float(CorrelationRegulariser(model, graph, {group.name: pairs})().detach()) <= len(pairs)
    sc.plan_removal(graph, removed)


@pytest.mark.parametrize("form", ["paper", "pair", "layer_mean", "log"])
@pytest.mark.parametrize("share", ["mean", "macs", "first"])
def test_regulariser_is_the_slow_sum_and_its_gradient(form: cfp.Form, share: Share) -> None:
    model, graph = residual()
    model.double()
    pairs = {"stem": [(0, 1), (2, 1), (5, 6)], "inner": [(3, 2)]}
    fast = CorrelationRegulariser(model, graph, pairs, form=form, strength=0.7, share=share)
    value = fast()
    value.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    layers = []
    for name, chosen in pairs.items():
        sources = pairing.producers(model, graph, graph.group(name), share)
        total = sum(s.weight for s in sources)
        scores = []
        for d, k in chosen:
            score = torch.zeros((), dtype=torch.float64)
            for s in sources:
                w = model.get_parameter(f"{s.slices.layer}.weight").flatten(1)
                a, b = w[d] - w[d].mean(), w[k] - w[k].mean()
                score = score + s.weight / total * (a @ b / (a.norm() * b.norm())).abs()
            scores.append(score)
        layers.append(torch.stack(scores))
    flat = torch.cat(layers)
    slow = 0.7 * {
        "paper": torch.exp(-flat.sum()), "pair": sum(torch.exp(-r) for r in flat), "log": -flat.sum(),
        "layer_mean": sum(torch.exp(-layer.mean()) for layer in layers),
    }[form]  # fmt: skip
    assert float(value.detach()) == pytest.approx(float(slow.detach()), rel=1e-12)
    assert fast.minimum == pytest.approx(float(flat.detach().min()), rel=1e-12)
    slow.backward()  # type: ignore[union-attr]
    for name, p in model.named_parameters():
        expected = p.grad if p.grad is not None else torch.zeros_like(p)
        assert torch.allclose(gradients.get(name, torch.zeros_like(p)), expected, atol=1e-12), name
    # Only the filters of the pairs move.
    touched = gradients["inner.weight"].flatten(1).abs().sum(1) > 0
    assert torch.nonzero(touched).flatten().tolist() == [2, 3]


def test_regulariser_alone_brings_every_pair_together() -> None:
    model, graph = residual()
    pairs = {
        g.name: pairing.select_pairs(model, graph, g, 3, share="mean", signed=False) for g in pairing.eligible(graph)
    }
    regulariser = CorrelationRegulariser(model, graph, pairs)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    first = regulariser.by_group()
    for _ in range(400):
        optimizer.zero_grad()
        regulariser().backward()
        optimizer.step()
    assert min(min(v) for v in first.values()) < 0.8
    assert regulariser.minimum > 0.99


def test_signed_regulariser_turns_a_negative_pair_round() -> None:
    model, graph = residual()
    weight = model.get_parameter("inner.weight")
    with torch.no_grad():
        weight[1] = -weight[0] + 0.3 * torch.randn_like(weight[0])
    regulariser = CorrelationRegulariser(model, graph, {"inner": [(1, 0)]}, signed=True)
    assert regulariser.by_group()["inner"][0] < 0
    regulariser().backward()
    with torch.no_grad():
        assert weight.grad is not None
        weight -= 0.01 * weight.grad
    after = regulariser.by_group()["inner"][0]
    with torch.no_grad():
        weight += 0.01 * weight.grad
    assert after > regulariser.by_group()["inner"][0]


def test_regulariser_is_fp32_under_autocast() -> None:
    model, graph = residual()
    regulariser = CorrelationRegulariser(model, graph, {"inner": [(1, 0)]})
    plain = regulariser()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = regulariser()
    assert mixed.dtype == torch.float32
    assert torch.equal(plain, mixed)


def test_an_empty_episode_is_refused() -> None:
    model, graph = residual()
    with pytest.raises(CriterionError, match="no pair"):
        CorrelationRegulariser(model, graph, {"inner": []})


def test_largest_correlations_are_numpys() -> None:
    model = Small()
    found = largest_correlations(model, sc.trace(model, X))
    assert list(found) == ["conv1", "conv2", "fc1", "fc2"]
    for name, value in found.items():
        rho = np.abs(np.corrcoef(model.get_parameter(f"{name}.weight").detach().flatten(1).numpy()))
        np.fill_diagonal(rho, 0)
        assert value == pytest.approx(rho.max(), abs=1e-5)


def test_a_duplicate_filter_is_the_first_pair() -> None:
    torch.manual_seed(0)
    model = Small()
    with torch.no_grad():
        for name in ("conv2.weight", "conv2.bias"):
            tensor = model.get_parameter(name)
            tensor[7] = tensor[4]
    graph = sc.trace(model, X)
    ((dropped, kept),) = pairing.select_pairs(model, graph, graph.group("conv2"), 1, share="mean", signed=False)
    assert {dropped, kept} == {4, 7}
    rho = pairing.correlations(model, graph, graph.group("conv2"), share="mean", signed=False)
    assert rho is not None
    assert math.isclose(float(rho[4, 7]), 1, abs_tol=1e-6)
