"""Normalisations, per-channel parameters, parametrised and frozen layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torchvision.ops import FrozenBatchNorm2d

from tests.cases.table import Net, case, conv, image, pooled


def with_norm(norm: nn.Module, channels: int = 8) -> Net:
    """Return convolution, norm, ReLU, head."""
    return Net(
        lambda m, x: m.head(m.norm(m.conv1(x)).relu()), conv1=conv(3, channels), norm=norm, head=conv(channels, 4)
    )


@case(prunable={"conv1": 8})
def group_norm() -> Net:
    """Group norm: whole groups go exactly; single channels of a group can't."""
    return with_norm(nn.GroupNorm(4, 8))


@case(prunable={"conv1": 8})
def group_norm_of_single_channels() -> Net:
    """Group norm with one channel a group: the same as instance norm."""
    return with_norm(nn.GroupNorm(8, 8))


@case(inexact=("conv1",))
def group_norm_of_all_channels() -> Net:
    """Group norm with one group: its statistics run over all channels."""
    return with_norm(nn.GroupNorm(1, 8))


@case(prunable={"stem": 8, "conv1": 8})
def group_norm_residual() -> Net:
    """Residual stream with group norm within its branch."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.stem(x)
        return m.head(x + m.norm(m.conv1(x)).relu())

    return Net(forward, stem=conv(3, 8), conv1=conv(8, 8), norm=nn.GroupNorm(2, 8), head=conv(8, 4))


@case(inexact=("conv1",), prunable={"fc": 10})
def layer_norm_channels_last() -> Net:
    """Layer norm over the channels, permuted to the end (ConvNeXt)."""
    return Net(
        lambda m, x: m.head(F.gelu(m.fc(m.norm(m.conv1(x).permute(0, 2, 3, 1))))),
        conv1=conv(3, 8),
        norm=nn.LayerNorm(8),
        fc=nn.Linear(8, 10),
        head=nn.Linear(10, 4),
    )


@case(inexact=("conv1",))
def layer_norm_without_parameters() -> Net:
    """Layer norm over the channels without scale and shift, its width taken of the shape."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.conv1(x).permute(0, 2, 3, 1)
        return m.head(F.layer_norm(x, x.shape[-1:]))

    return Net(forward, conv1=conv(3, 8), head=nn.Linear(8, 4))


@case(normalising=True)
def layer_norm_by_hand() -> Net:
    """Mean and variance over the channels, written out (SAM, early ConvNeXt)."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.conv1(x)
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).pow(2).mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt(variance + 1e-6)
        return m.head(m.weight[:, None, None] * x + m.bias[:, None, None])

    return Net(
        forward,
        conv1=conv(3, 8),
        weight=nn.Parameter(torch.randn(8)),
        bias=nn.Parameter(torch.randn(8)),
        head=conv(8, 4),
    )


@case(prunable={"conv1": 8})
def layer_norm_over_map() -> Net:
    """Layer norm over the map's positions only, one channel at a time."""
    return with_norm(nn.LayerNorm([8, 6]))


@case(normalising=True)
def layer_norm_over_everything() -> Net:
    """Layer norm over channels and positions at once."""
    return with_norm(nn.LayerNorm([8, 8, 6]))


@case(normalising=True)
def rms_norm() -> Net:
    """Root-mean-square norm over the channels."""
    return Net(
        lambda m, x: m.head(m.norm(m.conv1(x).permute(0, 2, 3, 1))),
        conv1=conv(3, 8),
        norm=nn.RMSNorm(8),
        head=nn.Linear(8, 4),
    )


@case(prunable={"conv1": 8})
def instance_norm() -> Net:
    """Instance norm without parameters."""
    return with_norm(nn.InstanceNorm2d(8))


@case(prunable={"conv1": 8})
def instance_norm_affine() -> Net:
    """Instance norm with parameters."""
    return with_norm(nn.InstanceNorm2d(8, affine=True))


@case(prunable={"conv1": 8})
def instance_norm_tracked() -> Net:
    """Instance norm with running statistics."""
    return with_norm(nn.InstanceNorm2d(8, affine=True, track_running_stats=True))


@case(prunable={"conv1": 8})
def batch_norm_bare() -> Net:
    """Batch norm without scale and shift."""
    return with_norm(nn.BatchNorm2d(8, affine=False))


@case(prunable={"conv1": 8})
def batch_norm_without_statistics() -> Net:
    """Batch norm that always normalises by the batch."""
    return with_norm(nn.BatchNorm2d(8, track_running_stats=False))


@case(prunable={"conv1": 8})
def batch_norm_functional() -> Net:
    """Functional batch norm on buffers and parameters of the network."""
    net = Net(
        lambda m, x: m.head(F.batch_norm(m.conv1(x), m.mean, m.var, m.gain, m.shift, m.training).relu()),
        conv1=conv(3, 8),
        gain=nn.Parameter(torch.randn(8)),
        shift=nn.Parameter(torch.randn(8)),
        head=conv(8, 4),
    )
    net.register_buffer("mean", torch.randn(8))
    net.register_buffer("var", torch.rand(8) + 0.5)
    return net


