"""A trace leaves a network as it found it: weights, memory, statistics, attributes and what containers hold."""

from __future__ import annotations

import collections
import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc
from tests.cases.table import conv
from tests.surroundings import Base, X, pruned


class Momentum(Base):
    """A second encoder follows the first with momentum, and a queue is written, past what counts versions."""

    def __init__(self) -> None:
        super().__init__()
        self.b = conv(3, 16)
        self.head = conv(16, 4)
        self.register_buffer("queue", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] > 1:
            self.b.weight.data.mul_(0.9).add_(self.a.weight.data, alpha=0.1)
        self.queue.data.copy_(torch.arange(4.0))
        return self.head(self.a(x) + self.b(x) * self.b.weight.shape[0])


def test_what_a_forward_writes_into_parameters_is_put_back() -> None:
    model = Momentum().eval()
    before = copy.deepcopy(model.state_dict())
    graph = sc.trace(model, X)
    assert any("a.weight" in refusal.tensors for refusal in graph.refused)  # the trial ran, and failed
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Exchanging(Base):
    """Gives a parameter other memory, a buffer another size, and normalises by the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("place", torch.zeros(4))
        self.norm = nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        self.b.bias.data = self.b.bias.data * 1.5
        self.place.resize_(6).fill_(1)
        x = F.batch_norm(self.a(x), self.norm.running_mean, self.norm.running_var, training=True)
        return self.head(self.b(x * (1.0 if x.shape[1] > 1 else 2.0)))


def test_memory_sizes_and_statistics_are_as_before() -> None:
    model = Exchanging().eval()
    before = copy.deepcopy(model.state_dict())
    sc.trace(model, X)
    found = model.state_dict()
    assert {name: (t.shape, t.dtype) for name, t in found.items()} == {n: (t.shape, t.dtype) for n, t in before.items()}
    assert [name for name, value in found.items() if not torch.equal(value, before[name])] == []


class Spiking(nn.Module):
    """Integrates what it reads, from one call to the next, and fires above a threshold."""

    def __init__(self) -> None:
        super().__init__()
        self.potential: float | Tensor = 0.0
        self.traces: tuple[Tensor, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        raised = self.potential + (x - self.potential) / 2
        fires = (raised > 0.5).to(x.dtype)
        self.potential, self.traces, self.last = raised * (1 - fires), (raised, fires), x
        return fires


def test_state_that_a_forward_leaves_in_attributes_is_put_back() -> None:
    model = nn.Sequential(conv(3, 16), Spiking(), conv(16, 12), Spiking(), conv(12, 4))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        inputs = 3 * torch.randn(2, 3, 8, 8)
    graph = sc.trace(model.eval(), inputs)
    assert {group.name for group in graph.groups} == {"0", "2"}
    plan = sc.plan_removal(graph, {"0": list(range(15)), "2": [0, 5]})
    small = sc.apply(model, plan)
    assert sc.verify(model, small, plan, inputs).exact
    for each in (model, small):
        assert [(m.potential, m.traces, hasattr(m, "last")) for m in (each[1], each[3])] == [(0.0, (), False)] * 2
    assert small(inputs).shape == small(inputs).shape == (2, 4, 8, 8)


class Accumulating(Base):
    """Keeps features in containers of its own, numbers under numbers, and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.features: dict[str, Tensor] = {}
        self.nested = {"past": [torch.zeros(1)], "shapes": set[int]()}
        self.last: collections.deque[Tensor] = collections.deque(maxlen=2)
        self.calls, self.ran = 0, False

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        key = str(tuple(y.shape[2:]))
        if key not in self.features:
            self.features[key] = torch.ones(1, y.shape[1], *y.shape[2:])
        self.nested["past"].append(y)  # type: ignore[attr-defined]
        self.nested["shapes"].add(y.shape[1])  # type: ignore[attr-defined]
        self.last.append(y)
        self.calls, self.ran = self.calls + 1, True
        return self.head(self.b(y * self.features[key]))


def test_containers_and_counts_of_a_network_are_as_before() -> None:
    model = Accumulating()
    first = model.nested["past"][0]  # type: ignore[index]
    graph, plan, small = pruned(model)
    assert {group.name for group in graph.groups} == {"a", "b"}, "nothing is left that has the unpruned size"
    assert sc.verify(model, small, plan, X).exact
    for each in (model, small):
        assert (each.features, each.nested["shapes"], list(each.last)) == ({}, set(), [])  # type: ignore[index]
        assert len(each.nested["past"]) == 1  # type: ignore[index, arg-type]
        assert (each.calls, each.ran) == (0, False)
    assert model.nested["past"][0] is first  # type: ignore[index]


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
