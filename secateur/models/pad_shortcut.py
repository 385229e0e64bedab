"""The parameter-free shortcut of CIFAR ResNets (option A), with an index map that pruning can rewrite."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn
from torch.nn import functional as F

from secateur.errors import UsageError
from secateur.network.custom_layers import register_layer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from secateur.tracing.call import Call


class PadShortcut(nn.Module):
    r"""Subsample in space, and copy each output channel from an input channel or fill it with zeros.

    Option A of He et al. 2016: an identity whose missing channels are zeros. With :math:`s` the stride and
    :math:`\sigma` the map ``source``,

    .. math:: y_{n,o,i,j} = x_{n,\sigma(o),si,sj} \text{ if } \sigma(o) \ge 0, \text{ else } 0.

    The map is the layer's whole behaviour and is free: pruning keeps the channels of either side that it likes and
    replaces ``in_channels`` and ``source`` by what :meth:`pruned` returns. An output channel whose input channel is
    removed becomes a zero channel, which is what zeroing the input gives; an input channel may be read by several
    outputs or by none. Neither attribute is in the state dict, as in the published option-A networks.

    Args:
        in_channels: Channels of the input.
        source: For each output channel, the input channel that it copies, or -1 for zeros.
        stride: Step of the subsampling, in pixels.

    Shapes:
        input ``(N, in_channels, H, W)``, output ``(N, len(source), ceil(H / stride), ceil(W / stride))``.

    Raises:
        UsageError: If ``source`` is empty or holds anything but -1 and indices of input channels.
    """

    index: Tensor
    """``source`` as the forward reads it: -1 replaced by ``in_channels``, where a channel of zeros is appended."""

    def __init__(self, in_channels: int, source: Sequence[int], stride: int = 1) -> None:
        super().__init__()
        self.stride = stride
        self._in_channels = in_channels
        self._source: tuple[int, ...] = ()
        self.register_buffer("index", torch.empty(0, dtype=torch.long), persistent=False)
        self.source = source

    @property
    def in_channels(self) -> int:
        """Number of input channels."""
        return self._in_channels

    @in_channels.setter
    def in_channels(self, value: int) -> None:
        self._in_channels = int(value)
        self._refresh()

    @property
    def out_channels(self) -> int:
        """Number of output channels, the length of ``source``."""
        return len(self._source)

    @property
    def source(self) -> tuple[int, ...]:
        """For each output channel, the input channel that it copies, or -1 for zeros."""
        return self._source

    @source.setter
    def source(self, value: Sequence[int]) -> None:
        source = tuple(int(i) for i in value)
        if not source or min(source) < -1:
            raise UsageError(f"PadShortcut: source holds input channels and -1, at least one; found {source}")
        self._source = source
        self._refresh()

    def _refresh(self) -> None:
        """Rebuild the index from the two attributes, which surgery sets one after the other."""
        index = [self._in_channels if i < 0 else i for i in self._source]
        self.index = torch.tensor(index, dtype=torch.long, device=self.index.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # A buffer outside the state dict isn't filled by loading one: after `to_empty` it would hold garbage.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._refresh()
        return self

    def pruned(self, kept_in: Sequence[int], kept_out: Sequence[int]) -> tuple[int, tuple[int, ...]]:
        """Return the ``in_channels`` and ``source`` of this layer without the removed channels.

        Args:
            kept_in: Ascending input channels that stay.
            kept_out: Ascending output channels that stay.

        Returns:
            The number of kept inputs, and for each kept output the new index of the input that it copies; -1 where it
            copied none or one that goes.
        """
        position = {channel: i for i, channel in enumerate(kept_in)}
        return len(position), tuple(position.get(self._source[out], -1) for out in kept_out)

    def forward(self, x: Tensor) -> Tensor:
        """Return the shortcut's output.

        Raises:
            UsageError: If the input hasn't ``in_channels`` channels, or ``source`` reads beyond them.
        """
        if x.shape[1] != self._in_channels or max(self._source) >= self._in_channels:
            raise UsageError(
                f"PadShortcut: built for {self._in_channels} input channels with source up to {max(self._source)}, "
                f"found an input of {x.shape[1]}"
            )
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, 0, 1)).index_select(1, self.index)

    def extra_repr(self) -> str:
        """Return the channel counts, the zero channels and the stride."""
        zeros = sum(i < 0 for i in self._source)
        return f"{self._in_channels}, {self.out_channels}, zeros={zeros}, stride={self.stride}"


def _flow(call: Call, layer: PadShortcut, args: tuple[Any, ...], out: Tensor) -> None:
    """Let the channels of both sides go independently: a removed input leaves a zero channel where it was copied."""
    inputs = call.axes(args[0]).get(1)
    outputs = call.fresh(layer.out_channels)
    call.registered_layer(inputs, outputs)
    call.give(out, {1: outputs})


def _resize(layer: PadShortcut, kept_inputs: list[int] | None, kept_outputs: list[int] | None) -> None:
    inputs = range(layer.in_channels) if kept_inputs is None else kept_inputs
    outputs = range(layer.out_channels) if kept_outputs is None else kept_outputs
    layer.in_channels, layer.source = layer.pruned(inputs, outputs)


register_layer(PadShortcut, _flow, _resize)


def centred(in_channels: int, out_channels: int) -> tuple[int, ...]:
    """Return the ``source`` that puts all input channels in the middle, with equally many zeros on either side.

    From 16 to 32 channels: 8 of zeros, the 16 of the input, 8 of zeros, as the published CIFAR networks have it. From
    more channels to fewer, the middle ones are kept.
    """
    shift = (out_channels - in_channels) // 2
    return tuple(o - shift if 0 <= o - shift < in_channels else -1 for o in range(out_channels))
