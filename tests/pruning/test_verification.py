"""The report of a verification."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import secateur as sc


class TwoModes(nn.Module):
    """Code that runs in train mode alone, with a size written in it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1)
        self.norm = nn.BatchNorm2d(8)
        self.size = [str(size)]

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.a(x))
        if self.training:
            x = x.view(len(x), int(self.size[0]), 6, 6)
        out: Tensor = self.b(x)
        return out


@pytest.mark.parametrize(("size", "exact"), [(8, False), (-1, True), (7, True)])
def test_a_network_that_can_not_be_trained_any_more_is_no_success(size: int, exact: bool) -> None:
    model, x = TwoModes(size).eval(), torch.randn(2, 3, 8, 8)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    plan = sc.plan_removal(sc.trace(model, x), {"a": [0, 3]})
    report = sc.verify(model, sc.apply(model, plan), plan, x)
    assert report.exact is report.trains is exact
    assert any("train mode: the pruned network fails" in note for note in report.refused) is not exact
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert not model.training


class Block(nn.Module):
    """Halves of what one layer makes; how wide they are is noted for another forward, and for merging the layers."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.c, self.groups, self.times = width, width, 5
        self.first = nn.Conv2d(3, 2 * width, 1)
        self.inner = nn.ModuleDict({"deep": nn.Conv2d(width, width, 3, padding=1, groups=width)})
        self.last = nn.Conv2d(2 * width, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.first(x).chunk(2, 1)
        return self.last(torch.cat((a, self.inner["deep"](b)), 1))


def test_attributes_that_did_not_follow_are_listed() -> None:
    x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(Block(), Block(16)).eval()
    graph = sc.trace(model, x)
    removed = {g.name: list(range(0, g.size, 4)) for g in graph.groups if g.name.startswith("0.")}
    plan = sc.plan_removal(graph, removed)
    check = sc.verify(model, sc.apply(model, plan), plan, x)
    assert check.exact
    assert check.kept == (
        "0: keeps c = 8, which equalled the width of inner.deep",
        "0: keeps groups = 8, which equalled the width of inner.deep",
    )
    assert not sc.verify(model, sc.apply(model, sc.PruningPlan()), sc.PruningPlan(), x).kept
