"""What goes on around a network's operators: functions that hold it, numbers of its own, tensors from elsewhere."""

from __future__ import annotations

import collections
import copy
import functools
import types
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc
from secateur import attempt
from secateur.replica import replica
from tests.cases.table import Net, conv

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Base(nn.Module):
    """A convolution of 16 channels, one more, and a head that is the output."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.head = conv(3, 16), conv(16, 12), conv(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(x).relu()))


def pruned(model: nn.Module, inputs: Tensor = X) -> tuple[sc.ChannelGraph, sc.PruningPlan, nn.Module]:
    """Remove half of every exact group."""
    graph = sc.trace(model.eval(), inputs)
    plan = sc.plan_removal(graph, {g.name: list(range(g.size // 2)) for g in graph.groups if g.exact})
    return graph, plan, sc.apply(model, plan)


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
    model.forward = lambda x: model.head(model.path[1](model.path[0](x)))  # type: ignore
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
    model.held = held[kind]  # type: ignore
    graph = sc.trace(model.eval(), X)
    plan = sc.plan_removal(graph, {"a": [0]})
    with pytest.raises(sc.PlanError, match=r"held: this .* holds a function that goes on to call the unpruned network"):
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


def test_layers_called_through_a_global_variable_are_kept() -> None:
    graph = sc.trace(ByGlobal().eval(), X)
    assert not graph.groups


# Numbers of the network's own


class Cropped(Base):
    """Crops to a number of tokens which is equal to the width by chance."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = 16
        self.head = nn.Linear(16, 4)  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        n, c, h, w = x.shape
        return self.head(x.view(n, c, h * w)[:, :, : 4 * self.tokens].mean(2))


def test_a_number_equal_to_the_width_by_chance_stays() -> None:
    model = Cropped()
    _, plan, small = pruned(model, torch.randn(2, 3, 4, 4))
    assert small.a.out_channels == 8
    assert small.tokens == 16
    assert sc.verify(model, small, plan, torch.randn(2, 3, 12, 12)).exact


class Counting(Base):
    """Holds numbers in every way, and counts on in one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.sizes, self.pair = 0, [16, 12], (8, "same")
        self.kept: object = None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.sizes.append(3)
        self.kept = (self.sizes[1] * 2, x.shape[1], [self.calls])
        x = self.a(x).view(len(x), self.sizes[0], *x.shape[2:])
        return self.head(self.b(x))


def test_numbers_are_plain_again_after_a_trace() -> None:
    model = Counting()
    _, plan, small = pruned(model)
    assert type(model.calls) is int
    assert {type(size) for size in model.sizes} == {int}
    assert [type(part) for part in model.pair] == [int, str]
    assert [type(part) for part in model.kept[:2]] == [int, int]  # type: ignore[index]
    assert small.sizes[:2] == [8, 12]
    assert sc.verify(model, small, plan, X).exact


def test_sizes_listed_at_a_split_follow_their_parts() -> None:
    model = Net(
        lambda m, x: m.head(m.cut(m.a(x))),
        a=conv(3, 16),
        cut=SplitParts(10, 6),
        head=conv(12, 4),
    )
    graph, plan, small = pruned(model)
    assert "a" in {g.name for g in graph.groups}
    assert small.cut.first + small.cut.second == small.a.out_channels < 16
    assert sc.verify(model, small, plan, X).exact


class SplitParts(nn.Module):
    """Two parts, each read by a layer of its own, whose widths are numbers of the module."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__()
        self.first, self.second = first, second
        self.b, self.c = conv(first, 12), conv(second, 12)

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.split(x, [self.first, self.second], 1)
        return self.b(a) + self.c(b)


class EqualParts(nn.Module):
    """Two parts of one width, twice the same number of the module."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.b, self.c = conv(width, 12), conv(width, 12)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.split((self.width, self.width), 1)
        return self.b(a) + self.c(b)


def test_one_number_given_twice_at_a_split_follows_equal_parts() -> None:
    model = Net(lambda m, x: m.head(m.cut(m.a(x))), a=conv(3, 16), cut=EqualParts(8), head=conv(12, 4))
    graph = sc.trace(model.eval(), X)
    assert [(g.name, g.size, int(g.blocks.max()) + 1) for g in graph.groups if g.name == "a"] == [("a", 16, 2)]


class AsksForTheType(Base):
    """Takes a number or a pair, and looks at its type."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 2

    def forward(self, x: Tensor) -> Tensor:
        size = (self.size, self.size) if type(self.size) is int else self.size
        return self.head(self.b(F.avg_pool2d(self.a(x), (size[0], size[1]))))


def test_code_that_asks_for_the_type_of_a_number_is_traced() -> None:
    model = AsksForTheType()
    graph, plan, small = pruned(model)
    assert {g.name for g in graph.groups} == {"a", "b"}
    assert type(model.size) is int
    assert sc.verify(model, small, plan, X).exact


# What depends on the width


