"""Code around the layers: modules from elsewhere, parts of one mode alone, compiled parts, closed modules."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.feature_extraction import create_feature_extractor

import secateur as sc
from tests.cases.table import Net, conv
from tests.surroundings import Base, X, pruned

outer = Base()
here = sys.modules[__name__]


@pytest.mark.parametrize("parts", [{"net": outer}, {"net": outer, "here": here}], ids=["name", "module"])
def test_layers_called_through_a_global_variable_are_kept(parts: dict[str, object]) -> None:
    """The variable goes on to name the unpruned network, by itself and through a module that a copy shares."""

    def forward(m: Net, x: Tensor) -> Tensor:
        return m.net.head((m.here.outer if "here" in parts else outer).b(m.net.a(x).relu()))

    assert not sc.trace(Net(forward, **parts).eval(), X).groups


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
    """A norm stands in a plain list, and the module has numbers of its own of the same names."""
    numbers = {"num_groups": 4, "num_channels": 16, "num_features": 16}
    model = Net(
        lambda m, x: m.head(m.norms[0](m.a(x))), a=conv(3, 16), norms=[norm.eval()], head=conv(16, 4), **numbers
    )
    _, _, small = pruned(model)
    assert {name: getattr(small, name) for name in numbers} == numbers


def test_parameters_of_training_alone_follow() -> None:
    """Weights are noisy in training, by parameters that evaluation does not read."""

    def noisy(m: Net, x: Tensor) -> Tensor:
        kernel = m.mean + m.spread * torch.randn_like(m.spread) if m.training else m.mean
        return m.head(F.conv2d(x, kernel))

    spread, mean = nn.Parameter(torch.full((16, 3, 1, 1), 0.1)), nn.Parameter(torch.randn(16, 3, 1, 1))
    _, _, small = pruned(Net(noisy, spread=spread, mean=mean, head=conv(16, 4)))
    assert small.spread.shape == small.mean.shape == (8, 3, 1, 1)
    assert small.train()(X).shape == (2, 4, 8, 8)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_parts_are_traced_as_they_are_written(backend: str) -> None:
    """A part is compiled; as it is written, it gives a size in its code."""
    model = Base().eval()
    part = torch.compile(lambda x: model.b(x).view(-1, 12, 64).relu().view(-1, 12, 8, 8), backend=backend)
    model.forward = lambda x: model.head(part(model.a(x)))
    with torch.no_grad():
        model(X)
    torch._dynamo.utils.counters.clear()
    graph, _, _ = pruned(model)
    assert not torch._dynamo.utils.counters, "nothing was compiled for the trace"
    assert {group.name for group in graph.groups} == {"a"}
    assert any("b.weight" in r.tensors and "test_surroundings.py" in r.source for r in graph.refused)


class Closed(nn.Module):
    """Does not let its number be changed."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.width = conv(3, 16), 16

    def __setattr__(self, name: str, value: object) -> None:
        if name == "width" and name in vars(self):
            raise AttributeError("the width is given once")
        super().__setattr__(name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).view(-1, self.width, 8, 8)


def test_layers_that_do_not_let_their_numbers_be_changed_are_kept() -> None:
    graph = sc.trace(nn.Sequential(Closed(), conv(16, 12), conv(12, 4)).eval(), X)
    assert {group.name for group in graph.groups} == {"1"}


def test_programs_of_two_modes_are_left_in_theirs_and_so_are_their_copies() -> None:
    layers = nn.Sequential(conv(3, 16), nn.ReLU(), nn.Dropout(0.5), conv(16, 4))
    model = create_feature_extractor(layers, {"3": "out"})
    _, plan, small = pruned(model)  # in eval mode, whose program a copy has to run, too
    assert not any(module.training for module in small.modules())
    assert torch.equal(small(X)["out"], small(X)["out"])
    graph = sc.trace(model.train(), X)
    assert {group.name for group in graph.groups} == {"0"}
    for program in (model, small := sc.apply(model, plan)):
        assert all(module.training for module in program.modules())
        assert not torch.equal(program(X)["out"], program(X)["out"])
    assert sc.verify(model, small, plan, X).exact


def test_what_is_no_network_yet_or_any_more_is_refused_in_a_line() -> None:
    with pytest.raises(sc.UsageError, match=r"expected a network, a torch\.nn\.Module; found a function"):
        sc.trace(lambda x: x, X)
    with pytest.raises(sc.TraceError, match="1 is a lazy layer, whose shape is not known yet: run the network once"):
        sc.trace(nn.Sequential(nn.ReLU(), nn.LazyConv2d(4, 3)), X)
    with pytest.raises(sc.TraceError, match="can't be put into eval mode"):
        sc.trace(torch.export.export(Base(), (X,)).module(), X)
    with pytest.raises(sc.TraceError, match="the model fails on the example inputs"):
        sc.trace(Base(), X[:, :1])


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_program_of_torchscript_is_noted() -> None:
    script = torch.jit.trace(nn.Sequential(conv(4, 6), nn.ReLU()), X[:, :1].repeat(1, 4, 1, 1))
    graph = sc.trace(nn.Sequential(nn.Sequential(conv(3, 4), script), conv(6, 2)), X)
    notes = [note for note in graph.notes if "TorchScript" in note]
    assert notes == ["0.1: is compiled by TorchScript, whose copies run with whole weights; prune what it was made of"]
    assert not graph.groups
