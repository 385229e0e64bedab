"""What follows a layer: norms that take up its bias, and sums that it mends; against plain least squares by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur.compensation.following import Following, observing
from secateur.compensation.least_squares import refit, unfold
from secateur.graph.steps import steps
from secateur.pruning.planning import plan_removal
from secateur.pruning.surgery import cut
from secateur.tracing.tracing import trace
from tests.cases import Case, Net, one_in

X = torch.randn(12, 3, 8, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def block(forward: Callable[[Net, Tensor], Tensor], **parts: nn.Module) -> Net:
    torch.manual_seed(0)
    parts = {
        "stem": nn.Sequential(nn.Conv2d(3, 6, 2), nn.ReLU(), nn.Conv2d(6, 6, 2)),
        "conv1": nn.Conv2d(6, 8, 3, padding=1),
        "conv2": nn.Conv2d(8, 6, 3, padding=1, bias=False),
        "bn": nn.BatchNorm2d(6),
        "head": nn.Conv2d(6, 2, 1),
        **parts,
    }
    net = Net(forward, **parts).double().eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
            module.weight.uniform_(0.5, 2)
    return net


def branch(net: Net, x: Tensor) -> Tensor:
    return net.bn(net.conv2(net.conv1(x).relu()))


def residual(net: Net, x: Tensor) -> Tensor:
    x = net.stem(x).relu()
    return net.head(net.tail(branch(net, x) + x).relu())


def in_place(net: Net, x: Tensor) -> Tensor:
    x = net.stem(x).relu()
    y = branch(net, x)
    y += x
    return net.head(net.tail(y).relu())


def into_the_other(net: Net, x: Tensor) -> Tensor:
    x = net.stem(x).relu()
    y = branch(net, x)
    x += y
    return net.head(net.tail(x).relu())


def straight(net: Net, x: Tensor) -> Tensor:
    return net.head(branch(net, net.stem(x).relu()).relu())


def following(net: nn.Module, x: Tensor = X) -> dict[str, Following]:
    with observing(net) as found:
        net(x)
    return found


def sum_of(net: Net, x: Tensor) -> Tensor:
    seen: list[Tensor] = []
    handle = net.tail.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    net(x)
    handle.remove()
    return seen[0]


def best(rows: Tensor, wanted: Tensor) -> Tensor:
    """Return what a layer with a bias gives at best."""
    rows = torch.cat((rows, torch.ones_like(rows[:, :1])), 1)
    return rows @ torch.linalg.lstsq(rows, wanted).solution


def test_the_running_mean_takes_up_a_bias() -> None:
    model = block(straight)
    plan = plan_removal(trace(model, X), {"conv1": [0, 3, 4]})
    small = cut(model, plan)
    refit(model, small, plan, X.split(5), ridge=0.0, exact=True)
    hidden = small.conv1(small.stem(X).relu()).relu()
    wanted = branch(model, model.stem(X).relu()).movedim(1, -1).reshape(-1, 6)
    rows = unfold(small.conv2, hidden, None)[0]
    found = small.bn(small.conv2(hidden)).movedim(1, -1).reshape(-1, 6)
    torch.testing.assert_close(found, best(rows, wanted), rtol=1e-6, atol=1e-8)
    assert small.conv2.bias is None


@pytest.mark.parametrize("forward", [residual, in_place, into_the_other])
def test_the_last_layer_before_a_sum_makes_good_what_the_other_branch_lacks(forward: Any) -> None:
    model = block(forward, tail=nn.Identity())
    plan = plan_removal(trace(model, X), {"conv1": [0, 3, 4], "stem.0": [1, 4], "stem.2": [2]})
    small = cut(model, plan)
    refit(model, small, plan, X.split(5), ridge=0.0, exact=True)
    stream = small.stem(X).relu()
    hidden = small.conv1(stream).relu()
    kept = plan.kept_outputs["conv2"]
    lacking = (sum_of(model, X)[:, kept] - stream).movedim(1, -1).reshape(-1, 5)
    found = (sum_of(small, X) - stream).movedim(1, -1).reshape(-1, 5)
    torch.testing.assert_close(found, best(unfold(small.conv2, hidden, None)[0], lacking), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("memory", [2**30, 1])
def test_the_sum_comes_nearer_than_by_the_layers_own_outputs(memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = block(residual, tail=nn.Identity())
    plan = plan_removal(trace(model, X), {"conv1": [0, 3, 4], "stem.0": [1, 4], "stem.2": [2]})
    mended, plain = cut(model, plan), cut(model, plan)
    refit(model, mended, plan, X.split(5), positions=20)
    monkeypatch.setattr("secateur.compensation.following._FAINT", 1e9)
    refit(model, plain, plan, X.split(5), positions=20)
    whole = sum_of(model, X)[:, plan.kept_outputs["conv2"]]
    errors = [float((sum_of(net, X) - whole).square().sum()) for net in (mended, plain)]
    assert errors[0] < 0.95 * errors[1]


def cubed(net: Net, x: Tensor) -> Tensor:
    y = branch(net, net.stem(x).relu())
    return net.head(y + 0.1 * y**3)


def normed_twice(net: Net, x: Tensor) -> Tensor:
    y = net.conv2(net.conv1(net.stem(x).relu()).relu())
    return net.head(net.bn(y) + net.bn(y).relu())


def projected(net: Net, x: Tensor) -> Tensor:
    x = net.stem(x).relu()
    y = branch(net, x)
    return net.head(y + net.norm(net.shortcut(x)))


def test_what_follows_is_told_of_the_layer_that_runs_last_before_the_sum() -> None:
    assert following(block(residual, tail=nn.Identity()))["conv2"] == Following("bn", added=True)
    assert following(block(straight))["conv2"] == Following("bn", added=False)
    assert following(block(straight))["conv1"] == Following("", added=False)
    assert following(block(cubed))["conv2"] == Following("bn", added=False)
    assert "conv2" not in following(block(normed_twice))
    found = following(block(projected, shortcut=nn.Conv2d(6, 6, 1, bias=False), norm=nn.BatchNorm2d(6)))
    assert found["conv2"] == Following("bn", added=False)
    assert found["shortcut"] == Following("norm", added=True)
    found = following(block(lambda net, x: net.head(net.conv2(net.stem(x).relu()) + 1), conv2=nn.Conv2d(6, 6, 3)))
    assert found["conv2"] == Following("", added=False)
    twice = block(lambda net, x: net.head(net.conv2(net.conv2(net.stem(x)))), conv2=nn.Conv2d(6, 6, 3))
    assert "conv2" not in following(twice)


def test_a_norm_of_the_last_dimension_but_one_is_none_of_a_linear_layer() -> None:
    net = Net(
        lambda net, x: net.head(net.bn(net.fc(x))), fc=nn.Linear(4, 6), bn=nn.BatchNorm1d(5), head=nn.Linear(6, 2)
    )
    assert following(net.eval(), torch.randn(3, 5, 4))["fc"] == Following("", added=False)
    net = Net(
        lambda net, x: net.head(net.bn(net.fc(x))), fc=nn.Linear(4, 6), bn=nn.BatchNorm1d(6), head=nn.Linear(6, 2)
    )
    assert following(net.eval(), torch.randn(3, 4))["fc"] == Following("bn", added=False)


def test_a_channel_that_its_norm_all_but_mutes_is_not_blown_up() -> None:
    model = block(residual, tail=nn.Identity())
    with torch.no_grad():
        model.bn.weight[4] = 1e-8
    plan = plan_removal(trace(model, X), {"conv1": [0, 3, 4], "stem.0": [1, 4], "stem.2": [2]})
    small = cut(model, plan)
    refit(model, small, plan, X.split(5))
    assert float(small.conv2.weight.abs().max()) < 10 * float(model.conv2.weight.abs().max())


@pytest.mark.filterwarnings("ignore")  # what torch says of old layers is no business of this test
@pytest.mark.parametrize("case", one_in(5), ids=lambda case: case.name)
def test_no_layers_error_grows_whatever_follows_it(case: Case) -> None:
    torch.manual_seed(0)
    model = case.build().eval()
    inputs = case.inputs()
    graph = trace(model, inputs)
    exact = [group for group in graph.groups if group.exact and steps(group, range(group.size))]
    plan = plan_removal(graph, {group.name: sorted(steps(group, range(group.size))[0]) for group in exact[:2]})
    small = cut(model, plan)
    data = [inputs if isinstance(inputs, dict) else (inputs,)]
    for entry in refit(model, small, plan, data, everywhere=True):
        if entry.applied:
            assert entry.before is not None
            assert entry.after is not None
            assert entry.after <= entry.before + 1e-6
    assert all(bool(tensor.isfinite().all()) for tensor in small.state_dict().values() if tensor.is_floating_point())
