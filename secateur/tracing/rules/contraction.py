"""Rules for convolution, matrix products and attention: channels are read, and new ones made."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
from torch import Tensor, nn

from secateur.graph.channels import Magnitude, Window
from secateur.tracing.call import Call
from secateur.tracing.labels import Axes, Labels
from secateur.tracing.rules.registry import rule

_UNKNOWN = "is read together with values that are no known channels"
_SPACE = "is convolved over as if it were space"


def _read(call: Call, given: Labels | None, wanted: Labels | None) -> None:
    """Join the channels that a layer is given with those that its weight reads."""
    if wanted is not None:
        call.found.consumed.append(wanted)
    if wanted is not None and given is not None:
        call.join(given, wanted)
    for labels in (given, wanted):
        if labels is not None and (given is None or wanted is None):
            call.freeze(labels, _UNKNOWN)


def _make(call: Call, made: Labels | None, bias: Tensor | None) -> None:
    """Note that a layer makes channels, one for each label, and adds its bias to them."""
    if made is not None:
        call.found.produced.append(made)
        _add_bias(call, made, bias)


def _add_bias(call: Call, made: Labels, bias: Tensor | None) -> None:
    """Join the labels of a vector, one value a channel, with those of the channels."""
    if bias is None:
        return
    own = call.axes(bias).get(bias.ndim - 1)
    if own is not None and own.size == made.size:
        call.join(made, own)
    elif bias.shape[-1] > 1:
        call.freeze(made, "takes one value a channel from a tensor that is no parameter")


def _note_layer(call: Call, kind: str, weight: Tensor, given: Labels | None, made: Labels | None, **more: Any) -> None:
    """Note the call of a layer: whose weight it is, and what it reads and makes."""
    layers = nn.Linear if kind == "linear" else nn.modules.conv._ConvNd
    name = call.labels.name(weight)
    owned = isinstance(call.layer, layers) and name in ("", f"{call.module}.weight".lstrip("."))
    axes = list(call.axes(weight).values())
    parts = call.labels.store.homes_of(axes, mixed=True) if axes and not owned else ()
    call.uses(
        kind,
        given,
        made,
        weight=call.labels.source_of(weight),
        owned=owned,
        parts=tuple(dict.fromkeys(home.tensor for home in parts)),
        **more,
    )


@rule("aten::convolution", "aten::_convolution")
def convolution(
    call: Call, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any,
    transposed: bool, output_padding: Any, groups: int, *_: Any,
) -> Axes:  # fmt: skip
    """Read the input's channels along the weight's second dimension, make one for each of its first.

    Transposed, the two dimensions change places. A grouped convolution reads and makes its channels in blocks, which
    must all keep the same number; a depthwise one has a channel a block, and passes each on.
    """
    inputs = call.axes(x)
    call.freeze_tensor(x, _SPACE, range(2, x.ndim))
    given = inputs.get(1)
    passed = {0: inputs[0]} if 0 in inputs else {}
    if not call.is_weight(weight):
        call.freeze_tensor(x, "is convolved with a computed kernel", [1])
        call.freeze_tensor(weight, "is a computed kernel")
        return passed
    own = call.axes(weight)
    made, wanted = own.get(1 if transposed else 0), own.get(0 if transposed else 1)
    in_channels, out_channels = x.shape[1], call.out.shape[1]
    if groups == 1:
        _read(call, given, wanted)
        _make(call, made, bias)
    elif groups == in_channels and (not transposed or groups == out_channels):
        made = own.get(0)
        _pass_on(call, given, made, bias, groups)
    else:
        made = _grouped(call, weight, given, out_channels if transposed else in_channels, groups, transposed)
        _make(call, made, bias)
    positions = prod((x if transposed else call.out).shape[2:]) * call.out.shape[0]
    sizes = (x.shape[2:], weight.shape[2:], stride, padding, dilation, output_padding)
    window = Window(*(tuple(int(n) for n in size) for size in sizes))
    _note_layer(
        call, "conv_transposed" if transposed else "conv", weight, given, made, in_channels=in_channels,
        out_channels=out_channels, groups=groups, kernel=prod(weight.shape[2:]), positions=positions,
        batch=call.out.shape[0], window=window,
    )  # fmt: skip
    return passed | ({1: made} if made is not None else {})


def _pass_on(call: Call, given: Labels | None, made: Labels | None, bias: Tensor | None, groups: int) -> None:
    """Convolve each channel by itself: it goes together with the filters that make something of it."""
    if made is not None and given is not None:
        call.join(given[:, None], made.reshape(groups, -1))
    elif made is not None:
        call.found.produced.append(made)
        call.freeze(made, _UNKNOWN)
    if made is not None:
        _add_bias(call, made, bias)
    if given is not None and not isinstance(call.layer, nn.modules.conv._ConvNd):
        for name in call.counts(groups):
            call.count(name, given)


def _grouped(
    call: Call, weight: Tensor, given: Labels | None, size: int, groups: int, transposed: bool
) -> Labels | None:
    """Join the channels of a grouped convolution; its blocks may lose different indices, but equally many.

    Returns:
        The channels that it makes. ``size`` is the number of those of which dimension 1 of the weight holds one block.
    """
    own = call.axes(weight)
    full = own.get(0)
    half = call.labels.all_blocks(weight, size, groups)
    if half is None:
        local = own.get(1)
        half = np.tile(local if local is not None else call.fixed(weight.shape[1], _UNKNOWN), groups)
    wanted, made = (full, half) if transposed else (half, full)
    _read(call, given, wanted)
    for labels in (wanted, made):
        if labels is not None:
            call.share(np.split(labels, groups), f"a convolution in {groups} groups keeps as many channels in each")
    return made


@rule("torchvision::deform_conv2d")
def deform_conv2d(
    call: Call, x: Tensor, weight: Tensor, offset: Tensor, mask: Tensor, bias: Tensor, *args: Any
) -> Axes:
    """Read and make channels as a convolution does; offsets and masks are counted by kernel position, and kept."""
    groups, offset_groups = args[6:8]
    call.freeze_tensor(offset, "gives the positions of a kernel")
    call.freeze_tensor(mask, "weighs the positions of a kernel")
    own = call.axes(weight)
    if groups != 1 or offset_groups != 1 or not call.is_weight(weight):
        for tensor in (x, weight):
            call.freeze_tensor(tensor, "is convolved in groups at deformed positions")
        return {}
    call.freeze_tensor(x, _SPACE, [2, 3])
    given, made, out = call.axes(x).get(1), own.get(0), call.out
    _read(call, given, own.get(1))
    _make(call, made, bias)
    call.uses(
        "conv", given, made, weight=call.labels.source_of(weight), owned=False, in_channels=x.shape[1],
        out_channels=out.shape[1], kernel=prod(weight.shape[2:]), positions=prod(out.shape[2:]) * out.shape[0],
        batch=out.shape[0],
    )  # fmt: skip
    return {1: made} if made is not None else {}


@rule("aten::_weight_norm_interface", keeps_weights=True)
def weight_norm(call: Call, v: Tensor, g: Tensor, dim: int = 0) -> list[Axes]:
    """Make the weight g·v/‖v‖, one norm for each index of a dimension: its channels are those of v.

    Where channels go along the other dimensions, ‖v‖ changes and the weight with it, unless g follows.
    """
    axes = call.combine([v, g], v.shape)
    gain, direction = call.labels.name(g), call.labels.name(v)
    if gain and direction:
        call.found.magnitudes[Magnitude(gain, direction, dim)] = None
    else:
        call.without(axes, set(axes) - {dim}, "takes a norm")
    return [axes, {d: labels for d, labels in axes.items() if d == dim}]


@rule("aten::linear")
def linear(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Axes:
    """Read the channels of the last dimension, make one for each row of the weight."""
    axes = call.axes(weight)
    return _weighted(call, x, x.ndim - 1, weight, (axes.get(1), axes.get(0)), bias, call.out.ndim - 1)


@rule("aten::addmm", keeps_weights=True)
def addmm(call: Call, bias: Tensor, left: Tensor, right: Tensor, *_: Any, **__: Any) -> Axes:
    """Apply the rule of ``mm``; the first argument is the bias."""
    return _product(call, left, right, bias)


@rule("aten::mm", "aten::bmm", "aten::mv", "aten::dot", keeps_weights=True)
def mm(call: Call, left: Tensor, right: Tensor, *_: Any) -> Axes:
    """Read the channels along the contracted dimension, make one for each column of the weight."""
    return _product(call, left, right, None)


@rule("aten::baddbmm", "aten::addbmm", "aten::addmv", keeps_weights=True)
def baddbmm(call: Call, added: Tensor, left: Tensor, right: Tensor, *_: Any, **__: Any) -> Axes:
    """Multiply, then add the first argument element by element."""
    product: Axes = {}
    if left.ndim == 3 and call.out.ndim == 2:
        for tensor in (left, right):
            call.freeze_tensor(tensor, "is summed over a batch of products")
    else:
        product = _product(call, left, right, None)
    call.labels.put(call.out, product)
    return call.combine([added, call.out], call.out.shape)


def _product(call: Call, left: Tensor, right: Tensor, bias: Tensor | None) -> Axes:
    """Multiply matrices, of which one may be a layer's weight."""
    inner_left, inner_right = left.ndim - 1, max(right.ndim - 2, 0)
    outer = max(left.ndim - 2, 0)
    a, b = call.axes(left), call.axes(right)
    if not a and not b:
        return {}
    if call.is_weight(right) and not call.is_weight(left):
        made = b.get(right.ndim - 1) if right.ndim > 1 else None
        return _weighted(call, left, inner_left, right, (b.get(inner_right), made), bias, call.out.ndim - 1)
    if call.is_weight(left) and not call.is_weight(right):
        made = a.get(outer) if left.ndim > 1 else None
        return _weighted(call, right, inner_right, left, (a.get(inner_left), made), bias, left.ndim - 2)
    axes = _product_of_activations(call, left, right, call.out.ndim)
    if bias is None:
        return axes
    call.labels.put(call.out, axes)
    return call.combine([bias, call.out], call.out.shape)


