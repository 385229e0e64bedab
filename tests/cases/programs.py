"""What users' programs do around the layers: control flow, containers, modes, integers in the code."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from tests.cases.table import Net, case, conv, conv_bn, image, pooled


@case(prunable={"0": 8}, refused={"2": ""}, outputs=("head",))
def hard_coded_view() -> nn.Module:
    """view(-1, K): fewer channels would change the batch dimension instead."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = getattr(m, "2")(getattr(m, "0")(x).relu()).relu()
        return m.head(x.view(-1, 6 * 48))

    return Net(forward, **{"0": conv(3, 8), "2": conv(8, 6), "head": nn.Linear(6 * 48, 4)})


@case(refused={"conv1": ""})
def hard_coded_reshape() -> Net:
    """reshape(n, 2, 4, h, w): both parts of the channel dimension are written as integers."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.conv1(x)
        return m.head(x.reshape(x.shape[0], 2, 4, 8, 6).amax(1))

    return Net(forward, conv1=conv(3, 8), head=conv(4, 4))


@case()
def hard_coded_inferred() -> Net:
    """reshape(n, 8, -1): fewer channels silently regroup the map."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.conv1(x)
        return m.head(x.reshape(x.shape[0], 8, -1).mean(2))

    return Net(forward, conv1=conv(3, 8), head=nn.Linear(8, 4))


@case()
def hard_coded_zeros() -> Net:
    """A sum with zeros of a size written in the code."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.conv1(x)
        return m.head(x + torch.zeros(1, 8, 1, 1, dtype=x.dtype))

    return Net(forward, conv1=conv(3, 8), head=conv(8, 4))


@case(normalising=True)
def hard_coded_divisor() -> Net:
    """Features divided by their number, taken of the shape: not a change of shape, but of value."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.conv1(x)
        return m.head(x / x.shape[1])

    return Net(forward, conv1=conv(3, 8), head=conv(8, 4))


@case()
def branch_on_width() -> Net:
    """The program's path depends on the number of channels."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.conv1(x)
        x = x.relu() if x.shape[1] == 8 else x.sigmoid()
        return m.head(x)

    return Net(forward, conv1=conv(3, 8), head=conv(8, 4))


@case(
    inputs=lambda: ({"image": torch.randn(2, 3, 8, 6), "scale": torch.rand(2, 1, 1, 1)},),
    prunable={"conv1": 8},
    outputs=("head", "aux"),
)
def dict_in_dict_out() -> Net:
    """A dict as input and a nested dict as output."""

    def forward(m: Net, batch: dict[str, Tensor]) -> dict[str, Any]:
        x = m.conv1(batch["image"]).relu() * batch["scale"]
        return {"out": m.head(x), "more": [{"aux": m.aux(x)}, None, 3]}

    return Net(forward, conv1=conv(3, 8), head=conv(8, 4), aux=conv(8, 2))


class Pair(NamedTuple):
    """Two outputs by name."""

    first: Tensor
    second: Tensor


@case(prunable={"conv1": 8}, outputs=("head", "aux"))
def named_tuple_out() -> Net:
    """A named tuple as output."""

    def forward(m: Net, x: Tensor) -> Pair:
        x = m.conv1(x).relu()
        return Pair(m.head(x), second=m.aux(x))

    return Net(forward, conv1=conv(3, 8), head=conv(8, 4), aux=conv(8, 2))


@case(prunable={"conv1": 8}, outputs=("head", "aux"))
def ordered_dict_out() -> Net:
    """An OrderedDict as output (segmentation models)."""

    def forward(m: Net, x: Tensor) -> OrderedDict[str, Tensor]:
        x = m.conv1(x).relu()
        return OrderedDict(out=F.interpolate(m.head(x), scale_factor=2), aux=m.aux(x))

    return Net(forward, conv1=conv(3, 8), head=conv(8, 4), aux=conv(8, 2))


@case(
    inputs=lambda: (torch.randn(2, 3, 8, 6), torch.randn(2, 5), 2),
    prunable={"conv1": 8, "fc": 8},
)
def several_inputs() -> Net:
    """Two tensors and a number as inputs, joined."""

    def forward(m: Net, x: Tensor, y: Tensor, factor: int) -> Tensor:
        return m.head(m.conv1(x).relu() + factor * m.fc(y)[:, :, None, None])

    return Net(forward, conv1=conv(3, 8), fc=nn.Linear(5, 8), head=conv(8, 4))


@case(
    inputs=lambda: {"left": torch.randn(2, 3, 8, 6), "right": torch.randn(2, 3, 8, 6)},
    prunable={"conv1": 8},
)
def keyword_inputs() -> Net:
    """Keyword arguments; one tower for both (siamese)."""
    return Net(
        lambda m, left, right: m.head((pooled(m.conv1(left)) - pooled(m.conv1(right))).abs()),
        conv1=conv(3, 8),
        head=nn.Linear(8, 4),
    )


@case(inputs=lambda: ([torch.randn(3, 8, 6), torch.randn(3, 8, 6)],), prunable={"conv1": 8})
def list_of_images() -> Net:
    """A list of images, stacked into a batch (detection)."""
    return Net(lambda m, images: [m.head(m.conv1(torch.stack(images)))], conv1=conv(3, 8), head=conv(8, 4))


@case(inputs=lambda: torch.rand(2, 3, 8, 6), prunable={"conv1": 8})
def control_flow_on_values() -> Net:
    """Branches on the input's values."""

    def forward(m: Net, x: Tensor) -> Tensor:
        if x.mean() > 0:
            x = x * 2
        if bool((x < -9).any()):
            x = x.abs()
        return m.head(m.conv1(x).relu())

    return Net(forward, conv1=conv(3, 8), head=conv(8, 4))


