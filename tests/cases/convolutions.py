"""Chains of convolutions and linear layers of every kind."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.cases.table import Net, case, conv, image, pooled


@case(prunable={"conv1": 8, "conv2": 10})
def plain_chain() -> Net:
    """Convolution after convolution."""
    return Net(
        lambda m, x: m.head(m.conv2(m.conv1(x).relu()).relu()), conv1=conv(3, 8), conv2=conv(8, 10), head=conv(10, 4)
    )


@case(prunable={"conv1": 8, "conv2": 10})
def batch_norm() -> Net:
    """Convolution, batch norm, ReLU."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.bn1(m.conv1(x)).relu()
        x = m.bn2(m.conv2(x)).relu()
        return m.head(pooled(x))

    return Net(
        forward,
        conv1=conv(3, 8, bias=False),
        bn1=nn.BatchNorm2d(8),
        conv2=conv(8, 10),
        bn2=nn.BatchNorm2d(10),
        head=nn.Linear(10, 4),
    )


@case(prunable={"0": 8, "3": 6}, outputs=("6",))
def sequential() -> nn.Module:
    """A plain nn.Sequential."""
    return nn.Sequential(
        conv(3, 8, stride=2), nn.BatchNorm2d(8), nn.GELU(), conv(8, 6), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(6, 4),
    )  # fmt: skip


@case(inputs=lambda: torch.randn(2, 3, 12), prunable={"conv1": 8, "conv2": 6})
def conv1d_chain() -> Net:
    """1-d convolutions."""
    return Net(
        lambda m, x: m.head(m.conv2(m.bn(m.conv1(x)).relu()).relu().mean(2)),
        conv1=nn.Conv1d(3, 8, 3),
        bn=nn.BatchNorm1d(8),
        conv2=nn.Conv1d(8, 6, 3, stride=2),
        head=nn.Linear(6, 4),
    )


@case(inputs=lambda: torch.randn(2, 2, 4, 6, 5), prunable={"conv1": 8, "conv2": 6})
def conv3d_chain() -> Net:
    """3-d convolutions."""
    return Net(
        lambda m, x: m.head(m.pool(m.conv2(m.bn(m.conv1(x)).relu())).flatten(1)),
        conv1=nn.Conv3d(2, 8, 3, padding=1),
        bn=nn.BatchNorm3d(8),
        conv2=nn.Conv3d(8, 6, (1, 3, 3)),
        pool=nn.AdaptiveAvgPool3d(1),
        head=nn.Linear(6, 4),
    )


@case(prunable={"conv1": 8, "pointwise": 10, "depthwise": 8})
def depthwise_separable() -> Net:
    """Depthwise convolution between pointwise ones."""
    return Net(
        lambda m, x: m.head(m.pointwise(m.bn(m.depthwise(m.conv1(x).relu())).relu()).relu()),
        conv1=conv(3, 8),
        depthwise=conv(8, 8, groups=8),
        bn=nn.BatchNorm2d(8),
        pointwise=conv(8, 10, 1),
        head=conv(10, 4, 1),
    )


@case(prunable={"conv1": 6})
def depthwise_multiplier() -> Net:
    """Depthwise convolution that makes two channels of each."""
    return Net(
        lambda m, x: m.head(m.depthwise(m.conv1(x).relu()).relu()),
        conv1=conv(3, 6),
        depthwise=conv(6, 12, groups=6),
        head=conv(12, 4, 1),
    )


@case(prunable={"conv1": 8, "grouped": 12})
def grouped() -> Net:
    """Grouped convolution, two groups."""
    return Net(
        lambda m, x: m.head(m.bn(m.grouped(m.conv1(x).relu())).relu()),
        conv1=conv(3, 8),
        grouped=conv(8, 12, groups=2),
        bn=nn.BatchNorm2d(12),
        head=conv(12, 4, 1),
    )


@case(prunable={"conv1": 12, "grouped1": 12, "grouped2": 12})
def grouped_twice() -> Net:
    """Grouped convolutions with different numbers of groups one after the other (ResNeXt-like)."""
    return Net(
        lambda m, x: m.head(m.grouped2(m.grouped1(m.conv1(x).relu()).relu()).relu()),
        conv1=conv(3, 12),
        grouped1=conv(12, 12, groups=3),
        grouped2=conv(12, 12, groups=2),
        head=conv(12, 4, 1),
    )


