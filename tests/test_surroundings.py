"""What goes on around a network's operators: functions that hold it, tensors from elsewhere, what is left behind."""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
import sys
import threading
import types
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.feature_extraction import create_feature_extractor

import secateur as sc
from secateur import attempt
from secateur.replica import replica
from tests.cases.table import Net, conv
from tests.surroundings import Base, X, pruned

# Functions that hold the network


class ByLambda(Base):
    """A lambda over self does a part of the work."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = lambda x: self.b(self.a(x).relu())

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encode(x))


class ByHook(Base):
    """A hook keeps features in a dict that both the hook and the module hold."""

    def __init__(self) -> None:
        super().__init__()
        features = self.features = dict[str, Tensor]()

        def keep(module: nn.Module, args: object, out: Tensor, place: str = "a") -> None:
            features[place] = out

        self.a.register_forward_hook(keep)

    def forward(self, x: Tensor) -> Tensor:
        self.a(x)
        return self.head(self.b(self.features["a"].relu()))


def by_patched_forward() -> nn.Module:
    """The forward is put on the instance."""
    model = Base()
    model.forward = lambda x: model.head(model.b(model.a(x).tanh()))  # type: ignore[method-assign]
    return model


def by_wrapped_layer() -> nn.Module:
    """A layer's own forward is wrapped in another function."""
    model = Base()
    inner = model.a.forward
    model.a.forward = lambda x: inner(x) * 0.5  # type: ignore[method-assign]
    return model


def by_list() -> nn.Module:
    """Functions over layers stand in a list."""
    model = Base()
    model.path = [lambda x, layer=layer: layer(x).relu() for layer in (model.a, model.b)]  # type: ignore[assignment]
    model.forward = lambda x: model.head(model.path[1](model.path[0](x)))  # type: ignore[method-assign, index, operator]
    return model


@pytest.mark.parametrize("build", [ByLambda, ByHook, by_patched_forward, by_wrapped_layer, by_list])
def test_functions_that_hold_the_network_hold_its_copy_in_the_copy(build: Callable[[], nn.Module]) -> None:
    model = build()
    graph, plan, small = pruned(model)
    assert {g.name for g in graph.groups} == {"a", "b"}
    found = sc.verify(model, small, plan, X)
    assert found.exact, found
    assert found.dtype == "float64"
    assert not torch.equal(small(X), small(2 * X))
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.fill_(torch.nan)
    assert small(X).isfinite().all()


@pytest.mark.parametrize("kind", [types.SimpleNamespace, collections.deque, weakref.ref, functools.lru_cache])
def test_copies_that_would_call_the_unpruned_network_are_refused(kind: object) -> None:
    model = Base()

    def encode(x: Tensor) -> Tensor:
        return model.b(model.a(x).relu())

    held = {
        types.SimpleNamespace: types.SimpleNamespace(encode=encode),
        collections.deque: collections.deque([encode]),
        weakref.ref: weakref.ref(model),
        functools.lru_cache: functools.lru_cache(encode),
    }
    model.held = held[kind]  # type: ignore[assignment, index]
    graph = sc.trace(model.eval(), X)
    plan = sc.plan_removal(graph, {"a": [0]})
    with pytest.raises(sc.PlanError, match=r"held: this .* holds a function that goes on to call the unpruned network"):
        sc.apply(model, plan)


def test_a_view_of_the_keys_of_a_module_dict_is_of_the_copys() -> None:
    model = Base()
    model.layers = nn.ModuleDict({"first": nn.Identity(), "second": nn.Identity()})
    model.names, model.backend = model.layers.keys(), F
    copied = replica(model)
    copied.layers["third"] = nn.Identity()
    assert list(copied.names) == ["first", "second", "third"]
    assert list(model.names) == ["first", "second"]
    assert copied.backend is F
    _, plan, small = pruned(model)
    assert sc.verify(model, small, plan, X).exact


def test_what_can_not_be_copied_is_named() -> None:
    model = Base()
    model.b.guards = [threading.Lock()]  # type: ignore[assignment]
    graph = sc.trace(model.eval(), X)
    plan = sc.plan_removal(graph, {"a": [0]})
    with pytest.raises(sc.PlanError, match=r"^b\.guards: this list can't be copied \(TypeError: cannot pickle"):
        sc.apply(model, plan)


class Forgetful(nn.Conv2d):
    """Drops its cache where it is copied."""

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "cache": {}}


def test_what_is_made_anew_for_each_copy_is_each_modules_own() -> None:
    model = nn.Sequential(*[Forgetful(3, 3, 1) for _ in range(40)])
    copied = replica(model)
    assert len({id(layer.cache) for layer in copied}) == 40


