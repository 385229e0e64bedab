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
from tests.surroundings import Base, X, pruned


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
    with pytest.raises(sc.PlanError, match=r"held: this .* holds a function that goes on to call the unpruned network"):
        sc.trace(model.eval(), X)


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
    with pytest.raises(sc.PlanError, match=r"^b\.guards: this list can't be copied \(TypeError: cannot pickle"):
        sc.trace(model.eval(), X)


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