@case(prunable={"conv1": 8})
def grouped_first_of_input() -> Net:
    """A grouped convolution on the raw input."""
    return Net(
        lambda m, x: m.head(m.conv1(m.stem(x)).relu()), stem=conv(3, 6, groups=3), conv1=conv(6, 8), head=conv(8, 4)
    )


@case(prunable={"conv1": 8, "grouped": 8})
def resnext_block() -> Net:
    """Residual bottleneck around a grouped convolution."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.stem(x).relu()
        y = m.conv3(m.bn2(m.grouped(m.bn1(m.conv1(x)).relu())).relu())
        return m.head(pooled((x + y).relu()))

    return Net(
        forward,
        stem=conv(3, 6),
        conv1=conv(6, 8, 1),
        bn1=nn.BatchNorm2d(8),
        grouped=conv(8, 8, groups=4),
        bn2=nn.BatchNorm2d(8),
        conv3=conv(8, 6, 1),
        head=nn.Linear(6, 4),
    )


@case(prunable={"conv1": 8, "up": 6})
def transposed() -> Net:
    """Transposed convolution."""
    return Net(
        lambda m, x: m.head(m.bn(m.up(m.conv1(x).relu())).relu()),
        conv1=conv(3, 8),
        up=nn.ConvTranspose2d(8, 6, 4, stride=2, padding=1),
        bn=nn.BatchNorm2d(6),
        head=conv(6, 4),
    )


@case(prunable={"conv1": 8, "up": 12})
def transposed_grouped() -> Net:
    """Transposed grouped convolution, two groups."""
    return Net(
        lambda m, x: m.head(m.up(m.conv1(x).relu()).relu()),
        conv1=conv(3, 8),
        up=nn.ConvTranspose2d(8, 12, 2, stride=2, groups=2),
        head=conv(12, 4, 1),
    )


@case(prunable={"conv1": 6, "up": 6})
def transposed_depthwise() -> Net:
    """Transposed depthwise convolution."""
    return Net(
        lambda m, x: m.head(m.up(m.conv1(x).relu()).relu()),
        conv1=conv(3, 6),
        up=nn.ConvTranspose2d(6, 6, 2, stride=2, groups=6),
        head=conv(6, 4, 1),
    )


@case(inputs=lambda: torch.randn(2, 3, 9), prunable={"conv1": 6, "up": 8})
def transposed_1d() -> Net:
    """1-d transposed convolution."""
    return Net(
        lambda m, x: m.head(m.up(m.conv1(x).relu()).relu()),
        conv1=nn.Conv1d(3, 6, 3),
        up=nn.ConvTranspose1d(6, 8, 2),
        head=nn.Conv1d(8, 4, 1),
    )


@case(inputs=lambda: torch.randn(3, 7), prunable={"fc1": 10, "fc2": 8})
def linear_chain() -> Net:
    """Multilayer perceptron with batch norm."""
    return Net(
        lambda m, x: m.head(m.fc2(m.bn(m.fc1(x)).relu()).tanh()),
        fc1=nn.Linear(7, 10),
        bn=nn.BatchNorm1d(10),
        fc2=nn.Linear(10, 8),
        head=nn.Linear(8, 4),
    )


@case(prunable={"conv1": 8, "conv2": 6, "fc": 10})
def flatten_linear() -> Net:
    """Feature map flattened, with its spatial positions, into a linear layer."""
    return Net(
        lambda m, x: m.head(m.fc(torch.flatten(m.pool(m.conv2(m.conv1(x).relu()).relu()), 1)).relu()),
        conv1=conv(3, 8),
        conv2=conv(8, 6),
        pool=nn.MaxPool2d(2),
        fc=nn.Linear(6 * 4 * 3, 10),
        head=nn.Linear(10, 4),
    )


@case(prunable={"conv1": 8})
def flatten_by_view() -> Net:
    """Feature map flattened by ``view(x.size(0), -1)``."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = F.max_pool2d(m.conv1(x).relu(), 2)
        return m.head(x.view(x.size(0), -1))

    return Net(forward, conv1=conv(3, 8), head=nn.Linear(8 * 4 * 3, 4))


@case(prunable={"conv1": 8})
def flatten_then_batch_norm() -> Net:
    """Batch norm over a flattened map: one value for each position of each channel."""
    return Net(
        lambda m, x: m.head(m.bn(m.conv1(x).relu().flatten(1)).relu()),
        conv1=conv(3, 8, stride=2),
        bn=nn.BatchNorm1d(8 * 4 * 3),
        head=nn.Linear(8 * 4 * 3, 4),
    )