@case()
def control_flow_on_features() -> Net:
    """A branch on whether any feature is negative: it reads all channels."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.conv1(x).relu()
        if bool((x < 0).any()):
            x = x.abs()
        return m.head(x)

    return Net(forward, conv1=conv(3, 8), head=conv(8, 4))


@case(prunable={"conv1": 8})
def loop_to_convergence() -> Net:
    """A loop whose length depends on values of the input."""

    def forward(m: Net, x: Tensor) -> Tensor:
        scale = x.abs().mean()
        while scale > 0.1:
            scale = scale / 2
        return m.head(m.conv1(x) * scale)

    return Net(forward, conv1=conv(3, 8), head=conv(8, 4))


@case(prunable={"conv1": 8, "conv2": 8})
def in_place() -> Net:
    """In-place operators on features and on views of them."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.conv1(x).relu_()
        x.mul_(2).add_(m.conv2(x.clone()))
        x[:, :, 0] *= 0.5
        x[:, :, :, 1:].clamp_(max=3)
        x.view(x.shape[0], -1).sub_(0.1)
        return m.head(F.relu(x, inplace=True))

    return Net(forward, conv1=conv(3, 8), conv2=conv(8, 8), head=conv(8, 4))


@case(prunable={"conv2": 6}, outputs=("head", "conv1"))
def intermediate_output() -> Net:
    """Features handed out next to the prediction: their layer's filters are outputs."""

    def forward(m: Net, x: Tensor) -> tuple[Tensor, Tensor]:
        features = m.conv1(x).relu()
        return m.head(m.conv2(features).relu()), features

    return Net(forward, conv1=conv(3, 8), conv2=conv(8, 6), head=conv(6, 4))


@case(outputs=("head", "aux"), modes=("eval", "train"))
def auxiliary_head_in_training() -> Net:
    """A second head that runs only in training: pruning must not break it."""

    def forward(m: Net, x: Tensor) -> Any:
        x = m.conv1(x).relu()
        out = m.head(m.conv2(x).relu())
        return (out, m.aux(x)) if m.training else out

    return Net(forward, conv1=conv(3, 8), conv2=conv(8, 6), head=conv(6, 4), aux=conv(8, 4, 1))


@case(prunable={"conv1": 8, "conv2": 6}, outputs=("head", "deep"), modes=("eval", "train"))
def deep_supervision() -> Net:
    """A second head that runs in eval mode, too, but is returned only in training."""

    def forward(m: Net, x: Tensor) -> Any:
        x = m.conv1(x).relu()
        deep = m.deep(x)
        out = m.head(m.conv2(x).relu())
        return (out, deep) if m.training else out

    return Net(forward, conv1=conv(3, 8), conv2=conv(8, 6), head=conv(6, 4), deep=conv(8, 4, 1))


