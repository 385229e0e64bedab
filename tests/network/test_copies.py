"""A copy of a network is the copy's own: functions, hooks, views and tables lead to it, or it is refused."""

from __future__ import annotations

import collections
import copy
import functools
import threading
import types
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc
from secateur.network.copies import replica
from tests.cases.table import Net
from tests.surroundings import Base, X, pruned


def by_lambda(model: Net) -> None:
    """A lambda over the network does a part of the work."""
    model.encode = lambda x: model.b(model.a(x).relu())
    model.body = lambda m, x: m.head(m.encode(x))


def by_hook(model: Net) -> None:
    """A hook keeps features in a dict that both the hook and the module hold."""
    features = model.features = dict[str, Tensor]()

    def keep(module: nn.Module, args: object, out: Tensor, place: str = "a") -> None:
        features[place] = out

    model.a.register_forward_hook(keep)
    model.body = lambda m, x: (m.a(x), m.head(m.b(m.features["a"].relu())))[1]


def by_patched_forward(model: Net) -> None:
    """The forward is put on the instance."""
    model.forward = lambda x: model.head(model.b(model.a(x).tanh()))


def by_wrapped_layer(model: Net) -> None:
    """A layer's own forward is wrapped in another function."""
    inner = model.a.forward
    model.a.forward = lambda x: inner(x) * 0.5


def by_list(model: Net) -> None:
    """Functions over layers stand in a list."""
    model.path = [lambda x, layer=layer: layer(x).relu() for layer in (model.a, model.b)]
    model.forward = lambda x: model.head(model.path[1](model.path[0](x)))


@pytest.mark.parametrize("change", [by_lambda, by_hook, by_patched_forward, by_wrapped_layer, by_list])
def test_functions_that_hold_the_network_hold_its_copy_in_the_copy(change: Callable[[Net], None]) -> None:
    model = Net(lambda m, x: m.head(m.b(m.a(x).relu())), **dict(Base().named_children()))
    change(model)
    graph, plan, small = pruned(model)
    assert {g.name for g in graph.groups} == {"a", "b"}
    assert sc.verify(model, small, plan, X).dtype == "float64"
    assert not torch.equal(small(X), small(2 * X))
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)
    assert small(X).isfinite().all()


@pytest.mark.parametrize(
    "held",
    [
        lambda model, encode: types.SimpleNamespace(encode=encode),
        lambda model, encode: collections.deque([encode]),
        lambda model, encode: weakref.ref(model),
        lambda model, encode: functools.lru_cache(encode),
    ],
)
def test_copies_that_would_call_the_unpruned_network_are_refused(held: Callable[..., object]) -> None:
    model = Base()
    model.held = held(model, lambda x: model.b(model.a(x).relu()))
    with pytest.raises(sc.PlanError, match=r"held: this .* holds a function that goes on to call the unpruned network"):
        sc.trace(model.eval(), X)


def test_what_can_not_be_copied_is_named() -> None:
    model = Base()
    model.b.guards = [threading.Lock()]
    with pytest.raises(sc.PlanError, match=r"^b\.guards: this list can't be copied \(TypeError: cannot pickle"):
        sc.trace(model.eval(), X)


class Forgetful(nn.Conv2d):
    """Drops its cache where it is copied."""

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "cache": {}}


def test_what_is_made_anew_for_each_copy_is_each_modules_own() -> None:
    copied = replica(nn.Sequential(*[Forgetful(3, 3, 1) for _ in range(40)]))
    assert len({id(layer.cache) for layer in copied}) == 40


def test_views_are_of_the_copys_own_and_what_hooks_hold_of_the_users_stays_the_users() -> None:
    seen: list[int] = []
    model = Base()
    model.layers = nn.ModuleDict({"first": nn.Identity(), "second": nn.Identity()})
    model.names, model.backend = model.layers.keys(), F
    model.head.register_forward_hook(lambda *_: seen.append(1))
    model.handle = model.a.register_forward_hook(lambda module, args, out: out * 2)
    _, _, small = pruned(model)
    small.layers["third"] = nn.Identity()
    assert [list(each.names) for each in (model, small)] == [["first", "second"], ["first", "second", "third"]]
    assert small.backend is F
    seen.clear()
    small(X)
    assert seen == [1]
    del small.names, small.backend  # which only a replica can copy
    again = copy.deepcopy(small)  # with the handle, by which a hook can be taken away
    again.handle.remove()
    assert [len(each.a._forward_hooks) for each in (model, small, again)] == [1, 1, 0]
