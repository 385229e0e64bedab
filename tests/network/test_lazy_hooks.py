"""Hooks that a library installs when a model first runs, and its note that it did, are put back together."""

from __future__ import annotations

import copy
import weakref
from contextvars import ContextVar

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from tests.cases.table import conv
from tests.surroundings import X

COLLECTED: ContextVar[list[Tensor] | None] = ContextVar("collected", default=None)
"""What hooks append to while a model runs, as in transformers 5."""
HOOKED = weakref.WeakSet[nn.Module]()


def collect(module: nn.Module, args: object, out: Tensor) -> None:
    found = COLLECTED.get()
    if found is not None:
        found.append(out)


def stage(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(conv(inputs, 10), nn.ReLU(), conv(10, outputs))


class Capturing(nn.Module):
    """Returns what its stages make, collected by hooks that the first forward installs, as ViT does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stages, self.head = nn.ModuleList([stage(3, 8), stage(8, 12)]), conv(12, 4)

    def installed(self) -> bool:
        return getattr(self, "_hooks_installed", False)

    def note(self) -> None:
        self._hooks_installed = True

    def run(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        if not self.installed():
            for stage in self.stages:
                stage.register_forward_hook(collect)
            self.note()
        token = COLLECTED.set([])
        try:
            for stage in self.stages:
                x = stage(x)
            return x, list(COLLECTED.get() or [])
        finally:
            COLLECTED.reset(token)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x, states = self.run(x)
        return self.head(x), *states


class NotedInADict(Capturing):
    """The note is an entry in a dict that the module holds."""

    def __init__(self) -> None:
        super().__init__()
        self.record: dict[str, bool] = {}

    def installed(self) -> bool:
        return self.record.get("installed", False)

    def note(self) -> None:
        self.record["installed"] = True


class Decoding(Capturing):
    """Each state is read by a layer of its own, in turn, as in Segformer's decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.each, self.head = nn.ModuleList([conv(8, 6, 1), conv(12, 6, 1)]), conv(6, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        _, states = self.run(x)
        return (self.head(sum(layer(state) for layer, state in zip(self.each, states, strict=False))),)


class NotedElsewhere(Capturing):
    """The note is kept in a global variable, where nothing finds it."""

    def installed(self) -> bool:
        return self in HOOKED

    def note(self) -> None:
        HOOKED.add(self)


def built(kind: type[Capturing], warm: bool) -> Capturing:
    model = kind().eval()
    if warm:
        model(X)
    return model


@pytest.mark.parametrize("warm", [False, True], ids=["before a first forward", "after one"])
@pytest.mark.parametrize(
    ("kind", "groups", "returned"),
    [
        (Capturing, {"stages.0.0", "stages.1.0"}, 3),
        (NotedInADict, {"stages.0.0", "stages.1.0"}, 3),
        (Decoding, {"stages.0.0", "stages.0.2", "stages.1.0", "stages.1.2", "each.0"}, 1),
    ],
)
def test_a_model_that_collects_by_hooks_collects_each_state_once(
    kind: type[Capturing], groups: set[str], returned: int, warm: bool
) -> None:
    model = built(kind, warm)
    wanted = built(kind, warm)(X)
    hooks = [list(stage._forward_hooks.items()) for stage in model.stages]
    graph = sc.trace(model, X)
    assert {group.name for group in graph.groups} == groups
    assert [list(stage._forward_hooks.items()) for stage in model.stages] == hooks
    plan = sc.plan_removal(graph, {group.name: [0, 3] for group in graph.groups})
    small = sc.apply(model, plan)
    assert sc.verify(model, small, plan, X).exact
    assert model.installed() is small.installed() is warm  # type: ignore[operator]
    for each in (model, copy.deepcopy(model), small):
        assert [len(each(X)) for _ in range(2)] == [returned] * 2
    assert all(torch.equal(one, other) for one, other in zip(model(X), wanted, strict=True))


def test_hooks_whose_note_is_kept_elsewhere_are_left_with_it() -> None:
    model = built(NotedElsewhere, False)
    sc.trace(model, X)
    assert model.installed()
    assert [len(stage._forward_hooks) for stage in model.stages] == [1, 1]
    assert len(model(X)) == 3


class Forgetting(Capturing):
    """Takes a hook away when it first runs."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.installed():
            self.stages[0]._forward_hooks.clear()
            self.note()
        return self.head(self.stages[1](self.stages[0](x)))


def test_hooks_that_a_run_takes_away_are_there_again() -> None:
    model = Forgetting().eval()
    model.stages[0].register_forward_hook(collect)
    sc.trace(model, X)
    assert list(model.stages[0]._forward_hooks.values()) == [collect]
    assert not model.installed()
