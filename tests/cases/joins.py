"""Branches that meet: residual sums, concatenations, products, shared layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.cases.table import Net, case, conv, conv_bn, image, pooled


@case(prunable={"conv1": 8, "conv2": 8, "conv3": 8})
def residual() -> Net:
    """Residual block with identity shortcut."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.conv1(x).relu()
        x = (x + m.conv3(m.conv2(x).relu())).relu()
        return m.head(x)

    return Net(forward, conv1=conv(3, 8), conv2=conv(8, 8), conv3=conv(8, 8), head=conv(8, 4, 1))


@case(prunable={"stem": 6, "conv1": 8, "conv2": 10, "shortcut": 10})
def residual_projection() -> Net:
    """Residual block with a strided projection shortcut."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.stem(x).relu()
        y = m.bn2(m.conv2(m.bn1(m.conv1(x)).relu()))
        return m.head(pooled((y + m.bn3(m.shortcut(x))).relu()))

    return Net(
        forward,
        stem=conv(3, 6),
        conv1=conv(6, 8, stride=2),
        bn1=nn.BatchNorm2d(8),
        conv2=conv(8, 10),
        bn2=nn.BatchNorm2d(10),
        shortcut=conv(6, 10, 1, stride=2),
        bn3=nn.BatchNorm2d(10),
        head=nn.Linear(10, 4),
    )


@case(prunable={"stem.0": 8, "a.0": 8, "b.0": 8, "c.0": 8})
def residual_stage() -> Net:
    """Several residual blocks on one stream, in place."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.stem(x)
        for block in (m.a, m.b, m.c):
            x += block(x.clone())
        return m.head(pooled(x))

    return Net(forward, stem=conv_bn(3, 8), a=conv_bn(8, 8), b=conv_bn(8, 8), c=conv_bn(8, 8), head=nn.Linear(8, 4))


@case(prunable={"stem": 8, "conv1": 6, "conv2": 8})
def preactivation() -> Net:
    """Pre-activation residual block: batch norm and ReLU before the convolution."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.stem(x)
        x = x + m.conv2(m.bn2(m.conv1(m.bn1(x).relu())).relu())
        return m.head(m.bn3(x).relu())

    return Net(
        forward,
        stem=conv(3, 8),
        bn1=nn.BatchNorm2d(8),
        conv1=conv(8, 6),
        bn2=nn.BatchNorm2d(6),
        conv2=conv(6, 8),
        bn3=nn.BatchNorm2d(8),
        head=conv(8, 4, 1),
    )


@case(prunable={"a": 6, "b": 8})
def concat() -> Net:
    """Two branches concatenated."""
    return Net(
        lambda m, x: m.head(torch.cat([m.a(x).relu(), m.b(x).relu()], 1)),
        a=conv(3, 6),
        b=conv(3, 8, 1),
        head=conv(14, 4),
    )


@case(prunable={"a": 4, "b": 6, "c": 5, "conv2": 8})
def concat_nested() -> Net:
    """Concatenation of concatenations, one part used twice, batch norm over the whole."""

    def forward(m: Net, x: Tensor) -> Tensor:
        a, b, c = m.a(x), m.b(x), m.c(x)
        x = torch.cat([torch.cat([a, b], 1), c, a], dim=-3)
        return m.head(m.conv2(m.bn(x).relu()))

    return Net(
        forward,
        a=conv(3, 4),
        b=conv(3, 6),
        c=conv(3, 5),
        bn=nn.BatchNorm2d(19),
        conv2=conv(19, 8),
        head=conv(8, 4, 1),
    )


@case(prunable={"a": 8, "b": 8})
def concat_add() -> Net:
    """Concatenations in opposite orders, added."""

    def forward(m: Net, x: Tensor) -> Tensor:
        a, b = m.a(x), m.b(x)
        return m.head(torch.cat([a, b], 1) + torch.cat([b, a], 1))

    return Net(forward, a=conv(3, 8), b=conv(3, 8), head=conv(16, 4, 1))


@case(prunable={"c": 12})
def concat_then_residual() -> Net:
    """A concatenation added to one convolution: its channels fall into two groups."""

    def forward(m: Net, x: Tensor) -> Tensor:
        return m.head((torch.cat([m.a(x), m.b(x)], 1) + m.c(x)).relu())

    return Net(forward, a=conv(3, 5), b=conv(3, 7), c=conv(3, 12), head=conv(12, 4, 1))


@case(prunable={"stem": 6, "conv1": 4, "conv2": 4, "conv3": 4, "transition": 8})
def dense_block() -> Net:
    """Dense block: each layer reads all before it."""

    def forward(m: Net, x: Tensor) -> Tensor:
        features = [m.stem(x)]
        for bn, layer in ((m.bn1, m.conv1), (m.bn2, m.conv2), (m.bn3, m.conv3)):
            features.append(layer(bn(torch.cat(features, 1)).relu()))
        x = F.avg_pool2d(m.transition(torch.cat(features, 1)), 2)
        return m.head(pooled(m.bn4(x)))

    return Net(
        forward,
        stem=conv(3, 6),
        bn1=nn.BatchNorm2d(6),
        conv1=conv(6, 4),
        bn2=nn.BatchNorm2d(10),
        conv2=conv(10, 4),
        bn3=nn.BatchNorm2d(14),
        conv3=conv(14, 4),
        transition=conv(18, 8, 1),
        bn4=nn.BatchNorm2d(8),
        head=nn.Linear(8, 4),
    )


@case(prunable={"stem": 8, "grouped": 4})
def dense_block_before_groups() -> Net:
    """A narrow layer concatenated to a wide one, read by a grouped convolution: its few filters could all go."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.stem(x).relu()
        x = torch.cat([x, m.narrow(x)], 1)
        return m.head(pooled(m.grouped(x).relu()))

    return Net(forward, stem=conv(3, 8), narrow=conv(8, 2), grouped=conv(10, 4, groups=2), head=nn.Linear(4, 3))


