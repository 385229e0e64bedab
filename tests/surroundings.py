"""A small network to put code around, and a short way to prune it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import secateur as sc
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


def around(code: Callable[[Tensor], Tensor]) -> sc.ChannelGraph:
    """Trace a convolution of 16 channels whose features the code handles before a head reads them."""
    model = Net(lambda m, x: m.head(code(m.a(x))), a=conv(3, 16), head=conv(16, 4))
    return sc.trace(model.eval(), X)