def _weighted(
    call: Call,
    x: Tensor,
    inner: int,
    weight: Tensor,
    channels: tuple[Labels | None, Labels | None],
    bias: Tensor | None,
    outer: int,
) -> Axes:
    """Multiply an activation with a weight, of which ``channels`` are those that it reads and those that it makes.

    Returns:
        The axes of the product: dimension ``inner`` of ``x`` is contracted, dimension ``outer`` of the result made.
    """
    axes, out = call.axes(x), call.out
    given, (wanted, made) = axes.get(inner), channels
    _read(call, given, wanted)
    result = {dim: labels for dim, labels in axes.items() if dim != inner}
    if weight.ndim == 3:
        batch = call.axes(weight).get(0)
        if 0 in axes and batch is not None:
            call.join(axes[0], batch)
        elif 0 in axes or batch is not None:
            for tensor in (x, weight):
                call.freeze_tensor(tensor, _UNKNOWN, [0])
    if made is not None:
        _make(call, made, bias)
        result[outer] = made
    positions = out.numel() // out.shape[outer] if out.ndim else 1
    _note_layer(
        call, "linear", weight, given, made, in_channels=x.shape[inner],
        out_channels=out.shape[outer] if out.ndim else 1, positions=positions, batch=positions,
    )  # fmt: skip
    return result