@case(prunable={"one": 4, "three.0": 4, "three.1": 6, "five.0": 4, "pool.1": 4})
def inception() -> Net:
    """Four branches of different kernels, concatenated."""
    return Net(
        lambda m, x: m.head(pooled(torch.cat([m.one(x), m.three(x), m.five(x), m.pool(x)], 1).relu())),
        one=conv(3, 4, 1),
        three=nn.Sequential(conv(3, 4, 1), conv(4, 6)),
        five=nn.Sequential(conv(3, 4, 1), conv(4, 6, 5)),
        pool=nn.Sequential(nn.MaxPool2d(3, 1, 1), conv(3, 4, 1)),
        head=nn.Linear(20, 4),
    )


@case(prunable={"down1": 6, "down2": 8, "up1": 6})
def unet() -> Net:
    """Encoder and decoder with upsampling and concatenated skips."""

    def forward(m: Net, x: Tensor) -> Tensor:
        first = m.down1(x).relu()
        second = m.down2(F.max_pool2d(first, 2)).relu()
        x = F.interpolate(second, size=first.shape[-2:], mode="bilinear", align_corners=True)
        return m.head(m.up1(torch.cat([x, first], 1)).relu())

    return Net(forward, down1=conv(3, 6), down2=conv(6, 8), up1=conv(14, 6), head=conv(6, 2, 1))


@case(prunable={"c3": 6, "lateral3": 8, "lateral4": 8}, outputs=("out3", "out4"))
def feature_pyramid() -> Net:
    """Top-down pyramid with lateral sums and several outputs."""

    def forward(m: Net, x: Tensor) -> list[Tensor]:
        c3 = m.c3(x).relu()
        c4 = m.c4(c3).relu()
        p4 = m.lateral4(c4)
        p3 = m.lateral3(c3) + F.interpolate(p4, size=c3.shape[-2:], mode="nearest")
        return [m.out3(p3), m.out4(p4)]

    return Net(
        forward,
        c3=conv(3, 6),
        c4=conv(6, 7, stride=2),
        lateral3=conv(6, 8, 1),
        lateral4=conv(7, 8, 1),
        out3=conv(8, 4),
        out4=conv(8, 4),
    )


