"""ResNet-20, 56 and 110 for 32×32 images, the networks of CFP's experiments, with both kinds of shortcut."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from torch.nn import functional as F

from secateur.errors import UsageError
from secateur.models.pad_shortcut import PadShortcut, centred

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

STREAMS = (16, 32, 64)
"""Channels of the three stages (He et al. 2016, section 4.2)."""


def _shortcut(kind: str, in_channels: int, out_channels: int, stride: int, always: bool) -> nn.Module:
    if in_channels == out_channels and stride == 1 and not always:
        return nn.Sequential()
    if kind == "A":
        return PadShortcut(in_channels, centred(in_channels, out_channels), stride)
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with batch norm around a shortcut (He et al. 2016, fig. 2).

    Args:
        in_channels: Channels of the input.
        internal: Filters of ``conv1``, which no other layer is coupled to.
        out_channels: Filters of ``conv2`` and channels of the residual stream.
        stride: Stride of ``conv1`` and of the shortcut.
        shortcut: ``"A"``, :class:`PadShortcut`, or ``"B"``, a 1×1 convolution with batch norm; either only where the
            shape changes.
        always: Put that shortcut where the shape doesn't change too.
    """

    def __init__(
        self, in_channels: int, internal: int, out_channels: int, stride: int, shortcut: str, always: bool = False
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, internal, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(internal)
        self.conv2 = nn.Conv2d(internal, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = _shortcut(shortcut, in_channels, out_channels, stride, always)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, after the ReLU that follows the sum."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """A ResNet of ``6 n + 2`` layers for 32×32 images: three stages of n blocks, then global average pooling.

    He et al. 2016, section 4.2. Modules are named as in the published weights: ``conv1``, ``bn1``,
    ``layer1.0.conv1`` …, ``linear``. ResNet-56 takes 125,485,696 MACs with option A shortcuts. Convolutions and the
    linear layer are drawn by He et al. 2015 (normal, fan-in). Departures: none.

    Args:
        depth: Layers with weights, ``6 n + 2``.
        shortcut: ``"A"`` pads with zeros (:class:`PadShortcut`), ``"B"`` projects by 1×1 convolution.
        stem: Filters of the first convolution.
        streams: Channels of the residual stream in the three stages.
        internal: Filters of the blocks' first convolutions: per stage a number, or one number a block; None takes the
            streams'.
        num_classes: Outputs of the linear layer.
        in_channels: Channels of the image.
        free_stem: Put a shortcut into the very first block too, so that the stem's channels aren't those of the first
            stage's stream, and either can be pruned without the other. CFP's ResNet-56 has one: with 1×1 projections
            it takes the 126.0 million MACs that the paper counts its reductions from.

    Shapes:
        input ``(N, in_channels, H, W)``, output (logits) ``(N, num_classes)``.

    Raises:
        UsageError: If the depth isn't ``6 n + 2``, the shortcut's kind is unknown, a width is below 1, or the number
            of widths doesn't match three stages of n blocks.
    """

    def __init__(
        self,
        depth: int,
        shortcut: str = "A",
        stem: int = 16,
        streams: Sequence[int] = STREAMS,
        internal: Sequence[int | Sequence[int]] | None = None,
        num_classes: int = 10,
        in_channels: int = 3,
        free_stem: bool = False,
    ) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise UsageError(f"resnet: a CIFAR ResNet has 6n + 2 layers (20, 56, 110, ...), found depth={depth}")
        if shortcut not in ("A", "B"):
            raise UsageError(
                f"resnet{depth}: shortcut is 'A' (zero-padded) or 'B' (1x1 projection), found {shortcut!r}"
            )
        blocks = (depth - 2) // 6
        widths = _block_widths(depth, blocks, streams, internal)
        if min(stem, num_classes, in_channels, *streams, *(w for stage in widths for w in stage)) < 1:
            raise UsageError(
                f"resnet{depth}: every width is at least 1; found stem={stem}, streams={tuple(streams)}, "
                f"internal={internal}, num_classes={num_classes}, in_channels={in_channels}"
            )
        self.conv1 = nn.Conv2d(in_channels, stem, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        channels = stem
        stages: list[nn.Sequential] = []
        for stage, (stream, inner) in enumerate(zip(streams, widths, strict=True)):
            layer = nn.Sequential()
            for block, width in enumerate(inner):
                stride = 2 if stage and not block else 1
                layer.append(
                    BasicBlock(channels, width, stream, stride, shortcut, free_stem and not stage and not block)
                )
                channels = stream
            stages.append(layer)
        self.layer1, self.layer2, self.layer3 = stages
        self.linear = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of a batch of images."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))
        return logits


def projected(model: CifarResNet, images: Iterable[Tensor]) -> CifarResNet:
    """Return a network with 1×1 projections that computes what one with padded shortcuts computes.

    CFP's ResNet-56 has projections, in the first block too, and the published weights are of padded shortcuts. The
    projections are 0 and 1 as the padding's map says; their batch norms have the moments of their channels on the
    images, and scale and shift that undo them, so that the networks agree in train mode, too, where batches have
    those moments. Channels that the padding fills with zeros get scale 0, and stay 0 in training.

    Args:
        model: With shortcuts of option A; left as it is.
        images: Batches ``(N, C, H, W)``, at least one.

    Returns:
        A network of option B with ``free_stem``, in eval mode.

    Raises:
        UsageError: If there is no image, or a shortcut is a projection already.
    """
    stages = [cast("list[BasicBlock]", list(stage)) for stage in (model.layer1, model.layer2, model.layer3)]
    inner = [[block.conv1.out_channels for block in blocks] for blocks in stages]
    streams = [blocks[0].conv2.out_channels for blocks in stages]
    result = CifarResNet(
        6 * len(stages[0]) + 2, "B", model.conv1.out_channels, streams, inner, model.linear.out_features,
        model.conv1.in_channels, free_stem=True,
    )  # fmt: skip
    result.to(model.linear.weight).load_state_dict(model.state_dict(), strict=False)
    first = [blocks[0] for blocks in stages]
    if not all(isinstance(block.shortcut, PadShortcut) or not len(block.shortcut) for block in first):  # type: ignore[arg-type]
        raise UsageError("projected: a shortcut is a 1x1 projection already; give a network of option A.")
    moments = _moments(model, first, images)
    for block, stage, (mean, variance) in zip(first, ("layer1", "layer2", "layer3"), moments, strict=True):
        sources = block.shortcut.source if isinstance(block.shortcut, PadShortcut) else range(len(mean))
        conv, norm = cast("tuple[nn.Conv2d, nn.BatchNorm2d]", result.get_submodule(f"{stage}.0.shortcut").children())
        with torch.no_grad():
            conv.weight.zero_()
            norm.weight.zero_()
            norm.bias.zero_()
            norm.running_var.zero_()  # type: ignore[union-attr]
            for out, source in enumerate(sources):
                if source >= 0:
                    conv.weight[out, source] = 1
                    norm.running_mean[out], norm.running_var[out] = mean[source], variance[source]  # type: ignore[index]
                    norm.weight[out], norm.bias[out] = (variance[source] + norm.eps).sqrt(), mean[source]
    return result.eval()


def _moments(model: CifarResNet, blocks: Sequence[BasicBlock], images: Iterable[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Return mean and variance of each channel that the blocks' shortcuts read, in fp64."""
    sums: list[list[Tensor]] = [[] for _ in blocks]

    def watch(number: int, step: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0][:, :, ::step, ::step].double()
            count = x.new_tensor(x.numel() // x.shape[1]).expand(x.shape[1])
            now = torch.stack([count, x.sum((0, 2, 3)), x.square().sum((0, 2, 3))])
            sums[number] = [sums[number][0] + now] if sums[number] else [now]

        return hook

    modes = {module: module.training for module in model.modules()}
    handles = [
        block.register_forward_pre_hook(watch(number, block.conv1.stride[0])) for number, block in enumerate(blocks)
    ]
    try:
        model.eval()
        with torch.no_grad():
            for batch in images:
                model(batch)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    if not all(sums):
        raise UsageError("projected: there is no image to measure the shortcuts' channels on.")
    return [(s / n, (q / n - (s / n) ** 2).clamp(min=0)) for (n, s, q) in (total.unbind() for (total,) in sums)]


def _block_widths(
    depth: int, blocks: int, streams: Sequence[int], internal: Sequence[int | Sequence[int]] | None
) -> list[list[int]]:
    """Return the internal widths, by stage and block."""
    given = list(streams) if internal is None else list(internal)
    widths = [list(w) if isinstance(w, Sequence) else [w] * blocks for w in given]
    if len(streams) != 3 or [len(w) for w in widths] != [blocks] * 3:
        raise UsageError(
            f"resnet{depth}: expected three streams, and for three stages one internal width or {blocks} of them; "
            f"found streams={tuple(streams)}, internal={internal}"
        )
    return widths


def resnet20(
    shortcut: str = "A",
    stem: int = 16,
    streams: Sequence[int] = STREAMS,
    internal: Sequence[int | Sequence[int]] | None = None,
    num_classes: int = 10,
    in_channels: int = 3,
    free_stem: bool = False,
) -> CifarResNet:
    """Build ResNet-20 with fresh weights; arguments and errors are :class:`CifarResNet`'s."""
    return CifarResNet(20, shortcut, stem, streams, internal, num_classes, in_channels, free_stem)


def resnet56(
    shortcut: str = "A",
    stem: int = 16,
    streams: Sequence[int] = STREAMS,
    internal: Sequence[int | Sequence[int]] | None = None,
    num_classes: int = 10,
    in_channels: int = 3,
    free_stem: bool = False,
) -> CifarResNet:
    """Build ResNet-56 with fresh weights; arguments and errors are :class:`CifarResNet`'s."""
    return CifarResNet(56, shortcut, stem, streams, internal, num_classes, in_channels, free_stem)


def resnet110(
    shortcut: str = "A",
    stem: int = 16,
    streams: Sequence[int] = STREAMS,
    internal: Sequence[int | Sequence[int]] | None = None,
    num_classes: int = 10,
    in_channels: int = 3,
    free_stem: bool = False,
) -> CifarResNet:
    """Build ResNet-110 with fresh weights; arguments and errors are :class:`CifarResNet`'s."""
    return CifarResNet(110, shortcut, stem, streams, internal, num_classes, in_channels, free_stem)