@case(prunable={"conv1": 8})
def unused_layer() -> Net:
    """A layer that never runs stays as it is."""
    return Net(lambda m, x: m.head(m.conv1(x).relu()), conv1=conv(3, 8), unused=conv(8, 8), head=conv(8, 4))


@case(prunable={"conv1": 8})
def dead_branch() -> Net:
    """A layer whose result nobody reads."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.conv1(x).relu()
        m.dead(x)
        return m.head(x)

    return Net(forward, conv1=conv(3, 8), dead=conv(8, 6), head=conv(8, 4))


@case(outputs=())
def no_layer() -> Net:
    """Nothing to prune at all."""
    return Net(lambda m, x: F.avg_pool2d(x, 2))


@case()
def one_layer() -> Net:
    """Only the output layer."""
    return Net(lambda m, x: m.head(x), head=conv(3, 4))


@case(prunable={"conv1": 8, "conv2": 6}, outputs=("head", "head2"))
def two_networks_in_one() -> Net:
    """Two towers that never meet; the outputs are returned side by side."""

    def forward(m: Net, x: Tensor) -> tuple[Tensor, Tensor]:
        return m.head(m.conv1(x).relu()), m.head2(m.conv2(x).relu())

    return Net(forward, conv1=conv(3, 8), conv2=conv(3, 6), head=conv(8, 4), head2=conv(6, 4))


@case(prunable={"blocks.0.0": 8, "blocks.1.0": 8, "stem": 6}, outputs=("heads.main",))
def modules_in_containers() -> Net:
    """ModuleList, ModuleDict and reversed order of use."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.stem(x)
        for block in m.blocks:
            x = block(x)
        return m.heads["main"](x)

    return Net(
        forward,
        stem=conv(3, 6),
        blocks=nn.ModuleList([conv_bn(6, 8), conv_bn(8, 8)]),
        heads=nn.ModuleDict({"main": conv(8, 4)}),
    )


