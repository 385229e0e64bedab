"""What a network's code does with channels is tried: what is offered is exact, and no more is kept than must be."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc
from tests.cases.table import Net, conv
from tests.surroundings import X, pruned

pytestmark = pytest.mark.filterwarnings("ignore")


def helper(x: Tensor, layer: nn.Conv2d) -> Tensor:
    """Code outside any module that looks at a count."""
    return x.relu() if layer.out_channels == 8 else x.sigmoid()


def scripted(x: Tensor) -> Tensor:
    """Read a size where nobody can see it."""
    return x / x.size(1)


VALUES = "would read other channels or values than in the original"
CODE: dict[str, tuple[Callable[[Net, Tensor], Tensor], str | None]] = {
    "other sizes read": (lambda m, x: x + x.shape[-2:][0] * x.shape[0] * x.size(2), None),
    "open sizes": (lambda m, x: x.view(2, -1, 64).mean(2)[..., None, None] + x, None),
    "copies by what is there": (lambda m, x: x + m.one.bias.view(1, -1, 1, 1).expand(-1, -1, -1, -1), None),
    "own operator": (lambda m, x: torch.ops.aten.relu.default(x), None),
    "pad positions": (lambda m, x: F.pad(x, pad=(1, 1)), None),
    "pad channels": (lambda m, x: F.pad(input=x, pad=(0, 0, 0, 0, 1, 1))[:, 1:-1], None),
    "slice positions": (lambda m, x: x[:, :, ::2, 1:][..., 1:], None),
    "like another": (lambda m, x: x + torch.zeros_like(x), None),
    "joined and flattened": (lambda m, x: torch.cat([x, 2 * x + 1], 1).clamp(0, 6)[:, : x.shape[1]], None),
    "instance norm of that size": (lambda m, x: nn.InstanceNorm2d(x.shape[1])(x), None),
    "a count that is not asked for": (lambda m, x: x if len(x) == 2 or m.one.out_channels == 8 else -x, None),
    "a number's type asked for": (lambda m, x: F.avg_pool2d(x, m.size if type(m.size) is int else m.size[0]), None),
    "size read": (lambda m, x: x / x.shape[1], VALUES),
    "size() read": (lambda m, x: x * x.size(1), VALUES),
    "size() of all": (lambda m, x: x * x.size()[1], VALUES),
    "size kept whole": (lambda m, x: (lambda shape: x * shape[1])(x.shape), VALUES),
    "length read": (lambda m, x: x * len(x[0]), VALUES),
    "elements counted": (lambda m, x: x / x.numel(), VALUES),
    "stride read": (lambda m, x: x * x.stride(0), VALUES),
    "parameter's size read": (lambda m, x: x * m.one.weight.shape[0], VALUES),
    "larger taken": (lambda m, x: x * max(x.shape[1] // 4, 1), VALUES),
    "small steps counted": (lambda m, x: x + 2e-5 * x.shape[1], VALUES),
    "divided by it and much more": (lambda m, x: x / (x.shape[1] + 10000), VALUES),
    "scaled": (lambda m, x: x * x.shape[1] ** -0.5, VALUES),
    "a small part added": (lambda m, x: x + 1e-6 * x.shape[1], VALUES),
    "as small a part added": (lambda m, x: x + x.shape[1] * 1e-6, VALUES),
    "a small number divided": (lambda m, x: x + 1e-5 / x.shape[1], VALUES),
    "attribute read by a function": (lambda m, x: helper(x, m.one), VALUES),
    "scripted": (lambda m, x: torch.jit.script(scripted)(x), VALUES),
    "a weight's bound": (lambda m, x: F.linear(x.mean((2, 3)), m.f.weight[: x.shape[1] // 4]).sum() + x, "size"),
    "bound of the map": (lambda m, x: x[..., : x.shape[1] // 2] + x[..., :4], "as a bound of"),
    "bound behind an index": (lambda m, x: x[0, None, ..., : x.shape[1] // 2] + x[..., :4], "as a bound of"),
    "written sizes": (lambda m, x: x.view(-1, 8, 8, 8), "the model's own code fails"),
    "written groups": (lambda m, x: F.conv2d(x, m.depthwise, groups=8), "the model's own code fails"),
    "written norm": (lambda m, x: F.layer_norm(x, (8, 8, 8)), "is normalised together with space"),
    "copies by number": (lambda m, x: x + torch.ones(1).expand(8).view(8, 1, 1), "the model's own code fails"),
    "slice channels": (lambda m, x: x * x[:, :1], "its blocks can't lose equal fractions"),
    "pick by a list": (lambda m, x: x[:, [0, 1, 2, 3, 4, 5, 6, 7]], "is read at given indices"),
    "group norm of a number": (lambda m, x: F.group_norm(x, 2), "in blocks whose number the code fixes"),
    "group norm of that size": (lambda m, x: nn.GroupNorm(1, x.shape[1])(x), "from a tensor that is no parameter"),
    "batch norm of that size": (lambda m, x: nn.BatchNorm2d(x.shape[1])(x), "from a tensor that is no parameter"),
    "multiply matrices": (lambda m, x: x + (x.flatten(2) @ x.flatten(2).mT).mean(), "reduces over the"),
    "array": (lambda m, x: torch.from_numpy(x.detach().numpy().copy()), "is handed out of PyTorch"),
    "list of numbers": (lambda m, x: torch.tensor(x.tolist(), dtype=x.dtype), "is handed out of PyTorch"),
    "parameter made of it": (lambda m, x: nn.Parameter(x, requires_grad=False), "the model's own code fails"),
    "another class's view": (lambda m, x: x.as_subclass(torch.Tensor), "the model's own code fails"),
    "another library's view": (lambda m, x: torch.from_dlpack(x.detach()), "no rule says how channels flow"),
}  # fmt: skip
"""What may be done with a layer's channels, and why they are kept or inexact then, if they are."""


@pytest.mark.parametrize("name", CODE)
def test_what_code_may_do_with_channels_is_tried(name: str) -> None:
    code, refusal = CODE[name]
    torch.manual_seed(0)
    net = Net(lambda m, x: m.head(code(m, m.one(x))), one=conv(3, 8), head=conv(8, 4), f=nn.Linear(8, 8), size=2)
    net.depthwise = nn.Parameter(torch.randn(8, 1, 1, 1))
    graph, _, _ = pruned(net)
    reasons = [refused.reason for refused in graph.refused if "one.weight" in refused.tensors]
    reasons += [group.reason for group in graph.groups if not group.exact]
    assert [group.name for group in graph.groups if group.exact] == ([] if refusal else ["one"])
    assert any(refusal in reason for reason in reasons) if refusal else not reasons


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
    "nothing that tells": lambda y, o: lambda: o,
}


@pytest.mark.parametrize("name", RETURNED)
def test_channels_that_are_returned_are_kept_whatever_holds_them(name: str) -> None:
    def forward(m: Net, x: Tensor) -> object:
        y = m.a(x)
        return RETURNED[name](y, m.head(m.b(y)))

    model = Net(forward, a=conv(3, 16), b=conv(16, 12), head=conv(12, 4)).eval()
    if name != "nothing that tells":
        assert [group.name for group in pruned(model, X, {"b": [0, 3, 5]})[0].groups] == ["b"]
        return
    graph = sc.trace(model, X)
    assert not graph.groups
    assert any("no tensor is returned" in refusal.reason for refusal in graph.refused)
    report = sc.verify(model, model, sc.plan_removal(graph, {}), X)
    assert not report.exact
    assert any("no tensor" in reason for reason in report.refused)
