"""What users' programs do with the number of channels: remainders, thresholds, equal widths, fractions."""

from __future__ import annotations

import math

from torch import Tensor, nn

from tests.cases.table import Net, case, conv, pooled


def _between(code: object) -> Net:
    """Return a network that does something with the channels between two convolutions."""
    return Net(lambda m, x: m.head(pooled(m.two(code(m.one(x))).relu())), one=conv(3, 16), two=conv(16, 12),  # type: ignore[operator]
               head=nn.Linear(12, 4))  # fmt: skip


@case(prunable={"one": 12, "two": 12})
def remainder_of_the_width() -> nn.Module:
    """Code asks whether a width can be divided by four: channels go in multiples of four."""
    return _between(lambda x: x.relu() if x.shape[1] % 4 == 0 else x.sigmoid())


@case(prunable={"one": 8, "two": 12})
def remainder_of_half_the_width() -> nn.Module:
    """Code asks whether half a width is even."""
    return _between(lambda x: x.relu() if x.shape[1] // 2 % 2 == 0 else x.sigmoid())


@case(prunable={"one": 6, "two": 12})
def threshold_of_the_width() -> nn.Module:
    """Code does something else where few channels are left: more than that have to stay."""
    return _between(lambda x: x.relu() if x.shape[1] > 5 else x.sigmoid())


@case(prunable={"one": 6, "two": 12})
def threshold_of_a_fraction() -> nn.Module:
    """A fraction on the left of a width, which takes it as the plain number that it is."""
    return _between(lambda x: x.relu() if 0.25 * x.shape[1] > 1 else x.sigmoid())


@case(prunable={"one": 6, "two": 12})
def threshold_of_a_function() -> nn.Module:
    """A function takes a width, and what it gives decides."""
    return _between(lambda x: x.relu() if math.log2(x.shape[1]) > 2 else x.sigmoid())


@case(prunable={"two": 12}, refused={"one": "trial pruning"})
def scaled_by_the_width() -> nn.Module:
    """Features are scaled by their number, by as little as rounding does."""
    return _between(lambda x: x + 1e-6 * x.shape[1])


@case(prunable={"two": 12}, refused={"one": "trial pruning"})
def scaled_by_a_parameters_width() -> nn.Module:
    """A kernel's fan-in is read off the parameter."""
    return Net(
        lambda m, x: m.head(pooled(m.two(m.one(x).relu() / math.sqrt(m.two.weight.shape[1])).relu())),
        one=conv(3, 16), two=conv(16, 12), head=nn.Linear(12, 4),
    )  # fmt: skip


@case(prunable={"head_of": 10}, refused={"one": "is compared with the equal", "two": "is compared with the equal"})
def equal_widths_compared() -> nn.Module:
    """Code does something else where two widths are equal, and nothing couples them: both stay."""

    def forward(m: Net, x: Tensor) -> Tensor:
        a = m.one(x).relu()
        b = m.two(a)
        y = 2 * b.relu() if a.shape[1] == b.shape[1] else b.relu()
        out: Tensor = m.head(pooled(m.head_of(y).relu()))
        return out

    return Net(forward, one=conv(3, 12), two=conv(12, 12), head_of=conv(12, 10), head=nn.Linear(10, 4))


@case(prunable={"one": 12}, refused={"two": "is compared with the smaller number"})
def unequal_widths_compared() -> nn.Module:
    """Code asks whether two widths are equal, and they are not: the larger must not come to equal the smaller."""

    def forward(m: Net, x: Tensor) -> Tensor:
        a = m.one(x).relu()
        b = m.two(a)
        out: Tensor = m.head(pooled(b if a.shape[1] == b.shape[1] else b.relu()))
        return out

    return Net(forward, one=conv(3, 12), two=conv(12, 16), head=nn.Linear(16, 4))


@case(prunable={"other.0": 8})
def viewed_by_the_width_of_others() -> nn.Module:
    """Channels are laid out by the number of other channels, which happen to be as many: neither can go alone.

    Groups of one size lose the same fraction of their channels every third time, so that numbers alone do not tell.
    """

    def forward(m: Net, x: Tensor) -> Tensor:
        a = m.one(x).relu()
        b = m.four(m.other(x))
        y = a.flatten(2).reshape(x.shape[0], b.shape[1], *x.shape[2:])
        out: Tensor = m.head(pooled(y)) + m.tail(pooled(b))
        return out

    other = nn.Sequential(conv(3, 9), nn.ReLU(), conv(9, 10), nn.ReLU())
    return Net(forward, one=conv(3, 8), other=other, four=conv(10, 8), head=nn.Linear(8, 4), tail=nn.Linear(8, 4))


@case(prunable={"one": 6, "two": 12})
def count_of_a_layer_compared() -> nn.Module:
    """Code asks a layer how many channels it makes, and branches on it."""
    return Net(
        lambda m, x: m.head(pooled(m.two(m.one(x).relu() if m.one.out_channels > 5 else m.one(x)).relu())),
        one=conv(3, 16), two=conv(16, 12), head=nn.Linear(12, 4),
    )  # fmt: skip
