"""Channels that are split, moved, interleaved, picked and reshaped."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.cases.table import Net, case, conv, image, pooled


def shuffled(x: Tensor, groups: int) -> Tensor:
    """Shuffle channels as ShuffleNet writes it."""
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


@case(prunable={"conv1": 8, "conv2": 8})
def shuffle_by_view() -> Net:
    """Channel shuffle by view and transpose."""
    return Net(
        lambda m, x: m.head(m.conv2(shuffled(m.conv1(x), 2)).relu()),
        conv1=conv(3, 8),
        conv2=conv(8, 8),
        head=conv(8, 4),
    )


@case(prunable={"conv1": 12})
def shuffle_native() -> Net:
    """Channel shuffle by nn.ChannelShuffle, three groups."""
    return Net(
        lambda m, x: m.head(m.shuffle(m.conv1(x).relu())),
        conv1=conv(3, 12),
        shuffle=nn.ChannelShuffle(3),
        head=conv(12, 4),
    )


@case(prunable={"conv1": 18, "grouped": 18})
def shuffle_between_groups() -> Net:
    """Grouped convolution, shuffle, grouped convolution (ShuffleNet v1)."""
    return Net(
        lambda m, x: m.head(m.last(shuffled(m.grouped(m.conv1(x).relu()), 3)).relu()),
        conv1=conv(3, 18),
        grouped=conv(18, 18, groups=3),
        last=conv(18, 18, groups=3),
        head=conv(18, 4),
    )


@case(prunable={"branch": 6})
def shufflenet_unit() -> Net:
    """Split in halves, one goes through a branch, concatenated and shuffled (ShuffleNet v2)."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.stem(x).relu()
        for _ in range(1):
            kept, worked = x.chunk(2, dim=1)
            worked = m.point(m.depth(m.branch(worked).relu()))
            x = shuffled(torch.cat([kept, worked], 1), 2)
        return m.head(x)

    return Net(
        forward,
        stem=conv(3, 12),
        branch=conv(6, 6, 1),
        depth=conv(6, 6, groups=6),
        point=conv(6, 6, 1),
        head=conv(12, 4),
    )


@case(prunable={"conv1": 8})
def chunk_halves() -> Net:
    """chunk(2): each half is read by another layer."""

    def forward(m: Net, x: Tensor) -> Tensor:
        a, b = m.conv1(x).relu().chunk(2, 1)
        return m.head(m.a(a) + m.b(b))

    return Net(forward, conv1=conv(3, 8), a=conv(4, 6), b=conv(4, 6), head=conv(6, 4))


@case(prunable={"conv1": 8, "a": 4})
def chunk_reversed() -> Net:
    """Halves concatenated in the other order, one of them changed on the way."""

    def forward(m: Net, x: Tensor) -> Tensor:
        a, b = m.conv1(x).relu().chunk(2, 1)
        return m.head(torch.cat([b, m.a(a)], 1))

    return Net(forward, conv1=conv(3, 8), a=conv(4, 4), head=conv(8, 4))


@case()
def split_sizes() -> Net:
    """split with unequal sizes written as integers: the total can't change without an error in the forward."""

    def forward(m: Net, x: Tensor) -> Tensor:
        a, b = m.conv1(x).relu().split([3, 5], 1)
        return m.head(m.a(a) + m.b(b))

    return Net(forward, conv1=conv(3, 8), a=conv(3, 6), b=conv(5, 6), head=conv(6, 4))


@case(prunable={"a": 6})
def split_sizes_refused() -> Net:
    """The same: nothing of the split layer may be offered."""

    def forward(m: Net, x: Tensor) -> Tensor:
        a, b = torch.split(m.conv1(x).relu(), [2, 6], dim=1)
        return m.head(m.a(a).relu() * m.b(b))

    return Net(forward, conv1=conv(3, 8), a=conv(2, 6), b=conv(6, 6), head=conv(6, 4))


@case(prunable={"a": 6, "b": 5}, outputs=("head_a", "head_b"))
def split_of_concat() -> Net:
    """What was concatenated is split again, at the widths of the parts."""

    def forward(m: Net, x: Tensor) -> Tensor:
        a, b = m.a(x), m.b(x)
        both = m.bn(torch.cat([a, b], 1))
        a, b = both.split([a.shape[1], b.shape[1]], 1)
        return m.head_a(a.relu()) + m.head_b(b.relu())

    return Net(forward, a=conv(3, 6), b=conv(3, 5), bn=nn.BatchNorm2d(11), head_a=conv(6, 4), head_b=conv(5, 4))


