"""Small networks on which criteria, compensations and rounds of pruning have gone wrong, several of each kind.

``KINDS`` names the kinds. Each network takes the images of ``X`` (or what its entry says) and scores five classes, but
for those whose forward, output or inputs are what is wrong with them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from tests.cases.table import Net, conv, pooled

X = torch.randn(10, 3, 16, 16, generator=torch.Generator().manual_seed(0))
Y = torch.arange(10) % 5


@dataclass(frozen=True)
class Network:
    """One network, what it is called on, and what kind of trouble it stands for."""

    name: str
    kind: str
    build: Callable[[], nn.Module]
    inputs: Any


KINDS = {
    "unequal": "Layers read a group unequally: some channels at more places than others.",
    "computed": "Weights are computed at each forward: parametrizations and masks.",
    "unseen": "Maps are read by code that calls no layer.",
    "transposed": "Producers in blocks along dimension 1: grouped transposed convolutions.",
    "narrow": "Rounds of pruning leave one channel in a part or block.",
    "positions": "Linear layers and convolutions along positions, with the channels among their rows.",
    "nested": "A batch is a nesting of containers.",
}
NETWORKS: dict[str, Network] = {}


def network(kind: str, inputs: Any = X) -> Callable[[Callable[[], nn.Module]], Callable[[], nn.Module]]:
    """Put the decorated builder into the table under its own name."""

    def enter(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        assert kind in KINDS
        assert build.__name__ not in NETWORKS
        NETWORKS[build.__name__] = Network(build.__name__, kind, build, inputs)
        return build

    return enter


# Unequal readings


@network("unequal")
def cross_stage() -> Net:
    """Half of the channels is read by a convolution of its own as well as by the head."""

    def forward(m: Net, x: Tensor) -> Tensor:
        a, b = m.stem(x).relu().chunk(2, 1)
        return pooled(m.head(torch.cat([a, b + m.side(b)], 1)))

    net = Net(forward, stem=conv(3, 8), side=conv(4, 4), head=conv(8, 5, 1))
    with torch.no_grad():
        net.side.weight *= 3
    return net


@network("unequal")
def c2f() -> Net:
    """Split, bottleneck with shortcut, everything concatenated (YOLOv8): a half is read twice by the last layer."""

    def forward(m: Net, x: Tensor) -> Tensor:
        y = list(m.cv1(m.stem(x)).relu().chunk(2, 1))
        y.append(m.m(y[-1]).relu() + y[-1])
        return m.out(pooled(m.cv2(torch.cat(y, 1)).relu()))

    return Net(forward, stem=conv(3, 6), cv1=conv(6, 16, 1), m=conv(8, 8), cv2=conv(24, 8, 1), out=nn.Linear(8, 5))


@network("unequal")
def c2f_of_two() -> Net:
    """Two bottlenecks with shortcuts: a half is read three times."""

    def forward(m: Net, x: Tensor) -> Tensor:
        y = list(m.cv1(x).relu().chunk(2, 1))
        for block in (m.m1, m.m2):
            y.append(block(y[-1]).relu() + y[-1])
        return m.out(pooled(m.cv2(torch.cat(y, 1)).relu()))

    return Net(forward, cv1=conv(3, 12, 1), m1=conv(6, 6), m2=conv(6, 6), cv2=conv(24, 8, 1), out=nn.Linear(8, 5))


@network("unequal")
def halves_apart() -> Net:
    """Each half is read by a layer of its own, at one size."""

    def forward(m: Net, x: Tensor) -> Tensor:
        a, b = m.stem(x).relu().chunk(2, 1)
        return pooled(m.left(a) + m.right(b))

    return Net(forward, stem=conv(3, 12), left=conv(6, 5), right=conv(6, 5))


@network("unequal")
def halves_at_two_scales() -> Net:
    """Each half is read by a layer of its own, one of them behind pooling: they are never seen together."""

    def forward(m: Net, x: Tensor) -> Tensor:
        a, b = m.stem(x).relu().chunk(2, 1)
        return pooled(m.left(a)) + pooled(m.right(F.max_pool2d(b, 2)))

    return Net(forward, stem=conv(3, 12), left=conv(6, 5), right=conv(6, 5))


@network("unequal")
def ghost_of_half() -> Net:
    """A ghost module: cheap maps of half of the channels beside their originals."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.primary(x).relu()
        return m.out(pooled(m.mix(torch.cat([x, m.cheap(x.chunk(2, 1)[0]).relu()], 1)).relu()))

    return Net(forward, primary=conv(3, 8), cheap=conv(4, 4, groups=4), mix=conv(12, 9, 1), out=nn.Linear(9, 5))


