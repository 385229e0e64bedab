"""The inputs that each output of a layer is computed from, laid out in rows, and the outputs beside them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateur.criteria import weights


@dataclass(frozen=True)
class Draw:
    """Which output positions are read: at random, the same in both networks and in every pass over the data."""

    positions: int | None
    seed: int

    def generator(self) -> torch.Generator:
        """Return the generator that a layer draws from, batch after batch."""
        return torch.Generator().manual_seed(self.seed)

    def __call__(self, layer: nn.Module, y: Tensor, generator: torch.Generator) -> Tensor | None:
        """Return flat indices of positions of one output; None for all."""
        return None if self.positions is None else draw_positions(layer, y, self.positions, generator)


def draw_positions(layer: nn.Module, y: Tensor, positions: int, generator: torch.Generator) -> Tensor | None:
    """Return flat indices of some positions of a layer's output, drawn at random; None for all."""
    if isinstance(layer, nn.Linear):
        return None
    count = y.flatten(-(layer.weight.dim() - 2)).shape[-1]  # type: ignore[operator]
    if count <= positions:
        return None
    return torch.randperm(count, generator=generator)[:positions].sort().values


def unfold(layer: nn.Module, x: Tensor, at: Tensor | None) -> Tensor:
    """Arrange what a layer's outputs are computed from.

    Args:
        layer: A convolution or linear layer.
        x: Its input.
        at: For a convolution, flat indices of output positions, the same for every image; all by default.

    Returns:
        Shape ``(blocks, n, D)``; D runs over input channels of a block, then kernel positions, as in the weight. Rows
        run over images, then positions.
    """
    if isinstance(layer, nn.Linear):
        return x.reshape(1, -1, x.shape[-1])
    assert isinstance(layer, weights.CONVOLUTIONS)
    x = _padded(layer, x)
    extent = x.shape[2:]
    kernel = layer.kernel_size
    outputs = [
        (size - dilation * (k - 1) - 1) // stride + 1
        for size, k, stride, dilation in zip(extent, kernel, layer.stride, layer.dilation, strict=True)
    ]
    at = torch.arange(math.prod(outputs)) if at is None else at
    index = torch.zeros(len(at), math.prod(kernel), dtype=torch.long)
    place, tap = at.clone(), torch.arange(math.prod(kernel))
    factor = 1
    for axis in reversed(range(len(extent))):
        start = place % outputs[axis] * layer.stride[axis]
        offset = tap % kernel[axis] * layer.dilation[axis]
        index += (start[:, None] + offset[None, :]) * factor
        place, tap = place // outputs[axis], tap // kernel[axis]
        factor *= extent[axis]
    count, channels = x.shape[:2]
    taken = x.flatten(2).index_select(2, index.flatten().to(x.device)).reshape(count, channels, len(at), -1)
    width = channels // layer.groups
    taken = taken.reshape(count, layer.groups, width, len(at), -1)
    return taken.permute(1, 0, 3, 2, 4).reshape(layer.groups, count * len(at), -1)


def _padded(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor) -> Tensor:
    x = x[None] if x.dim() == layer.weight.dim() - 1 else x
    sides: Sequence[int] = layer._reversed_padding_repeated_twice
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return nn.functional.pad(x, list(sides), mode=mode) if any(sides) else x


def outputs_of(layer: nn.Module, y: Tensor, at: Tensor | None, channels: Tensor | None) -> Tensor:
    """Arrange a layer's outputs as ``(n, C_out)``, in the order of :func:`unfold`."""
    if not isinstance(layer, nn.Linear):
        y = y[None] if y.dim() == layer.weight.dim() - 1 else y  # type: ignore[operator]
        y = y.flatten(2)
        y = y if at is None else y.index_select(2, at.to(y.device))
        y = y.movedim(1, 2)
    y = y.reshape(-1, y.shape[-1])
    return y if channels is None else y.index_select(1, channels.to(y.device))


def extent_of(layer: nn.Module, y: Tensor) -> tuple[int, ...]:
    """Return the sizes of a layer's outputs but for the channels."""
    if isinstance(layer, nn.Linear):
        return tuple(y.shape[:-1])
    places = layer.weight.dim() - 2  # type: ignore[operator]
    return (len(y) if y.dim() == places + 2 else 1, *y.shape[y.dim() - places :])