@case(prunable={"high": 4, "low": 6, "up": 4, "down": 6})
def multi_resolution() -> Net:
    """Two resolutions that exchange (HRNet)."""

    def forward(m: Net, x: Tensor) -> Tensor:
        high, low = m.high(x).relu(), m.low(x).relu()
        fused_high = high + F.interpolate(m.up(low), scale_factor=2.0)
        fused_low = low + m.down(high)
        return m.head(torch.cat([pooled(fused_high.relu()), pooled(fused_low.relu())], 1))

    return Net(
        forward,
        high=conv(3, 4),
        low=conv(3, 6, stride=2),
        up=conv(6, 4, 1),
        down=conv(4, 6, stride=2),
        head=nn.Linear(10, 4),
    )


@case(prunable={"conv1": 8})
def input_concat() -> Net:
    """The raw input concatenated with features."""
    return Net(lambda m, x: m.head(torch.cat([x, m.conv1(x).relu(), x], 1)), conv1=conv(3, 8), head=conv(14, 4))


@case(prunable={"conv2": 6}, refused={"conv1": "add"})
def input_add() -> Net:
    """The raw input added to features: their channels are the input's."""
    return Net(lambda m, x: m.head(m.conv2(x + m.conv1(x)).relu()), conv1=conv(3, 3), conv2=conv(3, 6), head=conv(6, 4))


@case(prunable={"conv1": 8})
def input_mask() -> Net:
    """Features multiplied with a one-channel map taken of the input."""
    return Net(
        lambda m, x: m.head(m.conv1(x) * x[:, :1].sigmoid() + x.mean(1, keepdim=True)),
        conv1=conv(3, 8),
        head=conv(8, 4),
    )


@case(prunable={"conv1": 8, "conv2": 8})
def option_a_shortcut() -> Net:
    """Strided shortcut whose new channels are zero padding (CIFAR ResNet, option A)."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.conv1(x).relu()
        shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4), "constant", 0)
        return m.head(pooled((m.conv2(x) + shortcut).relu()))

    return Net(forward, conv1=conv(3, 8), conv2=conv(8, 16, stride=2), head=nn.Linear(16, 4))


@case(prunable={"conv1": 8})
def option_a_by_cat() -> Net:
    """The same by concatenating zeros."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.conv1(x).relu()
        shortcut = torch.cat([x, torch.zeros_like(x)], 1)
        return m.head(pooled((m.conv2(x) + shortcut).relu()))

    return Net(forward, conv1=conv(3, 8), conv2=conv(8, 16), head=nn.Linear(16, 4))


@case(prunable={"a": 8, "b": 8})
def product_of_branches() -> Net:
    """Two branches multiplied, one through a sigmoid."""
    return Net(lambda m, x: m.head(m.a(x).tanh() * m.b(x).sigmoid()), a=conv(3, 8), b=conv(3, 8), head=conv(8, 4))


@case(prunable={"a": 8, "b": 8, "c": 8})
def binary_operators() -> Net:
    """Minimum, maximum, division, power, comparison, lerp, addcmul and where on branches."""

    def forward(m: Net, x: Tensor) -> Tensor:
        a, b, c = m.a(x), m.b(x), m.c(x)
        y = torch.maximum(a, b) - torch.minimum(b, c) / (c.abs() + 1)
        y = torch.lerp(y, a, 0.3) + torch.addcmul(a, b, c, value=0.5)
        y = torch.where(a > b, y, c) + (a.abs() + 1) ** b.sigmoid()
        return m.head(torch.atan2(y, c).masked_fill(a < 0, 0.5))

    return Net(forward, a=conv(3, 8), b=conv(3, 8), c=conv(3, 8), head=conv(8, 4))


@case(prunable={"features": 8})
def spatial_gate() -> Net:
    """Features multiplied with a one-channel attention map, broadcast over the channels."""
    return Net(
        lambda m, x: m.head(m.features(x) * m.gate(x).sigmoid()),
        features=conv(3, 8),
        gate=conv(3, 1),
        head=conv(8, 4),
    )


