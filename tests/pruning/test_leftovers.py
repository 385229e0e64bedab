"""Numbers of modules that equal a width and do not follow it are listed, before a cut and after it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import secateur as sc


class Block(nn.Module):
    """Keeps its width for another forward, and a number that equals no width."""

    def __init__(self, width: int, other: int) -> None:
        super().__init__()
        self.width, self.other, self.label, self.flag = width, other, "w", True
        self.conv1, self.conv2 = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv2(self.conv1(x).relu())
        return out


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.head = nn.Conv2d(3, 7, 3), Block(7, 5), Block(7, 5), nn.Conv2d(7, 4, 1)
        self.classes = 4

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.b(self.a(self.stem(x))))
        return out


class Counting(Block):
    """Asks for the width in the forward that is traced, so that it follows."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.reshape(len(x), self.width, *x.shape[2:]))


def test_what_would_stay_is_noted_once_a_class() -> None:
    model, images = Network().eval(), torch.rand(1, 3, 9, 9)
    graph = sc.trace(model, images)
    assert {g.name for g in graph.groups} == {"stem", "a.conv1", "a.conv2", "b.conv1", "b.conv2"}
    (note,) = graph.notes
    assert note.startswith("a keeps width = 7, which equals the width of conv1 (and 1 more of class Block); the traced")
    assert note in str(graph)
    plan = sc.plan_removal(graph, {"b.conv1": [0]})
    report = sc.verify(model, sc.apply(model, plan), plan, images)
    assert report.exact
    assert report.kept == ("b: keeps width = 7, which equalled the width of conv1",)


def test_what_follows_is_not_noted() -> None:
    model, images = Network().eval(), torch.rand(1, 3, 12, 11)
    model.a, model.b = Counting(7, 5), Counting(7, 5)
    graph = sc.trace(model, images)
    following = {(rule.module, rule.name) for rule in graph.attributes}
    assert following == {("a", "width"), ("b", "width")}
    assert not graph.notes


def test_widths_that_can_not_change_are_not_noted() -> None:
    model = nn.Sequential(Block(7, 5))
    graph = sc.trace(model, torch.rand(1, 7, 9, 9))
    assert {g.name for g in graph.groups} == {"0.conv1"}
    assert [note.partition(",")[0] for note in graph.notes] == ["0 keeps width = 7"]
    wider = Block(7, 5)
    wider.conv1, wider.conv2 = nn.Conv2d(7, 6, 1), nn.Conv2d(6, 7, 1)
    assert not sc.trace(nn.Sequential(wider), torch.rand(1, 7, 9, 9)).notes
