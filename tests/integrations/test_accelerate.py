"""A loop of one's own on Accelerate, measured by torchmetrics, pruned in the middle."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassF1Score

import secateur as sc

X = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(32) % 4


def test_a_loop_goes_on_with_the_pruned_network_and_its_optimizer() -> None:
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model, optimizer, batches = accelerator.prepare(
        net, torch.optim.Adam(net.parameters(), lr=0.01), DataLoader(TensorDataset(X, Y), 16)
    )

    def fit() -> None:
        model.train()
        for x, y in batches:
            optimizer.zero_grad()
            accelerator.backward(F.cross_entropy(model(x), y))
            optimizer.step()

    fit()
    whole, inner = accelerator.unwrap_model(model), optimizer.optimizer
    metric = MulticlassF1Score(num_classes=4)
    result = sc.prune(whole, X[:2], sc.Target(channels=0.5), method="l1", test=[(X, Y)], metric=metric)
    assert result.report["metric"] == "MulticlassF1Score"
    expected = MulticlassF1Score(num_classes=4)
    expected.update(whole.eval()(X), Y)
    assert result.report["before"]["test"] == expected.compute().item()

    model, optimizer = accelerator.prepare(result.model, sc.carry_optimizer(inner, whole, result.model, result.plan))
    moment = inner.state[whole[0].weight]["exp_avg"]
    carried = optimizer.optimizer.state[accelerator.unwrap_model(model)[0].weight]
    assert torch.equal(carried["exp_avg"], moment[result.plan.kept_outputs["0"]])
    fit()
    assert carried["step"] == 4
    assert accelerator.unwrap_model(model)[0].out_channels == 4
