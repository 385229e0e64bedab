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

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU())
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)).eval()


def pruned(model: nn.Module) -> tuple[sc.PruningPlan, nn.Module]:
    graph = sc.trace(model, X)
    plan = sc.plan(graph, sc.score(model, graph, "l1"), sc.Target(macs=0.4))
    return plan, sc.apply(model, plan)


WRAPPERS: list[Callable[[nn.Module], nn.Module]] = [
    nn.DataParallel,
    lambda model: torch.compile(model, backend="eager"),
    lambda model: nn.DataParallel(torch.compile(model, backend="eager")),
]


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_wrapper_changes_nothing(wrap: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    plain, model = network(), network()
    expected, smaller = pruned(plain)
    plan, small = pruned(wrap(model))
    assert plan == expected
    assert type(small) is nn.Sequential
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), smaller.parameters(), strict=True))
    assert sc.verify(wrap(model), small, plan, X).exact
    graph = sc.trace(plain, X)
    assert sc.select(wrap(model), graph, "fpgm", 0.5) == sc.select(plain, graph, "fpgm", 0.5)
    compensate(wrap(model), small, plan, "merge", example_inputs=X)
    compensate(plain, smaller, expected, "merge", example_inputs=X)
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), smaller.parameters(), strict=True))
    sc.save(wrap(small), plan, tmp_path / "small.safetensors")
    again = sc.load(wrap(network()), tmp_path / "small.safetensors")
    assert torch.equal(again(X), small(X))


def test_an_optimizer_of_a_wrapped_network_goes_on() -> None:
    model = network()
    wrapped = nn.DataParallel(model)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1, momentum=0.9)
    wrapped(X).sum().backward()
    optimizer.step()
    plan, small = pruned(wrapped)
    carried = sc.carry_optimizer(optimizer, wrapped, small, plan)
    momentum = carried.state[small[0].weight]["momentum_buffer"]
    kept = plan.kept_outputs["0"]
    assert torch.equal(momentum, optimizer.state[model[0].weight]["momentum_buffer"][kept])


class Served(nn.Module):
    """A network whose forward is decorated for serving."""

    def __init__(self, whole: bool) -> None:
        super().__init__()
        self.body, self.whole = network(), whole

    def forward(self, x: Tensor) -> Tensor:
        with torch.inference_mode(self.whole):
            return self.body(x)


@pytest.mark.parametrize(("inside", "outside"), [(True, False), (False, True), (True, True)])
def test_inference_mode_hides_nothing(inside: bool, outside: bool) -> None:
    expected = {g.name for g in sc.trace(Served(False).eval(), X).groups}
    model = Served(inside).eval()
    with torch.inference_mode(outside):
        graph = sc.trace(model, X)
        plan, small = pruned(model)
        assert sc.verify(model, small, plan, X).exact
    assert {g.name for g in graph.groups} == expected == {"body.0", "body.3"}
    small.body(X).sum().backward()  # it can be trained
    assert small.body[0].weight.grad is not None


def test_a_network_on_the_meta_device_is_traced_and_not_verified() -> None:
    with torch.device("meta"):
        model = network()
    x = X.to("meta")
    graph = sc.trace(model, x)
    assert [g.size for g in graph.groups] == [8, 6]
    plan = sc.plan_removal(graph, {"0": [1, 2]})
    small = sc.apply(model, plan)
    assert small[0].weight.shape[0] == 6
    with pytest.raises(sc.UsageError, match="meta device"):
        sc.verify(model, small, plan, x)


def test_an_exported_program_is_refused_in_words() -> None:
    program = torch.export.export(network(), (X,)).module()
    with pytest.raises(sc.TraceError, match="can't be put into eval mode"):
        sc.trace(program, X)


class Remembering(nn.Module):
    """A network whose output depends on the runs before, by what an object holds."""

    def __init__(self, kept: Callable[[], SimpleNamespace]) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)
        self.kept = kept

    def forward(self, x: Tensor) -> Tensor:
        kept = self.kept() if callable(self.kept) else self.kept
        kept.runs += 1
        return self.head(self.conv(x).relu()) * kept.runs


SHARED = SimpleNamespace(runs=0)
"""Of no network's own: no run's end puts it back."""


def test_a_network_that_keeps_state_between_runs_is_said_to_do_so() -> None:
    model = Remembering(lambda: SimpleNamespace(runs=0)).eval()
    plan = sc.plan_removal(sc.trace(model, X), {"conv": [0, 3]})
    model.kept = lambda: SHARED
    report = sc.verify(model, sc.apply(model, plan), plan, X)
    assert not report.exact
    assert any("differ from run to run" in reason for reason in report.refused)


def test_what_a_network_keeps_in_an_object_of_its_own_is_put_back() -> None:
    model = Remembering(lambda: SimpleNamespace(runs=0)).eval()
    kept = model.kept = SimpleNamespace(runs=3)  # type: ignore[assignment]
    plan = sc.plan_removal(sc.trace(model, X), {"conv": [0, 3]})
    assert sc.verify(model, sc.apply(model, plan), plan, X).exact
    assert kept.runs == 3


def test_magnitudes_of_weight_norm_follow_and_their_momentum_is_only_cut() -> None:
    torch.manual_seed(0)
    norm = nn.utils.parametrizations.weight_norm
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), norm(nn.Conv2d(8, 6, 3)), nn.ReLU(), nn.Conv2d(6, 2, 1)
    ).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    model(X.double()).sum().backward()
    optimizer.step()
    graph = sc.trace(model, X.double())
    scores = sc.score(model, graph, "l1")["2"]
    torch.testing.assert_close(scores, model[2].weight.detach().abs().flatten(1).sum(1))
    plan = sc.plan_removal(graph, {"0": [1, 4, 5], "2": [0]})
    small = sc.apply(model, plan)
    old, new = model[2].parametrizations.weight, small[2].parametrizations.weight
    torch.testing.assert_close(small[2].weight, model[2].weight[1:][:, plan.kept_inputs["2"]], rtol=1e-14, atol=1e-14)
    assert torch.equal(new.original1, old.original1[1:][:, plan.kept_inputs["2"]])
    carried = sc.carry_optimizer(optimizer, model, small, plan)
    momentum = optimizer.state[old.original0]["momentum_buffer"]
    assert torch.equal(carried.state[new.original0]["momentum_buffer"], momentum[1:])
    assert sc.PruningPlan.from_json(plan.to_json()) == plan


def test_a_direction_of_length_zero_stays_zero() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 2, 1)))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model[1].parametrizations.weight.original1.zero_()
    graph = sc.trace(twin, X)
    small = sc.apply(model, sc.plan_removal(graph, {"0": [0]}))
    assert torch.equal(small[1].parametrizations.weight.original0, model[1].parametrizations.weight.original0)


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