def _product_of_activations(call: Call, left: Tensor, right: Tensor, ndim: int) -> Axes:
    """Multiply two activations: batch dimensions join, the contracted one is kept whole."""
    a, b = call.axes(left), call.axes(right)
    reason = "is contracted with another activation"
    call.freeze_tensor(left, reason, [left.ndim - 1])
    call.freeze_tensor(right, reason, [max(right.ndim - 2, 0)])
    result: Axes = {}
    for dim in range(ndim - 2):
        result |= _join_dim(call, a.get(dim), b.get(dim), left.shape[dim], right.shape[dim], dim)
    if left.ndim > 1 and left.ndim - 2 in a and ndim >= left.ndim - 1:
        result[left.ndim - 2] = a[left.ndim - 2]
    if right.ndim > 1 and right.ndim - 1 in b:
        result[ndim - 1] = b[right.ndim - 1]
    return result


def _join_dim(call: Call, a: Labels | None, b: Labels | None, size_a: int, size_b: int, dim: int) -> Axes:
    """Join the labels of one dimension that two tensors share, by broadcasting."""
    if a is not None and b is not None:
        call.join(a, b)
        return {dim: a}
    one, other = (a, size_b) if a is not None else (b, size_a)
    if one is None:
        return {}
    if other > 1:
        call.freeze(one, _UNKNOWN)
    return {dim: one}


