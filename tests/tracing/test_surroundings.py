"""Code around the layers: modules from elsewhere, parts of one mode alone, compiled parts, closed modules."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.feature_extraction import create_feature_extractor

import secateur as sc
from secateur.tracing.trial import attempt
from tests.cases.table import Net, conv
from tests.surroundings import Base, X, pruned

outer = Base()


class ByGlobal(nn.Module):
    """Layers are called through a global variable, which goes on to name the unpruned network."""

    def __init__(self) -> None:
        super().__init__()
        self.net = outer

    def forward(self, x: Tensor) -> Tensor:
        return self.net.head(outer.b(self.net.a(x).relu()))


class ByModule(ByGlobal):
    """The global variable is reached through the Python module, which the network holds and its copy shares."""

    def __init__(self) -> None:
        super().__init__()
        self.here = sys.modules[__name__]

    def forward(self, x: Tensor) -> Tensor:
        return self.net.head(self.here.outer.b(self.net.a(x).relu()))


@pytest.mark.parametrize("kind", [ByGlobal, ByModule])
def test_layers_called_through_a_global_variable_are_kept(kind: type[nn.Module]) -> None:
    graph = sc.trace(kind().eval(), X)
    assert not graph.groups


class Unregistered(Base):
    """A norm stands in a plain list, and the module has numbers of its own of the same names."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norms = [norm]
        self.num_groups, self.num_channels, self.num_features = 4, 16, 16

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.norms[0](self.a(x))))


@pytest.mark.parametrize(
    "norm",
    [
        nn.GroupNorm(4, 16, affine=False),
        nn.GroupNorm(4, 16),
        nn.BatchNorm2d(16),
        nn.BatchNorm2d(16, affine=False, track_running_stats=False),
        nn.InstanceNorm2d(16),
        nn.LayerNorm(8, elementwise_affine=False),
    ],
)
def test_norms_that_are_registered_nowhere_change_nothing_else(norm: nn.Module) -> None:
    model = Unregistered(copy.deepcopy(norm).eval())
    graph, plan, small = pruned(model)
    assert (small.num_groups, small.num_channels, small.num_features) == (4, 16, 16)
    assert sc.verify(model, small, plan, X).exact, graph.refused


@pytest.mark.parametrize("make", [nn.InstanceNorm2d, nn.BatchNorm2d, lambda c: nn.GroupNorm(1, c)])
def test_norms_made_in_the_forward_are_no_crash(make: Callable[[int], nn.Module]) -> None:
    model = Net(lambda m, x: m.head(make((y := m.a(x)).shape[1])(y)), a=conv(3, 16), head=conv(16, 4))
    _, plan, small = pruned(model)
    assert sc.verify(model, small, plan, X).exact


class Noisy(Base):
    """Weights are noisy in training, by parameters that evaluation does not read."""

    def __init__(self) -> None:
        super().__init__()
        self.spread = nn.Parameter(torch.full((16, 3, 1, 1), 0.1))
        self.mean = nn.Parameter(torch.randn(16, 3, 1, 1))
        self.b = conv(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.mean + self.spread * torch.randn_like(self.spread) if self.training else self.mean
        return self.head(self.b(F.conv2d(x, kernel)))


def test_parameters_of_training_alone_follow() -> None:
    model = Noisy()
    _, plan, small = pruned(model)
    assert small.spread.shape == small.mean.shape
    assert small.spread.shape[0] < 16
    assert small.train()(X).shape == (2, 4, 8, 8)
    assert sc.verify(model, small, plan, X).exact


class Compiled(Base):
    """A part is compiled; as it is written, it gives a size in its code."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.encode = torch.compile(lambda x: self.b(x).view(-1, 12, 64).relu().view(-1, 12, 8, 8), backend=backend)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encode(self.a(x)))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_parts_are_traced_as_they_are_written(backend: str) -> None:
    model = Compiled(backend).eval()
    with torch.no_grad():
        model(X)
    torch._dynamo.utils.counters.clear()
    graph = pruned(model)[0]
    assert not torch._dynamo.utils.counters, "nothing was compiled for the trace"
    assert {group.name for group in graph.groups} == {"a"}
    assert any("b.weight" in r.tensors and "test_surroundings.py" in r.source for r in graph.refused)


def test_layers_that_do_not_let_their_numbers_be_changed_are_kept() -> None:
    class Closed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.width = conv(3, 16), 16

        def __setattr__(self, name: str, value: object) -> None:
            if name == "width" and name in vars(self):
                raise AttributeError("the width is given once")
            super().__setattr__(name, value)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).view(-1, self.width, 8, 8)

    graph = sc.trace(nn.Sequential(Closed(), conv(16, 12), conv(12, 4)).eval(), X)
    assert {group.name for group in graph.groups} == {"1"}


class Dropping(Base):
    """Drops values in training."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.dropout(self.b(self.a(x).relu()), 0.5, self.training))


def test_programs_of_two_modes_are_left_in_theirs_and_so_are_their_copies() -> None:
    model = create_feature_extractor(Dropping(), {"head": "out"})
    _, plan, small = pruned(model)  # in eval mode, whose program a copy has to run, too
    assert not any(module.training for module in small.modules())
    assert torch.equal(small(X)["out"], small(X)["out"])
    graph = sc.trace(model.train(), X)
    assert sc.verify(model, sc.apply(model, plan), plan, X).exact
    assert {group.name for group in graph.groups} == {"a", "b"}
    for program in (model, sc.apply(model, plan)):
        assert all(module.training for module in program.modules())
        assert not torch.equal(program(X)["out"], program(X)["out"])


def test_failures_without_a_line_to_show_are_not_found_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def scaled(m: Net, x: Tensor) -> Tensor:
        for layer in m.layers:
            x = layer(x) * 0.25 ** (1 / len(layer.weight))
        return m.head(x)

    runs: list[int] = []
    run = attempt._run
    monkeypatch.setattr(attempt, "_run", lambda *given: (runs.append(1), run(*given))[1])
    layers = nn.ModuleList([conv(3 if i == 0 else 8, 8) for i in range(16)])
    graph = sc.trace(Net(scaled, layers=layers, head=conv(8, 4)).eval(), X)
    assert not graph.groups
    assert len(runs) < 32


def test_a_function_and_lazy_layers_are_refused_in_a_line() -> None:
    with pytest.raises(sc.UsageError, match=r"expected a torch\.nn\.Module, found function"):
        sc.trace(lambda x: x, X)  # type: ignore[arg-type]
    with pytest.raises(sc.TraceError, match="1 is a lazy layer, whose shape is not known yet: run the network once"):
        sc.trace(nn.Sequential(nn.ReLU(), nn.LazyConv2d(4, 3)), X)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_program_of_torchscript_is_noted() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), torch.jit.trace(nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU()), X[:, :1].repeat(1, 4, 1, 1))
    )
    graph = sc.trace(nn.Sequential(model, nn.Conv2d(6, 2, 1)), X)
    notes = [note for note in graph.notes if "TorchScript" in note]
    assert notes == ["0.1: is compiled by TorchScript, whose copies run with whole weights; prune what it was made of"]
    assert not graph.groups
