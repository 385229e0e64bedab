"""Hooks that a library installs when a model first runs, and its note that it did, are put back together."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, MutableMapping
from contextvars import ContextVar
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from tests.cases.table import Net, conv
from tests.surroundings import X, pruned

COLLECTED: ContextVar[list[Tensor] | None] = ContextVar("collected", default=None)
"""What hooks append to while a model runs, as in transformers 5."""
HOOKED: MutableMapping[object, bool] = weakref.WeakKeyDictionary()
STAGES = {"stages.0.0", "stages.1.0"}


def collect(module: nn.Module, args: object, out: Tensor) -> None:
    found = COLLECTED.get()
    if found is not None:
        found.append(out)


class Capturing(nn.Module):
    """Returns what its stages make, collected by hooks that the first forward installs, as ViT does.

    Or each state is read by a layer of its own, in turn, as in Segformer's decoder. The note that hooks are installed
    is an attribute, or an entry in a dict that the module holds, or in a global variable, where nothing finds it.
    """

    def __init__(self, noted: str = "attribute", decodes: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stages = nn.ModuleList(nn.Sequential(conv(i, 10), nn.ReLU(), conv(10, o)) for i, o in ((3, 8), (8, 12)))
        self.each, self.head = nn.ModuleList([conv(8, 6, 1), conv(12, 6, 1)]), conv(6 if decodes else 12, 4)
        self.noted, self.decodes, self.record = noted, decodes, dict[object, bool]()

    def note(self) -> tuple[MutableMapping[Any, bool], object]:
        held = {"attribute": (vars(self), "hooked"), "dict": (self.record, 0), "elsewhere": (HOOKED, self)}
        return held[self.noted]

    def installed(self) -> bool:
        notes, key = self.note()
        return notes.get(key, False)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        if not self.installed():
            for stage in self.stages:
                stage.register_forward_hook(collect)
            notes, key = self.note()
            notes[key] = True
        token = COLLECTED.set([])
        try:
            for stage in self.stages:
                x = stage(x)
            states = list(COLLECTED.get() or [])
        finally:
            COLLECTED.reset(token)
        if self.decodes:
            return (self.head(sum(layer(state) for layer, state in zip(self.each, states, strict=False))),)
        return self.head(x), *states


@pytest.mark.parametrize("warm", [False, True], ids=["before a first forward", "after one"])
@pytest.mark.parametrize(
    ("built", "groups", "returned"),
    [
        (lambda: Capturing(), STAGES, 3),
        (lambda: Capturing("dict"), STAGES, 3),
        (lambda: Capturing(decodes=True), STAGES | {"stages.0.2", "stages.1.2", "each.0"}, 1),
    ],
)
def test_a_model_that_collects_by_hooks_collects_each_state_once(
    built: Callable[[], Capturing], groups: set[str], returned: int, warm: bool
) -> None:
    model = built().eval()
    wanted = built().eval()(X)
    if warm:
        model(X)
    hooks = [list(stage._forward_hooks.items()) for stage in model.stages]
    graph = sc.trace(model, X)
    assert {group.name for group in graph.groups} == groups
    assert [list(stage._forward_hooks.items()) for stage in model.stages] == hooks
    _, _, small = pruned(model, X, {name: [0, 3] for name in groups})
    assert model.installed() is small.installed() is warm
    for each in (model, copy.deepcopy(model), small):
        assert [len(each(X)) for _ in range(2)] == [returned] * 2
    assert all(torch.equal(one, other) for one, other in zip(model(X), wanted, strict=True))


def test_hooks_whose_note_is_kept_elsewhere_are_left_with_it() -> None:
    model = Capturing("elsewhere").eval()
    sc.trace(model, X)
    assert model.installed()
    assert [len(stage._forward_hooks) for stage in model.stages] == [1, 1]
    assert len(model(X)) == 3


def test_hooks_that_a_run_takes_away_are_there_again() -> None:
    def forgetting(m: Net, x: Tensor) -> Tensor:
        m.a._forward_hooks.clear()
        m.forgotten = True
        return m.head(m.a(x))

    model = Net(forgetting, a=conv(3, 8), head=conv(8, 4), forgotten=False).eval()
    model.a.register_forward_hook(collect)
    sc.trace(model, X)
    assert list(model.a._forward_hooks.values()) == [collect]
    assert not model.forgotten