@network("unequal")
def dense() -> Net:
    """A dense block: later layers read more of what was made than earlier ones."""

    def forward(m: Net, x: Tensor) -> Tensor:
        parts = [m.stem(x).relu()]
        for layer in (m.one, m.two):
            parts.append(layer(torch.cat(parts, 1)).relu())
        return m.out(pooled(torch.cat([*parts, parts[0]], 1)))

    return Net(forward, stem=conv(3, 8), one=conv(8, 6), two=conv(14, 6), out=nn.Linear(28, 5))


@network("unequal")
def flattened_unequally() -> Net:
    """A flattened concatenation that holds one half twice."""

    def forward(m: Net, x: Tensor) -> Tensor:
        a, b = F.adaptive_avg_pool2d(m.stem(x).relu(), 2).chunk(2, 1)
        return m.out(torch.cat([a, b, b * b], 1).flatten(1))

    return Net(forward, stem=conv(3, 12), out=nn.Linear(72, 5))


@network("unequal")
def flattened_channels_last() -> Net:
    """The same with channels last: the copies of a half interleave."""

    def forward(m: Net, x: Tensor) -> Tensor:
        a, b = F.adaptive_avg_pool2d(m.stem(x).relu(), 2).chunk(2, 1)
        return m.out(torch.cat([a, b, b * b], 1).movedim(1, -1).flatten(1)) + pooled(m.side(a)) + pooled(m.other(b))

    return Net(forward, stem=conv(3, 12), out=nn.Linear(72, 5), side=conv(6, 5), other=conv(6, 5))


# Computed weights


class Add(nn.Module):
    """A low-rank update of a weight."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(0.1 * torch.randn(2, columns)), nn.Parameter(0.1 * torch.randn(rows, 2))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.b @ self.a).view_as(weight)


class Scale(nn.Module):
    """One factor for every filter."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.by = nn.Parameter(1 + 0.5 * torch.rand(rows))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.by.view(-1, *[1] * (weight.dim() - 1))


class Clamped(nn.Module):
    """A weight within bounds, as quantization-aware training keeps it."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight.clamp(-0.1, 0.1)


def chain(change: Callable[[nn.Module], nn.Module]) -> nn.Module:
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*(change(m) if isinstance(m, nn.Conv2d) else m for m in (*layers, nn.Linear(12, 5))))


def parametrized(layer: nn.Module, made: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", made)
    return layer


@network("computed")
def weight_normed() -> nn.Module:
    """Weight norm."""
    return chain(parametrizations.weight_norm)


@network("computed")
def masked() -> nn.Module:
    """Masks of torch.nn.utils.prune."""
    return chain(lambda m: prune.l1_unstructured(m, "weight", 0.5))  # type: ignore[no-untyped-call]


@network("computed")
def low_rank() -> nn.Module:
    """Low-rank updates (LoRA)."""
    return chain(lambda m: parametrized(m, Add(len(m.weight), m.weight[0].numel())))  # type: ignore[arg-type, index, union-attr, operator]


@network("computed")
def scaled() -> nn.Module:
    """A learned factor for each filter."""
    return chain(lambda m: parametrized(m, Scale(len(m.weight))))  # type: ignore[arg-type]


@network("computed")
def clamped() -> nn.Module:
    """Weights kept within bounds."""
    return chain(lambda m: parametrized(m, Clamped()))


@network("computed")
def two_parametrizations() -> nn.Module:
    """A factor for each filter over a clamped weight, in every layer."""
    return chain(lambda m: parametrized(parametrized(m, Clamped()), Scale(len(m.weight))))  # type: ignore[arg-type]


@network("computed")
def masked_in_part() -> nn.Module:
    """A mask on one layer, weight norm on the next."""
    model = chain(lambda m: m)
    prune.random_unstructured(model[0], "weight", 0.3)  # type: ignore[index, no-untyped-call]
    parametrizations.weight_norm(model[2])  # type: ignore[index]
    return model


# Maps that no layer's input shows


@network("unseen")
def functional_head() -> Net:
    """The last layer lends its weight to a function."""

    def forward(m: Net, x: Tensor) -> Tensor:
        return F.linear(pooled(m.second(m.first(x).relu()).relu()), m.head.weight)

    return Net(forward, first=conv(3, 8), second=conv(8, 10), head=nn.Linear(10, 5))


@network("unseen")
def functional_convolution() -> Net:
    """A kernel that is a parameter."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = F.conv2d(m.first(x).relu(), m.kernel, padding=1)
        return pooled(m.head(x.relu()))

    return Net(forward, first=conv(3, 8), kernel=nn.Parameter(0.1 * torch.randn(10, 8, 3, 3)), head=conv(10, 5))