@case(prunable={"conv1": 8})
def slice_half_of_shape() -> Net:
    """Halves sliced at a width computed from the shape."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.conv1(x).relu()
        half = x.shape[1] // 2
        return m.head(m.a(x[:, :half]) * m.b(x[:, half:]))

    return Net(forward, conv1=conv(3, 8), a=conv(4, 6), b=conv(4, 6), head=conv(6, 4))


@case(prunable={"a": 6})
def slice_half_hard_coded() -> Net:
    """Halves sliced at an integer in the code: removing a channel of the first half would shift the second."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.conv1(x).relu()
        return m.head(m.a(x[:, :4]) * m.b(x[:, 4:]))

    return Net(forward, conv1=conv(3, 8), a=conv(4, 6), b=conv(4, 6), head=conv(6, 4))


@case()
def slice_hard_coded_prefix() -> Net:
    """Only a prefix of fixed width is read; a shorter tensor would be sliced without an error."""
    return Net(
        lambda m, x: m.head(m.conv1(x).relu()[:, :5]) + m.other(m.conv1(x)),
        conv1=conv(3, 8),
        other=conv(8, 4),
        head=conv(5, 4),
    )


@case()
def select_channel() -> Net:
    """One channel picked by its number and used as a mask."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.conv1(x)
        return m.head(x.relu() * x[:, 2:3].sigmoid() + x[:, -1].unsqueeze(1))

    return Net(forward, conv1=conv(3, 8), head=conv(8, 4))


@case(prunable={"conv1": 8})
def flip_channels() -> Net:
    """Channels in reverse order."""
    return Net(lambda m, x: m.head(m.conv1(x).relu().flip(1)), conv1=conv(3, 8), head=conv(8, 4))


@case(prunable={"conv1": 8})
def flip_channels_residual() -> Net:
    """Channels added to themselves reversed: mirror images can only go together."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.conv1(x).relu()
        return m.head(x + 0.5 * x.flip(1))

    return Net(forward, conv1=conv(3, 8), head=conv(8, 4))


@case()
def roll_channels() -> Net:
    """Channels rolled by one: the last is carried to the front, so it has to stay."""
    return Net(lambda m, x: m.head(m.conv1(x).relu().roll(1, 1)), conv1=conv(3, 8), head=conv(8, 4))


@case()
def roll_channels_residual() -> Net:
    """Channels added to themselves rolled: all of them hang together."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.conv1(x).relu()
        return m.head(x + x.roll(2, 1))

    return Net(forward, conv1=conv(3, 8), head=conv(8, 4))


@case(prunable={"conv1": 8})
def roll_map() -> Net:
    """The map rolled in space, channels in place."""
    return Net(lambda m, x: m.head(m.conv1(x).relu().roll((1, 2), (2, 3))), conv1=conv(3, 8), head=conv(8, 4))


@case()
def index_constant() -> Net:
    """Channels permuted by a constant index list: the numbers outlive the channels they named."""
    return Net(lambda m, x: m.head(m.conv1(x).relu()[:, [3, 1, 0, 2, 7, 6, 5, 4]]), conv1=conv(3, 8), head=conv(8, 4))


@case()
def index_select_buffer() -> Net:
    """Channels permuted by an index buffer."""
    net = Net(lambda m, x: m.head(m.conv1(x).relu().index_select(1, m.order)), conv1=conv(3, 8), head=conv(8, 4))
    net.register_buffer("order", torch.tensor([7, 0, 6, 1, 5, 2, 4, 3]))
    return net


@case()
def boolean_mask() -> Net:
    """Channels picked by a constant boolean mask."""
    net = Net(lambda m, x: m.head(m.conv1(x).relu()[:, m.mask]), conv1=conv(3, 8), head=conv(5, 4))
    net.register_buffer("mask", torch.tensor([True, False, True, True, False, False, True, True]))
    return net


@case()
def gather_channels() -> Net:
    """gather along the channels by an index tensor."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.conv1(x).relu()
        index = m.order[None, :, None, None].expand(x.shape[0], -1, *x.shape[2:])
        return m.head(x.gather(1, index))

    net = Net(forward, conv1=conv(3, 8), head=conv(6, 4))
    net.register_buffer("order", torch.tensor([7, 0, 6, 1, 5, 2]))
    return net