@case(prunable={"conv1": 8, "conv2": 6})
def gradient_checkpointing() -> Net:
    """Part of the forward under activation checkpointing."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = torch.utils.checkpoint.checkpoint(lambda y: m.conv2(m.conv1(y).relu()).relu(), x, use_reentrant=False)
        return m.head(x)

    return Net(forward, conv1=conv(3, 8), conv2=conv(8, 6), head=conv(6, 4))


@case(prunable={"conv1": 8})
def no_grad_inside() -> Net:
    """The forward switches gradients off and on by itself."""

    def forward(m: Net, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = m.conv1(x).relu()
        with torch.enable_grad():
            return m.head(x)

    return Net(forward, conv1=conv(3, 8), head=conv(8, 4))


@case(prunable={"conv1": 8})
def forward_hooks_of_the_user() -> nn.Module:
    """Hooks that change what passes: a pre-hook on the input, a forward hook on the features."""
    net = Net(lambda m, x: m.head(m.conv1(x).relu()), conv1=conv(3, 8), head=conv(8, 4))
    net.conv1.register_forward_pre_hook(lambda module, arguments: (arguments[0] * 0.5,))
    net.conv1.register_forward_hook(lambda module, arguments, output: output.sigmoid())
    return net


@case(prunable={"conv1": 8})
def counter_buffer() -> nn.Module:
    """A buffer that every forward changes."""

    def forward(m: Net, x: Tensor) -> Tensor:
        m.count += 1
        return m.head(m.conv1(x).relu())

    net = Net(forward, conv1=conv(3, 8), head=conv(8, 4))
    net.register_buffer("count", torch.zeros((), dtype=torch.long))
    return net


class Scale(nn.Module):
    """Scripted below."""

    def forward(self, x: Tensor) -> Tensor:
        """Return 2x + 1, rectified."""
        return torch.relu(2 * x + 1)


@case(prunable={"conv2": 6})
def scripted_submodule() -> Net:
    """A scripted submodule in the middle."""
    return Net(
        lambda m, x: m.head(m.conv2(m.scale(m.conv1(x))).relu()),
        conv1=conv(3, 8),
        scale=torch.jit.script(Scale()),
        conv2=conv(8, 6),
        head=conv(6, 4),
    )


@case(inexact=("conv1",))
def vectorised_map() -> Net:
    """torch.vmap over the examples; each is scaled by its mean over channels and positions."""
    return Net(
        lambda m, x: m.head(torch.vmap(lambda one: one * one.mean())(m.conv1(x))), conv1=conv(3, 8), head=conv(8, 4)
    )


@case(prunable={"conv1": 8})
def module_that_returns_a_tuple() -> Net:
    """Submodules with several outputs, and outputs handed on as keyword arguments."""

    def inner(m: Net, x: Tensor, *, scale: Tensor) -> tuple[Tensor, Tensor]:
        y = m.conv(x) * scale
        return y, y.sigmoid()

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.conv1(x)
        y, gate = m.inner(x, scale=x.mean((2, 3), keepdim=True))
        return m.head(y * gate)

    return Net(forward, conv1=conv(3, 8), inner=Net(inner, conv=conv(8, 8, groups=8)), head=conv(8, 4))


@case(prunable={"conv1": 8})
def residual_or_not_by_shape() -> Net:
    """A shortcut that is taken only where the shapes agree."""

    def forward(m: Net, x: Tensor) -> Tensor:
        for layer in (m.conv1, m.conv2, m.conv3):
            y = layer(x)
            x = x + y if x.shape == y.shape else y
        return m.head(x)

    return Net(forward, conv1=conv(3, 8), conv2=conv(8, 8), conv3=conv(8, 8), head=conv(8, 4))


@case(inputs=image(3, 8, 8), prunable={"backbone": 8}, outputs=("boxes", "scores"))
def detector() -> Net:
    """A small detector: heads reshaped to one row an anchor, thresholded, sorted."""

    def forward(m: Net, x: Tensor) -> list[Tensor]:
        x = m.backbone(x).relu()
        boxes = m.boxes(x).view(x.shape[0], 2, 4, 8, 8).permute(0, 3, 4, 1, 2).reshape(x.shape[0], -1, 4)
        scores = m.scores(x).permute(0, 2, 3, 1).reshape(x.shape[0], -1).sigmoid()
        out = []
        for box, score in zip(boxes, scores, strict=True):
            order = score.argsort(descending=True)[:5]
            out += [box[order], score[order]]
        return out

    return Net(forward, backbone=conv(3, 8), boxes=conv(8, 8, 1), scores=conv(8, 2, 1))


@case(inputs=image(3, 8, 8), prunable={"backbone": 8, "fc": 10})
def region_of_interest() -> nn.Module:
    """RoI align on features, flattened into linear layers."""
    from torchvision.ops import roi_align

    def forward(m: Net, x: Tensor) -> Tensor:
        rois = torch.tensor([[0.0, 1.0, 1.0, 5.0, 6.0], [1.0, 0.0, 2.0, 7.0, 7.0]], dtype=x.dtype)
        x = roi_align(m.backbone(x).relu(), rois, (2, 2))
        return m.head(m.fc(x.flatten(1)).relu())

    return Net(forward, backbone=conv(3, 8), fc=nn.Linear(32, 10), head=nn.Linear(10, 4))


@case(inputs=image(3, 8, 8), prunable={"low": 6, "high": 6, "fc": 10})
def regions_by_level() -> nn.Module:
    """Regions pooled from the level that suits their size, written row by row into one tensor (feature pyramid)."""
    from torchvision.ops import roi_align

    def forward(m: Net, x: Tensor) -> Tensor:
        rois = torch.tensor([[0.0, 1, 1, 5, 6], [1, 0, 2, 7, 7], [1, 3, 3, 5, 5]], dtype=x.dtype)
        levels = [m.high(x).relu(), F.max_pool2d(m.low(x).relu(), 2)]
        area = (rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2])
        x = torch.zeros(len(rois), levels[0].shape[1], 2, 2, dtype=x.dtype)
        for level, features in enumerate(levels):
            here = torch.where((area > 10) == bool(level))[0]
            x[here] = roi_align(features, rois[here], (2, 2), 1 / (level + 1))
        return m.head(m.fc(x.flatten(1)).relu())

    return Net(forward, low=conv(3, 6), high=conv(3, 6), fc=nn.Linear(24, 10), head=nn.Linear(10, 4))


@case(prunable={"conv1": 8})
def rows_written_by_mask() -> Net:
    """Examples of a batch replaced by constants where a mask says so; channels stay in place."""

    def forward(m: Net, x: Tensor) -> Tensor:
        dark = x.mean((1, 2, 3)) < x.mean()
        x = m.conv1(x).relu()
        x[dark] = 0.25
        x[:, :, torch.tensor([0, 3])] = x[:, :, torch.tensor([1, 2])] * 2
        return m.head(x)

    return Net(forward, conv1=conv(3, 8), head=conv(8, 4))


@case()
def channels_written_by_index() -> Net:
    """Channels overwritten at given numbers."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.conv1(x).relu()
        x[:, torch.tensor([1, 4])] = x[:, torch.tensor([0, 7])] * 2
        return m.head(x)

    return Net(forward, conv1=conv(3, 8), head=conv(8, 4))


