"""A small network to put code around, and a short way to prune it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import secateur as sc
from secateur.graph.steps import steps
from tests.cases.table import conv

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Base(nn.Module):
    """A convolution of 16 channels, one more, and a head that is the output."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.head = conv(3, 16), conv(16, 12), conv(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(x).relu()))


def pruned(
    model: nn.Module, inputs: Any = X, removed: dict[str, list[int]] | None = None
) -> tuple[sc.ChannelGraph, sc.PruningPlan, nn.Module]:
    """Trace, and remove the channels given, or half of every exact group: the cut has to be exact."""
    graph = sc.trace(model.eval(), inputs)
    if removed is None:
        found = {g.name: steps(g, range(g.size)) for g in graph.groups if g.exact}
        removed = {name: [c for step in each[: len(each) // 2 + 1] for c in step] for name, each in found.items()}
    plan = sc.plan_removal(graph, removed)
    small = sc.apply(model, plan)
    report = sc.verify(model, small, plan, inputs)
    assert report.exact, (report, graph)
    return graph, plan, small
