"""Costs, by the papers' equations in a slow form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.graph import cost


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.grouped = nn.Conv2d(8, 12, (1, 3), groups=4, bias=False)
        self.up = nn.ConvTranspose2d(12, 6, 2, stride=2)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(self.depthwise(self.conv(x).relu()).relu()).relu()
        return self.head(self.up(x).relu().mean((2, 3)))


def slow_macs(model: nn.Module, x: Tensor) -> int:
    """Count one multiplication for every output element and every weight that it is made of."""
    total = 0

    def count(layer: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        nonlocal total
        if isinstance(layer, nn.ConvTranspose2d):
            # Every input element meets every weight of its channel.
            total += args[0].numel() * layer.weight[0].numel()
        elif isinstance(layer, nn.Conv2d):
            total += out.numel() * layer.weight[0].numel()
        elif isinstance(layer, nn.Linear):
            total += out.numel() * layer.in_features

    hooks = [m.register_forward_hook(count) for m in model.modules()]
    model(x)
    for hook in hooks:
        hook.remove()
    return total // x.shape[0]


@pytest.mark.parametrize("batch", [1, 3])
def test_macs_and_parameters_before_and_after(batch: int) -> None:
    model = Net().eval()
    x = torch.randn(batch, 3, 11, 9)
    graph = sc.trace(model, x)
    assert sc.macs(graph) == slow_macs(model, x)
    assert sc.parameters(graph) == sum(p.numel() for p in model.parameters())
    scores = {g.name: torch.rand(g.size) for g in graph.groups}
    plan = sc.plan(graph, scores, sc.Target(channels=0.5))
    small = sc.apply(model, plan)
    assert sc.macs(graph, plan) == slow_macs(small, x)
    assert sc.parameters(graph, plan) == sum(p.numel() for p in small.parameters())


def test_run_time_memory_is_maps_times_the_batch_plus_weights() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 5, 1, bias=False))
    graph = sc.trace(model, torch.randn(2, 3, 6, 4))
    maps = 4 * 6 * 4 * (8 + 5)
    weights = 4 * (9 * 3 * 8 + 8 * 5)
    for batch in (1, 7):
        assert cost.run_time_memory(graph, batch_size=batch) == maps * batch + weights
    plan = sc.plan_removal(graph, {"0": [0, 1, 2]})
    assert cost.run_time_memory(graph, plan) == 4 * 24 * (5 + 5) + 4 * (9 * 3 * 5 + 5 * 5)


def test_published_figures() -> None:
    from secateur.models import MODELS

    x = torch.randn(1, 3, 32, 32)
    assert sc.macs(sc.trace(MODELS["resnet56"](), x)) == 125_485_696
    graph = sc.trace(MODELS["vgg16"](), x)
    assert sum(c.macs for c in cost.layer_costs(graph) if c.macs and "conv" in _kind(graph, c.module)) == 313_196_544
    assert sc.macs(sc.trace(MODELS["lenet5"](), torch.randn(1, 1, 28, 28))) == 2_293_000


def _kind(graph: sc.ChannelGraph, module: str) -> str:
    return next(p.kind for p in graph.layers if p.module == module)
