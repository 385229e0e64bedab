"""Layers that a run reaches with tensors without elements: a detector's mask head where nothing was detected."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from tests import oracle
from tests.oracle import randomise


class Detector(nn.Module):
    """Scores images, and looks closer at those above a threshold."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.score = nn.Linear(8, 1)
        self.head = head
        self.threshold = float("inf")

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(x)
        scores = self.score(features.mean((2, 3)))[:, 0]
        return scores, self.head(features[scores > self.threshold])


class Prefix(nn.Module):
    """Reads the first channels, as many as are written in the code."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.out = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.conv(x)[:, :4])


class Looping(nn.Module):
    """Looks at the examples one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.conv = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.conv(self.inner(x))
        found = torch.zeros(len(x), 6, dtype=x.dtype)
        for i in range(len(x)):
            found[i] = maps[i].amax((1, 2))
        return found


class Plain(nn.BatchNorm2d):
    """Batch norm by the operator itself, as older code calls it."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.batch_norm(
            x, self.weight, self.bias, self.running_mean, self.running_var, False, 0.1, self.eps, False
        )


def normed() -> nn.Module:
    """Return a mask head of convolutions with batch norm."""
    return nn.Sequential(
        nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 1),
    )  # fmt: skip


def pruned(model: nn.Module, x: Tensor) -> tuple[sc.ChannelGraph, sc.PruningPlan, nn.Module]:
    """Trace a network and take every second channel of each group."""
    graph = sc.trace(model, x)
    plan = sc.plan_removal(graph, {g.name: list(range(0, g.size, 2)) for g in graph.groups})
    return graph, plan, sc.apply(model, plan)


@pytest.mark.parametrize("functional", [False, True])
def test_a_batch_norm_that_sees_nothing_goes_with_its_convolution(functional: bool) -> None:
    head = normed()
    if functional:
        head[1] = Plain(8)
    model, x = randomise(Detector(head)).eval(), torch.randn(2, 3, 4, 4).double()
    graph, plan, small = pruned(model, x)
    assert {g.name for g in graph.groups} == {"body.0", "head.0", "head.3"}
    members = {m.tensor for g in graph.groups if g.name == "head.0" for m in g.members}
    assert members >= {"head.1.weight", "head.1.running_var"}
    model.threshold = small.threshold = float("-inf")
    assert oracle.judge(model, small, plan, x).exact
    assert len(small(x)[1]) == 2


def test_a_size_in_the_code_that_nothing_was_tried_against_is_refused() -> None:
    model, x = randomise(Detector(Prefix())).eval(), torch.randn(2, 3, 4, 4).double()
    graph, plan, small = pruned(model, x)
    assert [g.name for g in graph.groups] == ["body.0"]
    assert any("without elements" in r.reason for r in graph.refused)
    model.threshold = small.threshold = float("-inf")
    assert oracle.judge(model, small, plan, x).exact


def test_what_a_loop_over_nothing_would_read_is_kept() -> None:
    model, x = randomise(Detector(Looping())).eval(), torch.randn(2, 3, 4, 4).double()
    graph, plan, small = pruned(model, x)
    assert [g.name for g in graph.groups] == ["body.0", "head.inner"]
    assert any(r.module == "head.conv" and "without elements" in r.reason for r in graph.refused)
    model.threshold = small.threshold = float("-inf")
    assert oracle.judge(model, small, plan, x).exact


def test_what_saw_nothing_is_said() -> None:
    model, x = randomise(Detector(normed())).eval(), torch.randn(2, 3, 4, 4).double()
    graph, plan, small = pruned(model, x)
    assert any(note.startswith("head.0: ") and "without elements" in note for note in graph.notes)
    assert any("without elements" in said for said in sc.verify(model, small, plan, x).refused)


def test_a_batch_of_no_examples_shows_nothing() -> None:
    graph = sc.trace(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), torch.zeros(0, 3, 8, 8))
    assert not graph.groups
    assert graph.notes[0].startswith("0: reads tensors without elements")
