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
    """How wide its layers are is noted for another forward, and for merging them."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.c, self.groups, self.times = width, width, 5
        self.inner = nn.ModuleDict({"deep": nn.Conv2d(3, width, 1)})
        self.last = nn.Conv2d(width, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner["deep"](x))


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


class Cross(nn.Module):
    """Halves, cut by their number; another forward cuts them by their width (C2f of YOLOv8)."""

    def __init__(self, c: int = 8) -> None:
        super().__init__()
        self.c, self.limit = c, c
        self.first, self.inner, self.last = (
            nn.Conv2d(3, 2 * c, 1),
            nn.Conv2d(c, c, 3, padding=1),
            nn.Conv2d(3 * c, 3, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        assert self.limit < 100
        y = list(self.first(x).chunk(2, 1))
        y.append(self.inner(y[-1]))
        return self.last(torch.cat(y, 1))

    def forward_split(self, x: Tensor) -> Tensor:
        y = list(self.first(x).split((self.c, self.c), 1))
        y.append(self.inner(y[-1]))
        return self.last(torch.cat(y, 1))


def test_the_width_of_halves_follows_for_another_forward() -> None:
    x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(Cross()).eval()
    graph = sc.trace(model, x)
    plan = sc.plan(graph, sc.score(model, graph, "l2"), sc.Target(channels=0.4), allocation="uniform")
    small = sc.apply(model, plan)
    check = sc.verify(model, small, plan, x)
    assert check.exact
    assert small[0].c < 8
    assert torch.equal(small[0].forward_split(x), small(x))
    # A number that the code compares is left to what it compares it with.
    assert small[0].limit == 8
    assert any("0: keeps limit = 8" in text for text in check.kept)