@network("unseen")
def functional_transposed() -> Net:
    """A grouped transposed kernel that is a parameter."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = F.conv_transpose2d(m.first(x).relu(), m.kernel, stride=2, groups=2)
        return pooled(m.head(x.relu()))

    return Net(forward, first=conv(3, 8), kernel=nn.Parameter(0.1 * torch.randn(8, 5, 2, 2)), head=conv(10, 5))


@network("unseen")
def product() -> Net:
    """Channels meet a matrix in a product."""

    def forward(m: Net, x: Tensor) -> Tensor:
        return pooled(m.second(m.first(x).relu()).relu()) @ m.matrix

    return Net(forward, first=conv(3, 8), second=conv(8, 10), matrix=nn.Parameter(0.1 * torch.randn(10, 5)))


@network("unseen")
def recurrent() -> Net:
    """An LSTM reads the channels of every position."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.second(m.first(x).relu()).relu().flatten(2).movedim(1, 2)
        return m.head(m.lstm(x)[0].mean(1))

    lstm = nn.LSTM(8, 6, batch_first=True)
    return Net(forward, first=conv(3, 8, stride=2), second=conv(8, 8, stride=2), lstm=lstm, head=nn.Linear(6, 5))


@network("unseen")
def read_in_half() -> Net:
    """A layer reads half of the channels, a product the others."""

    def forward(m: Net, x: Tensor) -> Tensor:
        a, b = m.second(m.first(x).relu()).relu().chunk(2, 1)
        return m.head(pooled(a)) + pooled(b) @ m.matrix

    parts = {"head": nn.Linear(6, 5), "matrix": nn.Parameter(0.1 * torch.randn(6, 5))}
    return Net(forward, first=conv(3, 8), second=conv(8, 12), **parts)


@network("unseen")
def inexact_and_functional() -> Net:
    """A layer norm over the channels, which makes the group inexact, in front of a function."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.second(m.first(x).relu()).movedim(1, -1)
        return F.linear(m.norm(x), m.head.weight).mean((1, 2))

    return Net(forward, first=conv(3, 8), second=conv(8, 10), norm=nn.LayerNorm(10), head=nn.Linear(10, 5))


# Grouped transposed convolutions


@network("transposed")
def grouped_transposed() -> Net:
    """Four blocks of three channels each."""

    def forward(m: Net, x: Tensor) -> Tensor:
        return pooled(m.b(m.t(m.a(x).relu()).relu()))

    return Net(forward, a=conv(3, 8, stride=2), t=nn.ConvTranspose2d(8, 12, 2, 2, groups=4), b=conv(12, 5))


@network("transposed", torch.randn(10, 3, 32, generator=torch.Generator().manual_seed(1)))
def grouped_transposed_1d() -> Net:
    """In one dimension, with batch norm."""

    def forward(m: Net, x: Tensor) -> Tensor:
        return m.b(m.bn(m.t(m.a(x).relu())).relu()).mean(2)

    transposed = nn.ConvTranspose1d(8, 12, 3, 2, groups=2)
    return Net(forward, a=nn.Conv1d(3, 8, 3), t=transposed, bn=nn.BatchNorm1d(12), b=nn.Conv1d(12, 5, 3))


@network("transposed", torch.randn(10, 3, 5, 6, 4, generator=torch.Generator().manual_seed(2)))
def grouped_transposed_3d() -> Net:
    """In three dimensions, without bias."""

    def forward(m: Net, x: Tensor) -> Tensor:
        return m.b(m.t(m.a(x).relu()).relu()).mean((2, 3, 4))

    transposed = nn.ConvTranspose3d(8, 8, (1, 2, 2), groups=2, bias=False)
    return Net(forward, a=nn.Conv3d(3, 8, 2), t=transposed, b=nn.Conv3d(8, 5, 1))


@network("transposed")
def grouped_transposed_in_a_row() -> Net:
    """Two of them in a row, read by a grouped convolution."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.u(m.t(m.a(x).relu()).relu()).relu()
        return m.head(pooled(m.c(x).relu()))

    up, more = nn.ConvTranspose2d(8, 12, 2, 2, groups=2), nn.ConvTranspose2d(12, 8, 2, 2, groups=2)
    return Net(forward, a=conv(3, 8, stride=2), t=up, u=more, c=conv(8, 6, groups=2), head=nn.Linear(6, 5))


