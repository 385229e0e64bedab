"""What reads all channels at once: channel attention, statistics, sorting, transforms."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.cases.table import Net, case, conv, image, pooled


@case(prunable={"conv1": 8, "squeeze": 4})
def squeeze_excite() -> Net:
    """Squeeze and excite with 1x1 convolutions."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.conv1(x).relu()
        gate = m.excite(m.squeeze(F.adaptive_avg_pool2d(x, 1)).relu()).sigmoid()
        return m.head(x * gate)

    return Net(forward, conv1=conv(3, 8), squeeze=conv(8, 4, 1), excite=conv(4, 8, 1), head=conv(8, 4))


@case(prunable={"conv1": 8, "squeeze": 4})
def squeeze_excite_linear() -> Net:
    """Squeeze and excite with linear layers and views."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.conv1(x).relu()
        n, c = x.shape[:2]
        gate = m.excite(m.squeeze(F.adaptive_avg_pool2d(x, 1).view(n, c)).relu()).sigmoid().view(n, c, 1, 1)
        return m.head(x * gate.expand_as(x))

    return Net(forward, conv1=conv(3, 8), squeeze=nn.Linear(8, 4), excite=nn.Linear(4, 8), head=conv(8, 4))


@case(prunable={"stem": 8, "conv1": 8})
def squeeze_excite_residual() -> Net:
    """Squeeze and excite within a residual block."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.stem(x).relu()
        y = m.conv1(x)
        y = y * m.excite(m.squeeze(y.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return m.head(x + y)

    return Net(forward, stem=conv(3, 8), conv1=conv(8, 8), squeeze=conv(8, 4, 1), excite=conv(4, 8, 1), head=conv(8, 4))


@case(refused={"conv1": ""})
def efficient_channel_attention() -> Net:
    """ECA: a 1-d convolution across neighbouring channels."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.conv1(x)
        gate = m.mix(pooled(x)[:, None, :]).sigmoid().transpose(1, 2)[..., None]
        return m.head(x * gate)

    return Net(forward, conv1=conv(3, 8), mix=nn.Conv1d(1, 1, 3, padding=1, bias=False), head=conv(8, 4))


@case(prunable={"squeeze": 4})
def convolutional_block_attention() -> Net:
    """CBAM: channel attention, then a map of the channels' mean and maximum."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.conv1(x)
        average, maximum = x.mean((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
        x = x * (m.excite(m.squeeze(average).relu()) + m.excite(m.squeeze(maximum).relu())).sigmoid()
        gate = torch.cat([x.mean(1, keepdim=True), x.max(1, keepdim=True).values], 1)
        return m.head(x * m.spatial(gate).sigmoid())

    return Net(
        forward,
        conv1=conv(3, 8),
        squeeze=conv(8, 4, 1),
        excite=conv(4, 8, 1),
        spatial=conv(2, 1),
        head=conv(8, 4),
    )


@case(prunable={"a": 8, "b": 8, "squeeze": 4})
def selective_kernels() -> Net:
    """Selective kernels: softmax over branches, not over channels."""

    def forward(m: Net, x: Tensor) -> Tensor:
        a, b = m.a(x).relu(), m.b(x).relu()
        z = m.squeeze(pooled(a + b)).relu()
        gates = torch.stack([m.gate_a(z), m.gate_b(z)]).softmax(0)[..., None, None]
        return m.head(a * gates[0] + b * gates[1])

    return Net(
        forward,
        a=conv(3, 8),
        b=conv(3, 8, 5),
        squeeze=nn.Linear(8, 4),
        gate_a=nn.Linear(4, 8),
        gate_b=nn.Linear(4, 8),
        head=conv(8, 4),
    )


@case()
def split_attention() -> Net:
    """Split attention: two radices of one convolution, softmax over the radix (ResNeSt)."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.conv1(x).relu()
        n, c, h, w = x.shape
        x = x.reshape(n, 2, c // 2, h, w)
        z = m.squeeze(x.sum(1).mean((2, 3), keepdim=True)).relu()
        gate = m.gate(z).view(n, 1, 2, -1).transpose(1, 2).softmax(1).reshape(n, 2, c // 2, 1, 1)
        return m.head((x * gate).sum(1))

    return Net(forward, conv1=conv(3, 8, groups=1), squeeze=conv(4, 4, 1), gate=conv(4, 8, 1), head=conv(4, 4))


@case(prunable={"value": 6, "stem": 8}, refused={"theta": "contracted", "phi": "contracted"})
def non_local() -> Net:
    """Non-local block: attention between positions, channels contracted."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.stem(x)
        query, key, value = m.theta(x).flatten(2), m.phi(x).flatten(2), m.value(x).flatten(2)
        weights = torch.bmm(query.transpose(1, 2), key).softmax(-1)
        y = torch.bmm(value, weights.transpose(1, 2)).view(x.shape[0], -1, *x.shape[2:])
        return m.head(x + m.back(y))

    return Net(
        forward,
        stem=conv(3, 8),
        theta=conv(8, 6, 1),
        phi=conv(8, 6, 1),
        value=conv(8, 6, 1),
        back=conv(6, 8, 1),
        head=conv(8, 4),
    )


@case(refused={"conv1": ""})
def gram_matrix() -> Net:
    """Second-order pooling: the channels' Gram matrix, flattened."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.conv1(x).flatten(2)
        return m.head((x @ x.transpose(1, 2)).flatten(1).sort(1).values)

    return Net(forward, conv1=conv(3, 6), head=nn.Linear(36, 4))


@case()
def bilinear_pooling() -> Net:
    """Outer product of two branches' channels, flattened into a linear layer."""

    def forward(m: Net, x: Tensor) -> Tensor:
        product = torch.einsum("nap,nbp->nab", m.a(x).flatten(2), m.b(x).flatten(2))
        return m.head(product.flatten(1))

    return Net(forward, a=conv(3, 6), b=conv(3, 5), head=nn.Linear(30, 4))


@case(normalising=True)
def softmax_over_channels() -> Net:
    """Softmax over the channels."""
    return Net(lambda m, x: m.head(m.conv1(x).softmax(1)), conv1=conv(3, 8), head=conv(8, 4))


@case(normalising=True)
def mean_over_channels() -> Net:
    """Mean over the channels: its divisor is their number."""
    return Net(lambda m, x: m.head(m.conv1(x).mean(1, keepdim=True)), conv1=conv(3, 8), head=conv(1, 4))


@case(normalising=True)
def variance_over_channels() -> Net:
    """Standard deviation over the channels."""
    return Net(lambda m, x: m.head(m.conv1(x).std(1, keepdim=True)), conv1=conv(3, 8), head=conv(1, 4))


@case()
def sum_over_channels() -> Net:
    """Sum over the channels."""
    return Net(lambda m, x: m.head(m.conv1(x).sum(1, keepdim=True)), conv1=conv(3, 8), head=conv(1, 4))


@case(inexact=("conv1",))
def max_over_channels() -> Net:
    """Maximum over the channels."""
    return Net(lambda m, x: m.head(m.conv1(x).amax(1, keepdim=True)), conv1=conv(3, 8), head=conv(1, 4))


@case(refused={"conv1": "argmax"})
def argmax_over_channels() -> Net:
    """The number of the strongest channel."""
    return Net(lambda m, x: m.head(m.conv1(x).argmax(1, keepdim=True).to(x.dtype)), conv1=conv(3, 8), head=conv(1, 4))


@case(refused={"conv1": "sort"})
def sort_channels() -> Net:
    """Channels sorted by value."""
    return Net(lambda m, x: m.head(m.conv1(x).sort(1).values), conv1=conv(3, 8), head=conv(8, 4))


@case(refused={"conv1": "topk"})
def topk_channels() -> Net:
    """The four largest values over the channels."""
    return Net(lambda m, x: m.head(m.conv1(x).topk(4, dim=1).values), conv1=conv(3, 8), head=conv(4, 4))


@case(refused={"conv1": "cumsum"})
def cumulative_sum_over_channels() -> Net:
    """Cumulative sum over the channels."""
    return Net(lambda m, x: m.head(m.conv1(x).cumsum(1)), conv1=conv(3, 8), head=conv(8, 4))


@case(prunable={"conv1": 8})
def cumulative_sum_over_map() -> Net:
    """Cumulative sum and softmax over the map's rows, channels apart."""
    return Net(lambda m, x: m.head(m.conv1(x).cumsum(2).softmax(3).sort(2).values), conv1=conv(3, 8), head=conv(8, 4))


@case()
def flat_maximum() -> Net:
    """The largest value of the whole map scales everything."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.conv1(x)
        return m.head(x / x.abs().max())

    return Net(forward, conv1=conv(3, 8), head=conv(8, 4))


@case(refused={"conv1": ""})
def fourier_over_channels() -> Net:
    """Fourier transform over the channels."""
    return Net(lambda m, x: m.head(torch.fft.rfft(m.conv1(x), dim=1).abs()), conv1=conv(3, 8), head=conv(5, 4))


@case()
def fourier_over_map() -> Net:
    """Fourier filter over the map, one complex weight for each channel and frequency (GFNet)."""

    def forward(m: Net, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft2(m.conv1(x), norm="ortho")
        spectrum = spectrum * torch.view_as_complex(m.filter)
        return m.head(torch.fft.irfft2(spectrum, s=x.shape[-2:], norm="ortho"))

    return Net(forward, conv1=conv(3, 8), filter=nn.Parameter(torch.randn(8, 8, 4, 2)), head=conv(8, 4))


@case()
def cosine_similarity() -> Net:
    """Cosine similarity of two branches over their channels."""
    return Net(
        lambda m, x: m.head(F.cosine_similarity(m.a(x), m.b(x), dim=1)[:, None]),
        a=conv(3, 8),
        b=conv(3, 8),
        head=conv(1, 4),
    )


class Triple(torch.autograd.Function):
    """x to 3x, with its own backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Return 3x."""
        return 3 * x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """Return 3g."""
        return 3 * gradients[0]


@case(prunable={"conv1": 8})
def autograd_function() -> Net:
    """A custom autograd function, element-wise inside."""
    return Net(lambda m, x: m.head(Triple.apply(m.conv1(x))), conv1=conv(3, 8), head=conv(8, 4))


@case(refused={"conv1": ""})
def through_numpy() -> Net:
    """Channels that leave torch through numpy and come back."""

    def forward(m: Net, x: Tensor) -> Tensor:
        array = m.conv1(x).detach().numpy()
        return m.head(torch.from_numpy(array[:, ::-1].copy()).to(x.dtype))

    return Net(forward, conv1=conv(3, 8), head=conv(8, 4))


@case()
def through_python_numbers() -> Net:
    """Channel means that leave torch as Python numbers and scale the map."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.conv1(x)
        weights = pooled(x)[0].tolist()
        return m.head(sum(w * x for w in weights))

    return Net(forward, conv1=conv(3, 8), head=conv(8, 4))


@case(inputs=image(3, 8, 8), prunable={"conv1": 8})
def deformable() -> nn.Module:
    """Deformable convolution: offsets are fixed, features are not."""
    from torchvision.ops import DeformConv2d

    return Net(
        lambda m, x: m.head(m.deform(m.conv1(x).relu(), m.offset(x)).relu()),
        conv1=conv(3, 8),
        offset=conv(3, 18),
        deform=DeformConv2d(8, 6, 3, padding=1),
        head=conv(6, 4),
    )