@case(prunable={"features": 8, "hidden": 6})
def scalar_gate() -> Net:
    """Features scaled by one value an example, broadcast over everything."""
    return Net(
        lambda m, x: m.head(m.features(x) * m.gate(m.hidden(pooled(x)).relu())[:, :, None, None]),
        features=conv(3, 8),
        hidden=nn.Linear(3, 6),
        gate=nn.Linear(6, 1),
        head=conv(8, 4),
    )


@case(prunable={"conv1": 8, "shared": 8})
def shared_module() -> Net:
    """One module called twice in a row: its input and output channels are the same."""
    return Net(
        lambda m, x: m.head(m.shared(m.shared(m.conv1(x).relu()).relu()).relu()),
        conv1=conv(3, 8),
        shared=conv(8, 8),
        head=conv(8, 4),
    )


@case(prunable={"stem_a": 6, "stem_b": 6, "shared": 8})
def shared_on_branches() -> Net:
    """One module on two branches."""

    def forward(m: Net, x: Tensor) -> Tensor:
        a, b = m.shared(m.stem_a(x).relu()), m.shared(m.stem_b(x).relu())
        return m.head(torch.cat([a, b], 1))

    return Net(forward, stem_a=conv(3, 6), stem_b=conv(3, 6, 1), shared=conv(6, 8), head=conv(16, 4))


@case(prunable={"stem": 8}, outputs=("heads",))
def shared_head_over_levels() -> Net:
    """One head over several resolutions (RetinaNet)."""

    def forward(m: Net, x: Tensor) -> list[Tensor]:
        levels = [m.stem(x), m.stem(F.avg_pool2d(x, 2))]
        return [m.heads(m.tower(level).relu()) for level in levels]

    return Net(forward, stem=conv(3, 8), tower=conv(8, 8), heads=conv(8, 4))


@case(prunable={"conv1": 8, "conv2": 6, "conv3": 6})
def tied_weights() -> Net:
    """Two convolutions that hold one weight."""
    net = Net(
        lambda m, x: m.head(m.conv2(m.conv1(x).relu()).relu() - m.conv3(m.conv1(x).tanh())),
        conv1=conv(3, 8),
        conv2=conv(8, 6),
        conv3=conv(8, 6),
        head=conv(6, 4),
    )
    net.conv3.weight = net.conv2.weight
    return net


@case(inputs=lambda: torch.randn(3, 10), prunable={"encoder": 6}, outputs=())
def tied_autoencoder() -> Net:
    """Encoder and decoder share one matrix, the decoder transposed."""
    return Net(
        lambda m, x: F.linear(m.encoder(x).relu(), m.encoder.weight.t()),
        encoder=nn.Linear(10, 6),
    )


@case(prunable={"a": 8, "b": 8})
def stack_of_branches() -> Net:
    """Branches stacked on a new dimension, weighted and summed."""

    def forward(m: Net, x: Tensor) -> Tensor:
        both = torch.stack([m.a(x), m.b(x)], dim=1)
        return m.head((both * m.weights.softmax(0)[None, :, None, None, None]).sum(1))

    return Net(forward, a=conv(3, 8), b=conv(3, 8), weights=nn.Parameter(torch.randn(2)), head=conv(8, 4))


@case(prunable={"conv1": 8})
def batch_concat() -> Net:
    """Concatenation along the batch (two views through one network)."""

    def forward(m: Net, x: Tensor) -> Tensor:
        first, second = m.conv1(torch.cat([x, x.flip(3)])).relu().chunk(2)
        return m.head(first * second)

    return Net(forward, conv1=conv(3, 8), head=conv(8, 4))


@case(prunable={"conv1": 8})
def spatial_concat() -> Net:
    """Concatenation along the map's width."""
    return Net(lambda m, x: m.head(torch.cat([m.conv1(x), m.conv1(x.flip(2))], 3)), conv1=conv(3, 8), head=conv(8, 4))