@case(prunable={"conv1": 8})
def flatten_channels_last() -> Net:
    """Feature map flattened with its channels innermost: a channel owns strided positions of the linear layer."""
    return Net(
        lambda m, x: m.head(m.conv1(x).relu().permute(0, 2, 3, 1).flatten(1)),
        conv1=conv(3, 8, stride=2),
        head=nn.Linear(8 * 4 * 3, 4),
    )


@case(prunable={"conv1": 8})
def global_pool() -> Net:
    """Adaptive average and max pooling, summed."""
    return Net(
        lambda m, x: m.head((F.adaptive_avg_pool2d(m.conv1(x), 1) + F.adaptive_max_pool2d(m.conv1(x), 1)).flatten(1)),
        conv1=conv(3, 8),
        head=nn.Linear(8, 4),
    )


@case(prunable={"conv1": 8, "conv2": 8})
def padding_modes() -> Net:
    """Reflect and circular padding, dilation, 'same'."""
    return Net(
        lambda m, x: m.head(m.conv3(m.conv2(m.conv1(x).relu()).relu()).relu()),
        conv1=conv(3, 8, padding_mode="reflect"),
        conv2=conv(8, 8, padding_mode="circular", dilation=2, padding=2),
        conv3=nn.Conv2d(8, 6, 2, padding="same"),
        head=conv(6, 4, 1),
    )


@case(prunable={"conv1": 8, "conv2": 6})
def even_spatial_padding() -> Net:
    """Explicit zero padding of the map before a convolution without padding."""
    return Net(
        lambda m, x: m.head(m.conv2(F.pad(m.conv1(x).relu(), (1, 0, 1, 0))).relu()),
        conv1=conv(3, 8),
        conv2=nn.Conv2d(8, 6, 2),
        head=conv(6, 4, 1),
    )


@case(prunable={"conv1": 8, "weight": 6})
def functional_conv() -> Net:
    """Functional convolution on a raw parameter of the network itself."""
    return Net(
        lambda m, x: m.head(F.conv2d(m.conv1(x).relu(), m.weight, m.bias, padding=1).relu()),
        conv1=conv(3, 8),
        weight=nn.Parameter(torch.randn(6, 8, 3, 3) * 0.2),
        bias=nn.Parameter(torch.randn(6)),
        head=conv(6, 4, 1),
    )


def _kernels(*shape: int, count: int = 2) -> dict[str, nn.Parameter]:
    return {f"kernel{i}": nn.Parameter(0.2 * torch.randn(*shape)) for i in range(count)}


def _counted(x: Tensor) -> Tensor:
    """Multiply by one, in a way that may depend on the number of channels."""
    return x * (x.shape[1] / x.shape[1])


@case(prunable={"conv1": 8, "kernel0": 6})
def kernel_of_two_parameters() -> Net:
    """A kernel that is the sum of two, in a network whose code computes with the number of channels."""
    return Net(
        lambda m, x: m.head(F.conv2d(_counted(m.conv1(x)).relu(), m.kernel0 + m.kernel1, padding=1).relu()),
        conv1=conv(3, 8),
        head=conv(6, 4, 1),
        **_kernels(6, 8, 3, 3),
    )


class _Fused(nn.Module):
    """A RepVGG block that is fused anew in every forward: a kernel, a padded one of 1×1, and the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.large = nn.Parameter(0.2 * torch.randn(channels, channels, 3, 3))
        self.small = nn.Parameter(0.2 * torch.randn(channels, channels, 1, 1))
        self.bias = nn.Parameter(torch.randn(channels))
        self.register_buffer("same", F.pad(torch.eye(channels)[:, :, None, None], [1, 1, 1, 1]))

    def forward(self, x: Tensor) -> Tensor:
        """Convolve once."""
        return F.conv2d(x, self.large + F.pad(self.small, [1, 1, 1, 1]) + self.same, self.bias, padding=1)


@case(prunable={"conv1": 8, "fused.large": 8})
def kernels_fused_in_forward() -> Net:
    """RepVGG fused in every forward, in a network whose code computes with the number of channels."""
    return Net(
        lambda m, x: m.head(m.fused(_counted(m.conv1(x)).relu()).relu()),
        conv1=conv(3, 8),
        fused=_Fused(8),
        head=conv(8, 4, 1),
    )


@case(prunable={"conv1": 8, "weight": 6})
def low_rank_update() -> Net:
    """LoRA: a linear layer's weight plus a product of two narrow matrices."""
    return Net(
        lambda m, x: m.head(F.linear(_counted(pooled(m.conv1(x).relu())), m.weight + m.up @ m.down).relu()),
        conv1=conv(3, 8),
        weight=nn.Parameter(torch.randn(6, 8)),
        up=nn.Parameter(torch.randn(6, 2)),
        down=nn.Parameter(torch.randn(2, 8)),
        head=nn.Linear(6, 4),
    )


