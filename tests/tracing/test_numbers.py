"""Numbers that a network's own code holds or reads off shapes: what it does with them holds for every plan."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc
from secateur.graph.steps import steps
from tests.cases.table import Net, conv
from tests.surroundings import X, pruned

# Numbers of the network's own


def test_a_number_equal_to_the_width_by_chance_stays() -> None:
    def cropped(m: Net, x: Tensor) -> Tensor:
        x = m.a(x)
        n, c, h, w = x.shape
        return m.head(x.view(n, c, h * w)[:, :, : 4 * m.tokens].mean(2))

    model = Net(cropped, a=conv(3, 16), tokens=16, head=nn.Linear(16, 4))
    _, plan, small = pruned(model, torch.randn(2, 3, 4, 4))
    assert (small.a.out_channels, small.tokens) == (8, 16)
    assert sc.verify(model, small, plan, torch.randn(2, 3, 12, 12)).exact


def test_numbers_are_plain_in_a_run_and_after_a_trace() -> None:
    def counting(m: Net, x: Tensor) -> Tensor:
        m.calls += 1
        m.sizes.append(3)
        m.kept = (m.sizes[1] * 2, x.shape[1], [m.calls])
        x = m.a(x).view(len(x), m.sizes[0], *x.shape[2:])
        return m.head(m.b(x))

    layers = {"a": conv(3, 16), "b": conv(16, 12), "head": conv(12, 4)}
    model = Net(counting, **layers, calls=0, sizes=[16, 12], pair=(8, "same"), kept=None)
    graph, _, small = pruned(model)
    assert [group.name for group in graph.groups] == ["a", "b"]
    plain = (model.calls, *model.sizes, *model.pair, model.kept)
    assert plain == (0, 16, 12, 8, "same", None), "what a run left is gone"
    assert {type(number) for number in plain} == {int, str, type(None)}
    assert small.sizes == [8, 12]


# What depends on the width


def past_a_division(m: Net, y: Tensor) -> bool:
    """Divide by a number, and by zero, which the code catches."""
    width = y.shape[1]
    holds: bool = width % 4 == 0
    with contextlib.suppress(ZeroDivisionError):
        width % 0
    return holds


PRIME = "at least 7 channels stay"
"""A prime number near a half is tried."""
ASKED: dict[str, tuple[Callable[[Net, Tensor], object], str]] = {
    "a bound": (lambda m, y: y.shape[1] > 4, PRIME),
    "a bound of a sum": (lambda m, y: y.shape[1] + 1 > 5, PRIME),
    "the smaller": (lambda m, y: min(y.shape[1], 5) == 5, PRIME),
    "the number of elements": (lambda m, y: y.numel() > 4 * 2 * 64, PRIME),
    "the length": (lambda m, y: len(y[0]) > 4, PRIME),
    "a stride": (lambda m, y: y.stride(0) > 4 * 64, PRIME),
    "a shift": (lambda m, y: y.shape[1] >> 2, PRIME),
    "its square": (lambda m, y: y.shape[1] * y.shape[1] > 16, PRIME),
    "truth": (lambda m, y: bool(y.shape[1] // 5), PRIME),
    "its odd neighbour": (lambda m, y: (y.shape[1] | 1) - 4 > 0, PRIME),
    "its complement": (lambda m, y: ~y.shape[1] < -5, PRIME),
    "a look into a table": (lambda m, y: {2: 0, 3: 0}.get(y.shape[1], 1), PRIME),
    "a quarter": (lambda m, y: 0.25 * y.shape[1] > 1, PRIME),
    "a fraction that it is more than": (lambda m, y: y.shape[1] > 4.5, PRIME),
    "a fraction of one": (lambda m, y: 1.0 / y.shape[1] < 0.25, PRIME),
    "a power": (lambda m, y: 2.0 ** y.shape[1] > 20, PRIME),
    "a logarithm": (lambda m, y: math.log2(y.shape[1]) > 2.5, PRIME),
    "a root": (lambda m, y: math.isqrt(3 * y.shape[1]) > 3, PRIME),
    "its bits": (lambda m, y: (3 * y.shape[1]).bit_length() > 4, PRIME),
    "a layer's own count": (lambda m, y: m.a.out_channels > 4, PRIME),
    "a module's number": (lambda m, y: (y.view(-1, m.width, 8, 8), math.log2(m.width) > 2.5)[1], PRIME),
    "a quarter that it differs from": (lambda m, y: y.shape[1] // 4 != 1, "at least 8 channels stay"),
    "its pieces": (lambda m, y: len(y.split(4, 1)) > 1, "equal fractions of 4 blocks, at least 12 channels stay"),
    "whether it is squeezed away": (lambda m, y: y.mean((2, 3)).squeeze().ndim == 2, ""),
    "another shape": (lambda m, y: y.shape != m.x.shape, "at least 4 channels stay"),
    "its quotient": (lambda m, y: divmod(y.shape[1], 5)[0], "multiples of 5"),
    "its remainder": (lambda m, y: y.shape[1] % 4 == 0, "multiples of 4"),
    "its remainder after a division by zero": (past_a_division, "multiples of 4"),
    "another remainder than none": (lambda m, y: y.size(1) % 5 == 1, "multiples of 5"),
    "the remainder of a half": (lambda m, y: y.shape[1] // 2 % 2 == 0, "multiples of 4"),
    "of a multiple": (lambda m, y: y.shape[1] * 3 % 2 == 0, "multiples of 2"),
    "of two": (lambda m, y: y.shape[1] % 2 == 0 and divmod(y.shape[1], 3)[1] == 1, "multiples of 6"),
    "in bits": (lambda m, y: y.shape[1] & 3 == 0, "multiples of 4"),
    "by dividing and multiplying": (lambda m, y: y.shape[1] // 4 * 4 == y.shape[1], "multiples of 4"),
    "of a layer's own count": (lambda m, y: m.a.out_channels % 4 == 0, "multiples of 4"),
    "of a reader's count": (lambda m, y: m.head.in_channels % 4 == 0, "multiples of 4"),
    "of a norm's count": (lambda m, y: m.norm.num_features % 5 == 1, "multiples of 5"),
    "of a module's": (lambda m, y: (y.view(-1, m.width, 8, 8), m.width // 2 % 3 == 2)[1], "multiples of 6"),
}  # fmt: skip
"""What code asks before it does something, and what of the channels it asks that of can go then."""


@pytest.mark.parametrize("name", ASKED)
def test_what_code_asks_of_a_width_holds_for_every_plan(name: str) -> None:
    holds, constraint = ASKED[name]

    def forward(m: Net, x: Tensor) -> Tensor:
        m.x = x
        y = m.norm(m.a(x))
        return m.head(y if holds(m, y) else -y)

    model = Net(forward, a=conv(3, 16), norm=nn.BatchNorm2d(16), width=16, head=conv(16, 4)).eval()
    graph = sc.trace(model, X)
    (group,) = graph.groups
    assert group.constraint.removeprefix("channels go in ") == constraint
    assert type(model.a.out_channels) is type(model.norm.num_features) is int
    found = steps(group, range(16))
    assert {len(step) for step in found} == {int(group.quota.sum())}
    says = constraint.split("at least ")[-1].replace("channels stay", "have to stay") or "2 have to stay, and 1 would"
    with pytest.raises(sc.PlanError, match=says):
        sc.plan_removal(graph, {"a": list(range(1 if group.multiple > 1 else sum(map(len, found)) + 1))})
    plan = sc.plan(graph, sc.score(model, graph, "l1"), sc.Target(channels=0.2))
    for each in (plan, sc.plan_removal(graph, {"a": [c for step in found for c in step]})):
        assert sc.verify(model, sc.apply(model, each), each, X).exact


UNSEEN_REMAINDERS = {
    "of a plain number": lambda y: int(y.shape[1]) % 4 == 0,
    "of a sum": lambda y: (y.shape[1] + 4) % 4 == 0,
    "of the number below none": lambda y: -y.shape[1] % 4 == 0,
    "as a common divisor": lambda y: math.gcd(y.shape[1], 4) == 4,
    "as a fraction": lambda y: (y.shape[1] / 4).is_integer(),
    "of all elements": lambda y: y.numel() // 128 % 4 == 0,
    "in bits": lambda y: y.shape[1] >> 2 << 2 == y.shape[1],
    "as a square": lambda y: math.isqrt(y.shape[1]) ** 2 == y.shape[1],
}


@pytest.mark.parametrize("before", range(3))
@pytest.mark.parametrize("name", UNSEEN_REMAINDERS)
def test_remainders_that_numbers_do_not_notice_hold_for_no_trial(name: str, before: int) -> None:
    """Whichever part of the layer a trial takes, which depends on the number of layers before."""

    def forward(m: Net, x: Tensor) -> Tensor:
        y = m.a(m.before(x))
        assert UNSEEN_REMAINDERS[name](y)
        return m.head(y)

    layers = nn.Sequential(*(conv(8 if i else 3, 8) for i in range(before)))
    model = Net(forward, before=layers, a=conv(8 if before else 3, 64), head=conv(64, 4))
    assert "a" not in {group.name for group in sc.trace(model.eval(), X).groups}


def joined(m: Net, x: Tensor) -> Tensor:
    y = torch.cat([m.a(x), m.b(x)], 1)
    assert y.shape[1] % 4 == 0
    return m.head(y)


def grouped(m: Net, x: Tensor) -> Tensor:
    y = m.a(x)
    assert y.shape[1] % 3 == 0
    return m.head(m.b(y))


def counted_in_part(m: Net, x: Tensor) -> Tensor:
    y = m.a(x)
    assert y[:, :8].shape[1] % 4 == 0
    return m.head(y)


def in_heads(m: Net, x: Tensor) -> Tensor:
    """Cut channels into heads, whose number is given; a number of dimensions is an attribute."""
    y = m.a(x)
    y = y.flatten(2).view(y.size(0), m.heads, 4, 64).softmax(-1)
    return m.head(y.flatten(m.dim, 2).unflatten(2, (8, 8)))


def standardised(m: Net, x: Tensor) -> Tensor:
    """Standardise weights by batch norm, which takes more than one value (NFNet)."""
    x = m.a(x)
    rows = F.batch_norm(m.weight.reshape(1, len(m.weight), -1), None, None, training=True)
    return m.head(F.conv2d(x, (rows * (1 if x.shape[1] + 1 else 2)).reshape_as(m.weight)))


def differing(m: Net, x: Tensor) -> Tensor:
    """Take a shortcut where the shapes agree, which those of the unpruned network do not."""
    x = m.a(x)
    y = m.b(x)
    return m.head(x + y if x.shape == y.shape else y)


LIMITS: list[tuple[Callable[[Net, Tensor], Tensor], dict[str, Any], dict[str, tuple[int, list[int]]], str]] = [
    (joined, {"a": conv(3, 8), "b": conv(3, 8)}, {"a": (2, [4]), "b": (2, [4])}, ""),
    (joined, {"a": conv(3, 2), "b": conv(3, 14)}, {"b": (2, [4])}, ": the remainder of their number by 4"),
    (grouped, {"a": conv(3, 24), "b": conv(24, 16, groups=2)}, {"a": (2, [3, 3]), "b": (1, [1, 1])}, ""),
    (counted_in_part, {"a": conv(3, 16)}, {}, r"test_numbers.py:\d+: the remainder"),
    (in_heads, {"a": conv(3, 16), "heads": 4, "dim": 1}, {"a": (2, [1])}, ""),  # their number is given: two are tried
    (
        standardised,
        {"a": conv(3, 12), "weight": nn.Parameter(torch.randn(16, 12, 1, 1))},
        {"a": (2, [1]), "weight": (2, [1])},
        "",
    ),
    (differing, {"a": conv(3, 12), "b": conv(12, 16)}, {"a": (2, [1])}, r"test_numbers.py:\d+: .*come to equal"),
]
"""Code, its layers, how many channels of which groups stay and go together, and a refusal."""


@pytest.mark.parametrize(("code", "parts", "limits", "refusal"), LIMITS)
def test_each_group_is_limited_by_what_is_asked_of_its_channels(
    code: Callable[[Net, Tensor], Tensor], parts: dict[str, Any], limits: dict[str, tuple[int, list[int]]], refusal: str
) -> None:
    graph, _, _ = pruned(Net(code, **parts, head=conv(16, 4)))
    assert {group.name: (group.least, group.quota.tolist()) for group in graph.groups} == limits
    assert any(re.search(refusal, f"{refused.source}: {refused.reason}") for refused in graph.refused)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_inputs_that_tell_nothing_are_not_tried(value: float) -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        y = m.norm(m.a(x)).relu()
        return m.head(y * y.shape[1] ** -0.5)

    model = Net(forward, a=conv(3, 16, bias=False), norm=nn.BatchNorm2d(16), head=conv(16, 4)).eval()
    assert not sc.trace(model, torch.full((1, 3, 8, 8), value)).groups