def test_a_dimension_that_would_be_squeezed_away_keeps_two() -> None:
    model = Net(
        lambda m, x: m.head(F.adaptive_avg_pool2d(m.a(x), 1).squeeze()), a=conv(3, 16), head=nn.Linear(16, 4)
    ).eval()
    graph = sc.trace(model, X)
    (group,) = graph.groups
    with pytest.raises(sc.PlanError, match="2 have to stay, and 1 would"):
        sc.plan_removal(graph, {"a": list(range(15))})
    plan = sc.plan_removal(graph, {"a": list(range(14))})
    assert sc.verify(model, sc.apply(model, plan), plan, X).exact
    assert sum(map(len, sc.planning.steps(group, range(16)))) == 14


FORMULAS = {
    "takes the larger": lambda x: x * max(x.shape[1] // 4, 2),
    "counts in small steps": lambda x: x + 2e-5 * x.shape[1],
    "divides by it": lambda x: x / (x.shape[1] + 10000),
    "scales": lambda x: x * x.shape[1] ** -0.5,
}


@pytest.mark.parametrize("name", FORMULAS)
def test_what_is_computed_with_the_width_is_refused(name: str) -> None:
    model = Net(lambda m, x: m.head(FORMULAS[name](m.a(x))), a=conv(3, 16), head=conv(16, 4))
    graph = sc.trace(model.eval(), X)
    assert not graph.groups
    assert any("a.weight" in refusal.tensors for refusal in graph.refused)


@pytest.mark.parametrize("below", [lambda c: c > 4, lambda c: c + 1 > 5, lambda c: min(c, 5) == 5])
def test_where_code_does_otherwise_below_a_width_as_many_stay_as_were_tried(below: Callable[[int], bool]) -> None:
    model = Net(lambda m, x: m.head(y.relu() if below((y := m.a(x)).shape[1]) else -y), a=conv(3, 16), head=conv(16, 4))
    graph = sc.trace(model.eval(), X)
    (group,) = graph.groups
    assert group.least == 9
    assert group.constraint == "at least 9 channels stay"
    with pytest.raises(sc.PlanError, match="at least 9 have to stay"):
        sc.plan_removal(graph, {"a": list(range(8))})
    plan = sc.plan(graph, sc.score(model, graph, "l1"), sc.Target(channels=0.4))
    assert sc.verify(model, sc.apply(model, plan), plan, X).exact


class Standardised(nn.Conv2d):
    """Weights standardised by batch norm, which takes more than one value (NFNet)."""

    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight.reshape(1, len(self.weight), -1)
        rows = F.batch_norm(rows, None, None, training=True) * (1 if x.shape[1] + 1 else 2)
        return F.conv2d(x, rows.reshape_as(self.weight), self.bias)


def test_what_fails_with_one_channel_alone_keeps_two() -> None:
    model = Net(lambda m, x: m.head(m.b(m.a(x))), a=conv(3, 16), b=Standardised(16, 12, 1), head=conv(12, 4))
    graph = sc.trace(model.eval(), X)
    assert {(group.name, group.least) for group in graph.groups} == {("a", 2), ("b", 2)}


class WhereShapesAgree(Base):
    """A shortcut where the shapes agree, which those of the unpruned network do not."""

    def __init__(self) -> None:
        super().__init__()
        self.b, self.head = conv(16, 24), conv(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        y = self.b(x)
        return self.head(x + y if x.shape == y.shape else y)


def test_widths_that_code_found_to_differ_do_not_come_to_agree() -> None:
    model = WhereShapesAgree().eval()
    graph = sc.trace(model, X)
    assert [g.name for g in graph.groups] == ["a"]
    assert any("b.weight" in refusal.tensors and "come to equal" in refusal.reason for refusal in graph.refused)
    assert all("test_surroundings.py" in r.source for r in graph.refused if "b.weight" in r.tensors)


def test_more_channels_stay_than_the_number_that_they_are_compared_with() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.head(y if y.shape != x.shape else y + x)

    inputs = torch.randn(2, 5, 8, 8)
    (group,) = sc.trace(Net(forward, a=conv(5, 16), head=conv(16, 4)).eval(), inputs).groups
    assert group.constraint == "at least 6 channels stay"
    assert len(sc.planning.steps(group, range(16))) == 10


HIDDEN = {
    "the number of elements": lambda y: y.numel() > 4 * 2 * 64,
    "the length": lambda y: len(y[0]) > 4,
    "a stride": lambda y: y.stride(0) > 4 * 64,
    "a shift": lambda y: y.shape[1] >> 2,
    "a division": lambda y: divmod(y.shape[1], 5)[0],
    "its square": lambda y: y.shape[1] * y.shape[1] > 16,
    "truth": lambda y: bool(y.shape[1] // 5),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_widths_are_tried_however_code_asks_for_them(name: str) -> None:
    model = Net(lambda m, x: m.head(y if HIDDEN[name](y := m.a(x)) else -y), a=conv(3, 16), head=conv(16, 4))
    (group,) = sc.trace(model.eval(), X).groups
    assert group.least > 4


# Tensors and modules from elsewhere

ELSEWHERE: dict[str, Callable[[Tensor], Tensor]] = {
    "a parameter made of it": lambda x: nn.Parameter(x, requires_grad=False),
    "another class's view of it": lambda x: x.as_subclass(torch.Tensor),
    "another library's view of it": lambda x: torch.from_dlpack(x.detach()),
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
