"""What users' programs do with the number of channels: remainders, thresholds, equal widths, fractions."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.cases.table import Net, case, conv, conv_bn, pooled


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


@case(prunable={"wide": 6}, refused={"other": "gives the number of these channels"}, outputs=("left", "right", "third"))
def part_viewed_by_the_width_of_others() -> nn.Module:
    """A part of the channels is viewed at the width of others: the part stays, and so do the others; the rest goes."""

    def forward(m: Net, x: Tensor) -> Tensor:
        a, b = m.wide(x).relu().split(m.widths, 1)
        other = m.other(x)
        n, width, height, _ = other.shape
        out: Tensor = m.left(a.reshape(n, width, height, -1)) + m.right(b) + m.third(other)
        return out

    layers = {"wide": conv(3, 10), "other": conv(3, 4), "left": conv(4, 3), "right": conv(6, 3), "third": conv(4, 3)}
    return Net(forward, **layers, widths=[4, 6])


@case(prunable={"kernel": 16, "rest.0.0": 16, "rest.3.0": 16}, refused={"a": "trial pruning"})
def kernel_scaled_by_its_fan_in() -> nn.Module:
    """A kernel is scaled by its width in the code; layers behind it have nothing to do with that."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = F.conv2d(m.a(x).relu(), m.kernel / math.sqrt(m.kernel.shape[1] * 9), padding=1)
        return m.head(pooled(m.rest(x.relu())))

    rest, kernel = nn.Sequential(*(conv_bn(16, 16) for _ in range(4))), nn.Parameter(torch.randn(16, 16, 3, 3))
    return Net(forward, a=conv(3, 16), kernel=kernel, rest=rest, head=nn.Linear(16, 4))


def _known(x: Tensor) -> dict[str, Tensor]:
    """Return an image and, of each of its values, whether it is known."""
    return {"x": x, "mask": (x > 0).to(x.dtype)}


@case(inputs=lambda: _known(torch.randn(2, 1, 8, 6)), refused={"a": "trial pruning"})
def average_of_what_a_mask_lets_through() -> nn.Module:
    """What a mask lets through is counted over as many channels as the features have."""

    def forward(m: Net, x: Tensor, mask: Tensor) -> Tensor:
        x = m.a(x).relu() * mask
        number = mask.expand_as(x).sum((1, 2, 3), keepdim=True)
        return m.head(x.sum((2, 3), keepdim=True) / number)

    return Net(forward, a=conv(1, 16), head=conv(16, 8))


class PartialConv(nn.Conv2d):
    """Convolution of what is known, which says what is known then: two tensors, two kernels."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, padding=1)
        self.register_buffer("ones", torch.ones_like(self.weight))
        self.window = inputs * 9

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Convolve."""
        known = F.conv2d(mask, self.ones, None, 1, 1)  # type: ignore[arg-type]
        ratio = self.window / (known + 1e-8)
        known = known.clamp(0, 1)
        bias = self.bias.view(1, self.out_channels, 1, 1)  # type: ignore[union-attr]
        raw = F.conv2d(x * mask, self.weight, self.bias, 1, 1)
        return ((raw - bias) * ratio * known + bias) * known, known


@case(inputs=lambda: _known(torch.randn(2, 3, 8, 6)), prunable={"a": 16, "b": 16}, outputs=("c",))
def partial_convolutions() -> nn.Module:
    """Partial convolutions one after another, which scale by how much of their window is known (inpainting)."""

    def forward(m: Net, x: Tensor, mask: Tensor) -> Tensor:
        x, mask = m.a(x, mask)
        x, mask = m.b(x.relu(), mask)
        out: Tensor = m.c(x.relu(), mask)[0]
        return out

    return Net(forward, a=PartialConv(3, 16), b=PartialConv(16, 16), c=PartialConv(16, 3))
