"""Numbers that a network's own code holds or reads off shapes: what it does with them holds for every plan."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc
from secateur.graph.steps import steps
from tests.cases.table import Net, conv
from tests.surroundings import Base, X, around, pruned

# Numbers of the network's own


class Cropped(Base):
    """Crops to a number of tokens which is equal to the width by chance."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = 16
        self.head = nn.Linear(16, 4)  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        n, c, h, w = x.shape
        return self.head(x.view(n, c, h * w)[:, :, : 4 * self.tokens].mean(2))


def test_a_number_equal_to_the_width_by_chance_stays() -> None:
    model = Cropped()
    _, plan, small = pruned(model, torch.randn(2, 3, 4, 4))
    assert small.a.out_channels == 8
    assert small.tokens == 16
    assert sc.verify(model, small, plan, torch.randn(2, 3, 12, 12)).exact


class Counting(Base):
    """Holds numbers in every way, and counts on in one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.sizes, self.pair = 0, [16, 12], (8, "same")
        self.kept: object = None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.sizes.append(3)
        self.kept = (self.sizes[1] * 2, x.shape[1], [self.calls])
        x = self.a(x).view(len(x), self.sizes[0], *x.shape[2:])
        return self.head(self.b(x))


def test_numbers_are_plain_again_after_a_trace() -> None:
    model = Counting()
    _, plan, small = pruned(model)
    assert (type(model.calls), model.calls) == (int, 0)
    assert ({type(size) for size in model.sizes}, model.sizes) == ({int}, [16, 12])
    assert [type(part) for part in model.pair] == [int, str]
    assert model.kept is None, "what a run left is gone"
    assert small.sizes == [8, 12]
    assert sc.verify(model, small, plan, X).exact


def test_sizes_listed_at_a_split_follow_their_parts() -> None:
    model = Net(
        lambda m, x: m.head(m.cut(m.a(x))),
        a=conv(3, 16),
        cut=SplitParts(10, 6),
        head=conv(12, 4),
    )
    graph, plan, small = pruned(model)
    assert "a" in {g.name for g in graph.groups}
    assert small.cut.first + small.cut.second == small.a.out_channels < 16
    assert sc.verify(model, small, plan, X).exact


class SplitParts(nn.Module):
    """Two parts, each read by a layer of its own, whose widths are numbers of the module."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__()
        self.first, self.second = first, second
        self.b, self.c = conv(first, 12), conv(second, 12)

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.split(x, [self.first, self.second], 1)
        return self.b(a) + self.c(b)


class EqualParts(nn.Module):
    """Two parts of one width, twice the same number of the module."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.b, self.c = conv(width, 12), conv(width, 12)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.split((self.width, self.width), 1)
        return self.b(a) + self.c(b)


def test_one_number_given_twice_at_a_split_follows_equal_parts() -> None:
    model = Net(lambda m, x: m.head(m.cut(m.a(x))), a=conv(3, 16), cut=EqualParts(8), head=conv(12, 4))
    graph = sc.trace(model.eval(), X)
    assert [(g.name, g.size, int(g.blocks.max()) + 1) for g in graph.groups if g.name == "a"] == [("a", 16, 2)]


class AsksForTheType(Base):
    """Takes a number or a pair, and looks at its type."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 2

    def forward(self, x: Tensor) -> Tensor:
        size = (self.size, self.size) if type(self.size) is int else self.size
        return self.head(self.b(F.avg_pool2d(self.a(x), (size[0], size[1]))))


def test_code_that_asks_for_the_type_of_a_number_is_traced() -> None:
    model = AsksForTheType()
    graph, plan, small = pruned(model)
    assert {g.name for g in graph.groups} == {"a", "b"}
    assert type(model.size) is int
    assert sc.verify(model, small, plan, X).exact


# What depends on the width


def test_a_dimension_that_would_be_squeezed_away_keeps_two() -> None:
    model = Net(
        lambda m, x: m.head(F.adaptive_avg_pool2d(m.a(x), 1).squeeze()), a=conv(3, 16), head=nn.Linear(16, 4)
    ).eval()
    graph = sc.trace(model, X)
    (group,) = graph.groups
    with pytest.raises(sc.PlanError, match="2 have to stay, and 1 would"):
        sc.plan_removal(graph, {"a": list(range(15))})
    plan = sc.plan_removal(graph, {"a": list(range(14))})
    assert sc.verify(model, sc.apply(model, plan), plan, X).exact
    assert sum(map(len, steps(group, range(16)))) == 14