@case()
def gather_by_values() -> Net:
    """The strongest channels picked by their values (top-k attention)."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.conv1(x).relu()
        index = pooled(x).topk(4, 1).indices[:, :, None, None].expand(-1, -1, *x.shape[2:])
        return m.head(x.gather(1, index))

    return Net(forward, conv1=conv(3, 8), head=conv(4, 4))


@case(prunable={"conv1": 8})
def every_second_channel() -> Net:
    """Even and odd channels sliced with a step of two."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.conv1(x).relu()
        return m.head(m.a(x[:, ::2]) + m.b(x[:, 1::2]))

    return Net(forward, conv1=conv(3, 8), a=conv(4, 6), b=conv(4, 6), head=conv(6, 4))


@case(prunable={"conv1": 8})
def pairs_by_view() -> Net:
    """Neighbouring channels viewed as pairs and added: view(c // 2, 2)."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.conv1(x).relu()
        n, c, h, w = x.shape
        return m.head(x.view(n, c // 2, 2, h, w).sum(2))

    return Net(forward, conv1=conv(3, 8), head=conv(4, 4))


@case(prunable={"conv1": 8})
def maxout() -> Net:
    """Maximum over pairs of channels from the two halves: view(2, c // 2)."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.conv1(x)
        return m.head(x.unflatten(1, (2, x.shape[1] // 2)).amax(1))

    return Net(forward, conv1=conv(3, 8), head=conv(4, 4))


@case(prunable={"a": 6, "b": 6})
def interleave_by_stack() -> Net:
    """Two branches interleaved by stack and flatten."""
    return Net(
        lambda m, x: m.head(torch.stack([m.a(x), m.b(x)], 2).flatten(1, 2)),
        a=conv(3, 6),
        b=conv(3, 6),
        head=conv(12, 4),
    )


@case(prunable={"conv1": 8})
def unbind_pairs() -> Net:
    """Channels viewed as (2, c/2), unbound and gated."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.conv1(x)
        a, b = x.view(x.shape[0], 2, x.shape[1] // 2, *x.shape[2:]).unbind(1)
        return m.head(a.tanh() * b.sigmoid())

    return Net(forward, conv1=conv(3, 8), head=conv(4, 4))


@case()
def unbind_channels() -> Net:
    """Every channel taken out on its own and stacked again in a loop over them."""
    return Net(
        lambda m, x: m.head(torch.stack([channel * 2 for channel in m.conv1(x).unbind(1)], 1)),
        conv1=conv(3, 8),
        head=conv(8, 4),
    )


@case(prunable={"conv1": 8})
def gated_linear_unit() -> Net:
    """F.glu over the channels."""
    return Net(lambda m, x: m.head(F.glu(m.conv1(x), dim=1)), conv1=conv(3, 8), head=conv(4, 4))


@case(prunable={"conv1": 8, "conv2": 8})
def pixel_shuffle() -> Net:
    """Pixel shuffle: four channels make one of twice the size."""
    return Net(
        lambda m, x: m.head(F.pixel_shuffle(m.conv2(m.conv1(x).relu()), 2)),
        conv1=conv(3, 8),
        conv2=conv(8, 8),
        head=conv(2, 4),
    )


@case(prunable={"conv1": 4, "conv2": 6})
def pixel_unshuffle() -> Net:
    """Pixel unshuffle: one channel makes four."""
    return Net(
        lambda m, x: m.head(m.conv2(F.pixel_unshuffle(m.conv1(x).relu(), 2)).relu()),
        conv1=conv(3, 4),
        conv2=conv(16, 6),
        head=conv(6, 4),
    )


@case(prunable={"conv1": 4})
def space_to_depth() -> Net:
    """Strided slices of the map concatenated as channels (YOLO's focus, Swin's patch merging)."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.conv1(x)
        return m.head(torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1))

    return Net(forward, conv1=conv(3, 4), head=conv(16, 4))


@case(prunable={"conv1": 6})
def unfold() -> Net:
    """im2col of the map, read by a linear layer over its columns."""
    return Net(
        lambda m, x: m.head(F.unfold(m.conv1(x).relu(), 3, padding=1).transpose(1, 2)),
        conv1=conv(3, 6),
        head=nn.Linear(54, 4),
    )


@case()
def unfold_fold() -> Net:
    """im2col and col2im."""
    return Net(
        lambda m, x: m.head(F.fold(F.unfold(m.conv1(x), 2, stride=2), x.shape[2:], 2, stride=2)),
        conv1=conv(3, 6),
        head=conv(6, 4),
    )


@case(prunable={"conv1": 6})
def tensor_unfold() -> Net:
    """Windows of the map as new dimensions: Tensor.unfold."""
    return Net(
        lambda m, x: m.head(m.conv1(x).unfold(2, 2, 2).unfold(3, 2, 2).amax((-1, -2))),
        conv1=conv(3, 6),
        head=conv(6, 4),
    )


@case(prunable={"conv1": 8})
def tile_channels() -> Net:
    """Channels tiled: repeat(1, 2, 1, 1)."""
    return Net(lambda m, x: m.head(m.conv1(x).relu().repeat(1, 2, 1, 1)), conv1=conv(3, 8), head=conv(16, 4))


@case(prunable={"conv1": 8})
def repeat_interleave() -> Net:
    """Every channel repeated in place."""
    return Net(lambda m, x: m.head(m.conv1(x).relu().repeat_interleave(2, dim=1)), conv1=conv(3, 8), head=conv(16, 4))


@case(prunable={"conv1": 8, "fc": 10})
def channels_last_linear() -> Net:
    """Channels permuted to the end and read by linear layers (ConvNeXt)."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.conv1(x).permute(0, 2, 3, 1)
        x = m.head(F.gelu(m.fc(x)))
        return x.permute(0, 3, 1, 2)

    return Net(forward, conv1=conv(3, 8), fc=nn.Linear(8, 10), head=nn.Linear(10, 4))


@case(prunable={"conv1": 8, "fc": 8})
def moved_dimensions() -> Net:
    """movedim, swapaxes, flatten and unflatten of the map, transposes there and back."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.conv1(x).flatten(2).swapaxes(1, 2)
        x = m.fc(x).transpose(1, 2).unflatten(2, (8, 6))
        return m.head(x.movedim(1, -1).movedim(-1, 1).mT)

    return Net(forward, conv1=conv(3, 8), fc=nn.Linear(8, 8), head=conv(8, 4))


@case(prunable={"conv1": 8}, outputs=("matrix",))
def einsum_pointwise() -> Net:
    """A pointwise convolution written as an einsum with a raw parameter."""
    return Net(
        lambda m, x: torch.einsum("nchw,oc->nohw", m.conv1(x).relu(), m.matrix),
        conv1=conv(3, 8),
        matrix=nn.Parameter(torch.randn(4, 8)),
    )


@case(refused={"a": "contracted", "b": "contracted"})
def einsum_contraction() -> Net:
    """Two feature maps contracted over their channels by an einsum."""

    def forward(m: Net, x: Tensor) -> Tensor:
        a, b = m.a(x).flatten(2), m.b(x).flatten(2)
        return m.head(torch.einsum("ncp,ncq->npq", a, b))

    return Net(forward, a=conv(3, 8), b=conv(3, 8), head=nn.Linear(48, 4))


@case(prunable={"conv1": 8, "table": 8})
def einsum_mixing() -> Net:
    """Channels scaled and mixed by raw parameters, between two convolutions."""
    return Net(
        lambda m, x: m.head(torch.einsum("nchw,oc->nohw", m.conv1(x) * m.scale[:, None, None], m.table).relu()),
        conv1=conv(3, 8),
        scale=nn.Parameter(torch.randn(8)),
        table=nn.Parameter(torch.randn(8, 8)),
        head=conv(8, 4),
    )


@case(prunable={"stem": 8, "a.0": 4})
def cross_stage_partial() -> Net:
    """CSP: half of the channels goes through blocks, the other half around them."""

    def forward(m: Net, x: Tensor) -> Tensor:
        first, second = m.stem(x).relu().chunk(2, 1)
        second = second + m.a(second)
        return m.head(torch.cat([first, second], 1))

    return Net(
        forward,
        stem=conv(3, 8),
        a=nn.Sequential(conv(4, 4, 1), nn.ReLU(), conv(4, 4)),
        head=conv(8, 4, 1),
    )


@case(prunable={"conv1": 12})
def res2net() -> Net:
    """Res2Net: chunks that feed one another, concatenated."""

    def forward(m: Net, x: Tensor) -> Tensor:
        parts = list(m.conv1(x).relu().chunk(3, 1))
        parts[1] = m.a(parts[1]).relu()
        parts[2] = m.b(parts[2] + parts[1]).relu()
        return m.head(torch.cat(parts, 1))

    return Net(forward, conv1=conv(3, 12), a=conv(4, 4), b=conv(4, 4), head=conv(12, 4, 1))


@case(prunable={"conv1": 8})
def group_sum() -> Net:
    """Channels reshaped to groups, normalised by the map's mean and reshaped back."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.conv1(x)
        n, c, h, w = x.shape
        x = x.reshape(n * 2, c // 2, h, w)
        x = x * (x - x.mean((2, 3), keepdim=True)).sigmoid()
        return m.head(x.reshape(n, c, h, w))

    return Net(forward, conv1=conv(3, 8), head=conv(8, 4))


@case(refused={"conv1": "computed kernel"})
def batch_folded_into_channels() -> Net:
    """Batch folded into the channels and back (per-example convolution)."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.conv1(x)
        n, c, h, w = x.shape
        kernel = torch.full((n * c, 1, 3, 3), 1 / 9, dtype=x.dtype)
        x = F.conv2d(x.reshape(1, n * c, h, w), kernel, padding=1, groups=n * c)
        return m.head(x.reshape(n, c, h, w))

    return Net(forward, conv1=conv(3, 8), head=conv(8, 4))


@case(prunable={"one": 8})
def channels_last_padding() -> Net:
    """Several dimensions are padded at once, and channels are the last of them: what is padded on stays."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = F.pad(m.one(x).relu().permute(0, 2, 3, 1), (2, 3, 1, 0, 0, 1))
        return m.head(x.permute(0, 3, 1, 2))

    return Net(forward, one=conv(3, 8), head=conv(13, 4))


@case(inputs=image(3, 6, 6), prunable={"conv1": 8})
def crop_and_pad() -> Net:
    """The map cropped, padded, strided and transposed by slices."""
    return Net(
        lambda m, x: m.head(F.pad(m.conv1(x)[:, :, 1:-1, ::2], (1, 2, 0, 1), value=0.5).transpose(2, 3)),
        conv1=conv(3, 8),
        head=conv(8, 4),
    )


class Unit(nn.Module):
    """Works on one half of the channels, joins the two halves and shuffles them (ShuffleNet v2)."""

    def __init__(self, half: int, native: bool) -> None:
        super().__init__()
        self.native = native
        self.body = nn.Sequential(conv(half, half, 1), nn.ReLU(), conv(half, half, groups=half), conv(half, half, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Split, work, join, shuffle."""
        kept, worked = x.chunk(2, dim=1)
        x = torch.cat([kept, self.body(worked).relu()], 1)
        return F.channel_shuffle(x, 2) if self.native else shuffled(x, 2)


def stage(half: int, units: int, native: bool, reader: nn.Module) -> Net:
    """Two branches joined and shuffled, then units on the stream, then a depthwise layer and a reader."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = torch.cat([m.left(x), m.right(x).relu()], 1)
        x = F.channel_shuffle(x, 2) if native else shuffled(x, 2)
        x = m.norm(m.depth(m.units(x)))
        return m.head(x.flatten(1) if isinstance(m.head, nn.Linear) else x)

    return Net(
        forward,
        left=conv(3, half),
        right=conv(3, half),
        units=nn.Sequential(*(Unit(half, native) for _ in range(units))),
        depth=conv(2 * half, 2 * half, groups=2 * half),
        norm=nn.BatchNorm2d(2 * half),
        head=reader,
    )


@case(prunable={"left": 10, "right": 10, "units.0.body.3": 10, "units.2.body.3": 10})
def shuffled_stream() -> Net:
    """ShuffleNet v2 stage: halves of odd length are shuffled again and again; a depthwise layer reads them in order."""
    return stage(10, 3, False, conv(20, 4))


@case(prunable={"left": 6, "units.0.body.3": 6, "units.3.body.3": 6})
def shuffled_stream_native() -> Net:
    """The same by F.channel_shuffle, flattened with its positions into a linear layer."""
    return stage(6, 4, True, nn.Linear(12 * 48, 4))


@case(prunable={"left": 7, "units.0.body.0": 7})
def shuffled_stream_added() -> Net:
    """A shuffled stream with a layer's output added to it: that layer's filters go with the stream's places."""
    net = stage(7, 2, False, conv(14, 4))

    def forward(m: Net, x: Tensor) -> Tensor:
        y = shuffled(torch.cat([m.left(x), m.right(x).relu()], 1), 2)
        y = m.units(y) + m.side(x).relu()
        return m.head(m.norm(m.depth(y)))

    net.body = forward
    net.side = conv(3, 14)
    return net


@case(prunable={"left": 7, "units.0.body.0": 7}, outputs=("head", "side_head"))
def shuffled_before_it_meets_a_shuffled_stream() -> Net:
    """A layer's output is shuffled first, then added to a stream that was shuffled: its order is one found later."""
    net = stage(7, 2, False, conv(14, 4))

    def forward(m: Net, x: Tensor) -> Tensor:
        side = m.side(x).relu()
        first = m.side_head(shuffled(side, 2))
        y = shuffled(torch.cat([m.left(x), m.right(x).relu()], 1), 2)
        return m.head(m.norm(m.depth(m.units(y) + side))) + first

    net.body = forward
    net.side, net.side_head = conv(3, 14), conv(14, 4)
    return net


@case(prunable={"left": 6, "beside": 12, "grouped": 8})
def shuffled_stream_beside_channels_in_order() -> Net:
    """A grouped convolution reads a shuffled stream in one block, others in another: both lose alike."""

    def forward(m: Net, x: Tensor) -> Tensor:
        y = m.units(shuffled(torch.cat([m.left(x), m.right(x).relu()], 1), 2))
        return m.head(m.grouped(torch.cat([y, m.beside(x).relu()], 1)).relu())

    layers = {"left": conv(3, 6), "right": conv(3, 6), "units": nn.Sequential(Unit(6, False), Unit(6, False))}
    return Net(forward, **layers, beside=conv(3, 12), grouped=conv(24, 8, groups=2), head=conv(8, 4))


@case(refused={"conv": "meets itself unshuffled"})
def shuffle_added_to_what_it_shuffles() -> Net:
    """A residual around a channel shuffle: what is left would have to lie in an order that is its own shuffle."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.conv(x)
        return m.head(x + shuffled(x, 2))

    return Net(forward, conv=conv(3, 16), head=conv(16, 4))


@case(prunable={"conv": 8}, refused={"grouped": "meets itself unshuffled"})
def shuffle_added_to_the_groups_it_shuffles() -> Net:
    """A residual around a channel shuffle, behind a grouped convolution and a group norm."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.norm(m.grouped(m.conv(x)))
        return m.head(x + shuffled(x, 2))

    return Net(forward, conv=conv(3, 16), grouped=conv(16, 16, groups=4), norm=nn.GroupNorm(4, 16), head=conv(16, 4))


@case(prunable={"unit.body.0": 4}, refused={"conv": "meets itself unshuffled"})
def shuffled_unit_added_to_its_input() -> Net:
    """A residual around a ShuffleNet v2 unit."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.conv(x)
        return m.head(x + m.unit(x))

    return Net(forward, conv=conv(3, 16), unit=Unit(8, False), head=conv(16, 4))


@case()
def shuffled_stream_reversed() -> Net:
    """A shuffled stream read in reverse: what is left of it lies in no order that a plan can give."""
    net = stage(7, 2, False, conv(14, 4))

    def forward(m: Net, x: Tensor) -> Tensor:
        y = shuffled(torch.cat([m.left(x), m.right(x).relu()], 1), 2)
        return m.head(m.norm(m.depth(m.units(y).flip(1))))

    net.body = forward
    return net


@case(refused={"a": "", "b": ""}, outputs=("head_a", "head_b"))
def split_of_concat_in_proportion() -> Net:
    """What was concatenated is split again, in the proportion that the parts had: parts of 6 and 5 can't keep it."""

    def forward(m: Net, x: Tensor) -> Tensor:
        both = m.bn(torch.cat([m.a(x), m.b(x)], 1))
        first = round(both.shape[1] * 6 / 11)
        return m.head_a(both[:, :first].relu()) + m.head_b(both[:, first:].relu())

    return Net(forward, a=conv(3, 6), b=conv(3, 5), bn=nn.BatchNorm2d(11), head_a=conv(6, 4), head_b=conv(5, 4))


@case(refused={"conv1": "is folded as if it were space"})
def channels_folded_into_space() -> Net:
    """Every channel a patch of the image that is put together."""

    def forward(m: Net, x: Tensor) -> Tensor:
        patches = m.conv1(x).flatten(2).transpose(1, 2)
        return m.head(F.fold(patches, (6, 6), 2, stride=2))

    return Net(forward, conv1=conv(3, 9), head=conv(12, 4))
