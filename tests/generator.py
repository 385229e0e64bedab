"""Random networks, composed of the patterns of the table: what hypothesis draws and shrinks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

Draw = Callable[[st.SearchStrategy[Any]], Any]

HEIGHT, WIDTH = 6, 4
WIDTHS = (4, 6, 8, 12, 14)


class Residual(nn.Module):
    """x + f(x), in place or not."""

    def __init__(self, body: nn.Module, in_place: bool) -> None:
        super().__init__()
        self.body, self.in_place = body, in_place

    def forward(self, x: Tensor) -> Tensor:
        """Add."""
        if self.in_place:
            y = self.body(x).clone()
            y += x
            return y
        return x + self.body(x)


class Concat(nn.Module):
    """Branches of one input, concatenated; ``keep`` puts the input itself in front."""

    def __init__(self, branches: Sequence[nn.Module], keep: bool) -> None:
        super().__init__()
        self.branches, self.keep = nn.ModuleList(branches), keep

    def forward(self, x: Tensor) -> Tensor:
        """Concatenate."""
        return torch.cat(([x] if self.keep else []) + [b(x) for b in self.branches], 1)


class Chunks(nn.Module):
    """Chunks, each through its own body, concatenated in another order; cut by the shape or by what it was told."""

    def __init__(self, bodies: Sequence[nn.Module], order: Sequence[int], widths: Sequence[int], way: str) -> None:
        super().__init__()
        self.bodies, self.order, self.way = nn.ModuleList(bodies), tuple(order), way
        self.widths, self.first, self.channels = tuple(widths), widths[0], sum(widths)

    def forward(self, x: Tensor) -> Tensor:
        """Split, work, concatenate."""
        n = len(self.bodies)
        if self.way == "shape":
            width = x.shape[1] // n
            parts = [x[:, i * width : (i + 1) * width] for i in range(n)]
        elif self.way == "list":
            parts = list(x.split(self.widths, 1))
        elif self.way == "first" and n == 2:
            parts = [x[:, : self.first], x[:, self.first :]]
        elif self.way == "whole":
            parts = list(x.split(self.channels // n, 1))
        else:
            parts = list(x.chunk(n, 1))
        parts = [body(part) for body, part in zip(self.bodies, parts, strict=True)]
        return torch.cat([parts[i] for i in self.order], 1)


class Stream(nn.Module):
    """Half of the channels through a body, joined with the other half and shuffled, again and again."""

    def __init__(self, bodies: Sequence[nn.Module], groups: int) -> None:
        super().__init__()
        self.bodies, self.shuffle = nn.ModuleList(bodies), Shuffle(groups)

    def forward(self, x: Tensor) -> Tensor:
        """Split, work, join, shuffle."""
        for body in self.bodies:
            kept, worked = x.chunk(2, 1)
            x = self.shuffle(torch.cat([kept, body(worked)], 1))
        return x


class Shuffle(nn.Module):
    """Channel shuffle by view and transpose."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        """Shuffle."""
        n, c, h, w = x.shape
        return x.view(n, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(n, c, h, w)


class Flip(nn.Module):
    """Channels in reverse order."""

    def forward(self, x: Tensor) -> Tensor:
        """Flip."""
        return x.flip(1)


class Gate(nn.Module):
    """x · sigmoid(f(x))."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        """Multiply."""
        return x * self.body(x).sigmoid()


class SqueezeExcite(nn.Module):
    """Channel attention by two pointwise convolutions."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.squeeze, self.excite = nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Scale channels."""
        return x * self.excite(self.squeeze(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


class Dense(nn.Module):
    """Dense block: every layer reads all before it."""

    def __init__(self, channels: int, growth: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(c), nn.ReLU(), nn.Conv2d(c, growth, 3, padding=1))
            for c in (channels + i * growth for i in range(layers))
        )

    def forward(self, x: Tensor) -> Tensor:
        """Concatenate all."""
        features = [x]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        return torch.cat(features, 1)


class LowResolution(nn.Module):
    """Pool, work, upsample, concatenate with the input."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        """Work at half the resolution."""
        return torch.cat([x, F.interpolate(self.body(F.max_pool2d(x, 2)), scale_factor=2.0)], 1)


class LayerScale(nn.Module):
    """One raw parameter a channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Scale."""
        return x * self.gamma


class Pairs(nn.Module):
    """Sum or maximum over pairs of channels, neighbours or from the two halves."""

    def __init__(self, neighbours: bool, maximum: bool) -> None:
        super().__init__()
        self.neighbours, self.maximum = neighbours, maximum

    def forward(self, x: Tensor) -> Tensor:
        """Reduce pairs."""
        n, c, h, w = x.shape
        x = x.view(n, c // 2, 2, h, w) if self.neighbours else x.view(n, 2, c // 2, h, w)
        dim = 2 if self.neighbours else 1
        return x.amax(dim) if self.maximum else x.sum(dim)


class DepthToSpace(nn.Module):
    """Pixel unshuffle, a convolution, pixel shuffle."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4 * channels, 4 * out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Work at half the resolution without pooling."""
        return F.pixel_shuffle(self.conv(F.pixel_unshuffle(x, 2)).relu(), 2)


class ChannelsLast(nn.Module):
    """Two linear layers over the channels, permuted to the end."""

    def __init__(self, channels: int, hidden: int, out: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(channels, hidden), nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        """Mix channels."""
        return self.down(F.gelu(self.up(x.permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)


class Twice(nn.Module):
    """One module called twice."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        """Call twice."""
        return self.body(self.body(x))


class Network(nn.Module):
    """Stem, random body, and one or two heads."""

    def __init__(self, stem: nn.Module, body: nn.Module, channels: int, head: str) -> None:
        super().__init__()
        self.stem, self.body, self.kind = stem, body, head
        if head == "pool":
            self.head: nn.Module = nn.Linear(channels, 3)
        elif head == "flatten":
            self.head = nn.Linear(channels * HEIGHT * WIDTH, 3)
        else:
            self.head = nn.Conv2d(channels, 3, 1)
        self.second = nn.Conv2d(channels, 2, 3, padding=1) if head == "two" else None

    def forward(self, x: Tensor) -> Any:
        """Return the prediction, or two in a dict."""
        x = self.body(self.stem(x))
        if self.kind == "pool":
            return self.head(x.mean((2, 3)))
        if self.kind == "flatten":
            return self.head(x.flatten(1))
        if self.second is not None:
            return {"out": self.head(x), "second": [self.second(x)]}
        return self.head(x)


def divisors(n: int, least: int = 2) -> list[int]:
    """Divisors of n from ``least`` to n / 2."""
    return [d for d in range(least, n // 2 + 1) if n % d == 0]


def norm(draw: Draw, channels: int) -> list[nn.Module]:
    """Draw a norm and an activation."""
    kind = draw(st.sampled_from(["batch", "none", "batch", "group", "instance", "frozen", "bare"]))
    layers: list[nn.Module] = []
    if kind == "batch":
        layers.append(nn.BatchNorm2d(channels))
    elif kind == "group":
        layers.append(nn.GroupNorm(draw(st.sampled_from([*divisors(channels), channels])), channels))
    elif kind == "instance":
        layers.append(nn.InstanceNorm2d(channels, affine=draw(st.booleans())))
    elif kind == "frozen":
        layers.append(FrozenBatchNorm2d(channels))
    elif kind == "bare":
        layers.append(nn.BatchNorm2d(channels, affine=False))
    activation = draw(st.sampled_from(["relu", "silu", "prelu", "none", "hardtanh"]))
    layers += {
        "relu": [nn.ReLU(inplace=draw(st.booleans()))] if activation == "relu" else [],
        "silu": [nn.SiLU()],
        "prelu": [nn.PReLU(channels)],
        "none": [],
        "hardtanh": [nn.Hardtanh()],
    }[activation]
    return layers


def convolution(draw: Draw, channels: int, out: int | None = None) -> tuple[nn.Module, int]:
    """Draw a convolution of any kind with its norm and activation."""
    kind = draw(st.sampled_from(["full", "full", "pointwise", "grouped", "depthwise", "transposed"]))
    wanted = out if out is not None else draw(st.sampled_from(WIDTHS))
    bias = draw(st.booleans())
    if kind == "depthwise" and wanted % channels == 0:
        layer: nn.Module = nn.Conv2d(channels, wanted, 3, padding=1, groups=channels, bias=bias)
    elif kind == "grouped" and (common := [d for d in divisors(channels) if wanted % d == 0]):
        layer = nn.Conv2d(channels, wanted, 3, padding=1, groups=draw(st.sampled_from(common)), bias=bias)
    elif kind == "transposed":
        layer = nn.ConvTranspose2d(channels, wanted, 3, padding=1, bias=bias)
    elif kind == "pointwise":
        layer = nn.Conv2d(channels, wanted, 1, bias=bias)
    else:
        layer = nn.Conv2d(channels, wanted, 3, padding=1, bias=bias)
    return nn.Sequential(layer, *norm(draw, wanted)), wanted


def joined(draw: Draw, channels: int, depth: int) -> tuple[nn.Module, int] | None:
    """Draw a pattern with branches, or None where the width does not allow it."""
    kind = draw(st.sampled_from(["residual", "concat", "chunks", "chunks", "stream", "gate", "low", "twice"]))
    if kind == "residual":
        inner, width = chain(draw, channels, depth - 1)
        last, _ = convolution(draw, width, channels)
        return Residual(nn.Sequential(inner, last), draw(st.booleans())), channels
    if kind == "concat":
        parts = [chain(draw, channels, depth - 1) for _ in range(draw(st.integers(1, 2)))]
        keep = len(parts) == 1 or draw(st.booleans())
        return Concat([p for p, _ in parts], keep), sum(w for _, w in parts) + channels * keep
    if kind == "chunks":
        possible = [d for d in (2, 3) if channels % d == 0 and channels // d >= 2]
        if not possible:
            return None
        n = draw(st.sampled_from(possible))
        way = draw(st.sampled_from(["chunk", "shape", "list", "first", "whole"]))
        width = channels // n
        widths = [width + 1, *[width] * (n - 2), width - 1] if way in ("list", "first") and n == 2 else [width] * n
        bodies: list[nn.Module] = [
            convolution(draw, width, width)[0] if draw(st.booleans()) else nn.Identity() for width in widths
        ]
        return Chunks(bodies, draw(st.permutations(range(n))), widths, way), channels
    if kind == "stream":
        if channels % 2 or channels < 6:
            return None
        half = channels // 2
        workers = [convolution(draw, half, half)[0] for _ in range(draw(st.integers(1, 3)))]
        return Stream(workers, 2), channels
    if kind == "gate":
        return Gate(convolution(draw, channels, channels)[0]), channels
    if kind == "twice":
        return Twice(convolution(draw, channels, channels)[0]), channels
    inner, width = convolution(draw, channels)
    return LowResolution(inner), channels + width


def moved(draw: Draw, channels: int) -> tuple[nn.Module, int]:
    """Draw a pattern that moves, mixes or scales channels in place."""
    kinds = ["se", "dense", "scale", "last", "flip", "depth"]
    if channels % 2 == 0:
        kinds += ["shuffle", "pairs", "glu"]
    kind = draw(st.sampled_from(kinds))
    if kind == "se":
        return SqueezeExcite(channels, draw(st.sampled_from([2, 3]))), channels
    if kind == "dense":
        growth, layers = draw(st.sampled_from([2, 4])), draw(st.integers(1, 2))
        return Dense(channels, growth, layers), channels + growth * layers
    if kind == "scale":
        return LayerScale(channels), channels
    if kind == "last":
        out = draw(st.sampled_from(WIDTHS))
        return ChannelsLast(channels, draw(st.sampled_from(WIDTHS)), out), out
    if kind == "flip":
        return Flip(), channels
    if kind == "depth":
        out = draw(st.sampled_from([4, 6]))
        return DepthToSpace(channels, out), out
    if kind == "shuffle":
        groups = draw(st.sampled_from(divisors(channels) or [2]))
        return (nn.ChannelShuffle(groups) if draw(st.booleans()) else Shuffle(groups)), channels
    if kind == "pairs":
        return Pairs(draw(st.booleans()), draw(st.booleans())), channels // 2
    return nn.GLU(1), channels // 2


def chain(draw: Draw, channels: int, depth: int) -> tuple[nn.Module, int]:
    """Draw a chain of patterns."""
    layers: list[nn.Module] = []
    for _ in range(draw(st.integers(1, 2 if depth < 2 else 3))):
        kind = draw(st.sampled_from(["conv", "moved", "joined"] if depth > 0 else ["conv", "conv", "moved"]))
        found = joined(draw, channels, depth) if kind == "joined" else None
        if kind == "moved" and channels >= 4:
            found = moved(draw, channels)
        layer, width = found if found is not None else convolution(draw, channels)
        if width > 40:
            layer, width = nn.Sequential(layer, nn.Conv2d(width, 8, 1)), 8
        layers.append(layer)
        channels = width
    return nn.Sequential(*layers), channels


@st.composite
def networks(draw: Draw) -> Network:
    """Draw a network for inputs ``(2, 3, HEIGHT, WIDTH)``."""
    stem, width = convolution(draw, 3)
    body, width = chain(draw, width, 2)
    return Network(stem, body, width, draw(st.sampled_from(["pool", "flatten", "conv", "two"])))


def example(seed: int = 0) -> Tensor:
    """Return inputs for a drawn network, in fp64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, HEIGHT, WIDTH, generator=generator, dtype=torch.float64)