class Halves(nn.Module):
    """Cuts at a number kept as an attribute, written in one of several ways."""

    def __init__(self, width: int, way: str) -> None:
        super().__init__()
        self.width, self.way = width, way
        self.widths = (width, width)
        self.a, self.b = conv(width, 6), conv(width, 6)

    def forward(self, x: Tensor) -> Tensor:
        """Cut, and let each part be read by its own layer."""
        if self.way == "split":
            a, b = x.split(self.width, 1)
        elif self.way == "slice":
            a, b = x[:, : self.width], x[:, self.width :]
        elif self.way == "end":
            a, b = x[:, : -self.width], x[:, -self.width :]
        elif self.way == "twice":
            a, b = x.split((self.width, self.width), 1)
        else:
            a, b = x.split(self.widths, 1)
        return self.a(a) + self.b(b).relu()


def _halves(way: str) -> Net:
    return Net(lambda m, x: m.head(m.cut(m.conv1(x).relu())), conv1=conv(3, 8), cut=Halves(4, way), head=conv(6, 4))


@case(prunable={"conv1": 8, "cut.a": 6})
def split_at_attribute() -> Net:
    """Split into pieces as wide as an attribute says: it follows, and all pieces lose as many."""
    return _halves("split")


@case(prunable={"conv1": 8, "cut.a": 6})
def slice_at_attribute() -> Net:
    """Sliced at an attribute: it follows the first part, the second is what is left."""
    return _halves("slice")


@case(prunable={"conv1": 8, "cut.a": 6})
def slice_from_the_end_at_attribute() -> Net:
    """Sliced at an attribute counted from the end: it follows the second part."""
    return _halves("end")


@case(prunable={"conv1": 8, "cut.a": 6})
def split_by_attribute_list() -> Net:
    """Split at a tuple of widths kept as an attribute: each of its numbers follows its part."""
    return _halves("list")


@case(prunable={"conv1": 8, "cut.a": 6})
def split_at_one_attribute_twice() -> Net:
    """Split at two widths, which are one attribute: both parts lose as many."""
    return _halves("twice")


@case(prunable={"conv1": 16, "cut.a": 12})
def split_at_two_attributes() -> Net:
    """Split at two widths, each an attribute: each follows its part."""

    def cut(m: Net, x: Tensor) -> Tensor:
        a, b = x.split([m.first, m.second], 1)
        return m.a(a) + m.b(b)

    inner = Net(cut, first=10, second=6, a=conv(10, 12), b=conv(6, 12))
    return Net(lambda m, x: m.head(m.cut(m.conv1(x))), conv1=conv(3, 16), cut=inner, head=conv(12, 4))


class Widths(nn.Module):
    """Mixed depthwise convolutions (MixNet): each range of channels has a kernel of its own."""

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        self.widths = widths
        self.layers = nn.ModuleList(conv(w, w, 2 * i + 1, groups=w) for i, w in enumerate(widths))

    def forward(self, x: Tensor) -> Tensor:
        """Split, convolve, concatenate."""
        parts = torch.split(x, self.widths, 1)
        return torch.cat([layer(part) for layer, part in zip(self.layers, parts, strict=True)], 1)


@case(prunable={"conv1": 11, "mixed.layers.0": 5, "mixed.layers.2": 2})
def mixed_convolution() -> Net:
    """Split at unequal widths kept as a list, each part through a depthwise convolution, concatenated (MixNet)."""
    return Net(
        lambda m, x: m.head(m.mixed(m.conv1(x).relu()).relu()),
        conv1=conv(3, 11),
        mixed=Widths([5, 4, 2]),
        head=conv(11, 4),
    )