@case(prunable={"conv1": 8})
def low_rank_kernel() -> Net:
    """A linear layer's weight that is the product of two narrow matrices, of which only the second reads channels."""
    return Net(
        lambda m, x: F.linear(_counted(pooled(m.conv1(x).relu())), m.up @ m.down),
        conv1=conv(3, 8),
        up=nn.Parameter(torch.randn(6, 2)),
        down=nn.Parameter(torch.randn(2, 8)),
    )


@case(prunable={"conv1": 8, "kernel0": 4, "kernel1": 4, "kernel2": 4})
def kernel_joined_of_three() -> Net:
    """A kernel joined of three along its filters: each makes a third of the channels, all read the same."""
    return Net(
        lambda m, x: m.head(F.conv2d(_counted(m.conv1(x)).relu(), torch.cat([m.kernel0, m.kernel1, m.kernel2])).relu()),
        conv1=conv(3, 8),
        head=conv(12, 4, 1),
        **_kernels(4, 8, 1, 1, count=3),
    )


@case(prunable={"conv1": 9, "kernel0": 6})
def kernel_joined_of_three_along_its_columns() -> Net:
    """A kernel joined of three along its columns: each reads a third of the channels."""
    return Net(
        lambda m, x: m.head(F.conv2d(_counted(m.conv1(x)), torch.cat([m.kernel0, m.kernel1, m.kernel2], 1)).relu()),
        conv1=conv(3, 9),
        head=conv(6, 4, 1),
        **_kernels(6, 3, 1, 1, count=3),
    )


@case(prunable={"conv1": 8, "kernel0": 8})
def functional_grouped_conv() -> Net:
    """Functional convolution in groups, in a network whose code computes with the number of channels."""
    return Net(
        lambda m, x: m.head(F.conv2d(_counted(m.conv1(x)), m.kernel0, padding=1, groups=2).relu()),
        conv1=conv(3, 8),
        head=conv(8, 4, 1),
        **_kernels(8, 4, 3, 3, count=1),
    )


@case(prunable={"conv1": 8, "weight": 6}, outputs=("matrix",))
def functional_linear() -> Net:
    """Functional linear layer and matrix product on raw parameters."""
    return Net(
        lambda m, x: F.linear(pooled(m.conv1(x).relu()), m.weight).relu() @ m.matrix,
        conv1=conv(3, 8),
        weight=nn.Parameter(torch.randn(6, 8)),
        matrix=nn.Parameter(torch.randn(6, 4)),
    )


@case(inputs=image(batch=1), prunable={"conv1": 8, "conv2": 6})
def batch_of_one() -> Net:
    """One example only: the batch dimension has size 1."""
    return Net(
        lambda m, x: m.head(m.conv2(m.conv1(x).relu()).relu().mean((2, 3))),
        conv1=conv(3, 8),
        conv2=conv(8, 6),
        head=nn.Linear(6, 4),
    )


@case(inputs=lambda: torch.randn(3, 8, 6), prunable={"conv1": 8})
def unbatched() -> Net:
    """Input without a batch dimension."""
    return Net(lambda m, x: m.head(m.conv1(x).relu()), conv1=conv(3, 8), head=conv(8, 4))


@case(inputs=lambda: torch.randn(8, 8, 8, 8), prunable={"conv1": 8, "conv2": 8}, outputs=("conv3",))
def equal_sizes() -> Net:
    """Batch, channels, height and width all of one size."""
    return Net(
        lambda m, x: m.conv3(m.conv2(m.conv1(x).relu()).transpose(2, 3)),
        conv1=conv(8, 8),
        conv2=conv(8, 8),
        conv3=conv(8, 8),
    )


@case(inputs=image(1, 8, 8), prunable={"conv1": 6})
def one_input_channel() -> Net:
    """Grey images; the convolution's weight has a dimension of size 1."""
    return Net(lambda m, x: m.head(m.conv1(x).relu()), conv1=conv(1, 6), head=conv(6, 1))


