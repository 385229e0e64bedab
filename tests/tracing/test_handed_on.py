"""Channels that leave PyTorch, or the network, are kept, whatever holds them."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from tests.cases.table import Net, conv
from tests.surroundings import X, around

ELSEWHERE: dict[str, Callable[[Tensor], Tensor]] = {
    "a parameter made of it": lambda x: nn.Parameter(x, requires_grad=False),
    "another class's view of it": lambda x: x.as_subclass(torch.Tensor),
    "another library's view of it": lambda x: torch.from_dlpack(x.detach()),
    "a list of numbers": lambda x: torch.tensor(x.tolist()),
    "an array": lambda x: torch.tensor(x.detach().numpy()[..., ::-1].copy()),
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_features_handed_on_where_nothing_sees_it_are_kept(name: str) -> None:
    graph = around(ELSEWHERE[name])
    assert not graph.groups
    assert any("a.weight" in refusal.tensors for refusal in graph.refused)


@dataclasses.dataclass(slots=True)
class Slots:
    """What a network returns, without a dict of attributes."""

    features: Tensor
    result: Tensor


RETURNED: dict[str, Callable[[Tensor, Tensor], object]] = {
    "values": lambda y, o: {"y": y, "o": o}.values(),
    "items": lambda y, o: {"y": y, "o": o}.items(),
    "a queue": lambda y, o: collections.deque([y, o]),
    "a generator": lambda y, o: (t for t in (y, o)),
    "a map": lambda y, o: map(torch.relu, (y, o)),
    "slots": Slots,
    "an array": lambda y, o: (y.detach().numpy(), o),
    "a list of numbers": lambda y, o: (y.tolist(), o),
    "a shape": lambda y, o: (y.shape, o),
    "a number": lambda y, o: {"width": y.shape[1], "o": o},
    "parameters": lambda y, o: nn.ParameterList([nn.Parameter(y), nn.Parameter(o)]),
}


@pytest.mark.parametrize("name", RETURNED)
def test_channels_that_are_returned_are_kept_whatever_holds_them(name: str) -> None:
    def forward(m: Net, x: Tensor) -> object:
        y = m.a(x)
        return RETURNED[name](y, m.head(m.b(y)))

    model = Net(forward, a=conv(3, 16), b=conv(16, 12), head=conv(12, 4)).eval()  # type: ignore[arg-type]
    graph = sc.trace(model, X)
    assert [group.name for group in graph.groups] == ["b"]
    plan = sc.plan_removal(graph, {"b": [0, 3, 5]})
    report = sc.verify(model, sc.apply(model, plan), plan, X)
    assert report.exact, report


def test_where_nothing_is_returned_that_tells_nothing_is_pruned() -> None:
    def forward(m: Net, x: Tensor) -> object:
        y = m.head(m.a(x))
        return lambda: y

    model = Net(forward, a=conv(3, 16), head=conv(16, 4)).eval()  # type: ignore[arg-type]
    graph = sc.trace(model, X)
    assert not graph.groups
    assert any("no tensor is returned" in refusal.reason for refusal in graph.refused)
    plan = sc.plan_removal(graph, {})
    report = sc.verify(model, sc.apply(model, plan), plan, X)
    assert not report.exact
    assert any("no tensor" in reason for reason in report.refused)