class CrossStage(nn.Module):
    """CSP stage that keeps the width of its expansion as an attribute, and halves it in the forward."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.expanded = width
        self.expand = conv(6, width, 1)
        self.block = conv(width // 2, width // 2)

    def forward(self, x: Tensor) -> Tensor:
        """Let one half go round the block."""
        a, b = self.expand(x).split(self.expanded // 2, dim=1)
        return torch.cat([a, b + self.block(b).relu()], 1)


@case(prunable={"stem": 6, "stage.expand": 8, "stage.block": 4})
def cross_stage_by_attribute() -> Net:
    """CSP: split at half of an attribute that holds the whole width."""
    return Net(lambda m, x: m.head(m.stage(m.stem(x).relu())), stem=conv(3, 6), stage=CrossStage(8), head=conv(8, 4, 1))


class DualPath(nn.Module):
    """A residual path of fixed width in front of a dense one that grows (DPN)."""

    def __init__(self, inputs: int, width: int, growth: int) -> None:
        super().__init__()
        self.width = width
        self.body = conv_bn(inputs, width + growth)

    def forward(self, x: Tensor) -> Tensor:
        """Add the first part, concatenate the rest."""
        y = self.body(x)
        return torch.cat([x[:, : self.width] + y[:, : self.width], x[:, self.width :], y[:, self.width :]], 1)


@case(prunable={"stem": 8, "one.body.0": 8, "two.body.0": 8})
def dual_path() -> Net:
    """Dual path network: the first channels are a residual stream, the others a dense one, cut at an attribute."""
    return Net(
        lambda m, x: m.head(m.two(m.one(m.stem(x).relu())).relu()),
        stem=conv(3, 8),
        one=DualPath(8, 5, 3),
        two=DualPath(11, 5, 3),
        head=conv(14, 4),
    )


class PartialResidual(nn.Module):
    """A shortcut that is narrower than what it is added to (ReXNet)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.inputs = inputs
        self.body = conv(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Add to the first channels alone."""
        y = self.body(x)
        return torch.cat([y[:, : self.inputs] + x, y[:, self.inputs :]], 1)


@case(prunable={"stem": 7, "block.body": 11})
def partial_residual() -> Net:
    """The shortcut is added to as many channels as it has, which an attribute says (ReXNet)."""
    return Net(
        lambda m, x: m.head(m.block(m.stem(x)).relu()), stem=conv(3, 7), block=PartialResidual(7, 11), head=conv(11, 4)
    )


class Blur(nn.Module):
    """A fixed kernel stored for every channel, and their number as an attribute (anti-aliased ResNets)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.register_buffer("kernel", torch.rand(1, 1, 3, 3).repeat(channels, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Blur every channel."""
        return F.conv2d(x, self.kernel, stride=2, groups=self.channels)


@case(prunable={"conv1": 8})
def blur_by_attribute() -> Net:
    """Blur kernel stored for every channel; groups written as an attribute."""
    return Net(lambda m, x: m.head(m.blur(m.conv1(x).relu())), conv1=conv(3, 8), blur=Blur(8), head=conv(8, 4))


class Patches(nn.Module):
    """Two maps viewed as tokens by one attribute."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Flatten the maps."""
        return x.reshape(x.shape[0], self.width, -1), y.reshape(y.shape[0], self.width, -1)


@case(prunable={"a": 8, "b": 8})
def one_attribute_for_two_layers() -> Net:
    """Two layers' channels counted by one attribute: both have to lose as many, not the same."""

    def forward(m: Net, x: Tensor) -> Tensor:
        a, b = m.patches(m.a(x).relu(), m.b(x).tanh())
        return m.head(torch.cat([a, b], 1))

    return Net(forward, a=conv(3, 8), b=conv(3, 8), patches=Patches(8), head=nn.Conv1d(16, 4, 1))


@case(prunable={"conv1": 7})
def assignment_by_its_own_mask() -> Net:
    """One value assigned wherever a mask of the map's own shape tells."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.conv1(x)
        x[x < 0.1] = 0.1
        x[x.abs() > x.abs().mean((2, 3), keepdim=True)] = 1.0
        return m.head(x)

    return Net(forward, conv1=conv(3, 8), head=conv(8, 4))