@network("transposed")
def one_channel_a_block() -> Net:
    """Each block reads one channel and makes three."""

    def forward(m: Net, x: Tensor) -> Tensor:
        return pooled(m.b(m.t(m.a(x).relu()).relu()))

    return Net(forward, a=conv(3, 4), t=nn.ConvTranspose2d(4, 12, 2, 2, groups=4), b=conv(12, 5))


@network("transposed")
def grouped_transposed_shortcut() -> Net:
    """Its outputs are added to those of a plain one."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.a(x).relu()
        return m.head(pooled((m.t(x) + m.plain(x)).relu()))

    up = nn.ConvTranspose2d(8, 12, 2, 2, groups=2)
    return Net(forward, a=conv(3, 8), t=up, plain=nn.ConvTranspose2d(8, 12, 2, 2), head=nn.Linear(12, 5))


# Parts and blocks that come down to one channel


def mixed(*widths: int) -> Net:
    def forward(m: Net, x: Tensor) -> Tensor:
        parts = m.stem(x).relu().split(m.widths, 1)
        return m.head(pooled(torch.cat([part(y) for part, y in zip(m.parts, parts, strict=True)], 1).relu()))

    parts = nn.ModuleList(conv(n, n, groups=n) for n in widths)
    net = Net(forward, stem=conv(3, sum(widths)), parts=parts, head=nn.Linear(sum(widths), 5))
    net.widths = list(widths)
    return net


@network("narrow")
def mixed_depthwise() -> Net:
    """Unequal parts, each through a depthwise convolution of its own (MixNet)."""
    return mixed(5, 4, 2)


@network("narrow")
def mixed_of_pairs() -> Net:
    """Parts of two channels."""
    return mixed(2, 2, 2, 2)


@network("narrow")
def mixed_of_one() -> Net:
    """One wide part and one of two channels."""
    return mixed(10, 2)


@network("narrow")
def grouped_to_the_last() -> Net:
    """Rounds leave one channel in every block of a grouped convolution."""

    def forward(m: Net, x: Tensor) -> Tensor:
        return m.out(pooled(m.c(m.b(m.a(x).relu()).relu()).relu()))

    parts = {"b": conv(8, 12, groups=4), "c": conv(12, 16, stride=2), "out": nn.Linear(16, 5)}
    return Net(forward, a=conv(3, 8, stride=2), **parts)


@network("narrow")
def grouped_by_two_and_four() -> Net:
    """Two grouped convolutions of other numbers of blocks."""

    def forward(m: Net, x: Tensor) -> Tensor:
        return m.out(pooled(m.c(m.b(m.a(x).relu()).relu()).relu()))

    parts = {"b": conv(8, 12, groups=2), "c": conv(12, 8, groups=4), "out": nn.Linear(8, 5)}
    return Net(forward, a=conv(3, 8, stride=2), **parts)


@network("narrow")
def shuffled() -> Net:
    """A channel shuffle between two grouped convolutions."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.b(m.a(x).relu()).relu()
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return m.out(pooled(m.c(x).relu()))

    parts = {"b": conv(8, 12, groups=2), "c": conv(12, 8, groups=2), "out": nn.Linear(8, 5)}
    return Net(forward, a=conv(3, 8, stride=2), **parts)


@network("narrow")
def halved_twice() -> Net:
    """A vector cut into halves, one of them cut again."""

    def forward(m: Net, x: Tensor) -> Tensor:
        a, b = m.stem(x).relu().chunk(2, 1)
        c, d = b.chunk(2, 1)
        return m.head(pooled(m.one(a).relu() + m.two(torch.cat([d, c], 1)).relu()))

    return Net(forward, stem=conv(3, 8), one=conv(4, 6), two=conv(4, 6), head=nn.Linear(6, 5))


# Along positions


