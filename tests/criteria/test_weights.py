"""Filters of layers whose weights are laid out in blocks or computed at each forward, against slow derivations."""

from __future__ import annotations

import copy
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import secateur as sc
from secateur.criteria import scoring, weights
from secateur.criteria.papers.li2017l1 import l1, l2
from secateur.criteria.registry import NotDefinedError
from secateur.errors import CriterionError, DataError, UsageError
from secateur.graph.channels import ChannelGraph
from secateur.tracing.tracing import trace
from tests.cases.table import Net, conv, pooled
from tests.criteria.networks import NETWORKS, Y

COMPUTED = [name for name, network in NETWORKS.items() if network.kind == "computed"]
TRANSPOSED = [name for name, network in NETWORKS.items() if network.kind == "transposed"]


def traced(name: str) -> tuple[Any, ChannelGraph, Tensor]:
    torch.manual_seed(0)
    model, x = NETWORKS[name].build().double().eval(), NETWORKS[name].inputs.double()
    return model, trace(model, x), x


def response(layer: nn.Module, channel: int, x: Tensor) -> Tensor:
    """The weights that make an output channel, by differentiating one of its values by the inputs that it reads."""
    x = x.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(layer(x)[0, channel].sum(), x)
    return gradient


@pytest.mark.parametrize("name", TRANSPOSED)
def test_filters_of_transposed_blocks_are_what_makes_a_channel(name: str) -> None:
    model, graph, _ = traced(name)
    group = next(group for group in graph.groups if group.name == "t")
    layer = model.t
    groups, width = layer.groups, layer.weight.shape[1]
    own = weights.producers(model, graph, group)[0]
    assert own.shape == (layer.out_channels, layer.in_channels // groups * layer.weight[0, 0].numel())
    for channel in range(layer.out_channels):
        block, place = divmod(channel, width)
        inputs = range(block * layer.in_channels // groups, (block + 1) * layer.in_channels // groups)
        assert torch.equal(own[channel], torch.cat([layer.weight[i, place].flatten() for i in inputs]).detach())
        # The channel depends on these inputs alone.
        x = torch.zeros(1, layer.in_channels, *[5] * (layer.weight.dim() - 2), dtype=torch.float64)
        read = response(layer, channel, x).flatten(2)[0, :, 0] != 0
        assert read.nonzero().flatten().tolist() == list(inputs)


@pytest.mark.parametrize("name", TRANSPOSED)
def test_norms_of_transposed_blocks(name: str) -> None:
    model, graph, _ = traced(name)
    layer, group = model.t, graph.group("t")
    scores = scoring.score(model, graph, "l2")["t"]
    expected = torch.zeros(group.size, dtype=torch.float64)
    for other in (m for m in model.modules() if isinstance(m, weights.TRANSPOSED) and m.out_channels == group.size):
        width = other.weight.shape[1]
        for i, o in ((i, o) for i in range(other.in_channels) for o in range(width)):
            block = i // (other.in_channels // other.groups)
            expected[block * width + o] += other.weight[i, o].detach().square().sum()
    if sum(m.out_channels == group.size for m in model.modules() if isinstance(m, weights.TRANSPOSED)) == len(
        group.producers
    ):
        torch.testing.assert_close(scores, expected.sqrt())
    assert layer.groups > 1


@pytest.mark.parametrize("name", COMPUTED)
def test_filters_of_computed_weights_are_those_that_are_applied(name: str) -> None:
    model, graph, x = traced(name)
    first, second = model[0], model[2]
    # What the layer does tells its weight: its response to single ones.
    kernel = torch.zeros(27, 3, 3, 3, dtype=torch.float64)
    kernel.view(27, 27).copy_(torch.eye(27))
    applied = (first(kernel) - first.bias.view(1, -1, 1, 1)).flatten(1).T
    torch.testing.assert_close(weights.filters(model, graph, graph.group("0")), applied.detach())
    (read,) = weights.consumers(model, graph, graph.group("0"))
    model(x)  # a mask's attribute is that of the last forward
    torch.testing.assert_close(read, second.weight.detach().flatten(2))
    scores = scoring.score(model, graph, "l1")
    torch.testing.assert_close(scores["0"], applied.detach().abs().sum(1))
    maps = first(x).relu().detach()
    found = scoring.score(model, graph, "hrank", [x], groups=["0"])["0"]
    expected = torch.linalg.matrix_rank(maps).double().mean(0)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", COMPUTED)
def test_taylor_of_computed_weights_is_that_of_the_weights_applied(name: str) -> None:
    model, graph, x = traced(name)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    scores = scoring.score(model, graph, "taylor", [(x, Y)])
    model(x)  # a mask's attribute is that of the last forward
    weight = model[0].weight.detach().clone().requires_grad_(True)
    maps = F.conv2d(x, weight, model[0].bias)
    F.cross_entropy(model[1:](maps), Y).backward()
    assert weight.grad is not None
    expected = (weight * weight.grad).detach().flatten(1).sum(1).square()
    torch.testing.assert_close(scores["0"], expected)
    assert not any(p.requires_grad for p in model.parameters())


def test_a_masked_network_can_be_copied_after_taylor() -> None:
    model, graph, x = traced("masked")
    with torch.no_grad():
        model(x)
    before = model[0].weight
    scoring.score(model, graph, "taylor", [(x, Y)])
    assert model[0].weight is before
    copy.deepcopy(model)


def test_a_mask_is_read_as_the_next_forward_applies_it() -> None:
    model, graph, _ = traced("masked")
    with torch.no_grad():
        model[0].weight_orig.mul_(2)  # as a step of training does: the attribute is that of the last forward
    found = weights.filters(model, graph, graph.group("0"))
    assert torch.equal(found, (model[0].weight_orig * model[0].weight_mask).detach().flatten(1))
    prune.remove(model[0], "weight")  # type: ignore[no-untyped-call]
    plain = trace(model, torch.randn(2, 3, 16, 16).double())
    assert torch.equal(weights.filters(model, plain, plain.group("0")), found)


def test_filters_that_are_a_weights_rows_are_no_copy() -> None:
    model = nn.Sequential(conv(3, 6), nn.ReLU(), conv(6, 4))
    graph = trace(model, torch.randn(1, 3, 8, 8))
    found = weights.filters(model, graph, graph.group("0"))
    assert found.data_ptr() == model[0].weight.data_ptr()
    assert not found.requires_grad


def test_norms_in_blocks_are_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(7, 50, generator=torch.Generator().manual_seed(0))
    whole = l1(rows), l2(rows)
    torch.testing.assert_close(whole[0], rows.double().abs().sum(1))
    torch.testing.assert_close(whole[1], rows.double().square().sum(1).sqrt())
    for block in (1, 120):
        monkeypatch.setattr("secateur.criteria.papers.li2017l1.BLOCK", block)
        assert torch.equal(l1(rows), whole[0])
        assert torch.equal(l2(rows), whole[1])


# Groups that a criterion is not defined on


@pytest.mark.parametrize("criterion", ["corrnet", "chip", "redundancy", "corrnet_su", "cshe"])
def test_a_group_that_cant_be_seen_stops_no_others(criterion: str, caplog: pytest.LogCaptureFixture) -> None:
    model, graph, x = traced("functional_head")
    data = [(x, Y)]
    alone = scoring.score(model, graph, criterion, data, groups=["first"])
    with caplog.at_level(logging.WARNING, "secateur"):
        scores = scoring.score(model, graph, criterion, data)
    assert list(scores) == ["first"]
    assert torch.equal(scores["first"], alone["first"])
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(
        f"criterion {criterion}: second: left out, as the maps of 10 of its 10 channels can't be seen"
    )
    assert "\n" not in line
    chosen = scoring.select(model, graph, criterion, 0.5, data)
    assert chosen["second"].removed == ()
    weighed = scoring.score(model, graph, criterion, data, unseen="weights")
    assert torch.equal(weighed["first"], alone["first"])
    assert torch.equal(weighed["second"], scoring.score(model, graph, "l2")["second"])
    lowest = set(weighed["second"].argsort()[:5].tolist())
    assert set(scoring.select(model, graph, criterion, 0.5, data, unseen="weights")["second"].removed) == lowest
    with pytest.raises(CriterionError, match=f"criterion {criterion}: second: the maps of 10 of its 10 channels"):
        scoring.score(model, graph, criterion, data, unseen="error")
    with pytest.raises(NotDefinedError, match="Use a criterion of weights"):
        scoring.score(model, graph, criterion, data, groups=["second"])
    with pytest.raises(UsageError, match="unseen is 'leave'"):
        scoring.score(model, graph, criterion, data, unseen="leave")  # type: ignore[arg-type]


def test_inexact_groups_are_scored_where_asked_for() -> None:
    model, graph, x = traced("inexact_and_functional")
    assert [(group.name, group.exact) for group in graph.groups] == [("first", True), ("second", False)]
    assert list(scoring.score(model, graph, "hrank", [x], unseen="error")) == ["first"]
    assert list(scoring.select(model, graph, "l1", 0.5)) == ["first"]
    assert list(scoring.score(model, graph, "l1", inexact=True)) == ["first", "second"]
    assert list(scoring.select(model, graph, "l1", 0.5, inexact=True)) == ["first", "second"]
    assert list(scoring.score(model, graph, "l1", groups=["second"])) == ["second"]
    assert list(scoring.select(model, graph, "l1", {"second": 2})) == ["second"]


def pointwise(m: Net, x: Tensor) -> Tensor:
    return pooled(m.b(m.a(m.one(x)).relu()))


def test_pairs_of_filters_with_one_weight_are_left_out() -> None:
    model = Net(pointwise, one=nn.Conv2d(1, 6, 1), a=conv(6, 8), b=conv(8, 5)).eval()
    graph = trace(model, torch.randn(2, 1, 8, 8))
    assert list(scoring.score(model, graph, "cfp")) == ["a"]
    with pytest.raises(NotDefinedError, match="one: none of its filters has 2 elements"):
        scoring.score(model, graph, "cfp", groups=["one"])


@pytest.mark.parametrize("criterion", ["cshe", "corrnet", "cfp", "random"])
@pytest.mark.parametrize("name", ["mixed_depthwise", "mixed_of_pairs", "mixed_of_one", "halved_twice", "c2f_of_two"])
def test_the_last_channel_of_every_layer_stays(name: str, criterion: str) -> None:
    options: dict[str, Any] = {"threshold": 0.0} if criterion == "corrnet" else {}
    model, graph, x = traced(name)
    for share in (0.3, 0.6, 0.9):
        chosen = scoring.select(model, graph, criterion, share, [(x, Y)], **options)
        plan = sc.plan_removal(graph, {k: list(v.removed) for k, v in chosen.items()})
        assert all(plan.kept_inputs.get(port.module, [0]) for port in graph.layers)
        for one in chosen.values():
            assert all(pair.dropped in one.removed for pair in one.pairs)


# The user's own errors


def scale_grad_off(m: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        return pooled(m.b(m.a(x).relu()))


def inference(m: Net, x: Tensor) -> Tensor:
    with torch.inference_mode():
        return pooled(m.b(m.a(x).relu()))


def in_place(m: Net, x: Tensor) -> Tensor:
    y = m.a(x).sigmoid()
    y += 1
    return pooled(m.b(y))


def of_another_layer(outputs: Tensor, _: Any) -> Tensor:
    return nn.Parameter(torch.ones(())) * 2


@pytest.mark.parametrize(
    ("forward", "loss", "text"),
    [
        (scale_grad_off, None, "batch 1: the loss has no gradient: the network or the loss detaches"),
        (inference, None, "batch 1: the loss has no gradient: the network or the loss detaches"),
        (in_place, None, "batch 1: the loss can't be differentiated: one of the variables needed for gradient"),
        (None, lambda outputs, _: outputs.detach().sum(), "batch 1: the loss has no gradient"),
        (None, of_another_layer, "batch 1: the loss depends on no filter of the groups"),
    ],
)
def test_a_loss_without_gradients_is_one_line(forward: Any, loss: Any, text: str) -> None:
    plain: Any = lambda m, x: pooled(m.b(m.a(x).relu()))  # noqa: E731
    model = Net(forward or plain, a=conv(3, 8), b=conv(8, 5)).eval()
    x = torch.randn(10, 3, 8, 8)
    graph = trace(model, x)
    with pytest.raises(CriterionError) as caught:
        scoring.score(model, graph, "taylor", [(x, Y)], loss=loss)
    assert str(caught.value).startswith(f"criterion taylor: {text}")
    assert "Use a criterion without gradients, such as l1" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_scores_are_the_same_in_inference_mode() -> None:
    x = torch.randn(10, 3, 8, 8)
    model = Net(lambda m, x: pooled(m.b(m.a(x).relu())), a=conv(3, 8), b=conv(8, 5)).eval()
    graph = trace(model, x)
    expected = {name: scoring.score(model, graph, name, [(x, Y)])["a"] for name in ("taylor", "redundancy", "l2")}
    with torch.inference_mode():
        made = x + 0  # a tensor that backward can't save
        for name, values in expected.items():
            assert torch.equal(scoring.score(model, graph, name, [(made, Y + 0)])["a"], values)
        born = Net(lambda m, x: pooled(m.b(m.a(x).relu())), a=conv(3, 8), b=conv(8, 5)).eval()
    with pytest.raises(CriterionError, match="taylor: the model was made in inference mode"):
        scoring.score(born, trace(born, x), "taylor", [(x, Y)])


def test_a_loss_that_is_not_defined_is_one_line() -> None:
    model = Net(lambda m, x: (pooled(m.b(m.a(x).relu())), x), a=conv(3, 8), b=conv(8, 5)).eval()
    x = torch.randn(10, 3, 8, 8)
    graph = trace(model, x)
    text = r"batch 1: no loss of its outputs and labels: .* Tensor, not tuple. Pass loss=function\(outputs, labels\)"
    with pytest.raises(DataError, match=text):
        scoring.score(model, graph, "taylor", [(x, Y)])
    with pytest.raises(DataError, match="batch 1: no loss of its outputs and labels: 'logits'"):
        scoring.score(model, graph, "taylor", [(x, Y)], loss=lambda outputs, labels: {}["logits"])
    plain = Net(lambda m, x: pooled(m.b(m.a(x).relu())), a=conv(3, 8), b=conv(8, 5)).eval()
    with pytest.raises(DataError, match="batch 1: no loss of its outputs and labels: Target 5 is out of bounds"):
        scoring.score(plain, graph, "taylor", [(x, Y + 3)])


FIRST_USE = """
import random, sys, warnings
import torch
import secateur as sc

model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3))
x = torch.randn(2, 3, 9, 9)
graph = sc.trace(model, x)

def surroundings():
    return random.getstate(), list(warnings.filters), torch.random.get_rng_state().tolist()

before, modules = surroundings(), set(sys.modules)
sc.score(model, graph, "l2")
new = set(sys.modules) - modules
assert len(new) < 40, len(new)
assert not {name.partition(".")[0] for name in new} - {"secateur", "torch"}, sorted(new)
assert surroundings() == before
sc.score(model, graph, "cshe", [x])
assert "sklearn" in sys.modules
assert surroundings() == before
"""


@pytest.mark.slow
def test_a_criterion_imports_what_it_alone_needs_and_leaves_no_trace() -> None:
    root = Path(sc.__file__).parents[1]
    environment = {"PYTHONPATH": str(root), "PATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", FIRST_USE], env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr


def test_parametrized_weights_are_computed_once_a_batch() -> None:
    """The gradient asked for is that of the very tensor that the forward applied."""
    torch.manual_seed(0)
    layer = conv(3, 8)

    class Noisy(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight + 0.1 * torch.randn_like(weight)

    parametrize.register_parametrization(layer, "weight", Noisy(), unsafe=True)
    model = nn.Sequential(layer, nn.ReLU(), conv(8, 5), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    x = torch.randn(10, 3, 8, 8)
    graph = trace(model, x)
    if graph.groups:
        scores = scoring.score(model, graph, "taylor", [(x, Y)])
        assert bool(scores["0"].gt(0).any())
