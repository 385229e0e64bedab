"""Networks in wrappers, in inference mode, without data, with state: the same groups as without, or a clear word."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.compensation import compensate
from tests.cases.table import Net, conv
from tests.surroundings import Base, X, pruned

WRAPPERS: list[Callable[[nn.Module], nn.Module]] = [
    nn.DataParallel,
    lambda model: torch.compile(model, backend="eager"),
    lambda model: nn.DataParallel(torch.compile(model, backend="eager")),
]


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_wrapper_changes_nothing(wrap: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    plain, model = Base(), Base()
    graph, expected, smaller = pruned(plain)
    _, plan, small = pruned(wrap(model))
    assert plan == expected
    assert type(small) is Base
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), smaller.parameters(), strict=True))
    ours, theirs = (sc.score(each, graph, "l1") for each in (wrap(model), plain))
    assert all(torch.equal(ours[name], scores) for name, scores in theirs.items())
    assert sc.select(wrap(model), graph, "fpgm", 0.5) == sc.select(plain, graph, "fpgm", 0.5)
    compensate(wrap(model), small, plan, "merge", example_inputs=X)
    compensate(plain, smaller, expected, "merge", example_inputs=X)
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), smaller.parameters(), strict=True))
    sc.save(wrap(small), plan, tmp_path / "small.safetensors")
    assert torch.equal(sc.load(wrap(Base()), tmp_path / "small.safetensors")(X), small(X))


def test_an_optimizer_of_a_wrapped_network_goes_on() -> None:
    wrapped = nn.DataParallel(model := Base())
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1, momentum=0.9)
    wrapped(X).sum().backward()
    optimizer.step()
    _, plan, small = pruned(wrapped)
    momentum = sc.carry_optimizer(optimizer, wrapped, small, plan).state[small.a.weight]["momentum_buffer"]
    assert torch.equal(momentum, optimizer.state[model.a.weight]["momentum_buffer"][plan.kept_outputs["a"]])


@pytest.mark.parametrize(("inside", "outside"), [(True, False), (False, True), (True, True)])
def test_inference_mode_hides_nothing(inside: bool, outside: bool) -> None:
    def served(m: Net, x: Tensor) -> Tensor:
        with torch.inference_mode(inside):
            return m.head(m.fc(m.net(x).relu()))

    layers = {"fc": nn.Linear(12, 10), "head": nn.Linear(10, 4)}
    net = nn.Sequential(conv(3, 16), nn.BatchNorm2d(16), nn.ReLU(), conv(16, 12), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with torch.inference_mode(outside):
        graph, _, small = pruned(Net(served, net=net, **layers))
    assert {g.name for g in graph.groups} == {"net.0", "net.3", "fc"}
    small.net(X).sum().backward()  # it can be trained
    assert small.net[0].weight.grad is not None


def test_a_network_on_the_meta_device_is_traced_and_not_verified() -> None:
    with torch.device("meta"):
        model = nn.Sequential(conv(3, 8), conv(8, 6), conv(6, 4))
    graph = sc.trace(model, X.to("meta"))
    assert [g.size for g in graph.groups] == [8, 6]
    plan = sc.plan_removal(graph, {"0": [1, 2]})
    small = sc.apply(model, plan)
    assert small[0].weight.shape[0] == 6
    with pytest.raises(sc.UsageError, match="meta device"):
        sc.verify(model, small, plan, X.to("meta"))


SHARED = SimpleNamespace(runs=0)
"""Of no network's own: no run's end puts it back."""


@pytest.mark.parametrize("own", [True, False])
def test_a_network_that_keeps_state_between_runs_is_said_to_do_so_unless_it_is_put_back(own: bool) -> None:
    def remembering(m: Net, x: Tensor) -> Tensor:
        kept = m.kept or SHARED
        kept.runs += 1
        return m.head(m.conv(x).relu()) * kept.runs

    model = Net(remembering, conv=conv(3, 8), head=conv(8, 4), kept=SimpleNamespace(runs=3)).eval()
    plan = sc.plan_removal(sc.trace(model, X), {"conv": [0, 3]})
    model.kept = model.kept if own else None
    report = sc.verify(model, sc.apply(model, plan), plan, X)
    assert report.exact is own
    assert any("differ from run to run" in reason for reason in report.refused) is not own
    assert not own or model.kept.runs == 3


def test_magnitudes_of_weight_norm_follow_and_their_momentum_is_only_cut() -> None:
    norm = nn.utils.parametrizations.weight_norm
    model = nn.Sequential(conv(3, 8), nn.ReLU(), norm(conv(8, 6)), nn.ReLU(), conv(6, 2)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    model(X.double()).sum().backward()
    optimizer.step()
    graph, plan, small = pruned(model, X.double(), {"0": [1, 4, 5], "2": [0]})
    scores = sc.score(model, graph, "l1")["2"]
    torch.testing.assert_close(scores, model[2].weight.detach().abs().flatten(1).sum(1))
    old, new = model[2].parametrizations.weight, small[2].parametrizations.weight
    torch.testing.assert_close(small[2].weight, model[2].weight[1:][:, plan.kept_inputs["2"]], rtol=1e-14, atol=1e-14)
    assert torch.equal(new.original1, old.original1[1:][:, plan.kept_inputs["2"]])
    momentum = sc.carry_optimizer(optimizer, model, small, plan).state[new.original0]["momentum_buffer"]
    assert torch.equal(momentum, optimizer.state[old.original0]["momentum_buffer"][1:])
    assert sc.PruningPlan.from_json(plan.to_json()) == plan
    zero = copy.deepcopy(model)  # a direction of length zero stays zero
    zero[2].parametrizations.weight.original1.data.zero_()
    plan = sc.plan_removal(graph, {"0": [0]})
    assert torch.equal(sc.apply(zero, plan)[2].parametrizations.weight.original0, old.original0)


class FakeQuantised(nn.Conv2d):
    """A convolution that rounds its weight on the way, as in quantisation-aware training."""

    def forward(self, x: Tensor) -> Tensor:
        scale, zero = torch.full((self.out_channels,), 0.01), torch.zeros(self.out_channels, dtype=torch.int32)
        weight = torch.fake_quantize_per_channel_affine(self.weight, scale, zero, 0, -128, 127)
        return nn.functional.conv2d(x, weight, self.bias)


def test_layers_that_never_apply_their_own_weight_are_refused_by_name() -> None:
    graph = sc.trace(nn.Sequential(FakeQuantised(3, 8, 3), nn.ReLU(), FakeQuantised(8, 4, 3)), X)
    assert not graph.groups
    assert {name for refusal in graph.refused for name in refusal.tensors} == {"0.weight", "2.weight"}
    assert any("quantize after pruning" in note for note in graph.notes)