@case(prunable={"conv1": 8, "conv2": 8})
def max_unpool() -> Net:
    """Max pooling with indices and unpooling (SegNet)."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x, where = F.max_pool2d(m.conv2(m.conv1(x).relu()), 2, return_indices=True)
        return m.head(F.max_unpool2d(x, where, 2))

    return Net(forward, conv1=conv(3, 8), conv2=conv(8, 8), head=conv(8, 4))


@case(prunable={"conv1": 8, "conv2": 6})
def lazy_layers() -> Net:
    """Lazy convolutions, materialised by a first run."""
    net = Net(
        lambda m, x: m.head(m.conv2(m.conv1(x).relu()).relu()),
        conv1=nn.LazyConv2d(8, 3),
        conv2=nn.LazyConv2d(6, 3),
        head=nn.LazyConv2d(4, 1),
    )
    net(torch.randn(1, 3, 8, 6))
    return net


@case(prunable={"conv1": 8, "conv2": 6})
def channels_last_memory() -> nn.Module:
    """Weights in the channels-last memory format."""
    net = Net(
        lambda m, x: m.head(m.conv2(m.conv1(x.contiguous(memory_format=torch.channels_last)).relu()).relu()),
        conv1=conv(3, 8),
        conv2=conv(8, 6),
        head=conv(6, 4, 1),
    )
    return net.to(memory_format=torch.channels_last)


@case(prunable={"conv1": 8, "conv2": 8})
def activations() -> Net:
    """The activation functions that are in use, one after another."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = F.hardswish(F.silu(F.elu(m.conv1(x))))
        x = F.leaky_relu(F.mish(F.softplus(x)), 0.1)
        x = F.hardtanh(F.selu(F.celu(m.conv2(x))).clamp(-2, 2))
        return m.head(F.relu6(F.logsigmoid(x).abs()) + F.hardsigmoid(x).pow(2) + torch.erf(x).sign())

    return Net(forward, conv1=conv(3, 8), conv2=conv(8, 8), head=conv(8, 4))


@case(prunable={"conv1": 8})
def spatial_resampling() -> Net:
    """Interpolation, grid sampling and pooling of every kind."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = F.interpolate(m.conv1(x), scale_factor=2, mode="bilinear", align_corners=False)
        x = F.interpolate(x, size=(8, 8), mode="nearest")
        grid = F.affine_grid(torch.eye(2, 3, dtype=x.dtype).expand(x.shape[0], 2, 3), [x.shape[0], 1, 8, 8], False)
        x = F.grid_sample(x, grid, align_corners=False)
        x = F.avg_pool2d(x, 3, 1, 1, ceil_mode=True) + F.max_pool2d(x, 3, 1, 1) + F.lp_pool2d(x.abs() + 1, 2, 1)
        return m.head(F.adaptive_avg_pool2d(x, (3, 2)))

    return Net(forward, conv1=conv(3, 8), head=conv(8, 4))


@case(prunable={"conv1": 8, "conv2": 8})
def blur_pool() -> Net:
    """Fixed blur kernel expanded to every channel and applied depthwise (anti-aliased pooling)."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.conv1(x).relu()
        x = F.conv2d(x, m.kernel.expand(x.shape[1], 1, 3, 3), stride=2, padding=1, groups=x.shape[1])
        return m.head(m.conv2(x).relu())

    net = Net(forward, conv1=conv(3, 8), conv2=conv(8, 8), head=conv(8, 4, 1))
    net.register_buffer("kernel", torch.tensor([1.0, 2.0, 1.0]).outer(torch.tensor([1.0, 2.0, 1.0]))[None, None] / 16)
    return net


@case(prunable={"conv1": 8})
def repeated_blur_buffer() -> Net:
    """Blur kernel stored for every channel as a buffer; groups written as the map's channels."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.conv1(x).relu()
        return m.head(F.conv2d(x, m.kernel, padding=1, groups=x.shape[1]))

    net = Net(forward, conv1=conv(3, 8), head=conv(8, 4, 1))
    net.register_buffer("kernel", torch.rand(1, 1, 3, 3).repeat(8, 1, 1, 1))
    return net


@case(prunable={"conv1": 8})
def weight_in_halves() -> Net:
    """A convolution's weight cut into halves of filters, both of which read the same channels."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.conv1(x).relu()
        first, second = m.conv2.weight.chunk(2)
        return m.head(F.conv2d(x, first).sigmoid() * F.conv2d(x, second))

    return Net(forward, conv1=conv(3, 8), conv2=conv(8, 12, 1), head=conv(6, 4))