def test_what_a_hook_holds_of_the_users_own_stays_the_users() -> None:
    seen: list[int] = []
    model = Base()
    model.head.register_forward_hook(lambda *_: seen.append(1))
    _, _, small = pruned(model)
    seen.clear()
    small(X)
    assert seen == [1]


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


# Tensors and modules from elsewhere

ELSEWHERE: dict[str, Callable[[Tensor], Tensor]] = {
    "a parameter made of it": lambda x: nn.Parameter(x, requires_grad=False),
    "another class's view of it": lambda x: x.as_subclass(torch.Tensor),
    "another library's view of it": lambda x: torch.from_dlpack(x.detach()),
    "a list of numbers": lambda x: torch.tensor(x.tolist()),
    "an array": lambda x: torch.tensor(x.detach().numpy()[..., ::-1].copy()),
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_features_handed_on_where_nothing_sees_it_are_kept(name: str) -> None:
    model = Net(lambda m, x: m.head(ELSEWHERE[name](m.a(x))), a=conv(3, 16), head=conv(16, 4))
    graph = sc.trace(model.eval(), X)
    assert not graph.groups
    assert any("a.weight" in refusal.tensors for refusal in graph.refused)


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


# What is left behind


class Momentum(Base):
    """A second encoder follows the first with momentum, and a queue is written, past what counts versions."""

    def __init__(self) -> None:
        super().__init__()
        self.b = conv(3, 16)
        self.head = conv(16, 4)
        self.register_buffer("queue", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] > 1:
            self.b.weight.data.mul_(0.9).add_(self.a.weight.data, alpha=0.1)
        self.queue.data.copy_(torch.arange(4.0))
        return self.head(self.a(x) + self.b(x) * self.b.weight.shape[0])


def test_what_a_forward_writes_into_parameters_is_put_back() -> None:
    model = Momentum().eval()
    before = copy.deepcopy(model.state_dict())
    graph = sc.trace(model, X)
    assert any("a.weight" in refusal.tensors for refusal in graph.refused)  # the trial ran, and failed
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Exchanging(Base):
    """Gives a parameter other memory, a buffer another size, and normalises by the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("place", torch.zeros(4))
        self.norm = nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        self.b.bias.data = self.b.bias.data * 1.5
        self.place.resize_(6).fill_(1)
        x = F.batch_norm(self.a(x), self.norm.running_mean, self.norm.running_var, training=True)
        return self.head(self.b(x * (1.0 if x.shape[1] > 1 else 2.0)))


def test_memory_sizes_and_statistics_are_as_before() -> None:
    model = Exchanging().eval()
    before = copy.deepcopy(model.state_dict())
    sc.trace(model, X)
    found = model.state_dict()
    assert {name: (t.shape, t.dtype) for name, t in found.items()} == {n: (t.shape, t.dtype) for n, t in before.items()}
    assert [name for name, value in found.items() if not torch.equal(value, before[name])] == []


class Spiking(nn.Module):
    """Integrates what it reads, from one call to the next, and fires above a threshold."""

    def __init__(self) -> None:
        super().__init__()
        self.potential: float | Tensor = 0.0
        self.traces: tuple[Tensor, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        raised = self.potential + (x - self.potential) / 2
        fires = (raised > 0.5).to(x.dtype)
        self.potential, self.traces, self.last = raised * (1 - fires), (raised, fires), x
        return fires


def test_state_that_a_forward_leaves_in_attributes_is_put_back() -> None:
    model = nn.Sequential(conv(3, 16), Spiking(), conv(16, 12), Spiking(), conv(12, 4))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        inputs = 3 * torch.randn(2, 3, 8, 8)
    graph = sc.trace(model.eval(), inputs)
    assert {group.name for group in graph.groups} == {"0", "2"}
    plan = sc.plan_removal(graph, {"0": list(range(15)), "2": [0, 5]})
    small = sc.apply(model, plan)
    assert sc.verify(model, small, plan, inputs).exact
    for each in (model, small):
        assert [(m.potential, m.traces, hasattr(m, "last")) for m in (each[1], each[3])] == [(0.0, (), False)] * 2
    assert small(inputs).shape == small(inputs).shape == (2, 4, 8, 8)


class Accumulating(Base):
    """Keeps features in containers of its own, numbers under numbers, and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.features: dict[str, Tensor] = {}
        self.nested = {"past": [torch.zeros(1)], "shapes": set[int]()}
        self.last: collections.deque[Tensor] = collections.deque(maxlen=2)
        self.calls, self.ran = 0, False

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        key = str(tuple(y.shape[2:]))
        if key not in self.features:
            self.features[key] = torch.ones(1, y.shape[1], *y.shape[2:])
        self.nested["past"].append(y)  # type: ignore[attr-defined]
        self.nested["shapes"].add(y.shape[1])  # type: ignore[attr-defined]
        self.last.append(y)
        self.calls, self.ran = self.calls + 1, True
        return self.head(self.b(y * self.features[key]))


def test_containers_and_counts_of_a_network_are_as_before() -> None:
    model = Accumulating()
    first = model.nested["past"][0]  # type: ignore[index]
    graph, plan, small = pruned(model)
    assert {group.name for group in graph.groups} == {"a", "b"}, "nothing is left that has the unpruned size"
    assert sc.verify(model, small, plan, X).exact
    for each in (model, small):
        assert (each.features, each.nested["shapes"], list(each.last)) == ({}, set(), [])  # type: ignore[index]
        assert len(each.nested["past"]) == 1  # type: ignore[index, arg-type]
        assert (each.calls, each.ran) == (0, False)
    assert model.nested["past"][0] is first  # type: ignore[index]


class HoldsItsHandle(Base):
    """Keeps the handle of a hook, by which it can be taken away."""

    def __init__(self) -> None:
        super().__init__()
        self.handle = self.a.register_forward_hook(lambda module, args, out: out * 2)


def test_a_pruned_network_that_holds_a_hooks_handle_can_be_copied_again() -> None:
    model = HoldsItsHandle()
    _, plan, small = pruned(model)
    assert sc.verify(model, small, plan, X).dtype == "float64"
    again = copy.deepcopy(small)
    again.handle.remove()  # type: ignore[operator, union-attr]
    assert [len(each.a._forward_hooks) for each in (model, small, again)] == [1, 1, 0]


@dataclasses.dataclass(slots=True)
class Slots:
    """What a network returns, without a dict of attributes."""

    features: Tensor
    result: Tensor


RETURNED: dict[str, Callable[[Tensor, Tensor], object]] = {
    "values": lambda y, o: {"y": y, "o": o}.values(),
    "items": lambda y, o: {"y": y, "o": o}.items(),
    "a queue": lambda y, o: collections.deque([y, o]),
    "a generator": lambda y, o: (t for t in (y, o)),
    "a map": lambda y, o: map(torch.relu, (y, o)),
    "slots": Slots,
    "an array": lambda y, o: (y.detach().numpy(), o),
    "a list of numbers": lambda y, o: (y.tolist(), o),
    "a shape": lambda y, o: (y.shape, o),
    "a number": lambda y, o: {"width": y.shape[1], "o": o},
    "parameters": lambda y, o: nn.ParameterList([nn.Parameter(y), nn.Parameter(o)]),
}


@pytest.mark.parametrize("name", RETURNED)
def test_channels_that_are_returned_are_kept_whatever_holds_them(name: str) -> None:
    def forward(m: Net, x: Tensor) -> object:
        y = m.a(x)
        return RETURNED[name](y, m.head(m.b(y)))

    model = Net(forward, a=conv(3, 16), b=conv(16, 12), head=conv(12, 4)).eval()  # type: ignore[arg-type]
    graph = sc.trace(model, X)
    assert [group.name for group in graph.groups] == ["b"]
    plan = sc.plan_removal(graph, {"b": [0, 3, 5]})
    report = sc.verify(model, sc.apply(model, plan), plan, X)
    assert report.exact, report


def test_where_nothing_is_returned_that_tells_nothing_is_pruned() -> None:
    def forward(m: Net, x: Tensor) -> object:
        y = m.head(m.a(x))
        return lambda: y

    model = Net(forward, a=conv(3, 16), head=conv(16, 4)).eval()  # type: ignore[arg-type]
    graph = sc.trace(model, X)
    assert not graph.groups
    assert any("no tensor is returned" in refusal.reason for refusal in graph.refused)
    plan = sc.plan_removal(graph, {})
    report = sc.verify(model, sc.apply(model, plan), plan, X)
    assert not report.exact
    assert any("no tensor" in reason for reason in report.refused)


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


class Merging(nn.Conv2d):
    """Adds an update to its weight for evaluation, and takes it away for training (LoRA)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 1)
        self.update, self.merged = nn.Parameter(torch.randn(outputs, inputs, 1, 1)), False

    def train(self, mode: bool = True) -> Merging:
        super().train(mode)
        if mode == self.merged:
            self.weight.data += self.update.data * (-1 if mode else 1)
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight if self.merged else self.weight + self.update, self.bias)


def test_weights_merged_for_evaluation_are_as_before_to_the_last_bit() -> None:
    model = nn.Sequential(Merging(3, 16), nn.ReLU(), Merging(16, 12), nn.ReLU(), conv(12, 4))
    before = copy.deepcopy(model.state_dict())
    graph = sc.trace(model, X)
    plan = sc.plan_removal(graph, {group.name: [0, 3] for group in graph.groups})
    small = sc.apply(model, plan)
    assert sc.verify(model, small, plan, X).exact
    for each in (model, small):
        assert {(m.training, m.merged) for m in each.modules() if isinstance(m, Merging)} == {(True, False)}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


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
