"""A trace leaves a network as it found it: weights, memory, statistics, attributes and what containers hold."""

from __future__ import annotations

import collections
import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc
from tests.cases.table import Net, conv
from tests.surroundings import Base, X, pruned


def momentum(m: Net, x: Tensor) -> Tensor:
    """Let a second encoder follow the first with momentum, and write a queue, past what counts versions."""
    m.b.weight.data.mul_(0.9).add_(m.a.weight.data, alpha=0.1)
    m.queue.data.copy_(torch.arange(4.0))
    return m.head(m.a(x) + m.b(x) * m.b.weight.shape[0])


def exchanging(m: Net, x: Tensor) -> Tensor:
    """Give a parameter other memory, a buffer another size, and normalise by the batch."""
    m.b.bias.data = m.b.bias.data * 1.5
    m.queue.resize_(6).fill_(1)
    x = F.batch_norm(m.a(x) + m.b(x), m.norm.running_mean, m.norm.running_var, training=True)
    return m.head(x * x.shape[1])


@pytest.mark.parametrize("code", [momentum, exchanging])
def test_what_a_forward_writes_into_parameters_and_buffers_is_put_back(code: Callable[[Net, Tensor], Tensor]) -> None:
    layers = {"a": conv(3, 16), "b": conv(3, 16), "norm": nn.BatchNorm2d(16), "head": conv(16, 4)}
    model = Net(code, **layers, queue=nn.Buffer(torch.zeros(4))).eval()
    before = copy.deepcopy(model.state_dict())
    graph = sc.trace(model, X)
    assert any("a.weight" in refusal.tensors for refusal in graph.refused)  # the trial ran, and failed
    assert [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])] == []


class Accumulating(Base):
    """Keeps features in containers of its own, numbers under numbers, counts calls, and integrates what it makes."""

    def __init__(self) -> None:
        super().__init__()
        self.features: dict[str, Tensor] = {}
        self.nested = {"past": [torch.zeros(1)], "shapes": set[int]()}
        self.last: collections.deque[Tensor] = collections.deque(maxlen=2)
        self.calls, self.ran = 0, False
        self.potential: float | Tensor = 0.0
        self.traces: tuple[Tensor, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        key = str(tuple(y.shape[2:]))
        if key not in self.features:
            self.features[key] = torch.ones(1, y.shape[1], *y.shape[2:])
        self.nested["past"].append(y)
        self.nested["shapes"].add(y.shape[1])
        self.last.append(y)
        self.calls, self.ran = self.calls + 1, True
        self.potential, self.traces, self.latest = (self.potential + y) / 2, (y, x), x
        return self.head(self.b(self.potential * self.features[key]))


def test_state_that_a_forward_leaves_in_attributes_and_containers_is_put_back() -> None:
    model = Accumulating()
    first = model.nested["past"][0]
    graph, _, small = pruned(model)
    assert {group.name for group in graph.groups} == {"a", "b"}, "nothing is left that has the unpruned size"
    for each in (model, small):
        assert (each.features, each.nested["shapes"], list(each.last)) == ({}, set(), [])
        assert len(each.nested["past"]) == 1
        assert (each.calls, each.ran, each.potential, each.traces) == (0, False, 0.0, ())
        assert not hasattr(each, "latest")
    assert model.nested["past"][0] is first
    assert small(X).shape == small(X).shape == (2, 4, 8, 8)


class Merging(nn.Conv2d):
    """Adds an update to its weight for evaluation, and takes it away for training (LoRA)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 1)
        self.update, self.merged = nn.Parameter(torch.randn(outputs, inputs, 1, 1)), False

    def train(self, mode: bool = True) -> Merging:
        super().train(mode)
        if mode == self.merged:
            self.weight.data += self.update.data * (-1 if mode else 1)
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight if self.merged else self.weight + self.update, self.bias)


def test_weights_merged_for_evaluation_are_as_before_to_the_last_bit() -> None:
    model = nn.Sequential(Merging(3, 16), nn.ReLU(), Merging(16, 12), nn.ReLU(), conv(12, 4))
    before = copy.deepcopy(model.state_dict())
    graph = sc.trace(model, X)
    plan = sc.plan_removal(graph, {group.name: [0, 3] for group in graph.groups})
    small = sc.apply(model, plan)
    assert sc.verify(model, small, plan, X).exact
    for each in (model, small):
        assert {(m.training, m.merged) for m in each.modules() if isinstance(m, Merging)} == {(True, False)}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