@rule("aten::mkldnn_rnn_layer")
def recurrent_layer(call: Call, x: Tensor, inner: Tensor, outer: Tensor, *args: Any) -> None:
    """Read the features of every step; the layer's state is kept whole, and so are the steps."""
    given = call.axes(x).get(x.ndim - 1)
    _read(call, given, call.axes(inner).get(1))
    call.freeze_tensor(x, "are the steps of a recurrent layer", range(x.ndim - 1))
    call.freeze_tensor(inner, "counts the state of a recurrent layer", [0])
    for tensor in (outer, *args[:4]):
        call.freeze_tensor(tensor, "counts the state of a recurrent layer")
    positions = x.numel() // x.shape[-1]
    for tensor, labels in ((inner, given), (outer, None)):
        rows, columns = tensor.shape
        made = call.axes(tensor).get(0)
        if made is not None:
            call.found.produced.append(made)
        call.uses(
            "linear", labels, made, weight=call.labels.source_of(tensor), owned=False, in_channels=columns,
            out_channels=rows, positions=positions, batch=positions,
        )  # fmt: skip


@rule(
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_attention_math",
    "aten::scaled_dot_product_attention",
)
def attention(call: Call, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Sequence[Axes]:
    """Join the heads of query, key and value; keep the head's own dimension and the tokens whole."""
    for tensor in (query, key):
        call.freeze_tensor(tensor, "is contracted between query and key", [tensor.ndim - 1])
    for tensor in (key, value):
        call.freeze_tensor(tensor, "is attended over", [tensor.ndim - 2])
    axes: Axes = {}
    last = query.ndim - 1
    for dim in range(last - 1):
        size = query.shape[dim]
        joined = _join_dim(call, call.axes(query).get(dim), call.axes(key).get(dim), size, key.shape[dim], dim)
        axes |= _join_dim(call, joined.get(dim), call.axes(value).get(dim), size, value.shape[dim], dim)
    if last - 1 in call.axes(query):
        axes[last - 1] = call.axes(query)[last - 1]
    if value.ndim - 1 in call.axes(value):
        axes[last] = call.axes(value)[value.ndim - 1]
    made = call.out if isinstance(call.out, (tuple, list)) else (call.out,)
    if len(made) > 1 and made[1].shape == made[0].shape[:-1]:
        # The logarithm of the sum over what is attended to, one for each query.
        return [axes, {dim: labels for dim, labels in axes.items() if dim < last}]
    return [axes]


@rule("aten::embedding")
def embedding(call: Call, weight: Tensor, indices: Tensor, *_: Any) -> Axes:
    """Make one channel for each column of the table; its rows are kept."""
    call.freeze_tensor(weight, "is looked up by index", [0])
    call.freeze_tensor(indices, "is used as an index")
    made = call.axes(weight).get(1)
    if made is None:
        return {}
    call.found.produced.append(made)
    return {call.out.ndim - 1: made}