@case(prunable={"a": 6, "b": 8})
def slice_assignment() -> Net:
    """A buffer made empty and filled slice by slice."""

    def forward(m: Net, x: Tensor) -> Tensor:
        a, b = m.a(x), m.b(x)
        whole = torch.empty(x.shape[0], a.shape[1] + b.shape[1], *x.shape[2:], dtype=x.dtype)
        whole[:, : a.shape[1]] = a
        whole[:, a.shape[1] :] = b
        return m.head(whole)

    return Net(forward, a=conv(3, 6), b=conv(3, 8), head=conv(14, 4))


@case(prunable={"conv1": 8})
def temporal_shift() -> nn.Module:
    """Channels shifted in time by assigning slices (TSM); the slice widths follow the shape."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.conv1(x).relu()
        fold = x.shape[1] // 4
        out = torch.zeros_like(x)
        out[:-1, :fold] = x[1:, :fold]
        out[1:, fold : 2 * fold] = x[:-1, fold : 2 * fold]
        out[:, 2 * fold :] = x[:, 2 * fold :]
        return m.head(out)

    return Net(forward, conv1=conv(3, 8), head=conv(8, 4))


@case(prunable={"conv1": 8})
def zeros_like_sum() -> Net:
    """Accumulation that starts from zeros_like and ones_like."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.conv1(x)
        total = torch.zeros_like(x)
        for scale in (0.5, 2.0):
            total = total + torch.tanh(scale * x)
        return m.head(total * torch.ones_like(x) + torch.full_like(x, 0.5))

    return Net(forward, conv1=conv(3, 8), head=conv(8, 4))


@case(prunable={"conv1": 8, "conv2": 8})
def detach_clone_dropout() -> Net:
    """Detach, clone, contiguous, dropout, identity, type conversions on the way."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.drop(m.conv1(x).clone()).contiguous() + m.conv1(x).detach()
        x = F.dropout2d(m.same(m.conv2(x)).to(torch.float64).to(x.dtype), 0.5, m.training)
        return m.head(x.float().type_as(x))

    return Net(forward, conv1=conv(3, 8), drop=nn.Dropout(0.3), conv2=conv(8, 8), same=nn.Identity(), head=conv(8, 4))


@case(prunable={"primary": 6, "cheap": 6})
def ghost_module() -> Net:
    """Ghost module: features concatenated with a depthwise image of themselves."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.primary(x).relu()
        return m.head(torch.cat([x, m.cheap(x).relu()], 1))

    return Net(forward, primary=conv(3, 6), cheap=conv(6, 6, groups=6), head=conv(12, 4))


@case(prunable={"stem": 6, "a": 6, "b": 6})
def reparameterised_branches() -> Net:
    """3x3, 1x1 and identity branches, each with batch norm, added (RepVGG)."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.stem(x).relu()
        return m.head((m.bn_a(m.a(x)) + m.bn_b(m.b(x)) + m.bn_c(x)).relu())

    return Net(
        forward,
        stem=conv(3, 6),
        a=conv(6, 6),
        bn_a=nn.BatchNorm2d(6),
        b=conv(6, 6, 1),
        bn_b=nn.BatchNorm2d(6),
        bn_c=nn.BatchNorm2d(6),
        head=conv(6, 4),
    )


@case(prunable={"a": 8, "b": 6, "fuse": 8})
def pyramid_pooling() -> Net:
    """Pooled branch broadcast back over the map and concatenated (ASPP)."""

    def forward(m: Net, x: Tensor) -> Tensor:
        context = m.b(x.mean((2, 3), keepdim=True)).expand(-1, -1, *x.shape[2:])
        return m.head(m.fuse(torch.cat([m.a(x), context], 1)).relu())

    return Net(forward, a=conv(3, 8, dilation=2, padding=2), b=conv(3, 6, 1), fuse=conv(14, 8, 1), head=conv(8, 4))


@case(inputs=image(), prunable={"a": 8, "b": 8})
def residual_of_concat_input() -> Net:
    """Residual stream that later joins a concatenation with its own beginning."""

    def forward(m: Net, x: Tensor) -> Tensor:
        a = m.a(x).relu()
        return m.head(torch.cat([a + m.b(a), a], 1))

    return Net(forward, a=conv(3, 8), b=conv(8, 8), head=conv(16, 4))