@network("positions")
def mixed_positions() -> Net:
    """Linear layers along the positions (MLP-Mixer)."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.stem(x).flatten(2)
        return m.head((x + m.t2(m.t1(x).relu())).mean(2))

    parts = {"t1": nn.Linear(16, 9), "t2": nn.Linear(9, 16), "head": nn.Linear(6, 5)}
    return Net(forward, stem=nn.Conv2d(3, 6, 4, 4), **parts)


@network("positions")
def mixer_with_channels() -> Net:
    """The same followed by linear layers along the channels."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.stem(x).flatten(2)
        x = (x + m.t2(m.t1(x).relu())).movedim(1, 2)
        return m.head((x + m.c2(m.c1(x).relu())).mean(1))

    parts = {"t1": nn.Linear(16, 9), "t2": nn.Linear(9, 16), "c1": nn.Linear(6, 8), "c2": nn.Linear(8, 6)}
    return Net(forward, stem=nn.Conv2d(3, 6, 4, 4), **parts, head=nn.Linear(6, 5))


@network("positions")
def along_rows() -> Net:
    """A linear layer along the rows of each map, and one along its columns."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.stem(x).relu()
        x = m.rows(x).relu().movedim(2, 3)
        return m.head(pooled(m.columns(x).relu()))

    return Net(forward, stem=conv(3, 8), rows=nn.Linear(16, 7), columns=nn.Linear(16, 6), head=nn.Linear(8, 5))


@network("positions")
def convolved_along_channels() -> Net:
    """A 1-d convolution whose channels are positions and whose positions are channels."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.stem(x).relu().flatten(2).movedim(1, 2)
        return m.head(m.mix(x).relu().movedim(1, 2).mean(2))

    return Net(forward, stem=nn.Conv2d(3, 8, 4, 4), mix=nn.Conv1d(16, 9, 1), head=nn.Linear(8, 5))


@network("positions")
def gated_positions() -> Net:
    """Half of the channels gate the other half, mixed along the positions (gMLP)."""

    def forward(m: Net, x: Tensor) -> Tensor:
        a, b = m.up(m.stem(x).flatten(2).movedim(1, 2)).chunk(2, 2)
        x = a * m.mix(b.movedim(1, 2)).movedim(1, 2)
        return m.head(m.down(x).mean(1))

    parts = {"up": nn.Linear(6, 12), "mix": nn.Linear(16, 16), "down": nn.Linear(6, 6), "head": nn.Linear(6, 5)}
    return Net(forward, stem=nn.Conv2d(3, 6, 4, 4), **parts)


@network("positions")
def positions_in_and_out() -> Net:
    """Two linear layers along the positions between convolutions."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.stem(x).relu()
        y = m.t2(m.t1(x.flatten(2)).relu()).view_as(x)
        return m.head(pooled(m.last((x + y).relu()).relu()))

    parts = {"t1": nn.Linear(64, 10), "t2": nn.Linear(10, 64), "last": conv(8, 10), "head": nn.Linear(10, 5)}
    return Net(forward, stem=conv(3, 8, stride=2), **parts)


# Nested inputs


class Views(NamedTuple):
    """Two views of one batch."""

    left: Tensor
    right: Tensor


def two_layers(forward: Callable[..., Any]) -> Net:
    return Net(forward, a=conv(3, 8), b=conv(8, 5))


@network("nested", ({"image": X},))
def takes_a_dict() -> Net:
    """A dict as its only argument."""
    return two_layers(lambda m, batch: pooled(m.b(m.a(batch["image"]).relu())))


@network("nested", ({"views": {"left": X, "right": [X]}},))
def takes_a_deep_dict() -> Net:
    """Tensors lie two levels deep, one of them in a list."""

    def forward(m: Net, batch: Any) -> Tensor:
        return pooled(m.b((m.a(batch["views"]["left"]) + m.a(batch["views"]["right"][0])).relu()))

    return two_layers(forward)


@network("nested", ((X, X),))
def takes_a_pair() -> Net:
    """A tuple as its only argument."""
    return two_layers(lambda m, pair: pooled(m.b((m.a(pair[0]) - m.a(pair[1].flip(3))).relu())))


@network("nested", (Views(X, X),))
def takes_a_named_tuple() -> Net:
    """A named tuple as its only argument."""
    return two_layers(lambda m, views: pooled(m.b((m.a(views.left) - m.a(views.right.flip(3))).relu())))


@network("nested", {"image": X, "options": {"scale": 2.0}})
def takes_keywords() -> Net:
    """Keyword arguments, one of them a dict of numbers."""
    return two_layers(lambda m, image, options: pooled(m.b(m.a(image * options["scale"]).relu())))


@network("nested", (torch.tensor(0.5), {"image": X}))
def takes_a_number_first() -> Net:
    """A single number before the images."""
    return two_layers(lambda m, scale, batch: pooled(m.b(m.a(batch["image"] * scale).relu())))