@case(prunable={"conv1": 8})
def frozen_batch_norm() -> Net:
    """Batch norm whose four vectors are buffers (detection backbones)."""
    return with_norm(FrozenBatchNorm2d(8))


@case(prunable={"conv1": 8, "conv2": 6})
def frozen_layers() -> nn.Module:
    """Layers without gradient."""
    net = Net(
        lambda m, x: m.head(m.conv2(m.bn(m.conv1(x)).relu()).relu()),
        conv1=conv(3, 8),
        bn=nn.BatchNorm2d(8),
        conv2=conv(8, 6),
        head=conv(6, 4),
    )
    net.conv1.requires_grad_(False)
    net.bn.requires_grad_(False)
    return net


@case(prunable={"conv1": 8}, modes=("eval", "train"))
def left_in_train_mode() -> nn.Module:
    """A network handed over in training mode, one layer of it in evaluation mode."""
    net = with_norm(nn.BatchNorm2d(8))
    net.train()
    net.norm.eval()
    return net


@case()
def local_response_norm() -> Net:
    """Local response norm across neighbouring channels (AlexNet)."""
    return with_norm(nn.LocalResponseNorm(3))


@case()
def unit_length_over_channels() -> Net:
    """F.normalize over the channels."""
    return Net(lambda m, x: m.head(F.normalize(m.conv1(x), dim=1)), conv1=conv(3, 8), head=conv(8, 4))


@case(prunable={"conv1": 8, "conv2": 8})
def prelu() -> Net:
    """PReLU with one slope a channel, and with one slope in all."""
    return Net(
        lambda m, x: m.head(m.act2(m.conv2(m.act1(m.conv1(x))))),
        conv1=conv(3, 8),
        act1=nn.PReLU(8),
        conv2=conv(8, 8),
        act2=nn.PReLU(),
        head=conv(8, 4),
    )


@case(prunable={"stem": 8, "conv1": 8})
def layer_scale() -> Net:
    """Layer scale: a raw parameter (C, 1, 1) on a residual branch."""
    return Net(
        lambda m, x: m.head(m.stem(x) + m.gamma * m.conv1(m.stem(x)).tanh()),
        stem=conv(3, 8),
        conv1=conv(8, 8),
        gamma=nn.Parameter(torch.randn(8, 1, 1)),
        head=conv(8, 4),
    )


@case(prunable={"conv1": 8})
def per_channel_buffer() -> Net:
    """Buffers with one value a channel: mean and scale."""
    net = Net(lambda m, x: m.head((m.conv1(x) - m.mean) / m.scale.view(1, -1, 1, 1)), conv1=conv(3, 8), head=conv(8, 4))
    net.register_buffer("mean", torch.randn(1, 8, 1, 1))
    net.register_buffer("scale", torch.rand(8) + 0.5)
    return net


@case(prunable={"conv1": 8})
def per_channel_map_parameter() -> Net:
    """A learnt map for every channel and position (position embedding of a feature map)."""
    return Net(
        lambda m, x: m.head(m.conv1(x) + m.embedding),
        conv1=conv(3, 8),
        embedding=nn.Parameter(torch.randn(1, 8, 8, 6)),
        head=conv(8, 4),
    )


@case()
def per_channel_constant() -> Net:
    """A constant tensor with one value a channel, made in the forward."""
    return Net(
        lambda m, x: m.head(m.conv1(x) * torch.linspace(0.5, 2, 8, dtype=x.dtype)[:, None, None]),
        conv1=conv(3, 8),
        head=conv(8, 4),
    )


@case(prunable={"conv1": 8})
def threshold_parameter() -> Net:
    """Learnt activation x * (x > t) with per-channel parameters on both branches (FReLU, meta-ACON)."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.conv1(x)
        return m.head(torch.max(x, m.bn(m.funnel(x))) * (m.beta * x).sigmoid())

    return Net(
        forward,
        conv1=conv(3, 8),
        funnel=conv(8, 8, groups=8, bias=False),
        bn=nn.BatchNorm2d(8),
        beta=nn.Parameter(torch.randn(1, 8, 1, 1)),
        head=conv(8, 4),
    )


@case(prunable={"conv1": 8, "conv2": 6})
def weight_norm() -> Net:
    """Weight norm: a filter's length runs over its input channels, and its magnitude has to follow."""
    return Net(
        lambda m, x: m.head(m.conv2(m.conv1(x).relu()).relu()),
        conv1=conv(3, 8),
        conv2=parametrizations.weight_norm(conv(8, 6)),
        head=conv(6, 4),
    )