FORMULAS = {
    "takes the larger": lambda x: x * max(x.shape[1] // 4, 2),
    "counts in small steps": lambda x: x + 2e-5 * x.shape[1],
    "divides by it": lambda x: x / (x.shape[1] + 10000),
    "scales": lambda x: x * x.shape[1] ** -0.5,
    "takes a small part of it": lambda x: x + 1e-6 * x.shape[1],
    "takes as small a part": lambda x: x + x.shape[1] * 1e-6,
    "divides a small number by it": lambda x: x + 1e-5 / x.shape[1],
}


@pytest.mark.parametrize("name", FORMULAS)
def test_what_is_computed_with_the_width_is_refused(name: str) -> None:
    graph = around(FORMULAS[name])
    assert not graph.groups
    assert any("a.weight" in refusal.tensors for refusal in graph.refused)


@pytest.mark.parametrize("below", [lambda c: c > 4, lambda c: c + 1 > 5, lambda c: min(c, 5) == 5])
def test_where_code_does_otherwise_below_a_width_as_many_stay_as_were_tried(below: Callable[[int], bool]) -> None:
    model = Net(lambda m, x: m.head(y.relu() if below((y := m.a(x)).shape[1]) else -y), a=conv(3, 16), head=conv(16, 4))
    graph = sc.trace(model.eval(), X)
    (group,) = graph.groups
    assert group.least == 7  # a prime number near a half
    assert group.constraint == "at least 7 channels stay"
    with pytest.raises(sc.PlanError, match="at least 7 have to stay"):
        sc.plan_removal(graph, {"a": list(range(10))})
    plan = sc.plan(graph, sc.score(model, graph, "l1"), sc.Target(channels=0.4))
    assert sc.verify(model, sc.apply(model, plan), plan, X).exact


class Standardised(nn.Conv2d):
    """Weights standardised by batch norm, which takes more than one value (NFNet)."""

    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight.reshape(1, len(self.weight), -1)
        rows = F.batch_norm(rows, None, None, training=True) * (1 if x.shape[1] + 1 else 2)
        return F.conv2d(x, rows.reshape_as(self.weight), self.bias)


def test_what_fails_with_one_channel_alone_keeps_two() -> None:
    model = Net(lambda m, x: m.head(m.b(m.a(x))), a=conv(3, 16), b=Standardised(16, 12, 1), head=conv(12, 4))
    graph = sc.trace(model.eval(), X)
    assert {(group.name, group.least) for group in graph.groups} == {("a", 2), ("b", 2)}


class WhereShapesAgree(Base):
    """A shortcut where the shapes agree, which those of the unpruned network do not."""

    def __init__(self) -> None:
        super().__init__()
        self.b, self.head = conv(16, 24), conv(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        y = self.b(x)
        return self.head(x + y if x.shape == y.shape else y)


def test_widths_that_code_found_to_differ_do_not_come_to_agree() -> None:
    model = WhereShapesAgree().eval()
    graph = sc.trace(model, X)
    assert [g.name for g in graph.groups] == ["a"]
    assert any("b.weight" in refusal.tensors and "come to equal" in refusal.reason for refusal in graph.refused)
    assert all("test_numbers.py" in r.source for r in graph.refused if "b.weight" in r.tensors)


def test_more_channels_stay_than_the_number_that_they_are_compared_with() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.head(y if y.shape != x.shape else y + x)

    inputs = torch.randn(2, 5, 8, 8)
    (group,) = sc.trace(Net(forward, a=conv(5, 16), head=conv(16, 4)).eval(), inputs).groups
    assert group.constraint == "at least 6 channels stay"
    assert len(steps(group, range(16))) == 10


HIDDEN = {
    "the number of elements": lambda y: y.numel() > 4 * 2 * 64,
    "the length": lambda y: len(y[0]) > 4,
    "a stride": lambda y: y.stride(0) > 4 * 64,
    "a shift": lambda y: y.shape[1] >> 2,
    "a division": lambda y: divmod(y.shape[1], 5)[0],
    "its square": lambda y: y.shape[1] * y.shape[1] > 16,
    "truth": lambda y: bool(y.shape[1] // 5),
    "its odd neighbour": lambda y: (y.shape[1] | 1) - 4 > 0,
    "its complement": lambda y: ~y.shape[1] < -5,
    "a look into a table": lambda y: {2: 0, 3: 0}.get(y.shape[1], 1),
    "a quarter": lambda y: 0.25 * y.shape[1] > 1,
    "a fraction that it is more than": lambda y: y.shape[1] > 4.5,
    "a quarter that it differs from": lambda y: y.shape[1] // 4 != 1,
    "a fraction of one": lambda y: 1.0 / y.shape[1] < 0.25,
    "a power": lambda y: 2.0 ** y.shape[1] > 20,
    "a logarithm": lambda y: math.log2(y.shape[1]) > 2.5,
    "a root": lambda y: math.isqrt(3 * y.shape[1]) > 3,
    "its bits": lambda y: (3 * y.shape[1]).bit_length() > 4,
    "its pieces": lambda y: len(y.split(4, 1)) > 1,
}


@pytest.mark.parametrize("name", HIDDEN)
def test_widths_are_tried_however_code_asks_for_them(name: str) -> None:
    model = Net(lambda m, x: m.head(y if HIDDEN[name](y := m.a(x)) else -y), a=conv(3, 16), head=conv(16, 4))
    (group,) = sc.trace(model.eval(), X).groups
    assert group.size - sum(map(len, steps(group, range(group.size)))) > 4


def test_numbers_of_modules_are_tried_however_code_asks_for_them() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        y = m.a(x).view(-1, m.width, 8, 8)  # type: ignore[arg-type]
        return m.head(y.relu() if math.log2(m.width) > 2.5 else -y)  # type: ignore[arg-type]

    model = Net(forward, a=conv(3, 16), head=conv(16, 4))
    model.width = 16  # type: ignore[assignment]
    (group,) = sc.trace(model.eval(), X).groups
    assert group.least > 5


def test_where_code_does_otherwise_below_a_layers_own_count_as_many_stay() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        return m.head(y.relu() if m.a.out_channels > 4 else -y)

    (group,) = sc.trace(Net(forward, a=conv(3, 16), head=conv(16, 4)).eval(), X).groups
    assert group.least > 4


def test_of_a_layers_own_count_remainders_are_kept_too() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        y = m.b(m.a(x))
        assert m.a.out_channels % 4 == m.b.in_channels % 2 == m.norm.num_features % 3 == 0
        return m.head(m.norm(y))

    model = Net(forward, a=conv(3, 16), b=conv(16, 12), norm=nn.BatchNorm2d(12), head=conv(12, 4)).eval()
    assert {group.name: group.multiple for group in sc.trace(model, X).groups} == {"a": 4, "b": 3}
    assert type(model.a.out_channels) is type(model.norm.num_features) is int


class Heads(Base):
    """Channels that are cut into heads, and a number of dimensions kept as an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.dim = 4, 1

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y = y.flatten(2).view(y.size(0), self.num_heads, 4, 64).softmax(-1)
        y = y.flatten(self.dim, 2).unflatten(2, (8, 8))
        return self.head(self.b(y))


def test_what_the_rules_ask_for_is_not_asked_by_the_code() -> None:
    graph = sc.trace(Heads().eval(), X)
    heads = graph.groups[0]
    assert (heads.size, heads.least, heads.multiple) == (4, 2, 1)  # their number is given, so two are tried


# What remains of a division

REMAINDERS: dict[str, tuple[Callable[[Tensor], bool], int]] = {
    "of the width": (lambda y: y.shape[1] % 4 == 0, 4),
    "another than none": (lambda y: y.size(1) % 5 == 1, 5),
    "of a half": (lambda y: y.shape[1] // 2 % 2 == 0, 4),
    "of a multiple": (lambda y: y.shape[1] * 3 % 2 == 0, 2),
    "of two divisions": (lambda y: y.shape[1] % 2 == 0 and divmod(y.shape[1], 3)[1] == 1, 6),
    "in bits": (lambda y: y.shape[1] & 3 == 0, 4),
    "by dividing and multiplying": (lambda y: y.shape[1] // 4 * 4 == y.shape[1], 4),
}


@pytest.mark.parametrize("name", REMAINDERS)
def test_channels_go_in_multiples_of_what_their_number_is_divided_by(name: str) -> None:
    holds, multiple = REMAINDERS[name]

    def forward(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        assert holds(y)
        return m.head(y)

    model = Net(forward, a=conv(3, 16), head=conv(16, 4)).eval()
    graph = sc.trace(model, X)
    (group,) = graph.groups
    assert group.multiple == multiple
    assert group.constraint.endswith(f"channels go in multiples of {multiple}")
    assert {len(step) for step in steps(group, range(16))} == {multiple}
    with pytest.raises(sc.PlanError, match=f"multiples of {multiple}"):
        sc.plan_removal(graph, {"a": [0]})
    for step in range(multiple, 15, multiple):
        plan = sc.plan_removal(graph, {"a": list(range(step))})
        assert sc.verify(model, sc.apply(model, plan), plan, X).exact
    for ratio in (0.3, 0.6):
        plan = sc.plan(graph, sc.score(model, graph, "l1"), sc.Target(channels=ratio))
        assert sc.verify(model, sc.apply(model, plan), plan, X).exact


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
        for i in range(before):
            x = getattr(m, f"before{i}")(x)
        y = m.a(x)
        assert UNSEEN_REMAINDERS[name](y)
        return m.head(y)

    layers = {f"before{i}": conv(8 if i else 3, 8) for i in range(before)}
    model = Net(forward, **layers, a=conv(8 if before else 3, 64), head=conv(64, 4))
    assert "a" not in {group.name for group in sc.trace(model.eval(), X).groups}


BOUNDS = {
    "of another weight": lambda m, x: F.linear((y := m.a(x)).mean((2, 3)), m.f.weight[: y.shape[1] // 4]).sum() + y,
    "of the map": lambda m, x: (y := m.a(x))[..., : y.shape[1] // 4] + y[..., :4],
    "behind an index": lambda m, x: (y := m.a(x))[0, None, ..., : y.shape[1] // 4] + y[..., :4],
}


@pytest.mark.parametrize("name", BOUNDS)
def test_widths_that_bound_other_dimensions_are_kept(name: str) -> None:
    model = Net(lambda m, x: m.head(BOUNDS[name](m, x)), a=conv(3, 16), f=nn.Linear(16, 8), head=conv(16, 4))
    graph = sc.trace(model.eval(), X)
    assert not graph.groups
    assert any("a.weight" in r.tensors and ("bound" in r.reason or "size" in r.reason) for r in graph.refused)


def test_halves_bounded_by_the_width_still_go() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        half = y.shape[1] // 2
        return m.head(y[:, :half] * y[:, half:].sigmoid())

    model = Net(forward, a=conv(3, 16), head=conv(8, 4)).eval()
    _, plan, small = pruned(model)
    assert small.a.out_channels == 8
    assert sc.verify(model, small, plan, X).exact


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_inputs_that_tell_nothing_are_not_tried(value: float) -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        y = m.norm(m.a(x)).relu()
        return m.head(y * y.shape[1] ** -0.5)

    model = Net(forward, a=conv(3, 16, bias=False), norm=nn.BatchNorm2d(16), head=conv(16, 4)).eval()
    assert not sc.trace(model, torch.full((1, 3, 8, 8), value)).groups


class Divided(Base):
    """A module that asks whether its own number can be divided, of a width that a view is given."""

    def __init__(self) -> None:
        super().__init__()
        self.channels = 16

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        assert self.channels // 2 % 3 == 2
        return self.head(self.b(x.flatten(2).view(len(x), self.channels, 8, 8)))


def test_numbers_of_modules_are_divided_alike() -> None:
    graph = sc.trace(Divided().eval(), X)
    assert {group.name: group.multiple for group in graph.groups} == {"a": 6, "b": 1}


def test_blocks_lose_equal_fractions_in_multiples() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        assert y.shape[1] % 3 == 0
        return m.head(m.b(y))

    model = Net(forward, a=conv(3, 24), b=conv(24, 24, groups=2), head=conv(24, 4)).eval()
    graph = sc.trace(model, X)
    (first, _) = graph.groups
    assert first.quota.tolist() == [3, 3]
    plan = sc.plan_removal(graph, {"a": [0, 1, 2, 12, 13, 14]})
    assert sc.verify(model, sc.apply(model, plan), plan, X).exact


@pytest.mark.parametrize(("widths", "multiples"), [((8, 8), {"a": 4, "b": 4}), ((2, 14), {"b": 4})])
def test_of_concatenated_channels_each_group_goes_in_multiples(
    widths: tuple[int, int], multiples: dict[str, int]
) -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        y = torch.cat([m.a(x), m.b(x)], 1)
        assert y.shape[1] % 4 == 0
        return m.head(y)

    graph = sc.trace(Net(forward, a=conv(3, widths[0]), b=conv(3, widths[1]), head=conv(16, 4)).eval(), X)
    assert {group.name: group.multiple for group in graph.groups} == multiples
    assert all("remainder of their number by 4" in refusal.reason for refusal in graph.refused if refusal.module == "a")


def test_where_some_of_a_groups_channels_are_counted_none_go() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        assert y[:, :8].shape[1] % 4 == 0
        return m.head(y)

    graph = sc.trace(Net(forward, a=conv(3, 16), head=conv(16, 4)).eval(), X)
    assert not graph.groups