@case(prunable={"conv1": 8, "conv2": 6})
def weight_norm_transposed() -> Net:
    """Weight norm of a transposed convolution: one length for each input channel, over the output channels."""
    return Net(
        lambda m, x: m.head(m.conv2(m.conv1(x).relu()).relu()),
        conv1=conv(3, 8),
        conv2=parametrizations.weight_norm(nn.ConvTranspose2d(8, 6, 2, stride=2)),
        head=parametrizations.weight_norm(conv(6, 4)),
    )


@case(prunable={"conv1": 8, "conv2": 6})
def weight_norm_grouped() -> Net:
    """Weight norm of a grouped convolution, and of a linear layer behind a flattened map."""
    return Net(
        lambda m, x: m.head(m.conv2(m.conv1(x).relu()).relu().mean((2, 3))),
        conv1=parametrizations.weight_norm(conv(3, 8)),
        conv2=parametrizations.weight_norm(conv(8, 6, groups=2)),
        head=parametrizations.weight_norm(nn.Linear(6, 4)),
    )


@case(normalising=True)
def weight_norm_of_the_other_dimension() -> Net:
    """Weight norm with one length for each input channel: the lengths run over the filters."""
    return Net(
        lambda m, x: m.head(m.conv2(m.conv1(x).relu()).relu()),
        conv1=conv(3, 8),
        conv2=parametrizations.weight_norm(conv(8, 6), dim=1),
        head=conv(6, 4),
    )


@case(prunable={"conv1": 8, "conv2": 6})
def weight_norm_old_style() -> nn.Module:
    """Weight norm by hooks, as older code has it; a run without gradients makes the weights copyable."""
    net = Net(
        lambda m, x: m.head(m.conv2(m.conv1(x).relu()).relu()),
        conv1=nn.utils.weight_norm(conv(3, 8)),
        conv2=nn.utils.weight_norm(conv(8, 6)),
        head=conv(6, 4),
    )
    with torch.no_grad():
        net(torch.randn(1, 3, 8, 6))
    return net


@case(normalising=True)
def spectral_norm() -> Net:
    """Spectral norm: the weight's largest singular value runs over all channels."""
    return Net(
        lambda m, x: m.head(m.conv2(m.conv1(x).relu()).relu()),
        conv1=conv(3, 8),
        conv2=parametrizations.spectral_norm(conv(8, 6)),
        head=conv(6, 4),
    )


@case(normalising=True)
def weight_standardisation() -> Net:
    """Weights standardised over their input channels in the forward."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.conv1(x).relu()
        weight = m.conv2.weight
        weight = (weight - weight.mean((1, 2, 3), keepdim=True)) / weight.std((1, 2, 3), keepdim=True)
        return m.head(F.conv2d(x, weight, m.conv2.bias, padding=1).relu())

    return Net(forward, conv1=conv(3, 8), conv2=conv(8, 6), head=conv(6, 4))


@case(prunable={"conv1": 8})
def weight_gain() -> Net:
    """A weight scaled by a gain for each of its filters in the forward."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.conv1(x).relu()
        return m.head(F.conv2d(x, m.conv2.weight * m.gain, m.conv2.bias, padding=1).relu())

    return Net(forward, conv1=conv(3, 8), conv2=conv(8, 6), gain=nn.Parameter(torch.randn(6, 1, 1, 1)), head=conv(6, 4))


@case(inputs=image(3, 8, 8), prunable={"hidden": 12}, inexact=("stem",), outputs=("head",))
def convnext_block() -> Net:
    """ConvNeXt: depthwise, layer norm, inverted bottleneck of linear layers, layer scale, residual."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.stem(x)
        y = m.norm(m.depthwise(x).permute(0, 2, 3, 1))
        y = m.scale * m.back(F.gelu(m.hidden(y)))
        x = x + y.permute(0, 3, 1, 2)
        return m.head(pooled(x))

    return Net(
        forward,
        stem=nn.Conv2d(3, 6, 2, 2),
        depthwise=conv(6, 6, groups=6),
        norm=nn.LayerNorm(6),
        hidden=nn.Linear(6, 12),
        back=nn.Linear(12, 6),
        scale=nn.Parameter(torch.randn(6)),
        head=nn.Linear(6, 4),
    )


class StandardisedConv(nn.Conv2d):
    """Standardises each filter by a batch norm over the flattened weight, as NFNet and BiT do."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, padding=1)
        self.gain = nn.Parameter(torch.ones(outputs, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Convolve with the standardised weight."""
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(flat, None, None, weight=(self.gain * 0.3).view(-1), training=True)
        return F.conv2d(x, weight.reshape_as(self.weight), self.bias, padding=1)


@case(prunable={"conv2": 6}, inexact=("conv1",))
def standardised_by_batch_norm() -> Net:
    """Weights standardised over the channels they read: what such a layer reads is inexact, what it makes is not."""
    return Net(
        lambda m, x: m.head(m.conv2(m.conv1(x).relu()).relu()),
        conv1=conv(3, 8),
        conv2=StandardisedConv(8, 6),
        head=conv(6, 4),
    )
